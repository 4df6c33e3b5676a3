"""Tiny models of every family, with what is captured of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.families import ALL
from torch import nn
from transformers import PreTrainedModel

from ia2.adapters.types import peft_config
from ia2.adapters.weights import attach
from ia2.config.sections import AdapterConfig
from ia2.models.capture import ActivationCapture

# Where each family keeps a layer, its attention and its output projection: written down from
# transformers' sources, so that the search in ia2.models.capture is checked against something else.
_USUAL = (
    "llama qwen3 gemma3 mistral phi3 qwen2 gemma2 olmo2 granite cohere stablelm smollm3 mixtral qwen3_moe "
    "qwen3_next"
)
PLACES = {
    **dict.fromkeys(_USUAL.split(), ("model.layers", "self_attn", "o_proj")),
    "gpt2": ("transformer.h", "attn", "c_proj"),
    "gpt_neox": ("gpt_neox.layers", "attention", "dense"),
    "gptj": ("transformer.h", "attn", "out_proj"),
    "opt": ("model.decoder.layers", "self_attn", "out_proj"),
    "falcon": ("transformer.h", "self_attention", "dense"),
    "bloom": ("transformer.h", "self_attention", "dense"),
    "mpt": ("transformer.blocks", "attn", "out_proj"),
    "lfm2": ("model.layers", "self_attn", "out_proj"),
}

family = pytest.mark.parametrize("name", list(ALL))


def ids(rows: int = 2, width: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 100, (rows, width), generator=torch.Generator().manual_seed(seed))


def lora(model: PreTrainedModel, *, random_b: bool = True) -> Any:
    adapted = attach(model, peft_config(model, AdapterConfig(rank=2, alpha=4)), seed=0)
    if random_b:  # B starts at zero, where many mistakes do not show
        generator = torch.Generator().manual_seed(1)
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_B" in parameter_name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return adapted


def captured(model: nn.Module, inputs: torch.Tensor, **options: Any) -> dict[int, torch.Tensor]:
    with ActivationCapture(model, **options) as capture:
        model(input_ids=inputs, use_cache=False)
        return capture.take()
