"""The facts of a run that rules judge, what they ask of them, and what they find."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ia2.utils.statistics import mean_interval

Severity = Literal["problem", "warning", "note"]
Difference = Mapping[str, Any]
"""``value``, ``low`` and ``high``."""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Attributes:
        severity: ``problem`` (results are not what they seem, or the method cannot work), ``warning``
            (probably costs quality), ``note`` (good to know).
        message: one sentence.
        evidence: the figures, in words.
        advice: what to try next.
        where: recipe and rounds.
        numbers: the figures by name.
        rule: its id.
    """

    severity: Severity
    message: str
    evidence: str
    advice: str
    where: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    rule: str = ""


class CannotTell(Exception):
    """A rule cannot be judged on this run; the text says why."""


def interval_of(runs: Sequence[np.ndarray]) -> Difference | None:
    """95% over seeds, or over the rows of a single one."""
    if not runs:
        return None
    found = mean_interval(runs)
    ends = found.to_dict()
    return ends if ends["low"] is not None else dict.fromkeys(ends, ends["value"])  # one row


def in_words(difference: Difference) -> str:
    return f"{difference['value']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]"


def shown(places: Sequence[str]) -> str:
    return ", ".join(places[:3]) + (" …" if len(places) > 3 else "")


Rows = list[tuple[str, str]]  # prompt and answer


@dataclass
class StageFacts:
    """One training stage at one rate (and β) in one round, in a folder of the run; losses are (step, loss).

    A rate of its own settings counts instead of the recipe's, ``tried``.
    """

    recipes: list[str]
    kind: str
    label: str
    place: str
    tried: float
    own_rate: float | None
    chosen: bool | None  # None while none of its recipes has chosen
    finished: bool
    train: list[tuple[int, float]]
    dev: list[tuple[int, float]]
    diverged: int | None

    @property
    def rate(self) -> float:
        """What it is trained at."""
        return self.tried if self.own_rate is None else self.own_rate

    def at(self, *factors: float) -> str:
        """The option that gives it other rates: ``--learning-rates 0.01``."""
        if self.own_rate is not None:  # one only
            return f"--{self.kind}-learning-rate {self.rate * factors[-1]:g}"
        return f"--learning-rates {' '.join(f'{self.rate * factor:g}' for factor in factors)}"


Hits = list[tuple[StageFacts, dict[str, float]]]


@dataclass
class AnswerFacts:
    """One recipe's answers in one round, to ``n`` rows of ``test`` or, without such, of ``dev``.

    ``correct``, ``[n]``, and its mean are where only answers compete: ``scope`` is ``labels``, or ``answer``
    of free text. ``rows`` are the predictions; ``asim`` is of the first queries, or one number of all.
    """

    part: str
    n: int
    scope: str
    accuracy: float | None
    correct: np.ndarray | None
    rows: list[dict[str, Any]]
    asim: np.ndarray | None
    rate: float | None
    beta: float | None


@dataclass
class RoundFacts:
    """A training set, of a seed or a fold of one, and what came of it; a training run has exactly one.

    ``answers`` are by recipe, ``teacher`` has its answer to each training row; rows are None where unknown.
    """

    seed: int
    place: str
    stages: list[StageFacts]
    answers: dict[str, AnswerFacts]
    teacher: list[str]
    train: Rows | None
    dev: Rows | None


@dataclass
class RecipeFacts:
    """A recipe with its settings, ``ia2-sft@dora``, and its entry of ``compare.json``, if that is there.

    ``stages`` are kinds, empty without training; ``candidates`` counts rates times β.
    """

    name: str
    recipe: str
    variant: str
    stages: list[str]
    rates: list[float]
    candidates: int
    summary: Mapping[str, Any]


@dataclass
class Facts:
    """One run, as far as it has come; it has when nothing is ``missing``. None is what is not known (yet).

    ``labels`` are verbatim, with spaces; ``label_tokens`` counts the tokens of each; ``single_token``: each
    answer is one; ``no_rows``: why the training rows could not be drawn again; ``advice``: what the run said
    of labels and prompts when it began, each with its evidence and way out.
    """

    folder: Path
    kind: str
    missing: list[str]
    recipes: list[RecipeFacts]
    rounds: list[RoundFacts]
    labelled: bool | None
    labels: list[str]
    label_tokens: list[int]
    single_token: bool | None
    num_dev: int | None
    differences: Mapping[str, Any]
    no_rows: str | None
    advice: list[tuple[str, str, str]] | None

    def answers(self, name: str) -> list[AnswerFacts]:
        """Of one recipe, in all rounds that have come to it."""
        return [each.answers[name] for each in self.rounds if name in each.answers]

    def not_yet(self, what: str) -> CannotTell:
        return CannotTell(f"{what}: {'the run has not come to it' if self.missing else 'not there'}")

    def need_labels(self) -> None:
        if not self.labelled:
            free = "answers are free text, not labels"
            raise CannotTell("nothing tells yet what the answers are" if self.labelled is None else free)

    def need_recipes(self, *recipes: str) -> None:
        if self.kind == "train":
            raise CannotTell("a training run has one recipe; ia2 compare sets them side by side")
        there = {each.recipe for each in self.recipes}
        if lacking := [recipe for recipe in recipes if recipe not in there]:
            raise CannotTell(f"the recipe {' and '.join(lacking)} is not in the comparison")

    @property
    def trained(self) -> list[RecipeFacts]:
        return [each for each in self.recipes if each.stages]

    def find(self, recipe: str, variant: str = "") -> RecipeFacts | None:
        """With this variant, or with one that is part of it (``sft@dora`` beside ``dora-kl``)."""
        fitting = [
            each
            for each in self.recipes
            if each.recipe == recipe
            and (not each.stages or each.variant in ("", variant) or variant.startswith(f"{each.variant}-"))
        ]
        return max(fitting, key=lambda each: len(each.variant), default=None)

    def pairs(self, recipe: str, rival: str) -> Iterator[tuple[RecipeFacts, RecipeFacts]]:
        """Each variant of a recipe with the rival that has the same adapter."""
        for each in self.recipes:
            other = self.find(rival, each.variant)
            if each.recipe == recipe and other is not None:
                yield each, other

    @property
    def scope(self) -> str:
        """Where only the answers compete: the label set, or the whole answer of free text."""
        return "answer" if self.labelled is False else "labels"

    def mean_accuracy(self, recipe: RecipeFacts) -> float | None:
        """Accuracy over all rounds, each weighed by its rows; of the summary where only that is there."""
        parts = [(a.accuracy, a.n) for a in self.answers(recipe.name) if a.accuracy is not None]
        if parts:
            return float(np.average([mean for mean, _ in parts], weights=[n for _, n in parts]))
        value = recipe.summary.get("metrics", {}).get(self.scope, {}).get("accuracy", {}).get("value")
        return None if value is None else float(value)

    def mean_asim(self, recipe: RecipeFacts) -> float | None:
        parts = [float(a.asim.mean()) for a in self.answers(recipe.name) if a.asim is not None]
        return float(np.mean(parts)) if parts else (recipe.summary.get("asim") or {}).get("value")

    def columns(self, names: Sequence[str], column: str) -> list[list[np.ndarray]]:
        """Of each seed a column of each recipe's answers, paired; only of rounds in which all have it."""
        by_seed: dict[int, list[list[np.ndarray]]] = {}
        for each in self.rounds:
            taken = [getattr(each.answers[name], column) for name in names if name in each.answers]
            there = [values for values in taken if values is not None]
            if len(there) == len(names) and len({len(values) for values in there}) == 1:
                by_seed.setdefault(each.seed, []).append(there)
        return [[np.concatenate(parts) for parts in zip(*rounds, strict=True)] for rounds in by_seed.values()]

    def difference(self, a: RecipeFacts, b: RecipeFacts, column: str) -> Difference | None:
        """Paired by row and seed."""
        return interval_of([first - second for first, second in self.columns((a.name, b.name), column)])

    def asim_difference(self, a: RecipeFacts, b: RecipeFacts) -> tuple[Difference, str] | None:
        """asim of ``a`` less that of ``b``: paired over queries, or from the summary's two intervals."""
        if paired := self.difference(a, b, "asim"):
            return paired, "paired by query"
        one, two = a.summary.get("asim"), b.summary.get("asim")
        if not one or not two or one["value"] is None or two["value"] is None:
            return None
        value = one["value"] - two["value"]
        if None in (one["low"], one["high"], two["low"], two["high"]):
            return {"value": value, "low": value, "high": value}, "from the summary"
        # as if independent: wider than the paired one
        down = math.hypot(one["value"] - one["low"], two["high"] - two["value"])
        up = math.hypot(one["high"] - one["value"], two["value"] - two["low"])
        return {"value": value, "low": value - down, "high": value + up}, "from the summary, unpaired"

    def where(self, name: str) -> str:
        """A recipe and the seeds it was run with."""
        seeds = sorted({each.seed for each in self.rounds})
        if self.kind == "train" or not seeds:
            return name
        return f"{name}, {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"

    def guessing(self, recipe: RecipeFacts) -> float:
        """Accuracy of always giving the most frequent label, at least 1 / labels; 0 for free text."""
        rows = [row for answers in self.answers(recipe.name) for row in answers.rows]
        gold = Counter(str(row["gold"]) for row in rows)
        if self.labelled is False or not (gold or self.labels):
            return 0.0
        count = len(self.labels) or max((len(row.get("labels", ())) for row in rows), default=0)
        return max(max(gold.values(), default=0) / max(1, gold.total()), 1 / max(1, count))

    def stage_hits(
        self, kinds: Sequence[str], doing: str, test: Callable[[StageFacts], dict[str, float] | None]
    ) -> list[tuple[str, Hits, int]]:
        """Recipes' stages for which a test gives figures: where, the hits, and of how many.

        Stages at rates that were tried and not chosen are left out; until one is chosen, all count.
        """
        if not {kind for each in self.recipes for kind in each.stages} & set(kinds):
            raise CannotTell(f"nothing is {doing} here")
        stages = [stage for each in self.rounds for stage in each.stages if stage.kind in kinds]
        if not any(stage.train or stage.dev or stage.diverged is not None for stage in stages):
            gone = "no stage.json" if self.rounds else "only its summary is there"
            raise CannotTell("no stage has logged a loss yet" if self.missing else gone)
        groups: dict[str, list[StageFacts]] = {}
        for stage in stages:
            if stage.chosen is not False:
                groups.setdefault(f"{', '.join(stage.recipes)}, stage {stage.label}", []).append(stage)
        found = []
        for name, members in groups.items():
            hits = [(stage, figures) for stage in members if (figures := test(stage)) is not None]
            if hits:
                of = f"{len(hits)} of {len(members)}: " if len(members) > 1 else ""
                found.append(
                    (f"{name} ({of}{shown([stage.place for stage, _ in hits])})", hits, len(members))
                )
        return found


Rule = Callable[[Facts], Iterable[Finding]]
