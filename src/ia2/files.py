"""Files that are either whole or not there: everything is written beside its name, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ia2.errors import RunFolderError

# What safetensors and torch.save say of a full disk: they raise no OSError.
_FULL_DISK = (
    "No space left on device",
    "os error 28",
    "iostream error",
    "unexpected pos",
    "PytorchStreamWriter failed writing",
)


def cache_dir() -> Path:
    """The user's cache folder for converted models (``IA2_CACHE_DIR``, else the XDG one)."""
    if given := os.environ.get("IA2_CACHE_DIR"):
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "ia2"


def no_space_left(error: BaseException) -> bool:
    """Whether a full disk is what went wrong."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(text in str(error) for text in _FULL_DISK)


@contextmanager
def space_needed(path: Path) -> Iterator[None]:
    """A full disk while something is written to ``path`` is a user's error.

    Raises:
        RunFolderError: the disk is full.
    """
    try:
        yield
    except Exception as error:
        if not no_space_left(error):
            raise
        raise RunFolderError(
            f"{path}: no space left on the device. Free some and run the same command again."
        ) from error


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        with space_needed(path):
            yield
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise RunFolderError(
                f"{path}: not writable ({error.strerror}). Choose another folder."
            ) from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise RunFolderError(f"{path}: a file of that name is in the way.") from error
        raise


@contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` when the block ends well, and is gone otherwise.

    Raises:
        RunFolderError: nothing can be written there.
    """
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield temporary
            temporary.chmod(0o755)
            if path.exists():
                shutil.rmtree(path)
            temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all."""
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=_plain) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file written by :func:`write_json`.

    Raises:
        RunFolderError: it has been damaged since.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunFolderError(f"{path}: damaged ({error}). Remove it, or choose another folder.") from error


def finite(value: Any) -> Any:
    """``value`` with None for NaN and infinities, which JSON lacks: for results that others read."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return value


def digest(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of ``value`` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """NumPy scalars and arrays, paths and tuples, as JSON knows them."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot write a {type(value).__name__} as JSON")
