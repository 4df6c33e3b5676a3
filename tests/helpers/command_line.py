"""Running ``ia2`` in tests, in this process or in one of its own, and what a refusal looks like."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_icl.tasks import sample_task

from ia2.utils.locks import LOCK
from ia2.utils.manifest import MANIFEST


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON document without NaN."""
        return strict(self.out)

    def refusal(self) -> str:
        """The one line of a user's mistake."""
        assert self.status == 2, self
        assert self.out == "", self
        lines = self.err.splitlines()
        assert len(lines) == 1, self
        assert lines[0].startswith("ia2: error: "), self
        assert "Traceback" not in self.err
        return lines[0].removeprefix("ia2: error: ")


Ia2 = Callable[..., Ran]
TASK = sample_task(0, num_classes=3)


def strict(text: str) -> Any:
    """JSON as the standard has it: without NaN and Infinity."""

    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def names(line: str, *parts: str) -> None:
    """Assert that a message names files, rows, keys and values; how it puts them is free."""
    missing = [part for part in parts if part not in line]
    assert not missing, f"{missing} not in {line!r}"


def listed(arguments: Iterable[str | Path]) -> list[str]:
    """Arguments as texts. ``train`` is the method, unless a test says otherwise: a probe takes time."""
    texts = [str(argument) for argument in arguments]
    settled = {"--recipe", "--config", "--help"}
    if texts[:1] == ["train"] and not settled & {text.partition("=")[0] for text in texts}:
        texts += ["--recipe", "ia2-sft"]
    return texts


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Ran:
    """``ia2 arguments…`` in this process."""
    from ia2.cli import main

    capsys.readouterr()
    status = 0
    try:
        main(listed(arguments))
    except SystemExit as stop:
        if stop.code == 1 and isinstance(stop.__context__, Exception):
            raise stop.__context__ from None  # a bug; with its traceback, for whoever reads the test
        status = stop.code if isinstance(stop.code, int) else 1
    captured = capsys.readouterr()
    return Ran(status, captured.out, captured.err)


def run_apart(*arguments: str | Path, **environment: str) -> Ran:
    """``python -m ia2 arguments…``."""
    done = subprocess.run(
        [sys.executable, "-m", "ia2", *listed(arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def write_rows(path: Path, rows: Iterable[tuple[str, str] | dict[str, Any]]) -> Path:
    """Rows as JSON lines; pairs become the columns ``prompt`` and ``completion``."""
    columns = ("prompt", "completion")
    listed = [row if isinstance(row, dict) else dict(zip(columns, row, strict=True)) for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in listed), encoding="utf-8")
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and what it holds; the list of the files and their lock left out."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in (MANIFEST, LOCK)]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}
