"""What an analysis costs beside the plain evaluation passes that it needs.

    OMP_NUM_THREADS=2 python perf/analysis.py --output perf/analysis.json

Four LoRAs (one epoch each: how well they are trained does not matter here) on the demo model, two seeds.
A plain pass gives the logits at the answer positions of one condition, as evaluation does; the analysis runs
the same conditions, on the same prompts and answers, for activations, lens, heads and neurons. Both sides
load adapters and render prompts, block by block, in turn: each block of each side is timed next to the
other's, so that what else the machine does falls on both.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from ia2.analysis.analyze import AnalysisSettings
from ia2.analysis.checkpoints import Found, find_checkpoints
from ia2.analysis.conditions import ICL, MEAN, Condition, Runner, run_conditions, sites_of
from ia2.analysis.section import Analysis, Look
from ia2.analysis.sections import SECTIONS
from ia2.analysis.sections.heads import ATTENTION_QUERIES
from ia2.config import CompareConfig
from ia2.data.benchmarks import load_benchmark
from ia2.data.examples import Examples
from ia2.experiment.compare import compare
from ia2.experiment.run_folder import machine, versions
from ia2.models.forward import answer_pass
from ia2.models.load import load_base
from ia2.prompts.task import make_task
from ia2.utils.files import write_json
from ia2.utils.logging import configure

RECIPES = ["sft", "ia2", "ia2-sft", "soft-sft"]


def adapters(folder: Path, rows: Examples, queries: Examples) -> Found:
    """Train them, as quickly as can be, and find them again."""
    data, test = folder / "rows.jsonl", folder / "test.jsonl"
    for file, part in ((data, rows), (test, queries)):
        lines = [json.dumps({"prompt": e.query, "completion": e.answer}) + "\n" for e in part]
        file.write_text("".join(lines), encoding="utf-8")
    brief = {"epochs": 1}
    config = CompareConfig(
        model="demo", data=str(data), test_data=str(test), num_examples=8, seeds=2, max_test=4,
        recipes=RECIPES, learning_rates=[1e-3], align=brief, sft=brief, soft=brief,
    )  # fmt: skip
    compare("demo", rows, config, test=queries, output_dir=folder / "run")
    return find_checkpoints([folder / "run"], data=str(test))


def plain(runner: Runner, conditions: list[Condition], members: range, answers: list[Any]) -> None:
    """The evaluation passes."""
    for condition in conditions:
        with runner.showing(condition.checkpoint) as model:
            pairs = list(zip(runner.prompts(condition.context, members), answers, strict=True))
            for _ in answer_pass(model, runner.base.tokenizer, pairs, description=f"plain: {condition.name}"):
                pass


def measure(runner: Runner, others: list[Runner], controls: bool, queries: int) -> dict[str, Any]:
    """Seconds of both sides, over all queries."""
    look = Look(Analysis(runner.base, AnalysisSettings(controls=controls), [runner, *others]), runner)
    passes = [ICL, *(condition for condition in look.conditions if condition is not MEAN)]
    start = time.perf_counter()
    made = [section.accumulate(look) for section in SECTIONS.values() if section.accumulate is not None]
    accumulators = [accumulator for accumulator in made if accumulator is not None]
    seconds = {"plain": 0.0, "analysis": time.perf_counter() - start}
    for members in runner.blocks(sites_of(accumulators)):
        if members.start >= queries:
            break
        start = time.perf_counter()
        run_conditions(runner, look.conditions, accumulators, look.answers, members)
        middle = time.perf_counter()
        plain(runner, passes, members, look.answers[members.start :])
        seconds["analysis"] += middle - start
        seconds["plain"] += time.perf_counter() - middle
    start = time.perf_counter()
    for accumulator in accumulators:
        accumulator.finish()
    seconds["analysis"] += time.perf_counter() - start
    return {
        "queries": queries,
        "views": len(passes),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "ratio": round(seconds["analysis"] / seconds["plain"], 3),
    }


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--queries", type=int, nargs=2, default=[500, 500], help="without, with controls")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    configure(quiet=True)
    data = load_benchmark("Intents").load()
    pool = list(data.test) + list(data.pool)
    queries = Examples((pool * 2)[: max(given.queries)], name="queries")
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = adapters(Path(folder), data.pool, queries)
        base = load_base("demo")
        task = make_task(checkpoints.examples, checkpoints.config, base.tokenizer)
        runner, *others = [Runner(base, task, each, Path(folder)) for each in checkpoints.sets]
        found: dict[str, Any] = {
            name: measure(runner, others, controls, count)
            for (name, controls), count in zip(
                (("without controls", False), ("with controls", True)), given.queries, strict=True
            )
        }
        runner.close()
    found |= {
        "parts": [name for name, section in SECTIONS.items() if section.accumulate is not None],
        "not counted": f"attention of at most {ATTENTION_QUERIES} queries; weights",
        "machine": machine(),
        "versions": versions(),
    }
    print(json.dumps(found, indent=2))
    if given.output:
        write_json(given.output, found)


if __name__ == "__main__":
    main()
