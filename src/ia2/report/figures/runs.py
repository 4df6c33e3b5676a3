"""Figures of runs: results, N, cost, reliability, similarity to ICL, training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from ia2.evaluation.calibration import ece_equal_mass, reliability_bins
from ia2.evaluation.tables import MEASURES, intervals_of, scope_of
from ia2.report.figures.lines import Lines, line_figure
from ia2.report.figures.marks import bars
from ia2.report.figures.style import FAINT, Figure, Panel, arm_styles, drawable, numbers_table, plain_log
from ia2.report.results import Run
from ia2.utils.wording import MISSING, estimate

Json = Mapping[str, Any]

_DRAWN = {"accuracy": "accuracy (higher is better)", "nll": "NLL (lower is better)"}
"""The numbers of the figures have the other measures too."""

_BINS = 10


def try_summary_figure(summary: Json, folder: Path) -> Path | None:
    """Draw ``compare.svg`` or ``curve.svg`` beside a summary; say how to get matplotlib if it is missing."""
    if not drawable():
        return None
    figure = _sizes(summary) if "curves" in summary else _results(summary)
    return figure.save(folder / f"{figure.name}.svg")


def run_figures(run: Run) -> list[Figure]:
    """Every figure that a run has something for."""
    if run.kind == "curve":
        return [_sizes(run.summary)]
    compared = run.kind == "compare"
    found = (
        _results(run.summary) if compared else None,
        _reliability(run),
        _layers(run) if compared else None,
        _similarity(run) if compared else None,
        cost_figure(run.summary) if compared else None,
        _training(run),
    )
    return [figure for figure in found if figure is not None]


def _heading(run: Run) -> str:
    if run.kind == "compare":
        return _heading_of(run.summary)
    return f"{run.summary['model']}: {run.summary['num_train']} examples"


def _heading_of(summary: Json) -> str:
    design = summary["design"]
    return (
        f"{summary['model']}: {design['num_train']} examples, {design['num_test']} test rows, "
        f"{intervals_of(summary)}"
    )


# ----------------------------------------------------------------------------------- results, N, cost


def _results(summary: Json) -> Figure:
    """Accuracy, NLL and similarity to ICL of each arm of a comparison."""
    scope, entries = scope_of(summary), summary["recipes"]
    values = {
        title: {name: entry["metrics"][scope][measure] for name, entry in entries.items()}
        for measure, title in _DRAWN.items()
    }
    values["activation similarity to ICL"] = {n: e["asim"] for n, e in entries.items() if "asim" in e}
    styles = arm_styles(list(entries))
    rows = [[name, *(estimate(found.get(name)) for found in values.values())] for name in entries]
    return Figure(
        "compare",
        "Accuracy, NLL and similarity to ICL",
        _heading_of(summary),
        "Bars are means over draws; lines are 95% t-intervals over draws, of which one draw has none. "
        "Accuracy and NLL are among the labels, where there are labels.",
        tuple(
            bars(found, styles, title, 0.05 if "NLL" in title else 1.0)
            for title, found in values.items()
            if found
        ),
        numbers_table("compare", "Accuracy, NLL and similarity to ICL by recipe", ["recipe", *values], rows),
    )


def _sizes(summary: Json) -> Figure:
    """Accuracy and NLL of each recipe over N."""
    curves, sizes = summary["curves"], summary["sizes"]
    styles = arm_styles(list(curves))

    def axes(axis: Any) -> None:
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)

    panels = []
    for measure, title in {**MEASURES, "accuracy_vocabulary": "accuracy over the vocabulary"}.items():
        series = {}
        for name, points in curves.items():
            if any(measure in point for point in points):
                ends = {
                    end: [p.get(measure, {}).get(end) for p in points] for end in ("value", "low", "high")
                }
                # older versions kept the accuracy over the vocabulary alone
                hidden = measure not in _DRAWN and (measure in MEASURES or "accuracy" in points[0])
                style = {"markersize": 4, "linewidth": 1.5, **styles[name]}
                series[name] = {**ends, "style": style, "hidden": hidden}
        if series:
            panels.append(Lines(_DRAWN.get(measure, title), series, finish=axes, label=title))
    caption = (
        f"Lines are means over draws; bands: {intervals_of(summary)}. Among the labels, if there are any."
    )
    title = "Accuracy and NLL over the number of training examples"
    return line_figure(
        *("curve", title, f"{summary['model']}: {summary['title']}", caption, sizes, panels),
        rows="measure",
        xlabel="training examples N",
        numbers="Results by recipe and N",
        columns=2,
        width=4.3,
        height=3.4,
    )


def cost_figure(summary: Json) -> Figure | None:
    """Accuracy and NLL against tokens per query; None for runs that did not count them."""
    scope = scope_of(summary)
    points = {
        name: (float(entry["tokens_per_query"]), entry["metrics"][scope])
        for name, entry in summary["recipes"].items()
        if entry.get("tokens_per_query") is not None
        and None not in (entry["metrics"][scope][measure]["value"] for measure in _DRAWN)
    }
    if len(points) < 2:
        return None
    rows = [
        [name, f"{tokens:.1f}", *(estimate(metrics[measure]) for measure in _DRAWN)]
        for name, (tokens, metrics) in points.items()
    ]
    return Figure(
        "cost",
        "What a query costs, and what it buys",
        _heading_of(summary),
        "Tokens read for one query, on average: in-context learning reads its demonstrations again with "
        "every query. Points of the same cost stand side by side. The dashed line joins what nothing cheaper "
        "reaches.",
        tuple(Panel(_costs(points, m, title), True, 4.3, 3.4) for m, title in _DRAWN.items()),
        numbers_table("cost", "Tokens per query and results", ["recipe", "tokens per query", *_DRAWN], rows),
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


def frontier(points: Iterable[tuple[float, float]], *, higher: bool) -> list[tuple[float, float]]:
    """Points (cost, value) that nothing as cheap or cheaper reaches, by cost."""
    sign = 1 if higher else -1
    kept: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if not kept or sign * value > sign * kept[-1][1]:
            kept.append((cost, value))
    return kept


# --------------------------------------------------------------------------------------- reliability


def _reliability(run: Run) -> Figure | None:
    """Accuracy by confidence of each arm, its bins with intervals; None where no rows were kept."""
    bins = {arm: list(_bins(found)) for arm, found in run.evaluations.items()}
    if not bins:
        return None
    styles = arm_styles(list(bins))
    rows = [
        [arm, str(count), f"{x:.3f}", estimate({"value": y, "low": low, "high": high})]
        for arm, of in bins.items()
        for count, x, y, low, high in of
    ]
    return Figure(
        "reliability",
        "Reliability: is it right as often as it is confident?",
        _heading(run),
        f"{_BINS} bins of equal mass over the rows of all seeds; below the diagonal a model is "
        "overconfident. Intervals are Wilson's, 95%, with each test row counted once, however many seeds "
        "answered it.",
        tuple(
            Panel(_diagram(of, f"{arm}: ECE {_ece(run, arm):.3f}", styles[arm]), width=2.9, height=2.9)
            for arm, of in bins.items()
        ),
        numbers_table(
            "reliability", "Bins by recipe", ["recipe", "rows", "mean confidence", "share right [95%]"], rows
        ),
    )


def _ece(run: Run, arm: str) -> float:
    if run.kind == "compare":  # as the table has it: folds are one evaluation there
        return run.summary["recipes"][arm]["metrics"][scope_of(run.summary)]["ece"]["value"] or 0.0
    return float(np.mean([ece_equal_mass(e["confidence"], e["correct"]) for e in run.evaluations[arm]]))


def _bins(evaluations: Sequence[Json]) -> Iterator[tuple[int, float, float, float, float]]:
    """Count, mean confidence, share right and its interval, of each bin."""
    confidence, correct, places = (
        np.concatenate([np.asarray(e[key], dtype=float) for e in evaluations])
        for key in ("confidence", "correct", "places")
    )
    order = np.argsort(confidence, kind="stable")
    start = 0
    made = reliability_bins(confidence, correct, _BINS)
    for count, x, y in zip(made.count, made.confidence, made.accuracy, strict=True):
        distinct = len(np.unique(places[order[start : start + count]]))
        start += count
        yield int(count), float(x), float(y), *wilson(float(y), distinct)


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share of ``n`` (Wilson 1927)."""
    z = NormalDist().inv_cdf(0.975)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def _diagram(
    bins: Sequence[tuple[int, float, float, float, float]], title: str, style: Json
) -> Callable[[Any], None]:
    def draw(axis: Any) -> None:
        axis.plot([0, 1], [0, 1], color=FAINT, linewidth=0.8, linestyle="--")
        for _, x, _, low, high in bins:
            axis.plot([x, x], [low, high], color=style["color"], linewidth=1.5)
        axis.plot([b[1] for b in bins], [b[2] for b in bins], markersize=5, linewidth=1, **style)
        axis.set_xlim(-0.03, 1.03)
        axis.set_ylim(-0.03, 1.03)
        axis.set_xlabel("confidence")
        axis.set_ylabel("share right")
        axis.set_title(title, fontsize=10)

    return draw


# ------------------------------------------------------------------------------------ similarity to ICL


def _layers(run: Run) -> Figure | None:
    """Similarity to ICL by layer of each arm (the paper's figure 2); None where it was not measured."""
    known = {n: e["similarity"] for n, e in run.summary["recipes"].items() if e.get("similarity")}
    if not known:
        return None
    styles = arm_styles(run.arms)
    series: dict[str, Any] = {}
    for name, found in known.items():
        line = {"x": found["layers"], "value": found["asim_by_layer"], "style": styles[name]}
        seeds = [e["similarity"]["asim_by_layer"] for e in run.evaluations.get(name, []) if e["similarity"]]
        if len(seeds) > 1:
            line |= {"low": np.min(seeds, axis=0), "high": np.max(seeds, axis=0)}
        series[name] = line
    note = "Bands reach from the lowest to the highest seed. " if run.evaluations else ""
    return line_figure(
        "layers",
        "Similarity to ICL by layer",
        _heading(run),
        "Mean cosine between self-attention outputs and those of the base model with demonstrations, where "
        f"the answer is. {note}The base model's line is what there is without any training.",
        max((found["layers"] for found in known.values()), key=len),
        [Lines("", series, "asim to ICL")],
        width=5.0,
        height=3.6,
    )


def _similarity(run: Run) -> Figure | None:
    """Similarity to ICL against accuracy and ECE (the paper's figures 3 and 5), a point a seed and arm."""
    points = _points(run)
    if not points:
        return None
    rows = [[arm, *(f"{value:.3f}" for value in point)] for arm, found in points.items() for point in found]
    each = "training set" if run.evaluations else "recipe, the mean over seeds"
    styles = arm_styles(run.arms)

    def scatter(column: int, title: str) -> Callable[[Any], None]:
        def draw(axis: Any) -> None:
            for arm, found in points.items():
                x, y = [point[0] for point in found], [point[column] for point in found]
                axis.scatter(x, y, s=22, alpha=0.8, label=arm, **styles[arm])
            axis.set_xlabel("asim to ICL")
            axis.set_ylim(bottom=0)
            axis.set_title(title, fontsize=10)

        return draw

    return Figure(
        "similarity",
        "Similarity to ICL against results",
        _heading(run),
        f"A point a {each}. Being like ICL inside is no merit in itself: it matters where ICL works.",
        (
            Panel(scatter(1, "accuracy (higher is better)"), legend=True),
            Panel(scatter(2, "ECE (lower is better)"), legend=True),
        ),
        numbers_table("similarity", "asim, accuracy and ECE", ["recipe", "asim", "accuracy", "ECE"], rows),
        columns=2,
    )


def _points(run: Run) -> dict[str, list[tuple[float, ...]]]:
    """asim, accuracy and ECE by arm."""
    points: dict[str, list[tuple[float, ...]]] = {}
    for arm, evaluations in run.evaluations.items():
        for e in evaluations:
            if e["similarity"]:
                ece = float(ece_equal_mass(e["confidence"], e["correct"]))
                point = e["similarity"]["asim"], float(np.mean(e["correct"])), ece
                points.setdefault(arm, []).append(point)
    if run.evaluations:
        return points
    scope = scope_of(run.summary)
    for arm, entry in run.summary["recipes"].items():
        metrics = entry["metrics"][scope]
        point = tuple(
            found.get("value") for found in (entry.get("asim", {}), metrics["accuracy"], metrics["ece"])
        )
        if None not in point:
            points[arm] = [point]
    return points


# ------------------------------------------------------------------------------------------ training


def _training(run: Run) -> Figure | None:
    """Training and dev loss of each chain of stages, a line a seed; None where nothing was kept."""
    chosen = _best(run.stages)
    if not chosen:
        return None
    by_name: dict[str, list[Json]] = {}
    for stage in chosen:
        by_name.setdefault(stage["name"], []).append(stage)
    columns = [
        "stage",
        "training set",
        "rate",
        "steps",
        "kept step",
        "dev loss",
        "training loss, first to last",
    ]
    rows = [
        [s["name"], s["where"] or MISSING, s["rate"], str(s["steps"]), str(s["best_step"]), *_losses(s)]
        for s in [*chosen, *(s for s in run.stages if s.get("diverged") and s not in chosen)]
    ]
    return Figure(
        "training",
        "Training",
        _heading(run),
        "Loss over optimiser steps: thin lines on the training rows, thick ones on the dev rows, a pair for "
        "each training set; of several learning rates the one with the lowest dev loss. Dots are the steps "
        "that were kept. An alignment's loss is a distance of activations, another unit than the others'.",
        tuple(Panel(_loss_lines(name, stages)) for name, stages in by_name.items()),
        numbers_table("training", "Stages", columns, rows),
    )


def _best(stages: Sequence[Json]) -> list[Json]:
    """Of each stage and training set the rate with the lowest dev loss; the first where there is none."""
    found: dict[tuple[str, str], Json] = {}
    for stage in stages:
        known = found.setdefault((stage["name"], stage["where"]), stage)
        loss, lowest = stage.get("dev_loss"), known.get("dev_loss")
        lower = loss is not None and (lowest is None or loss < lowest)
        if lower or (known.get("diverged") and not stage.get("diverged")):
            found[stage["name"], stage["where"]] = stage
    return list(found.values())


def _history(stage: Json, name: str) -> list[tuple[float, float]]:
    return [(h["step"], h[name]) for h in stage["history"] if h.get(name) is not None and "step" in h]


def _losses(stage: Json) -> tuple[str, str]:
    """Dev loss, and the training loss at the beginning and the end."""
    losses = [loss for _, loss in _history(stage, "loss")]
    ends = f"{losses[0]:.4g} to {losses[-1]:.4g}" if losses else MISSING
    if stage.get("dev_loss") is None:
        return "diverged" if stage.get("diverged") else MISSING, ends
    return f"{stage['dev_loss']:.4g}", ends


def _loss_lines(name: str, stages: Sequence[Json]) -> Callable[[Any], None]:
    def draw(axis: Any) -> None:
        colours = arm_styles(["sft", "ia2"])
        lowest = float("inf")
        for stage in stages:
            for series, arm, width in (("loss", "sft", 0.8), ("eval_loss", "ia2", 1.6)):
                found = _history(stage, series)
                if not found:
                    continue
                lowest = min(lowest, *(loss for _, loss in found))
                colour = colours[arm]["color"]
                axis.plot(*zip(*found, strict=True), color=colour, linewidth=width, alpha=0.8)
                at = dict(found).get(stage["best_step"])
                if series == "eval_loss" and at is not None:
                    axis.plot(stage["best_step"], at, marker="o", markersize=4, color=colour)
        if 0 < lowest < float("inf"):
            plain_log(axis, "y")
        axis.set_xlabel("step")
        axis.set_ylabel("loss")
        axis.set_title(name, fontsize=10)

    return draw
