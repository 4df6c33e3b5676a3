"""Records, the choice of rates, differences, thresholds, variants: known answers, planted effects."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.sweep_records import drawn, evaluation, record, rows, small_grid, write_sweep

from ia2.experiment.sweep.records import Results, filtered, load_results
from ia2.report.sweep.cells import IclVerdict, Place, Report
from ia2.report.sweep.comparisons import halves, variants_table
from ia2.report.sweep.own_tables import crossing, threshold_table
from ia2.report.sweep.selection import ChosenRuns, choose_runs, differences
from ia2.utils.errors import ConfigError, DataError, RunFolderError
from ia2.utils.format import Entry, mean_entry
from ia2.utils.statistics import paired_test


def read(tmp_path: Path, records: Sequence[dict[str, Any]], name: str = "sweep") -> Results:
    return load_results([write_sweep(tmp_path / name, records)])


def one(tmp_path: Path, records: Sequence[dict[str, Any]], name: str = "sweep", **options: Any) -> ChosenRuns:
    [runs] = choose_runs(read(tmp_path, records, name).cells, **options)
    return runs


# ------------------------------------------------------------------------------------------ records


def test_folders_are_merged_and_a_cell_counts_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = write_sweep(tmp_path / "a", [record(rows(5), seed=0), record(rows(6), seed=1)])
    late = record(rows(7), seed=2)
    second = write_sweep(tmp_path / "b", [record(rows(6), seed=1)])
    # an unfinished sweep is read too
    (second / "cells").mkdir()
    (second / "cells" / f"{late['key']}.json").write_text(json.dumps(late))
    (second / "failed.json").write_text(json.dumps([{"key": "k", "spec": {}, "error": "e"}]))
    (second / "sweep.json").unlink()
    with caplog.at_level("INFO", "ia2"):
        results = load_results([first, second])
    assert [cell.seed for cell in results.cells] == [0, 1, 2]
    assert "1 cells are in several folders" in caplog.text
    assert (results.name, results.total, results.failed) == ("a, b", None, 1)


def damaged(key: str = "", **changes: Any) -> str:
    found = record(rows(5))
    found.pop(key, None)
    if changes:
        found["evaluations"]["SST2"]["rows"].update(changes)
    return json.dumps(found)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"key": "x', "Unterminated string"),
        ("[1, 2]", "no record of a cell"),
        (damaged("spec"), "'spec'"),
        (damaged(correct="01x"), "rows.correct of SST2"),
        (damaged(correct="0101"), "n = 10, but 4 answers"),
        (damaged(confidence=[7.0] * 10), "confidence of SST2"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    folder = write_sweep(tmp_path / "sweep", [record(rows(5), notes=["a line\u2028end in a text"])])
    with (folder / "cells.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(RunFolderError) as error:
        load_results([folder])
    assert f"{folder / 'cells.jsonl'}:2: damaged" in str(error.value) and problem in str(error.value)


def test_filters(tmp_path: Path) -> None:
    results = read(tmp_path, small_grid(seeds=1))
    kept = filtered(results, benchmarks=["FinS"], sizes=[32], seeds=[0])
    assert {(c.benchmark, c.num_examples) for c in kept.cells} == {("FinS", 32), ("FinS", None)}
    for wrong in ({"benchmarks": ["Fins"]}, {"models": ["gpt"]}, {"sizes": [4]}, {"seeds": [7]}):
        with pytest.raises(ConfigError, match=rf"{next(iter(wrong.values()))[0]} is in none"):  # type: ignore[index]
            filtered(results, **wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------- choice of rates


def two_rates() -> list[dict[str, Any]]:
    """1e-4 has the lower dev loss, 1e-3 the better test accuracy; at seed 1 dev is for 1e-3 too."""
    return [
        record(rows(5), rate=1e-4, seed=0, loss=0.1),
        record(rows(5), rate=1e-4, seed=1, loss=0.5),
        record(rows(9), rate=1e-3, seed=0, loss=0.6),
        record(rows(8), rate=1e-3, seed=1, loss=0.4),
    ]


def test_rates_are_chosen_by_what_was_asked(tmp_path: Path) -> None:
    by_dev = one(tmp_path, two_rates(), "a")
    assert (by_dev.chosen, by_dev.tried) == (("0.0001",), ("0.0001", "0.001"))
    assert by_dev.values("SST2", "accuracy") == {0: 0.5, 1: 0.5}
    assert one(tmp_path, two_rates(), "b", select="test").chosen == ("0.001",)
    each = one(tmp_path, two_rates(), "c", select="dev-per-seed")
    assert {seed: cell.learning_rate for seed, cell in each.cells.items()} == {0: 1e-4, 1: 1e-3}
    # a rate with fewer seeds is not chosen for their luck
    lucky = [*two_rates(), record(rows(10), rate=3e-4, seed=0, loss=0.01)]
    assert one(tmp_path, lucky, "d").chosen == ("0.0001",)


@pytest.mark.parametrize(
    ("candidates", "chosen"),
    [
        ([(1e-4, None, None), (1e-3, None, 9.0)], "0.001"),  # without a loss a rate comes last
        ([(1e-3, None, 0.5), (1e-4, None, 0.5)], "0.0001"),  # of equal ones the lowest
        ([(1e-3, 0.1, 0.4), (1e-3, 0.9, 0.2), (1e-4, 0.1, 0.3)], "0.001, β 0.9"),
    ],
)
def test_rate_and_beta(tmp_path: Path, candidates: list[Any], chosen: str) -> None:
    given = [
        record(rows(5), recipe="ia2+sft" if beta else "sft", rate=rate, beta=beta, loss=loss)
        for rate, beta, loss in candidates
    ]
    assert one(tmp_path, given).chosen == (chosen,)


def test_cells_of_one_name_and_other_settings_are_told_apart(tmp_path: Path) -> None:
    """Folders of two grids may call different things `sft`; they are never averaged."""
    shared = {"align.epochs": 30}
    given = [
        record(rows(5), seed=0, settings=shared),
        record(rows(6), seed=0, settings={**shared, "sft.answers": "icl_responses"}),
        record(rows(7), seed=1, settings={**shared, "adapter.target_modules": ["q_proj", "k_proj"]}),
        record(rows(8), seed=1, settings=shared),
        record(rows(9), seed=0, settings=shared, max_test=10),
    ]
    chosen = choose_runs(read(tmp_path, given).cells)
    assert {runs.label: list(runs.cells) for runs in chosen} == {
        "sft": [0, 1],
        "sft@sft.answers=icl_responses": [0],
        "sft@adapter.target_modules=q_proj+k_proj": [1],
        "sft@max_test=10": [0],
    }


# ------------------------------------------------------------------------- means and differences


def test_means_and_deviations(tmp_path: Path) -> None:
    runs = one(tmp_path, [record(rows(right), seed=seed) for seed, right in enumerate((5, 7, 9))])
    found = mean_entry(runs.values("SST2", "accuracy"), percent=True, expected=4)
    assert found.text == "70.0 (20.0), 3 of 4 seeds"
    assert found.value == {"mean": pytest.approx(0.7), "sd": pytest.approx(0.2), "seeds": [0, 1, 2]}
    assert mean_entry(runs.values("PoemS", "accuracy")).text == "–"
    assert mean_entry({None: 0.5}, expected=3).text == "0.50"


def test_only_shared_seeds_are_compared_and_base_stands_for_all(tmp_path: Path) -> None:
    grid = [record(rows(5), recipe="sft", seed=s) for s in (0, 1)]
    grid += [record(rows(8), recipe="ia2-sft", seed=s) for s in (1, 2)]
    grid += [record(rows(2), recipe="base")]
    # among the labels, and beside it over the vocabulary
    grid[1]["evaluations"]["SST2"]["metrics"]["labels"]["accuracy"] = 0.6
    sft, method, base = choose_runs(read(tmp_path, grid).cells)
    assert differences(method, sft, "SST2", "accuracy") == {1: pytest.approx(0.2)}
    assert differences(method, sft, "SST2", "accuracy_vocabulary") == {1: pytest.approx(0.3)}
    assert differences(method, base, "SST2", "accuracy") == {1: pytest.approx(0.6), 2: pytest.approx(0.6)}
    assert differences(base, sft, "SST2", "accuracy") == {0: pytest.approx(-0.3), 1: pytest.approx(-0.4)}
    assert differences(method, sft, "FinS", "accuracy") == {}


def test_other_rows_are_not_compared(tmp_path: Path) -> None:
    other = record(rows(5), recipe="ia2-sft")
    other["evaluations"]["SST2"]["test"] = "others"
    sft, method = choose_runs(read(tmp_path, [record(rows(5)), other]).cells)
    with pytest.raises(DataError, match=r"SST2: .*others, 10 rows; rows of SST2, 10 rows"):
        differences(method, sft, "SST2", "accuracy")


def planted(effect: float, between: float = 0.0, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return {f"b{b}": effect + rng.normal(0, between) + rng.normal(0, 0.03, 5) for b in range(8)}


def test_planted_effects_are_found_and_nulls_as_often_as_they_may_be() -> None:
    """No effect, but benchmarks differ: the paper's test finds too much, benchmarks as wholes do not."""
    real = paired_test(planted(0.05))
    assert (real.pairs, real.clusters, real.higher, real.lower) == (40, 8, 8, 0)
    assert max(real.p_t, real.p_wilcoxon, real.p_cluster) < 0.001
    assert 0 < real.whole.low < 0.05 < real.whole.high
    found = [paired_test(planted(0.0, between=0.05, seed=seed)) for seed in range(100)]
    assert np.mean([test.p_cluster < 0.05 for test in found]) < 0.10
    assert np.mean([not test.whole.low <= 0 <= test.whole.high for test in found]) < 0.10
    assert np.mean([test.p_t < 0.05 for test in found]) > 0.25


# --------------------------------------------------------------------------------------- thresholds


@pytest.mark.parametrize(
    ("values", "margin", "expected"),
    [
        ((0.2, 0.1, -0.1, -0.2), 0.0, 2**3.5),
        ((0.2, 0.1, 0.0, -0.2), 0.0, 16),
        ((0.2, 0.1, 0.0, -0.2), 0.1, 8),
        ((-0.2, -0.1, 0.0, -0.1), 0.0, -math.inf),
        ((-0.2, 0.1, -0.1, 0.1), 0.0, math.inf),
        ((0.1, -0.1, 0.1, -0.1), 0.0, 2**4.5),  # the last of several
    ],
)
def test_crossings_by_hand(values: tuple[float, ...], margin: float, expected: float) -> None:
    assert crossing((4, 8, 16, 32), values, margin) == pytest.approx(expected)


def planted_curve(
    effects: dict[int, float], seeds: int = 6, n: int = 300, draw: int = 0
) -> list[dict[str, Any]]:
    found = []
    for size, effect in effects.items():
        for seed in range(seeds):
            of = [draw, seed, size]
            found.append(record(drawn(0.6, n, of), recipe="sft", size=size, seed=seed))
            found.append(record(drawn(0.6 + effect, n, [*of, 1]), recipe="ia2-sft", size=size, seed=seed))
    return found


def threshold(tmp_path: Path, records: Sequence[dict[str, Any]], name: str = "sweep") -> Entry | None:
    table = threshold_table(Report(read(tmp_path, records, name)))
    return table.rows[0][-2] if table.rows else None


def test_the_threshold_covers_a_planted_crossing(tmp_path: Path) -> None:
    """Differences fall on a line in log2 N through zero at N = 16; 95% intervals miss it now and then."""
    effects = {size: 0.06 * (4 - math.log2(size)) for size in (4, 8, 16, 32, 64)}
    covered, widths = 0, []
    ends = {"never better": -math.inf, "still better": math.inf}
    for draw in range(20):
        found = threshold(tmp_path, planted_curve(effects, draw=draw), f"sweep-{draw}")
        assert found is not None
        low, value, high = (ends.get(found.value[end], found.value[end]) for end in ("low", "n", "high"))
        covered += low <= 16 <= high
        widths.append(math.log2(high) - math.log2(low))
        assert low <= value <= high
    assert covered >= 16
    assert np.median(widths) < 2.5


@pytest.mark.parametrize(
    ("effects", "begins", "ends"),
    [
        ({4: 0.3, 32: 0.2}, "still better at N = 32", "(for certain)"),
        ({4: -0.3, 32: -0.2}, "never better from N = 4 on", "(for certain)"),
        ({4: 0.3, 32: 0.0}, "", ", above 32]"),
        ({4: 0.0, 32: -0.3}, "", "]"),
    ],
)
def test_thresholds_outside_the_sizes_are_said(
    tmp_path: Path, effects: dict[int, float], begins: str, ends: str
) -> None:
    found = threshold(tmp_path, planted_curve(effects))
    assert found is not None
    assert found.text.startswith(begins) and found.text.endswith(ends)


def test_a_threshold_needs_two_sizes_and_one_set_of_rows(tmp_path: Path) -> None:
    assert threshold(tmp_path, planted_curve({4: 0.2}), "one") is None
    with pytest.raises(DataError, match="different test rows"):
        threshold(tmp_path, planted_curve({4: 0.2}) + planted_curve({8: 0.2}, n=200), "two")
    single = threshold(tmp_path, planted_curve({4: 0.2, 32: -0.2}, seeds=1), "single")
    assert single is not None and "[" not in single.text and single.value["low"] is None


# ------------------------------------------------------------------------------------- does ICL work?


def icl_of(
    tmp_path: Path, given: Sequence[dict[str, Any]], benchmark: str = "SST2", name: str = "sweep"
) -> IclVerdict:
    report = Report(read(tmp_path, given, name))
    [task] = report.tasks
    found = report.icl(Place(task, benchmark, 8))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("icl", "sft", "base", "expected"),
    [
        (0.9, 0.7, 0.3, ("yes", "ICL is better than SFT, and than the bare model")),
        (0.5, 0.4, 0.1, ("no", "ICL is not above guessing")),
        (0.9, 0.7, 0.9, ("no", "ICL is not above the bare model")),
        (0.8, 0.95, 0.3, ("no", "SFT is better than ICL")),
        (0.9, 0.9, 0.3, ("unclear", "ICL and SFT cannot be told apart")),
        (0.9, 0.7, None, ("unclear", "the bare model was not run beside it")),
        (0.9, None, 0.3, ("unclear", "SFT was not run beside it")),
    ],
)
def test_whether_icl_works(
    tmp_path: Path, icl: float, sft: float | None, base: float | None, expected: tuple[str, str]
) -> None:
    given = [record(rows(round(100 * icl) + seed - 1, 100), recipe="icl", seed=seed) for seed in range(3)]
    if sft is not None:
        # other draws than ICL's gain most from fine-tuning
        given += [
            record(rows(round(100 * sft) - seed + 1, 100), recipe="sft", seed=seed) for seed in range(3)
        ]
    if base is not None:
        given.append(record(rows(round(100 * base), 100), recipe="base"))
    found = icl_of(tmp_path, given)
    assert (found.judged.word, found.judged.reason) == expected
    assert (found.icl, found.base, found.chance) == (pytest.approx(icl), base, 0.5)
    assert (found.judged.headroom is None) == (sft is None)


def test_what_icl_is_judged_by(tmp_path: Path) -> None:
    # one draw with a thousand rows tells nothing of other draws
    draw = [record(rows(right, 1000), recipe=r) for r, right in (("icl", 900), ("sft", 600), ("base", 100))]
    assert icl_of(tmp_path, draw, name="draw").judged.reason == "one draw cannot tell"
    # the most frequent label is a guess too
    frequent = record(rows(75, 100), recipe="icl")
    frequent["evaluations"]["SST2"]["majority"] = 0.75
    assert icl_of(tmp_path, [frequent], name="frequent").chance == 0.75
    # free text has no guess
    free = [record(rows(30, 100), recipe="icl", benchmark="GSM8K")]
    assert icl_of(tmp_path, free, "GSM8K", "free").chance == 0
    # a benchmark of one's own, in records without the number of its labels
    own = {"Own": evaluation(rows(40, 100), dataset="Own")}
    own["Own"]["metrics"]["labels"] = own["Own"]["metrics"].pop("answer")
    unknown = icl_of(tmp_path, [record(own, benchmark="Own", recipe="icl")], "Own", "own").judged
    assert (unknown.word, unknown.reason) == ("unclear", "number of labels unknown")


# ----------------------------------------------------------------------------------------- variants

PLAIN = (0.6, 0.2)  # share of right rows, overconfidence


def variant_cell(benchmark: str, seed: int, variant: str, right: float, over: float) -> dict[str, Any]:
    """A cell with so many right rows, and a confidence that is too high by so much."""
    found = evaluation(rows(round(300 * right), 300), [min(1.0, right + over)] * 300, dataset=benchmark)
    # sure by how much, in nats; draws differ a little
    found["metrics"]["labels"]["nll"] = 1 - right + over + 0.001 * seed
    settings = {"align.objective": variant} if variant else {}
    options = {"recipe": "ia2-sft", "variant": variant, "seed": seed, "settings": settings}
    return record({benchmark: found}, benchmark=benchmark, **options)


def variants_report(tmp_path: Path, variants: dict[str, Any], seeds: int = 4) -> Report:
    """Plain cells and those of variants: name → (right, over) of a (benchmark number, seed)."""
    cells = []
    for number, benchmark in enumerate(("SST2", "Intents")):
        for seed in range(seeds):
            cells.append(variant_cell(benchmark, seed, "", *PLAIN))
            cells += [variant_cell(benchmark, seed, n, *value(number, seed)) for n, value in variants.items()]
    return Report(read(tmp_path, cells))


def test_a_real_gain_is_selected_and_confirmed(tmp_path: Path) -> None:
    better = {"better": lambda number, seed: (0.79 + 0.01 * (seed // 2), 0.05)}
    report = variants_report(tmp_path, {**better, "worse": lambda number, seed: (0.5, 0.3)})
    select, confirm = halves(report, "demo", 8, "ia2-sft@better")
    assert select is not None and confirm is not None
    assert select.pairs == confirm.pairs == 4
    assert select.accuracy.value == pytest.approx(0.195, abs=0.002)
    assert confirm.nll.value == pytest.approx(-0.345, abs=0.002)
    table = variants_table(report)
    assert "N = 8: selected better; confirmed" in table.notes[-1]
    assert [(row[2].text, row[2].mark) for row in table.rows] == [("better", "best"), ("worse", "")]


@pytest.mark.parametrize(
    ("even", "odd", "came"),
    [
        ((0.8, 0.05), (0.55, 0.25), "selected v; not confirmed: on the other half it is not better in both"),
        ((0.8, 0.05), (0.603, 0.199), "selected v; not confirmed: better in both on the other half, but not"),
        ((0.8, 0.6), (0.8, 0.6), "no variant is better in both"),  # in one respect only
    ],
)
def test_what_is_not_confirmed(tmp_path: Path, even: Any, odd: Any, came: str) -> None:
    report = variants_report(tmp_path, {"v": lambda number, seed: odd if (number + seed) % 2 else even})
    assert came in variants_table(report).notes[-1]


def test_each_benchmark_and_seed_is_in_both_halves(tmp_path: Path) -> None:
    """A variant that is good on one benchmark alone is as good on both halves."""
    report = variants_report(tmp_path, {"one": lambda number, seed: PLAIN if number else (0.8, 0.05)})
    for half in halves(report, "demo", 8, "ia2-sft@one"):
        assert half is not None and half.accuracy.value == pytest.approx(0.1)
    single = [variant_cell("SST2", 0, "", *PLAIN), variant_cell("SST2", 0, "v", 0.8, 0.05)]
    table = variants_table(Report(read(tmp_path, single, "single")))
    assert "selected v; there are no pairs to confirm it on" in table.notes[-1]
