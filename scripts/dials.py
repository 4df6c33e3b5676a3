"""What causes the gain of alignment: a small model that learns in context, with one thing changed at a time.

    python scripts/dials.py --output results/dials/learner.jsonl
    python scripts/dials.py --study selection --output results/dials/selection.jsonl
    python scripts/dials.py --table results/dials

Each point is 40 hidden rules of `tests/tiny_icl` (random maps from classes to labels, which the model reads
off demonstrations); all arms learn a rule from the same rows. `--study selection` asks what should choose the
steps, `dev`, `folds`, `average` or `last`, on the same number of labels. A line of a file is one rule at one
point; lines that are there are not done again. `--table` writes table.md and dials.svg of a folder's files.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ia2.config import AdaptConfig
from ia2.data.examples import Example, Examples, FewShotSplit
from ia2.experiment.run_folder import machine, versions
from ia2.experiment.workbench import Workbench
from ia2.models.load import BaseModel, load_base
from ia2.prompts.task import make_task
from ia2.utils.errors import DataError, UserError
from ia2.utils.files import json_text, write_text
from ia2.utils.logging import configure
from ia2.utils.manifest import begin

sys.path.insert(0, str(Path(__file__).parent))
from dials_tables import (
    ARMS,
    BATCH,
    DIALS,
    FIRST_RULE,
    RECIPES,
    RULES,
    SELECTIONS,
    SIZES,
    STEPS,
    TAUGHT_STEPS,
    TEST_ROWS,
    TESTS,
    USUAL,
    Point,
    depends,
    read_lines,
    write_report,
)  # fmt: skip
from tiny_icl.tasks import SURFACE_PER_CLASS, Task, balanced, sample_task

NONE = Examples([], name="none")


def rows_of(rule: Task, n: int, seed: int, name: str, surface: int = SURFACE_PER_CLASS) -> Examples:
    """``n`` rows of a rule, balanced over its answers."""
    rng = random.Random(f"dials {name} {seed}")
    order = balanced(len(rule.classes), n, rng)
    pairs = [(" ".join(rule.query(which, rng, surface=surface)), rule.answers[which]) for which in order]
    return Examples([Example(q, a, f"{name} {i}") for i, (q, a) in enumerate(pairs)], name=name)


def bare(rows: Examples) -> Examples:
    """Rows without their answers."""
    return Examples([replace(row, answer=None) for row in rows], name=rows.name)


def misread(rows: Examples, labels: Sequence[str], count: int, seed: int) -> Callable[..., list[Example]]:
    """What the teacher reads: the rows, ``count`` of them with a wrong label (fewer: the first of these)."""
    rng = random.Random(f"dials wrong {seed}")
    places = rng.sample(range(len(rows)), len(rows))
    wrong = {rows[p].source: rng.choice([x for x in labels if x != rows[p].answer]) for p in places}
    kept = {rows[p].source for p in places[:count]}

    def context(example: Example, others: Sequence[Example]) -> list[Example]:
        return [replace(o, answer=wrong[o.source]) if o.source in kept else o for o in others]

    return context


@contextmanager
def bench_of(
    base: BaseModel, split: FewShotSplit, seed: int, function: Any = None, **settings: Any
) -> Iterator[Workbench]:
    """A workbench in a scratch folder."""
    shared = {"unlabelled": "rows", "targets": "memory", "checkpoint_every": 10**6}
    config = AdaptConfig(seed=seed, **shared, **settings)
    with tempfile.TemporaryDirectory(prefix="ia2-dials-") as scratch:
        begin(Path(scratch))
        labelled = Examples([*split.train, *split.dev], name="labelled")
        task = make_task(labelled, config, base.tokenizer)
        bench = Workbench(base, split, task, config, Path(scratch), function=function)
        try:
            yield bench
        finally:
            bench.close()


def measured(bench: Workbench, recipe: str, test: Examples) -> dict[str, float]:
    """Among the labels; a recipe that is trained was trained just before."""
    found = bench.evaluate(recipe, test).measured
    values = {"accuracy": float(found.plain["labels"].correct.mean())}
    for name, rows in (("nll", found.plain), ("scaled_nll", found.scaled)):
        if rows:  # after a temperature, where rows chose one
            values[name] = round(float(rows["labels"].nll.mean()), 5)
    return values


def run_point(base: BaseModel, point: Point, seed: int, arms: Sequence[str]) -> dict[str, Any]:
    """Arms of one rule at one point, and how often their teacher is right."""
    rule = sample_task(FIRST_RULE + seed, point.classes)
    train = rows_of(rule, point.n, seed, "train", point.surface)
    test, more = (
        rows_of(rule, count, seed, name)
        for name, count in (("test", TEST_ROWS), ("unlabelled", point.unlabelled))
    )
    context = misread(train, rule.answers, point.wrong, seed)
    found: dict[str, Any] = {}
    right: dict[str, float] = {}
    own = [arm for arm in arms if arm.startswith("own")]
    for chosen, rows in (([arm for arm in arms if arm not in own], more), (own, train)):
        if not chosen:
            continue
        # the same number of steps, however many rows there are
        epochs = TAUGHT_STEPS // -(-len(rows) // BATCH)
        schedules = {
            f"arm-{arm}": [{"epochs": epochs, **stage} for stage in ARMS[arm][1]]
            for arm in chosen
            if ARMS[arm][1]
        }
        split = FewShotSplit(train, NONE, bare(rows), NONE)
        settings = {"selection": "last", "batch_size": BATCH, "schedules": schedules}
        with bench_of(base, split, seed, context, **settings) as bench:
            for arm in chosen:
                name = f"arm-{arm}" if ARMS[arm][1] else arm
                if ARMS[arm][1]:
                    bench.train(name)
                found[arm] = measured(bench, name, test)
            learnt = {arm.partition("-")[0] for arm in chosen}
            if "loo" in learnt:
                right["loo"] = len(bench.teaching.correct()) / len(train)
            for name in learnt & {"own", "more"}:
                said = bench.teaching.answers("unlabelled")
                hits = [f" {a.text.strip()}" == row.answer for a, row in zip(said, rows, strict=True)]
                right[name] = float(np.mean(hits))
    return {"arms": {arm: found[arm] for arm in arms}, "teacher_right": right}


def run_selection(base: BaseModel, n: int, seed: int) -> dict[str, Any]:
    """Every recipe with every way to select, on the same 3N/2 labelled rows of a rule."""
    rule = sample_task(FIRST_RULE + seed, USUAL.classes)
    dev, test = rows_of(rule, n // 2, seed, "dev"), rows_of(rule, TEST_ROWS, seed, "test")
    train = rows_of(rule, n, seed, "train")
    every = Examples([*train, *dev], name="labelled")
    more = bare(rows_of(rule, USUAL.unlabelled, seed, "unlabelled"))
    held = len(more) // 5
    schedules = {
        "loo-sft": [{"stage": "align", "rows": "labelled"}, {"stage": "sft"}],
        "more-sft": [{"stage": "align"}, {"stage": "sft"}],
    }
    found: dict[str, Any] = {}
    for together in SELECTIONS:
        rows = (train, dev) if together == ("dev",) else (every, NONE)
        split = FewShotSplit(*rows, more[held:], more[:held])
        epochs = STEPS * (1 + ("twice" in together[0]))
        stage = {"epochs": epochs, "learning_rate": 1e-2, "eval_every": 10**6}
        settings = {"batch_size": 64, "align": stage, "sft": stage, "schedules": schedules}
        with bench_of(base, split, seed, selection=together[0].partition(",")[0], **settings) as bench:
            for selection, recipe in product(together, RECIPES):
                update = {"selection": selection.partition(",")[0]}
                bench.config = bench.config.model_copy(update=update)
                bench.train(recipe)
                found[f"{recipe}/{selection}"] = measured(bench, recipe, test)
    return {"arms": found}


def arms_at(point: Point) -> list[str]:
    """Own rows are aligned on where N is turned, and soft labels where unlabelled rows are too."""
    where = {"own": ["n"], "soft": ["n", "unlabelled"]}
    return [
        arm
        for arm in ARMS
        if any(point in DIALS[dial] for dial in where.get(arm.partition("-")[0], DIALS))
        and (arm != "more-sft-fast" or point == USUAL)
    ]


def run(options: argparse.Namespace) -> None:
    """Rule after rule, all points of each, so that points have as many rules whenever it ends."""
    base = load_base(str(options.model), device="cpu", dtype="float32")
    gc.freeze()  # a stage ends with a collection, which would go through all that is imported each time
    lines = read_lines(options.output) if options.output.exists() else []
    facts = {"study": options.study, "model": base.identity["weights"]}
    if any(line[name] != value for line in lines for name, value in facts.items()):
        raise DataError(f"{options.output}: holds lines of another study or model. Give another --output.")
    done = {(json.dumps(line["point"]), line["rule"]): line for line in lines}
    points: list[Any] = list(dict.fromkeys(point for dial in options.dials for point in DIALS[dial]))
    points = list(SIZES) if options.study == "selection" else points
    for rule in range(options.rules):
        for point in points:
            about = {"n": point} if isinstance(point, int) else asdict(point)
            if (json.dumps(about), rule) in done:
                continue
            began = time.process_time()
            if isinstance(point, int):
                result = run_selection(base, point, rule)
            else:
                known = {
                    arm: line["arms"][arm]
                    for arm in arms_at(point)
                    for line in done.values()
                    if line["rule"] == rule
                    and arm in line["arms"]
                    and depends(arm, Point(**line["point"])) == depends(arm, point)
                }
                result = run_point(base, point, rule, [a for a in arms_at(point) if a not in known])
                result["arms"] |= known
            line = {**facts, "point": about, "rule": rule, **result}
            line["cpu_seconds"] = round(time.process_time() - began, 1)
            done[json.dumps(about), rule] = line
            with options.output.open("a", encoding="utf-8") as file:
                file.write(json_text(line) + "\n")
        print(f"rule {rule} done", flush=True)
    about_file = {"machine": machine(), "versions": versions(), "model": base.identity}
    write_text(options.output.with_suffix(".json"), json_text(about_file) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """What the command does; its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=TESTS / "tiny_icl" / "model")
    parser.add_argument("--study", choices=("dials", "selection"), default="dials")
    parser.add_argument("--dials", nargs="+", choices=list(DIALS), default=list(DIALS))
    parser.add_argument("--rules", type=int, default=RULES)
    parser.add_argument("--output", type=Path, help="JSON Lines; what is there stays")
    parser.add_argument("--table", type=Path, metavar="FOLDER", help="write table and figure, and end")
    options = parser.parse_args(arguments)
    configure(quiet=True)
    try:
        if options.table:
            write_report(options.table)
        elif options.output is None:
            parser.error("--output is needed")
        else:
            run(options)
    except UserError as error:
        print(f"dials: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
