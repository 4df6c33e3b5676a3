"""Figures of a run's rows and stages: reliability, training, similarity by layer and against results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from ia2.evaluation.calibration import ece_equal_mass, reliability_bins
from ia2.report.data import Evaluation, Run, Stage
from ia2.report.figures.comparison_figures import cost_figure, heading, results_figure, scope_of, sizes_figure
from ia2.report.figures.style import FAINT, Figure, Panel, arm_styles, numbers_table, plain_log
from ia2.utils.wording import estimate

BINS = 10


def run_figures(run: Run) -> list[Figure]:
    """Every figure that a run has something for."""
    if run.kind == "curve":
        return [sizes_figure(run.summary)]
    first = [results_figure(run.summary)] if run.kind == "compare" else []
    rest = (
        reliability_figure(run),
        layers_figure(run),
        similarity_figure(run),
        cost_figure(run.summary) if run.kind == "compare" else None,
        training_figure(run),
    )
    return [*first, *(figure for figure in rest if figure is not None)]


def _heading(run: Run) -> str:
    if run.kind == "compare":
        return heading(run.summary)
    return f"{run.summary['model']}: {run.summary['num_train']} examples"


# --------------------------------------------------------------------------------------- reliability


def reliability_figure(run: Run) -> Figure | None:
    """Accuracy by confidence of each arm, its bins with intervals; None where no rows were kept."""
    arms = [arm for arm in run.arms if run.evaluations.get(arm)]
    if not arms:
        return None
    bins = {arm: list(_bins(run.evaluations[arm])) for arm in arms}
    styles = arm_styles(arms)
    rows = [
        [arm, str(count), f"{x:.3f}", estimate({"value": y, "low": low, "high": high})]
        for arm in arms
        for count, x, y, low, high in bins[arm]
    ]
    return Figure(
        "reliability",
        "Reliability: is it right as often as it is confident?",
        _heading(run),
        f"{BINS} bins of equal mass over the rows of all seeds; below the diagonal a model is overconfident. "
        "Intervals are Wilson's, 95%, with each test row counted once, however many seeds answered it.",
        tuple(Panel(_reliability(arm, bins[arm], run, styles[arm]), width=2.9, height=2.9) for arm in arms),
        numbers_table(
            "reliability", "Bins by recipe", ["recipe", "rows", "mean confidence", "share right [95%]"], rows
        ),
    )


def _bins(found: Sequence[Evaluation]) -> Iterator[tuple[int, float, float, float, float]]:
    """Count, mean confidence, share right and its interval, of each bin."""
    confidence = np.concatenate([e.confidence for e in found])
    correct = np.concatenate([e.correct for e in found])
    places = np.concatenate([e.places for e in found])
    order = np.argsort(confidence, kind="stable")
    start = 0
    made = reliability_bins(confidence, correct, BINS)
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


def _reliability(
    arm: str, bins: Sequence[tuple[int, float, float, float, float]], run: Run, style: Mapping[str, Any]
) -> Callable[[Any], None]:
    eces = [float(ece_equal_mass(e.confidence, e.correct)) for e in run.evaluations[arm]]
    ece = sum(eces) / len(eces)
    if run.kind == "compare":  # as the table has it: folds are one evaluation there
        ece = run.summary["recipes"][arm]["metrics"][scope_of(run.summary)]["ece"]["value"] or 0.0

    def draw(axis: Any) -> None:
        axis.plot([0, 1], [0, 1], color=FAINT, linewidth=0.8, linestyle="--")
        for _, x, _, low, high in bins:
            axis.plot([x, x], [low, high], color=style["color"], linewidth=1.5)
        axis.plot([b[1] for b in bins], [b[2] for b in bins], markersize=5, linewidth=1, **style)
        axis.set_xlim(-0.03, 1.03)
        axis.set_ylim(-0.03, 1.03)
        axis.set_xlabel("confidence")
        axis.set_ylabel("share right")
        axis.set_title(f"{arm}: ECE {ece:.3f}", fontsize=10)

    return draw


# -------------------------------------------------------------------------------------------- layers


def layers_figure(run: Run) -> Figure | None:
    """Similarity to ICL by layer of each arm (the paper's figure 2); None where it was not measured."""
    if run.kind != "compare":
        return None
    known = {n: e["similarity"] for n, e in run.summary["recipes"].items() if e.get("similarity")}
    if not known:
        return None
    layers = max((s["layers"] for s in known.values()), key=len)
    rows = [
        [str(layer)]
        + [
            f"{s['asim_by_layer'][s['layers'].index(layer)]:.3f}" if layer in s["layers"] else "–"
            for s in known.values()
        ]
        for layer in layers
    ]
    note = "Bands reach from the lowest to the highest seed. " if run.evaluations else ""
    return Figure(
        "layers",
        "Similarity to ICL by layer",
        _heading(run),
        "Mean cosine between self-attention outputs and those of the base model with demonstrations, where "
        f"the answer is. {note}The base model's line is what there is without any training.",
        (Panel(_layers(known, run), legend=True, width=5.0, height=3.6),),
        numbers_table("layers", "asim to ICL by layer", ["layer", *known], rows),
    )


def _layers(known: Mapping[str, Any], run: Run) -> Callable[[Any], None]:
    styles = arm_styles(run.arms)

    def draw(axis: Any) -> None:
        for name, found in known.items():
            values = found["asim_by_layer"]
            axis.plot(found["layers"], values, markersize=3.5, linewidth=1.3, label=name, **styles[name])
            by_seed = [e.asim_by_layer for e in run.evaluations.get(name, []) if e.asim_by_layer]
            if len(by_seed) > 1:
                ends = np.min(by_seed, axis=0), np.max(by_seed, axis=0)
                axis.fill_between(
                    found["layers"], *ends, color=styles[name]["color"], alpha=0.12, linewidth=0
                )
        axis.set_xlabel("layer")
        axis.set_ylabel("asim to ICL")
        axis.xaxis.get_major_locator().set_params(integer=True)

    return draw


# ---------------------------------------------------------------------------------------- similarity


def similarity_figure(run: Run) -> Figure | None:
    """Similarity to ICL against accuracy and ECE (the paper's figures 3 and 5), a point a seed and arm."""
    if run.kind != "compare":
        return None
    points = _points(run)
    if not points:
        return None
    rows = [
        [arm, f"{asim:.3f}", f"{accuracy:.3f}", f"{ece:.3f}"]
        for arm, found in points.items()
        for asim, accuracy, ece in found
    ]
    each = "training set" if run.evaluations else "recipe, the mean over seeds"
    return Figure(
        "similarity",
        "Similarity to ICL against results",
        _heading(run),
        f"A point a {each}. Being like ICL inside is no merit in itself: it matters where ICL works.",
        tuple(
            Panel(_scatter(points, column, title, run.arms), legend=True)
            for column, title in ((1, "accuracy (higher is better)"), (2, "ECE (lower is better)"))
        ),
        numbers_table("similarity", "asim, accuracy and ECE", ["recipe", "asim", "accuracy", "ECE"], rows),
        columns=2,
    )


def _points(run: Run) -> dict[str, list[tuple[float, float, float]]]:
    """asim, accuracy and ECE by arm."""
    points: dict[str, list[tuple[float, float, float]]] = {}
    for arm, found in run.evaluations.items():
        for e in found:
            if e.asim is not None:
                ece = float(ece_equal_mass(e.confidence, e.correct))
                points.setdefault(arm, []).append((e.asim, float(e.correct.mean()), ece))
    if run.evaluations:
        return points
    scope = scope_of(run.summary)
    for arm, entry in run.summary["recipes"].items():
        metrics = entry["metrics"][scope]
        values = [entry.get("asim", {}).get("value"), metrics["accuracy"]["value"], metrics["ece"]["value"]]
        if None not in values:
            points[arm] = [(values[0], values[1], values[2])]
    return points


def _scatter(
    points: Mapping[str, Any], column: int, title: str, arms: Sequence[str]
) -> Callable[[Any], None]:
    styles = arm_styles(arms)

    def draw(axis: Any) -> None:
        for arm, found in points.items():
            x, y = [p[0] for p in found], [p[column] for p in found]
            axis.scatter(x, y, s=22, alpha=0.8, label=arm, **styles[arm])
        axis.set_xlabel("asim to ICL")
        axis.set_ylim(bottom=0)
        axis.set_title(title, fontsize=10)

    return draw


# ------------------------------------------------------------------------------------------ training


def training_figure(run: Run) -> Figure | None:
    """Training and dev loss of each chain of stages, a line a seed; None where nothing was kept."""
    chosen = _best(run.stages)
    if not chosen:
        return None
    names = list(dict.fromkeys(stage.name for stage in chosen))
    rows = [
        [s.name, s.where or "–", s.rate, str(s.steps), str(s.best_step), _loss(s), _ends(s)]
        for s in [*chosen, *(s for s in run.stages if s.diverged and s not in chosen)]
    ]
    return Figure(
        "training",
        "Training",
        _heading(run),
        "Loss over optimiser steps: thin lines on the training rows, thick ones on the dev rows, a pair for "
        "each training set; of several learning rates the one with the lowest dev loss. Dots are the steps "
        "that were kept. An alignment's loss is a distance of activations, another unit than the others'.",
        tuple(Panel(_training(name, [s for s in chosen if s.name == name])) for name in names),
        numbers_table(
            "training",
            "Stages",
            [
                "stage",
                "training set",
                "rate",
                "steps",
                "kept step",
                "dev loss",
                "training loss, first to last",
            ],
            rows,
        ),
    )


def _best(stages: Sequence[Stage]) -> list[Stage]:
    """Of each stage and training set the rate with the lowest dev loss; the first where there is none."""
    found: dict[tuple[str, str], Stage] = {}
    for stage in stages:
        known = found.setdefault((stage.name, stage.where), stage)
        lower = stage.dev_loss is not None and (known.dev_loss is None or stage.dev_loss < known.dev_loss)
        if lower or (known.diverged and not stage.diverged):
            found[stage.name, stage.where] = stage
    return list(found.values())


def _series(stage: Stage, name: str) -> list[tuple[float, float]]:
    return [(h["step"], h[name]) for h in stage.history if h.get(name) is not None and "step" in h]


def _loss(stage: Stage) -> str:
    if stage.dev_loss is None:
        return "diverged" if stage.diverged else "–"
    return f"{stage.dev_loss:.4g}"


def _ends(stage: Stage) -> str:
    losses = [loss for _, loss in _series(stage, "loss")]
    return f"{losses[0]:.4g} to {losses[-1]:.4g}" if losses else "–"


def _training(name: str, stages: Sequence[Stage]) -> Callable[[Any], None]:
    def draw(axis: Any) -> None:
        colours = arm_styles(["sft", "ia2"])
        lowest = float("inf")
        for stage in stages:
            for series, arm, width in (("loss", "sft", 0.8), ("eval_loss", "ia2", 1.6)):
                found = _series(stage, series)
                if not found:
                    continue
                lowest = min(lowest, *(loss for _, loss in found))
                colour = colours[arm]["color"]
                axis.plot(*zip(*found, strict=True), color=colour, linewidth=width, alpha=0.8)
                at = dict(found).get(stage.best_step)
                if series == "eval_loss" and at is not None:
                    axis.plot(stage.best_step, at, marker="o", markersize=4, color=colour)
        if 0 < lowest < float("inf"):
            plain_log(axis, "y")
        axis.set_xlabel("step")
        axis.set_ylabel("loss")
        axis.set_title(name, fontsize=10)

    return draw
