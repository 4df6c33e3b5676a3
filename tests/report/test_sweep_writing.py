"""What is written of a sweep: LaTeX, figures, and the command."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from helpers.command_line import run
from helpers.sweep_records import record, rows, small_grid, write_sweep
from helpers.sweep_reports import few, grid_of, report_of

from ia2.report.sweep.entries import p_value, ranked
from ia2.report.sweep.notes import span
from ia2.report.sweep.paper_layouts import paper_table
from ia2.report.sweep.printing import print_tables
from ia2.report.sweep.sweep_figures import sweep_figures, try_figures
from ia2.utils.format import Column, Entry, Table, escape, latex, markdown

# ------------------------------------------------------------------------------------------- writing


def test_latex_escapes_what_tex_would_take_for_itself() -> None:
    assert escape(r"a_b & 50% #1 $x^2$ {~} \ <|>") == (
        r"a\_b \& 50\% \#1 \$x\textasciicircum{}2\$ \{\textasciitilde{}\} \textbackslash{} "
        r"\textless{}\textbar{}\textgreater{}"
    )
    assert escape("IA2 → SFT − SFT, 0–4, β ≈ 1") == (
        r"IA2 $\rightarrow$ SFT $-$ SFT, 0--4, $\beta$ $\approx$ 1"
    )


def test_latex_literally() -> None:
    columns = (Column("eval"), Column("acc", "A_1"), Column("NLL", "A_1"), Column("ICL works"))
    body = ((Entry("SST2"), Entry("90.4 (2.3)", "best"), Entry("0.06", "second"), Entry("")),)
    assert (
        latex(Table("1", "Accuracy in %.", columns, body, ("One.", "Two.")))
        == r"""\begin{table}
\centering
\small
\caption{Accuracy in \%.}
\label{tab:ia2-1}
\begin{tabular}{lccl}
\toprule
 & \multicolumn{2}{c}{A\_1} &  \\
\cmidrule(lr){2-3}
eval & acc & NLL & ICL works \\
\midrule
SST2 & \textbf{90.4 (2.3)} & \underline{0.06} &  \\
\bottomrule
\end{tabular}
\par\smallskip
\begin{minipage}{\linewidth}\footnotesize
One. \\
Two.
\end{minipage}
\end{table}
"""
    )


def test_every_row_in_latex_has_as_many_fields(tmp_path: Path) -> None:
    report = report_of(tmp_path, [*few(), *few(benchmark="GSM8K")])
    for table in print_tables(report, "all").tables:
        text = latex(table)
        inside = text.split(r"\midrule")[1].split(r"\bottomrule")[0]
        for line in inside.strip().splitlines():
            assert len(re.findall(r"(?<!\\)&", line)) == len(table.columns) - 1
        assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")
        [groups] = re.findall(r"\\toprule\n(.*?)\\midrule", text, flags=re.DOTALL)
        spans = sum(int(n) - 1 for n in re.findall(r"multicolumn\{(\d+)\}", groups))
        if r"\cmidrule" in groups:
            assert len(re.findall(r"(?<!\\)&", groups.splitlines()[0])) + spans == len(table.columns) - 1


def test_odd_names_break_no_table(tmp_path: Path) -> None:
    report = report_of(tmp_path, few(8, "a|b\nc*<i>_&%"))
    [table] = paper_table(report, 1)
    assert len({len(row) for row in grid_of(markdown(table))}) == 1
    assert "&lt;i>" in markdown(table)
    assert r"\_\&\%" in latex(table)


def test_marks_go_by_what_is_printed() -> None:
    def entries(*texts: str) -> list[Entry]:
        return [Entry(text, value=None if text == "–" else {}) for text in texts]

    marks = [
        e.mark
        for e in ranked(entries("90.4 (1)", "80.0", "90.4 (2)", "–", "70.0"), higher=True, shown=[True] * 5)
    ]
    assert marks == ["best", "second", "best", "", ""]
    marks = [e.mark for e in ranked(entries("0.10", "0.20", "0.05"), higher=False, shown=[True, True, False])]
    assert marks == ["best", "second", ""]
    assert ranked(entries("0.10", "–"), higher=False, shown=[True, True])[0].mark == ""


def test_numbers() -> None:
    assert [p_value(p) for p in (0.0001, 0.0124, 1.0, float("nan"))] == ["< 0.001", "0.012", "1.000", "–"]
    assert [span(s) for s in ([0, 1, 2, 3], [0, 2], [5], [])] == ["0–3", "0, 2", "5", "none"]


# ------------------------------------------------------------------------------------------- figures


def test_figures_are_the_same_every_time_and_name_what_they_show(tmp_path: Path) -> None:
    report = report_of(tmp_path, small_grid())
    for folder in ("a", "b"):
        drawn = try_figures(report, tmp_path / folder)
        assert [path.name for path in drawn] == [
            "sizes-demo.svg",
            "differences-demo.svg",
            "similarity-demo.svg",
        ]
    for path in drawn:
        data = path.read_bytes()
        assert data == (tmp_path / "a" / path.name).read_bytes()
        assert str(tmp_path).encode() not in data
        text = "".join(ElementTree.fromstring(data).itertext())
        for expected in ("demo", "accuracy", "NLL", "lower is better"):
            assert expected in text
    assert "FinS (words), N = 32" in "".join(
        ElementTree.parse(tmp_path / "a" / drawn[1].name).getroot().itertext()
    )


def test_a_curve_over_n_is_of_benchmarks_with_several_n(tmp_path: Path) -> None:
    cells = [
        *(record(rows(8), recipe="sft", size=n) for n in (8, 32)),
        record(rows(9), recipe="soft-sft"),  # at one N only: a bar instead of a band
        record(rows(8), recipe="sft", benchmark="FinS"),
        *(record(rows(2), recipe="base", benchmark=name) for name in ("SST2", "FinS")),
    ]
    figure = next(f for f in sweep_figures(report_of(tmp_path, cells)) if f.name == "sizes-demo")
    path = figure.save(tmp_path / "x.svg")
    text = "".join(ElementTree.parse(path).getroot().itertext())
    assert "SST2" in text and "FinS" not in text


@pytest.mark.filterwarnings("error")
def test_figures_of_little(tmp_path: Path) -> None:
    report = report_of(
        tmp_path, [record(rows(5, 20), asim=None), record(rows(8, 20), recipe="ia2-sft", asim=None)]
    )
    (figure,) = sweep_figures(report)
    assert figure.name == "differences-demo"
    figure.save(tmp_path / "x.svg")
    assert not sweep_figures(report_of(tmp_path / "sft", [record(rows(5), asim=None)]))


def test_names_of_models_name_files(tmp_path: Path) -> None:
    report = report_of(tmp_path, few(8, "../own/model"))
    assert [path.parent for path in try_figures(report, tmp_path / "figures")] == [tmp_path / "figures"] * 2


def test_without_matplotlib_there_are_no_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    report = report_of(tmp_path, small_grid(seeds=1))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with caplog.at_level("INFO", "ia2"):
        assert try_figures(report, tmp_path / "figures") == []
    assert "pip install 'ia2[report]'" in caplog.text
    assert not (tmp_path / "figures").exists()


# -------------------------------------------------------------------------------------- the command


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return write_sweep(tmp_path / "sweep", few())


def test_the_command_prints_an_overview(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = run(capsys, "report", sweep)
    assert ran.status == 0
    assert ran.out.startswith(
        # two of icl, then a teacher pass and a training that the others share
        "sweep: 8 cells; 2 min of work (evaluate 74%, sft 14%, other 8%, teacher 3%). "
        "Models Qwen/Qwen3-4B-Base; benchmarks SST2; recipes icl,"
    )
    assert "Table 1 of the paper" in ran.out
    assert (
        "Tables that these cells fill (--table): 1, 5, 8, 12, full, tests, variants, thresholds, icl."
        in ran.out
    )


def test_the_command_prints_a_table_in_both_formats(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert r"\begin{table}" not in run(capsys, "report", sweep, "--table", "1").out
    both = run(capsys, "report", sweep, "--table", "1", "--latex", "--markdown").out
    assert both.index("| SST2 |") < both.index(r"\begin{table}")
    assert "| SST2 |" not in run(capsys, "report", sweep, "--table", "1", "--latex").out


def test_the_command_writes_files(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, figures = tmp_path / "out", tmp_path / "figures"
    ran = run(capsys, "report", sweep, "--table", "all", "--latex", "--output-dir", out, "--figures", figures)
    assert {path.name for path in out.iterdir()} == {
        "table-1.tex", "table-5.tex", "table-8.tex", "table-12.tex", "table-full.tex", "table-tests.tex",
        "table-icl.tex",
    }  # fmt: skip
    assert {path.name for path in figures.iterdir()} == {
        "differences-Qwen-Qwen3-4B-Base.svg", "similarity-Qwen-Qwen3-4B-Base.svg",
    }  # fmt: skip
    assert f"{out / 'table-1.tex'}" in ran.out


def test_the_command_gives_json(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, "report", sweep, "--table", "1", "--json").json
    assert (found["cells"], found["select"], found["files"]) == (8, "dev", [])
    [table] = found["tables"]
    entry = table["rows"][0]["IA2 → SFT acc"]
    assert (entry["text"], entry["mean"], entry["seeds"]) == ("77.5 (3.5)", pytest.approx(0.775), [0, 1])
    assert set(table["rows"][0]["IA2 → SFT − SFT acc [95%]"]) == {"text", "value", "low", "high", "seeds"}


def test_the_grid_says_how_to_select(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sweep / "grid.yaml").write_text("select: test\n")
    assert run(capsys, "report", sweep, "--json").json["select"] == "test"
    assert run(capsys, "report", sweep, "--json", "--select", "dev").json["select"] == "dev"


def test_the_command_keeps_to_what_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_sweep(tmp_path / "sweep", small_grid())
    ran = run(
        capsys,
        "report",
        folder,
        "--table",
        "1",
        "--benchmarks",
        "FinS",
        "--sizes",
        "8",
        "--models",
        "demo",
        "--seeds",
        "0,1",
    )
    assert {row[0] for row in grid_of(ran.out)[1:]} == {"FinS"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table", "21"], "the paper has no table 21; there are 1 to 20."),
        (["--table", "3"], "table 3 needs cells of sft, ia2, ia2-sft, ia2+sft on free-text tasks"),
        (
            ["--table", "fulll"],
            "there is no table 'fulll'; there are 1 to 20, full, tests, variants, thresholds, icl and all.",
        ),
        (["--table", "thresholds"], "table thresholds needs ia2-sft and sft at two N or more"),
        (["--sizes", "four"], "--sizes: 'four' is no number"),
        (
            ["--benchmarks", "SST"],
            "benchmark SST is in none of the cells; there are SST2. Did you mean 'SST2'?",
        ),
        (["--select", "best"], "'best' is not one of"),
    ],
)
def test_refusals(
    sweep: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in run(capsys, "report", sweep, *arguments).refusal()


def test_refusals_of_folders(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no such folder" in run(capsys, "report", tmp_path / "nowhere").refusal()
    with (sweep / "cells.jsonl").open("a") as file:
        file.write("{\n")
    assert f"{sweep / 'cells.jsonl'}:9: damaged" in run(capsys, "report", sweep).refusal()


def test_a_report_needs_no_torch(sweep: Path) -> None:
    code = (
        "import sys; from ia2.cli import main; main(sys.argv[1:]); "
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, "report", str(sweep), "--table", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "Table 1 of the paper" in ran.stdout
