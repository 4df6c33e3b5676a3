"""The method on a model that really learns in context: ten tasks, each with a hidden rule of its own.

The tiny model (tests/tiny_icl) infers a random class-to-label map from demonstrations. Accuracy and ECE of
every recipe are printed (`pytest -s`) and asserted only where the effect is real on such a model.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from ia2 import CompareConfig, Examples, compare, load_base
from ia2.utils.files import read_json
from tests.tiny_icl.tasks import sample_task

SEEDS = 10
RECIPES = ("base", "icl", "sft", "ia2", "ia2-sft")


def rows(pairs: list[tuple[str, str]], name: str) -> Examples:
    return Examples.from_rows([{"prompt": q, "completion": a} for q, a in pairs], name=name)


@pytest.fixture(scope="module")
def outcomes(
    tmp_path_factory: pytest.TempPathFactory, tiny_icl_model_path: Path
) -> dict[str, dict[str, np.ndarray]]:
    """Recipe → metric → one value a seed."""
    base = load_base(str(tiny_icl_model_path), device="cpu")
    found: dict[str, dict[str, list[float]]] = {r: {"accuracy": [], "ece": [], "asim": []} for r in RECIPES}
    began = time.perf_counter()
    for seed in range(SEEDS):
        task = sample_task(seed, num_classes=2)
        config = CompareConfig(
            recipes=list(RECIPES),
            seeds=1,
            seed=seed,
            num_examples=8,
            balanced=True,
            selection="dev",
            align={"eval_every": 10, "epochs": 25, "learning_rate": 2e-3},
            sft={"eval_every": 5, "epochs": 12, "learning_rate": 3e-3},
        )
        folder = tmp_path_factory.mktemp("compare") / str(seed)
        train = rows(task.examples(24, seed), "train")
        result = compare(
            base, train, config, test=rows(task.examples(60, seed + 1000), "test"), output_dir=folder
        )
        summary = read_json(result.folder / "compare.json")
        for recipe in RECIPES:
            entry = summary["recipes"][recipe]
            found[recipe]["accuracy"].append(entry["metrics"]["vocabulary"]["accuracy"]["value"])
            found[recipe]["ece"].append(entry["metrics"]["vocabulary"]["ece"]["value"])
            found[recipe]["asim"].append(entry["asim"]["value"] if "asim" in entry else 1.0)
    print(f"\n{SEEDS} tasks in {time.perf_counter() - began:.0f} s; mean over tasks (standard deviation):")
    for recipe in RECIPES:
        cells = [f"{k} {np.mean(v):.3f} ({np.std(v):.3f})" for k, v in found[recipe].items()]
        print(f"  {recipe:8s} " + ", ".join(cells))
    return {r: {k: np.array(v) for k, v in metrics.items()} for r, metrics in found.items()}


def test_the_base_is_at_chance_and_in_context_learning_is_not(outcomes: dict) -> None:
    # eight labels exist and the map is random: without demonstrations no argmax can beat one half
    assert outcomes["base"]["accuracy"].mean() < 0.35
    assert outcomes["icl"]["accuracy"].mean() > 0.9


def test_alignment_raises_similarity_to_in_context_learning(outcomes: dict) -> None:
    gain = outcomes["ia2"]["asim"] - outcomes["base"]["asim"]
    assert (gain > 0.15).all(), gain
    assert outcomes["ia2"]["asim"].mean() > 0.75


def test_fine_tuning_after_alignment_keeps_more_of_it_than_fine_tuning_alone(outcomes: dict) -> None:
    kept = outcomes["ia2-sft"]["asim"] - outcomes["sft"]["asim"]
    assert (kept > 0).all(), kept
    assert kept.mean() > 0.2


def test_alignment_first_is_better_calibrated_than_fine_tuning_alone(outcomes: dict) -> None:
    assert (outcomes["sft"]["ece"] - outcomes["ia2-sft"]["ece"]).mean() > 0.1


def test_trained_recipes_learn_the_rule(outcomes: dict) -> None:
    """Which of them is more accurate differs from task to task here, so only a floor is asserted."""
    for recipe in ("sft", "ia2", "ia2-sft"):
        assert outcomes[recipe]["accuracy"].mean() > 0.75, recipe
