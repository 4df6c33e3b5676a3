from __future__ import annotations

from collections.abc import Iterator

import pytest

from ia2 import console


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Commands set up logging for themselves; other tests read it through pytest."""
    before = console.logger.handlers[:], console.logger.propagate, console.logger.level
    yield
    console.logger.handlers[:], console.logger.propagate = before[0], before[1]
    console.logger.setLevel(before[2])
