"""A stage's callbacks: the best weights and early stopping, complete checkpoints, the progress bar."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia2.adapters.weights import adapter_state, load_adapter_state
from ia2.utils.distributed import wait
from ia2.utils.errors import RunFolderError
from ia2.utils.files import read_json, write_json
from ia2.utils.imports import for_training
from ia2.utils.logging import Progress, logger
from ia2.utils.manifest import check, check_tree, record_tree

with for_training():
    from transformers import TrainerCallback

if TYPE_CHECKING:
    import torch

    from ia2.training.example_trainer import ExampleTrainer


class BestWeights(TrainerCallback):
    """Keeps the adapter of the best dev loss, and stops when it does not improve.

    Stops at once where the loss, the dev loss or the weights are not finite.

    Args:
        patience: evaluations without improvement before stopping.
        restore_best: whether :meth:`restore` does anything.

    Attributes:
        diverged: optimiser steps after which the loss or the weights were not finite; None: they always were.
    """

    def __init__(self, patience: int, restore_best: bool) -> None:
        self.patience, self.restore_best = patience, restore_best
        self.loss = float("nan")
        self.step = 0
        self.waited = 0
        self.diverged: int | None = None
        self.seconds_before = 0.0
        self.state_dict: dict[str, torch.Tensor] | None = None
        self.trainer: ExampleTrainer | None = None

    def on_evaluate(
        self,
        args: Any,
        state: Any,
        control: Any,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Compare with the best so far."""
        assert self.trainer is not None
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
        assert self.trainer is not None
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
        assert self.trainer is not None
        from safetensors.torch import save_file

        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.state_dict is not None:
            save_file(self.state_dict, folder / "best.safetensors")
        record_tree(folder, folder)
        write_json(
            folder / "complete.json",
            {
                "loss": None if self.loss != self.loss else self.loss,
                "step": self.step,
                "waited": self.waited,
                "seconds": self.trainer.seconds,
            },
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the dev rows before the first step, or take up what was known at the checkpoint.

        Weights that come from an earlier stage may be better than any that this one reaches.
        """
        assert self.trainer is not None
        if state.global_step == 0:
            if len(self.trainer.eval_dataset):
                self.trainer.evaluate()
            return
        from safetensors.torch import load_file

        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"

        known = read_json(folder / "complete.json")
        self.loss = float("nan") if known["loss"] is None else known["loss"]
        self.step, self.waited = known["step"], known["waited"]
        self.seconds_before = known["seconds"]
        if (folder / "best.safetensors").is_file():
            self.state_dict = load_file(folder / "best.safetensors")

    def restore(self, model: Any) -> None:
        """Give the model the best weights, if that was asked for and there was a dev set."""
        if self.restore_best and self.state_dict is not None:
            load_adapter_state(model, self.state_dict)


class Steps(TrainerCallback):
    """Moves the progress bar."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.advance()


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint that was written to its end and is undamaged, or None."""
    complete = [path.parent for path in folder.glob("checkpoint-*/complete.json")]
    for checkpoint in sorted(complete, key=lambda path: int(path.name.rsplit("-", 1)[1]), reverse=True):
        try:
            check(checkpoint / "complete.json")
            check_tree(checkpoint)
        except RunFolderError as error:
            logger.warning("A damaged checkpoint is passed over. %s", str(error).partition(". ")[0] + ".")
        else:
            return checkpoint
    return None
