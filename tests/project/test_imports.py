"""Packages import downwards only: the way of the data, from files and settings to reports and commands."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import ia2

ROOT = Path(ia2.__file__).parent
ORDER = (
    "utils", "config", "data", "models", "adapters", "prompts", "teacher", "training", "evaluation",
    "experiment", "analysis", "report", "cli",
)  # fmt: skip


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, those inside functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", ORDER)
def test_a_package_imports_no_later_one(package: str) -> None:
    later = ORDER[ORDER.index(package) + 1 :]
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        for name in imports(file):
            parts = name.split(".")
            assert parts[0] != "ia2" or parts[1] not in later, f"{file.relative_to(ROOT)} imports {name}"
            # reports are made without a model
            assert package != "report" or parts[0] != "torch", f"{file.relative_to(ROOT)} imports torch"


def test_every_package_has_its_place() -> None:
    assert {folder.name for folder in ROOT.iterdir() if (folder / "__init__.py").is_file()} == set(ORDER)
