"""Intervals of many means at once are those of one mean at a time."""

from __future__ import annotations

import numpy as np
import pytest

from ia2.analysis.intervals import mean_intervals
from ia2.evaluation.calibration import clustered_interval


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_as_the_clustered_bootstrap(shared: bool, count: int) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(0, 1, (60, 4))
    runs = [rows * [1, 2, 0, 1] + rng.normal(0, 0.5, (1, 4)) for _ in range(count)]
    found = mean_intervals(runs, shared_rows=shared, resamples=4000)
    for column in range(4):
        one = clustered_interval(
            np.mean, [[run[:, column]] for run in runs], shared_rows=shared, resamples=4000
        )
        assert found.value[column] == pytest.approx(one.value, abs=1e-12)
        width = one.high - one.low
        assert found.low[column] == pytest.approx(one.low, abs=0.08 * width + 1e-12)
        assert found.high[column] == pytest.approx(one.high, abs=0.08 * width + 1e-12)


def test_coverage() -> None:
    rng = np.random.default_rng(1)
    hits = np.zeros(200, bool)
    for trial in range(5):
        runs = [rng.normal(0.3, 1, (50, 200))]
        found = mean_intervals(runs, shared_rows=True, seed=trial, resamples=500)
        hits = (found.low < 0.3) & (found.high > 0.3)
        assert 0.88 < hits.mean() < 0.98


def test_one_column_and_what_is_refused() -> None:
    found = mean_intervals([np.arange(10.0)], shared_rows=True).to_dict()
    assert found["value"] == 4.5
    assert isinstance(found["low"], float)
    with pytest.raises(ValueError, match="at least one row"):
        mean_intervals([np.zeros((0, 2))], shared_rows=False)
    with pytest.raises(ValueError, match="equal length"):
        mean_intervals([np.zeros(2), np.zeros(3)], shared_rows=True)
