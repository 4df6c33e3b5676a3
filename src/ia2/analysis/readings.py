"""What a lens reads of one example: log-probabilities of labels, of the answer, of the first tokens.

The logits of a whole vocabulary at every layer of a long answer would fill the memory (30 layers × 200 tokens
× 49,152 × 4 bytes are 1.2 GB), so they are made in blocks, and of each block only what is needed is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ia2.tokens import Ids, common_prefix

if TYPE_CHECKING:
    import torch

    from ia2.analysis.unembedding import Lens

# Tokens of the vocabulary that distributions of free text are compared over; the rest is one more outcome.
TOP_TOKENS = 32

# Elements of the float32 logits that are held at once: 64 MB.
_BLOCK = 2**24


@dataclass(frozen=True)
class LabelTokens:
    """One token a label: the first in which the labels differ.

    Labels of several tokens are told apart at the position where not all of them say the same; those that
    share the token there count as one label.

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
        """From the ids of each label; None where there are none, or no one token tells any of them apart."""
        if not label_ids:
            return None
        place = min(common_prefix(label_ids), min(map(len, label_ids)) - 1)
        tokens = [ids[place] for ids in label_ids]
        distinct = tuple(dict.fromkeys(tokens))
        if len(distinct) < 2:
            return None
        return cls(tuple(label_ids[0][:place]), distinct, tuple(distinct.index(t) for t in tokens))


@dataclass
class Reading:
    """Log-probabilities at the positions of one example that are read, in nats, on the CPU.

    Attributes:
        labels: over the label set at the one position, ``[L, C]``; None for free text.
        answer: of the teacher's answer over the vocabulary, mean over positions, ``[L]``; None without it.
        top1: share of positions whose first token is the teacher's, ``[L]``; None without the vocabulary.
        same: over the reference's first tokens at each layer and all others together, ``[L, G, K + 1]``.
        last: over those of its last layer, ``[L, G, K + 1]``.
        tokens: the reference's first tokens at each layer, ``[L, G, K]``.
    """

    labels: torch.Tensor | None = None
    answer: torch.Tensor | None = None
    top1: torch.Tensor | None = None
    same: torch.Tensor | None = None
    last: torch.Tensor | None = None
    tokens: torch.Tensor | None = None


def read_labels(lens: Lens, stream: torch.Tensor) -> Reading:
    """Read one position, ``[L, 1, d]``, with a lens for the label tokens alone: gives ``labels`` only."""
    return Reading(lens.logits(stream[:, 0]).double().log_softmax(-1).cpu())


def greedy(lens: Lens, stream: torch.Tensor) -> Ids:
    """The first token of the vocabulary at each position, read from the last layer of ``[L, G, d]``."""
    return tuple(i for block in _blocks(lens, stream[-1]) for i in block.argmax(-1).tolist())


def read_vocabulary(
    lens: Lens,
    stream: torch.Tensor,
    answer: Ids,
    labels: Ids = (),
    reference: Reading | None = None,
    compare: bool = True,
) -> Reading:
    """Read residual streams over the whole vocabulary.

    Args:
        lens: for the vocabulary.
        stream: ``[L, G, d]``.
        answer: the teacher's token at each position.
        labels: the label tokens, for a single position; without them no ``labels``.
        reference: ICL's reading, over whose first tokens distributions are taken; None for ICL itself.
        compare: whether ``same``, ``last`` and ``tokens`` are wanted.
    """
    import torch

    layers, positions = stream.shape[:2]
    rows = stream.flatten(0, 1)
    columns = [torch.tensor(answer).repeat(layers)[:, None], torch.tensor(labels).long().repeat(len(rows), 1)]
    last = tokens = None
    if compare:
        tokens = None if reference is None else reference.tokens
        last = _first_tokens(lens, stream[-1]) if tokens is None else tokens[-1]
        columns.append(last.repeat(layers, 1))
        if tokens is not None:
            columns.append(tokens.flatten(0, 1))
    index = torch.cat(columns, dim=1)
    found, tops, firsts, start = [], [], [], 0
    for logits in _blocks(lens, rows):
        here = index[start : start + len(logits)].to(logits.device)
        if compare and tokens is None:
            firsts.append(logits.topk(_count(lens), dim=-1).indices)
            here = torch.cat([here, firsts[-1]], dim=1)
        found.append((logits.gather(1, here) - logits.logsumexp(-1, keepdim=True)).cpu())
        tops.append((logits.argmax(-1) == here[:, 0]).cpu())
        start += len(logits)
    log_p = torch.cat(found).double().unflatten(0, (layers, positions))
    top1 = torch.cat(tops).double().unflatten(0, (layers, positions)).mean(-1)
    reading = Reading(answer=log_p[..., 0].mean(-1), top1=top1)
    if labels:
        reading.labels = log_p[:, 0, 1 : 1 + len(labels)].log_softmax(-1)
    if compare:
        half = log_p[..., 1 + len(labels) :].unflatten(-1, (2, -1))
        reading.last, reading.same = _with_rest(half[..., 0, :]), _with_rest(half[..., 1, :])
        reading.tokens = tokens
        if tokens is None:
            reading.tokens = torch.cat(firsts).cpu().unflatten(0, (layers, positions))
    return reading


def _count(lens: Lens) -> int:
    return min(TOP_TOKENS, lens.vocabulary)


def _first_tokens(lens: Lens, states: torch.Tensor) -> torch.Tensor:
    """The most probable tokens of each of ``[N, d]``, ``[N, K]``."""
    import torch

    return torch.cat([block.topk(_count(lens), dim=-1).indices.cpu() for block in _blocks(lens, states)])


def _blocks(lens: Lens, rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Logits ``[rows, V]`` of ``[N, d]``, so many at once as are to be held."""
    for block in rows.split(max(1, _BLOCK // lens.vocabulary)):
        yield lens.logits(block)


def _with_rest(log_p: torch.Tensor) -> torch.Tensor:
    """``[..., K]`` and behind it the log-probability of everything else; float32, for it is kept."""
    import torch

    rest = (-log_p.exp().sum(-1, keepdim=True)).clamp(-1.0, 0.0).log1p()
    return torch.cat([log_p, rest], dim=-1).float()


def divergence(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence (Lin 1991) in bits, 0 to 1.

    Args:
        a: log-probabilities in nats, ``[..., C]``.
        b: the same of the other distribution; shapes broadcast.

    Returns:
        ``[...]``, float64.
    """
    import torch

    a, b = torch.broadcast_tensors(a.double(), b.double())
    # equal ones are their own middle: rounding would leave what is the same a little apart, on some CPUs
    middle = torch.where(a == b, a, torch.logaddexp(a, b) - np.log(2))
    # an outcome without probability adds nothing; its logarithm would make it NaN
    halves = [torch.where(x > -torch.inf, x.exp() * (x - middle), 0.0).sum(-1) for x in (a, b)]
    return ((halves[0] + halves[1]) / (2 * np.log(2))).clamp(0.0, 1.0)
