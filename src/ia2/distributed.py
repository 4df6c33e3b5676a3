"""Several processes of one launch: the first one writes, the others wait and read.

The teacher pass and evaluations run in the first process; training runs in all.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")

# The others wait for the first process's teacher pass, which may take hours.
_PATIENCE = timedelta(days=2)


def _state() -> object:
    from accelerate import PartialState

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return PartialState(timeout=_PATIENCE)
    return PartialState()


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return bool(_state().is_main_process)  # type: ignore[attr-defined]


def wait() -> None:
    """All processes meet here."""
    _state().wait_for_everyone()  # type: ignore[attr-defined]


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
