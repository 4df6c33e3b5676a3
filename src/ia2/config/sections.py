"""Settings of one thing each: what is trained, and the stages that train it.

:mod:`ia2.config` puts them together into what a command or function takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from ia2.config.recipes import ADAPTER_NAMES, OBJECTIVE_NAMES
from ia2.utils.errors import suggest

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""What numpy, and with it ``transformers.set_seed``, takes as a seed."""

MAX_SEEDS = 10_000
"""Of one comparison or grid."""

Rate = Annotated[float, Field(gt=0)]

RowKind = Literal["labelled", "unlabelled", "both"]
"""Which rows a stage trains on."""

# Of the joint stage.
_ANSWER_WEIGHT = 0.3


def _share(value: float) -> float:
    if not 0 < value < 1:
        raise ValueError("β must lie between 0 and 1; for 0 or 1 take the recipes ia2 and sft")
    return value


Share = Annotated[float, AfterValidator(_share)]

MAX_EPOCHS = 50
"""Of a stage that held-out rows stop."""

Width = Annotated[int, Field(ge=1, le=2**16)]
"""Of what an adapter adds to a model; more than any layer is wide."""


class Section(BaseModel):
    """Keys and values of a YAML file; unknown keys are refused, and so are numbers without end."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    @field_validator("*", mode="wrap")
    @classmethod
    def _countable(cls, raw: Any, validated: ValidatorFunctionWrapHandler) -> Any:
        """Every number is finite, also inside mappings that are handed on as they are, and can be counted."""
        value = validated(raw)
        pairs = [(raw, value)]
        if isinstance(raw, (list, tuple)) and isinstance(value, (list, tuple)):
            pairs = list(zip(raw, value, strict=False))
        for given, number in pairs:
            if isinstance(given, bool) and type(number) in (int, float):
                raise ValueError(
                    f"{str(given).lower()} is no number (yes, no, on and off mean true and false)"
                )
        for place, number in _numbers(value):
            if not -(2**63) <= number < 2**63:  # nor is nan
                fault = "too large" if math.isfinite(number) else "not a finite number"
                raise ValueError(f"{number} is {fault}" + (f" (at {place})" if place else ""))
        return value


def _numbers(value: Any, place: str = "") -> Iterator[tuple[str, int | float]]:
    """Every whole number, and every other that is not finite, with its place inside ``value``."""
    if isinstance(value, int) or (isinstance(value, float) and not math.isfinite(value)):
        yield place, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{place}.{key}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            yield from _numbers(inner, f"{place}[{number}]")


def one_of(value: str, known: Sequence[str]) -> str:
    """``value``, if it is among the ``known``; else a ValueError with a suggestion."""
    if value not in known:
        raise ValueError(f"'{value}' is not one of {', '.join(known)}.{suggest(value, known)}")
    return value


AdapterName = Annotated[str, AfterValidator(lambda value: one_of(value, ADAPTER_NAMES))]
ObjectiveName = Annotated[str, AfterValidator(lambda value: one_of(value, OBJECTIVE_NAMES))]


class AdapterConfig(Section):
    """What is trained. A setting left open takes the type's own default (``ia2.adapters.types.ADAPTERS``)."""

    type: AdapterName = Field(
        "lora",
        description=f"Adapter type: {', '.join(ADAPTER_NAMES)} (every weight), unless `peft` is given.",
    )
    rank: Width | None = Field(None, description="Rank r of lora, rslora, dora (8) and vera (256).")
    alpha: float | None = Field(
        None, gt=0, description="Alpha of lora, rslora and dora (8); the update is scaled by alpha/r."
    )
    dropout: float | None = Field(None, ge=0, lt=1, description="Dropout of lora, rslora, dora, vera (0).")
    bias: bool | None = Field(
        None, description="Lora and rslora add a vector to each output too (no; the stage constant sets it)."
    )
    target_modules: list[str] | None = Field(
        None,
        description="Modules to adapt; by default the query, key and output projections (bottleneck: the "
        "output projections of attention and MLP).",
    )
    virtual_tokens: Width | None = Field(
        None, description="Virtual tokens of prefix, prompt and p-tuning (16)."
    )
    bottleneck_size: Width | None = Field(None, description="Width of bottleneck adapters (16).")
    placement: Literal["houlsby", "pfeiffer"] | None = Field(
        None, description="Bottleneck adapters after attention and MLP (houlsby) or after the MLP (pfeiffer)."
    )
    peft: dict[str, Any] | None = Field(
        None, description="Any PEFT configuration as it stands in an adapter_config.json."
    )


class StageConfig(Section):
    """One training stage."""

    # Without held-out rows nothing says when to stop: so many optimiser steps, and epochs at least.
    usual_steps: ClassVar[int] = 60
    least_epochs: ClassVar[int] = 1

    epochs: int | None = Field(
        None,
        ge=1,
        description="Epochs at most; by default 50, and with the selection last as many as take about 60 "
        "steps (the supervised stage: 30, and 3 epochs at least).",
    )
    learning_rate: Rate | None = Field(
        None,
        description="This stage's own rate; by default the one being tried, and where none is given the "
        "adapter type's, of which fine-tuning takes 0.3 (after another stage 0.1), joint and soft 0.3.",
    )
    eval_every: int | None = Field(
        None,
        ge=1,
        description="Optimiser steps between dev evaluations, besides each epoch's end; by default up to "
        "four an epoch, that cost at most a quarter of training.",
    )
    patience: int = Field(
        5,
        ge=1,
        description="Stop after this many dev evaluations without improvement (after two at least where they "
        "are seldom).",
    )
    restore_best: bool = Field(
        True, description="End with the weights of the best dev loss (false: with the last ones)."
    )

    def length(self, per_epoch: int, selection: str) -> int:
        """Epochs at most, of so many optimiser steps each, under a selection of :class:`AdaptConfig`."""
        if self.epochs is not None:
            return self.epochs
        if selection != "last":
            return MAX_EPOCHS
        return max(self.least_epochs, -(-self.usual_steps // per_epoch))


class TaughtConfig(Section):
    """What learns from the teacher: the base model with the context in its prompt."""

    rows: RowKind | None = Field(
        None,
        description="What is learnt from the teacher on: unlabelled rows (all training examples are their "
        "context), labelled ones (the others are), or both; by default unlabelled ones, where there are any.",
    )
    only_correct: bool = Field(
        False, description="Only examples that the teacher answers rightly (dev rows too)."
    )


class TeacherStageConfig(TaughtConfig, StageConfig):
    """A stage that is trained on what the teacher gives."""


class ConstantConfig(TaughtConfig):
    """The control of alignment: to each layer the mean of what the context adds, for every query the same.

    It is computed, not trained, and has no rate or epochs.
    """

    epochs: ClassVar[int] = 1
    learning_rate: ClassVar[float | None] = None

    def length(self, per_epoch: int, selection: str) -> int:
        """One epoch."""
        return self.epochs

    eval_every: ClassVar[int | None] = None
    patience: ClassVar[int] = 1
    restore_best: ClassVar[bool] = True


class AlignConfig(TeacherStageConfig):
    """The IA2 stage."""

    objective: ObjectiveName = Field(
        "mse",
        description="Alignment objective: mse, kl or cosine of attention outputs; heads (before the output "
        "projection), residual (the residual stream), attention (weights over the query's own tokens).",
    )
    temperature: float = Field(1.0, gt=0, description="Temperature of the kl objective.")
    normalise: bool = Field(False, description="Divide each layer's loss by the mean square of its targets.")
    layers: str | list[int] = Field(
        "all",
        description="Layers that are aligned: all, a list (0,5,6), a glob over module names, first-third, "
        "middle-third, last-third, or top-K: the K that change most under ICL.",
    )

    @model_validator(mode="after")
    def _scaled(self) -> AlignConfig:
        if self.normalise and self.objective == "attention":
            raise ValueError(
                "normalise does nothing to attention weights, which have no scale. Leave it out, or choose "
                "another objective"
            )
        return self


class SftConfig(TeacherStageConfig):
    """The supervised stage."""

    usual_steps: ClassVar[int] = 30
    least_epochs: ClassVar[int] = 3

    rows: RowKind | None = Field(
        None, description="labelled rows (the default), unlabelled ones with the teacher's answers, or both."
    )
    answers: Literal["ground_truth", "icl_responses"] = Field(
        "ground_truth", description="Train on the true answers, or on the teacher's own."
    )
    ia2_weight: float = Field(
        0.0, ge=0, description="Keep the alignment loss beside cross-entropy, with this weight at first."
    )
    ia2_decay_epochs: int | None = Field(
        None, ge=1, description="Epochs over which that weight falls to zero; by default all of the stage."
    )

    @model_validator(mode="after")
    def _effective(self) -> SftConfig:
        if self.only_correct and self.answers == "ground_truth" and not self.ia2_weight:
            raise ValueError(
                "only_correct does nothing to fine-tuning on true answers. Set answers to icl_responses, or "
                "ia2_weight above 0, or leave it out"
            )
        if self.ia2_decay_epochs and not self.ia2_weight:
            raise ValueError("ia2_decay_epochs does nothing without ia2_weight. Set that above 0")
        return self


class JointConfig(AlignConfig):
    """The joint stage of ia2+sft: alignment and cross-entropy in each step.

    Alignment is divided by its first value, and so needs no other weight from model to model.
    """

    rows: RowKind | None = Field(
        None,
        description="Rows that are aligned on, unlabelled ones by default, where there are any; "
        "cross-entropy is on labelled rows.",
    )
    answer_weight: float = Field(
        _ANSWER_WEIGHT,
        gt=0,
        description="Weight of cross-entropy beside alignment, which is divided by its first value.",
    )
    betas: list[Share] | None = Field(
        None,
        min_length=1,
        description="Instead, as the paper: (1 − β)·alignment + β·cross-entropy as they are, for values of β "
        "to try; the best is chosen by cross-entropy on dev.",
    )
    answers: Literal["ground_truth", "icl_responses"] | None = Field(
        None,
        description="Answers of the cross-entropy: the true ones, or the teacher's (by default with betas, "
        "where both losses are on the same rows).",
    )

    @model_validator(mode="after")
    def _one_weight(self) -> JointConfig:
        if self.betas and self.answer_weight != _ANSWER_WEIGHT:
            raise ValueError("answer_weight does nothing beside betas. Leave one of them out")
        return self


class SoftConfig(TeacherStageConfig):
    """The distillation stage of soft-sft."""

    top_k: int | None = Field(
        None, ge=1, description="Keep the teacher's k most probable tokens; by default the whole vocabulary."
    )
    remainder: Literal["drop", "spread"] | None = Field(
        None, description="Mass outside the top k: dropped, or spread evenly over the rest (drop)."
    )

    @model_validator(mode="after")
    def _effective(self) -> SoftConfig:
        if self.remainder and self.top_k is None:
            raise ValueError(
                "remainder does nothing without top_k, which leaves none. Set top_k, or leave it out"
            )
        return self


StageSection = StageConfig | ConstantConfig

SECTIONS: dict[str, type[StageConfig] | type[ConstantConfig]] = {
    "align": AlignConfig,
    "sft": SftConfig,
    "joint": JointConfig,
    "soft": SoftConfig,
    "constant": ConstantConfig,
}
"""Stage kind → its settings. A recipe is a list of these kinds (:mod:`ia2.config.recipes`)."""
