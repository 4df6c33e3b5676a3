"""Findings, and what the rules of :mod:`ia2.report.doctor.signatures` have in common."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ia2.config.recipes import ALIGN, JOINT, SFT
from ia2.report.doctor.facts import ArmFacts, Evaluation, Facts, Stage

Severity = Literal["problem", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("problem", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Attributes:
        rule: its id.
        severity: ``problem`` (results are not what they seem, or the method cannot work), ``warning``
            (probably costs quality), ``note`` (good to know).
        message: one sentence.
        evidence: the figures, in words.
        advice: what to try next.
        where: recipe and rounds.
        numbers: the figures by name.
    """

    rule: str
    severity: Severity
    message: str
    evidence: str
    advice: str
    where: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)


class CannotTell(Exception):
    """A rule cannot be judged on this run; the text says why."""


# ------------------------------------------------------------------------------------- what rules share


def percent(value: float) -> str:
    return f"{value:.0%}"


def range_text(interval: Mapping[str, Any]) -> str:
    return f"[{interval['low']:+.3f}, {interval['high']:+.3f}]"


def difference_interval(runs: list[list[np.ndarray]]) -> dict[str, float] | None:
    """Mean of the first column less the second (if any), 95% over seeds, or over the rows of a single one."""
    from ia2.utils.statistics import mean_interval

    if not runs:
        return None
    found = mean_interval([run[0] - run[1] if len(run) > 1 else run[0] for run in runs])
    value = float(found.value)
    if found.units < 2:  # one row
        return {"value": value, "low": value, "high": value}
    return {"value": value, "low": float(found.low), "high": float(found.high)}


def correct_in(scope: str) -> Callable[[Evaluation], np.ndarray | None]:
    """Takes the column of right answers, for :meth:`Facts.columns`."""
    return lambda evaluation: evaluation.correct.get(scope)


def accuracy_difference(facts: Facts, a: ArmFacts, b: ArmFacts) -> dict[str, float] | None:
    """Accuracy where only answers compete, paired by row and seed."""
    return difference_interval(facts.columns((a.name, b.name), correct_in(facts.scope)))


def asim_difference(facts: Facts, a: ArmFacts, b: ArmFacts) -> tuple[dict[str, float], str] | None:
    """asim of ``a`` less that of ``b``: paired over queries, or from the summary's two intervals."""
    if paired := difference_interval(facts.columns((a.name, b.name), lambda evaluation: evaluation.asim)):
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


def trained_arms(facts: Facts) -> list[ArmFacts]:
    """Recipes that train something."""
    return [arm for arm in facts.arms if arm.stages]


def need_recipes(facts: Facts, *recipes: str) -> None:
    """Refuse training runs and comparisons without these recipes."""
    if facts.kind == "train":
        raise CannotTell("a training run has one recipe; ia2 compare sets them side by side")
    if missing := [recipe for recipe in recipes if not any(arm.recipe == recipe for arm in facts.arms)]:
        raise CannotTell(f"the recipe {' and '.join(missing)} is not in the comparison")


def need_labels(facts: Facts) -> None:
    """Refuse free text, and runs that do not tell yet."""
    if facts.labelled is False:
        raise CannotTell("answers are free text, not labels")
    if facts.labelled is None:
        raise CannotTell("nothing tells yet what the answers are")


def not_yet(facts: Facts, what: str) -> CannotTell:
    """What to raise where something is not there."""
    return CannotTell(f"{what}: {'not there' if facts.finished else 'the run has not come to it'}")


def _rounds(facts: Facts) -> str:
    seeds = sorted({current.seed for current in facts.rounds})
    if facts.kind == "train" or not seeds:
        return ""
    what = "seed" if len(seeds) == 1 else "seeds"
    return f"{what} {', '.join(map(str, seeds))}"


def place_of(facts: Facts, name: str) -> str:
    """A recipe and the seeds it was run with."""
    return ", ".join(part for part in (name, _rounds(facts)) if part)


Hits = list[tuple[Stage, dict[str, float]]]


def stage_hits(
    facts: Facts, kinds: Iterable[str], test: Callable[[Stage], dict[str, float] | None]
) -> Iterable[tuple[str, Hits, int]]:
    """Recipes' stages for which a test gives figures: where, the hits, and of how many.

    Stages at rates that were tried and not chosen are left out; until one is chosen, all count.
    """
    groups: dict[tuple[tuple[str, ...], str], list[Stage]] = {}
    for current in facts.rounds:
        for stage in current.stages:
            if stage.kind in kinds and stage.chosen is not False:
                groups.setdefault((stage.arms, stage.label), []).append(stage)
    for (arms, label), stages in groups.items():
        hits = [(stage, figures) for stage in stages if (figures := test(stage)) is not None]
        if hits:
            of = f"{len(hits)} of {len(stages)}: " if len(stages) > 1 else ""
            places = [stage.place for stage, _ in hits]
            shown = ", ".join(places[:3]) + (" …" if len(places) > 3 else "")
            yield f"{', '.join(arms)}, stage {label} ({of}{shown})", hits, len(stages)


def need_stage(facts: Facts, kinds: Iterable[str], what: str) -> None:
    """Refuse runs in which no such stage has logged anything."""
    planned = {kind for arm in facts.arms for kind in arm.stages}
    if not planned & set(kinds):
        raise CannotTell(f"nothing is {what} here")
    stages = [s for current in facts.rounds for s in current.stages if s.kind in kinds]
    if not any(stage.train or stage.dev or stage.diverged is not None for stage in stages):
        gone = "only its summary is there" if not facts.rounds else "no stage.json"
        raise CannotTell(gone if facts.finished else "no stage has logged a loss yet")


def unless_rare(severity: Severity, hits: Hits, total: int) -> Severity:
    """A note where it happens in less than half of the rounds."""
    return severity if 2 * len(hits) >= total else "note"


EVERY_STAGE = (ALIGN, SFT, JOINT, "soft")


def guessing(facts: Facts, arm: ArmFacts) -> float:
    """Accuracy of always giving the most frequent label; at least one over their number. 0 for free text."""
    evaluations = facts.evaluations(arm.name)
    gold = Counter(answer for e in evaluations for answer in e.gold)
    if facts.labelled is False or not (gold or facts.labels):
        return 0.0
    count = len(facts.labels) or max(len(e.label_names) for e in evaluations)
    return max(max(gold.values(), default=0) / max(1, gold.total()), 1 / max(1, count))
