"""Tables of a sweep: literal ones from a few records, and what is missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.command_line import names
from helpers.sweep_records import evaluation, record, rows, small_grid, write_sweep
from helpers.sweep_reports import QWEN, RECIPES, few, grid_of, report_of

from ia2.experiment.sweep.records import load_results
from ia2.report.sweep.cells import Report
from ia2.report.sweep.paper import paper_tables
from ia2.report.sweep.paper_layouts import available, paper_table
from ia2.report.sweep.printing import print_tables
from ia2.utils.errors import ConfigError
from ia2.utils.format import latex, markdown

# ---------------------------------------------------------------------------------- the paper's own


def test_the_papers_tables_are_whole() -> None:
    tables = paper_tables()
    assert list(tables) == list(range(1, 21))
    for table in tables.values():
        assert table.adapter in ("lora", "ia3")
        assert table.answers in ("ground_truth", "icl_responses")
        for row in table.rows:
            assert list(row.figures) == list(table.recipes)
            for figure in row.figures.values():
                assert 0 <= figure.accuracy <= 100
                assert figure.ece is None or 0 <= figure.ece <= 1
                assert (figure.ece is None) == (row.source in ("GSM8K", "HMathA", "SciQ"))


def test_the_papers_figures_are_those_of_the_method_page() -> None:
    """The specification of the method gives some of them by itself."""
    given = {
        "SST2/SST2": ((85.4, 0.13), (65.2, 0.22), (82.7, 0.28), (90.4, 0.06)),
        "FinS/FinS": ((63.6, 0.12), (67.4, 0.31), (63.1, 0.24), (78.7, 0.16)),
        "SciQr/SciQr": ((87.7, 0.07), (88.3, 0.07), (90.4, 0.09), (91.7, 0.05)),
        "SciQr/QASCr": ((56.5, 0.08), (76.5, 0.09), (71.2, 0.12), (79.4, 0.09)),
        "STF/STF": ((66.0, 0.07), (52.4, 0.29), (62.2, 0.16), (62.4, 0.29)),
        "AGN/AGN": ((30.0, 0.13), (27.9, 0.52), (24.0, 0.11), (31.8, 0.35)),
    }
    for name, figures in given.items():
        row = paper_tables()[1].find(*name.split("/"), QWEN, 4)
        assert row is not None
        assert [(f.accuracy, f.ece) for f in row.figures.values()] == list(figures)
    free = {
        "GSM8K": (76.4, 70.9, 77.4, 73.6),
        "HMathA": (60.4, 50.4, 47.8, 55.3),
        "SciQ": (37.5, 35.0, 6.9, 40.8),
    }
    for name, accuracies in free.items():
        row = paper_tables()[2].find(name, name, QWEN, 4)
        assert row is not None
        assert tuple(row.figures[recipe].accuracy for recipe in RECIPES) == accuracies


def test_tables_with_the_same_runs_have_the_same_figures() -> None:
    """ICL and IA2 alone do not depend on what is fine-tuned on; tables 5 and 7 repeat others."""
    tables = paper_tables()
    for truth, responses in ((1, 9), (2, 3), (6, 16), (10, 11), (12, 13), (14, 15), (17, 18), (19, 20)):
        assert len(tables[truth].rows) == len(tables[responses].rows)
        for row in tables[truth].rows:
            other = tables[responses].find(row.source, row.dataset, row.model, row.num_examples)
            assert other is not None
            for recipe in ("icl", "ia2"):
                assert row.figures[recipe] == other.figures[recipe], (truth, row.source, row.dataset)
    for row in tables[5].rows:
        other = tables[10 if row.num_examples == 2 else 2].find(
            row.source, row.dataset, QWEN, row.num_examples
        )
        assert row.num_examples == 8 or other is not None
        if other is not None:
            assert all(other.figures[r] == f for r, f in row.figures.items())
    for row in tables[7].rows:
        if row.adapter == "r8 qko":
            other = tables[12 if row.source == "SST2" else 2].find(
                row.source, row.dataset, row.model, row.num_examples
            )
            assert other is not None
            assert all(other.figures[r] == f for r, f in row.figures.items())


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


def test_another_model_or_size_has_no_figures_beside(tmp_path: Path) -> None:
    for name, given in (("model", few(model="demo")), ("size", few(size=8))):
        [table] = paper_table(report_of(tmp_path / name, given), 1)
        assert len(table.rows) == 1
        text = markdown(table)
        assert "The paper's figures are of Qwen/Qwen3-4B-Base at N = 4: not beside other models" in text
        assert "In italics" not in text


def test_every_model_and_size_has_a_table_where_the_papers_is_not_there(tmp_path: Path) -> None:
    given = [*few(8, "a"), *few(32, "a"), *few(8, "b"), *few(4), *few(8)]
    titles = [table.title for table in paper_table(report_of(tmp_path, given), 1)]
    assert [title.split("draws), ")[1] for title in titles] == [
        "a, N = 8.", "a, N = 32.", "b, N = 8.", f"{QWEN}, N = 4.",
    ]  # fmt: skip
    labels = re.findall(r"\\label\{(.*?)\}", "".join(map(latex, paper_table(report_of(tmp_path, given), 1))))
    assert len(set(labels)) == 4


def test_rows_come_in_the_papers_order_and_others_behind(tmp_path: Path) -> None:
    ood = {"SST2": evaluation(rows(9)), "PoemS": evaluation(rows(8), dataset="PoemS", role="ood")}
    given = [*few(benchmark="STF"), *few(benchmark="Intents"), *few(benchmark="AGN")]
    given += [record(ood, model=QWEN, recipe=recipe, size=4) for recipe in RECIPES]
    [table] = paper_table(report_of(tmp_path, given), 1)
    ours = [row for row in table.rows if row[0].text]
    assert [(row[0].text, row[1].text) for row in ours] == [
        ("AGN", "AGN"), ("SST2", "PoemS (OOD)"), ("SST2", "SST2"), ("STF", "STF"), ("Intents", "Intents"),
    ]  # fmt: skip


def test_what_is_missing_is_counted(tmp_path: Path) -> None:
    given = [*few(), *few(benchmark="AGN")]
    gone = [
        r for r in given
        if (r["spec"]["benchmark"], r["spec"]["recipe"]) != ("AGN", "ia2")
        and (r["spec"]["benchmark"], r["spec"]["recipe"], r["spec"]["seed"]) != ("SST2", "sft", 1)
    ]  # fmt: skip
    [table] = paper_table(report_of(tmp_path, gone), 1)
    text = markdown(table)
    agn, _, sst2, _ = grid_of(text)[1:]
    assert agn[10:14] == ["–"] * 4
    assert sst2[6] == "50.0, 1 of 2 seeds"
    assert "Missing (–): 1 of 8: ia2 on AGN." in text
    assert "Means over fewer seeds than others of their row: sft on SST2 (1 of 2)." in text
    # the difference is of the seed that both have
    [entry] = [
        e
        for e in table.rows[2]
        if isinstance(e.value, dict) and e.value.get("seeds") == [0] and "low" in e.value
    ][:1]
    assert entry.text.startswith("+30.0")


def test_the_choice_of_rates_is_named(tmp_path: Path) -> None:
    given = few() + [record(rows(20, 20), model=QWEN, size=4, seed=s, rate=1e-4, loss=0.9) for s in (0, 1)]
    for select, accuracy, said in (
        ("dev", "47.5 (3.5)", "chosen by dev loss, mean over seeds, for each benchmark: sft 0.001 of 2."),
        ("test", "100.0 (0.0)", "chosen by test accuracy, mean over seeds, as in the paper: optimistic"),
        ("dev-per-seed", "47.5 (3.5)", "chosen by dev loss, for each seed alone"),
    ):
        [table] = paper_table(report_of(tmp_path / select, given, select), 1)  # type: ignore[arg-type]
        text = markdown(table)
        assert accuracy in grid_of(text)[1][6]
        assert said in text
        assert "fixed beforehand: 0.001 (ia2, ia2-sft)" in text


def test_data_notes_and_settings_are_said(tmp_path: Path) -> None:
    given = few(settings={"adapter.rank": 4}, notes=["SST2 cut to 20,000 rows.", "x"], max_test=20)
    [table] = paper_table(report_of(tmp_path, given), 1)
    text = markdown(table)
    assert "Data: SST2 cut to 20,000 rows; x." in text
    assert "adapter.rank = 4." in text


def test_settings_that_are_not_the_same_everywhere_are_said(tmp_path: Path) -> None:
    given = few(settings={"max_answer_tokens": 9}) + few(benchmark="AGN")
    [table] = paper_table(report_of(tmp_path, given), 1)
    assert "Settings that differ between benchmarks or N: max_answer_tokens." in markdown(table)


def test_folders_of_several_grids_fill_their_tables_together(tmp_path: Path) -> None:
    truth = write_sweep(tmp_path / "table1", few())
    of_responses = [r for r in few(settings={"sft.answers": "icl_responses"}) if "sft" in r["spec"]["recipe"]]
    responses = write_sweep(tmp_path / "table9", of_responses)
    report = Report(load_results([truth, responses]))
    assert "sft@sft.answers=icl_responses" in report.labels
    assert {1, 9} <= set(available(report))
    assert "Fine-tuned on ICL's responses" in markdown(paper_table(report, 9)[0])


def test_two_verbalisers_of_a_benchmark_are_two_rows(tmp_path: Path) -> None:
    digits = few()
    for r in digits:
        r["spec"]["verbaliser"] = "digits"
        r["key"] += "d"
    [table] = paper_table(report_of(tmp_path, [*few(), *digits]), 1)
    assert [row[0].text for row in table.rows if row[0].text] == ["SST2, words", "SST2, digits"]
    assert "verbaliser words (SST2); digits (SST2)" in markdown(table)


# ------------------------------------------------------------------------------------- other tables


def test_free_text_has_accuracy_alone_beside_the_base_model(tmp_path: Path) -> None:
    given = [*few(benchmark="GSM8K"), record(rows(8, 20), benchmark="GSM8K", model=QWEN, recipe="base")]
    [table] = paper_table(report_of(tmp_path, given), 2)
    header, ours, theirs = grid_of(markdown(table))
    assert header[2:7] == ["w/o ICL acc", "ICL acc", "SFT only acc", "IA2 only acc", "IA2 → SFT acc"]
    assert ours[2] == "40.0"
    assert theirs[2:7] == ["*56.4 (0.0)*", "*76.4 (1.1)*", "*70.9 (2.8)*", "*77.4 (2.8)*", "*73.6 (3.7)*"]
    with pytest.raises(ConfigError, match=r"table 1 .*sft, ia2, ia2-sft"):
        paper_table(report_of(tmp_path, given), 1)


def test_gaps_over_sizes(tmp_path: Path) -> None:
    given = [*few(2, benchmark="GSM8K"), *few(4, benchmark="GSM8K")]
    [table] = paper_table(report_of(tmp_path, given), 5)
    ours = [row for row in grid_of(markdown(table))[1:] if row[0]]
    assert [row[2] for row in ours] == ["2", "4"]
    assert [row[7].split()[0] for row in ours] == ["+10.0", "+10.0"]
    assert [row[8].split()[0] for row in ours] == ["+30.0", "+30.0"]


def test_icl_responses_and_adapters_have_tables_of_their_own(tmp_path: Path) -> None:
    of_responses = {"sft.answers": "icl_responses"}
    given = few()
    for recipe in ("sft", "ia2-sft"):
        given += [
            record(
                rows(3, 20),
                model=QWEN,
                size=4,
                seed=s,
                recipe=recipe,
                variant="responses",
                settings=of_responses,
            )
            for s in (0, 1)
        ]
    given += [record(rows(11, 20), model=QWEN, size=4, seed=s, recipe="ia2+sft", beta=0.5) for s in (0, 1)]
    report = report_of(tmp_path, given)
    assert available(report) == [1, 5, 8, 9, 12, 13]
    [table] = paper_table(report, 9)
    text = markdown(table)
    ours = grid_of(text)[1]
    # alignment alone has no answers to fine-tune on: the plain one stands there
    assert ours[6] == "15.0 (0.0)"
    assert "57.5" in ours[10]
    assert "55.0" in ours[18]
    assert "Fine-tuned on ICL's responses." in text
    assert "0.001, β 0.5 (ia2+sft)" in text
    with pytest.raises(ConfigError) as error:
        paper_table(report, 6)
    names(str(error.value), "table 6 ", "sft, ia2, ia2-sft", "adapter ia3", "1, 5, 8, 9, 12, 13")
    ia3 = few(settings={"adapter.type": "ia3"})
    assert available(report_of(tmp_path / "ia3", ia3)) == [6, 8, 17]
    [table] = paper_table(report_of(tmp_path / "ia3", ia3), 6)
    assert "adapter ia3" in markdown(table)


def test_ablations_of_the_adapter(tmp_path: Path) -> None:
    qk = {"adapter.target_modules": ["q_proj", "k_proj"]}
    given = few(8, "meta-llama/Llama-3.2-1B")
    given += [
        r
        for r in few(8, "meta-llama/Llama-3.2-1B", settings=qk, variant="qk")
        if r["spec"]["recipe"] != "icl"
    ]
    report = report_of(tmp_path, given)
    assert {arm.rank_and_modules for arm in report.arms} == {"r8 qko", "r8 qk"}
    [table] = paper_table(report, 7)
    text = grid_of(markdown(table))
    assert [row[2] for row in text[1:]] == ["r8 qko", "", "r8 qk", ""]
    place = text[0].index("SFT only acc (voc.)")
    assert text[2][place] == "*53.5 (5.0)*"
    assert text[4][place] == "*50.0 (6.4)*"


def test_distillation_needs_soft_labels(tmp_path: Path) -> None:
    given = few(8, settings={"sft.answers": "icl_responses"})
    assert 4 not in available(report_of(tmp_path / "without", given))
    given += [record(rows(13, 20), model=QWEN, size=8, recipe="soft-sft")]
    [table] = paper_table(report_of(tmp_path / "with", given), 4)
    assert "SFT (soft labels) acc" in grid_of(markdown(table))[0]


def test_table_8_tests_over_benchmarks_and_seeds(tmp_path: Path) -> None:
    given = [r for b in ("SST2", "FinS", "AGN", "STF") for r in few(8, "demo", b)]
    [table] = paper_table(report_of(tmp_path, given), 8)
    header, accuracy, nll, brier, ece, vocabulary = grid_of(markdown(table))
    found = dict(zip(header, accuracy, strict=True))
    assert (found["N"], found["measure"], found["pairs: n"]) == ("8", "accuracy", "8")
    assert found["pairs: difference"] == "+30.0"
    assert found["benchmarks: better"] == "4 of 4"
    assert found["benchmarks: difference [95%]"] == "+30.0 [+30.0, +30.0]"
    # the same difference everywhere has no t
    assert found["pairs: t"] == "–"
    assert found["pairs: Wilcoxon"] == "0.008"
    titles = [dict(zip(header, row, strict=True))["measure"] for row in (nll, brier, ece, vocabulary)]
    assert titles == ["NLL", "Brier", "ECE", "accuracy over the vocabulary"]


def test_table_8_counts_out_of_distribution_pairs(tmp_path: Path) -> None:
    given = [
        record(
            {
                "SST2": evaluation(rows(right, 20)),
                "PoemS": evaluation(rows(right - 2, 20), dataset="PoemS", role="ood"),
            },
            recipe=recipe, seed=seed,
        )
        for recipe, right in (("sft", 9), ("ia2-sft", 15)) for seed in (0, 1, 2)
    ]  # fmt: skip
    [table] = paper_table(report_of(tmp_path, given), 8)
    header, accuracy, *_ = grid_of(markdown(table))
    found = dict(zip(header, accuracy, strict=True))
    # they share their training examples: one benchmark
    assert (found["pairs: n"], found["benchmarks: better"]) == ("6", "1 of 1")
    assert "out of distribution" in markdown(table)


def test_joint_training_is_compared_on_the_same_answers_or_says_so(tmp_path: Path) -> None:
    given = few(8, "demo") + [record(rows(12, 20), recipe="ia2+sft", beta=0.1, seed=s) for s in (0, 1)]
    responses = {"sft.answers": "icl_responses"}
    given += [
        record(rows(13, 20), recipe="ia2-sft", variant="responses", settings=responses, seed=s)
        for s in (0, 1)
    ]
    report = report_of(tmp_path, given)
    pairs = {row[2].text for row in print_tables(report, "tests").tables[0].rows}
    assert "ia2-sft − ia2+sft (true answers against ICL's answers)" in pairs
    assert "ia2-sft@responses − ia2+sft" in pairs
    [full] = print_tables(report, "full").tables
    answers = {row[4].text: row[5].text for row in full.rows}
    assert answers == {
        "icl": "–", "sft": "true", "ia2": "–", "ia2-sft": "true",
        "ia2-sft@responses": "ICL's", "ia2+sft": "ICL's",
    }  # fmt: skip


def test_variants_are_tested_against_the_plain_method(tmp_path: Path) -> None:
    orders = {"context_draws": 8}
    given = few(8, "demo") + [
        record(rows(18, 20), recipe="ia2-sft", variant="orders", settings=orders, seed=s) for s in (0, 1)
    ]
    printed = print_tables(report_of(tmp_path, given), "tests")
    pairs = {row[2].text for row in printed.tables[0].rows}
    assert pairs == {
        "ia2-sft − icl", "ia2-sft − sft", "ia2-sft − ia2",
        "ia2-sft@orders − icl", "ia2-sft@orders − sft", "ia2-sft@orders − ia2", "ia2-sft@orders − ia2-sft",
    }  # fmt: skip


def test_own_tables(tmp_path: Path) -> None:
    report = report_of(tmp_path, small_grid())
    [full] = print_tables(report, "full").tables
    assert len(full.rows) == 2 * 2 * (1 + 2 * 4)
    first = dict(zip([c.full for c in full.columns], [e.text for e in full.rows[1]], strict=True))
    assert (first["source"], first["recipe"], first["N"], first["asim to ICL"]) == (
        "SST2, words", "icl", "8", "0.85 (0.00)",
    )  # fmt: skip
    assert re.fullmatch(r"\d+\.\d \[\d+\.\d, \d+\.\d\]", first["accuracy [95%]"])
    assert {"base", "ICL − SFT [95%]", "NLL [95%]", "Brier [95%]"} <= set(first)
    [thresholds] = print_tables(report, "thresholds").tables
    assert [row[1].text for row in thresholds.rows] == ["SST2, words", "FinS, words"]
    [icl] = print_tables(report, "icl").tables
    assert {row[-1].text.split(":")[0] for row in icl.rows} <= {"yes", "unclear"}


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
    [table] = paper_table(report.where(icl_works=True), 1)
    assert [row[0].text for row in table.rows] == ["FinS"]
    assert [row[-1].text for row in paper_table(report, 1)[0].rows] == ["yes", "no: SFT is better than ICL"]
    printed = print_tables(report, None)
    assert "Does ICL work with demo at N = 8? yes: FinS; no: SST2." in printed.lines
    only = report_of(tmp_path / "none", [r for r in given if r["spec"]["benchmark"] == "SST2"])
    with pytest.raises(ConfigError, match=r"table 1 .*ICL works"):
        paper_table(only.where(icl_works=True), 1)
    with pytest.raises(ConfigError, match=r"table full .*ICL works"):
        print_tables(only.where(icl_works=True), "full")


# --------------------------------------------------------------------------------- overview, verdicts


def verdicts(tmp_path: Path, difference: int) -> list[str]:
    given = []
    for number, benchmark in enumerate(("SST2", "FinS", "AGN", "STF", "Intents", "GSM8K")):
        for seed in range(3):
            noise = (number + seed * seed) % 3 - 1
            given.append(record(rows(50 + noise, 100), benchmark=benchmark, seed=seed))
            given.append(
                record(rows(50 + difference - noise, 100), benchmark=benchmark, seed=seed, recipe="ia2-sft")
            )
    return print_tables(report_of(tmp_path, given), None).lines


def test_verdicts(tmp_path: Path) -> None:
    better = verdicts(tmp_path / "better", 20)
    assert better[1].startswith("Over everything (N = 8): IA2 → SFT is more accurate than SFT, +20.0 [")
    assert "points among the labels (+" in better[1] and "and better in NLL, −0." in better[1]
    assert "(6 benchmarks, 18 pairs of runs; 95% t over benchmarks)." in better[1]
    assert better[2] == "Where ICL works: there is no such benchmark among these."
    assert "IA2 → SFT is less accurate than SFT, −20.0" in verdicts(tmp_path / "worse", -20)[1]
    assert "not distinguishably worse in NLL" in verdicts(tmp_path / "null", 0)[1]


def test_a_verdict_on_no_difference(tmp_path: Path) -> None:
    given = [record(rows(8), recipe=recipe) for recipe in ("sft", "ia2-sft")]
    line = print_tables(report_of(tmp_path, given), None).lines[1]
    names(line, "no more accurate", "+0.0", "no better", "+0.000", "1 benchmark, 1 pair")


def test_a_verdict_on_few_benchmarks_says_so(tmp_path: Path) -> None:
    one = print_tables(report_of(tmp_path / "one", few(8, "demo")), None).lines[1]
    assert "more accurate on this one benchmark than SFT, +30.0 points" in one
    assert "(1 benchmark, 2 pairs of runs; one benchmark: no interval over them)." in one
    two = print_tables(report_of(tmp_path / "two", small_grid(sizes=(8,))), None).lines[1]
    assert "more accurate" in two and "(2 benchmarks" in two


def test_the_overview_of_other_cells(tmp_path: Path) -> None:
    printed = print_tables(report_of(tmp_path, [record(rows(5), recipe="icl")]), None)
    names(printed.lines[1], "ia2-sft", "sft", "no verdict")
    assert [table.name for table in printed.tables] == ["full"]
    names(printed.lines[-1], "--table", "full, tests, variants, thresholds, icl")
