"""What a model does with embeddings and with a KV cache, tried out on a few tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ia2.models.capture import unwrap
from ia2.utils.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn


def cache_sizes(model: Any) -> tuple[int, int, int]:
    """Layers, heads and width of a head of the KV cache, as one token leaves it.

    Raises:
        ModelError: they differ from layer to layer, or between keys and values.
    """
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with _trying(model):
        ids = torch.zeros(1, 1, dtype=torch.long, device=model.get_input_embeddings().weight.device)
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    shapes = {tuple(t.shape[1::2]) for layer in layers for t in (layer.keys, layer.values)}
    if len(shapes) > 1:
        seen = ", ".join(f"{heads}×{width}" for heads, width in sorted(shapes))
        raise ModelError(
            "prefix tuning needs keys and values of one size in all layers, and those of "
            f"{type(unwrap(model)).__name__} have {seen}. Choose another adapter, such as prompt or lora."
        )
    heads, width = shapes.pop()
    return len(layers), heads, width


def embedding_problem(model: Any) -> str | None:
    """Why a model cannot read virtual tokens, which are embeddings without ids; None if it can."""
    import torch

    if getattr(model.config.get_text_config(), "hidden_size_per_layer_input", None):
        return "looks ids up in a table of every layer, and virtual tokens have no ids"
    embed = model.get_input_embeddings()
    ids = torch.arange(9, device=embed.weight.device)[None]
    with _trying(model):
        expected = model(input_ids=ids[:, :-1], use_cache=True)
        try:
            start = model(inputs_embeds=embed(ids[:, :-1]), use_cache=True)
        except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
            if is_out_of_memory(error):
                raise
            # what a model raises that wants ids: each family another one of these
            return f"takes no embeddings instead of ids ({' '.join(str(error).split())[:100]})"
        if not _alike(start.logits, expected.logits):
            return "does not do with embeddings what it does with the ids that they are of"
        # PEFT's generate finds by the cache that it has put the virtual tokens there, and gives no
        # position ids, which would not count them
        first, second = getattr(start, "past_key_values", None), getattr(expected, "past_key_values", None)
        if first is None:
            return "returns no KV cache, which answers after virtual tokens are generated with"
        if "position_ids" in inspect.signature(unwrap(model).forward).parameters:
            step: dict[str, Any] = {"input_ids": ids[:, -1:], "use_cache": True}
            found = model(**step, past_key_values=first).logits
            place = ids[:, -1:] * 0 + ids.shape[1] - 1
            if not _alike(found, model(**step, past_key_values=second, position_ids=place).logits):
                return "counts positions anew at every step of an answer unless it is told them"
    return None


def trial(model: Any, adapted: Any) -> None:
    """Read a few tokens with an adapter on, whatever it raises.

    Args:
        model: the base model.
        adapted: the same with the adapter.
    """
    import torch

    ids = torch.arange(9, device=model.get_input_embeddings().weight.device)[None]
    with _trying(adapted):
        adapted(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=1, use_cache=False)


def is_out_of_memory(error: Exception) -> bool:
    """An accelerator's or a CPU's, which says nothing about the model."""
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-3 * other.abs().max())


@contextmanager
def _trying(model: nn.Module) -> Iterator[None]:
    """No gradient, no dropout."""
    import torch

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
