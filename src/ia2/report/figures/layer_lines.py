"""Lines over layers, a line a view: their styles, bands and numbers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ia2.report.figures.style import FAINT, INK, Panel, arm_styles, numbers_table
from ia2.utils.format import Table
from ia2.utils.wording import MISSING, estimate

OTHER, MEAN = "icl-other", "icl-mean"

# Controls belong to no recipe: they are told apart by how their line is broken.
CONTROL_STYLES: dict[str, dict[str, Any]] = {
    OTHER: {"color": INK, "linestyle": "--"},
    MEAN: {"color": FAINT, "linestyle": ":"},
    "with demonstrations": {"color": INK, "linestyle": "--"},
    "other seed": {"color": FAINT, "linestyle": "-."},
}


def view_styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Style of each view: an adapter's is its recipe's, as in every figure.

    Args:
        names: of views; of the controls only ``icl-other`` and ``icl-mean``.
    """
    own = [name for name in names if name not in CONTROL_STYLES]
    # where recipes repeat, places settle the colours: these two have the same ones whether drawn or not
    return {**arm_styles(list(dict.fromkeys(("base", "icl", *own)))), **CONTROL_STYLES}


def array(values: Any) -> np.ndarray:
    """Numbers of JSON, where NaN has become null."""
    return np.asarray(values, dtype=float)


def number(value: Any, form: str = ".3f") -> str:
    """One of them in a table."""
    return MISSING if value is None or value != value else format(value, form).replace("-", "−")


def with_interval(found: Mapping[str, Any], place: int, *, signed: bool = False) -> str:
    """One layer's value with its interval."""
    return estimate({name: found[name][place] for name in ("value", "low", "high")}, signed=signed)


def draw_line(axis: Any, x: Sequence[int], found: Mapping[str, Any], label: str, **style: Any) -> None:
    """A line over layers and the band of its interval (a bar, where there is one layer).

    Args:
        axis: of a panel.
        x: layers.
        found: ``value``, ``low``, ``high``, lists.
        label: for the legend; empty for none.
        style: of the line.
    """
    own = {"markersize": 3.5, "linewidth": 1.3, "label": label or "_", **style}
    axis.plot(x, array(found["value"]), **own)
    if "low" not in found:
        return
    low, high = array(found["low"]), array(found["high"])
    if len(x) == 1:
        axis.plot([x[0], x[0]], [low[0], high[0]], color=own["color"], linewidth=1.5)
    else:
        axis.fill_between(x, low, high, color=own["color"], alpha=0.12, linewidth=0)


def layer_axis(axis: Any, ylabel: str, title: str = "", xlabel: str = "layer") -> None:
    """Names of a panel over layers."""
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.xaxis.get_major_locator().set_params(integer=True)
    if title:
        axis.set_title(title, fontsize=10)


def lines(
    x: Sequence[int],
    found: Mapping[str, Mapping[str, Any]],
    styles: Mapping[str, Mapping[str, Any]],
    ylabel: str,
    title: str = "",
    *,
    rules: Mapping[float, Mapping[str, Any]] | None = None,
    unnamed: Collection[str] = (),
    after: Callable[[Any], None] | None = None,
    xlabel: str = "layer",
    legend: bool = True,
    width: float = 5.0,
    height: float = 3.8,
) -> Panel:
    """A panel of lines over layers.

    Args:
        x: layers.
        found: by name ``value`` and, where there is an interval, ``low`` and ``high``, lists; ``x`` where a
            line has layers of its own.
        styles: of each name.
        ylabel, title: of the panel.
        rules: heights of horizontal lines, and their style.
        unnamed: lines that are not in the legend.
        after: what else is drawn, once the lines are there.
        xlabel: where these are no layers.
        legend: whether there is one.
        width, height: inches.
    """

    def draw(axis: Any) -> None:
        for at, style in (rules or {}).items():
            axis.axhline(at, **{"color": FAINT, "linewidth": 0.8, **style})
        for name, part in found.items():
            draw_line(axis, part.get("x", x), part, "" if name in unnamed else name, **styles[name])
        if after is not None:
            after(axis)
        layer_axis(axis, ylabel, title, xlabel)

    return Panel(draw, legend=legend, width=width, height=height)


def cells(found: Mapping[str, Any], *, signed: bool = False) -> list[str]:
    """One line in a table: each layer's value with its interval."""
    return [with_interval(found, place, signed=signed) for place in range(len(found["value"]))]


def layer_table(
    name: str, title: str, layers: Sequence[int], columns: Mapping[str, Sequence[str]], first: str = "layer"
) -> Table:
    """Lines in numbers: a row a layer, a column a line."""
    rows = [[str(layer), *(column[i] for column in columns.values())] for i, layer in enumerate(layers)]
    return numbers_table(name, title, [first, *columns], rows)


def limits_of(parts: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    """One scale for panels that are to be compared: of all intervals, and 0."""
    values = np.concatenate([array(part[name]) for part in parts for name in ("value", "low", "high")])
    known = np.append(values[np.isfinite(values)], 0.0)
    room = 0.05 * max(float(np.ptp(known)), 1e-6)
    return float(known.min()) - room, float(known.max()) + room


def from_zero(axis: Any) -> None:
    """Room above: of values that are nearly equal, matplotlib's own margin is a part of their range."""
    axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
