"""Files that users name: opened only where they are regular files, and read as what they claim to be."""

from __future__ import annotations

import io
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from ia2.utils.errors import DataError, suggest
from ia2.utils.wording import one_line, quoted

EMPTY_PATH = "an empty text is no path: leave it out, or name a file or folder"

# Settings and texts are read whole; rows are not.
_LARGEST_TEXT = 64 << 20

# Python refuses longer ones, or takes hours for them.
_MOST_DIGITS = 4300

_KINDS = (
    (stat.S_ISDIR, "a folder, not a file: name a file in it"),
    (stat.S_ISFIFO, "a pipe, not a regular file: write what comes out of it to a file, and name that"),
    (stat.S_ISSOCK, "a socket, not a regular file: name a file"),
    (stat.S_ISCHR, "a device, not a regular file: name a file"),
    (stat.S_ISBLK, "a device, not a regular file: name a file"),
)

# How files begin that are often given as text.
_NOT_TEXT = (
    (b"\x1f\x8b", "it is compressed with gzip: unpack it first, with gunzip"),
    (b"\x28\xb5\x2f\xfd", "it is compressed with zstd: unpack it first, with unzstd"),
    (b"\xfd7zXZ", "it is compressed with xz: unpack it first, with unxz"),
    (b"PK\x03\x04", "it is a zip file or a spreadsheet: unpack it, or save it as CSV"),
    (b"\xff\xfe", "it is UTF-16 text: save it as UTF-8"),
    (b"\xfe\xff", "it is UTF-16 text: save it as UTF-8"),
)


def user_path(path: str | Path) -> Path:
    """A path as users write it, with ``~`` for their home.

    Raises:
        DataError: it is empty, or the system takes no such path.
    """
    if not str(path):  # of a shell's variable that is not set; to Path it is the current folder
        raise DataError(f"{EMPTY_PATH}.")
    try:
        path = Path(path).expanduser()
        path.exists()
    except RuntimeError:  # "~nobody": then it is a name like any other
        path = Path(path)
    except (OSError, ValueError) as error:  # too long, a NUL in it, or in a folder that is closed
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{quoted(str(path))}: cannot be opened ({reason})") from error
    return path


def no_such_file(path: Path, hint: str = "") -> str:
    """That there is no such file, and which name comes close."""
    if path.is_symlink():
        return f"{path}: no such file, but a symbolic link that leads to none{hint}"
    if not path.parent.is_dir():
        return f"{path}: no such file (there is no folder {path.parent} either){hint}"
    return f"{path}: no such file{hint}{similar(path)}"


def similar(path: Path) -> str:
    """``. Did you mean 'x'?`` for the closest name in the folder, else an empty string."""
    try:
        near = suggest(path.name, sorted(other.name for other in path.parent.iterdir()))
    except OSError:
        return ""
    return "." + near if near else ""


def open_file(path: Path) -> io.BufferedReader:
    """Open a user's file to read its bytes; every file that a user names is opened here.

    A pipe, a device or a socket would be waited for, or never end.

    Raises:
        DataError: there is no such file, it is no regular file, or it cannot be opened.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = next((text for of_kind, text in _KINDS if of_kind(mode)), "not a regular file")
            raise DataError(f"{path} is {kind}")
        # Should a pipe have taken its name meanwhile, it is not waited for either.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        return io.BufferedReader(io.FileIO(os.open(path, flags)))
    except FileNotFoundError:
        raise DataError(no_such_file(path)) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason})") from error


def check_text(path: Path, head: bytes) -> None:
    """That a file which begins with ``head`` can be text in UTF-8.

    Raises:
        DataError: it is compressed, a spreadsheet, or in another encoding.
    """
    for beginning, reason in _NOT_TEXT:
        if head.startswith(beginning):
            raise DataError(f"{path}: not UTF-8 text; {reason}")
    if head.count(0) > len(head) // 4:
        raise DataError(f"{path}: not UTF-8 text; it is full of NUL bytes: save it as UTF-8, if it is UTF-16")


def read_text(path: str | Path) -> str:
    """The whole text of a user's file, without a byte order mark.

    Raises:
        DataError: what :func:`open_file` raises; it is not text in UTF-8, or longer than 64 MiB.
    """
    path = user_path(path)
    with open_file(path) as file:
        try:
            raw = file.read(_LARGEST_TEXT + 1)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(raw) > _LARGEST_TEXT:
        raise DataError(f"{path}: longer than {_LARGEST_TEXT >> 20} MiB; name a file of text")
    check_text(path, raw[:4096])
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: line {line} is not UTF-8 text; save the file as UTF-8") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path}: line {line} holds a NUL byte, which is no text; remove it")
    return text


def strict_json(text: str) -> Any:
    """A JSON document of which nothing is lost: no key twice, no NaN, no number beyond Python's.

    Raises:
        ValueError: it is none; what is wrong, on one line.
    """
    try:
        return json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_no_constant,
            parse_int=_integer,
            parse_float=_number,
        )
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"invalid JSON at {line}column {error.colno} ({error.msg})") from None
    except RecursionError:
        raise ValueError("invalid JSON (brackets are nested too deep)") from None
    except ValueError as error:
        raise ValueError(f"invalid JSON ({one_line(error)})") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {quoted(twice)} is there twice in one object")
    return made


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON: write null, or a text in quotation marks")


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits: write it as text, in quotation marks")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{quoted(text)} is too large a number: write it as text, in quotation marks")
    return value
