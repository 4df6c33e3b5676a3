"""A sweep's folder: finished cells, failed ones, and what the grid was.

Every finished cell is a file of its own at first, written whole, so that a killed sweep loses none; at the
end they are one JSON Lines file in the grid's order, which is small enough to be kept in a repository.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ia2.console import logger
from ia2.errors import RunFolderError
from ia2.files import finite, read_json, write_json, write_text
from ia2.sweeps.grid import Cell

CELLS, OTHERS, FAILED, SUMMARY, GRID = "cells.jsonl", "other.jsonl", "failed.json", "sweep.json", "grid.yaml"


class SweepFolder:
    """See the module's text.

    Args:
        path: the folder; made when something is written.

    Raises:
        RunFolderError: it holds something else, or a damaged file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _check(path)
        self.records: dict[str, dict[str, Any]] = {}
        for name in (OTHERS, CELLS):
            for record in read_lines(path / name):
                self.records[record["key"]] = record
        for file in sorted(self._loose.glob("*.json")):
            self.records[file.stem] = read_json(file)
        self.failures: dict[str, dict[str, Any]] = {}

    @property
    def _loose(self) -> Path:
        return self.path / "cells"

    @property
    def work(self) -> Path:
        """Folder for working files."""
        return self.path / "work"

    def begin(self, grid: str) -> None:
        """Note the grid as it was given."""
        write_text(self.path / GRID, grid)

    def add(self, record: dict[str, Any]) -> None:
        """Keep a finished cell."""
        write_json(self._loose / f"{record['key']}.json", record)
        self.records[record["key"]] = record

    def fail(self, cell: Cell, error: str, trace: str) -> None:
        """Note a cell that could not be done; it is tried again by the next start."""
        self.failures[cell.key] = {"key": cell.key, "spec": cell.spec, "error": error, "traceback": trace}

    def finish(self, cells: Sequence[Cell], summary: dict[str, Any]) -> None:
        """Gather all that is done, in the grid's order; what the grid no longer names is kept apart."""
        names = {cell.key: cell for cell in cells}
        own = []
        for key, cell in names.items():
            if key in self.records:
                # a grid may have given a variant another name since
                own.append({**self.records[key], "spec": cell.spec})
        others = [record for key, record in sorted(self.records.items()) if key not in names]
        _write_lines(self.path / CELLS, own)
        if others or (self.path / OTHERS).is_file():
            _write_lines(self.path / OTHERS, others)
        failed = [self.failures[key] for key in names if key in self.failures]
        if failed:
            write_json(self.path / FAILED, failed)
        else:
            (self.path / FAILED).unlink(missing_ok=True)
        write_json(self.path / SUMMARY, finite(summary))
        for file in self._loose.glob("*.json"):
            file.unlink()
        for folder in (self._loose, self.work):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _check(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"{path} is a file. Choose another --output-dir.")
    holds = {p.name for p in path.iterdir() if not p.name.startswith(".")} if path.is_dir() else set()
    ours = {CELLS, SUMMARY, GRID, FAILED, "cells", "work"}
    if holds and not holds & ours:
        raise RunFolderError(
            f"{path} is not empty and holds no sweep ({sorted(holds)[0]} …). Choose another --output-dir."
        )


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep other sweeps out of a folder meanwhile: two would overwrite each other's cells.

    Raises:
        RunFolderError: another one is at work there, or the folder holds something else.
    """
    from filelock import FileLock, Timeout

    _check(path)
    file = path / ".lock"
    if not file.is_file():
        write_text(file, "")
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunFolderError(
            f"{path}: another `ia2 sweep` is at work there. Wait for it, or choose another --output-dir."
        ) from None
    except NotImplementedError:
        logger.warning(
            "%s: this file system has no locks. See to it that no other sweep works in this folder.", path
        )
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        lock.release()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON Lines file; none if it is not there.

    Raises:
        RunFolderError: a damaged line.
    """
    if not path.is_file():
        return []
    records = []
    # only line ends divide records; str.splitlines would cut at U+2028 inside a text
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or "key" not in record:
                raise ValueError("no record of a cell")
        except ValueError as error:
            raise RunFolderError(
                f"{path}:{number}: damaged ({error}). Remove the line, and the cell is run again."
            ) from error
        records.append(record)
    return records


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
