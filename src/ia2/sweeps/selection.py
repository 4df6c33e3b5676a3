"""Which learning rate and β stand for a recipe; chosen by dev loss, or by test accuracy as in the paper."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from ia2.sweeps.records import Record

Select = Literal["dev", "dev-per-seed", "test"]

# How a choice is named in captions.
BY: dict[str, str] = {
    "dev": "dev loss, mean over seeds",
    "dev-per-seed": "dev loss, for each seed alone",
    "test": "test accuracy, mean over seeds, as in the paper: optimistic",
}


class Task(NamedTuple):
    """What a recipe is run on: a benchmark with its label words, and a model."""

    benchmark: str
    verbaliser: str | None
    model: str


class Tried(NamedTuple):
    """What a cell was trained with; None where a recipe has none."""

    learning_rate: float | None
    beta: float | None

    def __str__(self) -> str:
        parts = [] if self.learning_rate is None else [f"{self.learning_rate:g}"]
        return ", ".join(parts + ([] if self.beta is None else [f"β {self.beta:g}"]))


@dataclass(frozen=True)
class Arm:
    """A recipe on one task at one N, at the chosen rate and β: one cell a seed.

    Attributes:
        task: benchmark, verbaliser, model.
        num_examples: N; None for ``base``.
        recipe: its name.
        variant: the grid's name for its settings; empty for the plain recipe.
        settings: of its cells, dotted.
        runs: seed → cell; the one run of ``base`` has the seed None.
        tried: rates and β there were to choose from, in ascending order.
    """

    task: Task
    num_examples: int | None
    recipe: str
    variant: str
    settings: dict[str, object]
    runs: dict[int | None, Record] = field(repr=False)
    tried: tuple[Tried, ...]

    @property
    def label(self) -> str:
        """``ia2-sft``, or ``ia2-sft@variant``."""
        return f"{self.recipe}@{self.variant}" if self.variant else self.recipe

    @property
    def chosen(self) -> tuple[Tried, ...]:
        """Rates and β of its runs, each once; several where every seed has its own."""
        return tuple(sorted({_tried(cell) for cell in self.runs.values()}, key=_order))

    @property
    def datasets(self) -> tuple[str, ...]:
        """What its runs were evaluated on."""
        return tuple(dict.fromkeys(d for cell in self.runs.values() for d in cell.evaluations))


def make_arms(cells: Iterable[Record], select: Select = "dev") -> list[Arm]:
    """Group cells by task, N, recipe and variant, and choose a rate (and β) for each group.

    ``dev`` takes the lowest ``selection_loss``, averaged over seeds; ``dev-per-seed`` the lowest of each
    seed, which is what somebody with one training set can do; ``test`` the highest accuracy on the
    benchmark's own test rows, over the vocabulary and averaged over seeds (the paper). Candidates are
    compared on the same seeds: those of the candidate with most. Where none has a loss or an accuracy, and
    among equals, the lowest rate is taken.

    Cells with other settings are never averaged, whatever their folders call them: the name of a variant
    is made of the settings that set them apart, where the grid gives none.
    """
    groups: dict[_Name, dict[str, list[Record]]] = {}
    for cell in cells:
        name = _Name(
            Task(cell.benchmark, cell.verbaliser, cell.model), cell.num_examples, cell.recipe, cell.variant
        )
        alike = json.dumps([cell.settings, cell.max_test], sort_keys=True, ensure_ascii=False)
        groups.setdefault(name, {}).setdefault(alike, []).append(cell)
    arms = []
    for name, members in groups.items():
        variants = _told_apart(name.variant, [cells_of[0] for cells_of in members.values()])
        for variant, cells_of in zip(variants, members.values(), strict=True):
            candidates: dict[Tried, dict[int | None, Record]] = {}
            for cell in cells_of:
                candidates.setdefault(_tried(cell), {})[cell.seed] = cell
            ordered = dict(sorted(candidates.items(), key=lambda item: _order(item[0])))
            runs = _choose(ordered, select)
            runs = dict(sorted(runs.items(), key=lambda item: -1 if item[0] is None else item[0]))
            settings = dict(cells_of[0].settings)
            arms.append(
                Arm(name.task, name.num_examples, name.recipe, variant, settings, runs, tuple(ordered))
            )
    return arms


class _Name(NamedTuple):
    task: Task
    num_examples: int | None
    recipe: str
    variant: str


def _told_apart(variant: str, cells: Sequence[Record]) -> list[str]:
    """A variant's name for each of cells that have one name and different settings."""
    if len(cells) == 1:
        return [variant]
    texts = [{k: _short(v) for k, v in cell.settings.items()} for cell in cells]
    shared = set.intersection(*(set(text.items()) for text in texts))
    most = max(math.inf if cell.max_test is None else cell.max_test for cell in cells)
    names = []
    for cell, text in zip(cells, texts, strict=True):
        parts = [variant] + [f"{k}={v}" for k, v in sorted(text.items()) if (k, v) not in shared]
        if cell.max_test is not None and cell.max_test < most:
            parts.append(f"max_test={cell.max_test}")
        names.append(",".join(filter(None, parts)))
    return names


def _short(value: object) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def _tried(cell: Record) -> Tried:
    return Tried(cell.learning_rate, cell.beta)


def _order(tried: Tried) -> tuple[float, float]:
    return (tried.learning_rate or 0.0, tried.beta or 0.0)


def _choose(candidates: dict[Tried, dict[int | None, Record]], select: Select) -> dict[int | None, Record]:
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    if select == "dev-per-seed":
        seeds = {seed for runs in candidates.values() for seed in runs}
        return {
            seed: min((runs[seed] for runs in candidates.values() if seed in runs), key=_loss)
            for seed in seeds
        }
    most = max(len(runs) for runs in candidates.values())
    whole = {tried: runs for tried, runs in candidates.items() if len(runs) == most}
    # a sweep cut short may have the same number of other seeds; then each has its own mean
    shared = set.intersection(*(set(runs) for runs in whole.values()))

    def score(runs: dict[int | None, Record]) -> float:
        seeds = shared or set(runs)
        values = [(_loss if select == "dev" else _error)(runs[seed]) for seed in seeds]
        return float(np.mean(values))

    return whole[min(whole, key=lambda tried: score(whole[tried]))]


def _loss(cell: Record) -> float:
    # a diverged run has no loss: it is never chosen before one that has
    loss = cell.selection_loss
    return math.inf if loss is None or not math.isfinite(loss) else loss


def _error(cell: Record) -> float:
    return math.inf if cell.own is None else 1.0 - cell.own.value("accuracy_vocabulary")
