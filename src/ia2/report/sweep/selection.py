"""Arms: the cells of a recipe at its chosen learning rate and β, what they are of, and how two compare."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from ia2.config.recipes import JOINT, RECIPES, SFT, SOFT, is_trained
from ia2.experiment.sweep.records import Evaluation, Record
from ia2.utils.errors import DataError

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

    @property
    def source(self) -> str:
        """The benchmark, and its label words where there are some."""
        return f"{self.benchmark}, {self.verbaliser}" if self.verbaliser else self.benchmark


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

    @property
    def is_trained(self) -> bool:
        """Whether its recipe trains anything."""
        return is_trained(self.recipe)

    @property
    def plainness(self) -> tuple[bool, int, str]:
        """Its place among arms of one recipe, the plainest first.

        A variant may have fewer settings than the plain recipe, where it undoes one that all share.
        """
        return self.variant != "", len(self.settings), self.variant

    @property
    def adapter(self) -> str:
        """Type of the adapter: ``lora``, or what the settings say."""
        if any(name.startswith("adapter.peft") for name in self.settings):
            return "peft"
        return str(self.settings.get("adapter.type", "lora"))

    @property
    def rank_and_modules(self) -> str:
        """``r8 qko``: rank and projections of a LoRA adapter, as the paper's ablation names them."""
        rank = self.settings.get("adapter.rank") or 8
        modules: Any = self.settings.get("adapter.target_modules") or ["q", "k", "o"]
        names = [modules] if isinstance(modules, str) else map(str, modules)
        short = [re.sub(r"_proj$", "", name) for name in names]
        ordered = sorted(short, key=lambda name: ("qkvo".find(name) % 5, name))
        return f"r{rank} {('' if all(len(name) == 1 for name in short) else '+').join(ordered)}"

    @property
    def sft_answers(self) -> str:
        """What plain fine-tuning learns: ``ground_truth`` or ``icl_responses``."""
        return str(self.settings.get("sft.answers", "ground_truth"))

    @property
    def answers(self) -> str | None:
        """What its last supervised stage learns: ``true`` answers or ``ICL's``; None without such a stage."""
        given = {
            SFT: self.sft_answers,
            JOINT: self.settings.get("joint.answers", "icl_responses"),
            SOFT: "icl_responses",  # soft labels are the teacher's by nature
        }
        learned = [given[s] for s in RECIPES[self.recipe].stages if s in given] if self._known else []
        return None if not learned else "true" if learned[-1] == "ground_truth" else "ICL's"

    @property
    def _known(self) -> bool:
        return self.recipe in RECIPES

    def fits(self, *, adapter: str = "", answers: str = "", rank_and_modules: str = "") -> bool:
        """Whether it has this adapter and these answers, as far as they are asked for and it has any."""
        if not self.is_trained:
            return True
        if adapter not in ("", self.adapter) or rank_and_modules not in ("", self.rank_and_modules):
            return False
        fine_tunes = self._known and SFT in RECIPES[self.recipe].kinds()
        return not fine_tunes or answers in ("", self.sft_answers)

    def evaluations(self, dataset: str) -> dict[int | None, Evaluation]:
        """Seed → what a cell did on a benchmark's rows."""
        return {s: cell.evaluations[dataset] for s, cell in self.runs.items() if dataset in cell.evaluations}

    def values(self, dataset: str, measure: str) -> dict[int | None, float]:
        """Seed → a measure on all rows of a benchmark."""
        return {seed: e.value(measure) for seed, e in self.evaluations(dataset).items()}


def differences(first: Arm, second: Arm, dataset: str, measure: str) -> dict[int, float]:
    """Seed → ``first − second`` on the same rows; empty without a seed that both have.

    Raises:
        DataError: they were evaluated on other rows.
    """
    pairs = paired(first, second, dataset)
    return {seed: a.value(measure) - b.value(measure) for seed, (a, b) in pairs.items()}


def paired(first: Arm, second: Arm, dataset: str) -> dict[int, tuple[Evaluation, Evaluation]]:
    """Seed → the evaluations of both; ``base``, which has one run, stands for every seed.

    Raises:
        DataError: they were evaluated on other rows.
    """
    mine, other = first.evaluations(dataset), second.evaluations(dataset)
    seeds = sorted(s for s in {*mine, *other} if s is not None)
    # the base model has one run, whose seed is None
    pairs = {s: (mine.get(s, mine.get(None)), other.get(s, other.get(None))) for s in seeds}
    whole = {s: (a, b) for s, (a, b) in pairs.items() if a is not None and b is not None}
    same_rows([evaluation for pair in whole.values() for evaluation in pair])
    return whole


def same_rows(evaluations: Sequence[Evaluation]) -> None:
    """Refuse evaluations on different test rows."""
    for other in evaluations[1:]:
        first = evaluations[0]
        if (other.test, other.n) != (first.test, first.n):
            raise DataError(
                f"{first.dataset}: cells were evaluated on different test rows ({first.test}, {first.n} "
                f"rows; {other.test}, {other.n} rows): they cannot be compared. Report their folders apart."
            )


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
    groups: dict[tuple[Task, int | None, str, str], dict[str, list[Record]]] = {}
    for cell in cells:
        task = Task(cell.benchmark, cell.verbaliser, cell.model)
        alike = json.dumps([cell.settings, cell.max_test], sort_keys=True, ensure_ascii=False)
        members = groups.setdefault((task, cell.num_examples, cell.recipe, cell.variant), {})
        members.setdefault(alike, []).append(cell)
    arms = []
    for (task, num_examples, recipe, name), members in groups.items():
        variants = _told_apart(name, [cells_of[0] for cells_of in members.values()])
        for variant, cells_of in zip(variants, members.values(), strict=True):
            candidates: dict[Tried, dict[int | None, Record]] = {}
            for cell in sorted(cells_of, key=lambda cell: _order(_tried(cell))):
                candidates.setdefault(_tried(cell), {})[cell.seed] = cell
            runs = _choose(candidates, select)
            runs = dict(sorted(runs.items(), key=lambda item: -1 if item[0] is None else item[0]))
            settings = dict(cells_of[0].settings)
            arms.append(Arm(task, num_examples, recipe, variant, settings, runs, tuple(candidates)))
    return arms


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
