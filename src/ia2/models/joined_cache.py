"""Keys and values of many prompts that were read in several batches, joined for writing the answers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from ia2.models.batching import plan_batches
from ia2.models.families import input_device
from ia2.models.tokens import Ids, pad_rows


class RoomyLayer(DynamicLayer):
    """A layer's keys and values, with room behind them for what will be written.

    A :class:`~transformers.DynamicLayer` copies all that it holds at every step; of prompts of a thousand
    tokens that takes as long as reading the weights. A shallow copy writes into the same room.

    Args:
        keys: ``[B, H, T + R, d]``, of which the first T hold something; None: the layer is empty.
        values: as ``keys``.
        length: T.
        room: R of an empty layer.
    """

    def __init__(
        self,
        keys: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
        length: int = 0,
        *,
        room: int = 0,
    ) -> None:
        super().__init__()
        self._more = room
        if keys is not None and values is not None:
            self._hold(keys, values, length)

    def _hold(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        self.lazy_initialization(keys, values)
        self._room = (keys, values)
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            both = (key_states, value_states)
            keys, values = (t.new_empty(*t.shape[:2], self._more, t.shape[3]) for t in both)
            self._hold(keys, values, 0)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        keys, values = self._room
        keys[:, :, start:end], values[:, :, start:end] = key_states, value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        length = self.get_seq_length()
        keys, values = (held[indices.to(held.device)] for held in self._room)
        self._room = (keys, values)
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]


def read(model: Any, rows: Sequence[Ids], cache: DynamicCache, padding: int) -> None:
    """Fill a cache with rows behind what it holds; shorter rows leave something of no use behind them.

    Args:
        model: causal model in evaluation mode, bare or PEFT.
        rows: ids of each row.
        cache: of as many rows, or empty. Without the model's configuration, so that every layer holds all it
            is given: a sliding window would count the padding.
        padding: an id to fill rows with.
    """
    device = input_device(model)
    batch = pad_rows(rows, [1] * len(rows), padding)
    assert batch.attention_mask is not None
    held = torch.ones(len(rows), cache.get_seq_length(), dtype=batch.attention_mask.dtype)
    model(
        input_ids=batch.input_ids.to(device),
        attention_mask=torch.cat([held, batch.attention_mask], dim=1).to(device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )


def read_joined(
    model: Any, rows: Sequence[Ids], prefix: DynamicCache, *, budget: int, room: int, padding: int
) -> DynamicCache:
    """A cache of all rows, padded on the left.

    Args:
        model: causal model whose cache is keys and values, in evaluation mode.
        rows: ids of each row behind ``prefix``, none empty.
        prefix: what all rows begin with, as :func:`read` has it, or an empty cache.
        budget: tokens of one batch that is read.
        room: ids that will be written behind each row.
        padding: an id to fill rows with.
    """
    lengths = [prefix.get_seq_length() + len(row) for row in rows]
    width = max(lengths)
    whole: list[list[torch.Tensor]] = []  # keys and values of each layer
    for members in plan_batches(rows, [1] * len(rows), budget, 0):
        part = copy.deepcopy(prefix)
        part.batch_repeat_interleave(len(members))
        read(model, [rows[i] for i in members], part, padding)
        read_layers: list[Any] = part.layers
        for index, layer in enumerate(read_layers):
            own = (layer.keys, layer.values)
            if index == len(whole):
                whole.append([t.new_zeros(len(rows), t.shape[1], width + room, t.shape[3]) for t in own])
            for held, target in zip(own, whole[index], strict=True):
                for place, i in enumerate(members):
                    target[i, :, width - lengths[i] : width] = held[place, :, : lengths[i]]
    cache = DynamicCache(config=model.config)
    layers: list[Any] = cache.layers
    for index, (keys, values) in enumerate(whole):
        if layers[index].is_sliding:
            layers[index].update(keys[:, :, :width], values[:, :, :width])
        else:
            layers[index] = RoomyLayer(keys, values, width)
    return cache
