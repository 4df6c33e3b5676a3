"""Rules on the teacher and on training."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import numpy as np

from ia2.report.doctor.facts import CannotTell, Facts, Finding, Rule, StageFacts, interval_of, shown

# Thresholds, as in docs/doctor.md.
CHANCE_ROWS = 16  # with fewer rows nobody can be told from chance, and only a figure at it counts
LOSS_FALL = 0.1  # share of the first logged alignment loss that must go
DEV_TO_SELECT, DEV_TO_STOP = 8, 4  # dev rows: to choose among rates, to stop by


# ------------------------------------------------------------------------------------- the teacher


def icl_at_chance(facts: Facts) -> Iterable[Finding]:
    """ICL is no better than guessing: there is nothing to align with (METHOD, section 5)."""
    icl = facts.find("icl")
    mean = None if icl is None else facts.mean_accuracy(icl)
    if icl is None or mean is None:
        value, chance, n, low = _teacher_score(facts)
        where = "teacher"
    else:
        value, where = mean, "icl"
        runs = [run[0] for run in facts.columns([icl.name], "correct")]
        if interval := interval_of(runs):
            chance, n, low = facts.guessing(icl), len(runs[0]), interval["low"]
        else:
            metrics = icl.summary["metrics"]
            chance, n = 1 / len(facts.labels) if facts.labels else 0.0, int(metrics["n"])
            low = metrics[facts.scope]["accuracy"]["low"]
            low = value if low is None else low
    # free text is never guessed: there only no right answer at all is chance
    if value <= chance or (n >= CHANCE_ROWS and chance > 0 and low <= chance):
        evidence = f"{'ICL' if where == 'icl' else 'The teacher'} is right on {value:.0%} of {n} rows"
        if chance:
            evidence += f" (95% interval from {low:.3f}), always the most frequent label on {chance:.0%}"
        yield Finding(
            "problem",
            "In-context learning is no better than chance, so its activations hold nothing to align with.",
            evidence,
            "ia2 probe before any training; label words that the model can read (--label-map), more "
            "demonstrations (--num-examples), or a stronger model (--model)",
            facts.where(where),
            {"accuracy": value, "chance": chance, "rows": n, "low": low},
        )


def _teacher_score(facts: Facts) -> tuple[float, float, int, float]:
    """Of the teacher's own answers to the training rows: accuracy, chance, rows, low end."""
    rounds = [each for each in facts.rounds if each.teacher]
    if not rounds:
        raise CannotTell("neither the recipe icl nor a teacher pass is in the run")
    if all(each.train is None for each in rounds):
        raise CannotTell(
            f"ICL was not evaluated, and what the teacher should answer is not known: {facts.no_rows}"
        )
    facts.need_labels()
    right, guesses = [], []
    for each in rounds:
        answers = [answer.strip() for _, answer in each.train or ()]
        frequent = Counter(answers).most_common(1)[0][0]
        known = {label.strip() for label in facts.labels} | set(answers)
        for text, answer in zip(map(str.strip, each.teacher), answers, strict=False):
            exact = facts.single_token is True
            said = [label for label in known if text == label or (not exact and text.startswith(label))]
            # one label may begin another
            right.append(float(max(said, key=len, default="") == answer))
            guesses.append(float(answer == frequent))
    interval = interval_of([np.array(right)])
    assert interval is not None
    return interval["value"], float(np.mean(guesses)), len(rounds[0].teacher), interval["low"]


# ---------------------------------------------------------------------------------------- training


def diverged(facts: Facts) -> Iterable[Finding]:
    """A loss that is not a number."""

    def test(stage: StageFacts) -> dict[str, float] | None:
        bad = [step for step, loss in (*stage.train, *stage.dev) if not math.isfinite(loss)]
        if stage.diverged is None and not bad:
            return None
        return {"step": min(bad) if stage.diverged is None else stage.diverged, "loss": float("nan")}

    for where, hits, _ in facts.stage_hits(("align", "sft", "joint", "soft"), "trained", test):
        stage, figures = hits[0]
        yield Finding(
            "problem",
            "Training diverged.",
            f"at rate {stage.rate:g} the loss is not finite after step {figures['step']:.0f}",
            f"a tenth of the rate ({stage.at(0.1)}), or --dtype float32 where it is float16",
            where,
            {"rate": stage.rate, **figures},
        )
    stages = [stage for each in facts.rounds for stage in each.stages]
    if others := [stage for stage in stages if stage.chosen is False and stage.diverged is not None]:
        rates = ", ".join(dict.fromkeys(f"{stage.tried:g}" for stage in others))
        yield Finding(
            "note",
            "A learning rate that was tried diverged; another was chosen.",
            f"at {rates} the loss is not finite",
            f"leave {rates} out of --learning-rates",
            shown([stage.place for stage in others]),
            {"stages": len(others)},
        )


def alignment_not_learnt(facts: Facts) -> Iterable[Finding]:
    """The alignment loss hardly fell."""
    seen: list[StageFacts] = []

    def test(stage: StageFacts) -> dict[str, float] | None:
        if len(stage.train) < 2 or not all(math.isfinite(loss) for _, loss in stage.train):
            return None
        seen.append(stage)
        first, lowest = stage.train[0][1], min(loss for _, loss in stage.train[1:])
        fall = 1 - lowest / first if first > 0 else 0.0
        return {"first": first, "lowest": lowest, "fall": fall} if fall < LOSS_FALL else None

    for where, hits, total in facts.stage_hits(("align",), "aligned", test):
        stage, figures = min(hits, key=lambda hit: hit[1]["fall"])
        fall = f"{abs(figures['fall']):.0%} {'less' if figures['fall'] >= 0 else 'more'}"
        yield Finding(
            "problem" if 2 * len(hits) >= total else "note",
            "The alignment loss did not fall: the adapter has not come nearer to the activations of ICL.",
            f"{figures['first']:.4g} in the first steps, {figures['lowest']:.4g} at its lowest ({fall}) "
            f"after {stage.train[-1][0]} steps at rate {stage.rate:g}",
            f"higher rates ({stage.at(1, 3, 10)}), more --align-epochs, a larger --adapter-rank or more "
            "--adapter-target-modules",
            where,
            {"rate": stage.rate, **figures},
        )
    if not seen:
        raise CannotTell("the alignment stage has logged fewer than two losses")


def rate_at_edge(facts: Facts) -> Iterable[Finding]:
    """The chosen rate is the lowest or highest of those tried."""
    several = [each for each in facts.trained if len(each.rates) > 2]
    if not several:
        raise CannotTell("fewer than three rates were tried")
    seen = False
    for recipe in several:
        chosen = [a.rate for a in facts.answers(recipe.name)] or recipe.summary.get("learning_rates") or []
        rates = [rate for rate in chosen if rate is not None]
        seen = seen or bool(rates)
        for edge, more in ((min(recipe.rates), 1 / 3), (max(recipe.rates), 3)):
            times = rates.count(edge)
            if 2 * times > len(rates):
                wider = " ".join(f"{rate:.2g}" for rate in sorted([*recipe.rates, edge * more]))
                yield Finding(
                    "warning",
                    "The chosen learning rate lies at the edge of those tried; a better one may lie beyond.",
                    f"{edge:g} of {', '.join(f'{rate:g}' for rate in recipe.rates)} was chosen in {times} of "
                    f"{len(rates)} rounds",
                    f"one more rate: --learning-rates {wider}",
                    facts.where(recipe.name),
                    {"chosen": edge, "times": times, "rounds": len(rates)},
                )
    if not seen:
        raise facts.not_yet("the choice of a rate")


def dev_too_small(facts: Facts) -> Iterable[Finding]:
    """Too few dev rows for what they decide."""
    if not facts.trained:
        raise CannotTell("nothing is trained here")
    if (n := facts.num_dev) is None:
        raise facts.not_yet("the number of dev rows")
    candidates = max(each.candidates for each in facts.trained)
    advice = "more labelled rows (half of --num-examples come on top as dev), or no choice: a single rate"
    if n == 0:
        message = "There are no dev rows: no early stopping, no choice of rate, no temperature scaling."
        evidence = "0 dev rows"
        advice = "more labelled rows; or few --align-epochs and --sft-epochs, and one rate"
    elif candidates > 1 and n < DEV_TO_SELECT:
        message = "The dev set is too small to choose by: chance decides."
        evidence = f"{n} dev rows choose among {candidates} rates (or β); {DEV_TO_SELECT} are the least"
    elif n < DEV_TO_STOP:
        message = "The dev set is too small to stop by: the best step is found by chance."
        evidence = f"{n} dev rows; {DEV_TO_STOP} are the least"
    else:
        return
    yield Finding("warning", message, evidence, advice, numbers={"dev": n, "candidates": candidates})


RULES: tuple[Rule, ...] = (
    icl_at_chance,
    diverged,
    alignment_not_learnt,
    rate_at_edge,
    dev_too_small,
)
