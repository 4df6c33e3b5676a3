"""Adapters on small models: what several test modules expect of them and do to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import FAMILIES
from torch import nn
from transformers import PreTrainedModel

from ia2.adapters.types import ADAPTERS, peft_config
from ia2.adapters.weights import attach
from ia2.config.sections import AdapterConfig
from ia2.experiment.predict import predict_blocks

SEPARATE = {"q_proj", "k_proj", "o_proj"}
_USUAL = (
    "llama qwen3 gemma3 mistral qwen2 gemma2 olmo2 granite cohere stablelm smollm3 mixtral qwen3_moe "
    "qwen3_next"
)
EXPECTED: dict[str, set[str]] = {
    **{name: SEPARATE for name in _USUAL.split()},  # noqa: C420
    "phi3": {"qkv_proj", "o_proj"},
    "gpt2": {"c_attn", "attn.c_proj"},  # the MLP has a c_proj too
    "gpt_neox": {"query_key_value", "dense"},
    "gptj": {"q_proj", "k_proj", "out_proj"},
    "opt": {"q_proj", "k_proj", "out_proj"},
    "falcon": {"query_key_value", "dense"},
    "bloom": {"query_key_value", "dense"},
    "mpt": {"Wqkv", "out_proj"},
    "lfm2": {"q_proj", "k_proj", "self_attn.out_proj"},  # a convolution has an out_proj too
}
family = pytest.mark.parametrize("name", list(FAMILIES))
kinds = pytest.mark.parametrize("kind", list(ADAPTERS))

# What PEFT prepends, and what a fresh adapter therefore changes at once.
PROMPTS = ("prefix", "prompt", "p-tuning")

INPUTS = torch.arange(4, 24).reshape(2, 10)

PEFT: dict[str, dict[str, Any]] = {
    "IA3": {"target_modules": ["q_proj", "k_proj"], "feedforward_modules": ["q_proj", "k_proj"]},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "P_TUNING": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "LORA": {"r": 2, "target_modules": ["q_proj"], "use_dora": True},
}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=INPUTS).logits


def lora(model: PreTrainedModel, seed: int = 0, **fields: Any) -> Any:
    return attach(model, peft_config(model, AdapterConfig(rank=2, alpha=2, **fields)), seed)


def disturb(model: nn.Module, by: float | None = None) -> None:
    """Make the adapter do something: LoRA and others start as the identity."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad and by is None:
            parameter.data.add_(0.5)
        elif parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=by)


def predict_rows(folder: Path, data: str, **options: Any) -> list[dict[str, Any]]:
    """What an adapter predicts of rows, all blocks in one."""
    _, blocks = predict_blocks(folder, data, **options)
    return [row for block in blocks for row in block]
