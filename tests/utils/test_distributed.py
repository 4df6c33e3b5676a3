"""Rows are shared among the processes of a launch, and the results are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.benches import base_of, bench_of, icl_base, icl_examples, taught, word_examples, wordy_model
from helpers.launching import together
from helpers.words import make_word_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from ia2 import CompareConfig, compare
from ia2.utils import distributed

gloo = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 6))
def test_shares_are_neighbours_of_about_the_same_weight(weights: list[int], count: int) -> None:
    found = distributed.shares(weights, count)
    assert len(found) == count
    assert [i for share in found for i in share] == list(range(len(weights)))
    if sum(weights):
        for share in found:
            most = sum(weights) / count + max(weights)
            assert sum(weights[i] for i in share) <= most


def test_a_process_alone_has_everything() -> None:
    def refuse(i: int) -> float:
        raise AssertionError("weights are not asked for")

    assert distributed.share(3, refuse) == range(3)
    assert distributed.gathered("mine") == ["mine"]
    assert distributed.joined([1, 2]) == [1, 2]
    assert distributed.is_first()


def passes(folder: Path, task: str, targets: str) -> dict[str, Any]:
    """Teacher passes and evaluations of one workbench, and how many tokens this process computed."""
    tokenizer = make_word_tokenizer()
    base = base_of(wordy_model().double(), tokenizer)  # so that other batches round alike
    computed = []
    base.model.get_input_embeddings().register_forward_hook(
        lambda module, given, output: computed.append(given[0].numel())
    )
    generation = task == "generation"
    rows = word_examples(28, label_words=4 if generation else None)
    settings = {"task": task, "targets": targets, **({"max_answer_tokens": 7} if generation else {})}
    bench = bench_of(base, rows[:8], rows[8:13], folder, randomise=True, **settings)
    test = rows[13:]
    found = taught(bench)
    teacher = sum(computed)
    reference = bench.teaching.reference(test)
    evaluated = [bench.evaluate(recipe, test, reference) for recipe in ("base", "sft", "icl")]
    return {
        "answers": [answer.ids for part in found for answer in part.answers],
        "rms": [part.rms for part in found],
        "targets": [
            part.get(i).numpy() for part in found if targets != "online" for i in range(len(part.answers))
        ],
        "reference": [reference.get(i).numpy() for i in range(len(test))],
        "predictions": [[p.to_dict() for p in each.predictions] for each in evaluated],
        "temperatures": [each.measured.temperatures for each in evaluated],
        "similarity": [each.similarity and each.similarity.to_dict() for each in evaluated],
        "tokens": [teacher, sum(computed) - teacher],
    }


@gloo
@pytest.mark.parametrize(
    ("task", "targets"), [("generation", "store"), ("classification", "memory"), ("generation", "online")]
)
def test_two_processes_share_the_rows(task: str, targets: str, tmp_path: Path) -> None:
    alone = passes(tmp_path / "alone", task, targets)
    both = together(tmp_path / "logs", passes, tmp_path / "both", task, targets)
    assert alone["answers"] and alone["reference"]
    for found in both:
        assert found["answers"] == alone["answers"]
        for name in ("rms", "targets", "reference", "temperatures", "similarity"):
            assert_close(found[name], alone[name])
        assert_close(found["predictions"], alone["predictions"])
    if targets == "store":
        shards = sorted(file.name for file in (tmp_path / "both" / "teacher" / "train").glob("shard-*"))
        assert shards == ["shard-000-00000.safetensors", "shard-001-00000.safetensors"]
    for place, whole in enumerate(alone["tokens"]):
        parts = [found["tokens"][place] for found in both]
        assert max(parts) < 0.7 * whole and min(parts) > 0.3 * whole, (parts, whole)


def compared(path: Path, folder: Path) -> dict[str, Any]:
    """Metrics of a comparison with cross-fitting, which is then read again from its files."""
    config = CompareConfig(
        recipes=["base", "icl", "ia2-sft"], seeds=1, folds=2, align={"epochs": 2}, sft={"epochs": 2}
    )
    found, again = (
        {
            name: recipe["metrics"]
            for name, recipe in compare(icl_base(path), icl_examples(16), config, output_dir=folder)
            .summary["recipes"]
            .items()
        }
        for _ in range(2)
    )
    assert found == again
    return found


@gloo
def test_two_processes_compare(tiny_icl_model_path: Path, tmp_path: Path) -> None:
    alone = compared(tiny_icl_model_path, tmp_path / "alone")
    for found in together(tmp_path / "logs", compared, tiny_icl_model_path, tmp_path / "both"):
        for name, scopes in alone.items():
            for scope in ("vocabulary", "labels"):
                for metric in ("accuracy", "nll"):
                    here, there = found[name][scope][metric], scopes[scope][metric]
                    assert here["value"] == pytest.approx(there["value"], rel=1e-3), (name, scope, metric)


def assert_close(one: Any, other: Any) -> None:
    """Equal, and numbers to rounding."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_close(a, b)
    elif isinstance(one, (float, np.ndarray)):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    else:
        assert one == other
