"""``kill -9`` at random moments of ``train`` and ``compare``: the next start ends as if nothing had happened.

Run by hand: ``PYTHONPATH=tests python tests/faults/kills.py --train 60 --compare 20 --seed 0``. Prints
how many kills there were, at what they fell, and how many ended in other bytes or left something behind.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from helpers.benches import icl_examples
from helpers.launching import finish, start, write_rows

from ia2.utils.locks import LOCK
from ia2.utils.manifest import TEMPORARY

MODEL = Path(__file__).resolve().parents[1] / "tiny_icl" / "model"
_BRIEF = ["--learning-rates", 0.005, "--adapter-dropout", 0.1, "--checkpoint-every", 5]
_BRIEF += ["--align-epochs", 12, "--align-patience", 99, "--sft-epochs", 8, "--sft-patience", 99]
# What cannot be the same twice: how long something took, and the list of the digests of such files.
_TIMES = ("seconds", "evaluate", "train_runtime")


def main() -> None:
    """Parse, kill, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    for command, count in (("train", 60), ("compare", 20)):
        parser.add_argument(f"--{command}", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory(prefix="kills-") as scratch:
        folder = Path(scratch)
        for command in ("train", "compare"):
            bad += kill_again_and_again(command, getattr(given, command), given.seed, folder)
    sys.exit(bool(bad))


def kill_again_and_again(command: str, count: int, seed: int, folder: Path) -> int:
    """Returns how many of ``count`` killed runs did not end like the whole one."""
    rows = write_rows(icl_examples(15), folder / "rows.jsonl")
    log = folder / "log"

    def begin(out: Path) -> Any:
        options = ["--model", MODEL, "--device", "cpu", "--data", rows, "--quiet", "--output-dir", out]
        seeds = ["--seeds", 1, "--recipes", "icl", "sft", "ia2-sft"] if command == "compare" else []
        return start([command, *options, *_BRIEF, *seeds], log)

    finish(begin(folder / "whole"), log)  # the first one waits for imports
    shutil.rmtree(folder / "whole")
    began = time.monotonic()
    finish(begin(folder / "whole"), log)
    lasted = time.monotonic() - began
    expected = contents(folder / "whole")
    rng, at, ends = random.Random(f"{command} {seed}"), Counter[str](), Counter[str]()
    for number in range(count):
        out = folder / "killed"
        process = begin(out)
        process.join(rng.uniform(0, 1.05) * lasted)
        at["after its end" if process.exitcode is not None else _phase(out)] += 1
        process.kill()
        process.join()
        finish(begin(out), log)
        found = contents(out)
        differing = sorted(path for path in {*expected, *found} if expected.get(path) != found.get(path))
        ends["same" if not differing else "differs"] += 1
        if differing:
            print(f"{command} {number}: {', '.join(differing[:5])}", flush=True)
        shutil.rmtree(out)
    shutil.rmtree(folder / "whole")
    print(f"{command}: {count} kills over {lasted:.1f} s; {dict(at)}; ends: {dict(ends)}", flush=True)
    return ends["differs"]


def contents(folder: Path) -> dict[str, Any]:
    """What a run has left, by path; JSON without times."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.name == LOCK or path.name.endswith(".seconds.json") or path.is_dir():
            continue
        name = path.relative_to(folder).as_posix()
        if path.name == "ia2_manifest.jsonl":
            # digests of files with times in them differ, and reports are added at the end; the paths do not
            found[name] = sorted({json.loads(line)["path"] for line in path.read_text().splitlines()})
        elif path.suffix in (".json", ".jsonl"):
            found[name] = [_timeless(json.loads(line)) for line in _documents(path)]
        elif path.suffix in (".md", ".html"):  # with seconds in their text
            found[name] = len(path.read_text().splitlines())
        else:
            found[name] = path.read_bytes()
    return found


def _documents(path: Path) -> list[str]:
    text = path.read_text()
    return text.splitlines() if path.suffix == ".jsonl" else [text]


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(inner) for key, inner in value.items() if key not in _TIMES}
    if isinstance(value, list):
        return [_timeless(inner) for inner in value]
    return 0.0 if isinstance(value, float) and value > 1e9 else value


def _phase(out: Path) -> str:
    """What the run was at when it was killed."""
    if any(out.rglob(f".*{TEMPORARY}*")):
        return "in a write"
    stages = {path.parts[-3] for path in out.rglob("stage.json")}
    return f"after {', '.join(sorted(stages))}" if stages else "before the first stage"


if __name__ == "__main__":
    main()
