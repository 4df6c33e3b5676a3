"""Several worker processes: the same cells as in one, and nothing lost when one dies."""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.launching import python
from helpers.sweeping import grid_of, records, results, write_grid

from ia2.experiment.sweep.execute import cells_of, read_benchmarks, sweep
from ia2.experiment.sweep.grid import GridConfig, expand
from ia2.experiment.sweep.job import Event, Finished, Started
from ia2.experiment.sweep.workers import Lost, in_process, processes
from ia2.utils.errors import ConfigError

pytestmark = pytest.mark.slow  # each worker imports torch

GRID: dict[str, Any] = {"recipes": ["base", "icl", "sft", "ia2-sft"], "seeds": 2, "ood": True}
ENDLESS = {"sft": {"epochs": 1000, "patience": 1000}}
_PATIENCE = 120


@pytest.fixture(scope="module")
def here(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same sweep in this process."""
    import torch

    assert torch.get_num_threads() == 1
    folder = tmp_path_factory.mktemp("here") / "out"
    sweep(GridConfig(**grid_of(files, **GRID)), folder)
    return folder


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are the same to the last digit only with as many threads."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)


def workers_of(process: int) -> list[psutil.Process]:
    """Worker processes, without what multiprocessing itself needs."""
    found = psutil.Process(process).children(recursive=True)
    return [child for child in found if any("spawn_main" in word for word in child.cmdline())]


def watched(work: Path, count: int, on_event: Callable[[Event | Lost], None]) -> Any:
    """Processes whose events are shown to somebody before they are dealt with."""
    inner = processes(work, count)

    def run(queue: Any) -> Iterator[Event | Lost]:
        for event in inner(queue):
            on_event(event)
            yield event

    return run


def test_two_processes_give_the_same_cells(
    files: Path,
    here: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: set[int] = set()
    # names are relative to where the command is given
    monkeypatch.chdir(files)
    values = grid_of(Path(), **GRID)
    done = sweep(
        GridConfig(**values),
        tmp_path / "out",
        run=lambda work: watched(work, 2, lambda _: seen.update(w.pid for w in workers_of(os.getpid()))),
    )
    assert len(seen) == 2
    assert (done.done, done.failed) == (len(records(here)), [])

    def found(folder: Path) -> list[str]:
        # the model's name, and with it the key, are those of another grid
        return [line.split('"recipe"', 1)[1] for line in results(folder, "key")]

    assert found(tmp_path / "out") == found(here)
    assert {record["cost"]["machine"]["threads"] for record in records(tmp_path / "out")} == {1}
    assert not workers_of(os.getpid())
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""  # neither bars nor what dependencies warn of


def test_a_worker_that_is_killed_loses_nothing(
    files: Path,
    here: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # for the only worker
    killed: list[int] = []
    lost: list[Lost] = []

    def kill(event: Event | Lost) -> None:
        if isinstance(event, Lost):
            lost.append(event)
        # while it does the cell after the first that it finished
        if isinstance(event, Finished) and event.record["spec"]["recipe"] == "icl" and not killed:
            for worker in workers_of(os.getpid()):
                worker.kill()
                killed.append(worker.pid)

    grid = GridConfig(**grid_of(files, **GRID))
    with caplog.at_level("INFO", "ia2"):
        done = sweep(grid, tmp_path / "out", run=lambda work: watched(work, 1, kill))
    assert len(killed) == 1 and len(lost) == 1
    assert lost[0].reason == "was killed by signal 9 (SIGKILL)"
    assert any("A worker was killed by signal 9 (SIGKILL)" in line for line in caplog.messages)
    assert not done.failed
    assert results(tmp_path / "out") == results(here)


def test_a_cell_whose_workers_always_die_is_given_up_and_the_rest_is_done(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ia2.experiment.sweep.execute.RETRIES", 1)
    deaths: list[str] = []

    def kill(event: Event | Lost) -> None:
        doomed = isinstance(event, Started) and event.key == keys["sft"]
        if doomed:
            deaths.append(event.key)  # type: ignore[union-attr]
            for worker in workers_of(os.getpid()):
                worker.kill()

    # a long stage, so that it is never done before its worker is killed
    values = grid_of(files, recipes=["icl", "sft", "ia2"], settings=ENDLESS)
    grid = GridConfig(**values)
    units = cells_of(grid, read_benchmarks(grid))
    keys = {cell.spec["recipe"]: cell.key for unit in units for cell in unit.cells}
    done = sweep(grid, tmp_path / "out", run=lambda work: watched(work, 1, kill))
    assert len(deaths) == 2
    assert [r["spec"]["recipe"] for r in records(tmp_path / "out")] == ["icl", "ia2"]
    assert [f["error"] for f in done.failed] == ["its worker was killed by signal 9 (SIGKILL), 2 times"]


def test_an_idle_worker_that_died_is_replaced(files: Path, tmp_path: Path) -> None:
    """Seeds one after the other; whoever did the first is gone before the next is given out."""
    grid = GridConfig(**grid_of(files, recipes=["icl"], seeds=2))
    first, second = expand(grid)
    queue = deque([first])
    events: list[Event | Lost] = []
    for event in processes(tmp_path / "work", 1)(queue):
        events.append(event)
        if isinstance(event, Finished) and event.key == first.cells[0].key:
            (worker,) = workers_of(os.getpid())
            queue.append(second)
            deadline = time.monotonic() + _PATIENCE
            # it says that it is idle, then waits
            while worker.status() != psutil.STATUS_SLEEPING and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(0.2)
            worker.kill()
            worker.wait(_PATIENCE)
        if isinstance(event, Lost):
            queue.append(event.unit)
    assert [event.key for event in events if isinstance(event, Finished)] == [
        first.cells[0].key,
        second.cells[0].key,
    ]
    assert any(isinstance(event, Lost) and event.unit == second for event in events)


def test_workers_end_with_a_sweep_that_is_killed(files: Path, here: Path, tmp_path: Path) -> None:
    values = grid_of(files, recipes=["sft"], seeds=4, settings=ENDLESS)
    file = write_grid(tmp_path / "grid.yaml", values)
    command = ["-m", "ia2", "sweep", file, "--output-dir", tmp_path / "out", "--workers", "2"]
    process = python(command, tmp_path / "log")
    try:
        deadline = time.monotonic() + _PATIENCE
        while not list((tmp_path / "out").glob("work/*/stages")):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.05)
        workers = workers_of(process.pid)
        assert len(workers) == 2
        process.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(workers, timeout=_PATIENCE)
        assert not alive
    finally:
        process.kill()
        process.wait()


def test_an_interrupt_ends_workers_and_keeps_what_is_done(files: Path, tmp_path: Path) -> None:
    values = grid_of(files, recipes=["base", "sft"], seeds=3, settings=ENDLESS)
    file = write_grid(tmp_path / "grid.yaml", values)
    command = ["-m", "ia2", "sweep", file, "--output-dir", tmp_path / "out", "--workers", "2"]
    process = python(command, tmp_path / "log")
    try:
        deadline = time.monotonic() + _PATIENCE
        while not list((tmp_path / "out").glob("cells/*.json")):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.05)
        workers = workers_of(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(_PATIENCE) == 130
        _, alive = psutil.wait_procs(workers, timeout=_PATIENCE)
        assert not alive
    finally:
        process.kill()
        process.wait()
    said = (tmp_path / "log").read_text().splitlines()
    assert said[0].startswith("sweep: 4 cells in 4 units; 0 finished before, 4 to do.")
    assert [line for line in said[1:-2] if not line.startswith("[")] == []
    assert said[-2:] == ["", "ia2: interrupted; start the same command again to continue."]
    assert records(tmp_path / "out")[0]["spec"]["recipe"] == "base"


def test_no_workers_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="0 processes"):
        processes(tmp_path, 0)


def test_nothing_to_do_starts_no_worker(tmp_path: Path) -> None:
    for way in (processes(tmp_path, 2), in_process(tmp_path)):
        assert list(way(deque())) == []
    assert not workers_of(os.getpid())
