"""A sweep's folder: finished cells, failed ones, and what the grid was.

Every finished cell is a file of its own at first, written whole, so that a killed sweep loses none; at the
end they are one JSON Lines file in the grid's order, which is small enough to be kept in a repository.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ia2.experiment.sweep.grid import Cell
from ia2.utils.errors import RunFolderError
from ia2.utils.files import digest, finite, json_lines, parsed_lines, read_json, write_json, write_text
from ia2.utils.locks import only_one
from ia2.utils.logging import logger
from ia2.utils.manifest import MANIFEST, RUN_FILE, begin, check, clean, compact, is_ours

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
        self.records = {record["key"]: record for record in read_records(path)}
        self.failures: dict[str, dict[str, Any]] = {}

    @property
    def _loose(self) -> Path:
        return self.path / "cells"

    @property
    def work(self) -> Path:
        """Folder for working files."""
        return self.path / "work"

    def begin(self, grid: str) -> None:
        """Note the grid as it was given, which may be the very note of an earlier start."""
        file = self.path / GRID
        if not file.is_file() or file.read_bytes() != grid.encode():  # damaged, it may be no text
            write_text(file, grid)

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
        elif is_ours(self.path / FAILED):
            (self.path / FAILED).unlink(missing_ok=True)
        write_json(self.path / SUMMARY, summary)
        for file in loose_cells(self.path):
            file.unlink()
        for folder in (self._loose, self.work):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _check(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"{path} is a file. Choose another --output-dir.")
    holds = sorted(p.name for p in path.iterdir() if not p.name.startswith(".")) if path.is_dir() else []
    if MANIFEST not in holds and {SUMMARY, CELLS} & {*holds}:
        raise RunFolderError(
            f"{path}: a sweep without {MANIFEST}, so its cells cannot be checked: it is from an earlier "
            "release, or that file was lost. `ia2 report` reads it; to go on, choose another --output-dir."
        )
    if RUN_FILE in holds or (holds and MANIFEST not in holds):
        raise RunFolderError(
            f"{path} is not empty and holds no sweep ({holds[0]} …). Choose another --output-dir."
        )


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep other sweeps out of a folder meanwhile: two would overwrite each other's cells.

    Raises:
        RunFolderError: another one is at work there, or the folder holds something else.
    """
    _check(path)
    with only_one(path, "ia2 sweep"):
        _check(path)
        begin(path)
        clean(path)
        yield
        compact(path)


def loose_cells(path: Path) -> list[Path]:
    """Finished cells that are still files of their own; others' files are left alone."""
    files = sorted((path / "cells").glob("*.json"))
    return [file for file in files if is_ours(file)] if (path / MANIFEST).is_file() else files


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of all finished cells in a sweep's folder.

    Raises:
        RunFolderError: a damaged file; the message names the line.
    """
    records = [record for name in (OTHERS, CELLS) for _, record in read_lines(path / name)]
    return records + [read_json(file) for file in loose_cells(path)]


def read_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Records of a JSON Lines file, each with its place (file and line); none if it is not there.

    Every record carries a digest, so that one damaged record does not cost the others.

    Raises:
        RunFolderError: a damaged line.
    """
    if not path.is_file():
        return []
    mend = "Remove the line and run the sweep again: the cell is run anew."
    data = path.read_bytes()
    records = []
    for number, record in parsed_lines(path, data, mend):
        if not isinstance(record, dict) or "key" not in record:
            raise RunFolderError(f"{path}:{number}: damaged (no record of a cell). {mend}")
        if record.pop("sha256", None) not in (None, digest(record)):
            raise RunFolderError(f"{path}:{number}: damaged since it was written (another SHA-256). {mend}")
        records.append((f"{path}:{number}", record))
    try:
        check(path, data)
    except RunFolderError:
        logger.warning("%s was changed since it was written: %d records are left.", path, len(records))
    return records


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    write_text(path, json_lines({**record, "sha256": digest(record)} for record in map(finite, records)))
