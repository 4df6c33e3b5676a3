"""Figures draw, whatever is missing, and their numbers are those of the run or the analysis."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers.finished_runs import write_comparison, write_curve

from ia2.report.analysis import analysis_figures, analysis_tables, analysis_verdict
from ia2.report.figures.activations import activation_figures
from ia2.report.figures.lines import view_styles
from ia2.report.figures.runs import cost_figure, frontier, run_figures, try_summary_figure, wilson
from ia2.report.figures.style import Figure, recipe_style
from ia2.report.results import read_run
from ia2.utils.files import read_json

RESULTS = Path(__file__).parents[2] / "results" / "analysis"


def numbers(figure: Figure) -> list[dict[str, str]]:
    columns, rows = figure.numbers.texts()
    return [dict(zip(columns, row, strict=True)) for row in rows]


# --------------------------------------------------------------------------------------------- runs


def test_numbers_of_a_run(tmp_path: Path) -> None:
    summary = write_comparison(tmp_path / "run")
    run = read_run(tmp_path / "run")
    figures = {figure.name: figure for figure in run_figures(run)}
    assert list(figures) == ["compare", "reliability", "layers", "similarity", "cost", "training"]
    own = [row for row in numbers(figures["reliability"]) if row["recipe"] == "sft"]
    assert sum(int(row["rows"]) for row in own) == 40
    right = sum(int(row["rows"]) * float(row["share right [95%]"].split()[0]) for row in own)
    assert right == pytest.approx(sum(np.sum(e["correct"]) for e in run.evaluations["sft"]), abs=0.05)
    expected = {"layer": "1", **dict.fromkeys(("base", "sft", "ia2", "ia2-sft"), "0.500 [0.500, 0.600]")}
    assert numbers(figures["layers"])[1] == expected
    assert len(numbers(figures["similarity"])) == 4 * 2
    first = list(numbers(figures["training"])[0].values())
    assert first[:6] == ["align", "seed 0", "lr-0.001", "4", "4", "0.35"]
    for entry in summary["recipes"].values():
        del entry["tokens_per_query"]
    assert cost_figure(summary) is None


def test_wilson_intervals() -> None:
    # Wilson 1927; the values of R's binom.confint(8, 10, method = "wilson")
    assert wilson(0.8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson(1.0, 10)[1] == 1.0


def test_the_cheapest_way_to_each_value() -> None:
    points = [(12.0, 0.7), (12.0, 0.9), (120.0, 0.8), (200.0, 0.95)]
    assert frontier(points, higher=True) == [(12.0, 0.9), (200.0, 0.95)]
    assert frontier(points, higher=False) == [(12.0, 0.7)]


def test_a_figure_is_the_same_every_time_and_holds_text(tmp_path: Path) -> None:
    odd = 'a<script>&"$x_1$\\frac'
    summary = write_comparison(tmp_path / "run", recipes=("base", odd))
    summary["model"] = odd
    files = [try_summary_figure(summary, tmp_path / name) for name in "ab"]
    first, second = (file.read_bytes() for file in files if file is not None)
    assert first == second and str(tmp_path).encode() not in first
    root = ElementTree.fromstring(first)
    texts = "".join(root.itertext())
    assert texts.count(odd) >= 2 and "95% t-intervals over 2 draws" in texts
    assert not [element for element in root.iter() if element.tag.endswith("script")]


@pytest.mark.filterwarnings("error")
def test_extremes(tmp_path: Path) -> None:
    summary = write_comparison(tmp_path / "run", seeds=1)
    for entry in summary["recipes"].values():
        entry["metrics"]["labels"]["ece"] = {"value": 0.0, "low": None, "high": None}
    summary["recipes"]["base"]["asim"] = {"value": -0.2, "low": -0.3, "high": 0.1}
    assert try_summary_figure(summary, tmp_path) == tmp_path / "compare.svg"
    summary["recipes"]["sft"]["metrics"]["labels"]["accuracy"]["value"] = None
    [figure, *_] = run_figures(read_run(tmp_path / "run"))
    assert figure.save(tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_a_curve_of_an_older_version(tmp_path: Path) -> None:
    """Only the accuracy over the vocabulary was kept: it is what is drawn."""
    write_curve(tmp_path / "run")
    run = read_run(tmp_path / "run")
    [figure] = run_figures(run)
    assert figure.save(tmp_path / "curve.svg").stat().st_size > 1000
    assert numbers(figure)[0]["measure"] == "accuracy over the vocabulary"


def test_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    summary = write_comparison(tmp_path / "run")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with caplog.at_level("INFO", "ia2"):
        assert try_summary_figure(summary, tmp_path / "figures") is None
    assert "pip install 'ia2[report]'" in caplog.text and not (tmp_path / "figures").exists()


# ----------------------------------------------------------------------------------------- analyses


def test_every_section_of_an_analysis_is_shown(tmp_path: Path) -> None:
    """The committed analysis: all figures, sentences and tables."""
    result = read_json(RESULTS / "analysis.json")
    result["effects"] = read_json(RESULTS / "effects" / "analysis.json")["effects"]  # on one seed
    figures = {figure.name: figure for figure in analysis_figures(result)}
    assert list(figures) == [
        "activations-layers", "activations-controls", "activations-differences", "activations-unexplained",
        "lens", "overlap", "overlap-layers", "updates", "heads", "attention", "neurons", "common-shift",
        "causal-heads", "causal-layers", "causal-heads-reverse", "causal-layers-reverse",
        "perplexity", "diversity", "wordings",
    ]  # fmt: skip
    sentences = analysis_verdict(result)
    for words in ("nearer to ICL", "one constant", "Overlap", "logit lens", "Heads", "Causal", "Perplexity"):
        assert [line for line in sentences if words in line], words
    views = {view["name"]: view for view in result["activations"]["views"]}
    assert [row[0] for row in analysis_tables(result)[0].texts()[1]] == list(views)
    [row] = [
        row
        for row in numbers(figures["activations-controls"])
        if row["condition"] == "ia2" and row["layer"] == "7"
    ]
    assert row["other seed"].startswith(f"{views['ia2~seed']['asim_by_layer']['value'][7]:.3f} [")
    # controls of adapters have a figure of their own, and the method comes first
    assert not any("~" in name or "+" in name for name in figures["activations-layers"].numbers.texts()[0])
    assert numbers(figures["activations-differences"])[0]["pair"] == "ia2-sft − sft"


def around(values: Any, width: float = 0.02) -> dict[str, list[Any]]:
    values = np.asarray(values, dtype=float)
    return {"value": list(values), "low": list(values - width), "high": list(values + width)}


def section(layers: int = 4, tokens: int = 1, arms: Sequence[str] = ("sft", "ia2-sft")) -> dict[str, Any]:
    """A made section ``activations``."""
    views = []
    for place, name in enumerate(("icl-other", "base", *arms)):
        kind = "control" if name == "icl-other" else "base" if name == "base" else "adapter"
        views.append(
            {
                "name": name, "kind": kind, "control": "", "of": "icl" if kind == "control" else "",
                "asim_by_layer": around(0.3 + place / 10 + 0.1 * np.sin(np.arange(layers))),
                "variance_unexplained_by_layer": [0.1 + i / 10 for i in range(layers)],
                "asim_by_token": {"value": [0.5] * tokens, "count": list(range(40, 40 - tokens, -1))},
            }
        )  # fmt: skip
    pairs = [(arm, "base") for arm in arms] + ([("ia2-sft", "sft")] if len(arms) == 2 else [])
    differences = [
        {
            "a": a,
            "b": b,
            "asim": {"value": 0.2, "low": 0.1, "high": 0.3},
            "asim_by_layer": around([0.2] * layers),
        }
        for a, b in pairs
    ]
    return {"layers": list(range(2, 2 + layers)), "views": views, "differences": differences}


def drawn(given: dict[str, Any], folder: Path) -> dict[str, tuple[list[dict[str, str]], str]]:
    """Numbers and SVG by name."""
    return {
        figure.name.removeprefix("activations-"): (
            numbers(figure),
            figure.save(folder / f"{figure.name}.svg").read_text(),
        )
        for figure in activation_figures(given)
    }


def test_numbers_of_activations(tmp_path: Path) -> None:
    given = section(tokens=5)
    base = given["views"][1]["asim_by_token"]
    base["value"], base["count"] = base["value"][:3], base["count"][:3]
    found = drawn(given, tmp_path)
    assert list(found) == ["layers", "differences", "unexplained", "tokens"]
    rows, picture = found["layers"]
    for place, row in enumerate(rows):
        assert row["layer"] == str(2 + place)
        for view in given["views"]:
            value, low, high = (view["asim_by_layer"][end][place] for end in ("value", "low", "high"))
            assert row[view["name"]] == f"{value:.3f} [{low:.3f}, {high:.3f}]"
            assert f">{view['name']}</text>" in picture
    assert {row["pair"]: row["difference"] for row in found["differences"][0]} == {
        "ia2-sft − sft": "+0.200 [+0.180, +0.220]"
    }
    tokens = found["tokens"][0]
    assert [row["answers"] for row in tokens] == ["40", "39", "38", "37", "36"]
    assert [row["base"] for row in tokens] == ["0.500", "0.500", "0.500", "–", "–"]


@pytest.mark.parametrize("missing", [None, math.nan])
def test_little_and_missing_numbers(missing: float | None, tmp_path: Path) -> None:
    assert "differences" not in drawn(section(arms=[]), tmp_path)
    assert list(
        {row["pair"] for row in drawn(section(layers=1, arms=["sft"]), tmp_path)["differences"][0]}
    ) == [
        "sft − base"  # with one adapter there is the base model to compare with
    ]
    assert activation_figures({"layers": [], "views": [], "differences": []}) == []
    given = section()
    for end in ("value", "low", "high"):
        given["views"][2]["asim_by_layer"][end][2] = missing
    given["views"][2]["variance_unexplained_by_layer"][2] = missing
    found = drawn(given, tmp_path)
    assert found["layers"][0][2]["sft"] == found["unexplained"][0][2]["sft"] == "–"


def test_colours_are_the_recipes() -> None:
    styles = view_styles(["ia2-sft", "icl-other", "sft"])
    assert (styles["sft"], styles["ia2-sft"]) == (recipe_style("sft"), recipe_style("ia2-sft"))
    # two variants of a recipe cannot have its one colour, whether or not ICL itself is drawn
    twice = view_styles(["base", "ia2-sft", "ia2-sft@dora"])
    assert twice["ia2-sft"]["color"] != twice["ia2-sft@dora"]["color"]
    assert twice == view_styles(["icl", "base", "ia2-sft", "ia2-sft@dora"])


@pytest.mark.parametrize(("values", "is_log"), [([0.1, 0.2, 0.3], False), ([0.01, 0.5, 9.0], True)])
def test_a_wide_range_has_a_logarithmic_axis(values: list[float], is_log: bool, tmp_path: Path) -> None:
    given = section(layers=3)
    for view in given["views"]:
        view["variance_unexplained_by_layer"] = values
    # the numbers of such an axis are written out
    assert bool(re.search(">0.02</text>", drawn(given, tmp_path)["unexplained"][1])) == is_log
