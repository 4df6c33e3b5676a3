"""One process at a time works in a run's folder; the second is told who the first is."""

from __future__ import annotations

import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import run, write_rows
from tiny_icl.tasks import sample_task

from ia2.experiment.sweep.store import alone
from ia2.utils.errors import RunFolderError
from ia2.utils.locks import LOCK, only_one

STARTS = 300


def _start_again_and_again(folder: Path, barrier: Barrier, counts: Any) -> None:
    """Ask for the lock at the same moment as the others, ``STARTS`` times."""
    for number in range(STARTS):
        barrier.wait(60)
        try:
            with alone(folder / str(number // 10)):
                with counts.get_lock():
                    counts[0] += 1  # holders now
                    counts[1] = max(counts[1], counts[0])
                    counts[2] += 1
                time.sleep(0.001 * (number % 3))
                with counts.get_lock():
                    counts[0] -= 1
        except RunFolderError:
            with counts.get_lock():
                counts[3] += 1


def test_simultaneous_starts_have_one_holder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, counts = context.Barrier(3), context.Array("i", 4)
    processes = [
        context.Process(target=_start_again_and_again, args=(tmp_path, barrier, counts)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    _, most, held, refused = counts
    assert most == 1
    assert held + refused == 3 * STARTS
    assert held >= STARTS / 2 and refused >= STARTS / 2  # they did meet


def test_the_second_is_told_who_the_first_is(tmp_path: Path) -> None:
    with only_one(tmp_path / "run", "ia2 train"):
        inode = (tmp_path / "run" / LOCK).stat().st_ino
        with pytest.raises(RunFolderError) as error, only_one(tmp_path / "run", "ia2 train"):
            pass
        assert f"`ia2 train` (process {os.getpid()} on {platform.node()})" in str(error.value)
        assert "\n" not in str(error.value)
    # the file stays, so that whoever opened it meanwhile asks for the same lock
    assert (tmp_path / "run" / LOCK).stat().st_ino == inode
    assert [p.name for p in (tmp_path / "run").iterdir()] == [LOCK]


@pytest.mark.parametrize("command", ["train", "compare", "curve"])
def test_every_command_that_writes_a_run(
    tiny_icl_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", sample_task(0, num_classes=3).examples(12, seed=0))
    test = ["--test-data", rows, "--sizes", "2", "4"] if command == "curve" else []
    arguments = [command, "--model", tiny_icl_model_path, "--data", rows, *test, "--quiet"]
    with only_one(tmp_path / "out", f"ia2 {command}"):
        line = run(capsys, *arguments, "--output-dir", tmp_path / "out").refusal()
    assert f"`ia2 {command}` (process {os.getpid()}" in line and "is at work there" in line
    assert not (tmp_path / "out" / "ia2_run.json").exists()


def test_a_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    def hold(ready: Any) -> None:
        with only_one(tmp_path, "ia2 train"):
            ready.set()
            time.sleep(60)

    _killed(hold)
    with only_one(tmp_path, "ia2 train"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == [LOCK]


def _killed(work: Callable[[Any], None]) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=work, args=(ready,))
    process.start()
    assert ready.wait(60)
    process.kill()
    process.join()


def test_a_note_of_the_holder_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".ia2.lock.holder").symlink_to(tmp_path / "mine")
    with only_one(tmp_path / "run", "ia2 train"):
        pass
    assert (tmp_path / "mine").read_text() == "mine"
