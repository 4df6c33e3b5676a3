"""Panels of other marks than lines: dots and bars with intervals, violins, maps of heads by layer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ia2.report.figures.lines import array, number
from ia2.report.figures.style import FAINT, INK, Panel, plain_log

# A ratio beyond this leaves nothing to see of the others on a linear axis.
_LARGE = 5

# From Okabe and Ito's blue over grey to their vermilion, in steps that can be told apart: the steps are few
# paths in a file, however many heads there are.
_STEPS = 11
_LOW, _MIDDLE, _HIGH = (0x00, 0x72, 0xB2), (0xF2, 0xF2, 0xF2), (0xD5, 0x5E, 0x00)

# Marks on coloured cells, which a dark page must leave as they are: neither the page's black nor its white.
_DARK, _LIGHT = "#1b1b1b", "#fdfdfd"

Found = Mapping[str, Any]
"""``value``, ``low``, ``high`` of JSON."""


def bars(entries: Mapping[str, Found], styles: Mapping[str, Any], title: str, least: float) -> Panel:
    """A bar with its interval and its number a recipe; the axis reaches to ``least`` at least."""
    known = {name: found for name, found in entries.items() if found["value"] is not None}

    def draw(axis: Any) -> None:
        ends = [least]
        for place, (name, found) in enumerate(known.items()):
            value = found["value"]
            axis.barh(place, value, color=styles[name]["color"], height=0.65)
            _interval(axis, found, place, INK, 1.5)
            end = max(value, found["high"] or value)
            axis.text(max(end, 0) + 0.02, place, f"{value:.2f}", va="center", fontsize=9)
            ends.append(1.25 * end)
        axis.set_yticks(range(len(known)), list(known))
        axis.invert_yaxis()
        axis.set_title(title, fontsize=10)
        axis.set_xlim(min([0.0, *(found["value"] for found in known.values())]), max(ends))

    return Panel(draw, height=max(2.6, 0.8 + 0.3 * len(entries)))


def dots(
    entries: Mapping[str, Found],
    styles: Mapping[str, Any],
    title: str,
    unchanged: float | None = None,
    width: float = 3.6,
) -> Panel:
    """A dot with its interval a condition, one below the other; at ``unchanged`` nothing has changed."""
    known = {name: found for name, found in entries.items() if found["value"] is not None}

    def draw(axis: Any) -> None:
        if unchanged is not None:
            axis.axvline(unchanged, color=FAINT, linewidth=0.8, linestyle="--")
        for place, (name, found) in enumerate(known.items()):
            _interval(axis, found, place, styles[name]["color"], 1.8)
            axis.plot(found["value"], place, markersize=6, linestyle="none", **styles[name])
        axis.set_yticks(range(len(known)), list(known))
        axis.set_ylim(max(len(known), 1) - 0.5, -0.5)
        if unchanged is None:
            axis.set_xlim(0, max(1.05 * axis.get_xlim()[1], 1e-3))
        elif unchanged and max((f["value"] for f in known.values()), default=0) > _LARGE * unchanged:
            plain_log(axis, "x")
        axis.set_title(title, fontsize=10)

    return Panel(draw, width=width, height=max(1.7, 0.9 + 0.28 * len(entries)))


def grouped_dots(groups: Mapping[str, Mapping[str, Found]], styles: Mapping[str, Any], xlabel: str) -> Panel:
    """Dots of shares by group, a condition below the other; dashed lines are what the first group has."""
    names = list(next(iter(groups.values())))
    step = 0.8 / max(len(names), 1)

    def draw(axis: Any) -> None:
        for n, name in enumerate(names):
            colour = styles[name]["color"]
            first = next(iter(groups.values()))[name]["value"]
            axis.axvline(first, color=colour, linewidth=0.7, linestyle="--", alpha=0.7)
            for place, group in enumerate(groups.values()):
                y = place + (n - (len(names) - 1) / 2) * step
                _interval(axis, group[name], y, colour, 1.4)
                label = name if place == 0 else None
                axis.plot(
                    group[name]["value"], y, markersize=5, linestyle="none", label=label, **styles[name]
                )
        for place in range(1, len(groups)):
            axis.axhline(place - 0.5, color=INK, linewidth=0.3, alpha=0.4)
        axis.set_yticks(range(len(groups)), list(groups))
        axis.set_ylim(len(groups) - 0.5, -0.5)
        axis.set_xlim(-0.02, 1.02)
        axis.set_xlabel(xlabel)

    return Panel(draw, True, 6.2, 0.9 + len(groups) * (0.25 + 0.12 * len(names)))


def _interval(axis: Any, found: Found, y: float, colour: str, width: float) -> None:
    if found["low"] is not None and found["high"] is not None:
        axis.plot([found["low"], found["high"]], [y, y], color=colour, linewidth=width)


def violins(
    values: Mapping[str, Sequence[float]],
    ticks: Mapping[str, float],
    colours: Mapping[str, str],
    title: str,
    xlabel: str,
) -> Panel:
    """A violin a name with its mean, and a dashed tick of what chance has."""

    def draw(axis: Any) -> None:
        # matplotlib 3.10 renamed the argument
        flat: dict[str, Any] = {"orientation": "horizontal"}
        if "orientation" not in inspect.signature(axis.violinplot).parameters:
            flat = {"vert": False}
        for place, (name, of) in enumerate(values.items()):
            known = array(of)[~np.isnan(array(of))]
            parts = axis.violinplot([known], positions=[place], widths=0.8, showextrema=False, **flat)
            for body in parts["bodies"]:
                body.set(facecolor=colours[name], edgecolor=colours[name], alpha=0.45)
            axis.plot(known.mean(), place, marker="o", markersize=5, color=colours[name])
            tick = [ticks[name]] * 2
            axis.plot(tick, [place - 0.4, place + 0.4], color=INK, linewidth=1.2, linestyle="--")
        axis.set_yticks(range(len(values)), list(values))
        axis.invert_yaxis()
        axis.set_xlim(left=0)
        axis.set_xlabel(xlabel)
        axis.set_title(title, fontsize=10)

    return Panel(draw, width=5.2, height=0.9 + 0.42 * len(values))


def head_map(
    values: np.ndarray, limit: float, marked: np.ndarray, layers: Sequence[int], label: str, title: str
) -> Panel:
    """A map of heads by layer, coloured by a signed number, as large as its cells need.

    Values and marks (heads with a dot) are ``[L, H]``, NaN stays empty; the colour scale ends at ± ``limit``.
    """
    rows, columns = values.shape
    places = np.floor((np.nan_to_num(values) + limit) / (2 * limit) * _STEPS)
    steps = np.where(np.isfinite(values), np.clip(places, 0, _STEPS - 1), -1)

    def draw(axis: Any) -> None:
        _cells(axis, steps, limit, label)
        size = max(3.5, min(16.0, 900.0 / (rows * columns) ** 0.9))
        # only the outermost steps are dark
        dark = np.isin(steps, (0, 1, _STEPS - 2, _STEPS - 1))
        for colour, dark_cell in ((_LIGHT, True), (_DARK, False)):
            y, x = np.nonzero(marked & (dark == dark_cell))
            axis.scatter(x, y, s=size, color=colour, linewidths=0)
        axis.set_xlim(-0.5, columns - 0.5)
        axis.set_ylim(-0.5, rows - 0.5)
        every = max(1, -(-rows // 12))
        axis.set_yticks(range(0, rows, every), [str(layer) for layer in layers[::every]])
        axis.set_xticks(range(0, columns, max(1, -(-columns // 8))))
        axis.set_xlabel("head")
        axis.set_ylabel("layer")
        axis.set_title(title, fontsize=10)

    return Panel(draw, width=min(5.0, 2.6 + 0.085 * columns), height=min(5.0, 1.6 + 0.1 * rows))


def _palette() -> list[str]:
    colours = []
    for place in np.linspace(-1, 1, _STEPS):
        end = np.array(_LOW if place < 0 else _HIGH)
        mixed = np.array(_MIDDLE) + abs(place) * (end - np.array(_MIDDLE))
        colours.append("#" + "".join(f"{round(float(part)):02x}" for part in mixed))
    return colours


def _cells(axis: Any, steps: np.ndarray, limit: float, label: str) -> None:
    """One path a step of the scale, and the scale beside the map; what is not known stays empty."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    palette = _palette()
    corners = np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5), (-0.5, -0.5)])
    for step, colour in enumerate(palette):
        squares = [Path(np.add(corners, (x, y)), closed=True) for y, x in np.argwhere(steps == step)]
        if squares:
            # an edge of its own colour: without one, viewers leave hairlines between cells
            path = Path.make_compound_path(*squares)
            axis.add_patch(PathPatch(path, facecolor=colour, edgecolor=colour, linewidth=0.3))
    norm = BoundaryNorm(np.linspace(-limit, limit, _STEPS + 1), _STEPS)
    scale = ScalarMappable(norm, ListedColormap(palette))
    bar = axis.figure.colorbar(scale, ax=axis, fraction=0.06, pad=0.03)
    ends = np.linspace(-limit, limit, 5)
    bar.set_ticks(ends, labels=[number(float(end), ".2g") for end in ends])
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=8, length=2)
    bar.set_label(label, fontsize=8)
