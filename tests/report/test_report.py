"""Model cards, tables and figures from made results."""

from __future__ import annotations

import copy
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ia2.config.sections import AdapterConfig
from ia2.evaluation.metrics import Measured, RowMeasures, summarise
from ia2.experiment.card import model_card
from ia2.prompts.task import Task
from ia2.report.data import without_older_intervals
from ia2.report.figures.comparison_figures import comparison_figure, try_comparison_figure
from ia2.report.tables import (
    INTERVALS,
    comparison_columns,
    comparison_lines,
    comparison_markdown,
    difference_lines,
    mean_of,
    rates,
    seconds,
)
from ia2.utils.wording import estimate

TASK = Task("classification", labels=(" no", " yes"), max_answer_tokens=1)


def measured(scopes: tuple[str, ...], seed: int = 0) -> Measured:
    rng = np.random.default_rng(seed)

    def rows() -> RowMeasures:
        correct = (rng.random(20) < 0.7).astype(float)
        return RowMeasures(rng.random(20), correct, rng.random(20), rng.random(20))

    return Measured({s: rows() for s in scopes}, {s: rows() for s in scopes}, dict.fromkeys(scopes, 1.3))


def metrics(**changes: Any) -> dict[str, Any]:
    return {
        "recipe": "ia2-sft",
        "learning_rate": 1e-3,
        "selected_by": "dev loss",
        "num_train": 20,
        "num_dev": 10,
        "test": summarise([measured(("vocabulary", "labels"))]),
        **changes,
    }


def facts(model: str = "owner/name") -> dict[str, Any]:
    return {
        "config": {"model": model, "seed": 4, "schedules": {}, "adapter": AdapterConfig().model_dump()},
        "data": {"train": "0123abcd", "dev": "4567ef01", "test": ""},
    }


def front_matter(card: str) -> Any:
    _, front, _ = card.split("---\n", 2)
    return yaml.safe_load(front)


# --------------------------------------------------------------------------------------- model card


def test_card() -> None:
    card = model_card(metrics(), facts(), TASK)
    assert front_matter(card) == {
        "base_model": "owner/name", "library_name": "peft", "tags": ["ia2", "few-shot", "adapter"]
    }  # fmt: skip
    for text in (
        "`owner/name`",
        "0123abcd",
        "4567ef01",
        "| seed | 4 |",
        "one of `no`, `yes`",
        "On 20 test rows",
    ):
        assert text in card
    found = metrics()["test"]["labels"]["accuracy"]
    assert f"| accuracy | {found['value']:.3f} | " in card
    # what `predict` answers comes first, proper scores before ECE, and one draw has no interval
    assert "| metric | among the labels | over the vocabulary |" in card
    assert re.findall(r"^\| (\w+) \| [\d.]+ \| [\d.]+ \|$", card, re.MULTILINE)[:4] == [
        "accuracy",
        "NLL",
        "Brier",
        "ECE",
    ]
    assert (
        "one draw of training examples: no intervals" in card and "[" not in card.split("## Metrics")[1][:500]
    )


def test_the_snippet_of_a_card_is_python() -> None:
    for model in ("owner/name", "demo", "/home/someone's/model"):
        card = model_card(metrics(), facts(model), TASK)
        snippet = card.split("```python\n")[1].split("```")[0]
        compile(snippet, "card", "exec")
        assert "PeftModel.from_pretrained(base" in snippet


@pytest.mark.parametrize(
    ("adapter", "needed"),
    [
        ({"type": "full"}, 'AutoModelForCausalLM.from_pretrained("path/to'),
        ({"type": "bottleneck"}, "import ia2.adapters.bottleneck"),
        ({"peft": {"peft_type": "BOTTLENECK"}}, "import ia2.adapters.bottleneck"),
    ],
)
def test_the_snippet_suits_the_adapter(adapter: dict[str, Any], needed: str) -> None:
    given = facts("owner/name")
    given["config"]["adapter"] = AdapterConfig(**adapter).model_dump()
    snippet = model_card(metrics(), given, TASK).split("```python\n")[1].split("```")[0]
    compile(snippet, "card", "exec")
    assert needed in snippet
    assert ("PeftModel" in snippet) == (adapter.get("type") != "full")


def test_a_schedule_is_described() -> None:
    given = facts("owner/name")
    given["config"]["schedules"] = {"mine": [{"stage": "sft"}, {"stage": "align", "epochs": 3}]}
    assert "Trained by the stages sft, align." in model_card({**metrics(), "recipe": "mine"}, given, TASK)


def test_card_of_a_demo_model_needs_no_hub() -> None:
    card = model_card(metrics(), facts("demo"), TASK)
    assert "base_model" not in front_matter(card)
    assert 'load_base("demo")' in card


def test_a_card_names_no_path_but_the_user_s_own_model() -> None:
    card = model_card(metrics(), facts("owner/name"), TASK)
    assert str(Path.cwd()) not in card
    assert str(Path.home()) not in card
    assert "/home" not in card
    assert "/tmp" not in card
    assert (
        front_matter(model_card(metrics(), facts(r'C:\my "models"\m'), TASK))["base_model"]
        == r'C:\my "models"\m'
    )


def test_card_of_dev_rows_and_of_none() -> None:
    given = metrics(note="dev rows also chose the weights")
    given["dev"] = given.pop("test")
    card = model_card(given, facts(), TASK)
    assert "On 20 dev rows" in card
    assert "(dev rows also chose the weights)" in card
    del given["dev"]
    assert "Not evaluated" in model_card(given, facts(), TASK)


def test_card_of_free_text() -> None:
    given = metrics(test=summarise([measured(("vocabulary", "answer"))]))
    card = model_card(given, facts(), Task("generation", max_answer_tokens=80))
    assert "free text, up to 80 tokens" in card
    assert "of the whole answer" in card


# ------------------------------------------------------------------------------------------- tables


def summary(
    recipes: tuple[str, ...] = ("base", "icl", "ia2-sft"), task: str = "classification"
) -> dict[str, Any]:
    scopes = ("vocabulary", "labels") if task == "classification" else ("vocabulary", "answer")
    found: dict[str, Any] = {}
    for seed, recipe in enumerate(recipes):
        entry: dict[str, Any] = {
            "metrics": summarise([measured(scopes, seed), measured(scopes, seed + 10)]),
            "answers": "true" if recipe == "ia2-sft" else None,
            "seconds": {"evaluate": 1.0} | ({"align": 2.0, "sft": 3.25} if recipe == "ia2-sft" else {}),
        }
        if recipe != "icl":
            entry["asim"] = {"value": 0.5, "low": 0.4, "high": 0.6}
        found[recipe] = entry
    return {
        "model": "owner/name",
        "data": {"name": "rows.jsonl", "test": None},
        "design": {
            "kind": "3-fold cross-fitting", "num_train": 8, "num_dev": 4, "num_test": 18, "seeds": [0, 1],
            "task": task, "learning_rates": {"lora": [1e-3, 3e-4]}, "selected_by": "dev loss",
            "icl_demonstrations": "the same training examples",
        },
        "recipes": found,
        "differences": {
            "ia2-sft − base": {
                "accuracy": {"value": 0.09, "low": 0.02, "high": 0.15},
                "nll": {"value": -0.05, "low": -0.1, "high": 0.01},
                "brier": {"value": -0.02, "low": -0.04, "high": 0.0},
                "ece": {"value": 0.01, "low": -0.01, "high": 0.03},
            }
        },
        "headroom": {"icl − sft": {"accuracy": {"value": 0.04, "low": -0.01, "high": 0.09}}},
        "intervals": INTERVALS,
    }  # fmt: skip


def test_table() -> None:
    given = summary()
    text = comparison_markdown(given)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3
    assert len({line.count("|") for line in table}) == 1
    columns = comparison_columns(given)
    assert [title for title, _ in columns] == [
        "accuracy among the labels", "NLL", "Brier", "ECE", "acc. over the vocabulary", "ECE, temp.-scaled",
        "asim to ICL", "answers", "seconds",
    ]  # fmt: skip
    header, _, *rows = ([cell.strip(" `") for cell in line.strip("|").split("|")] for line in table)
    assert header == ["recipe", *(title for title, _ in columns)]
    for row, (recipe, entry) in zip(rows, given["recipes"].items(), strict=True):
        assert row == [recipe, *(cell(entry) for _, cell in columns)]
        cells, found = dict(zip(header, row, strict=True)), entry["metrics"]
        assert cells["accuracy among the labels"] == estimate(found["labels"]["accuracy"])
        assert "[" in cells["accuracy among the labels"]
        assert cells["acc. over the vocabulary"] == mean_of(found["vocabulary"]["accuracy"])
        assert cells["ECE, temp.-scaled"] == mean_of(found["scaled"]["labels"]["ece"])
        assert cells["answers"] == ("true" if recipe == "ia2-sft" else "–")
        assert (cells["asim to ICL"] == "–") == (recipe == "icl")
        assert cells["seconds"].startswith("align 2") == (recipe == "ia2-sft")


def test_table_of_free_text_measures_the_answer() -> None:
    given = summary(task="generation")
    titles = [title for title, _ in comparison_columns(given)]
    assert not [title for title in titles if "label" in title or "vocabulary" in title]
    cell = dict(comparison_columns(given))["ECE"](given["recipes"]["base"])
    assert cell == estimate(given["recipes"]["base"]["metrics"]["answer"]["ece"])


def test_lines_say_what_the_table_is_of() -> None:
    given = summary()
    lines = " ".join(comparison_lines(given))
    expected = ["owner/name", "rows.jsonl", "8 training and 4 dev", "18 rows, 3-fold cross-fitting"]
    expected += ["95% t-intervals over 2 draws"]
    for text in [*expected, "seeds 0, 1", "0.001/0.0003 by dev loss", "the same training examples"]:
        assert text in lines
    given["data"]["test"] = {"name": "t"}
    assert "18 test rows" in " ".join(comparison_lines(given))


def test_differences_are_signed() -> None:
    assert difference_lines(summary()) == [
        "ia2-sft − base: accuracy +0.090 [+0.020, +0.150], NLL −0.050 [−0.100, +0.010], Brier −0.020 "
        "[−0.040, +0.000], ECE +0.010 [−0.010, +0.030] (paired by draw and row)"
    ]
    assert "- ia2-sft − base: accuracy +0.090" in comparison_markdown(summary())


def test_headroom_and_the_base_stand_under_the_table() -> None:
    given = summary()
    base = given["recipes"]["base"]["metrics"]["labels"]["accuracy"]["value"]
    [line] = [line for line in comparison_lines(given) if line.startswith("Headroom")]
    headroom = "Headroom, accuracy among the labels: icl − sft: +0.040 [−0.010, +0.090]"
    assert line == f"{headroom}; base {base:.3f}."
    del given["recipes"]["base"]
    given["headroom"] = {}
    [line] = [line for line in comparison_lines(given) if line.startswith("Headroom")]
    assert line.endswith("ICL and SFT were not both run; the base model was not run.")


def test_one_draw_is_said_to_be_one() -> None:
    given = summary()
    given["design"]["seeds"] = [0]
    assert "One draw of training examples: no intervals." in " ".join(comparison_lines(given))


def test_what_is_not_like_for_like_is_said() -> None:
    given = summary()
    given["differences"]["ia2-sft − base"]["answers"] = ["true", "ICL's"]
    assert difference_lines(given)[0].endswith(
        "(paired by draw and row; not like for like: true answers against ICL's)"
    )


def test_older_intervals_are_left_out() -> None:
    """Bootstrap intervals covered less than they said, and older differences are over the vocabulary."""
    given = summary()
    del given["intervals"]
    kept = given["recipes"]["base"]["metrics"]["labels"]["accuracy"]["value"]
    without_older_intervals(given)
    less = given["differences"]["ia2-sft − base"]["accuracy"]
    ends = [given["recipes"][r]["metrics"]["labels"]["accuracy"]["value"] for r in ("ia2-sft", "base")]
    assert less == {"value": ends[0] - ends[1], "low": None, "high": None}
    assert given["recipes"]["base"]["metrics"]["labels"]["accuracy"] == {
        "value": kept,
        "low": None,
        "high": None,
    }
    assert "intervals were too narrow and are left out" in " ".join(comparison_lines(given))
    newer = summary()
    without_older_intervals(newer)
    assert newer["differences"]


def test_what_is_unknown_is_a_dash() -> None:
    assert seconds({"seconds": {"evaluate": 3.0}}) == "–"
    given = summary()
    given["differences"]["ia2-sft − base"]["ece"] = {"value": None, "low": None, "high": None}
    assert "ECE –" in difference_lines(given)[0]


def test_odd_names_do_not_break_the_table() -> None:
    given = summary()
    given["model"], given["data"]["name"] = "a|b\nc", "x|y.jsonl"
    table = [line for line in comparison_markdown(given).splitlines() if line.startswith("|")]
    assert len(table) == 5


# ------------------------------------------------------------------------------------------ figures


def test_a_figure_is_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        comparison_figure(summary(), tmp_path / name)
    first = (tmp_path / "a.svg").read_bytes()
    assert first == (tmp_path / "b.svg").read_bytes()
    text = "".join(ElementTree.fromstring(first).itertext())
    for expected in (
        "owner/name",
        "accuracy",
        "NLL",
        "activation similarity to ICL",
        "ia2-sft",
        "95% t-intervals over 2 draws",
    ):
        assert expected in text
    assert b"/work" not in first
    assert str(tmp_path).encode() not in first


def test_a_figure_escapes_odd_names(tmp_path: Path) -> None:
    odd = 'a<script>&"$x_1$\\frac'
    given = summary(recipes=("base", odd))
    given["model"] = odd
    comparison_figure(given, tmp_path / "odd.svg")
    root = ElementTree.fromstring((tmp_path / "odd.svg").read_bytes())
    texts = "".join(root.itertext())
    assert texts.count(odd) >= 2
    assert not [e for e in root.iter() if e.tag.endswith("script")]


@pytest.mark.parametrize("task", ["classification", "generation"])
@pytest.mark.filterwarnings("error")
def test_a_figure_of_extremes(tmp_path: Path, task: str) -> None:
    given = copy.deepcopy(summary(task=task))
    for entry in given["recipes"].values():
        for scope in ("vocabulary", "labels", "answer"):
            for name, found in entry["metrics"].get(scope, {}).items():
                found.update({"value": 0.0, "low": None, "high": None} if name == "ece" else {})
    found = given["recipes"]["base"].pop("asim")
    found["value"] = -0.2
    comparison_figure(given, tmp_path / "x.svg")
    comparison_figure(given, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_there_is_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with caplog.at_level("INFO", "ia2"):
        assert try_comparison_figure(summary(), tmp_path) is None
    assert "pip install 'ia2[report]'" in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("selected_by", "said"), [("dev loss", "rate 0.001 by dev loss"), (None, "rate 0.001")]
)
def test_a_rate_that_nothing_chose_is_only_named(selected_by: str | None, said: str) -> None:
    assert rates({"learning_rates": {"lora": [1e-3]}, "selected_by": selected_by}) == said
