"""What a training step is made of: rows, laid-out batches, and the order of an epoch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ia2.models.capture import ActivationCapture
from ia2.models.packing import inputs, pack_rows
from ia2.models.sharding import shards_model
from ia2.models.tokens import Batch, Ids, fed_ids, pad_rows
from ia2.teacher.targets import JoinedTargets, OnlineTargets, pack_targets

# Padded tokens that cost as much as one more small forward pass.
_WORTH_A_PASS = 32


@dataclass(frozen=True)
class AnswerRow:
    """One answer in two contexts.

    Attributes:
        query: ids without context, ``X``.
        answer: answer ids of the loss on answers, ``Y`` or ``Ŷ``.
        response: answer ids at which the teacher's targets were taken, ``Ŷ``; None where nothing is
            learnt from the teacher, or where it is the answer.
        context: ids with context, ``I ∘ X``, where targets are computed online.
        span: fed ids at the row's end that both contexts have in common (attention weights only).
    """

    query: Ids
    answer: Ids
    response: Ids | None = None
    context: Ids = ()
    span: int = 0


@dataclass
class AnswerDataset(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Rows by plain index or by ``(index, permutation, weight[, row beside it])``; weight 0 marks a filler.

    Rows are made when they are asked for, so that memory does not grow with their number.

    Attributes:
        make: row of an example's index and permutation.
        indices: the examples that are trained on.
        targets: activations to align with, by the example's index.
        soft: token distributions to distil, by the example's index.
        beside: rows of another loss, of which each row is given one.
    """

    make: Callable[[int, int], AnswerRow]
    indices: Sequence[int]
    targets: OnlineTargets | None = None
    soft: OnlineTargets | None = None
    beside: AnswerDataset | None = None

    @classmethod
    def of(cls, rows: Sequence[AnswerRow], targets: OnlineTargets | None = None) -> AnswerDataset:
        """Rows that are there already."""
        return cls(lambda i, _: rows[i], range(len(rows)), targets)

    @classmethod
    def joined(cls, parts: Sequence[AnswerDataset]) -> AnswerDataset:
        """The rows of all parts, which learn from the same kind of targets, or none of them from any."""
        if len(parts) == 1:
            return parts[0]
        places = [(part, place) for part in parts for place in range(len(part))]

        def make(i: int, permutation: int) -> AnswerRow:
            part, place = places[i]
            return part.row(place, permutation)

        def together(targets: Sequence[OnlineTargets | None]) -> OnlineTargets | None:
            present = [each for each in targets if each is not None]
            return JoinedTargets(present, [part.indices for part in parts]) if present else None

        targets = together([part.targets for part in parts])
        return cls(make, range(len(places)), targets, together([part.soft for part in parts]))

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def permutations(self) -> int:
        """How many targets each example has."""
        targets = self.targets or self.soft
        return targets.permutations if targets is not None else 1

    def row(self, place: int, permutation: int = 0) -> AnswerRow:
        """The row at this place."""
        return self.make(self.indices[place], permutation)

    @cached_property
    def longest_first(self) -> list[int]:
        """Places of all rows, by the length of their queries."""
        return sorted(range(len(self)), key=lambda place: -len(self.row(place).query))

    def __getitem__(self, key: int | tuple[int, int, float] | tuple[int, int, float, int]) -> dict[str, Any]:
        place, permutation, weight, *other = (key, 0, 1.0) if isinstance(key, int) else key
        index = self.indices[place]
        beside = {"beside": self.beside.row(other[0])} if self.beside is not None and other else {}
        return {
            **beside,
            "row": self.make(index, permutation),
            "weight": weight,
            "target": self.targets.get(index, permutation) if self.targets is not None else None,
            "soft": self.soft.get(index, permutation) if self.soft is not None else None,
        }


@dataclass
class Collator:
    """Lays rows out for the model, as tensors, plain lists and dicts of them.

    ``rows`` are the answers behind their queries: side by side in one pack, or padded. ``response`` are the
    same with the teacher's answers, and left out where they would be fed the same ids; ``context`` are the
    teacher's answers in their contexts, where targets are computed online; ``beside`` are rows of another
    loss, with their answers. Rows are in the same order everywhere.

    Attributes:
        padding: id to fill rows with.
        packed: whether rows are packed (see :mod:`ia2.models.packing`).
        alike: as many forward passes for any rows, which processes that share a model in shards need.
    """

    padding: int
    packed: bool = False
    alike: bool = False

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        rows: list[AnswerRow] = [item["row"] for item in items]
        responses = [row.answer if row.response is None else row.response for row in rows]
        batch = self._with_answers(rows)
        batch["weights"] = torch.tensor([item["weight"] for item in items], dtype=torch.float32)
        batch["spans"] = [row.span for row in rows]
        differ = any(a[:-1] != row.answer[:-1] for a, row in zip(responses, rows, strict=True))
        if differ or (self.alike and rows[0].response is not None):
            batch["response"] = self._laid_out([row.query for row in rows], responses)
        if "beside" in items[0]:
            batch["beside"] = self._with_answers([item["beside"] for item in items])
        if rows[0].context:
            batch["context"] = self._laid_out([row.context for row in rows], responses)
        for name, key in (("targets", "target"), ("soft", "soft")):
            if items[0][key] is not None:
                batch[name] = pack_targets([item[key] for item in items])
        return batch

    def _with_answers(self, rows: Sequence[AnswerRow]) -> dict[str, Any]:
        return {
            "rows": self._laid_out([row.query for row in rows], [row.answer for row in rows]),
            "answers": torch.tensor([token for row in rows for token in row.answer]),
        }

    def _laid_out(self, prompts: Sequence[Ids], answers: Sequence[Ids]) -> dict[str, Any]:
        rows = [fed_ids(p, a) for p, a in zip(prompts, answers, strict=True)]
        lengths = [len(answer) for answer in answers]
        return vars(pack_rows(rows, lengths) if self.packed else pad_rows(rows, lengths, self.padding))


def fed_rows(batch: dict[str, Any], name: str = "rows") -> Batch:
    """What the model is fed of a collated batch: ``rows``, ``response`` or ``context``.

    A batch without ``response`` feeds the model the same ids for both answers.
    """
    return Batch(**batch["rows" if name == "response" and name not in batch else name])


def run_rows(
    model: Any,
    rows: Batch,
    *,
    logits: bool,
    capture: ActivationCapture | None = None,
    spans: Sequence[int] | None = None,
) -> tuple[Any, Any]:
    """Logits ``[ΣG, V]`` and activations ``[L, ΣG, …]`` at the answer positions of all rows.

    None in place of what was not asked for. The head runs at answer positions only, or, without ``logits``,
    at one. To be called inside :func:`ia2.models.packing.row_attention`; ``spans`` are of each row, where
    ``capture`` reads attention weights.
    """
    members = [list(range(len(rows.row_lengths)))]
    if rows.kept is None and not shards_model():
        members = near_lengths(rows.row_lengths)
    scores, activations = [], []
    with capture or nullcontext():
        for own in members:
            part, seen = rows, spans
            if len(members) > 1:
                part, seen = rows.of(own), spans and [spans[i] for i in own]
            if capture is not None:
                capture.arm()
            keep = part.keep(part.input_ids.device) if logits else 1
            output = model(**inputs(model, part), logits_to_keep=keep, use_cache=False)
            if logits:
                # of a pack the head ran at the answer positions alone
                packed = part.kept is not None
                scores.append(output.logits[0 if packed else part.index(output.logits.shape[1])])
            if capture is not None:
                activations.append(capture.at_answers(part, seen))
    if len(members) == 1:  # no copy
        return next(iter(scores), None), next(iter(activations), None)
    order = _answer_order([i for own in members for i in own], rows.answer_lengths)
    return (
        torch.cat(scores)[order] if scores else None,
        pack_targets(activations)[:, order] if activations else None,
    )


def _answer_order(fed: Sequence[int], answer_lengths: Sequence[int]) -> list[int]:
    """Where the answer positions of each row are, in the rows' own order, among those in the order fed."""
    starts, end = {}, 0
    for row in fed:
        starts[row] = end
        end += answer_lengths[row]
    return [starts[row] + g for row, length in enumerate(answer_lengths) for g in range(length)]


def near_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Rows that are padded together, by their places.

    A row that is much shorter than the longest of a group begins another, if what that saves is more than a
    small pass costs.

    Example:
        >>> near_lengths([90, 400, 80, 390])
        [[1, 3], [0, 2]]
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    found = [[order[0]]]
    for n, i in enumerate(order[1:], 1):
        widest = lengths[found[-1][0]]
        padding = sum(widest - lengths[j] for j in order[n:])
        if lengths[i] < 0.75 * widest and padding > _WORTH_A_PASS:
            found.append([])
        found[-1].append(i)
    return found


@dataclass
class EpochSampler(torch.utils.data.Sampler):  # type: ignore[type-arg]
    """A shuffled order of each epoch that depends on seed and epoch alone.

    Every optimiser step of ``per_step`` examples is filled up to ``slots`` rows with fillers of weight 0, so
    that micro-batches and processes divide it evenly and nothing is counted twice. One of an example's
    ``permutations`` is drawn an epoch; of so many rows ``beside`` each example is given one, in turn.
    """

    count: int
    per_step: int
    slots: int
    permutations: int
    seed: int
    epoch: Callable[[], int]
    beside: int = 0

    @property
    def steps(self) -> int:
        """Optimiser steps of an epoch."""
        return -(-self.count // self.per_step)

    def __len__(self) -> int:
        return self.steps * self.slots

    def __iter__(self) -> Iterator[tuple[int, int, float] | tuple[int, int, float, int]]:
        others = self._others()
        draw = random.Random(f"epoch {self.seed} {self.epoch()}")
        order = draw.sample(range(self.count), self.count)
        for start in range(0, self.count, self.per_step):
            step = order[start : start + self.per_step]
            keys: list[Any] = [(i, draw.randrange(self.permutations), 1.0) for i in step]
            if self.beside:
                keys = [(*key, next(others)) for key in keys]
            # a filler takes none of the others, or the order would depend on how many there are
            keys += [(step[0], 0, 0.0, *keys[0][3:])] * (self.slots - len(step))
            yield from keys

    def _others(self) -> Iterator[int]:
        draw = random.Random(f"beside {self.seed} {self.epoch()}")
        while True:
            yield from draw.sample(range(self.beside), self.beside)
