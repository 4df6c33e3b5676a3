"""How near each view's attention outputs come to those of ICL, beside controls (the paper, figure 2).

A similarity means nothing alone: the base model without demonstrations, another seed of the same recipe,
the mean ICL activation, ICL with other demonstrations and a trained model that is shown the demonstrations
too say what is little and what is much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from ia2.analysis.similarity import Similarity, SimilarityMeter
from ia2.evaluation.statistics import Interval, mean_interval

if TYPE_CHECKING:
    import torch

    from ia2.analysis.views import View

SITE = "output"


class ActivationMeter:
    """Similarity of every view to ICL; see :class:`ia2.analysis.views.Meter`.

    Args:
        layers: their indices.
        mean: the mean ICL activation of other examples, ``[L, d]``, for the control ``icl-mean``.
    """

    def __init__(self, layers: list[int], mean: torch.Tensor | None = None) -> None:
        self.layers, self.mean = layers, mean
        self._views: dict[str, SimilarityMeter] = {}
        self._centred: dict[str, SimilarityMeter] = {}

    def add(
        self,
        view: str,
        index: int,
        found: Mapping[str, torch.Tensor],
        icl: Mapping[str, torch.Tensor],
        other: Mapping[str, torch.Tensor] | None,
    ) -> None:
        """One query's attention outputs in one view."""
        activations, reference = found[SITE], icl[SITE]
        constant = None if self.mean is None else self.mean[:, None].expand(reference.shape)
        if view == "icl":  # the reference itself
            if constant is None:
                return
            view, activations = "icl-mean", constant
        elif constant is not None:
            meter = self._centred.setdefault(view, SimilarityMeter(self.layers))
            meter.add(index, activations - constant, reference - constant)
        self._views.setdefault(view, SimilarityMeter(self.layers)).add(index, activations, reference)

    def finish(self) -> dict[str, tuple[Similarity, Similarity | None]]:
        """View → its similarity to ICL, and the same with the mean ICL activation taken off both."""
        return {
            view: (meter.finish(), self._centred[view].finish() if view in self._centred else None)
            for view, meter in self._views.items()
        }


class Pool:
    """Rows of several trials: the folds of a seed are one run, in the order of the data.

    Args:
        seeds: of the trials.
        places: of each trial's queries in their data.
    """

    def __init__(self, seeds: Sequence[int], places: Sequence[Sequence[int]]) -> None:
        self.seeds, self.places = list(seeds), [np.asarray(p) for p in places]

    def runs(self, arrays: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        """A run per seed, ``[n, …]``.

        Args:
            arrays: of each trial, ``[n_trial, …]``, or None where it has none.
        """
        runs = []
        for seed in dict.fromkeys(self.seeds):
            mine = [
                (p, a)
                for s, p, a in zip(self.seeds, self.places, arrays, strict=True)
                if s == seed and a is not None
            ]
            if not mine:
                continue
            places = np.concatenate([p for p, _ in mine])
            order = np.argsort(places, kind="stable")
            runs.append(np.concatenate([a for _, a in mine])[order])
        return runs

    def means(self, arrays: Sequence[np.ndarray | None]) -> Interval:
        """Means over rows and seeds with intervals over seeds, or over the rows of a single one."""
        return mean_interval(self.runs(arrays))


def summarise(
    pool: Pool,
    trials: Sequence[Mapping[str, tuple[Similarity, Similarity | None]]],
    views: Sequence[Sequence[View]],
) -> dict[str, Any]:
    """The section ``activations`` of an analysis.

    Args:
        pool: rows of the trials.
        trials: of each, view → similarity to ICL.
        views: of each.

    Returns:
        Means and 95% t-intervals over seeds (of one seed over its queries), by view and layer; differences of
        views paired by query. Intervals of the variance unexplained hold the reference's variance fixed.
        ``centred`` is the cosine with the mean ICL activation of the training examples taken off both: what
        is alike beyond what all queries have in common.
    """
    known: dict[str, View] = {}
    for own in views:
        for view in own:
            known.setdefault(view.name, view)
    pairs = {name: [trial.get(name, (None, None)) for trial in trials] for name in known}
    found = {name: [plain for plain, _ in own] for name, own in pairs.items()}
    layers = next(plain.layers for trial in trials for plain, _ in trial.values())
    return {
        "layers": layers,
        "views": [
            _view(pool, view, found[name], [centred for _, centred in pairs[name]])
            for name, view in known.items()
        ],
        "differences": [_difference(pool, a, b, found) for a, b in _pairs(known)],
    }


def _view(
    pool: Pool,
    view: View,
    trials: Sequence[Similarity | None],
    centred: Sequence[Similarity | None],
) -> dict[str, Any]:
    asim = [None if s is None else s.asim for s in trials]
    l2 = [None if s is None else s.l2 for s in trials]
    # a trial's mean over its rows is then its fraction of variance unexplained
    shares = [None if s is None else len(s.asim) * s.distance / _positive(s.variance) for s in trials]
    known = [s for s in trials if s is not None]
    longest = max(len(s.tokens) for s in known)
    count = np.sum([np.pad(s.tokens, (0, longest - len(s.tokens))) for s in known], axis=0)
    by_token = [
        np.pad(s.asim_by_token.mean(1) * s.tokens, (0, longest - len(s.tokens))) / count for s in known
    ]
    beyond = [None if s is None else s.asim for s in centred]
    extra = {}
    if any(b is not None for b in beyond):
        extra = {
            "centred": pool.means([_mean(b) for b in beyond]).to_dict(),
            "centred_by_layer": pool.means(beyond).to_dict(),
        }
    return {
        "name": view.name,
        "kind": view.kind,
        "control": view.control,
        "of": view.of,
        "n": sum(len(s.asim) for s in known),
        "asim": pool.means([_mean(a) for a in asim]).to_dict(),
        "l2": pool.means([_mean(a) for a in l2]).to_dict(),
        "variance_unexplained": pool.means([_mean(a) for a in shares]).to_dict(),
        "asim_by_layer": pool.means(asim).to_dict(),
        "l2_by_layer": pool.means(l2).to_dict(),
        "variance_unexplained_by_layer": pool.means(shares).value.tolist(),
        "asim_by_token": {"value": np.sum(by_token, axis=0).tolist(), "count": count.tolist()},
        **extra,
    }


def _pairs(known: Mapping[str, View]) -> list[tuple[str, str]]:
    """What is compared: adapters with the base model and with each other, controls with what they are of."""
    adapters = [name for name, view in known.items() if view.kind == "adapter"]
    pairs = [(name, "base") for name in adapters if "base" in known]
    pairs += [(b, a) for a, b in combinations(adapters, 2)]
    pairs += [(view.of, name) for name, view in known.items() if view.kind == "control" and view.of in known]
    for control in ("icl-mean", "icl-other"):
        pairs += [(name, control) for name in adapters if control in known]
    return pairs


def _difference(
    pool: Pool, a: str, b: str, found: Mapping[str, Sequence[Similarity | None]]
) -> dict[str, Any]:
    rows = [
        None if x is None or y is None else x.asim - y.asim for x, y in zip(found[a], found[b], strict=True)
    ]
    return {
        "a": a,
        "b": b,
        "asim": pool.means([_mean(r) for r in rows]).to_dict(),
        "asim_by_layer": pool.means(rows).to_dict(),
    }


def _mean(array: np.ndarray | None) -> np.ndarray | None:
    """Over layers."""
    return None if array is None else np.nanmean(array, axis=1)


def _positive(variance: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.where(variance > 0, variance, np.nan)
    return found
