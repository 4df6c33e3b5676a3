"""Tiny random models, one a model family: two layers, width 32, seeded, in evaluation mode.

Every family has the same vocabulary and hardly more positions than a test needs, so that a test can run
over all of them in seconds. Dropout stays at each configuration's default.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen3Config,
)

VOCABULARY = 128
WIDTH = 32
LAYERS = 2
HEADS = 4
POSITIONS = 256
WINDOW = 8  # of the sliding-window families

_SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_MODERN: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    **_SPECIAL,
}
_OLD: dict[str, Any] = {"vocab_size": VOCABULARY, **_SPECIAL}


def build(config: Any, seed: int = 0) -> PreTrainedModel:
    """A model of ``config`` with random weights that depend on the seed only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        # The default initialisation is so flat that greedy choices come down to rounding; biases and
        # norms start at values that would hide mistakes.
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def llama(**changes: Any) -> PreTrainedModel:
    """Llama with grouped key and value heads; keyword arguments replace fields of its configuration."""
    return build(LlamaConfig(**{**_MODERN, "num_key_value_heads": 2, **changes}))


def gpt2(**changes: Any) -> PreTrainedModel:
    """GPT-2; keyword arguments replace fields of its configuration."""
    fields = {**_OLD, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS}
    return build(GPT2Config(**{**fields, **changes}))


def _qwen3() -> PreTrainedModel:
    return build(Qwen3Config(**_MODERN, num_key_value_heads=2, head_dim=8))


def _gemma3() -> PreTrainedModel:
    kinds = ["sliding_attention", "full_attention"]
    return build(
        Gemma3TextConfig(
            **_MODERN, num_key_value_heads=2, head_dim=8, sliding_window=WINDOW, layer_types=kinds
        )
    )


def _mistral() -> PreTrainedModel:
    return build(MistralConfig(**_MODERN, num_key_value_heads=2, sliding_window=WINDOW))


def _phi3() -> PreTrainedModel:
    return build(Phi3Config(**_MODERN, num_key_value_heads=2, original_max_position_embeddings=POSITIONS))


def _gpt_neox() -> PreTrainedModel:
    return build(GPTNeoXConfig(**_MODERN))


def _gptj() -> PreTrainedModel:
    fields = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS, "rotary_dim": 4}
    return build(GPTJConfig(**_OLD, **fields))


def _opt() -> PreTrainedModel:
    return build(
        OPTConfig(
            **_OLD,
            hidden_size=WIDTH,
            ffn_dim=64,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=POSITIONS,
            word_embed_proj_dim=WIDTH,
        )
    )


def _falcon() -> PreTrainedModel:
    return build(FalconConfig(**_OLD, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS))


def _bloom() -> PreTrainedModel:
    return build(BloomConfig(**_OLD, hidden_size=WIDTH, n_layer=LAYERS, n_head=HEADS))


def _mpt() -> PreTrainedModel:
    return build(MptConfig(**_OLD, d_model=WIDTH, n_layers=LAYERS, n_heads=HEADS, max_seq_len=POSITIONS))


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "mistral": _mistral,
    "phi3": _phi3,
    "gpt2": gpt2,
    "gpt_neox": _gpt_neox,
    "gptj": _gptj,
    "opt": _opt,
    "falcon": _falcon,
    "bloom": _bloom,
    "mpt": _mpt,
}

# Families with a layer that sees only the last few positions.
SLIDING = ("gemma3", "mistral")
