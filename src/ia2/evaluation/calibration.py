"""Calibration measures and temperature scaling (METHOD.md, section 4), in numpy and scipy on small arrays.

Sources: Guo et al. 2017 (equal-width ECE, temperature scaling), Nixon et al. 2019 (equal-mass
ECE), Brier 1950.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.floating[Any]]

# 33 points, so that the middle one is 10**0, exactly 1.0: "no scaling" is always a candidate.
TEMPERATURES: Floats = np.logspace(-1.0, 1.0, 33)
TEMPERATURES.setflags(write=False)


def ece_equal_mass(confidence: ArrayLike, correct: ArrayLike, bins: int = 15, *, axis: int = -1) -> Any:
    """Expected calibration error over bins of equal mass (Nixon et al. 2019).

    Rows are sorted by confidence and cut into bins of ``floor(n / bins)``; the last one also takes
    the remainder. With fewer rows than bins, every row is a bin. The sort is stable: among equal
    confidences the order of the input decides which bin a row falls in.

    Args:
        confidence: ``[..., n]``, probability given to the predicted answer, in [0, 1].
        correct: ``[..., n]``, 1 or True where the prediction was right.
        bins: number of bins.
        axis: the axis of the rows; the others are batch.

    Returns:
        ``[...]`` (a scalar for one-dimensional input), in [0, 1]; NaN without rows.
    """
    conf, corr = _rows_last(confidence, correct, axis)
    n = conf.shape[-1]
    if n == 0:
        return np.full(conf.shape[:-1], np.nan)[()]
    order = np.argsort(conf, axis=-1, kind="stable")
    # |bin| · |mean conf - mean acc| = |sum of (conf - correct)|: no means needed.
    gap = np.take_along_axis(conf.astype(np.float64) - corr, order, axis=-1)
    per_bin = np.add.reduceat(gap, _mass_starts(n, bins), axis=-1)
    return (np.abs(per_bin).sum(axis=-1) / n)[()]


def ece_equal_width(confidence: ArrayLike, correct: ArrayLike, bins: int = 15, *, axis: int = -1) -> Any:
    """Expected calibration error over bins of equal width (Guo et al. 2017); as :func:`ece_equal_mass`.

    The edges follow torchmetrics: bin i holds ``[i / bins, (i + 1) / bins)``, and a confidence of
    exactly 1 has a bin of its own behind the last. Edges are compared in the precision of the data: 0.7 in
    float32 lies on the edge 0.7.

    Raises:
        ValueError: a confidence lies outside [0, 1].
    """
    conf, corr = _rows_last(confidence, correct, axis)
    n = conf.shape[-1]
    if n == 0:
        return np.full(conf.shape[:-1], np.nan)[()]
    # A float32 softmax may exceed 1 by rounding; more than that is a mistake of the caller.
    if not np.all((conf >= -1e-6) & (conf <= 1 + 1e-6)):
        raise ValueError("confidences must be probabilities in [0, 1] and not NaN")
    # The nearest float to each i / bins, so that a confidence written as i / bins lies on its edge.
    edges = (np.arange(bins + 1) / bins).astype(conf.dtype)
    index = np.searchsorted(edges, np.clip(conf, 0.0, 1.0), side="right") - 1
    rows = math.prod(conf.shape[:-1])
    # Bins of all batch rows side by side: one bincount serves the whole batch.
    index = index.reshape(rows, n) + np.arange(rows)[:, None] * (bins + 1)
    gap = conf.astype(np.float64) - corr
    sums = np.bincount(index.ravel(), weights=gap.ravel(), minlength=rows * (bins + 1))
    total = np.abs(sums.reshape(rows, bins + 1)).sum(axis=-1) / n
    return total.reshape(conf.shape[:-1])[()]


@dataclass(frozen=True)
class ReliabilityBins:
    """The bins behind an ECE in ascending confidence, ``[B]`` each: rows, mean confidence, share right."""

    count: NDArray[np.int64]
    confidence: Floats
    accuracy: Floats


def reliability_bins(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> ReliabilityBins:
    """The ``min(bins, n)`` bins of :func:`ece_equal_mass`, of ``[n]``."""
    conf, corr = _rows_last(confidence, correct, -1)
    order = np.argsort(conf, kind="stable")
    parts = np.split(order, _mass_starts(len(conf), bins)[1:]) if len(conf) else []
    return ReliabilityBins(
        np.array([len(part) for part in parts], np.int64),
        np.array([conf[part].mean(dtype=np.float64) for part in parts], np.float64),
        np.array([corr[part].mean() for part in parts], np.float64),
    )


def _rows_last(confidence: ArrayLike, correct: ArrayLike, axis: int) -> tuple[Floats, Floats]:
    conf, corr = np.asarray(confidence), np.asarray(correct)
    # float32 stays: the edges of equal width are compared in the precision of the data.
    if conf.dtype != np.float32:
        conf = conf.astype(np.float64)
    return np.moveaxis(conf, axis, -1), np.moveaxis(corr.astype(np.float64), axis, -1)


def _mass_starts(n: int, bins: int) -> NDArray[np.int64]:
    number = min(bins, n)
    return np.arange(number) * (n // number if number else 0)


def brier_rows(probabilities: ArrayLike, gold: ArrayLike) -> Floats:
    """Multi-class Brier score of each row (Brier 1950), in [0, 2]: sum over classes of squared differences.

    Args:
        probabilities: ``[n, C]``, each row a distribution.
        gold: ``[n]``, index of the right class.
    """
    difference = np.array(probabilities, dtype=np.float64)
    difference[np.arange(len(difference)), np.asarray(gold, dtype=int)] -= 1.0
    return np.square(difference).sum(axis=1)


def fit_temperature(temperatures: ArrayLike, nll_grid: ArrayLike) -> float:
    """The temperature of least mean NLL on held-out rows (Guo et al. 2017, section 4.2).

    The best grid point is refined by the parabola in log temperature through it and its
    neighbours. If several points are equally good, the one nearest to 1 wins: data that say nothing
    change nothing. Rows that are all answered rightly, as a handful often are, get better without end
    the sharper the distribution is; they do not say how sure to be, and change nothing either. Rows for
    which the flattest point is best take it.

    Args:
        temperatures: ``[T]``, positive and ascending, such as `TEMPERATURES`.
        nll_grid: ``[n, T]``, nats: the NLL of each dev row at each temperature.

    Returns:
        The temperature; 1.0 without rows, if no temperature has a finite mean, or if the sharpest is best.

    Raises:
        ValueError: NaN in the grid.
    """
    t = np.asarray(temperatures, dtype=np.float64)
    grid = np.asarray(nll_grid, dtype=np.float64)
    if np.isnan(grid).any():
        raise ValueError("nll_grid contains NaN")
    mean = grid.mean(axis=0) if grid.size else np.full(t.size, np.inf)
    if not np.isfinite(mean).any():
        return 1.0
    log_t = np.log(t)
    near_best = np.flatnonzero(np.isclose(mean, mean.min(), rtol=1e-12, atol=1e-12))
    if near_best[0] == 0:
        return 1.0
    best = int(near_best[np.argmin(np.abs(log_t[near_best]))])
    if best == t.size - 1 or not np.isfinite(mean[best - 1 : best + 2]).all():
        return float(t[best])
    left, right = log_t[best] - log_t[best - 1], log_t[best + 1] - log_t[best]
    rise_left, rise_right = mean[best - 1] - mean[best], mean[best + 1] - mean[best]
    curvature = rise_left * right + rise_right * left
    if curvature <= 1e-12:  # flat to rounding: the quotient below would be noise
        return float(t[best])
    shift = 0.5 * (rise_left * right**2 - rise_right * left**2) / curvature
    return float(np.exp(log_t[best] + np.clip(shift, -left, right)))


def scale_label_log_probabilities(log_p: ArrayLike, temperature: float) -> Floats:
    """``log_softmax(log_p / temperature)`` over the label set, ``[n, C]`` nats (Guo et al. 2017).

    ``log_p`` need not be normalised. -inf stays -inf; a row of nothing but -inf says nothing and becomes
    uniform.
    """
    from scipy import special

    scaled = np.asarray(log_p, dtype=np.float64)
    if scaled.size == 0:
        return scaled.copy()
    # Subtracting the maximum first keeps a small temperature from overflowing.
    top = scaled.max(axis=-1, keepdims=True)
    scaled = np.where(np.isneginf(top), 0.0, scaled - np.where(np.isfinite(top), top, 0.0))
    with np.errstate(over="ignore"):  # to -inf, which is the limit
        return special.log_softmax(scaled / temperature, axis=-1)
