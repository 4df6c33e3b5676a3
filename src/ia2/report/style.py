"""The look of every figure: colours, signs, canvas, and what makes a figure a part of a page.

A figure is made of panels. In a file they stand side by side; a page takes each as a picture of its own, so
that a narrow screen has them one below the other, at full size.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ia2.files import write_bytes
from ia2.recipes import RECIPES
from ia2.sweeps.tables import Column, Entry, Table

# Okabe and Ito's palette, told apart by readers with any colour vision; an olive of Paul Tol's stands for its
# yellow, which is no colour for lines on white.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999933", "#000000")

# A recipe has the same colour and sign in every figure, so that colour alone need not tell.
MARKERS = "osD^vP*X"

# For lines and text that belong to no recipe; a page draws them in its own text colour.
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


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        draw: draws on it.
        legend: whether what it draws has labels; with several panels in a file, the first one's legend
            stands for all.
        width: inches.
        height: inches.
    """

    draw: Callable[[Any], None]
    legend: bool = False
    width: float = 3.6
    height: float = 3.1


@dataclass(frozen=True)
class Figure:
    """Panels, what they show, and the same in numbers.

    Attributes:
        name: of its file, without ending.
        title: what it shows.
        heading: what it is of: model, data, seeds.
        caption: how to read it; sentences.
        panels: in order.
        numbers: its text alternative.
        columns: panels side by side in a file.
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
            if any(panel.legend for panel in self.panels):
                place = [panel.legend for panel in self.panels].index(True)
                legend(figure, list(axes.flat)[place], 4)
            figure.suptitle(self.heading, fontsize=10)
        return path

    def inline(self, ident: str) -> list[str]:
        """Each panel as an ``<svg>`` for a page; ``ident`` is the beginning of their ids.

        The description of each is the title and the caption: the numbers follow on the page.
        """
        pictures = []
        for place, panel in enumerate(self.panels):
            target = BytesIO()
            with canvas(target, 1, 1, panel.width, panel.height) as (figure, axes):
                panel.draw(axes[0][0])
                title = axes[0][0].get_title()
                if panel.legend:
                    legend(figure, axes[0][0], 3)
            name = f"{self.title}: {title}" if title else self.title
            pictures.append(inline_svg(target.getvalue(), f"{ident}-{place}", name, self.caption))
        return pictures


def numbers_table(name: str, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A figure's numbers; the first column names the row."""
    entries = tuple(tuple(map(Entry, row)) for row in rows)
    return Table(name, f"{title}.", tuple(map(Column, columns)), entries)


def matplotlib_is_there() -> bool:
    """Whether figures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def arm_styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each arm of a comparison: its recipe's, unless two arms share one.

    Args:
        names: ``ia2-sft`` or ``ia2-sft@dora``.
    """
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
    """A white figure, since pages are dark at times, saved when the block ends.

    Args:
        target: a file, whose ending chooses the format, or a buffer for SVG.
        rows: of panels.
        columns: of panels.
        width: inches.
        height: inches.
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
    """A logarithmic axis with its numbers written out; powers would need the mathematics that is off.

    Args:
        axes: of a panel.
        which: ``x`` or ``y``.
        base: 10, or 2 for counts.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    steps = (1.0, 2.0, 5.0) if base == 10 else (1.0,)
    axis.set_major_locator(LogLocator(base=base, subs=steps, numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


# --------------------------------------------------------------------------------------------- pages

_NAMESPACE = re.compile(r"\{[^}]*\}")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_FONT = re.compile(r"([\d.]+px)")
_PAGE_COLOURS = {"#000000": "currentColor", INK: "currentColor", FAINT: "currentColor", "#ffffff": "none"}

# A point of a figure is this many pixels of a page, whose text is larger than a figure's.
_SCALE = 1.25


def inline_svg(svg: bytes, ident: str, title: str, description: str) -> str:
    """An ``<svg>`` element to be put into a page.

    It has no style of its own (a page's policy forbids it), no ids that another figure could have, and no
    addresses; black becomes the page's text colour and white its background, so that it suits dark pages.

    Args:
        svg: a file that matplotlib wrote.
        ident: beginning of all its ids.
        title: read out as its name.
        description: read out after the name.
    """
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if _NAMESPACE.sub("", str(child.tag)) in ("metadata", "style"):
                parent.remove(child)
    used = set()
    for element in root.iter():
        element.tag = _NAMESPACE.sub("", str(element.tag))
        given = {_NAMESPACE.sub("", name): value for name, value in element.attrib.items()}
        given.update(_presentation(given.pop("style", "")))
        if "d" in given:
            given["d"] = " ".join(given["d"].split())
        if element.tag == "text":
            given.setdefault("fill", "currentColor")
        if given.get("href", "").startswith("#"):
            used.add(given["href"][1:])
        used.update(name for value in given.values() for name in _REFERENCE.findall(value))
        element.attrib.clear()
        element.attrib.update(given)
    for element in root.iter():
        _own_ids(element, ident, used)
    size = root.get("viewBox", "0 0 1 1").split()
    root.attrib.clear()
    root.attrib.update(
        {
            "class": "plot",
            "viewBox": " ".join(size),
            "width": f"{_SCALE * float(size[2]):.0f}",
            "height": f"{_SCALE * float(size[3]):.0f}",
            "role": "img",
            "aria-labelledby": f"{ident}-t {ident}-d",
            "stroke-linejoin": "round",
        }
    )
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, {"id": f"{ident}-{tag[0]}"})
        element.text = text
        root.insert(place, element)
    return ElementTree.tostring(root, encoding="unicode")


def _presentation(style: str) -> dict[str, str]:
    """A ``style`` attribute as attributes, without the font's family: a page has its own."""
    found = {}
    for part in style.split(";"):
        name, _, value = (text.strip() for text in part.partition(":"))
        if name == "font":  # matplotlib before 3.10 writes size and family as one
            size = _FONT.search(value)
            name, value = "font-size", size[1] if size else ""
        if name in ("fill", "stroke"):
            if value == FAINT:
                found[f"{name}-opacity"] = "0.6"
            value = _PAGE_COLOURS.get(value, value)
        if name and value and name != "font-family":
            found[name] = value
    return found


def _own_ids(element: ElementTree.Element, ident: str, used: set[str]) -> None:
    name = element.attrib.pop("id", None)
    if name in used:
        element.set("id", f"{ident}-{name}")
    for attribute, value in list(element.attrib.items()):
        if attribute == "href" and value.startswith("#"):
            element.set("href", f"#{ident}-{value[1:]}")
        else:
            element.set(attribute, _REFERENCE.sub(rf"url(#{ident}-\1)", value))
