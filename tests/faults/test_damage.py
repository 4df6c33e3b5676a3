"""Damaged files of a run: none is believed, none is a traceback, and what is said names the file and helps.

Every file of a finished and of a half-finished run is missing once, and damaged once in one of three ways,
taken in turn; then the commands that read the run are started. Each must end well, with just what the
undamaged run gives, or with one line.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import Ran, run, write_rows
from tiny_icl.tasks import sample_task

from ia2.training.best_weights import BestWeights
from ia2.utils.manifest import MANIFEST

TASK = sample_task(0, num_classes=3)
_SHORT = ("--align-epochs", 8, "--sft-epochs", 8, "--checkpoint-every", 5, "--sft-patience", 99)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def _halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flip": _flip,
    "half": _halve,
    "empty": lambda path: path.write_bytes(b""),
}
MISSING: dict[str, Callable[[Path], object]] = {"missing": lambda path: path.unlink()}


class Runs:
    """A finished and a half-finished run of the same command, and copies of them to damage."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.rows = write_rows(folder / "rows.jsonl", TASK.examples(12, seed=0))

    def train(self, out: Path) -> list[str | Path]:
        arguments = ["train", "--model", self.model, "--data", self.rows, "--output-dir", out, "--quiet"]
        return [*arguments, "--recipe", "ia2-sft", *map(str, _SHORT)]

    @property
    def last(self) -> Path:
        """The last checkpoint of the half-finished run, in its folder."""
        found = (self.folder / "begun").glob("sft/.*/checkpoint-*")
        return max(found, key=lambda p: int(p.name.split("-")[1])).relative_to(self.folder / "begun")

    def copies(self, name: str, below: str = ".") -> Iterator[tuple[str, str, Path]]:
        """Each file of a run, what was done to it, and a copy of the run in which it is so."""
        whole = self.folder / name
        found = [p for p in sorted((whole / below).rglob("*")) if p.is_file() and p.stat().st_size]
        assert len(found) > 6
        for number, file in enumerate(p.relative_to(whole) for p in found):
            damages = [list(DAMAGES.items())[number % len(DAMAGES)], *MISSING.items()]
            for damage, apply in damages:
                with tempfile.TemporaryDirectory(prefix=f"{name}-{number}-", dir=self.folder) as scratch:
                    copy = Path(scratch) / name
                    shutil.copytree(whole, copy)
                    apply(copy / file)
                    yield str(file), damage, copy


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_icl_model_path: Path) -> Runs:
    from ia2.cli import main

    runs = Runs(tmp_path_factory.mktemp("runs"), tiny_icl_model_path)
    main(list(map(str, runs.train(runs.folder / "whole"))))
    saves = 0
    save = BestWeights.on_save

    def stopped(self: BestWeights, args: object, state: object, control: object, **rest: object) -> None:
        nonlocal saves
        save(self, args, state, control, **rest)
        saves += 1
        if saves == 6:  # the second checkpoint of the second stage
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BestWeights, "on_save", stopped)
        with pytest.raises(SystemExit):
            main(list(map(str, runs.train(runs.folder / "begun"))))
    assert len(list((runs.folder / "begun" / "sft").glob(".*/checkpoint-*/complete.json"))) == 2
    return runs


def _weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def _one_line(ran: Ran, folder: Path, case: str) -> str:
    line = ran.refusal()
    assert str(folder) in line, f"{case}: no file is named: {line}"
    ways = ("Delete ", "Remove ", "Run ", "the same command", "Choose ", "Give ")
    assert any(way in line for way in ways), f"{case}: no way out: {line}"
    return line


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whole", "begun"])
def test_the_same_command_again(runs: Runs, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    expected = _weights(runs.folder / "whole")
    ends = {"refused": 0, "same": 0}
    # what both have is damaged in one of them; of two checkpoints the last is read
    for file, damage, copy in runs.copies(name, "." if name == "whole" else str(runs.last)):
        ran = run(capsys, *runs.train(copy))
        case = f"{name}/{file}, {damage}: {ran}"
        assert "Traceback" not in ran.err, case
        if ran.status:
            _one_line(ran, copy, case)
            ends["refused"] += 1
        else:
            assert _weights(copy) == expected, case
            ends["same"] += 1
    # a damaged checkpoint costs its steps and nothing else
    assert ends["same"] > 10 and (ends["refused"] > 5) == (name == "whole"), ends


@pytest.mark.slow
def test_predict(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    def predict(folder: Path) -> Ran:
        return run(capsys, "predict", "--adapter", folder, "--data", runs.rows, "--json", "--quiet")

    expected = predict(runs.folder / "whole")
    assert expected.status == 0 and expected.err == ""
    ends = {"refused": 0, "same": 0}
    for file, damage, copy in runs.copies("whole"):
        if "/" in file:
            continue  # stages and targets are not read
        ran = predict(copy)
        case = f"{file}, {damage}: {ran}"
        assert "Traceback" not in ran.err, case
        if ran.status:
            _one_line(ran, copy, case)
            ends["refused"] += 1
        else:
            assert ran.out == expected.out, case
            assert file != "adapter_model.safetensors"
            if file == MANIFEST and damage == "missing":
                assert "cannot be checked" in ran.err
            ends["same"] += 1
    assert min(ends.values()) > 3, ends


@pytest.mark.slow
def test_commands_that_read_results(
    runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # of what has been read; it takes longer than the reading
    monkeypatch.setattr("ia2.report.figures.style.matplotlib_is_there", lambda: False)

    def read(command: str, folder: Path) -> Ran:
        output = ["--output", runs.folder / "page.html"] if command == "report" else []
        return run(capsys, command, folder, *output, "--json")

    for command in ("doctor", "report"):
        expected = read(command, runs.folder / "whole")
        refused = 0
        for file, damage, copy in runs.copies("whole"):
            ran = read(command, copy)
            case = f"{command}: {file}, {damage}: {ran}"
            assert "Traceback" not in ran.err, case
            if ran.status == 2:
                _one_line(ran, copy, case)
                refused += 1
            elif damage == "flip":
                assert ran.out.replace(str(copy), str(runs.folder / "whole")) == expected.out, case
        assert refused > 5


def test_what_is_advised_works(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    """A damaged stage is deleted, as the line says, and the same command makes it anew."""
    copy = runs.folder / "advised"
    shutil.copytree(runs.folder / "whole", copy)
    _flip(next(copy.glob("align/lr-*/adapter_model.safetensors")))
    line = run(capsys, *runs.train(copy)).refusal()
    assert "adapter_model.safetensors: damaged" in line
    advised = line.partition("Delete ")[2].partition(" and run")[0]
    shutil.rmtree(advised)
    assert run(capsys, *runs.train(copy)).status == 0
    assert _weights(copy) == _weights(runs.folder / "whole")


def test_a_damaged_checkpoint_is_passed_over(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    copy = runs.folder / "passed"
    shutil.copytree(runs.folder / "begun", copy)
    _flip(copy / runs.last / "adapter_state.safetensors")
    ran = run(capsys, *runs.train(copy))
    assert ran.status == 0
    assert "damaged checkpoint is passed over" in ran.err and f"{runs.last.name}/adapter_state" in ran.err
    assert _weights(copy) == _weights(runs.folder / "whole")


def test_a_finished_run_without_its_adapter_is_not_complete(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = runs.folder / "emptied"
    shutil.copytree(runs.folder / "whole", copy)
    (copy / "adapter_model.safetensors").write_bytes(b"")
    predict = ("predict", "--adapter", copy, "--data", runs.rows, "--quiet")
    assert "Run the same `ia2 train` again" in run(capsys, *predict).refusal()
    ran = run(capsys, *runs.train(copy))
    assert ran.status == 0 and "adapter_model.safetensors: damaged" in ran.err
    assert _weights(copy) == _weights(runs.folder / "whole")
    assert run(capsys, *predict).status == 0


def _edited(runs: Runs, name: str, file: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """The finished run without its manifest, as published ones are, and with another value in a file."""
    copy = runs.folder / name
    shutil.copytree(runs.folder / "whole", copy)
    value = json.loads((copy / file).read_text())
    change(value)
    (copy / file).write_text(json.dumps(value))
    (copy / MANIFEST).unlink()
    return copy


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("task", {"labels": ["a", "a", "b"]}),
        ("task", {"names": ["a"]}),
        ("task", {"label_ids": [[1], [2], [10**9]]}),
        ("task", {"label_ids": [[1], [2], [-1]]}),
        ("data", 3),
    ],
)
def test_a_task_that_cannot_be(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, change: object
) -> None:
    def edit(facts: dict[str, Any]) -> None:
        facts[part] = {**facts[part], **change} if isinstance(change, dict) else change

    copy = _edited(runs, tmp_path.name, "ia2_run.json", edit)
    for command in ("predict", "eval"):
        ran = run(capsys, command, "--adapter", copy, "--data", runs.rows)
        *_, line = ran.err.splitlines()
        assert ran.status == 2 and line.startswith(f"ia2: error: {copy}"), ran


@pytest.mark.parametrize("value", ["x", None, {}, True, 10**30, [None]])
def test_results_of_another_form(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: object
) -> None:
    """Of a run that cannot be checked; what is shown or refused is no bug."""
    for key in ("dev", "seconds", "learning_rate", "recipe"):
        copy = _edited(runs, f"{tmp_path.name}-{key}", "metrics.json", lambda m: m.update({key: value}))  # noqa: B023
        for command in (["doctor"], ["report"], ["report", "--latex"]):
            ran = run(capsys, command[0], copy, *command[1:])
            assert ran.status == 0 or str(copy) in ran.refusal()
