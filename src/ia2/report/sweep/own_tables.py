"""Tables that the paper has not: every number, where the method's lead ends, and whether ICL works.

(``tests`` is in :mod:`ia2.report.sweep.significance`, ``variants`` in :mod:`ia2.report.sweep.variants`.)
"""

from __future__ import annotations

import math

from ia2.experiment.sweep.records import OVERHEAD
from ia2.report.sweep.cells import METHOD, TITLES, Place, Report
from ia2.report.sweep.entries import interval_entry, mean_entry
from ia2.report.sweep.notes import about
from ia2.report.sweep.selection import Arm, Task
from ia2.report.sweep.threshold import Threshold, effectiveness_threshold
from ia2.utils.format import Column, Entry, Fields, Table, fill
from ia2.utils.statistics import bounded, t_interval
from ia2.utils.wording import MISSING, estimate

# What "better" means in the second column of thresholds: accuracy falls to zero difference ever more slowly.
MARGIN = 0.01


def full_table(report: Report) -> Table:
    """Every measure of every arm on everything that it was evaluated on."""
    rows = [
        (place, arm)
        for place in report.places()
        for label in report.labels
        if (arm := report.arm(place.task, place.size, label)) is not None
        # the base model has no N: it stands with the smallest
        and (arm.num_examples is not None or place.size == min(report.sizes, default=0))
        and place.dataset in arm.datasets
    ]

    def vocabulary(place: Place, arm: Arm, entry: Entry | str) -> Entry | str:
        return entry if report.labelled(place.task) else "n/a"

    fields: Fields = [
        ("model", lambda place, arm: place.task.model),
        ("source", lambda place, arm: place.task.source),
        ("eval", lambda place, arm: place.evaluated),
        ("N", lambda place, arm: "any" if arm.num_examples is None else str(arm.num_examples)),
        ("recipe", lambda place, arm: arm.label),
        ("answers", lambda place, arm: arm.answers or MISSING),
        ("draws", lambda place, arm: _draws(report, place, arm)),
        ("accuracy [95%]", lambda place, arm: _interval(place, arm, "accuracy")),
        ("NLL [95%]", lambda place, arm: _interval(place, arm, "nll")),
        ("Brier [95%]", lambda place, arm: _interval(place, arm, "brier")),
        ("ECE [95%]", lambda place, arm: _interval(place, arm, "ece")),
        (
            "accuracy (voc.) [95%]",
            lambda place, arm: vocabulary(place, arm, _interval(place, arm, "accuracy_vocabulary")),
        ),
        (
            "ECE (voc.)",
            lambda place, arm: vocabulary(place, arm, _mean(arm.values(place.dataset, "ece_vocabulary"))),
        ),
        ("ECE, temp.-scaled", lambda place, arm: _scaled_ece(place, arm)),
        ("asim to ICL", lambda place, arm: _asim(place, arm)),
        ("seconds", lambda place, arm: _seconds(arm)),
        *headroom_fields(report),
    ]
    notes = [
        *about(report.arms, report.select),
        "Accuracy (in percent), NLL, Brier and ECE are among the labels; (voc.): over the vocabulary. Means "
        "over draws with 95% t-intervals over draws, of which one draw has none; the rest: mean (sd over "
        "draws). Answers: what is learned in the last supervised stage. asim of `icl`: the base model "
        "without demonstrations, the null baseline. Seconds: teacher and training, of one run.",
    ]
    return fill("full", f"All results of {report.results.name}.", fields, rows, notes)


def headroom_fields(report: Report) -> Fields:
    """The base model, ICL − SFT, both among the labels and in percent, and whether ICL works; of a place."""

    def base(place: Place, *_: object) -> str:
        found = report.icl(place)
        return MISSING if found is None or found.base is None else f"{100 * found.base:.1f}"

    def headroom(place: Place, *_: object) -> Entry:
        found = report.icl(place)
        return interval_entry(None if found is None else found.judged.headroom, signed=True, percent=True)

    def works(place: Place, *_: object) -> str:
        found = report.icl(place)
        if found is None:
            return MISSING
        return "yes" if found.judged.word == "yes" else f"{found.judged.word}: {found.judged.reason}"

    return [("base", base), ("ICL − SFT [95%]", headroom), ("ICL works", works)]


def _draws(report: Report, place: Place, arm: Arm) -> str:
    there = len(arm.evaluations(place.dataset))
    expected = 1 if arm.num_examples is None else report.expected_seeds(place.task, arm.num_examples)
    return str(there) if there == expected else f"{there} of {expected}"


def _interval(place: Place, arm: Arm, measure: str) -> Entry:
    found = bounded(t_interval(list(arm.values(place.dataset, measure).values())), measure)
    return interval_entry(found, percent=measure.startswith("accuracy"))


def _mean(values: dict[int | None, float]) -> str:
    return mean_entry(values).text


def _scaled_ece(place: Place, arm: Arm) -> str:
    found = {seed: e.scaled_ece for seed, e in arm.evaluations(place.dataset).items()}
    return _mean({seed: value for seed, value in found.items() if value is not None})


def _asim(place: Place, arm: Arm) -> str:
    """Similarity was measured on the benchmark's own rows."""
    return _mean({s: c.similarity["asim"] for s, c in arm.runs.items() if c.similarity and place.is_own})


def _seconds(arm: Arm) -> str:
    """Of one run: teacher and training."""
    total = sum(v for c in arm.runs.values() for kind, v in c.seconds.items() if kind not in OVERHEAD)
    return f"{total / len(arm.runs):.0f}" if total else MISSING


def icl_table(report: Report) -> Table:
    """Whether in-context learning works, by task and N."""
    rows = [
        (place, found) for place in report.where(icl_works=False).places() if (found := report.icl(place))
    ]
    fields: Fields = [
        ("model", lambda place, found: place.task.model),
        ("source", lambda place, found: place.task.source),
        ("eval", lambda place, found: place.evaluated),
        ("N", lambda place, found: str(place.size)),
        ("ICL", lambda place, found: Entry(f"{100 * found.icl:.1f}", value={"accuracy": found.icl})),
        ("chance", lambda place, found: f"{100 * found.chance:.1f}"),
        *headroom_fields(report),
    ]
    arms = [arm for place, _ in rows if (arm := report.plain(place.task, place.size, "icl"))]
    notes = [
        *about(arms, report.select),
        "Accuracy among the labels in percent, mean over draws. As `ia2 probe` judges: `yes` needs ICL above "
        "chance, and the 95% t-intervals over draws of ICL − SFT and of ICL − base above zero.",
    ]
    return fill("icl", "Does in-context learning work?", fields, rows, notes)


def threshold_table(report: Report) -> Table:
    """Differences of IA2 → SFT and SFT over N and where they end; no row of a task with a single N."""
    rows: list[tuple[Task, Threshold, Threshold]] = []
    used: list[Arm] = []
    places = report.places(own=True)
    for task in report.tasks:
        sizes = [place.size for place in places if place.task == task]
        pairs = {size: pair for size in sizes if (pair := report.pair(task, size)) is not None}
        better = effectiveness_threshold(pairs, task.benchmark)
        by_margin = effectiveness_threshold(pairs, task.benchmark, margin=MARGIN)
        if better is not None and by_margin is not None:
            rows.append((task, better, by_margin))
            used += [arm for pair in pairs.values() for arm in pair]
    fields: Fields = [
        ("model", lambda task, *_: task.model),
        ("benchmark", lambda task, *_: task.source),
        *(
            (
                Column(f"N = {size}", f"{TITLES[METHOD]} − SFT, accuracy"),
                lambda task, better, _, size=size: _difference(better, size),
            )
            for size in report.sizes
        ),
        (Column("better [95%]", "until"), lambda task, better, _: _threshold(better)),
        (Column(f"better by {100 * MARGIN:g} point [95%]", "until"), lambda task, _, more: _threshold(more)),
    ]
    notes = [
        *about(used, report.select),
        "In percentage points among the labels (draws that both have). The threshold is the N at which the "
        "difference, linear in log N between sizes, falls to zero for the last time; its ends are those of "
        "the t-intervals over draws, paired. One draw at some size: no ends. An end outside the sizes tried "
        "means: by that end it was never better, or still better at the largest.",
    ]
    title = f"Effectiveness threshold: the N from which {TITLES[METHOD]} is no longer more accurate than SFT."
    return fill("thresholds", title, fields, rows, notes)


def _difference(found: Threshold, size: int) -> Entry:
    if size not in found.differences:
        return Entry(MISSING)
    interval = found.differences[size]
    mean = {"value": interval.value, "low": None, "high": None}
    text = f"{estimate(mean, signed=True, percent=True)} ({interval.units})"
    return Entry(text, value={"mean": float(interval.value)})


def _threshold(found: Threshold) -> Entry:
    named = {math.inf: "still better", -math.inf: "never better"}
    ends = {"n": found.value, "low": found.low, "high": found.high}
    value = {name: None if math.isnan(x) else named.get(x, x) for name, x in ends.items()}
    return Entry(found.words(), value=value)
