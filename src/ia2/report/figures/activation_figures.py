"""Figures of the similarity to ICL inside: by layer (the paper's figure 2), beside controls, and by token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ia2.report.figures.layer_lines import (
    CONTROL_STYLES,
    MEAN,
    OTHER,
    array,
    cells,
    layer_table,
    limits_of,
    lines,
    number,
    view_styles,
)
from ia2.report.figures.style import Figure, numbers_table, plain_log
from ia2.report.verdict import METHOD, RIVAL
from ia2.utils.wording import MISSING, estimate

_BROKEN = {
    "with demonstrations": "dashed, the trained model that is given the demonstrations too",
    "other seed": "dash-dotted, the same recipe with another seed's examples, looked at with these",
}

# A range beyond which a linear axis would press most layers onto the bottom.
_LOG_FROM = 20
# Tokens up to which each has a marker.
_MARKED = 40
# Pairs that are drawn; the analysis has more.
_MAX_PAIRS = 3


def activation_figures(section: Mapping[str, Any], heading: str) -> list[Figure]:
    """By layer, beside controls, differences by layer, variance unexplained; by token for free text.

    Args:
        section: ``activations`` of ``analysis.json``.
        heading: what the figures are of.
    """
    views = {view["name"]: view for view in section["views"]}
    drawn = {name: view for name, view in views.items() if view["kind"] != "control"}
    if not drawn:
        return []
    shown = {**drawn, **{name: views[name] for name in (OTHER, MEAN) if name in views}}
    layers = section["layers"]
    found = (
        _layers(layers, shown, heading),
        _controls(layers, views, heading),
        _differences(section, heading),
        _unexplained(layers, shown, heading),
        _tokens(shown, drawn, heading),
    )
    return [figure for figure in found if figure is not None]


def _layers(layers: Sequence[int], shown: Mapping[str, Any], heading: str) -> Figure:
    plain = {name: view["asim_by_layer"] for name, view in shown.items()}
    centred = {n: view["centred_by_layer"] for n, view in shown.items() if "centred_by_layer" in view}
    styles = view_styles(shown)
    panels = [lines(layers, plain, styles, "asim to ICL", "as it is" if centred else "")]
    caption = (
        "Mean cosine between self-attention outputs and those of the base model with demonstrations, where "
        "the answer is; bands are 95% intervals over queries and seeds. The base model's line is what there "
        "is without any training."
    )
    if OTHER in shown:
        caption += " icl-other is ICL with other demonstrations: as near as the task alone brings one."
    if MEAN in shown:
        caption += (
            " icl-mean is one constant, the mean of ICL's activations over the training examples: what lies "
            "no higher need not have anything to do with the query."
        )
    if centred:
        panels.append(lines(layers, centred, view_styles(centred), "centred cosine", "mean taken off"))
        caption += " On the right that mean is taken off both sides, which leaves what differs by query."
    columns = {**plain, **{f"{name}, centred": part for name, part in centred.items()}}
    return Figure(
        "activations-layers",
        "Similarity of attention outputs to ICL by layer",
        heading,
        caption,
        tuple(panels),
        layer_table(
            "activations-layers",
            "asim to ICL by layer [95%]",
            layers,
            {name: cells(part) for name, part in columns.items()},
        ),
        columns=2,
    )


def _controls(layers: Sequence[int], views: Mapping[str, Any], heading: str) -> Figure | None:
    """A panel an adapter with controls of its own."""
    own: dict[str, dict[str, Any]] = {}
    for view in views.values():
        if view["kind"] == "control" and view["of"] in views:
            own.setdefault(view["of"], {})[view["control"]] = view["asim_by_layer"]
    if not own:
        return None
    styles = view_styles(name for name, view in views.items() if view["kind"] != "control")
    kinds = list(dict.fromkeys(kind for found in own.values() for kind in found))
    itself = {name: views[name]["asim_by_layer"] for name in own}
    limits = limits_of(part for name, found in own.items() for part in (itself[name], *found.values()))
    columns = {
        name: [cells(itself[name])]
        + [cells(found[kind]) if kind in found else [MISSING] * len(layers) for kind in kinds]
        for name, found in own.items()
    }
    told = "; ".join(_BROKEN[kind] for kind in kinds if kind in _BROKEN)
    twin = (
        " Where another seed's adapter is as near, it was not these very examples that brought it there."
        if "other seed" in kinds
        else ""
    )
    return Figure(
        "activations-controls",
        "Similarity to ICL beside controls",
        heading,
        f"Solid, in its colour: the trained model without demonstrations; {told}.{twin}",
        tuple(
            lines(
                layers,
                {name: itself[name], **found},
                {name: styles[name], **CONTROL_STYLES},
                "asim to ICL",
                name,
                unnamed={name},
                after=lambda axis: axis.set_ylim(*limits),
                width=3.6,
                height=3.1,
            )
            for name, found in own.items()
        ),
        numbers_table(
            "activations-controls",
            "asim to ICL by layer [95%]",
            ["view", "layer", "itself", *kinds],
            [
                [name, str(layer), *(column[i] for column in parts)]
                for name, parts in columns.items()
                for i, layer in enumerate(layers)
            ],
        ),
    )


def _differences(section: Mapping[str, Any], heading: str) -> Figure | None:
    pairs = {f"{pair['a']} − {pair['b']}": pair for pair in _chosen(section)}
    if not pairs:
        return None
    layers = section["layers"]
    styles = view_styles(view["name"] for view in section["views"] if view["kind"] != "control")
    limits = limits_of(pair["asim_by_layer"] for pair in pairs.values())
    overall = [f"{title}: {estimate(pair['asim'], signed=True)}" for title, pair in pairs.items()]
    return Figure(
        "activations-differences",
        "Differences in similarity to ICL by layer",
        heading,
        "Difference in asim, paired by query; bands are 95% intervals, and where one is wholly above 0 the "
        f"first of the two is nearer to ICL. Over all layers: {'; '.join(overall)}.",
        tuple(
            lines(
                layers,
                {title: pair["asim_by_layer"]},
                {title: styles[pair["a"]]},
                "difference in asim",
                title,
                rules={0: {"linestyle": "--"}},
                unnamed={title},
                after=lambda axis: axis.set_ylim(*limits),
                legend=False,
                width=3.6,
                height=3.1,
            )
            for title, pair in pairs.items()
        ),
        layer_table(
            "activations-differences",
            "Difference in asim by layer [95%]",
            layers,
            {title: cells(pair["asim_by_layer"], signed=True) for title, pair in pairs.items()},
        ),
    )


def _chosen(section: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The method against its rival first, then other pairs of adapters; else those with the base model."""
    kinds = {view["name"]: view["kind"] for view in section["views"]}

    def rank(pair: Mapping[str, Any]) -> int:
        recipes = {pair["a"].partition("@")[0], pair["b"].partition("@")[0]}
        return len({METHOD, RIVAL} - recipes)

    for other in ("adapter", "base"):
        found = [
            pair
            for pair in section["differences"]
            if kinds.get(pair["a"]) == "adapter" and kinds.get(pair["b"]) == other
        ]
        if found:
            return sorted(found, key=rank)[:_MAX_PAIRS]
    return []


def _unexplained(layers: Sequence[int], shown: Mapping[str, Any], heading: str) -> Figure:
    parts = {name: {"value": view["variance_unexplained_by_layer"]} for name, view in shown.items()}
    wide = _wide(part["value"] for part in parts.values())
    return Figure(
        "activations-unexplained",
        "Variance of ICL's activations that is not matched",
        heading,
        "Squared distance to ICL's attention outputs over their variance: 0 is a perfect match, and 1 "
        "(the thin line) is what their mean over the queries scores. Unlike the cosine it counts sizes too.",
        (
            lines(
                layers,
                parts,
                view_styles(shown),
                "variance unexplained",
                rules={1: {}},
                after=partial(plain_log, which="y") if wide else None,
            ),
        ),
        layer_table(
            "activations-unexplained",
            "Fraction of variance unexplained by layer",
            layers,
            {name: [number(value, ".3g") for value in part["value"]] for name, part in parts.items()},
        ),
    )


def _wide(parts: Iterable[Any]) -> bool:
    """Whether positive numbers span so much that they need a logarithmic axis."""
    values = np.concatenate([array(part) for part in parts])
    known = values[np.isfinite(values)]
    return bool(known.size and known.min() > 0 and known.max() / known.min() > _LOG_FROM)


def _tokens(shown: Mapping[str, Any], drawn: Mapping[str, Any], heading: str) -> Figure | None:
    longest = max(len(view["asim_by_token"]["value"]) for view in drawn.values())
    if longest < 2:
        return None
    values = {name: view["asim_by_token"]["value"][:longest] for name, view in shown.items()}
    count = max((view["asim_by_token"]["count"] for view in shown.values()), key=len)
    styles = view_styles(shown)
    if longest > _MARKED:
        styles = {name: {**style, "marker": None} for name, style in styles.items()}
    return Figure(
        "activations-tokens",
        "Similarity to ICL by token of the answer",
        heading,
        "Mean over layers and queries. Fewer answers reach the later tokens, as the table says.",
        (
            lines(
                (),
                {name: {"x": range(1, len(own) + 1), "value": own} for name, own in values.items()},
                styles,
                "asim to ICL",
                xlabel="token of the answer",
            ),
        ),
        layer_table(
            "activations-tokens",
            "asim to ICL by token",
            range(1, longest + 1),
            {
                "answers": [str(number_of) for number_of in count],
                **{
                    name: [*map(number, own), *[MISSING] * (longest - len(own))]
                    for name, own in values.items()
                },
            },
            first="token",
        ),
    )
