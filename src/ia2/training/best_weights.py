"""The best weights of a stage, early stopping, and checkpoints that are complete."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from ia2.adapters.weights import adapter_state, load_adapter_state
from ia2.utils.distributed import wait
from ia2.utils.errors import RunFolderError
from ia2.utils.files import read_json, write_json
from ia2.utils.imports import for_training
from ia2.utils.logging import logger
from ia2.utils.manifest import check, check_tree, record_tree

with for_training():
    from transformers import TrainerCallback

if TYPE_CHECKING:
    import torch

    from ia2.training.trainer import ExampleTrainer

_BEST, _COMPLETE = "best.safetensors", "complete.json"


class BestWeights(TrainerCallback):
    """Keeps the adapter of the best dev loss, and stops when it does not improve.

    Stops at once where the loss, the dev loss or the weights are not finite.

    Attributes:
        loss: the best dev loss; NaN without one.
        step: its optimiser step.
        diverged: optimiser steps after which the loss or the weights were not finite; None: they always were.
        seconds_before: training seconds of earlier starts, up to the checkpoint that this one went on from.
    """

    def __init__(self, trainer: ExampleTrainer, patience: int, restore_best: bool) -> None:
        self.trainer, self.patience, self.restore_best = trainer, patience, restore_best
        self.loss, self.step, self.waited = float("nan"), 0, 0
        self.diverged: int | None = None
        self.seconds_before = 0.0
        self.state_dict: dict[str, torch.Tensor] | None = None

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Compare with the best so far."""
        loss = (metrics or {}).get("eval_loss", float("nan"))
        if not math.isfinite(loss):
            self._end(control, state.global_step)
        elif not loss >= self.loss:
            self.loss, self.step, self.waited = loss, state.global_step, 0
            if self.restore_best:
                self.state_dict = adapter_state(self.trainer.model)
        else:
            self.waited += 1
            if self.waited >= self.patience:
                control.should_training_stop = True
                # a stage resumed from here would not know that it is over, and train on
                control.should_save = False

    def _end(self, control: Any, steps: int) -> None:
        """Training diverged; nothing of it is kept, logged or gone on from."""
        self.diverged = steps
        self.loss, self.step, self.state_dict = float("nan"), 0, None
        control.should_training_stop = True
        control.should_evaluate = control.should_save = control.should_log = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log, and with dev rows evaluate, where the schedule says so.

        Not in ``on_epoch_end``: a checkpoint of that step, written before, would not know of the
        evaluation, and a resumed stage would leave it out.
        """
        self.trainer.progress.advance()
        if control.should_save:
            # the loss is logged as a mean since the last time, and no checkpoint has what came since
            control.should_log = True
        loss, weights = self.trainer.step_is_finite()
        if not (loss and weights):
            # the loss of a step is that of the weights before it
            self._end(control, state.global_step if loss else state.global_step - 1)
        elif self.trainer.schedule.due(state.global_step):
            control.should_log = True
            control.should_evaluate = len(self.trainer.eval_dataset) > 0

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Complete a checkpoint: without these files it is not resumed from."""
        wait()  # each process has written a file of its own
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.state_dict is not None:
            save_file(self.state_dict, folder / _BEST)
        record_tree(folder, folder)
        progress = {"loss": None if self.loss != self.loss else self.loss, "step": self.step}
        progress |= {"waited": self.waited, "seconds": self.trainer.seconds}
        write_json(folder / _COMPLETE, progress)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the dev rows before the first step, or take up what was known at the checkpoint.

        Weights that come from an earlier stage may be better than any that this one reaches.
        """
        if state.global_step == 0:
            if len(self.trainer.eval_dataset):
                self.trainer.evaluate()
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        progress = read_json(folder / _COMPLETE)
        self.loss = float("nan") if progress["loss"] is None else progress["loss"]
        self.step, self.waited = progress["step"], progress["waited"]
        self.seconds_before = progress["seconds"]
        if (folder / _BEST).is_file():
            self.state_dict = load_file(folder / _BEST)

    def restore(self, model: Any) -> None:
        """Give the model the best weights, if that was asked for and there was a dev set."""
        if self.state_dict is not None:
            load_adapter_state(model, self.state_dict)


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint that was written to its end and is undamaged, or None."""
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{_COMPLETE}")]
    for checkpoint in sorted(complete, key=lambda path: int(path.name.rsplit("-", 1)[1]), reverse=True):
        try:
            check(checkpoint / _COMPLETE)
            check_tree(checkpoint)
        except RunFolderError as error:
            logger.warning("A damaged checkpoint is passed over. %s", str(error).partition(". ")[0] + ".")
        else:
            return checkpoint
    return None
