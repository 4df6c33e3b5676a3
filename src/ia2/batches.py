"""What a training step is made of: rows, right-padded batches, and the order of an epoch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ia2.tokens import Ids, fed_ids, pad_rows

if TYPE_CHECKING:
    from ia2.targets import Targets


@dataclass(frozen=True)
class Row:
    """One answer in two contexts.

    Attributes:
        query: ids without context, ``X``.
        answer: answer ids, ``Y`` or ``Ŷ``.
        contexts: ids with context, ``I ∘ X``, one for each permutation; empty where no context is
            needed (targets are stored, or the stage is supervised).
    """

    query: Ids
    answer: Ids
    contexts: tuple[Ids, ...] = ()


@dataclass
class AnswerDataset(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Rows by ``(index, permutation, weight)`` or by plain index; weight 0 marks a filler row."""

    rows: list[Row]
    targets: Targets | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def permutations(self) -> int:
        """How many targets each example has."""
        return self.targets.permutations if self.targets is not None else 1

    def __getitem__(self, key: int | tuple[int, int, float]) -> dict[str, Any]:
        index, permutation, weight = (key, 0, 1.0) if isinstance(key, int) else key
        row = self.rows[index]
        return {
            "row": row,
            "permutation": permutation,
            "weight": weight,
            "target": self.targets.get(index, permutation) if self.targets is not None else None,
        }


@dataclass
class Collator:
    """Right-pads rows; the result holds only tensors and plain lists."""

    padding: int

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        rows: list[Row] = [item["row"] for item in items]
        lengths = [len(row.answer) for row in rows]
        fed = [fed_ids(row.query, row.answer) for row in rows]
        padded = pad_rows(fed, lengths, self.padding)
        batch: dict[str, Any] = {
            "input_ids": padded.input_ids,
            "attention_mask": padded.attention_mask,
            "row_lengths": padded.row_lengths,
            "answer_lengths": lengths,
            "answers": torch.tensor([token for row in rows for token in row.answer]),
            "weights": torch.tensor([item["weight"] for item in items], dtype=torch.float32),
        }
        if items[0]["target"] is not None:
            batch["targets"] = torch.cat([item["target"] for item in items], dim=1)
        elif rows[0].contexts:
            contexts = [row.contexts[item["permutation"]] for row, item in zip(rows, items, strict=True)]
            rows_in_context = [fed_ids(c, row.answer) for c, row in zip(contexts, rows, strict=True)]
            context = pad_rows(rows_in_context, lengths, self.padding)
            batch["context_ids"] = context.input_ids
            batch["context_mask"] = context.attention_mask
            batch["context_lengths"] = context.row_lengths
        return batch


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
        keys: list[tuple[int, int, float]] = []
        for start in range(0, self.count, self.per_step):
            step = order[start : start + self.per_step]
            keys += [(i, draw.randrange(self.permutations), 1.0) for i in step]
            keys += [(step[0], 0, 0.0)] * (self.slots - len(step))
        return iter(keys)
