"""Examples in docstrings give what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import ia2

ROOT = Path(ia2.__file__).parent
FILES = sorted(file for file in ROOT.rglob("*.py") if ">>> " in file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_examples_of(file: Path) -> None:
    module = importlib.import_module(".".join(("ia2", *file.relative_to(ROOT).with_suffix("").parts)))
    found = doctest.testmod(module)
    assert found.attempted > 0 and found.failed == 0
    assert "doctest: +SKIP" not in file.read_text(encoding="utf-8")
