"""Tables that the paper has not: every number, whether ICL works, and where the method's lead ends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ia2.experiment.sweep.records import OVERHEAD
from ia2.report.sweep.cells import TITLES, Place, Report
from ia2.report.sweep.notes import about
from ia2.report.sweep.selection import ChosenRuns, check_same_rows, differences
from ia2.utils.format import Column, Entry, Row, Table, fill, interval_entry, mean_entry
from ia2.utils.statistics import Interval, bounded, t_interval
from ia2.utils.wording import MISSING, estimate

# What "better" means in the second column of thresholds: accuracy falls to zero difference ever more slowly.
MARGIN = 0.01


def headroom(report: Report, place: Place) -> Row:
    """The base model, ICL − SFT, both among the labels and in percent, and whether ICL works."""
    verdict = report.icl(place)
    if verdict is None:
        return {"base": MISSING, "ICL − SFT [95%]": MISSING, "ICL works": MISSING}
    judged = verdict.judged
    return {
        "base": MISSING if verdict.base is None else f"{100 * verdict.base:.1f}",
        "ICL − SFT [95%]": interval_entry(judged.headroom, signed=True, percent=True),
        "ICL works": "yes" if judged.word == "yes" else f"{judged.word}: {judged.reason}",
    }


# ------------------------------------------------------------------------------------------- tables


def full_table(report: Report) -> Table:
    """Every measure of every recipe on everything that it was evaluated on."""
    rows = [
        _full_row(report, place, runs)
        for place in report.places()
        for label in report.labels
        if (runs := report.of_label(place.task, place.size, label)) is not None
        # the base model has no N: it stands with the smallest
        and (runs.num_examples is not None or place.size == min(report.sizes, default=0))
        and runs.evaluations(place.dataset)
    ]
    notes = [
        *about(report.runs, report.select),
        "Accuracy (in percent), NLL, Brier and ECE are among the labels; (voc.): over the vocabulary. Means "
        "over draws with 95% t-intervals over draws, of which one draw has none; the rest: mean (sd over "
        "draws). Answers: what is learned in the last supervised stage. asim of `icl`: the base model "
        "without demonstrations, the null baseline. Seconds: teacher and training, of one run.",
    ]
    return fill("full", f"All results of {report.results.name}.", rows, notes)


def _full_row(report: Report, place: Place, runs: ChosenRuns) -> Row:
    evaluations = runs.evaluations(place.dataset)
    expected = 1 if runs.num_examples is None else report.expected_seeds(place.task, place.size)
    scaled = {seed: e.scaled_ece for seed, e in evaluations.items() if e.scaled_ece is not None}
    # similarity was measured on the benchmark's own rows
    asim = {s: c.similarity["asim"] for s, c in runs.cells.items() if c.similarity and place.is_own}
    kinds = [pair for cell in runs.cells.values() for pair in cell.seconds.items()]
    seconds = sum(took for kind, took in kinds if kind not in OVERHEAD) / len(runs.cells)

    def interval(measure: str) -> Entry:
        ends = bounded(t_interval(list(runs.values(place.dataset, measure).values())), measure)
        return interval_entry(ends, percent=measure.startswith("accuracy"))

    labelled = report.labelled(place.task)
    return {
        "model": place.task.model,
        "source": place.task.source,
        "eval": place.evaluated,
        "N": "any" if runs.num_examples is None else str(runs.num_examples),
        "recipe": runs.label,
        "answers": runs.answers or MISSING,
        "draws": str(expected) if len(evaluations) == expected else f"{len(evaluations)} of {expected}",
        "accuracy [95%]": interval("accuracy"),
        "NLL [95%]": interval("nll"),
        "Brier [95%]": interval("brier"),
        "ECE [95%]": interval("ece"),
        "accuracy (voc.) [95%]": interval("accuracy_vocabulary") if labelled else "n/a",
        "ECE (voc.)": mean_entry(runs.values(place.dataset, "ece_vocabulary")).text if labelled else "n/a",
        "ECE, temp.-scaled": mean_entry(scaled).text,
        "asim to ICL": mean_entry(asim).text,
        "seconds": f"{seconds:.0f}" if seconds else MISSING,
        **headroom(report, place),
    }


def icl_table(report: Report) -> Table:
    """Whether in-context learning works, by task and N."""
    places = [place for place in report.where(icl_works=False).places() if report.icl(place)]
    rows: list[Row] = []
    for place in places:
        verdict = report.icl(place)
        assert verdict is not None
        rows.append(
            {
                "model": place.task.model,
                "source": place.task.source,
                "eval": place.evaluated,
                "N": str(place.size),
                "ICL": Entry(f"{100 * verdict.icl:.1f}", value={"accuracy": verdict.icl}),
                "chance": f"{100 * verdict.chance:.1f}",
                **headroom(report, place),
            }
        )
    used = [runs for place in places if (runs := report.plain(place.task, place.size, "icl"))]
    notes = [
        *about(used, report.select),
        "Accuracy among the labels in percent, mean over draws. As `ia2 probe` judges: `yes` needs ICL above "
        "chance, and the 95% t-intervals over draws of ICL − SFT and of ICL − base above zero.",
    ]
    return fill("icl", "Does in-context learning work?", rows, notes)


# --------------------------------------------------------------------------------------- thresholds


def threshold_table(report: Report) -> Table:
    """Differences of IA2 → SFT and SFT over N and where they end; no row of a task with a single N."""
    method = TITLES["ia2-sft"]
    rows: list[Row] = []
    used: list[ChosenRuns] = []
    places = report.places(own=True)
    for task in report.tasks:
        sizes = [place.size for place in places if place.task == task]
        pairs = {size: pair for size in sizes if (pair := report.pair(task, size)) is not None}
        found = differences_by_size(pairs, task.benchmark)
        if len(found) < 2:
            continue
        used += [runs for pair in pairs.values() for runs in pair]
        row: dict[Any, Entry | str] = {"model": task.model, "benchmark": task.source}
        for size in report.sizes:
            entry = Entry(MISSING)
            if size in found:
                mean = float(found[size].value)
                text = estimate({"value": mean, "low": None, "high": None}, signed=True, percent=True)
                entry = Entry(f"{text} ({found[size].units})", value={"mean": mean})
            row[Column(f"N = {size}", f"{method} − SFT, accuracy")] = entry
        row[Column("better [95%]", "until")] = threshold_entry(found)
        row[Column(f"better by {100 * MARGIN:g} point [95%]", "until")] = threshold_entry(found, MARGIN)
        rows.append(row)
    notes = [
        *about(used, report.select),
        "In percentage points among the labels (draws that both have). The threshold is the N at which the "
        "difference, linear in log N between sizes, falls to zero for the last time; its ends are those of "
        "the t-intervals over draws, paired. One draw at some size: no ends. An end outside the sizes tried "
        "means: by that end it was never better, or still better at the largest.",
    ]
    title = f"Effectiveness threshold: the N from which {method} is no longer more accurate than SFT."
    return fill("thresholds", title, rows, notes)


def differences_by_size(
    pairs: Mapping[int, tuple[ChosenRuns, ChosenRuns]], dataset: str
) -> dict[int, Interval]:
    """N → the difference in accuracy of the method and its rival, paired by draw."""
    check_same_rows(
        [e for pair in pairs.values() for runs in pair for e in runs.evaluations(dataset).values()]
    )
    by_seed = {n: differences(*pair, dataset, "accuracy") for n, pair in pairs.items()}
    return {n: t_interval(list(values.values())) for n, values in by_seed.items() if values}


def crossing(sizes: Sequence[int], values: Sequence[float], margin: float = 0.0) -> float:
    """The N behind which a curve stays at or below the margin, linear in log N between sizes.

    Where it crosses several times the last time counts: from there on it is no longer better.

    Returns:
        ``-inf`` where no size is better, ``inf`` where the largest is.
    """
    above = [value - margin for value in values]
    last = max((place for place, value in enumerate(above) if value > 0), default=None)
    if last is None:
        return -math.inf
    if last == len(above) - 1:
        return math.inf
    left, right = math.log2(sizes[last]), math.log2(sizes[last + 1])
    return float(2 ** (left + above[last] / (above[last] - above[last + 1]) * (right - left)))


def threshold_entry(found: Mapping[int, Interval], margin: float = 0.0) -> Entry:
    """``N ≈ 12 [6, 24]``, with ends outside the sizes in words; no ends where a size has one draw."""
    first, last = min(found), max(found)
    outside = {-math.inf: f"below {first}", math.inf: f"above {last}"}
    value, low, high = (
        crossing(list(found), [getattr(interval, end) for interval in found.values()], margin)
        for end in ("value", "low", "high")
    )
    numbers: dict[str, float | str | None] = {"n": value, "low": low, "high": high}
    if value == math.inf:
        text = f"still better at N = {last}"
    elif value == -math.inf:
        text = f"never better from N = {first} on"
    else:
        text = f"N ≈ {value:.3g}"
    if any(interval.units < 2 for interval in found.values()):
        numbers.update(low=None, high=None)
    elif low == high and math.isinf(low):
        text += " (for certain)"
    else:
        text += f" [{', '.join(outside.get(end, f'{end:.3g}') for end in (low, high))}]"
    named = {math.inf: "still better", -math.inf: "never better"}
    return Entry(text, value={name: named.get(end, end) for name, end in numbers.items()})  # type: ignore[arg-type, call-overload]
