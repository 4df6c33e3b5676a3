"""Several processes of one launch: the first one writes, the others wait and read.

The teacher pass and evaluations run in the first process; training runs in all.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from ia2.errors import ConfigError

if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")

# The others wait for the first process's teacher pass, which may take hours.
_PATIENCE = timedelta(days=2)


def process_state(*, on_cpu: bool = False) -> PartialState:
    """This process among those of its launch; the first call connects them.

    Args:
        on_cpu: the model is to be on the CPU, where there may be an accelerator as well.

    Raises:
        ConfigError: several processes were launched, and they cannot be connected.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    asked = parse_flag_from_env("ACCELERATE_USE_CPU")
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or "LOCAL_RANK" not in os.environ:
        return PartialState(cpu=asked)
    # accelerate connects processes without an accelerator only where it is told that there is none
    cpu = asked or on_cpu or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=_PATIENCE)
    if state.num_processes == 1:
        raise ConfigError(
            f"{count} processes were launched, and on {state.device.type} they cannot work together. "
            "Start one, or give --device cpu."
        )
    return state


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return bool(process_state().is_main_process)


def wait() -> None:
    """All processes meet here."""
    process_state().wait_for_everyone()


def first_then_all(work: Callable[[], T]) -> T:
    """Run ``work`` in the first process, then in the others, which find its files."""
    if is_first():
        try:
            result = work()
        finally:
            wait()
        return result
    wait()
    return work()
