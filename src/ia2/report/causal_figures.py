"""Figures of the causal check: what one layer or head recovers of ICL, and what it breaks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ia2.analysis.causal_summary import MIN_FRACTION
from ia2.report.head_map import head_map
from ia2.report.layer_lines import array, number
from ia2.report.style import COLOURS, FAINT, Figure, Panel, numbers_table
from ia2.wording import estimate

LEVEL = 0.05

_LISTED = 10

_FRACTIONS = {"targets": "recovered", "reverse": "broken"}

# What is patched → name, colour, marker, line; those with a control behind a slash.
_LINES: dict[str, tuple[str, str, str, str]] = {
    "layers": ("attention output", COLOURS[0], "o", "-"),
    "layers/other": ("of another query, ICL", COLOURS[0], "", "--"),
    "layers/own": ("of another query, own run", COLOURS[0], "", ":"),
    "neurons": ("MLP", COLOURS[1], "s", "-"),
    "residual": ("residual stream", COLOURS[2], "^", "-"),
}


def causal_figures(section: Mapping[str, Any], heading: str) -> list[Figure]:
    """Layer × head maps and lines by layer, for ICL into each target and the reverse.

    Args:
        section: ``causal`` of ``analysis.json``.
        heading: what the figures are of.
    """
    found = []
    for direction in _FRACTIONS:
        targets = section.get(direction) or {}
        if any("heads" in target for target in targets.values()):
            found.append(_maps_figure(section, direction, heading))
        if any("layers" in target for target in targets.values()):
            found.append(_layers_figure(section, direction, heading))
    return found


def _told(target: Mapping[str, Any], fraction: str) -> bool:
    """Whether there are fractions: they are missing where the two runs hardly differ."""
    return bool(np.isfinite(array(target["all"][fraction])).all())


def _shown(target: Mapping[str, Any], fraction: str) -> tuple[str, str, str, str]:
    """Keys of the values that are drawn and of their interval, and the values' name."""
    if _told(target, fraction):
        return fraction, "low", "high", f"{fraction} fraction"
    return "change", "change_low", "change_high", "change of log p, nats"


def _interval(values: Mapping[str, Any], place: tuple[int, ...], keys: Sequence[str]) -> str:
    value, low, high = (array(values[key])[place] for key in keys)
    return estimate({"value": value if np.isfinite(value) else None, "low": low, "high": high})


def _gap(target: Mapping[str, Any]) -> str:
    return f"{estimate(target['gap'], signed=True)} nats"


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


def _maps_figure(section: Mapping[str, Any], direction: str, heading: str) -> Figure:
    fraction, targets = _FRACTIONS[direction], section[direction]
    width, height = min(5.0, 2.6 + 0.085 * section["heads"]), min(5.0, 1.6 + 0.1 * len(section["layers"]))
    panels = [
        Panel(_map(name, target, section, fraction, _limit(targets, fraction)), width=width, height=height)
        for name, target in targets.items()
        if "heads" in target
    ]
    verb = "recovers" if direction == "targets" else "breaks"
    return Figure(
        "causal-heads" if direction == "targets" else "causal-heads-reverse",
        f"What each head {verb}",
        heading,
        f"{_explained(section, direction)} A dot marks a head that changes the answer's log-probability by "
        f"more than {MIN_FRACTION:.0%} of the difference between the two runs, at a false-discovery rate of "
        f"{LEVEL:g} over all heads. Where a model is about as sure of the answer as ICL is, there is no "
        "fraction, and colour is the change itself.",
        tuple(panels),
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
                if "heads" in target
                for row in _head_rows(name, target, section, fraction)
            ],
        ),
    )


def _limit(targets: Mapping[str, Any], fraction: str) -> float:
    """One scale for the fractions of all targets."""
    values = np.concatenate([array(t["heads"][fraction]).ravel() for t in targets.values() if "heads" in t])
    values = np.abs(values[np.isfinite(values)])
    return max(float(values.max()), 0.05) if values.size else 1.0


def _map(
    name: str, target: Mapping[str, Any], section: Mapping[str, Any], fraction: str, limit: float
) -> Callable[[Any], None]:
    key, _, _, label = _shown(target, fraction)
    values = array(target["heads"][key])
    certain = array(target["heads"]["q"]) < LEVEL
    if key == "change":
        limit = max(float(np.nanmax(np.abs(values))), 0.05)

    title = f"{name}: {int(certain.sum())} of {values.size} heads marked"
    return head_map(values, limit, certain, section["layers"], label, title)


def _head_rows(
    name: str, target: Mapping[str, Any], section: Mapping[str, Any], fraction: str
) -> list[list[str]]:
    heads, rows = target["heads"], []
    other = target["control"].get("other", {}).get("heads")
    change = array(heads["change"])
    for place in np.argsort(-np.abs(change), axis=None)[:_LISTED]:
        layer, head = (int(i) for i in np.unravel_index(place, change.shape))
        rows.append(
            [
                name,
                _gap(target),
                f"layer {section['layers'][layer]}, head {head}",
                _interval(heads, (layer, head), (fraction, "low", "high")),
                _interval(heads, (layer, head), ("change", "change_low", "change_high")),
                number(heads["q"][layer][head], ".2g"),
                number(None if other is None else other[fraction][layer][head], ".3f"),
            ]
        )
    return rows


# -------------------------------------------------------------------------------------------- layers


def _layers_figure(section: Mapping[str, Any], direction: str, heading: str) -> Figure:
    fraction, targets = _FRACTIONS[direction], section[direction]
    verb = "recovers" if direction == "targets" else "breaks"
    kinds = [kind for kind in _LINES if any(_values(target, kind) for target in targets.values())]
    return Figure(
        "causal-layers" if direction == "targets" else "causal-layers-reverse",
        f"What each layer {verb}",
        heading,
        f"{_explained(section, direction)} Bands are 95% intervals. Broken and dotted lines are controls: "
        "the layer's attention output on another query, from ICL or from the patched run itself; where they "
        "leave the picture, the table has them. The residual stream after a layer holds all that came "
        "before; after the last layer it is the other run itself.",
        tuple(
            Panel(_by_layer(name, target, section, fraction), legend=True, width=4.2, height=3.4)
            for name, target in targets.items()
        ),
        numbers_table(
            "causal layers",
            f"{fraction.capitalize()} fraction by layer, with 95% intervals where there is room",
            ["model", "layer", *(_LINES[kind][0] for kind in kinds)],
            [
                row
                for name, target in targets.items()
                for row in _layer_rows(name, target, section, fraction, kinds)
            ],
        ),
        columns=2,
    )


def _values(target: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
    group, _, control = kind.partition("/")
    found = target["control"].get(control, {}) if control else target
    return found.get(group)  # type: ignore[no-any-return]


def _layer_rows(
    name: str, target: Mapping[str, Any], section: Mapping[str, Any], fraction: str, kinds: Sequence[str]
) -> list[list[str]]:
    keys = _shown(target, fraction)[:3]
    named = name if keys[0] == fraction else f"{name} (change, nats)"

    def row(place: str, index: tuple[int, ...], group: str = "") -> list[str]:
        cells = []
        for kind in kinds:
            found = _values(target, kind if not group else kind.replace("layers", group))
            known = found is not None and (not group or kind.startswith("layers"))
            cells.append(_interval(found, index, keys) if known and found else number(None, ""))
        return [named, place, *cells]

    return [
        *(row(str(layer), (i,)) for i, layer in enumerate(section["layers"])),
        row("all at once", (), "all"),
    ]


def _by_layer(
    name: str, target: Mapping[str, Any], section: Mapping[str, Any], fraction: str
) -> Callable[[Any], None]:
    key, low, high, label = _shown(target, fraction)

    def draw(axis: Any) -> None:
        axis.axhline(0, color=FAINT, linewidth=0.6)
        if key == fraction:
            axis.axhline(1, color=FAINT, linewidth=0.6, linestyle="--")
        layers, reach = section["layers"], [-0.6, 1.1]
        for kind, (title, colour, marker, line) in _LINES.items():
            if (found := _values(target, kind)) is None:
                continue
            if "/" not in kind:  # a control may be far away: another answer than this one
                reach += [float(np.nanmin(array(found[low]))), float(np.nanmax(array(found[high])))]
            style = {"color": colour, "marker": marker, "linestyle": line}
            axis.plot(layers, array(found[key]), markersize=3.5, linewidth=1.3, label=title, **style)
            if kind != "layers/own":
                ends = array(found[low]), array(found[high])
                axis.fill_between(layers, *ends, color=colour, alpha=0.12, linewidth=0)
        if key == fraction:
            axis.set_ylim(min(reach) - 0.1, max(reach) + 0.1)
        axis.set_xlabel("layer")
        axis.set_ylabel(label)
        axis.set_title(f"{name}: all attention outputs {number(target['all'][key], '.2f')}", fontsize=10)
        axis.xaxis.get_major_locator().set_params(integer=True)

    return draw
