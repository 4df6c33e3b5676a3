"""Intervals of means of many columns at once: layers, heads, tokens.

The design is that of :func:`ia2.evaluation.calibration.clustered_interval`: runs (seeds) are resampled, and
rows within them; rows that all runs share are drawn once for all. A mean is linear in the rows, so a
resample is a weighted sum, and all columns cost one product of matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 1000

# Weights of rows in resamples that are held at once.
_WEIGHTS = 250_000


@dataclass(frozen=True)
class Means:
    """Means over rows and runs with 95% intervals, each ``[K]``."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """Lists; plain numbers of a single column."""
        found = {"value": self.value, "low": self.low, "high": self.high}
        return {name: v.tolist() if len(v) > 1 else float(v[0]) for name, v in found.items()}


def mean_intervals(
    runs: Sequence[np.ndarray], *, shared_rows: bool, seed: int = 0, resamples: int = RESAMPLES
) -> Means:
    """Means over runs of means over rows, with percentile intervals.

    Args:
        runs: for each run ``[n_run, K]`` (or ``[n_run]``, one column).
        shared_rows: row i is the same example in every run.
        seed: of the resampling.
        resamples: their number.

    Returns:
        In units of the columns.

    Raises:
        ValueError: no runs, an empty one, or shared rows of differing numbers.
    """
    if not runs or not all(map(len, runs)):
        raise ValueError("an interval needs at least one row in every run")
    columns = [np.asarray(run, float).reshape(len(run), -1) for run in runs]
    if shared_rows and len({len(run) for run in columns}) > 1:
        raise ValueError(f"shared rows need runs of equal length, not {[len(run) for run in columns]}")
    rng = np.random.default_rng(seed)
    value = np.mean([run.mean(0) for run in columns], axis=0)
    share = np.full(len(columns), 1 / len(columns))
    # in parts: the weights of all resamples at once would be most of the memory of an analysis
    part = max(1, _WEIGHTS // max(map(len, columns)))
    drawn = []
    for start in range(0, resamples, part):
        count = min(part, resamples - start)
        times = rng.multinomial(len(columns), share, size=count)
        shared = _row_weights(rng, len(columns[0]), count) if shared_rows else None
        total = np.zeros((count, columns[0].shape[1]))
        for run, often in zip(columns, times.T, strict=True):
            weights = _row_weights(rng, len(run), count) if shared is None else shared
            total += often[:, None] * (weights @ run)
        drawn.append(total / len(columns))
    low, high = np.percentile(np.concatenate(drawn), [2.5, 97.5], axis=0)
    return Means(value, low, high)


def _row_weights(rng: np.random.Generator, n: int, resamples: int) -> np.ndarray:
    """Share of each row in each resample, ``[resamples, n]``."""
    return rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n
