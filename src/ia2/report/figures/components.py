"""Figures of parts of models: updates of weights (the paper's figure 4), heads, neurons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ia2.report.figures.lines import OTHER, Lines, array, from_zero, line_figure, number
from ia2.report.figures.marks import head_map, violins
from ia2.report.figures.style import COLOURS, FAINT, INK, Figure, arm_styles, make_figure
from ia2.utils.wording import estimate

Json = Mapping[str, Any]

# Heads in the numbers of a map, and how their measures are written.
_LISTED = 10
_HEAD_FORMS = {
    "share": ("share_of_model", ".1%"),
    "d_z": ("effect", "+.2f"),
    "q": ("q", ".2g"),
    "distance": ("distance", ".3g"),
    "cosine": ("cosine", ".3f"),
}
_OVERLAPS = {"b": "by B's left singular vectors", "weighted": "by ΔW's, weighted by strength"}
_MEASURES = {
    "b": "B",
    "left": "ΔW, left",
    "right": "ΔW, right",
    "weighted": "ΔW, weighted",
    "cosine": "ΔW, cosine",
}
_REGIONS = {
    "first": "to the first token",
    "demonstrations": "to the demonstrations",
    "query": "to the query and the answer",
}


# ------------------------------------------------------------------------------------------- weights


def weight_figures(section: Json) -> list[Figure]:
    """Overlap of updates, by module and by layer, and their size."""
    pairs = {
        pair["label"] if pair["kind"] == "recipes" else f"{pair['label']}, two seeds": pair
        for pair in sorted(section["pairs"], key=lambda pair: str(pair["kind"]))
        if _is_known(pair["overlap"]["b"]["value"])
    }
    return [*_overlap(pairs), *_overlap_by_layer(pairs), *_updates(section)]


def _is_known(value: Any) -> bool:
    return value is not None and value == value


def _of_seeds(entry: Json) -> Json:
    return entry if entry["n"] > 1 else {**entry, "low": None, "high": None}


def _overlap(pairs: Mapping[str, Json]) -> Iterator[Figure]:
    colours = {label: COLOURS[0 if pair["kind"] == "recipes" else 1] for label, pair in pairs.items()}
    panels = [
        violins(
            {label: pair["by_module"][measure] for label, pair in pairs.items()},
            {label: pair["random"][measure] for label, pair in pairs.items()},
            colours,
            title,
            "overlap",
        )
        for measure, title in _OVERLAPS.items()
    ]
    rows = [
        {
            "pair": label,
            **{title: estimate(_of_seeds(pair["overlap"][of])) for of, title in _MEASURES.items()},
            "random (B)": f"{pair['random']['b']:.3f}",
            "angles in degrees": f"{pair['angles'][0]:.0f}–{pair['angles'][-1]:.0f}",
        }
        for label, pair in pairs.items()
    ]
    if pairs:
        yield make_figure("overlap", panels, rows, columns=2)


def _overlap_by_layer(pairs: Mapping[str, Json]) -> Iterator[Figure]:
    """A line a pair of recipes; none without layers."""
    recipes = [label for label, pair in pairs.items() if pair["kind"] == "recipes"]
    layers = pairs[recipes[0]]["by_layer"]["layers"] if recipes else []
    if not layers:
        return
    seeds = {"color": FAINT, "linestyle": ":"}
    styles = {**dict.fromkeys(pairs, seeds), **arm_styles(recipes)}
    panels = []
    for measure, title in _OVERLAPS.items():
        random = {pairs[recipes[0]]["random"][measure]: {"color": INK, "linewidth": 1, "linestyle": "--"}}
        series = {
            label: {
                "value": pair["by_layer"][measure],
                "style": styles[label],
                "legend": label in recipes,
            }
            for label, pair in pairs.items()
        }
        panels.append(Lines(title, series, "overlap", random, from_zero))
    yield line_figure("overlap-layers", layers, panels, rows="measure", size=(4.6, 3.4), columns=2)


def _updates(section: Json) -> Iterator[Figure]:
    """Norm and effective rank of the updates by layer; none without any."""
    arms = {
        name: entry["by_layer"] for name, entry in section["updates"].items() if entry["by_layer"]["layers"]
    }
    relative = all(_is_known(e["value"]) for of in arms.values() for e in of["relative_norm"][:1])
    titles = {"relative_norm": "‖ΔW‖ / ‖W‖"} if relative else {"norm": "‖ΔW‖"}
    styles = arm_styles(list(arms))
    panels = []
    for measure, title in {**titles, "effective_rank": "effective rank"}.items():
        series = {}
        for name, of in arms.items():
            entries = [_of_seeds(entry) for entry in of[measure]]
            ends = {end: [entry[end] for entry in entries] for end in ("value", "low", "high")}
            series[name] = {"x": of["layers"], **ends, "style": styles[name]}
        panels.append(Lines(title, series, finish=from_zero))
    layers = sorted({layer for of in arms.values() for layer in of["layers"]})
    words = ", relative to that of the weights they change" if relative else ""
    options: dict[str, Any] = {"rows": "measure", "size": (4.6, 3.4), "columns": 2}
    if arms:
        yield line_figure("updates", layers, panels, **options, relative=words)


# ------------------------------------------------------------------------------------ heads, neurons


def head_figures(section: Json) -> list[Figure]:
    """Layer × head maps, and where attention goes if that was measured."""
    found = [_head_maps(section)] if section.get("views") else []
    return [*found, _attention(section)] if section.get("attention", {}).get("views") else found


def neuron_figures(section: Json) -> list[Figure]:
    """How many neurons differ by layer, and how much of the difference is one common shift."""
    found = []
    if of := section.get("neurons"):
        shares = {name: array(view["significant"]) / of["width"] for name, view in of["views"].items()}
        panel = Lines("", _own_and_hidden(shares), "share of neurons that differ", {0: {"linewidth": 0.6}})
        texts = {"level": of["level"], "width": of["width"]}
        found.append(line_figure("neurons", of["layers"], [panel], form=".1%", size=(5.0, 3.6), **texts))
    if of := section.get("residual"):
        shares = {name: array(view["common_shift"]) for name, view in of["views"].items()}
        panel = Lines("", _own_and_hidden(shares), "common share", {0: {"linewidth": 0.6}})
        found.append(line_figure("common-shift", of["layers"], [panel], size=(5.0, 3.6)))
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


def _head_maps(section: Json) -> Figure:
    views = {name: view for name, view in section["views"].items() if _is_drawn(name)}
    # the control itself has no control; beside views that have one its map would be of another test
    test = "control" if "control" in {view["test"] for view in section["views"].values()} else "direction"
    mapped = {name: view for name, view in views.items() if view["test"] == test}
    effects = np.concatenate([array(view["effect"]).ravel() for view in mapped.values()])
    known = np.abs(effects[np.isfinite(effects)])
    # a few extreme heads must not wash out the others
    limit = max(float(np.quantile(known, 0.98)), 0.1) if known.size else 1.0
    panels = []
    for name, view in mapped.items():
        certain = np.maximum(array(view["further"]), array(view["closer"])) >= len(view["n"])
        further, closer = view["heads_further"], view["heads_closer"]
        title = f"{name}: {further} " + (f"further, {closer} nearer" if test == "control" else "shifted")
        panels.append(head_map(array(view["effect"]), limit, certain, section["layers"], "d_z", title))
    rows = [
        {
            "view": name,
            "head": f"layer {head['layer']}, head {head['head']}",
            **{title: number(head[key], form) for title, (key, form) in _HEAD_FORMS.items()},
            "control": number(_control_of(view, section, head), ".3g"),
        }
        for name, view in views.items()
        for head in view["top"][:_LISTED]
    ]
    return make_figure("heads", panels, rows, parts=[test, "caption"], level=section["level"])


def _control_of(view: Json, section: Json, head: Json) -> Any:
    return view["control"][section["layers"].index(head["layer"])][head["head"]] if view["control"] else None


def _attention(section: Json) -> Figure:
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
    return line_figure("attention", section["layers"], panels, rows="attention", form=".1%", size=(3.6, 3.1))


def _whole_range(axis: Any) -> None:
    axis.set_ylim(-0.03, 1.03)
