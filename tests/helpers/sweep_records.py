"""Made-up records of a sweep, in its file's format, with right answers as planned."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ia2.config.recipes import is_trained
from ia2.evaluation.calibration import ece_equal_mass
from ia2.utils.files import digest

LABELLED = {"SST2": 2, "FinS": 2, "PoemS": 2, "AGN": 4, "BBCN": 4, "STF": 2, "Intents": 4}


def evaluation(
    correct: Sequence[int],
    confidence: Sequence[float] | None = None,
    *,
    dataset: str = "SST2",
    role: str = "id",
) -> dict[str, Any]:
    """An evaluation with these right (1) and wrong (0) rows."""
    labelled = dataset in LABELLED
    bits = np.asarray(correct)
    sure = np.full(len(bits), 0.8) if confidence is None else np.asarray(confidence)
    accuracy, ece = float(bits.mean()), float(ece_equal_mass(sure, bits))
    nll = 0.3 + float(1 - bits.mean())
    metrics = {"accuracy": accuracy, "ece": ece, "ece_equal_width": 0.1, "brier": 0.2, "nll": nll}
    scopes = {"vocabulary": metrics, ("labels" if labelled else "answer"): dict(metrics)}
    return {
        "role": role,
        "n": len(bits),
        "test": f"rows of {dataset}",
        "verbaliser": "words" if labelled else None,
        "labels": LABELLED.get(dataset),
        "metrics": {**scopes, "scaled": scopes},
        "rows": {"correct": "".join(map(str, bits)), "confidence": [float(c) for c in sure]},
    }


def record(
    evaluations: dict[str, dict[str, Any]] | Sequence[int],
    *,
    benchmark: str = "SST2",
    model: str = "demo",
    recipe: str = "sft",
    variant: str = "",
    size: int = 8,
    seed: int = 0,
    rate: float | None = 1e-3,
    beta: float | None = None,
    loss: float | None = 0.5,
    asim: float | None = 0.6,
    settings: dict[str, Any] | None = None,
    max_test: int | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """One record; a sequence of 0 and 1 stands for the evaluation on the benchmark itself."""
    if not isinstance(evaluations, dict):
        evaluations = {benchmark: evaluation(evaluations, dataset=benchmark)}
    trained, base = is_trained(recipe), recipe == "base"
    spec = {
        "benchmark": benchmark,
        "verbaliser": evaluations[benchmark]["verbaliser"],
        "model": model,
        "recipe": recipe,
        "variant": variant,
        "num_examples": None if base else size,
        "seed": None if base else seed,
        "learning_rate": rate if trained else None,
        "beta": beta if recipe == "ia2+sft" else None,
        "max_test": max_test,
        "settings": settings or {},
    }
    stages = [{"stage": "sft", "epochs": 12.0, "dev_loss": loss}]
    seconds = {"evaluate": 9.0, "other": 1.0, **({"teacher": 3.0, "sft": 14.0} if trained else {})}
    rows_of = {"pool": "p", "test": "t", "num_train": 0 if base else size, "num_dev": size // 2}
    similarity = {"asim": asim, "layers": [0], "asim_by_layer": [asim]}
    return {
        "key": digest(spec),
        "spec": spec,
        "data": {**rows_of, "notes": list(notes)},
        "training": {"selection_loss": loss, "stages": stages} if trained else None,
        "evaluations": evaluations,
        "similarity": None if asim is None or base else similarity,
        "cost": {"seconds": seconds, "machine": {}, "versions": {}},
    }


def rows(right: int, n: int = 10) -> list[int]:
    """The first so many of n rows right."""
    return [1] * right + [0] * (n - right)


def drawn(p: float, n: int, seed: int | Sequence[int]) -> list[int]:
    """Each row right with probability p; rows of one seed are alike at every p."""
    return [int(u < p) for u in np.random.default_rng(seed).random(n)]


def write_sweep(folder: Path, records: Iterable[dict[str, Any]], **summary: Any) -> Path:
    """A sweep folder as ``ia2 sweep`` leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(r, ensure_ascii=False) for r in records]
    (folder / "cells.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    facts = {"name": folder.name, "cells": {"done": len(lines), "failed": 0, "total": len(lines)}, **summary}
    (folder / "sweep.json").write_text(json.dumps(facts), encoding="utf-8")
    return folder


def small_grid(
    benchmarks: Sequence[str] = ("SST2", "FinS"),
    sizes: Sequence[int] = (8, 32),
    seeds: int = 3,
    n: int = 60,
    model: str = "demo",
) -> list[dict[str, Any]]:
    """Recipes on benchmarks and, OOD, on PoemS: ICL works, IA2 → SFT leads by 0.2 at N = 8 alone."""
    found = []
    share = {"base": 0.3, "icl": 0.85, "sft": 0.65, "ia2": 0.75, "ia2-sft": 0.85}
    for number, benchmark in enumerate(benchmarks):
        for recipe, p in share.items():
            for size in sizes[:1] if recipe == "base" else sizes:
                for seed in range(1 if recipe == "base" else seeds):
                    at = 0.85 if size > 8 and recipe == "sft" else p
                    of = [number, seed, size]
                    noise = np.random.default_rng(of).random(n)
                    evaluations = {
                        benchmark: evaluation(drawn(at, n, of), 0.5 + noise / 2, dataset=benchmark),
                        "PoemS": evaluation(drawn(at - 0.1, n, [*of, 1]), dataset="PoemS", role="ood"),
                    }
                    options = {"benchmark": benchmark, "model": model, "recipe": recipe, "asim": p}
                    found.append(record(evaluations, size=size, seed=seed, **options))  # type: ignore[arg-type]
    return found
