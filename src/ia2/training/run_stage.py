"""One stage is trained into one folder, or found there."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia2.adapters.weights import adapter_state, read_adapter_state, save_adapter
from ia2.config import AdaptConfig
from ia2.config.recipes import ALIGN, CONSTANT
from ia2.config.sections import AlignConfig, JointConfig, SftConfig, SoftConfig
from ia2.training.objectives import OBJECTIVES
from ia2.training.stages import PlannedStage, StageResult
from ia2.utils.distributed import is_first, wait
from ia2.utils.errors import ConfigError, RunFolderError
from ia2.utils.files import atomic_dir, read_json, space_needed, write_json
from ia2.utils.logging import logger, progress
from ia2.utils.manifest import check_tree

if TYPE_CHECKING:
    from ia2.training.dataset import AnswerDataset
    from ia2.training.losses import Loss


def check_trackers(names: Sequence[str]) -> None:
    """Raise a ConfigError if transformers does not know a tracker, or its package is not installed."""
    if not names:  # the import takes a second
        return
    from transformers.integrations import get_available_reporting_integrations

    known = ["all", "none", *get_available_reporting_integrations()]
    for name in names:
        if name not in known:
            raise ConfigError(f"report_to: '{name}' is not installed. There are {', '.join(known)}.")


@dataclass
class StageJob:
    """A stage that is to be trained.

    Attributes:
        stage: what it is.
        rate: learning rate.
        tried: the rate of the recipe that this is part of.
        beta: of the joint stage.
        rows: training and dev rows.
        folder: written whole, at the end; checkpoints lie beside it meanwhile.
        key: digest of everything that the stage depends on.
        align: how alignment is measured, where the stage aligns; its layers are ``all`` or indices.
        selection_rows: dev rows with true answers, by whose cross-entropy the joint stage is selected.
    """

    stage: PlannedStage
    rate: float
    tried: float
    beta: float | None
    rows: tuple[AnswerDataset, AnswerDataset]
    folder: Path
    key: str
    align: AlignConfig | None = None
    selection_rows: AnswerDataset | None = None


def finished_stage(name: str, tried: float, folder: Path, key: str) -> StageResult:
    """The result of a stage that lies in ``folder``.

    Raises:
        RunFolderError: the result is of something else, or damaged.
    """
    mend = f"Delete {folder} and run the same command again."
    check_tree(folder, mend)
    record = read_json(folder / "stage.json", mend)
    if record["key"] != key:
        raise RunFolderError(
            f"{folder} holds a stage trained with other settings or data. Choose another output folder."
        )
    if is_first():  # what a start left that was killed right after it had finished the stage
        shutil.rmtree(_partial(folder, key), ignore_errors=True)
    diverged = record["diverged_step"]
    if diverged is None:
        logger.info("Stage %s at rate %g: reusing %s.", name, tried, folder)
        return StageResult.of(record, tried, folder, read_adapter_state(folder, mend))
    rate = record["learning_rate"]
    logger.warning("Stage %s at rate %g: it diverged at step %d before.", name, rate, diverged)
    return StageResult.of(record, tried, folder, {})


def run_stage(model: Any, tokenizer: Any, config: AdaptConfig, job: StageJob) -> StageResult:
    """Train a PEFT model in place from its present weights, and leave the result in the job's folder."""
    # heavy imports are left until something is trained
    from ia2.models.capture import eager_attention
    from ia2.training.constant import ConstantTrainer
    from ia2.training.losses import AnswerLoss
    from ia2.training.trainer import AlignTrainer, ExampleTrainer

    settings, (train, dev) = job.stage.settings, job.rows
    partial = _partial(job.folder, job.key)
    name = job.stage.kind
    what = f"rate {job.rate:g}" + ("" if job.beta is None else f", β {job.beta:g}")
    per_epoch = _steps_per_epoch(config, job)
    most = settings.length(per_epoch, config.selection) * per_epoch
    weights = job.align is not None and OBJECTIVES[job.align.objective].site == "weights"
    with (
        progress(f"{name} ({what}, at most {most} steps)", most) as bar,
        eager_attention(model) if weights else nullcontext(),
    ):
        options: Any = {"config": config, "output_dir": partial, "learning_rate": job.rate, "progress": bar}
        if name == ALIGN:
            trainer: Any = AlignTrainer(model, train, dev, tokenizer, align=job.align, **options)
        else:
            make = ConstantTrainer if name == CONSTANT else ExampleTrainer
            loss = stage_loss(model, config, job)
            trainer = make(model, loss, train, dev, tokenizer, stage=settings, **options)
        with space_needed(job.folder):  # for checkpoints
            dev_loss = trainer.fit()
        seconds, diverged = trainer.seconds, trainer.best.diverged
        selection_loss = dev_loss
        if job.selection_rows and diverged is None:  # comparable over β and other weights
            selection_loss = trainer.everywhere(trainer.mean_loss(AnswerLoss(), job.selection_rows))
    steps, best_step = trainer.state.global_step, trainer.best.step
    if diverged is None and job.selection_rows and not math.isfinite(selection_loss):
        diverged, dev_loss = steps, math.nan
    record = {
        "stage": name,
        "key": job.key,
        "learning_rate": job.rate,
        "beta": job.beta,
        "dev_loss": dev_loss if math.isfinite(dev_loss) else None,
        "selection_loss": selection_loss if math.isfinite(selection_loss) else None,
        "diverged": diverged is not None,
        "diverged_step": diverged,
        "best_step": best_step,
        "steps": steps,
        "seconds": seconds,
        "history": [
            {key: entry[key] for key in ("step", "epoch", "loss", "eval_loss") if key in entry}
            for entry in trainer.state.log_history
            if "loss" in entry or "eval_loss" in entry
        ],
    }
    if job.align is not None and job.align.layers != "all":
        record["layers"] = job.align.layers
    if is_first():
        with atomic_dir(job.folder) as temporary:
            if diverged is None:
                save_adapter(model, temporary)
            write_json(temporary / "stage.json", record)
        shutil.rmtree(partial, ignore_errors=True)
    wait()
    if diverged is not None:
        logger.warning("Stage %s at %s: diverged at step %d: the loss is not finite.", name, what, diverged)
    else:
        best = f", best dev loss {dev_loss:.4g} at step {best_step}" if math.isfinite(dev_loss) else ""
        logger.info("Stage %s at %s: %d steps%s, %.1f s.", name, what, steps, best, seconds)
    return StageResult.of(record, job.tried, job.folder, adapter_state(model) if diverged is None else {})


def _partial(folder: Path, key: str) -> Path:
    """Where checkpoints of an unfinished stage lie."""
    return folder.with_name(f".{folder.name}.{key}")


def _steps_per_epoch(config: AdaptConfig, job: StageJob) -> int:
    """Optimiser steps."""
    rows = len(job.rows[0])
    return -(-rows // min(config.batch_size, rows))


def stage_loss(model: Any, config: AdaptConfig, job: StageJob) -> Loss:
    """What a stage minimises."""
    from ia2.training.losses import AlignmentLoss, AnswerLoss, JointLoss, SoftLoss

    settings = job.stage.settings
    if isinstance(settings, SoftConfig):
        return SoftLoss(model, settings.top_k, settings.remainder or "drop")
    if job.align is None:
        return AnswerLoss()
    targets = job.rows[0].targets
    assert targets is not None
    align = AlignmentLoss(model, job.align, targets, config.attention_modules)
    if isinstance(settings, JointConfig):
        if job.beta is None:
            return JointLoss(align, lambda step: 1.0, settings.answer_weight, relative=True)
        share = job.beta
        return JointLoss(align, lambda step: 1 - share, share)
    if isinstance(settings, SftConfig):
        weight = settings.ia2_weight
        per_epoch = _steps_per_epoch(config, job)
        decay = per_epoch * (settings.ia2_decay_epochs or settings.length(per_epoch, config.selection))
        return JointLoss(align, lambda step: weight * max(0.0, 1 - step / decay), dev_answers=True)
    return align
