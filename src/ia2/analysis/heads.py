"""Which attention heads carry the difference between in-context learning and another view.

A head is looked at by what it gives to the output projection (site ``heads``), at answer positions. How far
it is from ICL says little: ICL with *other* demonstrations is some way off as well. So the question is
which heads are further from ICL than that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ia2.analysis.effect_sizes import (
    LEVEL,
    REFERENCE,
    Effects,
    ShiftTest,
    effects,
    largest,
    rank_agreement,
    rounded,
    stability,
)
from ia2.tokens import Ids, common_prefix, fed_ids

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

CONTROL = "icl-other"
"""The view whose distance to ICL others' are compared with: ICL with other demonstrations."""

# Relative squared distances below are not told apart: what rounding to bfloat16 alone makes, (2^-9)², is
# 4e-6, and a logarithm would make a finding of it.
_FLOOR = 1e-5

REGIONS = ("first", "demonstrations", "query")
"""What attention goes to: the first token (the sink), what stands between it and the query, and the query
with the answer so far."""

# Bytes of attention weights that are held at once. Beyond, layers are read in several passes.
_HELD = 2**30


@dataclass(frozen=True)
class HeadView:
    """One view against ICL, by head.

    Attributes:
        test: ``control`` (is it further from ICL than ICL with other demonstrations is?) or ``direction``
            (is there a mean shift at all?), see :class:`HeadMeter`.
        distance: squared distance to ICL, mean over an example's answer tokens, over the mean of ICL's own
            squared norm in that head (over answer tokens, then over all examples of the view), ``[n, L, H]``.
            0 is the same; a head that is silent scores 1 in the mean over examples. NaN for a head that is
            silent under ICL.
        cosine: with ICL, mean over an example's answer tokens and the examples, ``[L, H]``.
        control: ``distance`` of ICL with other demonstrations, ``[n, L, H]``; None without.
        effects: of the test, ``[L, H]``; false discoveries are controlled over all heads of the view.
        share_of_layer: the head's part of the layer's summed squared distance, ``[L, H]``.
        share_of_model: the same of all layers, each layer's distances taken relative to the squared norm of
            its heads under ICL, so that layers of large outputs do not own the whole; ``[L, H]``.
    """

    test: str
    distance: np.ndarray
    cosine: np.ndarray
    control: np.ndarray | None
    effects: Effects
    share_of_layer: np.ndarray
    share_of_model: np.ndarray


@dataclass(frozen=True)
class Heads:
    """What a :class:`HeadMeter` found in one trial.

    Attributes:
        layers: layer indices, ``[L]``.
        num_heads: H.
        views: by name.
    """

    layers: list[int]
    num_heads: int
    views: dict[str, HeadView]


class HeadMeter:
    """Collects :class:`Heads`, one example of one view at a time.

    **With a control** (``other`` is given), each example has two distances to ICL: the view's and that of
    ICL with other demonstrations. Tested is the mean of the *logarithm* of their ratio: distances are
    skewed, and a query that moves heads much does so in both, so what is comparable over examples is the
    ratio. Its t test is symmetric in the two. d_z above zero: further from ICL than the control.

    **Without** (``other`` is None, and for the control itself), tested is whether the mean difference to ICL
    is zero in all directions (:class:`~ia2.analysis.effect_sizes.ShiftTest`).

    But for the sums of the latter only ``[L, H]`` numbers of each example and view are kept. The order of the
    examples does not matter.

    Args:
        layers: layer indices.
        num_heads: H, query heads of a layer; the site's width is ``H·d_head``.
    """

    def __init__(self, layers: list[int], num_heads: int) -> None:
        self.layers = layers
        self.num_heads = num_heads
        self._energy: dict[int, np.ndarray] = {}
        self._controls: dict[int, np.ndarray] = {}
        self._distance: dict[str, dict[int, np.ndarray]] = {}
        self._cosine: dict[str, Any] = {}
        self._shifts: dict[str, ShiftTest] = {}

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
            index: of the example, the same in all views.
            found: its site ``heads``, ``[L, G, H·d_head]``.
            icl: the same of ICL.
            other: the same of ICL with other demonstrations.

        Raises:
            ValueError: a width that H does not divide, or a view with a control for some examples only.
        """
        import torch

        if view == REFERENCE:
            return
        ours, reference = self._by_head(found), self._by_head(icl)
        difference = ours - reference
        if index not in self._energy:
            self._energy[index] = _squared(reference)
        self._distance.setdefault(view, {})[index] = _squared(difference)
        cosine = torch.nn.functional.cosine_similarity(ours, reference, dim=-1)
        self._cosine[view] = self._cosine.get(view, 0.0) + cosine.mean(1).double().numpy()
        controlled = other is not None and view != CONTROL
        if len(self._distance[view]) > 1 and controlled == (view in self._shifts):
            raise ValueError(f"view '{view}': all of its examples have a control, or none")
        if not controlled:
            self._shifts.setdefault(view, ShiftTest()).add(index, difference.mean(1))
        elif other is not None and index not in self._controls:
            self._controls[index] = _squared(self._by_head(other) - reference)

    def _by_head(self, sites: Mapping[str, torch.Tensor]) -> torch.Tensor:
        heads = sites["heads"].double()
        if heads.shape[-1] % self.num_heads:
            raise ValueError(f"a width of {heads.shape[-1]} is not of {self.num_heads} heads")
        return heads.unflatten(-1, (self.num_heads, -1))

    def finish(self) -> Heads:
        """All examples have been added."""
        return Heads(self.layers, self.num_heads, {view: self._view(view) for view in self._distance})

    def _view(self, view: str) -> HeadView:
        order = sorted(self._distance[view])
        squared = np.stack([self._distance[view][i] for i in order]).astype(float)
        energy = np.mean([self._energy[i] for i in order], axis=0, dtype=float)
        scale = np.where(energy > 0, energy, np.nan)
        mean = squared.mean(0)
        relative = mean / np.maximum(energy.sum(1, keepdims=True), np.finfo(float).tiny)
        shift = self._shifts.get(view)
        control = None if shift else np.stack([self._controls[i] for i in order]) / scale
        return HeadView(
            "direction" if shift else "control",
            squared / scale,
            self._cosine[view] / len(order),
            control,
            shift.effects() if shift else _against(squared / scale, control),
            mean / _positive(mean.sum(1, keepdims=True)),
            relative / _positive(relative.sum()),
        )


def _squared(heads: torch.Tensor) -> np.ndarray:
    """Squared norm by head, mean over tokens: ``[L, G, H, d_head]`` → ``[L, H]`` float32.

    An array of numpy's own: a small tensor's storage is ten times as large.
    """
    return np.array(heads.pow(2).sum(-1).mean(1).numpy(), dtype=np.float32)


def _positive(total: Any) -> Any:
    return np.where(total > 0, total, np.nan)


def _against(distance: np.ndarray, control: Any) -> Effects:
    """The paired test of log ratios, ``[n, L, H]`` each."""
    ratios = np.log(distance + _FLOOR) - np.log(control + _FLOOR)
    sd = ratios.std(0, ddof=1) if len(ratios) > 1 else np.zeros(ratios.shape[1:])
    return effects(ratios.mean(0), sd, len(ratios))


# ------------------------------------------------------------------------------------------- summary


def summarise(
    trials: Sequence[Heads], attention: Sequence[Mapping[str, np.ndarray]] = (), top: int = 10
) -> dict[str, Any]:
    """The section ``heads`` of ``analysis.json``, over trials.

    Maps are ``[L][H]``: means over trials, but for ``q`` (the largest), and ``further`` and ``closer``, the
    number of trials that call the head different, by the sign of d_z.

    Args:
        trials: one a training set; a view may be missing in some.
        attention: of each trial, view → :func:`attention_mass`.
        top: heads that are listed by name, and compared between trials.
    """
    first = trials[0]
    names = list(dict.fromkeys(view for trial in trials for view in trial.views))
    section: dict[str, Any] = {
        "layers": first.layers,
        "num_heads": first.num_heads,
        "trials": len(trials),
        "level": LEVEL,
        "views": {
            name: _summary([t.views[name] for t in trials if name in t.views], first.layers, top)
            for name in names
        },
    }
    if attention:
        section["attention"] = {"regions": list(REGIONS), "views": _masses(attention)}
    return section


def _summary(found: Sequence[HeadView], layers: Sequence[int], top: int) -> dict[str, Any]:
    maps = {
        "effect": np.mean([v.effects.d_z for v in found], axis=0),
        "q": np.max([v.effects.q for v in found], axis=0),
        "distance": np.mean([v.distance.mean(0) for v in found], axis=0),
        "cosine": np.mean([v.cosine for v in found], axis=0),
        "share_of_layer": np.mean([v.share_of_layer for v in found], axis=0),
        "share_of_model": np.mean([v.share_of_model for v in found], axis=0),
    }
    controls = [v.control.mean(0) for v in found if v.control is not None]
    further, closer = (
        sum((sign * v.effects.d_z > 0) & v.effects.significant for v in found) for sign in (1, -1)
    )
    places = [divmod(place, maps["effect"].shape[1]) for place in largest(maps["share_of_model"], top)]
    return {
        "test": found[0].test,
        "n": [len(v.distance) for v in found],
        "heads_further": int(np.sum(further == len(found))),
        "heads_closer": int(np.sum(closer == len(found))),
        **{name: rounded(values) for name, values in maps.items()},
        "control": rounded(np.mean(controls, axis=0)) if len(controls) == len(found) else None,
        "further": np.asarray(further).tolist(),
        "closer": np.asarray(closer).tolist(),
        "top": [
            {"layer": layers[i], "head": j, **{name: rounded(values[i, j]) for name, values in maps.items()}}
            for i, j in places
        ],
        "stability": _stability(found, top) if len(found) > 1 else None,
    }


def _stability(found: Sequence[HeadView], top: int) -> dict[str, Any]:
    return {
        "spearman_of_effect": rounded(rank_agreement([v.effects.d_z for v in found])),
        "spearman_of_share": rounded(rank_agreement([v.share_of_model for v in found])),
        **stability([v.share_of_model for v in found], top),
    }


# ----------------------------------------------------------------------------------- attention mass


def attention_mass(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Ids],
    answers: Sequence[Ids],
    query_lengths: Sequence[int],
    *,
    attention_modules: str | None = None,
    description: str = "attention",
) -> np.ndarray:
    """How much attention goes where, at answer positions, by head.

    The model runs with eager attention, whatever it is set to. Weights are reduced batch by batch; where
    those of all layers do not fit into a gibibyte, layers are read in several passes.

    Args:
        model: as it is to be looked at (its adapter on or off).
        tokenizer: gives the padding id.
        prompts: ids of each prompt, demonstrations included.
        answers: ids of each answer; ``prompt + answer[:-1]`` is fed.
        query_lengths: how many of the last ids of each prompt are the query; the rest, but for the first
            token, counts as demonstrations (instructions too, where there are some).
        attention_modules: optional glob over module names.
        description: text of the progress bar.

    Returns:
        ``[n, L, H, 3]`` float64, mean over an example's answer positions: the parts of :data:`REGIONS`, which
        sum to 1. What goes to tokens that are not the row's own (virtual tokens of prompt tuning, learnt
        sinks) is left out, and the rest made to sum to 1.

    Raises:
        ModelError: no attention modules, or attention that has no weights to give.
        ValueError: a query that is longer than its prompt.
    """
    from ia2.batching import token_budget
    from ia2.capture import ActivationCapture, eager_attention
    from ia2.inference import answer_pass

    if any(not 0 <= q <= len(p) for q, p in zip(query_lengths, prompts, strict=True)):
        raise ValueError("query lengths must be between 0 and the length of the prompt")
    pairs = list(zip(prompts, answers, strict=True))
    spans = [len(fed_ids(*pair)) for pair in pairs]
    layers = ActivationCapture(model, attention_modules, site="weights").layers
    together, rows = _fitting(model, pairs, len(layers))
    parts = []
    for start in range(0, len(layers), together):
        some = layers[start : start + together]
        found: dict[int, np.ndarray] = {}
        with eager_attention(model), ActivationCapture(model, attention_modules, some, "weights") as capture:
            for output in answer_pass(
                model,
                tokenizer,
                pairs,
                capture=capture,
                spans=spans,
                logits=False,
                description=description,
                batch_tokens=min(token_budget(model), rows * max(spans)),
            ):
                i = output.index
                found[i] = _regions(output.activations, len(prompts[i]) - query_lengths[i])
        parts.append(np.stack([found[i] for i in range(len(pairs))]))
    return np.concatenate(parts, axis=1)


def _regions(weights: Any, query_start: int) -> np.ndarray:
    """Weights ``[L, G, H, S]`` over a whole row → ``[L, H, 3]``."""
    mean = weights.double().mean(1)
    ends = mean[..., :1], mean[..., 1 : max(1, query_start)], mean[..., max(1, query_start) :]
    return np.stack([part.sum(-1).numpy() for part in ends], axis=-1)


def _fitting(model: Any, pairs: Sequence[tuple[Ids, Ids]], layers: int) -> tuple[int, int]:
    """How many layers' weights are read in one pass, and of how many rows at once (the longest)."""
    from ia2.inference import MIN_SHARED_PREFIX
    from ia2.traits import takes_cache

    rows = [fed_ids(*pair) for pair in pairs]
    longest, answer = max(map(len, rows)), max(len(a) for _, a in pairs)
    shared = common_prefix(rows) if len(rows) > 1 and takes_cache(model) else 0
    fed = longest - (min(shared, longest - answer) if shared >= MIN_SHARED_PREFIX else 0)
    heads = getattr(model.config.get_text_config(), "num_attention_heads", 32)
    size = next(iter(model.parameters())).element_size()
    # all positions in the model's dtype; answer positions in float32, stacked and by row
    row = longest * heads * (fed * size + 3 * 4 * answer)
    together = max(1, min(layers, _HELD // row))
    return together, max(1, _HELD // (row * together))


def _masses(trials: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """Means over examples, then trials, by view: of each head, and of each layer."""
    names = list(dict.fromkeys(view for trial in trials for view in trial))
    means = {n: np.mean([trial[n].mean(0) for trial in trials if n in trial], axis=0) for n in names}
    return {name: {"mass": rounded(mean), "by_layer": rounded(mean.mean(1))} for name, mean in means.items()}
