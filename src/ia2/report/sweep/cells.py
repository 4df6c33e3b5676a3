"""A sweep's cells, ready to be put into tables: arms by task, size and recipe, and what they are of."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ia2.config.recipes import RECIPES
from ia2.data.benchmarks import BENCHMARKS
from ia2.evaluation.headroom import Judgement, judge
from ia2.experiment.sweep.records import Results
from ia2.report.sweep.selection import Arm, Select, Task, differences, make_arms, paired, same_rows

METHOD, RIVAL = "ia2-sft", "sft"

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
    """What arms are compared on: a benchmark's rows, by a task's models of N examples."""

    task: Task
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


@dataclass(frozen=True)
class IclVerdict:
    """Whether there is anything in context that fine-tuning lacks (``ia2 probe`` judges alike).

    Attributes:
        judged: word, reason and ICL − SFT.
        icl: accuracy, mean over seeds.
        base: accuracy of the base model without demonstrations; None where it was not run.
        chance: accuracy of guessing.
    """

    judged: Judgement
    icl: float
    base: float | None
    chance: float


class Report:
    """Arms of a sweep and the statistics of them that several tables share.

    Args:
        results: the cells.
        select: how rates and β are chosen.
        where_icl_works: leave out the evaluations on which ICL does not work.

    Attributes:
        arms: every task, size, recipe and variant, at its chosen rate.
    """

    def __init__(self, results: Results, select: Select = "dev", *, where_icl_works: bool = False) -> None:
        self.results, self.select, self.where_icl_works = results, select, where_icl_works
        self.arms = make_arms(results.cells, select)
        self._of_task: dict[Task, list[Arm]] = {}
        for arm in self.arms:
            self._of_task.setdefault(arm.task, []).append(arm)
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

    @property
    def tasks(self) -> list[Task]:
        """Benchmark, label words and model, in the order of the cells."""
        return list(self._of_task)

    @cached_property
    def models(self) -> list[str]:
        """In the order of the cells."""
        return list(dict.fromkeys(task.model for task in self.tasks))

    @cached_property
    def sizes(self) -> list[int]:
        """Every N, ascending."""
        return sorted({arm.num_examples for arm in self.arms if arm.num_examples is not None})

    @cached_property
    def labels(self) -> list[str]:
        """Recipes and their variants, in the order of ``RECIPES``, the plain one first."""
        found = {(arm.recipe, arm.variant, arm.label) for arm in self.arms}
        order = {recipe: place for place, recipe in enumerate(RECIPES)}
        return [name for *_, name in sorted(found, key=lambda f: (order.get(f[0], len(order)), f[0], f[1]))]

    def labelled(self, task: Task) -> bool:
        """Whether the task's answers are labels."""
        own = (cell.own for arm in self._of_task[task] for cell in arm.runs.values())
        return next((evaluation.labelled for evaluation in own if evaluation is not None), True)

    def datasets(self, task: Task) -> list[str]:
        """What the task's cells were evaluated on, its own rows first."""
        found = dict.fromkeys(d for arm in self._of_task[task] for d in arm.datasets)
        return sorted(found, key=lambda name: name != task.benchmark)

    def places(self, *, own: bool = False, model: str = "", size: int | None = None) -> list[Place]:
        """What was evaluated, by task, benchmark and N; only where ICL works, if the report is of that.

        Args:
            own: leave out other benchmarks than the one trained on.
            model: only this one.
            size: only this N.
        """
        found = [
            Place(task, dataset, n)
            for task in self.tasks
            if model in ("", task.model)
            for dataset in self.datasets(task)
            for n in (self.sizes or [0] if size is None else [size])
        ]
        return [p for p in found if (p.is_own or not own) and (not self.where_icl_works or self.works(p))]

    def of(self, task: Task, size: int) -> list[Arm]:
        """The task's arms at a size, and ``base``, which has none."""
        return [arm for arm in self._of_task[task] if arm.num_examples in (size, None)]

    def arm(self, task: Task, size: int, label: str) -> Arm | None:
        """One arm by its name."""
        return next((arm for arm in self.of(task, size) if arm.label == label), None)

    def plain(self, task: Task, size: int, recipe: str, **asked: str) -> Arm | None:
        """The arm of a recipe, plain or as plain as there is.

        Args:
            task: benchmark, verbaliser, model.
            size: N.
            recipe: its name.
            asked: adapter and answers, as :meth:`Arm.fits` takes them.
        """
        found = [arm for arm in self.of(task, size) if arm.recipe == recipe and arm.fits(**asked)]
        return min(found, key=lambda arm: arm.plainness, default=None)

    def pair(self, task: Task, size: int) -> tuple[Arm, Arm] | None:
        """The method and plain fine-tuning, with the same adapter and answers; None without both."""
        rivals = [arm for arm in self.of(task, size) if arm.recipe == RIVAL]
        for rival in sorted(rivals, key=lambda arm: arm.plainness):
            method = self.plain(task, size, METHOD, adapter=rival.adapter, answers=rival.sft_answers)
            if method is not None:
                return method, rival
        return None

    def pooled(
        self,
        places: Iterable[Place],
        measure: str,
        labels: tuple[str, str] | None = None,
    ) -> tuple[dict[str, list[float]], list[Arm]]:
        """Differences of two arms over places and seeds, by the benchmark trained on; and the arms.

        Evaluations of one task share their training examples, and so belong to one benchmark.

        Args:
            places: to compare on; those of free text count for accuracy alone.
            measure: of :data:`ia2.experiment.sweep.records.MEASURES`.
            labels: names of the two arms; :meth:`pair` by default.
        """
        pairs: dict[str, list[float]] = {}
        used: list[Arm] = []
        for task, dataset, size in places:
            first, second = (
                self.pair(task, size) or (None, None)
                if labels is None
                else (self.arm(task, size, label) for label in labels)
            )
            if first is None or second is None or (measure != "accuracy" and not self.labelled(task)):
                continue
            used += [first, second]
            if found := differences(first, second, dataset, measure):
                pairs.setdefault(task.benchmark, []).extend(found.values())
        return pairs, used

    def expected_seeds(self, task: Task, size: int) -> int:
        """Seeds that any recipe of the task has at this size."""
        return len({s for arm in self.of(task, size) for s in arm.runs if s is not None})

    def works(self, place: Place) -> bool:
        """Whether ICL works there."""
        found = self.icl(place)
        return found is not None and found.judged.word == "yes"

    def icl(self, place: Place) -> IclVerdict | None:
        """Judge in-context learning there by ICL − SFT, and by the base model, among the labels.

        Chance is one over the number of labels, or the share of the most frequent one where records have it.

        Returns:
            None where ICL was not evaluated.
        """
        if place not in self._verdicts:
            self._verdicts[place] = self._judge_icl(place)
        return self._verdicts[place]

    def _judge_icl(self, place: Place) -> IclVerdict | None:
        task, dataset, size = place
        icl, sft, base = (self.plain(task, size, recipe) for recipe in ("icl", RIVAL, "base"))
        evaluations = [] if icl is None else list(icl.evaluations(dataset).values())
        if icl is None or not evaluations:
            return None
        bare = [] if base is None else list(base.evaluations(dataset).values())[:1]
        same_rows([*evaluations, *bare])
        # records of older versions lack the share, which is the same for all
        majority = max(e.majority or 0.0 for e in evaluations)
        labels = (evaluations[0].num_labels or _num_labels(dataset)) if evaluations[0].labelled else None
        chance = max(majority, 1 / labels if labels else 0.0)
        # only draws that both have count
        pairs = list(paired(icl, sft, dataset).values()) if sft is not None else []
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


def _num_labels(dataset: str) -> int | None:
    """Labels of a known benchmark, of which several raw ones may share one; None for free text or unknown."""
    known = BENCHMARKS.get(dataset)
    if known is None or not known.verbalisers:
        return None
    return len(set(next(iter(known.verbalisers.values())).values()))
