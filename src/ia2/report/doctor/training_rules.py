"""Rules on the teacher, on training, and on the rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import numpy as np

from ia2.config.recipes import ALIGN, JOINT
from ia2.report.doctor.facts import ArmFacts, Facts, Stage
from ia2.report.doctor.findings import (
    EVERY_STAGE,
    CannotTell,
    Finding,
    correct_in,
    difference_interval,
    guessing,
    need_labels,
    need_stage,
    not_yet,
    percent,
    place_of,
    stage_hits,
    trained_arms,
    unless_rare,
)

# Thresholds, as in docs/doctor.md.
CHANCE_ROWS = 16  # with fewer rows nobody can be told from chance, and only a figure at it counts
LOSS_FALL = 0.1  # share of the first logged alignment loss that must go
DEV_TO_SELECT, DEV_TO_STOP = 8, 4  # dev rows: to choose among rates, to stop by


# ------------------------------------------------------------------------------------------- the teacher


def icl_at_chance(facts: Facts) -> Iterable[Finding]:
    """ICL is no better than guessing: there is nothing to align with (METHOD, section 5)."""
    icl = facts.arm("icl")
    measured = icl is not None and facts.mean(icl, facts.scope, "accuracy") is not None
    found = _icl_evaluated(facts, icl) if icl is not None and measured else _teacher_score(facts)
    value, chance, n, low, what = found
    # free text is never guessed: there only no right answer at all is chance
    if value <= chance or (n >= CHANCE_ROWS and chance > 0 and low <= chance):
        figures = f"{what} is right on {percent(value)} of {n} rows"
        if chance:
            figures += f" (95% interval from {low:.3f}), always the most frequent label on {percent(chance)}"
        yield Finding(
            "icl-at-chance",
            "problem",
            "In-context learning is no better than chance, so its activations hold nothing to align with.",
            figures,
            "ia2 probe before any training; label words that the model can read (--label-map), more "
            "demonstrations (--num-examples), or a stronger model (--model)",
            place_of(facts, "icl" if measured else "teacher"),
            {"accuracy": value, "chance": chance, "rows": n, "low": low},
        )


def _icl_evaluated(facts: Facts, icl: ArmFacts) -> tuple[float, float, int, float, str]:
    runs = facts.columns([icl.name], correct_in(facts.scope))
    value = facts.mean(icl, facts.scope, "accuracy")
    assert value is not None
    if not runs:
        n = int(icl.summary["metrics"]["n"])
        low = icl.summary["metrics"][facts.scope]["accuracy"]["low"]
        chance = 1 / len(facts.labels) if facts.labels else 0.0
        return value, chance, n, value if low is None else low, "ICL"
    interval = difference_interval(runs)
    assert interval is not None
    return value, guessing(facts, icl), len(runs[0][0]), interval["low"], "ICL"


def _teacher_score(facts: Facts) -> tuple[float, float, int, float, str]:
    """The teacher's own answers to the training rows, each behind the others."""
    rounds = [current for current in facts.rounds if current.teacher]
    if not rounds:
        raise CannotTell("neither the recipe icl nor a teacher pass is in the run")
    if all(current.train is None for current in rounds):
        raise CannotTell(
            f"ICL was not evaluated, and what the teacher should answer is not known: {_rows(facts)}"
        )
    need_labels(facts)
    right, guesses = [], []
    for current in rounds:
        answers = [answer for _, answer in current.train or ()]
        frequent = Counter(answers).most_common(1)[0][0]
        for text, answer in zip(current.teacher, answers, strict=False):
            # one label may begin another
            longer = [la for la in facts.labels if len(la.strip()) > len(answer.strip())]
            says_more = any(_says(text, label, facts.single_token) for label in longer)
            right.append(float(_says(text, answer, facts.single_token) and not says_more))
            guesses.append(float(answer == frequent))
    interval = difference_interval([[np.array(right)]])
    assert interval is not None
    n = len(rounds[0].teacher)
    return interval["value"], float(np.mean(guesses)), n, interval["low"], "The teacher"


def _says(text: str, label: str, single: bool | None) -> bool:
    said, wanted = text.strip(), label.strip()
    return said == wanted or (single is not True and said.startswith(wanted))


def _rows(facts: Facts) -> str:
    return facts.no_rows or "they have not been read"


# ------------------------------------------------------------------------------------------- training


def diverged(facts: Facts) -> Iterable[Finding]:
    """A loss that is not a number."""
    need_stage(facts, EVERY_STAGE, "trained")

    def test(stage: Stage) -> dict[str, float] | None:
        if stage.diverged is not None:
            return {"step": stage.diverged, "loss": float("nan")}
        losses = [*stage.train, *stage.dev]
        bad = [step for step, loss in losses if not math.isfinite(loss)]
        if bad:
            return {"step": min(bad), "loss": float("nan")}
        return None

    for where, hits, _ in stage_hits(facts, EVERY_STAGE, test):
        step, rate = hits[0][1]["step"], hits[0][0].rate
        yield Finding(
            "diverged",
            "problem",
            "Training diverged.",
            f"at rate {rate:g} the loss is not finite after step {step:.0f}",
            f"a tenth of the rate ({hits[0][0].at(0.1)}), or --dtype float32 where it is float16",
            where,
            {"rate": rate, **hits[0][1]},
        )
    every = [stage for current in facts.rounds for stage in current.stages]
    if others := [stage for stage in every if stage.chosen is False and stage.diverged is not None]:
        rates = ", ".join(dict.fromkeys(f"{stage.tried:g}" for stage in others))
        yield Finding(
            "diverged",
            "note",
            "A learning rate that was tried diverged; another was chosen.",
            f"at {rates} the loss is not finite",
            f"leave {rates} out of --learning-rates",
            ", ".join(stage.place for stage in others[:3]) + (" …" if len(others) > 3 else ""),
            {"stages": len(others)},
        )


def alignment_not_learnt(facts: Facts) -> Iterable[Finding]:
    """The alignment loss hardly fell."""
    need_stage(facts, (ALIGN,), "aligned")
    seen: list[Stage] = []

    def test(stage: Stage) -> dict[str, float] | None:
        if len(stage.train) < 2 or not all(math.isfinite(loss) for _, loss in stage.train):
            return None
        seen.append(stage)
        first, lowest = stage.train[0][1], min(loss for _, loss in stage.train[1:])
        fall = 1 - lowest / first if first > 0 else 0.0
        return {"first": first, "lowest": lowest, "fall": fall} if fall < LOSS_FALL else None

    for where, hits, total in stage_hits(facts, (ALIGN,), test):
        stage, figures = min(hits, key=lambda hit: hit[1]["fall"])
        yield Finding(
            "alignment-not-learnt",
            unless_rare("problem", hits, total),
            "The alignment loss did not fall: the adapter has not come nearer to the activations of ICL.",
            f"{figures['first']:.4g} in the first steps, {figures['lowest']:.4g} at its lowest "
            f"({abs(figures['fall']):.0%} {'less' if figures['fall'] >= 0 else 'more'}) after "
            f"{stage.train[-1][0]} steps at rate {stage.rate:g}",
            f"higher rates ({stage.at(1, 3, 10)}), "
            "more --align-epochs, a larger --adapter-rank or more --adapter-target-modules",
            where,
            {"rate": stage.rate, **figures},
        )
    if not seen:
        raise CannotTell("the alignment stage has logged fewer than two losses")


def rate_at_edge(facts: Facts) -> Iterable[Finding]:
    """The chosen rate is the lowest or highest of those tried."""
    several = [arm for arm in trained_arms(facts) if len(arm.rates) > 2]
    if not several:
        raise CannotTell("fewer than three rates were tried")
    seen = False
    for arm in several:
        chosen = [e.rate for e in facts.evaluations(arm.name)] or arm.summary.get("learning_rates") or []
        rates = [rate for rate in chosen if rate is not None]
        seen = seen or bool(rates)
        for edge, more in ((min(arm.rates), 1 / 3), (max(arm.rates), 3)):
            if rates and 2 * rates.count(edge) > len(rates):
                wider = " ".join(f"{rate:.2g}" for rate in sorted([*arm.rates, edge * more]))
                yield Finding(
                    "rate-at-edge",
                    "warning",
                    "The chosen learning rate lies at the edge of those tried; a better one may lie beyond.",
                    f"{edge:g} of {', '.join(f'{rate:g}' for rate in arm.rates)} was chosen in "
                    f"{rates.count(edge)} of {len(rates)} rounds",
                    f"one more rate: --learning-rates {wider}",
                    place_of(facts, arm.name),
                    {"chosen": edge, "times": rates.count(edge), "rounds": len(rates)},
                )
    if not seen:
        raise not_yet(facts, "the choice of a rate")


def dev_too_small(facts: Facts) -> Iterable[Finding]:
    """Too few dev rows for what they decide."""
    trained = trained_arms(facts)
    if not trained:
        raise CannotTell("nothing is trained here")
    if facts.num_dev is None:
        raise not_yet(facts, "the number of dev rows")
    n = facts.num_dev
    advice = "more labelled rows (half of --num-examples come on top as dev), or no choice: a single rate"
    if n == 0:
        yield Finding(
            "dev-too-small",
            "warning",
            "There are no dev rows: no early stopping, no choice of rate, no temperature scaling.",
            "0 dev rows",
            "more labelled rows; or few --align-epochs and --sft-epochs, and one rate",
            numbers={"dev": 0},
        )
        return
    most = max(_candidates(arm) for arm in trained)
    if most > 1 and n < DEV_TO_SELECT:
        yield Finding(
            "dev-too-small",
            "warning",
            "The dev set is too small to choose by: chance decides.",
            f"{n} dev rows choose among {most} rates (or β); {DEV_TO_SELECT} are the least",
            advice,
            numbers={"dev": n, "candidates": most},
        )
    elif n < DEV_TO_STOP:
        yield Finding(
            "dev-too-small",
            "warning",
            "The dev set is too small to stop by: the best step is found by chance.",
            f"{n} dev rows; {DEV_TO_STOP} are the least",
            advice,
            numbers={"dev": n, "candidates": most},
        )


def _candidates(arm: ArmFacts) -> int:
    joint = arm.config.joint.betas if arm.config is not None and JOINT in arm.stages else None
    return max(1, len(arm.rates)) * len(joint or [None])


# ----------------------------------------------------------------------------------------------- rows


def label_missing(facts: Facts) -> Iterable[Finding]:
    """A label that no training (or dev) row has."""
    need_labels(facts)
    rounds = [current for current in facts.rounds if current.train is not None]
    if not rounds:
        raise CannotTell(f"the training rows are not known: {_rows(facts)}")
    known = set(facts.labels) or {
        answer for r in rounds for part in (r.train, r.dev) for _, answer in part or ()
    }
    for part, severity in (("train", "warning"), ("dev", "note")):
        lacking: dict[str, list[int]] = {}
        for current in rounds:
            rows = current.train if part == "train" else current.dev
            for label in known - {answer for _, answer in rows or ()} if rows else ():
                lacking.setdefault(label, []).append(current.seed)
        if lacking:
            shown = "; ".join(
                repr(label) + (f" in {len(seeds)} of {len(rounds)} rounds" if len(rounds) > 1 else "")
                for label, seeds in sorted(lacking.items())[:6]
            )
            yield Finding(
                "label-missing",
                "warning" if severity == "warning" else "note",
                "A label is in none of the training rows: neither demonstrations nor fine-tuning show it."
                if part == "train"
                else "A label is in none of the dev rows: what is chosen by them does not look at it.",
                f"no {part} row has {shown}",
                "rows of it in the data, more examples (--num-examples), or balanced draws (--balanced)",
                f"{part} rows",
                {"labels": sorted(lacking)},
            )


def texts_hardly_read(facts: Facts) -> Iterable[Finding]:
    """Labels that nearly match, prompts and answers that meet oddly: what the run said when it began."""
    if facts.advice is None:
        raise not_yet(facts, "what was said of labels and prompts")
    for message, evidence, way_out in facts.advice:
        yield Finding("texts-hardly-read", "warning", f"{message}.", evidence, way_out, "labels and prompts")


def repeated_rows(facts: Facts) -> Iterable[Finding]:
    """The same prompt in training and test rows, or with two answers."""
    rounds = [current for current in facts.rounds if current.train is not None]
    if not rounds:
        raise CannotTell(f"the training rows are not known: {_rows(facts)}")
    leaks: set[str] = set()
    shared: set[str] = set()
    torn: set[str] = set()
    for current in rounds:
        train, dev = dict(current.train or ()), dict(current.dev or ())
        tested = {q for e in current.evaluations.values() if e.part == "test" for q in e.queries}
        leaks |= tested & {*train, *dev}
        shared |= set(train) & set(dev)
        answers: dict[str, set[str]] = {}
        for query, answer in (*(current.train or ()), *(current.dev or ())):
            answers.setdefault(query, set()).add(answer)
        torn |= {query for query, given in answers.items() if len(given) > 1}
    for found, severity, message, advice in (
        (
            leaks,
            "problem",
            "Test rows are among the training or dev rows.",
            "take them out of one of the files",
        ),
        (shared, "warning", "Training rows are among the dev rows.", "remove repeated rows from the data"),
        (torn, "warning", "The same prompt has different answers.", "mend the labels of these rows"),
    ):
        if found:
            first = min(found)
            yield Finding(
                "repeated-rows",
                "problem" if severity == "problem" else "warning",
                message,
                f"{len(found)} prompts, {first[:60]!r} for one",
                advice,
                "rows",
                {"prompts": len(found)},
            )


def evaluated_on_dev(facts: Facts) -> Iterable[Finding]:
    """Figures of the rows that chose the weights."""
    if facts.kind == "compare":
        return
    evaluations = [e for current in facts.rounds for e in current.evaluations.values()]
    if not evaluations:
        raise CannotTell("nothing was evaluated" if facts.finished else "the evaluation comes last")
    if evaluations[0].part == "dev":
        yield Finding(
            "evaluated-on-dev",
            "note",
            "The figures are of the dev rows, which also chose the weights: they flatter.",
            f"{len(evaluations[0].places)} dev rows, no test rows",
            "--test-data with other rows, or ia2 compare, which cross-fits the rows that there are",
        )
