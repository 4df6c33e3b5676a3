"""The floor: what the matrix products of the real tokens take at the rate at which the machine multiplies.

    floor = FLOPs of the real tokens / measured rate

Rate: ``x W^T`` with the model's own weight matrices and 512 rows, each as often as the model has it,
measured in the same run, in turn with what it is held against. FLOPs of one token at position p (from 0),
with W the weights of all layers' matrices:

    forward            2 W + 4 (p + 1) heads head_dim layers
    head               2 d V, at answer positions only
    training step      forward, and the same again for gradients of activations; adapters a third time

Of prompts that begin alike each distinct beginning counts once, since it need not be computed twice. An
alignment step needs neither the head nor the MLP of the last layer. Norms, softmax, activation functions, the
optimiser, padding and tokenising count nothing, and attention over a window counts as if it were whole.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch

ROWS = 512


class Floor:
    """Counts the products of one model, and measures the rate at which it could make them."""

    def __init__(self, model: Any, rank: int = 0, adapted: Sequence[str] = ()) -> None:
        config = model.config.get_text_config()
        self.layers = config.num_hidden_layers
        self.heads = config.num_attention_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.head = config.hidden_size * config.vocab_size
        linear = [
            (name, module.weight)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and ".layers." in name
        ]
        self.weights = sum(weight.numel() for _, weight in linear)
        last = f".layers.{self.layers - 1}."
        self.last_mlp = sum(weight.numel() for name, weight in linear if f"{last}mlp." in name)
        on = [weight for name, weight in linear if name.rsplit(".", 1)[-1] in adapted]
        self.adapter = sum(rank * sum(weight.shape) for weight in on)
        self._shapes = Counter(tuple(weight.shape) for _, weight in linear)
        self.rates: list[float] = []
        self._example = {tuple(weight.shape): weight for _, weight in linear}

    @property
    def rate(self) -> float:
        """FLOP a second of processor time: the median of what was measured."""
        return statistics.median(self.rates)

    def measure(self) -> None:
        """Measure the rate once more, in the shapes of the model."""
        flops = seconds = 0.0
        for shape, count in self._shapes.items():
            weight = self._example[shape].detach()
            rows = torch.randn(ROWS, shape[1])
            took = []
            with torch.no_grad():
                for _ in range(3):
                    began = time.process_time()
                    torch.nn.functional.linear(rows, weight)
                    took.append(time.process_time() - began)
            flops += count * 2.0 * ROWS * shape[0] * shape[1]
            seconds += count * sorted(took)[len(took) // 2]
        self.rates.append(flops / seconds)

    def forward(self, rows: Iterable[Sequence[int]], answers: int) -> float:
        """FLOPs of one pass over rows, with the head at so many positions."""
        return sum(self._token(place) for place in depths(rows)) + 2.0 * self.head * answers

    def step(self, rows: Sequence[tuple[Sequence[int], int]], *, align: bool) -> float:
        """FLOPs of a training step on (fed ids, answer tokens) pairs."""
        total = 0.0
        for ids, answers in rows:
            for place in range(len(ids)):
                pass_ = self._token(place) + 2.0 * self.adapter - (2.0 * self.last_mlp if align else 0)
                total += 2 * pass_ + 2.0 * self.adapter
            total += 0 if align else 4.0 * self.head * answers
        return total

    def _token(self, place: int) -> float:
        return 2.0 * self.weights + 4.0 * (place + 1) * self.heads * self.head_dim * self.layers


def depths(rows: Iterable[Sequence[int]]) -> list[int]:
    """The position of every token of the rows, common beginnings once.

    Of sorted rows, what a row has in common with any row before it is what it has in common with the one
    just before.
    """
    found: list[int] = []
    before: tuple[int, ...] = ()
    for row in sorted(map(tuple, rows)):
        same = 0
        while same < min(len(row), len(before)) and row[same] == before[same]:
            same += 1
        found += range(same, len(row))
        before = row
    return found
