"""Peak memory of a run over the number of training examples: 200 rows, and 20,000.

    python perf/rows.py

Both run `ia2 train` (recipe ia2-sft, one epoch a stage) on the tests' small in-context learner, in a
process of their own, with targets in a store and online. Writes perf/rows.json.
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

from ia2.files import write_json  # noqa: E402
from ia2.runs import machine, versions  # noqa: E402

DEV = 48


def rows(count: int, path: Path) -> None:
    """As many rows of one of the learner's tasks."""
    from tiny_icl.tasks import sample_task

    pairs = sample_task(1, 2).examples(count, 0)
    path.write_text("".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in pairs))


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
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=ROOT / "perf" / "rows.json")
    given = parser.parse_args()
    if given.one:
        # a process of its own, since the peak of children is never forgotten
        found = measure(int(given.one[0]), given.one[1])
        found["peak_mb"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(json.dumps(found))
        return
    results = []
    for targets in ("store", "online"):
        for count in given.rows:
            command = [sys.executable, __file__, "--one", str(count), targets]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results.append(json.loads(output.splitlines()[-1]))
            print(results[-1], flush=True)
        ratio = results[-1]["peak_mb"] / results[-2]["peak_mb"]
        print(f"{targets}: {ratio:.3f}", flush=True)
    write_json(given.output, {"runs": results, "machine": machine(), "versions": versions()})


if __name__ == "__main__":
    main()
