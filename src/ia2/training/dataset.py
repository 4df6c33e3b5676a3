"""What a training step is made of: rows, laid-out batches, and the order of an epoch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ia2.models.capture import ActivationCapture
from ia2.models.packing import inputs, pack_rows
from ia2.models.tokens import Batch, Ids, fed_ids, pad_rows
from ia2.teacher.targets import JoinedTargets, Targets, pack_targets

# Padded tokens that cost as much as one more small forward pass.
_WORTH_A_PASS = 32


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
        beside: rows of another loss, of which each row is given one (the key's fourth part).
    """

    make: Callable[[int, int], Row]
    indices: Sequence[int]
    targets: Targets | None = None
    soft: Targets | None = None
    beside: AnswerDataset | None = None

    @classmethod
    def of(cls, rows: Sequence[Row], targets: Targets | None = None) -> AnswerDataset:
        """Rows that are there already."""
        return cls(lambda i, _: rows[i], range(len(rows)), targets)

    @classmethod
    def joined(cls, parts: Sequence[AnswerDataset]) -> AnswerDataset:
        """The rows of all parts, which learn from the same kind of targets, or none of them from any."""
        if len(parts) == 1:
            return parts[0]
        places = [(part, place) for part in parts for place in range(len(part))]

        def make(i: int, permutation: int) -> Row:
            part, place = places[i]
            return part.row(place, permutation)

        def together(known: Sequence[Targets | None]) -> Targets | None:
            there = [targets for targets in known if targets is not None]
            return JoinedTargets(there, [part.indices for part in parts]) if there else None

        return cls(
            make,
            range(len(places)),
            together([part.targets for part in parts]),
            together([part.soft for part in parts]),
        )

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
    """Lays rows out for the model; the result holds only tensors, plain lists and dicts of them.

    ``parts`` are forward passes over the answers behind their queries: one pack of all rows, or batches of
    padded rows of near lengths. ``response`` are the same with the teacher's answers, and left out where they
    would be fed the same ids; ``context`` are the teacher's answers in their contexts, where targets are
    computed online; ``beside`` are rows of another loss, with their answers.
    Rows are in the same order everywhere; where they are padded, the longest is first.

    Attributes:
        padding: id to fill rows with.
        packed: whether rows are packed (see :mod:`ia2.models.packing`).
        alike: as many forward passes for any rows, which processes that share a model in shards need.
    """

    padding: int
    packed: bool = False
    alike: bool = False

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if not self.packed:
            items = sorted(items, key=lambda item: -len(fed_ids(item["row"].query, item["row"].answer)))
        rows: list[Row] = [item["row"] for item in items]
        responses = [row.answer if row.response is None else row.response for row in rows]
        queries = [row.query for row in rows]
        batch: dict[str, Any] = {"parts": self._parts(queries, [row.answer for row in rows])}
        batch["answers"] = torch.tensor([token for row in rows for token in row.answer])
        batch["weights"] = torch.tensor([item["weight"] for item in items], dtype=torch.float32)
        batch["spans"] = [row.span for row in rows]
        differ = any(a[:-1] != row.answer[:-1] for a, row in zip(responses, rows, strict=True))
        if differ or (self.alike and rows[0].response is not None):
            batch["response"] = self._parts(queries, responses)
        if "beside" in items[0]:
            others: list[Row] = [item["beside"] for item in items]
            batch["beside"] = {
                "parts": self._parts([row.query for row in others], [row.answer for row in others]),
                "answers": torch.tensor([token for row in others for token in row.answer]),
            }
        if rows[0].context:
            batch["context"] = self._parts([row.context for row in rows], responses)
        for name, key in (("targets", "target"), ("soft", "soft")):
            if items[0][key] is not None:
                batch[name] = pack_targets([item[key] for item in items])
        return batch

    def _parts(self, prompts: Sequence[Ids], answers: Sequence[Ids]) -> list[dict[str, Any]]:
        rows = [fed_ids(p, a) for p, a in zip(prompts, answers, strict=True)]
        lengths = [len(answer) for answer in answers]
        if self.packed:
            return [vars(pack_rows(rows, lengths))]
        bounds = [(0, len(rows))] if self.alike else near_lengths([len(row) for row in rows])
        return [vars(pad_rows(rows[a:b], lengths[a:b], self.padding)) for a, b in bounds]


def near_lengths(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Cut rows into runs that are padded together.

    A row that is much shorter than the first of its run begins a run of its own, if what that saves is more
    than a small pass costs.

    Args:
        lengths: of the rows, in order.

    Returns:
        First and exclusive last row of each run.

    Example:
        >>> near_lengths([400, 390, 90, 80])
        [(0, 2), (2, 4)]
    """
    cuts = [0]
    for i in range(1, len(lengths)):
        widest = max(lengths[cuts[-1] : i])
        padding = sum(abs(widest - n) for n in lengths[i:])
        if lengths[i] < 0.75 * widest and padding > _WORTH_A_PASS:
            cuts.append(i)
    return list(zip(cuts, [*cuts[1:], len(lengths)], strict=True))


def parts_of(batch: dict[str, Any], name: str | None = None) -> list[Batch]:
    """The forward passes of a collated batch, or of its part ``response`` or ``context``.

    A batch without ``response`` feeds the model the same ids for both answers.
    """
    own = batch["parts"] if name is None or (name == "response" and name not in batch) else batch[name]
    return [Batch(**part) for part in own]


def run_parts(
    model: Any,
    parts: Sequence[Batch],
    *,
    logits: bool,
    capture: ActivationCapture | None = None,
    spans: Sequence[int] | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Run the passes of a batch; the head runs at answer positions only, or, without ``logits``, at one.

    Args:
        model: causal model, bare or wrapped, inside :func:`ia2.models.packing.row_attention`.
        parts: see :func:`parts_of`.
        logits: whether logits are wanted.
        capture: reads activations; its hooks are in place here only.
        spans: of each row, where attention weights are captured.

    Returns:
        Logits ``[ΣG, V]`` and activations ``[L, ΣG, …]`` at the answer positions of all rows, or None.
    """
    scores, activations, start = [], [], 0
    with capture or nullcontext():
        for part in parts:
            if capture is not None:
                capture.arm()
            keep = part.keep(part.input_ids.device) if logits else 1
            output = model(**inputs(model, part), logits_to_keep=keep, use_cache=False)
            if logits:
                rows, positions = part.index(output.logits.shape[1])
                packed = part.kept is not None
                scores.append(output.logits[0] if packed else output.logits[rows, positions])
            if capture is not None:
                end = start + len(part.row_lengths)
                own = spans[start:end] if spans is not None else None
                activations.append(capture.at_answers(part, own))
                start = end
    if len(parts) == 1:
        return next(iter(scores), None), next(iter(activations), None)
    return torch.cat(scores) if scores else None, pack_targets(activations) if activations else None


def lengths_of(parts: Sequence[Batch]) -> list[int]:
    """G of each row, over all forward passes."""
    return [g for part in parts for g in part.answer_lengths]


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
        beside: rows of another loss; each example is given one, in turn of a shuffled order.
    """

    def __init__(
        self,
        count: int,
        per_step: int,
        slots: int,
        permutations: int,
        seed: int,
        epoch: Callable[[], int],
        beside: int = 0,
    ) -> None:
        self.count, self.per_step, self.slots, self.beside = count, per_step, slots, beside
        self.permutations, self.seed, self.epoch = permutations, seed, epoch

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
