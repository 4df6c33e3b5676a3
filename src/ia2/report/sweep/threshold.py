"""The effectiveness threshold: the N from which IA2 → SFT is no longer better than SFT, as an interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ia2.report.sweep.selection import Arm, differences, same_rows
from ia2.utils.statistics import Interval, t_interval


@dataclass(frozen=True)
class Threshold:
    """Where a curve of differences over N falls to a margin; N, not log N.

    ``-inf``: below it on the whole grid. ``inf``: above it at the largest N.

    Attributes:
        value: of the means over seeds.
        low, high: of the 95% t-intervals; NaN where a size has one draw.
        differences: size → paired difference over draws, ascending.
    """

    value: float
    low: float
    high: float
    differences: dict[int, Interval]

    def words(self) -> str:
        """``N ≈ 12 [6, 24]``, with ends outside the grid in words."""
        first, last = min(self.differences), max(self.differences)
        outside = {-math.inf: f"below {first}", math.inf: f"above {last}"}
        if self.value == math.inf:
            text = f"still better at N = {last}"
        elif self.value == -math.inf:
            text = f"never better from N = {first} on"
        else:
            text = f"N ≈ {self.value:.3g}"
        if math.isnan(self.low) or math.isnan(self.high):
            return text
        if self.low == self.high and math.isinf(self.low):
            return f"{text} (for certain)"
        low, high = (outside.get(end, f"{end:.3g}") for end in (self.low, self.high))
        return f"{text} [{low}, {high}]"


def crossing(sizes: Sequence[int], differences: np.ndarray, margin: float = 0.0) -> np.ndarray:
    """The N behind which differences stay at or below the margin, linear in log2 N between sizes.

    Where a curve crosses several times the last time counts: from there on it is no longer better.

    Args:
        sizes: ascending, ``[K]``.
        differences: ``[..., K]``.
        margin: a difference above it counts as better.

    Returns:
        ``[...]``; ``-inf`` where no size is better, ``inf`` where the largest is.
    """
    above = np.asarray(differences, float) - margin
    log_n = np.log2(np.asarray(sizes, float))
    better = above > 0
    count = len(sizes)
    last = count - 1 - np.argmax(better[..., ::-1], axis=-1)  # of the better ones
    left = np.minimum(last, count - 2)[..., None]
    d0 = np.take_along_axis(above, left, -1)[..., 0]
    d1 = np.take_along_axis(above, left + 1, -1)[..., 0]
    fall = np.where(d0 > d1, d0 - d1, 1.0)
    at = log_n[left[..., 0]] + d0 / fall * (log_n[left[..., 0] + 1] - log_n[left[..., 0]])
    # the last interval says nothing of a curve that ends above
    at = np.where(last == count - 1, math.inf, at)
    found = 2.0**at
    return np.where(better.any(-1), found, -math.inf)


def effectiveness_threshold(
    pairs: Mapping[int, tuple[Arm, Arm]], dataset: str, *, margin: float = 0.0
) -> Threshold | None:
    """The N at which the method stops being more accurate than its rival, paired by draw.

    Its ends are where the lower and the upper ends of the differences' t-intervals fall to the margin; there
    are none where a size has one draw.

    Args:
        pairs: N → the arms of the method and of its rival, ascending.
        dataset: evaluated on.
        margin: by how much it must be better.

    Returns:
        None with fewer than two sizes that both have.

    Raises:
        DataError: sizes were evaluated on different rows.
    """
    same_rows([e for pair in pairs.values() for arm in pair for e in arm.evaluations(dataset).values()])
    by_seed = {n: differences(*pair, dataset, "accuracy") for n, pair in pairs.items()}
    found = {n: t_interval(list(values.values())) for n, values in by_seed.items() if values}
    if len(found) < 2:
        return None

    def falls(end: str) -> float:
        return float(crossing(list(found), np.array([getattr(i, end) for i in found.values()]), margin))

    known = all(math.isfinite(i.low) for i in found.values())
    low, high = (falls("low"), falls("high")) if known else (math.nan, math.nan)
    return Threshold(falls("value"), low, high, found)
