"""Logit lens: what a model would answer if its residual stream went to the output after each layer.

The lens (nostalgebraist 2020) puts the residual stream behind the model's own last norm and unembedding. How
early the teacher's answer can be read tells whether conditions reach it along the same path. Early layers
have another basis than the last one, and the lens then leans to certain tokens (Belrose et al. 2023): compare
conditions at one layer rather than layers of one condition, and with ``chance``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ia2.analysis.conditions import BASE, ICL, Activations, by_condition
from ia2.analysis.section import AnalysisSection, Look
from ia2.analysis.unembedding import Lens
from ia2.models.tokens import Ids, common_prefix
from ia2.utils.errors import ModelError
from ia2.utils.logging import logger
from ia2.utils.statistics import mean_interval

if TYPE_CHECKING:
    import torch
    from torch import nn

# Answer positions of free text that are read. At each the logits of all layers cost L·V·d, on the demo model
# eight times what the forward pass costs there: to read a whole answer would cost more than to make it.
_POSITIONS = 4

# Tokens of the vocabulary that distributions of free text are compared over; the rest is one more outcome.
TOP_TOKENS = 32

# Layers in a row at which the task must show before it is said to: with intervals of 95%, one in forty layers
# would show it by chance.
_IN_A_ROW = 3


class LabelTokens(NamedTuple):
    """One token a label: the first in which the labels differ; those that share it count as one label.

    Attributes:
        prefix: ids that all labels begin with; mostly none.
        ids: distinct tokens behind it, ``[C]``.
        of_label: index into ``ids`` of each label.
    """

    prefix: Ids
    ids: Ids
    of_label: tuple[int, ...]

    @classmethod
    def of(cls, label_ids: Sequence[Ids]) -> LabelTokens | None:
        """From the ids of each label; None where there are none, or no one token tells any of them apart.

        >>> LabelTokens.of([(4, 1), (4, 2, 3), (4, 2, 5)])
        LabelTokens(prefix=(4,), ids=(1, 2), of_label=(0, 1, 1))
        """
        if not label_ids:
            return None
        place = min(common_prefix(label_ids), min(map(len, label_ids)) - 1)
        tokens = [ids[place] for ids in label_ids]
        distinct = tuple(dict.fromkeys(tokens))
        if len(distinct) < 2:
            return None
        return cls(tuple(label_ids[0][:place]), distinct, tuple(distinct.index(t) for t in tokens))


class LensResult(NamedTuple):
    """What the lens has read in one training set.

    Attributes:
        conditions: condition → measure (see :class:`LensAccumulator`) → ``[n, L]``.
        chance: what a lens that says the same for every example can reach, by measure.
        over: ``labels`` or ``vocabulary``: what log-probabilities are normalised over.
    """

    conditions: dict[str, dict[str, np.ndarray]]
    chance: dict[str, float]
    over: str


class LensAccumulator:
    """Reads the residual streams of conditions, one example at a time.

    With labels, the position of the token in which they differ is read (:class:`LabelTokens`); of free text
    four, spread evenly over the answer, and an example's value is their mean. Measures, each a number a
    condition, layer and example:

    - ``agreement``: the first label is the teacher's (free text: the first token of the vocabulary is);
    - ``gold``: the first label is the right one;
    - ``log_probability``: of the teacher's answer, in nats, over the label set, or the vocabulary;
    - ``divergence``: Jensen-Shannon divergence (Lin 1991) from ICL at the same layer, in bits, 0 to 1, over
      the label set; for free text over ICL's first 32 tokens and one outcome for all others;
    - ``divergence_from_answer``: the same from ICL's last layer, which is its output (but for a hybrid model
      whose last layer has no attention).

    The teacher's label is its answer; where that is none of the labels, the one that its last layer puts
    first. Examples whose answer does not begin as all labels do are left out. All conditions go through one
    lens, the base model's: a norm or unembedding that was trained too (``full``) is not looked at.

    ``answers`` are the ids of the teacher's answer by example, and may grow until an example is added;
    ``gold`` is each example's label, by index. The adapter of the model is off.

    Raises:
        ModelError: the model's read-out cannot be followed (see :meth:`Lens.of`).
    """

    sites: tuple[str, ...] = ("residual",)

    def __init__(
        self,
        model: nn.Module,
        answers: Sequence[Ids],
        label_ids: Sequence[Ids] = (),
        gold: Sequence[int] | None = None,
        pattern: str | None = None,
    ) -> None:
        self.labels = LabelTokens.of(label_ids)
        self.lens = Lens.of(model, None if self.labels is None else self.labels.ids, pattern)
        self.answers, self.gold = answers, gold
        self._rows: dict[str, dict[int, dict[str, np.ndarray]]] = {}
        self._teacher: dict[int, int] = {}
        self._references: dict[int, dict[str, Any] | None] = {}
        self._last = ICL.name

    def add(
        self, condition: str, index: int, found: Activations, icl: Activations, other: Activations | None
    ) -> None:
        """One example of one condition; ICL's comes first."""
        if condition == ICL.name:
            if self._last != ICL.name:
                self._references.clear()  # of the block before, whose conditions have all been seen
            self._references[index] = self._refer(index, found["residual"])
        self._last = condition
        reference = self._references[index]
        if reference is None:
            return
        stream = found["residual"][:, reference["positions"]]
        if self.labels is None:
            measures = _free_text(self.lens, stream, reference)
        else:
            measures = self._of_labels(index, self._label_log_p(stream), reference["log_p"])
        # arrays of numpy's own: small tensors are ten times as large
        self._rows.setdefault(condition, {})[index] = {n: v.double().numpy() for n, v in measures.items()}

    def _refer(self, index: int, stream: torch.Tensor) -> dict[str, Any] | None:
        """What others are compared with; None where the answer does not begin as the labels do."""
        answer = self.answers[index]
        if self.labels is None:
            spread = np.linspace(0, len(answer) - 1, _POSITIONS).round().astype(int)
            positions = sorted(set(spread.tolist()))
            return _free_text_reference(self.lens, stream[:, positions], positions, answer)
        prefix, ids = self.labels.prefix, self.labels.ids
        if len(answer) <= len(prefix) or tuple(answer[: len(prefix)]) != prefix:
            return None
        said, positions = answer[len(prefix)], [len(prefix)]
        log_p = self._label_log_p(stream[:, positions])
        self._teacher[index] = ids.index(said) if said in ids else int(log_p[-1].argmax())
        return {"positions": positions, "log_p": log_p}

    def _label_log_p(self, stream: torch.Tensor) -> torch.Tensor:
        """``[L, 1, d]`` → ``[L, C]``."""
        return self.lens.logits(stream[:, 0]).double().log_softmax(-1).cpu()

    def _of_labels(self, index: int, log_p: torch.Tensor, icl: torch.Tensor) -> dict[str, torch.Tensor]:
        assert self.labels is not None
        first, teacher = log_p.argmax(-1), self._teacher[index]
        gold = {} if self.gold is None else {"gold": first == self.labels.of_label[self.gold[index]]}
        return {
            "agreement": first == teacher,
            **gold,
            "log_probability": log_p[:, teacher],
            "divergence": divergence(log_p, icl),
            "divergence_from_answer": divergence(log_p, icl[-1:]),
        }

    def finish(self) -> LensResult:
        """All examples of all conditions have been added.

        Raises:
            ModelError: no example could be read.
        """
        known = sorted(self._rows.get(ICL.name, {}))
        if not known:
            raise ModelError(
                "logit lens: no answer of the model with demonstrations begins as the labels do."
            )
        conditions = {
            condition: {name: np.stack([rows[i][name] for i in known]) for name in rows[known[0]]}
            for condition, rows in self._rows.items()
        }
        labels = {} if self.labels is None else {"agreement": [self._teacher[i] for i in known]}
        if self.labels is not None and self.gold is not None:
            labels["gold"] = [self.labels.of_label[self.gold[i]] for i in known]
        chance = {name: float(np.bincount(of).max() / len(of)) for name, of in labels.items()}
        return LensResult(conditions, chance, "vocabulary" if self.labels is None else "labels")


def _free_text_reference(
    lens: Lens, stream: torch.Tensor, positions: list[int], answer: Ids
) -> dict[str, Any]:
    """ICL's first tokens at each layer, and its distributions over them."""
    import torch

    count = min(TOP_TOKENS, lens.vocabulary)
    firsts = [logits.topk(count).indices.cpu() for _, logits in lens.blocks(stream.flatten(0, 1))]
    tokens = torch.cat(firsts).unflatten(0, stream.shape[:2])
    said = torch.tensor([answer[place] for place in positions])
    reference = {"positions": positions, "tokens": tokens, "said": said}
    _, _, same, last = _read(lens, stream, reference)
    return {**reference, "same": same, "last": last[-1:]}


def _free_text(lens: Lens, stream: torch.Tensor, reference: dict[str, Any]) -> dict[str, torch.Tensor]:
    answer, top1, same, last = _read(lens, stream, reference)
    return {
        "agreement": top1.mean(-1),
        "log_probability": answer.mean(-1),
        "divergence": divergence(same, reference["same"]).mean(-1),
        "divergence_from_answer": divergence(last, reference["last"]).mean(-1),
    }


def _read(lens: Lens, stream: torch.Tensor, reference: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Streams ``[L, G, d]`` read over the whole vocabulary.

    Returns:
        Log-probability of the teacher's token ``[L, G]``; whether it is the first; log-probabilities of the
        reference's first tokens at each layer and of all others together ``[L, G, K + 1]``; the same of those
        of its last layer.
    """
    import torch

    tokens = reference["tokens"]
    said = reference["said"][None, :, None].expand(len(tokens), -1, -1)
    index = torch.cat([said, tokens, tokens[-1:].expand_as(tokens)], dim=-1).flatten(0, 1)
    log_p, first = [], []
    for part, logits in lens.blocks(stream.flatten(0, 1)):
        here = index[part].to(logits.device)
        log_p.append((logits.gather(1, here) - logits.logsumexp(-1, keepdim=True)).cpu())
        first.append((logits.argmax(-1) == here[:, 0]).cpu())
    found = torch.cat(log_p).double().unflatten(0, stream.shape[:2])
    top1 = torch.cat(first).double().unflatten(0, stream.shape[:2])
    same, last = found[..., 1:].unflatten(-1, (2, -1)).unbind(-2)
    return found[..., 0], top1, _with_rest(same), _with_rest(last)


def _with_rest(log_p: torch.Tensor) -> torch.Tensor:
    """``[..., K]`` and behind it the log-probability of everything else; float32, for it is kept."""
    import torch

    rest = (-log_p.exp().sum(-1, keepdim=True)).clamp(-1.0, 0.0).log1p()
    return torch.cat([log_p, rest], dim=-1).float()


def divergence(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence (Lin 1991) of log-probabilities ``[..., C]``: bits, 0 to 1, float64."""
    import torch

    a, b = torch.broadcast_tensors(a.double(), b.double())
    # equal ones are their own middle: rounding would leave what is the same a little apart, on some CPUs
    middle = torch.where(a == b, a, torch.logaddexp(a, b) - np.log(2))
    # an outcome without probability adds nothing; its logarithm would make it NaN
    halves = [torch.where(x > -torch.inf, x.exp() * (x - middle), 0.0).sum(-1) for x in (a, b)]
    return ((halves[0] + halves[1]) / (2 * np.log(2))).clamp(0.0, 1.0)


def summarise(results: Sequence[LensResult], layers: Sequence[int]) -> dict[str, Any]:
    """Means by layer, with 95% t-intervals over training sets (of one, over examples).

    ``shows_at`` of a condition is the first layer at which the task shows, there and at the next two layers
    (as far as there are any): where the interval of ``agreement`` lies above chance and, for conditions other
    than the base model's, that of the paired difference to the base model's above 0.
    """
    chance = {name: float(np.mean([each.chance[name] for each in results])) for name in results[0].chance}
    views = []
    for name, own in by_condition([each.conditions for each in results]).items():
        intervals = {measure: mean_interval([m[measure] for m in own]) for measure in own[0]}
        above = intervals["agreement"].low > chance.get("agreement", 0.0)
        beside = [each.conditions for each in results if name in each.conditions]
        if name != BASE.name and all(BASE.name in each for each in beside):
            gains = [each[name]["agreement"] - each[BASE.name]["agreement"] for each in beside]
            above = above & (mean_interval(gains).low > 0)
        runs = (int(place) for place in np.flatnonzero(above) if above[place : place + _IN_A_ROW].all())
        start = next(runs, None)
        view = {
            "name": name,
            "n": sum(len(m["agreement"]) for m in own),
            "shows_at": None if start is None else layers[start],
        }
        views.append(view | {f"{measure}_by_layer": i.to_dict() for measure, i in intervals.items()})
    return {"layers": list(layers), "over": results[0].over, "chance": chance, "views": views}


def _accumulator(look: Look) -> LensAccumulator | None:
    runner = look.runner
    labels, gold, pattern = runner.task.label_ids, runner.gold(), runner.pattern
    try:
        return LensAccumulator(runner.base.model, look.answers, labels, gold, pattern)
    except ModelError as error:
        logger.warning("%s The lens is left out.", error)
        return None


SECTION = AnalysisSection(
    "logit lens: where the task shows, by layer",
    lambda results, analysis: summarise(results, analysis.layers),
    _accumulator,
)
