"""What `ia2 probe` says of each task and model of a grid, against what came out there.

    python scripts/verdicts.py paper/evidence.yaml --output results/evidence/verdicts.jsonl
    python scripts/verdicts.py --table results/evidence/verdicts.jsonl --cells results/evidence/grid

The probe sees the labelled rows of one draw, as its user would. Each (task, model) is a line of the output;
those in the file stay. In the table a verdict is right where *likely to help* met a gain of IA2 → SFT over
SFT (accuracy among the labels, mean over draws) or *unlikely* met none; *unclear* counts as half.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from evidence import arms_of

from ia2.config import ProbeConfig
from ia2.config.recipes import METHOD, PLAIN
from ia2.data.examples import Examples
from ia2.experiment.probe import probe
from ia2.experiment.run_folder import machine
from ia2.experiment.sweep.grid import Unit, expand, load_grid
from ia2.experiment.sweep.job import load_rows, without_held_back
from ia2.experiment.sweep.store import CELLS, read_lines
from ia2.models.load import load_base
from ia2.utils.errors import UserError
from ia2.utils.files import json_lines, write_text
from ia2.utils.user_files import read_text
from ia2.utils.wording import MISSING

LIKELY, UNLIKELY = "likely to help", "unlikely"


def pairs(units: Sequence[Unit], seed: int) -> Iterator[tuple[dict[str, Any], Examples, ProbeConfig]]:
    """The grid's pairs of task and model: what names one, its labelled rows, and settings of the probe."""
    seen = []
    for unit in units:
        for cell in unit.cells:
            spec, (benchmark, verbaliser) = cell.spec, unit.benchmarks[0]
            about = {
                **{"model": spec["model"], "benchmark": benchmark.name, "verbaliser": verbaliser},
                **{"num_examples": spec["num_examples"], "seed": seed},
            }
            if spec["seed"] != seed or spec["recipe"] != METHOD or about in seen:
                continue
            seen.append(about)
            rows = load_rows(benchmark, verbaliser, unit.data_dir, spec["max_test"])
            pool = without_held_back(rows, spec.get("hold_back") or 0).pool
            drawn = {**cell.config.drawn, "num_examples": spec["num_examples"]}
            given = {k: v for k, v in cell.config.model_dump().items() if k in ProbeConfig.model_fields}
            # the probe's own rate and selection: its user has no grid that chose them
            for name in ("learning_rates", "selection", "schedules", "recipe", "unlabelled", "num_examples"):
                given.pop(name, None)
            yield about, pool.split(seed=seed, **drawn).train, ProbeConfig(**given)


def gains(cells: Sequence[dict[str, Any]]) -> dict[tuple[str, str, int], dict[str, list[float]]]:
    """Points of IA2 → SFT over SFT, one a draw: leave one out, and on unlabelled rows."""
    by_pair: dict[tuple[str, str, int], dict[str, list[float]]] = {}
    for setting, arms in arms_of(cells).items():
        plain = arms.get(PLAIN, {})
        for arm, measures in arms.items():
            if arm.partition(",")[0] != METHOD:
                continue
            for draw, value in measures.items():
                if draw.task.partition(",")[0] == draw.evaluated and draw in plain:
                    key = (setting.model, draw.task, setting.num_examples)
                    points = 100 * (value["accuracy"] - plain[draw]["accuracy"])
                    by_pair.setdefault(key, {}).setdefault(arm, []).append(points)
    return by_pair


def table(lines: Sequence[dict[str, Any]], came_out: dict[tuple[str, str, int], Any]) -> list[str]:
    """Markdown: a pair a row, then how often the verdict was right and how often *likely* would have been."""
    arms = sorted({arm for pair in came_out.values() for arm in pair})
    rows = [
        "| model | task | verdict | ICL | SFT | base | "
        + " | ".join(f"`{arm}` less SFT" for arm in arms)
        + " |",
        "|---" * (6 + len(arms)) + "|",
    ]
    scores = {arm: [] for arm in arms}
    for line in lines:
        task = f"{line['benchmark']}, {line['verbaliser']}"
        gained = came_out.get((line["model"], task, line["num_examples"]), {})
        accuracy = line["probe"]["accuracy"]
        cells = [
            MISSING if accuracy[name] is None else f"{accuracy[name]:.3f}" for name in ("icl", "sft", "base")
        ]
        for arm in arms:
            draws = gained.get(arm)
            cells.append(
                f"{sum(draws) / len(draws):+.1f} ({len(draws)})".replace("-", "−") if draws else MISSING
            )
            if draws:
                helped = sum(draws) > 0
                verdict = line["probe"]["verdict"]
                right = (
                    float(helped) if verdict == LIKELY else float(not helped) if verdict == UNLIKELY else 0.5
                )
                scores[arm].append((right, float(helped)))
        rows.append(f"| {line['model']} | {task} | {line['probe']['verdict']} | " + " | ".join(cells) + " |")
    rows.append("")
    for arm, marks in scores.items():
        if marks:
            verdict, always = (sum(each) for each in zip(*marks, strict=True))
            rows.append(
                f"`{arm}`: the verdict is right in {verdict:g} of {len(marks)} pairs, "
                f"always *likely* in {always:g}."
            )
    return rows


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in read_text(file).splitlines()]


def main(arguments: Sequence[str] | None = None) -> int:
    """What the command does; its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("grid", type=Path, nargs="?", default=Path("paper/evidence.yaml"))
    parser.add_argument("--seed", type=int, default=0, help="the draw whose labelled rows are probed")
    parser.add_argument("--num-examples", type=int, default=8)
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="these only")
    parser.add_argument("--output", type=Path, default=Path("results/evidence/verdicts.jsonl"))
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of such a file, and end")
    parser.add_argument("--cells", type=Path, default=Path("results/evidence/grid"))
    options = parser.parse_args(arguments)
    try:
        if options.table:
            print("\n".join(table(_read(options.table), gains(read_lines(options.cells / CELLS)))))
            return 0
        lines = _read(options.output) if options.output.exists() else []
        names = ("model", "benchmark", "verbaliser", "num_examples", "seed")
        done = [{name: line[name] for name in names} for line in lines]
        loaded = (None, None)
        for about, rows, config in pairs(expand(load_grid(options.grid)), options.seed):
            if about in done or about["num_examples"] != options.num_examples:
                continue
            if options.models and about["model"] not in options.models:
                continue
            if loaded[0] != about["model"]:
                loaded = (about["model"], load_base(about["model"]))
            began = time.process_time()
            judged = probe(loaded[1], rows, config)
            spent = round(time.process_time() - began, 1)
            lines.append({**about, "probe": judged.to_dict(), "cpu_seconds": spent, "machine": machine()})
            write_text(options.output, json_lines(lines))
            print(json.dumps(about), judged.verdict, judged.reason, flush=True)
    except UserError as error:
        print(f"verdicts: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
