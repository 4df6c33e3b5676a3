"""What a comparison compares: each recipe, with each adapter type and each objective it can have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from ia2.adapters.types import ADAPTERS, narrowed
from ia2.config import AdaptConfig, CompareConfig
from ia2.config.reading import validate
from ia2.config.recipes import JOINT, METHOD, SFT, SOFT, describe, is_trained
from ia2.training.stages import fitted, plan
from ia2.utils.errors import ConfigError


@dataclass(frozen=True)
class Arm:
    """One row of a comparison.

    Attributes:
        name: ``ia2-sft``, or with what it differs in, ``ia2-sft@dora``; also a file name.
        recipe: its recipe.
        variant: the part behind the recipe, ``dora``; empty without.
        config: settings.
    """

    name: str
    recipe: str
    variant: str
    config: AdaptConfig

    @property
    def answers(self) -> str | None:
        """What its last supervised stage learns: ``true`` answers or ``ICL's``; None without such a stage."""
        stages = plan(self.recipe, self.config) if is_trained(self.recipe) else []
        found = [stage for stage in stages if stage.kind in (SFT, JOINT, SOFT)]
        if not found:
            return None
        # soft labels are the teacher's by nature
        given = getattr(found[-1].settings, "answers", "icl_responses")
        return "true" if given == "ground_truth" else "ICL's"

    @property
    def description(self) -> str:
        """One line on the recipe."""
        return describe(self.recipe, self.config.schedules)


def arms(config: CompareConfig) -> list[Arm]:
    """Every combination that makes sense: ``base`` and ``icl`` have no adapter, ``sft`` no objective.

    Raises:
        ConfigError: a setting that none of the types has.
    """
    _check_types(config)
    found = []
    for recipe in config.recipes:
        stages = plan(recipe, config)
        adapters: Sequence[str | None] = config.adapters if is_trained(recipe) else []
        objectives: Sequence[str | None] = config.objectives if any(stage.aligns for stage in stages) else []
        for adapter, objective in product(adapters or [None], objectives or [None]):
            chosen = config
            if adapter is not None:
                chosen = chosen.model_copy(update={"adapter": narrowed(config.adapter, adapter)})
            if objective is not None:
                sections = {n: _with_objective(chosen, n, objective) for n in ("align", "joint")}
                chosen = chosen.model_copy(update=sections)
            chosen = fitted(recipe, chosen)
            variant = "-".join(part for part in (adapter, objective) if part)
            found.append(Arm(f"{recipe}@{variant}" if variant else recipe, recipe, variant, chosen))
    return found


def _with_objective(config: AdaptConfig, section: str, objective: str) -> Any:
    given = getattr(config, section)
    return validate(type(given), {**given.model_dump(), "objective": objective}, section)


def _check_types(config: CompareConfig) -> None:
    if config.adapters and config.adapter.peft is not None:
        raise ConfigError("adapters and adapter.peft are both given. Leave one of them out.")
    given = [name for name, value in config.adapter.model_dump().items() if value is not None]
    for name in given:
        if (
            config.adapters
            and name != "type"
            and all(name not in ADAPTERS[kind].settings for kind in config.adapters)
        ):
            raise ConfigError(
                f"adapter.{name} is a setting of none of {', '.join(config.adapters)}. Leave it out."
            )


def rivals(arm: Arm, among: Sequence[Arm]) -> list[Arm]:
    """What an arm of the method is compared with, pairwise.

    All other recipes with the same adapter and objective (or none), and the first arm of the method.
    """
    if arm.recipe != METHOD:
        return []
    first = next(other for other in among if other.recipe == METHOD)
    return [
        other
        for other in among
        if other is not arm
        and (other is first or (other.recipe != METHOD and _comparable(arm.variant, other.variant)))
    ]


def _comparable(variant: str, other: str) -> bool:
    # `sft@dora` is the rival of `ia2-sft@dora-kl`
    return other == "" or variant == other or variant.startswith(f"{other}-")
