"""How near each condition's attention outputs come to those of ICL, beside controls (the paper, figure 2).

A similarity means nothing alone: the base model without demonstrations, another seed of the same recipe,
the mean ICL activation, ICL with other demonstrations and a trained model that is shown the demonstrations
too say what is little and what is much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from ia2.analysis.conditions import BASE, ICL, MEAN, OTHER, Activations, Condition
from ia2.evaluation.similarity import Similarity, SimilarityMeter
from ia2.utils.statistics import Interval, mean_interval

if TYPE_CHECKING:
    import torch

_CENTRED = "centred "
_Rows = Sequence[np.ndarray | None]


class ActivationAccumulator:
    """Similarity of every condition to ICL; see :class:`ia2.analysis.conditions.Accumulator`.

    Args:
        layers: their indices.
        mean: the mean ICL activation of other examples, ``[L, d]``, for the control ``icl-mean``.
    """

    sites: tuple[str, ...] = ("output",)

    def __init__(self, layers: list[int], mean: torch.Tensor | None = None) -> None:
        self.layers, self.mean = layers, mean
        self._meters: dict[str, SimilarityMeter] = {}

    def add(
        self, condition: str, index: int, found: Activations, icl: Activations, other: Activations | None
    ) -> None:
        """One query's attention outputs in one condition."""
        ours, reference = found["output"], icl["output"]
        constant = None if self.mean is None else self.mean[:, None].expand(reference.shape)
        if condition != ICL.name:
            self._add(condition, index, ours, reference)
            if constant is not None:
                self._add(_CENTRED + condition, index, ours - constant, reference - constant)
        elif constant is not None:
            self._add(MEAN.name, index, constant, reference)

    def _add(self, name: str, index: int, ours: torch.Tensor, reference: torch.Tensor) -> None:
        self._meters.setdefault(name, SimilarityMeter(self.layers)).add(index, ours, reference)

    def finish(self) -> dict[str, Similarity]:
        """Condition → its similarity to ICL; ``centred CONDITION``: with the mean taken off both."""
        return {name: meter.finish() for name, meter in self._meters.items()}


class Pool:
    """Rows of several training sets: the folds of a seed are one run, in the order of the data.

    Args:
        seeds: of the training sets.
        places: of each one's queries in their data.
    """

    def __init__(self, seeds: Sequence[int], places: Sequence[Sequence[int]]) -> None:
        self.seeds, self.places = list(seeds), [np.asarray(p) for p in places]

    def runs(self, arrays: _Rows) -> list[np.ndarray]:
        """A run per seed, ``[n, …]``, of the arrays of each training set; None where it has none."""
        runs = []
        for seed in dict.fromkeys(self.seeds):
            rows = zip(self.seeds, self.places, arrays, strict=True)
            mine = [(p, a) for s, p, a in rows if s == seed and a is not None]
            if mine:
                order = np.argsort(np.concatenate([p for p, _ in mine]), kind="stable")
                runs.append(np.concatenate([a for _, a in mine])[order])
        return runs

    def means(self, arrays: _Rows) -> Interval:
        """Means over rows and seeds with intervals over seeds, or over the rows of a single one."""
        return mean_interval(self.runs(arrays))

    def overall(self, arrays: _Rows) -> dict[str, Any]:
        """:meth:`means` of ``[n, L]``, over layers."""
        return self.means([None if a is None else np.nanmean(a, axis=1) for a in arrays]).to_dict()


def summarise(
    found: Sequence[Mapping[str, Similarity]], pool: Pool, conditions: Sequence[Sequence[Condition]]
) -> dict[str, Any]:
    """The section ``activations`` of an analysis.

    Args:
        found: of each training set, condition → similarity to ICL.
        pool: their rows.
        conditions: of each.

    Returns:
        Means and 95% t-intervals over seeds (of one seed over its queries), by condition and layer;
        differences of conditions paired by query. Intervals of the variance unexplained hold the reference's
        variance fixed. ``centred`` is the cosine with the mean ICL activation of the training examples taken
        off both: what is alike beyond what all queries have in common.
    """
    known: dict[str, Condition] = {}
    for condition in (condition for own in conditions for condition in own):
        known.setdefault(condition.name, condition)
    return {
        "layers": next(similar.layers for own in found for similar in own.values()),
        "views": [
            _condition(
                pool,
                condition,
                [own.get(name) for own in found],
                [own.get(_CENTRED + name) for own in found],
            )
            for name, condition in known.items()
        ],
        "differences": [_difference(pool, a, b, found) for a, b in _pairs(known)],
    }


def _condition(
    pool: Pool,
    condition: Condition,
    found: Sequence[Similarity | None],
    centred: Sequence[Similarity | None],
) -> dict[str, Any]:
    known = [similar for similar in found if similar is not None]
    rows: dict[str, _Rows] = {
        "asim": [None if s is None else s.asim for s in found],
        "l2": [None if s is None else s.l2 for s in found],
        # a training set's mean over its rows is then its fraction of variance unexplained
        "variance_unexplained": [
            None if s is None else len(s.asim) * s.distance / np.where(s.variance > 0, s.variance, np.nan)
            for s in found
        ],
    }
    if any(s is not None for s in centred):
        rows["centred"] = [None if s is None else s.asim for s in centred]
    by_layer = {f"{name}_by_layer": pool.means(arrays).to_dict() for name, arrays in rows.items()}
    unexplained = "variance_unexplained_by_layer"
    longest = max(len(s.tokens) for s in known)
    count = np.sum([np.pad(s.tokens, (0, longest - len(s.tokens))) for s in known], axis=0)
    sums = [np.pad(s.asim_by_token.mean(1) * s.tokens, (0, longest - len(s.tokens))) for s in known]
    return {
        "name": condition.name,
        "kind": condition.kind,
        "control": condition.control,
        "of": condition.of,
        "n": sum(len(s.asim) for s in known),
        **{name: pool.overall(arrays) for name, arrays in rows.items()},
        **by_layer,
        unexplained: by_layer[unexplained]["value"],
        "asim_by_token": {"value": (np.sum(sums, axis=0) / count).tolist(), "count": count.tolist()},
    }


def _pairs(known: Mapping[str, Condition]) -> list[tuple[str, str]]:
    """What is compared: adapters with the base model and with each other, controls with what they are of."""
    adapters = [name for name, condition in known.items() if condition.kind == "adapter"]
    pairs = [(name, BASE.name) for name in adapters if BASE.name in known]
    pairs += [(b, a) for a, b in combinations(adapters, 2)]
    pairs += [(c.of, name) for name, c in known.items() if c.kind == "control" and c.of in known]
    return pairs + [(n, control.name) for control in (MEAN, OTHER) for n in adapters if control.name in known]


def _difference(pool: Pool, a: str, b: str, found: Sequence[Mapping[str, Similarity]]) -> dict[str, Any]:
    rows = [own[a].asim - own[b].asim if a in own and b in own else None for own in found]
    by_layer = pool.means(rows).to_dict()
    return {"a": a, "b": b, "asim": pool.overall(rows), "asim_by_layer": by_layer}
