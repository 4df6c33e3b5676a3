"""Tiny random models, one a model family: two layers, width 32, seeded, in evaluation mode.

Every family has the same vocabulary and hardly more positions than a test needs, so that a test can run
over all of them in seconds. Dropout stays at each configuration's default. ``HYBRIDS`` have four layers
of which only some have attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SmolLM3Config,
    StableLmConfig,
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
_GROUPED: dict[str, Any] = {**_MODERN, "num_key_value_heads": 2}
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
    return build(LlamaConfig(**{**_GROUPED, **changes}))


def gpt2(**changes: Any) -> PreTrainedModel:
    """GPT-2; keyword arguments replace fields of its configuration."""
    fields = {**_OLD, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS}
    return build(GPT2Config(**{**fields, **changes}))


def qwen3_next() -> PreTrainedModel:
    """Every second layer is linear attention, a recurrent state."""
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
    return build(
        Qwen3NextConfig(
            **{**_GROUPED, "num_hidden_layers": 4},
            **linear,
            head_dim=8,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            num_experts=0,
            layer_types=["linear_attention", "full_attention"] * 2,
        )
    )


def lfm2(**changes: Any) -> PreTrainedModel:
    """Two convolutions, then two layers of attention; keyword arguments replace fields."""
    fields = {**_GROUPED, "num_hidden_layers": 4, "layer_types": ["conv"] * 2 + ["full_attention"] * 2}
    return build(Lfm2Config(**{**fields, **changes}))


_SLIDES = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_GPTJ = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS, "rotary_dim": 4}
_OPT = {"hidden_size": WIDTH, "ffn_dim": 64, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
_OPT |= {"max_position_embeddings": POSITIONS, "word_embed_proj_dim": WIDTH}
_FALCON = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
_BLOOM = {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
_MPT = {"d_model": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": POSITIONS}
_EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "qwen3": lambda: build(Qwen3Config(**_GROUPED, head_dim=8)),
    "gemma3": lambda: build(Gemma3TextConfig(**_GROUPED, head_dim=8, **_SLIDES)),
    "mistral": lambda: build(MistralConfig(**_GROUPED, sliding_window=WINDOW)),
    "phi3": lambda: build(Phi3Config(**_GROUPED, original_max_position_embeddings=POSITIONS)),
    "gpt2": gpt2,
    "gpt_neox": lambda: build(GPTNeoXConfig(**_MODERN)),
    "gptj": lambda: build(GPTJConfig(**_OLD, **_GPTJ)),
    "opt": lambda: build(OPTConfig(**_OLD, **_OPT)),
    "falcon": lambda: build(FalconConfig(**_OLD, **_FALCON)),
    "bloom": lambda: build(BloomConfig(**_OLD, **_BLOOM)),
    "mpt": lambda: build(MptConfig(**_OLD, **_MPT)),
    "qwen2": lambda: build(Qwen2Config(**_GROUPED)),
    "gemma2": lambda: build(Gemma2Config(**_GROUPED, head_dim=8, **_SLIDES)),
    "olmo2": lambda: build(Olmo2Config(**_GROUPED)),
    "granite": lambda: build(GraniteConfig(**_GROUPED, residual_multiplier=0.7)),
    "cohere": lambda: build(CohereConfig(**_GROUPED), seed=1),
    "stablelm": lambda: build(StableLmConfig(**_GROUPED), seed=1),
    "smollm3": lambda: build(SmolLM3Config(**_GROUPED, no_rope_layers=[1, 0])),
    "mixtral": lambda: build(MixtralConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": lambda: build(Qwen3MoeConfig(**_GROUPED, head_dim=8, **_EXPERTS)),
}

# Families with a layer that sees only the last few positions.
SLIDING = ("gemma2", "gemma3", "mistral")

# Families whose rows can stand side by side in one sequence; the others are not given positions.
PACKED = tuple(name for name in FAMILIES if name not in ("falcon", "bloom", "mpt"))

HYBRIDS: dict[str, Callable[[], PreTrainedModel]] = {"qwen3_next": qwen3_next, "lfm2": lfm2}

ALL = {**FAMILIES, **HYBRIDS}


@contextmanager
def counting_ids(model: Any) -> Iterator[list[int]]:
    """How many ids each forward pass is fed, padding included."""
    fed: list[int] = []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: fed.append(args[0].numel())
    )
    try:
        yield fed
    finally:
        handle.remove()


def attention_layers(name: str) -> list[int]:
    """The layers of a family that have attention: of a hybrid, some."""
    return {"qwen3_next": [1, 3], "lfm2": [2, 3]}.get(name, list(range(LAYERS)))
