"""Damaged files of a run: none is believed, none is a traceback, and what is said names the file and helps.

Every file of a finished and of a half-finished run is missing once, and damaged once in one of three ways,
taken in turn; then a command that reads the run is started. It must end with just what the undamaged run
gives, or with one line.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import TASK, Ia2, Ran, write_rows

from ia2.training.best_weights import BestWeights
from ia2.utils.manifest import MANIFEST

WAYS_OUT = ("Delete ", "Remove ", "Run ", "the same command", "Choose ", "Give ")
SHORT = ("--align-epochs", 8, "--sft-epochs", 8, "--checkpoint-every", 5, "--sft-patience", 99)


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


class Runs:
    """A finished and a half-finished run of the same command, and copies of them to damage."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.rows = write_rows(folder / "rows.jsonl", TASK.examples(12, seed=0))

    def train(self, out: Path) -> list[str]:
        arguments = ["train", "--model", self.model, "--data", self.rows, "--output-dir", out, *SHORT]
        chosen = ["--selection", "dev", "--learning-rates", "1e-3"]
        return list(map(str, [*arguments, "--recipe", "ia2-sft", *chosen]))

    @property
    def last(self) -> Path:
        """The last checkpoint of the half-finished run, in its folder."""
        found = (self.folder / "begun").glob("sft/.*/checkpoint-*")
        return max(found, key=lambda p: int(p.name.split("-")[1])).relative_to(self.folder / "begun")

    def copy(self, name: str, to: str) -> Path:
        return Path(shutil.copytree(self.folder / name, self.folder / to))

    def damaged(self, name: str, below: str = ".", deep: bool = True) -> Iterator[tuple[str, str, Path]]:
        """Each file of a run, what was done to it, and a copy of the run in which it is so."""
        whole = self.folder / name
        files = (whole / below).rglob("*") if deep else whole.glob("*")
        found = [p.relative_to(whole) for p in sorted(files) if p.is_file() and p.stat().st_size]
        assert len(found) > 6
        for number, file in enumerate(found):
            damage = list(DAMAGES)[number % len(DAMAGES)]
            for done, apply in ((damage, DAMAGES[damage]), ("missing", Path.unlink)):
                with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
                    copy = Path(shutil.copytree(whole, Path(scratch) / name))
                    apply(copy / file)
                    yield str(file), done, copy


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_icl_model_path: Path) -> Runs:
    from ia2.cli import main

    runs = Runs(tmp_path_factory.mktemp("runs"), tiny_icl_model_path)
    main([*runs.train(runs.folder / "whole"), "--quiet"])
    saves = 0
    save = BestWeights.on_save

    def stopped(self: Any, *given: Any, **named: Any) -> None:
        nonlocal saves
        save(self, *given, **named)
        saves += 1
        if saves == 6:  # the second checkpoint of the second stage
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BestWeights, "on_save", stopped)
        with pytest.raises(SystemExit):
            main([*runs.train(runs.folder / "begun"), "--quiet"])
    assert len(list((runs.folder / "begun" / "sft").glob(".*/checkpoint-*/complete.json"))) == 2
    return runs


def _weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["train", "resume", "predict", "doctor", "report"])
def test_every_file(reader: str, runs: Runs, ia2: Ia2, monkeypatch: pytest.MonkeyPatch) -> None:
    # drawing takes longer than the reading
    monkeypatch.setattr("ia2.report.figures.style.matplotlib_is_there", lambda: False)

    def read(folder: Path) -> Ran:
        if reader in ("train", "resume"):
            return ia2(*runs.train(folder))
        if reader == "predict":
            return ia2("predict", "--adapter", folder, "--data", runs.rows, "--json")
        output = ["--output", runs.folder / "page.html"] if reader == "report" else []
        return ia2(reader, folder, *output, "--json")

    whole = runs.folder / "whole"
    expected = read(whole)
    ends = {"refused": 0, "same": 0}
    # what both have is damaged in one of them; of two checkpoints the last is read
    name, below = ("begun", str(runs.last)) if reader == "resume" else ("whole", ".")
    for file, damage, copy in runs.damaged(name, below, deep=reader != "predict"):
        ran = read(copy)
        case = f"{file}, {damage}: {ran}"
        assert "Traceback" not in ran.err, case
        if ran.status:
            line = ran.refusal()
            assert str(copy) in line and any(way in line for way in WAYS_OUT), case
        elif reader in ("train", "resume"):
            assert _weights(copy) == _weights(whole), case
        elif reader == "predict" or damage == "flip":
            assert ran.out.replace(str(copy), str(whole)) == expected.out, case
            assert (file, damage) != (MANIFEST, "missing") or "cannot be checked" in ran.err
        ends["refused" if ran.status else "same"] += 1
    # a damaged checkpoint costs its steps and nothing else
    assert ends["same"] > 3 and (ends["refused"] > 3) == (reader != "resume"), ends


def test_what_is_advised_works(runs: Runs, ia2: Ia2) -> None:
    """A damaged stage is deleted, as the line says, and the same command makes it anew."""
    copy = runs.copy("whole", "advised")
    _flip(next(copy.glob("align/lr-*/adapter_model.safetensors")))
    line = ia2(*runs.train(copy)).refusal()
    assert "adapter_model.safetensors: damaged" in line
    shutil.rmtree(line.partition("Delete ")[2].partition(" and run")[0])
    assert ia2(*runs.train(copy)).status == 0
    assert _weights(copy) == _weights(runs.folder / "whole")


def test_a_damaged_checkpoint_or_adapter_is_made_again(runs: Runs, ia2: Ia2) -> None:
    begun, whole = runs.copy("begun", "passed"), runs.copy("whole", "emptied")
    _flip(begun / runs.last / "adapter_state.safetensors")
    (whole / "adapter_model.safetensors").write_bytes(b"")
    predict = ("predict", "--adapter", whole, "--data", runs.rows)
    assert "Run the same `ia2 train` again" in ia2(*predict).refusal()
    for copy, said in (
        (begun, "damaged checkpoint is passed over"),
        (whole, "adapter_model.safetensors: damaged"),
    ):
        ran = ia2(*runs.train(copy))
        assert ran.status == 0 and said in ran.err
        assert _weights(copy) == _weights(runs.folder / "whole")


def _edited(runs: Runs, name: str, file: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """The finished run without its manifest, as published ones are, and with another value in a file."""
    copy = runs.copy("whole", name)
    value = json.loads((copy / file).read_text())
    change(value)
    (copy / file).write_text(json.dumps(value))
    (copy / MANIFEST).unlink()
    return copy


@pytest.mark.parametrize(
    "changes",
    [
        {"task": {"labels": ["a", "a", "b"]}},
        {"task": {"names": ["a"]}},
        {"task": {"label_ids": [[1], [2], [10**9]]}},
        {"task": {"label_ids": [[1], [2], [-1]]}},
        {"data": 3},
    ],
    ids=str,
)
def test_a_task_that_cannot_be(runs: Runs, tmp_path: Path, ia2: Ia2, changes: dict[str, Any]) -> None:
    def edit(facts: dict[str, Any]) -> None:
        for part, change in changes.items():
            facts[part] = {**facts[part], **change} if isinstance(change, dict) else change

    copy = _edited(runs, tmp_path.name, "ia2_run.json", edit)
    ran = ia2("predict", "--adapter", copy, "--data", runs.rows)
    assert ran.status == 2 and ran.err.splitlines()[-1].startswith(f"ia2: error: {copy}"), ran


@pytest.mark.parametrize("value", ["x", None, {}, True, 10**30, [None]])
def test_results_of_another_form(runs: Runs, tmp_path: Path, ia2: Ia2, value: object) -> None:
    """Of a run that cannot be checked; what is shown or refused is no bug."""
    for key in ("dev", "seconds", "learning_rate", "recipe"):
        copy = _edited(runs, f"{tmp_path.name}-{key}", "metrics.json", lambda m: m.update({key: value}))  # noqa: B023
        for command in (["doctor", copy], ["report", copy, "--latex"]):
            ran = ia2(*command)
            assert ran.status == 0 or str(copy) in ran.refusal()
