"""Figures of comparisons and curves, from their summaries alone (matplotlib, from the extra ``report``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ia2.report.figures.style import (
    FAINT,
    INK,
    NO_MATPLOTLIB,
    Figure,
    Panel,
    arm_styles,
    matplotlib_is_there,
    numbers_table,
    plain_log,
)
from ia2.report.tables import MEASURES, intervals_of
from ia2.utils.logging import logger
from ia2.utils.statistics import main_scope
from ia2.utils.wording import estimate

_MEASURES = {"accuracy": "accuracy (higher is better)", "nll": "NLL (lower is better)"}
"""What is drawn; the tables beside the figures have the others too."""


def try_comparison_figure(summary: dict[str, Any], folder: Path) -> Path | None:
    """Draw ``compare.svg`` if matplotlib is there; say how to get it otherwise."""
    return _try(comparison_figure, summary, folder / "compare.svg")


def try_curve_figure(summary: dict[str, Any], folder: Path) -> Path | None:
    """Draw ``curve.svg`` if matplotlib is there; say how to get it otherwise."""
    return _try(curve_figure, summary, folder / "curve.svg")


def _try(draw: Callable[[dict[str, Any], Path], None], summary: dict[str, Any], path: Path) -> Path | None:
    if not matplotlib_is_there():
        logger.info("No figure: %s", NO_MATPLOTLIB)
        return None
    draw(summary, path)
    return path


def comparison_figure(summary: dict[str, Any], path: Path) -> None:
    """Accuracy, NLL and similarity to ICL of each recipe, with 95% intervals over draws.

    Args:
        summary: what ``compare.json`` holds.
        path: the file; its ending chooses the format.
    """
    results_figure(summary).save(path)


def curve_figure(summary: dict[str, Any], path: Path) -> None:
    """Accuracy and NLL of each recipe over the number of training examples, with 95% intervals over draws.

    Args:
        summary: what ``curve.json`` holds.
        path: the file; its ending chooses the format.
    """
    sizes_figure(summary).save(path)


def heading(summary: Mapping[str, Any]) -> str:
    """What a comparison's figures are of."""
    design = summary["design"]
    return (
        f"{summary['model']}: {design['num_train']} examples, {design['num_test']} test rows, "
        f"{intervals_of(summary)}"
    )


def scope_of(summary: Mapping[str, Any]) -> str:
    """The scope of a comparison's main metrics."""
    return main_scope(summary["design"]["task"] == "classification")


# ------------------------------------------------------------------------------------------- results


def results_figure(summary: Mapping[str, Any]) -> Figure:
    """Accuracy, NLL and similarity to ICL of each arm of a comparison."""
    scope, entries = scope_of(summary), summary["recipes"]
    values = {
        title: {name: entry["metrics"][scope][measure] for name, entry in entries.items()}
        for measure, title in _MEASURES.items()
    }
    values["activation similarity to ICL"] = {n: e["asim"] for n, e in entries.items() if "asim" in e}
    styles = arm_styles(list(entries))
    height = max(2.6, 0.8 + 0.3 * len(entries))
    panels = tuple(
        Panel(_bars(title, found, styles), height=height) for title, found in values.items() if found
    )
    rows = [[name, *(estimate(found.get(name)) for found in values.values())] for name in entries]
    return Figure(
        "compare",
        "Accuracy, NLL and similarity to ICL",
        heading(summary),
        "Bars are means over draws; lines are 95% t-intervals over draws, of which one draw "
        "has none. Accuracy "
        "and NLL are among the labels, where there are labels.",
        panels,
        numbers_table("compare", "Accuracy, NLL and similarity to ICL by recipe", ["recipe", *values], rows),
    )


def _bars(title: str, values: Mapping[str, Any], styles: Mapping[str, Any]) -> Callable[[Any], None]:
    known = {name: found for name, found in values.items() if found["value"] is not None}

    def draw(axis: Any) -> None:
        ends = [0.05 if "NLL" in title else 1.0]
        for place, (name, found) in enumerate(known.items()):
            value, low, high = found["value"], found["low"], found["high"]
            axis.barh(place, value, color=styles[name]["color"], height=0.65)
            if low is not None and high is not None:
                axis.plot([low, high], [place, place], color=INK, linewidth=1.5)
            end = max(value, high or value)
            axis.text(max(end, 0) + 0.02, place, f"{value:.2f}", va="center", fontsize=9)
            ends.append(1.25 * end)
        axis.set_yticks(range(len(known)), list(known))
        axis.invert_yaxis()
        axis.set_title(title, fontsize=10)
        axis.set_xlim(min([0.0, *(found["value"] for found in known.values())]), max(ends))

    return draw


# --------------------------------------------------------------------------------------------- sizes


def sizes_figure(summary: Mapping[str, Any]) -> Figure:
    """Accuracy and NLL of each recipe over N."""
    rows = [
        [name, str(point["num_train"]), *(estimate(point.get(measure)) for measure in MEASURES)]
        for name, points in summary["curves"].items()
        for point in points
    ]
    return Figure(
        "curve",
        "Accuracy and NLL over the number of training examples",
        f"{summary['model']}: {summary['title']}",
        f"Lines are means over draws; bands: {intervals_of(summary)}. Among the "
        "labels, where there are "
        "labels.",
        tuple(
            Panel(_curves(summary, name, title), legend=True, width=4.3, height=3.4)
            for name, title in _MEASURES.items()
            if any(name in point for points in summary["curves"].values() for point in points)
        ),
        numbers_table("curve", "Results by recipe and N", ["recipe", "N", *MEASURES.values()], rows),
        columns=2,
    )


def _curves(summary: Mapping[str, Any], name: str, title: str) -> Callable[[Any], None]:
    styles = arm_styles(list(summary["curves"]))

    def draw(axis: Any) -> None:
        for recipe, points in summary["curves"].items():
            known = [p for p in points if p.get(name, {}).get("value") is not None]
            values = [p[name]["value"] for p in known]
            ends = [
                [v if p[name][end] is None else p[name][end] for p, v in zip(known, values, strict=True)]
                for end in ("low", "high")
            ]
            sizes = [p["num_train"] for p in known]
            axis.plot(sizes, values, markersize=4, label=recipe, **styles[recipe])
            axis.fill_between(sizes, *ends, color=styles[recipe]["color"], alpha=0.12, linewidth=0)
        axis.set_xscale("log", base=2)
        axis.set_xticks(summary["sizes"], [str(size) for size in summary["sizes"]])
        axis.minorticks_off()
        axis.set_xlabel("training examples N")
        axis.set_title(title, fontsize=10)
        axis.set_ylim(bottom=0)

    return draw


# ---------------------------------------------------------------------------------------------- cost


def cost_figure(summary: Mapping[str, Any]) -> Figure | None:
    """Accuracy and NLL against tokens per query; None for runs that did not count them."""
    scope = scope_of(summary)
    points = {
        name: (float(entry["tokens_per_query"]), entry["metrics"][scope])
        for name, entry in summary["recipes"].items()
        if entry.get("tokens_per_query") is not None
        and None not in (entry["metrics"][scope][measure]["value"] for measure in _MEASURES)
    }
    if len(points) < 2:
        return None
    rows = [
        [name, f"{tokens:.1f}", *(estimate(metrics[measure]) for measure in _MEASURES)]
        for name, (tokens, metrics) in points.items()
    ]
    return Figure(
        "cost",
        "What a query costs, and what it buys",
        heading(summary),
        "Tokens read for one query, on average: in-context learning reads its demonstrations again with "
        "every query. Points of the same cost stand side by side. The dashed line joins what nothing cheaper "
        "reaches.",
        tuple(
            Panel(_costs(points, measure, title), legend=True, width=4.3, height=3.4)
            for measure, title in _MEASURES.items()
        ),
        numbers_table(
            "cost", "Tokens per query and results", ["recipe", "tokens per query", *_MEASURES], rows
        ),
        columns=2,
    )


def _costs(points: Mapping[str, Any], measure: str, title: str) -> Callable[[Any], None]:
    styles = arm_styles(list(points))

    def draw(axis: Any) -> None:
        found = [(tokens, metrics[measure]["value"]) for tokens, metrics in points.values()]
        front = frontier(found, higher=measure == "accuracy")
        front = [*front, (max(cost for cost, _ in found), front[-1][1])]
        axis.plot(*zip(*front, strict=True), drawstyle="steps-post", color=FAINT, linewidth=1, linestyle="--")
        for name, (tokens, metrics) in points.items():
            at = metrics[measure]
            same = [other for other, (cost, _) in points.items() if cost == tokens]
            shown = tokens * 1.04 ** (same.index(name) - (len(same) - 1) / 2)
            if at["low"] is not None and at["high"] is not None:
                axis.plot([shown, shown], [at["low"], at["high"]], color=styles[name]["color"], linewidth=1.5)
            axis.plot(shown, at["value"], linestyle="none", markersize=6, label=name, **styles[name])
        plain_log(axis, "x", base=2)
        axis.margins(x=0.12)
        axis.set_xlabel("tokens per query")
        axis.set_ylim(bottom=0)
        axis.set_title(title, fontsize=10)

    return draw


def frontier(points: Iterable[tuple[float, float]], *, higher: bool) -> Sequence[tuple[float, float]]:
    """Points (cost, value) that nothing as cheap or cheaper reaches, by cost."""
    sign = 1 if higher else -1
    kept: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if not kept or sign * value > sign * kept[-1][1]:
            kept.append((cost, value))
    return kept
