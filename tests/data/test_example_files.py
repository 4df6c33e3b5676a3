"""Examples from files, from folders in hub layout, and from the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import names
from helpers.example_rows import REVIEWS, jsonl, said

from ia2.data.examples import Examples, RowFormat
from ia2.utils.errors import ConfigError, DataError


def test_jsonl(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "reviews.jsonl", {"text": "ä\u2028b", "label": 0}, "", {"text": "c", "label": 1})
    examples = Examples.from_file(path, format=REVIEWS)
    assert examples.name == "reviews.jsonl"
    assert [example.source for example in examples] == ["reviews.jsonl:1", "reviews.jsonl:3"]
    assert examples[0].query == "Text: ä\u2028b\nLabel:"
    for suffix in (".ndjson", ".json", ".JSONL"):
        other = path.rename(path.with_suffix(suffix))
        assert Examples.from_file(str(other), format=REVIEWS).fingerprint == examples.fingerprint
        path = other


def test_jsonl_with_a_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}\r\n\r\n')
    assert Examples.from_file(path).answers == ["b"]


def test_every_fault_of_a_jsonl_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(
        b'{"prompt": "a", "completion": "b"}\n'
        b'{"prompt": "a" "completion": "b"}\n'
        b'["a", "b"]\n'
        b'{"prompt": "caf\xe9", "completion": "b"}\n'
        b'{"prompt": "a", "completion": ""}\n'
        b'{"prompt": "a"}\n'
        b"\n"
        b'{"prompt": "a", "completion": NaN}\n' + b'{"prompt": "a", "completion": "b"'
        b"\n" + b"[" * 100_000 + b"\n"
    )
    with pytest.raises(DataError) as info:
        Examples.from_file(path)
    message = said(info)
    assert message.startswith(f"{path}: 8 bad rows: bad.jsonl:2: invalid JSON at column 16 (Exp")
    for part in (
        "bad.jsonl:3: not an object with columns but a list",
        "bad.jsonl:4: not UTF-8 text (byte 16 of the line)",
        "bad.jsonl:5: empty completion ('completion')",
        "bad.jsonl:6: no column 'completion'",
        "bad.jsonl:8: invalid JSON (NaN is no JSON: write null, or a text in quotation marks)",
        "bad.jsonl:9: invalid JSON at column ",
        "bad.jsonl:10: invalid JSON (brackets are nested too deep)",
    ):
        assert part in message


def test_a_json_array(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('\n[{"prompt": "a",\n"completion": "b"}, {"prompt": "c", "completion": "d"}]')
    examples = Examples.from_file(path)
    assert [(e.source, e.query, e.answer) for e in examples] == [
        ("a.json:1", "a", "b"),
        ("a.json:2", "c", "d"),
    ]
    path.write_text('[{"prompt": "a"},\n{"completion" "b"}]')
    with pytest.raises(DataError, match=r"a\.json: invalid JSON at line 2, column 15"):
        Examples.from_file(path)
    path.write_text('[{"prompt": "a", "completion": "b"},\n["x"], {"prompt": "c"}]')
    with pytest.raises(DataError, match=r"2 bad rows: a\.json:2: .*; a\.json:3: .*'completion'"):
        Examples.from_file(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "a.json"])
@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_files(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=rf"{name} is empty"):
        Examples.from_file(path)


def test_csv_and_tsv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbftext,label\r\n"one, ""two""\nthree",0\r\n\r\nfour,1\r\n"five\n\nsix",1')
    examples = Examples.from_file(path, format=REVIEWS)
    assert [example.source for example in examples] == ["a.csv:2", "a.csv:5", "a.csv:6"]
    assert examples[0].fields == {"text": 'one, "two"\nthree', "label": "0"}
    assert examples.raw_labels == {" negative": "0", " positive": "1"}
    path = tmp_path / "a.tsv"
    path.write_text("text\tlabel\na, b\t1\n")
    assert Examples.from_file(path, format=REVIEWS)[0].query == "Text: a, b\nLabel:"


def test_every_fault_of_a_csv_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'text,label\na,b,0\na\n"x\ny",2\ncaf\xe9,0\nfine,0\n"a"b,0\n,1\na,\n"never closed,0\n\n'
    )
    with pytest.raises(DataError) as info:
        Examples.from_file(path, format=REVIEWS)
    message = said(info)
    assert f"{path}: 8 bad rows: " in message
    for part in (
        "a.csv:2: 3 values for the 2 columns 'text', 'label'",
        "a.csv:3: 1 value for the 2 columns",
        "a.csv:4: column 'label' has the label '2'",
        "a.csv:6: not UTF-8 text",
        "a.csv:8: invalid CSV (",
        "a.csv:9: empty prompt ('text')",
        "a.csv:10: empty completion ('label')",
        "a.csv:11: a quote is never closed",
    ):
        assert part in message


def test_csv_headers(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\n")
    with pytest.raises(DataError, match="is empty"):
        Examples.from_file(path, format=REVIEWS)
    path.write_text("text,text,label\na,b,0\n")
    with pytest.raises(DataError, match=r"a\.csv:1: .*'text'"):
        Examples.from_file(path, format=REVIEWS)
    path.write_text("text;label\na;0\n")
    with pytest.raises(DataError, match="there are 'text;label'"):
        Examples.from_file(path, format=REVIEWS)


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["a", "b", None], "label": [0, 1, 1]})
    parquet.write_table(table.slice(0, 2), path, row_group_size=1)
    examples = Examples.from_file(path, format=REVIEWS)
    assert [example.source for example in examples] == ["a.parquet:1", "a.parquet:2"]
    assert examples.answers == [" negative", " positive"]
    parquet.write_table(table, path)
    with pytest.raises(DataError, match=r"a\.parquet:3: column 'text' is missing \(null\)"):
        Examples.from_file(path, format=REVIEWS)
    parquet.write_table(table.slice(0, 0), path)
    with pytest.raises(DataError, match="is empty"):
        Examples.from_file(path, format=REVIEWS)
    path.write_bytes(b"no parquet at all")
    with pytest.raises(DataError, match="not a sound Parquet file") as info:
        Examples.from_file(path, format=REVIEWS)
    said(info)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    jsonl(tmp_path / "reviews.jsonl", {})
    (tmp_path / "a.xlsx").touch()
    (tmp_path / "folder.csv").mkdir()
    for load in (Examples.from_file, Examples.load):
        with pytest.raises(DataError, match=r"review\.jsonl: .*Did you mean 'reviews"):
            load(str(tmp_path / "review.jsonl"))
        with pytest.raises(DataError, match=r"a\.csv: .*nowhere"):
            load(str(tmp_path / "nowhere" / "a.csv"))
        with pytest.raises(DataError, match=r"'\.xlsx'.*\.jsonl, .*\.parquet"):
            load(tmp_path / "a.xlsx")
    for load in (Examples.from_file, Examples.load, Examples.from_hub):
        with pytest.raises(DataError, match=r"cannot be opened .*too long"):
            load("x" * 5000 + ".csv")
    with pytest.raises(DataError, match=r"folder\.csv"):
        Examples.from_file(tmp_path / "folder.csv")


def test_a_folder_in_hub_layout(offline: Path) -> None:
    folder = offline / "reviews"
    folder.mkdir()
    jsonl(folder / "train.jsonl", {"text": "a", "label": 0}, {"text": "b", "label": 1})
    jsonl(folder / "test.jsonl", {"text": "c", "label": 1})
    examples = Examples.load("reviews", format=REVIEWS)
    assert examples.name == "reviews"
    assert [example.source for example in examples] == [
        "reviews/train.jsonl:1",
        "reviews/train.jsonl:2",
    ]
    assert examples.raw_labels == {" negative": 0, " positive": 1}
    test = Examples.from_hub(folder, split="test", format=REVIEWS)
    assert test[0].source == "reviews/test.jsonl:1"
    assert len(Examples.load(str(folder), split="train[:1]", format=REVIEWS)) == 1
    assert len(Examples.load(folder, split="train", format=REVIEWS, labelled=False)) == 2
    with pytest.raises(DataError) as info:
        Examples.load("reviews", split="tset", format=REVIEWS)
    names(said(info), "reviews: ", "'tset'", "'train', 'test'", "Did you mean 'test'?")
    with pytest.raises(DataError, match=r"reviews\[train\]: .*'\{txt\}'"):
        Examples.load("reviews", format=RowFormat("{txt}", "{label}"))
    bad = RowFormat("{text}", " {label}", {"0": "x"})
    with pytest.raises(DataError, match=r"1 bad row: reviews/train\.jsonl:2: column 'label'"):
        Examples.load("reviews", format=bad)
    with pytest.raises(ConfigError, match="it has no revision 'v1'"):
        Examples.load("reviews", revision="v1")


def test_class_labels_stay_integers(offline: Path) -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    folder = offline / "csv"
    (folder / "data").mkdir(parents=True)
    data.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    examples = Examples.load("csv", format=REVIEWS)
    assert examples.answers == [" positive", " negative"]
    assert examples.raw_labels == {" negative": 0, " positive": 1}


def test_which_split(offline: Path) -> None:
    row = {"prompt": "a", "completion": "b"}
    for folder, splits in (("one", ["test"]), ("two", ["validation", "test"])):
        (offline / folder).mkdir()
        for name in splits:
            jsonl(offline / folder / f"{name}.jsonl", row)
    assert Examples.load("one")[0].source == "one/test.jsonl:1"
    with pytest.raises(DataError, match=r"two: .*'validation', 'test'"):
        Examples.load("two")


def test_folders_without_usable_files(offline: Path) -> None:
    (offline / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: .*\.jsonl, "):
        Examples.load("empty")
    (offline / "broken").mkdir()
    (offline / "broken" / "train.jsonl").write_text('{"prompt": \n')
    with pytest.raises(DataError, match=r"1 bad row: broken/train\.jsonl:1: ") as info:
        Examples.load("broken")
    assert said(info).startswith("broken[train]: ")


def test_the_hub_cannot_be_reached(offline: Path) -> None:
    with pytest.raises(DataError, match=r"owner/name: .*HF_HUB_OFFLINE"):
        Examples.load("owner/name")
    (offline / "data").mkdir()
    jsonl(offline / "data" / "reviews.jsonl", {})
    with pytest.raises(DataError, match=r"Did you mean 'reviews\.jsonl'\?"):
        Examples.load("data/reviews")


def test_what_the_hub_says_comes_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    error: Exception = ValueError("Config name is missing.\nPlease pick one: ['a', 'b']")
    with pytest.raises(DataError, match=r"missing\. Please pick one: \['a', 'b'\]") as info:
        Examples.load("owner/name")
    said(info)
    error = datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' doesn't exist " * 50)
    with pytest.raises(DataError, match="log in with `hf auth login`") as info:
        Examples.load("owner/name")
    assert len(said(info)) < 600


def test_what_reaches_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return [{"prompt": "a", "completion": "b"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    examples = Examples.load("o/n", split="test", config="c", revision="r")
    assert asked == [(("o/n", "c"), {"split": "test", "revision": "r"})]
    assert (examples.name, examples[0].source) == ("o/n", "o/n[test]:1")


@pytest.mark.parametrize("source", ["imdb", "/no/such", "./reviews", "a/b/c", "~x/y", "a/b.csv"])
def test_what_is_not_taken_for_a_hub_id(source: str) -> None:
    with pytest.raises(DataError, match="no such file"):
        Examples.load(source)


def test_a_file_has_no_splits(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"})
    assert len(Examples.load(str(path))) == 1
    for option in ("split", "config", "revision"):
        with pytest.raises(ConfigError, match=f"it has no {option} 'x'"):
            Examples.load(path, **{option: "x"})
