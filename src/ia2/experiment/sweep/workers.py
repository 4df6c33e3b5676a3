"""Where units are run: in this process, or in several of this machine (``cluster`` has more machines).

Each way is a generator: units in, events out, as they happen. A worker that dies is reported as
:class:`Lost`; what it had finished has been handed over before.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ia2.experiment.sweep.grid import Unit
from ia2.experiment.sweep.job import Event, run_unit
from ia2.utils.errors import ConfigError
from ia2.utils.logging import configure, muted


@dataclass(frozen=True)
class Lost:
    """A worker died while it did a unit."""

    unit: Unit
    reason: str


# Seconds that a worker has to end by itself.
_FAREWELL = 10.0

Queue = deque[Unit]
Run = Callable[[Queue], Generator["Event | Lost", None, None]]
"""Takes units from the queue until it is empty; the caller may put some back meanwhile."""


def in_process(work: Path, *, keep: bool = False) -> Run:
    """One unit after the other, here."""

    def run(queue: Queue) -> Generator[Event | Lost, None, None]:
        model: str | None = None
        while queue:
            # one seed's after the other's, so that a sweep cut short has every model
            seed = next((unit.seed for unit in queue if unit.seed is not None), None)
            unit = _next(queue, model, (None, seed))
            model = unit.model
            with muted():
                yield from run_unit(unit, work, keep=keep)

    return run


def processes(work: Path, count: int, *, keep: bool = False) -> Run:
    """Several units at once, each in a process of this machine with its share of the cores.

    Raises:
        ConfigError: fewer than one process.
    """
    if count < 1:
        raise ConfigError(f"{count} processes: at least one is needed.")

    def run(queue: Queue) -> Generator[Event | Lost, None, None]:
        context = multiprocessing.get_context("spawn")
        threads = max(1, (os.cpu_count() or 1) // count)
        busy: dict[Connection, _Worker] = {}
        idle: list[_Worker] = []
        try:
            while queue or busy:
                while queue and len(busy) < count:
                    worker = idle.pop() if idle else _Worker(context, work, keep, threads)
                    unit = _next(queue, worker.model)
                    try:
                        worker.begin(unit)
                    except OSError:  # it died while it had nothing to do
                        yield Lost(unit, worker.ended())
                        continue
                    busy[worker.connection] = worker
                for ready in wait(list(busy)):
                    assert isinstance(ready, Connection)
                    worker = busy[ready]
                    try:
                        event = ready.recv()
                    except (EOFError, OSError):  # OSError: in the middle of an event
                        del busy[ready]
                        assert worker.unit is not None
                        yield Lost(worker.unit, worker.ended())
                        continue
                    if event is None:
                        idle.append(busy.pop(ready))
                    else:
                        yield event
        finally:
            for worker in (*busy.values(), *idle):
                worker.stop()

    return run


def _next(queue: Queue, model: str | None, seeds: Sequence[int | None] | None = None) -> Unit:
    """A unit (of these seeds) of the model that the worker has loaded, if there is one; else the first."""
    for unit in queue:
        if unit.model == model and (seeds is None or unit.seed in seeds):
            queue.remove(unit)
            return unit
    return queue.popleft()


class _Worker:
    """A process that does one unit after the other."""

    def __init__(self, context: Any, work: Path, keep: bool, threads: int) -> None:
        self.connection, theirs = context.Pipe()
        self.unit: Unit | None = None
        self.model: str | None = None
        self._process = context.Process(target=_serve, args=(theirs, work, keep, threads), daemon=True)
        # before torch is imported there; its own count would be all cores
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = str(threads)
        try:
            self._process.start()
        finally:
            if before is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = before
        theirs.close()

    def begin(self, unit: Unit) -> None:
        self.unit, self.model = unit, unit.model
        self.connection.send(unit)

    def ended(self) -> str:
        """How it died."""
        self._process.join()
        code = self._process.exitcode
        if code is not None and code < 0:
            return f"was killed by signal {-code} ({signal.Signals(-code).name})"
        return f"ended with status {code}"

    def stop(self) -> None:
        self.connection.close()
        self._process.terminate()
        self._process.join(_FAREWELL)
        self._process.kill()
        self._process.join()


def _serve(connection: Connection, work: Path, keep: bool, threads: int) -> None:
    """What a worker process does: units come in, events go out, None after each unit."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it,
    signal.signal(signal.SIGTERM, _leave)  # and it may tidy up
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(threads)
    configure(quiet=True)  # what dependencies have to say is for nobody
    with muted():
        # a parent that was interrupted has closed its end, while a unit is waited for or an event sent
        with suppress(EOFError, BrokenPipeError):
            while True:
                unit = connection.recv()
                for event in run_unit(unit, work, keep=keep):
                    connection.send(event)
                connection.send(None)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is leaving


def _leave(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(1)


def _end_with_parent() -> None:
    """A parent that was killed cannot end its workers; one that went on would meet the next start's."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
