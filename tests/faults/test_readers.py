"""One format has one reader, and every file that cannot be read is one line, at once."""

from __future__ import annotations

import gzip
import json
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import names, run, write_rows
from helpers.example_rows import jsonl, said

from ia2.data.examples import Examples, RowFormat
from ia2.utils.errors import DataError, UserError

FORMAT = RowFormat("{text}", " {label}")
ROWS = [{"text": "007", "label": "01"}, {"text": "1e5", "label": "true"}, {"text": "NA", "label": "1.10"}]
ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


@pytest.fixture(autouse=True)
def a_minute() -> Iterator[None]:
    """What waits for a pipe, or takes hours, fails instead."""

    def late(*_: Any) -> None:
        raise AssertionError("more than a minute")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """Rows in the format of a file's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ending, columns = path.suffix, list(rows[0])
    if ending == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif ending in (".csv", ".tsv"):
        mark = "," if ending == ".csv" else "\t"
        lines = [mark.join(columns), *(mark.join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        jsonl(path, *rows)
    return path


def refusal(path: Path | str, format: RowFormat = FORMAT, **options: Any) -> str:
    with pytest.raises(DataError) as info:
        Examples.load(path, format=format, **options)
    return said(info)


# The same rows from a file and from a folder


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
        line = 1 + (ending in (".csv", ".tsv"))
        assert found[0].source == f"{folder.name}/{inside}{ending}:{line}"


def parts(folder: Path, **files: str) -> Path:
    """Files named ``data/train-…`` and so on, with one row each for every letter."""
    for name, letters in files.items():
        write(
            folder / (name.replace("__", "/").replace("_", "-") + ".jsonl"),
            [{"text": t, "label": t} for t in letters],
        )
    return folder


def texts(folder: Path, **options: Any) -> str:
    return "".join(e.query for e in Examples.load(folder, format=FORMAT, **options))


def test_layouts(tmp_path: Path) -> None:
    many = parts(
        tmp_path / "many",
        data__train_00001_of_00002="cd",
        data__train_00000_of_00002="ab",
        data__extra_00000_of_00001="x",
    )
    assert texts(many) == "abcd"
    assert texts(many, split="extra") == "x"
    assert texts(many, split="train[1:3]") == "bc"
    assert texts(many, split="train[-1:]+extra") == "dx"
    assert texts(many, split="train[:50%]") == "ab"
    names(refusal(many, split="test"), f"{many}: ", "'test'", "'train', 'extra'")
    names(refusal(many, split="tran[:2]"), "'tran'", "Did you mean 'train'?")
    names(refusal(many, split="train[a:b]"), "'train[a:b]'")
    words = parts(tmp_path / "words", my_training="a", dev="b", evaluation="c", latest="d")
    assert [texts(words, split=s) for s in ("train", "validation", "test")] == ["a", "b", "c"]
    folders = parts(tmp_path / "folders", test__a="c", train__b="b", train__a="a")
    assert (texts(folders), texts(folders, split="test")) == ("ab", "c")
    plain = parts(tmp_path / "plain", one="a", two="b")
    assert texts(plain) == "ab"


def test_a_split_in_files_of_several_types_is_not_read_twice(tmp_path: Path) -> None:
    """Usually these are the same rows, saved twice."""
    folder = parts(tmp_path / "both", train="ab", test="c")
    write(folder / "train.csv")
    line = refusal(folder)
    names(line, "'train'", ".csv, .jsonl")
    suggested = line.split("such as ")[1]
    assert len(Examples.load(suggested, format=FORMAT)) == 3
    assert texts(folder, split="test") == "c"


def test_a_folder_with_glob_characters_in_its_name(tmp_path: Path) -> None:
    assert texts(parts(tmp_path / "br[1]*?", train="ab", test="c"), split="test") == "c"


def test_configurations(tmp_path: Path) -> None:
    folder = parts(tmp_path / "tongues", de__train="a", en__train="b", en__test="c")
    line = refusal(folder)
    names(line, "'train'", "'de', 'en'")
    assert texts(Path(line.rsplit("such as ", 1)[1])) == "b"
    assert texts(folder, config="en", split="test") == "c"
    names(refusal(folder, config="fr"), "'fr'", "'de', 'en'")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: german\n  data_files: de/train.jsonl\n"
        "- config_name: english\n  data_files:\n  - split: train\n    path: en/tr*\n"
        "  - split: test\n    path: ['en/test.*']\n---\n# Tongues\n"
    )
    assert texts(folder, config="german") == "a"
    assert texts(folder, config="english", split="test") == "c"
    names(refusal(folder), "'german', 'english'")
    names(refusal(folder, config="germn"), "'germn'", "Did you mean 'german'?")
    readme = folder / "README.md"
    readme.write_text(
        readme.read_text().replace("  data_files: de", "  default: true\n  data_files: '**/no'\n  x: de")
    )
    names(refusal(folder), "README.md: ", "'**/no'", "'train'")
    readme.write_text("---\nconfigs: [\n---\n")
    names(refusal(folder), "README.md: ", "YAML")


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    jsonl(write(saved / "state.json"), {}).rename(saved / "dataset_info.json")
    jsonl(saved / "state.json", {})
    line = refusal(saved)
    assert "save_to_disk" in line
    assert "dataset_info.json" not in line
    mixed = tmp_path / "mixed"
    (mixed / "a.csv").parent.mkdir()
    (mixed / "a.csv").write_text('text,text\n"')
    write(mixed / "b.jsonl")
    line = refusal(mixed)
    assert ".csv, .jsonl" in line
    assert len(Examples.load(line.rsplit("such as ", 1)[1], format=FORMAT)) == 3
    names(refusal(parts(tmp_path / "two", test_train="a")), "test-train.jsonl")
    deep = parts(tmp_path / "deep", one__two__rows="a")
    line = refusal(deep)
    assert texts(Path(line.rsplit("such as ", 1)[1])) == "a"
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "train.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    names(refusal(packed), "train.jsonl.gz", "gunzip")
    piped = tmp_path / "piped"
    piped.mkdir()
    os.mkfifo(piped / "train.jsonl")
    names(refusal(piped), "train.jsonl", "pipe")
    bad = parts(tmp_path / "bad", train="ab", test="c")
    (bad / "train.jsonl").write_text('{"text": "a", "label": "b"}\n{\n[]\n')
    line = refusal(bad)
    names(line, "2 bad rows", "bad/train.jsonl:2: ", "bad/train.jsonl:3: ")


def test_the_whole_disk_is_not_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal("/").startswith("/: ")
    home = tmp_path / "home"
    for i in range(30):
        for j in range(30):
            (home / f"project {i}" / f"{j}" / "src" / "deep").mkdir(parents=True)
    write(home / "project 1" / "1" / "src" / "deep" / "rows.jsonl")
    (home / "again").symlink_to(home)
    monkeypatch.setenv("HOME", str(home))
    names(refusal("~"), "~: ", ".jsonl")
    for i in range(10_001):
        (home / f"{i}.txt").touch()
    names(refusal("~"), "~: ", "10,000")


# Text, and what is none


def test_tsv_has_no_quotation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\n" a lone one\tx\nfine, "so"\ty\n"\tx\na ""b"" c\tx\n')
    found = Examples.load(path, format=FORMAT)
    assert [e.query for e in found] == ['" a lone one', 'fine, "so"', '"', 'a ""b"" c']
    assert found[-1].source == "a.tsv:5"
    assert not caplog.records
    path.write_text('text\tlabel\na\tx\n"b ""c"""\tx\n"d"\tx\n')
    assert Examples.load(path, format=FORMAT)[1].query == '"b ""c"""'
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    names(record.getMessage(), "a.tsv: ", "a.tsv:3", "2")


def test_quotation_marks_of_csv_that_swallow_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,label\na,x\n"b,x\nc,x\nd,x\n')
    names(refusal(path), "1 bad row: a.csv:3: ", "lines 3 to 5")
    path.write_text('text,label\na,x\n"b,x\nc,x\n"d",x\ne,x,x\n')
    line = refusal(path)
    names(line, "2 bad rows: a.csv:3: ", "lines 3 to 5", "a.csv:6: ")
    assert not caplog.records
    path.write_text('text,label\na,x\n"b,x\nc,x\nd",x\n"two\nlines",x\n')
    assert len(Examples.load(path, format=FORMAT)) == 3
    (record,) = caplog.records
    assert "a.csv:3" in record.getMessage()


def test_quotation_marks_of_csv_behind_a_blank(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They do not quote there, and were part of every label."""
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"a", "x"\n"b", x\n"say ""c""",y\n')
    assert [e.answer for e in Examples.load(path, format=FORMAT)] == ['  "x"', "  x", " y"]
    (record,) = caplog.records
    assert "a.csv:2" in record.getMessage()


@pytest.mark.parametrize("ending", ENDINGS)
def test_long_cells(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"a{ending}", [{"text": "x" * 150_000, "label": "y"}])
    assert len(Examples.load(path, format=FORMAT)[0].query) == 150_000


@pytest.mark.parametrize("ending", ENDINGS[:-1])
def test_many_columns(tmp_path: Path, ending: str) -> None:
    row = {f"column {i}": str(i) for i in range(200_000)}
    path = write(tmp_path / f"a{ending}", [row, row])
    format = RowFormat("{column 7}", " {column 199999}")
    assert Examples.load(path, format=format).answers == [" 199999"] * 2
    assert "(200000 in all)" in refusal(path)
    assert "--completion-template ' {column 199999}'" in refusal(path, RowFormat())
    path = write(tmp_path / f"b{ending}", [row, {**row, "column 3": " "}])
    assert "1 bad row: " in refusal(path, RowFormat("{column 7}", "{column 3}"))


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
    path = jsonl(tmp_path / "a.jsonl", good, value, good)
    line = refusal(path)
    assert "1 bad row: a.jsonl:2: invalid JSON" in line
    assert reason in line
    path = tmp_path / "a.json"
    path.write_text(f"[{good},\n{value}]")
    assert f"{path}: invalid JSON" in refusal(path)


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
    for encoding in ("utf-16", "utf-16-be"):
        path.write_text(text, encoding=encoding)
        assert "not UTF-8 text; it is " in refusal(path)
    rows = [{"text": "fine", "label": "x"}, {"text": "größer", "label": "x"}, {"text": "a\0b", "label": "x"}]
    path = write(tmp_path / f"b{ending}", rows)
    first = 2 if ending in (".csv", ".tsv") else 1
    text = json.dumps(rows[1], ensure_ascii=False) if first == 1 else path.read_text().splitlines()[2]
    lines = path.read_bytes().splitlines()
    lines[first] = text.encode("latin-1")
    path.write_bytes(b"\n".join(lines) + b"\n")
    line = refusal(path, FORMAT) if first == 2 else refusal(path, RowFormat("{text}", "{nowhere}"))
    assert f"b{ending}:{first + 1}: not UTF-8 text" in line or "nowhere" in line
    if first == 2:
        assert f"b{ending}:4: a NUL byte" in line or "line contains NUL" in line
    path.write_bytes(gzip.compress(text.encode()))
    assert "gzip" in refusal(path)
    path.write_bytes(b"PK\x03\x04" + b"sheet")
    assert "spreadsheet" in refusal(path)


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_headers(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"

    def header(*names: str, rows: int = 1) -> Path:
        mark = "," if ending == ".csv" else "\t"
        cells = mark.join("x" for _ in names)
        path.write_text("\n".join([mark.join(names), *[cells] * rows]) + "\n")
        return path

    # the row numbers of a data frame
    assert len(Examples.load(header("", "text", "label"), format=FORMAT)) == 1
    names(refusal(header("text", "label", "", "")), f"a{ending}:1: ", "(3, 4)")
    names(refusal(header("text", "label", "text")), f"a{ending}:1: ", "'text'")
    names(refusal(header("text", "label", rows=0)), f"a{ending}", "empty")
    path.write_text("")
    names(refusal(path), f"a{ending}", "empty")
    path.write_text(header("text", "label", rows=3).read_text() + "x\n")
    names(refusal(path), f"1 bad row: a{ending}:5: ")


def test_files_of_another_type(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}'))
    names(refusal(path), "a.jsonl.gz", "gunzip")
    path = path.rename(tmp_path / "a.xlsx")
    names(refusal(path), "'.xlsx'", ".jsonl")


# Parquet


def test_parquet_values_that_python_lacks(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    late = pyarrow.array([0, 10**17, 0], pyarrow.int64()).cast(pyarrow.timestamp("ms"))
    table = pyarrow.table({"text": ["a", "b", "c"], "label": ["x", "y", "x"], "when": late})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path)
    assert Examples.load(path, format=FORMAT).answers == [" x", " y", " x"]
    line = refusal(path, RowFormat("{text} {when}", "{label}"))
    names(line, "1 bad row: a.parquet:2: ", "'when'")


def test_parquet_that_is_damaged(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": [f"text {i}" for i in range(3000)], "label": ["x", "y", "z"] * 1000})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path, write_page_checksum=True)
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], whole[len(whole) // 2 :], b"PAR1" * 10):
        path.write_bytes(damaged)
        assert "a.parquet: not a sound Parquet file" in refusal(path)
    for place in (100, len(whole) // 3, len(whole) // 2):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x40]) + whole[place + 1 :])
        assert "a.parquet: not a sound Parquet file" in refusal(path)
    twice = pyarrow.Table.from_arrays(
        [table["text"], table["label"], table["label"]], ["text", "label", "label"]
    )
    pyarrow.parquet.write_table(twice, path)
    assert "column 'label' is there twice" in refusal(path)


# What is no regular file

Kind = Callable[[Path], object]


def _socket(path: Path) -> object:
    opened = socket.socket(socket.AF_UNIX)
    opened.bind(str(path))
    return opened


KINDS: dict[str, tuple[Kind, str]] = {
    "pipe": (lambda path: os.mkfifo(path), "is a pipe, not a regular file"),
    "socket": (_socket, "is a socket, not a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device, not a regular file"),
    "folder": (lambda path: path.mkdir(), "is a folder, not a file"),
    "loop": (lambda path: path.symlink_to(path), "symbolic link"),
    "nowhere": (lambda path: path.symlink_to("nothing"), "a symbolic link that leads to none"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_only_regular_files_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    from ia2.evaluation.plain_text import plain_texts

    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    make, reason = KINDS[kind]
    write_rows(Path("rows.jsonl"), [("a", " x"), ("b", " y")] * 4)
    kept = [make(Path(name)) for name in ("a.jsonl", "a.csv", "a.tsv", "a.parquet", "a.yaml", "a.txt")]
    for ending in (".jsonl", ".csv", ".tsv", ".parquet"):
        with pytest.raises(UserError) as info:
            Examples.from_file(f"a{ending}")
        assert reason in said(info)
        if kind != "folder":  # which has files, or not
            assert reason in refusal(f"a{ending}")
    with pytest.raises(UserError) as info:
        plain_texts("a.txt")
    assert reason in said(info)
    train = ("train", "--model", "none", "--output-dir", "out", "--quiet")
    commands: list[tuple[str, ...]] = [
        (*train, "--data", "rows.jsonl", "--config", "a.yaml"),
        ("sweep", "a.yaml", "--quiet"),
        ("benchmarks", "show", "a.yaml"),
        ("benchmarks", "prepare", "a.yaml"),
    ]
    if kind != "folder":
        commands.append((*train, "--data", "a.csv"))
    for command in commands:
        assert reason in run(capsys, *command).refusal()
    assert len(kept) == 6


def test_a_context_file_that_is_a_pipe(tmp_path: Path) -> None:
    from ia2.config import AdaptConfig
    from ia2.prompts.own_context import context_text

    os.mkfifo(tmp_path / "context.txt")
    with pytest.raises(DataError, match=r"context_file: .*context\.txt.* pipe"):
        context_text(AdaptConfig(context_file=str(tmp_path / "context.txt")))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"seed: 1\nseed: 2\n", "line 2: the key 'seed' is there twice, in line 1 too"),
        (b"align: {epochs: 1, epochs: 2}", "the key 'epochs' is there twice"),
        ("seed: 1\n".encode("utf-16"), "it is UTF-16 text: save it as UTF-8"),
        (b"# caf\xe9\nseed: 1\n", "line 1 is not UTF-8 text"),
        (b"# x\n# \0\nseed: 1\n", "line 2 holds a NUL byte"),
        (b"seed: " + b"[" * 50_000, "nested too deep"),
        (b"seed: 2020-99-99", "not YAML"),
        (b"seed: &a [*a]", "seed: "),
        (b"? [a]\n: 1\n", "not YAML"),
        (b"x: !!python/object:os.system {}", "not YAML"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_settings_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, reason: str
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_bytes(content)
    for command in (("train", "--config", file, "--output-dir", tmp_path / "out"), ("sweep", file)):
        line = run(capsys, *command).refusal()
        assert line.startswith(f"{file}: ")
    assert (
        reason in run(capsys, *command[:1], file).refusal()
        or reason in run(capsys, "train", "--config", file).refusal()
    )


def test_a_byte_order_mark_in_settings(tmp_path: Path) -> None:
    from ia2.config import TrainConfig
    from ia2.config.reading import load_config

    file = tmp_path / "settings.yaml"
    file.write_text("seed: 3\n", encoding="utf-8-sig")
    assert load_config(TrainConfig, file, {}).seed == 3


def test_a_split_of_a_benchmark_that_is_there_twice(tmp_path: Path) -> None:
    from ia2.data.benchmarks import load_benchmark

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
    (tmp_path / "own" / "test.csv").unlink()
    (tmp_path / "own" / "test.jsonl").unlink()
    os.mkfifo(tmp_path / "own" / "test.jsonl")
    with pytest.raises(DataError, match=r"test\.jsonl.* pipe"):
        load_benchmark(entry).load()
