"""Settings of a run as a grid has them: dotted, and only those that a recipe's result depends on."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from ia2.config import AdaptConfig
from ia2.config.reading import validate
from ia2.config.recipes import RECIPES, UNLABELLED
from ia2.config.sections import MAX_EPOCHS, SECTIONS, SftConfig
from ia2.training.stages import PlannedStage, plan
from ia2.utils.errors import ConfigError, suggest

# Settings of a run that are axes of the grid themselves, and those that change no result.
AXES = ("recipe", "seed", "num_examples", "learning_rates", "joint.betas", "unlabelled", "max_unlabelled")
INCIDENTAL = ("report_to", "checkpoint_every", "targets")

# Values that stand for defaults in keys and records: a cell is random unless it says balanced, as every cell
# was before balanced draws became the default.
# What a grid starts from in place of a run's own defaults: tables choose rates by dev rows.
USUAL = {"selection": "dev", **{f"{kind}.epochs": MAX_EPOCHS for kind in ("align", "sft", "joint", "soft")}}
KEPT = {"balanced": False, **USUAL}
# Of the task: all that a model without demonstrations and training depends on.
_TASK = (
    "task",
    "labels",
    "parser",
    "separator",
    "chat",
    "thinking",
    "max_context_tokens",
    "max_answer_tokens",
)
# Beside these, what is in the prompt; the teacher's part of a run depends on nothing else.
TRAINING = ("adapter.", *(f"{name}." for name in SECTIONS), "schedules", "batch_size", "micro_batch_size")
_UNLABELLED = ("unlabelled", "max_unlabelled")
_ORDERS = ("context_draws", "permutation_targets")
_TECHNICAL = ("activation_checkpointing", "activation_checkpointing_kwargs", "attention_modules")


def planned(recipe: str, config: AdaptConfig, prefix: str) -> list[PlannedStage]:
    """The stages of a recipe.

    Raises:
        ConfigError: there is none of that name.
    """
    known = [*RECIPES, *config.schedules]
    if recipe not in known:
        raise ConfigError(
            f"{prefix}recipes: '{recipe}' is not one of {', '.join(known)}.{suggest(recipe, known)}"
        )
    return plan(recipe, config)


def used_settings(
    recipe: str, stages: Sequence[PlannedStage], config: AdaptConfig, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Settings that differ from the defaults and that this recipe's result depends on, dotted."""
    kinds = {stage.kind for stage in stages}
    if any(isinstance(s.settings, SftConfig) and s.settings.ia2_weight for s in stages):
        kinds.add("align")  # a kept alignment term is measured as that stage measures it
    teacher = any(stage.teacher_answers for stage in stages)
    found = {}
    for name, value in flat(config.model_dump()).items():
        if (name in (*AXES, *INCIDENTAL) and name not in _UNLABELLED) or value == defaults.get(name):
            continue
        if name in _UNLABELLED and not any(UNLABELLED in stage.rows for stage in stages):
            continue
        if recipe == "base" and name not in _TASK:
            continue
        if name == "icl_demonstrations" and recipe != "icl":
            continue
        if not stages and name.startswith((*TRAINING, *_ORDERS, *_TECHNICAL[:2])):
            continue
        section = name.split(".")[0]
        if section in SECTIONS and section not in kinds and recipe in RECIPES:
            continue
        if name in _ORDERS and not teacher:
            continue
        if name == "schedules":
            if recipe in RECIPES:
                continue
            value = {recipe: value[recipe]}
        found[name] = value
    return dict(sorted(found.items()))


def validated(values: Mapping[str, Any], where: str) -> AdaptConfig:
    """Nested values as a configuration; errors name ``where``."""
    config: AdaptConfig = validate(AdaptConfig, values, where)
    return config


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names as nested sections.

    Raises:
        ConfigError: a section is given as a value too.
    """
    values: dict[str, Any] = {}
    for name, value in flat.items():
        *sections, leaf = name.split(".")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"settings: '{name}' cannot be given beside {section}: {inner!r}.")
        # a copy, since a dotted name may reach into it
        inner[leaf] = copy.deepcopy(value)
    return values


# Settings whose values are mappings.
_WHOLE = ("schedules", "activation_checkpointing_kwargs", "adapter.peft")


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in _WHOLE:
            found |= flat(value, f"{name}.")
        else:
            found[name] = value
    return found
