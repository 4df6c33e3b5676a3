"""What the user sees while something runs: log lines and progress bars, both on stderr.

Library code logs through ``logging.getLogger("ia2")`` and wraps long loops in :func:`progress`; the
command line decides with :func:`configure` whether either is shown. Results go to stdout, so that
``ia2 … --json | jq`` works whatever is shown here.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("ia2")

_show_progress = False


def configure(*, quiet: bool = False) -> None:
    """Show log lines and progress bars on stderr (the command line calls this; a library need not).

    Bars appear on terminals only: in a log file they are noise. ``quiet`` leaves warnings alone.
    Under ``accelerate launch`` only the first process speaks.
    """
    global _show_progress
    first_process = os.environ.get("RANK", "0") == "0"
    _show_progress = not quiet and first_process and sys.stderr.isatty()
    logger.handlers.clear()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
    level = logging.WARNING if quiet else logging.INFO
    logger.setLevel(level if first_process else logging.ERROR)
    _quiet_dependencies()


def _quiet_dependencies() -> None:
    """Keep transformers' and datasets' own bars and advice off the user's screen."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if _show_progress else "1")
    os.environ.setdefault("TQDM_DISABLE", "0" if _show_progress else "1")
    # peft 0.21 asks transformers for an attribute that was renamed in 5.18; it works all the same
    # (https://github.com/huggingface/peft/issues) until peft asks by the new name.
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")
    # one dependency's use of another; nothing a user can act on
    for package in ("accelerate", "datasets", "peft", "torch", "transformers"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=rf"{package}\.")
    # advice about kernels for 4-bit weights, given on some CPUs to whoever has bitsandbytes, used or not
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # torch's lazy NVML probe on machines without a GPU; nothing a user can act on.
    warnings.filterwarnings("ignore", message="Can't initialize NVML")


class Progress:
    """A handle to one bar; does nothing when bars are off."""

    def __init__(self, bar: object = None, task: object = None) -> None:
        self._bar, self._task = bar, task

    def advance(self, steps: float = 1) -> None:
        """Move the bar on by ``steps`` of its total."""
        if self._bar is not None:
            self._bar.advance(self._task, steps)  # type: ignore[attr-defined]

    def describe(self, text: str) -> None:
        """Replace the text before the bar."""
        if self._bar is not None:
            self._bar.update(self._task, description=text)  # type: ignore[attr-defined]


def is_shown() -> bool:
    """Whether progress is shown: on a terminal that the user has not asked to be quiet."""
    return _show_progress


@contextmanager
def muted() -> Iterator[None]:
    """Neither bars nor log lines but warnings: of work whose progress is shown as a whole."""
    global _show_progress
    before = _show_progress, logger.level
    _show_progress = False
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        _show_progress = before[0]
        logger.setLevel(before[1])


@contextmanager
def progress(description: str, total: int | None) -> Iterator[Progress]:
    """A progress bar around a loop of ``total`` steps (``None``: of unknown length)."""
    if not _show_progress:
        yield Progress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        yield Progress(bars, bars.add_task(description, total=total))
