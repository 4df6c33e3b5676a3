"""Batches of rows of differing lengths: how they are made, how large, and what if one does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from ia2.models.sharding import stepping
from ia2.models.tokens import Ids
from ia2.utils.logging import Progress, logger

# Tokens of one batch from which on more rows make a forward pass hardly faster (two cores; on a GPU a
# thousand or so, where bounds on padding matter less).
EFFICIENT = 256

# Float32 logits of one batch; beyond this the vocabulary, not the model, fills the memory.
MAX_LOGITS = 5 * 10**7

T = TypeVar("T")


def plan_batches(
    rows: Sequence[Ids],
    answer_lengths: Sequence[int],
    budget: int,
    vocabulary: int,
    *,
    grow: int = 0,
    equal_lengths: bool = False,
) -> list[list[int]]:
    """Rows into batches, longest first, so that a batch that does not fit is met at once."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    batches: list[list[int]] = []
    for i in order:
        if batches:
            last = batches[-1]
            size = len(last) + 1
            width = len(rows[last[0]]) + grow
            keep = max(answer_lengths[j] for j in [*last, i]) + len(rows[last[0]]) - len(rows[i])
            fits = size * width <= budget and size * keep * vocabulary <= MAX_LOGITS
            # Padding is computed and thrown away, and the head runs wherever any row's answer is; a
            # batch that is large enough to be efficient takes no row much shorter than its first.
            wasteful = not grow and size * width > EFFICIENT and len(rows[i]) < 0.85 * width
            if fits and not wasteful and (not equal_lengths or len(rows[last[0]]) == len(rows[i])):
                last.append(i)
                continue
        batches.append([i])
    return batches


def in_halves(plan: list[list[int]], run: Callable[[list[int]], list[T]], bar: Progress) -> Iterator[T]:
    """Run every batch; one that runs out of memory is split in two, down to single rows."""
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

    waiting = list(reversed(plan))
    while waiting:
        members = waiting.pop()
        try:
            results = run(members)
        except Exception as error:
            if len(members) == 1 or stepping() or not should_reduce_batch_size(error):
                raise
            half = len(members) // 2
            logger.info("Out of memory with %d rows a batch; going on with %d.", len(members), half)
            clear_device_cache(garbage_collection=True)
            # batches after this one are as long or shorter, but as large: halve them too
            smaller = [members, *reversed(waiting)]
            halves = [part for b in smaller for part in (b[: (len(b) + 1) // 2], b[(len(b) + 1) // 2 :])]
            waiting = [part for part in reversed(halves) if part]
            continue
        yield from results
        bar.advance(len(members))


def give_back_memory() -> None:
    """Return freed memory to the system, where the C library (glibc) would keep it.

    Batches have thousands of sizes, and what is freed of one does not fit the next: over 2,000 examples
    the resident memory of a small model's teacher pass grew by 120 MB, of which 3 MB were in use.
    """
    import ctypes

    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another system, another C library
        return


def token_budget(model: Any, keys: int = 0) -> int:
    """Tokens of one batch that a forward pass without gradients has memory for.

    A quarter of the free memory over a generous estimate of the bytes a token needs. On a CPU larger
    batches are not faster, so the budget is small there.

    Args:
        model: bare or wrapped causal model.
        keys: length of the attention weights that are kept for every token, head and layer; 0: none are.
    """
    import psutil
    import torch

    parameter = next(iter(model.parameters()))
    per_token = _read_bytes(model, keys)
    if parameter.device.type == "cuda":
        free, ceiling = torch.cuda.mem_get_info(parameter.device)[0], 131072
    else:
        free, ceiling = psutil.virtual_memory().available, 4096
    return max(512, min(ceiling, int(free // 4 // per_token)))


def writing_budget(model: Any, reach: int, *, captured: bool) -> tuple[int, int]:
    """As :func:`token_budget`, of a batch that is written: half the memory, for keys and values alone.

    Args:
        model: bare or wrapped causal model.
        reach: ids that are written of each row.
        captured: activations of all layers are kept at each of them.

    Returns:
        Tokens of one batch, and how many of them a row needs beside its prompt.
    """
    width, _, layers, size = _sizes(model)
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    grouped = getattr(config, "num_key_value_heads", None) or heads
    held = 2 * size * layers * grouped * (getattr(config, "head_dim", None) or width // heads)
    # once while they are collected, once in the answers
    seen = 2 * size * layers * width if captured else 0
    tokens = token_budget(model) * max(1.0, _read_bytes(model) / held / 2)
    return int(tokens), reach * (held + seen) // held


def _sizes(model: Any) -> tuple[int, int, int, int]:
    """Width, width of the MLP, layers, bytes of a number."""
    config = model.config.get_text_config()
    width = getattr(config, "hidden_size", 1024)
    inner = getattr(config, "intermediate_size", None) or 4 * width
    layers = getattr(config, "num_hidden_layers", 32)
    return width, inner, layers, next(iter(model.parameters())).element_size()


def _read_bytes(model: Any, keys: int = 0) -> int:
    """A generous estimate of what a token of a forward pass needs."""
    width, inner, layers, size = _sizes(model)
    # residual stream and attention, MLP, KV cache over all layers, float32 softmax and norms
    per_token = size * (8 * width + 3 * inner + 2 * layers * width) + 16 * width
    heads = getattr(model.config.get_text_config(), "num_attention_heads", 32)
    return int(per_token + size * keys * layers * heads)
