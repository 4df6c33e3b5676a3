"""A map of heads by layer, coloured by a signed number, some of them marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ia2.report.figures.layer_lines import number
from ia2.report.figures.style import Panel

# From Okabe and Ito's blue over grey to their vermilion, in steps that can be told apart: the steps are few
# paths in a file, however many heads there are.
_STEPS = 11
_LOW, _MIDDLE, _HIGH = (0x00, 0x72, 0xB2), (0xF2, 0xF2, 0xF2), (0xD5, 0x5E, 0x00)

# Marks on coloured cells, which a dark page must leave as they are: neither the page's black nor its white.
_DARK, _LIGHT = "#1b1b1b", "#fdfdfd"


def head_map(
    values: np.ndarray,
    limit: float,
    marked: np.ndarray,
    layers: Sequence[int],
    label: str,
    title: str,
) -> Panel:
    """The panel of a map, as large as its cells need.

    Args:
        values: ``[L, H]``; NaN stays empty.
        limit: end of the colour scale, in both directions.
        marked: heads with a dot, ``[L, H]`` bool.
        layers: their indices.
        label: of the scale.
        title: of the panel.
    """

    def draw(axis: Any) -> None:
        _cells(axis, values, limit, label)
        size = max(3.5, min(16.0, 900.0 / (rows * columns) ** 0.9))
        # only the outermost steps are dark
        dark = np.isin(_steps(values, limit), (0, 1, _STEPS - 2, _STEPS - 1))
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

    rows, columns = values.shape
    width, height = min(5.0, 2.6 + 0.085 * columns), min(5.0, 1.6 + 0.1 * rows)
    return Panel(draw, width=width, height=height)


def _palette() -> list[str]:
    colours = []
    for place in np.linspace(-1, 1, _STEPS):
        end = np.array(_LOW if place < 0 else _HIGH)
        mixed = np.array(_MIDDLE) + abs(place) * (end - np.array(_MIDDLE))
        colours.append("#" + "".join(f"{round(float(part)):02x}" for part in mixed))
    return colours


def _steps(values: np.ndarray, limit: float) -> np.ndarray:
    """Step of the scale of each value; −1 for NaN."""
    places = np.floor((np.nan_to_num(values) + limit) / (2 * limit) * _STEPS)
    return np.where(np.isfinite(values), np.clip(places, 0, _STEPS - 1), -1)


def _cells(axis: Any, values: np.ndarray, limit: float, label: str) -> None:
    """One path a step of the scale, and the scale beside the map; what is not known stays empty."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    palette, steps = _palette(), _steps(values, limit)
    corners = np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5), (-0.5, -0.5)])
    for step, colour in enumerate(palette):
        squares = [Path(np.add(corners, (x, y)), closed=True) for y, x in np.argwhere(steps == step)]
        if squares:
            # an edge of its own colour: without one, viewers leave hairlines between cells
            path = Path.make_compound_path(*squares)
            axis.add_patch(PathPatch(path, facecolor=colour, edgecolor=colour, linewidth=0.3))
    norm = BoundaryNorm(np.linspace(-limit, limit, _STEPS + 1), _STEPS)
    bar = axis.figure.colorbar(
        ScalarMappable(norm, ListedColormap(palette)), ax=axis, fraction=0.06, pad=0.03
    )
    ends = np.linspace(-limit, limit, 5)
    bar.set_ticks(ends, labels=[number(float(end), ".2g") for end in ends])
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=8, length=2)
    bar.set_label(label, fontsize=8)
