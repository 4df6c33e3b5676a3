"""Which variant of the method beats it: selected on half of the (benchmark, seed) pairs, confirmed after.

The best of several variants looks better than it is on the pairs that it was chosen by. So the choice is
made on one half, and what is claimed is measured on the other, which had no part in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ia2.evaluation.statistics import Interval, side, t_interval
from ia2.sweeps.report import METHOD, TITLES, Report
from ia2.sweeps.selection import Arm, Task
from ia2.sweeps.significance import works_on
from ia2.sweeps.statistics import differences_by_seed
from ia2.sweeps.tables import Column, Entry, Mark, Table
from ia2.wording import MISSING, estimate

_MEASURES = ("accuracy", "nll")

# Differences of each pair, by measure.
_Runs = list[dict[str, float]]


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


def candidates(report: Report, *, where_icl_works: bool = False) -> list[Candidate]:
    """Every variant of the method that has pairs with the plain one."""
    found = []
    for model in report.models:
        tasks = [task for task in report.tasks if task.model == model]
        for size in report.sizes:
            chosen = [t for t in tasks if not where_icl_works or works_on(report, t, size, t.benchmark)]
            for label in report.labels:
                if not label.startswith(f"{METHOD}@"):
                    continue
                halves = _halves(report, chosen, size, label)
                if any(halves):
                    select, confirm = (_half(runs) if runs else None for runs in halves)
                    found.append(Candidate(model, size, label.removeprefix(f"{METHOD}@"), select, confirm))
    return found


def selected(found: Sequence[Candidate], model: str, size: int) -> Candidate | None:
    """The variant with the largest gain on the first half among those better there in both respects."""
    better = [
        c for c in found if (c.model, c.size) == (model, size) and c.select is not None and c.select.better
    ]
    return max(better, key=lambda c: c.select.gain if c.select else 0.0, default=None)


def variants_table(report: Report, *, where_icl_works: bool = False) -> Table | None:
    """All variants against the plain method on both halves, the selected one in bold; None without any."""
    found = candidates(report, where_icl_works=where_icl_works)
    if not found:
        return None
    best = {(c.model, c.size): selected(found, c.model, c.size) for c in found}
    rows = []
    for candidate in found:
        mark: Mark = "best" if best[candidate.model, candidate.size] is candidate else ""
        rows.append(
            (
                Entry(candidate.model),
                Entry(str(candidate.size)),
                Entry(candidate.variant, mark),
                *_entries(candidate.select),
                *_entries(candidate.confirm),
            )
        )
    columns = (
        *map(Column, ("model", "N", "variant")),
        *(
            Column(title, group)
            for group in ("selection:", "confirmation:")
            for title in ("pairs", "accuracy [95%]", "NLL [95%]")
        ),
    )
    where = " where ICL works" if where_icl_works else ""
    arms = [arm for arm in report.arms if arm.recipe == METHOD]
    return Table(
        "variants",
        f"Variants of {TITLES[METHOD]} less the plain one{where}: selected on half of the pairs, confirmed "
        "on the other.",
        columns,
        tuple(rows),
        (
            *report.about(list(dict.fromkeys(arm.task for arm in arms)), arms),
            "Pairs are of one benchmark and seed, dealt to the halves in turn: a benchmark with two seeds or "
            "more is in both. Accuracy in percentage points, both among the labels; t-intervals over pairs.",
            *(verdict(best[key], *key) for key in best),
        ),
    )


def verdict(chosen: Candidate | None, model: str, size: int) -> str:
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


def _halves(report: Report, tasks: Sequence[Task], size: int, label: str) -> tuple[_Runs, _Runs]:
    halves: tuple[_Runs, _Runs] = ([], [])
    for place, task in enumerate(tasks):
        variant, plain = report.arm(task, size, label), report.arm(task, size, METHOD)
        if variant is None or plain is None:
            continue
        for seed, run in _runs(variant, plain).items():
            halves[(place + seed) % 2].append(run)
    return halves


def _runs(variant: Arm, plain: Arm) -> dict[int, dict[str, float]]:
    found = {name: differences_by_seed(variant, plain, variant.task.benchmark, name) for name in _MEASURES}
    return {seed: {name: found[name][seed] for name in _MEASURES} for seed in found["accuracy"]}


def _half(runs: _Runs) -> Half:
    return Half(len(runs), *(t_interval([run[name] for run in runs]) for name in _MEASURES))


def _entries(half: Half | None) -> tuple[Entry, ...]:
    if half is None:
        return tuple(Entry(MISSING) for _ in range(3))
    accuracy, nll = half.accuracy.to_dict(), half.nll.to_dict()
    return (
        Entry(str(half.pairs)),
        Entry(estimate(accuracy, signed=True, percent=True), value=accuracy),
        Entry(estimate(nll, signed=True), value=nll),
    )
