"""Rows of a hidden rule that the tests' small in-context learner can infer from its prompt.

    python scripts/make_rule_data.py --task 3 --output-dir out/rule

Writes train.jsonl and test.jsonl with `prompt` and `completion`, and needs the folder tests/.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))


def main() -> None:
    from tiny_icl.tasks import sample_task

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", type=int, default=3, help="seed of the rule")
    parser.add_argument("--train", type=int, default=400)
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--output-dir", type=Path, required=True)
    given = parser.parse_args()
    given.output_dir.mkdir(parents=True, exist_ok=True)
    pairs = sample_task(given.task, 2).examples(given.train + given.test, given.task)
    parts = {"train": pairs[: given.train], "test": pairs[given.train :]}
    for name, rows in parts.items():
        lines = [json.dumps({"prompt": query, "completion": answer}) + "\n" for query, answer in rows]
        (given.output_dir / f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
