"""The naive reference: what a first script does, and what the paper's released scripts do.

Written anew from METHOD.md §2 and §3; nothing is copied. One row a forward pass, the whole prompt each time,
logits at every position, no cache between the tokens of an answer, hooks that copy every attention output.
A training step is as many rows one after the other as the batch has, with their gradients added up. Nothing
is made slower than those scripts are; tokenising, progress bars and files are left out here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ia2.models.tokens import Ids


@dataclass
class Pair:
    """Prompt and answer of a row, and the activations to align with, ``[L, G, d]``."""

    prompt: Ids
    answer: Ids
    target: torch.Tensor | None = None


@contextmanager
def watching(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Copies of every attention output of the last forward pass, by module, ``[1, T, d]``."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, arguments: Any, output: Any) -> None:
            found[name] = (output[0] if isinstance(output, tuple) else output).clone()

        return hook

    modules = [(n, m) for n, m in model.named_modules() if n.endswith(("self_attn", ".attn"))]
    hooks = [module.register_forward_hook(keep(name)) for name, module in modules]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _full(model: Any, ids: Sequence[int]) -> torch.Tensor:
    row = torch.tensor([list(ids)])
    logits: torch.Tensor = model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0]
    return logits


@torch.no_grad()
def teach(model: Any, prompt: Ids, answer: Ids, place: int) -> tuple[int, torch.Tensor, float]:
    """One token of an answer: the whole sequence again.

    ``answer[:place]`` stands for what the reference has written before; where its tokens agree with these,
    that is what it would have written.

    Returns:
        The next token, its attention outputs ``[L, d]``, and seconds of the processor.
    """
    with watching(model) as outputs:
        began = time.process_time()
        logits = _full(model, [*prompt, *answer[:place]])
        activations = torch.stack([output[0, -1] for output in outputs.values()])
        token = int(logits[-1].argmax())
        return token, activations, time.process_time() - began


@torch.no_grad()
def answer_token(model: Any, prompt: Ids) -> int:
    """The most probable next token, by a pass over the whole prompt."""
    probabilities = _full(model, prompt)[-1].softmax(-1)
    return int(probabilities.topk(10).indices[0])


def loss_of(model: Any, pair: Pair, outputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of the answer, or, of a pair with a target, ``L_IA2``."""
    if pair.target is None:
        row = torch.tensor([[*pair.prompt, *pair.answer]])
        labels = row.clone()
        labels[:, : len(pair.prompt)] = -100
        loss: torch.Tensor = model(input_ids=row, attention_mask=torch.ones_like(row), labels=labels).loss
        return loss
    outputs.clear()
    _full(model, [*pair.prompt, *pair.answer])
    first = len(pair.prompt) - 1
    own = torch.stack([output[0, first : first + len(pair.answer)] for output in outputs.values()])
    return torch.nn.functional.mse_loss(own, pair.target) * len(own)


def step(model: Any, pairs: Sequence[Pair], optimizer: Any, outputs: dict[str, torch.Tensor]) -> list[float]:
    """One optimiser step, a row at a time; the loss of each row."""
    losses = []
    for pair in pairs:
        loss = loss_of(model, pair, outputs)
        (loss / len(pairs)).backward()
        losses.append(loss.item())
    optimizer.step()
    optimizer.zero_grad()
    return losses


def train(model: Any, pairs: Sequence[Pair], dev: Sequence[Pair], epochs: int, rate: float) -> None:
    """A stage: batches of four, the dev loss every second step and at the end of each epoch.

    For at most four pairs, whose order does not matter.
    """
    assert len(pairs) <= 4
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=rate)
    with watching(model) if pairs[0].target is not None else no_hooks() as outputs:
        for _ in range(epochs):
            model.train()
            step(model, pairs, optimizer, outputs)
            model.eval()
            with torch.no_grad():
                for pair in dev:
                    loss_of(model, pair, outputs).item()


@contextmanager
def no_hooks() -> Iterator[dict[str, torch.Tensor]]:
    """Where no activation is looked at."""
    yield {}
