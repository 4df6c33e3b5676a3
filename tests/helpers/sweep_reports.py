"""Reports of a few made-up records."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers.sweep_records import evaluation, record, rows, write_sweep

from ia2.experiment.sweep.records import load_results
from ia2.report.sweep.cells import Report
from ia2.report.sweep.selection import Select

QWEN = "Qwen/Qwen3-4B-Base"
RECIPES = ("icl", "sft", "ia2", "ia2-sft")


def report_of(tmp_path: Path, records: Sequence[dict[str, Any]], select: Select = "dev") -> Report:
    return Report(load_results([write_sweep(tmp_path / "sweep", records)]), select)


def few(size: int = 4, model: str = QWEN, benchmark: str = "SST2", **options: Any) -> list[dict[str, Any]]:
    """Two seeds of four recipes: accuracies are 0.7, 0.5, 0.6 and 0.8, one right row less at seed 1."""
    right = dict(zip(RECIPES, (14, 10, 12, 16), strict=True))
    found = []
    for recipe in RECIPES:
        for seed in (0, 1):
            of = evaluation(rows(right[recipe] - seed, 20), [0.72] * 20, dataset=benchmark)
            found.append(
                record(
                    {benchmark: of},
                    benchmark=benchmark,
                    model=model,
                    recipe=recipe,
                    size=size,
                    seed=seed,
                    **options,
                )
            )
    return found


def grid_of(text: str) -> list[list[str]]:
    """Fields of a table in Markdown."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[field.strip() for field in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
