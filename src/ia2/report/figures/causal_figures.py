"""Figures of the causal check: what one layer or head recovers of ICL, and what it breaks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ia2.report.figures.head_map import head_map
from ia2.report.figures.layer_lines import array, lines, number
from ia2.report.figures.style import COLOURS, Figure, Panel, numbers_table
from ia2.utils.wording import MISSING, estimate

LEVEL = 0.05

# Of the difference between the two runs: what counts as a change (ia2.analysis.interventions).
MIN_FRACTION = 0.02

_LISTED = 10

# Direction → what a fraction is called, the verb, and the ending of the figures' names.
_DIRECTIONS = {"targets": ("recovered", "recovers", ""), "reverse": ("broken", "breaks", "-reverse")}

# What is patched → name, colour, marker, line; those with a control behind a slash.
_LINES: dict[str, tuple[str, str, str, str]] = {
    "layers": ("attention output", COLOURS[0], "o", "-"),
    "layers/other": ("of another query, ICL", COLOURS[0], "", "--"),
    "layers/own": ("of another query, own run", COLOURS[0], "", ":"),
    "neurons": ("MLP", COLOURS[1], "s", "-"),
    "residual": ("residual stream", COLOURS[2], "^", "-"),
}

_CHANGE = ("change", "change_low", "change_high")


def causal_figures(section: Mapping[str, Any], heading: str) -> list[Figure]:
    """Layer × head maps and lines by layer, for ICL into each target and the reverse.

    Args:
        section: ``causal`` of ``analysis.json``.
        heading: what the figures are of.
    """
    found = []
    for direction in _DIRECTIONS:
        targets = section.get(direction) or {}
        if any("heads" in target for target in targets.values()):
            found.append(_maps(section, direction, heading))
        if any("layers" in target for target in targets.values()):
            found.append(_layers(section, direction, heading))
    return found


def _keys(target: Mapping[str, Any], fraction: str) -> tuple[str, str, str]:
    """Of the values that are drawn, and their interval: there is no fraction where two runs hardly differ."""
    told = np.isfinite(array(target["all"][fraction])).all()
    return (fraction, "low", "high") if told else _CHANGE


def _label(key: str) -> str:
    return "change of log p, nats" if key == "change" else f"{key} fraction"


def _interval(values: Mapping[str, Any], place: tuple[int, ...], keys: Sequence[str]) -> str:
    value, low, high = (array(values[key])[place] for key in keys)
    return estimate({"value": value if np.isfinite(value) else None, "low": low, "high": high})


def _explained(section: Mapping[str, Any], direction: str) -> str:
    what = (
        "The activations that the base model has with demonstrations are put into each model's run without, "
        "one at a time, where the answer is. A recovered fraction of 1 means that this alone makes the "
        "answer of ICL as likely as demonstrations do, 0 that nothing changes."
        if direction == "targets"
        else "The reverse: each model's activations without demonstrations are put into the base model's run "
        "with them. A broken fraction of 1 means that this alone takes away all that demonstrations bring."
    )
    count = f"{section['queries']} queries, {section['trials']} training sets"
    return f"{what} {count}. Parts do not add up to the whole."


# ---------------------------------------------------------------------------------------------- maps


def _maps(section: Mapping[str, Any], direction: str, heading: str) -> Figure:
    fraction, verb, ending = _DIRECTIONS[direction]
    targets = {name: target for name, target in section[direction].items() if "heads" in target}
    values = np.concatenate([array(target["heads"][fraction]).ravel() for target in targets.values()])
    values = np.abs(values[np.isfinite(values)])
    # one scale for the fractions of all targets
    limit = max(float(values.max()), 0.05) if values.size else 1.0
    return Figure(
        f"causal-heads{ending}",
        f"What each head {verb}",
        heading,
        f"{_explained(section, direction)} A dot marks a head that changes the answer's log-probability by "
        f"more than {MIN_FRACTION:.0%} of the difference between the two runs, at a false-discovery rate of "
        f"{LEVEL:g} over all heads. Where a model is about as sure of the answer as ICL is, there is no "
        "fraction, and colour is the change itself.",
        tuple(_map(name, target, section, fraction, limit) for name, target in targets.items()),
        numbers_table(
            "causal heads",
            f"The {_LISTED} heads of each model with the largest changes",
            [
                "model",
                "ICL − model, log p",
                "head",
                f"{fraction} [95%]",
                "change [95%], nats",
                "q",
                "another query",
            ],
            [
                row
                for name, target in targets.items()
                for row in _head_rows(name, target, section["layers"], fraction)
            ],
        ),
    )


def _map(
    name: str, target: Mapping[str, Any], section: Mapping[str, Any], fraction: str, limit: float
) -> Panel:
    key, _, _ = _keys(target, fraction)
    values = array(target["heads"][key])
    certain = array(target["heads"]["q"]) < LEVEL
    if key == "change":
        limit = max(float(np.nanmax(np.abs(values))), 0.05)
    title = f"{name}: {int(certain.sum())} of {values.size} heads marked"
    return head_map(values, limit, certain, section["layers"], _label(key), title)


def _head_rows(name: str, target: Mapping[str, Any], layers: Sequence[int], fraction: str) -> list[list[str]]:
    heads, rows = target["heads"], []
    other = target["control"].get("other", {}).get("heads")
    change = array(heads["change"])
    for flat in np.argsort(-np.abs(change), axis=None)[:_LISTED]:
        place = layer, head = tuple(int(i) for i in np.unravel_index(flat, change.shape))
        rows.append(
            [
                name,
                f"{estimate(target['gap'], signed=True)} nats",
                f"layer {layers[layer]}, head {head}",
                _interval(heads, place, (fraction, "low", "high")),
                _interval(heads, place, _CHANGE),
                number(heads["q"][layer][head], ".2g"),
                number(None if other is None else other[fraction][layer][head], ".3f"),
            ]
        )
    return rows


# -------------------------------------------------------------------------------------------- layers


def _layers(section: Mapping[str, Any], direction: str, heading: str) -> Figure:
    fraction, verb, ending = _DIRECTIONS[direction]
    targets = section[direction]
    kinds = [kind for kind in _LINES if any(_values(target, kind) for target in targets.values())]
    return Figure(
        f"causal-layers{ending}",
        f"What each layer {verb}",
        heading,
        f"{_explained(section, direction)} Bands are 95% intervals. Broken and dotted lines are controls: "
        "the layer's attention output on another query, from ICL or from the patched run itself; where they "
        "leave the picture, the table has them. The residual stream after a layer holds all that came "
        "before; after the last layer it is the other run itself.",
        tuple(_by_layer(name, target, section["layers"], fraction) for name, target in targets.items()),
        numbers_table(
            "causal layers",
            f"{fraction.capitalize()} fraction by layer, with 95% intervals where there is room",
            ["model", "layer", *(_LINES[kind][0] for kind in kinds)],
            [
                row
                for name, target in targets.items()
                for row in _layer_rows(name, target, section["layers"], fraction, kinds)
            ],
        ),
        columns=2,
    )


def _values(target: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
    group, _, control = kind.partition("/")
    found = target["control"].get(control, {}) if control else target
    return found.get(group)  # type: ignore[no-any-return]


def _layer_rows(
    name: str, target: Mapping[str, Any], layers: Sequence[int], fraction: str, kinds: Sequence[str]
) -> list[list[str]]:
    keys = _keys(target, fraction)
    named = name if keys[0] == fraction else f"{name} (change, nats)"

    def cell(kind: str, place: tuple[int, ...]) -> str:
        found = _values(target, kind)
        return _interval(found, place, keys) if found else MISSING

    rows = [[named, str(layer), *(cell(kind, (i,)) for kind in kinds)] for i, layer in enumerate(layers)]
    whole = [
        cell(kind.replace("layers", "all"), ()) if kind.startswith("layers") else MISSING for kind in kinds
    ]
    return [*rows, [named, "all at once", *whole]]


def _by_layer(name: str, target: Mapping[str, Any], layers: Sequence[int], fraction: str) -> Panel:
    key, low, high = _keys(target, fraction)
    found: dict[str, Any] = {}
    styles: dict[str, Any] = {}
    reach = [-0.6, 1.1]
    for kind, (title, colour, marker, line) in _LINES.items():
        if (values := _values(target, kind)) is None:
            continue
        if "/" not in kind:  # a control may be far away: another answer than this one
            reach += [float(np.nanmin(array(values[low]))), float(np.nanmax(array(values[high])))]
        ends = {} if kind == "layers/own" else {"low": values[low], "high": values[high]}
        found[title] = {"value": values[key], **ends}
        styles[title] = {"color": colour, "marker": marker, "linestyle": line}
    rules: dict[float, Any] = {0: {"linewidth": 0.6}}
    if key == fraction:
        rules[1] = {"linewidth": 0.6, "linestyle": "--"}

    def limited(axis: Any) -> None:
        if key == fraction:
            axis.set_ylim(min(reach) - 0.1, max(reach) + 0.1)

    title = f"{name}: all attention outputs {number(target['all'][key], '.2f')}"
    return lines(layers, found, styles, _label(key), title, rules=rules, after=limited, width=4.2, height=3.4)
