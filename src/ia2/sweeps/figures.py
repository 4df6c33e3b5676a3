"""Figures of a sweep (matplotlib, from the extra ``report``): over N, by benchmark, by similarity."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ia2.console import logger
from ia2.recipes import RECIPES
from ia2.report.figures import COLOURS
from ia2.sweeps.report import METHOD, TITLES, Report
from ia2.sweeps.selection import Task
from ia2.sweeps.statistics import by_seed, interval, paired_test

_SETTINGS: Any = {
    # fixed ids and no date: the same numbers give the same file
    "svg.hashsalt": "ia2",
    "svg.fonttype": "none",
    "font.size": 10,
    # a dollar in the name of a model is a dollar
    "text.parse_math": False,
}

# A recipe has the same colour and sign in every figure, so that colour alone need not tell.
_MARKERS = "osD^vP*X"

_MEASURES = {"accuracy": "accuracy (higher is better)", "ece": "ECE (lower is better)"}


def try_figures(report: Report, folder: Path) -> list[Path]:
    """Draw what there is something for; say how to get matplotlib if it is not there."""
    if importlib.util.find_spec("matplotlib") is None:
        logger.info("No figures: pip install 'ia2[report]' brings matplotlib.")
        return []
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    figures: dict[str, Callable[[Report, str, Path], bool]] = {
        "sizes": sizes_figure,
        "differences": differences_figure,
        "similarity": similarity_figure,
    }
    for name, draw in figures.items():
        for model in report.models:
            path = folder / f"{name}-{_file_name(model)}.svg"
            if draw(report, model, path):
                drawn.append(path)
    return drawn


def _file_name(model: str) -> str:
    return "".join(sign if sign.isalnum() or sign in "-." else "-" for sign in model).strip("-.") or "model"


def _style(recipe: str) -> dict[str, Any]:
    known = list(RECIPES)
    place = known.index(recipe) if recipe in known else len(known)
    return {"color": COLOURS[place % len(COLOURS)], "marker": _MARKERS[place % len(_MARKERS)]}


@contextmanager
def _canvas(path: Path, rows: int, columns: int, width: float, height: float) -> Iterator[tuple[Any, Any]]:
    """A white figure, since pages are dark at times, saved when the block ends."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(_SETTINGS):
        figure, axes = plt.subplots(
            rows, columns, figsize=(width, height), squeeze=False, layout="constrained"
        )
        figure.patch.set_facecolor("white")
        yield figure, axes
        for axis in axes.flat:
            axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)
        plt.close(figure)


def _legend(figure: Any, axis: Any) -> None:
    """Below the panels: inside, it would cover a curve of some sweep."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)


def _tasks(report: Report, model: str) -> list[Task]:
    return [task for task in report.tasks if task.model == model]


def sizes_figure(report: Report, model: str, path: Path) -> bool:
    """Accuracy and ECE of the plain recipes over N, a row of panels a benchmark; False with one N."""
    tasks = _tasks(report, model)
    if len(report.sizes) < 2 or not tasks:
        return False
    with _canvas(path, len(tasks), 2, 8.6, 0.6 + 2.5 * len(tasks)) as (figure, axes):
        for task, pair in zip(tasks, axes, strict=True):
            for axis, (measure, title) in zip(pair, _MEASURES.items(), strict=True):
                if measure == "ece" and not report.labelled(task):
                    axis.set_axis_off()
                    continue
                for recipe in RECIPES:
                    _curve(report, task, recipe, measure, axis)
                axis.set_xscale("log", base=2)
                axis.set_xticks(report.sizes, [str(size) for size in report.sizes])
                axis.minorticks_off()
                axis.set_ylim(bottom=0)
                axis.set_title(f"{_name(task)}: {title}", fontsize=10)
        for axis in axes[-1]:
            axis.set_xlabel("training examples N")
        _legend(figure, axes[0][0])
        figure.suptitle(f"{model}, means with 95% intervals over seeds and test rows", fontsize=10)
    return True


def _curve(report: Report, task: Task, recipe: str, measure: str, axis: Any) -> None:
    sizes, values, low, high = [], [], [], []
    for size in report.sizes:
        arm = report.plain(task, size, recipe)
        found = None if arm is None else interval(arm, task.benchmark, measure)
        if found is not None:
            sizes.append(size)
            values.append(found.value)
            low.append(found.low)
            high.append(found.high)
    if sizes:
        style = _style(recipe)
        axis.plot(sizes, values, markersize=4, label=TITLES[recipe], **style)
        axis.fill_between(sizes, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _name(task: Task) -> str:
    return f"{task.benchmark} ({task.verbaliser})" if task.verbaliser else task.benchmark


def differences_figure(report: Report, model: str, path: Path) -> bool:
    """IA2 → SFT less SFT, accuracy and ECE, of each benchmark and N and over all; False without a pair."""
    lines: dict[str, list[tuple[str, Any]]] = {}
    pooled: dict[str, dict[str, list[float]]] = {}
    for measure in _MEASURES:
        for task in _tasks(report, model):
            for size in report.sizes:
                pair = report.pair(task, size)
                if pair is None or (measure == "ece" and not report.labelled(task)):
                    continue
                found = report.compare(*pair, task.benchmark, measure)
                if found is not None:
                    lines.setdefault(measure, []).append((f"{_name(task)}, N = {size}", found.interval))
                    of = pooled.setdefault(measure, {}).setdefault(task.benchmark, [])
                    of.extend(found.by_seed.values())
    if not lines:
        return False
    height = 1.4 + 0.28 * (1 + max(map(len, lines.values())))
    with _canvas(path, 1, len(lines), 4.6 * len(lines), height) as (figure, axes):
        for axis, (measure, found_lines) in zip(axes[0], lines.items(), strict=True):
            _forest(axis, found_lines)
            _diamond(axis, len(found_lines), pooled[measure])
            names = [name for name, _ in found_lines] + ["over benchmarks"]
            axis.set_yticks(range(len(names)), names)
            axis.set_ylim(len(names) - 0.4, -0.6)
            axis.axvline(0, color="#666666", linewidth=0.8, zorder=0)
            axis.set_title(_MEASURES[measure].replace(" (", " difference ("), fontsize=10)
        figure.suptitle(f"{model}: {TITLES[METHOD]} − SFT, paired, 95% intervals", fontsize=10)
    return True


def _forest(axis: Any, lines: Sequence[tuple[str, Any]]) -> None:
    for place, (_, found) in enumerate(lines):
        axis.plot([found.low, found.high], [place, place], color=COLOURS[0], linewidth=1.5)
        axis.plot(found.value, place, marker="s", markersize=4, color=COLOURS[0])


def _diamond(axis: Any, place: int, pairs: dict[str, list[float]]) -> None:
    found = paired_test(pairs)
    axis.plot(found.cluster_mean, place, marker="D", markersize=6, color=COLOURS[5])
    if found.low == found.low:
        axis.plot([found.low, found.high], [place, place], color=COLOURS[5], linewidth=1.5)


def similarity_figure(report: Report, model: str, path: Path) -> bool:
    """Similarity to ICL against accuracy and ECE, one point a run of a plain recipe; False without any."""
    points: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for task in _tasks(report, model):
        for size in report.sizes:
            for recipe in RECIPES:
                # an icl record's similarity is the base model's: the null baseline, no point of its own
                arm = report.plain(task, size, recipe) if recipe not in ("base", "icl") else None
                if arm is None:
                    continue
                for measure in _MEASURES if report.labelled(task) else ["accuracy"]:
                    for seed, value in by_seed(arm, task.benchmark, measure).items():
                        similarity = arm.runs[seed].similarity
                        if similarity is not None and similarity.get("asim") is not None:
                            of = points.setdefault(measure, {}).setdefault(recipe, [])
                            of.append((similarity["asim"], value))
    if not points:
        return False
    with _canvas(path, 1, len(points), 4.3 * len(points), 3.4) as (figure, axes):
        for axis, (measure, by_recipe) in zip(axes[0], points.items(), strict=True):
            for recipe, found in by_recipe.items():
                style = _style(recipe)
                axis.scatter(*zip(*found, strict=True), s=16, alpha=0.75, label=TITLES[recipe], **style)
            axis.set_xlabel("activation similarity to ICL (asim)")
            axis.set_ylim(bottom=0)
            axis.set_title(_MEASURES[measure], fontsize=10)
        _legend(figure, axes[0][0])
        figure.suptitle(f"{model}: one point a run", fontsize=10)
    return True
