"""``ia2 benchmarks`` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.benchmark_rows import (
    NAMES,
    ROOT,
    ROWS,
    SIZES,
    mirror,
    own,
    some_rows,
    verbalisers,
)
from helpers.command_line import run

from ia2.data.benchmarks import BENCHMARKS
from ia2.data.examples import Examples


def test_ls(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "benchmarks", "ls").out.splitlines()
    for name, benchmark in BENCHMARKS.items():
        (line,) = [line for line in lines if line.replace("│", " ").split()[:1] == [name]]
        for words in (benchmark.kind, benchmark.role, benchmark.hub or "packaged", *benchmark.ood):
            assert words in line
        assert ", ".join(benchmark.verbalisers) in line
    listed = run(capsys, "benchmarks", "ls", "--json").json
    assert [facts["name"] for facts in listed] == NAMES


def test_show(capsys: pytest.CaptureFixture[str], shared_data: Path) -> None:
    shown = run(capsys, "benchmarks", "show", "SST2", "--data-dir", shared_data).out
    assert r"'\n\nText:'" in shown
    assert "stanfordnlp/sst2" in shown
    assert "    | Label:0\n" in shown
    assert "    | Label: negative\n" in shown
    facts = run(capsys, "benchmarks", "show", "QASCr", "--json").json
    assert facts["stop"] == "\n\nQuestion:"
    assert "examples" not in facts
    elsewhere = run(capsys, "benchmarks", "show", "QASCr").out
    assert "`ia2 benchmarks prepare QASCr`" in elsewhere
    assert "IA2_DATA_DIR" in elsewhere
    assert "Label: weather" in run(capsys, "benchmarks", "show", "Intents").out


def test_prepare(capsys: pytest.CaptureFixture[str], shared_data: Path) -> None:
    found = run(capsys, "benchmarks", "prepare", "--data-dir", shared_data)
    assert (found.status, found.err) == (0, "")
    for name, (pool, test) in SIZES.items():
        benchmark = BENCHMARKS[name]
        counts = [f"{count:,} {part} rows" for part, count in (("pool", pool), ("test", test)) if count]
        assert f"{name} ({benchmark.role}; {benchmark.source}): {', '.join(counts)}\n" in found.out
    assert found.out.count("first test row, ") == sum(len(verbalisers(b)) for b in BENCHMARKS.values())
    assert "  test answers, words: no 268, yes 232\n" in found.out
    assert "  note: the mirror differs from the hub: train is the first 20,000 of 67,349 rows\n" in found.out
    assert "    | Answer: yes\n" in found.out
    (facts,) = run(capsys, "benchmarks", "prepare", "PoemS", "--json", "--data-dir", shared_data).json
    assert facts["test"] == 288
    assert facts["answers"]["words"]["test"] == {" negative": 155, " positive": 133}
    assert facts["examples"]["digits"]["prompt"] == ROWS["PoemS"][1]


def test_prepare_ones_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    mirror(tmp_path, train=some_rows(0, 30), test=some_rows(30, 20))
    found = run(capsys, "benchmarks", "prepare", own(tmp_path / "own.yaml"))
    assert "Own (train, eval; " in found.out
    assert "30 pool rows, 20 test rows" in found.out


def test_prepare_writes_rows_for_other_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "rows"
    found = run(capsys, "benchmarks", "prepare", "Intents", "--output-dir", out)
    assert f"  written: {out / 'Intents-words' / 'pool.jsonl'}\n" in found.out
    data = BENCHMARKS["Intents"].load()
    for part, rows in (("pool", data.pool), ("test", data.test)):
        read = Examples.from_file(out / "Intents-words" / f"{part}.jsonl")
        assert [(row.query, row.answer) for row in read] == [(row.query, row.answer) for row in rows]
    (facts,) = run(capsys, "benchmarks", "prepare", "Intents", "--output-dir", out, "--json").json
    assert set(facts["files"]) == {
        str(out / f"Intents-{verbaliser}" / f"{part}.jsonl")
        for verbaliser in BENCHMARKS["Intents"].verbalisers
        for part in ("pool", "test")
    }


def test_prepare_reads_a_folder_in_hub_layout(capsys: pytest.CaptureFixture[str], offline: Path) -> None:
    mirror(offline / "rows", train=some_rows(0, 30), test=some_rows(30, 20))
    entry = own(offline / "own.yaml", path=None, hub="rows")
    assert "20 test rows" in run(capsys, "benchmarks", "prepare", entry).out


def test_prepare_reads_what_it_can(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    mirror(tmp_path / "poem_sentiment", train=[ROWS["PoemS"][0]])
    found = run(capsys, "benchmarks", "prepare", "SST2", "PoemS", "AGN", "--data-dir", tmp_path)
    assert found.status == 2
    assert "PoemS (OOD eval" in found.out
    (line,) = found.err.splitlines()
    assert line.startswith("ia2: error: SST2, AGN cannot be read; the first: SST2: no file ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "sst2"], "unknown benchmark 'sst2'. Did you mean 'SST2'?"),
        (["show", "none.yaml"], "none.yaml: no such file"),
        (["show", "SST2", "--data-dir", "nowhere"], "SST2: no folder nowhere."),
        (["prepare", "SST2", "--data-dir", "nowhere"], "SST2: no folder nowhere."),
        (["prepare", "Intent"], "Did you mean 'Intents'?"),
        (["lst"], "Did you mean 'ls'?"),
        (["ls", "--jsn"], "Did you mean '--json'?"),
        ([], "Missing command. See ia2 benchmarks --help."),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in run(capsys, "benchmarks", *arguments).refusal()


def test_entries_are_packaged() -> None:
    """They are files beside the code, which the wheel takes whole (`packages` in pyproject.toml)."""
    folder = ROOT / "src" / "ia2" / "data" / "benchmarks" / "entries"
    assert sorted(file.stem for file in folder.iterdir()) == sorted(NAMES)
    assert all(json.dumps(benchmark.model_dump(mode="json")) for benchmark in BENCHMARKS.values())
