"""Model cards and tables of comparisons, from made results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.finished_runs import write_comparison

from ia2.config.sections import AdapterConfig
from ia2.evaluation.metrics import Measured, RowMeasures, summarise
from ia2.evaluation.tables import comparison_table, mean_of
from ia2.experiment.card import model_card
from ia2.prompts.task import Task
from ia2.report.results import without_older_intervals
from ia2.utils.format import Table, markdown
from ia2.utils.wording import estimate

TASK = Task("classification", labels=(" no", " yes"), max_answer_tokens=1)


def measured(*scopes: str) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    rows = {scope: RowMeasures(*rng.random((4, 20))) for scope in scopes}
    return summarise([Measured(rows, rows, dict.fromkeys(scopes, 1.3))])


def metrics(**changes: Any) -> dict[str, Any]:
    return {
        "recipe": "ia2-sft", "learning_rate": 1e-3, "selected_by": "dev loss", "num_train": 20, "num_dev": 10,
        "test": measured("vocabulary", "labels"), **changes,
    }  # fmt: skip


def facts(model: str = "owner/name", adapter: dict[str, Any] | None = None, **config: Any) -> dict[str, Any]:
    settings = AdapterConfig(**(adapter or {})).model_dump()
    return {
        "config": {"model": model, "seed": 4, "schedules": {}, "adapter": settings, **config},
        "data": {"train": "0123abcd", "dev": "4567ef01", "test": ""},
    }


def front_matter(card: str) -> Any:
    return yaml.safe_load(card.split("---\n", 2)[1])


def test_a_card() -> None:
    card = model_card(metrics(), facts(), TASK)
    expected = {"base_model": "owner/name", "library_name": "peft", "tags": ["ia2", "few-shot", "adapter"]}
    assert front_matter(card) == expected
    value = metrics()["test"]["labels"]["accuracy"]["value"]
    for text in (
        "`owner/name`", "0123abcd", "4567ef01", "| seed | 4 |", "one of `no`, `yes`", "on 20 test rows",
        f"| accuracy | {value:.3f} | ", "| metric | among the labels | over the vocabulary |",
        "one draw of training examples: no intervals",
    ):  # fmt: skip
        assert text in card
    # proper scores before ECE; nothing of this machine
    rows = re.findall(r"^\| (\w+) \| [\d.]+ \| [\d.]+ \|$", card, re.MULTILINE)
    assert rows[:4] == ["accuracy", "NLL", "Brier", "ECE"]
    assert not [path for path in (Path.cwd(), Path.home(), "/home", "/tmp") if str(path) in card]


def test_cards_of_other_runs() -> None:
    schedule = {"mine": [{"stage": "sft"}, {"stage": "align", "epochs": 3}]}
    card = model_card(metrics(recipe="mine"), facts(schedules=schedule), TASK)
    assert "Trained by the stages sft, align." in card
    odd = r'C:\my "models"\m'
    assert front_matter(model_card(metrics(), facts(odd), TASK))["base_model"] == odd
    given = metrics(note="dev rows also chose the weights")
    given["dev"] = given.pop("test")
    card = model_card(given, facts("demo"), TASK)
    assert "on 20 dev rows" in card and "- Dev rows also chose the weights." in card
    assert "base_model" not in front_matter(card) and 'load_base("demo")' in card
    del given["dev"]
    free = model_card(given, facts(), Task("generation", max_answer_tokens=80))
    assert "Not evaluated" in free and "free text, up to 80 tokens" in free


@pytest.mark.parametrize(
    ("model", "adapter", "needed"),
    [
        ("owner/name", {}, "PeftModel.from_pretrained(base"),
        ("demo", {}, "PeftModel.from_pretrained(base"),
        ("/home/someone's/model", {}, "PeftModel.from_pretrained(base"),
        ("owner/name", {"type": "full"}, 'AutoModelForCausalLM.from_pretrained("path/to'),
        ("owner/name", {"type": "bottleneck"}, "import ia2.adapters.bottleneck"),
        ("owner/name", {"peft": {"peft_type": "BOTTLENECK"}}, "import ia2.adapters.bottleneck"),
    ],
)
def test_the_snippet_of_a_card_is_python(model: str, adapter: dict[str, Any], needed: str) -> None:
    card = model_card(metrics(), facts(model, adapter), TASK)
    snippet = card.split("```python\n")[1].split("```")[0]
    compile(snippet, "card", "exec")
    assert needed in snippet
    assert ("PeftModel" in snippet) == (adapter.get("type") != "full")


# ------------------------------------------------------------------------------------------- tables


@pytest.fixture
def summary(tmp_path: Path) -> dict[str, Any]:
    given = write_comparison(tmp_path / "run", recipes=("base", "icl", "sft", "ia2-sft"))
    given["recipes"]["ia2-sft"] |= {"answers": "true", "seconds": {"align": 2.0, "sft": 3.25, "evaluate": 1}}
    return given


def cells(table: Table) -> list[dict[str, str]]:
    columns, rows = table.texts()
    return [dict(zip(columns, row, strict=True)) for row in rows]


def test_a_table(summary: dict[str, Any]) -> None:
    table = comparison_table(summary)
    assert table.texts()[0] == [
        "recipe", "accuracy among the labels", "NLL", "Brier", "ECE", "acc. over the vocabulary",
        "ECE, temp.-scaled", "asim to ICL", "answers", "seconds",
    ]  # fmt: skip
    for row, (recipe, entry) in zip(cells(table), summary["recipes"].items(), strict=True):
        found = entry["metrics"]
        assert row["recipe"] == recipe
        assert row["accuracy among the labels"] == estimate(found["labels"]["accuracy"])
        assert "[" in row["accuracy among the labels"]
        assert row["acc. over the vocabulary"] == mean_of(found["vocabulary"]["accuracy"])
        assert row["ECE, temp.-scaled"] == mean_of(found["scaled"]["labels"]["ece"])
        assert row["asim to ICL"] == ("–" if recipe == "icl" else "0.500")
    assert [row["seconds"] for row in cells(table)] == ["–", "–", "sft 2", "align 2 + sft 3"]
    assert [row["answers"] for row in cells(table)] == ["–", "–", "–", "true"]
    summary["model"], summary["data"]["name"] = "a|b\nc", "x|y.jsonl"
    lines = [line for line in markdown(comparison_table(summary)).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4


def test_free_text_is_measured_by_the_answer(summary: dict[str, Any]) -> None:
    summary["design"]["task"] = "generation"
    for entry in summary["recipes"].values():
        entry["metrics"] = measured("vocabulary", "answer")
    [first, *_] = cells(comparison_table(summary))
    assert not [title for title in first if "label" in title or "vocabulary" in title]
    assert first["ECE"] == estimate(summary["recipes"]["base"]["metrics"]["answer"]["ece"])


def test_notes_say_what_the_table_is_of(summary: dict[str, Any]) -> None:
    base = summary["recipes"]["base"]["metrics"]["labels"]["accuracy"]["value"]
    summary["design"]["learning_rates"] = {"lora": [1e-3, 3e-4]}
    notes = " ".join(comparison_table(summary).notes)
    for text in (
        "owner/name", "rows.jsonl", "8 training and 4 dev", "20 rows, test data", "seeds 0, 1",
        "95% t-intervals over 2 draws", "rate 0.001/0.0003 by dev loss", "the same training examples",
        f"Headroom, accuracy among the labels: icl − sft: +0.200 [+0.100, +0.300]; base {base:.3f}.",
        "ia2-sft − base: accuracy +0.200 [+0.100, +0.300], NLL −0.200 [−0.300, −0.100], Brier +0.000 "
        "[−0.100, +0.100], ECE +0.000 [−0.100, +0.100] (paired by draw and row).",
    ):  # fmt: skip
        assert text in notes


def test_notes_say_what_is_missing(summary: dict[str, Any]) -> None:
    del summary["recipes"]["base"]
    summary["headroom"], summary["diverged"] = {}, {"sft": "0.01"}
    summary["data"]["test"] = {"name": "t"}
    summary["design"] |= {"seeds": [0], "selected_by": None}
    less = summary["differences"]["ia2-sft − base"]
    less |= {"answers": ["true", "ICL's"], "ece": {"value": None, "low": None, "high": None}}
    notes = " ".join(comparison_table(summary).notes)
    for text in (
        "20 test rows", "One draw of training examples: no intervals.", "rate 0.001;", "ECE –",
        "ICL and SFT were not both run; the base model was not run.", "sft diverged at every learning rate",
        "(paired by draw and row; not like for like: true answers against ICL's)",
    ):  # fmt: skip
        assert text in notes


def test_older_intervals_are_left_out(summary: dict[str, Any]) -> None:
    """Bootstrap intervals covered less than they said, and older differences are over the vocabulary."""
    newer = summary["differences"]["ia2-sft − base"]["accuracy"].copy()
    without_older_intervals(summary)
    assert summary["differences"]["ia2-sft − base"]["accuracy"] == newer
    del summary["intervals"]
    without_older_intervals(summary)
    accuracy = {name: entry["metrics"]["labels"]["accuracy"] for name, entry in summary["recipes"].items()}
    assert all(found["low"] is None and found["value"] is not None for found in accuracy.values())
    expected = accuracy["ia2-sft"]["value"] - accuracy["base"]["value"]
    assert summary["differences"]["ia2-sft − base"]["accuracy"] == {
        "value": expected,
        "low": None,
        "high": None,
    }
    assert "intervals were too narrow and are left out" in " ".join(comparison_table(summary).notes)
