"""Effect sizes of many places at once (heads, neurons), with false-discovery control, and their stability.

All is made of means and standard deviations by place, so that no example's vectors need be kept.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch

LEVEL = 0.05
"""False-discovery rate at which a place is called different."""

# A difference of two runs below this many nats is nothing to give a fraction of.
MIN_GAP = 0.05

_RESAMPLES = 2000

# Effects beyond are cut: a shift that is the same in every example to rounding has no spread to divide by.
LARGEST = 1000.0


class Effects(NamedTuple):
    """Paired differences at many places, all of one shape; NaN with fewer than two examples.

    Attributes:
        d_z: mean difference over its standard deviation, cut at ±:data:`LARGEST`.
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


class Difference(NamedTuple):
    """How one condition differs from ICL at every place of every layer, in one training set.

    Attributes:
        n: examples.
        effects: of the test, ``[L, places]``; false discoveries are controlled over all of them.
        maps: further numbers by name; see what makes them.
        test: what was tested.
    """

    n: int
    effects: Effects
    maps: dict[str, np.ndarray]
    test: str = ""


def effects(mean: np.ndarray, sd: np.ndarray, n: int, *, one_sided: bool = False) -> Effects:
    """Effects of ``n`` paired differences by place, from their mean and standard deviation (with n − 1).

    The test is ``scipy.stats.ttest_1samp`` against zero; ``one_sided``: only positive differences count. A
    place where nothing ever differs has d_z 0 and p 1; NaN does not count among the places.
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
    q = np.full(p.shape, np.nan)
    if (known := np.isfinite(p)).any():
        q[known] = stats.false_discovery_control(p[known])
    return Effects(d_z, p, q)


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
    positive mean. The spread of projections on a direction that is known only at the end needs the second
    half's outer products, ``[L, H, d, d]`` in float32; no vector of any example is kept.
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
        n = self._counts[1]
        if not self._counts[0] or n < 2:
            return effects(known[..., 0], known[..., 0], 0)
        length = np.linalg.norm(known, axis=-1, keepdims=True)
        direction = known / np.where(length > 0, length, 1.0)
        mean = (self._sums[1] * direction).sum(-1) / n
        products = self._products.numpy().reshape(*direction.shape, -1)
        squares = np.einsum("lhi,lhij,lhj->lh", direction, products, direction, optimize=True)
        variance = np.maximum(squares - n * mean**2, 0.0) / (n - 1)
        return effects(mean, np.sqrt(variance), n, one_sided=True)


# ------------------------------------------------------------------------ fractions of a difference


class CrossedRows:
    """Rows of several training sets, a row a query and set, and how they are drawn again.

    Intervals are percentiles of a crossed bootstrap, which draws queries and training sets (Owen 2007).

    Args:
        places: of each training set's queries, the same for a query in every set that has it.
        gap: of each row, the whole difference that changes are fractions of, ``[n]``.
        seed: of the bootstrap.
    """

    def __init__(self, places: Sequence[Sequence[int]], gap: np.ndarray, seed: int) -> None:
        self.gap = gap
        self.owner = np.concatenate([np.full(len(own), t) for t, own in enumerate(places)])
        _, self.place = np.unique(np.concatenate(places), return_inverse=True)
        rng = np.random.default_rng(seed)
        weights = _drawn(rng, len(places))[:, self.owner] * _drawn(rng, self.place.max() + 1)[:, self.place]
        weights = weights[weights.sum(1) > 0]  # folds: the queries drawn may be of sets that are not
        self.weights = weights / weights.sum(1, keepdims=True)  # [R, n]

    def interval(self, values: np.ndarray) -> np.ndarray:
        """Ends of the interval of the mean of ``[n, U]``: ``[2, U]``."""
        return np.quantile(self.weights @ values, [0.025, 0.975], axis=0)

    def estimate(self, change: np.ndarray, fraction: str, least: float) -> dict[str, Any]:
        """Changes ``[n, …]`` as fractions of the gap (under that name), in their unit, and by training set.

        ``q`` is of a two-sided test that the mean change is further from 0 than ``least``.
        """
        shape = change.shape[1:]
        flat = change.reshape(len(change), -1)
        change_low, change_high = self.interval(flat)
        drawn = self.weights @ self.gap
        value = low = high = np.full(flat.shape[1], np.nan)
        if np.prod(np.quantile(drawn, [0.025, 0.975])) > 0 and abs(self.gap.mean()) >= MIN_GAP:
            value = _ratio(flat, self.gap)
            low, high = np.quantile((self.weights @ flat) / drawn[:, None], [0.025, 0.975], axis=0)
        sets = [self.owner == t for t in range(self.owner.max() + 1)]
        numbers = {
            fraction: value,
            "low": low,
            "high": high,
            "change": flat.mean(0),
            "change_low": change_low,
            "change_high": change_high,
            "q": self._q(flat, least),
        }
        by_set = np.stack([_ratio(flat[rows], self.gap[rows]) for rows in sets])
        return {
            **{name: values.reshape(shape).tolist() for name, values in numbers.items()},
            "by_trial": by_set.reshape(-1, *shape).tolist(),
        }

    def _q(self, change: np.ndarray, least: float) -> np.ndarray:
        """A minimum-effect t test (Murphy & Myors 1999), one value a query: the mean over training sets."""
        from scipy import stats

        counts = np.bincount(self.place)[:, None]
        by_place = np.zeros((len(counts), change.shape[1]))
        np.add.at(by_place, self.place, change)
        by_place /= counts
        beyond = np.abs(by_place.mean(0)) - least
        with np.errstate(divide="ignore"):
            t = beyond / (by_place.std(0, ddof=1) / np.sqrt(len(by_place)))
        p = np.minimum(2 * stats.t.sf(t, len(by_place) - 1), 1)
        return np.asarray(stats.false_discovery_control(p))


def _ratio(change: np.ndarray, gap: np.ndarray) -> np.ndarray:
    mean = gap.mean()
    return change.mean(0) / mean if abs(mean) >= MIN_GAP else np.full(change.shape[1], np.nan)


def _drawn(rng: np.random.Generator, count: int) -> np.ndarray:
    """How often each of ``count`` is in each resample, ``[R, count]``."""
    if count == 1:
        return np.ones((_RESAMPLES, 1))
    return rng.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES).astype(float)


# ----------------------------------------------------------------------------------------- stability


def largest(values: np.ndarray, k: int) -> list[int]:
    """Flat places of the k largest values, largest first; NaN come last, ties as they stand.

    >>> largest(np.array([[1.0, np.nan], [3.0, 1.0]]), 3)
    [2, 0, 3]
    """
    flat = np.nan_to_num(np.asarray(values, dtype=float).ravel(), nan=-np.inf)
    return [int(place) for place in np.argsort(-flat, kind="stable")[:k]]


def rank_agreement(maps: Sequence[np.ndarray]) -> float:
    """Spearman's correlation of maps of the same places, mean over pairs of training sets.

    NaN with fewer than two maps, or where one is constant. Places that are NaN in either map are left out.
    """
    from scipy.stats import spearmanr

    found = []
    for a, b in combinations([np.asarray(m, dtype=float).ravel() for m in maps], 2):
        known = np.isfinite(a) & np.isfinite(b)
        if known.sum() > 1 and np.ptp(a[known]) > 0 and np.ptp(b[known]) > 0:
            found.append(float(spearmanr(a[known], b[known]).statistic))
    return float(np.mean(found)) if found else float("nan")


def stability(rankings: Sequence[np.ndarray], k: int) -> dict[str, Any]:
    """Whether training sets find the same places: Jaccard's index of their top k (at most half of all)."""
    from scipy.stats import hypergeom

    total = int(np.size(rankings[0]))
    k = min(k, max(1, total // 2))
    pairs = combinations([set(largest(ranking, k)) for ranking in rankings], 2)
    x = np.arange(k + 1)  # places that two sets drawn at random have in common
    by_chance = float((hypergeom.pmf(x, total, k, k) * x / (2 * k - x)).sum())
    return {
        "k": k,
        "jaccard": rounded(np.mean([len(a & b) / max(1, len(a | b)) for a, b in pairs])),
        "jaccard_by_chance": rounded(by_chance),
    }


def rounded(values: Any) -> Any:
    """Plain lists (or a number) of four significant digits, for JSON that people keep in repositories."""
    array = np.asarray(values, dtype=float)
    return [rounded(part) for part in array] if array.ndim else float(f"{float(array):.4g}")
