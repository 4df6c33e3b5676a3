"""One format has one reader, for a file and for a folder, and nothing in a file is lost."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from helpers.command_line import names
from helpers.example_rows import jsonl, said

from ia2.config import AdaptConfig, TrainConfig
from ia2.config.reading import load_config
from ia2.data.benchmarks import load_benchmark
from ia2.data.examples import Examples, RowFormat
from ia2.prompts.own_context import context_text
from ia2.utils.errors import DataError

FORMAT = RowFormat("{text}", " {label}")
ROWS = [{"text": "007", "label": "01"}, {"text": "1e5", "label": "true"}, {"text": "NA", "label": "1.10"}]
TABLES = (".csv", ".tsv")
ENDINGS = (".jsonl", ".ndjson", ".json", *TABLES, ".parquet")


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """Rows in the format of a file's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix in TABLES:
        mark = "," if path.suffix == ".csv" else "\t"
        lines = [mark.join(rows[0]), *(mark.join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        jsonl(path, *rows)
    return path


def parts(folder: Path, **files: str) -> Path:
    """Files named ``data/train-…`` and so on, with one row each for every letter."""
    for name, letters in files.items():
        path = folder / (name.replace("__", "/").replace("_", "-") + ".jsonl")
        write(path, [{"text": t, "label": t} for t in letters])
    return folder


def texts(folder: Path, **options: Any) -> str:
    return "".join(e.query for e in Examples.load(folder, format=FORMAT, **options))


def refusal(path: Path | str, *named: str, format: RowFormat = FORMAT, **options: Any) -> str:
    with pytest.raises(DataError) as info:
        Examples.load(path, format=format, **options)
    names(said(info), *named)
    return said(info)


# ----------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_folder_is_read_as_its_file_is(tmp_path: Path, ending: str) -> None:
    alone = Examples.load(write(tmp_path / f"rows{ending}"), format=FORMAT)
    assert alone.answers == [" 01", " true", " 1.10"]
    for inside in ("train", "data/train-00000-of-00001", "train/part", "rows"):
        folder = tmp_path / inside.replace("/", "-")
        write(folder / f"{inside}{ending}")
        found = Examples.load(folder, format=FORMAT)
        assert found.fingerprint == alone.fingerprint
        assert [e.fields for e in found] == [e.fields for e in alone]
        assert found[0].source == f"{folder.name}/{inside}{ending}:{1 + (ending in TABLES)}"
    path = write(tmp_path / f"long{ending}", [{"text": "x" * 150_000, "label": "y"}])
    assert len(Examples.load(path, format=FORMAT)[0].query) == 150_000


def test_splits(tmp_path: Path) -> None:
    files = {"data__train_00001_of_00002": "cd", "data__train_00000_of_00002": "ab"}
    many = parts(tmp_path / "many", **files, data__extra_00000_of_00001="x")
    for split, expected in {
        **{"train": "abcd", "extra": "x", "train[1:3]": "bc", "train[-1:]+extra": "dx"},
        "train[:50%]": "ab",
    }.items():
        assert texts(many, split=split) == expected
    refusal(many, f"{many}: ", "'test'", "'train', 'extra'", split="test")
    refusal(many, "'tran'", "Did you mean 'train'?", split="tran[:2]")
    refusal(many, "'train[a:b]'", split="train[a:b]")
    words = parts(tmp_path / "words", my_training="a", dev="b", evaluation="c", latest="d")
    assert [texts(words, split=s) for s in ("train", "validation", "test")] == ["a", "b", "c"]
    folders = parts(tmp_path / "br[1]*?", test__a="c", train__b="b", train__a="a")
    assert (texts(folders), texts(folders, split="test")) == ("ab", "c")
    # a split in files of several types is not read twice: usually these are the same rows, saved twice
    both = parts(tmp_path / "both", train="ab", test="c")
    write(both / "train.csv")
    line = refusal(both, "'train'", ".csv, .jsonl")
    assert len(Examples.load(line.split("such as ")[1], format=FORMAT)) == 3
    assert texts(both, split="test") == "c"


def test_configurations(tmp_path: Path) -> None:
    folder = parts(tmp_path / "tongues", de__train="a", en__train="b", en__test="c")
    line = refusal(folder, "'train'", "'de', 'en'")
    assert texts(Path(line.rsplit("such as ", 1)[1])) == "b"
    assert texts(folder, config="en", split="test") == "c"
    refusal(folder, "'fr'", "'de', 'en'", config="fr")
    readme = folder / "README.md"
    readme.write_text(
        "---\nconfigs:\n- config_name: german\n  data_files: de/train.jsonl\n"
        "- config_name: english\n  data_files:\n  - split: train\n    path: en/tr*\n"
        "  - split: test\n    path: ['en/test.*']\n---\n# Tongues\n"
    )
    assert (texts(folder, config="german"), texts(folder, config="english", split="test")) == ("a", "c")
    refusal(folder, "'german', 'english'")
    refusal(folder, "'germn'", "Did you mean 'german'?", config="germn")
    readme.write_text("---\nconfigs: [\n---\n")
    refusal(folder, "README.md: ", "YAML")


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    write(saved / "state.json").rename(saved / "dataset_info.json")
    write(saved / "state.json")
    assert "dataset_info.json" not in refusal(saved, "save_to_disk")
    write(tmp_path / "mixed" / "b.jsonl")
    (tmp_path / "mixed" / "a.csv").write_text('text,text\n"')
    line = refusal(tmp_path / "mixed", ".csv, .jsonl")
    assert len(Examples.load(line.rsplit("such as ", 1)[1], format=FORMAT)) == 3
    refusal(parts(tmp_path / "two", test_train="a"), "test-train.jsonl")
    line = refusal(parts(tmp_path / "deep", one__two__rows="a"))
    assert texts(Path(line.rsplit("such as ", 1)[1])) == "a"
    for name, make, reason in (
        ("train.jsonl.gz", lambda path: path.write_bytes(gzip.compress(b"{}")), "gunzip"),
        ("train.jsonl", os.mkfifo, "pipe"),
    ):
        (tmp_path / reason).mkdir()
        make(tmp_path / reason / name)
        refusal(tmp_path / reason, name, reason)
    bad = parts(tmp_path / "bad", train="ab", test="c")
    (bad / "train.jsonl").write_text('{"text": "a", "label": "b"}\n{\n[]\n')
    refusal(bad, "2 bad rows", "bad/train.jsonl:2: ", "bad/train.jsonl:3: ")


def test_the_whole_disk_is_not_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal("/").startswith("/: ")
    home = tmp_path / "home"
    write(home / "project" / "1" / "src" / "deep" / "rows.jsonl")
    (home / "again").symlink_to(home)
    monkeypatch.setenv("HOME", str(home))
    refusal("~", "~: ", ".jsonl")
    for i in range(10_001):
        (home / f"{i}.txt").touch()
    refusal("~", "~: ", "10,000")


def test_a_benchmark_whose_split_is_there_twice(tmp_path: Path) -> None:
    entry = tmp_path / "own.yaml"
    entry.write_text(
        "name: Own\npath: own\ntest: {split: test, rows: 9}\nprompt: '{text}'\nlabel: label\n"
        "verbalisers: {w: {x: ' a', y: ' b'}}\n"
    )
    rows = [{"text": f"{i}", "label": "xy"[i % 2]} for i in range(4)]
    write(tmp_path / "own" / "test.jsonl", rows)
    assert len(load_benchmark(entry).load().test) == 4
    write(tmp_path / "own" / "test.csv", rows)
    with pytest.raises(DataError, match=r"split test .*test\.jsonl .*test\.csv"):
        load_benchmark(entry).load()


# -------------------------------------------------------------------------------- text, and others


def test_quotation_marks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def answers(name: str, text: str, *warned: str) -> list[str]:
        (tmp_path / name).write_text(text)
        caplog.clear()
        found = Examples.load(tmp_path / name, format=FORMAT)
        assert len(caplog.records) == bool(warned)
        names(caplog.text, *warned)
        return [f"{e.query}|{e.answer}" for e in found]

    # a TSV file has none
    found = answers("a.tsv", 'text\tlabel\n" a lone one\tx\nfine, "so"\ty\na ""b"" c\tx\n')
    assert found == ['" a lone one| x', 'fine, "so"| y', 'a ""b"" c| x']
    assert answers("a.tsv", 'text\tlabel\na\tx\n"b ""c"""\tx\n"d"\tx\n', "a.tsv:3")[1] == '"b ""c"""| x'
    # those of a CSV file may swallow lines
    assert len(answers("a.csv", 'text,label\na,x\n"b,x\nc,x\nd",x\n"two\nlines",x\n', "a.csv:3")) == 3
    (tmp_path / "a.csv").write_text('text,label\na,x\n"b,x\nc,x\n"d",x\ne,x,x\n')
    refusal(tmp_path / "a.csv", "2 bad rows: a.csv:3: ", "lines 3 to 5", "a.csv:6: ")
    # behind a blank they do not quote, and were part of every label
    assert answers("a.csv", 'text,label\n"a", "x"\n"b", x\n', "a.csv:2") == ['a|  "x"', "b|  x"]


def test_a_table_with_another_separator(tmp_path: Path) -> None:
    for ending, mark in ((".csv", ";"), (".csv", "\t"), (".tsv", ",")):
        path = tmp_path / f"a{ending}"
        path.write_text(f"text{mark}label\na{mark}b\n")
        assert "Did you mean" not in refusal(path, "cells are separated by commas in .csv files")


@pytest.mark.parametrize("ending", ENDINGS[:-1])
def test_many_columns(tmp_path: Path, ending: str) -> None:
    row = {f"column {i}": str(i) for i in range(100_000)}
    path = write(tmp_path / f"a{ending}", [row, {**row, "column 3": " "}])
    assert Examples.load(path, format=RowFormat("{column 7}", " {column 99999}")).answers == [" 99999"] * 2
    refusal(path, "(100000 in all)")
    refusal(path, "1 bad row: ", format=RowFormat("{column 7}", "{column 3}"))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ('{"text": "a", "label": "b", "text": "c"}', "the key 'text' is there twice in one object"),
        ('{"text": "a", "label": "b", "x": [{"y": 1, "y": 2}]}', "the key 'y' is there twice"),
        ('{"text": "a", "label": NaN}', "NaN is no JSON: write null, or a text"),
        ('{"text": "a", "label": -Infinity}', "-Infinity is no JSON"),
        ('{"text": "a", "label": ' + "9" * 5000 + "}", "a number of 5000 digits: write it as text"),
        ('{"text": "a", "label": 1e999}', "'1e999' is too large a number: write it as text"),
        ('{"text": "a", "label": ' + "[" * 90_000 + "]" * 90_000 + "}", "nested too deep"),
        ('{"text": "a", "label": "b"} {}', "Extra data"),
        ('{"text": "a\0", "label": "b"}', "Invalid control character"),
    ],
    ids=lambda value: value[:40],
)
def test_json_of_which_something_would_be_lost(tmp_path: Path, value: str, reason: str) -> None:
    good = '{"text": "a", "label": "b"}'
    refusal(jsonl(tmp_path / "a.jsonl", good, value, good), "1 bad row: a.jsonl:2: invalid JSON", reason)
    path = tmp_path / "a.json"
    path.write_text(f"[{good},\n{value}]")
    refusal(path, f"{path}: invalid JSON")


@pytest.mark.parametrize("ending", ENDINGS[:-1])
def test_encodings(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"a{ending}", [{"text": "größer", "label": "x"}] * 3)
    alone = Examples.load(path, format=FORMAT)
    text = path.read_text(encoding="utf-8")
    path.write_text(text, encoding="utf-8-sig")
    assert Examples.load(path, format=FORMAT).fingerprint == alone.fingerprint
    for ends in ("\r\n", "\r"):
        path.write_bytes(text.replace("\n", ends).encode())
        assert [e.source for e in Examples.load(path, format=FORMAT)] == [e.source for e in alone]
    for content, reason in (
        (text.encode("utf-16"), "not UTF-8 text; it is "),
        (gzip.compress(text.encode()), "gzip"),
        (b"PK\x03\x04" + b"sheet", "spreadsheet"),
    ):
        path.write_bytes(content)
        refusal(path, reason)
    if ending in TABLES:
        lines = write(path, ROWS).read_bytes().splitlines()
        path.write_bytes(b"\n".join([*lines[:2], "größer\tx".encode("latin-1"), b"a\0b\tx", *lines[2:]]))
        refusal(path, f"a{ending}:3: not UTF-8 text", "NUL")


@pytest.mark.parametrize("ending", TABLES)
def test_headers(tmp_path: Path, ending: str) -> None:
    mark, path = "," if ending == ".csv" else "\t", tmp_path / f"a{ending}"
    for head, rows, *named in (
        (["text", "label", "", ""], 1, f"a{ending}:1: ", "(3, 4)"),
        (["text", "label", "text"], 1, f"a{ending}:1: ", "'text'"),
        (["text", "label"], 0, "empty"),
    ):
        path.write_text("\n".join([mark.join(head), *[mark.join("x" for _ in head)] * rows]) + "\n")
        refusal(path, f"a{ending}", *named)
    path.write_text(f"{mark}text{mark}label\n0{mark}a{mark}b\n")  # the row numbers of a data frame
    assert len(Examples.load(path, format=FORMAT)) == 1


def test_files_of_settings_and_contexts(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("seed: 3\n", encoding="utf-8-sig")
    assert load_config(TrainConfig, tmp_path / "s.yaml", {}).seed == 3
    os.mkfifo(tmp_path / "context.txt")
    with pytest.raises(DataError, match=r"context_file: .*context\.txt.* pipe"):
        context_text(AdaptConfig(context_file=str(tmp_path / "context.txt")))


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"text {i}" for i in range(3000)], "label": ["x", "y", "z"] * 1000})
    pyarrow.parquet.write_table(table, path, write_page_checksum=True)
    whole = path.read_bytes()
    flipped = [
        whole[:place] + bytes([whole[place] ^ 0x40]) + whole[place + 1 :] for place in (100, len(whole) // 2)
    ]
    for damaged in (b"", whole[: len(whole) // 2], b"PAR1" * 10, *flipped):
        path.write_bytes(damaged)
        refusal(path, "a.parquet: not a sound Parquet file")
    columns = [table["text"], table["label"], table["label"]]
    twice = pyarrow.Table.from_arrays(columns, ["text", "label", "label"])
    pyarrow.parquet.write_table(twice, path)
    refusal(path, "column 'label' is there twice")
    # a moment that Python lacks
    late = pyarrow.array([0, 10**17, 0], pyarrow.int64()).cast(pyarrow.timestamp("ms"))
    write_late = pyarrow.table({"text": ["a", "b", "c"], "label": ["x", "y", "x"], "when": late})
    pyarrow.parquet.write_table(write_late, path)
    assert Examples.load(path, format=FORMAT).answers == [" x", " y", " x"]
    refusal(path, "1 bad row: a.parquet:2: ", "'when'", format=RowFormat("{text} {when}", "{label}"))


def test_json_rows_can_be_written_back(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b", "label": 'x"\\'}]
    path = jsonl(tmp_path / "a.jsonl", *(json.dumps(row, ensure_ascii=False) for row in rows))
    assert [example.fields for example in Examples.load(path, format=FORMAT)] == rows
