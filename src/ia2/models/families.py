"""What a causal model's family allows: caches, padding, virtual tokens; and states a model is put in."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ia2.models.capture import unwrap
from ia2.models.sharding import in_step

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

# Layers whose whole state is keys and values; "attention" is what older configurations say.
_KEYS_AND_VALUES = ("full_attention", "sliding_attention", "chunked_attention", "attention")

# Layers that carry a state from token to token: convolutions, state-space models, linear attention.
_RECURRENT = ("linear_attention", "conv", "hybrid", "hybrid_sliding", "mamba", "recurrent")


def layer_kinds(model: Any) -> list[str]:
    """What each layer mixes tokens with, in the configuration's words; nothing where it does not say."""
    config = model.config.get_text_config()
    # hybrids have it under the second name, in earlier releases under that alone (RecurrentGemma)
    return list(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or [])


def keeps_keys_and_values(model: Any) -> bool:
    """Whether keys and values are all that a model keeps of what it has read."""
    if getattr(unwrap(model), "_is_stateful", False):
        return False  # recurrent or hybrid: the cache holds more
    return all(kind in _KEYS_AND_VALUES for kind in layer_kinds(model))


def takes_cache(model: Any) -> bool:
    """Whether a plain KV cache carries the whole state of a prefix."""
    # virtual tokens would come between the cached prefix and the query
    return keeps_keys_and_values(model) and not has_virtual_tokens(model)


def has_virtual_tokens(model: Any) -> bool:
    """Whether an active adapter puts tokens of its own before the sequence (prompt tuning)."""
    prompting = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    return bool(prompting) and not getattr(model, "_adapters_disabled", False)


def padding_counts(model: Any) -> bool:
    """Whether padding on the left of a prompt would change its answer.

    Attention skips padding. A recurrent layer reads it, unless the family silences it there.
    """
    if has_virtual_tokens(model):
        return True  # they stand before the padding, and PEFT drops the position ids
    inner = unwrap(model)
    recurrent = getattr(inner, "_is_stateful", False) or any(k in _RECURRENT for k in layer_kinds(model))
    if not recurrent:
        return False
    # The function's name in every family of transformers that sets padding to zero before such a layer
    # (RecurrentGemma does not). LFM2's convolutions make something of zeros if they have a bias.
    silenced = hasattr(sys.modules.get(type(inner).__module__), "apply_mask_to_padding_states")
    return not silenced or bool(getattr(model.config.get_text_config(), "conv_bias", False))


def has_sliding_window(model: Any) -> bool:
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return any("sliding" in kind or "chunked" in kind for kind in kinds)
    return getattr(config, "sliding_window", None) is not None


def input_device(model: Any) -> torch.device:
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    return next(iter(embeddings.parameters())).device  # type: ignore[no-any-return]


@contextmanager
def greedy(model: Any) -> Iterator[None]:
    """Without the settings that come with a model: ``generate`` would add its penalties to ours."""
    from transformers import GenerationConfig

    inner = unwrap(model)
    recommended, inner.generation_config = inner.generation_config, GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = recommended


class evaluating:
    """Evaluation mode for the duration (dropout off: a teacher must not be random)."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.training = self.model.training
        self.model.eval()
        self.in_step = in_step(self.model)
        self.in_step.__enter__()

    def __exit__(self, *exc: Any) -> None:
        self.in_step.__exit__(*exc)
        self.model.train(self.training)


def end_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase, end_id: int | None) -> list[int]:
    """Ids that end an answer: the one given, the tokenizer's, those of the model's generation settings."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({int(i) for i in [*ids, tokenizer.eos_token_id, end_id] if i is not None})
