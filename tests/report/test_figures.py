"""Figures draw, whatever is missing, and their numbers are those of the run or the analysis."""

from __future__ import annotations

import math
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
    [figure] = run_figures(read_run(tmp_path / "run"))
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


@pytest.fixture
def result() -> dict[str, Any]:
    """The committed analysis."""
    found: dict[str, Any] = read_json(RESULTS / "analysis.json")
    return found


def test_every_section_of_an_analysis_is_shown(result: dict[str, Any]) -> None:
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
    rows = numbers(figures["activations-controls"])
    [row] = [row for row in rows if (row["condition"], row["layer"]) == ("ia2", "7")]
    assert row["other seed"].startswith(f"{views['ia2~seed']['asim_by_layer']['value'][7]:.3f} [")
    # controls of adapters have a figure of their own, and the method comes first
    columns, rows_of_layers = figures["activations-layers"].numbers.texts()
    assert not any("~" in name or "+" in name for name in columns)
    value, low, high = (views["sft"]["centred_by_layer"][end][3] for end in ("value", "low", "high"))
    row = dict(zip(columns, rows_of_layers[30 + 3], strict=True))
    assert (row["panel"], row["layer"]) == ("mean taken off", "3")
    assert row["sft"].replace("−", "-") == f"{value:.3f} [{low:.3f}, {high:.3f}]"
    pairs = dict.fromkeys(row["pair"] for row in numbers(figures["activations-differences"]))
    assert list(pairs) == ["ia2-sft − sft", "ia2 − sft", "ia2-sft − ia2"]


@pytest.mark.parametrize("missing", [None, math.nan])
def test_missing_numbers_and_answers_of_several_tokens(
    result: dict[str, Any], missing: float | None, tmp_path: Path
) -> None:
    section = result["activations"]
    views = {view["name"]: view for view in section["views"]}
    for view in views.values():
        view["asim_by_token"] = {"value": [0.5] * 5, "count": [40, 39, 38, 37, 36]}
        view.pop("centred_by_layer", None)
    views["base"]["asim_by_token"] = {"value": [0.4] * 3, "count": [40, 39, 38]}
    for end in ("value", "low", "high"):
        views["sft"]["asim_by_layer"][end][2] = missing
    views["sft"]["variance_unexplained_by_layer"][2] = missing
    figures = {figure.name.removeprefix("activations-"): figure for figure in activation_figures(section)}
    for figure in figures.values():
        assert len(figure.pictures()) == len(figure.panels)
        figure.save(tmp_path / "figure.svg")
    assert numbers(figures["layers"])[2]["sft"] == numbers(figures["unexplained"])[2]["sft"] == "–"
    tokens = numbers(figures["tokens"])
    assert [row["answers"] for row in tokens] == ["40", "39", "38", "37", "36"]
    assert [row["base"] for row in tokens] == ["0.400", "0.400", "0.400", "–", "–"]


def test_one_layer_and_one_adapter(result: dict[str, Any], tmp_path: Path) -> None:
    section = result["activations"]
    section["layers"] = [4]
    section["views"] = [view for view in section["views"] if view["name"] in ("base", "sft")]
    section["differences"] = [d for d in section["differences"] if (d["a"], d["b"]) == ("sft", "base")]
    for found in (*section["views"], *section["differences"]):
        found["asim_by_layer"] = {end: part[:1] for end, part in found["asim_by_layer"].items()}
    for view, values in zip(section["views"], ([0.01], [9.0]), strict=True):
        view["variance_unexplained_by_layer"] = values
        view.pop("centred_by_layer", None)
    figures = activation_figures(section)
    pictures = {figure.name: figure.save(tmp_path / "figure.svg").read_text() for figure in figures}
    # the base model is what one adapter is compared with; without controls they have no figure
    names = ("layers", "differences", "unexplained")
    assert list(pictures) == [f"activations-{name}" for name in names]
    # the numbers of a logarithmic axis are written out
    assert ">0.02</text>" in pictures["activations-unexplained"]
    assert activation_figures({"layers": [], "views": [], "differences": []}) == []


def test_colours_are_the_recipes() -> None:
    styles = view_styles(["ia2-sft", "icl-other", "sft"])
    assert (styles["sft"], styles["ia2-sft"]) == (recipe_style("sft"), recipe_style("ia2-sft"))
    # two variants of a recipe cannot have its one colour
    twice = view_styles(["base", "ia2-sft", "ia2-sft@dora"])
    assert twice["ia2-sft"]["color"] != twice["ia2-sft@dora"]["color"]
