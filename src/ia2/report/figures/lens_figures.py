"""Figures of the logit lens: at which layer the task shows, view by view."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ia2.report.figures.layer_lines import OTHER, array, cells, lines, view_styles
from ia2.report.figures.style import Figure, Panel, numbers_table
from ia2.utils.format import Table
from ia2.utils.wording import MISSING

# Measures with a panel, and how it is titled; one more is in the numbers.
_TITLES = {
    "agreement": "agreement with ICL's answer",
    "gold": "accuracy",
    "log_probability": "log-probability of ICL's answer",
    "divergence": "divergence from ICL at that layer",
}
_UNITS = {"log_probability": "nats", "divergence": "bits (0 is the same)"}
_COLUMNS = {**_TITLES, "divergence_from_answer": "divergence from ICL's output"}


def lens_figures(section: Mapping[str, Any], heading: str) -> list[Figure]:
    """Agreement with ICL, accuracy, log-probability and divergence by layer.

    Args:
        section: ``lens`` of ``analysis.json``.
        heading: what the figures are of.
    """
    views = {view["name"]: view for view in section["views"] if _is_drawn(view["name"])}
    if not views:
        return []
    layers = section["layers"]
    known = [m for m in _TITLES if all(f"{m}_by_layer" in view for view in views.values())]
    panels = tuple(_measure(section, views, measure) for measure in known)
    return [
        Figure("lens", "Logit lens: where the task shows", heading, _caption(section), panels,
               _numbers(layers, views), columns=2)
    ]  # fmt: skip


def _is_drawn(name: str) -> bool:
    """Models of interest and ICL with other demonstrations; the controls of adapters would hide them."""
    return name == OTHER or not (name.endswith(("+demos", "~seed")) or name.startswith("icl-"))


def _caption(section: Mapping[str, Any]) -> str:
    over = "the label set" if section["over"] == "labels" else "the vocabulary"
    text = (
        "What the model would answer if its residual stream went to its last norm and unembedding after each "
        f"layer. Log-probabilities are over {over}; bands are 95% intervals over queries and seeds. A ring "
        "marks the first layer at which the task shows: agreement above chance and above the base model's, "
        "there and at the next two layers. "
    )
    if section["chance"]:
        text += "The dashed grey line is what one label for every query reaches at best. "
    return (
        text + "Early layers write in another basis than the last: what the lens does not show may be there."
    )


def _measure(section: Mapping[str, Any], views: Mapping[str, Any], measure: str) -> Panel:
    layers, styles = section["layers"], view_styles(views)
    parts = {name: view[f"{measure}_by_layer"] for name, view in views.items()}
    chance = {section["chance"][measure]: {"linestyle": "--"}} if measure in section["chance"] else {}

    def rings(axis: Any) -> None:
        for name, view in views.items():
            if measure == "agreement" and view["shows_at"] is not None:
                height = array(parts[name]["value"])[layers.index(view["shows_at"])]
                ring = {"marker": "o", "markersize": 10, "markerfacecolor": "none", "linestyle": "none"}
                axis.plot(view["shows_at"], height, color=styles[name]["color"], **ring)

    unit = _UNITS.get(measure, "share of queries")
    return lines(
        layers, parts, styles, unit, _TITLES[measure], rules=chance, after=rings, width=4.2, height=3.2
    )


def _numbers(layers: Sequence[int], views: Mapping[str, Any]) -> Table:
    known = [m for m in _COLUMNS if any(f"{m}_by_layer" in view for view in views.values())]
    rows = []
    for name, view in views.items():
        parts = [cells(view[f"{m}_by_layer"]) if f"{m}_by_layer" in view else None for m in known]
        for place, layer in enumerate(layers):
            marked = "yes" if view["shows_at"] == layer else ""
            rows.append([name, str(layer), marked, *(part[place] if part else MISSING for part in parts)])
    columns = ["view", "layer", "task shows from here", *(_COLUMNS[m] for m in known)]
    return numbers_table("lens", "Logit lens by view and layer [95%]", columns, rows)
