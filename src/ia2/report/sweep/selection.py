"""The runs of a recipe at its chosen learning rate and β, and how those of two recipes differ."""

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
"""What rates and β are chosen by."""

Seeds = dict[int | None, Record]
"""Seed → cell; the one cell of ``base`` has the seed None."""


class SweepTask(NamedTuple):
    """What a recipe is run on: a benchmark with its label words, and a model."""

    benchmark: str
    verbaliser: str | None
    model: str

    @property
    def source(self) -> str:
        """The benchmark, and its label words where there are some."""
        return f"{self.benchmark}, {self.verbaliser}" if self.verbaliser else self.benchmark


@dataclass(frozen=True)
class ChosenRuns:
    """A recipe on one task at one N (None for ``base``), at the chosen rate and β: one cell a seed.

    ``variant`` is empty for the plain recipe; ``tried`` are the rates (and β) to choose from, in words.
    """

    task: SweepTask
    num_examples: int | None
    recipe: str
    variant: str
    settings: dict[str, object]
    cells: Seeds = field(repr=False)
    tried: tuple[str, ...]

    @property
    def label(self) -> str:
        """``ia2-sft``, or ``ia2-sft@variant``."""
        return f"{self.recipe}@{self.variant}" if self.variant else self.recipe

    @property
    def chosen(self) -> tuple[str, ...]:
        """Those of ``tried`` that its cells have; several where every seed has its own."""
        rates = {rate_in_words(cell) for cell in self.cells.values()}
        return tuple(rate for rate in self.tried if rate in rates)

    @property
    def plainness(self) -> tuple[bool, int, str]:
        """Its place among runs of one recipe, the plainest first."""
        # a variant may have fewer settings than the plain recipe, where it undoes one that all share
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
        modules: Any = self.settings.get("adapter.target_modules") or ["q", "k", "o"]
        names = [modules] if isinstance(modules, str) else map(str, modules)
        short = [re.sub(r"_proj$", "", name) for name in names]
        ordered = sorted(short, key=lambda name: ("qkvo".find(name) % 5, name))
        between = "" if all(len(name) == 1 for name in short) else "+"
        return f"r{self.settings.get('adapter.rank') or 8} {between.join(ordered)}"

    @property
    def sft_answers(self) -> str:
        """What plain fine-tuning learns: ``ground_truth`` or ``icl_responses``."""
        return str(self.settings.get("sft.answers", "ground_truth"))

    @property
    def answers(self) -> str | None:
        """What its last supervised stage learns: ``true`` answers or ``ICL's``; None without such a stage."""
        by_stage = {
            SFT: self.sft_answers,
            JOINT: self.settings.get("joint.answers", "icl_responses"),
            SOFT: "icl_responses",  # soft labels are the teacher's by nature
        }
        stages = RECIPES[self.recipe].stages if self.recipe in RECIPES else ()
        learned = [by_stage[stage] for stage in stages if stage in by_stage]
        return None if not learned else "true" if learned[-1] == "ground_truth" else "ICL's"

    def fits(self, *, adapter: str = "", answers: str = "", rank_and_modules: str = "") -> bool:
        """Whether it has this adapter and these answers, as far as they are asked for and it has any."""
        if not is_trained(self.recipe):
            return True
        if adapter not in ("", self.adapter) or rank_and_modules not in ("", self.rank_and_modules):
            return False
        fine_tunes = self.recipe in RECIPES and SFT in RECIPES[self.recipe].kinds()
        return not fine_tunes or answers in ("", self.sft_answers)

    def evaluations(self, dataset: str) -> dict[int | None, Evaluation]:
        """Seed → what a cell did on a benchmark's rows."""
        return {s: cell.evaluations[dataset] for s, cell in self.cells.items() if dataset in cell.evaluations}

    def values(self, dataset: str, measure: str) -> dict[int | None, float]:
        """Seed → a measure on all rows of a benchmark."""
        return {seed: e.value(measure) for seed, e in self.evaluations(dataset).items()}


def rate_in_words(cell: Record) -> str:
    """``0.001``, ``0.001, β 0.5``; empty without training."""
    parts = [] if cell.learning_rate is None else [f"{cell.learning_rate:g}"]
    return ", ".join(parts + ([] if cell.beta is None else [f"β {cell.beta:g}"]))


# -------------------------------------------------------------------------------- the choice of rates


def choose_runs(cells: Iterable[Record], select: Select = "dev") -> list[ChosenRuns]:
    """Group cells by task, N, recipe and variant, and choose a rate (and β) for each group.

    ``dev`` takes the lowest ``selection_loss``, averaged over seeds; ``dev-per-seed`` the lowest of each
    seed, which is what somebody with one training set can do; ``test`` the highest accuracy on the
    benchmark's own test rows, over the vocabulary and averaged over seeds (the paper). Candidates are
    compared on the same seeds: those of the candidate with most. Where none has a loss or an accuracy, and
    among equals, the lowest rate is taken.

    Cells with other settings are never averaged, whatever their folders call them: the name of a variant
    is made of the settings that set them apart, where the grid gives none.
    """
    groups: dict[tuple[SweepTask, int | None, str, str], dict[str, list[Record]]] = {}
    for cell in cells:
        task = SweepTask(cell.benchmark, cell.verbaliser, cell.model)
        alike = json.dumps([cell.settings, cell.max_test], sort_keys=True)
        by_settings = groups.setdefault((task, cell.num_examples, cell.recipe, cell.variant), {})
        by_settings.setdefault(alike, []).append(cell)
    chosen = []
    for (task, num_examples, recipe, name), by_settings in groups.items():
        variants = _told_apart(name, [members[0] for members in by_settings.values()])
        for variant, members in zip(variants, by_settings.values(), strict=True):
            candidates: dict[str, Seeds] = {}
            for cell in sorted(members, key=lambda cell: (cell.learning_rate or 0.0, cell.beta or 0.0)):
                candidates.setdefault(rate_in_words(cell), {})[cell.seed] = cell
            by_seed = _choose(list(candidates.values()), select)
            ordered = dict(sorted(by_seed.items(), key=lambda item: -1 if item[0] is None else item[0]))
            settings = dict(members[0].settings)
            chosen.append(
                ChosenRuns(task, num_examples, recipe, variant, settings, ordered, tuple(candidates))
            )
    return chosen


def _told_apart(variant: str, cells: Sequence[Record]) -> list[str]:
    """A variant's name for each of cells that have one name and different settings."""
    if len(cells) == 1:
        return [variant]
    texts = [
        {k: "+".join(map(str, v)) if isinstance(v, list) else str(v) for k, v in cell.settings.items()}
        for cell in cells
    ]
    shared = set.intersection(*(set(text.items()) for text in texts))
    longest = max(math.inf if cell.max_test is None else cell.max_test for cell in cells)
    names = []
    for cell, text in zip(cells, texts, strict=True):
        parts = [variant] + [f"{k}={v}" for k, v in sorted(text.items()) if (k, v) not in shared]
        if cell.max_test is not None and cell.max_test < longest:
            parts.append(f"max_test={cell.max_test}")
        names.append(",".join(filter(None, parts)))
    return names


def _choose(candidates: Sequence[Seeds], select: Select) -> Seeds:
    if select == "dev-per-seed":
        seeds = dict.fromkeys(seed for cells in candidates for seed in cells)
        return {seed: min((c[seed] for c in candidates if seed in c), key=_dev_loss) for seed in seeds}
    count = max(map(len, candidates))
    whole = [cells for cells in candidates if len(cells) == count]
    # a sweep cut short may have the same number of other seeds; then each has its own mean
    shared = set.intersection(*map(set, whole))
    badness = _dev_loss if select == "dev" else _test_error
    return min(whole, key=lambda cells: float(np.mean([badness(cells[s]) for s in shared or cells])))


def _dev_loss(cell: Record) -> float:
    # a diverged run has no loss: it is never chosen before one that has
    loss = cell.selection_loss
    return math.inf if loss is None or not math.isfinite(loss) else loss


def _test_error(cell: Record) -> float:
    return math.inf if cell.own is None else 1.0 - cell.own.value("accuracy_vocabulary")


# ---------------------------------------------------------------------------------------- differences


def differences(first: ChosenRuns, second: ChosenRuns, dataset: str, measure: str) -> dict[int, float]:
    """Seed → ``first − second`` on the same rows; empty without a seed that both have.

    Raises:
        DataError: they were evaluated on other rows.
    """
    pairs = paired(first, second, dataset)
    return {seed: a.value(measure) - b.value(measure) for seed, (a, b) in pairs.items()}


def paired(first: ChosenRuns, second: ChosenRuns, dataset: str) -> dict[int, tuple[Evaluation, Evaluation]]:
    """Seed → the evaluations of both; ``base``, which has one run, stands for every seed."""
    mine, other = first.evaluations(dataset), second.evaluations(dataset)
    seeds = sorted(s for s in {*mine, *other} if s is not None)
    pairs = {s: (mine.get(s, mine.get(None)), other.get(s, other.get(None))) for s in seeds}
    whole = {s: (a, b) for s, (a, b) in pairs.items() if a is not None and b is not None}
    check_same_rows([evaluation for pair in whole.values() for evaluation in pair])
    return whole


def check_same_rows(evaluations: Sequence[Evaluation]) -> None:
    """Raise DataError for evaluations on different test rows."""
    for other in evaluations[1:]:
        first = evaluations[0]
        if (other.test, other.n) != (first.test, first.n):
            raise DataError(
                f"{first.dataset}: cells were evaluated on different test rows ({first.test}, {first.n} "
                f"rows; {other.test}, {other.n} rows): they cannot be compared. Report their folders apart."
            )
