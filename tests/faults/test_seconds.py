"""Published seconds are those of the whole work, however often it was started."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from helpers.benches import bench_of, clone, icl_base, icl_examples, taught
from helpers.sweeping import records, swept

from ia2.config import AdaptConfig, ProbeConfig
from ia2.experiment.adapt import adapt
from ia2.experiment.probe import probe
from ia2.models.load import BaseModel
from ia2.teacher.teacher import Teacher
from ia2.training.schedule import Schedule
from ia2.training.trainer import ExampleTrainer
from ia2.utils.files import read_json

ROWS = icl_examples(12)
STEP = 0.05


@pytest.fixture(scope="module")
def base(tiny_icl_model_path: Path) -> BaseModel:
    return icl_base(tiny_icl_model_path)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Every optimiser step of fine-tuning takes a while; at step ``stop`` the run is killed."""
    when = {"stop": -1}
    step = ExampleTrainer.training_step

    def slowly(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == when["stop"]:
            raise KeyboardInterrupt
        time.sleep(STEP)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(ExampleTrainer, "training_step", slowly)
    return when


SETTINGS: dict[str, Any] = {"checkpoint_every": 5, "sft": {"epochs": 10, "patience": 99}}


def test_of_a_stage_over_all_starts(base: BaseModel, tmp_path: Path, slow: dict[str, int]) -> None:
    config = AdaptConfig(recipe="sft", **SETTINGS)
    for stop in (8, 13, 18):
        slow["stop"] = stop
        with pytest.raises(KeyboardInterrupt):
            adapt(clone(base), ROWS, config, output_dir=tmp_path / "out")
    slow["stop"] = -1
    metrics = adapt(clone(base), ROWS, config, output_dir=tmp_path / "out").metrics
    assert metrics["steps"]["sft"] == 20
    assert metrics["seconds"]["sft"] >= 20 * STEP
    (stage,) = (tmp_path / "out").glob("sft/lr-*/stage.json")
    assert read_json(stage)["seconds"] == metrics["seconds"]["sft"]


def test_of_a_cell_over_all_starts(files: Path, tmp_path: Path, slow: dict[str, int]) -> None:
    settings = {**SETTINGS, "sft": {"epochs": 30, "patience": 99}}
    slow["stop"] = 28
    with pytest.raises(KeyboardInterrupt):
        swept(files, tmp_path / "out", settings=settings)
    slow["stop"] = -1
    assert swept(files, tmp_path / "out", settings=settings).done == 1
    (record,) = records(tmp_path / "out")
    assert record["training"]["stages"][0]["steps"] == 30
    assert record["cost"]["seconds"]["sft"] >= 30 * STEP


@pytest.mark.parametrize("targets", ["store", "memory", "online"])
def test_of_a_teacher_pass_that_was_killed_between_its_parts(
    targets: str, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = "to_store" if targets == "store" else "teach"
    run = getattr(Teacher, kind)
    killed = True

    def slowly(self: Any, *args: Any, description: str, **kwargs: Any) -> Any:
        if "dev" in description and killed:
            raise KeyboardInterrupt
        if "train" in description and killed:
            time.sleep(0.3)
        return run(self, *args, description=description, **kwargs)

    monkeypatch.setattr(Teacher, kind, slowly)
    with pytest.raises(KeyboardInterrupt):
        taught(bench_of(clone(base), ROWS[:8], ROWS[8:], tmp_path, targets=targets))
    killed = False
    again = bench_of(clone(base), ROWS[:8], ROWS[8:], tmp_path, targets=targets)
    taught(again)
    assert again.teaching.seconds("train") >= 0.3


# ---------------------------------------------------------------------------------- what is foretold


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        (170, {"num_examples": 110}),  # 48 dev rows, not 55
        (30, {"num_examples": 20}),
        (30, {"num_examples": 3}),
        (31, {}),
        (3, {}),
        (30, {"context_draws": 3, "align": {"objective": "residual"}}),
        (30, {"align": {"epochs": 3}, "sft": {"epochs": 7}, "learning_rates": [1e-3, 1e-2], "batch_size": 7}),
    ],
)
def test_a_probe_counts_the_rows_and_steps_of_the_run(
    rows: int, settings: dict[str, Any], base: BaseModel
) -> None:
    examples = icl_examples(rows)
    probed = ProbeConfig(**{"max_queries": 4, **settings})
    cost = probe(base, examples, probed).facts["cost"]
    split = examples.split(num_examples=probed.num_examples, seed=0, balanced=False)
    train, dev = len(split.train), len(split.dev)
    assert (cost["num_train"], cost["num_dev"]) == (train, dev)
    per_row = 4 * 64 * 4  # layers, width, bytes
    assert cost["target_bytes"] == per_row * (train + dev)
    per_epoch = -(-train // min(probed.batch_size, train))
    steps, seconds = [], 0.0
    for section in (probed.align, probed.sft):
        steps.append(per_epoch * section.epochs)
        done = range(1, steps[-1] + 1)
        schedule = Schedule(per_epoch, section.epochs, min(probed.batch_size, train), dev)
        evaluations = sum(map(schedule.due, done)) if dev else 0
        seconds += cost["step_seconds"] * steps[-1] + cost["evaluation_seconds"] * evaluations
    assert cost["max_steps_a_stage"] == max(steps)
    rates = len(probed.learning_rates or [0])
    assert cost["training_seconds_at_most"] == pytest.approx(seconds * rates)
