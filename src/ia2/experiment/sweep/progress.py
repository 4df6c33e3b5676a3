"""Live progress of a sweep: what is done, running and failed, and the time left."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from ia2.experiment.sweep.grid import Cell, Unit
from ia2.experiment.sweep.pace import Pace
from ia2.utils.logging import is_shown, logger, printable, terminal
from ia2.utils.statistics import main_scope
from ia2.utils.wording import counted, in_words

# Its own, since what a worker in this process does is muted while this is not.
_log = logging.getLogger("ia2.sweep")


class Board:
    """A bar on a terminal, a line for each finished cell elsewhere.

    Args:
        cells: all cells of the sweep.
        known: records of those finished before; they tell how long the others will take.
    """

    def __init__(self, cells: Sequence[Cell], known: Mapping[str, Mapping[str, Any]]) -> None:
        self._waiting = {cell.key: cell for cell in cells if cell.key not in known}
        self._running: dict[str, float] = {}
        self._titles = {cell.key: cell.title for cell in cells}
        self._done, self._failed, self._total = len(cells) - len(self._waiting), 0, len(cells)
        self._pace = Pace()
        for cell in cells:
            if cell.key in known:
                self._pace.add(cell, known[cell.key])
        self._live: Any = None

    def __enter__(self) -> Board:
        _log.setLevel(logger.getEffectiveLevel())
        if is_shown() and self._waiting:
            from rich.live import Live

            self._live = Live(
                self._render(), refresh_per_second=1, transient=True, console=terminal(stderr=True)
            )
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, trace)
            self._live = None
        _log.setLevel(logging.NOTSET)

    # ------------------------------------------------------------------------------------ events

    def started(self, cell: Cell) -> None:
        """A worker has begun a cell."""
        self._running[cell.key] = time.monotonic()
        self._refresh()

    def finished(self, cell: Cell, record: Mapping[str, Any]) -> None:
        """A cell is done."""
        self._done += 1
        self._leave(cell)
        seconds = self._pace.add(cell, record)
        metrics = next(iter(record["evaluations"].values()))["metrics"]
        own = metrics[main_scope("labels" in metrics)]
        self._say(
            "[%d/%d] %s: accuracy %.3f, NLL %.3f (%.0f s%s)",
            self._done,
            self._total,
            cell.title,
            own["accuracy"],
            own["nll"],
            seconds,
            self._left_in_words(),
        )

    def failed(self, cell: Cell, error: str) -> None:
        """A cell could not be done."""
        self._failed += 1
        self._leave(cell)
        self._say("%s failed: %s", cell.title, error, warn=True)

    def lost(self, unit: Unit, reason: str) -> None:
        """A worker died; what it had not finished waits again."""
        for cell in unit.cells:
            self._running.pop(cell.key, None)
        waits = "waits" if len(unit.cells) == 1 else "wait"
        self._say("A worker %s: %s %s again.", reason, counted(len(unit.cells), "cell"), waits, warn=True)

    # ----------------------------------------------------------------------------------- time left

    def seconds_left(self) -> float | None:
        """Of the cells that wait and run, at the pace of those like them; None before any is known."""
        mean = self._pace.mean()
        if mean is None:
            return None
        expected = sum(self._pace.expect(cell) or mean for cell in self._waiting.values())
        running = sum(time.monotonic() - begun for begun in self._running.values())
        return max(0.0, expected - running) / max(1, len(self._running))

    def _left_in_words(self) -> str:
        left = self.seconds_left()
        return "" if not self._waiting or left is None else f", {in_words(left)} left"

    # --------------------------------------------------------------------------------------- screen

    def _leave(self, cell: Cell) -> None:
        self._running.pop(cell.key, None)
        self._waiting.pop(cell.key, None)

    def _say(self, message: str, *values: Any, warn: bool = False) -> None:
        if self._live is not None:
            self._live.console.print(message % values, markup=False, highlight=False)
        elif warn:
            _log.warning(message, *values)
        else:
            _log.info(message, *values)
        self._refresh()

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._render())

    def _render(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        line = f"{self._done} done, {len(self._running)} running, {self._failed} failed, of {self._total}"
        running: Iterable[str] = (self._titles[key] for key in self._running)
        return Group(
            ProgressBar(total=max(1, self._total), completed=self._done + self._failed, width=60),
            Text(line + self._left_in_words()),
            *(Text(f"  {printable(title)}", style="dim") for title in running),
        )
