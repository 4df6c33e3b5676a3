"""Entries of tables: intervals, means over seeds, p-values, and which of a row are best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ia2.utils.format import Entry, Mark
from ia2.utils.statistics import Interval
from ia2.utils.wording import MISSING, estimate


def interval_entry(
    found: Interval | None, *, signed: bool = False, percent: bool = False, **more: Any
) -> Entry:
    """A mean with its interval, or a dash.

    Args:
        found: the interval, if there is one.
        signed: for differences.
        percent: in percent (percentage points).
        more: for JSON.
    """
    if found is None:
        return Entry(MISSING)
    of = found.to_dict()
    return Entry(estimate(of, signed=signed, percent=percent), value={**of, **more})


def mean_entry(values: Mapping[int | None, float], *, percent: bool = False, expected: int = 0) -> Entry:
    """A mean (standard deviation) over seeds, or a dash.

    Args:
        values: by seed; the base model's one has none.
        percent: in percent.
        expected: seeds that others of the row have; where there are fewer, that is said.
    """
    numbers = list(values.values())
    if not numbers:
        return Entry(MISSING)
    mean, sd = float(np.mean(numbers)), float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None
    text = mean_sd(mean, sd, percent=percent)
    seeds = [seed for seed in values if seed is not None]
    if 0 < len(seeds) < expected:
        text += f", {len(seeds)} of {expected} seeds"
    return Entry(text, value={"mean": mean, "sd": sd, "seeds": seeds})


def mean_sd(mean: float, sd: float | None, *, percent: bool) -> str:
    """``90.4 (2.3)`` in percent or ``0.06 (0.01)``."""
    shown = [f"{100 * x:.1f}" if percent else f"{x:.2f}" for x in (mean, sd) if x is not None]
    return shown[0] + (f" ({shown[1]})" if len(shown) > 1 else "")


def p_value(p: float) -> str:
    """``0.012``, ``< 0.001``; a dash where there is none."""
    if p != p:
        return MISSING
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def ranked(entries: Sequence[Entry], *, higher: bool, shown: Sequence[bool]) -> list[Entry]:
    """Set off the best and the second best of a row, as they are printed; ties share a mark.

    Args:
        entries: of one measure, one a recipe; those without a value take no part.
        higher: whether more is better.
        shown: which of them compete.
    """

    def printed(entry: Entry) -> float:
        # what looks equal is not told apart
        return float(entry.text.split()[0].rstrip(","))

    known = [e.value is not None and ok for e, ok in zip(entries, shown, strict=True)]
    values = sorted({printed(e) for e, k in zip(entries, known, strict=True) if k}, reverse=higher)
    if sum(known) < 2:
        return list(entries)
    marks: dict[float, Mark] = dict(zip(values, ("best", "second"), strict=False))  # type: ignore[arg-type]
    return [
        Entry(e.text, marks.get(printed(e), ""), e.value) if k else e
        for e, k in zip(entries, known, strict=True)
    ]
