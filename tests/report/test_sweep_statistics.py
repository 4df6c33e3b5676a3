"""Records, the choice of rates, tests and thresholds: known answers, planted effects and planted nulls."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.sweep_records import drawn, evaluation, record, rows, small_grid, write_sweep
from scipy import stats

from ia2.experiment.sweep.records import Results, filtered, load_results
from ia2.report.sweep.cells import IclVerdict, Place, Report
from ia2.report.sweep.entries import mean_entry
from ia2.report.sweep.selection import Arm, Task, Tried, differences, make_arms
from ia2.report.sweep.threshold import Threshold, crossing, effectiveness_threshold
from ia2.utils.errors import ConfigError, DataError, RunFolderError
from ia2.utils.statistics import paired_test

TASK = Task("SST2", "words", "demo")


def read(tmp_path: Path, records: Sequence[dict[str, Any]], name: str = "sweep") -> Results:
    return load_results([write_sweep(tmp_path / name, records)])


def one_arm(tmp_path: Path, records: Sequence[dict[str, Any]], name: str = "sweep", **options: Any) -> Arm:
    [arm] = make_arms(read(tmp_path, records, name).cells, **options)
    return arm


# ------------------------------------------------------------------------------------------ records


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    poems = evaluation([0, 1], dataset="PoemS", role="ood")
    given = record(
        {"SST2": evaluation([1, 0, 1], [0.9, 0.6, 0.7]), "PoemS": poems},
        recipe="ia2+sft", beta=0.5, settings={"align.objective": "cosine"}, notes=["cut to 20,000 rows"],
    )  # fmt: skip
    results = read(tmp_path, [given])
    [cell] = results.cells
    assert (cell.benchmark, cell.recipe, cell.num_examples, cell.seed, cell.learning_rate, cell.beta) == (
        "SST2", "ia2+sft", 8, 0, 1e-3, 0.5,
    )  # fmt: skip
    assert cell.settings == {"align.objective": "cosine"}
    assert cell.selection_loss == 0.5
    assert cell.notes == ("cut to 20,000 rows",)
    assert cell.seconds == {"teacher": 3.0, "sft": 14.0, "evaluate": 9.0, "other": 1.0}
    assert cell.own is not None
    assert cell.own.labelled
    assert {name: e.n for name, e in cell.evaluations.items()} == {"SST2": 3, "PoemS": 2}
    assert (results.name, results.total, results.failed, results.select) == ("sweep", 1, 0, "dev")


def test_folders_are_merged_and_a_cell_counts_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = write_sweep(tmp_path / "a", [record(rows(5), seed=0), record(rows(6), seed=1)])
    second = write_sweep(tmp_path / "b", [record(rows(6), seed=1), record(rows(7), seed=2)])
    with caplog.at_level("INFO", "ia2"):
        results = load_results([first, second])
    assert [cell.seed for cell in results.cells] == [0, 1, 2]
    assert "1 cells are in several folders" in caplog.text
    assert (results.name, results.total) == ("a, b", 4)


def test_an_unfinished_sweep_is_read_too(tmp_path: Path) -> None:
    late = record(rows(7), seed=1)
    folder = write_sweep(tmp_path / "sweep", [record(rows(5), seed=0)])
    (folder / "cells").mkdir()
    (folder / "cells" / f"{late['key']}.json").write_text(json.dumps(late))
    (folder / "failed.json").write_text(json.dumps([{"key": "k", "spec": {}, "error": "e"}]))
    (folder / "grid.yaml").write_text("name: x\nselect: test\n")
    (folder / "sweep.json").unlink()
    results = load_results([folder])
    assert [cell.seed for cell in results.cells] == [0, 1]
    assert (results.failed, results.total, results.select, results.name) == (1, None, "test", "sweep")


def _without(key: str) -> str:
    damaged = record(rows(5))
    del damaged[key]
    return json.dumps(damaged)


def _with_rows(**changes: Any) -> str:
    damaged = record(rows(5))
    damaged["evaluations"]["SST2"]["rows"].update(changes)
    return json.dumps(damaged)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"key": "x', "Unterminated string"),
        ("[1, 2]", "no record of a cell"),
        (_without("spec"), "the key 'spec' is missing"),
        (_without("evaluations"), "the key 'evaluations' is missing"),
        (_with_rows(correct="01x"), "not made of 0 and 1"),
        (_with_rows(correct=""), "not made of 0 and 1"),
        (_with_rows(correct="0101"), "n = 10, but 4 answers"),
        (_with_rows(confidence=[0.5]), "and 1 confidences"),
        (_with_rows(confidence=[0.5] * 9 + [None]), "is no probability"),
        (_with_rows(confidence=[7.0] * 10), "is no probability"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    folder = write_sweep(tmp_path / "sweep", [record(rows(5))])
    with (folder / "cells.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(RunFolderError) as error:
        load_results([folder])
    assert f"{folder / 'cells.jsonl'}:2: damaged" in str(error.value)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


def test_a_line_end_inside_a_text_is_none(tmp_path: Path) -> None:
    assert len(read(tmp_path, [record(rows(5), notes=["one\u2028two"])]).cells) == 1


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="there is no such folder"):
        load_results([tmp_path / "nowhere"])
    with pytest.raises(RunFolderError, match=r"no cells\.jsonl there"):
        load_results([tmp_path])
    with pytest.raises(DataError, match="no finished cells"):
        read(tmp_path, [])
    folder = write_sweep(tmp_path / "bytes", [record(rows(5))])
    (folder / "cells.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(RunFolderError, match=r"cells\.jsonl:1: damaged"):
        load_results([folder])


def test_filters(tmp_path: Path) -> None:
    results = read(tmp_path, small_grid(seeds=1))
    kept = filtered(results, benchmarks=["FinS"], sizes=[32], seeds=[0])
    assert {(c.benchmark, c.num_examples) for c in kept.cells} == {("FinS", 32), ("FinS", None)}
    for wrong, message in (
        (
            {"benchmarks": ["Fins"]},
            "benchmark Fins is in none of the cells; there are FinS, SST2.",
        ),
        ({"models": ["gpt"]}, "model gpt is in none"),
        ({"sizes": [4]}, "N 4 is in none of the cells; there are 8, 32."),
        ({"seeds": [0], "sizes": [8], "benchmarks": ["AGN"]}, "benchmark AGN"),
    ):
        with pytest.raises(ConfigError) as error:
            filtered(results, **wrong)
        assert message in str(error.value)


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
    by_dev = one_arm(tmp_path, two_rates(), "a")
    assert by_dev.chosen == (Tried(1e-4, None),)
    assert by_dev.tried == (Tried(1e-4, None), Tried(1e-3, None))
    assert one_arm(tmp_path, two_rates(), "b", select="test").chosen == (Tried(1e-3, None),)
    each = one_arm(tmp_path, two_rates(), "c", select="dev-per-seed")
    assert {seed: cell.learning_rate for seed, cell in each.runs.items()} == {0: 1e-4, 1: 1e-3}
    assert by_dev.values("SST2", "accuracy") == {0: 0.5, 1: 0.5}


def test_beta_is_chosen_with_the_rate(tmp_path: Path) -> None:
    given = [
        record(rows(5), recipe="ia2+sft", rate=rate, beta=beta, loss=loss)
        for rate, beta, loss in ((1e-3, 0.1, 0.4), (1e-3, 0.9, 0.2), (1e-4, 0.1, 0.3))
    ]
    assert one_arm(tmp_path, given).chosen == (Tried(1e-3, 0.9),)


def test_a_rate_with_fewer_seeds_is_not_chosen_for_their_luck(tmp_path: Path) -> None:
    given = [*two_rates(), record(rows(10), rate=3e-4, seed=0, loss=0.01)]
    assert one_arm(tmp_path, given).chosen == (Tried(1e-4, None),)


def test_without_a_loss_a_rate_comes_last_and_equal_ones_are_told_apart(tmp_path: Path) -> None:
    diverged = [record(rows(5), rate=1e-4, loss=None), record(rows(5), rate=1e-3, loss=9.0)]
    assert one_arm(tmp_path, diverged, "a").chosen == (Tried(1e-3, None),)
    equal = [record(rows(5), rate=1e-3, loss=0.5), record(rows(5), rate=1e-4, loss=0.5)]
    assert one_arm(tmp_path, equal, "b").chosen == (Tried(1e-4, None),)


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
    arms = make_arms(read(tmp_path, given).cells)
    assert {arm.label: list(arm.runs) for arm in arms} == {
        "sft": [0, 1],
        "sft@sft.answers=icl_responses": [0],
        "sft@adapter.target_modules=q_proj+k_proj": [1],
        "sft@max_test=10": [0],
    }


# ------------------------------------------------------------------------- means and differences


def test_means_and_deviations(tmp_path: Path) -> None:
    arm = one_arm(tmp_path, [record(rows(right), seed=seed) for seed, right in enumerate((5, 7, 9))])
    found = mean_entry(arm.values("SST2", "accuracy"), percent=True, expected=4)
    assert found.text == "70.0 (20.0), 3 of 4 seeds"
    assert found.value == {"mean": pytest.approx(0.7), "sd": pytest.approx(0.2), "seeds": [0, 1, 2]}
    assert mean_entry(arm.values("PoemS", "accuracy")).text == "–"
    assert mean_entry({None: 0.5}, expected=3).text == "0.50"


def test_accuracy_is_among_the_labels_and_beside_it_over_the_vocabulary(tmp_path: Path) -> None:
    given = record(rows(5))
    given["evaluations"]["SST2"]["metrics"]["labels"]["accuracy"] = 0.9
    arm = one_arm(tmp_path, [given])
    assert arm.values("SST2", "accuracy") == {0: 0.9}
    assert arm.values("SST2", "accuracy_vocabulary") == {0: 0.5}


def test_differences_are_paired_by_seed_and_row(tmp_path: Path) -> None:
    """The method is right on one row more of each seed: rows and seeds are noisy, the difference is not."""
    grid = []
    for seed in range(4):
        bare = drawn(0.3 + 0.1 * seed, 50, seed)
        more = [*bare]
        more[bare.index(0)] = 1
        grid += [record(bare, recipe="sft", seed=seed), record(more, recipe="ia2-sft", seed=seed)]
    sft, method = make_arms(read(tmp_path, grid).cells)
    found = differences(method, sft, "SST2", "accuracy")
    assert found == {seed: pytest.approx(1 / 50) for seed in range(4)}
    turned = differences(sft, method, "SST2", "accuracy")
    assert list(turned.values()) == pytest.approx([-1 / 50] * 4)


def test_only_shared_seeds_are_compared_and_base_stands_for_all(tmp_path: Path) -> None:
    grid = [record(rows(5), recipe="sft", seed=s) for s in (0, 1)]
    grid += [record(rows(8), recipe="ia2-sft", seed=s) for s in (1, 2)]
    grid += [record(rows(2), recipe="base")]
    sft, method, base = make_arms(read(tmp_path, grid).cells)
    assert differences(method, sft, "SST2", "accuracy") == {1: pytest.approx(0.3)}
    assert differences(method, base, "SST2", "accuracy") == {
        1: pytest.approx(0.6),
        2: pytest.approx(0.6),
    }
    assert differences(base, sft, "SST2", "accuracy") == {
        0: pytest.approx(-0.3),
        1: pytest.approx(-0.3),
    }
    assert differences(method, sft, "FinS", "accuracy") == {}


def test_other_rows_are_not_compared(tmp_path: Path) -> None:
    other = record(rows(5), recipe="ia2-sft")
    other["evaluations"]["SST2"]["test"] = "others"
    sft, method = make_arms(read(tmp_path, [record(rows(5)), other]).cells)
    with pytest.raises(DataError, match=r"different test rows \(others, 10 rows; rows of SST2, 10 rows\)"):
        differences(method, sft, "SST2", "accuracy")


# -------------------------------------------------------------------------------------------- tests


def planted(effect: float, benchmarks: int = 8, seeds: int = 5, between: float = 0.0, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return {f"b{b}": effect + rng.normal(0, between) + rng.normal(0, 0.03, seeds) for b in range(benchmarks)}


def test_a_planted_difference_is_found_by_every_test() -> None:
    found = paired_test(planted(0.05))
    assert (found.pairs, found.clusters, found.higher, found.lower) == (40, 8, 8, 0)
    assert found.p_t < 0.001
    assert found.p_wilcoxon < 0.001
    assert found.p_cluster < 0.001
    assert 0 < found.whole.low < 0.05 < found.whole.high


def test_tests_agree_with_scipy() -> None:
    given = planted(0.02)
    pairs = np.concatenate(list(given.values()))
    found = paired_test(given)
    assert (found.t, found.p_t) == pytest.approx(tuple(stats.ttest_1samp(pairs, 0)))
    assert found.p_wilcoxon == pytest.approx(stats.wilcoxon(pairs).pvalue)
    means = [values.mean() for values in given.values()]
    assert found.p_cluster == pytest.approx(stats.ttest_1samp(means, 0).pvalue)
    assert found.whole.value == pytest.approx(np.mean(means))


def test_planted_nulls_are_found_as_often_as_they_may_be() -> None:
    """No effect, but benchmarks differ: the paper's test finds too much, benchmarks as wholes do not."""
    found = [paired_test(planted(0.0, between=0.05, seed=seed)) for seed in range(100)]
    assert np.mean([test.p_cluster < 0.05 for test in found]) < 0.10
    assert np.mean([not test.whole.low <= 0 <= test.whole.high for test in found]) < 0.10
    assert np.mean([test.p_t < 0.05 for test in found]) > 0.25


def test_no_difference_at_all() -> None:
    found = paired_test({"a": [0.0, 0.0], "b": [0.0, 0.0]})
    assert (found.p_t, found.p_wilcoxon, found.p_cluster, found.mean) == (1.0, 1.0, 1.0, 0.0)
    one = paired_test({"a": [0.1, 0.2, 0.3], "b": []})
    assert one.clusters == 1
    assert math.isnan(one.p_cluster)
    assert math.isnan(one.whole.low)
    with pytest.raises(ValueError, match="no differences"):
        paired_test({"a": []})


# --------------------------------------------------------------------------------------- thresholds


def test_crossings_by_hand() -> None:
    sizes = (4, 8, 16, 32)
    assert crossing(sizes, np.array([0.2, 0.1, -0.1, -0.2])) == pytest.approx(2**3.5)
    assert crossing(sizes, np.array([0.2, 0.1, 0.0, -0.2])) == pytest.approx(16)
    assert crossing(sizes, np.array([-0.2, -0.1, 0.0, -0.1])) == -math.inf
    assert crossing(sizes, np.array([-0.2, 0.1, -0.1, 0.1])) == math.inf
    # the last of several
    assert crossing(sizes, np.array([0.1, -0.1, 0.1, -0.1])) == pytest.approx(2**4.5)
    assert crossing(sizes, np.array([0.2, 0.1, 0.0, -0.2]), margin=0.1) == pytest.approx(8)
    both = crossing(sizes, np.array([[0.2, 0.1, -0.1, -0.2], [-0.2, -0.1, 0.0, -0.1]]))
    assert both.tolist() == [pytest.approx(2**3.5), -math.inf]


def threshold(results: Results) -> Threshold | None:
    report = Report(results)
    pairs = {size: pair for size in report.sizes if (pair := report.pair(TASK, size))}
    return effectiveness_threshold(pairs, "SST2")


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


def test_the_threshold_covers_a_planted_crossing(tmp_path: Path) -> None:
    """Differences fall on a line in log2 N through zero at N = 16; 95% intervals miss it now and then."""
    effects = {size: 0.06 * (4 - math.log2(size)) for size in (4, 8, 16, 32, 64)}
    covered, widths = 0, []
    for draw in range(20):
        results = read(tmp_path, planted_curve(effects, draw=draw), f"sweep-{draw}")
        found = threshold(results)
        assert found is not None
        covered += found.low <= 16 <= found.high
        widths.append(math.log2(found.high) - math.log2(found.low))
        assert found.low <= found.value <= found.high
    assert covered >= 16
    assert np.median(widths) < 2.5


def test_thresholds_outside_the_sizes_are_said_in_words(tmp_path: Path) -> None:
    def words(effects: dict[int, float], name: str) -> str:
        results = read(tmp_path, planted_curve(effects), name)
        found = threshold(results)
        assert found is not None
        return found.words()

    assert words({4: 0.3, 32: 0.2}, "still").startswith("still better at N = 32 (for certain)")
    assert words({4: -0.3, 32: -0.2}, "never").startswith("never better from N = 4 on (for certain)")
    assert words({4: 0.3, 32: 0.0}, "open").endswith(", above 32]")
    assert words({4: 0.0, 32: -0.3}, "low").split("[")[1].startswith("below 4")


def test_a_threshold_needs_two_sizes_and_one_set_of_rows(tmp_path: Path) -> None:
    results = read(tmp_path, planted_curve({4: 0.2}), "one")
    assert threshold(results) is None
    given = planted_curve({4: 0.2}) + planted_curve({8: 0.2}, n=200)
    results = read(tmp_path, given, "two")
    with pytest.raises(DataError, match="different test rows"):
        threshold(results)


def test_seeds_may_differ_between_sizes(tmp_path: Path) -> None:
    given = planted_curve({4: 0.2}, seeds=5) + planted_curve({32: 0.1}, seeds=3)
    results = read(tmp_path, given)
    found = threshold(results)
    assert found is not None
    assert [interval.units for interval in found.differences.values()] == [5, 3]


def test_a_threshold_of_single_draws_has_no_ends(tmp_path: Path) -> None:
    results = read(tmp_path, planted_curve({4: 0.2, 32: -0.2}, seeds=1))
    found = threshold(results)
    assert found is not None
    assert math.isnan(found.low) and "[" not in found.words()


# ------------------------------------------------------------------------------------- does ICL work?


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
    assert found.icl == pytest.approx(icl)
    assert found.base == base
    assert found.chance == 0.5
    assert (found.judged.headroom is None) == (sft is None)


def icl_of(
    tmp_path: Path, given: Sequence[dict[str, Any]], benchmark: str = "SST2", name: str = "sweep"
) -> IclVerdict:
    report = Report(read(tmp_path, given, name))
    [task] = report.tasks
    found = report.icl(Place(task, benchmark, 8))
    assert found is not None
    return found


def test_draws_are_the_units_not_their_rows(tmp_path: Path) -> None:
    """One draw with a thousand rows tells nothing of other draws."""
    given = [
        record(rows(900, 1000), recipe="icl"),
        record(rows(600, 1000)),
        record(rows(100, 1000), recipe="base"),
    ]
    assert icl_of(tmp_path, given).judged.reason == "one draw cannot tell"


def test_the_most_frequent_label_is_a_guess_too(tmp_path: Path) -> None:
    given = record(rows(75, 100), recipe="icl")
    assert icl_of(tmp_path, [given], name="a").judged.word == "unclear"
    given["evaluations"]["SST2"]["majority"] = 0.75
    found = icl_of(tmp_path, [given], name="b")
    assert (found.judged.word, found.chance) == ("no", 0.75)
    # a record without the share beside one that has it, on the same rows
    newer = record(rows(75, 100), recipe="icl", seed=7)
    newer["evaluations"]["SST2"]["majority"] = given["evaluations"]["SST2"].pop("majority")
    assert icl_of(tmp_path, [given, newer], name="c").chance == 0.75


def test_labels_of_ones_own_benchmark_are_in_its_records(tmp_path: Path) -> None:
    of = {"Own": evaluation(rows(40, 100), dataset="Own")}
    of["Own"]["metrics"]["labels"] = of["Own"]["metrics"].pop("answer")
    given = record(of, benchmark="Own", recipe="icl")
    unknown = icl_of(tmp_path, [given], "Own", "a").judged
    assert (unknown.word, unknown.reason) == ("unclear", "number of labels unknown")
    of["Own"]["labels"] = 4
    assert icl_of(tmp_path, [given], "Own", "b").chance == 0.25


def test_free_text_has_no_guess(tmp_path: Path) -> None:
    given = [
        *(record(rows(30 + s, 100), recipe="icl", benchmark="GSM8K", seed=s) for s in range(3)),
        *(record(rows(15 - s, 100), recipe="sft", benchmark="GSM8K", seed=s) for s in range(3)),
        record(rows(5, 100), recipe="base", benchmark="GSM8K"),
    ]
    found = icl_of(tmp_path, given, "GSM8K", "a")
    assert (found.judged.word, found.chance) == ("yes", 0.0)
    nothing = icl_of(tmp_path, [record(rows(0), recipe="icl", benchmark="GSM8K")], "GSM8K", "b").judged
    assert (nothing.word, nothing.reason) == ("no", "ICL is not above guessing")
