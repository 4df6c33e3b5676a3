"""Dev evaluations: as often as they are affordable, at the ends of epochs, as asked for."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ia2.training.schedule import Schedule

sizes = st.integers(1, 64)


@given(sizes, st.integers(1, 20), st.integers(1, 16), st.integers(0, 100))
def test_they_cost_a_quarter_of_training_at_most(per_epoch: int, epochs: int, batch: int, dev: int) -> None:
    schedule = Schedule(per_epoch, epochs, batch, dev)
    steps = per_epoch * epochs
    due = [step for step in range(1, steps + 1) if schedule.due(step)]
    assert due[-1] == steps and schedule.total == len(due)  # the last weights are judged too
    # a step costs its rows' forward and backward pass, twice a forward pass; the last evaluation is extra
    assert (len(due) - 1) * dev <= 0.25 * 2 * batch * steps + 1e-9
    assert all(b - a >= min(2, per_epoch) or b == steps for a, b in pairwise(due))


@pytest.mark.parametrize(
    ("per_epoch", "dev", "every", "due", "waits"),
    [
        (1, 2, None, [1, 2, 3, 4], 5),  # four rows, two of them dev: after each step
        (2, 4, None, [2, 4], 5),
        (8, 16, None, [8, 16], 2),  # 32 rows: the end of each epoch
        (8, 0, None, [2, 4, 6, 8], 5),
        (4, 40, None, [20, 40], 2),
        (32, 48, None, [32, 64], 2),
        (8, 40, 3, [3, 6, 8, 9, 12, 15, 16], 5),  # as asked for, whatever it costs
    ],
)
def test_when(per_epoch: int, dev: int, every: int | None, due: list[int], waits: int) -> None:
    schedule = Schedule(per_epoch, 100, 4, dev, every)
    assert [step for step in range(1, due[-1] + 1) if schedule.due(step)] == due
    assert schedule.waits == waits


def test_patience_of_one_stays() -> None:
    assert Schedule(8, 10, 4, 16, patience=1).waits == 1
