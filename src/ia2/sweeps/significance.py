"""Tables of tests: IA2 → SFT against SFT at each N (the paper's table 8), and every pair of recipes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ia2.evaluation.statistics import holm
from ia2.sweeps.report import METHOD, TITLES, Report, answers_of
from ia2.sweeps.selection import Arm, Task
from ia2.sweeps.statistics import MEASURES, PairedTest, differences_by_seed, paired_test
from ia2.sweeps.tables import Column, Entry, Table, p_value
from ia2.wording import MISSING, estimate

_MEASURES = {name: MEASURES[name] for name in ("accuracy", "nll", "brier", "ece", "accuracy_vocabulary")}

# Benchmark → difference of each seed; models on its test rows belong to the same benchmark.
_Pairs = dict[str, list[float]]


@dataclass(frozen=True)
class Tested:
    """One test of a table.

    Attributes:
        lead: its first fields.
        measure: of :data:`ia2.sweeps.statistics.MEASURES`.
        found: the result.
    """

    lead: tuple[str, ...]
    measure: str
    found: PairedTest


def significance_table(report: Report, *, where_icl_works: bool = False) -> Table | None:
    """The paper's table 8: IA2 → SFT less SFT at each N, over benchmarks and seeds; None without pairs.

    Pairs are of (trained on, evaluated on, seed), out of distribution too, as in the paper; what was trained
    on is one benchmark, since its evaluations share their training examples.
    """
    tests = []
    used: list[Arm] = []
    for size in report.sizes:
        for labelled, kind in ((True, "labels"), (False, "free text")):
            for measure in _MEASURES if labelled else ["accuracy"]:
                pairs: _Pairs = {}
                for task in report.tasks:
                    found = report.pair(task, size)
                    if report.labelled(task) != labelled or found is None:
                        continue
                    for dataset in report.datasets(task):
                        if not where_icl_works or works_on(report, task, size, dataset):
                            used += found
                            _gather(pairs, *found, dataset, measure)
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
        "on their own test rows and out of distribution",
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
                        if measure != "accuracy" and not report.labelled(task):
                            continue
                        a, b = report.arm(task, size, first), report.arm(task, size, second)
                        if a is not None and b is not None:
                            used += [a, b]
                            _gather(pairs, a, b, a.task.benchmark, measure)
                    if pairs:
                        lead = (model, str(size), f"{first} − {second}{unlike(used[-2:])}")
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
        "own test rows, no OOD evaluations",
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


def unlike(pair: Sequence[Arm]) -> str:
    """That two recipes learned other answers, which makes them no like for like; empty where they did not."""
    answers = [answers_of(arm) for arm in pair]
    if None in answers or len(set(answers)) == 1:
        return ""
    return f" ({answers[0]} answers against {answers[1]} answers)"


def _gather(pairs: _Pairs, first: Arm, second: Arm, dataset: str, measure: str) -> None:
    found = differences_by_seed(first, second, dataset, measure)
    if found:
        pairs.setdefault(first.task.benchmark, []).extend(found.values())


def _table(
    report: Report,
    name: str,
    title: str,
    lead: Sequence[str],
    tests: Sequence[Tested],
    used: Sequence[Arm],
    evaluated: str,
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
        f"Benchmarks: {benchmarks}; {evaluated}. Accuracy in percentage points, and all but "
        "the accuracy over the "
        "vocabulary among the labels.",
        "Pairs are of one evaluation and seed. All p-values are two-sided; Holm: corrected over the "
        f"{len(tests)} tests of this table, each kind of test apart.",
        "Seeds of one benchmark share its test rows, so pairs are not independent and tests over "
        "(benchmark, seed), the paper's, find too much. The honest columns are those of benchmarks as "
        "wholes: a t-test of their means, and its interval.",
    ]
    return Table(name, title, columns, tuple(rows), tuple(notes))


def _row(test: Tested, p_t: float, p_wilcoxon: float, p_cluster: float) -> tuple[Entry, ...]:
    found, percent = test.found, test.measure.startswith("accuracy")
    # the others are errors: less is better
    better = found.higher if percent else found.lower
    mean = {"value": found.mean, "low": None, "high": None}
    whole = found.whole.to_dict()
    return (
        *map(Entry, test.lead),
        Entry(_MEASURES[test.measure]),
        Entry(str(found.pairs)),
        Entry(estimate(mean, signed=True, percent=percent), value={"mean": found.mean}),
        Entry(MISSING if found.t != found.t else f"{found.t:.2f}".replace("-", "−")),
        Entry(p_value(found.p_t)),
        Entry(p_value(p_t)),
        Entry(p_value(found.p_wilcoxon)),
        Entry(p_value(p_wilcoxon)),
        Entry(f"{better} of {found.clusters}"),
        Entry(estimate(whole, signed=True, percent=percent), value=whole),
        Entry(p_value(found.p_cluster)),
        Entry(p_value(p_cluster)),
    )
