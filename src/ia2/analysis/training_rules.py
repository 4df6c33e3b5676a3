"""Rules on the teacher, on training, and on the rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import numpy as np

from ia2.analysis.facts import ArmFacts, Facts, Stage
from ia2.analysis.findings import (
    EVERY_STAGE,
    CannotTell,
    Finding,
    correct_in,
    difference_interval,
    guessing,
    need_labels,
    need_recipes,
    need_stage,
    not_yet,
    percent,
    place_of,
    stage_hits,
    trained_arms,
    unless_rare,
)
from ia2.recipes import ALIGN, JOINT, SFT

# Thresholds; docs/doctor.md has them with their reasons.
CHANCE_ROWS = 16  # with fewer rows nobody can be told from chance, and only a figure at it counts
HEADROOM = 0.05  # accuracy of ICL over the base; less leaves little to carry over (as `ia2 probe`)
LOSS_FALL = 0.1  # share of the first logged alignment loss that must go
LATE_FALL = 0.01  # share of the first dev loss that is still won in the last quarter of the evaluations
BLOWN_UP = 10  # last training loss over the first
LEARNT = 0.1  # nats: a cross-entropy this low is learnt; what it does below says nothing
OVERSHOOT = 1.1  # last dev loss over the best, which was the first
DEV_TO_SELECT, DEV_TO_STOP = 8, 4  # dev rows: to choose among rates, to stop by
TIE, DEV_TIE = 0.02, 16  # dev losses this close are a tie where dev rows are fewer than this
DEV_FACTOR, DEV_GAP = 2.0, 0.5  # test NLL over dev loss: times, and nats
OFF_TASK = 0.5  # share of teacher answers that are no label, or cut off
FEW_TEST = 30  # test rows


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
        for (text, _), answer in zip(current.teacher, answers, strict=False):
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


def icl_no_headroom(facts: Facts) -> Iterable[Finding]:
    """ICL hardly better than the base: little to carry over."""
    need_recipes(facts, "base", "icl")
    icl, base = facts.arm("icl"), facts.arm("base")
    assert icl is not None and base is not None
    one, two = (facts.mean(arm, facts.scope, "accuracy") for arm in (icl, base))
    if one is None or two is None:
        raise not_yet(facts, "evaluations of icl and base")
    if one - two < HEADROOM:
        yield Finding(
            "icl-no-headroom",
            "warning",
            "In-context learning is hardly better than the base model: there is little to carry over.",
            f"accuracy of ICL {one:.3f}, of the base {two:.3f}",
            "more demonstrations (--num-examples), another order (--demo-order), or plain --recipe sft",
            place_of(facts, "icl, base"),
            {"icl": one, "base": two},
        )


def teacher_off_task(facts: Facts) -> Iterable[Finding]:
    """The teacher answers something else than labels, or is cut off."""
    answers = [answer for current in facts.rounds for answer in current.teacher]
    if not answers:
        raise CannotTell("no teacher pass is in the run")
    if facts.labelled is None or (facts.labelled and not facts.labels):
        raise CannotTell("the labels are not known before the run ends")
    if facts.labelled:
        off = [
            text for text, _ in answers if not any(_says(text, la, facts.single_token) for la in facts.labels)
        ]
        message = (
            "In context, the base model mostly answers something that is no label; that is aligned with."
        )
        advice = "label words that follow the prompt naturally (--label-map), --align-only-correct"
        what = "are no label: " + ", ".join(repr(text) for text in dict.fromkeys(off[:3]))
    else:
        off = [text for text, ended in answers if not ended]
        message = "Most of the teacher's answers were cut off at the limit; what is aligned with has no end."
        advice = "a higher --max-answer-tokens, or demonstrations with shorter answers"
        what = "did not end"
    if len(off) > OFF_TASK * len(answers):
        yield Finding(
            "teacher-off-task",
            "warning",
            message,
            f"{len(off)} of {len(answers)} teacher answers {what}",
            advice,
            place_of(facts, "teacher"),
            {"off": len(off), "answers": len(answers)},
        )


# ------------------------------------------------------------------------------------------- training


def diverged(facts: Facts) -> Iterable[Finding]:
    """A loss that is not a number, or ends far above where it began."""
    need_stage(facts, EVERY_STAGE, "trained")

    def test(stage: Stage) -> dict[str, float] | None:
        if stage.diverged is not None:
            return {"step": stage.diverged, "loss": float("nan")}
        losses = [*stage.train, *stage.dev]
        bad = [step for step, loss in losses if not math.isfinite(loss)]
        if bad:
            return {"step": min(bad), "loss": float("nan")}
        floor = 0.0 if stage.kind == ALIGN else LEARNT
        if len(stage.train) > 1 and stage.train[-1][1] > BLOWN_UP * max(stage.train[0][1], floor):
            return {"step": stage.train[-1][0], "loss": stage.train[-1][1]}
        return None

    for where, hits, _ in stage_hits(facts, EVERY_STAGE, test):
        step, loss = hits[0][1]["step"], hits[0][1]["loss"]
        rate = hits[0][0].rate
        yield Finding(
            "diverged",
            "problem",
            "Training diverged.",
            f"at rate {rate:g} the loss is {loss:g} at step {step:.0f}"
            if math.isfinite(loss)
            else f"at rate {rate:g} the loss is not finite after step {step:.0f}",
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


def undertrained(facts: Facts) -> Iterable[Finding]:
    """Stopped by the limit of epochs while the dev loss still fell."""
    _with_dev(facts)

    def test(stage: Stage) -> dict[str, float] | None:
        finite = [loss for _, loss in stage.dev if math.isfinite(loss)]
        if not stage.finished or len(finite) < 2 or stage.best_step != stage.dev[-1][0]:
            return None
        if stage.last_epoch < stage.epochs - 1e-6:
            return None
        before = finite[min(len(finite) - 2, (3 * len(finite)) // 4 - 1)]
        # of the loss at first: a loss that is nearly nothing may fall by half and nothing is won
        if before - finite[-1] <= LATE_FALL * finite[0]:
            return None
        return {"before": before, "last": finite[-1], "epochs": stage.epochs}

    for where, hits, total in stage_hits(facts, EVERY_STAGE, test):
        stage, figures = hits[0]
        yield Finding(
            "undertrained",
            unless_rare("warning", hits, total),
            "Training stopped at the limit of epochs while the dev loss was still falling.",
            f"{stage.epochs} epochs; dev loss {figures['before']:.4g} → {figures['last']:.4g} in the last "
            "quarter",
            f"--{stage.kind}-epochs {4 * stage.epochs}, or a higher rate ({stage.at(3)})",
            where,
            figures,
        )


def best_at_first_evaluation(facts: Facts) -> Iterable[Finding]:
    """The first evaluation was the best: the rate is too high, or there is nothing left to learn."""
    _with_dev(facts)

    def test(stage: Stage) -> dict[str, float] | None:
        if len(stage.dev) < 3 or stage.best_step != stage.dev[0][0]:
            return None
        best, last = stage.dev[0][1], stage.dev[-1][1]
        if last <= OVERSHOOT * best or (stage.kind != ALIGN and last - best <= LEARNT):
            return None
        return {"best": best, "last": last, "step": stage.dev[0][0]}

    for where, hits, total in stage_hits(facts, EVERY_STAGE, test):
        stage, figures = hits[0]
        yield Finding(
            "best-at-first-evaluation",
            unless_rare("warning", hits, total),
            "The dev loss was best at the very first evaluation and rose after it: the rate is too high.",
            f"dev loss {figures['best']:.4g} at step {figures['step']:.0f}, {figures['last']:.4g} at the "
            f"end; rate {stage.rate:g}",
            f"--{stage.kind}-learning-rate {stage.rate / 3:.2g}, and --{stage.kind}-eval-every 1",
            where,
            figures,
        )


def _with_dev(facts: Facts) -> None:
    need_stage(facts, EVERY_STAGE, "trained")
    if not any(stage.dev for current in facts.rounds for stage in current.stages):
        raise CannotTell("there are no dev losses")


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
    if n < DEV_TIE:
        yield from _ties(facts, trained)


def _candidates(arm: ArmFacts) -> int:
    joint = arm.config.joint.betas if arm.config is not None and JOINT in arm.stages else None
    return max(1, len(arm.rates)) * len(joint or [None])


def _ties(facts: Facts, trained: Iterable[ArmFacts]) -> Iterable[Finding]:
    """Rates whose dev losses are nearly the same."""
    for arm in trained:
        ties, total = [], 0
        for current in facts.rounds:
            last = [
                s for s in current.stages if arm.name in s.arms and s.kind == arm.stages[-1] and s.finished
            ]
            losses = sorted(s.selection_loss for s in last if s.selection_loss is not None)
            if len(losses) > 1:
                total += 1
                ties += [losses] if losses[1] - losses[0] <= TIE * abs(losses[0]) else []
        if ties and 2 * len(ties) >= total:
            best, second = ties[0][:2]
            yield Finding(
                "dev-too-small",
                "note",
                "The two best rates (or β) are all but equal on the dev rows: the choice is left to chance.",
                f"dev losses {best:.4g} and {second:.4g} on {facts.num_dev} rows; a tie in {len(ties)} of "
                f"{total} rounds",
                "more dev rows, or rates further apart (--learning-rates 1e-4 1e-3)",
                place_of(facts, arm.name),
                {"best": best, "second": second, "ties": len(ties), "rounds": total},
            )


def dev_misleads(facts: Facts) -> Iterable[Finding]:
    """The dev loss that chose the weights is far below the loss on the test rows."""
    if facts.labelled is False or facts.single_token is False:
        raise CannotTell("loss on dev and NLL on test are the same measure only for labels of one token")
    seen = False
    for arm in trained_arms(facts):
        if arm.stages[-1] != SFT or (arm.config is not None and arm.config.sft.answers != "ground_truth"):
            continue
        pairs = []
        for current in facts.rounds:
            e = current.evaluations.get(arm.name)
            loss = _chosen_loss(current.stages, arm)
            if e is not None and e.part == "test" and loss is not None and "vocabulary" in e.means:
                pairs.append((loss, e.means["vocabulary"]["nll"]))
        if not pairs:
            continue
        seen = True
        dev, test = np.mean(pairs, axis=0)
        if test > DEV_FACTOR * dev and test - dev > DEV_GAP:
            yield Finding(
                "dev-misleads",
                "warning",
                "The dev rows promise far more than the test rows keep: what they chose suits them only.",
                f"dev loss {dev:.3f}, NLL on test {test:.3f} nats, {facts.num_dev} dev rows",
                "more dev rows from the same source as the test rows; see whether the two differ",
                place_of(facts, arm.name),
                {"dev_loss": float(dev), "test_nll": float(test), "rounds": len(pairs)},
            )
    if not seen:
        raise CannotTell("no recipe that ends with fine-tuning has both a dev loss and test rows")


def _chosen_loss(stages: Iterable[Stage], arm: ArmFacts) -> float | None:
    mine = [s for s in stages if arm.name in s.arms and s.kind == arm.stages[-1] and s.chosen]
    return mine[-1].selection_loss if mine else None


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


def few_test_rows(facts: Facts) -> Iterable[Finding]:
    """Too few test rows to see any but large differences."""
    counts = [e.places for current in facts.rounds for e in current.evaluations.values()]
    if not counts and not any(arm.summary for arm in facts.arms):
        raise not_yet(facts, "evaluations")
    # folds of a seed are one evaluation of all rows
    n = len({place for places in counts for place in places})
    if not counts:
        n = next(int(arm.summary["metrics"]["n"]) for arm in facts.arms if arm.summary)
    if n < FEW_TEST:
        yield Finding(
            "few-test-rows",
            "note",
            "There are few rows to evaluate on: only large differences can be seen.",
            f"{n} rows; at an accuracy of 0.8 the 95% interval is ±{1.96 * math.sqrt(0.16 / max(1, n)):.2f}",
            "more rows in --test-data",
            numbers={"rows": n},
        )
