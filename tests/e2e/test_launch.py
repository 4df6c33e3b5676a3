"""Two processes under ``accelerate launch`` learn what one process learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from helpers.benches import icl_examples
from helpers.launching import finish, free_port, python, start, write_rows
from safetensors.torch import load_file

import ia2
from ia2.utils.distributed import process_state
from ia2.utils.errors import ConfigError

# What `-m ia2` runs, and a word about how many processes share a stage: `accelerate launch --cpu` starts
# a single one, whatever it is asked for, so the launch goes through torchrun (MULTI_GPU).
_MAIN = """
import os

from ia2.cli import main
from ia2.teacher.teacher import Teacher
from ia2.training.trainer import ExampleTrainer

teach = Teacher.teach

def saying(*arguments, **options):
    print(f"[teacher pass in {os.environ['RANK']}]", flush=True)
    return teach(*arguments, **options)

Teacher.teach = saying

fit = ExampleTrainer.fit

def telling(trainer):
    print(f"[process {trainer.args.process_index} of {trainer.args.world_size}]", flush=True)
    return fit(trainer)

ExampleTrainer.fit = telling
main()
"""


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes_learn_what_one_learns(tiny_icl_model_path: Path, tmp_path: Path) -> None:
    # six training rows, four a step: the second step of an epoch has two rows for two processes; with
    # adapters behind the last attention, which the first stage does not reach
    data = write_rows(icl_examples(9), tmp_path / "rows.jsonl")

    def arguments(name: str) -> list[Any]:
        options = ["--model", tiny_icl_model_path, "--device", "cpu", "--data", data, "--num-examples", 6]
        options += ["--adapter-target-modules", "q_proj,k_proj,o_proj,down_proj"]
        options += [
            "--recipe",
            "ia2-sft",
            "--align-epochs",
            4,
            "--sft-epochs",
            4,
            "--learning-rates",
            0.002,
            "--selection",
            "dev",
        ]
        return ["train", *options, "--output-dir", tmp_path / name]

    logs = {name: tmp_path / f"{name}.log" for name in ("one", "two")}
    config = Path(ia2.__file__).parent / "accelerate_configs" / "ddp.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", 2]
    launcher += ["--main_process_port", free_port()]
    script = tmp_path / "main.py"
    script.write_text(_MAIN)
    two = python([*launcher, script, *arguments("two")], logs["two"], ACCELERATE_USE_CPU="true")
    one = start(arguments("one"), logs["one"])
    finish(one, logs["one"])
    said = finish(two, logs["two"])

    assert all(said.count(f"[process {i} of 2]") == 2 for i in (0, 1))  # two stages
    assert said.count("Stage sft at rate") == 1  # only the first process speaks
    # training rows and dev rows; the reference of the report is that of the dev rows
    assert all(said.count(f"[teacher pass in {i}]") == 2 for i in (0, 1))
    states = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two")]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        # Adam makes a step of rounding where a gradient is next to nothing, hence not element by element.
        # Processors round differently: up to 4e-4 was seen
        assert float((tensor - states[1][name]).norm()) < 2e-3 * float(tensor.norm()) + 1e-7
    assert max(float(t.abs().max()) for n, t in states[0].items() if "lora_B" in n) > 1e-3
    for stage in ("align", "sft"):
        files = [tmp_path / name / stage / "lr-0.002" / "stage.json" for name in ("one", "two")]
        told = [json.loads(file.read_text()) for file in files]
        assert told[0]["steps"] == told[1]["steps"] == 8
        assert told[0]["dev_loss"] == pytest.approx(told[1]["dev_loss"], rel=1e-4)
        losses = [[e["loss"] for e in t["history"] if "loss" in e] for t in told]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_processes_that_cannot_be_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    # an accelerator that accelerate has no way to connect, as Apple's
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda **_: None)
    PartialState._reset_state()
    try:
        with pytest.raises(ConfigError, match=r"^2 processes were launched, and on cpu they cannot work"):
            process_state()
    finally:
        PartialState._reset_state()
