"""Figures of lines: over layers, tokens or N, a line a recipe or condition, with the band of its interval."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ia2.report.figures.style import FAINT, INK, Figure, Panel, arm_styles, make_figure
from ia2.utils.format import Row
from ia2.utils.wording import MISSING, estimate

OTHER, MEAN = "icl-other", "icl-mean"

# Controls belong to no recipe: they are told apart by how their line is broken.
CONTROL_STYLES: dict[str, dict[str, Any]] = {
    OTHER: {"color": INK, "linestyle": "--"},
    MEAN: {"color": FAINT, "linestyle": ":"},
    "with demonstrations": {"color": INK, "linestyle": "--"},
    "other seed": {"color": FAINT, "linestyle": "-."},
}

Series = Mapping[str, Any]
"""A line: ``value`` and, where there is an interval, ``low`` and ``high``, lists of JSON (None for NaN).

More keys: ``x``, where it has places of its own; ``style``; ``legend`` and ``band``, False for none;
``hidden``, in the numbers only; ``form`` of its numbers; ``whole``, its text in a last row of numbers."""


@dataclass(frozen=True)
class Lines:
    """One panel of lines; it is drawn unless all of them are hidden.

    ``rules`` are heights of horizontal lines with their style, ``finish`` draws more or sets limits,
    ``label`` names its rows in the numbers (by default the title does).
    """

    title: str
    series: Mapping[str, Series]
    ylabel: str = ""
    rules: Mapping[float, Mapping[str, Any]] = field(default_factory=dict)
    finish: Callable[[Any], None] | None = None
    label: str = ""


def line_figure(
    name: str,
    x: Sequence[int],
    panels: Sequence[Lines],
    *,
    rows: str = "",
    xlabel: str = "layer",
    form: str = ".3f",
    signed: bool = False,
    one_scale: bool = False,
    size: tuple[float, float] = (5.0, 3.8),
    **texts: Any,
) -> Figure:
    """Panels of lines and their numbers: a row a panel and place, a column a line.

    ``rows`` says what the panels are (empty for a single one), ``form`` how numbers without an interval are
    written; intervals may be of differences (``signed``), panels may be to be compared (``one_scale``). The
    ``size`` of a panel is in inches; ``texts`` go to :func:`make_figure`.
    """
    shown = [{n: s for n, s in panel.series.items() if not s.get("hidden")} for panel in panels]
    limits = _limits([s for series in shown for s in series.values()]) if one_scale else None
    drawn = [
        Panel(
            _drawing(x, panel, series, xlabel, limits),
            any(s.get("legend", True) for s in series.values()),
            *size,
        )
        for panel, series in zip(panels, shown, strict=True)
        if series
    ]
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    numbers: list[Row] = []
    for panel in panels:
        first = {rows: panel.label or panel.title} if rows else {}
        for place in x:
            cells = {n: _cell(panel.series.get(n), x, place, form, signed) for n in names}
            numbers.append({**first, xlabel: str(place), **cells})
        if any("whole" in series for series in panel.series.values()):
            cells = {n: panel.series.get(n, {}).get("whole", MISSING) for n in names}
            numbers.append({**first, xlabel: "all at once", **cells})
    return make_figure(name, drawn, numbers, **texts)


def _drawing(
    x: Sequence[int],
    panel: Lines,
    shown: Mapping[str, Series],
    xlabel: str,
    limits: tuple[float, float] | None,
) -> Callable[[Any], None]:
    def draw(axis: Any) -> None:
        for height, style in panel.rules.items():
            axis.axhline(height, **{"color": FAINT, "linewidth": 0.8, **style})
        for name, series in shown.items():
            _draw_line(axis, series.get("x", x), series, name if series.get("legend", True) else "_")
        axis.set_xlabel(xlabel)
        axis.set_ylabel(panel.ylabel)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if panel.title:
            axis.set_title(panel.title, fontsize=10)
        if limits is not None:
            axis.set_ylim(*limits)
        if panel.finish is not None:
            panel.finish(axis)

    return draw


def _draw_line(axis: Any, x: Sequence[int], series: Series, label: str) -> None:
    style = {"markersize": 3.5, "linewidth": 1.3, **series["style"]}
    axis.plot(x, array(series["value"]), label=label, **style)
    if "low" not in series or not series.get("band", True):
        return
    low, high = array(series["low"]), array(series["high"])
    if len(x) == 1:  # a band needs two
        axis.plot([x[0], x[0]], [low[0], high[0]], color=style["color"], linewidth=1.5)
    else:
        axis.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _cell(series: Series | None, x: Sequence[int], place: int, form: str, signed: bool) -> str:
    places = list(series.get("x", x)) if series else []
    if series is None or place not in places or places.index(place) >= len(series["value"]):
        return MISSING
    i = places.index(place)
    if "low" not in series:
        return number(series["value"][i], series.get("form", form))
    return estimate({end: series[end][i] for end in ("value", "low", "high")}, signed=signed)


def _limits(series: Iterable[Series]) -> tuple[float, float]:
    """One scale for panels that are to be compared: of all intervals, and 0."""
    values = np.concatenate([array(s[name]) for s in series for name in ("value", "low", "high")])
    known = np.append(values[np.isfinite(values)], 0.0)
    room = 0.05 * max(float(np.ptp(known)), 1e-6)
    return float(known.min()) - room, float(known.max()) + room


def view_styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Style of each condition: an adapter's is its recipe's, as in every figure; controls have their own."""
    own = [name for name in names if name not in CONTROL_STYLES]
    # where recipes repeat, places settle the colours: these two have the same ones whether drawn or not
    return {**arm_styles(list(dict.fromkeys(("base", "icl", *own)))), **CONTROL_STYLES}


def array(values: Any) -> np.ndarray:
    """Numbers of JSON, where NaN has become null."""
    return np.asarray(values, dtype=float)


def number(value: Any, form: str = ".3f") -> str:
    """One of them in a table."""
    return MISSING if value is None or value != value else format(value, form).replace("-", "−")


def from_zero(axis: Any) -> None:
    """Room above: of values that are nearly equal, matplotlib's own margin is a part of their range."""
    axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
