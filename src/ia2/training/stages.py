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
from ia2.config.sections import ConstantConfig, JointConfig, SftConfig, SoftConfig, StageSection, TaughtConfig
from ia2.utils.distributed import is_first, wait
from ia2.utils.errors import ConfigError, RunFolderError
from ia2.utils.files import atomic_dir, digest, read_json, space_needed, write_json
from ia2.utils.logging import logger, progress
from ia2.utils.manifest import check_tree

if TYPE_CHECKING:
    import torch

    from ia2.training.alignment import AlignmentSettings
    from ia2.training.dataset import AnswerDataset
    from ia2.training.trainer import ExampleTrainer
    from ia2.utils.logging import Progress


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
        settings = self.settings
        if isinstance(settings, SftConfig):
            return UNLABELLED in self.rows or self.labelled_answers
        return True

    @property
    def labelled_answers(self) -> bool:
        """Whether it needs those to labelled rows."""
        settings = self.settings
        if isinstance(settings, SftConfig):
            return self.answers == "icl_responses" or settings.ia2_weight > 0
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
        return self.kind in (ALIGN, JOINT, CONSTANT) or (
            isinstance(self.settings, SftConfig) and self.settings.ia2_weight > 0
        )

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
    for given in _schedule(recipe, config):
        kind, settings = given["stage"], config.stage_settings(given)
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
    rows = settings.rows or usual
    found = (LABELLED, UNLABELLED) if rows == "both" else (rows,)
    where = f"recipe '{recipe}': its stage {kind} learns on {rows} rows"
    if UNLABELLED in found and not config.unlabelled:
        raise ConfigError(
            f"recipe '{recipe}': its stage {kind} needs unlabelled rows. Name some with --unlabelled (in a "
            "grid: unlabelled, a number)."
        )
    if found == (UNLABELLED,) and settings.only_correct:
        raise ConfigError(
            f"{where}, and only labels tell which answers are right. Leave out only_correct, or set "
            f"{kind}.rows to labelled."
        )
    if isinstance(settings, SftConfig) and settings.ia2_weight and found != (LABELLED,):
        raise ConfigError(
            f"{where}, on which ia2_weight keeps no alignment. Leave one of them out, or take the stage "
            "joint."
        )
    if kind == CONSTANT and (config.adapter.peft is not None or config.adapter.type not in _WITH_BIAS):
        raise ConfigError(
            f"recipe '{recipe}': its stage constant needs an adapter that adds a vector to outputs: "
            f"{' or '.join(_WITH_BIAS)}. Set adapter.type to one of them, or leave the recipe out."
        )
    return found


def fitted(recipe: str, config: C) -> C:
    """The settings, with an adapter in which all stages of a recipe find what they write into."""
    if config.adapter.bias or all(given["stage"] != CONSTANT for given in _schedule(recipe, config)):
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
        beta: of the joint stage.
        dev_loss: the best.
        selection_loss: what rates and β are chosen by; the dev loss, but for the joint stage, whose
            losses of different β cannot be compared: there the cross-entropy on dev.
        steps: optimiser steps taken.
        seconds: of training, over all starts.
        folder: where it lies.
        key: digest of everything it depends on.
        state: the weights.
        history: losses by step.
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
    """Everything about a stage that is to be trained.

    Attributes:
        stage: what it is.
        rate: learning rate.
        tried: the rate of the recipe that this is part of.
        beta: of the joint stage.
        rows: training and dev rows.
        beside: labelled rows of the cross-entropy, where they are others.
        selection_rows: dev rows with true answers, by whose cross-entropy the joint stage is selected.
        how: how alignment is measured, where the stage aligns.
        folder: written whole, at the end; checkpoints lie beside it meanwhile.
        key: digest of everything that the stage depends on.
    """

    stage: PlannedStage
    rate: float
    tried: float
    beta: float | None
    rows: tuple[AnswerDataset, AnswerDataset]
    folder: Path
    key: str
    how: AlignmentSettings | None = None
    beside: tuple[AnswerDataset, AnswerDataset] | None = None
    selection_rows: AnswerDataset | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def finished_stage(name: str, tried: float, folder: Path, key: str) -> StageResult:
    """The result that lies in ``folder``.

    Args:
        name: the stage's kind.
        tried: the learning rate that the folder is of.
        folder: holds ``stage.json`` and the adapter.
        key: digest of everything that the stage depends on.

    Raises:
        RunFolderError: the result is of something else.
    """
    mend = f"Delete {folder} and run the same command again."
    check_tree(folder, mend)
    known = read_json(folder / "stage.json", mend)
    if known["key"] != key:
        raise RunFolderError(
            f"{folder} holds a stage trained with other settings or data. Choose another output folder."
        )
    diverged = known["diverged_step"] if known.get("diverged") else None
    if diverged is None:
        logger.info("Stage %s at rate %g: reusing %s.", name, tried, folder)
    else:
        rate = known["learning_rate"]
        logger.warning("Stage %s at rate %g: it diverged at step %d before.", name, rate, diverged)
    return StageResult(
        name,
        tried,
        _number(known["dev_loss"]),
        known["steps"],
        known["seconds"],
        folder,
        key,
        read_adapter_state(folder, mend) if diverged is None else {},
        known["history"],
        known["beta"],
        _number(known["selection_loss"]),
        diverged,
    )


def run_stage(model: Any, tokenizer: Any, config: AdaptConfig, job: StageJob) -> StageResult:
    """Train from the model's present weights, and leave the result in the job's folder.

    Args:
        model: a PEFT model; trained in place.
        tokenizer: of the base model.
        config: settings that all stages share.
        job: what is to be done.
    """
    # heavy imports are left until something is trained
    from ia2.models.capture import eager_attention

    settings, (train, _) = job.stage.settings, job.rows
    partial = job.folder.with_name(f".{job.folder.name}.{job.key}")
    steps = settings.epochs * -(-len(train) // min(config.batch_size, len(train)))
    name = job.stage.kind
    what = f"rate {job.rate:g}" + ("" if job.beta is None else f", β {job.beta:g}")
    weights = job.how is not None and job.how.site == "weights"
    with (
        progress(f"{name} ({what}, at most {steps} steps)", steps) as bar,
        eager_attention(model) if weights else nullcontext(),
    ):
        trainer = _trainer(model, tokenizer, config, job, partial, bar)
        with space_needed(job.folder):  # for checkpoints
            dev_loss = trainer.fit()
    seconds = trainer.seconds
    steps, best_step, diverged = trainer.state.global_step, trainer.best.step, trainer.best.diverged
    selection_loss = dev_loss
    if job.selection_rows and diverged is None:
        selection_loss = _cross_entropy(model, tokenizer, config, job, partial)
        if not math.isfinite(selection_loss):
            diverged, dev_loss = steps, float("nan")
    history = [
        {k: v for k, v in entry.items() if k in ("step", "epoch", "loss", "eval_loss")}
        for entry in trainer.state.log_history
        if "loss" in entry or "eval_loss" in entry
    ]
    if is_first():
        with atomic_dir(job.folder) as temporary:
            if diverged is None:
                save_adapter(model, temporary)
            write_json(
                temporary / "stage.json",
                {
                    "stage": name,
                    "key": job.key,
                    "learning_rate": job.rate,
                    "beta": job.beta,
                    "dev_loss": _or_none(dev_loss),
                    "selection_loss": _or_none(selection_loss),
                    "diverged": diverged is not None,
                    "diverged_step": diverged,
                    "best_step": best_step,
                    "steps": steps,
                    "seconds": seconds,
                    "history": history,
                    **job.facts,
                },
            )
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


def _trainer(
    model: Any, tokenizer: Any, config: AdaptConfig, job: StageJob, partial: Path, bar: Progress
) -> ExampleTrainer:
    from ia2.training.trainer import AlignTrainer, MixedTrainer, SftTrainer, SoftTrainer, StageSettings

    settings, (train, dev), how = job.stage.settings, job.rows, job.how
    shared = StageSettings(
        output_dir=partial,
        learning_rate=job.rate,
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
    if job.stage.kind == ALIGN:
        assert how is not None
        return AlignTrainer(
            model,
            train,
            dev,
            shared,
            tokenizer,
            objective=how.objective,
            temperature=how.temperature,
            normalise=how.normalise,
            layers=how.layers,
            attention_modules=how.attention_modules,
            progress=bar,
        )
    if isinstance(settings, ConstantConfig):
        from ia2.training.constant import ConstantTrainer

        assert how is not None
        return ConstantTrainer(
            model, train, dev, shared, tokenizer, attention_modules=how.attention_modules, progress=bar
        )
    if isinstance(settings, JointConfig):
        assert how is not None
        share = 1.0 if job.beta is None else 1 - job.beta
        return MixedTrainer(
            model,
            train,
            dev,
            shared,
            tokenizer,
            how=how,
            align_weight=lambda step: share,
            answer_weight=settings.answer_weight if job.beta is None else job.beta,
            beside=job.beside,
            relative=job.beta is None,
            progress=bar,
        )
    if isinstance(settings, SoftConfig):
        return SoftTrainer(
            model,
            train,
            dev,
            shared,
            tokenizer,
            top_k=settings.top_k,
            remainder=settings.remainder or "drop",
            progress=bar,
        )
    assert isinstance(settings, SftConfig)
    if how is None:
        return SftTrainer(model, train, dev, shared, tokenizer, bar)
    weight = settings.ia2_weight
    per_epoch = -(-len(train) // min(config.batch_size, len(train)))
    decay = per_epoch * (settings.ia2_decay_epochs or settings.epochs)
    return MixedTrainer(
        model,
        train,
        dev,
        shared,
        tokenizer,
        how=how,
        align_weight=lambda step: weight * max(0.0, 1 - step / decay),
        dev="answers",
        progress=bar,
    )


def _cross_entropy(model: Any, tokenizer: Any, config: AdaptConfig, job: StageJob, partial: Path) -> float:
    """Cross-entropy on dev, comparable over β and other weights."""
    from ia2.training.trainer import SftTrainer, StageSettings

    rows = job.selection_rows
    assert rows is not None
    settings = StageSettings(output_dir=partial, micro_batch_size=config.micro_batch_size)
    return float(SftTrainer(model, rows, rows, settings, tokenizer).evaluate()["eval_loss"])


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
