"""The rules of ``ia2 doctor``: functions from the facts of a run to findings, in ``RULES``.

A finding says what was seen in numbers, and what to try next. A rule that a run cannot tell about raises
:class:`CannotTell` with the reason.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ia2.report.doctor.reading import AnswerFacts, Facts, RecipeFacts, RoundFacts, StageFacts
from ia2.utils.statistics import mean_interval

Severity = Literal["problem", "warning", "note"]
Difference = Mapping[str, Any]
"""``value``, ``low`` and ``high``."""

# Thresholds, as in docs/doctor.md.
CHANCE_ROWS = 16  # with fewer rows nobody can be told from chance, and only a figure at it counts
LOSS_FALL = 0.1  # share of the first logged alignment loss that must go
DEV_TO_SELECT, DEV_TO_STOP = 8, 4  # dev rows: to choose among rates, to stop by
GAIN = 0.02  # asim that alignment must add before any of it can be lost
KEPT = 1 / 3  # share of that gain that fine-tuning must leave


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


# ------------------------------------------------------------------------------- what rules share


def _not_yet(facts: Facts, what: str) -> CannotTell:
    return CannotTell(f"{what}: {'the run has not come to it' if facts.missing else 'not there'}")


def _need_labels(facts: Facts) -> None:
    if not facts.labelled:
        free = "answers are free text, not labels"
        raise CannotTell("nothing tells yet what the answers are" if facts.labelled is None else free)


def _need_recipes(facts: Facts, *recipes: str) -> None:
    if facts.kind == "train":
        raise CannotTell("a training run has one recipe; ia2 compare sets them side by side")
    there = {each.recipe for each in facts.recipes}
    if lacking := [recipe for recipe in recipes if recipe not in there]:
        raise CannotTell(f"the recipe {' and '.join(lacking)} is not in the comparison")


def _trained(facts: Facts) -> list[RecipeFacts]:
    return [each for each in facts.recipes if each.stages]


def _recipe(facts: Facts, recipe: str, variant: str = "") -> RecipeFacts | None:
    """With this variant, or with one that is part of it (``sft@dora`` beside ``dora-kl``)."""
    fitting = [
        each
        for each in facts.recipes
        if each.recipe == recipe
        and (not each.stages or each.variant in ("", variant) or variant.startswith(f"{each.variant}-"))
    ]
    return max(fitting, key=lambda each: len(each.variant), default=None)


def _pairs(facts: Facts, recipe: str, rival: str) -> Iterator[tuple[RecipeFacts, RecipeFacts]]:
    """Each variant of a recipe with the rival that has the same adapter."""
    for each in facts.recipes:
        other = _recipe(facts, rival, each.variant)
        if each.recipe == recipe and other is not None:
            yield each, other


def _scope(facts: Facts) -> str:
    """Where only the answers compete: the label set, or the whole answer of free text."""
    return "answer" if facts.labelled is False else "labels"


def _mean(facts: Facts, recipe: RecipeFacts, scope: str) -> float | None:
    """Accuracy over all rounds, each weighed by its rows; of the summary where only that is there."""
    parts = [(a.means[scope]["accuracy"], a.n) for a in facts.answers(recipe.name) if scope in a.means]
    if parts:
        return float(np.average([mean for mean, _ in parts], weights=[n for _, n in parts]))
    value = recipe.summary.get("metrics", {}).get(scope, {}).get("accuracy", {}).get("value")
    return None if value is None else float(value)


def _mean_asim(facts: Facts, recipe: RecipeFacts) -> float | None:
    parts = [float(a.asim.mean()) for a in facts.answers(recipe.name) if a.asim is not None]
    return float(np.mean(parts)) if parts else (recipe.summary.get("asim") or {}).get("value")


def _interval(runs: Sequence[np.ndarray]) -> Difference | None:
    """95% over seeds, or over the rows of a single one."""
    if not runs:
        return None
    found = mean_interval(runs)
    ends = found.to_dict()
    return ends if ends["low"] is not None else dict.fromkeys(ends, ends["value"])  # one row


def columns(
    facts: Facts, names: Sequence[str], take: Callable[[AnswerFacts], np.ndarray | None]
) -> list[list[np.ndarray]]:
    """For each seed a column for each recipe, its rows paired; only of rounds in which all have it."""
    by_seed: dict[int, list[list[np.ndarray]]] = {}
    for each in facts.rounds:
        taken = [take(each.answers[name]) for name in names if name in each.answers]
        there = [column for column in taken if column is not None]
        if len(there) == len(names) and len({len(column) for column in there}) == 1:
            by_seed.setdefault(each.seed, []).append(there)
    return [[np.concatenate(parts) for parts in zip(*rounds, strict=True)] for rounds in by_seed.values()]


def _less(
    facts: Facts, a: RecipeFacts, b: RecipeFacts, take: Callable[[AnswerFacts], np.ndarray | None]
) -> Difference | None:
    """Paired by row and seed."""
    return _interval([first - second for first, second in columns(facts, (a.name, b.name), take)])


def _correct(facts: Facts) -> Callable[[AnswerFacts], np.ndarray | None]:
    return lambda answers: answers.correct.get(_scope(facts))


def _asim_less(facts: Facts, a: RecipeFacts, b: RecipeFacts) -> tuple[Difference, str] | None:
    """asim of ``a`` less that of ``b``: paired over queries, or from the summary's two intervals."""
    if paired := _less(facts, a, b, lambda answers: answers.asim):
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


def _in_words(difference: Difference) -> str:
    return f"{difference['value']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]"


def _where(facts: Facts, name: str) -> str:
    """A recipe and the seeds it was run with."""
    seeds = sorted({each.seed for each in facts.rounds})
    if facts.kind == "train" or not seeds:
        return name
    return f"{name}, {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"


def _guessing(facts: Facts, recipe: RecipeFacts) -> float:
    """Accuracy of always giving the most frequent label; at least one over their number. 0 for free text."""
    rows = [row for answers in facts.answers(recipe.name) for row in answers.rows]
    gold = Counter(str(row["gold"]) for row in rows)
    if facts.labelled is False or not (gold or facts.labels):
        return 0.0
    count = len(facts.labels) or max((len(row.get("labels", ())) for row in rows), default=0)
    return max(max(gold.values(), default=0) / max(1, gold.total()), 1 / max(1, count))


Hits = list[tuple[StageFacts, dict[str, float]]]


def _stage_hits(
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
            found.append((f"{name} ({of}{_shown([stage.place for stage, _ in hits])})", hits, len(members)))
    return found


def _shown(places: Sequence[str]) -> str:
    return ", ".join(places[:3]) + (" …" if len(places) > 3 else "")


# ------------------------------------------------------------------------------------- the teacher


def icl_at_chance(facts: Facts) -> Iterable[Finding]:
    """ICL is no better than guessing: there is nothing to align with (METHOD, section 5)."""
    icl = _recipe(facts, "icl")
    mean = None if icl is None else _mean(facts, icl, _scope(facts))
    if icl is None or mean is None:
        value, chance, n, low = _teacher_score(facts)
        where = "teacher"
    else:
        value, where = mean, "icl"
        runs = [run[0] for run in columns(facts, [icl.name], _correct(facts))]
        if interval := _interval(runs):
            chance, n, low = _guessing(facts, icl), len(runs[0]), interval["low"]
        else:
            metrics = icl.summary["metrics"]
            chance, n = 1 / len(facts.labels) if facts.labels else 0.0, int(metrics["n"])
            low = metrics[_scope(facts)]["accuracy"]["low"]
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
            _where(facts, where),
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
    _need_labels(facts)
    right, guesses = [], []
    for each in rounds:
        answers = [answer for _, answer in each.train or ()]
        frequent = Counter(answers).most_common(1)[0][0]
        for text, answer in zip(each.teacher, answers, strict=False):
            # one label may begin another
            longer = [label for label in facts.labels if len(label.strip()) > len(answer.strip())]
            says_more = any(_says(text, label, facts.single_token) for label in longer)
            right.append(float(_says(text, answer, facts.single_token) and not says_more))
            guesses.append(float(answer == frequent))
    interval = _interval([np.array(right)])
    assert interval is not None
    return interval["value"], float(np.mean(guesses)), len(rounds[0].teacher), interval["low"]


def _says(text: str, label: str, single: bool | None) -> bool:
    said, wanted = text.strip(), label.strip()
    return said == wanted or (single is not True and said.startswith(wanted))


# ---------------------------------------------------------------------------------------- training


def diverged(facts: Facts) -> Iterable[Finding]:
    """A loss that is not a number."""

    def test(stage: StageFacts) -> dict[str, float] | None:
        bad = [step for step, loss in (*stage.train, *stage.dev) if not math.isfinite(loss)]
        if stage.diverged is None and not bad:
            return None
        return {"step": min(bad) if stage.diverged is None else stage.diverged, "loss": float("nan")}

    for where, hits, _ in _stage_hits(facts, ("align", "sft", "joint", "soft"), "trained", test):
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
            _shown([stage.place for stage in others]),
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

    for where, hits, total in _stage_hits(facts, ("align",), "aligned", test):
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
    several = [each for each in _trained(facts) if len(each.rates) > 2]
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
                    _where(facts, recipe.name),
                    {"chosen": edge, "times": times, "rounds": len(rates)},
                )
    if not seen:
        raise _not_yet(facts, "the choice of a rate")


def dev_too_small(facts: Facts) -> Iterable[Finding]:
    """Too few dev rows for what they decide."""
    if not _trained(facts):
        raise CannotTell("nothing is trained here")
    if (n := facts.num_dev) is None:
        raise _not_yet(facts, "the number of dev rows")
    candidates = max(each.candidates for each in _trained(facts))
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


# ---------------------------------------------------------------------------------- similarity to ICL


def asim_no_gain(facts: Facts) -> Iterable[Finding]:
    """IA2 → SFT is no nearer to ICL than SFT alone: the method's known failure signature."""
    _need_recipes(facts, "ia2-sft", "sft")
    return _no_nearer(
        facts,
        ("ia2-sft", "sft"),
        "After alignment and fine-tuning the model is no nearer to ICL than after fine-tuning alone.",
        "That alignment and fine-tuning end nearer to ICL than fine-tuning alone is not certain.",
        "see whether the alignment itself worked (ia2 in --recipes); --align-epochs, --align-normalise, "
        "--align-layers middle-third, a gentler second stage (--sft-learning-rate, --sft-ia2-weight)",
    )


def alignment_not_carried_over(facts: Facts) -> Iterable[Finding]:
    """On test queries the aligned model is no nearer to ICL than the base."""
    _need_recipes(facts, "base", "ia2")
    message = "On the test queries alignment brought the model no nearer to ICL than the base model is."
    return _no_nearer(
        facts,
        ("ia2", "base"),
        message,
        message,
        "if the alignment loss fell, more training rows (--num-examples) or several orders "
        "(--context-draws 8); else a higher rate and more --align-epochs",
    )


def _no_nearer(
    facts: Facts, recipes: tuple[str, str], message: str, uncertain: str, advice: str
) -> Iterable[Finding]:
    found = [(a, b, less) for a, b in _pairs(facts, *recipes) if (less := _asim_less(facts, a, b))]
    if not found:
        raise _not_yet(facts, f"similarities to ICL of {' and '.join(recipes)}")
    for a, b, (difference, how) in found:
        if difference["low"] <= 0:
            none = difference["value"] <= 0
            yield Finding(
                "problem" if none else "warning",
                message if none else uncertain,
                f"asim {_mean_asim(facts, a):.3f} against {_mean_asim(facts, b):.3f}: difference "
                f"{_in_words(difference)} ({how})",
                advice,
                _where(facts, a.name if b.recipe == "base" else f"{a.name}, {b.name}"),
                difference,
            )


def sft_undid_alignment(facts: Facts) -> Iterable[Finding]:
    """Fine-tuning threw away what alignment had won."""
    if facts.kind == "train":
        raise CannotTell(
            "ia2 train measures similarity to ICL after the last stage only; ia2 compare shows both"
        )
    _need_recipes(facts, "ia2", "ia2-sft")
    told = False
    for recipe, aligned in _pairs(facts, "ia2-sft", "ia2"):
        rival = _recipe(facts, "sft", recipe.variant) or _recipe(facts, "base")
        if rival is None:
            continue
        after, before, start = (_mean_asim(facts, each) for each in (recipe, aligned, rival))
        if after is None or before is None or start is None:
            continue
        told = True
        if before - start < GAIN:
            continue  # nothing was won; other rules say so
        kept = (after - start) / (before - start)
        if kept < KEPT:
            yield Finding(
                "problem" if kept <= 0 else "warning",
                "Fine-tuning undid the alignment: most of the similarity to ICL is gone after it.",
                f"asim {before:.3f} after alignment, {after:.3f} after fine-tuning, {start:.3f} with "
                f"{rival.name}: {kept:.0%} of the gain is left",
                "--sft-learning-rate (a third of it), fewer --sft-epochs, or keep the alignment loss beside "
                "cross-entropy (--sft-ia2-weight 0.1)",
                _where(facts, recipe.name),
                {"aligned": before, "fine_tuned": after, "reference": start, "kept": kept},
            )
    if not told:
        raise _not_yet(facts, "similarities to ICL of ia2, ia2-sft and sft or base")


# ------------------------------------------------------------------------------------------ answers


def labels_of_several_tokens(facts: Facts) -> Iterable[Finding]:
    """Answers are labels of more than one token."""
    _need_labels(facts)
    if facts.single_token is None:
        raise _not_yet(facts, "the labels' tokens")
    if facts.single_token:
        return
    longest = max(facts.label_tokens, default=None)
    tokens = "of several tokens" if longest is None else f"of up to {longest} tokens"
    those = [
        label for label, k in zip(facts.labels, facts.label_tokens, strict=False) if k == longest
    ] or facts.labels
    yield Finding(
        "note",
        "Labels have several tokens: scoring takes longer, and confidences are of whole labels.",
        f"{len(facts.labels)} labels {tokens} ({', '.join(map(repr, those[:3]))})",
        "words of one token with --label-map; ECE is not comparable with that of one-token labels",
        numbers={"labels": len(facts.labels), "longest": longest},
    )


def worse_than_base(facts: Facts) -> Iterable[Finding]:
    """Training made the model worse than it was."""
    _need_recipes(facts, "base")
    base = _recipe(facts, "base")
    assert base is not None
    found = [(each, less) for each in _trained(facts) if (less := _less(facts, each, base, _correct(facts)))]
    if not found:
        raise CannotTell("no predictions of a trained recipe and of the base on the same rows")
    scope = _scope(facts)
    for recipe, difference in found:
        if difference["high"] < 0:
            yield Finding(
                "problem",
                "The trained model is worse than the base model without demonstrations.",
                f"accuracy {'in the label set' if scope == 'labels' else 'of answers'} "
                f"{_mean(facts, recipe, scope):.3f} against {_mean(facts, base, scope):.3f}: difference "
                f"{_in_words(difference)} (paired by row and seed)",
                "a lower rate (--learning-rates), more rows (--num-examples); see the findings on training",
                _where(facts, recipe.name),
                difference,
            )


def worse_than_guessing(facts: Facts) -> Iterable[Finding]:
    """No better than always answering the most frequent label."""
    _need_labels(facts)
    means = [(each, mean) for each in _trained(facts) if (mean := _mean(facts, each, "labels")) is not None]
    if not means:
        raise _not_yet(facts, "evaluations of a trained recipe")
    for recipe, mean in means:
        guess, n = _guessing(facts, recipe), sum(a.n for a in facts.answers(recipe.name))
        if mean <= guess:
            yield Finding(
                "problem",
                "The trained model is no better than always answering the most frequent label.",
                f"accuracy in the label set {mean:.3f}, guessing {guess:.3f}"
                f"{f', on {n} answers' if n else ''}",
                "ia2 probe tells whether the model can do the task; more rows (--num-examples), another rate "
                "(--learning-rates)",
                _where(facts, recipe.name),
                {"accuracy": mean, "guessing": guess},
            )


def worse_than_sft(facts: Facts) -> Iterable[Finding]:
    """The method lost to plain fine-tuning."""
    _need_recipes(facts, "ia2-sft", "sft")
    told = False
    for recipe, rival in _pairs(facts, "ia2-sft", "sft"):
        summed_up = facts.differences.get(f"{recipe.name} − {rival.name}", {}).get("accuracy")
        difference = _less(facts, recipe, rival, _correct(facts)) or summed_up
        if difference is None or difference["high"] is None:
            continue
        told = True
        if difference["high"] < 0:
            yield Finding(
                "warning",
                "Alignment before fine-tuning made the answers worse than fine-tuning alone.",
                f"accuracy {_in_words(difference)} (paired by row and seed)",
                "--recipe sft here; or see what is said of ICL and of the alignment",
                _where(facts, f"{recipe.name}, {rival.name}"),
                dict(difference),
            )
    if not told:
        raise _not_yet(facts, "predictions of ia2-sft and sft")


# --------------------------------------------------------------------------------------------- rows


def label_missing(facts: Facts) -> Iterable[Finding]:
    """A label that no training (or dev) row has."""
    _need_labels(facts)
    rounds = _with_rows(facts)
    known = set(facts.labels) or {answer for each in rounds for _, answer in (*each.train, *each.dev)}  # type: ignore[misc]
    says: dict[str, tuple[Severity, str]] = {
        "train": (
            "warning",
            "A label is in none of the training rows: neither demonstrations nor fine-tuning show it.",
        ),
        "dev": ("note", "A label is in none of the dev rows: what is chosen by them does not look at it."),
    }
    for part, (severity, message) in says.items():
        parts = [rows for each in rounds if (rows := getattr(each, part))]
        lacking = Counter(label for rows in parts for label in known - {answer for _, answer in rows})
        if lacking:
            of = f" in {{}} of {len(rounds)} rounds" if len(rounds) > 1 else ""
            shown = "; ".join(f"{label!r}{of.format(lacking[label])}" for label in sorted(lacking)[:6])
            yield Finding(
                severity,
                message,
                f"no {part} row has {shown}",
                "rows of it in the data, more examples (--num-examples), or balanced draws (--balanced)",
                f"{part} rows",
                {"labels": sorted(lacking)},
            )


def _with_rows(facts: Facts) -> list[RoundFacts]:
    rounds = [each for each in facts.rounds if each.train is not None]
    if not rounds:
        raise CannotTell(f"the training rows are not known: {facts.no_rows or 'they have not been read'}")
    return rounds


def texts_hardly_read(facts: Facts) -> Iterable[Finding]:
    """Labels that nearly match, prompts and answers that meet oddly: what the run said when it began."""
    if facts.advice is None:
        raise _not_yet(facts, "what was said of labels and prompts")
    for message, evidence, way_out in facts.advice:
        yield Finding("warning", f"{message}.", evidence, way_out, "labels and prompts")


def repeated_rows(facts: Facts) -> Iterable[Finding]:
    """The same prompt in training and test rows, or with two answers."""
    leaks: set[str] = set()
    shared: set[str] = set()
    torn: set[str] = set()
    for each in _with_rows(facts):
        train, dev = ({query for query, _ in rows or ()} for rows in (each.train, each.dev))
        tested = [answers.rows for answers in each.answers.values() if answers.part == "test"]
        leaks |= {str(row["query"]) for rows in tested for row in rows} & (train | dev)
        shared |= train & dev
        times = Counter(query for query, _ in {*(each.train or ()), *(each.dev or ())})
        torn |= {query for query, answers_of in times.items() if answers_of > 1}
    says: tuple[tuple[set[str], Severity, str, str], ...] = (
        (
            leaks,
            "problem",
            "Test rows are among the training or dev rows.",
            "take them out of one file",
        ),
        (shared, "warning", "Training rows are among the dev rows.", "remove repeated rows from the data"),
        (torn, "warning", "The same prompt has different answers.", "mend the labels of these rows"),
    )
    for prompts, severity, message, advice in says:
        if prompts:
            evidence = f"{len(prompts)} prompts, {min(prompts)[:60]!r} for one"
            yield Finding(severity, message, evidence, advice, "rows", {"prompts": len(prompts)})


def evaluated_on_dev(facts: Facts) -> Iterable[Finding]:
    """Figures of the rows that chose the weights."""
    if facts.kind == "compare":
        return
    answers = [found for each in facts.rounds for found in each.answers.values()]
    if not answers:
        raise CannotTell("the evaluation comes last" if facts.missing else "nothing was evaluated")
    if answers[0].part == "dev":
        yield Finding(
            "note",
            "The figures are of the dev rows, which also chose the weights: they flatter.",
            f"{answers[0].n} dev rows, no test rows",
            "--test-data with other rows, or ia2 compare, which cross-fits the rows that there are",
        )


RULES: dict[str, Callable[[Facts], Iterable[Finding]]] = {
    rule.__name__.replace("_", "-"): rule
    for rule in (
        icl_at_chance,
        diverged,
        alignment_not_learnt,
        rate_at_edge,
        dev_too_small,
        asim_no_gain,
        sft_undid_alignment,
        alignment_not_carried_over,
        labels_of_several_tokens,
        worse_than_base,
        worse_than_guessing,
        worse_than_sft,
        label_missing,
        texts_hardly_read,
        repeated_rows,
        evaluated_on_dev,
    )
}
"""Every rule by its id, in the order in which findings of one severity are shown."""
