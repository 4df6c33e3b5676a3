"""How long cells take: the seconds of finished ones, by what they have in common with the others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ia2.experiment.sweep.grid import Cell
from ia2.experiment.sweep.records import count_seconds
from ia2.utils.format import Column, Entry, Table, markdown
from ia2.utils.wording import MISSING, counted, in_words


class Pace:
    """Mean seconds of finished cells of the same kind: model, recipe and number of examples."""

    def __init__(self) -> None:
        self._times: dict[tuple[Any, ...], list[float]] = defaultdict(list)
        self._counted: set[tuple[str, float]] = set()

    def add(self, cell: Cell, record: Mapping[str, Any]) -> float:
        """Learn from a finished cell.

        Returns:
            Its seconds, less what it shares with cells that were added before.
        """
        seconds = count_seconds(record["cost"]["seconds"], self._counted)
        # a worker loads its model once, however many cells follow
        pace = seconds - record["cost"]["seconds"].get("load", 0.0)
        for key in ((), kind_of(cell), _alike(cell)):
            self._times[key].append(pace)
        return seconds

    def expect(self, cell: Cell) -> float | None:
        """Seconds of a cell: the mean of its kind, on its own benchmark if one is known; None if none is."""
        return self._mean(_alike(cell)) or self._mean(kind_of(cell))

    def mean(self) -> float | None:
        """Of all cells that were added."""
        return self._mean(())

    def _mean(self, key: tuple[Any, ...]) -> float | None:
        times = self._times.get(key)
        return sum(times) / len(times) if times else None


def kind_of(cell: Cell) -> tuple[str, str, int | None]:
    """Model, recipe and number of examples: what most decides how long a cell takes."""
    return cell.spec["model"], cell.spec["recipe"], cell.spec["num_examples"]


def first_of_kinds(cells: Sequence[Cell], known: Mapping[str, Any]) -> set[str]:
    """Keys of the first cell of each kind that has no finished cell.

    Args:
        cells: in the grid's order.
        known: keys of finished cells.
    """
    timed = {kind_of(cell) for cell in cells if cell.key in known}
    chosen: dict[tuple[Any, ...], str] = {}
    for cell in cells:
        if kind_of(cell) not in timed:
            chosen.setdefault(kind_of(cell), cell.key)
    return set(chosen.values())


def _alike(cell: Cell) -> tuple[Any, ...]:
    return (*kind_of(cell), cell.spec["benchmark"])


@dataclass(frozen=True)
class Kind:
    """Cells of one model, recipe and number of examples.

    Attributes:
        model: as the grid names it.
        recipe: as the grid names it.
        num_examples: None of ``base``.
        cells: how many there are.
        done: how many are finished.
        seconds_left: of those that are not, one after the other; None where none of the kind is finished.
    """

    model: str
    recipe: str
    num_examples: int | None
    cells: int
    done: int
    seconds_left: float | None


@dataclass(frozen=True)
class WorkLeft:
    """What is left of a grid, and how long it will take at the pace of its finished cells."""

    kinds: tuple[Kind, ...] = ()

    @classmethod
    def of(cls, cells: Sequence[Cell], records: Mapping[str, Mapping[str, Any]]) -> WorkLeft:
        """Compare cells with those that are finished.

        Args:
            cells: of the grid, in its order.
            records: finished cells, by key.
        """
        pace = Pace()
        kinds: dict[tuple[Any, ...], list[Cell]] = defaultdict(list)
        for cell in cells:
            kinds[kind_of(cell)].append(cell)
            if cell.key in records:
                pace.add(cell, records[cell.key])
        return cls(tuple(_kind(members, records, pace) for members in kinds.values()))

    @property
    def cells(self) -> int:
        """That are not finished."""
        return sum(kind.cells - kind.done for kind in self.kinds)

    @property
    def seconds(self) -> float:
        """Of the kinds whose pace is known, one cell after the other."""
        return sum(kind.seconds_left or 0.0 for kind in self.kinds)

    @property
    def untimed(self) -> int:
        """Unfinished cells of kinds whose pace is not known."""
        return sum(kind.cells - kind.done for kind in self.kinds if kind.seconds_left is None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "cells_left": self.cells,
            "seconds_left": self.seconds,
            "cells_not_timed": self.untimed,
            "kinds": [asdict(kind) for kind in self.kinds],
        }

    def text(self, workers: int = 1) -> str:
        """A table of the kinds, and the time that is left with so many workers."""
        rows = [
            (
                kind.model,
                MISSING if kind.num_examples is None else str(kind.num_examples),
                kind.recipe,
                str(kind.cells),
                str(kind.done),
                "not timed" if kind.seconds_left is None else in_words(kind.seconds_left),
            )
            for kind in self.kinds
        ]
        table = Table(
            "left",
            "Cells by kind, and what is left of them, one after the other",
            tuple(map(Column, ("model", "N", "recipe", "cells", "done", "left"))),
            tuple(tuple(map(Entry, row)) for row in rows),
        )
        if not self.cells:
            return f"{markdown(table)}\nNothing is left to do."
        parts = []
        if timed := self.cells - self.untimed:
            spent = in_words(self.seconds / workers)
            parts.append(f"{counted(timed, 'cell')}, about {spent} with {counted(workers, 'worker')}")
        if self.untimed:
            parts.append(f"{counted(self.untimed, 'cell')} whose kind could not be timed")
        return f"{markdown(table)}\nLeft: {'; '.join(parts)}."


def _kind(cells: Sequence[Cell], records: Mapping[str, Any], pace: Pace) -> Kind:
    waiting = [pace.expect(cell) for cell in cells if cell.key not in records]
    known = [seconds for seconds in waiting if seconds is not None]
    left = sum(known) if len(known) == len(waiting) else None
    return Kind(*kind_of(cells[0]), len(cells), len(cells) - len(waiting), left)
