"""Recipes: what is done with the same examples, as a list of stages.

``base`` and ``icl`` train nothing. To add a recipe, add one entry.
"""

from __future__ import annotations

ALIGN, SFT = "align", "sft"

RECIPES: dict[str, tuple[str, ...]] = {
    "base": (),
    "icl": (),
    "sft": (SFT,),
    "ia2": (ALIGN,),
    "ia2-sft": (ALIGN, SFT),
}

TRAINED = tuple(name for name, stages in RECIPES.items() if stages)

DESCRIPTIONS = {
    "base": "the model as it is, no demonstrations, no training",
    "icl": "in-context learning: the training examples as demonstrations in every prompt",
    "sft": "supervised fine-tuning",
    "ia2": "alignment with ICL activations only",
    "ia2-sft": "alignment, then fine-tuning (the method)",
}
