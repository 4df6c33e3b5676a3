"""Figures of a sweep (matplotlib, from the extra ``report``): over N, by benchmark, by similarity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ia2.config.recipes import METHOD, RECIPES
from ia2.report.figures.lines import Lines, line_figure
from ia2.report.figures.marks import dots
from ia2.report.figures.style import COLOURS, Figure, Panel, drawable, make_figure, recipe_style
from ia2.report.sweep.cells import TITLES, Report
from ia2.report.sweep.selection import SweepTask
from ia2.utils.statistics import bounded, paired_test, t_interval
from ia2.utils.wording import estimate

# Among the labels, where there are labels.
_MEASURES = {"accuracy": "accuracy (higher is better)", "nll": "NLL (lower is better)"}
_OVER = "over benchmarks"


def try_figures(report: Report, folder: Path) -> list[Path]:
    """Draw what there is something for; say how to get matplotlib if it is not there."""
    figures = sweep_figures(report) if drawable() else []
    return [figure.save(folder / f"{figure.name}.svg") for figure in figures]


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


def _measures(report: Report, task: SweepTask) -> Sequence[str]:
    return list(_MEASURES) if report.labelled(task) else ["accuracy"]


def _sizes(report: Report, model: str) -> Figure | None:
    panels: list[Lines] = []
    shown: set[int] = set()

    def finish(axis: Any) -> None:
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted(shown), [str(size) for size in sorted(shown)])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)

    for task in report.tasks:
        by_recipe = {r: {n: report.plain(task, n, r) for n in report.sizes} for r in RECIPES}
        # the base model, which has no N, stands at each that others have
        sizes = {
            n for by_size in by_recipe.values() for n, each in by_size.items() if each and each.num_examples
        }
        for measure in _measures(report, task) if task.model == model and len(sizes) > 1 else ():
            series = {}
            for recipe, by_size in by_recipe.items():
                values = {n: each.values(task.benchmark, measure) for n, each in by_size.items() if each}
                points = {
                    n: bounded(t_interval(list(of.values())), measure).to_dict()
                    for n, of in values.items()
                    if of and n in sizes
                }
                ends = {end: [point[end] for point in points.values()] for end in ("value", "low", "high")}
                style = {"markersize": 4, "linewidth": 1.5, **recipe_style(recipe)}
                if points:
                    series[TITLES.get(recipe, recipe)] = {"x": list(points), **ends, "style": style}
            title = f"{_name(task)}: {_MEASURES[measure]}"
            shown |= sizes
            panels.append(Lines(title, series, finish=finish, label=f"{_name(task)}, {measure}"))
    if not panels:
        return None
    figure = line_figure(
        _file_name("sizes", model),
        sorted(shown),
        panels,
        text="sizes",
        rows="benchmark, measure",
        xlabel="training examples N",
        size=(4.3, 2.7),
        columns=2,
        model=model,
    )
    return replace(figure, heading=f"{model}, means with 95% t-intervals over draws")


def _differences(report: Report, model: str) -> Figure | None:
    panels: list[Panel] = []
    rows: list[dict[str, str]] = []
    places = report.places(own=True, model=model)
    for measure, title in _MEASURES.items():
        lines = {
            f"{_name(place.task)}, N = {place.size}": t_interval(values).to_dict()
            for place in places
            for values in report.pooled([place], measure)[0].values()
        }
        if lines:
            lines[_OVER] = paired_test(report.pooled(places, measure)[0]).whole.to_dict()
            styles = {name: {"color": COLOURS[0], "marker": "s"} for name in lines}
            styles[_OVER] = {"color": COLOURS[5], "marker": "D"}
            panels.append(dots(lines, styles, title.replace(" (", " difference ("), 0.0, width=4.6))
            rows += [
                {"evaluation": name, "measure": measure, "difference [95%]": estimate(found, signed=True)}
                for name, found in lines.items()
            ]
    if not panels:
        return None
    name = _file_name("differences", model)
    figure = make_figure(name, panels, rows, text="differences", columns=2, model=model)
    return replace(figure, heading=f"{model}: {TITLES[METHOD]} − SFT, paired, 95% t-intervals")


def _similarity(report: Report, model: str) -> Figure | None:
    points: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for task in report.tasks:
        of_task = {(n, r): report.plain(task, n, r) for n in report.sizes for r in RECIPES}
        for (_, recipe), runs in of_task.items() if task.model == model else ():
            # an icl record's similarity is the base model's: the null baseline, no point of its own
            for measure in _measures(report, task) if runs and recipe not in ("base", "icl") else ():
                for seed, value in runs.values(task.benchmark, measure).items() if runs else ():
                    similarity = runs.cells[seed].similarity or {} if runs else {}
                    if similarity.get("asim") is not None:
                        of = points.setdefault(measure, {}).setdefault(recipe, [])
                        of.append((similarity["asim"], value))
    if not points:
        return None
    rows = [
        {
            "recipe": TITLES.get(recipe, recipe),
            "measure": measure,
            "asim": f"{asim:.3f}",
            "value": f"{value:.3f}",
        }
        for measure, by_recipe in points.items()
        for recipe, found in by_recipe.items()
        for asim, value in found
    ]
    panels = [Panel(_scatter(by_recipe, measure), True, 4.3, 3.4) for measure, by_recipe in points.items()]
    name = _file_name("similarity", model)
    figure = make_figure(name, panels, rows, text="sweep-similarity", columns=2, model=model)
    return replace(figure, heading=f"{model}: one point a run")


def _scatter(by_recipe: dict[str, list[tuple[float, float]]], measure: str) -> Callable[[Any], None]:
    def draw(axis: Any) -> None:
        for recipe, found in by_recipe.items():
            x, y = zip(*found, strict=True)
            axis.scatter(x, y, s=16, alpha=0.75, label=TITLES.get(recipe, recipe), **recipe_style(recipe))
        axis.set_xlabel("activation similarity to ICL (asim)")
        axis.set_ylim(bottom=0)
        axis.set_title(_MEASURES[measure], fontsize=10)

    return draw
