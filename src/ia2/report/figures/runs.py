"""Figures of runs: results, N, cost, reliability, similarity to ICL, training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from ia2.evaluation.calibration import ece_equal_mass, reliability_bins
from ia2.evaluation.tables import MEASURES, intervals_of, scope_of
from ia2.report.figures.lines import Lines, line_figure
from ia2.report.figures.marks import bars
from ia2.report.figures.style import FAINT, Figure, Panel, arm_styles, drawable, make_figure, plain_log
from ia2.report.results import Run
from ia2.utils.wording import MISSING, estimate

Json = Mapping[str, Any]
Draw = Callable[[Any], None]

_DRAWN = {"accuracy": "accuracy (higher is better)", "nll": "NLL (lower is better)"}
"""The numbers of the figures have the other measures too."""

_BINS = 10


def try_summary_figure(summary: Json, folder: Path) -> Path | None:
    """Draw ``compare.svg`` or ``curve.svg`` beside a summary; say how to get matplotlib if it is missing."""
    if not drawable():
        return None
    figure = _sizes(summary) if "curves" in summary else _results(summary)
    return replace(figure, heading=_heading(summary)).save(folder / f"{figure.name}.svg")


def run_figures(run: Run) -> list[Figure]:
    """Every figure that a run has something for."""
    found: list[Figure | None] = []
    if run.kind == "curve":
        found = [_sizes(run.summary)]
    elif run.kind == "train":
        found = [_reliability(run), _training(run)]
    else:
        found = [_results(run.summary), _reliability(run), _layers(run), _similarity(run)]
        found += [cost_figure(run.summary), _training(run)]
    return [replace(figure, heading=_heading(run.summary)) for figure in found if figure is not None]


def _heading(summary: Json) -> str:
    if "curves" in summary:
        return f"{summary['model']}: {summary['title']}"
    if "design" not in summary:
        return f"{summary['model']}: {summary['num_train']} examples"
    design = summary["design"]
    counts = f"{design['num_train']} examples, {design['num_test']} test rows"
    return f"{summary['model']}: {counts}, {intervals_of(summary)}"


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
    panels = [
        bars(found, styles, title, 0.05 if "NLL" in title else 1.0)
        for title, found in values.items()
        if found
    ]
    rows = [{"recipe": n, **{title: estimate(of.get(n)) for title, of in values.items()}} for n in entries]
    return make_figure("compare", panels, rows)


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
    options: dict[str, Any] = {"rows": "measure", "xlabel": "training examples N", "size": (4.3, 3.4)}
    return line_figure("curve", sizes, panels, **options, columns=2, intervals=intervals_of(summary))


def cost_figure(summary: Json) -> Figure | None:
    """Accuracy and NLL against tokens per query; None for runs that did not count them."""
    scope = scope_of(summary)
    points = {
        name: (float(entry["tokens_per_query"]), entry["metrics"][scope])
        for name, entry in summary["recipes"].items()
        if entry.get("tokens_per_query") is not None
        and None not in (entry["metrics"][scope][measure]["value"] for measure in _DRAWN)
    }
    rows = [
        {"recipe": name, "tokens per query": f"{tokens:.1f}", **{m: estimate(metrics[m]) for m in _DRAWN}}
        for name, (tokens, metrics) in points.items()
    ]
    panels = [Panel(_costs(points, measure, title), True, 4.3, 3.4) for measure, title in _DRAWN.items()]
    return make_figure("cost", panels, rows, columns=2) if len(points) > 1 else None


def _costs(points: Mapping[str, Any], measure: str, title: str) -> Draw:
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
        axis.set_ylim(bottom=0)
        axis.set_xlabel("tokens per query")
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
    styles = arm_styles(list(bins))
    panels = [
        Panel(_diagram(of, f"{arm}: ECE {_ece(run, arm):.3f}", styles[arm]), width=2.9, height=2.9)
        for arm, of in bins.items()
    ]
    rows = [
        {
            "recipe": arm,
            "rows": str(found["count"]),
            "mean confidence": f"{found['confidence']:.3f}",
            "share right [95%]": estimate(found),
        }
        for arm, of in bins.items()
        for found in of
    ]
    return make_figure("reliability", panels, rows, bins=_BINS) if bins else None


def _ece(run: Run, arm: str) -> float:
    if run.kind == "compare":  # as the table has it: folds are one evaluation there
        return run.summary["recipes"][arm]["metrics"][scope_of(run.summary)]["ece"]["value"] or 0.0
    return float(np.mean([ece_equal_mass(e["confidence"], e["correct"]) for e in run.evaluations[arm]]))


def _bins(evaluations: Sequence[Json]) -> Iterator[dict[str, float]]:
    """``count``, mean ``confidence``, share right (``value``) and its interval of each bin."""
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
        low, high = wilson(float(y), distinct)
        yield {"count": int(count), "confidence": float(x), "value": float(y), "low": low, "high": high}


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share of ``n`` (Wilson 1927)."""
    z = NormalDist().inv_cdf(0.975)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def _diagram(bins: Sequence[Json], title: str, style: Json) -> Draw:
    def draw(axis: Any) -> None:
        axis.plot([0, 1], [0, 1], color=FAINT, linewidth=0.8, linestyle="--")
        x = [found["confidence"] for found in bins]
        for place, found in zip(x, bins, strict=True):
            axis.plot([place, place], [found["low"], found["high"]], color=style["color"], linewidth=1.5)
        axis.plot(x, [found["value"] for found in bins], markersize=5, linewidth=1, **style)
        axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="confidence", ylabel="share right")
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
    layers = max((found["layers"] for found in known.values()), key=len)
    parts = ["caption", *(["bands"] if run.evaluations else [])]
    return line_figure("layers", layers, [Lines("", series, "asim to ICL")], size=(5.0, 3.6), parts=parts)


def _similarity(run: Run) -> Figure | None:
    """Similarity to ICL against accuracy and ECE (the paper's figures 3 and 5), a point a seed and arm."""
    points = _points(run)
    styles = arm_styles(run.arms)

    def scatter(measure: str, title: str) -> Draw:
        def draw(axis: Any) -> None:
            for arm, found in points.items():
                x, y = [point["asim"] for point in found], [point[measure] for point in found]
                axis.scatter(x, y, s=22, alpha=0.8, label=arm, **styles[arm])
            axis.set_xlabel("asim to ICL")
            axis.set_ylim(bottom=0)
            axis.set_title(title, fontsize=10)

        return draw

    rows = [
        {"recipe": arm, **{name: f"{value:.3f}" for name, value in point.items()}}
        for arm, found in points.items()
        for point in found
    ]
    titles = {"accuracy": "accuracy (higher is better)", "ECE": "ECE (lower is better)"}
    panels = [Panel(scatter(measure, title), legend=True) for measure, title in titles.items()]
    each = "training set" if run.evaluations else "recipe, the mean over seeds"
    return make_figure("similarity", panels, rows, columns=2, each=each) if points else None


def _points(run: Run) -> dict[str, list[dict[str, float]]]:
    """``asim``, ``accuracy`` and ``ECE`` by arm, a point a seed; where no rows were kept, the means."""
    points: dict[str, list[dict[str, float]]] = {}
    for arm, evaluations in run.evaluations.items():
        for e in evaluations:
            if e["similarity"]:
                ece = float(ece_equal_mass(e["confidence"], e["correct"]))
                point = {
                    "asim": e["similarity"]["asim"],
                    "accuracy": float(np.mean(e["correct"])),
                    "ECE": ece,
                }
                points.setdefault(arm, []).append(point)
    if run.evaluations:
        return points
    scope = scope_of(run.summary)
    for arm, entry in run.summary["recipes"].items():
        metrics = entry["metrics"][scope]
        found = {"asim": entry.get("asim", {}), "accuracy": metrics["accuracy"], "ECE": metrics["ece"]}
        point = {name: of.get("value") for name, of in found.items()}
        if None not in point.values():
            points[arm] = [point]
    return points


# ------------------------------------------------------------------------------------------ training


def _training(run: Run) -> Figure | None:
    """Training and dev loss of each chain of stages, a line a seed; None where nothing was kept."""
    chosen = _best(run.stages)
    by_name: dict[str, list[Json]] = {}
    for stage in chosen:
        by_name.setdefault(stage["name"], []).append(stage)
    rows = [
        {
            "stage": s["name"],
            "training set": s["where"] or MISSING,
            "rate": s["rate"],
            "steps": str(s["steps"]),
            "kept step": str(s["best_step"]),
            "dev loss": _dev_loss(s),
            "training loss, first to last": _first_to_last(s),
        }
        for s in [*chosen, *(s for s in run.stages if s.get("diverged") and s not in chosen)]
    ]
    panels = [Panel(_loss_lines(name, stages)) for name, stages in by_name.items()]
    return make_figure("training", panels, rows) if chosen else None


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


def _dev_loss(stage: Json) -> str:
    if stage.get("dev_loss") is None:
        return "diverged" if stage.get("diverged") else MISSING
    return f"{stage['dev_loss']:.4g}"


def _first_to_last(stage: Json) -> str:
    losses = [loss for _, loss in _history(stage, "loss")]
    return f"{losses[0]:.4g} to {losses[-1]:.4g}" if losses else MISSING


def _history(stage: Json, name: str) -> list[tuple[float, float]]:
    return [(h["step"], h[name]) for h in stage["history"] if h.get(name) is not None and "step" in h]


def _loss_lines(name: str, stages: Sequence[Json]) -> Draw:
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
        axis.set(xlabel="step", ylabel="loss")
        axis.set_title(name, fontsize=10)

    return draw
