"""Training stages: what a recipe does one after the other, and a folder for each stage's result."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ia2.adapters.weights import adapter_state, read_adapter_state, save_adapter
from ia2.config import AdaptConfig
from ia2.config.recipes import ALIGN, CONSTANT, JOINT, LABELLED, RECIPES, SFT, UNLABELLED
from ia2.config.sections import (
    AlignConfig,
    JointConfig,
    SftConfig,
    SoftConfig,
    StageSection,
    TaughtConfig,
)
from ia2.training.objectives import OBJECTIVES
from ia2.utils.distributed import is_first, wait
from ia2.utils.errors import ConfigError, RunFolderError
from ia2.utils.files import atomic_dir, digest, read_json, space_needed, write_json
from ia2.utils.logging import logger, progress
from ia2.utils.manifest import check_tree

if TYPE_CHECKING:
    import torch

    from ia2.training.dataset import AnswerDataset
    from ia2.training.losses import Loss


C = TypeVar("C", bound=AdaptConfig)

# Types of adapters that may have a bias.
_WITH_BIAS = ("lora", "rslora")


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a recipe.

    Attributes:
        kind: ``align``, ``sft``, ``joint``, ``soft`` or ``constant``.
        settings: its section of the configuration, changed where a schedule says so.
        label: names its folder; the kind, with a digest of the changes if there are any.
        rows: kinds of rows that it trains on: ``labelled``, ``unlabelled`` or both.
    """

    kind: str
    settings: StageSection
    label: str
    rows: tuple[str, ...] = (LABELLED,)

    @property
    def teacher_answers(self) -> bool:
        """Whether it needs the teacher's answers ``Ŷ``."""
        if isinstance(self.settings, SftConfig):
            return UNLABELLED in self.rows or self.labelled_answers
        return True

    @property
    def labelled_answers(self) -> bool:
        """Whether it needs those to labelled rows."""
        if isinstance(self.settings, SftConfig):
            return self.answers == "icl_responses" or self.settings.ia2_weight > 0
        return LABELLED in self.rows or self.answers == "icl_responses"

    @property
    def answers(self) -> str | None:
        """Of the cross-entropy: ``ground_truth`` or ``icl_responses``; None of a stage that has none."""
        settings = self.settings
        if isinstance(settings, JointConfig):
            together = bool(settings.betas) and not self.beside
            return settings.answers or ("icl_responses" if together else "ground_truth")
        return settings.answers if isinstance(settings, SftConfig) else None

    @property
    def beside(self) -> bool:
        """Whether cross-entropy is on other rows than alignment: on labelled ones."""
        return self.kind == JOINT and UNLABELLED in self.rows

    @property
    def aligns(self) -> bool:
        """Whether ``L_IA2`` is part of its loss."""
        kept = isinstance(self.settings, SftConfig) and self.settings.ia2_weight > 0
        return self.kind in (ALIGN, JOINT, CONSTANT) or kept

    @property
    def betas(self) -> list[float | None]:
        """Values of β to try; only a joint stage may have them."""
        return list(getattr(self.settings, "betas", None) or [None])


def plan(recipe: str, config: AdaptConfig) -> list[PlannedStage]:
    """The stages of a recipe, built in or of the configuration's own schedules.

    Raises:
        ConfigError: a stage is for unlabelled rows, and there are none, or it cannot use them.
    """
    stages = []
    for entry in _schedule(recipe, config):
        kind, settings = entry["stage"], config.stage_settings(entry)
        changed = settings != getattr(config, kind)
        label = f"{kind}~{digest(settings.model_dump())[:6]}" if changed else kind
        stages.append(PlannedStage(kind, settings, label, _rows_of(recipe, kind, settings, config)))
    return stages


def _schedule(recipe: str, config: AdaptConfig) -> Sequence[Mapping[str, Any]]:
    """The settings of each stage that differ from its section, and its kind."""
    if recipe in RECIPES:
        return RECIPES[recipe].schedule(unlabelled=config.unlabelled is not None)
    return config.schedules[recipe]


def _rows_of(recipe: str, kind: str, settings: StageSection, config: AdaptConfig) -> tuple[str, ...]:
    """Kinds of rows that a stage trains on."""
    assert isinstance(settings, TaughtConfig)
    usual = UNLABELLED if config.unlabelled and kind != SFT else LABELLED
    asked = settings.rows or usual
    rows = (LABELLED, UNLABELLED) if asked == "both" else (asked,)
    where = f"recipe '{recipe}': its stage {kind}"
    if UNLABELLED in rows and not config.unlabelled:
        raise ConfigError(
            f"{where} needs unlabelled rows. Name some with --unlabelled (in a grid: unlabelled, a number)."
        )
    if rows == (UNLABELLED,) and settings.only_correct:
        raise ConfigError(
            f"{where} learns on unlabelled rows, and only labels tell which answers are right. Leave out "
            f"only_correct, or set {kind}.rows to labelled."
        )
    if isinstance(settings, SftConfig) and settings.ia2_weight and rows != (LABELLED,):
        raise ConfigError(
            f"{where} learns on {asked} rows, on which ia2_weight keeps no alignment. Leave one of them out, "
            "or take the stage joint."
        )
    if kind == CONSTANT and (config.adapter.peft is not None or config.adapter.type not in _WITH_BIAS):
        raise ConfigError(
            f"{where} needs an adapter that adds a vector to outputs: {' or '.join(_WITH_BIAS)}. Set "
            "adapter.type to one of them, or leave the recipe out."
        )
    return rows


def fitted(recipe: str, config: C) -> C:
    """The settings, with an adapter in which all stages of a recipe find what they write into."""
    if config.adapter.bias or all(entry["stage"] != CONSTANT for entry in _schedule(recipe, config)):
        return config
    return config.model_copy(update={"adapter": config.adapter.model_copy(update={"bias": True})})


def stage_place(stages: Sequence[PlannedStage], tried: float, beta: float | None, *, alone: bool) -> Path:
    """Where a stage lies below its run's folder and variant.

    A rate or β that neither it nor a stage before it depends on is no part of the place: otherwise the
    same stage would be trained for each.

    Args:
        stages: those up to this one.
        tried: the recipe's rate.
        beta: the recipe's β.
        alone: the run has a single recipe, whose stages are then simply named.
    """
    chain = [stage.label for stage in stages]
    own = [stage.settings.learning_rate for stage in stages if stage.settings.learning_rate is not None]
    if len(own) == len(stages):
        tried = own[-1]
    if all(stage.betas == [None] for stage in stages):
        beta = None
    name = chain[-1] if alone and len(set(chain)) == len(chain) else "-".join(chain)
    return Path(name) / (f"lr-{tried:g}" if beta is None else f"lr-{tried:g}-beta-{beta:g}")


@dataclass
class StageResult:
    """A finished stage: the adapter's weights and how it went.

    Attributes:
        name: its kind.
        learning_rate: the rate tried (a stage's own rate is in its settings).
        dev_loss: the best.
        steps: optimiser steps taken.
        seconds: of training, over all starts.
        key: digest of everything it depends on.
        state: the weights.
        history: losses by step.
        beta: of the joint stage.
        selection_loss: what rates and β are chosen by; the dev loss, but for the joint stage, whose
            losses of different β cannot be compared: there the cross-entropy on dev.
        diverged: steps after which loss or weights were not finite, which leaves no weights; None: they were.
    """

    name: str
    learning_rate: float
    dev_loss: float
    steps: int
    seconds: float
    folder: Path
    key: str
    state: dict[str, torch.Tensor]
    history: list[dict[str, Any]]
    beta: float | None = None
    selection_loss: float = float("nan")
    diverged: int | None = None


@dataclass
class TrainedRecipe:
    """A recipe's chosen adapter, and what each learning rate (and β) came to.

    Attributes:
        recipe: its name.
        stages: at the chosen rate.
        tried: rate (and β) → the loss that it is chosen by; NaN without dev rows, and where it diverged.
        selected_by: what chose.
        diverged: rate (and β) → the stage that diverged, and after how many steps.
        temperatures: fitted on rows that were dev rows in turn; None where they are fitted on dev rows.
    """

    recipe: str
    stages: list[StageResult]
    tried: dict[str, float]
    selected_by: str
    diverged: dict[str, str] = field(default_factory=dict)
    temperatures: dict[str, float] | None = None

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """Weights after the last stage."""
        return self.stages[-1].state

    @property
    def learning_rate(self) -> float:
        """The rate chosen."""
        return self.stages[-1].learning_rate

    @property
    def beta(self) -> float | None:
        """The β chosen, where the recipe has a joint stage."""
        return next((stage.beta for stage in self.stages if stage.beta is not None), None)

    @property
    def seconds(self) -> dict[str, float]:
        """Training seconds of each stage; a kind that comes twice is summed."""
        total: dict[str, float] = {}
        for stage in self.stages:
            total[stage.name] = total.get(stage.name, 0.0) + stage.seconds
        return total


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
    diverged = record["diverged_step"] if record.get("diverged") else None
    if diverged is None:
        logger.info("Stage %s at rate %g: reusing %s.", name, tried, folder)
    else:
        rate = record["learning_rate"]
        logger.warning("Stage %s at rate %g: it diverged at step %d before.", name, rate, diverged)
    losses = [math.nan if record[key] is None else record[key] for key in ("dev_loss", "selection_loss")]
    return StageResult(
        name,
        tried,
        losses[0],
        record["steps"],
        record["seconds"],
        folder,
        key,
        read_adapter_state(folder, mend) if diverged is None else {},
        record["history"],
        record["beta"],
        losses[1],
        diverged,
    )


def run_stage(model: Any, tokenizer: Any, config: AdaptConfig, job: StageJob) -> StageResult:
    """Train a PEFT model in place from its present weights, and leave the result in the job's folder."""
    # heavy imports are left until something is trained
    from ia2.models.capture import eager_attention
    from ia2.training.constant import ConstantTrainer
    from ia2.training.losses import AnswerLoss
    from ia2.training.trainer import AlignTrainer, ExampleTrainer

    settings, (train, dev) = job.stage.settings, job.rows
    partial = job.folder.with_name(f".{job.folder.name}.{job.key}")
    name = job.stage.kind
    what = f"rate {job.rate:g}" + ("" if job.beta is None else f", β {job.beta:g}")
    most = settings.epochs * _steps_per_epoch(config, job)
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
    history = [
        {k: v for k, v in entry.items() if k in ("step", "epoch", "loss", "eval_loss")}
        for entry in trainer.state.log_history
        if "loss" in entry or "eval_loss" in entry
    ]
    if is_first():
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
            "history": history,
        }
        if job.align is not None and job.align.layers != "all":
            record["layers"] = job.align.layers
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
    return StageResult(
        name,
        job.tried,
        dev_loss,
        steps,
        seconds,
        job.folder,
        job.key,
        adapter_state(model) if diverged is None else {},
        history,
        job.beta,
        selection_loss,
        diverged,
    )


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
        decay = _steps_per_epoch(config, job) * (settings.ia2_decay_epochs or settings.epochs)
        return JointLoss(align, lambda step: weight * max(0.0, 1 - step / decay), dev_answers=True)
    return align
