"""Figures of the causal check: what one layer or head recovers of ICL, and what it breaks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ia2.report.figures.lines import Lines, array, line_figure, number
from ia2.report.figures.marks import head_map
from ia2.report.figures.style import COLOURS, Figure, Panel, make_figure
from ia2.utils.wording import estimate

Json = Mapping[str, Any]

LEVEL = 0.05
# Of the difference between the two runs: what counts as a change (ia2.analysis.sections.causal).
MIN_FRACTION = 0.02
# Heads in the numbers of a map.
_LISTED = 10

# Direction → what a fraction is called, the verb, and the ending of the figures' names.
_DIRECTIONS = {"targets": ("recovered", "recovers", ""), "reverse": ("broken", "breaks", "-reverse")}

# What is patched → name and style; those with a control behind a slash.
_PATCHED: dict[str, tuple[str, dict[str, str]]] = {
    "layers": ("attention output", {"color": COLOURS[0], "marker": "o"}),
    "layers/other": ("of another query, ICL", {"color": COLOURS[0], "linestyle": "--"}),
    "layers/own": ("of another query, own run", {"color": COLOURS[0], "linestyle": ":"}),
    "neurons": ("MLP", {"color": COLOURS[1], "marker": "s"}),
    "residual": ("residual stream", {"color": COLOURS[2], "marker": "^"}),
}


def causal_figures(section: Json) -> list[Figure]:
    """Layer × head maps and lines by layer, for ICL into each target and the reverse."""
    found = []
    for direction, (fraction, verb, ending) in _DIRECTIONS.items():
        targets, layers = section.get(direction) or {}, section["layers"]
        values = {
            "verb": verb,
            "fraction": fraction,
            "queries": section["queries"],
            "trials": section["trials"],
        }
        texts: dict[str, Any] = {"parts": [direction, "caption"], **values}
        mapped = {name: target for name, target in targets.items() if "heads" in target}
        if mapped:
            panels, rows = _maps(mapped, layers, fraction), _rows(mapped, layers, fraction)
            texts |= {"level": LEVEL, "min_fraction": MIN_FRACTION}
            found.append(make_figure(f"causal-heads{ending}", panels, rows, text="causal-heads", **texts))
        if any("layers" in target for target in targets.values()):
            lines = [_lines(name, target, fraction) for name, target in targets.items()]
            texts |= {"text": "causal-layers", "rows": "model", "size": (4.2, 3.4), "columns": 2}
            found.append(line_figure(f"causal-layers{ending}", layers, lines, **texts))
    return found


def _shown_keys(target: Json, fraction: str) -> tuple[str, str, str]:
    """Value and ends that are shown: there is no fraction where two runs hardly differ, but the change."""
    if np.isfinite(array(target["all"][fraction])).all():
        return fraction, "low", "high"
    return "change", "change_low", "change_high"


def _axis_label(key: str) -> str:
    return "change of log p, nats" if key == "change" else f"{key} fraction"


def _interval(values: Json, place: tuple[int, ...], keys: Sequence[str]) -> str:
    value, low, high = (float(array(values[key])[place]) for key in keys)
    return estimate({"value": value, "low": low, "high": high})


def _maps(targets: Mapping[str, Json], layers: Sequence[int], fraction: str) -> Iterator[Panel]:
    """One scale for the fractions of all targets."""
    fractions = np.concatenate([array(target["heads"][fraction]).ravel() for target in targets.values()])
    for name, target in targets.items():
        key, _, _ = _shown_keys(target, fraction)
        values = array(target["heads"][key])
        scale = np.abs(values.ravel() if key == "change" else fractions)
        limit = max(float(np.nanmax(scale, initial=0.0)), 0.05)
        certain = array(target["heads"]["q"]) < LEVEL
        title = f"{name}: {int(certain.sum())} of {values.size} heads marked"
        yield head_map(values, limit, certain, layers, _axis_label(key), title)


def _rows(targets: Mapping[str, Json], layers: Sequence[int], fraction: str) -> Iterator[dict[str, str]]:
    for name, target in targets.items():
        heads, other = target["heads"], target["control"].get("other", {}).get("heads")
        change = array(heads["change"])
        for flat in np.argsort(-np.abs(change), axis=None)[:_LISTED]:
            place = layer, head = tuple(int(i) for i in np.unravel_index(flat, change.shape))
            yield {
                "model": name,
                "ICL − model, log p": f"{estimate(target['gap'], signed=True)} nats",
                "head": f"layer {layers[layer]}, head {head}",
                f"{fraction} [95%]": _interval(heads, place, (fraction, "low", "high")),
                "change [95%], nats": _interval(heads, place, ("change", "change_low", "change_high")),
                "q": number(heads["q"][layer][head], ".2g"),
                "another query": number(None if other is None else other[fraction][layer][head]),
            }


def _lines(name: str, target: Json, fraction: str) -> Lines:
    keys = key, low, high = _shown_keys(target, fraction)
    series: dict[str, Any] = {}
    reach = [-0.6, 1.1]
    for kind, (title, style) in _PATCHED.items():
        group, _, control = kind.partition("/")
        parts = target["control"].get(control, {}) if control else target
        if (values := parts.get(group)) is None:
            continue
        ends = {"value": values[key], "low": values[low], "high": values[high]}
        series[title] = {**ends, "style": style, "band": control != "own"}
        if group == "layers":
            series[title]["whole"] = _interval(parts["all"], (), keys)
        if not control:  # a control may be far away: another answer than this one
            reach += [float(np.nanmin(array(values[low]))), float(np.nanmax(array(values[high])))]

    def limited(axis: Any) -> None:
        axis.set_ylim(min(reach) - 0.1, max(reach) + 0.1)

    is_fraction = key == fraction
    rules: dict[float, Any] = {0: {"linewidth": 0.6}}
    if is_fraction:
        rules[1] = {"linewidth": 0.6, "linestyle": "--"}
    title = f"{name}: all attention outputs {number(target['all'][key], '.2f')}"
    label = name if is_fraction else f"{name} (change, nats)"
    return Lines(title, series, _axis_label(key), rules, limited if is_fraction else None, label)
