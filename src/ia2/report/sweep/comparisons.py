"""Tables of tests (the paper's table 8, every pair of recipes), and of variants of the method.

The best of several variants looks better than it is on the pairs that it was chosen by. So it is selected on
half of the (benchmark, seed) pairs, and what is claimed is measured on the other half.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ia2.config.recipes import METHOD
from ia2.experiment.sweep.records import MEASURES
from ia2.report.sweep.cells import TITLES, Place, Report
from ia2.report.sweep.notes import about
from ia2.report.sweep.selection import ChosenRuns, differences
from ia2.utils.format import Column, Entry, Row, Table, fill, interval_entry
from ia2.utils.statistics import Interval, PairedTest, holm, paired_test, side, t_interval
from ia2.utils.wording import MISSING, estimate

_TESTED = [measure for measure in MEASURES if measure != "ece_vocabulary"]

# -------------------------------------------------------------------------------------------- tests


Case = tuple[dict[str, str], Sequence[Place], tuple[str, str] | None]
"""First columns of a row, where to compare, and what: labels of two recipes, or IA2 → SFT and SFT."""


def significance_table(report: Report) -> Table:
    """The paper's table 8: IA2 → SFT less SFT at each N, over benchmarks and seeds.

    Pairs are of (trained on, evaluated on, seed), out of distribution too, as in the paper; what was trained
    on is one benchmark, since its evaluations share their training examples.
    """
    cases: list[Case] = []
    for size in report.sizes:
        for labelled, kind in ((True, "labels"), (False, "free text")):
            places = [p for p in report.places(size=size) if report.labelled(p.task) == labelled]
            cases.append(({"N": str(size), "answers": kind}, places, None))
    title = (
        f"Table 8 of the paper, from these cells: {TITLES[METHOD]} less SFT, tested over benchmarks and "
        f"seeds{report.where_words}, {', '.join(report.models)}."
    )
    return _tests_table(report, "8", title, cases, "on their own test rows and out of distribution")


def pairs_table(report: Report) -> Table:
    """The method against every other recipe and variant, by model and N."""
    cases: list[Case] = []
    for model in report.models:
        for size in report.sizes:
            places = report.places(own=True, model=model, size=size)
            cases += [({"model": model, "N": str(size)}, places, labels) for labels in _rivals(report)]
    title = f"Differences between recipes, over benchmarks and seeds{report.where_words}."
    return _tests_table(report, "tests", title, cases, "own test rows, no OOD evaluations")


def _rivals(report: Report) -> Iterator[tuple[str, str]]:
    """The method and its variants, each with other recipes, of its variant or plain, and the plain method."""
    of_label = {runs.label: runs for runs in report.runs}
    for label in report.labels:
        for other_label in report.labels:
            runs, other = of_label[label], of_label[other_label]
            alike = other.variant in ("", runs.variant) and (other.recipe != METHOD or not other.variant)
            if runs.recipe == METHOD and alike and other_label != label:
                yield label, other_label


def _unlike(first: ChosenRuns, second: ChosenRuns) -> str:
    """That two recipes learned other answers, which makes them no like for like; empty where they did not."""
    if None in (first.answers, second.answers) or first.answers == second.answers:
        return ""
    return f" ({first.answers} answers against {second.answers} answers)"


def _tests_table(report: Report, name: str, title: str, cases: Sequence[Case], evaluated: str) -> Table:
    tests: list[tuple[dict[str, str], str, PairedTest]] = []
    used: list[ChosenRuns] = []
    for lead, places, labels in cases:
        for measure in _TESTED:
            pairs, compared = report.pooled(places, measure, labels)
            if pairs:
                pair = {"pair": f"{' − '.join(labels)}{_unlike(*compared[-2:])}"} if labels else {}
                tests.append(({**lead, **pair}, measure, paired_test(pairs)))
                used += compared
    corrected = zip(
        *(holm([getattr(test, p) for *_, test in tests]) for p in ("p_t", "p_wilcoxon", "p_cluster")),
        strict=True,
    )
    rows = [_tests_row(*test, *p_values) for test, p_values in zip(tests, corrected, strict=True)]
    benchmarks = ", ".join(dict.fromkeys(runs.task.benchmark for runs in used))
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
    return fill(name, title, rows, notes)


def _tests_row(
    lead: dict[str, str], measure: str, found: PairedTest, p_t: float, p_wilcoxon: float, p_cluster: float
) -> Row:
    over, whole = "pairs:", "benchmarks:"
    percent = measure.startswith("accuracy")  # the other measures are errors, of which less is better
    mean = estimate({"value": found.mean, "low": None, "high": None}, signed=True, percent=percent)
    return {
        **lead,
        "measure": MEASURES[measure],
        Column("n", over): str(found.pairs),
        Column("difference", over): Entry(mean, value={"mean": found.mean}),
        Column("t", over): MISSING if found.t != found.t else f"{found.t:.2f}".replace("-", "−"),
        Column("p", over): p_value(found.p_t),
        Column("p Holm", over): p_value(p_t),
        Column("Wilcoxon", over): p_value(found.p_wilcoxon),
        Column("Wilcoxon Holm", over): p_value(p_wilcoxon),
        Column("better", whole): f"{found.higher if percent else found.lower} of {found.clusters}",
        Column("difference [95%]", whole): interval_entry(found.whole, signed=True, percent=percent),
        Column("p", whole): p_value(found.p_cluster),
        Column("p Holm", whole): p_value(p_cluster),
    }


def p_value(p: float) -> str:
    """``0.012``, ``< 0.001``; a dash where there is none."""
    if p != p:
        return MISSING
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


# ----------------------------------------------------------------------------------------- variants


class Half(NamedTuple):
    """A variant less the plain method on half of the pairs, with 95% t-intervals over pairs."""

    pairs: int
    accuracy: Interval
    nll: Interval

    @property
    def better(self) -> bool:
        """Higher accuracy and lower NLL."""
        return bool(self.accuracy.value > 0 > self.nll.value)

    @property
    def gain(self) -> float:
        """What variants are ranked by: a point of accuracy counts as much as a hundredth of a nat."""
        return float(self.accuracy.value - self.nll.value)


def halves(report: Report, model: str, size: int, label: str) -> tuple[Half | None, Half | None]:
    """A variant on the pairs that select it, and on those that confirm it; pairs are dealt in turn."""
    dealt: tuple[list[tuple[float, float]], ...] = ([], [])
    for place, (task, dataset, _) in enumerate(report.places(own=True, model=model, size=size)):
        variant, plain = (report.of_label(task, size, name) for name in (label, METHOD))
        if variant is not None and plain is not None:
            accuracy, nll = (differences(variant, plain, dataset, name) for name in ("accuracy", "nll"))
            for seed in accuracy:
                dealt[(place + seed) % 2].append((accuracy[seed], nll[seed]))
    select, confirm = (
        Half(len(pairs), *(t_interval(values) for values in zip(*pairs, strict=True))) if pairs else None
        for pairs in dealt
    )
    return select, confirm


def variants_table(report: Report) -> Table:
    """All variants against the plain method on both halves, the selected one in bold."""
    variants = [label for label in report.labels if label.startswith(f"{METHOD}@")]
    rows: list[Row] = []
    verdicts = []
    for model in report.models:
        for size in report.sizes:
            found = {label: halves(report, model, size, label) for label in variants}
            found = {label: pair for label, pair in found.items() if any(pair)}
            better = {label: select.gain for label, (select, _) in found.items() if select and select.better}
            best = max(better, key=better.__getitem__, default=None)
            for label, pair in found.items():
                name = Entry(label.removeprefix(f"{METHOD}@"), "best" if label == best else "")
                row: dict[Any, Entry | str] = {"model": model, "N": str(size), "variant": name}
                for group, half in zip(("selection:", "confirmation:"), pair, strict=True):
                    accuracy, nll = (half.accuracy, half.nll) if half else (None, None)
                    row[Column("pairs", group)] = str(half.pairs) if half else MISSING
                    row[Column("accuracy [95%]", group)] = interval_entry(accuracy, signed=True, percent=True)
                    row[Column("NLL [95%]", group)] = interval_entry(nll, signed=True)
                rows.append(row)
            if found:
                verdicts.append(f"{model}, N = {size}: {_verdict(best, found[best][1] if best else None)}.")
    title = (
        f"Variants of {TITLES[METHOD]} less the plain one{report.where_words}: selected on half of the "
        "pairs, confirmed on the other."
    )
    notes = [
        *about((runs for runs in report.runs if runs.recipe == METHOD), report.select),
        "Pairs are of one benchmark and seed, dealt to the halves in turn: a benchmark with two seeds or "
        "more is in both. Accuracy in percentage points, both among the labels; t-intervals over pairs.",
        *verdicts,
    ]
    return fill("variants", title, rows, notes)


def _verdict(selected: str | None, half: Half | None) -> str:
    """What came of the selected variant on the other half."""
    if selected is None:
        return "no variant is better in both accuracy and NLL on the selection half"
    name = selected.removeprefix(f"{METHOD}@")
    if half is None:
        return f"selected {name}; there are no pairs to confirm it on"
    if side(half.accuracy.to_dict()) > 0 > side(half.nll.to_dict()):
        came = "confirmed: better in both on the other half, and both intervals exclude zero"
    elif half.better:
        came = "not confirmed: better in both on the other half, but not both intervals exclude zero"
    else:
        came = "not confirmed: on the other half it is not better in both"
    return f"selected {name}; {came}"
