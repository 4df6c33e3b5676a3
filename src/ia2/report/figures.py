"""Figures (matplotlib, from the extra ``report``)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ia2.console import logger

# Okabe and Ito's palette, told apart by readers with any colour vision.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")

_SETTINGS: Any = {
    # fixed ids and no date: the same numbers give the same file
    "svg.hashsalt": "ia2",
    "svg.fonttype": "none",
    "font.size": 10,
    # a dollar in the name of a model is a dollar
    "text.parse_math": False,
}


def try_comparison_figure(summary: dict[str, Any], folder: Path) -> Path | None:
    """Draw ``compare.svg`` if matplotlib is there; say how to get it otherwise."""
    return _try(comparison_figure, summary, folder / "compare.svg")


def try_curve_figure(summary: dict[str, Any], folder: Path) -> Path | None:
    """Draw ``curve.svg`` if matplotlib is there; say how to get it otherwise."""
    return _try(curve_figure, summary, folder / "curve.svg")


def _try(draw: Callable[[dict[str, Any], Path], None], summary: dict[str, Any], path: Path) -> Path | None:
    if importlib.util.find_spec("matplotlib") is None:
        logger.info("No figure: pip install 'ia2[report]' brings matplotlib.")
        return None
    draw(summary, path)
    return path


def curve_figure(summary: dict[str, Any], path: Path) -> None:
    """Accuracy and ECE of each recipe over the number of training examples, with 95% intervals.

    Args:
        summary: what ``curve.json`` holds.
        path: the file; its ending chooses the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(_SETTINGS):
        figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.4))
        figure.patch.set_facecolor("white")
        for axis, (name, title) in zip(axes, (("accuracy", "accuracy"), ("ece", "ECE")), strict=True):
            for place, (recipe, points) in enumerate(summary["curves"].items()):
                colour = COLOURS[place % len(COLOURS)]
                known = [p for p in points if p[name]["value"] is not None]
                sizes = [p["num_train"] for p in known]
                values = [p[name]["value"] for p in known]
                low = [
                    v if p[name]["low"] is None else p[name]["low"]
                    for p, v in zip(known, values, strict=True)
                ]
                high = [
                    v if p[name]["high"] is None else p[name]["high"]
                    for p, v in zip(known, values, strict=True)
                ]
                axis.plot(sizes, values, marker="o", markersize=4, color=colour, label=recipe)
                axis.fill_between(sizes, low, high, color=colour, alpha=0.12, linewidth=0)
            axis.set_xscale("log", base=2)
            axis.set_xticks(summary["sizes"], [str(size) for size in summary["sizes"]])
            axis.minorticks_off()
            axis.set_xlabel("training examples N")
            axis.set_title(f"{title} ({'higher' if name == 'accuracy' else 'lower'} is better)", fontsize=10)
            axis.set_ylim(bottom=0)
            axis.spines[["top", "right"]].set_visible(False)
        axes[1].legend(frameon=False, fontsize=8)
        figure.suptitle(f"{summary['model']}: {summary['title']}, 95% intervals", fontsize=10)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)
        plt.close(figure)


def comparison_figure(summary: dict[str, Any], path: Path) -> None:
    """Accuracy, ECE and similarity to ICL of each recipe, with 95% intervals.

    Args:
        summary: what ``compare.json`` holds.
        path: the file; its ending chooses the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labelled = summary["design"]["task"] == "classification"
    scope = "vocabulary" if labelled else "answer"
    recipes = list(summary["recipes"])
    panels: list[tuple[str, dict[str, Any]]] = [
        (
            "accuracy (higher is better)",
            {r: summary["recipes"][r]["metrics"][scope]["accuracy"] for r in recipes},
        ),
        (
            "ECE (lower is better)",
            {r: summary["recipes"][r]["metrics"][scope]["ece"] for r in recipes},
        ),
        (
            "activation similarity to ICL",
            {r: summary["recipes"][r]["asim"] for r in recipes if "asim" in summary["recipes"][r]},
        ),
    ]
    panels = [panel for panel in panels if panel[1]]
    height = max(3.0, 1.0 + 0.3 * len(recipes))
    with plt.rc_context(_SETTINGS):
        figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), height), squeeze=False)
        figure.patch.set_facecolor("white")
        for axis, (title, values) in zip(axes[0], panels, strict=True):
            for place, (recipe, found) in enumerate(values.items()):
                colour = COLOURS[recipes.index(recipe) % len(COLOURS)]
                value, low, high = found["value"], found["low"], found["high"]
                axis.barh(place, value, color=colour, height=0.65)
                if low is not None and high is not None:
                    axis.plot([low, high], [place, place], color="#222222", linewidth=1.5)
                axis.text(max(value, high or value) + 0.02, place, f"{value:.2f}", va="center", fontsize=9)
            axis.set_yticks(range(len(values)), list(values))
            axis.invert_yaxis()
            axis.set_title(title, fontsize=10)
            axis.set_xlim(
                0,
                max(
                    1.0 if "ECE" not in title else 0.05,
                    *(1.25 * (f["high"] or f["value"]) for f in values.values()),
                ),
            )
            axis.spines[["top", "right"]].set_visible(False)
        design = summary["design"]
        figure.suptitle(
            f"{summary['model']}: {design['num_train']} examples, {design['num_test']} test rows, "
            f"{len(design['seeds'])} seeds, 95% intervals",
            fontsize=10,
        )
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)
        plt.close(figure)
