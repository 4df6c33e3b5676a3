"""Figures of the section ``weights``: overlap of updates (the paper's figure 4), and their size by layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ia2.report.style import COLOURS, FAINT, INK, Figure, Panel, arm_styles, numbers_table
from ia2.wording import estimate

_DRAWN = {
    "b": "by B's left singular vectors",
    "weighted": "by ΔW's, weighted by strength",
}
_PAIR_COLOURS = {"recipes": COLOURS[0], "seeds": COLOURS[1]}


def weight_figures(section: Mapping[str, Any], heading: str) -> list[Figure]:
    """Every figure that the section has something for.

    Args:
        section: what :func:`ia2.analysis.overlap.overlaps` gives, or the same from JSON.
        heading: what it is of: model, data, seeds.
    """
    found = (
        overlap_figure(section, heading),
        overlap_layers_figure(section, heading),
        updates_figure(section, heading),
    )
    return [figure for figure in found if figure is not None]


def _numbers(values: Sequence[Any]) -> np.ndarray:
    """With NaN where JSON has null."""
    return np.array(values, dtype=float)


def _known(value: Any) -> bool:
    return value is not None and value == value


def _text(entry: Mapping[str, Any]) -> str:
    return estimate(entry if entry["n"] > 1 else {**entry, "low": None, "high": None})


def _pairs(section: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Pairs that have an overlap at all, with what they are called: those of recipes first."""
    pairs = sorted(section["pairs"], key=lambda pair: str(pair["kind"]))
    return [
        (pair["label"] if pair["kind"] == "recipes" else f"{pair['label']}, two seeds", pair)
        for pair in pairs
        if _known(pair["overlap"]["b"]["value"])
    ]


# ------------------------------------------------------------------------------------------- overlap


def overlap_figure(section: Mapping[str, Any], heading: str) -> Figure | None:
    """Violins of overlap over modules; None without two adapters to compare."""
    pairs = _pairs(section)
    if not pairs:
        return None
    rows = [
        [
            label,
            *(_text(pair["overlap"][measure]) for measure in section["measures"]),
            f"{pair['random']['b']:.3f}",
            f"{pair['angles'][0]:.0f}–{pair['angles'][-1]:.0f}",
        ]
        for label, pair in pairs
    ]
    columns = ["B", "ΔW, left", "ΔW, right", "ΔW, weighted", "ΔW, cosine", "random (B)", "angles in degrees"]
    height = 0.9 + 0.42 * len(pairs)
    return Figure(
        "overlap",
        "Do the recipes change the same directions?",
        heading,
        "Each violin holds one value for every adapted module of every layer, the mean over training sets; "
        "the dot is their mean. 1: the same directions. The dashed ticks are what random subspaces have. "
        "Pairs of two recipes were trained on the same examples; pairs of two seeds are one recipe on other "
        "examples, the baseline beside the random one. A recipe that goes on from another's adapter, as "
        "ia2-sft does from ia2, has a head start. Brackets in the numbers are 95% intervals over five seeds "
        "or more, with fewer the lowest and the highest.",
        tuple(
            Panel(_violins(pairs, measure, title), width=5.2, height=height)
            for measure, title in _DRAWN.items()
        ),
        numbers_table("overlap", "Overlap of updates", ["pair", *columns], rows),
        columns=2,
    )


def _violins(pairs: Sequence[tuple[str, Any]], measure: str, title: str) -> Callable[[Any], None]:
    def draw(axis: Any) -> None:
        # matplotlib 3.10 renamed the argument
        flat: dict[str, Any] = {"orientation": "horizontal"}
        if "orientation" not in inspect.signature(axis.violinplot).parameters:
            flat = {"vert": False}
        for place, (_, pair) in enumerate(pairs):
            values = _numbers(pair["by_module"][measure])
            values = values[~np.isnan(values)]
            colour = _PAIR_COLOURS[pair["kind"]]
            parts = axis.violinplot([values], positions=[place], widths=0.8, showextrema=False, **flat)
            for body in parts["bodies"]:
                body.set(facecolor=colour, edgecolor=colour, alpha=0.45)
            axis.plot(values.mean(), place, marker="o", markersize=5, color=colour)
            random = pair["random"][measure]
            axis.plot([random] * 2, [place - 0.4, place + 0.4], color=INK, linewidth=1.2, linestyle="--")
        axis.set_yticks(range(len(pairs)), [label for label, _ in pairs])
        axis.invert_yaxis()
        axis.set_xlim(left=0)
        axis.set_xlabel("overlap")
        axis.set_title(title, fontsize=10)

    return draw


def overlap_layers_figure(section: Mapping[str, Any], heading: str) -> Figure | None:
    """Overlap by layer, a line a pair of recipes; None without two recipes or without layers."""
    pairs = _pairs(section)
    layers = pairs[0][1]["by_layer"]["layers"] if pairs else []
    drawn = [(label, pair) for label, pair in pairs if pair["kind"] == "recipes"]
    if not layers or not drawn:
        return None
    rows = [
        [str(layer), *(_plain(pair["by_layer"]["b"][place]) for _, pair in pairs)]
        for place, layer in enumerate(layers)
    ]
    return Figure(
        "overlap-layers",
        "Overlap of updates by layer",
        heading,
        "Means over the modules of a layer and over training sets. Dashed: random subspaces; dotted: one "
        "recipe with two seeds, a line a recipe.",
        tuple(
            Panel(_by_layer(pairs, drawn, measure, title), legend=True, width=4.6, height=3.4)
            for measure, title in _DRAWN.items()
        ),
        numbers_table(
            "overlap-layers",
            f"Overlap by layer, {_DRAWN['b']}",
            ["layer", *(label for label, _ in pairs)],
            rows,
        ),
        columns=2,
    )


def _from_zero(axis: Any) -> None:
    """Room above: of values that are nearly equal, matplotlib's own margin is a part of their range."""
    axis.set_ylim(0, 1.05 * axis.get_ylim()[1])


def _plain(value: Any) -> str:
    return f"{value:.3f}" if _known(value) else "–"


def _by_layer(
    pairs: Sequence[tuple[str, Any]], drawn: Sequence[tuple[str, Any]], measure: str, title: str
) -> Callable[[Any], None]:
    styles = arm_styles([label for label, _ in drawn])

    def draw(axis: Any) -> None:
        for label, pair in pairs:
            found = pair["by_layer"]
            look = styles.get(label, {"color": FAINT, "linestyle": ":"})
            named = {"label": label, "markersize": 4} if label in styles else {}
            axis.plot(found["layers"], _numbers(found[measure]), linewidth=1.3, **look, **named)
        axis.axhline(drawn[0][1]["random"][measure], color=INK, linewidth=1, linestyle="--")
        _from_zero(axis)
        axis.set_xlabel("layer")
        axis.set_ylabel("overlap")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_title(title, fontsize=10)

    return draw


# ---------------------------------------------------------------------------------------------- size


def updates_figure(section: Mapping[str, Any], heading: str) -> Figure | None:
    """Norm and effective rank of the updates by layer; None without any."""
    arms = {
        name: entry["by_layer"] for name, entry in section["updates"].items() if entry["by_layer"]["layers"]
    }
    if not arms:
        return None
    relative = all(_known(e["value"]) for found in arms.values() for e in found["relative_norm"][:1])
    norm = "relative_norm" if relative else "norm"
    title = "‖ΔW‖ / ‖W‖" if relative else "‖ΔW‖"
    layers = sorted({layer for found in arms.values() for layer in found["layers"]})
    rows = [
        [str(layer)]
        + [
            _text(found[measure][found["layers"].index(layer)]) if layer in found["layers"] else "–"
            for measure in (norm, "effective_rank")
            for found in arms.values()
        ]
        for layer in layers
    ]
    columns = [f"{name}, {what}" for what in ("norm", "effective rank") for name in arms]
    return Figure(
        "updates",
        "How much do the recipes change, and in how many directions?",
        heading,
        "Frobenius norm of the updates of a layer's adapted modules together"
        f"{', relative to that of the weights they change' if relative else ''}; effective rank (the "
        "exponential of the entropy of the singular values), the mean over these modules. Lines are means "
        "over seeds; bands are 95% intervals over five seeds or more, with fewer the lowest and the highest.",
        (
            Panel(_sizes(arms, norm, title), legend=True, width=4.6, height=3.4),
            Panel(_sizes(arms, "effective_rank", "effective rank"), legend=True, width=4.6, height=3.4),
        ),
        numbers_table("updates", "Size of updates by layer", ["layer", *columns], rows),
        columns=2,
    )


def _sizes(arms: Mapping[str, Any], measure: str, title: str) -> Callable[[Any], None]:
    styles = arm_styles(list(arms))

    def draw(axis: Any) -> None:
        for name, found in arms.items():
            value, low, high = (
                _numbers([e[end] for e in found[measure]]) for end in ("value", "low", "high")
            )
            axis.plot(found["layers"], value, markersize=4, linewidth=1.3, label=name, **styles[name])
            axis.fill_between(
                found["layers"], low, high, color=styles[name]["color"], alpha=0.12, linewidth=0
            )
        _from_zero(axis)
        axis.set_xlabel("layer")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_title(title, fontsize=10)

    return draw
