"""What a training step is made of: rows, right-padded batches, and the order of an epoch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ia2.targets import Targets, pack_targets
from ia2.tokens import Batch, Ids, fed_ids, pad_rows


@dataclass(frozen=True)
class Row:
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
    """Rows by ``(index, permutation, weight)`` or by plain index; weight 0 marks a filler row.

    Rows are made when they are asked for, so that memory does not grow with their number.

    Attributes:
        make: row of an example's index and permutation.
        indices: the examples that are trained on.
        targets: activations to align with, by the example's index.
        soft: token distributions to distil, by the example's index.
    """

    make: Callable[[int, int], Row]
    indices: Sequence[int]
    targets: Targets | None = None
    soft: Targets | None = None

    @classmethod
    def of(cls, rows: Sequence[Row], targets: Targets | None = None) -> AnswerDataset:
        """Rows that are there already."""
        return cls(lambda i, _: rows[i], range(len(rows)), targets)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def permutations(self) -> int:
        """How many targets each example has."""
        known = self.targets or self.soft
        return known.permutations if known is not None else 1

    def row(self, place: int, permutation: int = 0) -> Row:
        """The row at this place."""
        return self.make(self.indices[place], permutation)

    def __getitem__(self, key: int | tuple[int, int, float]) -> dict[str, Any]:
        place, permutation, weight = (key, 0, 1.0) if isinstance(key, int) else key
        index = self.indices[place]
        return {
            "row": self.make(index, permutation),
            "weight": weight,
            "target": self.targets.get(index, permutation) if self.targets is not None else None,
            "soft": self.soft.get(index, permutation) if self.soft is not None else None,
        }


@dataclass
class Collator:
    """Right-pads rows; the result holds only tensors, plain lists and dicts of them.

    ``input_ids`` and what belongs to it is the answer behind its query. ``response`` is the same with
    the teacher's answer, and left out where it would be fed the same ids; ``context`` is the teacher's
    answer in its context, where targets are computed online.
    """

    padding: int

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        rows: list[Row] = [item["row"] for item in items]
        responses = [row.answer if row.response is None else row.response for row in rows]
        batch = self._part([row.query for row in rows], [row.answer for row in rows])
        batch["answers"] = torch.tensor([token for row in rows for token in row.answer])
        batch["weights"] = torch.tensor([item["weight"] for item in items], dtype=torch.float32)
        batch["spans"] = [row.span for row in rows]
        if any(a[:-1] != row.answer[:-1] for a, row in zip(responses, rows, strict=True)):
            batch["response"] = self._part([row.query for row in rows], responses)
        if rows[0].context:
            batch["context"] = self._part([row.context for row in rows], responses)
        for name, key in (("targets", "target"), ("soft", "soft")):
            if items[0][key] is not None:
                batch[name] = pack_targets([item[key] for item in items])
        return batch

    def _part(self, prompts: Sequence[Ids], answers: Sequence[Ids]) -> dict[str, Any]:
        lengths = [len(answer) for answer in answers]
        padded = pad_rows(
            [fed_ids(p, a) for p, a in zip(prompts, answers, strict=True)], lengths, self.padding
        )
        return {
            "input_ids": padded.input_ids,
            "attention_mask": padded.attention_mask,
            "row_lengths": padded.row_lengths,
            "answer_lengths": lengths,
        }


def part_of(batch: dict[str, Any], name: str | None = None) -> Batch:
    """The rows of a collated batch, or of its part ``response`` or ``context``.

    A batch without ``response`` feeds the model the same ids for both answers.
    """
    part = batch if name is None or (name == "response" and name not in batch) else batch[name]
    return Batch(part["input_ids"], part["attention_mask"], part["answer_lengths"], part["row_lengths"])


class EpochSampler(torch.utils.data.Sampler):  # type: ignore[type-arg]
    """A shuffled order of each epoch that depends on seed and epoch alone.

    Every optimiser step is filled up to the same number of rows with fillers of weight 0, so that
    micro-batches and processes divide it evenly and nothing is counted twice.

    Args:
        count: number of examples.
        per_step: examples of one optimiser step.
        slots: rows of one optimiser step, at least ``per_step``.
        permutations: targets an example has; one is drawn an epoch.
        seed: of the order.
        epoch: tells the current epoch.
    """

    def __init__(
        self,
        count: int,
        per_step: int,
        slots: int,
        permutations: int,
        seed: int,
        epoch: Callable[[], int],
    ) -> None:
        self.count, self.per_step, self.slots = count, per_step, slots
        self.permutations, self.seed, self.epoch = permutations, seed, epoch

    @property
    def steps(self) -> int:
        """Optimiser steps of an epoch."""
        return -(-self.count // self.per_step)

    def __len__(self) -> int:
        return self.steps * self.slots

    def __iter__(self) -> Iterator[tuple[int, int, float]]:
        draw = random.Random(f"epoch {self.seed} {self.epoch()}")
        order = draw.sample(range(self.count), self.count)
        for start in range(0, self.count, self.per_step):
            step = order[start : start + self.per_step]
            keys = [(i, draw.randrange(self.permutations), 1.0) for i in step]
            keys += [(step[0], 0, 0.0)] * (self.slots - len(step))
            yield from keys
