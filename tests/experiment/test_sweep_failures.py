"""Failures of a grid in one process: bad cells, odd folders, kills and lost workers lose nothing."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import run, tree, write_rows
from helpers.launching import finish, kill_when, start
from helpers.sweeping import grid_of, records, results, swept, write_files, write_grid

from ia2.experiment.sweep.execute import RETRIES, sweep
from ia2.experiment.sweep.grid import GridConfig
from ia2.experiment.sweep.job import Failed, Started
from ia2.experiment.sweep.store import alone
from ia2.experiment.sweep.workers import Lost, in_process
from ia2.training import trainer
from ia2.utils.errors import DataError, RunFolderError
from ia2.utils.files import read_json

# --------------------------------------------------------------------------------------------- failures


def test_a_bad_cell_does_not_stop_the_rest(files: Path, tmp_path: Path, caplog: Any) -> None:
    folder = tmp_path / "out"
    grid: dict[str, Any] = {
        "recipes": ["icl", "sft", "ia2"],
        "variants": {"bad": {"align.layers": [99]}, "good": {"align.objective": "kl"}},
    }
    with caplog.at_level(logging.INFO, "ia2"):
        done = swept(files, folder, **grid)
    assert (done.done, done.trained, len(done.failed), done.total) == (4, 4, 1, 5)
    (failure,) = read_json(folder / "failed.json")
    assert failure == done.failed[0]
    assert failure["spec"]["variant"] == "bad" and failure["spec"]["recipe"] == "ia2"
    assert "99" in failure["error"] and "\n" not in failure["error"]
    assert "Traceback" in failure["traceback"]
    assert any(failure["error"] in message for message in caplog.messages)
    assert read_json(folder / "sweep.json")["cells"] == {"done": 4, "failed": 1, "total": 5}
    # another start tries it again, and nothing else
    again = swept(files, folder, **grid)
    assert (again.trained, len(again.failed)) == (0, 1)
    # and once nothing fails, nothing is said to
    mended = swept(files, folder, **{**grid, "variants": {"good": {"align.objective": "kl"}}})
    assert not mended.failed and not (folder / "failed.json").exists()


def test_a_model_that_is_not_there(files: Path, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    done = swept(files, tmp_path / "out", models=[nowhere, str(files / "model")], recipes=["base", "icl"])
    assert (done.done, len(done.failed)) == (2, 2)
    assert all(nowhere in failure["error"] for failure in done.failed)


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with alone(tmp_path / "out"):
        assert "See to it that no other run works in this folder." in caplog.text
    assert not (tmp_path / "out" / ".lock").exists()


def test_the_command_says_what_failed_and_ends_with_1(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = grid_of(files, recipes=["icl", "ia2"], variants={"bad": {"align.layers": [99]}})
    file = write_grid(tmp_path / "grid.yaml", grid)
    ran = run(capsys, "sweep", file, "--output-dir", tmp_path / "out")
    assert ran.status == 1
    lines = ran.out.splitlines()
    assert lines[0] == f"2 of 3 cells are done (2 run now): {tmp_path / 'out'}"
    assert len(lines) == 3 and lines[1].startswith("failed: Two ia2: ")
    assert lines[2] == f"Tables and figures: ia2 report {tmp_path / 'out'}"
    # as JSON, and the rest as the log tells it
    ran = run(capsys, "sweep", file, "--output-dir", tmp_path / "out", "--json", "--quiet")
    assert ran.status == 1
    assert (ran.json["total"], ran.json["done"], ran.json["run"]) == (3, 2, 0)
    assert [failure["spec"]["variant"] for failure in ran.json["failed"]] == ["bad"]


def test_the_command_keeps_the_grid_and_takes_options(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write_grid(tmp_path / "brief.yaml", grid_of(files, recipes=["icl", "sft"]))
    ran = run(capsys, "sweep", file, "--limit", "1", "--keep-work")
    assert ran.status == 0
    assert ran.out == (
        "1 of 2 cells are done (1 run now): out/brief\nTables and figures: ia2 report out/brief\n"
    )
    folder = tmp_path / "out" / "brief"  # named after the file
    assert (folder / "grid.yaml").read_bytes() == file.read_bytes()
    assert "[1/1] Two " in ran.err
    ran = run(capsys, "sweep", file, "--keep-work", "--quiet")
    assert (ran.status, ran.err) == (0, "")
    assert len(list((folder / "work").glob("*/stages/*"))) == 1


def test_rows_come_from_the_folder_that_is_named(
    tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, count in (("train", 12), ("validation", 6)):
        rows = [{"sentence": f"{w} film", "label": i % 2} for i, w in enumerate("abcdefghabcd"[:count])]
        rows = [{**row, "sentence": f"{split[0]} {i} {row['sentence']}"} for i, row in enumerate(rows)]
        (tmp_path / "data" / "sst2").mkdir(parents=True, exist_ok=True)
        write_rows(tmp_path / "data" / "sst2" / f"{split}.jsonl", rows)
    file = write_grid(tmp_path / "grid.yaml", grid_of(files, benchmarks=["SST2"], recipes=["base"]))
    arguments = ("sweep", file, "--output-dir", tmp_path / "out", "--data-dir")
    assert run(capsys, *arguments, tmp_path / "data").status == 0
    (record,) = records(tmp_path / "out")
    assert record["evaluations"]["SST2"]["n"] == 6
    assert "no folder" in run(capsys, *arguments, tmp_path / "none").refusal()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--gpus-per-worker", "0.5"], ["--gpus-per-worker does nothing without --ray"]),
        (["--ray", "auto", "--workers", "2"], ["--workers does nothing beside --ray with an address"]),
        (["--limit", "0"], ["--limit"]),
        (["--workers", "0"], ["--workers"]),
    ],
)
def test_options_that_do_not_fit(
    options: list[str], parts: list[str], files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_grid(tmp_path / "grid.yaml", grid_of(files))
    message = run(capsys, "sweep", file, "--output-dir", tmp_path / "out", *options).refusal()
    assert all(part in message for part in parts)
    assert not (tmp_path / "out").exists()


def test_a_mistake_in_the_grid_writes_nothing(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_grid(tmp_path / "grid.yaml", grid_of(files, recipes=["stf"]))
    assert "'stf' is not one of" in run(capsys, "sweep", file, "--output-dir", tmp_path / "out").refusal()
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------- the folder


def test_a_folder_of_something_else_is_refused(files: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    with pytest.raises(RunFolderError, match=r"holds no sweep \(cat\.jpg"):
        swept(files, tmp_path / "photos", recipes=["base"])
    assert tree(tmp_path / "photos") == {"cat.jpg": b""}
    with pytest.raises(RunFolderError, match="is a file"):
        swept(files, tmp_path / "photos" / "cat.jpg", recipes=["base"])


@pytest.mark.parametrize("damage", [b'{"key": "12', b"[]", b'{"spec": {}}', b"\xe9"], ids=str)
def test_a_damaged_line_is_named(damage: bytes, files: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    swept(files, folder, recipes=["base", "icl"])
    with (folder / "cells.jsonl").open("ab") as file:
        file.write(damage)
    with pytest.raises(RunFolderError, match=r"cells\.jsonl:3: damaged .*Remove the line") as raised:
        swept(files, folder, recipes=["base", "icl"])
    assert "\n" not in str(raised.value)
    # as it says
    lines = (folder / "cells.jsonl").read_bytes().split(b"\n")
    (folder / "cells.jsonl").write_bytes(lines[1] + b"\n")
    assert swept(files, folder, recipes=["base", "icl"]).trained == 1


def test_texts_with_odd_line_ends_are_read_back(files: Path, tmp_path: Path) -> None:
    settings = {"separator": "\u2028\x85\x0b"}
    swept(files, tmp_path / "out", recipes=["base"], settings=settings)
    assert swept(files, tmp_path / "out", recipes=["base"], settings=settings).trained == 0


def test_two_sweeps_in_one_folder_are_refused(files: Path, tmp_path: Path) -> None:
    with (
        alone(tmp_path / "out"),
        pytest.raises(RunFolderError, match=rf"`ia2 sweep` \(process {os.getpid()} on .*\) is at work there"),
    ):
        swept(files, tmp_path / "out", recipes=["base"])
    assert swept(files, tmp_path / "out", recipes=["base"]).done == 1
    assert sorted(tree(tmp_path / "out")) == ["cells.jsonl", "sweep.json"]


def test_an_interrupt_gathers_what_is_done(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid: dict[str, Any] = {"recipes": ["icl", "sft", "ia2"]}
    fit = trainer.AlignTrainer.fit

    def interrupted(self: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.AlignTrainer, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        swept(files, tmp_path / "out", **grid)
    assert [record["spec"]["recipe"] for record in records(tmp_path / "out")] == ["icl", "sft"]
    assert not (tmp_path / "out" / "cells").exists()
    monkeypatch.setattr(trainer.AlignTrainer, "fit", fit)
    assert swept(files, tmp_path / "out", **grid).trained == 1


def test_rows_that_changed_are_another_experiment(tmp_path: Path) -> None:
    files = write_files(tmp_path / "files")
    assert swept(files, tmp_path / "out", recipes=["base"]).trained == 1
    rows = (files / "two" / "test.jsonl").read_text().replace('"label": 1', '"label": 0')
    (files / "two" / "test.jsonl").write_text(rows)
    assert swept(files, tmp_path / "out", recipes=["base"]).trained == 1
    assert len(records(tmp_path / "out", "other.jsonl")) == 1


def test_missing_rows_are_one_line(tmp_path: Path) -> None:
    files = write_files(tmp_path / "files")
    (files / "two" / "test.jsonl").unlink()
    with pytest.raises(DataError, match=r"Two: no file test\.jsonl"):
        swept(files, tmp_path / "out")


# ----------------------------------------------------------------------------------- killed and run again

_LONG = {"align": {"epochs": 30}, "sft": {"epochs": 30}, "checkpoint_every": 3}


@pytest.fixture(scope="module")
def uninterrupted(files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A grid file, and the results of a sweep that nothing disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    values = grid_of(files, recipes=["base", "icl", "ia2", "ia2-sft"], seeds=2, settings=_LONG)
    file = write_grid(folder / "grid.yaml", values)
    sweep(GridConfig(**values), folder / "out")
    return file, results(folder / "out")


def _a_cell(folder: Path) -> bool:
    return any((folder / "cells").glob("*.json"))


def _a_checkpoint(folder: Path) -> bool:
    """Some stage is under way, of which something is saved."""
    return any((folder / "work").glob("*/stages/.*/checkpoint-*/trainer_state.json"))


@pytest.mark.slow
@pytest.mark.parametrize("when", [_a_cell, _a_checkpoint])
def test_a_killed_sweep_goes_on(
    when: Callable[[Path], bool], uninterrupted: tuple[Path, list[str]], tmp_path: Path
) -> None:
    file, expected = uninterrupted
    folder = tmp_path / "out"
    command = ["sweep", file, "--output-dir", folder]
    kill_when(start(command, tmp_path / "log"), lambda: when(folder), tmp_path / "log")
    known = sorted(path.stem for path in (folder / "cells").glob("*.json"))
    assert known and not (folder / "cells.jsonl").exists()
    said = finish(start(command, tmp_path / "again"), tmp_path / "again")
    left = len(expected) - len(known)
    assert f"{len(expected)} of {len(expected)} cells are done ({left} run now)" in said
    assert results(folder) == expected
    assert sorted(tree(folder)) == ["cells.jsonl", "grid.yaml", "sweep.json"]


# ------------------------------------------------------------------------------------------- lost workers


def test_a_cell_whose_worker_always_dies_is_given_up(files: Path, tmp_path: Path) -> None:
    grid = GridConfig(**grid_of(files, recipes=["icl", "sft", "ia2"]))
    lost: list[list[str]] = []

    def way(work: Path) -> Any:
        inner = in_process(work)

        def dying(queue: Any) -> Any:
            while queue:
                unit = queue.popleft()
                (sft,) = [c.key for c in unit.cells if c.spec["recipe"] == "sft"] or [None]
                titles = {cell.key: cell.spec["recipe"] for cell in unit.cells}
                for event in inner(type(queue)([unit])):
                    yield event
                    if isinstance(event, Started) and event.key == sft:
                        lost.append(list(titles.values()))
                        yield Lost(unit, "was eaten")
                        break

        return dying

    done = sweep(grid, tmp_path / "out", run=way)
    assert [r["spec"]["recipe"] for r in records(tmp_path / "out")] == ["icl", "ia2"]
    assert [failure["error"] for failure in done.failed] == [f"its worker was eaten, {RETRIES + 1} times"]
    # what was finished is not done again
    assert lost == [["icl", "sft", "ia2"], ["sft", "ia2"], ["sft", "ia2"]]


def test_a_worker_that_dies_now_and_then_is_nobodys_fault(files: Path, tmp_path: Path) -> None:
    grid = GridConfig(**grid_of(files, recipes=["icl", "sft", "ia2", "ia2-sft", "soft-sft"]))

    def way(work: Path) -> Any:
        def dying(queue: Any) -> Any:
            while queue:
                unit = queue.popleft()
                yield from in_process(work)(type(queue)([unit.only({unit.cells[0].key})]))
                if len(unit.cells) > 1:
                    yield Lost(unit, "was eaten")

        return dying

    done = sweep(grid, tmp_path / "out", run=way)
    assert (done.done, done.failed) == (5, [])


def test_a_cell_that_failed_before_its_worker_died_is_not_tried_again_now(
    files: Path, tmp_path: Path
) -> None:
    grid = GridConfig(**grid_of(files, recipes=["icl", "sft"]))

    def way(work: Path) -> Any:
        def dying(queue: Any) -> Any:
            unit = queue.popleft()
            yield Failed(unit.cells[0].key, "no")
            yield Lost(unit, "was eaten")
            assert [cell.spec["recipe"] for cell in queue[0].cells] == ["sft"]
            yield from in_process(work)(queue)

        return dying

    done = sweep(grid, tmp_path / "out", run=way)
    assert [failure["error"] for failure in done.failed] == ["no"]
    assert done.done == 1
