"""Findings of the doctor, and what its rules ask of a run's facts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ia2.report.doctor.reading import Facts, RecipeFacts, StageFacts
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


Rule = Callable[[Facts], Iterable[Finding]]


# ------------------------------------------------------------------------------- what rules share


def not_yet(facts: Facts, what: str) -> CannotTell:
    return CannotTell(f"{what}: {'the run has not come to it' if facts.missing else 'not there'}")


def need_labels(facts: Facts) -> None:
    if not facts.labelled:
        free = "answers are free text, not labels"
        raise CannotTell("nothing tells yet what the answers are" if facts.labelled is None else free)


def need_recipes(facts: Facts, *recipes: str) -> None:
    if facts.kind == "train":
        raise CannotTell("a training run has one recipe; ia2 compare sets them side by side")
    there = {each.recipe for each in facts.recipes}
    if lacking := [recipe for recipe in recipes if recipe not in there]:
        raise CannotTell(f"the recipe {' and '.join(lacking)} is not in the comparison")


def trained(facts: Facts) -> list[RecipeFacts]:
    return [each for each in facts.recipes if each.stages]


def find_recipe(facts: Facts, recipe: str, variant: str = "") -> RecipeFacts | None:
    """With this variant, or with one that is part of it (``sft@dora`` beside ``dora-kl``)."""
    fitting = [
        each
        for each in facts.recipes
        if each.recipe == recipe
        and (not each.stages or each.variant in ("", variant) or variant.startswith(f"{each.variant}-"))
    ]
    return max(fitting, key=lambda each: len(each.variant), default=None)


def pairs_of(facts: Facts, recipe: str, rival: str) -> Iterator[tuple[RecipeFacts, RecipeFacts]]:
    """Each variant of a recipe with the rival that has the same adapter."""
    for each in facts.recipes:
        other = find_recipe(facts, rival, each.variant)
        if each.recipe == recipe and other is not None:
            yield each, other


def scope_of(facts: Facts) -> str:
    """Where only the answers compete: the label set, or the whole answer of free text."""
    return "answer" if facts.labelled is False else "labels"


def mean_accuracy(facts: Facts, recipe: RecipeFacts) -> float | None:
    """Accuracy over all rounds, each weighed by its rows; of the summary where only that is there."""
    parts = [(a.accuracy, a.n) for a in facts.answers(recipe.name) if a.accuracy is not None]
    if parts:
        return float(np.average([mean for mean, _ in parts], weights=[n for _, n in parts]))
    value = recipe.summary.get("metrics", {}).get(scope_of(facts), {}).get("accuracy", {}).get("value")
    return None if value is None else float(value)


def mean_asim(facts: Facts, recipe: RecipeFacts) -> float | None:
    parts = [float(a.asim.mean()) for a in facts.answers(recipe.name) if a.asim is not None]
    return float(np.mean(parts)) if parts else (recipe.summary.get("asim") or {}).get("value")


def interval_of(runs: Sequence[np.ndarray]) -> Difference | None:
    """95% over seeds, or over the rows of a single one."""
    if not runs:
        return None
    found = mean_interval(runs)
    ends = found.to_dict()
    return ends if ends["low"] is not None else dict.fromkeys(ends, ends["value"])  # one row


def columns(facts: Facts, names: Sequence[str], column: str) -> list[list[np.ndarray]]:
    """For each seed a column of each recipe's answers, rows paired; only of rounds in which all have it."""
    by_seed: dict[int, list[list[np.ndarray]]] = {}
    for each in facts.rounds:
        taken = [getattr(each.answers[name], column) for name in names if name in each.answers]
        there = [values for values in taken if values is not None]
        if len(there) == len(names) and len({len(values) for values in there}) == 1:
            by_seed.setdefault(each.seed, []).append(there)
    return [[np.concatenate(parts) for parts in zip(*rounds, strict=True)] for rounds in by_seed.values()]


def difference_of(facts: Facts, a: RecipeFacts, b: RecipeFacts, column: str) -> Difference | None:
    """Paired by row and seed."""
    return interval_of([first - second for first, second in columns(facts, (a.name, b.name), column)])


def asim_less(facts: Facts, a: RecipeFacts, b: RecipeFacts) -> tuple[Difference, str] | None:
    """asim of ``a`` less that of ``b``: paired over queries, or from the summary's two intervals."""
    if paired := difference_of(facts, a, b, "asim"):
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


def in_words(difference: Difference) -> str:
    return f"{difference['value']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]"


def where_of(facts: Facts, name: str) -> str:
    """A recipe and the seeds it was run with."""
    seeds = sorted({each.seed for each in facts.rounds})
    if facts.kind == "train" or not seeds:
        return name
    return f"{name}, {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"


def guessing(facts: Facts, recipe: RecipeFacts) -> float:
    """Accuracy of always giving the most frequent label; at least one over their number. 0 for free text."""
    rows = [row for answers in facts.answers(recipe.name) for row in answers.rows]
    gold = Counter(str(row["gold"]) for row in rows)
    if facts.labelled is False or not (gold or facts.labels):
        return 0.0
    count = len(facts.labels) or max((len(row.get("labels", ())) for row in rows), default=0)
    return max(max(gold.values(), default=0) / max(1, gold.total()), 1 / max(1, count))


Hits = list[tuple[StageFacts, dict[str, float]]]


def stage_hits(
    facts: Facts, kinds: Sequence[str], doing: str, test: Callable[[StageFacts], dict[str, float] | None]
) -> list[tuple[str, Hits, int]]:
    """Recipes' stages for which a test gives figures: where, the hits, and of how many.

    Stages at rates that were tried and not chosen are left out; until one is chosen, all count.
    """
    if not {kind for each in facts.recipes for kind in each.stages} & set(kinds):
        raise CannotTell(f"nothing is {doing} here")
    stages = [stage for each in facts.rounds for stage in each.stages if stage.kind in kinds]
    if not any(stage.train or stage.dev or stage.diverged is not None for stage in stages):
        gone = "no stage.json" if facts.rounds else "only its summary is there"
        raise CannotTell("no stage has logged a loss yet" if facts.missing else gone)
    groups: dict[str, list[StageFacts]] = {}
    for stage in stages:
        if stage.chosen is not False:
            groups.setdefault(f"{', '.join(stage.recipes)}, stage {stage.label}", []).append(stage)
    found = []
    for name, members in groups.items():
        hits = [(stage, figures) for stage in members if (figures := test(stage)) is not None]
        if hits:
            of = f"{len(hits)} of {len(members)}: " if len(members) > 1 else ""
            found.append((f"{name} ({of}{shown([stage.place for stage, _ in hits])})", hits, len(members)))
    return found


def shown(places: Sequence[str]) -> str:
    return ", ".join(places[:3]) + (" …" if len(places) > 3 else "")
