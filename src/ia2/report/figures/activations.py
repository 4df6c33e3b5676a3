"""Figures of conditions by layer: similarity to ICL (the paper's figure 2) and the logit lens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np

from ia2.report.figures.lines import MEAN, OTHER, Lines, array, line_figure, view_styles
from ia2.report.figures.style import Figure, plain_log
from ia2.report.verdict import METHOD, RIVAL
from ia2.utils.wording import estimate

Json = Mapping[str, Any]

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

# Measures of the lens: title and unit; the last is in the numbers only.
_LENS = {
    "agreement": ("agreement with ICL's answer", "share of queries"),
    "gold": ("accuracy", "share of queries"),
    "log_probability": ("log-probability of ICL's answer", "nats"),
    "divergence": ("divergence from ICL at that layer", "bits (0 is the same)"),
    "divergence_from_answer": ("divergence from ICL's output", ""),
}


def activation_figures(section: Json, heading: str) -> list[Figure]:
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
    found = (
        _layers(section, shown, heading),
        _controls(section, views, heading),
        _differences(section, views, heading),
        _unexplained(section, shown, heading),
        _tokens(shown, drawn, heading),
    )
    return [figure for figure in found if figure is not None]


def _styled(views: Mapping[str, Json], key: str) -> dict[str, Json]:
    styles = view_styles(views)
    return {name: {**view[key], "style": styles[name]} for name, view in views.items() if key in view}


def _layers(section: Json, shown: Mapping[str, Json], heading: str) -> Figure:
    centred = _styled(shown, "centred_by_layer")
    panels = [Lines("as it is" if centred else "", _styled(shown, "asim_by_layer"), "asim to ICL")]
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
        panels.append(Lines("mean taken off", centred, "centred cosine"))
        caption += " On the right that mean is taken off both sides, which leaves what differs by query."
    title = "Similarity of attention outputs to ICL by layer"
    return line_figure(
        *("activations-layers", title, heading, caption, section["layers"], panels),
        rows="panel" if centred else "",
        numbers="asim to ICL by layer [95%]",
        columns=2,
        width=5.0,
        height=3.8,
    )


def _controls(section: Json, views: Mapping[str, Json], heading: str) -> Figure | None:
    """A panel an adapter with controls of its own."""
    own: dict[str, dict[str, Json]] = {}
    styles = view_styles(name for name, view in views.items() if view["kind"] != "control")
    for view in views.values():
        if view["kind"] == "control" and view["of"] in views:
            line = {**view["asim_by_layer"], "style": styles[view["control"]]}
            own.setdefault(view["of"], {})[view["control"]] = line
    if not own:
        return None
    panels = []
    for name, controls in own.items():
        itself = {**views[name]["asim_by_layer"], "style": styles[name], "legend": False}
        panels.append(Lines(name, {"itself": itself, **controls}, "asim to ICL"))
    kinds = dict.fromkeys(kind for controls in own.values() for kind in controls)
    caption = "Solid, in its colour: the trained model without demonstrations; "
    caption += "; ".join(_BROKEN[kind] for kind in kinds if kind in _BROKEN) + "."
    if "other seed" in kinds:
        caption += (
            " Where another seed's adapter is as near, it was not these very examples that brought it there."
        )
    title = "Similarity to ICL beside controls"
    return line_figure(
        *("activations-controls", title, heading, caption, section["layers"], panels),
        rows="condition",
        numbers="asim to ICL by layer [95%]",
        one_scale=True,
    )


def _differences(section: Json, views: Mapping[str, Json], heading: str) -> Figure | None:
    pairs = {f"{pair['a']} − {pair['b']}": pair for pair in _chosen(section, views)}
    if not pairs:
        return None
    styles = view_styles(name for name, view in views.items() if view["kind"] != "control")
    overall = [f"{title}: {estimate(pair['asim'], signed=True)}" for title, pair in pairs.items()]
    panels = [
        Lines(
            title,
            {"difference": {**pair["asim_by_layer"], "style": styles[pair["a"]], "legend": False}},
            "difference in asim",
            {0: {"linestyle": "--"}},
        )
        for title, pair in pairs.items()
    ]
    return line_figure(
        "activations-differences",
        "Differences in similarity to ICL by layer",
        heading,
        "Difference in asim, paired by query; bands are 95% intervals, and where one is wholly above 0 the "
        f"first of the two is nearer to ICL. Over all layers: {'; '.join(overall)}.",
        section["layers"],
        panels,
        rows="pair",
        numbers="Difference in asim by layer [95%]",
        signed=True,
        one_scale=True,
    )


def _chosen(section: Json, views: Mapping[str, Json]) -> list[Json]:
    """The method against its rival first, then other pairs of adapters; else those with the base model."""

    def rank(pair: Json) -> int:
        return len({METHOD, RIVAL} - {pair["a"].partition("@")[0], pair["b"].partition("@")[0]})

    for other in ("adapter", "base"):
        found = [
            pair
            for pair in section["differences"]
            if (views[pair["a"]]["kind"], views[pair["b"]]["kind"]) == ("adapter", other)
        ]
        if found:
            return sorted(found, key=rank)[:_MAX_PAIRS]
    return []


def _unexplained(section: Json, shown: Mapping[str, Json], heading: str) -> Figure:
    styles, key = view_styles(shown), "variance_unexplained_by_layer"
    series = {name: {"value": view[key], "style": styles[name]} for name, view in shown.items()}
    finish = partial(plain_log, which="y") if _wide(view[key] for view in shown.values()) else None
    return line_figure(
        "activations-unexplained",
        "Variance of ICL's activations that is not matched",
        heading,
        "Squared distance to ICL's attention outputs over their variance: 0 is a perfect match, and 1 "
        "(the thin line) is what their mean over the queries scores. Unlike the cosine it counts sizes too.",
        section["layers"],
        [Lines("", series, "variance unexplained", {1: {}}, finish)],
        numbers="Fraction of variance unexplained by layer",
        form=".3g",
        width=5.0,
        height=3.8,
    )


def _wide(parts: Iterable[Any]) -> bool:
    """Whether positive numbers span so much that they need a logarithmic axis."""
    values = np.concatenate([array(part) for part in parts])
    known = values[np.isfinite(values)]
    return bool(known.size and known.min() > 0 and known.max() / known.min() > _LOG_FROM)


def _tokens(shown: Mapping[str, Json], drawn: Mapping[str, Json], heading: str) -> Figure | None:
    longest = max(len(view["asim_by_token"]["value"]) for view in drawn.values())
    if longest < 2:
        return None
    x, styles = range(1, longest + 1), view_styles(shown)
    count = max((view["asim_by_token"]["count"] for view in shown.values()), key=len)
    series: dict[str, Json] = {"answers": {"value": count, "form": ".0f", "hidden": True}}
    for name, view in shown.items():
        value = view["asim_by_token"]["value"][:longest]
        style = {**styles[name], **({"marker": None} if longest > _MARKED else {})}
        series[name] = {"x": x[: len(value)], "value": value, "style": style}
    return line_figure(
        "activations-tokens",
        "Similarity to ICL by token of the answer",
        heading,
        "Mean over layers and queries. Fewer answers reach the later tokens, as the table says.",
        x,
        [Lines("", series, "asim to ICL")],
        xlabel="token of the answer",
        width=5.0,
        height=3.8,
    )


def lens_figures(section: Json, heading: str) -> list[Figure]:
    """Agreement with ICL, accuracy, log-probability and divergence by layer, through the logit lens.

    Args:
        section: ``lens`` of ``analysis.json``.
        heading: what the figures are of.
    """
    # the controls of adapters would hide the models of interest
    views = {
        name: view
        for view in section["views"]
        if (name := view["name"]) == OTHER
        or not (name.endswith(("+demos", "~seed")) or name.startswith("icl-"))
    }
    if not views:
        return []
    panels = []
    for measure, (title, unit) in _LENS.items():
        series = _styled(views, f"{measure}_by_layer")
        if not unit or len(series) < len(views):
            series = {name: {**line, "hidden": True} for name, line in series.items()}
        chance = {section["chance"][measure]: {"linestyle": "--"}} if measure in section["chance"] else {}
        rings = partial(_rings, section, views) if measure == "agreement" else None
        if series:
            panels.append(Lines(title, series, unit, chance, rings))
    over = "the label set" if section["over"] == "labels" else "the vocabulary"
    shows = [
        f"{name} {'nowhere' if view['shows_at'] is None else view['shows_at']}"
        for name, view in views.items()
    ]
    caption = (
        "What the model would answer if its residual stream went to its last norm and unembedding after each "
        f"layer. Log-probabilities are over {over}; bands are 95% intervals over queries and seeds. A ring "
        "marks the first layer at which the task shows: agreement above chance and above the base model's, "
        f"there and at the next two layers ({', '.join(shows)}). "
    )
    if section["chance"]:
        caption += "The dashed grey line is what one label for every query reaches at best. "
    caption += "Early layers write in another basis than the last: what the lens does not show may be there."
    title = "Logit lens: where the task shows"
    return [
        line_figure(
            *("lens", title, heading, caption, section["layers"], panels),
            rows="measure",
            numbers="Logit lens by layer [95%]",
            columns=2,
            width=4.2,
            height=3.2,
        )
    ]


def _rings(section: Json, views: Mapping[str, Json], axis: Any) -> None:
    styles = view_styles(views)
    ring = {"marker": "o", "markersize": 10, "markerfacecolor": "none", "linestyle": "none"}
    for name, view in views.items():
        if view["shows_at"] is not None:
            height = array(view["agreement_by_layer"]["value"])[section["layers"].index(view["shows_at"])]
            axis.plot(view["shows_at"], height, color=styles[name]["color"], **ring)
