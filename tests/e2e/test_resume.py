"""A run killed at any point and started again ends as if nothing had happened."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.benches import icl_examples
from helpers.launching import finish, kill_when, python, start, write_rows

from ia2.utils.locks import LOCK

# Epochs of three steps and checkpoints every five: they fall into the middle of epochs, and step 15 is
# an epoch's end that no regular evaluation falls on.
_TRAIN = ("--recipe", "ia2-sft", "--checkpoint-every", 5, "--learning-rates", 0.005, "--adapter-dropout", 0.1)
_TRAIN += (
    "--align-epochs",
    20,
    "--align-patience",
    1000,
    "--sft-epochs",
    10,
    "--sft-patience",
    1000,
    "--selection",
    "dev",
)


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_train(tiny_icl_model_path: Path, tmp_path: Path) -> None:
    data = write_rows(icl_examples(15), tmp_path / "rows.jsonl")

    def arguments(name: str) -> list[Any]:
        options = ["--model", tiny_icl_model_path, "--device", "cpu", "--data", data]
        return ["train", *options, *_TRAIN, "--output-dir", tmp_path / name]

    logs = {name: tmp_path / f"{name}.log" for name in ("whole", "align", "between")}
    align, whole = tmp_path / "align", tmp_path / "whole"

    # killed in the alignment stage, after a checkpoint that is no multiple of an epoch
    reference = python(["-m", "ia2", *arguments("whole")], logs["whole"])
    process = start(arguments("align"), logs["align"])
    kill_when(process, lambda: any(align.glob("align/.lr-*/checkpoint-20/complete.json")), logs["align"])
    finish(reference, logs["whole"])
    assert not (align / "align" / "lr-0.005").exists()
    assert not (align / "adapter_model.safetensors").exists()
    # the same, killed between the stages
    between = tmp_path / "between"
    process = start(arguments("between"), logs["between"])
    kill_when(process, lambda: any(between.glob("align/lr-*/stage.json")), logs["between"])

    again = [start(arguments(name), logs[name]) for name in ("align", "between")]
    said = {
        name: finish(process, logs[name]) for name, process in zip(("align", "between"), again, strict=True)
    }
    assert "Continuing from" in said["align"] and "checkpoint-" in said["align"]
    assert "Teacher targets: reusing" in said["align"]
    assert "Stage align at rate 0.005: reusing" in said["between"]
    for name in ("align", "between"):
        assert weights(tmp_path / name) == weights(whole), f"killed run '{name}' ended differently"
        for stage in ("align", "sft"):
            files = [f / stage / "lr-0.005" for f in (tmp_path / name, whole)]
            assert weights(files[0]) == weights(files[1])
            told = [json.loads((f / "stage.json").read_text()) for f in files]
            assert all(told[0][k] == told[1][k] for k in ("dev_loss", "best_step", "steps", "key"))
            assert told[0]["history"] == told[1]["history"]
        leftovers = [p for p in (tmp_path / name).rglob("*") if p.name.startswith((".", "checkpoint-"))]
        assert [p.name for p in leftovers] == [LOCK]

    # started once more, a finished run trains nothing
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*")}
    said_again = finish(start(arguments("whole"), logs["whole"]), logs["whole"])
    assert "nothing was trained again" in said_again
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*")} == before


def without_time(value: Any) -> Any:
    """A summary less what cannot be the same twice."""
    if isinstance(value, dict):
        return {k: without_time(v) for k, v in value.items() if k not in ("seconds", "machine")}
    return [without_time(v) for v in value] if isinstance(value, list) else value


def test_compare(tiny_icl_model_path: Path, tmp_path: Path) -> None:
    rows = icl_examples(44)
    data = write_rows(rows[:14], tmp_path / "rows.jsonl")
    test = write_rows(rows[14:], tmp_path / "test.jsonl")

    def arguments(name: str) -> list[Any]:
        options = ["--model", tiny_icl_model_path, "--device", "cpu", "--data", data, "--test-data", test]
        options += [
            "--num-examples",
            6,
            "--seeds",
            2,
            "--recipes",
            "base,icl,ia2,ia2-sft",
            "--selection",
            "dev",
        ]
        options += ["--align-epochs", 5, "--sft-epochs", 5, "--output-dir", tmp_path / name]
        return ["compare", *options]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    logs = [tmp_path / f"{name}.log" for name in ("whole", "killed")]
    reference = start(arguments("whole"), logs[0])
    process = start(arguments("killed"), logs[1])
    kill_when(process, lambda: any(killed.glob("seed-*/evaluations/*.json")), logs[1])
    finish(reference, logs[0])
    assert not (killed / "compare.json").exists()
    evaluated = list(killed.glob("seed-*/evaluations/*.json"))
    times = {path: path.stat().st_mtime_ns for path in evaluated}
    finish(start(arguments("killed"), logs[1]), logs[1])
    assert {path: path.stat().st_mtime_ns for path in evaluated} == times, "evaluated twice"
    summaries = [json.loads((folder / "compare.json").read_text()) for folder in (whole, killed)]
    assert without_time(summaries[0]) == without_time(summaries[1])

    # the last files lost: everything else is reused, and nothing is trained again
    for folder in killed.glob("seed-*"):
        (folder / "evaluations" / "ia2-sft.json").unlink()
    said = finish(start(arguments("killed"), logs[1]), logs[1])
    assert said.count("reusing") == 4  # both stages of both seeds
    summary = json.loads((killed / "compare.json").read_text())
    assert without_time(summary) == without_time(summaries[0])


@pytest.fixture(autouse=True)
def _clean(tmp_path: Path) -> Any:
    yield
    shutil.rmtree(tmp_path, ignore_errors=True)
