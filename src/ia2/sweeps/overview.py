"""What a sweep shows, in short; and the tables that the paper has not.

``full``: every number with its interval. ``thresholds``: the N from which IA2 → SFT is no longer better than
SFT. ``icl``: whether in-context learning works. (``tests`` is in :mod:`ia2.sweeps.significance`.)
"""

from __future__ import annotations

import math
from typing import Any

from ia2.evaluation.statistics import main_scope, side
from ia2.sweeps.layouts import headroom_entries
from ia2.sweeps.records import OVERHEAD, seconds_by_kind, work_in_words
from ia2.sweeps.report import METHOD, RIVAL, TITLES, Report, answers_of
from ia2.sweeps.selection import Arm, Task
from ia2.sweeps.significance import works_on
from ia2.sweeps.statistics import (
    PairedTest,
    by_seed,
    differences_by_seed,
    interval,
    metric_by_seed,
    of_values,
    paired_test,
    summarise,
)
from ia2.sweeps.tables import Column, Entry, Table, mean_sd
from ia2.sweeps.threshold import Threshold, effectiveness_threshold
from ia2.wording import MISSING, counted, estimate

# What "better" means in the second column of thresholds: accuracy falls to zero difference ever more slowly.
MARGIN = 0.01


# --------------------------------------------------------------------------------------- every number


def full_table(report: Report, *, where_icl_works: bool = False) -> Table:
    """Every measure of every arm on everything that it was evaluated on."""
    columns = (
        *map(Column, ("model", "source", "eval", "N", "recipe", "answers", "draws")),
        *map(Column, ("accuracy [95%]", "NLL [95%]", "Brier [95%]", "ECE [95%]")),
        *map(Column, ("accuracy (voc.) [95%]", "ECE (voc.)", "ECE, temp.-scaled", "asim to ICL", "seconds")),
        *map(Column, ("base", "ICL − SFT [95%]", "ICL works")),
    )
    rows = []
    for task in report.tasks:
        for dataset in report.datasets(task):
            for size in report.sizes or [0]:
                if where_icl_works and not works_on(report, task, size, dataset):
                    continue
                for label in report.labels:
                    arm = report.arm(task, size, label)
                    # the base model has no N: it stands with the smallest
                    if arm is None or (arm.num_examples is None and size != (report.sizes or [0])[0]):
                        continue
                    if summarise(arm, dataset, "accuracy") is not None:
                        rows.append(_full_row(report, task, dataset, size, arm))
    notes = [
        *report.about(report.tasks, report.arms),
        "Accuracy (in percent), NLL, Brier and ECE are among the labels; (voc.): over the "
        "vocabulary. Means over "
        "draws with 95% t-intervals over draws, of which one draw has none; the rest: mean (sd over draws). "
        "Answers: what is learned in the last supervised stage. asim of `icl`: the base model "
        "without demonstrations, the null baseline. "
        "Seconds: teacher and training, of one run.",
    ]
    return Table("full", f"All results of {report.results.name}.", columns, tuple(rows), tuple(notes))


def _full_row(report: Report, task: Task, dataset: str, size: int, arm: Arm) -> tuple[Entry, ...]:
    labelled = report.labelled(task)
    expected = report.expected_seeds(task, arm.num_examples) if arm.num_examples is not None else 1
    there = sum(dataset in cell.evaluations for cell in arm.runs.values())
    own = dataset == task.benchmark
    asim = {s: c.similarity["asim"] for s, c in arm.runs.items() if c.similarity and own}
    seconds = {
        s: sum(v for kind, v in c.seconds.items() if kind not in OVERHEAD) for s, c in arm.runs.items()
    }
    source = f"{task.benchmark}, {task.verbaliser}" if task.verbaliser else task.benchmark
    return (
        Entry(task.model),
        Entry(source),
        Entry(dataset if own else f"{dataset} (OOD)"),
        Entry(str(arm.num_examples) if arm.num_examples is not None else "any"),
        Entry(arm.label),
        Entry(answers_of(arm) or MISSING),
        Entry(str(there) if there == expected else f"{there} of {expected}"),
        *(_with_interval(arm, dataset, measure) for measure in ("accuracy", "nll", "brier", "ece")),
        _with_interval(arm, dataset, "accuracy_vocabulary") if labelled else Entry("n/a"),
        _mean(by_seed(arm, dataset, "ece_vocabulary")) if labelled else Entry("n/a"),
        _mean(metric_by_seed(arm, dataset, "scaled", main_scope(labelled), "ece")),
        _mean(asim),
        Entry(f"{sum(seconds.values()) / len(seconds):.0f}" if any(seconds.values()) else MISSING),
        *headroom_entries(report, task, size, dataset),
    )


def _with_interval(arm: Arm, dataset: str, measure: str) -> Entry:
    found = interval(arm, dataset, measure)
    if found is None:
        return Entry(MISSING)
    of = found.to_dict()
    return Entry(estimate(of, percent=measure.startswith("accuracy")), value=of)


def _mean(values: dict[int | None, float]) -> Entry:
    found = of_values(values)
    return Entry(MISSING) if found is None else Entry(mean_sd(found.mean, found.sd, percent=False))


# ----------------------------------------------------------------------------------------- thresholds


def threshold_table(report: Report, *, where_icl_works: bool = False) -> Table | None:
    """Differences of IA2 → SFT and SFT over N and where they end; None with a single N."""
    rows, used = [], []
    for task in report.tasks:
        pairs = {n: pair for n in report.sizes if (pair := report.pair(task, n)) is not None}
        if where_icl_works:
            pairs = {n: pair for n, pair in pairs.items() if works_on(report, task, n, task.benchmark)}
        methods, rivals = ({n: pair[which] for n, pair in pairs.items()} for which in (0, 1))
        found = [
            effectiveness_threshold(methods, rivals, task.benchmark, margin=margin)
            for margin in (0.0, MARGIN)
        ]
        if found[0] is None or found[1] is None:
            continue
        used += [arm for pair in pairs.values() for arm in pair]
        by_size = dict(
            zip(found[0].sizes, zip(found[0].differences, found[0].seeds, strict=True), strict=True)
        )
        rows.append(
            (
                Entry(task.model),
                Entry(f"{task.benchmark}, {task.verbaliser}" if task.verbaliser else task.benchmark),
                *(_at(by_size.get(size)) for size in report.sizes),
                *(Entry(t.words(), value=_threshold_value(t)) for t in found if t is not None),
            )
        )
    if not rows:
        return None
    columns = (
        *map(Column, ("model", "benchmark")),
        *(Column(f"N = {size}", f"{TITLES[METHOD]} − SFT, accuracy") for size in report.sizes),
        Column("better [95%]", "until"),
        Column(f"better by {100 * MARGIN:g} point [95%]", "until"),
    )
    tasks = list(dict.fromkeys(arm.task for arm in used))
    notes = [
        *report.about(tasks, used),
        "In percentage points among the labels (draws that both have). The threshold is the N at which the "
        "difference, linear in log N between sizes, falls to zero for the last time; its ends "
        "are those of the "
        "t-intervals over draws, paired. One draw at some size: no ends. An end outside the "
        "sizes tried means: "
        "by that end it was never better, or still better at the largest.",
    ]
    title = f"Effectiveness threshold: the N from which {TITLES[METHOD]} is no longer more accurate than SFT."
    return Table("thresholds", title, columns, tuple(rows), tuple(notes))


def _at(found: tuple[float, int] | None) -> Entry:
    if found is None:
        return Entry(MISSING)
    mean = {"value": found[0], "low": None, "high": None}
    return Entry(f"{estimate(mean, signed=True, percent=True)} ({found[1]})", value={"mean": found[0]})


def _threshold_value(found: Threshold) -> dict[str, Any]:
    named = {math.inf: "still better", -math.inf: "never better"}
    ends = (("n", found.value), ("low", found.low), ("high", found.high))
    return {name: None if math.isnan(x) else named.get(x, x) for name, x in ends}


# ------------------------------------------------------------------------------------------------ icl


def icl_table(report: Report) -> Table | None:
    """Whether in-context learning works, by task and N; None where it was not run."""
    rows, used = [], []
    for task in report.tasks:
        for dataset in report.datasets(task):
            for size in report.sizes:
                found, arm = report.icl(task, size, dataset), report.plain(task, size, "icl")
                if found is None or arm is None:
                    continue
                used.append(arm)
                rows.append(
                    (
                        Entry(task.model),
                        Entry(f"{task.benchmark}, {task.verbaliser}" if task.verbaliser else task.benchmark),
                        Entry(dataset if dataset == task.benchmark else f"{dataset} (OOD)"),
                        Entry(str(size)),
                        Entry(f"{100 * found.icl:.1f}", value={"accuracy": found.icl}),
                        Entry(f"{100 * found.chance:.1f}"),
                        *headroom_entries(report, task, size, dataset),
                    )
                )
    if not rows:
        return None
    columns = ("model", "source", "eval", "N", "ICL", "chance", "base", "ICL − SFT [95%]", "ICL works")
    notes = [
        *report.about(list(dict.fromkeys(arm.task for arm in used)), used),
        "Accuracy among the labels in percent, mean over draws. As `ia2 probe` judges: `yes` needs ICL above "
        "chance, and the 95% t-intervals over draws of ICL − SFT and of ICL − base above zero.",
    ]
    return Table(
        "icl", "Does in-context learning work?", tuple(map(Column, columns)), tuple(rows), tuple(notes)
    )


# ------------------------------------------------------------------------------------------- overview


def overview_lines(report: Report) -> list[str]:
    """What was run, the verdict on IA2 → SFT, and whether ICL worked; sentences."""
    results = report.results
    count = len(results.cells)
    of = f"{count} of " if results.total not in (None, count) else ""
    cells = of + counted(results.total or count, "cell")
    failed = f", {results.failed} failed" if results.failed else ""
    seeds = {cell.seed for cell in results.cells if cell.seed is not None}
    seconds = seconds_by_kind(cell.seconds for cell in results.cells)
    took = f"; {work_in_words(seconds)}" if sum(seconds.values()) else ""
    sources = list(dict.fromkeys(task.benchmark for task in report.tasks))
    return [
        f"{results.name}: {cells}{failed}{took}. Models {', '.join(report.models)}; benchmarks "
        f"{', '.join(sources)}; recipes {', '.join(report.labels)}; N = {', '.join(map(str, report.sizes))}; "
        f"{counted(len(seeds), 'seed')}.",
        *verdict_lines(report),
        *_icl_lines(report),
    ]


def verdict_lines(report: Report) -> list[str]:
    """IA2 → SFT against SFT in two sentences: over all label and free-text tasks, and where ICL works."""
    every = pooled(report)
    if every["accuracy"] is None:
        return [f"{METHOD} and {RIVAL} were not both run: there is no verdict."]
    where = pooled(report, where_icl_works=True)
    sizes = ", ".join(map(str, report.sizes))
    lines = [f"Over everything (N = {sizes}): {_verdict(every)}"]
    if where["accuracy"] is None:
        return [*lines, "Where ICL works: there is no such benchmark among these."]
    if where == every:
        return [*lines, "Where ICL works: the same, it works on all of them."]
    return [*lines, f"Where ICL works: {_verdict(where)}"]


def pooled(report: Report, *, where_icl_works: bool = False) -> dict[str, PairedTest | None]:
    """IA2 → SFT less SFT over models, N, benchmarks and seeds, by measure; only accuracy of free text."""
    found: dict[str, PairedTest | None] = {}
    for measure in ("accuracy", "nll", "accuracy_vocabulary"):
        pairs: dict[str, list[float]] = {}
        for task in report.tasks:
            for size in report.sizes:
                if measure != "accuracy" and not report.labelled(task):
                    continue
                if where_icl_works and not works_on(report, task, size, task.benchmark):
                    continue
                pair = report.pair(task, size)
                if pair is not None:
                    values = differences_by_seed(*pair, task.benchmark, measure)
                    pairs.setdefault(task.benchmark, []).extend(values.values())
        pairs = {name: values for name, values in pairs.items() if values}
        found[measure] = paired_test(pairs) if pairs else None
    return found


def _verdict(found: dict[str, PairedTest | None]) -> str:
    accuracy, nll, vocabulary = found["accuracy"], found["nll"], found["accuracy_vocabulary"]
    assert accuracy is not None
    word = _word(accuracy, "more accurate", "less accurate", "no more accurate")
    text = f"{TITLES[METHOD]} is {word} than SFT, {_shown(accuracy, percent=True)} points"
    if nll is not None and vocabulary is not None:
        word = _word(nll, "worse", "better", "no better")
        text += (
            f" among the labels ({_shown(vocabulary, percent=True)} over the vocabulary), and {word} in NLL, "
            f"{_shown(nll, percent=False)}"
        )
    several = accuracy.clusters > 1
    how = "95% t over benchmarks" if several else "one benchmark: no interval over them"
    of = f"{counted(accuracy.clusters, 'benchmark')}, {counted(accuracy.pairs, 'pair')} of runs"
    return f"{text} ({of}; {how})."


def _shown(found: PairedTest, *, percent: bool) -> str:
    return estimate(found.whole.to_dict(), signed=True, percent=percent)


def _word(found: PairedTest, above: str, below: str, equal: str) -> str:
    value = float(found.whole.value)
    if abs(value) < 1e-12:
        return equal
    word = above if value > 0 else below
    if found.clusters < 2:
        # the draws of one benchmark say nothing of others
        return f"{word} on this one benchmark"
    return word if side(found.whole.to_dict()) else f"not distinguishably {word}"


def _icl_lines(report: Report) -> list[str]:
    lines = []
    for model in report.models:
        for size in report.sizes:
            by: dict[str, list[str]] = {}
            for task in report.tasks:
                found = report.icl(task, size, task.benchmark) if task.model == model else None
                if found is not None:
                    by.setdefault(found.verdict, []).append(task.benchmark)
            if by:
                listed = "; ".join(
                    f"{word}: {', '.join(by[word])}" for word in ("yes", "unclear", "no") if word in by
                )
                lines.append(f"Does ICL work with {model} at N = {size}? {listed}.")
    return lines
