"""Made-up finished runs, in the files that ``ia2 compare``, ``curve`` and ``train`` leave."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ia2.config.recipes import RECIPES, is_trained
from ia2.evaluation.metrics import Measured, RowMeasures, summarise
from ia2.evaluation.tables import INTERVALS
from ia2.utils.files import finite, write_json, write_text

EVIL = '<script>window.hacked = 1</script></script><img src=x onerror="window.hacked = 2">'
LABELS = ("no", "yes")
LAYERS = [0, 1, 2, 3]

# share of right answers, by recipe
SKILL = {"base": 0.5, "icl": 0.8, "sft": 0.7, "ia2": 0.75, "ia2-sft": 0.95}

_FACTS = {
    "machine": {
        "cpu_cores": 2,
        "threads": 1,
        "memory_gb": 24,
        "accelerators": [],
        "platform": "Linux x86_64",
    },
    "versions": {"python": "3.11.7", "ia2": "0.1.0", "torch": "2.13.0"},
}


def write_comparison(
    folder: Path,
    *,
    recipes: Sequence[str] = tuple(SKILL),
    seeds: int = 2,
    rows: int = 20,
    evil: bool = False,
    difference: tuple[float, float, float] = (0.2, 0.1, 0.3),
    num_train: int = 8,
) -> dict[str, Any]:
    """A comparison of two labels; gives its summary. Rows, gold and predictions are those of a fixed draw."""
    name = EVIL if evil else "rows.jsonl"
    measured: dict[str, list[Measured]] = {recipe: [] for recipe in recipes}
    rng = np.random.default_rng(0)
    for seed in range(seeds):
        where = folder / f"seed-{seed}"
        for recipe in recipes:
            correct = (rng.random(rows) < SKILL.get(recipe, 0.6)).astype(float)
            confidence = 0.5 + rng.random(rows) / 2
            row = RowMeasures(confidence, correct, (confidence - correct) ** 2, rng.random(rows))
            scopes = {"vocabulary": row, "labels": row}
            measured[recipe].append(Measured(scopes, scopes, dict.fromkeys(scopes, 1.0)))
            similarity = None if recipe == "icl" else _similarity(seed)
            outcome = {
                "places": list(range(rows)),
                "measured": {
                    "plain": {s: vars(r) for s, r in scopes.items()},
                    "scaled": {},
                    "temperatures": {},
                },
                "similarity": similarity,
            }
            write_json(where / "evaluations" / f"{recipe}.json", outcome)
            lines = [_prediction(n, bool(correct[n]), float(confidence[n]), name, evil) for n in range(rows)]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            write_text(where / "evaluations" / f"{recipe}.predictions.jsonl", text)
        for chain in ("align", "align-sft", "sft"):
            write_json(where / chain / "lr-0.001" / "stage.json", _stage(seed))
    value, low, high = difference
    found = {
        "accuracy": {"value": value, "low": low, "high": high},
        "nll": {"value": -value, "low": -high, "high": -low},
        "brier": {"value": 0.0, "low": -0.1, "high": 0.1},
        "ece": {"value": 0.0, "low": -0.1, "high": 0.1},
    }
    summary = {
        "model": "owner/name",
        "data": {"name": name, "fingerprint": "0123456789abcdef", "rows": 50, "test": None},
        "design": {
            "kind": "test data", "num_train": num_train, "num_dev": 4, "num_test": rows,
            "seeds": list(range(seeds)),
            "task": "classification", "labels": list(LABELS), "single_token": True,
            "learning_rates": {"lora": [1e-3]}, "selected_by": "dev loss",
            "icl_demonstrations": "the same training examples",
        },
        "recipes": {recipe: _entry(recipe, measured[recipe]) for recipe in recipes},
        "differences": {f"ia2-sft − {r}": found for r in recipes if r != "ia2-sft" and "ia2-sft" in recipes},
        "headroom": {"icl − sft": found} if {"icl", "sft"} <= set(recipes) else {},
        "intervals": INTERVALS,
        "config": {"data": "/somebody/rows.jsonl", "num_examples": num_train, "adapter": {"type": "lora"}},
        **_FACTS,
    }  # fmt: skip
    write_json(folder / "compare.json", finite(summary))
    write_json(folder / "ia2_run.json", {"kind": "compare", "config": summary["config"], "data": {}})
    return summary


def _entry(recipe: str, measured: Sequence[Measured]) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "recipe": recipe,
        "variant": "",
        "description": RECIPES[recipe].description if recipe in RECIPES else "of our own",
        "metrics": summarise(measured),
        "seconds": {"evaluate": 1.0} | ({"sft": 2.0} if is_trained(recipe) else {}),
        "tokens_per_query": 120.0 if recipe == "icl" else 12.0,
    }
    if recipe != "icl":
        entry["asim"] = {"value": 0.5, "low": 0.4, "high": 0.6}
        entry["similarity"] = {"asim_by_layer": _similarity(0)["asim_by_layer"], "layers": LAYERS}
    return entry


def _similarity(seed: int) -> dict[str, Any]:
    return {"asim": 0.5 + seed / 10, "layers": LAYERS, "asim_by_layer": [0.9, 0.5 + seed / 10, 0.4, 0.6]}


def _stage(seed: int) -> dict[str, Any]:
    history = [
        entry
        for step in range(1, 5)
        for entry in ({"loss": 1 / step + seed, "step": step}, {"eval_loss": 1 / step + 0.1, "step": step})
    ]
    return {"stage": "sft", "dev_loss": 0.35, "best_step": 4, "steps": 4, "history": history}


def _prediction(n: int, right: bool, confidence: float, name: str, evil: bool) -> dict[str, Any]:
    gold = LABELS[n % 2]
    predicted = gold if right else LABELS[1 - n % 2]
    return {
        "source": f"{name}:{n + 1}",
        "query": f"{EVIL if evil else 'Text:'} row {n:02}",
        "gold": gold + (EVIL if evil else ""),
        "predicted": predicted + (EVIL if evil else ""),
        "correct": right,
        "confidence": confidence,
    }


def write_curve(folder: Path, sizes: Sequence[int] = (4, 8)) -> None:
    """A curve of comparisons."""
    found = {n: write_comparison(folder / f"n-{n}", rows=12, num_train=n) for n in sizes}
    curves = {
        recipe: [
            {
                "num_train": n,
                **{m: s["recipes"][recipe]["metrics"]["vocabulary"][m] for m in ("accuracy", "ece")},
            }
            for n, s in found.items()
        ]
        for recipe in SKILL
    }
    summary = {
        "model": "owner/name",
        "data": found[sizes[0]]["data"],
        "title": "rows.jsonl, 12 test rows, 2 seeds",
        "sizes": list(sizes),
        "curves": curves,
        "differences": {str(n): s["differences"]["ia2-sft − sft"] for n, s in found.items()},
        "seeds": [0, 1],
        "config": {"sizes": list(sizes)},
        **_FACTS,
    }
    write_json(folder / "curve.json", finite(summary))


def write_training(folder: Path, *, note: str = "") -> None:
    """An adapter with its metrics."""
    rng = np.random.default_rng(1)
    correct, confidence = (rng.random(20) < 0.8).astype(float), 0.5 + rng.random(20) / 2
    row = RowMeasures(confidence, correct, confidence, confidence)
    measured = Measured({"vocabulary": row, "labels": row}, {}, {})
    metrics = {
        "recipe": "ia2-sft", "model": "owner/name", "learning_rate": 1e-3, "selected_by": "dev loss",
        "num_train": 8, "num_dev": 4, "test": summarise([measured]), "machine": _FACTS["machine"],
        **({"note": note} if note else {}),
    }  # fmt: skip
    config = {"seed": 3, "schedules": {}, "model": "owner/name"}
    facts = {"kind": "train", "config": config, "data": {"train": "aa11"}, "versions": _FACTS["versions"]}
    write_json(folder / "ia2_run.json", {**facts, "task": {"kind": "classification"}})
    lines = [_prediction(n, bool(correct[n]), float(confidence[n]), "t.jsonl", False) for n in range(20)]
    write_text(folder / "predictions.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_json(folder / "align" / "lr-0.001" / "stage.json", _stage(0))
    write_json(folder / "metrics.json", finite(metrics))
