"""Demonstration orders with shared beginnings against independent ones: does quality differ?

    OMP_NUM_THREADS=1 python perf/orders.py --output perf/orders.json                    # demo model, Intents
    OMP_NUM_THREADS=1 python perf/orders.py --model tiny --draws 40 --output perf/orders.json

Each draw is label-balanced and is trained on twice, with `--demo-order random` and with `shared`; dev and
test rows and their contexts are the same. Measured: what the teacher says of its training examples, each
left out (accuracy and negative log-likelihood of the true label, among the labels), how well IA2 aligns on
dev, and IA2 → SFT on test rows. Differences are paired, with t intervals over draws. How far the targets
are from each other is compared with how far those of two independent orders are.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the tests' tasks

from ia2 import Examples, load_base
from ia2.adapters.weights import base_weights
from ia2.config import AdaptConfig
from ia2.data.examples import FewShotSplit
from ia2.evaluation.metrics import RowMeasures, measure_labels
from ia2.evaluation.scoring import score_labels
from ia2.experiment.adapt import load_both
from ia2.experiment.demo import demo_config
from ia2.experiment.run_folder import machine, versions
from ia2.experiment.workbench import Workbench
from ia2.models.capture import ActivationCapture
from ia2.models.forward import AnswerOutput
from ia2.models.load import BaseModel
from ia2.models.tokens import decode
from ia2.prompts.task import Task, make_task
from ia2.teacher.targets import TargetStore, TeacherAnswer
from ia2.utils.files import finite, read_json, write_json
from ia2.utils.manifest import begin
from tests.tiny_icl.tasks import sample_task

TINY = Path(__file__).resolve().parents[1] / "tests" / "tiny_icl" / "model"
STAGES: dict[str, dict[str, Any]] = {
    "demo": {"align": {"eval_every": 9, "epochs": 12}, "sft": {"eval_every": 9, "epochs": 6}},
    "tiny": {
        "align": {"eval_every": 10, "epochs": 25, "learning_rate": 2e-3},
        "sft": {"eval_every": 5, "epochs": 12, "learning_rate": 3e-3},
    },
}


def draw_of(model: str, examples: int, seed: int) -> tuple[FewShotSplit, Examples]:
    """Training and dev rows of one draw, and the test rows."""
    if model == "demo":
        rows, test = load_both(demo_config())
        assert test is not None
        return rows.split(num_examples=examples, seed=seed, balanced=True), test[:60]
    task = sample_task(seed, num_classes=2)

    def made(count: int, part: int, name: str) -> Examples:
        pairs = task.examples(count, seed + part)
        return Examples.from_rows([{"prompt": q, "completion": a} for q, a in pairs], name=name)

    pool = made(3 * examples, 0, "train")
    return pool.split(num_examples=examples, seed=seed, balanced=True), made(100, 1000, "test")


def answered(bench: Workbench, data: Examples) -> tuple[RowMeasures, TargetStore]:
    """What the teacher says of its training examples, among the labels; and its targets, of the same pass."""
    contexts, task = bench.train_contexts, bench.task
    prompts = [contexts.context_ids(i) for i in range(len(data))]
    said: dict[int, int] = {}
    model = bench.base.current
    with base_weights(model), ActivationCapture(model) as capture:
        targets = TargetStore(capture.layers)

        def keep(output: AnswerOutput) -> None:
            assert output.logits is not None and output.activations is not None
            said[output.index] = int(output.logits[0].argmax())
            targets.add(output.index, 0, output.activations)

        scores = score_labels(model, bench.tokenizer, task, prompts, capture=capture, on_output=keep)
    gold = np.array([task.label_of(example) for example in data])
    measured = measure_labels(scores, gold, [ids[0] for ids in task.label_ids], None)
    answers = [TeacherAnswer((said[i],), decode(bench.tokenizer, [said[i]])) for i in range(len(data))]
    targets.finish(answers)
    return measured.plain["labels"], targets


def apart(one: TargetStore, other: TargetStore) -> float:
    """Mean over layers and examples of the squared difference, as a share of the squares."""
    found = []
    for i in range(len(one.answers)):
        a, b = one.get(i), other.get(i)
        assert a is not None and b is not None
        found.append(((a - b).square().sum((1, 2)) / a.square().sum((1, 2))).mean())
    return float(np.mean(found))


def one(base: BaseModel, model: str, examples: int, seed: int) -> dict[str, dict[str, float]]:
    """Order → what was measured → value, for one draw."""
    data, test = draw_of(model, examples, seed)
    found: dict[str, dict[str, float]] = {}
    kept: dict[str, TargetStore] = {}
    again = ["random again"] if model == "tiny" else []  # costs a third of the time on the demo model
    for name in ("random", "shared", *again):
        config = AdaptConfig(
            seed=seed + 5000 * (name == "random again"),
            demo_order="shared" if name == "shared" else "random",
            recipe="ia2-sft",
            targets="memory",
            learning_rates=[1e-3],
            **STAGES[model],
        )
        with tempfile.TemporaryDirectory() as scratch:
            begin(Path(scratch))
            task: Task = make_task(
                Examples([*data.train, *data.dev], name="rows"), config, base.tokenizer, None, test
            )
            bench = Workbench(base, data, task, config, Path(scratch))
            began = time.process_time()
            teacher, kept[name] = answered(bench, data.train)
            row = {
                "teacher accuracy": float(teacher.correct.mean()),
                "teacher NLL": float(teacher.nll.mean()),
                "teacher seconds": time.process_time() - began,
            }
            if name == "random again":
                found["random"]["targets apart"] = apart(kept["random"], kept[name])
                continue
            if again and name == "shared":
                row["targets apart"] = apart(kept["random"], kept[name])
            dev = bench.teaching.teacher().teach(bench.teaching.contexts("dev"))
            for part, targets in (("train", kept[name]), ("dev", dev)):  # so as not to compute them again
                bench.teaching._targets[part, "output", None] = targets
            trained = bench.train("ia2-sft")
            labels = bench.evaluate("ia2-sft", test).measured.plain["labels"]
            row["dev alignment loss"] = trained.stages[0].dev_loss
            row["IA2 → SFT accuracy"] = float(labels.correct.mean())
            row["IA2 → SFT NLL"] = float(labels.nll.mean())
            bench.close()
            found[name] = row
    return found


def difference(shared: list[float], random: list[float]) -> dict[str, float]:
    """Means and the paired difference, with its 95% t interval over draws."""
    less = np.array(shared) - np.array(random)
    half = float(stats.t.ppf(0.975, len(less) - 1) * stats.sem(less)) if len(less) > 1 else float("nan")
    mean = float(less.mean())
    return {
        "random": float(np.mean(random)),
        "shared": float(np.mean(shared)),
        "difference": mean,
        "low": mean - half,
        "high": mean + half,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=STAGES, default="demo")
    parser.add_argument("--examples", type=int, default=12)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    base = load_base("demo" if given.model == "demo" else str(TINY), device="cpu", dtype="float32")
    draws = []
    for seed in range(given.draws):
        draws.append(one(base, given.model, given.examples, seed))
        print(seed, f"{time.process_time():.0f} s", draws[-1], flush=True)
    names = draws[0]["shared"]
    summary = {
        name: difference([d["shared"][name] for d in draws], [d["random"][name] for d in draws])
        for name in names
    }
    for name, entry in summary.items():
        print(f"{name:20s} " + "  ".join(f"{key} {value:+.4f}" for key, value in entry.items()))
    if given.output:
        known = read_json(given.output) if given.output.is_file() else {}
        key = f"{given.model}, {given.examples} examples, {given.draws} draws"
        write_json(
            given.output,
            finite({**known, key: summary, "machine": machine(), "versions": versions()}),
        )


if __name__ == "__main__":
    main()
