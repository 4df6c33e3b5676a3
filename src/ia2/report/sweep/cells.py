"""What tables ask of a sweep: chosen runs by task, N and recipe, where to compare them, whether ICL works."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ia2.config.recipes import METHOD, PLAIN, RECIPES
from ia2.evaluation.headroom import Judgement, judge
from ia2.experiment.sweep.records import Results
from ia2.report.sweep.selection import (
    ChosenRuns,
    Select,
    SweepTask,
    check_same_rows,
    choose_runs,
    differences,
    paired,
)

TITLES = {
    "base": "w/o ICL",
    "icl": "ICL",
    "sft": "SFT only",
    "ia2": "IA2 only",
    "ia2-sft": "IA2 → SFT",
    "sft-ia2": "SFT → IA2",
    "ia2+sft": "IA2 + SFT",
    "soft-sft": "SFT (soft labels)",
}
"""How the paper calls the recipes."""


class Place(NamedTuple):
    """Where recipes are compared: on a benchmark's rows, trained on a task's examples, N of them."""

    task: SweepTask
    dataset: str
    size: int

    @property
    def is_own(self) -> bool:
        """Whether the rows are of the benchmark that was trained on."""
        return self.dataset == self.task.benchmark

    @property
    def evaluated(self) -> str:
        """The benchmark evaluated on, and whether it is another one."""
        return self.dataset if self.is_own else f"{self.dataset} (OOD)"


class IclVerdict(NamedTuple):
    """Whether ICL knows what fine-tuning lacks; accuracies of ICL, the base model (if run) and guessing."""

    judged: Judgement
    icl: float
    base: float | None
    chance: float


class Report:
    """The chosen runs of a sweep, and what several tables ask of them.

    Attributes:
        runs: of every task, size, recipe and variant.
        tasks, models: in the order of the cells.
        sizes: every N, ascending.
        labels: recipes and their variants, in the order of ``RECIPES``, the plain one first.
        where_icl_works: whether evaluations on which ICL does not work are left out.
    """

    def __init__(self, results: Results, select: Select = "dev", *, where_icl_works: bool = False) -> None:
        self.results, self.select, self.where_icl_works = results, select, where_icl_works
        self.runs = choose_runs(results.cells, select)
        self._of_task: dict[SweepTask, list[ChosenRuns]] = {}
        for runs in self.runs:
            self._of_task.setdefault(runs.task, []).append(runs)
        self.tasks = list(self._of_task)
        self.models = list(dict.fromkeys(task.model for task in self.tasks))
        self.sizes = sorted({runs.num_examples for runs in self.runs if runs.num_examples is not None})
        rank = {recipe: place for place, recipe in enumerate(RECIPES)}
        named = {(rank.get(r.recipe, len(rank)), r.recipe, r.variant, r.label) for r in self.runs}
        self.labels = [label for *_, label in sorted(named)]
        self._verdicts: dict[Place, IclVerdict | None] = {}

    def where(self, *, icl_works: bool) -> Report:
        """The same of all evaluations, or of those on which ICL works."""
        other = copy.copy(self)
        other.where_icl_works = icl_works
        return other

    @property
    def where_words(self) -> str:
        """What titles say of it."""
        return " where ICL works" if self.where_icl_works else ""

    def labelled(self, task: SweepTask) -> bool:
        """Whether the task's answers are labels."""
        own = (cell.own for runs in self._of_task[task] for cell in runs.cells.values())
        return next((evaluation.labelled for evaluation in own if evaluation is not None), True)

    def datasets(self, task: SweepTask) -> list[str]:
        """What the task's cells were evaluated on, its own rows first."""
        cells = (cell for runs in self._of_task[task] for cell in runs.cells.values())
        names = dict.fromkeys(name for cell in cells for name in cell.evaluations)
        return sorted(names, key=lambda name: name != task.benchmark)

    def places(self, *, own: bool = False, model: str = "", size: int | None = None) -> list[Place]:
        """Where was evaluated (where ICL works, if the report is of that); ``own``: no other benchmarks."""
        places = [
            Place(task, dataset, n)
            for task in self.tasks
            if model in ("", task.model)
            for dataset in self.datasets(task)
            for n in (self.sizes or [0] if size is None else [size])
        ]
        return [p for p in places if (p.is_own or not own) and (not self.where_icl_works or self.works(p))]

    def of(self, task: SweepTask, size: int) -> list[ChosenRuns]:
        """The task's runs at a size, and ``base``, which has none."""
        return [runs for runs in self._of_task[task] if runs.num_examples in (size, None)]

    def of_label(self, task: SweepTask, size: int, label: str) -> ChosenRuns | None:
        """Those of one label."""
        return next((runs for runs in self.of(task, size) if runs.label == label), None)

    def plain(self, task: SweepTask, size: int, recipe: str, **asked: str) -> ChosenRuns | None:
        """The runs of a recipe, plain or as plain as there are, that fit (:meth:`ChosenRuns.fits`)."""
        fitting = [runs for runs in self.of(task, size) if runs.recipe == recipe and runs.fits(**asked)]
        return min(fitting, key=lambda runs: runs.plainness, default=None)

    def pair(self, task: SweepTask, size: int) -> tuple[ChosenRuns, ChosenRuns] | None:
        """The method and plain fine-tuning, with the same adapter and answers; None without both."""
        rivals = [runs for runs in self.of(task, size) if runs.recipe == PLAIN]
        for rival in sorted(rivals, key=lambda runs: runs.plainness):
            method = self.plain(task, size, METHOD, adapter=rival.adapter, answers=rival.sft_answers)
            if method is not None:
                return method, rival
        return None

    def pooled(
        self, places: Iterable[Place], measure: str, labels: tuple[str, str] | None = None
    ) -> tuple[dict[str, list[float]], list[ChosenRuns]]:
        """Differences of two recipes (:meth:`pair` by default) over places and seeds, and the runs compared.

        They are by the benchmark trained on: evaluations of one task share their training examples. Free text
        counts for accuracy alone.
        """
        pairs: dict[str, list[float]] = {}
        used: list[ChosenRuns] = []
        for task, dataset, size in places:
            if measure != "accuracy" and not self.labelled(task):
                continue
            if labels is None:
                first, second = self.pair(task, size) or (None, None)
            else:
                first, second = (self.of_label(task, size, label) for label in labels)
            if first is None or second is None:
                continue
            used += [first, second]
            if found := differences(first, second, dataset, measure):
                pairs.setdefault(task.benchmark, []).extend(found.values())
        return pairs, used

    def expected_seeds(self, task: SweepTask, size: int) -> int:
        """Seeds that any recipe of the task has at this size."""
        return len({s for runs in self.of(task, size) for s in runs.cells if s is not None})

    def works(self, place: Place) -> bool:
        """Whether ICL works there."""
        verdict = self.icl(place)
        return verdict is not None and verdict.judged.word == "yes"

    def icl(self, place: Place) -> IclVerdict | None:
        """Judge ICL there by ICL − SFT and by the base model; None where it was not evaluated."""
        if place not in self._verdicts:
            self._verdicts[place] = self._judge_icl(place)
        return self._verdicts[place]

    def _judge_icl(self, place: Place) -> IclVerdict | None:
        task, dataset, size = place
        icl, sft, base = (self.plain(task, size, recipe) for recipe in ("icl", PLAIN, "base"))
        evaluations = [] if icl is None else list(icl.evaluations(dataset).values())
        if icl is None or not evaluations:
            return None
        bare = [] if base is None else list(base.evaluations(dataset).values())[:1]
        check_same_rows([*evaluations, *bare])
        # the first records had neither
        majority = max(e.majority or 0.0 for e in evaluations)
        labels = max(e.num_labels or 0 for e in evaluations)
        chance = max(majority, 1 / labels if labels else 0.0)
        # only draws that both have count
        pairs = [] if sft is None else list(paired(icl, sft, dataset).values())
        accuracies = [e.value("accuracy") for e in evaluations]
        of_base = [e.value("accuracy") for e in bare]
        judged = judge(
            [a.value("accuracy") for a, _ in pairs] or accuracies,
            [b.value("accuracy") for _, b in pairs] or None,
            of_base or None,
            chance,
        )
        if evaluations[0].labelled and chance == 0:
            judged = replace(judged, word="unclear", reason="number of labels unknown")
        return IclVerdict(judged, float(np.mean(accuracies)), of_base[0] if of_base else None, chance)
