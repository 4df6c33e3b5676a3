"""The effectiveness threshold: the N from which IA2 → SFT is no longer better than SFT, as an interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ia2.errors import DataError
from ia2.sweeps.selection import Arm

RESAMPLES = 4000


@dataclass(frozen=True)
class Threshold:
    """Where a curve of differences over N falls to a margin; N, not log N.

    ``-inf``: below it on the whole grid. ``inf``: above it at the largest N.

    Attributes:
        value: of the means over seeds.
        low, high: 95% of the resamples.
        sizes: the grid, ascending.
        differences: mean of each size.
        margin: a difference above it counts as better.
        seeds: number of seeds at each size.
    """

    value: float
    low: float
    high: float
    sizes: tuple[int, ...]
    differences: tuple[float, ...]
    margin: float
    seeds: tuple[int, ...]

    def words(self) -> str:
        """``N ≈ 12 [6, 24]``, with ends outside the grid in words."""
        first, last = self.sizes[0], self.sizes[-1]
        if self.value == math.inf:
            text = f"still better at N = {last}"
        elif self.value == -math.inf:
            text = f"never better from N = {first} on"
        else:
            text = f"N ≈ {self.value:.3g}"
        if self.low == self.high and math.isinf(self.low):
            return f"{text} (in 95% of the resamples or more)"
        low = {-math.inf: f"below {first}", math.inf: f"above {last}"}.get(self.low, f"{self.low:.3g}")
        high = {-math.inf: f"below {first}", math.inf: f"above {last}"}.get(self.high, f"{self.high:.3g}")
        return f"{text} [{low}, {high}]"


def crossing(sizes: Sequence[int], differences: np.ndarray, margin: float = 0.0) -> np.ndarray:
    """The N behind which differences stay at or below the margin, linear in log2 N between sizes.

    Where a curve crosses several times the last time counts: from there on it is no longer better.

    Args:
        sizes: ascending, ``[K]``.
        differences: ``[..., K]``.
        margin: see :class:`Threshold`.

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
    method: Mapping[int, Arm],
    rival: Mapping[int, Arm],
    dataset: str,
    *,
    margin: float = 0.0,
    seed: int = 0,
) -> Threshold | None:
    """The N at which the method stops being more accurate than its rival, by a paired bootstrap.

    Each resample draws one set of test rows for everything, and seeds (jointly for sizes with the same
    seeds, whose examples contain each other); differences are paired by seed and row.

    Args:
        method: N → its arm.
        rival: N → the other's.
        dataset: evaluated on.
        margin: by how much it must be better.
        seed: of the resampling.

    Returns:
        None with fewer than two sizes that both have.

    Raises:
        DataError: sizes were evaluated on different rows.
    """
    paired = {n: _pairs(method[n], rival[n], dataset) for n in sorted(set(method) & set(rival))}
    paired = {n: found for n, found in paired.items() if found[0]}
    if len(paired) < 2:
        return None
    sizes = tuple(paired)
    tests = {test for _, _, test in paired.values()}
    if len(tests) > 1:
        raise DataError(
            f"{dataset}: sizes were evaluated on different test rows; a curve needs the same at every N. "
            "Report their folders apart."
        )
    rng = np.random.default_rng(seed)
    rows = next(iter(paired.values()))[1].shape[1]
    weights = rng.multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES) / rows  # [R, n]
    drawn: dict[tuple[int, ...], np.ndarray] = {}
    curves = np.empty((RESAMPLES, len(sizes)))
    for place, (seeds, values, _) in enumerate(paired.values()):
        if seeds not in drawn:
            drawn[seeds] = rng.integers(len(seeds), size=(RESAMPLES, len(seeds)))
        per_seed = weights @ values.T  # [R, S]
        curves[:, place] = np.take_along_axis(per_seed, drawn[seeds], axis=1).mean(1)
    means = np.array([values.mean() for _, values, _ in paired.values()])
    found = np.sort(crossing(sizes, curves, margin))
    low, high = found[int(0.025 * RESAMPLES)], found[math.ceil(0.975 * RESAMPLES) - 1]
    return Threshold(
        float(crossing(sizes, means, margin)),
        float(low),
        float(high),
        sizes,
        tuple(float(mean) for mean in means),
        margin,
        tuple(len(seeds) for seeds, _, _ in paired.values()),
    )


def _pairs(method: Arm, rival: Arm, dataset: str) -> tuple[tuple[int, ...], np.ndarray, tuple[str, int]]:
    """Seeds, differences of right answers ``[S, n]`` and what rows they are of."""
    seeds, values, tests = [], [], set()
    for seed, cell in method.runs.items():
        mine = cell.evaluations.get(dataset)
        other = rival.runs[seed].evaluations.get(dataset) if seed in rival.runs else None
        if mine is None or other is None or seed is None:
            continue
        tests |= {(mine.test, mine.n), (other.test, other.n)}
        if len(tests) > 1:
            raise DataError(
                f"{dataset}: cells were evaluated on different test rows: they cannot be compared. "
                "Report their folders apart."
            )
        seeds.append(seed)
        values.append(mine.correct - other.correct)
    return tuple(seeds), np.array(values), next(iter(tests), ("", 0))
