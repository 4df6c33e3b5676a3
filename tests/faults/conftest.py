"""What several tests of faults count."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The trainers of the stages that were trained, in order."""
    from ia2.training.trainer import ExampleTrainer

    trained: list[str] = []
    fit = ExampleTrainer.fit

    def counting(self: Any) -> float:
        trained.append(type(self.loss).__name__)
        return fit(self)

    monkeypatch.setattr(ExampleTrainer, "fit", counting)
    return trained
