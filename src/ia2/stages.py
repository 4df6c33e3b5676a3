"""One training stage: settings to trainer, trainer to a folder that a later start finds finished."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia2.adapters import adapter_state
from ia2.config import AdaptConfig, AlignConfig, SftConfig
from ia2.console import logger, progress
from ia2.distributed import is_first, wait
from ia2.errors import RunFolderError
from ia2.files import atomic_dir, read_json, space_needed, write_json

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from ia2.batches import AnswerDataset

FORMAT = 1  # of stage folders and target stores; bump when their meaning changes


@dataclass
class StageResult:
    """A finished stage: the adapter's weights and how it went."""

    name: str
    learning_rate: float
    dev_loss: float
    steps: int
    seconds: float
    folder: Path
    key: str
    state: dict[str, torch.Tensor]
    history: list[dict[str, Any]]


@dataclass
class TrainedRecipe:
    """A recipe's chosen adapter, and what each learning rate came to."""

    recipe: str
    stages: list[StageResult]
    tried: dict[str, float]
    selected_by: str

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """Weights after the last stage."""
        return self.stages[-1].state

    @property
    def learning_rate(self) -> float:
        """The rate chosen."""
        return self.stages[-1].learning_rate

    @property
    def seconds(self) -> dict[str, float]:
        """Training seconds of each stage."""
        return {stage.name: stage.seconds for stage in self.stages}


def finished_stage(name: str, tried: float, folder: Path, key: str) -> StageResult:
    """The result that lies in ``folder``.

    Args:
        name: ``align`` or ``sft``.
        tried: the learning rate that the folder is of.
        folder: holds ``stage.json`` and the adapter.
        key: digest of everything that the stage depends on.

    Raises:
        RunFolderError: the result is of something else.
    """
    from safetensors.torch import load_file

    known = read_json(folder / "stage.json")
    if known["key"] != key:
        raise RunFolderError(
            f"{folder} holds a stage trained with other settings or data. Choose another output folder."
        )
    logger.info("Stage %s at rate %g: reusing %s.", name, tried, folder)
    return StageResult(
        name,
        tried,
        float("nan") if known["dev_loss"] is None else known["dev_loss"],
        known["steps"],
        known["seconds"],
        folder,
        key,
        load_file(folder / "adapter_model.safetensors"),
        known["history"],
    )


def run_stage(
    model: PeftModel,
    tokenizer: Any,
    config: AdaptConfig,
    settings: AlignConfig | SftConfig,
    rows: tuple[AnswerDataset, AnswerDataset],
    name: str,
    rate: float,
    tried: float,
    folder: Path,
    key: str,
) -> StageResult:
    """Train from the model's present weights, and leave the result in ``folder``.

    Args:
        model: a PEFT model; trained in place.
        tokenizer: of the base model.
        config: settings that all stages share.
        settings: of this stage; their class says which trainer it is.
        rows: training and dev rows.
        name: ``align`` or ``sft``.
        rate: learning rate.
        tried: the rate of the recipe that this is part of.
        folder: written whole, at the end; checkpoints lie beside it meanwhile.
        key: digest of everything that the stage depends on.
    """
    # heavy imports are left until something is trained
    from ia2.trainer import AlignTrainer, ExampleTrainer, SftTrainer, StageSettings

    train, dev = rows
    partial = folder.with_name(f".{folder.name}.{key}")
    stage = StageSettings(
        output_dir=partial,
        learning_rate=rate,
        epochs=settings.epochs,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        eval_every=settings.eval_every,
        patience=settings.patience,
        restore_best=settings.restore_best,
        seed=config.seed,
        checkpoint_every=config.checkpoint_every,
        activation_checkpointing=config.activation_checkpointing,
        activation_checkpointing_kwargs=config.activation_checkpointing_kwargs or {},
        report_to=config.report_to,
    )
    steps = settings.epochs * -(-len(train) // min(config.batch_size, len(train)))
    began = time.perf_counter()
    with progress(f"{name} (rate {rate:g}, at most {steps} steps)", steps) as bar:
        trainer: ExampleTrainer
        if isinstance(settings, AlignConfig):
            trainer = AlignTrainer(
                model,
                train,
                dev,
                stage,
                tokenizer,
                objective=settings.objective,
                temperature=settings.temperature,
                attention_modules=config.attention_modules,
                progress=bar,
            )
        else:
            trainer = SftTrainer(model, train, dev, stage, tokenizer, bar)
        with space_needed(folder):  # for checkpoints
            dev_loss = trainer.fit()
    seconds = time.perf_counter() - began
    steps, best_step = trainer.state.global_step, trainer.best.step
    history = [
        {k: v for k, v in entry.items() if k in ("step", "epoch", "loss", "eval_loss")}
        for entry in trainer.state.log_history
        if "loss" in entry or "eval_loss" in entry
    ]
    if is_first():
        with atomic_dir(folder) as temporary:
            model.save_pretrained(str(temporary))
            (temporary / "README.md").unlink(missing_ok=True)
            write_json(
                temporary / "stage.json",
                {
                    "stage": name,
                    "key": key,
                    "learning_rate": rate,
                    "dev_loss": None if dev_loss != dev_loss else dev_loss,
                    "best_step": best_step,
                    "steps": steps,
                    "seconds": seconds,
                    "history": history,
                },
            )
        shutil.rmtree(partial, ignore_errors=True)
    wait()
    logger.info(
        "Stage %s at rate %g: %d steps, best dev loss %.4g at step %d, %.1f s.",
        name,
        rate,
        steps,
        dev_loss,
        best_step,
        seconds,
    )
    return StageResult(name, tried, dev_loss, steps, seconds, folder, key, adapter_state(model), history)
