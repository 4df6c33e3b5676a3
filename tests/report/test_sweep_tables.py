"""Tables of a sweep, literally from a few records; how they are written; figures; the command."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from helpers.command_line import run
from helpers.sweep_records import evaluation, record, rows, small_grid, write_sweep

from ia2.experiment.sweep.records import load_results
from ia2.report.sweep.cells import Report
from ia2.report.sweep.comparisons import p_value
from ia2.report.sweep.notes import span
from ia2.report.sweep.paper import PaperRow, available, paper_table, paper_tables, ranked
from ia2.report.sweep.printing import print_tables
from ia2.report.sweep.selection import Select
from ia2.report.sweep.sweep_figures import sweep_figures, try_figures
from ia2.utils.errors import ConfigError
from ia2.utils.format import Column, Entry, Table, escape, latex, markdown

QWEN = "Qwen/Qwen3-4B-Base"
RECIPES = ("icl", "sft", "ia2", "ia2-sft")
RESPONSES = {"sft.answers": "icl_responses"}


def report_of(tmp_path: Path, records: Sequence[dict[str, Any]], select: Select = "dev") -> Report:
    return Report(load_results([write_sweep(tmp_path / "sweep", records)]), select)


def few(size: int = 4, model: str = QWEN, benchmark: str = "SST2", **options: Any) -> list[dict[str, Any]]:
    """Two seeds of four recipes: accuracies are 0.7, 0.5, 0.6 and 0.8, one right row less at seed 1."""
    right = dict(zip(RECIPES, (14, 10, 12, 16), strict=True))
    of_all = {"benchmark": benchmark, "model": model, "size": size, **options}
    return [
        record(
            {benchmark: evaluation(rows(right[recipe] - seed, 20), [0.72] * 20, dataset=benchmark)},
            recipe=recipe,
            seed=seed,
            **of_all,
        )
        for recipe in RECIPES
        for seed in (0, 1)
    ]


def grid_of(text: str) -> list[list[str]]:
    """Fields of a table in Markdown."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[field.strip() for field in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def lines_of(table: Table) -> list[dict[str, str]]:
    """Column → text of each row."""
    return [{c.full: e.text for c, e in zip(table.columns, row, strict=True) if e.text} for row in table.rows]


# ---------------------------------------------------------------------------------- the paper's own


def test_the_papers_figures_are_those_of_the_method_page() -> None:
    """The specification of the method gives some of them by itself."""
    assert list(paper_tables()) == list(range(1, 21))
    given = {
        "SST2/SST2": ((85.4, 0.13), (65.2, 0.22), (82.7, 0.28), (90.4, 0.06)),
        "FinS/FinS": ((63.6, 0.12), (67.4, 0.31), (63.1, 0.24), (78.7, 0.16)),
        "SciQr/SciQr": ((87.7, 0.07), (88.3, 0.07), (90.4, 0.09), (91.7, 0.05)),
        "SciQr/QASCr": ((56.5, 0.08), (76.5, 0.09), (71.2, 0.12), (79.4, 0.09)),
        "STF/STF": ((66.0, 0.07), (52.4, 0.29), (62.2, 0.16), (62.4, 0.29)),
        "AGN/AGN": ((30.0, 0.13), (27.9, 0.52), (24.0, 0.11), (31.8, 0.35)),
    }
    for name, figures in given.items():
        found = paper_tables()[1].rows[PaperRow(*name.split("/"), QWEN, 4)]
        assert [(accuracy, ece) for accuracy, _, ece, _ in found.values()] == list(figures)
    free = {"GSM8K": (76.4, 70.9, 77.4, 73.6), "HMathA": (60.4, 50.4, 47.8, 55.3)}
    for name, accuracies in {**free, "SciQ": (37.5, 35.0, 6.9, 40.8)}.items():
        found = paper_tables()[2].rows[PaperRow(name, name, QWEN, 4)]
        assert tuple(found[recipe][0] for recipe in RECIPES) == accuracies


def test_tables_with_the_same_runs_have_the_same_figures() -> None:
    """ICL and IA2 alone do not depend on what is fine-tuned on; tables 5 and 7 repeat others."""
    tables = paper_tables()
    for truth, responses in ((1, 9), (2, 3), (6, 16), (10, 11), (12, 13), (14, 15), (17, 18), (19, 20)):
        assert set(tables[truth].rows) == set(tables[responses].rows)
        for row, figures in tables[truth].rows.items():
            for recipe in ("icl", "ia2"):
                assert figures[recipe] == tables[responses].rows[row][recipe], (truth, row)
    repeated = 0
    for number in (5, 7):
        for row, figures in tables[number].rows.items():
            others = (tables[other].rows.get(row._replace(adapter="")) for other in (2, 10, 12))
            other = next((found for found in others if found), None)
            if other is not None and row.adapter in ("", "r8 qko"):
                repeated += 1
                assert all(other[recipe] == figure for recipe, figure in figures.items()), (number, row)
    assert repeated == 8


# ------------------------------------------------------------------------------------------ table 1

MEASURES = ("acc", "NLL", "acc (voc.)", "ECE (voc.)")


def test_table_1_literally(tmp_path: Path) -> None:
    [table] = paper_table(report_of(tmp_path, few()), 1)
    text = markdown(table)
    header, ours, theirs = grid_of(text)
    assert header == [
        "source", "eval",
        *(f"{of} {name}" for of in ("ICL", "SFT only", "IA2 only", "IA2 → SFT") for name in MEASURES),
        *(f"IA2 → SFT − SFT {measure} [95%]" for measure in MEASURES), "base", "ICL − SFT [95%]", "ICL works",
    ]  # fmt: skip
    # among the labels and over the vocabulary the made records have the same accuracy
    assert ours[:18] == [
        "SST2", "SST2",
        "67.5 (3.5)", "0.62 (0.04)", "67.5 (3.5)", "0.42 (0.02)",
        "47.5 (3.5)", "0.83 (0.04)", "47.5 (3.5)", "0.51 (0.02)",
        "<u>57.5 (3.5)</u>", "<u>0.72 (0.04)</u>", "<u>57.5 (3.5)</u>", "<u>0.47 (0.02)</u>",
        "**77.5 (3.5)**", "**0.53 (0.04)**", "**77.5 (3.5)**", "**0.34 (0.04)**",
    ]  # fmt: skip
    assert ours[18:21] == ["+30.0 [+30.0, +30.0]", "−0.300 [−0.300, −0.300]", "+30.0 [+30.0, +30.0]"]
    # bins of one row, and of six: (0.337 − 0.511), by hand
    assert ours[21].startswith("−0.174 [")
    assert ours[22:] == ["–", "+20.0 [+20.0, +20.0]", "unclear: the bare model was not run beside it"]
    # the paper's accuracies are over the vocabulary
    assert theirs == [
        "", "*the paper*", "", "", "*85.4 (0.4)*", "*0.13 (0.00)*", "", "", "*65.2 (10.7)*", "*0.22 (0.10)*",
        "", "", "*82.7 (6.4)*", "*0.28 (0.03)*", "", "", "*90.4 (2.3)*", "*0.06 (0.01)*", *[""] * 7,
    ]  # fmt: skip
    for said in (
        "mean (sd over draws), Qwen/Qwen3-4B-Base, N = 4.",
        "Seeds 0, 1; 20 test rows; adapter lora; verbaliser words.",
        "Learning rate fixed beforehand: 0.001 (sft, ia2, ia2-sft).",
        "In italics: the paper's figures",
        "Not trained on here: AGN, FinS, SciQr, STF.",
    ):
        assert said in text
    assert "Missing" not in text


def test_every_model_and_size_has_a_table_and_the_papers_own_has_its_figures(tmp_path: Path) -> None:
    given = [*few(8, "a"), *few(32, "a"), *few(8, "b"), *few(4), *few(8)]
    tables = paper_table(report_of(tmp_path, given), 1)
    assert [table.title.split("draws), ")[1] for table in tables] == [
        "a, N = 8.", "a, N = 32.", "b, N = 8.", f"{QWEN}, N = 4.",
    ]  # fmt: skip
    assert ["In italics" in markdown(table) for table in tables] == [False, False, False, True]
    assert len({*re.findall(r"\\label\{(.*?)\}", "".join(map(latex, tables)))}) == 4


def test_rows_come_in_the_papers_order_and_others_behind(tmp_path: Path) -> None:
    ood = {"SST2": evaluation(rows(9)), "PoemS": evaluation(rows(8), dataset="PoemS", role="ood")}
    given = [*few(benchmark="STF"), *few(benchmark="Intents"), *few(benchmark="AGN")]
    given += [record(ood, model=QWEN, recipe=recipe, size=4) for recipe in RECIPES]
    [table] = paper_table(report_of(tmp_path, given), 1)
    assert [(row["source"], row["eval"]) for row in lines_of(table) if "source" in row] == [
        ("AGN", "AGN"), ("SST2", "PoemS (OOD)"), ("SST2", "SST2"), ("STF", "STF"), ("Intents", "Intents"),
    ]  # fmt: skip


def test_what_is_missing_is_counted(tmp_path: Path) -> None:
    gone = (("AGN", "ia2", 0), ("AGN", "ia2", 1), ("SST2", "sft", 1))
    given = [*few(), *few(benchmark="AGN")]
    kept = [r for r in given if tuple(r["spec"][k] for k in ("benchmark", "recipe", "seed")) not in gone]
    [table] = paper_table(report_of(tmp_path, kept), 1)
    text = markdown(table)
    agn, _, sst2, _ = grid_of(text)[1:]
    assert agn[10:14] == ["–"] * 4
    assert sst2[6] == "50.0, 1 of 2 seeds"
    assert "Missing (–): 1 of 8: ia2 on AGN." in text
    assert "Means over fewer seeds than others of their row: sft on SST2 (1 of 2)." in text
    # the difference is of the seed that both have
    assert table.rows[2][18].text == "+30.0" and table.rows[2][18].value["seeds"] == [0]


@pytest.mark.parametrize(
    ("select", "accuracy", "said"),
    [
        ("dev", "47.5 (3.5)", "chosen by dev loss, mean over seeds, for each benchmark: sft 0.001 of 2."),
        ("test", "100.0 (0.0)", "chosen by test accuracy, mean over seeds, as in the paper: optimistic"),
        ("dev-per-seed", "47.5 (3.5)", "chosen by dev loss, for each seed alone"),
    ],
)
def test_the_choice_of_rates_is_named(tmp_path: Path, select: Any, accuracy: str, said: str) -> None:
    given = few() + [record(rows(20, 20), model=QWEN, size=4, seed=s, rate=1e-4, loss=0.9) for s in (0, 1)]
    text = markdown(paper_table(report_of(tmp_path, given, select), 1)[0])
    assert accuracy in grid_of(text)[1][6] and said in text
    assert "fixed beforehand: 0.001 (ia2, ia2-sft)" in text


def test_what_stands_below_a_table(tmp_path: Path) -> None:
    given = few(settings={"adapter.rank": 4}, notes=["SST2 cut to 20,000 rows.", "x"], max_test=20)
    given += few(benchmark="AGN", settings={"adapter.rank": 4, "max_answer_tokens": 9})
    text = markdown(paper_table(report_of(tmp_path, given), 1)[0])
    assert "Data: SST2 cut to 20,000 rows; x." in text
    assert "Settings of all trained recipes: adapter.rank = 4." in text
    assert "Settings that differ between benchmarks or N: max_answer_tokens." in text
    assert [span(s) for s in ([0, 1, 2, 3], [0, 2], [5], [])] == ["0–3", "0, 2", "5", "none"]


def test_two_verbalisers_of_a_benchmark_are_two_rows(tmp_path: Path) -> None:
    digits = few()
    for each in digits:
        each["spec"]["verbaliser"] = "digits"
        each["key"] += "d"
    [table] = paper_table(report_of(tmp_path, [*few(), *digits]), 1)
    assert [row["source"] for row in lines_of(table) if "source" in row] == ["SST2, words", "SST2, digits"]
    assert "verbaliser words (SST2); digits (SST2)" in markdown(table)


# ------------------------------------------------------------------------------------- other tables


def test_free_text_has_accuracy_alone_beside_the_base_model(tmp_path: Path) -> None:
    given = [*few(benchmark="GSM8K"), record(rows(8, 20), benchmark="GSM8K", model=QWEN, recipe="base")]
    report = report_of(tmp_path, given)
    ours, theirs = lines_of(paper_table(report, 2)[0])
    accuracies = ["w/o ICL acc", "ICL acc", "SFT only acc", "IA2 only acc", "IA2 → SFT acc"]
    assert list(ours)[2:7] == accuracies and ours["w/o ICL acc"] == "40.0"
    paper = ["56.4 (0.0)", "76.4 (1.1)", "70.9 (2.8)", "77.4 (2.8)", "73.6 (3.7)"]
    assert [theirs[name] for name in accuracies] == paper
    with pytest.raises(ConfigError, match=r"table 1 .*sft, ia2, ia2-sft"):
        paper_table(report, 1)


def test_gaps_over_sizes(tmp_path: Path) -> None:
    given = [*few(2, benchmark="GSM8K"), *few(4, benchmark="GSM8K")]
    [table] = paper_table(report_of(tmp_path, given), 5)
    ours = [row for row in lines_of(table) if "N" in row]
    assert [row["N"] for row in ours] == ["2", "4"]
    assert [row["IA2 → SFT − ICL acc [95%]"].split()[0] for row in ours] == ["+10.0", "+10.0"]
    assert [row["IA2 → SFT − SFT acc [95%]"].split()[0] for row in ours] == ["+30.0", "+30.0"]


def test_icl_responses_and_adapters_have_tables_of_their_own(tmp_path: Path) -> None:
    """Folders of several grids fill their tables together."""
    of_responses = [r for r in few(settings=RESPONSES) if "sft" in r["spec"]["recipe"]]
    joint = [record(rows(11, 20), model=QWEN, size=4, seed=s, recipe="ia2+sft", beta=0.5) for s in (0, 1)]
    folders = [write_sweep(tmp_path / "truth", few()), write_sweep(tmp_path / "b", [*of_responses, *joint])]
    report = Report(load_results(folders))
    assert "sft@sft.answers=icl_responses" in report.labels
    assert available(report) == [1, 5, 8, 9, 12, 13]
    [table] = paper_table(report, 9)
    ours = lines_of(table)[0]
    # alignment alone has no answers to fine-tune on: the plain one stands there
    assert [ours[f"{name} acc"] for name in ("IA2 only", "IA2 + SFT")] == ["57.5 (3.5)", "55.0 (0.0)"]
    assert "Fine-tuned on ICL's responses." in markdown(table)
    assert "0.001, β 0.5 (ia2+sft)" in markdown(table)
    with pytest.raises(ConfigError, match=r"table 6 .*adapter ia3.* fill 1, 5, 8, 9, 12, 13"):
        paper_table(report, 6)
    ia3 = report_of(tmp_path, few(settings={"adapter.type": "ia3"}))
    assert available(ia3) == [6, 8, 17]


def test_ablations_of_the_adapter(tmp_path: Path) -> None:
    model, qk = "meta-llama/Llama-3.2-1B", {"adapter.target_modules": ["q_proj", "k_proj"]}
    ablated = [r for r in few(8, model, settings=qk, variant="qk") if r["spec"]["recipe"] != "icl"]
    [table] = paper_table(report_of(tmp_path, [*few(8, model), *ablated]), 7)
    ours = lines_of(table)
    assert [row.get("LoRA") for row in ours] == ["r8 qko", None, "r8 qk", None]
    assert [row["SFT only acc (voc.)"] for row in ours[1::2]] == ["53.5 (5.0)", "50.0 (6.4)"]


def test_distillation_needs_soft_labels(tmp_path: Path) -> None:
    given = few(8, settings=RESPONSES)
    assert 4 not in available(report_of(tmp_path / "without", given))
    given += [record(rows(13, 20), model=QWEN, size=8, recipe="soft-sft")]
    assert 4 in available(report_of(tmp_path / "with", given))


def test_table_8_tests_over_benchmarks_and_seeds(tmp_path: Path) -> None:
    given = [r for b in ("SST2", "FinS", "AGN", "STF") for r in few(8, "demo", b)]
    found = lines_of(paper_table(report_of(tmp_path, given), 8)[0])
    titles = ["accuracy", "NLL", "Brier", "ECE", "accuracy over the vocabulary"]
    assert [row["measure"] for row in found] == titles
    first = {"pairs: n": "8", "pairs: difference": "+30.0", "benchmarks: better": "4 of 4"}
    # the same difference everywhere has no t
    first |= {"pairs: t": "–", "pairs: Wilcoxon": "0.008", "N": "8"}
    assert found[0].items() >= first.items()
    assert found[0]["benchmarks: difference [95%]"] == "+30.0 [+30.0, +30.0]"
    # evaluations on other benchmarks count, and share their training examples: one benchmark
    ood = [
        record(
            {"SST2": evaluation(rows(right)), "PoemS": evaluation(rows(right - 1), dataset="PoemS")},
            recipe=recipe,
            seed=seed,
        )
        for recipe, right in (("sft", 4), ("ia2-sft", 7))
        for seed in (0, 1, 2)
    ]
    found = lines_of(paper_table(report_of(tmp_path / "ood", ood), 8)[0])
    assert (found[0]["pairs: n"], found[0]["benchmarks: better"]) == ("6", "1 of 1")


def test_recipes_and_variants_are_compared_on_the_same_answers_or_say_so(tmp_path: Path) -> None:
    given = few(8, "demo") + [record(rows(12, 20), recipe="ia2+sft", beta=0.1, seed=s) for s in (0, 1)]
    given += [
        record(rows(13, 20), recipe="ia2-sft", variant="responses", settings=RESPONSES, seed=s)
        for s in (0, 1)
    ]
    report = report_of(tmp_path, given)
    others = ["icl", "sft", "ia2"]
    assert {row["pair"] for row in lines_of(print_tables(report, "tests").tables[0])} == {
        *(f"ia2-sft − {other}" for other in others),
        "ia2-sft − ia2+sft (true answers against ICL's answers)",
        *(f"ia2-sft@responses − {other}" for other in ("icl", "ia2", "ia2+sft")),
        "ia2-sft@responses − sft (ICL's answers against true answers)",
        "ia2-sft@responses − ia2-sft (ICL's answers against true answers)",
    }
    full = lines_of(print_tables(report, "full").tables[0])
    assert {row["recipe"]: row["answers"] for row in full} == {
        "icl": "–", "sft": "true", "ia2": "–", "ia2-sft": "true",
        "ia2-sft@responses": "ICL's", "ia2+sft": "ICL's",
    }  # fmt: skip


def test_own_tables(tmp_path: Path) -> None:
    report = report_of(tmp_path, small_grid())
    full = lines_of(print_tables(report, "full").tables[0])
    assert len(full) == 2 * 2 * (1 + 2 * 4)
    first = {"source": "SST2, words", "recipe": "icl", "N": "8", "asim to ICL": "0.85 (0.00)"}
    assert full[1].items() >= {**first, "seconds": "–", "draws": "3"}.items()
    assert full[2]["seconds"] == "17"
    for name in ("accuracy [95%]", "NLL [95%]", "Brier [95%]", "ECE [95%]", "accuracy (voc.) [95%]"):
        assert re.fullmatch(r"[\d.]+ \[[\d.]+, [\d.]+\]", full[1][name])
    thresholds = lines_of(print_tables(report, "thresholds").tables[0])
    assert [row["benchmark"] for row in thresholds] == ["SST2, words", "FinS, words"]
    assert {row["ICL works"].split(":")[0] for row in lines_of(print_tables(report, "icl").tables[0])} <= {
        "yes",
        "unclear",
    }


def test_tables_can_be_kept_to_where_icl_works(tmp_path: Path) -> None:
    """ICL works on FinS alone: on SST2 fine-tuning is better."""
    given = []
    for benchmark, right in (("SST2", 50), ("FinS", 95)):
        given.append(record(rows(10, 100), benchmark=benchmark, recipe="base"))
        for recipe, count in (("icl", right), ("sft", 60), ("ia2-sft", 80)):
            given += [
                record(rows(count + s * (recipe == "icl"), 100), benchmark=benchmark, recipe=recipe, seed=s)
                for s in (0, 1, 2)
            ]
    report = report_of(tmp_path, given)
    works = [row["ICL works"] for row in lines_of(paper_table(report, 1)[0])]
    assert works == ["yes", "no: SFT is better than ICL"]
    [table] = paper_table(report.where(icl_works=True), 1)
    assert [row["source"] for row in lines_of(table)] == ["FinS"]
    assert "Does ICL work with demo at N = 8? yes: FinS; no: SST2." in print_tables(report, None).lines
    only = report_of(tmp_path / "none", [r for r in given if r["spec"]["benchmark"] == "SST2"])
    for name in ("1", "full"):
        with pytest.raises(ConfigError, match=rf"table {name} .*ICL works"):
            print_tables(only.where(icl_works=True), name)


# --------------------------------------------------------------------------------- overview, verdicts


@pytest.mark.parametrize(
    ("less", "benchmarks", "said"),
    [
        (20, 6, "IA2 → SFT is more accurate than SFT, +20.0 ["),
        (20, 6, "and better in NLL, −0."),
        (20, 6, "(6 benchmarks, 18 pairs of runs; 95% t over benchmarks)"),
        (-20, 6, "IA2 → SFT is less accurate than SFT, −20.0"),
        (0, 6, "not distinguishably worse in NLL"),
        (20, 1, "more accurate on this one benchmark than SFT, +20.7 points"),
        (20, 1, "(1 benchmark, 3 pairs of runs; one benchmark: no interval over them)"),
    ],
)
def test_verdicts(tmp_path: Path, less: int, benchmarks: int, said: str) -> None:
    given = []
    for number, benchmark in enumerate(("SST2", "FinS", "AGN", "STF", "Intents", "GSM8K")[:benchmarks]):
        for seed in range(3):
            noise = (number + seed * seed) % 3 - 1
            options = {"benchmark": benchmark, "seed": seed}
            given.append(record(rows(50 + noise, 100), **options))  # type: ignore[arg-type]
            given.append(record(rows(50 + less - noise, 100), recipe="ia2-sft", **options))  # type: ignore[arg-type]
    lines = print_tables(report_of(tmp_path, given), None).lines
    assert lines[1].startswith("Over everything (N = 8): ") and said in lines[1]
    assert lines[2] == "Where ICL works: there is no such benchmark among these."


def test_the_overview_without_a_comparison(tmp_path: Path) -> None:
    printed = print_tables(report_of(tmp_path, [record(rows(5), recipe="icl")]), None)
    assert printed.lines[1] == "ia2-sft and sft were not both run: there is no verdict."
    assert [table.name for table in printed.tables] == ["full"]


# ------------------------------------------------------------------------------------------- writing


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
    assert escape(r"a_b & 50% #1 $x^2$ {~} \ <|> IA2 → SFT − SFT, 0–4, β ≈ 1") == (
        r"a\_b \& 50\% \#1 \$x\textasciicircum{}2\$ \{\textasciitilde{}\} \textbackslash{} "
        r"\textless{}\textbar{}\textgreater{} IA2 $\rightarrow$ SFT $-$ SFT, 0--4, $\beta$ $\approx$ 1"
    )


def test_odd_names_break_no_table(tmp_path: Path) -> None:
    report = report_of(tmp_path, [*few(8, "a|b\nc*<i>_&%"), *few(8, "a|b\nc*<i>_&%", "GSM8K")])
    for table in print_tables(report, "all").tables:
        assert {len(row) for row in grid_of(markdown(table))} == {len(table.columns)}
        body = latex(table).split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
        assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {len(table.columns) - 1}
        text = Counter(re.sub(r"\\[{}]", "", latex(table)))
        assert text["{"] == text["}"]


def test_marks_go_by_what_is_printed() -> None:
    def marks(*texts: str, higher: bool) -> list[str]:
        entries = [Entry(text, value=None if text == "–" else {}) for text in texts]
        return [entry.mark for entry in ranked(entries, higher=higher)]

    assert marks("90.4 (1)", "80.0", "90.4 (2)", "–", "70.0", higher=True) == [
        "best",
        "second",
        "best",
        "",
        "",
    ]
    assert marks("0.10", "0.20", higher=False) == ["best", "second"]
    assert marks("0.10", "–", higher=False) == ["", ""]
    assert [p_value(p) for p in (0.0001, 0.0124, 1.0, float("nan"))] == ["< 0.001", "0.012", "1.000", "–"]


# ------------------------------------------------------------------------------------------- figures


def test_figures_are_the_same_every_time_and_name_what_they_show(tmp_path: Path) -> None:
    report = report_of(tmp_path, small_grid())
    drawn = [try_figures(report, tmp_path / folder) for folder in ("a", "b")]
    assert [path.name for path in drawn[0]] == [
        "sizes-demo.svg", "differences-demo.svg", "similarity-demo.svg",
    ]  # fmt: skip
    for path, again in zip(*drawn, strict=True):
        assert path.read_bytes() == again.read_bytes()
        assert str(tmp_path).encode() not in path.read_bytes()
        text = "".join(ElementTree.parse(path).getroot().itertext())
        for expected in ("demo", "accuracy", "lower is better"):
            assert expected in text
    assert "FinS (words), N = 32" in drawn[0][1].read_text()


@pytest.mark.filterwarnings("error")
def test_figures_of_little(tmp_path: Path) -> None:
    pair = [record(rows(5, 20), asim=None), record(rows(8, 20), recipe="ia2-sft", asim=None, model="../x")]
    assert not sweep_figures(report_of(tmp_path / "a", pair[:1]))
    pair[0] = record(rows(5, 20), asim=None, model="../x")
    [path] = try_figures(report_of(tmp_path / "b", pair), tmp_path / "figures")
    # the names of models name files
    assert path == tmp_path / "figures" / "differences-x.svg"
    cells = [
        *(record(rows(8), recipe="sft", size=n) for n in (8, 32)),
        record(rows(9), recipe="soft-sft"),  # at one N only: a bar instead of a band
        record(rows(8), recipe="sft", benchmark="FinS"),
        *(record(rows(2), recipe="base", benchmark=name) for name in ("SST2", "FinS")),
    ]
    figure = next(f for f in sweep_figures(report_of(tmp_path / "c", cells)) if f.name == "sizes-demo")
    figure.save(tmp_path / "x.svg")
    assert {row[0].text for row in figure.numbers.rows} == {"SST2 (words), accuracy", "SST2 (words), nll"}


# -------------------------------------------------------------------------------------- the command


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return write_sweep(tmp_path / "sweep", few())


def test_the_command_prints_an_overview(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "report", sweep).out
    # two of icl, then a teacher pass and a training that the others share
    assert out.startswith(
        "sweep: 8 cells; 2 min of work (evaluate 74%, sft 14%, other 8%, teacher 3%). Models"
    )
    assert "Table 1 of the paper" in out
    assert "(--table): 1, 5, 8, 12, full, tests, variants, thresholds, icl." in out
    (sweep / "grid.yaml").write_text("select: test\n")
    assert run(capsys, "report", sweep, "--json").json["select"] == "test"
    assert run(capsys, "report", sweep, "--json", "--select", "dev").json["select"] == "dev"


def test_the_command_prints_and_writes_tables(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = run(capsys, "report", sweep, "--table", "1", "--latex", "--markdown").out
    assert both.index("| SST2 |") < both.index(r"\begin{table}")
    assert "| SST2 |" not in run(capsys, "report", sweep, "--table", "1", "--latex").out
    out, figures = tmp_path / "out", tmp_path / "figures"
    ran = run(capsys, "report", sweep, "--table", "all", "--latex", "--output-dir", out, "--figures", figures)
    names = ("1", "5", "8", "12", "full", "tests", "icl")
    assert {path.name for path in out.iterdir()} == {f"table-{name}.tex" for name in names}
    assert len(list(figures.iterdir())) == 2 and f"{out / 'table-1.tex'}" in ran.out


def test_the_command_gives_json_of_what_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_sweep(tmp_path / "sweep", small_grid())
    kept = ["--benchmarks", "FinS", "--sizes", "8", "--models", "demo", "--seeds", "0,1"]
    found = run(capsys, "report", folder, "--table", "1", "--json", *kept).json
    assert (found["cells"], found["select"], found["files"]) == (9, "dev", [])
    [table] = found["tables"]
    assert {row["source"] for row in table["rows"]} == {"FinS"}
    assert set(table["rows"][0]["IA2 → SFT acc"]) == {"text", "mean", "sd", "seeds"}
    assert set(table["rows"][0]["IA2 → SFT − SFT acc [95%]"]) == {"text", "value", "low", "high", "seeds"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table", "21"], "no table 21; there are 1 to 20"),
        (["--table", "3"], "table 3 needs cells of sft, ia2, ia2-sft, ia2+sft on free-text tasks"),
        (["--table", "fulll"], "no table 'fulll'; there are 1 to 20, full, tests, variants, thresholds, icl"),
        (["--table", "thresholds"], "table thresholds needs ia2-sft and sft at two N or more"),
        (["--table", "variants"], "table variants needs a variant of ia2-sft"),
        (["--sizes", "four"], "--sizes: 'four' is no number"),
        (["--benchmarks", "SST"], "Did you mean 'SST2'?"),
        (["--select", "best"], "'best' is not one of"),
    ],
)
def test_refusals(
    sweep: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in run(capsys, "report", sweep, *arguments).refusal()


def test_a_report_needs_no_torch(sweep: Path) -> None:
    code = (
        "import sys; from ia2.cli import main; main(sys.argv[1:]); "
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    arguments = [sys.executable, "-c", code, "report", str(sweep), "--table", "1"]
    ran = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
