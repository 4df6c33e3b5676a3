"""Lines over layers, a line a view: their styles, bands and numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ia2.report.style import FAINT, INK, arm_styles
from ia2.wording import MISSING, estimate

OTHER, MEAN = "icl-other", "icl-mean"

# Controls belong to no recipe: they are told apart by how their line is broken.
CONTROL_STYLES: dict[str, dict[str, Any]] = {
    OTHER: {"color": INK, "linestyle": "--"},
    MEAN: {"color": FAINT, "linestyle": ":"},
    "with demonstrations": {"color": INK, "linestyle": "--"},
    "other seed": {"color": FAINT, "linestyle": "-."},
}


def view_styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Style of each view: an adapter's is its recipe's, as in every figure.

    Args:
        names: of views; of the controls only ``icl-other`` and ``icl-mean``.
    """
    own = [name for name in names if name not in CONTROL_STYLES]
    # where recipes repeat, places settle the colours: these two have the same ones whether drawn or not
    return {**arm_styles(list(dict.fromkeys(("base", "icl", *own)))), **CONTROL_STYLES}


def array(values: Any) -> np.ndarray:
    """Numbers of JSON, where NaN has become null."""
    return np.asarray(values, dtype=float)


def number(value: Any, form: str = ".3f") -> str:
    """One of them in a table."""
    return MISSING if value is None or value != value else format(value, form).replace("-", "−")


def with_interval(found: Mapping[str, Any], place: int, *, signed: bool = False) -> str:
    """One layer's value with its interval."""
    return estimate({name: found[name][place] for name in ("value", "low", "high")}, signed=signed)


def draw_line(axis: Any, x: Sequence[int], found: Mapping[str, Any], label: str, **style: Any) -> None:
    """A line over layers and the band of its interval (a bar, where there is one layer).

    Args:
        axis: of a panel.
        x: layers.
        found: ``value``, ``low``, ``high``, lists.
        label: for the legend; empty for none.
        style: of the line.
    """
    own = {"markersize": 3.5, "linewidth": 1.3, "label": label or "_", **style}
    axis.plot(x, array(found["value"]), **own)
    if "low" not in found:
        return
    low, high = array(found["low"]), array(found["high"])
    if len(x) == 1:
        axis.plot([x[0], x[0]], [low[0], high[0]], color=own["color"], linewidth=1.5)
    else:
        axis.fill_between(x, low, high, color=own["color"], alpha=0.12, linewidth=0)


def layer_axis(axis: Any, ylabel: str, title: str = "") -> None:
    """Names of a panel over layers."""
    axis.set_xlabel("layer")
    axis.set_ylabel(ylabel)
    axis.xaxis.get_major_locator().set_params(integer=True)
    if title:
        axis.set_title(title, fontsize=10)


def limits_of(parts: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    """One scale for panels that are to be compared: of all intervals, and 0."""
    values = np.concatenate([array(part[name]) for part in parts for name in ("value", "low", "high")])
    known = np.append(values[np.isfinite(values)], 0.0)
    room = 0.05 * max(float(np.ptp(known)), 1e-6)
    return float(known.min()) - room, float(known.max()) + room
