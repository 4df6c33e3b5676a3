"""Selecting a variant on half of the pairs, and confirming it on the other half."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.sweep_records import evaluation, record, write_sweep

from ia2.report.sweep.cells import Report
from ia2.report.sweep.printing import make_report, print_tables
from ia2.report.sweep.variants import candidates, selected, variants_table
from ia2.utils.errors import ConfigError

N = 300
PLAIN = (0.6, 0.2)  # share of right rows, overconfidence


def cell(benchmark: str, seed: int, variant: str, right: float, over: float) -> dict[str, Any]:
    """A cell with so many right rows, and a confidence that is too high by so much."""
    correct = [int(i < right * N) for i in range(N)]
    order = np.random.default_rng([len(benchmark), seed]).permutation(N)
    rows = evaluation(
        [correct[i] for i in order],
        [min(1.0, right + over)] * N,
        dataset=benchmark,
    )
    # sure by how much, in nats; draws differ a little
    rows["metrics"]["labels"]["nll"] = 1 - right + over + 0.001 * seed
    return record({benchmark: rows}, benchmark=benchmark, recipe="ia2-sft", variant=variant, seed=seed)


def report_of(tmp_path: Path, variants: dict[str, Any], seeds: int = 4) -> Report:
    """Plain cells and those of variants: name → (right, over) of a (benchmark number, seed)."""
    cells = []
    for number, benchmark in enumerate(("SST2", "Intents")):
        for seed in range(seeds):
            cells.append(cell(benchmark, seed, "", *PLAIN))
            for name, value in variants.items():
                settings = {"align.objective": name}
                made = cell(benchmark, seed, name, *value(number, seed))
                made["spec"]["settings"], made["key"] = settings, f"{name}-{benchmark}-{seed}"
                cells.append(made)
    return make_report([write_sweep(tmp_path / "sweep", cells)])


def test_a_real_gain_is_selected_and_confirmed(tmp_path: Path) -> None:
    made = report_of(
        tmp_path,
        {
            "better": lambda number, seed: (0.79 + 0.01 * (seed // 2), 0.05),
            "worse": lambda number, seed: (0.5, 0.3),
        },
    )
    found = {c.variant: c for c in candidates(made)}
    better, worse = found["better"], found["worse"]
    assert better.select is not None and better.confirm is not None and worse.select is not None
    assert better.select.pairs == better.confirm.pairs == 4
    assert better.select.accuracy.value == pytest.approx(0.195, abs=0.002)
    assert better.confirm.nll.value == pytest.approx(-0.345, abs=0.002)
    assert better.confirm.beyond_doubt and not worse.select.better
    assert selected(list(found.values()), "demo", 8) is better
    table = variants_table(made)
    assert table.notes[-1] == (
        "demo, N = 8: selected better; confirmed: better in both on the other half, and both intervals "
        "exclude zero."
    )
    assert [row[2].mark for row in table.rows] == ["best", ""]


@pytest.mark.parametrize(
    ("even", "odd", "came"),
    [
        ((0.8, 0.05), (0.55, 0.25), "selected v; not confirmed: on the other half it is not better in both"),
        ((0.8, 0.05), (0.603, 0.199), "selected v; not confirmed: better in both on the other half, but not"),
        # in one respect only
        ((0.8, 0.6), (0.8, 0.6), "no variant is better in both"),
    ],
)
def test_what_is_not_confirmed(tmp_path: Path, even: Any, odd: Any, came: str) -> None:
    made = report_of(tmp_path, {"v": lambda number, seed: odd if (number + seed) % 2 else even})
    assert came in variants_table(made).notes[-1]


def test_each_benchmark_and_seed_is_in_both_halves(tmp_path: Path) -> None:
    """A variant that is good on one benchmark alone is as good on both halves."""
    made = report_of(tmp_path, {"one": lambda number, seed: (0.8, 0.05) if number == 0 else PLAIN})
    (found,) = candidates(made)
    assert found.select is not None and found.confirm is not None
    assert found.select.accuracy.value == pytest.approx(found.confirm.accuracy.value) == pytest.approx(0.1)


def test_with_one_seed_of_one_benchmark_nothing_is_confirmed(tmp_path: Path) -> None:
    cells = [cell("SST2", 0, "", *PLAIN), cell("SST2", 0, "v", 0.8, 0.05)]
    table = variants_table(make_report([write_sweep(tmp_path / "one", cells)]))
    assert table.notes[-1].endswith("selected v; there are no pairs to confirm it on.")


def test_without_variants_it_is_refused(tmp_path: Path) -> None:
    made = make_report([write_sweep(tmp_path / "plain", [cell("SST2", 0, "", *PLAIN)])])
    with pytest.raises(ConfigError, match="table variants needs a variant of ia2-sft and the plain one"):
        print_tables(made, "variants")
