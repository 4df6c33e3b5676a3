"""Figures of conditions by layer: similarity to ICL (the paper's figure 2) and the logit lens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np

from ia2.config.recipes import METHOD, PLAIN
from ia2.report.figures.lines import MEAN, OTHER, Lines, array, line_figure, view_styles
from ia2.report.figures.style import Figure, plain_log
from ia2.utils.wording import estimate

Json = Mapping[str, Any]

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


def activation_figures(section: Json) -> list[Figure]:
    """By layer, beside controls, differences by layer, variance unexplained; by token for free text."""
    views = {view["name"]: view for view in section["views"]}
    drawn = {name: view for name, view in views.items() if view["kind"] != "control"}
    if not drawn:
        return []
    shown = {**drawn, **{name: views[name] for name in (OTHER, MEAN) if name in views}}
    found = [_layers(section, shown)]
    if any(view["kind"] == "control" and view["of"] in views for view in views.values()):
        found.append(_controls(section, views, drawn))
    if pairs := _chosen(section, views):
        found.append(_differences(section, pairs, drawn))
    found.append(_unexplained(section, shown))
    longest = max(len(view["asim_by_token"]["value"]) for view in drawn.values())
    return [*found, _tokens(shown, longest)] if longest > 1 else found


def _styled(views: Mapping[str, Json], key: str) -> dict[str, Json]:
    styles = view_styles(views)
    return {name: {**view[key], "style": styles[name]} for name, view in views.items() if key in view}


def _layers(section: Json, shown: Mapping[str, Json]) -> Figure:
    centred = _styled(shown, "centred_by_layer")
    panels = [Lines("as it is" if centred else "", _styled(shown, "asim_by_layer"), "asim to ICL")]
    parts = ["caption", *(name for name in (OTHER, MEAN) if name in shown)]
    if centred:
        panels.append(Lines("mean taken off", centred, "centred cosine"))
        parts.append("centred")
    rows = "panel" if centred else ""
    return line_figure("activations-layers", section["layers"], panels, rows=rows, parts=parts, columns=2)


def _controls(section: Json, views: Mapping[str, Json], drawn: Iterable[str]) -> Figure:
    """A panel an adapter with controls of its own."""
    styles = view_styles(drawn)
    own: dict[str, dict[str, Json]] = {}
    for view in views.values():
        name, kind = view["of"], view["control"]
        if view["kind"] == "control" and name in views:
            itself = {**views[name]["asim_by_layer"], "style": styles[name], "legend": False}
            lines = own.setdefault(name, {"itself": itself})
            lines[kind] = {**view["asim_by_layer"], "style": styles[kind]}
    kinds = dict.fromkeys(kind for lines in own.values() for kind in lines if kind != "itself")
    return line_figure(
        "activations-controls",
        section["layers"],
        [Lines(name, lines, "asim to ICL") for name, lines in own.items()],
        rows="condition",
        one_scale=True,
        size=(3.6, 3.1),
        parts=["caption", *kinds],
    )


def _differences(section: Json, pairs: Iterable[Json], drawn: Iterable[str]) -> Figure:
    styles, panels, overall = view_styles(drawn), [], []
    for pair in pairs:
        title = f"{pair['a']} − {pair['b']}"
        line = {**pair["asim_by_layer"], "style": styles[pair["a"]], "legend": False}
        panels.append(Lines(title, {"difference": line}, "difference in asim", {0: {"linestyle": "--"}}))
        overall.append(f"{title}: {estimate(pair['asim'], signed=True)}")
    return line_figure(
        "activations-differences",
        section["layers"],
        panels,
        rows="pair",
        signed=True,
        one_scale=True,
        size=(3.6, 3.1),
        overall="; ".join(overall),
    )


def _chosen(section: Json, views: Mapping[str, Json]) -> list[Json]:
    """The method against its rival first, then other pairs of adapters; else those with the base model."""

    def rank(pair: Json) -> int:
        return len({METHOD, PLAIN} - {pair["a"].partition("@")[0], pair["b"].partition("@")[0]})

    for other in ("adapter", "base"):
        kinds = ("adapter", other)
        found = [p for p in section["differences"] if (views[p["a"]]["kind"], views[p["b"]]["kind"]) == kinds]
        if found:
            return sorted(found, key=rank)[:_MAX_PAIRS]
    return []


def _unexplained(section: Json, shown: Mapping[str, Json]) -> Figure:
    styles, key = view_styles(shown), "variance_unexplained_by_layer"
    series = {name: {"value": view[key], "style": styles[name]} for name, view in shown.items()}
    values = np.concatenate([array(view[key]) for view in shown.values()])
    known = values[np.isfinite(values)]
    wide = bool(known.size and known.min() > 0 and known.max() / known.min() > _LOG_FROM)
    finish = partial(plain_log, which="y") if wide else None
    panel = Lines("", series, "variance unexplained", {1: {}}, finish)
    return line_figure("activations-unexplained", section["layers"], [panel], form=".3g")


def _tokens(shown: Mapping[str, Json], longest: int) -> Figure:
    x, styles = range(1, longest + 1), view_styles(shown)
    count = max((view["asim_by_token"]["count"] for view in shown.values()), key=len)
    series: dict[str, Json] = {"answers": {"value": count, "form": ".0f", "hidden": True}}
    for name, view in shown.items():
        value = view["asim_by_token"]["value"][:longest]
        style = {**styles[name], **({"marker": None} if longest > _MARKED else {})}
        series[name] = {"x": x[: len(value)], "value": value, "style": style}
    panel = Lines("", series, "asim to ICL")
    return line_figure("activations-tokens", x, [panel], xlabel="token of the answer")


def lens_figures(section: Json) -> list[Figure]:
    """Agreement with ICL, accuracy, log-probability and divergence by layer, through the logit lens."""
    views = {view["name"]: view for view in section["views"] if _is_of_interest(view["name"])}
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
    shows = [f"{n} {'nowhere' if v['shows_at'] is None else v['shows_at']}" for n, v in views.items()]
    figure = line_figure(
        "lens",
        section["layers"],
        panels,
        rows="measure",
        size=(4.2, 3.2),
        columns=2,
        parts=["caption", *(["chance"] if section["chance"] else [])],
        over="the label set" if section["over"] == "labels" else "the vocabulary",
        shows=", ".join(shows),
    )
    return [figure]


def _is_of_interest(name: str) -> bool:
    """The controls of adapters would hide the models."""
    return name == OTHER or not (name.endswith(("+demos", "~seed")) or name.startswith("icl-"))


def _rings(section: Json, views: Mapping[str, Json], axis: Any) -> None:
    styles = view_styles(views)
    ring = {"marker": "o", "markersize": 10, "markerfacecolor": "none", "linestyle": "none"}
    for name, view in views.items():
        if view["shows_at"] is not None:
            height = array(view["agreement_by_layer"]["value"])[section["layers"].index(view["shows_at"])]
            axis.plot(view["shows_at"], height, color=styles[name]["color"], **ring)
