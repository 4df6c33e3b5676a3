"""``--dry-run``: the cells of a grid, and the hours and gigabytes they will take on this machine."""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from ia2.benchmarks import BenchmarkData
from ia2.console import logger, muted
from ia2.errors import UserError
from ia2.manifest import begin
from ia2.models import load_base
from ia2.recipes import is_trained
from ia2.runs import machine
from ia2.sweeps.costs import (
    Cost,
    Shape,
    Speed,
    UnitCosts,
    adapter_of,
    kind_of,
    measure_shape,
    shares_of_steps,
)
from ia2.sweeps.grid import Cell, GridConfig, Unit, evaluated_on
from ia2.sweeps.run import cells_of, first_cells
from ia2.sweeps.store import SweepFolder
from ia2.sweeps.unit import describe, forget_rows, load_rows
from ia2.wording import counted, in_words

# What is said of a benchmark where there is no network.
_UNREACHABLE = "the hub cannot be reached"

# Reasons that are printed, and characters of each; JSON has all.
_REASONS, _LONGEST = 3, 400

# What a model, its rows or the machine can be to blame for (out of memory is a RuntimeError); a fault of
# this package is none of these and must be seen.
_CANNOT = (UserError, RuntimeError, ValueError, OSError, MemoryError)

Rows = dict[tuple[str, "str | None"], BenchmarkData]


@dataclass(frozen=True)
class CellEstimate:
    """One cell: finished, or what it will take.

    Attributes:
        cell: what it is.
        done: finished in the sweep's folder.
        cost: seconds; None of a finished cell, and where they could not be estimated.
    """

    cell: Cell
    done: bool
    cost: Cost | None = None


@dataclass(frozen=True)
class Estimate:
    """What :func:`estimate` found.

    Attributes:
        name: the grid's.
        folder: the sweep's.
        cells: in the grid's order.
        units: what cells are done together.
        workers: processes at once.
        unknown: why cells could not be estimated → how many.
        speeds: of each model.
        shares: stage kind → mean share of its steps before it stopped early, over finished cells.
        stopped: finished cells that these are of; without any, times are upper bounds.
        wall: seconds from start to end with these workers: at most, and likely.
        work_bytes: at most, of the working files of the units that run at once.
        record_bytes: about, of the results of all cells.
        seconds: that the estimate took.
        load: processes that were running when it began, beside it.
        machine: as results name it.
    """

    name: str
    folder: str
    cells: tuple[CellEstimate, ...]
    units: int
    workers: int
    unknown: Mapping[str, int]
    speeds: Mapping[str, Speed]
    shares: Mapping[str, float]
    stopped: int
    wall: tuple[float, float]
    work_bytes: int
    record_bytes: int
    seconds: float
    load: float
    machine: Mapping[str, Any] = field(repr=False)

    @property
    def done(self) -> int:
        """Finished cells."""
        return sum(cell.done for cell in self.cells)

    @property
    def memory_bytes(self) -> int:
        """Of all processes, with the model that takes most."""
        return self.workers * max((speed.memory_bytes for speed in self.speeds.values()), default=0)

    def total(self) -> Cost:
        """Seconds of all cells that could be estimated, one after the other."""
        return _sum(cell.cost for cell in self.cells)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; times are null where nothing could be estimated."""
        known = bool(self.speeds)
        likely = known and self.stopped > 0
        return {
            "name": self.name,
            "folder": self.folder,
            "cells": {
                "total": len(self.cells),
                "done": self.done,
                "estimated": sum(cell.cost is not None for cell in self.cells),
            },
            "units": self.units,
            "workers": self.workers,
            "hours": {
                "at_most": self.wall[0] / 3600 if known else None,
                "likely": self.wall[1] / 3600 if likely else None,
            },
            "seconds": _seconds(self.total() if known else None, likely),
            "gigabytes": {
                "disk_at_most": self.work_bytes / 1e9 if known else None,
                "results": self.record_bytes / 1e9 if known else None,
                "memory": self.memory_bytes / 1e9 if known else None,
            },
            "not_estimated": [{"cells": count, "reason": why} for why, count in self.unknown.items()],
            "steps": {"share": dict(self.shares), "finished_cells": self.stopped},
            "calibration": {
                "seconds": self.seconds,
                "load": self.load,
                "models": {name: _speed(speed) for name, speed in self.speeds.items()},
                "machine": dict(self.machine),
            },
            "groups": _groups(self.cells),
            "list": [
                {
                    "key": each.cell.key,
                    "title": each.cell.title,
                    "done": each.done,
                    "seconds": _seconds(each.cost, likely),
                }
                for each in self.cells
            ],
        }

    def text(self) -> str:
        """A table of the cells, and a few lines on time, disk and memory."""
        done = f"{self.done} finished in {self.folder}" if self.done else "none finished"
        head = f"{self.name}: {counted(len(self.cells), 'cell')} in {counted(self.units, 'unit')}, {done}."
        lines = [head, "", *_table(self.cells, self.stopped > 0), ""]
        if self.done == len(self.cells):
            return "\n".join([*lines, "Nothing is left to do."])
        lines += self._unknown_lines()
        if self.speeds:
            lines += [*self._time_lines(), *self._space_lines(), *self._speed_lines()]
        return "\n".join(lines)

    def _unknown_lines(self) -> list[str]:
        reasons = list(self.unknown.items())
        shown = reasons[:_REASONS] if len(reasons) > _REASONS + 1 else reasons
        lines = [f"Not estimated ({counted(count, 'cell')}): {_cut(why)}" for why, count in shown]
        if len(shown) < len(reasons):
            rest = sum(count for _, count in reasons[_REASONS:])
            lines.append(f"Not estimated ({counted(rest, 'cell')}): other reasons; --json has them all.")
        return lines

    def _time_lines(self) -> list[str]:
        total = self.total()
        where = "in one process" if self.workers == 1 else f"in {self.workers} processes"
        at_most, likely = map(in_words, self.wall)
        if self.stopped:
            share = f"{self.shares['']:.0%} of their steps in {counted(self.stopped, 'finished cell')}"
            line = f"Time    at most {at_most} {where}, likely {likely} (stages stopped after {share})"
        else:
            line = f"Time    at most {at_most} {where}: an upper bound, with every stage to its last epoch"
        parts = (("teacher", total.teacher), ("training", total.training), ("evaluation", total.evaluation))
        return [line, "        " + ", ".join(f"{name} {in_words(seconds)}" for name, seconds in parts)]

    def _space_lines(self) -> list[str]:
        of = " of the GPU" if any(speed.device == "cuda" for speed in self.speeds.values()) else ""
        each = "" if self.workers == 1 else f" in {self.workers} processes"
        return [
            f"Disk    at most {_size(self.work_bytes)} while it runs; results {_size(self.record_bytes)}",
            f"Memory  {_size(self.memory_bytes)}{of}{each}, as measured{self._longer()}",
        ]

    def _longer(self) -> str:
        """Longer rows take more memory than was measured."""
        for name, speed in self.speeds.items():
            if speed.longest_context > 1.2 * speed.longest:
                seen, longest = speed.longest, speed.longest_context
                return f" on rows of up to {seen} tokens; {name} will have some of {longest:.0f}"
        return ""

    def _speed_lines(self) -> list[str]:
        lines = []
        for name, speed in self.speeds.items():
            rates = f"{speed.bare:.0f} bare"
            if speed.steps:
                rates += f", {speed.context:.0f} behind demonstrations, {speed.teacher:.0f} teacher"
            lines.append(f"Speed   {name}: tokens a second {rates}; loaded in {speed.loading:.1f} s")
        # what else runs takes its share of the cores, and of what was measured
        busy = (
            f", beside about {self.load:.1f} other processes: alone it is faster" if self.load >= 0.5 else ""
        )
        return [*lines, f"Measured in {self.seconds:.0f} s{busy}."]


def estimate(
    grid: GridConfig, output_dir: str | Path, *, limit: int | None = None, workers: int = 1
) -> Estimate:
    """Count a grid's cells and time, briefly, what they are made of; nothing is written.

    A benchmark or model that cannot be had, or is refused, is no error: its cells are counted and the reason
    is in the result.

    Args:
        grid: the grid.
        output_dir: the sweep's folder, which need not exist; what is finished there is not counted as work.
        limit: the grid's first so many cells only.
        workers: processes that share this machine.

    Raises:
        UserError: a mistake in the grid, or a folder that holds something else.
    """
    import psutil

    began, load = time.perf_counter(), psutil.getloadavg()[0]
    store = SweepFolder(Path(output_dir))
    rows, missing = _read(grid)
    units = first_cells(cells_of(grid, rows), limit)
    cells = [cell for unit in units for cell in unit.cells]
    shares = shares_of_steps(cells, store.records)
    todo = {cell.key for cell in cells} - set(store.records)
    waiting = [part for unit in units if (part := unit.only(todo)).cells]
    found = _Found(shares)
    by_model: dict[str, list[Unit]] = defaultdict(list)
    for unit in waiting:
        absent = [missing[b.name, v] for b, v in unit.benchmarks if (b.name, v) in missing]
        if absent:
            found.refuse(unit.cells, absent[0])
        else:
            by_model[unit.model].append(unit)
    with _shared_out(workers), tempfile.TemporaryDirectory(prefix="ia2-dry-run-") as scratch:
        begin(Path(scratch))
        for model, of_model in by_model.items():
            logger.info("Measuring %s …", model)
            with muted():
                found.add(model, of_model, rows, Path(scratch))
    stopped = sum(is_trained(c.spec["recipe"]) and c.key in store.records for c in cells)
    return Estimate(
        grid.name,
        str(output_dir),
        tuple(CellEstimate(cell, cell.key not in todo, found.costs.get(cell.key)) for cell in cells),
        len(units),
        workers,
        dict(found.refused),
        found.speeds,
        shares,
        stopped,
        _wall(waiting, found, workers),
        sum(sorted(found.work.values())[-workers:]),
        found.records,
        time.perf_counter() - began,
        load,
        machine(),
    )


class _Found:
    """Costs of cells, gathered model by model."""

    def __init__(self, shares: Mapping[str, float]) -> None:
        self.shares = shares
        self.costs: dict[str, Cost] = {}
        self.refused: Counter[str] = Counter()
        self.speeds: dict[str, Speed] = {}
        self.work: dict[str, int] = {}
        self.records = 0

    def refuse(self, cells: Sequence[Cell], why: str) -> None:
        """These cells cannot be estimated."""
        self.refused[why] += len(cells)

    def add(self, model: str, units: Sequence[Unit], rows: Rows, scratch: Path) -> None:
        """Load a model, calibrate, and estimate its units."""
        # it imports torch's trainer
        from ia2.sweeps.speed import measure

        began = time.perf_counter()
        try:
            base = load_base(model, **units[0].options)
        except _CANNOT as error:  # the cells are still counted
            self.refuse([cell for unit in units for cell in unit.cells], describe(error))
            return
        loading = time.perf_counter() - began
        shapes: dict[str, Shape | str] = {}
        for unit in units:
            if (kind := kind_of(unit)) not in shapes:
                try:
                    shapes[kind] = measure_shape(unit, base, rows, scratch)
                except _CANNOT as error:
                    shapes[kind] = describe(error)
        possible = []
        for unit in units:
            shape = shapes[kind_of(unit)]
            if isinstance(shape, Shape):
                possible.append((unit, shape))
            else:
                self.refuse(unit.cells, shape)
        if possible:
            cells = [cell for unit, _ in possible for cell in unit.cells]
            adapters = {adapter_of(c): c.config for c in cells if is_trained(c.spec["recipe"])}
            known = [shape for shape in shapes.values() if isinstance(shape, Shape)]
            try:
                speed = measure(base, known, adapters, loading, scratch)
            except _CANNOT as error:
                self.refuse(cells, describe(error))
            else:
                self.speeds[model] = speed
                for unit, shape in possible:
                    self._unit(unit, UnitCosts(shape, speed, self.shares), speed)
        del base
        shapes.clear()
        gc.collect()

    def _unit(self, unit: Unit, costs: UnitCosts, speed: Speed) -> None:
        for cell in unit.cells:
            refused = speed.refused.get(adapter_of(cell)) if is_trained(cell.spec["recipe"]) else None
            if refused is not None:
                self.refuse([cell], refused)
                continue
            self.costs[cell.key] = costs.cell(cell)
            self.records += costs.record_bytes()
        self.work[unit.key] = costs.work_bytes


def _read(grid: GridConfig) -> tuple[Rows, dict[tuple[str, str | None], str]]:
    """The rows that can be had, and why others cannot."""
    rows: Rows = {}
    missing: dict[tuple[str, str | None], str] = {}
    unreachable = ""
    forget_rows()  # as a sweep does
    for benchmark, verbaliser in evaluated_on(grid):
        key = benchmark.name, verbaliser
        if unreachable and benchmark.path is None:
            missing[key] = unreachable
            continue
        try:
            rows[key] = load_rows(benchmark, verbaliser, grid.data_dir, None)
        except UserError as error:
            missing[key] = str(error)
            # its client tries for most of a minute, for each of a dozen benchmarks; told to be offline, not
            if _UNREACHABLE in str(error) and "OfflineMode" not in str(error):
                unreachable = f"{error} The hub was not asked for the others."
                missing[key] = unreachable
    return rows, missing


@contextmanager
def _shared_out(workers: int) -> Iterator[None]:
    """As many threads as each of several processes has (see :func:`ia2.sweeps.workers.processes`)."""
    import torch

    before = torch.get_num_threads()
    if workers > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _wall(units: Sequence[Unit], found: _Found, workers: int) -> tuple[float, float]:
    """Seconds from start to end: at most, and likely. Units are not divided among workers."""
    costs = [_sum(found.costs.get(cell.key) for cell in unit.cells) for unit in units]
    known = [unit.model for unit in units if unit.model in found.speeds]
    loads = known
    if workers == 1:  # one model at a time, in the grid's order
        loads = known[:1] + [after for before, after in pairwise(known) if after != before]
    loading = sum(found.speeds[model].loading for model in (loads if workers == 1 else set(loads)))

    def spread(seconds: list[float]) -> float:
        return loading + max(sum(seconds) / workers, max(seconds, default=0.0))

    return spread([c.at_most for c in costs]), spread([c.likely_total for c in costs])


def _sum(costs: Any) -> Cost:
    known = [cost for cost in costs if cost is not None]
    return Cost(*(sum(getattr(c, n) for c in known) for n in ("teacher", "training", "likely", "evaluation")))


# ------------------------------------------------------------------------------------------------ words


def _table(cells: Sequence[CellEstimate], likely: bool) -> list[str]:
    """Lines: benchmarks by model, recipes side by side."""
    recipes = list(dict.fromkeys(each.cell.spec["recipe"] for each in cells))
    groups: dict[tuple[str, str], list[CellEstimate]] = {}
    for each in cells:
        groups.setdefault((each.cell.spec["model"], _benchmark(each.cell)), []).append(each)
    head = ["model", "benchmark", "N", "seeds", *recipes, "cells", "done", "at most"]
    table = [head + ["likely"] * likely]
    for names, members in [*groups.items(), (("all", ""), list(cells))]:
        counts = Counter(each.cell.spec["recipe"] for each in members)
        table.append(
            [
                *names,
                *(_sizes(members) if names[1] else ("", "")),
                *(str(counts[recipe]) if counts[recipe] else "–" for recipe in recipes),
                str(len(members)),
                str(sum(each.done for each in members)),
                _time(members, "at_most"),
                *([_time(members, "likely_total")] if likely else []),
            ]
        )
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return [
        "  ".join(
            text.ljust(width) if column < 2 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def _benchmark(cell: Cell) -> str:
    verbaliser = cell.spec["verbaliser"]
    return f"{cell.spec['benchmark']} ({verbaliser})" if verbaliser else str(cell.spec["benchmark"])


def _sizes(cells: Sequence[CellEstimate]) -> tuple[str, str]:
    """Values of N, and how many seeds each has."""
    seeds: dict[int, set[int]] = defaultdict(set)
    for each in cells:
        if each.cell.spec["num_examples"] is not None:
            seeds[each.cell.spec["num_examples"]].add(each.cell.spec["seed"])
    if not seeds:
        return "–", "–"
    counts = [len(seeds[n]) for n in sorted(seeds)]
    same = len(set(counts)) == 1
    return ", ".join(map(str, sorted(seeds))), ", ".join(map(str, counts[:1] if same else counts))


def _time(cells: Sequence[CellEstimate], what: str) -> str:
    """``12 min``; ``12 min + ?`` where some, and ``?`` where no cell could be estimated."""
    waiting = [each for each in cells if not each.done]
    known = [each.cost for each in waiting if each.cost is not None]
    if not waiting:
        return "–"
    if not known:
        return "?"
    return in_words(getattr(_sum(known), what)) + (" + ?" if len(known) < len(waiting) else "")


def _groups(cells: Sequence[CellEstimate]) -> list[dict[str, Any]]:
    names = ("model", "benchmark", "verbaliser", "num_examples", "recipe", "variant")
    found: dict[tuple[Any, ...], list[CellEstimate]] = {}
    for each in cells:
        found.setdefault(tuple(each.cell.spec[name] for name in names), []).append(each)
    return [
        {
            **dict(zip(names, key, strict=True)),
            "cells": len(members),
            "done": sum(each.done for each in members),
        }
        for key, members in found.items()
    ]


def _seconds(cost: Cost | None, likely: bool) -> dict[str, float] | None:
    if cost is None:
        return None
    found = {
        "at_most": cost.at_most,
        "teacher": cost.teacher,
        "training": cost.training,
        "evaluation": cost.evaluation,
    }
    return {**found, "likely": cost.likely_total} if likely else found


def _speed(speed: Speed) -> dict[str, Any]:
    return {
        "seconds": speed.seconds,
        "loading_seconds": speed.loading,
        "tokens_a_second": {"bare": speed.bare, "context": speed.context, "teacher": speed.teacher},
        "device": speed.device,
        "memory_bytes": speed.memory_bytes,
        "longest_row": {"measured": speed.longest, "grid": speed.longest_context},
    }


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _size(count: float) -> str:
    """``1.4 GB``, ``120 MB``, ``30 kB``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}" if count < 10 * size else f"{count / size:.0f} {unit}"
    return f"{count / 1e3:.0f} kB"
