"""Figures of parts of models: updates of weights (the paper's figure 4), heads, neurons."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ia2.report.figures.lines import OTHER, Lines, array, from_zero, line_figure, number
from ia2.report.figures.marks import head_map, violins
from ia2.report.figures.style import COLOURS, FAINT, INK, Figure, arm_styles, numbers_table
from ia2.utils.wording import estimate

Json = Mapping[str, Any]

# Heads in the numbers of a map.
_LISTED = 10

_ENDS = "95% intervals over five seeds or more, with fewer the lowest and the highest."
_OVERLAPS = {"b": "by B's left singular vectors", "weighted": "by ΔW's, weighted by strength"}
_REGIONS = {
    "first": "to the first token",
    "demonstrations": "to the demonstrations",
    "query": "to the query and the answer",
}

# ------------------------------------------------------------------------------------------- weights


def weight_figures(section: Json, heading: str) -> list[Figure]:
    """Overlap of updates, by module and by layer, and their size.

    Args:
        section: ``weights`` of ``analysis.json``.
        heading: what it is of: model, data, seeds.
    """
    pairs = {
        pair["label"] if pair["kind"] == "recipes" else f"{pair['label']}, two seeds": pair
        for pair in sorted(section["pairs"], key=lambda pair: str(pair["kind"]))
        if _is_known(pair["overlap"]["b"]["value"])
    }
    found = [_overlap(pairs, section["measures"], heading)] if pairs else []
    if pairs and "recipes" in {pair["kind"] for pair in pairs.values()}:
        found += _overlap_by_layer(pairs, heading)
    return [*found, *_updates(section, heading)]


def _is_known(value: Any) -> bool:
    return value is not None and value == value


def _of_seeds(entry: Json) -> Json:
    return entry if entry["n"] > 1 else {**entry, "low": None, "high": None}


def _overlap(pairs: Mapping[str, Json], measures: Iterable[str], heading: str) -> Figure:
    colours = {label: COLOURS[0 if pair["kind"] == "recipes" else 1] for label, pair in pairs.items()}
    rows = [
        [
            label,
            *(estimate(_of_seeds(pair["overlap"][measure])) for measure in measures),
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
            violins(
                {label: pair["by_module"][measure] for label, pair in pairs.items()},
                {label: pair["random"][measure] for label, pair in pairs.items()},
                colours,
                title,
                "overlap",
            )
            for measure, title in _OVERLAPS.items()
        ),
        numbers_table("overlap", "Overlap of updates", ["pair", *columns], rows),
        columns=2,
    )


def _overlap_by_layer(pairs: Mapping[str, Json], heading: str) -> Iterator[Figure]:
    """A line a pair of recipes; none without layers."""
    layers = next(iter(pairs.values()))["by_layer"]["layers"]
    if not layers:
        return
    recipes = [label for label, pair in pairs.items() if pair["kind"] == "recipes"]
    styles = arm_styles(recipes)
    panels = []
    for measure, title in _OVERLAPS.items():
        series = {
            label: {
                "value": pair["by_layer"][measure],
                "style": styles.get(label, {"color": FAINT, "linestyle": ":"}),
                "legend": label in recipes,
            }
            for label, pair in pairs.items()
        }
        random = {pairs[recipes[0]]["random"][measure]: {"color": INK, "linewidth": 1, "linestyle": "--"}}
        panels.append(Lines(title, series, "overlap", random, from_zero))
    caption = (
        "Means over the modules of a layer and over training sets. Dashed: random subspaces; dotted: one "
        "recipe with two seeds, a line a recipe."
    )
    title = "Overlap of updates by layer"
    yield line_figure(
        *("overlap-layers", title, heading, caption, layers, panels),
        rows="measure",
        columns=2,
        width=4.6,
        height=3.4,
    )


def _updates(section: Json, heading: str) -> Iterator[Figure]:
    """Norm and effective rank of the updates by layer; none without any."""
    arms = {
        name: entry["by_layer"] for name, entry in section["updates"].items() if entry["by_layer"]["layers"]
    }
    if not arms:
        return
    relative = all(_is_known(e["value"]) for of in arms.values() for e in of["relative_norm"][:1])
    titles = {"effective_rank": "effective rank"}
    titles = {"relative_norm": "‖ΔW‖ / ‖W‖", **titles} if relative else {"norm": "‖ΔW‖", **titles}
    styles = arm_styles(list(arms))
    panels = []
    for measure, title in titles.items():
        series = {}
        for name, of in arms.items():
            entries = [_of_seeds(entry) for entry in of[measure]]
            ends = {end: [entry[end] for entry in entries] for end in ("value", "low", "high")}
            series[name] = {"x": of["layers"], **ends, "style": styles[name]}
        panels.append(Lines(title, series, finish=from_zero))
    yield line_figure(
        "updates",
        "How much do the recipes change, and in how many directions?",
        heading,
        "Frobenius norm of the updates of a layer's adapted modules together"
        f"{', relative to that of the weights they change' if relative else ''}; effective rank (the "
        "exponential of the entropy of the singular values), the mean over these modules. Lines are means "
        f"over seeds; bands are {_ENDS}",
        sorted({layer for of in arms.values() for layer in of["layers"]}),
        panels,
        rows="measure",
        numbers="Size of updates by layer",
        columns=2,
        width=4.6,
        height=3.4,
    )


# ------------------------------------------------------------------------------------ heads, neurons


def head_figures(section: Json, heading: str) -> list[Figure]:
    """Layer × head maps, and where attention goes if that was measured.

    Args:
        section: ``heads`` of ``analysis.json``.
        heading: what the figures are of.
    """
    found = [_head_maps(section, heading)] if section.get("views") else []
    if section.get("attention", {}).get("views"):
        found.append(_attention(section, heading))
    return found


def neuron_figures(section: Json, heading: str) -> list[Figure]:
    """How many neurons differ by layer, and how much of the difference is one common shift.

    Args:
        section: ``neurons`` of ``analysis.json``.
        heading: what the figures are of.
    """
    found = []
    if neurons := section.get("neurons"):
        caption = (
            "Share of a layer's MLP neurons whose mean activation differs from that under ICL, at a "
            f"false-discovery rate of {neurons['level']:g} over all {neurons['width']} neurons of all "
            "layers. With many examples small differences count too: compare the lines with each other, and "
            "with ICL under other demonstrations (icl-other) where it is there."
        )
        shares = {n: array(view["significant"]) / neurons["width"] for n, view in neurons["views"].items()}
        panel = Lines("", _own_and_hidden(shares), "share of neurons that differ", {0: {"linewidth": 0.6}})
        of = ("neurons", "Neurons that differ from ICL", heading, caption, neurons["layers"], [panel])
        found.append(line_figure(*of, form=".1%", width=5.0, height=3.6))
    if residual := section.get("residual"):
        caption = (
            "Share of the squared difference of residual streams that is the same vector in every example, "
            "by layer: 1 is a constant that could be added, 0 a difference of each example's own. It is "
            "corrected for chance, so that it can come out a little below 0."
        )
        shares = {name: array(view["common_shift"]) for name, view in residual["views"].items()}
        panel = Lines("", _own_and_hidden(shares), "common share", {0: {"linewidth": 0.6}})
        title = "How much of the difference to ICL is one common shift"
        of = ("common-shift", title, heading, caption, residual["layers"], [panel])
        found.append(line_figure(*of, width=5.0, height=3.6))
    return found


def _owner(name: str) -> str:
    """The arm that a condition is a control of (``sft+demos``, ``sft~seed``), or is itself."""
    return "icl" if name == OTHER else name.removesuffix("+demos").removesuffix("~seed")


def _is_drawn(name: str) -> bool:
    """Arms, and ICL with other demonstrations; other controls are in the numbers only."""
    return _owner(name) == name or name == OTHER


def _own_and_hidden(values: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Lines in their arm's style; ICL with other demonstrations in ICL's colour, broken."""
    styles = arm_styles(list(dict.fromkeys(_owner(name) for name in values if _is_drawn(name))))
    return {
        name: {
            "value": value,
            "hidden": not _is_drawn(name),
            "style": {**styles.get(_owner(name), {}), "linestyle": "--" if name == OTHER else "-"},
        }
        for name, value in values.items()
    }


def _head_maps(section: Json, heading: str) -> Figure:
    views = {name: view for name, view in section["views"].items() if _is_drawn(name)}
    # the control itself has no control; beside views that have one its map would be of another test
    test = "control" if "control" in {view["test"] for view in section["views"].values()} else "direction"
    mapped = {name: view for name, view in views.items() if view["test"] == test}
    effects = np.concatenate([array(view["effect"]).ravel() for view in mapped.values()])
    known = np.abs(effects[np.isfinite(effects)])
    # a few extreme heads must not wash out the others
    limit = max(float(np.quantile(known, 0.98)), 0.1) if known.size else 1.0
    meaning = "Colour is the effect size d_z of " + (
        "how much further a head is from ICL than under ICL with other demonstrations: orange is further, "
        "blue is nearer."
        if test == "control"
        else "the head's mean shift away from ICL."
    )
    panels = []
    for name, view in mapped.items():
        certain = np.maximum(array(view["further"]), array(view["closer"])) >= len(view["n"])
        further, closer = view["heads_further"], view["heads_closer"]
        title = f"{name}: {further} " + (f"further, {closer} nearer" if test == "control" else "shifted")
        panels.append(head_map(array(view["effect"]), limit, certain, section["layers"], "d_z", title))
    rows = [
        [
            name,
            f"layer {head['layer']}, head {head['head']}",
            *(number(head[key], form) for key, form in _HEAD_COLUMNS.items()),
            number(_of_head(view["control"], section["layers"], head), ".3g"),
        ]
        for name, view in views.items()
        for head in view["top"][:_LISTED]
    ]
    columns = ["view", "head", "share", "d_z", "q", "distance", "cosine", "control"]
    return Figure(
        "heads",
        "Heads that differ from ICL",
        heading,
        f"{meaning} A dot marks a head that differs in every training set, at a false-discovery rate of "
        f"{section['level']:g} over all heads of the view. Effects beyond the scale have its last colour.",
        tuple(panels),
        numbers_table(
            "heads",
            f"The {_LISTED} heads of each view with the largest share of the model's distance to ICL",
            columns,
            rows,
        ),
    )


_HEAD_COLUMNS = {
    "share_of_model": ".1%",
    "effect": "+.2f",
    "q": ".2g",
    "distance": ".3g",
    "cosine": ".3f",
}


def _of_head(values: Any, layers: Sequence[int], head: Json) -> Any:
    return values[layers.index(head["layer"])][head["head"]] if values else None


def _attention(section: Json, heading: str) -> Figure:
    mass = {name: array(view["mass"]) for name, view in section["attention"]["views"].items()}  # [L, H, 3]
    panels = []
    for place, region in enumerate(section["attention"]["regions"]):
        means = _own_and_hidden({name: of[..., place].mean(1) for name, of in mass.items()})
        series: dict[str, Any] = {}
        for name, line in means.items():
            thin = {"color": line["style"].get("color"), "linewidth": 0.6, "alpha": 0.8}
            largest = {**line, "value": mass[name][..., place].max(1), "style": thin, "legend": False}
            series[f"{name}, largest"] = largest
            series[name] = {**line, "style": {"linewidth": 1.6, **line["style"]}}
        panels.append(Lines(_REGIONS[region], series, "share of attention", finish=_whole_range))
    return line_figure(
        "attention",
        "Where attention goes",
        heading,
        "Share of attention from the positions that predict the answer, by layer: thick lines are the mean "
        "over heads, thin ones the head with the largest share. The three shares of a head sum to 1. The "
        "first token takes what a head has no use for (an attention sink).",
        section["layers"],
        panels,
        rows="attention",
        numbers="Attention by layer, mean over heads and the head with the largest share",
        form=".1%",
    )


def _whole_range(axis: Any) -> None:
    axis.set_ylim(-0.03, 1.03)
