"""Figures of the section ``weights``: overlap of updates (the paper's figure 4), and their size by layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ia2.report.figures.layer_lines import array, from_zero, layer_table, lines, number
from ia2.report.figures.style import COLOURS, FAINT, INK, Figure, Panel, arm_styles, numbers_table
from ia2.utils.wording import MISSING, estimate

_DRAWN = {
    "b": "by B's left singular vectors",
    "weighted": "by ΔW's, weighted by strength",
}
_PAIR_COLOURS = {"recipes": COLOURS[0], "seeds": COLOURS[1]}
_ENDS = "95% intervals over five seeds or more, with fewer the lowest and the highest."


def weight_figures(section: Mapping[str, Any], heading: str) -> list[Figure]:
    """Every figure that the section has something for.

    Args:
        section: ``weights`` of ``analysis.json``.
        heading: what it is of: model, data, seeds.
    """
    pairs = {
        pair["label"] if pair["kind"] == "recipes" else f"{pair['label']}, two seeds": pair
        for pair in sorted(section["pairs"], key=lambda pair: str(pair["kind"]))
        if _known(pair["overlap"]["b"]["value"])
    }
    found = (
        _overlap(pairs, section["measures"], heading),
        _overlap_layers(pairs, heading),
        _updates(section, heading),
    )
    return [figure for figure in found if figure is not None]


def _known(value: Any) -> bool:
    return value is not None and value == value


def _text(entry: Mapping[str, Any]) -> str:
    return estimate(entry if entry["n"] > 1 else {**entry, "low": None, "high": None})


def _overlap(pairs: Mapping[str, Any], measures: Sequence[str], heading: str) -> Figure | None:
    """Violins over modules; None without two adapters to compare."""
    if not pairs:
        return None
    rows = [
        [
            label,
            *(_text(pair["overlap"][measure]) for measure in measures),
            f"{pair['random']['b']:.3f}",
            f"{pair['angles'][0]:.0f}–{pair['angles'][-1]:.0f}",
        ]
        for label, pair in pairs.items()
    ]
    columns = ["B", "ΔW, left", "ΔW, right", "ΔW, weighted", "ΔW, cosine", "random (B)", "angles in degrees"]
    return Figure(
        "overlap",
        "Do the recipes change the same directions?",
        heading,
        "Each violin holds one value for every adapted module of every layer, the mean over training sets; "
        "the dot is their mean. 1: the same directions. The dashed ticks are what random subspaces have. "
        "Pairs of two recipes were trained on the same examples; pairs of two seeds are one recipe on other "
        "examples, the baseline beside the random one. A recipe that goes on from another's adapter, as "
        f"ia2-sft does from ia2, has a head start. Brackets in the numbers are {_ENDS}",
        tuple(
            Panel(_violins(pairs, measure, title), width=5.2, height=0.9 + 0.42 * len(pairs))
            for measure, title in _DRAWN.items()
        ),
        numbers_table("overlap", "Overlap of updates", ["pair", *columns], rows),
        columns=2,
    )


def _violins(pairs: Mapping[str, Any], measure: str, title: str) -> Callable[[Any], None]:
    def draw(axis: Any) -> None:
        # matplotlib 3.10 renamed the argument
        flat: dict[str, Any] = {"orientation": "horizontal"}
        if "orientation" not in inspect.signature(axis.violinplot).parameters:
            flat = {"vert": False}
        for place, pair in enumerate(pairs.values()):
            values = array(pair["by_module"][measure])
            values = values[~np.isnan(values)]
            colour = _PAIR_COLOURS[pair["kind"]]
            parts = axis.violinplot([values], positions=[place], widths=0.8, showextrema=False, **flat)
            for body in parts["bodies"]:
                body.set(facecolor=colour, edgecolor=colour, alpha=0.45)
            axis.plot(values.mean(), place, marker="o", markersize=5, color=colour)
            random = pair["random"][measure]
            axis.plot([random] * 2, [place - 0.4, place + 0.4], color=INK, linewidth=1.2, linestyle="--")
        axis.set_yticks(range(len(pairs)), list(pairs))
        axis.invert_yaxis()
        axis.set_xlim(left=0)
        axis.set_xlabel("overlap")
        axis.set_title(title, fontsize=10)

    return draw


def _overlap_layers(pairs: Mapping[str, Any], heading: str) -> Figure | None:
    """A line a pair of recipes; None without two recipes or without layers."""
    layers = next(iter(pairs.values()))["by_layer"]["layers"] if pairs else []
    drawn = [label for label, pair in pairs.items() if pair["kind"] == "recipes"]
    if not layers or not drawn:
        return None
    of_recipes = arm_styles(drawn)
    styles = {label: of_recipes.get(label, {"color": FAINT, "linestyle": ":"}) for label in pairs}
    random = {measure: {pairs[drawn[0]]["random"][measure]: _RANDOM} for measure in _DRAWN}
    return Figure(
        "overlap-layers",
        "Overlap of updates by layer",
        heading,
        "Means over the modules of a layer and over training sets. Dashed: random subspaces; dotted: one "
        "recipe with two seeds, a line a recipe.",
        tuple(
            lines(
                layers,
                {label: {"value": pair["by_layer"][measure]} for label, pair in pairs.items()},
                styles,
                "overlap",
                title,
                rules=random[measure],
                unnamed=set(pairs) - set(drawn),
                after=from_zero,
                width=4.6,
                height=3.4,
            )
            for measure, title in _DRAWN.items()
        ),
        layer_table(
            "overlap-layers",
            f"Overlap by layer, {_DRAWN['b']}",
            layers,
            {label: [number(value) for value in pair["by_layer"]["b"]] for label, pair in pairs.items()},
        ),
        columns=2,
    )


_RANDOM = {"color": INK, "linewidth": 1, "linestyle": "--"}


def _updates(section: Mapping[str, Any], heading: str) -> Figure | None:
    """Norm and effective rank of the updates by layer; None without any."""
    arms = {
        name: entry["by_layer"] for name, entry in section["updates"].items() if entry["by_layer"]["layers"]
    }
    if not arms:
        return None
    relative = all(_known(e["value"]) for found in arms.values() for e in found["relative_norm"][:1])
    measures = {"relative_norm" if relative else "norm": "norm", "effective_rank": "effective rank"}
    titles = ["‖ΔW‖ / ‖W‖" if relative else "‖ΔW‖", "effective rank"]
    layers = sorted({layer for found in arms.values() for layer in found["layers"]})
    columns = {}
    for measure, what in measures.items():
        for name, found in arms.items():
            known = dict(zip(found["layers"], map(_text, found[measure]), strict=True))
            columns[f"{name}, {what}"] = [known.get(layer, MISSING) for layer in layers]

    def part(found: Mapping[str, Any], measure: str) -> dict[str, Any]:
        ends = {end: [entry[end] for entry in found[measure]] for end in ("value", "low", "high")}
        return {"x": found["layers"], **ends}

    return Figure(
        "updates",
        "How much do the recipes change, and in how many directions?",
        heading,
        "Frobenius norm of the updates of a layer's adapted modules together"
        f"{', relative to that of the weights they change' if relative else ''}; effective rank (the "
        "exponential of the entropy of the singular values), the mean over these modules. Lines are means "
        f"over seeds; bands are {_ENDS}",
        tuple(
            lines(
                layers,
                {name: part(found, measure) for name, found in arms.items()},
                arm_styles(list(arms)),
                "",
                title,
                after=from_zero,
                width=4.6,
                height=3.4,
            )
            for measure, title in zip(measures, titles, strict=True)
        ),
        layer_table("updates", "Size of updates by layer", layers, columns),
        columns=2,
    )
