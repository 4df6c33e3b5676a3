"""``ia2 …`` in processes of their own, run to their end or killed.

Importing torch and transformers takes longer than training a tiny model, so :func:`start` forks from a
server that has imported them once; :func:`python` starts a real interpreter.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ia2.data.examples import Examples

_PATIENCE = 240
_PRELOAD = [
    "ia2.cli",
    "ia2.experiment.compare",
    "ia2.training.trainer",
    "peft",
    "transformers.models.llama.modeling_llama",
]


def write_rows(examples: Examples, path: Path) -> Path:
    """A JSONL file of prompts and completions."""
    rows = [{"prompt": example.query, "completion": example.answer} for example in examples]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def python(arguments: Sequence[object], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Start ``python <arguments>``; its output goes to a file."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    with log.open("wb") as out:
        command = [sys.executable, *map(str, arguments)]
        return subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=variables, preexec_fn=_heed_interrupts
        )


def _heed_interrupts() -> None:
    """A shell has its background jobs ignore interrupts, and so would what a test starts in one."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def forkserver() -> Any:
    """Processes forked from the server; the first call in a test session settles what it has imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def start(arguments: Sequence[object], log: Path) -> BaseProcess:
    """Start ``ia2 <arguments>``; its output goes to a file."""
    process: BaseProcess = forkserver().Process(target=_ia2, args=(list(map(str, arguments)), str(log)))
    process.start()
    return process


def _ia2(arguments: list[str], log: str) -> None:
    with Path(log).open("wb", buffering=0) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    import torch

    from ia2.cli import main

    torch.set_num_threads(1)
    sys.argv = ["ia2", *arguments]
    main()


def free_port() -> int:
    """A port that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def together(
    folder: Path, work: Callable[..., Any], *arguments: Any, count: int = 2, **env: str
) -> list[Any]:
    """What ``work(*arguments)`` gives in each of ``count`` processes that were launched together, over gloo.

    Args:
        folder: for their logs and results; made here.
        work: a function of a module.
        arguments: can be pickled.
        count: of processes.
        env: variables of their environment.
    """
    folder.mkdir()
    port, members = free_port(), []
    for rank in range(count):
        launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true", **env}
        variables = {name: str(value) for name, value in launched.items()}
        told = (str(folder / f"{rank}"), variables, work, arguments)
        members.append(forkserver().Process(target=_member, args=told))
        members[-1].start()
    for rank, member in enumerate(members):
        finish(member, folder / f"{rank}.log")
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(count)]


def _member(place: str, variables: dict[str, str], work: Callable[..., Any], given: tuple[Any, ...]) -> None:
    with Path(f"{place}.log").open("wb", buffering=0) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.environ.update(variables)
    import torch

    torch.set_num_threads(1)
    Path(f"{place}.pickle").write_bytes(pickle.dumps(work(*given)))
    torch.distributed.destroy_process_group()


def finish(process: BaseProcess | subprocess.Popen[bytes], log: Path) -> str:
    """Wait for the end; returns what was said."""
    try:
        if isinstance(process, BaseProcess):
            process.join(_PATIENCE)
            code = process.exitcode
        else:
            code = process.wait(_PATIENCE)
    finally:
        process.kill()
    text = log.read_text()
    assert code == 0, text
    return text


def kill_when(process: BaseProcess, condition: Callable[[], bool], log: Path) -> None:
    """SIGKILL as soon as something is there."""
    end = time.monotonic() + _PATIENCE
    try:
        while not condition():
            assert process.is_alive(), f"ended before it could be killed:\n{log.read_text()}"
            assert time.monotonic() < end, f"never came to the point of being killed:\n{log.read_text()}"
            time.sleep(0.002)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -9, f"ended before it could be killed:\n{log.read_text()}"
