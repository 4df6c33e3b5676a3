"""Calibration measures, temperature scaling and bootstrap intervals (METHOD.md, section 4).

Everything is numpy and scipy on small arrays. A *statistic* is a function that takes one or more
row arrays and ``axis=-1`` and reduces that axis, such as ``np.mean`` or ``ece_equal_mass``; batches
``[R, n]`` of resampled rows then cost one call instead of R.

Sources: Guo et al. 2017 (equal-width ECE, temperature scaling), Nixon et al. 2019 (equal-mass
ECE), Brier 1950, Efron 1987 (BCa), Davison and Hinkley 1997 (two-level bootstrap), Owen 2007
(crossed bootstrap).
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.floating[Any]]
Statistic = Callable[..., Any]

# 33 points, so that the middle one is 10**0, exactly 1.0: "no scaling" is always a candidate.
TEMPERATURES: Floats = np.logspace(-1.0, 1.0, 33)
TEMPERATURES.setflags(write=False)

# BCa needs a jackknife of n rows n times. Above this size it costs seconds and moves the ends
# by O(1/n) only, so the percentile interval takes over.
BCA_MAX_ROWS = 2000
# Elements of a resample held at once (16 MB in float64).
_BATCH_ELEMENTS = 2_000_000


# --- calibration error -------------------------------------------------------------------------


def ece_equal_mass(confidence: ArrayLike, correct: ArrayLike, bins: int = 15, *, axis: int = -1) -> Any:
    """Expected calibration error over bins of equal mass (Nixon et al. 2019).

    Rows are sorted by confidence and cut into bins of ``floor(n / bins)``; the last one also takes
    the remainder. With fewer rows than bins, every row is a bin (``min(bins, n)`` bins). The sort
    is stable: among equal confidences the order of the input decides which bin a row falls in.

    Args:
        confidence: ``[..., n]``, probability given to the predicted answer, in [0, 1].
        correct: ``[..., n]``, 1 or True where the prediction was right.
        bins: number of bins.
        axis: the axis of the rows; the others are batch.

    Returns:
        ``[...]`` (a scalar for one-dimensional input), in [0, 1]; NaN without rows.

    Raises:
        ValueError: shapes differ or ``bins`` is not positive.
    """
    conf, corr = _rows_last(confidence, correct, bins, axis)
    n = conf.shape[-1]
    if n == 0:
        return _scalar(np.full(conf.shape[:-1], np.nan))
    order = np.argsort(conf, axis=-1, kind="stable")
    # |bin| · |mean conf - mean acc| = |sum of (conf - correct)|: no means needed.
    gap = np.take_along_axis(conf.astype(np.float64) - corr, order, axis=-1)
    per_bin = np.add.reduceat(gap, _mass_starts(n, bins), axis=-1)
    return _scalar(np.abs(per_bin).sum(axis=-1) / n)


def ece_equal_width(confidence: ArrayLike, correct: ArrayLike, bins: int = 15, *, axis: int = -1) -> Any:
    """Expected calibration error over bins of equal width (Guo et al. 2017).

    The edges follow torchmetrics: bin i holds ``[i / bins, (i + 1) / bins)``, and a confidence of
    exactly 1 has a bin of its own behind the last (Guo et al. close the bins on the right; the two
    differ only for confidences exactly on an edge). An edge here is the float nearest to
    ``i / bins``; torch.linspace rounds some edges the other way in the last bit.

    Args:
        confidence: ``[..., n]``, probability given to the predicted answer, in [0, 1]. Edges are
            compared in its own precision: 0.7 in float32 lies on the edge 0.7.
        correct: ``[..., n]``, 1 or True where the prediction was right.
        bins: number of bins.
        axis: the axis of the rows; the others are batch.

    Returns:
        ``[...]`` (a scalar for one-dimensional input), in [0, 1]; NaN without rows.

    Raises:
        ValueError: shapes differ, ``bins`` is not positive or a confidence lies outside [0, 1].
    """
    conf, corr = _rows_last(confidence, correct, bins, axis)
    n = conf.shape[-1]
    if n == 0:
        return _scalar(np.full(conf.shape[:-1], np.nan))
    index = _width_index(conf, bins)
    gap = conf.astype(np.float64) - corr
    rows = math.prod(conf.shape[:-1])
    # Bins of all batch rows side by side: one bincount serves the whole batch.
    index = index.reshape(rows, n) + np.arange(rows)[:, None] * (bins + 1)
    sums = np.bincount(index.ravel(), weights=gap.ravel(), minlength=rows * (bins + 1))
    total = np.abs(sums.reshape(rows, bins + 1)).sum(axis=-1) / n
    return _scalar(total.reshape(conf.shape[:-1]))


@dataclass(frozen=True)
class ReliabilityBins:
    """The bins behind an ECE, for a reliability diagram; all arrays are ``[B]``.

    Attributes:
        count: rows in the bin.
        confidence: mean confidence; NaN in an empty bin.
        accuracy: share of right predictions; NaN in an empty bin.
        lower: lower edge (equal width) or smallest confidence (equal mass).
        upper: upper edge (equal width) or largest confidence (equal mass).
    """

    count: NDArray[np.int64]
    confidence: Floats
    accuracy: Floats
    lower: Floats
    upper: Floats

    def ece(self) -> float:
        """``sum(count / n · |confidence - accuracy|)``; NaN without rows."""
        n = int(self.count.sum())
        if n == 0:
            return math.nan
        full = self.count > 0
        gap = np.abs(self.confidence[full] - self.accuracy[full])
        return float((self.count[full] * gap).sum() / n)


def reliability_bins(
    confidence: ArrayLike,
    correct: ArrayLike,
    bins: int = 15,
    kind: Literal["equal-mass", "equal-width"] = "equal-mass",
) -> ReliabilityBins:
    """Count, mean confidence and accuracy of each bin of the ECE of that kind.

    Equal mass gives ``min(bins, n)`` bins. Equal width gives ``bins + 1``: the last holds the
    confidences of exactly 1, as in `ece_equal_width`, so that the bins add up to that ECE.

    Args:
        confidence: ``[n]``, in [0, 1].
        correct: ``[n]``, 1 or True where the prediction was right.
        bins: number of bins.
        kind: which bins.

    Returns:
        The bins, in ascending confidence.

    Raises:
        ValueError: as the ECE of that kind, or an unknown ``kind``.
    """
    conf, corr = _rows_last(confidence, correct, bins, -1)
    if conf.ndim != 1:
        raise ValueError(f"confidence must be [n], not {list(conf.shape)}")
    n = conf.shape[0]
    lower: Floats
    upper: Floats
    if kind == "equal-mass":
        order = np.argsort(conf, kind="stable")
        conf, corr = conf[order], corr[order]
        starts = _mass_starts(n, bins)
        index = np.searchsorted(starts, np.arange(n), side="right") - 1
        number = len(starts)
        lower = conf[starts].astype(np.float64)
        upper = conf[np.append(starts[1:], n) - 1].astype(np.float64) if n else lower
    elif kind == "equal-width":
        index = _width_index(conf, bins)
        number = bins + 1
        edges = _width_edges(bins, np.dtype(np.float64))
        lower, upper = edges, np.append(edges[1:], 1.0)
    else:
        raise ValueError(f"kind must be 'equal-mass' or 'equal-width', not {kind!r}")
    count = np.bincount(index, minlength=number)
    # max(count, 1): an empty bin is 0/1 first and NaN after, without a warning.
    safe = np.maximum(count, 1)
    mean_conf = np.bincount(index, weights=conf, minlength=number) / safe
    mean_acc = np.bincount(index, weights=corr, minlength=number) / safe
    mean_conf[count == 0] = np.nan
    mean_acc[count == 0] = np.nan
    return ReliabilityBins(count, mean_conf, mean_acc, lower, upper)


def _rows_last(confidence: ArrayLike, correct: ArrayLike, bins: int, axis: int) -> tuple[Floats, Floats]:
    conf, corr = np.asarray(confidence), np.asarray(correct)
    if conf.shape != corr.shape:
        raise ValueError(f"confidence is {list(conf.shape)} and correct {list(corr.shape)}: they must agree")
    if conf.ndim == 0:
        raise ValueError("confidence must have at least one axis, the rows")
    if bins < 1:
        raise ValueError(f"bins must be at least 1, not {bins}")
    # float32 stays: the edges of equal width are compared in the precision of the data.
    if conf.dtype != np.float32:
        conf = conf.astype(np.float64)
    return np.moveaxis(conf, axis, -1), np.moveaxis(corr.astype(np.float64), axis, -1)


def _mass_starts(n: int, bins: int) -> NDArray[np.int64]:
    number = min(bins, n)
    return np.arange(number) * (n // number if number else 0)


def _width_edges(bins: int, dtype: np.dtype[Any]) -> Floats:
    # The nearest float to each i / bins, so that a confidence written as i / bins lies on its edge.
    return (np.arange(bins + 1) / bins).astype(dtype)


def _width_index(conf: Floats, bins: int) -> NDArray[np.int64]:
    # A float32 softmax may exceed 1 by rounding; more than that is a mistake of the caller.
    if not np.all((conf >= -1e-6) & (conf <= 1 + 1e-6)):
        raise ValueError("confidences must be probabilities in [0, 1] and not NaN")
    edges = _width_edges(bins, conf.dtype)
    return np.searchsorted(edges, np.clip(conf, 0.0, 1.0), side="right") - 1


def _scalar(value: Floats) -> Any:
    return value[()]


# --- proper scores -----------------------------------------------------------------------------


def brier_rows(probabilities: ArrayLike, gold: ArrayLike) -> Floats:
    """Multi-class Brier score of each row (Brier 1950): sum over classes of squared differences.

    Args:
        probabilities: ``[n, C]``, each row a distribution.
        gold: ``[n]``, index of the right class.

    Returns:
        ``[n]``, each in [0, 2]; 0 is best. Give these to `bootstrap_interval` with ``np.mean``.

    Raises:
        ValueError: shapes do not fit or a gold index is outside ``[0, C)``.
    """
    p, g = np.asarray(probabilities, dtype=np.float64), np.asarray(gold)
    if p.ndim != 2 or g.shape != p.shape[:1]:
        raise ValueError(f"expected [n, C] and [n], got {list(p.shape)} and {list(g.shape)}")
    if len(g) == 0:
        return np.zeros(0)
    if not np.issubdtype(g.dtype, np.integer) or g.min() < 0 or g.max() >= p.shape[1]:
        raise ValueError(f"gold must be integers in [0, {p.shape[1]})")
    difference = p.copy()
    difference[np.arange(len(g)), g] -= 1.0
    return np.square(difference).sum(axis=1)


def brier(probabilities: ArrayLike, gold: ArrayLike) -> float:
    """Mean multi-class Brier score, in [0, 2]: the mean of `brier_rows`, NaN without rows."""
    return _mean(brier_rows(probabilities, gold))


def nll(log_probability_of_gold: ArrayLike) -> float:
    """Negative log-likelihood, in nats: minus the mean of ``[n]`` log-probabilities.

    NaN without rows, infinite if any gold answer has probability 0.
    """
    return -_mean(np.asarray(log_probability_of_gold, dtype=np.float64))


def _mean(values: Floats) -> float:
    return float(values.mean()) if values.size else math.nan


# --- temperature scaling -----------------------------------------------------------------------


def fit_temperature(temperatures: ArrayLike, nll_grid: ArrayLike) -> float:
    """The temperature of least mean NLL on held-out rows (Guo et al. 2017, section 4.2).

    The best grid point is refined by the parabola in log temperature through it and its
    neighbours. A best point at an end of the grid is returned as it is. If several points are
    equally good, the one nearest to 1 wins: data that say nothing change nothing.

    Args:
        temperatures: ``[T]``, positive and ascending, such as `TEMPERATURES`.
        nll_grid: ``[n, T]``, nats: the NLL of each dev row at each temperature.

    Returns:
        The temperature; 1.0 without rows or if no temperature has a finite mean.

    Raises:
        ValueError: shapes do not fit, temperatures not positive and ascending, or NaN in the grid.
    """
    t = np.asarray(temperatures, dtype=np.float64)
    grid = np.asarray(nll_grid, dtype=np.float64)
    if t.ndim != 1 or t.size == 0 or t[0] <= 0 or np.any(np.diff(t) <= 0):
        raise ValueError("temperatures must be [T], positive and ascending")
    if grid.size == 0:
        return 1.0
    if grid.ndim != 2 or grid.shape[1] != t.size:
        raise ValueError(f"nll_grid must be [n, {t.size}], not {list(grid.shape)}")
    if np.isnan(grid).any():
        raise ValueError("nll_grid contains NaN")
    mean = grid.mean(axis=0)
    if not np.isfinite(mean).any():
        return 1.0
    log_t = np.log(t)
    near_best = np.flatnonzero(np.isclose(mean, mean.min(), rtol=1e-12, atol=1e-12))
    best = int(near_best[np.argmin(np.abs(log_t[near_best]))])
    if best in (0, t.size - 1) or not np.isfinite(mean[best - 1 : best + 2]).all():
        return float(t[best])
    left, right = log_t[best] - log_t[best - 1], log_t[best + 1] - log_t[best]
    rise_left, rise_right = mean[best - 1] - mean[best], mean[best + 1] - mean[best]
    curvature = rise_left * right + rise_right * left
    if curvature <= 1e-12:  # flat to rounding: the quotient below would be noise
        return float(t[best])
    shift = 0.5 * (rise_left * right**2 - rise_right * left**2) / curvature
    return float(np.exp(log_t[best] + np.clip(shift, -left, right)))


def scale_label_log_probabilities(log_p: ArrayLike, temperature: float) -> Floats:
    """``log_softmax(log_p / temperature)`` over the label set (Guo et al. 2017).

    Args:
        log_p: ``[n, C]``, nats: log-probability of each label; need not be normalised. -inf stays
            -inf. A row of nothing but -inf says nothing and becomes uniform.
        temperature: above 1 flattens, below 1 sharpens.

    Returns:
        ``[n, C]``, nats, each row normalised over C.

    Raises:
        ValueError: the temperature is not positive and finite.
    """
    from scipy import special

    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive and finite, not {temperature}")
    scaled = np.asarray(log_p, dtype=np.float64)
    if scaled.size == 0:
        return scaled.copy()
    # Subtracting the maximum first keeps a small temperature from overflowing.
    top = scaled.max(axis=-1, keepdims=True)
    scaled = np.where(np.isneginf(top), 0.0, scaled - np.where(np.isfinite(top), top, 0.0))
    with np.errstate(over="ignore"):  # to -inf, which is the limit
        return special.log_softmax(scaled / temperature, axis=-1)


# --- intervals ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """Plain values for JSON, which has neither NaN nor infinity: those become None."""
        pairs = {"value": self.value, "low": self.low, "high": self.high}
        return {name: x if math.isfinite(x) else None for name, x in pairs.items()}


def bootstrap_interval(
    statistic: Statistic,
    arrays: Sequence[np.ndarray] | np.ndarray,
    *,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> Interval:
    """Bootstrap interval of a statistic of one set of rows.

    Rows are drawn jointly from all arrays. BCa (Efron 1987) up to `BCA_MAX_ROWS` rows, otherwise,
    and where BCa has no finite ends, the percentile interval.

    A small ECE needs care: resampling adds to it, so that most or all resamples lie above the
    estimate. BCa then shrinks to nothing (often narrower than a hundredth of the standard error)
    and the percentile interval misses the estimate. If the estimate lies outside the percentile
    interval, that interval is moved by the mean bias of the resamples: it then tells how much the
    estimate would vary over other samples of n rows. It does not remove the upward bias of an ECE
    itself. The ends always enclose the value.

    Args:
        statistic: ``statistic(*arrays, axis=-1)``, reducing the last axis.
        arrays: row arrays, each ``[n]``; a single array counts as one.
        seed: of the resampling: the same seed gives the same interval.
        resamples: number of resamples.
        confidence: level of the interval, in (0, 1).

    Returns:
        Value and ends, in units of the statistic. NaN without rows; one row has no width.

    Raises:
        ValueError: arrays of different lengths or not ``[n]``, or impossible settings.
    """
    from scipy import stats  # slow to import, and no prediction needs it

    rows = _as_rows(arrays)
    _check_settings(resamples, confidence)
    n = len(rows[0])
    if n == 0:
        return Interval(math.nan, math.nan, math.nan)
    value = float(statistic(*rows, axis=-1))
    if n == 1:
        return Interval(value, value, value)
    if n > BCA_MAX_ROWS or not math.isfinite(value):
        drawn = _row_resamples(statistic, rows, resamples, np.random.default_rng(seed))
        return _percentile(value, drawn, confidence).interval

    def of_indices(index: NDArray[np.int64], axis: int = -1) -> Any:
        return np.asarray(statistic(*(row[index] for row in rows), axis=axis), dtype=np.float64)

    # scipy 1.15 renamed the argument
    keyword = "rng" if "rng" in inspect.signature(stats.bootstrap).parameters else "random_state"
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        # Data such as "all correct" have no BCa interval: that is what the fallback is for.
        warnings.filterwarnings("ignore", category=stats.DegenerateDataWarning)
        # One array of row numbers instead of `paired=True`: the same draws, and the row arrays
        # keep their own dtypes.
        result = stats.bootstrap(
            (np.arange(n),),
            of_indices,
            n_resamples=resamples,
            batch=_batch(n, max(resamples, n)),
            vectorized=True,
            axis=-1,
            confidence_level=confidence,
            method="BCa",
            **{keyword: np.random.default_rng(seed)},
        )
    low, high = (float(end) for end in result.confidence_interval)
    fallback = _percentile(value, result.bootstrap_distribution, confidence)
    if not (math.isfinite(low) and math.isfinite(high)) or fallback.shifted:
        return fallback.interval
    return Interval(value, min(low, value), max(high, value))


def paired_difference_interval(
    statistic: Statistic,
    a: Sequence[np.ndarray] | np.ndarray,
    b: Sequence[np.ndarray] | np.ndarray,
    *,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> Interval:
    """Bootstrap interval of ``statistic(a) - statistic(b)`` on the same rows.

    Row i of ``a`` and row i of ``b`` must be the same example: they are drawn together, so that
    what is common to both cancels. Otherwise as `bootstrap_interval`.

    Args:
        statistic: ``statistic(*arrays, axis=-1)``, reducing the last axis.
        a: row arrays of one method, each ``[n]``.
        b: row arrays of the other, each ``[n]``.
        seed: of the resampling.
        resamples: number of resamples.
        confidence: level of the interval, in (0, 1).

    Returns:
        The difference and its ends, in units of the statistic.

    Raises:
        ValueError: as `bootstrap_interval`; also if ``a`` and ``b`` have different lengths.
    """
    first, second = _as_rows(a), _as_rows(b)

    def difference(*arrays: np.ndarray, axis: int = -1) -> Any:
        left = statistic(*arrays[: len(first)], axis=axis)
        return left - statistic(*arrays[len(first) :], axis=axis)

    return bootstrap_interval(
        difference, [*first, *second], seed=seed, resamples=resamples, confidence=confidence
    )


def clustered_interval(
    statistic: Statistic,
    runs: Sequence[Sequence[np.ndarray] | np.ndarray],
    *,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
    shared_rows: bool = False,
) -> Interval:
    """Interval of the mean of a statistic over runs (seeds): a two-level percentile bootstrap.

    Each resample draws runs with replacement and, within each drawn run, rows with replacement
    (Davison and Hinkley 1997, section 3.8). If all runs are evaluated on the same test rows, the
    luck of those rows does not average out over runs: then say ``shared_rows=True``, and every
    resample draws one set of rows for all its runs (crossed bootstrap, Owen 2007). With one run
    both are the row bootstrap.

    Args:
        statistic: ``statistic(*arrays, axis=-1)``, reducing the last axis.
        runs: for each run its row arrays, each ``[n_run]``; runs may differ in length.
        seed: of the resampling.
        resamples: number of resamples.
        confidence: level of the interval, in (0, 1).
        shared_rows: row i is the same example in every run.

    Returns:
        Mean over runs and ends, in units of the statistic. NaN without runs or if a run is empty.

    Raises:
        ValueError: arrays of different lengths within a run, impossible settings, or
            ``shared_rows`` with runs of different lengths.
    """
    _check_settings(resamples, confidence)
    parsed = [_as_rows(run) for run in runs]
    lengths = [len(rows[0]) for rows in parsed]
    if shared_rows and len(set(lengths)) > 1:
        raise ValueError(f"shared_rows needs runs of equal length, not {lengths}")
    if not parsed or 0 in lengths:
        return Interval(math.nan, math.nan, math.nan)
    value = float(np.mean([statistic(*rows, axis=-1) for rows in parsed]))
    rng = np.random.default_rng(seed)
    drawn_run = rng.integers(len(parsed), size=(resamples, len(parsed)))
    if shared_rows:
        row_seed = int(rng.integers(2**63))
        # The same generator for every run draws the same rows for every run.
        per_run = [
            _row_resamples(statistic, rows, resamples, np.random.default_rng(row_seed)) for rows in parsed
        ]
        drawn = np.take_along_axis(np.stack(per_run, axis=1), drawn_run, axis=1)
    else:
        drawn = np.empty(drawn_run.shape)
        for i, rows in enumerate(parsed):
            here = drawn_run == i
            drawn[here] = _row_resamples(statistic, rows, int(here.sum()), rng)
    return _percentile(value, drawn.mean(axis=1), confidence).interval


def _as_rows(arrays: Sequence[np.ndarray] | np.ndarray) -> list[np.ndarray]:
    rows = [arrays] if isinstance(arrays, np.ndarray) else [np.asarray(array) for array in arrays]
    shapes = [list(row.shape) for row in rows]
    if not rows or rows[0].ndim != 1 or any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"expected row arrays of one length, each [n], not {shapes}")
    return rows


def _check_settings(resamples: int, confidence: float) -> None:
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, not {resamples}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")


def _batch(n: int, wanted: int) -> int:
    return min(max(1, _BATCH_ELEMENTS // n), max(1, wanted))


def _row_resamples(
    statistic: Statistic, rows: list[np.ndarray], resamples: int, rng: np.random.Generator
) -> Floats:
    n = len(rows[0])
    drawn = np.empty(resamples)
    step = _batch(n, resamples)
    for start in range(0, resamples, step):
        index = rng.integers(n, size=(min(step, resamples - start), n))
        drawn[start : start + step] = statistic(*(row[index] for row in rows), axis=-1)
    return drawn


class _Percentile(NamedTuple):
    interval: Interval
    shifted: bool


def _percentile(value: float, drawn: Floats, confidence: float) -> _Percentile:
    if np.isnan(drawn).any() or math.isnan(value):
        return _Percentile(Interval(value, math.nan, math.nan), False)
    tail = (1 - confidence) / 2
    # Order statistics, not interpolation: between two infinite NLLs the latter gives NaN.
    low = float(np.quantile(drawn, tail, method="lower"))
    high = float(np.quantile(drawn, 1 - tail, method="higher"))
    # A mean adds up in another order in each resample: rounding is not bias.
    rounding = 1e-12 * max(1.0, abs(value)) if math.isfinite(value) else 0.0
    shifted = not low - rounding <= value <= high + rounding
    if shifted and np.isfinite(drawn).all() and math.isfinite(value):
        bias = float(drawn.mean()) - value
        low, high = low - bias, high - bias
        if value >= 0 and drawn.min() >= 0:
            low = max(low, 0.0)  # an error that is never negative gets no negative end
    return _Percentile(Interval(value, min(low, value), max(high, value)), shifted)
