"""A working folder, a finished run that is trained once a session, and ``ia2`` in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import TASK, Ia2, Ran, run, write_rows

# held-out rows and one rate, whatever the defaults are
CHOSEN = ("--selection", "dev", "--learning-rates", "1e-3")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_icl_model_path: Path) -> Path:
    """A finished run of one epoch, with rows.jsonl beside it; no test may change it."""
    from ia2.cli import main

    folder = tmp_path_factory.mktemp("finished")
    rows = write_rows(folder / "rows.jsonl", TASK.examples(12, seed=0))
    options = ["--model", tiny_icl_model_path, "--data", rows, "--output-dir", folder / "out"]
    main(
        [
            "train",
            *map(str, options),
            "--recipe",
            "sft",
            *("--sft-epochs", "1", "--align-epochs", "50", "--joint-epochs", "50"),
            "--device",
            "cpu",
            *CHOSEN,
            "--quiet",
        ]
    )
    return folder / "out"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_icl_model_path: Path) -> Path:
    """A working folder with labelled rows (rows.jsonl, test.jsonl) and the small model (model)."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", TASK.examples(12, seed=0))
    write_rows(tmp_path / "test.jsonl", TASK.examples(6, seed=1))
    (tmp_path / "model").symlink_to(tiny_icl_model_path)
    return tmp_path


@pytest.fixture
def ia2(capsys: pytest.CaptureFixture[str]) -> Ia2:
    """``ia2`` in this process, with nothing but warnings and errors on stderr."""

    def command(name: str, *options: Any) -> Ran:
        quiet = [] if name in ("benchmarks", "env") else ["--quiet"]
        return run(capsys, name, *options, *quiet)

    return command


@pytest.fixture
def train(here: Path, ia2: Ia2) -> Ia2:
    """``ia2 train`` on these rows and this model into out, an epoch a stage; later options win."""
    brief = ["--align-epochs", 1, "--sft-epochs", 1, "--joint-epochs", 1]
    common = ["--model", "model", "--data", "rows.jsonl", "--output-dir", "out", *brief, *CHOSEN]
    return lambda *options: ia2("train", *common, *options)


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The trainers of the stages that were trained, in order."""
    from ia2.training.trainer import ExampleTrainer

    trained: list[str] = []
    fit = ExampleTrainer.fit

    def counting(self: Any) -> float:
        trained.append(type(self.loss).__name__)
        return fit(self)

    monkeypatch.setattr(ExampleTrainer, "fit", counting)
    return trained
