"""The progress of a grid: what is done, what failed, and the time left."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from helpers.sweeping import grid_of

from ia2.experiment.sweep import progress as boards
from ia2.experiment.sweep.grid import GridConfig, expand
from ia2.experiment.sweep.progress import Board
from ia2.utils import logging as console


def board_of(files: Path, known: int = 0, seconds: float = 10.0) -> tuple[Board, list[Any], Any]:
    grid = GridConfig(**grid_of(files, recipes=["icl", "sft"], seeds=4))
    cells = [cell for unit in expand(grid) for cell in unit.cells]

    def record(cell: Any, took: float = seconds) -> dict[str, Any]:
        metrics = {"vocabulary": {"accuracy": 0.1, "nll": 9.0}, "labels": {"accuracy": 0.5, "nll": 0.25}}
        return {
            "spec": cell.spec,
            "evaluations": {"Two": {"metrics": metrics}},
            "cost": {"seconds": {"evaluate": took}},
        }

    return Board(cells, {cell.key: record(cell) for cell in cells[:known]}), cells, record


def test_time_left_is_by_cells_alike(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(boards.time, "monotonic", lambda: now[0])
    board, cells, record = board_of(files)
    assert board.seconds_left() is None
    with board:
        board.finished(cells[0], record(cells[0], 2.0))  # icl
        assert board.seconds_left() == pytest.approx(7 * 2.0)
        board.finished(cells[1], record(cells[1], 30.0))  # sft
        assert board.seconds_left() == pytest.approx(3 * 2.0 + 3 * 30.0)
        for cell in cells[3:6:2]:  # two sft at once, half as long
            board.started(cell)
        assert board.seconds_left() == pytest.approx(96 / 2)
        now[0] += 10
        assert board.seconds_left() == pytest.approx((96 - 20) / 2)
        now[0] += 1000
        assert board.seconds_left() == 0
        board.failed(cells[3], "no")
        board.finished(cells[5], record(cells[5], 30.0))
        assert board.seconds_left() == pytest.approx(3 * 2.0 + 30.0)


def test_time_left_is_known_from_earlier_starts(files: Path) -> None:
    board, _, _ = board_of(files, known=2, seconds=4.0)
    assert board.seconds_left() == pytest.approx(6 * 4.0)


def test_what_cells_share_is_counted_once(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    board, cells, record = board_of(files)
    first, second = record(cells[1]), record(cells[3])
    first["cost"]["seconds"] = {"teacher": 40.5, "align": 20.25, "evaluate": 2.0}
    second["cost"]["seconds"] = {"teacher": 40.5, "align": 20.25, "sft": 5.0, "evaluate": 2.0}
    with caplog.at_level(logging.INFO, "ia2"), board:
        board.finished(cells[1], first)
        board.finished(cells[3], second)
    assert "(63 s, " in caplog.messages[0] and "(7 s, " in caplog.messages[1]
    # two more of the same kind, and four of another
    assert board.seconds_left() == pytest.approx(6 * (62.75 + 7.0) / 2)


def test_lines_where_there_is_no_terminal(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    board, cells, record = board_of(files, known=1)
    with caplog.at_level(logging.INFO, "ia2"), board, console.muted():
        board.started(cells[1])
        board.finished(cells[1], record(cells[1]))
        board.failed(cells[2], "no")
        unit = expand(GridConfig(**grid_of(files, recipes=["icl", "sft"])))[0]
        board.lost(unit, "was eaten")
        board.lost(unit.only({unit.cells[0].key}), "was eaten")
    path = files / "model"
    assert caplog.messages == [
        f"[2/8] Two {path} sft N=4 seed 0 rate 0.001: accuracy 0.500, NLL 0.250 (10 s, 60 s left)",
        f"Two {path} icl N=4 seed 1 failed: no",
        "A worker was eaten: 2 cells wait again.",
        "A worker was eaten: 1 cell waits again.",
    ]
    assert [r.levelname for r in caplog.records] == ["INFO", "WARNING", "WARNING", "WARNING"]


def test_quietly_only_what_failed(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console.configure(quiet=True)
    board, cells, record = board_of(files)
    with board:
        board.finished(cells[0], record(cells[0]))
        board.failed(cells[1], "no")
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.splitlines() == [f"{cells[1].title} failed: no"]


def test_a_bar_on_a_terminal(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    monkeypatch.setattr(boards, "is_shown", lambda: True)
    monkeypatch.setattr(
        boards, "terminal", lambda **_: Console(stderr=True, force_terminal=True, width=120, no_color=True)
    )
    board, cells, record = board_of(files)
    with board:
        board.started(cells[1])
        board.finished(cells[0], record(cells[0]))
        shown = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
        shown.print(board._render())
        text = shown.export_text()
        board.failed(cells[2], "[no]")
    assert "1 done, 1 running, 0 failed, of 8, 70 s left" in text
    assert f"  {cells[1].title}" in text
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "accuracy 0.500" in captured.err
    assert "[no]" in captured.err  # no markup
    assert board._live is None


def test_nothing_is_drawn_if_nothing_is_left(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boards, "is_shown", lambda: True)
    board, _, _ = board_of(files, known=8)
    with board:
        assert board._live is None


def test_progress_is_shown_on_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal, quiet, shown in ((True, False, True), (True, True, False), (False, False, False)):
        monkeypatch.setattr("sys.stderr.isatty", lambda terminal=terminal: terminal)
        console.configure(quiet=quiet)
        assert console.is_shown() is shown
        with console.muted():
            assert console.is_shown() is False
        assert console.is_shown() is shown
    monkeypatch.undo()
    console.configure(quiet=True)
