"""Effect sizes of many places at once (heads, neurons), with false-discovery control, and their stability.

All is made of means and standard deviations by place, so that no example's vectors need be kept.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

REFERENCE = "icl"
"""The view that others are compared with: the base model with its demonstrations."""

LEVEL = 0.05
"""False-discovery rate at which a place is called different."""

# Effects beyond are cut: a shift that is the same in every example to rounding has no spread to divide by.
LARGEST = 1000.0


@dataclass(frozen=True)
class Effects:
    """Of each place, all of one shape.

    Attributes:
        d_z: mean difference over the standard deviation of the differences (Cohen 1988, section 2.3.5), with
            its sign; NaN with fewer than two examples. Cut at ±:data:`LARGEST`.
        p: of the t test that the mean difference is zero.
        q: p adjusted for all places at once (Benjamini and Hochberg 1995).
    """

    d_z: np.ndarray
    p: np.ndarray
    q: np.ndarray

    @property
    def significant(self) -> np.ndarray:
        """Places called different: ``q < LEVEL``, bool."""
        return np.nan_to_num(self.q, nan=1.0) < LEVEL


def effects(mean: np.ndarray, sd: np.ndarray, n: int, *, one_sided: bool = False) -> Effects:
    """Effects of paired differences, by place.

    With ``n`` differences this is ``scipy.stats.ttest_rel`` (or ``ttest_1samp`` against zero). A place where
    nothing ever differs has d_z 0 and p 1. Benjamini and Hochberg's procedure holds the false-discovery rate
    for independent places and for positively dependent ones.

    Args:
        mean: of the differences.
        sd: of the differences, with n − 1 in the denominator.
        n: number of differences.
        one_sided: whether only positive differences count, where no others can be meant.
    """
    from scipy import stats

    mean, sd = np.asarray(mean, dtype=float), np.asarray(sd, dtype=float)
    if n < 2:
        nothing = np.full(mean.shape, np.nan)
        return Effects(nothing, nothing, nothing)
    spread = np.maximum(sd, np.abs(mean) / LARGEST)
    d_z = np.where(spread == 0, 0.0, mean / np.where(spread == 0, 1.0, spread))
    t = d_z * np.sqrt(n)
    p = stats.t.sf(t, n - 1) if one_sided else 2 * stats.t.sf(np.abs(t), n - 1)
    return Effects(d_z, p, adjusted(p))


def adjusted(p: np.ndarray) -> np.ndarray:
    """Benjamini and Hochberg's q of all p at once, whatever their shape; NaN stays, and does not count."""
    from scipy.stats import false_discovery_control

    q = np.full(p.shape, np.nan)
    known = np.isfinite(p)
    if known.any():
        q[known] = false_discovery_control(p[known])
    return q


class Moments:
    """Mean and spread of arrays that are seen once each (Welford 1962), in float64."""

    def __init__(self) -> None:
        self.n = 0
        self.mean: Any = 0.0
        self._squares: Any = 0.0

    def add(self, values: np.ndarray) -> None:
        """One example's array; all of one shape."""
        self.n += 1
        deviation = values - self.mean
        self.mean = self.mean + deviation / self.n
        self._squares = self._squares + deviation * (values - self.mean)

    @property
    def variance(self) -> np.ndarray:
        """With n − 1 in the denominator; NaN with fewer than two."""
        squares = np.asarray(self._squares, dtype=float)
        return squares / (self.n - 1) if self.n > 1 else np.full(squares.shape, np.nan)


class ShiftTest:
    """Whether the mean of vectors is zero in all directions, at many places, from running sums alone.

    A cross-fitted projection (Kim and Ramdas 2024, *Dimension-agnostic inference using cross U-statistics*):
    one half of the examples, drawn by a hash of their index, gives the direction of the mean; the vectors of
    the other half are projected on it and t tested. Given the direction these are independent draws of mean
    zero under the null, whatever the number of dimensions. The test is one-sided: a real shift shows as a
    positive mean. The other way round would add nothing: both have the product of the same two means.

    The spread of projections on a direction that is known only at the end needs the second half's outer
    products, ``[L, H, d, d]`` in float32; no vector of any example is kept, and the order does not matter.
    """

    def __init__(self) -> None:
        self._counts = [0, 0]
        self._sums: list[Any] = [0.0, 0.0]
        self._products: Any = None

    def add(self, index: int, difference: torch.Tensor) -> None:
        """One example's vectors, ``[L, H, d]`` float64."""
        # by a hash: rows may alternate between classes
        half = random.Random(index).getrandbits(1)
        self._counts[half] += 1
        self._sums[half] = self._sums[half] + difference.numpy()
        flat = difference.float().flatten(0, 1)
        if self._products is None:
            self._products = flat.new_zeros(*flat.shape, flat.shape[-1])
        if half:
            self._products.baddbmm_(flat.unsqueeze(2), flat.unsqueeze(1))

    def effects(self) -> Effects:
        """Of the projections of one half on the mean direction of the other, ``[L, H]``."""
        known = self._sums[0] if self._counts[0] else self._sums[1]
        places, n = known.shape[:-1], self._counts[1]
        if not self._counts[0] or n < 2:
            return effects(np.zeros(places), np.zeros(places), 0)
        length = np.linalg.norm(self._sums[0], axis=-1, keepdims=True)
        direction = self._sums[0] / np.where(length > 0, length, 1.0)
        mean = (self._sums[1] * direction).sum(-1) / n
        products = self._products.numpy().reshape(*direction.shape, -1)
        squares = np.einsum("lhi,lhij,lhj->lh", direction, products, direction, optimize=True)
        variance = np.maximum(squares - n * mean**2, 0.0) / (n - 1)
        return effects(mean, np.sqrt(variance), n, one_sided=True)


# ----------------------------------------------------------------------------------------- stability


def largest(values: np.ndarray, k: int) -> list[int]:
    """Flat places of the k largest values, largest first; NaN come last, ties as they stand."""
    flat = np.nan_to_num(np.asarray(values, dtype=float).ravel(), nan=-np.inf)
    return [int(place) for place in np.argsort(-flat, kind="stable")[:k]]


def rank_agreement(maps: Sequence[np.ndarray]) -> float:
    """Spearman's correlation of maps of the same places, mean over pairs of trials.

    NaN with fewer than two maps, or where one is constant. Places that are NaN in either map are left out.
    """
    from scipy.stats import rankdata

    found = []
    for a, b in combinations([np.asarray(m, dtype=float).ravel() for m in maps], 2):
        known = np.isfinite(a) & np.isfinite(b)
        ranks = rankdata(a[known]), rankdata(b[known])
        if known.sum() > 1 and min(np.ptp(r) for r in ranks) > 0:
            found.append(float(np.corrcoef(*ranks)[0, 1]))
    return float(np.mean(found)) if found else float("nan")


def overlap(sets: Sequence[Collection[int]]) -> float:
    """Jaccard's index ``|A ∩ B| / |A ∪ B|``, mean over pairs of trials; NaN with fewer than two."""
    found = [len(set(a) & set(b)) / max(1, len(set(a) | set(b))) for a, b in combinations(sets, 2)]
    return float(np.mean(found)) if found else float("nan")


def chance_overlap(total: int, k: int) -> float:
    """Expected Jaccard index of two sets of ``k`` that are drawn at random out of ``total`` places.

    The number that both hold is hypergeometric; x in common make an index of ``x / (2k − x)``.
    """
    from scipy.stats import hypergeom

    x = np.arange(k + 1)
    return float((hypergeom.pmf(x, total, k, k) * x / (2 * k - x)).sum()) if k else float("nan")


def stability(rankings: Sequence[np.ndarray], k: int) -> dict[str, Any]:
    """Whether trials find the same places: overlap of their top k, beside what chance gives.

    Args:
        rankings: of each trial, all of one shape; the largest values count.
        k: at most half of the places.
    """
    total = int(np.size(rankings[0]))
    k = min(k, max(1, total // 2))
    return {
        "k": k,
        "jaccard": rounded(overlap([largest(ranking, k) for ranking in rankings])),
        "jaccard_by_chance": rounded(chance_overlap(total, k)),
    }


def rounded(values: Any) -> Any:
    """Plain lists (or a number) of four significant digits, for JSON that people keep in repositories."""
    array = np.asarray(values, dtype=float)
    return [rounded(part) for part in array] if array.ndim else float(f"{float(array):.4g}")
