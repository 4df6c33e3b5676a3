"""Which MLP neurons and which directions of the residual stream differ most from in-context learning.

Of each coordinate (a neuron's activation, or a coordinate of the residual stream) only count, mean and
spread of its difference to ICL are kept, so memory does not grow with the number of examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ia2.analysis.effect_sizes import LEVEL, REFERENCE, Effects, Moments, effects, largest, rounded, stability

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_QUANTILES = (0.5, 0.9, 0.99, 1.0)

# Rows of the unembedding that are taken to float32 at once.
_VOCABULARY_PART = 16384


@dataclass(frozen=True)
class CoordinateView:
    """One view's difference to ICL, by coordinate; F is the width of the site.

    Attributes:
        n: examples.
        shift: mean difference, ``[L, F]`` float64; of the residual stream a direction by layer.
        effects: of the t test that the mean difference is zero, ``[L, F]``; false discoveries are controlled
            over all coordinates of all layers.
        common_shift: how much of the difference is one shift that all examples have, ``[L]``:
            ``(‖m‖² − tr(S)/n) / mean‖x‖²``, of the differences x, their mean m and covariance S (with n − 1).
            ``‖m‖²`` alone would come out at 1/n without any shift; numerator and denominator are unbiased for
            ``‖E x‖²`` and ``E‖x‖²`` (the numerator is that of Chen and Qin 2010). 1: the same vector in every
            example; 0 (or, by chance, a little below): nothing in common. NaN with one example.
    """

    n: int
    shift: np.ndarray
    effects: Effects
    common_shift: np.ndarray


@dataclass(frozen=True)
class Coordinates:
    """What a :class:`NeuronMeter` found in one trial.

    Attributes:
        layers: layer indices, ``[L]``.
        site: ``neurons`` or ``residual``.
        views: by name.
    """

    layers: list[int]
    site: str
    views: dict[str, CoordinateView]


class NeuronMeter:
    """Collects :class:`Coordinates`, one example of one view at a time.

    The example is the unit: its answer tokens are averaged first. What ICL with other demonstrations differs
    by is a view like any other (``icl-other``), and what the other views' numbers are to be held against.

    Args:
        layers: layer indices.
        width: F, of the site.
        site: ``neurons`` (what the MLP's last projection is given) or ``residual`` (the stream after layers).
    """

    def __init__(self, layers: list[int], width: int, site: str = "neurons") -> None:
        self.layers = layers
        self.width = width
        self.site = site
        self._moments: dict[str, Moments] = {}

    def add(
        self,
        view: str,
        index: int,
        found: Mapping[str, torch.Tensor],
        icl: Mapping[str, torch.Tensor],
        other: Mapping[str, torch.Tensor] | None,
    ) -> None:
        """One example of one view; of ICL itself nothing is kept.

        Args:
            view: its name.
            index: of the example.
            found: the site, ``[L, G, F]``.
            icl: the same of ICL.
            other: of ICL with other demonstrations; not looked at.

        Raises:
            ValueError: a site of another shape.
        """
        if view == REFERENCE:
            return
        difference = (found[self.site].double() - icl[self.site].double()).mean(1)
        if difference.shape != (len(self.layers), self.width):
            raise ValueError(f"{self.site}: {tuple(difference.shape)} is not [layers, width]")
        self._moments.setdefault(view, Moments()).add(difference.numpy())

    def finish(self) -> Coordinates:
        """All examples have been added."""
        return Coordinates(self.layers, self.site, {v: _view(m) for v, m in self._moments.items()})


def _view(moments: Moments) -> CoordinateView:
    n, mean, variance = moments.n, moments.mean, moments.variance
    squared = mean**2 + variance * (n - 1) / n
    total = squared.sum(1)
    common = (mean**2 - variance / n).sum(1) / np.where(total > 0, total, np.nan)
    return CoordinateView(n, mean, effects(mean, np.sqrt(variance), n), common)


# ------------------------------------------------------------------------------------------- summary


def summarise(
    trials: Mapping[str, Sequence[Coordinates]],
    tokens: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    top: int = 50,
) -> dict[str, Any]:
    """The section ``neurons`` of ``analysis.json``, over trials, by site.

    Args:
        trials: site → one result a training set; sites without results are left out.
        tokens: of the residual stream, what :func:`shift_tokens` gives.
        top: coordinates that are listed, and compared between trials.
    """
    section = {site: _site(found, top) for site, found in trials.items() if found}
    for view, named in (tokens or {}).items():
        section["residual"]["views"][view]["tokens"] = list(named)
    return section


def _site(trials: Sequence[Coordinates], top: int) -> dict[str, Any]:
    names = list(dict.fromkeys(view for trial in trials for view in trial.views))
    first = next(iter(trials[0].views.values()))
    return {
        "layers": trials[0].layers,
        "width": first.shift.shape[1],
        "trials": len(trials),
        "level": LEVEL,
        "views": {
            name: _summary([t.views[name] for t in trials if name in t.views], trials[0].layers, top)
            for name in names
        },
    }


def _summary(found: Sequence[CoordinateView], layers: Sequence[int], top: int) -> dict[str, Any]:
    significant = np.array([v.effects.significant.sum(1) for v in found])
    strength = [np.abs(v.effects.d_z) for v in found]
    common = np.array([v.common_shift for v in found])
    return {
        "n": [v.n for v in found],
        "significant": rounded(significant.mean(0)),
        "share_significant": rounded(significant.sum(1).mean() / found[0].shift.size),
        "effect_quantiles": {
            f"{share:g}": rounded(np.mean([np.quantile(s, share, axis=1) for s in strength], axis=0))
            for share in _QUANTILES
        },
        "common_shift": rounded(common.mean(0)),
        "common_shift_range": rounded([common.min(0), common.max(0)]),
        "top": _top(found, layers, top),
        "stability": stability(strength, top) if len(found) > 1 else None,
    }


def _top(found: Sequence[CoordinateView], layers: Sequence[int], top: int) -> list[dict[str, Any]]:
    """Coordinates of the largest mean effect, with its sign: where trials disagree on it, it is small."""
    effect = np.mean([v.effects.d_z for v in found], axis=0)
    shift = np.mean([v.shift for v in found], axis=0)
    places = [divmod(place, effect.shape[1]) for place in largest(np.abs(effect), top)]
    return [
        {
            "layer": layers[i],
            "index": j,
            "effect": rounded(effect[i, j]),
            "shift": rounded(shift[i, j]),
            "q": rounded(max(v.effects.q[i, j] for v in found)),
            "significant": int(sum(v.effects.significant[i, j] for v in found)),
        }
        for i, j in places
    ]


# -------------------------------------------------------------------------------------------- tokens


def shift_tokens(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    trials: Sequence[Coordinates],
    k: int = 8,
) -> dict[str, list[dict[str, Any]]]:
    """Tokens that each view's mean shift over trials promotes and suppresses, on its way straight out.

    The layers are those at one half and three quarters of the depth, and the last. A shift is put through the
    gains of the final norm (a LayerNorm also removes its mean) and the unembedding. Layers in between, which
    would make more of it, are left out; so is the length that the norm divides by, the same for all tokens.

    Args:
        model: the base model, bare or wrapped.
        tokenizer: whose ids are named.
        trials: results of the site ``residual``.
        k: tokens of either kind.

    Returns:
        View → for each layer its number with ``promoted`` and ``suppressed``: each a list of ``token`` (its
        text), ``id`` and ``score``, in standard deviations over the vocabulary from its mean; the strongest
        first.

    Raises:
        ModelError: what comes after the last layer cannot be followed.
    """
    known = trials[0].layers
    places = sorted({len(known) // 2, 3 * len(known) // 4, len(known) - 1})
    found: dict[str, list[dict[str, Any]]] = {}
    for view in dict.fromkeys(view for trial in trials for view in trial.views):
        shift = np.mean([t.views[view].shift for t in trials if view in t.views], axis=0)
        scores = _scores(model, shift[places])
        found[view] = [
            {"layer": known[place], **_named(tokenizer, row, k)}
            for place, row in zip(places, scores, strict=True)
        ]
    return found


def _scores(model: nn.Module, shifts: np.ndarray) -> np.ndarray:
    """Directions ``[m, d]`` → scores ``[m, V]``."""
    import torch

    from ia2.analysis.unembedding import Lens

    lens = Lens.of(model)
    with torch.no_grad():
        # scaled, so that half precision does not drown it; only the direction matters
        directions = torch.from_numpy(shifts / np.maximum(np.abs(shifts).max(1, keepdims=True), 1e-30))
        states = directions.to(lens.device, torch.float32)
        for module in lens.tail:
            states = _linear_part(module, states, lens.dtype)
        if lens.weight is not None:
            parts = lens.weight.split(_VOCABULARY_PART)
            states = states.to(lens.weight.device)
            logits = torch.cat([states @ part.float().T for part in parts], dim=1)
        else:
            assert lens.head is not None
            silent = torch.zeros_like(states[:1]).to(lens.dtype)
            logits = (lens.head(states.to(lens.dtype)) - lens.head(silent)).float()
    scores = logits.double().cpu().numpy()
    return (scores - scores.mean(1, keepdims=True)) / np.maximum(scores.std(1, keepdims=True), 1e-30)


def _linear_part(module: nn.Module, states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a module between layers and unembedding does to a direction.

    The gains of a norm are read off what it does to a vector of ones of alternating signs, which has mean
    square 1 and mean 0: families write them differently (Gemma's are 1 + weight).
    """
    import torch
    from torch import nn

    if isinstance(module, nn.Linear):
        return states @ module.weight.float().T
    probe = torch.ones(1, 1, states.shape[-1], device=states.device, dtype=dtype)
    probe[..., 1::2] = -1
    plus, minus = module(probe).float(), module(-probe).float()
    gains = (0.5 * (plus - minus) * probe.float())[0]
    # a norm that removes the mean does not see what is added to all coordinates
    if (module(probe + 1).float() - plus).abs().max() < 1e-2 * (plus - minus).abs().max():
        states = states - states.mean(-1, keepdim=True)
    return states * gains


def _named(tokenizer: PreTrainedTokenizerBase, scores: np.ndarray, k: int) -> dict[str, list[dict[str, Any]]]:
    scores = scores[: len(tokenizer)]  # unembeddings are padded at times

    def named(sign: int) -> list[dict[str, Any]]:
        return [
            {"token": tokenizer.decode([i]), "id": i, "score": rounded(scores[i])}
            for i in largest(sign * scores, k)
        ]

    return {"promoted": named(1), "suppressed": named(-1)}
