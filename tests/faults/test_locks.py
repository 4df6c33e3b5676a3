"""One process at a time works in a run's folder; the second is told who the first is."""

from __future__ import annotations

import multiprocessing
import os
import platform
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import Ia2, names

from ia2.utils.errors import RunFolderError
from ia2.utils.locks import LOCK, only_one

STARTS = 100


def _start_again_and_again(folder: Path, barrier: Barrier, counts: Any) -> None:
    """Ask for the lock at the same moment as the others, ``STARTS`` times."""
    for number in range(STARTS):
        barrier.wait(60)
        try:
            with only_one(folder / str(number // 10), "ia2 sweep"):
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
    arguments = (tmp_path, barrier, counts)
    processes = [context.Process(target=_start_again_and_again, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    _, most, held, refused = counts
    assert (most, held + refused) == (1, 3 * STARTS)
    assert held >= STARTS / 2 and refused >= STARTS / 2  # they did meet


@pytest.mark.parametrize("command", ["train", "compare", "curve"])
def test_every_command_that_writes_a_run(command: str, here: Path, ia2: Ia2) -> None:
    test = ["--test-data", "test.jsonl", "--sizes", "2", "4"] if command == "curve" else []
    with only_one(here / "out", f"ia2 {command}"):
        inode = (here / "out" / LOCK).stat().st_ino
        line = ia2(
            command, "--model", "model", "--data", "rows.jsonl", *test, "--output-dir", "out"
        ).refusal()
    names(line, f"`ia2 {command}` (process {os.getpid()} on {platform.node()})", "is at work there")
    # the file stays, so that whoever opened it meanwhile asks for the same lock
    assert [(p.name, p.stat().st_ino) for p in (here / "out").iterdir()] == [(LOCK, inode)]


def test_a_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def hold() -> None:
        with only_one(tmp_path, "ia2 train"):
            ready.set()
            time.sleep(60)

    process = context.Process(target=hold)
    process.start()
    assert ready.wait(60)
    process.kill()
    process.join()
    with only_one(tmp_path, "ia2 train"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == [LOCK]


def test_a_note_of_the_holder_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".ia2.lock.holder").symlink_to(tmp_path / "mine")
    with only_one(tmp_path / "run", "ia2 train"):
        pass
    assert (tmp_path / "mine").read_text() == "mine"
