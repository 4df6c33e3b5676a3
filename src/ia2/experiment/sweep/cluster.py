"""Units on a Ray cluster: each is a task; its events come back as they happen.

Results are written where the sweep was started. Workers need the package and the benchmarks' files (or the
hub), not a shared disk; with one, a unit whose worker died goes on where it was.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from ia2.experiment.sweep.grid import Unit
from ia2.experiment.sweep.job import Event, run_unit
from ia2.experiment.sweep.workers import Lost, Queue, Run
from ia2.utils.errors import ConfigError
from ia2.utils.logging import configure, muted

LOCAL = "local"
"""Address that starts a cluster on this machine."""

# What workers need of this process's environment.
_ENVIRONMENT = (
    *("HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "XDG_CACHE_HOME"),
    *("IA2_CACHE_DIR", "IA2_DATA_DIR", "TOKENIZERS_PARALLELISM"),
)

_PATIENCE = 5.0  # seconds; Ray itself would try for minutes


def on_ray(work: Path, address: str, *, workers: int = 1, gpus: float = 0.0, keep: bool = False) -> Run:
    """Units as tasks of a Ray cluster.

    Args:
        work: folder for working files on the workers.
        address: of the cluster's head, ``auto`` for the one that runs here, ``local`` to start one.
        workers: of a local cluster.
        gpus: each task's share; fractions put several tasks on one.
        keep: see :func:`ia2.experiment.sweep.job.run_unit`.

    Raises:
        ConfigError: Ray is not installed, or the cluster cannot be reached or has too few GPUs.
    """

    def run(queue: Queue) -> Generator[Event | Lost, None, None]:
        if not queue:  # nothing is left to do
            return
        ray = _connect(address, workers)
        try:
            yield from _tasks(ray, queue, _remote(ray, address, workers, gpus), work.resolve(), keep)
        finally:
            ray.shutdown()

    return run


def _connect(address: str, workers: int) -> Any:
    # it would print what the cluster says of dead workers on stdout, where results go; read on import
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            f"--ray needs Ray ({error}). Install it with: pip install 'ia2[cluster]'"
        ) from error
    _check_answered(address)
    # nobody's experiments are anybody else's business
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": "ERROR",
        "runtime_env": {"env_vars": environment},
    }
    if address == LOCAL:
        options |= {"address": LOCAL, "num_cpus": workers, "include_dashboard": False}
    else:
        options["address"] = address
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _nobody_there(address, error) from error
    return ray


def _check_answered(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host.removeprefix("ray://"), int(port)), _PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise _nobody_there(address, error) from error


def _nobody_there(address: str, error: Exception) -> ConfigError:
    text = " ".join(str(error).split()).rstrip(".")
    return ConfigError(
        f"--ray {address}: no cluster there ({text[:200]}). Start one with `ray start --head`, or give "
        "--ray local."
    )


def _remote(ray: Any, address: str, workers: int, gpus: float) -> Any:
    if gpus and ray.cluster_resources().get("GPU", 0) < gpus:
        found = ray.cluster_resources().get("GPU", 0)
        ray.shutdown()
        raise ConfigError(f"--gpus-per-worker {gpus:g}: the cluster has {found:g} GPUs.")
    # Ray gives a task as many threads as CPUs; on this machine they are shared out
    threads = max(1, (os.cpu_count() or 1) // workers) if address == LOCAL else 1
    environment = {"OMP_NUM_THREADS": str(threads)}
    # a worker that died is dealt with here, where it is known what it had finished
    return ray.remote(_unit).options(
        num_cpus=1,
        num_gpus=gpus,
        max_retries=0,
        num_returns="streaming",
        runtime_env={"env_vars": environment},
    )


def _unit(unit: Unit, work: Path, keep: bool) -> Iterator[Event]:
    """The task."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    configure(quiet=True)  # what dependencies have to say is for nobody
    with muted():
        yield from run_unit(unit, work, keep=keep)


def _tasks(ray: Any, queue: Queue, remote: Any, work: Path, keep: bool) -> Iterator[Event | Lost]:
    from ray.exceptions import RayError

    running: dict[Any, Unit] = {}
    while queue or running:
        while queue:  # Ray keeps what does not fit yet
            unit = queue.popleft()
            running[remote.remote(unit, work, keep)] = unit
        ready, _ = ray.wait(list(running), num_returns=1)
        for events in ready:
            try:
                event = ray.get(next(events))
            except StopIteration:
                del running[events]
                continue
            except RayError as error:
                text = " ".join(str(error).split())
                yield Lost(running.pop(events), f"was lost ({type(error).__name__}: {text[:120]})")
                continue
            yield event
