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
from ia2.analysis.section import Analysis, AnalysisSection, Look
from ia2.evaluation.similarity import Similarity, SimilarityMeter
from ia2.utils.statistics import mean_interval

if TYPE_CHECKING:
    import torch

_CENTRED = "centred "
_Rows = Sequence[np.ndarray | None]


class ActivationAccumulator:
    """Similarity of every condition to ICL.

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


def _accumulator(look: Look) -> ActivationAccumulator:
    mean = look.runner.mean_of_training("output") if look.analysis.settings.controls else None
    return ActivationAccumulator(look.analysis.layers, mean)


def _measure(look: Look) -> tuple[dict[str, Similarity], list[Condition]]:
    return look.results["activations"], look.conditions


def _summarise(
    results: Sequence[tuple[dict[str, Similarity], list[Condition]]], analysis: Analysis
) -> dict[str, Any]:
    """Means and 95% t-intervals over seeds (of one seed over its queries), by condition and layer.

    Differences of conditions are paired by query. Intervals of the variance unexplained hold the reference's
    variance fixed.
    """
    found = [similar for similar, _ in results]
    seeds = [runner.set.seed for runner in analysis.runners]
    conditions: dict[str, Condition] = {}
    for condition in (condition for _, own in results for condition in own):
        conditions.setdefault(condition.name, condition)
    return {
        "layers": analysis.layers,
        "views": [_view(condition, found, seeds) for condition in conditions.values()],
        "differences": [_difference(a, b, found, seeds) for a, b in _pairs(conditions)],
    }


def _intervals(name: str, rows: _Rows, seeds: Sequence[int]) -> dict[str, Any]:
    """Of ``[n, L]``, over layers and by layer; the folds of a seed are one run."""
    own: dict[int, list[np.ndarray]] = {}
    for seed, part in zip(seeds, rows, strict=True):
        if part is not None:
            own.setdefault(seed, []).append(part)
    runs = [np.concatenate(parts) for parts in own.values()]
    return {
        name: mean_interval([np.nanmean(run, axis=1) for run in runs]).to_dict(),
        f"{name}_by_layer": mean_interval(runs).to_dict(),
    }


def _column(similar: Sequence[Similarity | None], name: str) -> _Rows:
    return [None if s is None else getattr(s, name) for s in similar]


def _view(
    condition: Condition, found: Sequence[Mapping[str, Similarity]], seeds: Sequence[int]
) -> dict[str, Any]:
    own = [each.get(condition.name) for each in found]
    centred = [each.get(_CENTRED + condition.name) for each in found]
    known = [similar for similar in own if similar is not None]
    longest = max(len(s.tokens) for s in known)
    count, total = np.zeros(longest, int), np.zeros(longest)
    for s in known:
        count[: len(s.tokens)] += s.tokens
        total[: len(s.tokens)] += s.asim_by_token.mean(1) * s.tokens
    view: dict[str, Any] = {
        "name": condition.name,
        "kind": condition.kind,
        "control": condition.control,
        "of": condition.of,
        "n": sum(len(s.asim) for s in known),
        **_intervals("asim", _column(own, "asim"), seeds),
        **_intervals("l2", _column(own, "l2"), seeds),
        **_intervals("variance_unexplained", _column(own, "unexplained"), seeds),
        "asim_by_token": {"value": (total / count).tolist(), "count": count.tolist()},
    }
    view["variance_unexplained_by_layer"] = view["variance_unexplained_by_layer"]["value"]
    if any(s is not None for s in centred):
        view |= _intervals("centred", _column(centred, "asim"), seeds)
    return view


def _pairs(conditions: Mapping[str, Condition]) -> list[tuple[str, str]]:
    """What is compared: adapters with the base model and with each other, controls with what they are of."""
    adapters = [name for name, condition in conditions.items() if condition.kind == "adapter"]
    controls = [(c.of, name) for name, c in conditions.items() if c.kind == "control" and c.of in conditions]
    beside = {c.name: [(name, c.name) for name in adapters] for c in (BASE, MEAN, OTHER)}
    between = [(b, a) for a, b in combinations(adapters, 2)]
    pairs = {BASE.name: beside[BASE.name], "": between + controls, **beside}
    return [pair for name, own in pairs.items() if not name or name in conditions for pair in own]


def _difference(
    a: str, b: str, found: Sequence[Mapping[str, Similarity]], seeds: Sequence[int]
) -> dict[str, Any]:
    rows = [own[a].asim - own[b].asim if a in own and b in own else None for own in found]
    return {"a": a, "b": b, **_intervals("asim", rows, seeds)}


SECTION = AnalysisSection(
    "similarity to ICL by layer and token, with controls", _summarise, _accumulator, _measure
)
