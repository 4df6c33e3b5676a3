"""Tables of tests: IA2 → SFT against SFT at each N (the paper's table 8), and every pair of recipes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

from ia2.experiment.sweep.records import MEASURES
from ia2.report.sweep.cells import METHOD, TITLES, Report
from ia2.report.sweep.entries import interval_entry, p_value
from ia2.report.sweep.notes import about
from ia2.report.sweep.selection import Arm
from ia2.utils.format import Column, Entry, Fields, Table, fill
from ia2.utils.statistics import PairedTest, holm, paired_test
from ia2.utils.wording import MISSING, estimate

_MEASURES = [measure for measure in MEASURES if measure != "ece_vocabulary"]


@dataclass(frozen=True)
class _Tested:
    """One test of a table: its first fields, measure, result and arms."""

    lead: tuple[str, ...]
    measure: str
    found: PairedTest
    arms: list[Arm]

    @property
    def percent(self) -> bool:
        """Whether it is of an accuracy; the others are errors, of which less is better."""
        return self.measure.startswith("accuracy")


def significance_table(report: Report) -> Table:
    """The paper's table 8: IA2 → SFT less SFT at each N, over benchmarks and seeds.

    Pairs are of (trained on, evaluated on, seed), out of distribution too, as in the paper; what was trained
    on is one benchmark, since its evaluations share their training examples.
    """
    tests = []
    for size in report.sizes:
        for labelled, kind in ((True, "labels"), (False, "free text")):
            places = [p for p in report.places(size=size) if report.labelled(p.task) == labelled]
            for measure in _MEASURES:
                pairs, used = report.pooled(places, measure)
                if pairs:
                    tests.append(_Tested((str(size), kind), measure, paired_test(pairs), used))
    title = (
        f"Table 8 of the paper, from these cells: {TITLES[METHOD]} less SFT, tested over benchmarks and "
        f"seeds{report.where_words}, {', '.join(report.models)}."
    )
    evaluated = "on their own test rows and out of distribution"
    return _table(report, "8", title, ("N", "answers"), tests, evaluated)


def pairs_table(report: Report) -> Table:
    """The method against every other recipe and variant, by model and N."""
    tests = []
    for model in report.models:
        for size in report.sizes:
            places = report.places(own=True, model=model, size=size)
            for first, second in _rivals(report):
                for measure in _MEASURES:
                    pairs, used = report.pooled(places, measure, (first, second))
                    if pairs:
                        lead = (model, str(size), f"{first} − {second}{_unlike(used[-2:])}")
                        tests.append(_Tested(lead, measure, paired_test(pairs), used))
    title = f"Differences between recipes, over benchmarks and seeds{report.where_words}."
    evaluated = "own test rows, no OOD evaluations"
    return _table(report, "tests", title, ("model", "N", "pair"), tests, evaluated)


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


def _unlike(pair: Sequence[Arm]) -> str:
    """That two recipes learned other answers, which makes them no like for like; empty where they did not."""
    first, second = (arm.answers for arm in pair)
    if None in (first, second) or first == second:
        return ""
    return f" ({first} answers against {second} answers)"


def _table(
    report: Report, name: str, title: str, lead: Sequence[str], tests: Sequence[_Tested], evaluated: str
) -> Table:
    over, whole = "pairs:", "benchmarks:"
    fields: Fields = [
        *((of, lambda test, *_, place=place: test.lead[place]) for place, of in enumerate(lead)),
        ("measure", lambda test, *_: MEASURES[test.measure]),
        (Column("n", over), lambda test, *_: str(test.found.pairs)),
        (Column("difference", over), lambda test, *_: _mean(test)),
        (Column("t", over), lambda test, *_: _t(test.found.t)),
        (Column("p", over), lambda test, *_: p_value(test.found.p_t)),
        (Column("p Holm", over), lambda test, p_t, *_: p_value(p_t)),
        (Column("Wilcoxon", over), lambda test, *_: p_value(test.found.p_wilcoxon)),
        (Column("Wilcoxon Holm", over), lambda test, p_t, p_wilcoxon, _: p_value(p_wilcoxon)),
        (Column("better", whole), lambda test, *_: _better(test)),
        (Column("difference [95%]", whole), lambda test, *_: _whole(test)),
        (Column("p", whole), lambda test, *_: p_value(test.found.p_cluster)),
        (Column("p Holm", whole), lambda test, p_t, p_wilcoxon, p_cluster: p_value(p_cluster)),
    ]
    p_values = (map(attrgetter(f"found.{which}"), tests) for which in ("p_t", "p_wilcoxon", "p_cluster"))
    used = [arm for test in tests for arm in test.arms]
    benchmarks = ", ".join(dict.fromkeys(arm.task.benchmark for arm in used))
    notes = [
        *about(used, report.select),
        f"Benchmarks: {benchmarks}; {evaluated}. Accuracy in percentage points, and all but the accuracy "
        "over the vocabulary among the labels.",
        "Pairs are of one evaluation and seed. All p-values are two-sided; Holm: corrected over the "
        f"{len(tests)} tests of this table, each kind of test apart.",
        "Seeds of one benchmark share its test rows, so pairs are not independent and tests over "
        "(benchmark, seed), the paper's, find too much. The honest columns are those of benchmarks as "
        "wholes: a t-test of their means, and its interval.",
    ]
    return fill(name, title, fields, zip(tests, *(holm(list(p)) for p in p_values), strict=True), notes)


def _mean(test: _Tested) -> Entry:
    mean = {"value": test.found.mean, "low": None, "high": None}
    return Entry(estimate(mean, signed=True, percent=test.percent), value={"mean": test.found.mean})


def _whole(test: _Tested) -> Entry:
    return interval_entry(test.found.whole, signed=True, percent=test.percent)


def _t(t: float) -> str:
    return MISSING if t != t else f"{t:.2f}".replace("-", "−")


def _better(test: _Tested) -> str:
    return f"{test.found.higher if test.percent else test.found.lower} of {test.found.clusters}"
