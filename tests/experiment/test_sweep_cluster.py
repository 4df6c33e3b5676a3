"""Units on a Ray cluster: the same cells, nothing lost when a worker dies, and refusals in one line."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from helpers.command_line import run
from helpers.sweeping import grid_of, results, write_files, write_grid

from ia2.experiment.sweep.cluster import on_ray
from ia2.experiment.sweep.execute import sweep
from ia2.experiment.sweep.grid import GridConfig
from ia2.experiment.sweep.job import Event, Finished
from ia2.experiment.sweep.workers import Lost
from ia2.utils.errors import ConfigError

# without importing it, which a sweep does once it has told it to be silent
with_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")


def begin(address: str, **options: Any) -> list[Event | Lost]:
    """What comes of a queue on a cluster; with a unit that is none, since it never comes to it."""
    queue: Any = deque(["a unit"])
    return list(on_ray(Path("work"), address, **options)(queue))


@pytest.mark.slow
@with_ray
def test_a_local_cluster_gives_the_same_cells_though_a_worker_is_killed(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)  # so that each worker has one thread, as this process
    files = write_files(tmp_path / "files")
    grid = GridConfig(**grid_of(files, recipes=["base", "icl", "sft", "ia2-sft"], seeds=2, ood=True))
    sweep(grid, tmp_path / "here")
    pids: set[int] = set()
    lost: list[str] = []
    killed: list[int] = []

    def way(work: Path) -> Any:
        inner = on_ray(work, "local", workers=2)

        def watched(queue: Any) -> Iterator[Event | Lost]:
            for event in inner(queue):
                workers = [p for p in psutil.Process().children(recursive=True) if at_work(p)]
                pids.update(worker.pid for worker in workers)
                if isinstance(event, Lost):
                    lost.append(event.reason)
                # both are in the middle of something else by now
                if isinstance(event, Finished) and event.record["spec"]["recipe"] == "icl" and not killed:
                    for worker in workers:
                        worker.kill()
                        killed.append(worker.pid)
                yield event

        return watched

    capfd.readouterr()
    with caplog.at_level("INFO", "ia2"):
        done = sweep(grid, tmp_path / "out", run=way)
    assert not done.failed
    assert results(tmp_path / "out") == results(tmp_path / "here")
    assert killed and len(lost) == len(killed) and len(pids) > len(killed)
    assert all(reason.startswith("was lost (") for reason in lost)
    assert sum("A worker was lost" in message for message in caplog.messages) == len(lost)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert not [process for process in psutil.Process().children(recursive=True) if at_work(process)]


def at_work(process: psutil.Process) -> bool:
    """Whether it is a Ray worker with a unit."""
    try:
        return "ray::_unit" in " ".join(process.cmdline())
    except psutil.Error:  # gone meanwhile
        return False


def test_nothing_to_do_needs_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert list(on_ray(Path("work"), "auto")(deque())) == []


# ------------------------------------------------------------------------------------------- refusals


def test_without_ray_it_says_how_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    file = write_grid(tmp_path / "grid.yaml", grid_of(write_files(tmp_path), recipes=["base"]))
    message = run(
        capsys, "sweep", file, "--output-dir", tmp_path / "out", "--ray", "local", "--quiet"
    ).refusal()
    assert message.startswith("--ray needs Ray (") and "pip install 'ia2[cluster]'" in message


@with_ray
@pytest.mark.parametrize("address", ["auto", "nonsense", "127.0.0.1:{port}", "ray://127.0.0.1:{port}"])
def test_no_cluster_at_an_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = address.format(port=free.getsockname()[1])
    began = time.monotonic()
    with pytest.raises(ConfigError) as raised:
        begin(address)
    assert time.monotonic() - began < 30  # Ray itself tries for minutes
    message = str(raised.value)
    assert message.startswith(f"--ray {address}: no cluster there (") and "\n" not in message
    assert "`ray start --head`" in message and "--ray local" in message


# ------------------------------------------------------------------------------------- what Ray is asked for


class FakeRay:
    """Notes what it is asked for."""

    def __init__(self, gpus: float = 0) -> None:
        self.started: dict[str, Any] = {}
        self.asked: dict[str, Any] = {}
        self.resources = {"CPU": 4.0, **({"GPU": float(gpus)} if gpus else {})}
        self.stopped = 0

    def init(self, **options: Any) -> None:
        self.started = options

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def remote(self, function: Any) -> Any:
        def options(**asked: Any) -> Any:
            self.asked = asked
            raise _Asked

        return SimpleNamespace(options=options)

    def shutdown(self) -> None:
        self.stopped += 1


class _Asked(Exception):
    """No unit is run."""


def asked(ray: FakeRay, monkeypatch: pytest.MonkeyPatch, address: str = "auto", **options: Any) -> FakeRay:
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(_Asked):
        begin(address, **options)
    assert ray.stopped == 1  # whatever happens
    return ray


def test_each_task_has_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus in (0.0, 0.25, 1.0):
        ray = asked(FakeRay(gpus=2), monkeypatch, gpus=gpus)
        assert (ray.asked["num_cpus"], ray.asked["num_gpus"]) == (1, gpus)
        assert ray.asked["max_retries"] == 0  # what is lost is given out again here
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for address, threads in (("auto", "1"), ("local", "4")):
        ray = asked(FakeRay(), monkeypatch, address, workers=2)
        assert ray.asked["runtime_env"]["env_vars"] == {"OMP_NUM_THREADS": threads}


def test_too_few_gpus_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(ConfigError, match=r"--gpus-per-worker 0\.5: the cluster has 0 GPUs"):
        begin("auto", gpus=0.5)
    assert ray.stopped


def test_workers_find_data_and_models_and_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HOME", "IA2_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("IA2_DATA_DIR", "/data")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")  # Ray would show it to whoever looks at the cluster
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "")
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED")
    started = asked(FakeRay(), monkeypatch).started
    environment = started["runtime_env"]["env_vars"]
    assert environment["IA2_DATA_DIR"] == "/data"
    assert environment["HF_HUB_OFFLINE"] == "1"  # as this process has it
    assert "HF_HOME" not in environment and "HF_TOKEN" not in environment
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert started["log_to_driver"] is False and started["address"] == "auto"
    local = asked(FakeRay(), monkeypatch, "local", workers=3).started
    assert (local["num_cpus"], local["address"]) == (3, "local")
