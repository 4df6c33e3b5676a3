"""Which benchmarks a model learns in context: ICL against the model alone, among the labels, untrained.

    python scripts/screen.py --model demo-qwen --output results/evidence/screen.json
    python scripts/screen.py --table results/evidence/screen.json

Queries and demonstrations are the last rows of the pool, never test rows, and a grid with ``hold_back: 120``
draws none of them. The file is written after each task; tasks that are in it are not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ia2.config import AdaptConfig
from ia2.config.reading import validate
from ia2.data.benchmarks import load_benchmark
from ia2.data.examples import Examples, FewShotSplit
from ia2.experiment.run_folder import machine, versions
from ia2.experiment.sweep.job import load_rows, task_of
from ia2.experiment.workbench import Workbench
from ia2.models.load import BaseModel, load_base
from ia2.utils.errors import DataError, UserError
from ia2.utils.files import read_json, write_json
from ia2.utils.manifest import begin

HOLD_BACK = 120
"""Rows at the pool's end that a grid must not draw."""
QUERIES = 80
"""So many of them are asked; the others are demonstrated."""

# What is screened by default, the likely ones first.
TASKS = (
    *("SST2:words", "AGN:words", "FinS:words", "Intents:words", "SciQr:remapped", "STF:words"),
    *("SST2:neutral", "AGN:neutral", "FinS:neutral", "Intents:neutral", "STF:neutral"),
    *("SST2:swapped", "AGN:swapped", "FinS:swapped", "Intents:swapped"),
    *("SST2:digits", "AGN:digits", "FinS:digits", "STF:digits"),
)


def screen(base: BaseModel, task: str, num_examples: int, draws: int, data_dir: str | None) -> dict[str, Any]:
    """Base and ICL of one benchmark with one verbaliser, ``name:verbaliser``."""
    name, _, verbaliser = task.partition(":")
    benchmark = load_benchmark(name)
    rows = load_rows(benchmark, benchmark.check_verbaliser(verbaliser or None), data_dir, None)
    if len(rows.pool) <= HOLD_BACK:
        raise DataError(f"{name}: a pool of {len(rows.pool)} rows, of which {HOLD_BACK} would be held back.")
    held = rows.pool[-HOLD_BACK:]
    queries, others = held[:QUERIES], held[QUERIES:]
    none = Examples([], name=name)
    found: dict[str, Any] = {"rows": queries.fingerprint, "labels": benchmark.settings(verbaliser)["labels"]}
    began = time.process_time()
    for seed in range(draws):
        config = validate(AdaptConfig, {**benchmark.settings(verbaliser), "seed": seed})
        train = others.split(num_examples=num_examples, seed=seed, balanced=True).train
        with tempfile.TemporaryDirectory(prefix="ia2-screen-") as scratch:
            begin(Path(scratch))
            answers = task_of(rows, config, base, ood=False)
            bench = Workbench(base, FewShotSplit(train, none), answers, config, Path(scratch))
            try:
                for recipe in ("base", "icl") if seed == 0 else ("icl",):
                    spent = time.process_time()
                    plain = bench.evaluate(recipe, queries).measured.plain
                    found.setdefault(recipe, []).append(
                        {
                            "accuracy": float(plain["labels"].correct.mean()),
                            "nll": float(plain["labels"].nll.mean()),
                            "brier": float(plain["labels"].brier.mean()),
                            "vocabulary": float(plain["vocabulary"].correct.mean()),
                            "cpu_seconds": round(time.process_time() - spent, 1),
                        }
                    )
            finally:
                bench.close()
    return {**found, "cpu_seconds": round(time.process_time() - began, 1)}


def table(found: dict[str, Any]) -> list[str]:
    """Markdown of a screen's file: accuracy among the labels, percent."""
    lines = [
        "| task | labels | base | ICL, each draw | ICL | ICL less base | CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, each in found["tasks"].items():
        base = 100 * each["base"][0]["accuracy"]
        icl = [100 * draw["accuracy"] for draw in each["icl"]]
        mean = sum(icl) / len(icl)
        lines.append(
            f"| {task.replace(':', ', ')} | {len(each['labels'])} | {base:.1f} | "
            f"{' '.join(f'{value:.1f}' for value in icl)} | {mean:.1f} | {mean - base:+.1f} | "
            f"{each['cpu_seconds']:.0f} |".replace("-", "−")
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """What the command does; its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="demo-qwen")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="NAME:VERBALISER")
    parser.add_argument("--num-examples", type=int, default=8)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--data-dir", help="folder of mirrors; by default IA2_DATA_DIR, else the hub")
    parser.add_argument("--output", type=Path, default=Path("results/evidence/screen.json"))
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of a screen, and end")
    options = parser.parse_args(arguments)
    try:
        if options.table:
            print("\n".join(table(read_json(options.table))))
            return 0
        setting = {
            **{"model": options.model, "num_examples": options.num_examples, "draws": options.draws},
            **{"queries": QUERIES, "hold_back": HOLD_BACK},
        }
        found = read_json(options.output) if options.output.exists() else {"setting": setting, "tasks": {}}
        if found["setting"] != setting:
            raise DataError(
                f"{options.output}: is a screen with other settings ({json.dumps(found['setting'])}). Give "
                "another --output."
            )
        base = load_base(options.model)
        found |= {"machine": machine(), "versions": versions()}
        for task in options.tasks:
            if task in found["tasks"]:
                continue
            found["tasks"][task] = screen(base, task, options.num_examples, options.draws, options.data_dir)
            write_json(options.output, found)
            print(table({"tasks": {task: found["tasks"][task]}})[-1], flush=True)
    except UserError as error:
        print(f"screen: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
