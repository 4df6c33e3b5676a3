"""Figures of the similarity to ICL inside: by layer (the paper's figure 2), beside controls, and by token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ia2.report.layer_lines import (
    CONTROL_STYLES,
    MEAN,
    OTHER,
    array,
    draw_line,
    layer_axis,
    limits_of,
    number,
    view_styles,
    with_interval,
)
from ia2.report.style import FAINT, Figure, Panel, numbers_table, plain_log
from ia2.report.verdict import METHOD, RIVAL
from ia2.wording import MISSING, estimate

_BROKEN = {"with demonstrations": "dashed", "other seed": "dash-dotted"}

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
    found = (
        _layers_figure(section["layers"], views, drawn, heading),
        _controls_figure(section["layers"], views, heading),
        _differences_figure(section, heading),
        _unexplained_figure(section["layers"], views, drawn, heading),
        _tokens_figure(views, drawn, heading),
    )
    return [figure for figure in found if figure is not None]


# ------------------------------------------------------------------------------------------ by layer


def _layers_figure(
    layers: Sequence[int], views: Mapping[str, Any], drawn: Mapping[str, Any], heading: str
) -> Figure:
    shown = {**drawn, **{name: views[name] for name in (OTHER, MEAN) if name in views}}
    centred = {name: view for name, view in shown.items() if "centred_by_layer" in view}
    panels = [_similar(layers, shown, "asim_by_layer", "asim to ICL", "as it is" if centred else "")]
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
        panels.append(_similar(layers, centred, "centred_by_layer", "centred cosine", "mean taken off"))
        caption += " On the right that mean is taken off both sides, which leaves what differs by query."
    columns = [*shown, *(f"{name}, centred" for name in centred)]
    parts = [view["asim_by_layer"] for view in shown.values()]
    parts += [view["centred_by_layer"] for view in centred.values()]
    rows = [
        [str(layer), *(with_interval(part, place) for part in parts)] for place, layer in enumerate(layers)
    ]
    return Figure(
        "activations-layers",
        "Similarity of attention outputs to ICL by layer",
        heading,
        caption,
        tuple(panels),
        numbers_table("activations-layers", "asim to ICL by layer [95%]", ["layer", *columns], rows),
        columns=2,
    )


def _similar(layers: Sequence[int], views: Mapping[str, Any], measure: str, ylabel: str, title: str) -> Panel:
    styles = view_styles(views)

    def draw(axis: Any) -> None:
        for name, view in views.items():
            draw_line(
                axis,
                layers,
                view[measure],
                name,
                **styles[name],
            )
        layer_axis(axis, ylabel, title)

    return Panel(draw, legend=True, width=5.0, height=3.8)


# ------------------------------------------------------------------------------------------ controls


def _controls_figure(layers: Sequence[int], views: Mapping[str, Any], heading: str) -> Figure | None:
    """A panel an adapter with controls of its own."""
    own: dict[str, dict[str, Any]] = {}
    for view in views.values():
        if view["kind"] == "control" and view["of"] in views:
            own.setdefault(view["of"], {})[view["control"]] = view
    if not own:
        return None
    styles = view_styles(name for name, view in views.items() if view["kind"] != "control")
    kinds = list(dict.fromkeys(kind for found in own.values() for kind in found))
    rows = [
        [name, str(layer), with_interval(views[name]["asim_by_layer"], place)]
        + [with_interval(found[k]["asim_by_layer"], place) if k in found else MISSING for k in kinds]
        for name, found in own.items()
        for place, layer in enumerate(layers)
    ]
    says = {
        "with demonstrations": "the trained model that is given the demonstrations too",
        "other seed": "the same recipe with another seed's examples, looked at with these",
    }
    limits = limits_of(
        view["asim_by_layer"] for n, found in own.items() for view in (views[n], *found.values())
    )
    lines = "; ".join(f"{_BROKEN[kind]}, {says[kind]}" for kind in kinds if kind in says)
    twin = (
        " Where another seed's adapter is as near, it was not these very examples that brought it there."
        if "other seed" in kinds
        else ""
    )
    return Figure(
        "activations-controls",
        "Similarity to ICL beside controls",
        heading,
        f"Solid, in its colour: the trained model without demonstrations; {lines}.{twin}",
        tuple(
            Panel(_beside(layers, views[name], own[name], styles[name], limits), legend=True, width=3.6)
            for name in own
        ),
        numbers_table(
            "activations-controls",
            "asim to ICL by layer [95%]",
            ["view", "layer", "itself", *kinds],
            rows,
        ),
    )


def _beside(
    layers: Sequence[int],
    view: Mapping[str, Any],
    controls: Mapping[str, Any],
    style: Mapping[str, Any],
    limits: tuple[float, float],
) -> Callable[[Any], None]:
    def draw(axis: Any) -> None:
        draw_line(axis, layers, view["asim_by_layer"], "", **style)
        for kind, control in controls.items():
            draw_line(axis, layers, control["asim_by_layer"], kind, **CONTROL_STYLES[kind])
        axis.set_ylim(*limits)
        layer_axis(axis, "asim to ICL", view["name"])

    return draw


# --------------------------------------------------------------------------------------- differences


def _differences_figure(section: Mapping[str, Any], heading: str) -> Figure | None:
    pairs = _chosen(section)
    if not pairs:
        return None
    layers = section["layers"]
    styles = view_styles(view["name"] for view in section["views"] if view["kind"] != "control")
    limits = limits_of(pair["asim_by_layer"] for pair in pairs)
    titles = [f"{pair['a']} − {pair['b']}" for pair in pairs]
    rows = [
        [str(layer), *(with_interval(pair["asim_by_layer"], place, signed=True) for pair in pairs)]
        for place, layer in enumerate(layers)
    ]
    overall = [f"{t}: {estimate(p['asim'], signed=True)}"
               for t, p in zip(titles, pairs, strict=True)]  # fmt: skip
    return Figure(
        "activations-differences",
        "Differences in similarity to ICL by layer",
        heading,
        "Difference in asim, paired by query; bands are 95% intervals, and where one is wholly above 0 the "
        f"first of the two is nearer to ICL. Over all layers: {'; '.join(overall)}.",
        tuple(
            Panel(_difference(layers, p, t, styles[p["a"]], limits))
            for p, t in zip(pairs, titles, strict=True)
        ),
        numbers_table(
            "activations-differences", "Difference in asim by layer [95%]", ["layer", *titles], rows
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


def _difference(
    layers: Sequence[int],
    pair: Mapping[str, Any],
    title: str,
    style: Mapping[str, Any],
    limits: tuple[float, float],
) -> Callable[[Any], None]:
    def draw(axis: Any) -> None:
        axis.axhline(0, color=FAINT, linewidth=0.8, linestyle="--")
        draw_line(axis, layers, pair["asim_by_layer"], "", **style)
        axis.set_ylim(*limits)
        layer_axis(axis, "difference in asim", title)

    return draw


# -------------------------------------------------------------------------------- variance unexplained


def _unexplained_figure(
    layers: Sequence[int], views: Mapping[str, Any], drawn: Mapping[str, Any], heading: str
) -> Figure:
    shown = {**drawn, **{name: views[name] for name in (OTHER, MEAN) if name in views}}
    measure = "variance_unexplained_by_layer"
    rows = [
        [str(layer), *(number(view[measure][place], ".3g") for view in shown.values())]
        for place, layer in enumerate(layers)
    ]
    styles = view_styles(drawn)

    def draw(axis: Any) -> None:
        # a fraction of 1: the mean of ICL over these queries
        axis.axhline(1, color=FAINT, linewidth=0.8)
        for name, view in shown.items():
            draw_line(axis, layers, {"value": view[measure]}, name, **styles[name])
        if _wide(view[measure] for view in shown.values()):
            plain_log(axis, "y")
        layer_axis(axis, "variance unexplained")

    return Figure(
        "activations-unexplained",
        "Variance of ICL's activations that is not matched",
        heading,
        "Squared distance to ICL's attention outputs over their variance: 0 is a perfect match, and 1 "
        "(the thin line) is what their mean over the queries scores. Unlike the cosine it counts sizes too.",
        (Panel(draw, legend=True, width=5.0, height=3.8),),
        numbers_table(
            "activations-unexplained", "Fraction of variance unexplained by layer", ["layer", *shown], rows
        ),
    )


def _wide(parts: Iterable[Any]) -> bool:
    """Whether positive numbers span so much that they need a logarithmic axis."""
    values = np.concatenate([array(part) for part in parts])
    known = values[np.isfinite(values)]
    return bool(known.size and known.min() > 0 and known.max() / known.min() > _LOG_FROM)


# ------------------------------------------------------------------------------------------ by token


def _tokens_figure(views: Mapping[str, Any], drawn: Mapping[str, Any], heading: str) -> Figure | None:
    longest = max(len(view["asim_by_token"]["value"]) for view in drawn.values())
    if longest < 2:
        return None
    shown = {**drawn, **{name: views[name] for name in (OTHER, MEAN) if name in views}}
    styles = view_styles(drawn)
    count = max((view["asim_by_token"]["count"] for view in shown.values()), key=len)
    rows = [
        [str(place + 1), str(count[place])]
        + [number(_at(view["asim_by_token"]["value"], place)) for view in shown.values()]
        for place in range(longest)
    ]

    def draw(axis: Any) -> None:
        for name, view in shown.items():
            values = view["asim_by_token"]["value"]
            style = styles[name] if longest <= _MARKED else {**styles[name], "marker": None}
            draw_line(axis, range(1, len(values) + 1), {"value": values}, name, **style)
        layer_axis(axis, "asim to ICL")
        axis.set_xlabel("token of the answer")

    return Figure(
        "activations-tokens",
        "Similarity to ICL by token of the answer",
        heading,
        "Mean over layers and queries. Fewer answers reach the later tokens, as the table says.",
        (Panel(draw, legend=True, width=5.0, height=3.8),),
        numbers_table("activations-tokens", "asim to ICL by token", ["token", "answers", *shown], rows),
    )


def _at(values: Sequence[Any], place: int) -> Any:
    return values[place] if place < len(values) else None
