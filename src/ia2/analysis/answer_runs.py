"""The answer positions of one prompt, run many times over behind one KV cache."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ia2.batching import MAX_LOGITS, token_budget
from ia2.capture import unwrap
from ia2.console import logger
from ia2.inference import MIN_SHARED_PREFIX
from ia2.tokens import Ids, common_prefix
from ia2.traits import has_sliding_window, input_device, layer_kinds, takes_cache

if TYPE_CHECKING:
    import torch
    from torch import nn

# Positions of one pack: each looks at all of them, though its mask leaves it only its own run.
_PACK, _PACK_GPU = 256, 1024

# By how much log-probabilities of a pack may differ from those of a plain pass, nats.
_TOLERANCE, _TOLERANCE_HALF = 1e-2, 0.5


class AnswerRuns:
    """How the answer positions of each example are run many times over.

    Beside each other in one sequence, each hidden from the others by the attention mask, so that the cache of
    the prompt is there once; where a family does not take such masks, as rows, each with a copy of the cache;
    where there is no cache, as rows with the whole prompt.
    """

    def __init__(self, model: nn.Module, prompts: Sequence[Ids], batch_tokens: int | None) -> None:
        self._model, self._budget = model, batch_tokens or token_budget(model)
        self._cached = takes_cache(model)
        self._packs: bool | None = None if self._cached and _may_pack(model) else False
        self._shared: Any = None
        self._length = 0
        if self._cached and len(prompts) > 1:
            length = min(common_prefix(prompts), min(map(len, prompts)) - 1)
            if length >= MIN_SHARED_PREFIX:
                self._shared, self._length = _read(model, None, 0, prompts[0][:length]), length

    def of(self, prompt: Ids, answer: Ids) -> Packed | Rows:
        """The layout of one example."""
        before, fed = prompt[:-1], (prompt[-1], *answer[:-1])
        if not self._cached or not before:
            return Rows(self._model, None, (), (*before, *fed), len(fed), self._budget)
        cache = copy.deepcopy(self._shared)
        if cache is None or len(before) > self._length:
            cache = _read(self._model, cache, self._length, before[self._length :])
        rows = Rows(self._model, cache, before, fed, len(fed), self._budget)
        if self._packs is False or not _sees_all(self._model, len(before) + len(fed)):
            return rows
        packed = Packed(self._model, cache, len(before), fed, self._budget)
        if self._packs is None:
            self._packs = packed.agrees(rows)
        return packed if self._packs else rows


def _read(model: Any, cache: Any, done: int, ids: Ids) -> Any:
    """The KV cache after these ids, behind ``done`` that are in it; batch 1."""
    import torch
    from transformers import DynamicCache

    device = input_device(model)
    cache = DynamicCache(config=model.config) if cache is None else cache
    model(
        input_ids=torch.tensor([ids], device=device),
        attention_mask=torch.ones(1, done + len(ids), dtype=torch.long, device=device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return cache


@dataclass
class Rows:
    """A run a row.

    Attributes:
        cache: of the ids before, batch 1, or None.
        before: ids in the cache.
        fed: ids of every row.
        positions: of ``fed``, the last ones, at which answers are predicted.
        budget: tokens of one batch.
    """

    model: Any
    cache: Any
    before: Ids
    fed: Ids
    positions: int
    budget: int

    @property
    def size(self) -> int:
        """Runs of one batch."""
        by_logits = MAX_LOGITS // (self.positions * _vocabulary(self.model))
        return max(1, min(self.budget // (len(self.before) + len(self.fed)), by_logits))

    def logits(self, count: int) -> torch.Tensor:
        """``[count, G, V]``."""
        import torch

        device = input_device(self.model)
        options: dict[str, Any] = {"use_cache": False}
        if self.cache is not None:
            cache = copy.deepcopy(self.cache)
            cache.batch_repeat_interleave(count)
            options = {"use_cache": True, "past_key_values": cache}
        output = self.model(
            input_ids=torch.tensor([self.fed], device=device).repeat(count, 1),
            attention_mask=torch.ones(
                count, len(self.before) + len(self.fed), dtype=torch.long, device=device
            ),
            logits_to_keep=self.positions,
            **options,
        )
        return output.logits[:, -self.positions :]  # type: ignore[no-any-return]


@dataclass
class Packed:
    """All runs in one sequence behind the cached prompt, at the same positions, each seeing only itself.

    Attributes:
        cache: of the ids before, batch 1.
        past: how many these are.
        fed: ids of each run.
        budget: tokens of one batch.
    """

    model: Any
    cache: Any
    past: int
    fed: Ids
    budget: int

    @property
    def size(self) -> int:
        """Runs of one batch."""
        pack = _PACK_GPU if input_device(self.model).type == "cuda" else _PACK
        by_logits = MAX_LOGITS // (len(self.fed) * _vocabulary(self.model))
        return max(1, min(min(pack, self.budget) // len(self.fed), by_logits))

    def logits(self, count: int) -> torch.Tensor:
        """``[count, G, V]``."""
        import torch

        device, g = input_device(self.model), len(self.fed)
        place = torch.arange(count * g, device=device)
        visible = (place[:, None] // g == place // g) & (place[:, None] >= place)
        visible = torch.cat([visible.new_ones(count * g, self.past), visible], dim=1)
        # numbers, not truth values: eager attention adds them
        mask = torch.zeros(visible.shape, dtype=self.model.dtype, device=device)
        mask.masked_fill_(~visible, torch.finfo(mask.dtype).min)
        output = self.model(
            input_ids=torch.tensor([self.fed * count], device=device),
            attention_mask=mask[None, None],
            position_ids=(self.past + place % g)[None],
            past_key_values=copy.deepcopy(self.cache),
            use_cache=True,
        )
        return output.logits.reshape(count, g, -1)  # type: ignore[no-any-return]

    def agrees(self, rows: Rows) -> bool:
        """Whether the model takes the mask as it is meant."""
        import torch

        packed, plain = self.logits(3)[-1].float(), rows.logits(1)[0].float()
        tolerance = _TOLERANCE if self.model.dtype == torch.float32 else _TOLERANCE_HALF
        difference = (packed.log_softmax(-1) - plain.log_softmax(-1)).abs().max().item()
        if difference <= tolerance:
            return True
        logger.debug("Packed and plain passes differ by %.3g nats: they go on as rows.", difference)
        return False


def _vocabulary(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[0])


def _may_pack(model: Any) -> bool:
    """Whether the family is one that hands a four-dimensional mask on as it is."""
    inner = unwrap(model)
    return (
        getattr(inner, "_supports_attention_backend", False)
        and "position_ids" in inspect.signature(inner.forward).parameters
        and inner.config._attn_implementation in ("sdpa", "eager")
    )


def _sees_all(model: Any, length: int) -> bool:
    """Whether every layer sees all of a sequence of this length, so that one mask serves all layers."""
    if not has_sliding_window(model):
        return True
    if any("chunked" in kind for kind in layer_kinds(model)):
        return False
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    return isinstance(window, int) and length <= window
