"""Figures of heads and neurons: what differs from in-context learning where, and where attention goes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ia2.report.figures.head_map import head_map
from ia2.report.figures.layer_lines import OTHER, array, layer_table, lines, number
from ia2.report.figures.style import Figure, Panel, arm_styles, numbers_table
from ia2.utils.wording import MISSING

_TITLES = {
    "first": "to the first token",
    "demonstrations": "to the demonstrations",
    "query": "to the query and the answer",
}
_LISTED = 10


def head_figures(section: Mapping[str, Any], heading: str) -> list[Figure]:
    """Layer × head maps, and where attention goes if that was measured.

    Args:
        section: ``heads`` of ``analysis.json``.
        heading: what the figures are of.
    """
    found = [_maps(section, heading)] if section.get("views") else []
    if section.get("attention", {}).get("views"):
        found.append(_attention(section, heading))
    return found


def neuron_figures(section: Mapping[str, Any], heading: str) -> list[Figure]:
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
        counts = {name: array(view["significant"]) for name, view in neurons["views"].items()}
        shares = {name: found_in / neurons["width"] for name, found_in in counts.items()}
        numbers = "Neurons that differ, by layer, mean over training sets", counts, ",.0f"
        panel = _by_view(neurons["layers"], shares, "share of neurons that differ")
        title = "Neurons that differ from ICL"
        found.append(_figure("neurons", title, heading, caption, panel, neurons["layers"], *numbers))
    if residual := section.get("residual"):
        caption = (
            "Share of the squared difference of residual streams that is the same vector in every example, "
            "by layer: 1 is a constant that could be added, 0 a difference of each example's own. It is "
            "corrected for chance, so that it can come out a little below 0."
        )
        shares = {name: array(view["common_shift"]) for name, view in residual["views"].items()}
        numbers = "Common share of the difference to ICL, by layer", shares, ".3f"
        panel = _by_view(residual["layers"], shares, "common share")
        title = "How much of the difference to ICL is one common shift"
        found.append(_figure("common-shift", title, heading, caption, panel, residual["layers"], *numbers))
    return found


def _figure(
    name: str,
    title: str,
    heading: str,
    caption: str,
    panel: Panel,
    layers: Sequence[int],
    table: str,
    values: Mapping[str, np.ndarray],
    form: str,
) -> Figure:
    columns = {view: [number(value, form) for value in found] for view, found in values.items()}
    return Figure(name, title, heading, caption, (panel,), layer_table(name, table, layers, columns))


def _by_view(layers: Sequence[int], values: Mapping[str, np.ndarray], ylabel: str) -> Panel:
    shown = {name: {"value": values[name]} for name in _drawn(values)}
    return lines(layers, shown, _styles(shown), ylabel, rules={0: {"linewidth": 0.6}}, height=3.6)


def _owner(name: str) -> str:
    """The arm that a view is a control of (``sft+demos``, ``sft~seed``), or is itself."""
    return "icl" if name == OTHER else re.sub(r"(\+demos|~seed)$", "", name)


def _drawn(names: Iterable[str]) -> list[str]:
    """Arms, and ICL with other demonstrations; other controls are in the numbers only."""
    return [name for name in names if _owner(name) == name or name == OTHER]


def _styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """An arm's own style; ICL with other demonstrations in ICL's colour, broken."""
    names = list(names)
    styles = arm_styles(list(dict.fromkeys(map(_owner, names))))
    return {n: {**styles[_owner(n)], "linestyle": "--" if n == OTHER else "-"} for n in names}


# ---------------------------------------------------------------------------------------------- maps


def _maps(section: Mapping[str, Any], heading: str) -> Figure:
    views, drawn = section["views"], _drawn(section["views"])
    tests = {view["test"] for view in views.values()}
    # the control itself has no control; beside views that have one its map would be of another test
    test = "control" if "control" in tests else "direction"
    mapped = {name: views[name] for name in drawn if views[name]["test"] == test}
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
        counts = f"{further} further, {closer} nearer" if test == "control" else f"{further} shifted"
        effect = array(view["effect"])
        panels.append(head_map(effect, limit, certain, section["layers"], "d_z", f"{name}: {counts}"))
    columns = ["view", "head", "share", "d_z", "q", "distance", "control", "cosine"]
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
            [row for name in drawn for row in _head_rows(name, views[name], section["layers"])],
        ),
    )


def _head_rows(name: str, view: Mapping[str, Any], layers: Sequence[int]) -> list[list[str]]:
    rows = []
    for head in view["top"][:_LISTED]:
        control = view["control"][layers.index(head["layer"])][head["head"]] if view["control"] else None
        rows.append(
            [
                name,
                f"layer {head['layer']}, head {head['head']}",
                number(head["share_of_model"], ".1%"),
                number(head["effect"], "+.2f"),
                number(head["q"], ".2g"),
                number(head["distance"], ".3g"),
                number(control, ".3g"),
                number(head["cosine"], ".3f"),
            ]
        )
    return rows


# ----------------------------------------------------------------------------------------- attention


def _attention(section: Mapping[str, Any], heading: str) -> Figure:
    layers, views = section["layers"], section["attention"]["views"]
    regions = section["attention"]["regions"]
    mass = {name: array(view["mass"]) for name, view in views.items()}  # [L, H, 3]
    rows = [
        [
            name,
            str(layer),
            *(number(share, ".1%") for share in views[name]["by_layer"][i]),
            _most(mass[name][i, :, regions.index("demonstrations")]),
        ]
        for name in views
        for i, layer in enumerate(layers)
    ]
    return Figure(
        "attention",
        "Where attention goes",
        heading,
        "Share of attention from the positions that predict the answer, by layer: thick lines are the mean "
        "over heads, thin ones the head with the largest share. The three shares of a head sum to 1. The "
        "first token takes what a head has no use for (an attention sink).",
        tuple(
            _shares({name: found[..., place] for name, found in mass.items()}, layers, _TITLES[region])
            for place, region in enumerate(regions)
        ),
        numbers_table(
            "attention",
            "Attention by layer, mean over heads, and the head that looks at demonstrations most",
            ["view", "layer", *(_TITLES[region] for region in regions), "most to demonstrations"],
            rows,
        ),
    )


def _most(shares: np.ndarray) -> str:
    """The head with the largest share of attention."""
    head = int(np.argmax(np.nan_to_num(shares)))
    return f"head {head}, {number(float(shares[head]), '.1%')}" if shares[head] > 0 else MISSING


def _shares(shares: Mapping[str, np.ndarray], layers: Sequence[int], title: str) -> Panel:
    """Of one region, ``[L, H]`` each."""
    own = _styles(_drawn(shares))
    parts: dict[str, Any] = {}
    styles: dict[str, Any] = {}
    for name, style in own.items():
        parts[f"{name}, largest"] = {"value": shares[name].max(1)}
        styles[f"{name}, largest"] = {"linewidth": 0.6, "alpha": 0.8, "color": style["color"]}
        parts[name], styles[name] = {"value": shares[name].mean(1)}, {"linewidth": 1.6, **style}
    return lines(
        layers,
        parts,
        styles,
        "share of attention",
        title,
        unnamed=set(parts) - set(own),
        after=lambda axis: axis.set_ylim(-0.03, 1.03),
        width=3.6,
        height=3.1,
    )
