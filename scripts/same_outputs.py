"""The same commands in two checkouts: which numbers and sentences differ.

    python scripts/same_outputs.py BEFORE AFTER [--demo] [--work out/same-outputs]

Runs probe, train, compare, curve, sweep (two cells), report, analyze, doctor, eval and predict with the
source of each checkout, on the same rows and the same tiny model, and holds what they print against each
other. With --demo, `ia2 demo` too (a real model, some minutes). Times, paths, digests and versions are left
out. The exit code is 1 where something differs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "tests" / "tiny_icl" / "model"

# Keys of what differs from run to run, whatever the code.
VOLATILE = re.compile(
    r"second|time|machine|version|sha|digest|fingerprint|identity|key|path|folder|file|created|content|bytes"
)

ROWS = ["--model", str(MODEL), "--data", "train.jsonl", "--num-examples", "8", "--batch-size", "4"]
LENGTHS = ["--align-epochs", "10", "--sft-epochs", "10", "--learning-rates", "3e-3", "--selection", "dev"]
GRID = f"""
models: [{MODEL}]
benchmarks: [rule.yaml]
num_examples: [8]
seeds: 1
ood: false
learning_rates: [0.003]
recipes: [sft, ia2-sft]
settings: {{align.epochs: 5, sft.epochs: 5}}
"""
BENCHMARK = """
name: Rule
path: .
pool: {split: train, rows: 200}
test: {split: test, rows: 100}
filter: {completion: [" L0", " L1", " L2", " L3"]}
prompt: "{prompt}"
label: completion
verbalisers:
  words: {" L0": " L0", " L1": " L1", " L2": " L2", " L3": " L3"}
"""

COMMANDS: dict[str, list[str]] = {
    "probe": ["probe", *ROWS, "--json"],
    "train": [
        *["train", *ROWS, *LENGTHS, "--test-data", "test.jsonl", "--recipe", "ia2-sft"],
        *["--output-dir", "out/train", "--json"],
    ],
    "compare": [
        *["compare", *ROWS, *LENGTHS, "--test-data", "test.jsonl", "--seeds", "2"],
        *["--recipes", "base,icl,sft,ia2-sft,ia2+sft,soft-sft", "--output-dir", "out/compare", "--json"],
    ],
    "compare, folds": [
        *["compare", *ROWS, *LENGTHS, "--seeds", "1", "--recipes", "icl,sft,ia2-sft"],
        *["--output-dir", "out/folds", "--json"],
    ],
    "curve": [
        *["curve", *ROWS[:4], *LENGTHS, "--test-data", "test.jsonl", "--sizes", "4,8", "--seeds", "2"],
        *["--recipes", "icl,sft,ia2-sft", "--output-dir", "out/curve", "--json"],
    ],
    "sweep": ["sweep", "grid.yaml", "--output-dir", "out/sweep", "--limit", "2", "--json"],
    "report": ["report", "out/compare", "--json"],
    "report, tables": ["report", "out/sweep", "--table", "all", "--markdown"],
    "analyze": [
        *["analyze", "out/compare", "--parts", "activations,weights,lens,heads,neurons,causal"],
        *["--adapters", "sft,ia2-sft", "--causal-queries", "8", "--json"],
    ],
    "doctor": ["doctor", "out/compare", "--json"],
    "eval": ["eval", "--adapter", "out/train", "--data", "test.jsonl", "--json"],
    "predict": ["predict", "--adapter", "out/train", "--data", "test.jsonl"],
}
DEMO = ["demo", "--seeds", "1", "--output-dir", "out/demo", "--json"]


def run(checkout: Path, arguments: Sequence[str], folder: Path) -> Any:
    """What a command prints, read as JSON where it is such."""
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [sys.executable, "-m", "ia2", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    if ran.returncode:
        return {"exit code": ran.returncode, "error": ran.stderr.strip().splitlines()[-1:]}
    try:
        return json.loads(ran.stdout)
    except json.JSONDecodeError:
        return [_json_or_text(line) for line in ran.stdout.splitlines()]


def _json_or_text(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        # numbers of a table are held against each other one by one
        return [float(part) if _is_number(part) else part for part in line.replace("−", "-").split()]


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?\d+(\.\d+)?", text) is not None


def leaves(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything that should be the same in both."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if not VOLATILE.search(str(name).lower()):
                yield from leaves(inner, f"{at}.{name}" if at else str(name))
    elif isinstance(value, list):
        for n, inner in enumerate(value):
            yield from leaves(inner, f"{at}[{n}]")
    else:
        yield at, value


def differences(before: Any, after: Any, tolerance: float) -> tuple[int, list[str]]:
    """How many values are in both, and a line for each that differs or is missing."""
    first, second = dict(leaves(before)), dict(leaves(after))
    lines = [f"{key}: only before ({first[key]!r})" for key in first.keys() - second.keys()]
    lines += [f"{key}: only after ({second[key]!r})" for key in second.keys() - first.keys()]
    both = first.keys() & second.keys()
    for key in both:
        one, other = first[key], second[key]
        numbers = all(isinstance(each, (int, float)) for each in (one, other))
        same = math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance) if numbers else one == other
        if not same:
            lines.append(f"{key}: {one!r} before, {other!r} after")
    return len(both), sorted(lines)


def prepare(folder: Path) -> None:
    """Rows, grid and benchmark that the commands read."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows = ROOT / "scripts" / "make_rule_data.py"
    subprocess.run([sys.executable, str(rows), "--output-dir", str(folder)], check=True)
    (folder / "grid.yaml").write_text(GRID)
    (folder / "rule.yaml").write_text(BENCHMARK)


def main(arguments: Sequence[str] | None = None) -> int:
    """What the command does; its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--work", type=Path, default=Path("out/same-outputs"))
    parser.add_argument("--lines", type=int, default=8, help="differences shown of a command")
    given = parser.parse_args(arguments)
    commands = {**COMMANDS, **({"demo": DEMO} if given.demo else {})}
    folders = {name: given.work.resolve() / name for name in ("before", "after")}
    for folder in folders.values():
        prepare(folder)
    failed = False
    print("| command | values held against each other | differ |\n|---|---|---|", flush=True)
    for name, command in commands.items():
        if given.only and name not in given.only:
            continue
        printed = {
            side: run(checkout.resolve(), command, folders[side])
            for side, checkout in (("before", given.before), ("after", given.after))
        }
        count, lines = differences(printed["before"], printed["after"], given.tolerance)
        failed = failed or bool(lines)
        print(f"| `{name}` | {count} | {len(lines)} |", flush=True)
        for line in lines[: given.lines]:
            print(f"    {line}", file=sys.stderr, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
