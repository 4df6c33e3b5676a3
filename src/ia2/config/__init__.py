"""All settings, each defined once: the command line's options and the YAML keys are made from here.

``AdaptConfig`` is what :func:`ia2.adapt` takes; the commands add where model, data and results are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from ia2.config.packaged_models import PACKAGED_MODELS
from ia2.config.reading import describe
from ia2.config.recipes import AUTO, METHOD, PLAIN, RECIPES, TRAINED
from ia2.config.sections import (
    MAX_SEEDS,
    SECTIONS,
    AdapterConfig,
    AdapterName,
    AlignConfig,
    ConstantConfig,
    JointConfig,
    ObjectiveName,
    Rate,
    Section,
    Seed,
    SftConfig,
    SoftConfig,
    StageSection,
    one_of,
)

FREE_TEXT_TOKENS = 200  # METHOD: definitions


class AdaptConfig(Section):
    """How examples become an adapter."""

    recipe: str = Field("ia2-sft", description=f"{', '.join(TRAINED)}, or a name under `schedules`.")
    schedules: dict[str, list[dict[str, Any]]] = Field(
        {},
        description="Recipes of one's own: name → list of stages, each with the key `stage` (align, sft, "
        "joint, soft or constant) and any settings of that stage.",
    )
    seed: Seed = Field(0, description="Seed of the draw, the orders, the initial weights.")
    num_examples: int | None = Field(
        None,
        description="Train on N rows drawn from the data, with N/2 more as dev. By default all rows are "
        "used: two thirds train, one third dev.",
    )
    balanced: bool = Field(
        True, description="Draw N evenly over the answers, so that no label is missing; else at random."
    )
    unlabelled: str | None = Field(
        None,
        min_length=1,
        description="Rows of the same task without labels (if there are any, they are not read), named and "
        "read as the data are. Alignment learns on them from the model that is shown all training examples.",
    )
    max_unlabelled: int = Field(
        256,
        ge=2,
        description="Use at most this many unlabelled rows, drawn by the seed; a fifth is held out.",
    )
    selection: Literal["dev", "folds", "average", "last"] = Field(
        "last",
        description="What chooses steps, rate, β and temperature: last, nothing (all rows, the last weights, "
        "one rate); dev, rows that are held out (the default with several rates or β); folds, cross-fitting "
        "over all rows, which are all trained on; average, the mean of the folds' weights.",
    )
    task: Literal["auto", "classification", "generation"] = Field(
        "auto", description="Whether answers are labels of a fixed set, or free text."
    )
    labels: list[str] | None = Field(
        None,
        description="The label set, as completions, in which blanks count; by default the distinct "
        "completions in the data.",
    )
    parser: str = Field(
        "text",
        description="How a free-form answer is read: text, first-line, last-number, hash, boxed, or "
        "module:function.",
    )
    separator: str = Field("\n\n", description="Text between demonstrations.")
    context_text: str | None = Field(
        None, description="A text (a system prompt, say) as the context, instead of demonstrations."
    )
    context_file: str | None = Field(None, description="The same, from a text file.")
    context_column: str | None = Field(
        None,
        description="Column with each row's own context: a text or chat messages (TRL's privileged_context), "
        "or a list of demonstrations, each with prompt and completion.",
    )
    context_function: str | None = Field(
        None,
        description="module:function that makes the context of an example from it and the other training "
        "examples: a text, chat messages, or a list of examples.",
    )
    chat: Literal["off", "turns", "single"] = Field(
        "off",
        description="Prompts through the model's chat template: demonstrations as turns, or all in one user "
        "turn.",
    )
    thinking: bool = Field(False, description="Leave a chat model's thinking switched on.")
    max_demonstrations: int | None = Field(
        None, ge=1, description="At most this many demonstrations a prompt, drawn for each example."
    )
    demo_order: Literal["random", "shared", "balanced", "nearest", "search"] = Field(
        "random",
        description="Which demonstrations come and in what order: random; shared, random too, but contexts "
        "of training examples begin alike, so that this is computed once; balanced over the answers; nearest "
        "to the query by the base model's own embedding, nearest last; search over orders by the likelihood "
        "of each example given the others.",
    )
    icl_demonstrations: Literal["same", "fresh"] = Field(
        "same",
        description="What the recipe icl shows: the same training examples as the others learn from, or (as "
        "the paper) as many drawn afresh for every query from rows that nothing else uses.",
    )
    demo_search_orders: int = Field(8, ge=2, description="Orders that the search tries.")
    context_draws: int = Field(
        1,
        ge=1,
        description="Contexts of each row in the teacher pass: so many random orders of the demonstrations, "
        "or subsets of them where max_demonstrations is set.",
    )
    permutation_targets: Literal["mean", "sample"] = Field(
        "mean", description="With several contexts: average their activations, or draw one an epoch."
    )
    max_context_tokens: int | None = Field(
        None, ge=8, description="Use at most this much of the model's context window."
    )
    max_answer_tokens: int | None = Field(
        None,
        ge=1,
        description=f"Longest answer; by default 1 for one-token labels, {FREE_TEXT_TOKENS} for free text.",
    )
    learning_rates: list[Rate] | None = Field(
        None,
        min_length=1,
        description="Rates of every stage to try; the best is chosen by dev loss. By default each stage has "
        "its own, a share of the adapter type's.",
    )
    batch_size: int = Field(4, ge=1, description="Examples of one optimiser step, over all processes.")
    micro_batch_size: int | None = Field(
        None, ge=1, description="Examples of one forward pass; smaller saves memory."
    )
    targets: Literal["auto", "store", "memory", "online"] = Field(
        "auto", description="Keep the teacher's activations on disk, in memory, or recompute them each step."
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
    joint: JointConfig = Field(default_factory=JointConfig)
    soft: SoftConfig = Field(default_factory=SoftConfig)
    constant: ConstantConfig = Field(default_factory=ConstantConfig)

    @property
    def crosses(self) -> bool:
        """Whether folds of the training rows choose, so that there are no dev rows."""
        return self.selection in ("folds", "average")

    @property
    def drawn(self) -> dict[str, Any]:
        """What :meth:`ia2.Examples.split` is called with, beside the seed."""
        return {"num_examples": self.num_examples, "balanced": self.balanced, "dev": self.selection == "dev"}

    @model_validator(mode="after")
    def _possible(self) -> AdaptConfig:
        self._check_schedules()
        if self.recipe != AUTO:
            self._check_recipe(self.recipe, "recipe")
        if "selection" not in self.model_fields_set and self._chooses:
            self.selection = "dev"
        for wrong, reason in self._contradictions():
            if wrong:
                raise ValueError(reason)
        return self

    @property
    def _chooses(self) -> bool:
        return len(self.learning_rates or ()) > 1 or len(self.joint.betas or ()) > 1

    def _check_recipe(self, recipe: str, place: str) -> None:
        try:
            one_of(recipe, [*RECIPES, *self.schedules])
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None

    def _check_schedules(self) -> None:
        for name, stages in self.schedules.items():
            if name in RECIPES or name == AUTO:
                raise ValueError(f"schedules.{name}: '{name}' is a recipe already. Choose another name")
            if not re.fullmatch(r"[\w.+-]+", name):
                raise ValueError(
                    f"schedules: '{name}' names a folder too; use letters, digits and . + - _ only"
                )
            if not stages:
                raise ValueError(f"schedules.{name}: no stages. Give at least one, such as stage: sft")
            for place, given in enumerate(stages):
                self.stage_settings(given, f"schedules.{name}.{place}")

    def stage_settings(self, given: Mapping[str, Any], where: str = "stage") -> StageSection:
        """Settings of one stage of a schedule: the section of its kind, changed by what is given.

        Raises:
            ValueError: no or an unknown ``stage``, an unknown key, or a value that is not allowed.
        """
        kind = given.get("stage")
        if kind not in SECTIONS:
            raise ValueError(f"{where}: the key stage must be one of {', '.join(SECTIONS)}, not {kind!r}")
        changes = {key: value for key, value in given.items() if key != "stage"}
        section = {**getattr(self, kind).model_dump(), **changes}
        try:
            return SECTIONS[kind](**section)
        except ValidationError as error:
            problems = [describe(SECTIONS[kind], problem) for problem in error.errors()]
            raise ValueError(f"{where}: {'; '.join(problems)}") from None

    def _contradictions(self) -> Iterator[tuple[bool, str]]:
        """Whether two settings contradict each other, and what to say of it."""
        kinds = ("context_text", "context_file", "context_column", "context_function")
        for name in kinds:
            # as from a shell variable that is not set; demonstrations are not what was asked for
            empty = getattr(self, name) is not None and not getattr(self, name).strip()
            yield empty, f"{name} is empty. Leave it out to show demonstrations"
        given = [name for name in kinds if getattr(self, name)]
        yield len(given) > 1, f"{' and '.join(given)} are given; one context at a time"
        of_demonstrations = ("context_draws", "demo_order", "icl_demonstrations", "max_demonstrations")
        idle = [n for n in of_demonstrations if getattr(self, n) != AdaptConfig.model_fields[n].default]
        beside = f"{' and '.join(idle)} do nothing beside {given[0]}. Leave them out" if given else ""
        yield bool(given and idle), beside
        yield (
            self.thinking and self.chat == "off",
            "thinking does nothing without chat. Set chat to turns or single",
        )
        draws, tries, order = self.context_draws, self.demo_search_orders, self.demo_order
        yield (
            tries != 8 and order != "search",
            "demo_search_orders does nothing unless demo_order is search",
        )
        yield (
            order == "nearest" and draws > 1,
            f"demo_order nearest gives one order, context_draws is {draws}. Leave it out, or choose another "
            "order",
        )
        yield (
            order == "search" and draws > tries,
            f"context_draws is {draws}, but the search tries {tries} orders. Raise demo_search_orders",
        )
        yield (
            bool((self.activation_checkpointing_kwargs or {}).get("use_reentrant")),
            "use_reentrant=True is not possible: captured activations would carry no gradient. Leave it "
            "out, or set it to false",
        )
        yield (
            self.selection == "last" and self._chooses,
            "selection last chooses nothing: give one learning rate and one β, or set selection to folds",
        )
        yield (
            self.batch_size % (self.micro_batch_size or 1) > 0,
            f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}",
        )
        online = self.targets == "online"
        layers = [str(section.layers).strip() for section in (self.align, self.joint)]
        yield (
            online and any(chosen.startswith("top-") for chosen in layers),
            "layers chosen by their shift under ICL need stored targets. Set targets to store or memory, "
            "or choose the layers by name",
        )
        yield (
            online and self.permutation_targets == "mean" and draws > 1,
            "targets averaged over several demonstration orders cannot be computed online. Set "
            "permutation_targets to sample, or targets to store",
        )


class ModelOptions(Section):
    """Which model, and where it runs."""

    model: str = Field(
        "demo",
        description=f"Hub id, local folder, .gguf file, or {' / '.join(PACKAGED_MODELS)} (packaged models).",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Weights' type; auto is bfloat16 on an accelerator, float32 on a CPU."
    )
    device: str | None = Field(
        None, description="cpu, cuda, cuda:1, mps; by default an accelerator if there is one."
    )
    revision: str | None = Field(None, description="Hub branch, tag or commit of the model.")
    quantization: Literal["4bit", "8bit"] | None = Field(
        None, description="Load the weights in 4 or 8 bit (bitsandbytes)."
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")


class DataOptions(Section):
    """Where rows come from and how they are read."""

    data: str | None = Field(
        None, description="JSONL, CSV or Parquet file, a folder in hub layout, or a hub data set id."
    )
    test_data: str | None = Field(
        None, min_length=1, description="Labelled rows to evaluate on, read the same way."
    )
    split: str | None = Field(None, description="Split of a hub data set or folder.")
    test_split: str | None = Field(None, description="Split of the test data.")
    unlabelled_split: str | None = Field(None, description="Split of the unlabelled rows.")
    data_config: str | None = Field(None, description="Configuration (subset) of a hub data set.")
    prompt_template: str | None = Field(
        None, description=r"For example 'Text: {text}\nLabel:'; by default the column `prompt`."
    )
    completion_template: str | None = Field(
        None, description="For example ' {label}'; by default the column `completion`."
    )
    label_map: dict[str, str] | None = Field(
        None,
        description="Texts for raw labels: 0=negative,1=positive, or a JSON object. Texts are verbatim: "
        "'0 = negative' gives ' negative'.",
    )


class TrainConfig(AdaptConfig, ModelOptions, DataOptions):
    """Everything that `ia2 train` needs."""

    recipe: str = Field(
        AUTO,
        description=f"{AUTO}: {METHOD}, or {PLAIN} where a probe of the rows finds that in-context learning "
        f"does not help. Else {', '.join(TRAINED)}, or a schedule's name.",
    )
    output_dir: str | None = Field(None, description="Folder for the adapter, its model card and metrics.")


class CompareConfig(AdaptConfig, ModelOptions, DataOptions):
    """Everything that `ia2 compare` needs."""

    recipes: list[str] = Field(
        ["base", "icl", "sft", "ia2", "ia2-sft"], min_length=1, description="Recipes to compare."
    )
    adapters: list[AdapterName] = Field(
        [], description="Adapter types to compare, each with every recipe that trains."
    )
    objectives: list[ObjectiveName] = Field(
        [], description="Alignment objectives to compare, each with every recipe that aligns."
    )
    seeds: int = Field(
        3, ge=1, le=MAX_SEEDS, description="Number of repetitions, with seeds seed, seed + 1, …"
    )
    folds: int = Field(3, ge=2, description="Cross-fitting folds when no test data is given.")
    max_test: int | None = Field(None, ge=1, description="Evaluate on at most this many test rows.")
    output_dir: str | None = Field(None, description="Folder for results and adapters.")

    @model_validator(mode="after")
    def _comparable(self) -> CompareConfig:
        for recipe in self.recipes:
            self._check_recipe(recipe, "recipes")
        for name in ("recipes", "adapters", "objectives"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: one of them is named twice")
        if self.seed + self.seeds > 2**32:
            raise ValueError(f"seeds: the last would be {self.seed + self.seeds - 1}, above {2**32 - 1}")
        return self


class CurveConfig(CompareConfig):
    """Everything that `ia2 curve` needs."""

    sizes: list[int] = Field(
        [2, 4, 8, 16, 32], min_length=2, description="Numbers of training examples, one point each."
    )

    @field_validator("sizes")
    @classmethod
    def _rising(cls, value: list[int]) -> list[int]:
        if min(value) < 2 or sorted(set(value)) != value:
            raise ValueError("sizes must rise, from 2 at least")
        return value


class ProbeConfig(AdaptConfig, ModelOptions, DataOptions):
    """Everything that `ia2 probe` needs."""

    max_queries: int = Field(32, ge=2, description="Probe on at most this many rows.")
