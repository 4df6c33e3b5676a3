"""Texts of rows, labels and names steer no terminal and are no markup; in tables they are no formulas."""

from __future__ import annotations

import csv
import io
import json

import pytest

from ia2.cli.output import print_metrics
from ia2.experiment.predict import prediction_text
from ia2.utils.logging import configure, escaped, logger, printable, terminal

STEERING = "a\x1b[2Jb\rc\x07d\x9b31me\u202ef\u2066g\u200fh\x7fi\u2028j\udc9bk\x00l\x85"
BARE = "a[2Jbcd31mefghijkl"
FORMULAS = ["=1+1", "+cmd|' /C calc'!A0", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "＝1", "-", '="a"']


def test_printable_and_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    assert printable(STEERING) == BARE
    assert printable("línea\n\tتجربة 👩‍🔬") == "línea\n\tتجربة 👩‍🔬"
    document = escaped(json.dumps({STEERING: [STEERING]}, ensure_ascii=False, indent=1))
    assert printable(document) == document
    assert json.loads(document) == {STEERING: [STEERING]}
    configure()
    logger.warning("%s: %s", "row 1", STEERING)
    print(STEERING)
    assert capsys.readouterr() == (f"{BARE}\n", f"row 1: {BARE}\n")


def test_tables_show_markup_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    table = Table(title=f"[/] {STEERING} :smile:")
    table.add_column("[red]label[/red]")
    table.add_row(f"[link=https://evil.example]{STEERING}")
    terminal(width=100).print(table)
    interval = {"value": 0.5, "low": None, "high": None}
    found = dict.fromkeys(("accuracy", "ece", "ece_equal_width", "brier", "nll"), interval)
    print_metrics({"recipe": "[/] [blink]", "test": {"n": 1, "labels": found}})
    out = capsys.readouterr().out
    for text in ("[/]", "[red]label[/red]", "[blink]", ":smile:", f"[link=https://evil.example]{BARE}"):
        assert text in out
    assert printable(out) == out


def test_csv_holds_no_formula_and_jsonl_is_exact() -> None:
    rows = [{"source": text, "query": text, "label": text, "confidence": 0.5} for text in FORMULAS]
    first = {**rows[0], "labels": {FORMULAS[0]: -0.5}}
    written = list(csv.reader(io.StringIO(prediction_text([first, *rows], ".csv"), newline="")))
    assert written[0] == ["source", "query", "label", "confidence", "p(=1+1)"]
    assert written[1][3:] == ["0.5", "-0.5"]
    assert [cells[:4] for cells in written[2:]] == [[f"'{text}"] * 3 + ["0.5"] for text in FORMULAS]
    # what is no formula stays
    texts = ["-1", "+2.5", "-.5e-3", " =1", "a=1", "'=1", "", "é"]
    plain = prediction_text([{"query": text, "label": -1} for text in texts], ".csv")
    read = list(csv.DictReader(io.StringIO(plain, newline="")))
    assert [cells["query"] for cells in read] == texts and {cells["label"] for cells in read} == {"-1"}
    rows = [{"query": text, "label": text} for text in [*FORMULAS, STEERING]]
    assert [json.loads(line) for line in prediction_text(rows, ".jsonl").split("\n")[:-1]] == rows


def test_a_stream_that_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams that others put in place of stdout may return None: workers of a cluster and notebooks do."""

    class Stream(io.StringIO):
        def write(self, text: str) -> None:  # type: ignore[override]
            super().write(text)

    stream = Stream()
    monkeypatch.setattr("sys.stdout", stream)
    configure()
    print("one\x1b[2J")
    assert stream.getvalue() == "one[2J\n"
