"""Whether alignment will help: reasons, and verdicts on a model that learns in context."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
from helpers.benches import clone, icl_base, icl_examples

from ia2.config import AdaptConfig, ProbeConfig, TrainConfig
from ia2.data.examples import Example, Examples
from ia2.evaluation.headroom import judge
from ia2.experiment.adapt import adapt
from ia2.experiment.probe import Probe, choose_recipe, probe, reason_of
from ia2.models.load import BaseModel
from ia2.utils.errors import ConfigError, DataError, RunFolderError


def test_reasons_hold_the_numbers_and_a_way_on() -> None:
    """Whether words and numbers agree is asked of the verdict itself (test_statistics.py)."""
    rows = [1.0] * 30 + [0.0] * 10
    half = [0.0] * 20 + rows[20:]
    for icl, sft, base, chance, expected, todo in (
        (rows, half, half, 0.2, "ICL is better than SFT, and than", "ia2 compare"),
        (rows, [1.0] * 40, [0.0] * 40, 0.2, "SFT is better than ICL", "--recipe sft"),
        (rows, rows, [0.0] * 40, 0.2, "ICL and SFT cannot be told apart", "More labelled rows"),
        (rows, rows, [1.0] * 40, 0.2, "ICL is not above the bare model", "--label-map"),
        (rows, rows, [1.0] * 40, 0.8, "ICL is not above guessing", "--label-map"),
    ):
        reason = reason_of(judge(icl, sft, base, chance, units="rows"), 40)
        assert reason.startswith(expected)
        assert todo in reason and "on 40 rows" in reason and "\n" not in reason
        assert "ICL 75.0%" in reason and "guessing" in reason


@pytest.fixture(scope="module")
def base(tiny_icl_model_path: Path) -> BaseModel:
    return icl_base(tiny_icl_model_path)


@pytest.mark.parametrize("task", [0, 1])
def test_a_task_that_is_learnt_in_context(base: BaseModel, task: int) -> None:
    # as many demonstrations as the model was trained with: it answers all 17 rows rightly
    found = probe(base, icl_examples(17, task=task))
    assert found.verdict == "likely to help", found.reason
    accuracy = found.facts["accuracy"]
    assert accuracy["icl_leave_one_out"] > 0.9
    assert accuracy["icl"] > accuracy["base"] + 0.2
    assert accuracy["icl"] > accuracy["sft"] and found.facts["headroom"]["low"] > 0
    assert accuracy["most_frequent_label"] == 6 / 17


@pytest.mark.parametrize("task", [0, 1])
def test_shuffled_labels(base: BaseModel, task: int) -> None:
    rows = icl_examples(17, task=task)
    answers = rows.answers
    random.Random(task).shuffle(answers)
    shuffled = Examples([Example(r.query, a, r.source) for r, a in zip(rows, answers, strict=True)])
    found = probe(base, shuffled)
    assert found.verdict == "unlikely", found.reason
    assert "--label-map" in found.reason


def test_facts(base: BaseModel) -> None:
    before = {name: p.clone() for name, p in base.model.named_parameters()}
    found = probe(base, icl_examples(30), ProbeConfig(max_queries=12, context_draws=2, selection="dev"))
    facts = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (facts["rows"], facts["demonstrations"]) == (12, 11)
    accuracy = facts["accuracy"]
    assert set(accuracy) == {
        *("icl", "sft", "icl_leave_one_out", "base", "icl_leave_one_out_vocabulary", "base_vocabulary"),
        "most_frequent_label",
    }
    assert accuracy["icl_leave_one_out"] >= accuracy["icl_leave_one_out_vocabulary"]
    assert facts["headroom"]["value"] == pytest.approx(accuracy["icl"] - accuracy["sft"])
    assert (facts["sft"]["folds"], facts["sft"]["rows"]) == (3, 8)
    assert 20 <= facts["sft"]["steps"] <= 40
    assert facts["chance"] == pytest.approx(1 / 3)
    cost = facts["cost"]
    # a run on all 30 rows: 20 to train on, five steps an epoch, at most 50 epochs; L·d·4 bytes a row
    assert cost["num_train"] == 20
    assert cost["max_steps_a_stage"] == 250
    assert cost["target_bytes"] == 30 * 4 * 64 * 4
    for name in ("teacher_seconds", "step_seconds", "training_seconds_at_most"):
        assert cost[name] > 0
    assert facts["machine"]["cpu_cores"] >= 1
    # the model is as before
    after: Any = dict(base.model.named_parameters())
    assert list(before) == list(after)
    assert all((before[name] == after[name]).all() for name in before)
    assert not any(p.requires_grad for p in after.values())


def test_what_unlabelled_rows_would_bring(base: BaseModel) -> None:
    """Rows beyond N are answered behind all N; without such rows, behind the rows of the other folds."""
    found = probe(base, icl_examples(30), ProbeConfig(num_examples=6)).facts
    teacher = found["teacher_of_unlabelled"]
    assert (teacher["rows"], teacher["demonstrations"]) == (24, 6)
    alone = found["accuracy"]["icl_leave_one_out"]
    better = "better ones" if teacher["accuracy"] > alone else "not better ones"
    assert f"{alone:.1%}" in found["unlabelled"] and f"{teacher['accuracy']:.1%}" in found["unlabelled"]
    assert found["unlabelled"].endswith(f"{better}.")
    found = probe(base, icl_examples(12)).facts
    assert found["teacher_of_unlabelled"] == {
        "rows": 12,
        "demonstrations": 8,
        "accuracy": found["accuracy"]["icl"],
    }


def test_two_rows_cannot_be_held_out(base: BaseModel) -> None:
    found = probe(base, icl_examples(2))
    assert found.facts["sft"] is None and found.facts["accuracy"]["sft"] is None
    assert "SFT was not run" in found.reason or found.verdict == "unlikely"


def test_too_few_rows(base: BaseModel) -> None:
    rows = icl_examples(6)
    with pytest.raises(DataError, match="asked for 20 rows, there are 6"):
        probe(base, rows, ProbeConfig(num_examples=20))
    with pytest.raises(DataError, match="at least two rows"):
        probe(base, rows, ProbeConfig(num_examples=1))


# ------------------------------------------------------------------------------------- recipe: auto


def shuffled(count: int) -> Examples:
    """Rows whose answers have nothing to do with them."""
    rows = icl_examples(count)
    answers = rows.answers
    random.Random(1).shuffle(answers)
    return Examples([Example(r.query, a, r.source) for r, a in zip(rows, answers, strict=True)], name="rows")


@pytest.mark.parametrize(("rows", "recipe"), [(icl_examples(17), "ia2-sft"), (shuffled(17), "sft")])
def test_auto_takes_the_method_where_in_context_learning_helps(
    rows: Examples, recipe: str, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(align={"epochs": 2}, sft={"epochs": 2}, learning_rates=[3e-3], selection="dev")
    assert config.recipe == "auto"
    result = adapt(clone(base), rows, config, output_dir=tmp_path / "out")
    assert (result.config.recipe, result.metrics["recipe"]) == (recipe, recipe)
    reason = result.metrics["chosen_because"]
    assert "ICL" in reason and reason in (tmp_path / "out" / "README.md").read_text()
    # the same run knows what it chose
    monkeypatch.setattr("ia2.experiment.probe.probe", lambda *_: pytest.fail("probed again"))
    again = adapt(clone(base), rows, config, output_dir=tmp_path / "out")
    assert again.metrics == result.metrics
    # another run is refused before it is probed
    with pytest.raises(RunFolderError, match="holds another run"):
        adapt(clone(base), rows, config.model_copy(update={"seed": 1}), output_dir=tmp_path / "out")


@pytest.mark.parametrize(("unlabelled", "recipe"), [(None, "sft"), ("more.jsonl", "ia2-sft")])
def test_auto_learns_from_no_teacher_that_guesses(
    unlabelled: str | None, recipe: str, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one row a label, leave one out is always wrong; other rows may be answered rightly."""
    accuracy = {"icl_leave_one_out": 0.25, "most_frequent_label": 0.25}
    found = Probe("unclear", "ICL and SFT cannot be told apart.", {"accuracy": accuracy, "chance": 0.25})
    monkeypatch.setattr("ia2.experiment.probe.probe", lambda *_: found)
    chosen, reason = choose_recipe(base, icl_examples(4), AdaptConfig(unlabelled=unlabelled))
    assert chosen == recipe
    assert (reason == found.reason) if unlabelled else ("25.0%" in reason and "--unlabelled" in reason)


def test_rows_that_nothing_learns_from(base: BaseModel, caplog: pytest.LogCaptureFixture) -> None:
    """Refused where the user named the recipe; where it was chosen, told, and counted nowhere."""
    more = Examples([Example(r.query, None, r.source) for r in icl_examples(20, seed=9)], name="more")
    config = TrainConfig(sft={"epochs": 1}, learning_rates=[3e-3], selection="dev")
    with caplog.at_level(logging.INFO, "ia2"):
        found = adapt(clone(base), shuffled(17), config, unlabelled=more).metrics
    assert found["recipe"] == "sft" and "num_unlabelled" not in found
    assert any("unlabelled rows are not used" in message for message in caplog.messages)
    with pytest.raises(ConfigError, match="'sft' learns nothing from unlabelled rows"):
        adapt(clone(base), shuffled(17), config.model_copy(update={"recipe": "sft"}), unlabelled=more)


def test_a_file_of_settings_for_training_serves_a_probe(base: BaseModel) -> None:
    """What it says of unlabelled rows is not for a probe; its selection and its rate for SFT are."""
    config = ProbeConfig(unlabelled="more.jsonl", selection="folds", sft={"learning_rate": 2e-3})
    found = probe(base, icl_examples(9), config)
    assert found.facts["sft"]["rate"] == 2e-3
    assert found.facts["cost"]["num_train"] == 9


def test_auto_does_not_probe_two_rows(base: BaseModel) -> None:
    recipe, reason = choose_recipe(base, icl_examples(2), AdaptConfig())
    assert recipe == "ia2-sft" and "2 rows" in reason
