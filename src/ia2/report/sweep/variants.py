"""Which variant of the method beats it: selected on half of the (benchmark, seed) pairs, confirmed after.

The best of several variants looks better than it is on the pairs that it was chosen by. So the choice is
made on one half, and what is claimed is measured on the other, which had no part in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ia2.report.sweep.cells import METHOD, TITLES, Report
from ia2.report.sweep.entries import interval_entry
from ia2.report.sweep.notes import about
from ia2.report.sweep.selection import differences
from ia2.utils.format import Column, Entry, Fields, Table, fill
from ia2.utils.statistics import Interval, side, t_interval
from ia2.utils.wording import MISSING


@dataclass(frozen=True)
class Half:
    """A variant less the plain method on half of the pairs.

    Attributes:
        pairs: of benchmark and seed.
        accuracy: difference, with its 95% t-interval over pairs.
        nll: the same; less is better.
    """

    pairs: int
    accuracy: Interval
    nll: Interval

    @property
    def better(self) -> bool:
        """Higher accuracy and lower NLL."""
        return bool(self.accuracy.value > 0 > self.nll.value)

    @property
    def beyond_doubt(self) -> bool:
        """Better, with both intervals on the right side of zero."""
        return side(self.accuracy.to_dict()) > 0 > side(self.nll.to_dict())

    @property
    def gain(self) -> float:
        """What variants are ranked by: a point of accuracy counts as much as a hundredth of a nat."""
        return float(self.accuracy.value - self.nll.value)


@dataclass(frozen=True)
class Candidate:
    """A variant on both halves; None where it has no pair."""

    model: str
    size: int
    variant: str
    select: Half | None
    confirm: Half | None


def candidates(report: Report) -> list[Candidate]:
    """Every variant of the method that has pairs with the plain one."""
    found = []
    for model in report.models:
        for size in report.sizes:
            for label in report.labels:
                if label.startswith(f"{METHOD}@"):
                    select, confirm = _halves(report, model, size, label)
                    if select or confirm:
                        found.append(
                            Candidate(model, size, label.removeprefix(f"{METHOD}@"), select, confirm)
                        )
    return found


def _halves(report: Report, model: str, size: int, label: str) -> tuple[Half | None, Half | None]:
    """Pairs are dealt to the halves in turn."""
    halves: tuple[list[tuple[float, float]], ...] = ([], [])
    for place, (task, dataset, _) in enumerate(report.places(own=True, model=model, size=size)):
        variant, plain = report.arm(task, size, label), report.arm(task, size, METHOD)
        if variant is not None and plain is not None:
            accuracy, nll = (differences(variant, plain, dataset, name) for name in ("accuracy", "nll"))
            for seed in accuracy:
                halves[(place + seed) % 2].append((accuracy[seed], nll[seed]))
    select, confirm = (
        Half(len(runs), *(t_interval(values) for values in zip(*runs, strict=True))) if runs else None
        for runs in halves
    )
    return select, confirm


def selected(found: Sequence[Candidate], model: str, size: int) -> Candidate | None:
    """The variant with the largest gain on the first half among those better there in both respects."""
    better = [c for c in found if (c.model, c.size) == (model, size) and c.select and c.select.better]
    return max(better, key=lambda c: c.select.gain if c.select else 0.0, default=None)


def variants_table(report: Report) -> Table:
    """All variants against the plain method on both halves, the selected one in bold."""
    found = candidates(report)
    best = {(c.model, c.size): selected(found, c.model, c.size) for c in found}
    fields: Fields = [
        ("model", lambda c: c.model),
        ("N", lambda c: str(c.size)),
        ("variant", lambda c: Entry(c.variant, "best" if best[c.model, c.size] is c else "")),
        *_fields("selection:", "select"),
        *_fields("confirmation:", "confirm"),
    ]
    title = (
        f"Variants of {TITLES[METHOD]} less the plain one{report.where_words}: selected on half of the "
        "pairs, confirmed on the other."
    )
    notes = [
        *about((arm for arm in report.arms if arm.recipe == METHOD), report.select),
        "Pairs are of one benchmark and seed, dealt to the halves in turn: a benchmark with two seeds or "
        "more is in both. Accuracy in percentage points, both among the labels; t-intervals over pairs.",
        *(_verdict(chosen, *key) for key, chosen in best.items()),
    ]
    return fill("variants", title, fields, ((c,) for c in found), notes)


def _fields(group: str, which: str) -> Fields:
    """Of one half."""

    def entry(candidate: Candidate, measure: str) -> Entry:
        half = getattr(candidate, which)
        of = None if half is None else getattr(half, measure)
        return interval_entry(of, signed=True, percent=measure == "accuracy")

    def pairs(candidate: Candidate) -> str:
        half = getattr(candidate, which)
        return MISSING if half is None else str(half.pairs)

    return [
        (Column("pairs", group), pairs),
        (Column("accuracy [95%]", group), lambda c: entry(c, "accuracy")),
        (Column("NLL [95%]", group), lambda c: entry(c, "nll")),
    ]


def _verdict(chosen: Candidate | None, model: str, size: int) -> str:
    """What came of it, in a sentence."""
    at = f"{model}, N = {size}"
    if chosen is None:
        return f"{at}: no variant is better in both accuracy and NLL on the selection half."
    half = chosen.confirm
    if half is None:
        return f"{at}: selected {chosen.variant}; there are no pairs to confirm it on."
    if half.beyond_doubt:
        came = "confirmed: better in both on the other half, and both intervals exclude zero"
    elif half.better:
        came = "not confirmed: better in both on the other half, but not both intervals exclude zero"
    else:
        came = "not confirmed: on the other half it is not better in both"
    return f"{at}: selected {chosen.variant}; {came}."
