"""Figures of a sweep (matplotlib, from the extra ``report``): over N, by benchmark, by similarity."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ia2.config.recipes import METHOD, RECIPES
from ia2.report.figures.style import (
    COLOURS,
    FAINT,
    NO_MATPLOTLIB,
    Figure,
    Panel,
    matplotlib_is_there,
    numbers_table,
    recipe_style,
)
from ia2.report.sweep.cells import TITLES, Place, Report
from ia2.report.sweep.selection import SweepTask
from ia2.utils.logging import logger
from ia2.utils.statistics import Interval, bounded, paired_test, t_interval
from ia2.utils.wording import estimate

# Among the labels, where there are labels.
_MEASURES = {"accuracy": "accuracy (higher is better)", "nll": "NLL (lower is better)"}

Curves = dict[str, dict[int, Interval]]
"""Recipe → N → interval."""


def try_figures(report: Report, folder: Path) -> list[Path]:
    """Draw what there is something for; say how to get matplotlib if it is not there."""
    if not matplotlib_is_there():
        logger.info("No figures: %s", NO_MATPLOTLIB)
        return []
    return [figure.save(folder / f"{figure.name}.svg") for figure in sweep_figures(report)]


def sweep_figures(report: Report) -> list[Figure]:
    """Every figure that the cells have something for, of each model, wherever ICL works."""
    report = report.where(icl_works=False)
    made = (make(report, model) for make in (_sizes, _differences, _similarity) for model in report.models)
    return [figure for figure in made if figure is not None]


def _file_name(kind: str, model: str) -> str:
    safe = "".join(sign if sign.isalnum() or sign in "-." else "-" for sign in model).strip("-.")
    return f"{kind}-{safe or 'model'}"


def _name(task: SweepTask) -> str:
    return f"{task.benchmark} ({task.verbaliser})" if task.verbaliser else task.benchmark


# ---------------------------------------------------------------------------------------------- over N


def _sizes(report: Report, model: str) -> Figure | None:
    panels, rows = [], []
    for task in report.tasks:
        runs = {(r, n): report.plain(task, n, r) for r in RECIPES for n in report.sizes}
        # the base model, which has no N, stands at each that others have
        sizes = [n for n in report.sizes if any(runs[r, n] and runs[r, n].num_examples for r in RECIPES)]  # type: ignore[union-attr]
        if task.model != model or len(sizes) < 2:
            continue
        for measure, title in _MEASURES.items():
            curves: Curves = {}
            for (recipe, n), each in runs.items() if measure == "accuracy" or report.labelled(task) else ():
                values = list(each.values(task.benchmark, measure).values()) if each and n in sizes else []
                if values:
                    curves.setdefault(recipe, {})[n] = bounded(t_interval(values), measure)
            draw = _draw_curves(sizes, f"{_name(task)}: {title}", curves)
            panels.append(Panel(draw, legend=bool(curves), width=4.3, height=2.7))
            rows += [
                [_name(task), TITLES.get(recipe, recipe), measure, str(n), estimate(interval.to_dict())]
                for recipe, points in curves.items()
                for n, interval in points.items()
            ]
    if not panels:
        return None
    return Figure(
        _file_name("sizes", model),
        f"Accuracy and NLL over N, {model}",
        f"{model}, means with 95% t-intervals over draws",
        "Plain recipes, among the labels; lines are means over draws, bands 95% t-intervals over draws, of "
        "which one draw has none.",
        tuple(panels),
        numbers_table("sizes", "Values by N", ["benchmark", "recipe", "measure", "N", "value [95%]"], rows),
        columns=2,
    )


def _draw_curves(sizes: list[int], title: str, curves: Curves) -> Callable[[Any], None]:
    def draw(axis: Any) -> None:
        if not curves:
            axis.set_axis_off()
            return
        for recipe, points in curves.items():
            style, at = recipe_style(recipe), list(points)
            axis.plot(
                at,
                [i.value for i in points.values()],
                markersize=4,
                label=TITLES.get(recipe, recipe),
                **style,
            )
            ends = [i.low for i in points.values()], [i.high for i in points.values()]
            axis.fill_between(at, *ends, color=style["color"], alpha=0.12, linewidth=0)
            if len(at) == 1:  # a band needs two
                axis.vlines(at, *ends, color=style["color"], alpha=0.5)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set_xlabel("training examples N")
        axis.set_title(title, fontsize=10)

    return draw


# ----------------------------------------------------------------------------------------- differences


def _differences(report: Report, model: str) -> Figure | None:
    places = report.places(own=True, model=model)
    panels, rows = [], []
    for measure in _MEASURES:
        lines = _forest(report, places, measure)
        if lines:
            panels.append((lines, measure))
            rows += [[name, measure, estimate(i.to_dict(), signed=True)] for name, i in lines.items()]
    if not panels:
        return None
    # the means over benchmarks come last
    rows.sort(key=lambda row: row[0] == _OVER)
    height = 1.2 + 0.28 * max(len(lines) for lines, _ in panels)
    return Figure(
        _file_name("differences", model),
        f"{TITLES[METHOD]} less SFT, {model}",
        f"{model}: {TITLES[METHOD]} − SFT, paired, 95% t-intervals",
        "Squares: a benchmark and N, over draws; one draw has no interval. Diamond: the mean over "
        "benchmarks, its interval over benchmarks. Right of zero is better in accuracy, left of it in NLL.",
        tuple(Panel(_draw_forest(*panel), width=4.6, height=height) for panel in panels),
        numbers_table("differences", "Differences", ["evaluation", "measure", "difference [95%]"], rows),
        columns=2,
    )


_OVER = "over benchmarks"


def _forest(report: Report, places: list[Place], measure: str) -> dict[str, Interval]:
    """The difference at each place and, last, over benchmarks; empty without any."""
    lines = {}
    for place in places:
        for values in report.pooled([place], measure)[0].values():
            lines[f"{_name(place.task)}, N = {place.size}"] = t_interval(values)
    return {**lines, _OVER: paired_test(report.pooled(places, measure)[0]).whole} if lines else {}


def _draw_forest(lines: dict[str, Interval], measure: str) -> Callable[[Any], None]:
    def draw(axis: Any) -> None:
        for place, (name, found) in enumerate(lines.items()):
            colour, marker, size = (COLOURS[5], "D", 6) if name == _OVER else (COLOURS[0], "s", 4)
            axis.plot([found.low, found.high], [place, place], color=colour, linewidth=1.5)
            axis.plot(found.value, place, marker=marker, markersize=size, color=colour)
        axis.set_yticks(range(len(lines)), list(lines))
        axis.set_ylim(len(lines) - 0.4, -0.6)
        axis.axvline(0, color=FAINT, linewidth=0.8, zorder=0)
        axis.set_title(_MEASURES[measure].replace(" (", " difference ("), fontsize=10)

    return draw


# ------------------------------------------------------------------------------------------ similarity


def _similarity(report: Report, model: str) -> Figure | None:
    points: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for task in report.tasks:
        for size in report.sizes if task.model == model else ():
            for recipe in RECIPES:
                # an icl record's similarity is the base model's: the null baseline, no point of its own
                runs = report.plain(task, size, recipe) if recipe not in ("base", "icl") else None
                for measure in _MEASURES if report.labelled(task) else ["accuracy"]:
                    for seed, value in runs.values(task.benchmark, measure).items() if runs else ():
                        similarity = runs.cells[seed].similarity or {} if runs else {}
                        if similarity.get("asim") is not None:
                            of = points.setdefault(measure, {}).setdefault(recipe, [])
                            of.append((similarity["asim"], value))
    if not points:
        return None
    rows = [
        [TITLES.get(recipe, recipe), measure, f"{asim:.3f}", f"{value:.3f}"]
        for measure, by_recipe in points.items()
        for recipe, found in by_recipe.items()
        for asim, value in found
    ]
    return Figure(
        _file_name("similarity", model),
        f"Similarity to ICL against results, {model}",
        f"{model}: one point a run",
        "A point a run of a plain recipe. Being like ICL inside is no merit in itself: it matters where "
        "ICL works.",
        tuple(
            Panel(_draw_points(by_recipe, measure), legend=True, width=4.3, height=3.4)
            for measure, by_recipe in points.items()
        ),
        numbers_table("similarity", "Runs", ["recipe", "measure", "asim", "value"], rows),
        columns=2,
    )


def _draw_points(by_recipe: dict[str, list[tuple[float, float]]], measure: str) -> Callable[[Any], None]:
    def draw(axis: Any) -> None:
        for recipe, found in by_recipe.items():
            x, y = zip(*found, strict=True)
            axis.scatter(x, y, s=16, alpha=0.75, label=TITLES.get(recipe, recipe), **recipe_style(recipe))
        axis.set_xlabel("activation similarity to ICL (asim)")
        axis.set_ylim(bottom=0)
        axis.set_title(_MEASURES[measure], fontsize=10)

    return draw
