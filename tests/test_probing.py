"""Whether alignment will help: verdicts on made arrays, and on a model that learns in context."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benches import icl_base, icl_examples

from ia2.config import ProbeConfig
from ia2.errors import DataError
from ia2.examples import Example, Examples
from ia2.models import BaseModel
from ia2.probing import judge, probe
from ia2.task import Task

LABELS = Task("classification", labels=(" a", " b"), max_answer_tokens=1)
FREE = Task("generation")


def right(share: float, n: int, start: int = 0) -> np.ndarray:
    """``share`` of n rows are right, counted from row ``start``."""
    found = np.zeros(n)
    found[[(start + i) % n for i in range(round(share * n))]] = 1
    return found


@pytest.mark.parametrize(
    ("icl", "base", "guess", "n", "task", "verdict", "because"),
    [
        (0.95, 0.5, 0.5, 60, LABELS, "likely to help", "clearly above the base"),
        (0.5, 0.5, 0.5, 60, LABELS, "unlikely", "at chance"),
        (0.3, 0.2, 0.5, 60, LABELS, "unlikely", "at chance"),
        (0.55, 0.2, 0.5, 60, LABELS, "unlikely", "at chance"),
        (0.75, 0.25, 0.5, 8, LABELS, "unclear", "too few rows to tell ICL from chance"),
        (0.9, 0.9, 0.5, 60, LABELS, "unclear", "hardly better"),
        (0.9, 0.95, 0.5, 60, LABELS, "unclear", "hardly better"),
        (0.9, 0.8, 0.5, 20, LABELS, "unclear", "too few to be sure"),
        (0.9, 0.1, 0.95, 60, LABELS, "unlikely", "at chance"),
        (0.4, 0.1, 0.0, 60, FREE, "likely to help", "clearly above"),
        (0.0, 0.0, 0.0, 60, FREE, "unlikely", "at chance"),
        (0.4, 0.4, 0.0, 60, FREE, "unclear", "hardly better"),
    ],
)
def test_verdicts(
    icl: float, base: float, guess: float, n: int, task: Task, verdict: str, because: str
) -> None:
    found, reason = judge(right(icl, n), right(base, n), right(guess, n), task)
    assert found == verdict
    assert because in reason
    assert f"on {n} rows" in reason
    assert "\n" not in reason


def test_icl_is_held_against_guessing_where_only_labels_compete() -> None:
    """Over the vocabulary a model may answer beside the labels; that is no worse than guessing."""
    arrays = right(0.4, 60), right(0.1, 60), right(0.5, 60)
    assert judge(*arrays, LABELS)[0] == "unlikely"
    verdict, reason = judge(*arrays, LABELS, in_label_set=right(0.9, 60))
    assert verdict == "likely to help"
    assert "ICL 40% (90% in the label set), base 10%" in reason
    assert judge(*arrays, LABELS, in_label_set=right(0.5, 60))[0] == "unlikely"


@pytest.fixture(scope="module")
def base(tiny_icl_model_path: Path) -> BaseModel:
    return icl_base(tiny_icl_model_path)


@pytest.mark.parametrize("task", [0, 1, 2])
def test_a_task_that_is_learnt_in_context(base: BaseModel, task: int) -> None:
    # as many demonstrations as the model was trained with: it answers all 17 rows rightly
    found = probe(base, icl_examples(17, task=task))
    assert found.verdict == "likely to help", found.reason
    accuracy = found.facts["accuracy"]
    assert accuracy["icl"] > 0.9
    assert accuracy["icl"] > accuracy["base"] + 0.2
    assert accuracy["most_frequent_label"] == 6 / 17


@pytest.mark.parametrize("task", [0, 1, 2])
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
    found = probe(base, icl_examples(30), ProbeConfig(max_queries=12, demo_permutations=2))
    facts = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (facts["rows"], facts["demonstrations"]) == (12, 11)
    assert set(facts["accuracy"]) == {
        "icl",
        "base",
        "icl_in_label_set",
        "base_in_label_set",
        "most_frequent_label",
    }
    assert facts["accuracy"]["icl_in_label_set"] >= facts["accuracy"]["icl"]
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


def test_too_few_rows(base: BaseModel) -> None:
    rows = icl_examples(6)
    with pytest.raises(DataError, match="asked for 20 rows, there are 6"):
        probe(base, rows, ProbeConfig(num_examples=20))
    with pytest.raises(DataError, match="at least two rows"):
        probe(base, rows, ProbeConfig(num_examples=1))
