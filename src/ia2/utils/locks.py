"""One process at a time works in a run's folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ia2.utils.errors import RunFolderError
from ia2.utils.files import write_text, writing
from ia2.utils.logging import logger

# Held by the process that works in a run's folder, and who that is.
LOCK = ".ia2.lock"
_HOLDER = ".ia2.lock.holder"


@contextmanager
def only_one(folder: Path, command: str) -> Iterator[None]:
    """Keep other processes out of a run's folder meanwhile.

    The lock file stays: who removes it while others open it gives them a lock of their own.

    Args:
        folder: the run's folder; made if it is not there.
        command: who asks, as others are told.

    Raises:
        RunFolderError: another process is at work there.
    """
    import platform

    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK)
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
    except Timeout:
        raise RunFolderError(
            f"{folder}: {_holder(folder)} is at work there. Wait for it, or choose another --output-dir."
        ) from None
    except NotImplementedError:
        logger.warning(
            "%s: this file system has no locks. See to it that no other run works in this folder.", folder
        )
    holder = folder / _HOLDER
    try:
        with writing(holder):
            asker = f"`{command}` (process {os.getpid()} on {platform.node() or 'this host'})"
            write_text(holder, asker, listed=False)  # in place of a link too
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _holder(folder: Path) -> str:
    try:
        return (folder / _HOLDER).read_text(errors="replace") or "another process"
    except OSError:  # it has just begun or ended
        return "another process"
