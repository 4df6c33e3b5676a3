"""What an analysis costs beside the plain evaluation passes that it needs.

    OMP_NUM_THREADS=2 python perf/analysis.py --output perf/analysis.json

Four LoRAs (one epoch each: how well they are trained does not matter here) on the demo model, two seeds.
A plain pass gives the logits at the answer positions of one view, as evaluation does; the analysis runs the
same views, on the same prompts and answers, with its meters: activations, lens, heads, neurons. Both sides
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

from ia2.analysis import activations, heads, inside, lens, neurons, views
from ia2.analysis.analyze import PARTS
from ia2.analysis.sites import site_widths
from ia2.analysis.subjects import Study, find_study
from ia2.benchmarks import load_benchmark
from ia2.comparison import compare
from ia2.config import CompareConfig
from ia2.console import configure
from ia2.examples import Examples
from ia2.files import write_json
from ia2.inference import answer_pass
from ia2.models import load_base
from ia2.runs import machine, versions
from ia2.task import make_task

RECIPES = ["sft", "ia2", "ia2-sft", "soft-sft"]


def adapters(folder: Path, rows: Examples, queries: Examples) -> Study:
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
    return find_study([folder / "run"], data=str(test))


def plain(look: views.Look, every: list[views.View], members: range, answers: list[Any]) -> None:
    """The evaluation passes."""
    for view in every:
        with look.showing(view.subject) as model:
            pairs = list(zip(look.prompts(view.context, members), answers, strict=True))
            for _ in answer_pass(model, look.base.tokenizer, pairs, description=f"plain: {view.name}"):
                pass


def measure(look: views.Look, study: Study, controls: bool, queries: int, step: int) -> dict[str, Any]:
    """Seconds of both sides, over all queries."""
    task, trial = look.task, look.trial
    every = views.views_of(trial, study.trials, controls=controls, others=controls)
    passes = [views.ICL, *(view for view in every if view is not views.MEAN)]
    model = look.base.model
    layers = list(range(model.config.num_hidden_layers))
    answers: list[Any] = []
    start = time.perf_counter()
    meters: list[Any] = [
        activations.ActivationMeter(
            layers, look.mean_of_training(["output"])["output"] if controls else None
        ),
        lens.LensMeter.for_task(
            model, layers, task.label_ids, views.gold_of(task, trial.queries), answers=answers
        ),
        heads.HeadMeter(layers, model.config.num_attention_heads),
        *(neurons.NeuronMeter(layers, w, s) for s, w in site_widths(model, ["residual", "neurons"]).items()),
    ]
    seconds = {"plain": 0.0, "analysis": time.perf_counter() - start}
    sites = ["output", "residual", "heads", "neurons"]
    for begin in range(0, queries, step):
        members = range(begin, min(begin + step, queries))
        start = time.perf_counter()
        views.run_block(look, every, sites, meters, answers, members)
        middle = time.perf_counter()
        plain(look, passes, members, answers[begin:])
        seconds["analysis"] += middle - start
        seconds["plain"] += time.perf_counter() - middle
    start = time.perf_counter()
    for meter in meters:
        meter.finish()
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
        study = adapters(Path(folder), data.pool, queries)
        base = load_base("demo")
        task = make_task(study.examples, study.config, base.tokenizer)
        look = views.Look(base, task, study.trials[0], Path(folder))
        step = look.block_size(["output", "residual", "heads", "neurons"], 1)
        found: dict[str, Any] = {
            name: measure(look, study, controls, count, step)
            for (name, controls), count in zip(
                (("without controls", False), ("with controls", True)), given.queries, strict=True
            )
        }
        look.close()
    found |= {
        "parts": [part for part in PARTS if part in ("activations", "lens", "heads", "neurons")],
        "not counted": f"attention of at most {inside.ATTENTION_QUERIES} queries; weights",
        "machine": machine(),
        "versions": versions(),
    }
    print(json.dumps(found, indent=2))
    if given.output:
        write_json(given.output, found)


if __name__ == "__main__":
    main()
