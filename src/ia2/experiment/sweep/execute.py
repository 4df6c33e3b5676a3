"""``sweep``: every cell of a grid that is not finished yet, wherever there is room for it."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ia2.data.benchmarks import BenchmarkData
from ia2.experiment.run_folder import machine, versions
from ia2.experiment.sweep.grid import Cell, GridConfig, Unit, evaluated_on, expand
from ia2.experiment.sweep.job import Failed, Finished, Started, forget_rows, load_rows
from ia2.experiment.sweep.pace import WorkLeft, first_of_kinds
from ia2.experiment.sweep.progress import Board
from ia2.experiment.sweep.records import seconds_by_kind
from ia2.experiment.sweep.store import SUMMARY, SweepFolder, alone
from ia2.experiment.sweep.workers import Lost, Queue, Run, in_process
from ia2.models.load import content_of
from ia2.utils.files import digest, read_json
from ia2.utils.logging import logger
from ia2.utils.wording import counted

RETRIES = 2
"""How often a cell whose worker died is given to another one."""


@dataclass
class Sweep:
    """What :func:`sweep` did.

    Attributes:
        folder: where the results lie.
        done: cells that are finished now.
        trained: cells that this call ran.
        failed: records of the cells that could not be done.
        total: cells of the grid.
        left: what is not finished, of the cells that this call was about.
    """

    folder: Path
    done: int
    trained: int
    failed: list[dict[str, Any]] = field(default_factory=list)
    total: int = 0
    left: WorkLeft = field(default_factory=WorkLeft)


def read_benchmarks(grid: GridConfig) -> dict[tuple[str, str | None], BenchmarkData]:
    """All rows that a grid needs, by benchmark and verbaliser.

    Raises:
        DataError: a benchmark that cannot be had.
    """
    forget_rows()  # their files may have changed since an earlier sweep of this process
    return {(b.name, v): load_rows(b, v, grid.data_dir, None) for b, v in evaluated_on(grid)}


def cells_of(grid: GridConfig, rows: dict[tuple[str, str | None], BenchmarkData]) -> list[Unit]:
    """A grid's units, with keys that name the rows and models by their content."""
    fingerprints = {key: digest([data.pool.fingerprint, data.test.fingerprint]) for key, data in rows.items()}
    names = {name for part in grid.resolved() for name in part.models or ()}
    return expand(grid, fingerprints, {name: _content(grid, name) for name in sorted(names)})


def _content(grid: GridConfig, name: str) -> dict[str, Any]:
    return content_of(name, revision=grid.revision, code=grid.trust_remote_code)


def first_cells(units: Sequence[Unit], limit: int | None) -> list[Unit]:
    """The units with the grid's first so many cells."""
    if limit is None:
        return list(units)
    kept = {cell.key for cell in [cell for unit in units for cell in unit.cells][:limit]}
    return [part for unit in units if (part := unit.only(kept)).cells]


def sweep(
    grid: GridConfig,
    output_dir: str | Path,
    *,
    text: str = "",
    limit: int | None = None,
    one_of_each: bool = False,
    run: Callable[[Path], Run] | None = None,
) -> Sweep:
    """Run a grid; what is finished is never run again, what was begun goes on.

    Args:
        grid: the grid.
        output_dir: its folder.
        text: the grid as it was given, kept beside the results.
        limit: the grid's first so many cells only.
        one_of_each: run one cell of each kind (model, recipe, number of examples), and none of a kind that
            has finished ones: enough to know what the others will take.
        run: makes the way units are run from the folder for working files; in this process by default.

    Raises:
        UserError: a mistake in the grid, rows that cannot be had, a folder that holds something else.
    """
    every = cells_of(grid, read_benchmarks(grid))
    with alone(Path(output_dir)):
        store = SweepFolder(Path(output_dir))
        return _sweep(grid, every, store, text, limit, one_of_each, run or in_process)


def _sweep(
    grid: GridConfig,
    every: Sequence[Unit],
    store: SweepFolder,
    text: str,
    limit: int | None,
    one_of_each: bool,
    run: Callable[[Path], Run],
) -> Sweep:
    units = first_cells(every, limit)
    about = [cell for unit in units for cell in unit.cells]
    finished = sum(cell.key in store.records for cell in about)
    size = f"{counted(len(about), 'cell')} in {counted(len(units), 'unit')}"
    now = ""
    if one_of_each:
        chosen = first_of_kinds(about, store.records)
        units = [part for unit in units if (part := unit.only(chosen)).cells]
        now = f", {len(chosen)} of them now, one of each kind"
    cells = [cell for unit in units for cell in unit.cells]
    waiting = [part for unit in units if (part := _unfinished(unit, store)).cells]
    todo = sum(len(unit.cells) for unit in waiting)
    logger.info(
        "%s: %s; %d finished before, %d to do%s.", grid.name, size, finished, len(about) - finished, now
    )
    before = _seconds(store)
    began = time.perf_counter()
    if text:
        store.begin(text)
    with Board(cells, store.records) as board:
        try:
            _work(waiting, store, board, run(store.work))
        finally:
            spent = time.perf_counter() - began if todo else 0.0
            # a limit says what is run, not what the grid is: other cells keep their place
            cells = [cell for unit in every for cell in unit.cells]
            store.finish(cells, _summary(grid, cells, store, before + spent))
    done = sum(cell.key in store.records for cell in cells)
    failed = [store.failures[cell.key] for cell in cells if cell.key in store.failures]
    left = WorkLeft.of(about, store.records)
    return Sweep(store.path, done, todo - len(failed), failed, len(cells), left)


def _unfinished(unit: Unit, store: SweepFolder) -> Unit:
    return unit.only({cell.key for cell in unit.cells} - set(store.records))


def _work(waiting: Iterable[Unit], store: SweepFolder, board: Board, run: Run) -> None:
    queue = deque(waiting)
    cells = {cell.key: cell for unit in queue for cell in unit.cells}
    losses: Counter[str] = Counter()
    # closed at once if this ends by an error, not when its traceback is let go
    with closing(run(queue)) as events:
        for event in events:
            if isinstance(event, Lost):
                _lost(event, queue, losses, store, board)
            elif isinstance(event, Started):
                board.started(cells[event.key])
            elif isinstance(event, Finished):
                store.add(event.record)
                board.finished(cells[event.key], event.record)
            elif isinstance(event, Failed):
                store.fail(cells[event.key], event.error, event.traceback)
                board.failed(cells[event.key], event.error)


def _lost(event: Lost, queue: Queue, losses: Counter[str], store: SweepFolder, board: Board) -> None:
    """Put what a dead worker left back into the queue, but a cell that workers keep dying in."""
    left = _unfinished(event.unit, store)
    left = left.only({cell.key for cell in left.cells} - set(store.failures))
    if not left.cells:
        return
    # the cell that it died in may be to blame; the others are not
    dying = left.cells[0]
    losses[dying.key] += 1
    if losses[dying.key] > RETRIES:
        store.fail(dying, f"its worker {event.reason}, {RETRIES + 1} times", "")
        board.failed(dying, store.failures[dying.key]["error"])
        left = left.only({cell.key for cell in left.cells[1:]})
    else:
        board.lost(left, event.reason)
    if left.cells:
        queue.append(left)


def _seconds(store: SweepFolder) -> float:
    """Wall-clock seconds that earlier starts took."""
    file = store.path / SUMMARY
    return float(read_json(file)["seconds"]) if file.is_file() else 0.0


def _summary(grid: GridConfig, cells: Sequence[Cell], store: SweepFolder, seconds: float) -> dict[str, Any]:
    done = [cell.key for cell in cells if cell.key in store.records]
    work = seconds_by_kind(store.records[key]["cost"]["seconds"] for key in done)
    return {
        "name": grid.name,
        "description": grid.description,
        "select": grid.select,
        "cells": {
            "done": len(done),
            "failed": sum(cell.key in store.failures for cell in cells),
            "total": len(cells),
        },
        "seconds": round(seconds, 1),
        "work_seconds": round(sum(work.values()), 1),
        "work_by_kind": {kind: round(took, 1) for kind, took in work.items()},
        "machine": machine(),
        "versions": versions(),
    }
