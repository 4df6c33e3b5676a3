"""Where a command meets its surroundings: its streams, and errors that nobody has put into words."""

from __future__ import annotations

import codecs
import io
import json
import os
import sys
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from ia2.utils.errors import ConfigError
from ia2.utils.machine_errors import memory_exhausted, no_space_left, system_trouble

DEBUG = "IA2_DEBUG"
"""Environment variable: set, errors that are no user's mistake are raised with their traceback."""

_LONGEST_WORDS = 200  # characters of an error's own words


def open_streams() -> None:
    """Streams that any text can be written to, before the work whose results they are to take.

    What an encoding lacks is written as JSON's ``\\u00e9``, so that JSON stays JSON.

    Raises:
        ConfigError: standard output is closed, or cannot be written.
    """
    if sys.stdin is None:
        sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115 - as long as the process
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    way_out = "Redirect it to a file, or to /dev/null."
    if sys.stdout is None:
        raise ConfigError(f"standard output is closed. {way_out}")
    codecs.register_error("ia2.escaped", _escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="ia2.escaped")
    try:
        # of a device or a descriptor that takes nothing even this fails
        os.write(sys.stdout.fileno(), b"")
    except (io.UnsupportedOperation, AttributeError):
        pass  # in memory
    except OSError as error:
        give_up(sys.stdout)
        raise ConfigError(f"standard output cannot be written ({error.strerror}). {way_out}") from None


def _escaped(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def say(line: str) -> None:
    """On stderr, if anything can be said there, after what is on its way to stdout."""
    try:
        sys.stdout.flush()
    except (AttributeError, OSError, ValueError):
        give_up(sys.stdout)
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        give_up(sys.stderr)


def give_up(stream: TextIO | None) -> None:
    """What a stream still holds can never be written; the interpreter must not try again as it ends."""
    with suppress(AttributeError, OSError, ValueError):  # none, in memory, or closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[union-attr]


def in_words(error: Exception) -> str | None:
    """One line on an error that the machine is to blame for, with the way out; None for mistakes of ours."""
    place = getattr(error, "filename", None) or "standard output, or a file"
    if no_space_left(error):
        return f"{place}: no space left on the device. Free some and run the same command again."
    if memory_exhausted(error):
        return (
            f"out of memory ({_first_line(error)}). End other programs, or use fewer or shorter rows, "
            "smaller batches or a smaller model."
        )
    if isinstance(error, OSError):
        return system_trouble(error, None if error.errno is None else place)
    if isinstance(error, UnicodeError):
        return f"a text is not Unicode ({_first_line(error)}). Write the files that are given as UTF-8."
    return None


def bug(error: Exception) -> str:
    """One line on a mistake of ours: what it is, and where the traceback was written."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "ia2" in Path(frame.filename).parts]
    place = f" at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
    try:
        handle, name = tempfile.mkstemp(prefix="ia2-traceback-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write("".join(traceback.format_exception(error)))
    except OSError:
        name = f"what {DEBUG}=1 shows"
    said = f"{type(error).__name__}: {_first_line(error)}".rstrip(": ")
    return f"{said}{place}. The mistake is ia2's: please report it, with `ia2 env` and {name}."


def _first_line(error: BaseException) -> str:
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= _LONGEST_WORDS else line[:_LONGEST_WORDS] + "…"
