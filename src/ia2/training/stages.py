"""Training stages: what a recipe does one after the other, and a folder for each stage's result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ia2.adapters.types import default_learning_rate
from ia2.config import AdaptConfig
from ia2.config.recipes import ALIGN, CONSTANT, JOINT, LABELLED, RECIPES, SFT, UNLABELLED
from ia2.config.sections import (
    JointConfig,
    SftConfig,
    StageSection,
    TaughtConfig,
)
from ia2.utils.errors import ConfigError
from ia2.utils.files import digest

if TYPE_CHECKING:
    import torch


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
    stages: list[PlannedStage] = []
    for entry in _schedule(recipe, config):
        kind, settings = entry["stage"], config.stage_settings(entry)
        changed = settings != getattr(config, kind)
        label = f"{kind}~{digest(settings.model_dump())[:6]}" if changed else kind
        if config.learning_rates is None and settings.learning_rate is None and kind != CONSTANT:
            usual = default_learning_rate(config.adapter) * _share_of_rate(kind, first=not stages)
            settings = settings.model_copy(update={"learning_rate": usual})
        stages.append(PlannedStage(kind, settings, label, _rows_of(recipe, kind, settings, config)))
    return stages


def _share_of_rate(kind: str, *, first: bool) -> float:
    """Of the adapter type's rate: what a stage takes where none is given (docs/choices.md, rates)."""
    if kind == SFT:
        return 0.3 if first else 0.1
    return 1.0 if kind == ALIGN else 0.3


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
    """Where the last of these stages lies below its run's folder and variant.

    A rate or β that neither it nor a stage before it depends on is no part of the place: otherwise the
    same stage would be trained for each. ``alone``: the run has one recipe, whose stages are simply named.
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

    @classmethod
    def of(
        cls, record: Mapping[str, Any], tried: float, folder: Path, state: dict[str, torch.Tensor]
    ) -> StageResult:
        """The result that ``stage.json`` tells of, with the weights beside it."""
        dev, selection = (
            math.nan if record[key] is None else record[key] for key in ("dev_loss", "selection_loss")
        )
        return cls(
            record["stage"],
            tried,
            dev,
            **{key: record[key] for key in ("steps", "seconds", "key", "history", "beta")},
            folder=folder,
            state=state,
            selection_loss=selection,
            diverged=record["diverged_step"],
        )


@dataclass
class TrainedRecipe:
    """A recipe's chosen adapter, and what each learning rate (and β) came to.

    Attributes:
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
