"""What a sweep shows, in short; and the tables that the paper has not.

``full``: every number with its interval. ``thresholds``: the N from which IA2 → SFT is no longer better than
SFT. ``icl``: whether in-context learning works. (``tests`` is in :mod:`ia2.sweeps.significance`.)
"""

from __future__ import annotations

import math
from typing import Any

from ia2.probing import SIGNIFICANCE
from ia2.sweeps.records import OVERHEAD, seconds_by_kind, work_in_words
from ia2.sweeps.report import METHOD, RIVAL, TITLES, Report
from ia2.sweeps.selection import Arm, Task
from ia2.sweeps.significance import works_on
from ia2.sweeps.statistics import (
    PairedTest,
    differences_by_seed,
    interval,
    metric_by_seed,
    of_values,
    paired_test,
    summarise,
)
from ia2.sweeps.tables import MISSING, Column, Entry, Table, mean_sd, signed
from ia2.sweeps.threshold import Threshold, effectiveness_threshold
from ia2.wording import counted

# What "better" means in the second column of thresholds: accuracy falls to zero difference ever more slowly.
MARGIN = 0.01


# --------------------------------------------------------------------------------------- every number


def full_table(report: Report, *, where_icl_works: bool = False) -> Table:
    """Accuracy and calibration of every arm on everything that it was evaluated on."""
    columns = (
        *map(Column, ("model", "source", "eval", "N", "recipe", "seeds", "accuracy [95%]", "ECE [95%]")),
        *map(Column, ("ECE, temp.-scaled", "NLL", "asim to ICL", "seconds")),
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
                        rows.append(_full_row(report, task, dataset, arm))
    notes = [
        *report.about(report.tasks, report.arms),
        "Accuracy and ECE: means over seeds, 95% bootstrap intervals over seeds and test rows. The rest: "
        "mean (sd over seeds). asim of `icl`: the base model without demonstrations, the null baseline. "
        "Seconds: teacher and training, of one run.",
    ]
    return Table("full", f"All results of {report.results.name}.", columns, tuple(rows), tuple(notes))


def _full_row(report: Report, task: Task, dataset: str, arm: Arm) -> tuple[Entry, ...]:
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
        Entry(str(there) if there == expected else f"{there} of {expected}"),
        _with_interval(arm, dataset, "accuracy"),
        _with_interval(arm, dataset, "ece") if labelled else Entry("n/a"),
        _mean(metric_by_seed(arm, dataset, "scaled", "vocabulary", "ece")) if labelled else Entry("n/a"),
        _mean(metric_by_seed(arm, dataset, "vocabulary", "nll")),
        _mean(asim),
        Entry(f"{sum(seconds.values()) / len(seconds):.0f}" if any(seconds.values()) else MISSING),
    )


def _with_interval(arm: Arm, dataset: str, measure: str) -> Entry:
    found = interval(arm, dataset, measure)
    if found is None:
        return Entry(MISSING)
    percent = measure == "accuracy"
    low, high = ((f"{100 * x:.1f}" if percent else f"{x:.3f}") for x in (found.low, found.high))
    mean = f"{100 * found.value:.1f}" if percent else f"{found.value:.3f}"
    return Entry(f"{mean} [{low}, {high}]", value=found.to_dict())


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
        "In percentage points (seeds that both have). The threshold is the N at which the difference, "
        "linear in log N between sizes, falls to zero for the last time; its interval comes from a bootstrap "
        "over seeds and test rows, paired. An end outside the sizes tried means: in some of the resamples it "
        "was never better, or still better at the largest.",
    ]
    title = f"Effectiveness threshold: the N from which {TITLES[METHOD]} is no longer more accurate than SFT."
    return Table("thresholds", title, columns, tuple(rows), tuple(notes))


def _at(found: tuple[float, int] | None) -> Entry:
    if found is None:
        return Entry(MISSING)
    return Entry(f"{signed(found[0], None, None, percent=True)} ({found[1]})", value={"mean": found[0]})


def _threshold_value(found: Threshold) -> dict[str, Any]:
    named = {math.inf: "still better", -math.inf: "never better"}
    return {
        name: named.get(x, x) for name, x in (("n", found.value), ("low", found.low), ("high", found.high))
    }


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
                        Entry(MISSING if found.base is None else f"{100 * found.base:.1f}"),
                        Entry(f"{100 * found.chance:.1f}"),
                        Entry(
                            found.verdict if found.verdict == "yes" else f"{found.verdict}: {found.reason}"
                        ),
                    )
                )
    if not rows:
        return None
    columns = ("model", "source", "eval", "N", "ICL", "base", "chance", "ICL works")
    notes = [
        *report.about(list(dict.fromkeys(arm.task for arm in used)), used),
        "Accuracy in percent, mean over seeds. As `ia2 probe` judges: `yes` needs ICL above chance among the "
        "labels (binomial test) and above the base model by five points and beyond doubt (sign test on "
        "rows); tests one-sided, 5%.",
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
    """IA2 → SFT less SFT over all models, N, benchmarks and seeds, by measure; ECE of labels only."""
    found: dict[str, PairedTest | None] = {}
    for measure in ("accuracy", "ece"):
        pairs: dict[str, list[float]] = {}
        for task in report.tasks:
            for size in report.sizes:
                if measure == "ece" and not report.labelled(task):
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
    accuracy, ece = found["accuracy"], found["ece"]
    assert accuracy is not None
    word = _word(accuracy, "more accurate", "less accurate", "no more accurate")
    shown = signed(accuracy.cluster_mean, accuracy.low, accuracy.high, percent=True)
    text = f"{TITLES[METHOD]} is {word} than SFT, {shown} points"
    if ece is not None:
        word = _word(ece, "worse calibrated", "better calibrated", "no better calibrated")
        shown = signed(ece.cluster_mean, ece.low, ece.high, percent=False)
        text += f" and {word}, ECE {shown}"
    several = accuracy.clusters > 1
    how = "95% over benchmarks and seeds" if several else "one benchmark: no interval over them"
    of = f"{counted(accuracy.clusters, 'benchmark')}, {counted(accuracy.pairs, 'pair')} of runs"
    return f"{text} ({of}; {how})."


def _word(found: PairedTest, above: str, below: str, equal: str) -> str:
    if abs(found.cluster_mean) < 1e-12 and not found.low < 0 < found.high:
        return equal
    word = above if found.cluster_mean > 0 else below
    if found.low > 0 or found.high < 0:
        # an interval that draws from a few benchmarks is too narrow: a t-test of them must agree
        return word if found.p_cluster < SIGNIFICANCE else f"{word} on these few benchmarks"
    if math.isnan(found.low):
        # the seeds of one benchmark say nothing of others
        return f"{word} on this one benchmark"
    return f"not distinguishably {word}"


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
