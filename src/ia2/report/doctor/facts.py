"""What a run folder tells, as :mod:`ia2.report.doctor.reading` finds it: stages, evaluations, answers, rows.

Whatever is not there (yet) is absent, and ``Facts.missing`` says what a running run still lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ia2.config import AdaptConfig, CompareConfig, TrainConfig
from ia2.config.recipes import RECIPES, is_trained

Rows = tuple[tuple[str, str], ...]
"""Prompt and answer of each row."""


@dataclass(frozen=True)
class Stage:
    """One training stage at one rate (and β) in one round.

    Attributes:
        arms: recipes that it is part of.
        kind: ``align``, ``sft``, ``joint`` or ``soft``.
        label: its kind, with a digest where a schedule changes it.
        place: its folder, relative to the run.
        tried: the rate of the recipe (a stage may have its own).
        beta: of the joint stage.
        chosen: whether a finished recipe kept it; None while no recipe has chosen.
        finished: whether it ended.
        train: (step, loss) as logged: the mean since the last entry.
        dev: (step, loss).
        diverged: steps after which it did; None: it did not.
        own_rate: that of its settings, which counts instead of the recipe's; None without.
    """

    arms: tuple[str, ...]
    kind: str
    label: str
    place: str
    tried: float
    beta: float | None
    chosen: bool | None
    finished: bool
    train: tuple[tuple[int, float], ...] = field(repr=False)
    dev: tuple[tuple[int, float], ...] = field(repr=False)
    diverged: int | None = None
    own_rate: float | None = None

    @property
    def rate(self) -> float:
        """What it is trained at."""
        return self.tried if self.own_rate is None else self.own_rate

    def at(self, *factors: float) -> str:
        """The option that gives it other rates: ``--learning-rates 0.01``."""
        if self.own_rate is not None:  # one only
            return f"--{self.kind}-learning-rate {self.rate * factors[-1]:g}"
        return f"--learning-rates {' '.join(f'{self.rate * factor:g}' for factor in factors)}"


@dataclass(frozen=True)
class Evaluation:
    """One recipe's answers in one round.

    Attributes:
        part: ``test``, or ``dev`` where a training run had no test rows.
        places: of the rows in the data, ``[n]``.
        correct: scope → ``[n]``; ``vocabulary`` and ``labels``, or ``vocabulary`` and ``answer``.
        means: scope → metric → mean over the rows.
        queries, gold: of the rows, as users call the answers; empty where they were not kept.
        label_names: what users call the labels; empty for free text.
        asim: mean over layers for each of the first queries, ``[m]``; None where it was not measured.
        mean_asim: over all of them.
        rate, beta: chosen.
    """

    part: str
    places: tuple[int, ...]
    correct: Mapping[str, np.ndarray]
    means: Mapping[str, Mapping[str, float]]
    queries: tuple[str, ...] = ()
    gold: tuple[str, ...] = ()
    label_names: tuple[str, ...] = ()
    asim: np.ndarray | None = None
    mean_asim: float | None = None
    rate: float | None = None
    beta: float | None = None


@dataclass(frozen=True)
class Round:
    """One training set: a seed, or a fold of one; a training run has exactly one.

    Attributes:
        seed: of the draw.
        fold: None with test data.
        place: its folder, relative to the run.
        stages: in the order of the recipes, each once.
        evaluations: by recipe.
        teacher: text of the teacher's answer to each training example.
        train, dev: the rows; None where they could not be read again.
    """

    seed: int
    fold: int | None
    place: str
    stages: tuple[Stage, ...]
    evaluations: Mapping[str, Evaluation]
    teacher: tuple[str, ...] = ()
    train: Rows | None = None
    dev: Rows | None = None


@dataclass(frozen=True)
class ArmFacts:
    """What is compared: a recipe with its settings.

    Attributes:
        name: as in the table, ``ia2-sft@dora``.
        recipe, variant: its parts.
        stages: kinds, in order; empty without training.
        config: settings; None where another version of ia2 wrote them.
        rates: tried; empty without training.
        summary: its entry of ``compare.json``; empty while the comparison runs.
    """

    name: str
    recipe: str
    variant: str
    stages: tuple[str, ...]
    config: AdaptConfig | None
    rates: tuple[float, ...]
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class Facts:
    """One run, as far as it has come.

    Attributes:
        folder: as it was given.
        kind: ``train`` or ``compare``.
        finished: whether it has come to its end.
        missing: what is still to come, in words.
        config: settings; None where another version of ia2 wrote them.
        labelled: whether answers are labels; None while that is not known.
        labels: answers verbatim, with their spaces; empty for free text, or while they are not known.
        label_tokens: of each label; empty where it is not known.
        single_token: whether every answer is one token; None while that is not known.
        num_dev: of a round (the first); None while it is not known.
        arms: recipes.
        rounds: that have begun.
        differences: the method less the others, paired, of ``compare.json``.
        no_rows: why the training rows could not be read again; None where they were.
        advice: what was said of labels, prompts and answers when the run began: what, evidence, way out; None
            while the run has not recorded it.
    """

    folder: Path
    kind: str
    finished: bool
    missing: tuple[str, ...]
    config: TrainConfig | CompareConfig | None
    labelled: bool | None
    labels: tuple[str, ...]
    label_tokens: tuple[int, ...]
    single_token: bool | None
    num_dev: int | None
    arms: tuple[ArmFacts, ...]
    rounds: tuple[Round, ...]
    differences: Mapping[str, Any]
    no_rows: str | None
    advice: tuple[tuple[str, str, str], ...] | None = None

    @property
    def scope(self) -> str:
        """Where only the answers compete: the label set, or the whole answer of free text."""
        return "answer" if self.labelled is False else "labels"

    def arm(self, recipe: str, variant: str = "") -> ArmFacts | None:
        """The recipe with this variant, or with one that is part of it (``sft@dora`` beside ``dora-kl``)."""
        found = [
            a
            for a in self.arms
            if a.recipe == recipe
            and (a.variant in ("", variant) or variant.startswith(f"{a.variant}-") or is_bare(a.recipe))
        ]
        return max(found, key=lambda a: len(a.variant), default=None)

    def evaluations(self, name: str) -> list[Evaluation]:
        """Of one recipe, in all rounds that have come to it."""
        return [r.evaluations[name] for r in self.rounds if name in r.evaluations]

    def mean(self, arm: ArmFacts, scope: str, metric: str) -> float | None:
        """A metric over all rounds, each weighed by its rows; of the summary where only that is there."""
        parts = [
            (e.means[scope][metric], len(e.places))
            for e in self.evaluations(arm.name)
            if metric in e.means.get(scope, {})
        ]
        if parts:
            return float(np.average([p[0] for p in parts], weights=[p[1] for p in parts]))
        value = arm.summary.get("metrics", {}).get(scope, {}).get(metric, {}).get("value")
        return None if value is None else float(value)

    def mean_asim(self, arm: ArmFacts) -> float | None:
        """Similarity to ICL over all rounds; of the summary where only that is there."""
        parts = [e.mean_asim for e in self.evaluations(arm.name) if e.mean_asim is not None]
        if parts:
            return float(np.mean(parts))
        value = (arm.summary.get("asim") or {}).get("value")
        return None if value is None else float(value)

    def columns(
        self, names: Sequence[str], take: Callable[[Evaluation], np.ndarray | None]
    ) -> list[list[np.ndarray]]:
        """For each seed a column for each recipe, rows in the data's order, paired.

        Only rounds in which all of the recipes have the column; seeds without any are left out.

        Args:
            names: of recipes.
            take: the column of an evaluation: of all its rows, or of the first so many.
        """
        seeds: dict[int, list[tuple[tuple[int, ...], list[np.ndarray]]]] = {}
        for current in self.rounds:
            every = [current.evaluations.get(name) for name in names]
            found = [take(e) for e in every if e is not None]
            taken = [column for column in found if column is not None]
            if len(taken) < len(names) or len({len(column) for column in taken}) > 1:
                continue
            places = current.evaluations[names[0]].places[: len(taken[0])]
            seeds.setdefault(current.seed, []).append((places, taken))
        runs = []
        for parts in seeds.values():
            order = np.argsort(np.concatenate([places for places, _ in parts]), kind="stable")
            runs.append([np.concatenate([taken[i] for _, taken in parts])[order] for i in range(len(names))])
        return runs


def is_bare(recipe: str) -> bool:
    """Whether a recipe trains nothing."""
    return recipe in RECIPES and not is_trained(recipe)
