"""When a training stage looks at the dev rows."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Dev evaluations of one stage.

    Where nothing is asked for, up to four an epoch, its end among them, two steps apart at least, and so
    seldom that they cost at most a quarter of what training costs: forward and backward pass of a row take
    about twice as long as the forward pass of a dev row.

    Attributes:
        per_epoch: optimiser steps of an epoch.
        epochs: at most.
        batch: rows of a step.
        dev: dev rows of an evaluation, each as often as it has targets.
        every: optimiser steps between evaluations, besides each epoch's end, as asked for.
        patience: evaluations without improvement before stopping, as asked for.
    """

    per_epoch: int
    epochs: int
    batch: int
    dev: int
    every: int | None = None
    patience: int = 5

    @property
    def _apart(self) -> int:
        """Optimiser steps from one evaluation to the next, about."""
        affordable = max(1, -(-2 * self.dev // self.batch))
        if affordable > self.per_epoch:
            return -(-affordable // self.per_epoch) * self.per_epoch
        return min(self.per_epoch, max(affordable, self._usual))

    @property
    def _usual(self) -> int:
        return max(2, -(-self.per_epoch // 4))

    @property
    def waits(self) -> int:
        """Evaluations without improvement before stopping.

        Seldom evaluations stop a stage after about as many steps as frequent ones would, but not before two.
        """
        if self.every is not None:
            return self.patience
        return min(self.patience, max(2, math.ceil(self.patience * self._usual / self._apart)))

    def due(self, step: int) -> bool:
        """Whether the dev rows are looked at after this optimiser step."""
        if step == self.per_epoch * self.epochs:
            return True
        if self.every is not None:
            return step % self.every == 0 or step % self.per_epoch == 0
        if self._apart >= self.per_epoch:
            return step % self._apart == 0
        # evenly within each epoch, its end included
        count = self.per_epoch // self._apart
        within = (step - 1) % self.per_epoch + 1
        return within in {-(-part * self.per_epoch // count) for part in range(1, count + 1)}

    @property
    def total(self) -> int:
        """Evaluations of a stage that goes to its last epoch, besides that before the first step."""
        return sum(map(self.due, range(1, self.per_epoch * self.epochs + 1)))
