"""What the user sees while something runs: log lines and progress bars, both on stderr.

Library code logs through ``logging.getLogger("ia2")`` and wraps long loops in :func:`progress`; the
command line decides with :func:`configure` whether either is shown. Results go to stdout, so that
``ia2 … --json | jq`` works whatever is shown here.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

logger = logging.getLogger("ia2")

_show_progress = False

# What steers a terminal or hides how a text reads: control characters but line break and tab, marks that
# turn the direction of writing, other line breaks, and halves of characters.
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff]"
)


def printable(text: str) -> str:
    """A text as a terminal may have it: without control characters and marks that turn its direction.

    Rows, labels, names and what errors say of them come from files of anybody.
    """
    return _STEERING.sub("", text)


def escaped(document: str) -> str:
    """A JSON document with the same value, in which :func:`printable` finds nothing to take out."""
    return _STEERING.sub(lambda sign: json.dumps(sign[0])[1:-1], document)


class _Printable:
    """A stream whose texts are :func:`printable`; all else is the stream's own."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(printable(text))  # what it returns is no number in every environment
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class _PrintableLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def terminal(*, stderr: bool = False, width: int | None = None) -> Console:
    """Where tables and bars are drawn: texts in them are printed as they are, never read as markup."""
    from rich.console import Console
    from rich.text import Text

    class Terminal(Console):
        def render_str(self, text: str, **settings: Any) -> Text:
            return super().render_str(printable(text), **settings)

    stream = sys.stderr if stderr else sys.stdout
    # it steers the terminal itself
    file: Any = stream.stream if isinstance(stream, _Printable) else stream
    return Terminal(file=file, width=width, markup=False, emoji=False, highlight=False)


def configure(*, quiet: bool = False) -> None:
    """Show log lines and progress bars on stderr (the command line calls this; a library need not).

    What is printed on stdout loses what would steer a terminal (:func:`printable`).

    Bars appear on terminals only: in a log file they are noise. ``quiet`` leaves warnings alone.
    Under ``accelerate launch`` only the first process speaks.
    """
    global _show_progress
    first_process = os.environ.get("RANK", "0") == "0"
    _show_progress = not quiet and first_process and sys.stderr.isatty()
    if not isinstance(sys.stdout, _Printable):
        sys.stdout = _Printable(sys.stdout)  # type: ignore[assignment]
    logger.handlers.clear()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PrintableLines("%(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
    level = logging.WARNING if quiet else logging.INFO
    logger.setLevel(level if first_process else logging.ERROR)
    warn_once.cache_clear()
    _quiet_dependencies()


@lru_cache(maxsize=256)
def warn_once(message: str) -> None:
    """Log a warning that a command of several parts would give for each of them."""
    logger.warning("%s", message)


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
            self._bar.update(self._task, description=printable(text))  # type: ignore[attr-defined]


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
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=terminal(stderr=True), transient=True) as bars:
        yield Progress(bars, bars.add_task(printable(description), total=total))
