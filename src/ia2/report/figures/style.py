"""The look of every figure: colours, signs, canvas, and what makes a figure a part of a page.

A figure is made of panels. In a file they stand side by side; a page takes each as a picture of its own, so
that a narrow screen has them one below the other, at full size.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ia2.config.recipes import RECIPES
from ia2.utils.files import write_bytes
from ia2.utils.format import Row, Table, fill
from ia2.utils.logging import logger

# Okabe and Ito's palette, told apart by readers with any colour vision; an olive of Paul Tol's stands for its
# yellow, which is no colour for lines on white.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999933", "#000000")

# A recipe has the same colour and sign in every figure, so that colour alone need not tell.
MARKERS = "osD^vP*X"

# For lines and text that belong to no recipe.
INK, FAINT = "#222222", "#666666"

_SETTINGS: Any = {
    # fixed ids and no date: the same numbers give the same file
    "svg.hashsalt": "ia2",
    "svg.fonttype": "none",
    "font.size": 10,
    # a dollar in the name of a model is a dollar
    "text.parse_math": False,
}

NO_MATPLOTLIB = "pip install 'ia2[report]' brings matplotlib."


class Panel(NamedTuple):
    """One pair of axes; sizes in inches. Of the panels in a file the first legend stands for all."""

    draw: Callable[[Any], None]
    legend: bool = False
    width: float = 3.6
    height: float = 3.1


class Picture(NamedTuple):
    """One panel as SVG, with its text alternative."""

    title: str
    svg: bytes


@dataclass(frozen=True)
class Figure:
    """Panels, what they show, and the same in numbers, the text alternative.

    The heading says what it is of (model, data, seeds), the caption how to read it; a file has ``columns``
    panels side by side.
    """

    name: str
    title: str
    heading: str
    caption: str
    panels: tuple[Panel, ...]
    numbers: Table
    columns: int = 3

    def save(self, path: Path) -> Path:
        """All panels in one file; its ending chooses the format."""
        columns = min(self.columns, len(self.panels))
        rows = -(-len(self.panels) // columns)
        size = (columns * max(p.width for p in self.panels), 0.5 + rows * max(p.height for p in self.panels))
        with canvas(path, rows, columns, *size) as (figure, axes):
            for axis, panel in zip(axes.flat, self.panels, strict=False):
                panel.draw(axis)
            for axis in list(axes.flat)[len(self.panels) :]:
                axis.set_axis_off()
            with_legend = [place for place, panel in enumerate(self.panels) if panel.legend]
            if with_legend:
                legend(figure, list(axes.flat)[with_legend[0]], 4)
            figure.suptitle(self.heading, fontsize=10)
        return path

    def pictures(self) -> list[Picture]:
        """Each panel as a picture for a page."""
        found = []
        for panel in self.panels:
            target = BytesIO()
            with canvas(target, 1, 1, panel.width, panel.height) as (figure, axes):
                panel.draw(axes[0][0])
                title = axes[0][0].get_title()
                if panel.legend:
                    legend(figure, axes[0][0], 3)
            found.append(Picture(f"{self.title}: {title}" if title else self.title, target.getvalue()))
        return found


def make_figure(
    name: str,
    panels: Iterable[Panel],
    rows: Iterable[Row],
    *,
    parts: Iterable[str] = ("caption",),
    text: str = "",
    columns: int = 3,
    **values: Any,
) -> Figure:
    """A figure with the texts of ``texts.yaml``, without a heading yet.

    ``rows`` are its numbers, ``parts`` those of its caption, ``text`` the entry of the texts (by default the
    name), ``values`` what is filled in.
    """
    texts = _texts()[text or name]
    title = texts["title"].format(**values)
    caption = " ".join(texts[part] for part in parts).format(**values)
    numbers = fill(name, f"{texts.get('numbers', title)}.".format(**values), rows)
    return Figure(name, title, "", caption, tuple(panels), numbers, columns)


@cache
def _texts() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = yaml.safe_load(
        Path(__file__).with_name("texts.yaml").read_text("utf-8")
    )
    return found


def matplotlib_is_there() -> bool:
    """Whether figures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def drawable() -> bool:
    """The same; says how to get matplotlib where it is missing."""
    there = matplotlib_is_there()
    if not there:
        logger.info("No figures: %s", NO_MATPLOTLIB)
    return there


def arm_styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each arm (``ia2-sft``, ``ia2-sft@dora``): its recipe's, unless two share one."""
    recipes = [name.split("@")[0] for name in names]
    if len(set(recipes)) == len(recipes) and all(recipe in RECIPES for recipe in recipes):
        return {name: recipe_style(recipe) for name, recipe in zip(names, recipes, strict=True)}
    return {name: _style(place) for place, name in enumerate(names)}


def recipe_style(recipe: str) -> dict[str, Any]:
    """Colour and marker of a recipe."""
    known = list(RECIPES)
    return _style(known.index(recipe) if recipe in known else len(known))


def _style(place: int) -> dict[str, Any]:
    # more arms than colours: the signs go on changing against them
    turn = place // len(COLOURS)
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[(place + turn) % len(MARKERS)]}


@contextmanager
def canvas(
    target: Path | BytesIO, rows: int, columns: int, width: float, height: float
) -> Iterator[tuple[Any, Any]]:
    """A white figure, since pages are dark at times, saved when the block ends; sizes in inches.

    The target is a file, whose ending chooses the format, or a buffer for SVG.
    """
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(_SETTINGS):
        figure = Canvas(figsize=(width, height), layout="constrained", facecolor="white")
        axes = figure.subplots(rows, columns, squeeze=False)
        yield figure, axes
        for axis in axes.flat:
            axis.spines[["top", "right"]].set_visible(False)
        kind = target.suffix.removeprefix(".") if isinstance(target, Path) else "svg"
        metadata = {"Date": None} if kind == "svg" else None
        drawn = target if isinstance(target, BytesIO) else BytesIO()
        figure.savefig(drawn, format=kind, metadata=metadata, dpi=150)
        if isinstance(target, Path):
            write_bytes(target, drawn.getvalue())


def legend(figure: Any, axis: Any, columns: int) -> None:
    """Below the panels: inside, it would cover a curve of some run."""
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def plain_log(axes: Any, which: str, base: int = 10) -> None:
    """A logarithmic x or y axis, its numbers written out: powers would need the mathematics that is off."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    steps = (1.0, 2.0, 5.0) if base == 10 else (1.0,)
    axis.set_major_locator(LogLocator(base=base, subs=steps, numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")
