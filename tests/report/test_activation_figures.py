"""Figures of the section ``activations``: they draw, and their tables hold its numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ia2.report.figures.activation_figures import activation_figures
from ia2.report.figures.layer_lines import view_styles
from ia2.report.figures.style import Figure, recipe_style


def around(values: Sequence[float], width: float = 0.02) -> dict[str, list[float]]:
    return {
        "value": list(values),
        "low": [v - width for v in values],
        "high": [v + width for v in values],
    }


def one(value: float) -> dict[str, float]:
    return {name: values[0] for name, values in around([value]).items()}


def view(name: str, height: float, layers: int, tokens: int, **fields: Any) -> dict[str, Any]:
    shape = height + 0.1 * np.sin(np.arange(layers))
    return {
        "name": name,
        "kind": "adapter",
        "control": "",
        "of": "",
        "n": 40,
        "asim": one(height),
        "l2": one(3.0),
        "variance_unexplained": one(1 - height),
        "asim_by_layer": around(shape),
        "l2_by_layer": around(3 + shape),
        "variance_unexplained_by_layer": list(np.exp(4 * (1 - shape))),
        "asim_by_token": {
            "value": list(height - 0.01 * np.arange(tokens)), "count": list(range(40, 40 - tokens, -1))
        },
        **fields,
    }  # fmt: skip


def section(layers: int = 12, tokens: int = 1, arms: Sequence[str] = ("sft", "ia2", "ia2-sft")) -> Any:
    views = [
        view("icl-other", 0.9, layers, tokens, kind="control", control="other demonstrations", of="icl"),
        view("icl-mean", 0.85, layers, tokens, kind="control", control="one constant", of="icl"),
        view("base", 0.4, layers, tokens, kind="base", control="no demonstrations"),
    ]
    for place, arm in enumerate(arms):
        views.append(view(arm, 0.5 + 0.15 * place, layers, tokens))
        for ending, control in (("+demos", "with demonstrations"), ("~seed", "other seed")):
            fields = {"kind": "control", "control": control, "of": arm}
            height = 0.45 + 0.15 * place + (0.2 if ending == "+demos" else 0)
            views.append(view(arm + ending, height, layers, tokens, **fields))
    differences = [
        {"a": a, "b": b, "asim": one(gap), "asim_by_layer": around([gap + 0.01 * i for i in range(layers)])}
        for a, b, gap in (
            *((arm, "base", 0.3) for arm in arms),
            ("ia2", "sft", 0.2),
            ("ia2-sft", "sft", 0.25),
            ("ia2-sft", "ia2", 0.05),
            ("sft", "sft~seed", 0.01),
            ("sft", "icl-other", -0.3),
        )
        if a in arms and b in (*arms, "base", "sft~seed", "icl-other")
    ]
    return {"layers": list(range(4, 4 + layers)), "views": views, "differences": differences}


def drawn(found: Sequence[Figure], folder: Path) -> dict[str, str]:
    """Name of each figure → its SVG."""
    pictures = {}
    for figure in found:
        pictures[figure.name] = figure.save(folder / f"{figure.name}.svg").read_text()
        assert len(figure.pictures()) == len(figure.panels)
    return pictures


def table(figure: Figure) -> list[dict[str, str]]:
    names = [column.title for column in figure.numbers.columns]
    return [dict(zip(names, (e.text for e in row), strict=True)) for row in figure.numbers.rows]


def figures(found: Any) -> dict[str, Figure]:
    made = activation_figures(found, "tiny: words")
    return {figure.name.removeprefix("activations-"): figure for figure in made}


def test_all_figures(tmp_path: Path) -> None:
    found = figures(section(tokens=5))
    assert list(found) == ["layers", "controls", "differences", "unexplained", "tokens"]
    pictures = drawn(list(found.values()), tmp_path)
    for name in ("base", "sft", "ia2-sft", "icl-other", "icl-mean"):
        assert f">{name}</text>" in pictures["activations-layers"]
    assert ">other seed</text>" in pictures["activations-controls"]
    assert ">ia2-sft − sft</text>" in pictures["activations-differences"]
    assert len({figure.name for figure in found.values()}) == 5


def test_numbers_are_the_sections() -> None:
    whole = section()
    found = figures(whole)
    views = {v["name"]: v for v in whole["views"]}
    layers = table(found["layers"])
    assert [row["layer"] for row in layers] == [str(layer) for layer in range(4, 16)]
    for name in ("base", "sft", "ia2", "ia2-sft", "icl-other", "icl-mean"):
        for place, row in enumerate(layers):
            value, low, high = (views[name]["asim_by_layer"][k][place] for k in ("value", "low", "high"))
            assert row[name] == f"{value:.3f} [{low:.3f}, {high:.3f}]"
    # adapters of other seeds, and with demonstrations, have a figure of their own
    assert not any("~" in name or "+" in name for name in layers[0])
    controls = [row for row in table(found["controls"]) if row["view"] == "ia2"]
    assert controls[3]["layer"] == "7"
    assert controls[3]["other seed"].startswith(f"{views['ia2~seed']['asim_by_layer']['value'][3]:.3f} [")
    shares = table(found["unexplained"])[2]["sft"]
    assert shares == f"{views['sft']['variance_unexplained_by_layer'][2]:.3g}"


def test_differences_are_of_the_method_first() -> None:
    found = figures(section())["differences"]
    assert list(table(found)[0]) == ["layer", "ia2-sft − sft", "ia2 − sft", "ia2-sft − ia2"]
    assert table(found)[1]["ia2-sft − ia2"] == "+0.060 [+0.040, +0.080]"
    assert "ia2-sft − sft: +0.250 [+0.230, +0.270]" in found.caption
    # with one adapter there is the base model to compare with
    assert list(table(figures(section(arms=["sft"]))["differences"])[0]) == ["layer", "sft − base"]


def test_centred_cosine_has_a_panel(tmp_path: Path) -> None:
    whole = section()
    for found in whole["views"]:
        if found["name"] != "icl-mean":
            found["centred"], found["centred_by_layer"] = one(0.2), around([0.2] * 12)
    layers = figures(whole)["layers"]
    assert len(layers.panels) == 2
    assert table(layers)[0]["sft, centred"] == "0.200 [0.180, 0.220]"
    assert "icl-mean, centred" not in table(layers)[0]
    assert ">mean taken off</text>" in drawn([layers], tmp_path)["activations-layers"]


def test_tokens_of_answers_that_differ_in_length() -> None:
    whole = section(tokens=5)
    base = whole["views"][2]["asim_by_token"]
    base["value"], base["count"] = base["value"][:3], base["count"][:3]
    rows = table(figures(whole)["tokens"])
    assert [row["token"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert [row["answers"] for row in rows] == ["40", "39", "38", "37", "36"]
    assert [row["base"] for row in rows] == ["0.400", "0.390", "0.380", "–", "–"]
    assert "tokens" not in figures(section(tokens=1))


def test_few_layers_few_arms_and_missing_numbers(tmp_path: Path) -> None:
    for number, whole in enumerate((section(layers=1), section(arms=[]), section(arms=["sft"]))):
        folder = tmp_path / str(number)
        folder.mkdir()
        drawn(list(figures(whole).values()), folder)
    assert "controls" not in figures(section(arms=[]))
    assert "differences" not in figures(section(arms=[]))
    whole = section()
    for missing in (None, math.nan):
        for part in ("value", "low", "high"):
            whole["views"][3]["asim_by_layer"][part][2] = missing
        whole["views"][3]["variance_unexplained_by_layer"][2] = missing
        found = figures(whole)
        assert table(found["layers"])[2]["sft"] == "–"
        assert table(found["unexplained"])[2]["sft"] == "–"
        drawn(list(found.values()), tmp_path)


def test_a_section_without_views_has_no_figures() -> None:
    assert activation_figures({"layers": [], "views": [], "differences": []}, "") == []


def test_colours_are_the_recipes() -> None:
    styles = view_styles(["ia2-sft", "icl-other", "sft"])
    assert styles["sft"] == recipe_style("sft")
    assert styles["ia2-sft"] == recipe_style("ia2-sft")
    # two variants of a recipe cannot have its one colour
    twice = view_styles(["base", "ia2-sft", "ia2-sft@dora"])
    assert len({style["color"] for name, style in twice.items() if name.startswith("ia2")}) == 2
    # whether or not ICL itself is drawn
    assert twice == view_styles(["icl", "base", "ia2-sft", "ia2-sft@dora"])


@pytest.mark.parametrize("values", [[0.1, 0.2, 0.3], [0.01, 0.5, 9.0]])
def test_a_wide_range_has_a_logarithmic_axis(values: list[float], tmp_path: Path) -> None:
    whole = section(layers=3)
    for found in whole["views"]:
        found["variance_unexplained_by_layer"] = values
    picture = drawn([figures(whole)["unexplained"]], tmp_path)["activations-unexplained"]
    # the numbers of such an axis are written out
    assert (">0.02</text>" in picture) == (values[-1] == 9.0)
