"""The list of what ia2 has written into a run's folder, with digests.

One file at the root of a run, ``ia2_manifest.jsonl``, has a line for every file that was written there. It
tells our files from others', which are never removed or replaced, and it shows damage when a file is read
back. A line is added just before its file gets its name: a killed write leaves a line too many, never a file
without one. A file may therefore have any of the digests that were ever recorded for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from ia2.utils.errors import RunFolderError

MANIFEST = "ia2_manifest.jsonl"
RUN_FILE = "ia2_run.json"

# Part of the name of everything that is not finished yet; left behind by kills alone.
TEMPORARY = ".ia2-tmp-"

# The way out of damage, where a caller knows no better one.
MEND = "Delete it and run the same command again."

Digests = dict[str, set[str]]

# Each manifest as it was when this process last read or wrote it, and the digests by path in it.
_read: dict[Path, tuple[tuple[int, ...], Digests]] = {}


def begin(folder: Path) -> None:
    """Make ``folder`` the root of a run, if it is none yet."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / MANIFEST).open("ab"):
        pass


def root_of(path: Path) -> Path | None:
    """The nearest folder above ``path`` that has a manifest; that of a run around another run is not its."""
    for folder in path.absolute().parents:
        if (folder / MANIFEST).is_file():
            return folder
        if (folder / RUN_FILE).is_file():
            return None
    return None


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def record(root: Path, digests: Mapping[str, str]) -> None:
    """Add lines to a manifest.

    Args:
        root: the run's folder.
        digests: SHA-256 by path below ``root``.
    """
    known, before = recorded(root), _stamp(root)
    lines = "".join(_line(path, digest) for path, digest in digests.items()).encode()
    with (root / MANIFEST).open("ab+") as file:
        # the last line of a killed process may lack its end
        if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            lines = b"\n" + lines
        file.write(lines)
    after = _stamp(root)
    # else another process has written too, and all of it is read when it is asked for
    if before and after and after[:2] == (before[0], before[1] + len(lines)):
        for path, digest in digests.items():
            known.setdefault(path, set()).add(digest)
        _read[root] = (after, known)


def record_tree(folder: Path, target: Path) -> None:
    """Record every file in ``folder`` under the name that it will have in ``target``."""
    if (root := root_of(target / "any")) is not None:
        files = {relative(target / file.relative_to(folder), root): sha256(file) for file in _files(folder)}
        record(root, files)


def recorded(root: Path) -> Digests:
    """Digests by path below ``root``; a manifest is read again only if another process has changed it.

    Unreadable lines are passed over: a file that they spoke of is then unknown, and refused when it is read.
    So are paths that lead out of the folder: a manifest is data, and may be a stranger's.
    """
    if (stamp := _stamp(root)) is None:
        return {}
    known = _read.get(root)
    if known is None or known[0] != stamp:
        known = _read[root] = (stamp, _parsed((root / MANIFEST).read_bytes()))
    return known[1]


def _parsed(data: bytes) -> Digests:
    digests: Digests = {}
    for line in data[: data.rfind(b"\n") + 1].splitlines():
        try:
            entry = json.loads(line)
            path, sha = str(entry["path"]), str(entry["sha256"])
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        parts = path.split("/")
        if not {"", ".", ".."} & {*parts} and "\0" not in path and not Path(path).drive:
            digests.setdefault(path, set()).add(sha)
    return digests


def _stamp(root: Path) -> tuple[int, ...] | None:
    """What changes with a manifest: its inode, size and times; None where there is none."""
    try:
        stat = (root / MANIFEST).stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def is_ours(path: Path) -> bool:
    """Whether a run's manifest lists this file."""
    root = root_of(path)
    return root is not None and relative(path, root) in recorded(root)


def check(path: Path, data: bytes | None = None, mend: str = MEND) -> None:
    """Compare a file with what was written; outside of runs there is nothing to compare with.

    Args:
        path: the file.
        data: what was read from it, if it was.
        mend: the way out, as a sentence.

    Raises:
        RunFolderError: the file is damaged or gone, or the manifest does not know it.
    """
    root = root_of(path)
    if root is None or TEMPORARY in str(path):
        return
    digests = recorded(root).get(relative(path, root))
    if not path.is_file():
        raise RunFolderError(f"{path} is missing. {mend}")
    if digests is None:
        raise RunFolderError(f"{path}: {root / MANIFEST} does not list it, so it may be damaged. {mend}")
    if (sha256(path) if data is None else hashlib.sha256(data).hexdigest()) not in digests:
        raise RunFolderError(f"{path}: damaged since it was written (another SHA-256). {mend}")


def check_tree(folder: Path, mend: str | None = None) -> None:
    """:func:`check` every file that was written into ``folder``.

    Raises:
        RunFolderError: see there.
    """
    mend = mend or f"Delete {folder} and run the same command again."
    if (root := root_of(folder / "any")) is None:
        return
    below = relative(folder, root) + "/"
    for path in [path for path in recorded(root) if path.startswith(below)]:
        check(root / path, mend=mend)


def refuse_others(path: Path) -> None:
    """A file that ia2 has not written is not replaced by one of a run.

    Raises:
        RunFolderError: there is such a file.
    """
    root = root_of(path)
    if root is not None and os.path.lexists(path) and not path.is_dir() and not is_ours(path):
        raise RunFolderError(
            f"{path}: a file that ia2 did not write is in the way. Move it and run the same command again."
        )


def remove(folder: Path) -> list[Path]:
    """Remove what the manifest lists at or below ``folder``, and folders that are empty then.

    Returns:
        What is left, because ia2 did not write it.
    """
    root = root_of(folder / "any")
    if root is not None:
        whole = root == folder.absolute()
        below = "" if whole else relative(folder, root) + "/"
        for path in [root / path for path in recorded(root) if path.startswith(below)]:
            # behind a link to a folder lies what is not the run's
            if path.parent.resolve().is_relative_to(root.resolve()) and not path.is_dir():
                path.unlink(missing_ok=True)
        if whole:
            (root / MANIFEST).unlink(missing_ok=True)
        clean(folder)
        _prune(folder)
    return sorted(_files(folder)) if folder.is_dir() else []


def clean(folder: Path) -> None:
    """Remove what killed writes have left below ``folder``; nobody else may be at work there."""
    for path in sorted(folder.rglob(f".*{TEMPORARY}*")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def compact(root: Path) -> None:
    """Rewrite a finished run's manifest, sorted, with the files that are there."""
    lines = []
    for path, digests in sorted(recorded(root).items()):
        if (root / path).is_file():
            # only a file that was written several times is read to see which of its digests it has
            kept = digests if len(digests) == 1 else digests & {sha256(root / path)}
            lines += [_line(path, digest) for digest in kept]
    text = "".join(lines)
    if (root / MANIFEST).read_text(encoding="utf-8", errors="replace") != text:
        temporary = root / f".{MANIFEST}{TEMPORARY}compact"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(root / MANIFEST)


def _line(path: str, digest: str) -> str:
    return json.dumps({"path": path, "sha256": digest}, ensure_ascii=False) + "\n"


def relative(path: Path, root: Path) -> str:
    """A path below ``root``, as manifests write it."""
    return path.absolute().relative_to(root).as_posix()


def _files(folder: Path) -> Iterable[Path]:
    return (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def _prune(folder: Path) -> None:
    """Remove empty folders at and below ``folder``."""
    inner = sorted((p for p in folder.rglob("*") if p.is_dir() and not p.is_symlink()), reverse=True)
    for each in [*inner, folder]:
        if each.is_dir() and not any(each.iterdir()):
            each.rmdir()
