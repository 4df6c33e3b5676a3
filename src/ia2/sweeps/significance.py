"""Tables of tests: IA2 → SFT against SFT at each N (the paper's table 8), and every pair of recipes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ia2.sweeps.report import METHOD, TITLES, Report
from ia2.sweeps.selection import Arm, Task
from ia2.sweeps.statistics import PairedTest, differences_by_seed, holm, paired_test
from ia2.sweeps.tables import Column, Entry, Table, p_value, signed

_MEASURES = {"accuracy": "accuracy", "ece": "ECE"}

# Benchmark → difference of each seed; models on its test rows belong to the same benchmark.
_Pairs = dict[str, list[float]]


@dataclass(frozen=True)
class Tested:
    """One test of a table.

    Attributes:
        lead: its first fields.
        measure: ``accuracy`` or ``ece``.
        found: the result.
    """

    lead: tuple[str, ...]
    measure: str
    found: PairedTest


def significance_table(report: Report, *, where_icl_works: bool = False) -> Table | None:
    """The paper's table 8: IA2 → SFT less SFT at each N, over benchmarks and seeds; None without pairs."""
    tests = []
    used: list[Arm] = []
    for size in report.sizes:
        for labelled, kind in ((True, "labels"), (False, "free text")):
            for measure in _MEASURES if labelled else ["accuracy"]:
                pairs: _Pairs = {}
                for task in report.tasks:
                    if report.labelled(task) != labelled or (
                        where_icl_works and not works_on(report, task, size, task.benchmark)
                    ):
                        continue
                    found = report.pair(task, size)
                    if found is not None:
                        used += found
                        _gather(pairs, *found, measure)
                if pairs:
                    tests.append(Tested((str(size), kind), measure, paired_test(pairs)))
    if not tests:
        return None
    return _table(
        report,
        "8",
        f"Table 8 of the paper, from these cells: {TITLES[METHOD]} less SFT, tested over "
        f"benchmarks and seeds{_where(where_icl_works)}, {', '.join(report.models)}.",
        ("N", "answers"),
        tests,
        used,
    )


def pairs_table(report: Report, *, where_icl_works: bool = False) -> Table | None:
    """The method against every other recipe and variant, by model and N; None without pairs."""
    tests = []
    used: list[Arm] = []
    for model in report.models:
        tasks = [task for task in report.tasks if task.model == model]
        for size in report.sizes:
            chosen = [t for t in tasks if not where_icl_works or works_on(report, t, size, t.benchmark)]
            for first, second in _rivals(report):
                for measure in _MEASURES:
                    pairs: _Pairs = {}
                    for task in chosen:
                        if measure == "ece" and not report.labelled(task):
                            continue
                        a, b = report.arm(task, size, first), report.arm(task, size, second)
                        if a is not None and b is not None:
                            used += [a, b]
                            _gather(pairs, a, b, measure)
                    if pairs:
                        lead = (model, str(size), f"{first} − {second}")
                        tests.append(Tested(lead, measure, paired_test(pairs)))
    if not tests:
        return None
    return _table(
        report,
        "tests",
        f"Differences between recipes, over benchmarks and seeds{_where(where_icl_works)}.",
        ("model", "N", "pair"),
        tests,
        used,
    )


def _where(where_icl_works: bool) -> str:
    return " where ICL works" if where_icl_works else ""


def works_on(report: Report, task: Task, size: int, dataset: str) -> bool:
    """Whether ICL works on a task's evaluation at a size."""
    found = report.icl(task, size, dataset)
    return found is not None and found.verdict == "yes"


def _rivals(report: Report) -> Iterator[tuple[str, str]]:
    """Each arm of the method with other recipes, of its variant or plain, and with the plain method."""
    arms = {arm.label: arm for arm in report.arms}
    for name in report.labels:
        arm = arms[name]
        if arm.recipe != METHOD:
            continue
        for other_name in report.labels:
            other = arms[other_name]
            alike = other.variant in ("", arm.variant)
            if alike and other_name != name and (other.recipe != METHOD or not other.variant):
                yield name, other_name


def _gather(pairs: _Pairs, first: Arm, second: Arm, measure: str) -> None:
    found = differences_by_seed(first, second, first.task.benchmark, measure)
    if found:
        pairs.setdefault(first.task.benchmark, []).extend(found.values())


def _table(
    report: Report,
    name: str,
    title: str,
    lead: Sequence[str],
    tests: Sequence[Tested],
    used: Sequence[Arm],
) -> Table:
    adjusted = [
        holm([getattr(test.found, which) for test in tests]) for which in ("p_t", "p_wilcoxon", "p_cluster")
    ]
    over, whole = "pairs:", "benchmarks:"
    columns = (
        *(Column(title_of) for title_of in lead),
        Column("measure"),
        *(
            Column(name, over)
            for name in ("n", "difference", "t", "p", "p Holm", "Wilcoxon", "Wilcoxon Holm")
        ),
        *(Column(name, whole) for name in ("better", "difference [95%]", "p", "p Holm")),
    )
    rows = [_row(test, *p) for test, *p in zip(tests, *adjusted, strict=True)]
    arms = list({id(arm): arm for arm in used}.values())
    tasks = list(dict.fromkeys(arm.task for arm in arms))
    benchmarks = ", ".join(dict.fromkeys(task.benchmark for task in tasks))
    notes = [
        *report.about(tasks, arms),
        f"Benchmarks: {benchmarks}; own test rows, no OOD evaluations. Accuracy in percentage points.",
        "Pairs are of one benchmark and seed. All p-values are two-sided; Holm: corrected over the "
        f"{len(tests)} tests of this table, each kind of test apart.",
        "Seeds of one benchmark share its test rows, so pairs are not independent and tests over "
        "(benchmark, seed), the paper's, find too much. The honest columns are those of benchmarks as "
        "wholes: a t-test of their means, and an interval that draws benchmarks and then seeds (too narrow "
        "with fewer than about six benchmarks).",
    ]
    return Table(name, title, columns, tuple(rows), tuple(notes))


def _row(test: Tested, p_t: float, p_wilcoxon: float, p_cluster: float) -> tuple[Entry, ...]:
    found, percent = test.found, test.measure == "accuracy"
    # ECE is an error: less is better
    better = found.higher if percent else found.lower
    difference = signed(found.cluster_mean, found.low, found.high, percent=percent)
    return (
        *map(Entry, test.lead),
        Entry(_MEASURES[test.measure]),
        Entry(str(found.pairs)),
        Entry(signed(found.mean, None, None, percent=percent), value={"mean": found.mean}),
        Entry("–" if found.t != found.t else f"{found.t:.2f}".replace("-", "−")),
        Entry(p_value(found.p_t)),
        Entry(p_value(p_t)),
        Entry(p_value(found.p_wilcoxon)),
        Entry(p_value(p_wilcoxon)),
        Entry(f"{better} of {found.clusters}"),
        Entry(difference, value={"value": found.cluster_mean, "low": found.low, "high": found.high}),
        Entry(p_value(found.p_cluster)),
        Entry(p_value(p_cluster)),
    )
