"""All settings, each defined once: the command line's options and the YAML keys are made from here.

Unknown keys are refused with a suggestion. ``AdaptConfig`` is what the Python function
:func:`ia2.adapt` takes; the commands add where model, data and results are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ia2.errors import ConfigError, DataError, suggest
from ia2.recipes import RECIPES

RECIPE_NAMES = tuple(RECIPES)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class AdapterConfig(_Section):
    """What is trained."""

    type: str = Field("lora", description="Adapter type (lora), unless `peft` is given.")
    rank: int = Field(8, ge=1, description="LoRA rank r.")
    alpha: float = Field(8, gt=0, description="LoRA alpha; the update is scaled by alpha/r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="LoRA dropout.")
    target_modules: list[str] | None = Field(
        None, description="Modules to adapt; by default the query, key and output projections."
    )
    peft: dict[str, Any] | None = Field(
        None, description="Any PEFT configuration as it stands in an adapter_config.json."
    )


class StageConfig(_Section):
    """One training stage."""

    epochs: int = Field(50, ge=1, description="Epochs at most.")
    learning_rate: float | None = Field(
        None, gt=0, description="This stage's own rate; by default the one being tried."
    )
    eval_every: int | None = Field(
        None,
        ge=1,
        description="Optimiser steps between dev evaluations; by default four an epoch, at least two "
        "steps apart.",
    )
    patience: int = Field(5, ge=1, description="Stop after this many dev evaluations without improvement.")
    restore_best: bool = Field(
        True, description="End with the weights of the best dev loss (false: with the last ones)."
    )


class AlignConfig(StageConfig):
    """The IA2 stage."""

    objective: Literal["mse", "kl", "cosine"] = Field("mse", description="Alignment objective.")
    temperature: float = Field(1.0, gt=0, description="Temperature of the kl objective.")


class SftConfig(StageConfig):
    """The supervised stage."""


class AdaptConfig(_Section):
    """How examples become an adapter."""

    recipe: str = Field("ia2-sft", description="sft, ia2, or ia2-sft (align, then fine-tune).")
    seed: int = Field(0, ge=0, description="Seed of the draw, the orders, the initial weights.")
    num_examples: int | None = Field(
        None,
        description="Train on N rows drawn from the data, with N/2 more as dev. By default all rows are "
        "used: two thirds train, one third dev.",
    )
    balanced: bool = Field(False, description="Draw the same number of rows of each answer.")
    task: Literal["auto", "classification", "generation"] = Field(
        "auto", description="Whether answers are labels of a fixed set, or free text."
    )
    labels: list[str] | None = Field(
        None,
        description="The label set, as completions; by default the distinct completions in the data.",
    )
    parser: str = Field(
        "text",
        description="How a free-form answer is read: text, first-line, last-number, hash, boxed, or "
        "module:function.",
    )
    separator: str = Field("\n\n", description="Text between demonstrations.")
    demo_permutations: int = Field(
        1, ge=1, description="Random demonstration orders of each example in the teacher pass."
    )
    permutation_targets: Literal["mean", "sample"] = Field(
        "mean", description="With several orders: average their activations, or draw one an epoch."
    )
    max_context_tokens: int | None = Field(
        None, ge=8, description="Use at most this much of the model's context window."
    )
    max_answer_tokens: int | None = Field(
        None,
        ge=1,
        description="Longest answer; by default 1 for one-token labels, 200 for free text.",
    )
    learning_rates: list[float] = Field(
        [1e-3], min_length=1, description="Rates to try; the best is chosen by dev loss."
    )
    batch_size: int = Field(4, ge=1, description="Examples of one optimiser step, over all processes.")
    micro_batch_size: int | None = Field(
        None, ge=1, description="Examples of one forward pass; smaller saves memory."
    )
    targets: Literal["auto", "store", "memory", "online"] = Field(
        "auto",
        description="Keep the teacher's activations on disk, in memory, or recompute them each step.",
    )
    attention_modules: str | None = Field(
        None, description="Glob over module names, for models whose attention is not recognised."
    )
    activation_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass to save memory."
    )
    activation_checkpointing_kwargs: dict[str, Any] | None = Field(
        None, description="Passed on to the model's activation checkpointing."
    )
    checkpoint_every: int = Field(
        100, ge=1, description="Optimiser steps between checkpoints inside a stage."
    )
    report_to: list[str] = Field([], description="Trackers of transformers.Trainer, such as tensorboard.")
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    align: AlignConfig = Field(default_factory=AlignConfig)
    sft: SftConfig = Field(default_factory=SftConfig)

    @field_validator("recipe")
    @classmethod
    def _known_recipe(cls, value: str) -> str:
        if value not in RECIPE_NAMES:
            raise ValueError(
                f"'{value}' is not one of {', '.join(RECIPE_NAMES)}.{suggest(value, RECIPE_NAMES)}"
            )
        return value

    @field_validator("learning_rates")
    @classmethod
    def _positive(cls, value: list[float]) -> list[float]:
        if any(rate <= 0 for rate in value):
            raise ValueError("learning rates must be positive")
        return value

    @model_validator(mode="after")
    def _possible(self) -> AdaptConfig:
        if (self.activation_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(REENTRANT)
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}"
            )
        if self.targets == "online" and self.permutation_targets == "mean" and self.demo_permutations > 1:
            raise ValueError(
                "targets averaged over several demonstration orders cannot be computed online. Set "
                "permutation_targets to sample, or targets to store"
            )
        return self


REENTRANT = (
    "use_reentrant=True is not possible: captured activations would carry no gradient. "
    "Leave it out, or set it to false"
)


class ModelOptions(_Section):
    """Which model, and where it runs."""

    model: str = Field(
        "demo",
        description="Hub id, local folder, .gguf file, or demo / demo-gemma (packaged models).",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Weights' type; auto is bfloat16 on an accelerator, float32 on a CPU."
    )
    device: str | None = Field(
        None, description="cpu, cuda, cuda:1, mps; by default an accelerator if there is one."
    )
    revision: str | None = Field(None, description="Hub branch, tag or commit of the model.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")


class DataOptions(_Section):
    """Where rows come from and how they are read."""

    data: str | None = Field(
        None,
        description="JSONL, CSV or Parquet file, a folder in hub layout, or a hub data set id.",
    )
    test_data: str | None = Field(None, description="Labelled rows to evaluate on, read the same way.")
    split: str | None = Field(None, description="Split of a hub data set or folder.")
    test_split: str | None = Field(None, description="Split of the test data.")
    data_config: str | None = Field(None, description="Configuration (subset) of a hub data set.")
    prompt_template: str | None = Field(
        None, description=r"For example 'Text: {text}\nLabel:'; by default the column `prompt`."
    )
    completion_template: str | None = Field(
        None, description="For example ' {label}'; by default the column `completion`."
    )
    label_map: dict[str, str] | None = Field(
        None, description="Texts for raw labels: 0=negative,1=positive, or a JSON object."
    )


class TrainConfig(AdaptConfig, ModelOptions, DataOptions):
    """Everything that `ia2 train` needs."""

    output_dir: str | None = Field(None, description="Folder for the adapter, its model card and metrics.")


class CompareConfig(AdaptConfig, ModelOptions, DataOptions):
    """Everything that `ia2 compare` needs."""

    recipes: list[str] = Field(
        ["base", "icl", "sft", "ia2", "ia2-sft"], min_length=1, description="Recipes to compare."
    )
    seeds: int = Field(3, ge=1, description="Number of repetitions, with seeds seed, seed + 1, …")
    folds: int = Field(3, ge=2, description="Cross-fitting folds when no test data is given.")
    max_test: int | None = Field(None, ge=1, description="Evaluate on at most this many test rows.")
    output_dir: str | None = Field(None, description="Folder for results and adapters.")

    @field_validator("recipes")
    @classmethod
    def _known_recipes(cls, value: list[str]) -> list[str]:
        for recipe in value:
            if recipe not in RECIPE_NAMES:
                raise ValueError(
                    f"'{recipe}' is not one of {', '.join(RECIPE_NAMES)}.{suggest(recipe, RECIPE_NAMES)}"
                )
        if len(set(value)) < len(value):
            raise ValueError("a recipe is named twice")
        return value


class ProbeConfig(AdaptConfig, ModelOptions, DataOptions):
    """Everything that `ia2 probe` needs."""

    max_queries: int = Field(32, ge=2, description="Probe on at most this many rows.")


def load_config(kind: type[_Section], file: str | Path | None, flags: Mapping[str, Any]) -> Any:
    """A validated configuration from a YAML file and flags; flags win.

    Args:
        kind: the configuration class.
        file: YAML file with (some of) its keys, or None.
        flags: values given on the command line; None means not given. Dotted names reach sections.

    Raises:
        DataError: the file is missing.
        ConfigError: it is no mapping, has an unknown key, or a value is not allowed. One line.
    """
    values: dict[str, Any] = {}
    if file is not None:
        values = _read_yaml(Path(file))
    for name, value in flags.items():
        if value is not None:
            _assign(values, name, value, f"{file}: " if file is not None else "")
    return validate(kind, values, str(file) if file is not None else None)


def validate(kind: type[_Section], values: Mapping[str, Any], where: str | None = None) -> Any:
    """``kind(**values)`` with one-line errors.

    Raises:
        ConfigError: an unknown key (with a suggestion) or a value that is not allowed.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        lines = [_describe(kind, problem) for problem in error.errors()]
        prefix = f"{where}: " if where else ""
        message = prefix + "; ".join(lines)
        raise ConfigError(message if message.endswith("?") else message + ".") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}).") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if values is None:  # nothing but comments
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(values).__name__}.")
    return values


def _assign(values: dict[str, Any], name: str, value: Any, prefix: str) -> None:
    *sections, leaf = name.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{prefix}{section}: expected keys and values, found {type(inner).__name__}.")
        values = inner
    values[leaf] = value


def _describe(kind: type[_Section], problem: Any) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        section: type[pydantic.BaseModel] = kind
        for part in problem["loc"][:-1]:
            annotation = section.model_fields[str(part)].annotation
            if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
                section = annotation
        return f"unknown key '{place}'.{suggest(str(problem['loc'][-1]), list(section.model_fields))}".rstrip(
            "."
        )
    message = problem["msg"].removeprefix("Value error, ").rstrip(".")
    message = message[:1].lower() + message[1:] if problem["type"] != "value_error" else message
    return f"{place}: {message}" if place else message
