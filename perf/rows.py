"""Peak memory over the number of rows: of training on 200 and 20,000, of an analysis of 500 and 10,000.

    python perf/rows.py

Both run `ia2 train` (recipe ia2-sft, one epoch a stage) on the tests' small in-context learner, in a
process of their own, with targets in a store and online. Then `ia2 analyze` looks at an adapter that was
trained on 16 rows, on so many queries. Writes perf/rows.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from ia2.experiment.run_folder import machine, versions  # noqa: E402
from ia2.utils.files import write_json  # noqa: E402

DEV = 48


def rows(count: int, path: Path) -> None:
    """As many rows of one of the learner's tasks."""
    from tiny_icl.tasks import sample_task

    pairs = sample_task(1, 2).examples(count, 0)
    path.write_text("".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in pairs))


def trained(folder: Path) -> None:
    """An adapter of the small learner, and rows to look at it on."""
    rows(64, folder / "rows.jsonl")
    command = [
        sys.executable, "-m", "ia2", "train", "--quiet",
        "--model", str(ROOT / "tests" / "tiny_icl" / "model"),
        "--data", str(folder / "rows.jsonl"),
        "--num-examples", "16",
        "--recipe", "sft",
        "--sft-epochs", "1",
        "--output-dir", str(folder / "run"),
    ]  # fmt: skip
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def measure_analysis(count: int, folder: Path) -> dict[str, Any]:
    """Seconds of one analysis of the adapter in ``folder``."""
    rows(count, folder / f"queries-{count}.jsonl")
    command = [
        sys.executable, "-m", "ia2", "analyze", str(folder / "run"), "--quiet",
        "--data", str(folder / f"queries-{count}.jsonl"),
        "--max-queries", str(count),
        "--output-dir", str(folder / "out"),
    ]  # fmt: skip
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return {"queries": count, "seconds": time.perf_counter() - began}


def measure(count: int, targets: str) -> dict[str, Any]:
    """Peak resident memory (MB) and seconds of one run."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows(count + DEV, folder / "rows.jsonl")
        command = [
            sys.executable, "-m", "ia2", "train", "--quiet",
            "--model", str(ROOT / "tests" / "tiny_icl" / "model"),
            "--data", str(folder / "rows.jsonl"),
            "--num-examples", str(count),
            "--recipe", "ia2-sft",
            "--align-epochs", "1",
            "--sft-epochs", "1",
            "--batch-size", "32",
            # room for some twenty demonstrations, so that both runs draw them
            "--max-context-tokens", "160",
            "--targets", targets,
            "--output-dir", str(folder / "run"),
        ]  # fmt: skip
        began = time.perf_counter()
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        seconds = time.perf_counter() - began
    return {"rows": count, "targets": targets, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs=2, default=[200, 20_000])
    parser.add_argument("--queries", type=int, nargs=2, default=[500, 10_000])
    parser.add_argument("--part", nargs="+", choices=["train", "analysis"], default=["train", "analysis"])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=ROOT / "perf" / "rows.json")
    given = parser.parse_args()
    if given.one:
        # a process of its own, since the peak of children is never forgotten
        count, how = int(given.one[0]), given.one[1]
        found = measure_analysis(count, Path(how)) if Path(how).is_dir() else measure(count, how)
        found["peak_mb"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(json.dumps(found))
        return
    known = json.loads(given.output.read_text()) if given.output.is_file() else {}
    if "train" in given.part:
        runs = []
        for targets in ("store", "online"):
            runs += both(given.rows, targets)
        known["runs"] = runs
    if "analysis" in given.part:
        with tempfile.TemporaryDirectory() as scratch:
            trained(Path(scratch))
            known["analysis"] = both(given.queries, scratch)
    write_json(given.output, {**known, "machine": machine(), "versions": versions()})


def both(counts: list[int], how: str) -> list[dict[str, Any]]:
    """A small run and a large one, and the ratio of their peaks."""
    results = []
    for count in counts:
        command = [sys.executable, __file__, "--one", str(count), how]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results.append(json.loads(output.splitlines()[-1]))
        print(results[-1], flush=True)
    print(f"{results[-1]['peak_mb'] / results[0]['peak_mb']:.3f}", flush=True)
    return results


if __name__ == "__main__":
    main()
