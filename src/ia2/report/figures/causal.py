"""Figures of the causal check: what one layer or head recovers of ICL, and what it breaks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ia2.report.figures.lines import Lines, array, line_figure, number
from ia2.report.figures.marks import head_map
from ia2.report.figures.style import COLOURS, Figure, Panel, numbers_table
from ia2.utils.wording import estimate

Json = Mapping[str, Any]

LEVEL = 0.05
# Of the difference between the two runs: what counts as a change (ia2.analysis.interventions).
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


def causal_figures(section: Json, heading: str) -> list[Figure]:
    """Layer × head maps and lines by layer, for ICL into each target and the reverse.

    Args:
        section: ``causal`` of ``analysis.json``.
        heading: what the figures are of.
    """
    found = []
    for direction in _DIRECTIONS:
        targets = section.get(direction) or {}
        with_heads = {name: target for name, target in targets.items() if "heads" in target}
        if with_heads:
            found.append(_causal_maps(section, direction, with_heads, heading))
        if any("layers" in target for target in targets.values()):
            found.append(_causal_layers(section, direction, targets, heading))
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
    return estimate({"value": value if np.isfinite(value) else None, "low": low, "high": high})


def _explained(section: Json, direction: str) -> str:
    meaning = (
        "The activations that the base model has with demonstrations are put into each model's run without, "
        "one at a time, where the answer is. A recovered fraction of 1 means that this alone makes the "
        "answer of ICL as likely as demonstrations do, 0 that nothing changes."
        if direction == "targets"
        else "The reverse: each model's activations without demonstrations are put into the base model's run "
        "with them. A broken fraction of 1 means that this alone takes away all that demonstrations bring."
    )
    count = f"{section['queries']} queries, {section['trials']} training sets"
    return f"{meaning} {count}. Parts do not add up to the whole."


def _causal_maps(section: Json, direction: str, targets: Mapping[str, Json], heading: str) -> Figure:
    fraction, verb, ending = _DIRECTIONS[direction]
    all_values = np.concatenate([array(target["heads"][fraction]).ravel() for target in targets.values()])
    known = np.abs(all_values[np.isfinite(all_values)])
    columns = ["model", "ICL − model, log p", "head", f"{fraction} [95%]", "change [95%], nats", "q"]
    return Figure(
        f"causal-heads{ending}",
        f"What each head {verb}",
        heading,
        f"{_explained(section, direction)} A dot marks a head that changes the answer's log-probability by "
        f"more than {MIN_FRACTION:.0%} of the difference between the two runs, at a false-discovery rate of "
        f"{LEVEL:g} over all heads. Where a model is about as sure of the answer as ICL is, there is no "
        "fraction, and colour is the change itself.",
        # one scale for the fractions of all targets
        tuple(_causal_map(n, t, section["layers"], fraction, known) for n, t in targets.items()),
        numbers_table(
            "causal heads",
            f"The {_LISTED} heads of each model with the largest changes",
            [*columns, "another query"],
            [row for n, t in targets.items() for row in _causal_rows(n, t, section["layers"], fraction)],
        ),
    )


def _causal_map(name: str, target: Json, layers: Sequence[int], fraction: str, known: np.ndarray) -> Panel:
    key, _, _ = _shown_keys(target, fraction)
    values = array(target["heads"][key])
    if key == "change":
        known = np.abs(values[np.isfinite(values)])
    limit = max(float(known.max()), 0.05) if known.size else 1.0
    certain = array(target["heads"]["q"]) < LEVEL
    title = f"{name}: {int(certain.sum())} of {values.size} heads marked"
    return head_map(values, limit, certain, layers, _axis_label(key), title)


def _causal_rows(name: str, target: Json, layers: Sequence[int], fraction: str) -> Iterator[list[str]]:
    heads, other = target["heads"], target["control"].get("other", {}).get("heads")
    change = array(heads["change"])
    for flat in np.argsort(-np.abs(change), axis=None)[:_LISTED]:
        place = layer, head = tuple(int(i) for i in np.unravel_index(flat, change.shape))
        yield [
            name,
            f"{estimate(target['gap'], signed=True)} nats",
            f"layer {layers[layer]}, head {head}",
            _interval(heads, place, (fraction, "low", "high")),
            _interval(heads, place, ("change", "change_low", "change_high")),
            number(heads["q"][layer][head], ".2g"),
            number(None if other is None else other[fraction][layer][head]),
        ]


def _causal_layers(section: Json, direction: str, targets: Mapping[str, Json], heading: str) -> Figure:
    fraction, verb, ending = _DIRECTIONS[direction]
    return line_figure(
        f"causal-layers{ending}",
        f"What each layer {verb}",
        heading,
        f"{_explained(section, direction)} Bands are 95% intervals. Broken and dotted lines are controls: "
        "the layer's attention output on another query, from ICL or from the patched run itself; where they "
        "leave the picture, the table has them. The residual stream after a layer holds all that came "
        "before; after the last layer it is the other run itself.",
        section["layers"],
        [_causal_lines(name, target, fraction) for name, target in targets.items()],
        rows="model",
        numbers=f"{fraction.capitalize()} fraction by layer",
        columns=2,
        width=4.2,
        height=3.4,
    )


def _causal_lines(name: str, target: Json, fraction: str) -> Lines:
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
