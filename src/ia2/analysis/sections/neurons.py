"""Which MLP neurons and which directions of the residual stream differ most from in-context learning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ia2.analysis.conditions import ICL, Activations, by_condition
from ia2.analysis.section import Analysis, AnalysisSection, Look
from ia2.analysis.unembedding import Lens
from ia2.evaluation.effect_sizes import LEVEL, Difference, Moments, effects, largest, rounded, stability
from ia2.models.sites import has_site
from ia2.utils.logging import logger

# Coordinates that are listed, and compared between training sets.
_TOP = 50

_QUANTILES = (0.5, 0.9, 0.99, 1.0)


class NeuronAccumulator:
    """Differences from ICL by coordinate, of which only count, mean and spread are kept.

    The example is the unit: its answer tokens are averaged first. What ICL with other demonstrations differs
    by is a condition like any other (``icl-other``), and what the others' numbers are to be held against.

    Args:
        sites: ``neurons`` (what the MLP's last projection is given), ``residual`` (the stream after layers).
    """

    def __init__(self, sites: Sequence[str] = ("neurons", "residual")) -> None:
        self.sites = tuple(sites)
        self._moments: dict[str, dict[str, Moments]] = {site: {} for site in sites}

    def add(
        self, condition: str, index: int, found: Activations, icl: Activations, other: Activations | None
    ) -> None:
        """One example of one condition; of ICL itself nothing is kept."""
        if condition == ICL.name:
            return
        for site, moments in self._moments.items():
            difference = (found[site].double() - icl[site].double()).mean(1)
            moments.setdefault(condition, Moments()).add(difference.numpy())

    def finish(self) -> dict[str, dict[str, Difference]]:
        """Site → condition → what was found; all examples have been added. Maps:

        - ``shift`` ``[L, F]``: mean difference; of the residual stream a direction by layer.
        - ``common_shift`` ``[L]``: how much of the difference is one shift that all examples have,
          ``(‖m‖² − tr(S)/n) / mean‖x‖²`` of the differences x, their mean m and covariance S (with n − 1).
          ``‖m‖²`` alone would come out at 1/n without any shift; numerator and denominator are unbiased for
          ``‖E x‖²`` and ``E‖x‖²`` (the numerator is that of Chen and Qin 2010). 1: the same vector in every
          example; 0 (or, by chance, a little below): nothing in common. NaN with one example.
        """
        return {
            site: {condition: _of_moments(own) for condition, own in moments.items()}
            for site, moments in self._moments.items()
        }


def _of_moments(moments: Moments) -> Difference:
    n, mean, variance = moments.n, moments.mean, moments.variance
    total = (mean**2 + variance * (n - 1) / n).sum(1)
    common = (mean**2 - variance / n).sum(1) / np.where(total > 0, total, np.nan)
    return Difference(n, effects(mean, np.sqrt(variance), n), {"shift": mean, "common_shift": common})


def summarise(
    results: Sequence[Mapping[str, Mapping[str, Difference]]], layers: Sequence[int]
) -> dict[str, Any]:
    """The section ``neurons``, over training sets, by site."""
    section = {}
    for site in results[0]:
        views = by_condition([each[site] for each in results])
        section[site] = {
            "layers": list(layers),
            "width": next(iter(views.values()))[0].maps["shift"].shape[1],
            "trials": len(results),
            "level": LEVEL,
            "views": {name: _of_view(own, layers) for name, own in views.items()},
        }
    return section


def _of_view(found: Sequence[Difference], layers: Sequence[int]) -> dict[str, Any]:
    significant = np.array([d.effects.significant for d in found])
    counts = significant.sum(2)
    strength = [np.abs(d.effects.d_z) for d in found]
    common = np.array([d.maps["common_shift"] for d in found])
    # where training sets disagree on the sign, the mean effect is small
    effect = np.mean([d.effects.d_z for d in found], axis=0)
    shift = np.mean([d.maps["shift"] for d in found], axis=0)
    q = np.max([d.effects.q for d in found], axis=0)
    quantiles = {share: [np.quantile(s, share, axis=1) for s in strength] for share in _QUANTILES}
    top = [divmod(place, effect.shape[1]) for place in largest(np.abs(effect), _TOP)]
    return {
        "n": [d.n for d in found],
        "significant": rounded(counts.mean(0)),
        "share_significant": rounded(counts.sum(1).mean() / effect.size),
        "effect_quantiles": {f"{s:g}": rounded(np.mean(of, axis=0)) for s, of in quantiles.items()},
        "common_shift": rounded(common.mean(0)),
        "common_shift_range": rounded([common.min(0), common.max(0)]),
        "top": [
            {
                "layer": layers[i],
                "index": j,
                "effect": rounded(effect[i, j]),
                "shift": rounded(shift[i, j]),
                "q": rounded(q[i, j]),
                "significant": int(significant[:, i, j].sum()),
            }
            for i, j in top
        ],
        "stability": stability(strength, _TOP) if len(found) > 1 else None,
    }


def shift_tokens(
    lens: Lens, tokenizer: Any, results: Sequence[Mapping[str, Difference]], layers: Sequence[int], k: int = 8
) -> dict[str, list[dict[str, Any]]]:
    """The ``k`` tokens that each condition's mean shift of the residual stream promotes and suppresses.

    Returns:
        Condition → for the layers at one half and three quarters of the depth, and the last: its number, and
        ``promoted`` and ``suppressed``, lists of ``token`` (its text), ``id`` and ``score``, in standard
        deviations over the vocabulary from its mean; the strongest first.
    """
    depth = len(layers)
    places = sorted({depth // 2, 3 * depth // 4, depth - 1})

    def named(scores: np.ndarray, sign: int) -> list[dict[str, Any]]:
        return [
            {"token": tokenizer.decode([i]), "id": i, "score": rounded(scores[i])}
            for i in largest(sign * scores, k)
        ]

    tokens = {}
    for condition, own in by_condition(results).items():
        shift = np.mean([d.maps["shift"] for d in own], axis=0)
        # unembeddings are padded at times
        scores = lens.promotes(shift[places])[:, : len(tokenizer)]
        tokens[condition] = [
            {"layer": layers[place], "promoted": named(row, 1), "suppressed": named(row, -1)}
            for place, row in zip(places, scores, strict=True)
        ]
    return tokens


def _accumulator(look: Look) -> NeuronAccumulator:
    if has_site(look.runner.base.model, "neurons", look.runner.pattern):
        return NeuronAccumulator()
    logger.info("No dense MLPs in this model: no neurons, only the residual stream.")
    return NeuronAccumulator(("residual",))


def _section(results: list[Any], analysis: Analysis) -> dict[str, Any]:
    section = summarise(results, analysis.layers)
    base, residual = analysis.base, [each["residual"] for each in results]
    tokens = shift_tokens(Lens.of(base.model), base.tokenizer, residual, analysis.layers)
    for condition, named in tokens.items():
        section["residual"]["views"][condition]["tokens"] = named
    return section


SECTION = AnalysisSection("which neurons and residual directions differ from ICL", _section, _accumulator)
