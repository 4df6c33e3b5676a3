"""Figures of a sweep (matplotlib, from the extra ``report``): over N, by benchmark, by similarity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ia2.config.recipes import RECIPES
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
from ia2.report.sweep.cells import METHOD, TITLES, Report
from ia2.report.sweep.selection import Task
from ia2.utils.logging import logger
from ia2.utils.statistics import Interval, bounded, paired_test, t_interval
from ia2.utils.wording import estimate

_MEASURES = {"accuracy": "accuracy (higher is better)", "nll": "NLL (lower is better)"}
"""Among the labels, where there are labels."""


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


def _file_name(model: str) -> str:
    return "".join(sign if sign.isalnum() or sign in "-." else "-" for sign in model).strip("-.") or "model"


def _tasks(report: Report, model: str) -> list[Task]:
    return [task for task in report.tasks if task.model == model]


def _name(task: Task) -> str:
    return f"{task.benchmark} ({task.verbaliser})" if task.verbaliser else task.benchmark


# ---------------------------------------------------------------------------------------------- over N


def _sizes(report: Report, model: str) -> Figure | None:
    sizes = {task: _own_sizes(report, task) for task in _tasks(report, model)}
    sizes = {task: own for task, own in sizes.items() if len(own) > 1}
    if not sizes:
        return None
    panels, rows = [], []
    for task, own in sizes.items():
        for measure, title in _MEASURES.items():
            labelled = measure == "accuracy" or report.labelled(task)
            found = {r: _curve(report, task, own, r, measure) for r in RECIPES} if labelled else {}
            panels.append(_curves_panel(own, f"{_name(task)}: {title}", found))
            for recipe, points in found.items():
                rows += [
                    [_name(task), TITLES[recipe], measure, str(n), estimate(i.to_dict())]
                    for n, i in points.items()
                ]
    return Figure(
        f"sizes-{_file_name(model)}",
        f"Accuracy and NLL over N, {model}",
        f"{model}, means with 95% t-intervals over draws",
        "Plain recipes, among the labels; lines are means over draws, bands 95% t-intervals "
        "over draws, of which "
        "one draw has none.",
        tuple(panels),
        numbers_table("sizes", "Values by N", ["benchmark", "recipe", "measure", "N", "value [95%]"], rows),
        columns=2,
    )


def _own_sizes(report: Report, task: Task) -> list[int]:
    """The N that a task was run at; the base model, which has none, stands at each."""
    arms = {size: [report.plain(task, size, recipe) for recipe in RECIPES] for size in report.sizes}
    return [size for size, of in arms.items() if any(a is not None and a.num_examples for a in of)]


def _curve(
    report: Report, task: Task, sizes: Sequence[int], recipe: str, measure: str
) -> dict[int, Interval]:
    """Intervals by N."""
    arms = {size: report.plain(task, size, recipe) for size in sizes}
    values = {
        n: list(arm.values(task.benchmark, measure).values()) for n, arm in arms.items() if arm is not None
    }
    return {n: bounded(t_interval(of), measure) for n, of in values.items() if of}


def _curves_panel(sizes: Sequence[int], title: str, found: dict[str, dict[int, Any]]) -> Panel:
    def draw(axis: Any) -> None:
        if not found:
            axis.set_axis_off()
            return
        for recipe, points in found.items():
            if points:
                style = recipe_style(recipe)
                axis.plot(
                    list(points),
                    [i.value for i in points.values()],
                    markersize=4,
                    label=TITLES[recipe],
                    **style,
                )
                ends = [i.low for i in points.values()], [i.high for i in points.values()]
                axis.fill_between(list(points), *ends, color=style["color"], alpha=0.12, linewidth=0)
                if len(points) == 1:  # a band needs two
                    axis.vlines(list(points), *ends, color=style["color"], alpha=0.5)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set_xlabel("training examples N")
        axis.set_title(title, fontsize=10)

    return Panel(draw, legend=bool(found), width=4.3, height=2.7)


# ----------------------------------------------------------------------------------------- differences


def _differences(report: Report, model: str) -> Figure | None:
    places = report.places(own=True, model=model)
    lines: dict[str, list[tuple[str, Interval]]] = {}
    pooled = {measure: report.pooled(places, measure)[0] for measure in _MEASURES}
    for measure in _MEASURES:
        for place in places:
            of_place = list(report.pooled([place], measure)[0].values())
            if of_place:
                name = f"{_name(place.task)}, N = {place.size}"
                lines.setdefault(measure, []).append((name, t_interval(of_place[0])))
    if not lines:
        return None
    height = 1.2 + 0.28 * (1 + max(map(len, lines.values())))
    rows = [
        [name, measure, estimate(i.to_dict(), signed=True)]
        for measure, found_lines in lines.items()
        for name, i in found_lines
    ]
    for measure in lines:
        over = paired_test(pooled[measure]).whole
        rows.append(["over benchmarks", measure, estimate(over.to_dict(), signed=True)])
    return Figure(
        f"differences-{_file_name(model)}",
        f"{TITLES[METHOD]} less SFT, {model}",
        f"{model}: {TITLES[METHOD]} − SFT, paired, 95% t-intervals",
        "Squares: a benchmark and N, over draws; one draw has no interval. Diamond: the mean "
        "over benchmarks, "
        "its interval over benchmarks. Right of zero is better in accuracy, left of it in NLL.",
        tuple(
            Panel(_forest(found_lines, pooled[measure], measure), width=4.6, height=height)
            for measure, found_lines in lines.items()
        ),
        numbers_table("differences", "Differences", ["evaluation", "measure", "difference [95%]"], rows),
        columns=2,
    )


def _forest(
    lines: Sequence[tuple[str, Any]], pairs: dict[str, list[float]], measure: str
) -> Callable[[Any], None]:
    def draw(axis: Any) -> None:
        for place, (_, found) in enumerate(lines):
            axis.plot([found.low, found.high], [place, place], color=COLOURS[0], linewidth=1.5)
            axis.plot(found.value, place, marker="s", markersize=4, color=COLOURS[0])
        over = paired_test(pairs).whole
        axis.plot(over.value, len(lines), marker="D", markersize=6, color=COLOURS[5])
        if over.low == over.low:
            axis.plot([over.low, over.high], [len(lines)] * 2, color=COLOURS[5], linewidth=1.5)
        names = [name for name, _ in lines] + ["over benchmarks"]
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.4, -0.6)
        axis.axvline(0, color=FAINT, linewidth=0.8, zorder=0)
        axis.set_title(_MEASURES[measure].replace(" (", " difference ("), fontsize=10)

    return draw


# ------------------------------------------------------------------------------------------ similarity


def _similarity(report: Report, model: str) -> Figure | None:
    points: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for task in _tasks(report, model):
        for size in report.sizes:
            for recipe in RECIPES:
                # an icl record's similarity is the base model's: the null baseline, no point of its own
                arm = report.plain(task, size, recipe) if recipe not in ("base", "icl") else None
                if arm is None:
                    continue
                for measure in _MEASURES if report.labelled(task) else ["accuracy"]:
                    for seed, value in arm.values(task.benchmark, measure).items():
                        similarity = arm.runs[seed].similarity
                        if similarity is not None and similarity.get("asim") is not None:
                            of = points.setdefault(measure, {}).setdefault(recipe, [])
                            of.append((similarity["asim"], value))
    if not points:
        return None
    rows = [
        [TITLES[recipe], measure, f"{asim:.3f}", f"{value:.3f}"]
        for measure, by_recipe in points.items()
        for recipe, found in by_recipe.items()
        for asim, value in found
    ]
    return Figure(
        f"similarity-{_file_name(model)}",
        f"Similarity to ICL against results, {model}",
        f"{model}: one point a run",
        "A point a run of a plain recipe. Being like ICL inside is no merit in itself: it matters where "
        "ICL works.",
        tuple(
            Panel(_scatter(by_recipe, measure), legend=True, width=4.3, height=3.4)
            for measure, by_recipe in points.items()
        ),
        numbers_table("similarity", "Runs", ["recipe", "measure", "asim", "value"], rows),
        columns=2,
    )


def _scatter(by_recipe: dict[str, list[tuple[float, float]]], measure: str) -> Callable[[Any], None]:
    def draw(axis: Any) -> None:
        for recipe, found in by_recipe.items():
            x, y = zip(*found, strict=True)
            axis.scatter(x, y, s=16, alpha=0.75, label=TITLES[recipe], **recipe_style(recipe))
        axis.set_xlabel("activation similarity to ICL (asim)")
        axis.set_ylim(bottom=0)
        axis.set_title(_MEASURES[measure], fontsize=10)

    return draw
