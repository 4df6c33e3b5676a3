"""Figures of heads and neurons: what differs from in-context learning where, and where attention goes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ia2.analysis.heads import CONTROL
from ia2.report.head_map import head_map
from ia2.report.layer_lines import array, number
from ia2.report.style import FAINT, Figure, Panel, arm_styles, numbers_table
from ia2.wording import MISSING

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
    found = [_maps_figure(section, heading)] if section.get("views") else []
    if section.get("attention", {}).get("views"):
        found.append(_attention_figure(section, heading))
    return found


def neuron_figures(section: Mapping[str, Any], heading: str) -> list[Figure]:
    """How many neurons differ by layer, and how much of the difference is one common shift.

    Args:
        section: ``neurons`` of ``analysis.json``.
        heading: what the figures are of.
    """
    found = []
    if section.get("neurons", {}).get("views"):
        found.append(_significant_figure(section["neurons"], heading))
    if section.get("residual", {}).get("views"):
        found.append(_shift_figure(section["residual"], heading))
    return found


def _owner(name: str) -> str:
    """The arm that a view is a control of (``sft+demos``, ``sft~seed``), or is itself."""
    return "icl" if name == CONTROL else re.sub(r"(\+demos|~seed)$", "", name)


def _drawn(names: Iterable[str]) -> list[str]:
    """Arms, and ICL with other demonstrations; other controls are in the numbers only."""
    return [name for name in names if _owner(name) == name or name == CONTROL]


def _styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """An arm's own style; ICL with other demonstrations in ICL's colour, broken."""
    names = list(names)
    styles = arm_styles(list(dict.fromkeys(map(_owner, names))))
    return {n: {**styles[_owner(n)], "linestyle": "--" if n == CONTROL else "-"} for n in names}


# ---------------------------------------------------------------------------------------------- maps


def _maps_figure(section: Mapping[str, Any], heading: str) -> Figure:
    tests = {view["test"] for view in section["views"].values()}
    # the control itself has no control; beside views that have one its map would be of another test
    test = "control" if "control" in tests else "direction"
    views = {n: section["views"][n] for n in _drawn(section["views"]) if section["views"][n]["test"] == test}
    effects = np.concatenate([array(view["effect"]).ravel() for view in views.values()])
    known = np.abs(effects[np.isfinite(effects)])
    # a few extreme heads must not wash out the others
    limit = max(float(np.quantile(known, 0.98)), 0.1) if known.size else 1.0
    if test == "control":
        meaning = (
            "Colour is the effect size d_z of how much further a head is from ICL than under ICL with other "
            "demonstrations: orange is further, blue is nearer."
        )
    else:
        meaning = "Colour is the effect size d_z of the head's mean shift away from ICL."
    width, height = min(5.0, 2.6 + 0.085 * section["num_heads"]), min(5.0, 1.6 + 0.1 * len(section["layers"]))
    columns = ["view", "head", "share", "d_z", "q", "distance", "control", "cosine"]
    return Figure(
        "heads",
        "Heads that differ from ICL",
        heading,
        f"{meaning} A dot marks a head that differs in every training set, at a false-discovery rate of "
        f"{section['level']:g} over all heads of the view. Effects beyond the scale have its last colour.",
        tuple(
            Panel(_map(name, view, section, limit), width=width, height=height)
            for name, view in views.items()
        ),
        numbers_table(
            "heads",
            f"The {_LISTED} heads of each view with the largest share of the model's distance to ICL",
            columns,
            [row for n in _drawn(section["views"]) for row in _head_rows(n, section["views"][n], section)],
        ),
    )


def _head_rows(name: str, view: Mapping[str, Any], section: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for head in view["top"][:_LISTED]:
        place = section["layers"].index(head["layer"])
        control = view["control"][place][head["head"]] if view["control"] else None
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


def _map(
    name: str, view: Mapping[str, Any], section: Mapping[str, Any], limit: float
) -> Callable[[Any], None]:
    effect = array(view["effect"])
    certain = np.maximum(array(view["further"]), array(view["closer"])) >= len(view["n"])
    further, closer = view["heads_further"], view["heads_closer"]
    counts = f"{further} further, {closer} nearer" if view["test"] == "control" else f"{further} shifted"

    title = f"{name}: {counts}"
    return head_map(effect, limit, certain, section["layers"], "d_z", title)


# ----------------------------------------------------------------------------------------- attention


def _attention_figure(section: Mapping[str, Any], heading: str) -> Figure:
    views, regions = section["attention"]["views"], section["attention"]["regions"]
    mass = {name: array(view["mass"]) for name, view in views.items()}  # [L, H, 3]
    rows = [
        [
            name,
            str(layer),
            *(number(share, ".1%") for share in views[name]["by_layer"][i]),
            _most(mass[name][i, :, regions.index("demonstrations")]),
        ]
        for name in views
        for i, layer in enumerate(section["layers"])
    ]
    return Figure(
        "attention",
        "Where attention goes",
        heading,
        "Share of attention from the positions that predict the answer, by layer: thick lines are the mean "
        "over heads, thin ones the head with the largest share. The three shares of a head sum to 1. The "
        "first token takes what a head has no use for (an attention sink).",
        tuple(
            Panel(_attention(mass, place, _TITLES[region], section), legend=True)
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


def _attention(
    mass: Mapping[str, np.ndarray], place: int, title: str, section: Mapping[str, Any]
) -> Callable[[Any], None]:
    styles = _styles(_drawn(mass))

    def draw(axis: Any) -> None:
        for name, style in styles.items():
            found = mass[name]
            largest = found[..., place].max(1)
            axis.plot(section["layers"], largest, linewidth=0.6, alpha=0.8, color=style["color"])
            mean = found[..., place].mean(1)
            axis.plot(section["layers"], mean, markersize=3.5, linewidth=1.6, label=name, **style)
        axis.set_ylim(-0.03, 1.03)
        axis.set_xlabel("layer")
        axis.set_ylabel("share of attention")
        axis.set_title(title, fontsize=10)
        axis.xaxis.get_major_locator().set_params(integer=True)

    return draw


# ------------------------------------------------------------------------------------------- neurons


def _significant_figure(section: Mapping[str, Any], heading: str) -> Figure:
    views = section["views"]
    shares = {n: array(views[n]["significant"]) / section["width"] for n in _drawn(views)}
    return Figure(
        "neurons",
        "Neurons that differ from ICL",
        heading,
        "Share of a layer's MLP neurons whose mean activation differs from that under ICL, at a "
        f"false-discovery rate of {section['level']:g} over all {section['width']} neurons of all layers. "
        "With many examples small differences count too: compare the lines with each other, and with ICL "
        "under other demonstrations (icl-other) where it is there.",
        (
            Panel(
                _lines(shares, section["layers"], "share of neurons that differ"),
                legend=True,
                width=5.0,
                height=3.6,
            ),
        ),
        numbers_table(
            "neurons",
            "Neurons that differ, by layer, mean over training sets",
            ["layer", *views],
            _by_layer(section["layers"], {n: v["significant"] for n, v in views.items()}, ",.0f"),
        ),
    )


def _shift_figure(section: Mapping[str, Any], heading: str) -> Figure:
    views = section["views"]
    shares = {n: array(views[n]["common_shift"]) for n in _drawn(views)}
    return Figure(
        "common-shift",
        "How much of the difference to ICL is one common shift",
        heading,
        "Share of the squared difference of residual streams that is the same vector in every example, by "
        "layer: 1 is a constant that could be added, 0 a difference of each example's own. It is corrected "
        "for chance, so that it can come out a little below 0.",
        (Panel(_lines(shares, section["layers"], "common share"), legend=True, width=5.0, height=3.6),),
        numbers_table(
            "common-shift",
            "Common share of the difference to ICL, by layer",
            ["layer", *views],
            _by_layer(section["layers"], {n: v["common_shift"] for n, v in views.items()}, ".3f"),
        ),
    )


def _by_layer(layers: Sequence[int], views: Mapping[str, Sequence[Any]], form: str) -> list[list[str]]:
    return [
        [str(layer), *(number(values[i], form) for values in views.values())]
        for i, layer in enumerate(layers)
    ]


def _lines(values: Mapping[str, np.ndarray], layers: Sequence[int], label: str) -> Callable[[Any], None]:
    styles = _styles(values)

    def draw(axis: Any) -> None:
        axis.axhline(0, color=FAINT, linewidth=0.6)
        for name, found in values.items():
            axis.plot(layers, found, markersize=3.5, linewidth=1.3, label=name, **styles[name])
        axis.set_xlabel("layer")
        axis.set_ylabel(label)
        axis.xaxis.get_major_locator().set_params(integer=True)

    return draw
