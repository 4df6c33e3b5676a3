"""Several demonstration orders: average the teacher's activations, or draw one order an epoch?

    python perf/permutations.py --output results/permutations.json      # about three minutes

Trains IA2 and IA2 → SFT on the tests' small in-context learner: with one order an example, eight averaged,
and one of eight drawn an epoch. Ten hidden rules; means and paired differences to one order.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the tests' tasks

from ia2 import CompareConfig, Examples, compare, load_base
from ia2.experiment.run_folder import machine, versions
from ia2.utils.files import finite, write_json
from ia2.utils.statistics import t_interval
from ia2.utils.wording import estimate
from tests.tiny_icl.tasks import sample_task

MODEL = Path(__file__).resolve().parents[1] / "tests" / "tiny_icl" / "model"
VARIANTS: dict[str, dict[str, Any]] = {
    "one order": {"context_draws": 1},
    "eight, averaged": {"context_draws": 8, "permutation_targets": "mean"},
    "eight, one drawn an epoch": {"context_draws": 8, "permutation_targets": "sample"},
}
RECIPES = ("ia2", "ia2-sft")


def rows(pairs: list[tuple[str, str]], name: str) -> Examples:
    """Examples of a hidden rule."""
    return Examples.from_rows([{"prompt": q, "completion": a} for q, a in pairs], name=name)


def one(base: Any, seed: int, variant: dict[str, Any], folder: str) -> dict[str, dict[str, float]]:
    """Recipe → metric → value, for one hidden rule."""
    task = sample_task(seed, num_classes=2)
    config = CompareConfig(
        recipes=list(RECIPES),
        seeds=1,
        seed=seed,
        num_examples=8,
        balanced=True,
        align={"eval_every": 10, "epochs": 25, "learning_rate": 2e-3},
        sft={"eval_every": 5, "epochs": 12, "learning_rate": 3e-3},
        **variant,
    )
    train, test = rows(task.examples(24, seed), "train"), rows(task.examples(60, seed + 1000), "test")
    summary = compare(base, train, config, test=test, output_dir=folder).summary
    return {
        recipe: {
            "accuracy": summary["recipes"][recipe]["metrics"]["vocabulary"]["accuracy"]["value"],
            "ece": summary["recipes"][recipe]["metrics"]["vocabulary"]["ece"]["value"],
            "asim": summary["recipes"][recipe]["asim"]["value"],
        }
        for recipe in RECIPES
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    base = load_base(str(MODEL), device="cpu")
    values: dict[str, dict[str, dict[str, list[float]]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(given.seeds):
            for number, (name, variant) in enumerate(VARIANTS.items()):
                for recipe, metrics in one(base, seed, variant, f"{scratch}/{seed}-{number}").items():
                    for metric, value in metrics.items():
                        values.setdefault(name, {}).setdefault(recipe, {}).setdefault(metric, []).append(
                            value
                        )
    results: dict[str, Any] = {
        "seeds": given.seeds,
        "machine": machine(),
        "versions": versions(),
        "means": {},
    }
    for name, recipes in values.items():
        for recipe, metrics in recipes.items():
            entry: dict[str, Any] = {}
            for metric, found in metrics.items():
                less = np.array(found) - np.array(values["one order"][recipe][metric])
                interval = t_interval(less).to_dict()
                entry[metric] = {"mean": float(np.mean(found)), "less_one_order": interval}
            results["means"][f"{recipe}, {name}"] = entry
            cells = [
                f"{m} {e['mean']:.3f} ({estimate(e['less_one_order'], signed=True)})"
                for m, e in entry.items()
            ]
            print(f"{recipe:8s} {name:26s} " + "  ".join(cells), flush=True)
    if given.output:
        write_json(given.output, finite(results))


if __name__ == "__main__":
    main()
