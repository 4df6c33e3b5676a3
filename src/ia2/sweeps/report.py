"""A sweep's cells, ready to be put into tables: arms by task, size and recipe, and what they are of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from ia2.benchmarks import BENCHMARKS
from ia2.recipes import JOINT, RECIPES, SFT, SOFT, is_trained
from ia2.sweeps.records import Results
from ia2.sweeps.selection import BY, Arm, Select, Task, make_arms
from ia2.sweeps.statistics import Difference, IclVerdict, difference, icl_works

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


class Report:
    """Arms of a sweep and the statistics of them that several tables share.

    Args:
        results: the cells.
        select: how rates and β are chosen.

    Attributes:
        arms: every task, size, recipe and variant, at its chosen rate.
    """

    def __init__(self, results: Results, select: Select = "dev") -> None:
        self.results, self.select = results, select
        self.arms = make_arms(results.cells, select)
        self._differences: dict[tuple[Any, ...], Difference | None] = {}

    @cached_property
    def tasks(self) -> list[Task]:
        """Benchmark, label words and model, in the order of the cells."""
        return list(dict.fromkeys(arm.task for arm in self.arms))

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
        order = list(RECIPES)
        place = {recipe: n for n, recipe in enumerate(order)}
        return [name for *_, name in sorted(found, key=lambda f: (place.get(f[0], len(order)), f[0], f[1]))]

    def labelled(self, task: Task) -> bool:
        """Whether the task's answers are labels."""
        for arm in self.arms:
            if arm.task == task:
                for cell in arm.runs.values():
                    if cell.own is not None:
                        return cell.own.labelled
        return True

    def datasets(self, task: Task) -> list[str]:
        """What the task's cells were evaluated on, its own rows first."""
        found = dict.fromkeys(d for arm in self.arms if arm.task == task for d in arm.datasets)
        return sorted(found, key=lambda name: name != task.benchmark)

    def of(self, task: Task, size: int | None = None, label: str | None = None) -> list[Arm]:
        """The task's arms at a size (and ``base``, which has none), all or those of one name."""
        return [
            arm
            for arm in self.arms
            if arm.task == task and arm.num_examples in (size, None) and (label is None or arm.label == label)
        ]

    def arm(self, task: Task, size: int, label: str) -> Arm | None:
        """One arm by its name."""
        return next(iter(self.of(task, size, label)), None)

    def plain(
        self,
        task: Task,
        size: int,
        recipe: str,
        *,
        adapter: str = "",
        answers: str = "",
        label: str = "",
    ) -> Arm | None:
        """The arm of a recipe with this adapter and these answers, plain or as plain as there is.

        Args:
            task: benchmark, verbaliser, model.
            size: N.
            recipe: its name.
            adapter: adapter type, asked of trained recipes; empty for any.
            answers: ``sft.answers``, asked of recipes that fine-tune; empty for any.
            label: :func:`adapter_label` of its settings; empty for any.
        """
        found = [
            arm
            for arm in self.of(task, size)
            if arm.recipe == recipe and fits(arm, adapter=adapter, answers=answers, label=label)
        ]
        return min(found, key=_plainness, default=None)

    def pair(self, task: Task, size: int) -> tuple[Arm, Arm] | None:
        """The method and plain fine-tuning, with the same adapter and answers; None without both."""
        rivals = [arm for arm in self.of(task, size) if arm.recipe == RIVAL]
        for rival in sorted(rivals, key=_plainness):
            answers = str(rival.settings.get("sft.answers", "ground_truth"))
            method = self.plain(task, size, METHOD, adapter=adapter_type(rival), answers=answers)
            if method is not None:
                return method, rival
        return None

    def expected_seeds(self, task: Task, size: int) -> int:
        """Seeds that any recipe of the task has at this size."""
        return len({s for arm in self.of(task, size) for s in arm.runs if s is not None})

    def compare(self, first: Arm, second: Arm, dataset: str, measure: str) -> Difference | None:
        """:func:`ia2.sweeps.statistics.difference`, computed once."""
        names = [(arm.task, arm.num_examples, arm.label) for arm in (first, second)]
        key = (*names, dataset, measure)
        if key not in self._differences:
            self._differences[key] = difference(first, second, dataset, measure)
        return self._differences[key]

    def icl(self, task: Task, size: int, dataset: str) -> IclVerdict | None:
        """Whether ICL works there."""
        icl, sft, base = (self.plain(task, size, recipe) for recipe in ("icl", RIVAL, "base"))
        return None if icl is None else icl_works(icl, sft, base, dataset, _num_labels(dataset))

    # ------------------------------------------------------------------------- what a table is of

    def rates(self, arms: Iterable[Arm]) -> str:
        """``Rates fixed beforehand: 0.001 (sft, ia2-sft)``, or how they were chosen among how many."""
        fixed: dict[str, list[str]] = {}
        chosen: dict[str, dict[str, None]] = {}
        tried: dict[str, int] = {}
        for arm in arms:
            if not is_trained(arm.recipe) or arm.tried[0].learning_rate is None:
                continue
            if len(arm.tried) == 1:
                fixed.setdefault(str(arm.tried[0]), []).append(arm.label)
            else:
                chosen.setdefault(arm.label, {}).update(dict.fromkeys(map(str, arm.chosen)))
                tried[arm.label] = max(tried.get(arm.label, 0), len(arm.tried))
        parts = []
        if fixed:
            listed = "; ".join(f"{rate} ({', '.join(dict.fromkeys(who))})" for rate, who in fixed.items())
            parts.append(f"Learning rate fixed beforehand: {listed}.")
        if chosen:
            listed = "; ".join(
                f"{who} {' or '.join(sorted(rates))} of {tried[who]}" for who, rates in chosen.items()
            )
            what = (
                "Learning rate and β"
                if any("β" in r for rates in chosen.values() for r in rates)
                else ("Learning rate")
            )
            parts.append(f"{what} chosen by {BY[self.select]}, for each benchmark: {listed}.")
        return " ".join(parts) if parts else "Nothing trained."

    def about(self, tasks: Sequence[Task], arms: Sequence[Arm]) -> list[str]:
        """Seeds, rows, label words, settings, choice of rates and differences in the data, as sentences."""
        trained = [arm for arm in arms if is_trained(arm.recipe)]
        adapters = sorted({adapter_type(arm) for arm in trained})
        seeds = sorted({s for arm in arms for s in arm.runs if s is not None})
        notes = [
            f"Seeds {span(seeds)}; {self._rows(arms)}; adapter {', '.join(adapters) or 'none'}; "
            f"{_verbalisers(tasks)}.",
            self.rates(arms),
        ]
        if icl := [arm for arm in arms if arm.recipe == "icl"]:
            fresh = all(arm.settings.get("icl_demonstrations") == "fresh" for arm in icl)
            notes.append(
                "ICL: new demonstrations for every query, as in the paper."
                if fresh
                else "ICL: the same N examples as the trained recipes."
            )
        if shared := _shared_settings(trained):
            notes.append(f"Settings of all trained recipes: {shared}.")
        if uneven := _uneven_settings(trained):
            notes.append(f"Settings that differ between benchmarks or N: {uneven}.")
        data = dict.fromkeys(note for arm in arms for cell in arm.runs.values() for note in cell.notes)
        if data:
            notes.append(f"Data: {'; '.join(' '.join(note.split()).rstrip('.') for note in data)}.")
        return notes

    def _rows(self, arms: Sequence[Arm]) -> str:
        sizes: dict[int, list[str]] = {}
        for arm in arms:
            for cell in arm.runs.values():
                for name, evaluation in cell.evaluations.items():
                    if name not in sizes.setdefault(evaluation.n, []):
                        sizes[evaluation.n].append(name)
        if len(sizes) == 1:
            return f"{next(iter(sizes))} test rows"
        return ", ".join(f"{n} test rows ({', '.join(names)})" for n, names in sorted(sizes.items()))


def _plainness(arm: Arm) -> tuple[bool, int, str]:
    """A variant may have fewer settings than the plain recipe, where it undoes one that all share."""
    return arm.variant != "", len(arm.settings), arm.variant


def fits(arm: Arm, *, adapter: str = "", answers: str = "", label: str = "") -> bool:
    """Whether an arm has this adapter and these answers, as far as they are asked for and it has any."""
    if not is_trained(arm.recipe):
        return True
    if (adapter and adapter_type(arm) != adapter) or (label and adapter_label(arm) != label):
        return False
    fine_tunes = SFT in (RECIPES[arm.recipe].kinds() if arm.recipe in RECIPES else ())
    return not (fine_tunes and answers) or arm.settings.get("sft.answers", "ground_truth") == answers


def answers_of(arm: Arm) -> str | None:
    """What its last supervised stage learns: ``true`` answers or ``ICL's``; None without such a stage."""
    stages = RECIPES[arm.recipe].stages if arm.recipe in RECIPES else ()
    found = [stage for stage in stages if stage in (SFT, JOINT, SOFT)]
    if not found:
        return None
    # soft labels are the teacher's by nature
    given = {
        SFT: arm.settings.get("sft.answers", "ground_truth"),
        JOINT: arm.settings.get("joint.answers", "icl_responses"),
        SOFT: "icl_responses",
    }
    return "true" if given[found[-1]] == "ground_truth" else "ICL's"


def adapter_type(arm: Arm) -> str:
    """``lora``, or what the settings say."""
    if any(name.startswith("adapter.peft") for name in arm.settings):
        return "peft"
    return str(arm.settings.get("adapter.type", "lora"))


def adapter_label(arm: Arm) -> str:
    """``r8 qko``: rank and projections of a LoRA adapter, as the paper's ablation names them."""
    rank = arm.settings.get("adapter.rank") or 8
    modules = arm.settings.get("adapter.target_modules") or ["q", "k", "o"]
    names = [str(modules)] if isinstance(modules, str) else [str(m) for m in modules]  # type: ignore[attr-defined]
    short = [re.sub(r"_proj$", "", name) for name in names]
    ordered = sorted(short, key=lambda name: ("qkvo".find(name) % 5, name))
    return f"r{rank} {('' if all(len(name) == 1 for name in short) else '+').join(ordered)}"


def _num_labels(dataset: str) -> int | None:
    """Labels of a known benchmark, of which several raw ones may share one; None for free text or unknown."""
    known = BENCHMARKS.get(dataset)
    if known is None or not known.verbalisers:
        return None
    return len(set(next(iter(known.verbalisers.values())).values()))


def span(seeds: Sequence[int]) -> str:
    """``0–4`` for neighbours, else ``0, 2, 5``."""
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]}–{seeds[-1]}"
    return ", ".join(map(str, seeds)) or "none"


def _verbalisers(tasks: Sequence[Task]) -> str:
    words: dict[str, list[str]] = {}
    for task in tasks:
        if task.verbaliser is not None and task.benchmark not in words.setdefault(task.verbaliser, []):
            words[task.verbaliser].append(task.benchmark)
    if not words:
        return "free text"
    if len(words) == 1:
        return f"verbaliser {next(iter(words))}"
    return "verbaliser " + "; ".join(f"{word} ({', '.join(names)})" for word, names in words.items())


def _shared_settings(arms: Sequence[Arm]) -> str:
    if not arms:
        return ""
    shared = dict(arms[0].settings)
    for arm in arms[1:]:
        shared = {k: v for k, v in shared.items() if arm.settings.get(k) == v}
    shared.pop("adapter.type", None)
    return ", ".join(f"{name} = {value}" for name, value in sorted(shared.items()))


def _uneven_settings(arms: Sequence[Arm]) -> str:
    """Settings that are not the same in all arms of one name."""
    values: dict[tuple[str, str], set[str]] = {}
    for arm in arms:
        for name in {key for other in arms if other.label == arm.label for key in other.settings}:
            values.setdefault((arm.label, name), set()).add(str(arm.settings.get(name)))
    return ", ".join(sorted({name for (_, name), found in values.items() if len(found) > 1}))
