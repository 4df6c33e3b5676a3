"""Which attention heads differ from in-context learning, and what they attend to.

How far a head is from ICL says little: ICL with *other* demonstrations is some way off as well. So the
question is which heads are further from ICL than that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ia2.analysis.conditions import ICL, OTHER, Activations, by_condition
from ia2.analysis.section import AnalysisSection, Look
from ia2.evaluation.effect_sizes import (
    LEVEL,
    Difference,
    Effects,
    ShiftTest,
    effects,
    largest,
    rank_agreement,
    rounded,
    stability,
)
from ia2.models.tokens import Ids, common_prefix, fed_ids

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

# Relative squared distances below are not told apart: what rounding to bfloat16 alone makes, (2^-9)², is
# 4e-6, and a logarithm would make a finding of it.
_FLOOR = 1e-5

REGIONS = ("first", "demonstrations", "query")
"""What attention goes to: the first token (the sink), what stands between it and the query, and the query
with the answer so far."""

# Queries whose attention is looked at: eager attention is slow, and means over heads settle soon.
ATTENTION_QUERIES = 48

# Bytes of attention weights that are held at once. Beyond, layers are read in several passes.
_HELD = 2**30

# Heads that are listed, and compared between training sets.
_TOP = 10


class HeadAccumulator:
    """Differences from ICL by head, ``num_heads`` a layer, one example of one condition at a time.

    **With a control** (``other`` is given), each example has two distances to ICL: the condition's and that
    of ICL with other demonstrations. Tested is the mean of the *logarithm* of their ratio: distances are
    skewed, and a query that moves heads much does so in both. d_z above zero: further than the control.

    **Without** (``other`` is None, and for the control itself), tested is whether the mean difference to ICL
    is zero in all directions (:class:`~ia2.evaluation.effect_sizes.ShiftTest`).

    But for the sums of the latter only ``[L, H]`` numbers of each example and condition are kept.
    """

    sites: tuple[str, ...] = ("heads",)

    def __init__(self, num_heads: int) -> None:
        self.num_heads = num_heads
        self._energy: dict[int, np.ndarray] = {}
        self._controls: dict[int, np.ndarray] = {}
        self._distance: dict[str, dict[int, np.ndarray]] = {}
        self._cosine: dict[str, Any] = {}
        self._shifts: dict[str, ShiftTest] = {}

    def add(
        self, condition: str, index: int, found: Activations, icl: Activations, other: Activations | None
    ) -> None:
        """One example of one condition; of ICL itself nothing is kept."""
        import torch

        if condition == ICL.name:
            return
        ours, reference = self._by_head(found), self._by_head(icl)
        difference = ours - reference
        if index not in self._energy:
            self._energy[index] = _squared(reference)
            if other is not None:
                self._controls[index] = _squared(self._by_head(other) - reference)
        self._distance.setdefault(condition, {})[index] = _squared(difference)
        cosine = torch.nn.functional.cosine_similarity(ours, reference, dim=-1)
        self._cosine[condition] = self._cosine.get(condition, 0.0) + cosine.mean(1).double().numpy()
        if other is None or condition == OTHER.name:
            self._shifts.setdefault(condition, ShiftTest()).add(index, difference.mean(1))

    def _by_head(self, sites: Activations) -> torch.Tensor:
        return sites["heads"].double().unflatten(-1, (self.num_heads, -1))

    def finish(self) -> dict[str, Difference]:
        """By condition; all examples have been added. Maps ``[L, H]``:

        - ``distance``: squared distance to ICL, mean over an example's answer tokens, over the mean of ICL's
          own squared norm in that head. 0 is the same; a head that is silent scores 1. NaN for a head that
          is silent under ICL. ``control`` is that of ICL with other demonstrations, where there is one.
        - ``cosine`` with ICL, mean over an example's answer tokens and the examples.
        - ``share_of_layer``: the head's part of the layer's summed squared distance.
        - ``share_of_model``: the same of all layers, each layer's distances taken relative to the squared
          norm of its heads under ICL, so that layers of large outputs do not own the whole.

        The test is ``control`` (is it further from ICL than ICL with other demonstrations is?) or
        ``direction`` (is there a mean shift at all?).
        """
        return {condition: self._difference(condition) for condition in self._distance}

    def _difference(self, condition: str) -> Difference:
        order = sorted(self._distance[condition])
        squared = np.stack([self._distance[condition][i] for i in order]).astype(float)
        energy = np.mean([self._energy[i] for i in order], axis=0, dtype=float)
        scale = np.where(energy > 0, energy, np.nan)
        mean = squared.mean(0)
        relative = mean / np.maximum(energy.sum(1, keepdims=True), np.finfo(float).tiny)
        maps = {
            "distance": (squared / scale).mean(0),
            "cosine": self._cosine[condition] / len(order),
            "share_of_layer": mean / _positive(mean.sum(1, keepdims=True)),
            "share_of_model": relative / _positive(relative.sum()),
        }
        if shift := self._shifts.get(condition):
            return Difference(len(order), shift.effects(), maps, "direction")
        control = np.stack([self._controls[i] for i in order]) / scale
        tested = _against(squared / scale, control)
        return Difference(len(order), tested, {**maps, "control": control.mean(0)}, "control")


def _squared(heads: torch.Tensor) -> np.ndarray:
    """Squared norm by head, mean over tokens: ``[L, G, H, d_head]`` → ``[L, H]`` float32.

    An array of numpy's own: a small tensor's storage is ten times as large.
    """
    return np.array(heads.pow(2).sum(-1).mean(1).numpy(), dtype=np.float32)


def _positive(total: Any) -> Any:
    return np.where(total > 0, total, np.nan)


def _against(distance: np.ndarray, control: np.ndarray) -> Effects:
    """The paired test of log ratios, ``[n, L, H]`` each."""
    ratios = np.log(distance + _FLOOR) - np.log(control + _FLOOR)
    sd = ratios.std(0, ddof=1) if len(ratios) > 1 else np.zeros(ratios.shape[1:])
    return effects(ratios.mean(0), sd, len(ratios))


def summarise(
    results: Sequence[tuple[Mapping[str, Difference], Mapping[str, np.ndarray]]],
    layers: Sequence[int],
    num_heads: int,
) -> dict[str, Any]:
    """The section ``heads``, over training sets: of each the accumulator's result, and attention masses.

    Maps are ``[L][H]``: means over training sets, but for ``q`` (the largest), and ``further`` and
    ``closer``, the number of training sets that call the head different, by the sign of d_z.
    """
    views = by_condition([found for found, _ in results])
    section: dict[str, Any] = {
        "layers": list(layers),
        "num_heads": num_heads,
        "trials": len(results),
        "level": LEVEL,
        "views": {name: _of_view(own, layers) for name, own in views.items()},
    }
    attention = {}
    for name, own in by_condition([masses for _, masses in results]).items():
        mean = np.mean([shares.mean(0) for shares in own], axis=0)
        attention[name] = {"mass": rounded(mean), "by_layer": rounded(mean.mean(1))}
    if attention:
        section["attention"] = {"regions": list(REGIONS), "views": attention}
    return section


def _of_view(found: Sequence[Difference], layers: Sequence[int]) -> dict[str, Any]:
    maps = {
        "effect": np.mean([d.effects.d_z for d in found], axis=0),
        "q": np.max([d.effects.q for d in found], axis=0),
    }
    for name in ("distance", "cosine", "share_of_layer", "share_of_model"):
        maps[name] = np.mean([d.maps[name] for d in found], axis=0)
    controls = [d.maps["control"] for d in found if "control" in d.maps]
    further, closer = (
        np.sum([(sign * d.effects.d_z > 0) & d.effects.significant for d in found], axis=0)
        for sign in (1, -1)
    )
    shares = [d.maps["share_of_model"] for d in found]
    top = [divmod(place, maps["effect"].shape[1]) for place in largest(maps["share_of_model"], _TOP)]
    agreement = None
    if len(found) > 1:
        agreement = {
            "spearman_of_effect": rounded(rank_agreement([d.effects.d_z for d in found])),
            "spearman_of_share": rounded(rank_agreement(shares)),
            **stability(shares, _TOP),
        }
    return {
        "test": found[0].test,
        "n": [d.n for d in found],
        "heads_further": int(np.sum(further == len(found))),
        "heads_closer": int(np.sum(closer == len(found))),
        **{name: rounded(values) for name, values in maps.items()},
        "control": rounded(np.mean(controls, axis=0)) if len(controls) == len(found) else None,
        "further": further.tolist(),
        "closer": closer.tolist(),
        "top": [
            {"layer": layers[i], "head": j, **{name: rounded(values[i, j]) for name, values in maps.items()}}
            for i, j in top
        ],
        "stability": agreement,
    }


def attention_mass(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Ids],
    answers: Sequence[Ids],
    query_lengths: Sequence[int],
    *,
    pattern: str | None = None,
    description: str = "attention",
) -> np.ndarray:
    """How much attention goes where, at answer positions, by head.

    The model runs with eager attention, whatever it is set to. Weights are reduced batch by batch; where
    those of all layers do not fit into a gibibyte, layers are read in several passes.

    ``prompt + answer[:-1]`` is fed. The last ``query_lengths`` ids of each prompt are the query; the rest,
    but for the first token, counts as demonstrations (instructions too, where there are some).

    Returns:
        ``[n, L, H, 3]`` float64, mean over an example's answer positions: the parts of :data:`REGIONS`, which
        sum to 1. What goes to tokens that are not the row's own (virtual tokens of prompt tuning, learnt
        sinks) is left out, and the rest made to sum to 1.
    """
    from ia2.models.batching import token_budget
    from ia2.models.capture import ActivationCapture, eager_attention
    from ia2.models.forward import answer_pass

    pairs = list(zip(prompts, answers, strict=True))
    spans = [len(fed_ids(*pair)) for pair in pairs]
    layers = ActivationCapture(model, pattern, site="weights").layers
    together, rows = _fitting(model, pairs, len(layers))
    budget = min(token_budget(model), rows * max(spans))
    settings: Any = {"spans": spans, "logits": False, "description": description, "batch_tokens": budget}
    parts = []
    for start in range(0, len(layers), together):
        some = layers[start : start + together]
        masses: list[Any] = [None] * len(pairs)
        with eager_attention(model), ActivationCapture(model, pattern, some, "weights") as capture:
            for output in answer_pass(model, tokenizer, pairs, capture=capture, **settings):
                i = output.index
                masses[i] = _regions(output.activations, len(prompts[i]) - query_lengths[i])
        parts.append(np.stack(masses))
    return np.concatenate(parts, axis=1)


def _regions(weights: Any, query_start: int) -> np.ndarray:
    """Weights ``[L, G, H, S]`` over a whole row → ``[L, H, 3]``."""
    mean = weights.double().mean(1)
    ends = mean[..., :1], mean[..., 1 : max(1, query_start)], mean[..., max(1, query_start) :]
    return np.stack([part.sum(-1).numpy() for part in ends], axis=-1)


def _fitting(model: Any, pairs: Sequence[tuple[Ids, Ids]], layers: int) -> tuple[int, int]:
    """How many layers' weights are read in one pass, and of how many rows at once (the longest)."""
    from ia2.models.families import takes_cache
    from ia2.models.forward import MIN_SHARED_PREFIX

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


def _measure(look: Look) -> tuple[dict[str, Difference], dict[str, np.ndarray]]:
    """What was accumulated, and what attention goes to where there are demonstrations."""
    runner = look.runner
    members = range(min(ATTENTION_QUERIES, len(look.answers)))
    shown = [ICL, *(c for c in look.conditions if c.context == "own" and c.checkpoint is not None)]
    masses = {}
    for condition in shown:
        with runner.showing(condition.checkpoint) as model:
            masses[condition.name] = attention_mass(
                model,
                runner.base.tokenizer,
                runner.prompts("own", members),
                [look.answers[i] for i in members],
                runner.query_lengths(members),
                pattern=runner.pattern,
                description=f"{runner.set}: attention of {condition.name}",
            )
    return look.results["heads"], masses


SECTION = AnalysisSection(
    "which attention heads differ from ICL, and what they attend to",
    lambda results, analysis: summarise(results, analysis.layers, analysis.num_heads),
    lambda look: HeadAccumulator(look.analysis.num_heads),
    _measure,
)
