"""Recipes: what is done with the same examples, as a list of stages.

``base`` and ``icl`` train nothing. To add a recipe, add one entry; a user's own are ``schedules`` of the
configuration, with settings of each stage.
"""

from __future__ import annotations

ALIGN, SFT, JOINT, SOFT = "align", "sft", "joint", "soft"

RECIPES: dict[str, tuple[str, ...]] = {
    "base": (),
    "icl": (),
    "sft": (SFT,),
    "ia2": (ALIGN,),
    "ia2-sft": (ALIGN, SFT),
    "sft-ia2": (SFT, ALIGN),
    "ia2+sft": (JOINT,),
    "soft-sft": (SOFT,),
}

TRAINED = tuple(name for name, stages in RECIPES.items() if stages)

DESCRIPTIONS = {
    "base": "the model as it is, no demonstrations, no training",
    "icl": "in-context learning: the training examples as demonstrations in every prompt",
    "sft": "supervised fine-tuning",
    "ia2": "alignment with ICL activations only",
    "ia2-sft": "alignment, then fine-tuning (the method)",
    "sft-ia2": "fine-tuning, then alignment",
    "ia2+sft": "alignment and fine-tuning jointly",
    "soft-sft": "distillation of the teacher's token distributions",
}

# Names of ``ia2.losses.OBJECTIVES``; here, because settings are checked without importing torch.
OBJECTIVE_NAMES = ("mse", "kl", "cosine", "heads", "residual", "attention")
