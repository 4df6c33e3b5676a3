"""Recipes: what is done with the same examples, as a list of stages.

``base`` and ``icl`` train nothing. To add a recipe, add one entry; a user's own are ``schedules`` of the
configuration, with settings of each stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ALIGN, SFT, JOINT, SOFT, CONSTANT = "align", "sft", "joint", "soft", "constant"
LABELLED, UNLABELLED = "labelled", "unlabelled"
METHOD, PLAIN = "ia2-sft", "sft"
AUTO = "auto"
"""Instead of a recipe: the method, or plain fine-tuning where in-context learning does not help."""


@dataclass(frozen=True)
class Recipe:
    """Stages, one after the other, and what they amount to.

    Attributes:
        stages: kinds; or, as in schedules, settings that differ from those of the kind named by ``stage``.
        description: one line.
        then: further ones, where there are unlabelled rows and the stages are on these alone.
    """

    stages: tuple[str | Mapping[str, Any], ...]
    description: str
    then: tuple[str, ...] = ()

    def schedule(self, *, unlabelled: bool = False) -> list[Mapping[str, Any]]:
        """The stages as a schedule has them, with or without unlabelled rows."""
        stages = (*self.stages, *(self.then if unlabelled else ()))
        return [{"stage": stage} if isinstance(stage, str) else stage for stage in stages]

    def kinds(self, *, unlabelled: bool = False) -> tuple[str, ...]:
        """Kind of each stage."""
        return tuple(stage["stage"] for stage in self.schedule(unlabelled=unlabelled))


RECIPES: dict[str, Recipe] = {
    "base": Recipe((), "the model as it is, no demonstrations, no training"),
    "icl": Recipe((), "in-context learning: the training examples as demonstrations in every prompt"),
    "sft": Recipe((SFT,), "supervised fine-tuning"),
    "ia2": Recipe((ALIGN,), "alignment with ICL activations only"),
    "ia2-sft": Recipe((ALIGN, SFT), "alignment, then fine-tuning (the method)"),
    "sft-ia2": Recipe((SFT, ALIGN), "fine-tuning, then alignment"),
    "ia2+sft": Recipe((JOINT,), "alignment and fine-tuning jointly"),
    "soft-sft": Recipe(
        (SOFT,),
        "distillation of the teacher's token distributions (on unlabelled rows, then fine-tuning)",
        (SFT,),
    ),
    "constant-sft": Recipe(
        (CONSTANT, SFT), "the mean of what demonstrations add to each layer, as a constant, then fine-tuning"
    ),
    "pseudo-sft": Recipe(
        ({"stage": SFT, "rows": "both"},), "fine-tuning on true answers and the teacher's to unlabelled rows"
    ),
}


def is_trained(recipe: str) -> bool:
    """Whether a recipe trains anything; all but ``base`` and ``icl`` do, and every schedule."""
    return recipe not in RECIPES or bool(RECIPES[recipe].stages)


def describe(recipe: str, schedules: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """One line on a recipe, or on a schedule of the configuration."""
    if recipe in RECIPES:
        return RECIPES[recipe].description
    return "the stages " + ", ".join(str(stage["stage"]) for stage in schedules[recipe])


TRAINED = tuple(filter(is_trained, RECIPES))

# Names of ``ia2.training.objectives.OBJECTIVES`` and of ``ia2.adapters.types.ADAPTERS``; here, because
# settings are checked
# without importing torch. A test holds them together.
OBJECTIVE_NAMES = ("mse", "kl", "cosine", "heads", "residual", "attention")
ADAPTER_NAMES = (
    "lora",
    "rslora",
    "dora",
    "vera",
    "ia3",
    "prefix",
    "prompt",
    "p-tuning",
    "bottleneck",
    "full",
)
