"""Files that are either whole or not there: everything is written beside its name, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ia2.utils import manifest
from ia2.utils.errors import ConfigError, RunFolderError
from ia2.utils.machine_errors import no_space_left, system_trouble
from ia2.utils.user_files import user_path


def cache_dir() -> Path:
    """The user's cache folder for converted models (``IA2_CACHE_DIR``, else the XDG one)."""
    if given := os.environ.get("IA2_CACHE_DIR"):
        return Path(os.path.expanduser(given))  # noqa: PTH111 - it leaves "~nobody" as it is
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(os.path.expanduser(base or "~/.cache")) / "ia2"  # noqa: PTH111


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
def writing(path: Path) -> Iterator[None]:
    """What the system refuses while ``path`` is written is a user's error.

    Raises:
        RunFolderError: nothing can be written there.
    """
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
        if error.errno in (errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.EMFILE):
            raise RunFolderError(system_trouble(error, path)) from error
        raise


# Bytes of a file's name: 255 are allowed, and what it is called while it is written has some more.
_LONGEST_NAME = 230


def check_writable(path: Path, *, folder: bool = False) -> None:
    """Refuse a file or folder that cannot be written, before anything is computed for it; leave no trace.

    Args:
        path: the file, or the folder; neither need exist.
        folder: whether it is to be a folder.

    Raises:
        RunFolderError: something else has that name, the name is too long, or nothing can be written there.
    """
    try:
        made = [] if folder else [path.name]
        above = path if folder else path.parent
        while not above.exists():
            if above.is_symlink():
                raise OSError(errno.ENOENT, f"{above} is a link that leads nowhere")
            made.append(above.name)
            above = above.parent
        if (longest := max((len(os.fsencode(name)) for name in made), default=0)) > _LONGEST_NAME:
            raise OSError(errno.ENAMETOOLONG, f"a name of {longest} bytes is too long")
        if not above.is_dir():
            raise OSError(errno.ENOTDIR, f"{above} is a file")
        if not folder and path.is_dir():
            raise OSError(errno.EISDIR, "it is a folder")
        if not folder and path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "it is no regular file")  # a device would be replaced by a file
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        kind = "folder" if folder else "file"
        raise RunFolderError(
            f"{path}: cannot be written ({error.strerror}). Choose another {kind}."
        ) from error


@contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` when the block ends well, and is gone otherwise.

    Raises:
        RunFolderError: nothing can be written there, or ``path`` holds files that are not ours.
    """
    with writing(path), _scratch(path) as temporary:
        yield temporary
        manifest.record_tree(temporary, path)
        if path.exists() and manifest.root_of(path) is None:
            shutil.rmtree(path)
        elif others := manifest.remove(path):
            raise RunFolderError(f"{others[0]}: in the way, and not written by ia2. Move it elsewhere.")
        temporary.rename(path)


@contextmanager
def atomic_files(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files go into ``folder``, each whole, when the block ends well.

    Raises:
        RunFolderError: nothing can be written there, or a file that is not ours is in the way.
    """
    with writing(folder), _scratch(folder / "files") as temporary:
        yield temporary
        names = [path.relative_to(temporary) for path in sorted(temporary.rglob("*")) if path.is_file()]
        for name in names:
            manifest.refuse_others(folder / name)
        manifest.record_tree(temporary, folder)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).replace(folder / name)


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """An empty folder beside ``path`` for the time of the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name[:32]}{manifest.TEMPORARY}", dir=path.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(path: Path, data: bytes | Iterable[bytes], *, listed: bool = True) -> None:
    """Write ``data`` to ``path``, whole or not at all.

    Args:
        path: the file.
        data: what it is to hold, also in parts that are made one after the other.
        listed: in a run's folder, add it to the manifest. Not what the user asked to be put there.

    Raises:
        RunFolderError: nothing can be written there, or a file that is not ours is in the way.
    """
    with writing(path):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise RunFolderError(f"{path}: no regular file. Choose another name.")  # a device, say
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:32]}{manifest.TEMPORARY}", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                sha = hashlib.sha256()
                for part in [data] if isinstance(data, bytes) else data:
                    file.write(part)
                    sha.update(part)
            Path(name).chmod(0o644)
            root = manifest.root_of(path) if listed else None
            # what is written into a temporary folder is listed when that folder gets its name
            if root is not None and manifest.TEMPORARY not in str(path):
                manifest.refuse_others(path)
                manifest.record(root, {manifest.relative(path, root): sha.hexdigest()})
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str, *, listed: bool = True) -> None:
    """:func:`write_bytes` of a text."""
    write_bytes(path, text.encode("utf-8"), listed=listed)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON (:func:`json_text`), whole or not at all."""
    write_text(path, json_text(value, indent=2) + "\n")


def _checked(path: Path, mend: str) -> bytes:
    """What a file of a run holds, if that is what was written."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be read ({error.strerror}). {mend}") from error
    manifest.check(path, data, mend)
    return data


def read_json(path: Path, mend: str = manifest.MEND) -> Any:
    """Read a JSON file of a run.

    Args:
        path: the file.
        mend: the way out if it is damaged, as a sentence.

    Raises:
        RunFolderError: it is damaged, or cannot be read.
    """
    try:
        return json.loads(_checked(path, mend))
    except (ValueError, RecursionError) as error:
        raise RunFolderError(f"{path}: damaged ({error}). {mend}") from error


def read_lines(path: Path) -> list[Any]:
    """Read a JSON Lines file of a run.

    Raises:
        RunFolderError: it is damaged, or cannot be read; the message names the line.
    """
    return [value for _, value in parsed_lines(path, _checked(path, manifest.MEND), manifest.MEND)]


def parsed_lines(path: Path, data: bytes, mend: str) -> Iterator[tuple[int, Any]]:
    """Number and value of each line of a JSON Lines file that is not empty.

    Raises:
        RunFolderError: a line is not JSON.
    """
    # only line ends divide records; str.splitlines would cut at U+2028 inside a text
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise RunFolderError(f"{path}:{number}: damaged ({error}). {mend}") from error


@contextmanager
def understood(path: Path) -> Iterator[None]:
    """Files that are not of the expected form are a user's error: another release's, or damaged.

    Raises:
        RunFolderError: a value is missing or of another type.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as error:
        raise RunFolderError(
            f"{path}: its files are damaged or of another version of ia2 ({type(error).__name__}: {error}). "
            "Run the command that made them again, into another folder."
        ) from error


@contextmanager
def unchecked(folders: Sequence[Path]) -> Iterator[None]:
    """What a run without a manifest holds may be anything, so an error that it leads to is no bug.

    Raises:
        RunFolderError: see :func:`understood`.
    """
    with ExitStack() as stack:
        for folder in folders:
            if manifest.root_of(folder / "any") is None:
                stack.enter_context(understood(folder))
        yield


def output_file(path: Path, *inputs: str | Path | None) -> None:
    """Refuse to write a result where something is that must stay.

    Args:
        path: the file that the user wants to be written.
        inputs: what is read meanwhile: files, folders, or names that are neither.

    Raises:
        ConfigError: it is one of the inputs, or a file of a run.
    """
    for source in [user_path(given) for given in inputs if given is not None]:
        # a run's folder says itself which files are its own
        holds = source.is_dir() and not (source / manifest.MANIFEST).is_file()
        within = holds and source.resolve() in path.resolve().parents
        if path.exists() and source.exists() and (within or path.samefile(source)):
            raise ConfigError(f"{path}: it is read, so it cannot be the output too. Choose another file.")
    if manifest.is_ours(path):
        raise ConfigError(f"{path}: belongs to the run in its folder. Choose another file.")


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


def json_text(value: Any, **options: Any) -> str:
    """``value`` as JSON that every reader takes: NaN and infinities are null."""
    return json.dumps(finite(value), **{"ensure_ascii": False, "default": _plain, **options})


def json_lines(values: Iterable[Any]) -> str:
    """JSON Lines of :func:`json_text`."""
    return "".join(json_text(value) + "\n" for value in values)


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
