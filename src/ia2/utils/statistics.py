"""Intervals and tests over draws of training examples (METHOD.md, section 9).

A draw is the unit: its test rows make one number of it, and Student's t says how far the mean of the numbers
may be off. One draw has no interval. The percentile bootstrap over draws that is common instead covered .82
where it said .95, with three draws.

Nothing but numpy is imported here, since every command passes by; scipy only where a number needs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

Statistic = Callable[..., Any]
"""Takes row arrays and ``axis``, and reduces that axis, such as ``np.mean`` or ``ece_equal_mass``."""

LEVEL = 0.95
"""Of every interval."""

# Spread below this is rounding: the same difference everywhere is no evidence of a t-test's kind.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% interval; floats, or arrays of one shape.

    Attributes:
        value: mean.
        low, high: ends; NaN with fewer than two units.
        units: how many the mean is of.
    """

    value: Any
    low: Any
    high: Any
    units: int

    def to_dict(self) -> dict[str, Any]:
        """``value``, ``low``, ``high`` for JSON: lists of arrays, and None for what is not finite."""
        return {name: _plain(getattr(self, name)) for name in ("value", "low", "high")}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.ndim:
        return [_plain(part) for part in value]
    number = float(value)
    return number if math.isfinite(number) else None


def t_interval(values: ArrayLike) -> Interval:
    """Student's interval of the mean over the first axis.

    Args:
        values: ``[units]`` or ``[units, ...]``; paired differences for a paired interval.

    Returns:
        In the unit of the values, of shape ``[...]``.

    Raises:
        ValueError: no unit.

    >>> t_interval([0.70, 0.80, 0.90]).to_dict()["low"].__round__(3)
    0.552
    >>> t_interval([0.8]).to_dict()
    {'value': 0.8, 'low': None, 'high': None}
    """
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    numbers = np.asarray(values, dtype=float)
    if not len(numbers):
        raise ValueError("an interval needs at least one unit")
    n = len(numbers)
    mean = numbers.mean(0)
    if n < 2:
        nothing = np.full(np.shape(mean), np.nan)[()]
        return Interval(mean, nothing, nothing, n)
    with np.errstate(invalid="ignore"):  # of infinite values there is no spread
        half = stdtrit(n - 1, (1 + LEVEL) / 2) * numbers.std(0, ddof=1) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


_HIGHEST = {"accuracy": 1.0, "ece": 1.0, "brier": 2.0}


def bounded(found: Interval, measure: str) -> Interval:
    """An interval of a measure itself (not of a difference), cut to what the measure can be."""
    highest = _HIGHEST.get(measure.partition("_")[0], math.inf)
    return replace(found, low=np.maximum(found.low, 0.0), high=np.minimum(found.high, highest))


def over_draws(statistic: Statistic, runs: Sequence[Sequence[np.ndarray]]) -> Interval:
    """Interval of a statistic over draws: each draw's rows make one number.

    Args:
        statistic: of row arrays; see :data:`Statistic`.
        runs: of each draw its row arrays, each ``[n]``. For a paired difference, the columns of both.
    """
    return t_interval([float(statistic(*rows, axis=-1)) for rows in runs])


def mean_interval(runs: Sequence[np.ndarray]) -> Interval:
    """Interval of a mean over draws of means over rows; of one draw, over its rows.

    With one draw it tells how sure these rows make one of this one adapter, and nothing of other draws.

    Args:
        runs: of each draw its rows, ``[n]`` or ``[n, K]``.

    Raises:
        ValueError: no run, or an empty one.
    """
    if not runs or not all(map(len, runs)):
        raise ValueError("an interval needs at least one row in every run")
    return t_interval(runs[0] if len(runs) == 1 else [np.asarray(run, float).mean(0) for run in runs])


def side(found: Mapping[str, Any]) -> int:
    """1 where an interval lies above zero, -1 below it, 0 where it holds zero, or there is none.

    Args:
        found: ``low`` and ``high``. Draws that all say the same have an interval without width, which is
            no evidence either.
    """
    low, high = found["low"], found["high"]
    if low is None or high is None or not high - low > _ROUNDING:
        return 0
    return int(low > 0) - int(high < 0)


def t_test(values: ArrayLike) -> tuple[float, float]:
    """t and its two-sided p that the mean is zero; NaN with fewer than two values, or without spread."""
    from scipy.special import stdtr

    numbers = np.asarray(values, dtype=float)
    n = len(numbers)
    if n < 2:
        return math.nan, math.nan
    if np.ptp(numbers) <= _ROUNDING:
        return (0.0, 1.0) if abs(numbers[0]) <= _ROUNDING else (math.nan, math.nan)
    t = float(numbers.mean() / (numbers.std(ddof=1) / math.sqrt(n)))
    return t, float(2 * stdtr(n - 1, -abs(t)))


def wilcoxon(values: ArrayLike) -> float:
    """Two-sided p of the signed-rank test that values are symmetric about zero."""
    from scipy import stats

    # accuracies are multiples of 1/n: rounding would break their ties
    rounded = np.round(np.asarray(values, dtype=float), 12)
    return float(stats.wilcoxon(rounded).pvalue) if rounded.any() else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values of a family of tests, in the order given; NaN stays and counts not."""
    known = [i for i, p in enumerate(p_values) if not math.isnan(p)]
    adjusted = [math.nan] * len(p_values)
    running = 0.0
    for rank, i in enumerate(sorted(known, key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(known) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


@dataclass(frozen=True)
class PairedTest:
    """Whether differences over (benchmark, seed) are zero; all p-values are two-sided.

    Attributes:
        pairs: how many differences.
        clusters: how many benchmarks.
        mean: of all pairs.
        t, p_t: paired t-test over pairs (the paper's table 8).
        p_wilcoxon: signed-rank test over pairs.
        whole: the mean of the benchmarks' means, with its 95% t-interval over benchmarks.
        p_cluster: t-test over the benchmarks' means; NaN with one benchmark.
        higher, lower: benchmarks whose mean difference is positive, negative.
    """

    pairs: int
    clusters: int
    mean: float
    t: float
    p_t: float
    p_wilcoxon: float
    whole: Interval
    p_cluster: float
    higher: int
    lower: int


def paired_test(differences: Mapping[str, Sequence[float]]) -> PairedTest:
    """Test paired differences: benchmark → one of each seed.

    The pairs of one benchmark share their test rows and its peculiarities: tests over pairs take them for
    independent and so find too much. What the benchmarks' means say is the honest answer to "does it hold
    elsewhere?".

    Raises:
        ValueError: no difference.
    """
    groups = [np.array(values, float) for values in differences.values() if len(values)]
    if not groups:
        raise ValueError("there are no differences to test")
    pairs = np.concatenate(groups)
    means = np.array([group.mean() for group in groups])
    t, p_t = t_test(pairs)
    return PairedTest(
        len(pairs),
        len(groups),
        float(pairs.mean()),
        t,
        p_t,
        wilcoxon(pairs),
        t_interval(means),
        t_test(means)[1],
        int((means > 0).sum()),
        int((means < 0).sum()),
    )


def main_scope(labelled: bool) -> str:
    """Where the accuracy that comes first is taken: among the labels, or of the whole free answer."""
    return "labels" if labelled else "answer"
