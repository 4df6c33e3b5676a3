"""How a model reads its last residual stream: the final norm and the unembedding, of any causal family.

Found by watching a small forward pass, not by names: what runs between the last layer and the output
embeddings, the output embeddings, and what is done to the logits after them (Granite and Cohere scale them,
Gemma 2 soft-caps them). What was found is then checked on that pass against the model's own logits.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ia2.models.capture import find_attention_modules, layer_of, unwrap
from ia2.models.families import evaluating, input_device
from ia2.models.tokens import Ids
from ia2.utils.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn

# Elements of the float32 logits that are held at once: 64 MB. Of a whole vocabulary at every layer of a long
# answer they would fill the memory.
_BLOCK = 2**24

# Ids of the pass that is watched: low ones, for high ones may stand for images.
_TRIED = 8

# Largest difference from the model's own logits, as a share of the largest logit: in float32, and in half
# precision, where sums over a row of 50,000 logits' inputs are rounded at every step.
_TOLERANCE, _HALF_TOLERANCE = 1e-4, 2e-2


@dataclass(frozen=True)
class Lens:
    """Residual streams to logits, as the model itself reads the last one.

    It stays what it was when it was made, whatever adapter is put on the model afterwards. (Output embeddings
    that are not a plain linear layer, quantised or adapted, are called as they are at the time.)

    Attributes:
        tail: modules between the last layer and the output embeddings, in order; OPT may have none.
        head: output embeddings, if they are not plain.
        weight: of plain ones, ``[V, d]`` or, with ``ids``, ``[C, d]`` in float32.
        bias: of plain ones, or None.
        scale, cap: logits are multiplied with the one, and are ``cap · tanh(logits / cap)``; None without.
        ids: tokens whose logits are wanted; None for the vocabulary.
        like: where and as what residual streams are taken in: an empty tensor there.
        vocabulary: V.
    """

    tail: tuple[nn.Module, ...]
    head: nn.Module | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    scale: float
    cap: float | None
    ids: Ids | None
    like: torch.Tensor
    vocabulary: int

    @classmethod
    def of(cls, model: nn.Module, ids: Sequence[int] | None = None, pattern: str | None = None) -> Lens:
        """The lens of a model as it is now: with its adapter off, the base model's.

        With ``ids`` only the logits of these tokens are wanted, which then cost next to nothing.

        Raises:
            ModelError: what comes after the last layer cannot be followed, or gives other logits.
        """
        from torch import nn

        inner = unwrap(model)
        name, _ = list(find_attention_modules(inner, pattern).values())[-1]
        head = inner.get_output_embeddings()
        if head is None:
            raise ModelError(
                f"logit lens: {type(inner).__name__} has no output embeddings. Leave the lens out."
            )
        tail, residual, logits = _watch(inner, _last_layer(inner, name), head)
        scale, cap = _after(inner, tail, residual, logits, head)
        # exactly: a quantised or adapted layer is a linear layer to isinstance
        plain = type(head) is nn.Linear and head.weight.device.type != "meta"
        weight = head.weight.detach() if plain else None
        bias = head.bias.detach() if plain and head.bias is not None else None
        if ids is not None and weight is not None:
            # a chosen few in float32: rounded to half precision, labels would tie
            weight, bias = weight[list(ids)].float(), None if bias is None else bias[list(ids)].float()
        return cls(
            tuple(copy.deepcopy(module).requires_grad_(False) for module in tail),
            None if plain else head,
            weight,
            bias,
            scale,
            cap,
            None if ids is None else tuple(ids),
            residual.new_empty(0),
            logits.shape[-1],
        )

    def logits(self, residual: torch.Tensor) -> torch.Tensor:
        """Logits ``[..., V]``, or ``[..., C]``, of residual streams ``[..., d]``.

        In float32, on the device of the output embeddings.
        """
        import torch

        with torch.no_grad():
            states = residual.reshape(1, -1, residual.shape[-1]).to(self.like)
            for module in self.tail:
                states = module(states)
            if self.weight is not None:
                states = states.to(self.weight)
                raw = torch.nn.functional.linear(states, self.weight, self.bias).float()
            else:
                assert self.head is not None
                raw = self.head(states).float()
                raw = raw if self.ids is None else raw[..., list(self.ids)]
            return _capped(raw * self.scale, self.cap).reshape(*residual.shape[:-1], -1)

    def blocks(self, rows: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Logits ``[rows, V]`` of ``[N, d]``, so many rows at once as are to be held."""
        size = max(1, _BLOCK // self.vocabulary)
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            yield part, self.logits(rows[part])

    def promotes(self, shifts: np.ndarray) -> np.ndarray:
        """What directions ``[m, d]`` of the residual stream add to the logits on their way straight out.

        ``[m, V]``, in standard deviations over the vocabulary from its mean. Layers in between are left out,
        and the length that the norm divides by, the same for all tokens.
        """
        import torch

        with torch.no_grad():
            # scaled, so that half precision does not drown it; only the direction matters
            directions = torch.from_numpy(shifts / np.maximum(np.abs(shifts).max(1, keepdims=True), 1e-30))
            states = directions.to(self.like.device, torch.float32)
            for module in self.tail:
                states = _linear_part(module, states, self.like.dtype)
            if self.weight is not None:
                states = states.to(self.weight.device)
                # a part of the vocabulary at a time is taken to float32
                logits = torch.cat([states @ part.float().T for part in self.weight.split(2**14)], dim=1)
            else:
                assert self.head is not None
                silent = torch.zeros_like(states[:1]).to(self.like.dtype)
                logits = (self.head(states.to(self.like.dtype)) - self.head(silent)).float()
        scores = logits.double().cpu().numpy()
        return (scores - scores.mean(1, keepdims=True)) / np.maximum(scores.std(1, keepdims=True), 1e-30)


def _linear_part(module: nn.Module, states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a module between layers and unembedding does to a direction.

    The gains of a norm are read off what it does to a vector of ones of alternating signs, which has mean
    square 1 and mean 0: families write them differently (Gemma's are 1 + weight).
    """
    import torch
    from torch import nn

    if isinstance(module, nn.Linear):
        return states @ module.weight.float().T
    probe = torch.ones(1, 1, states.shape[-1], device=states.device, dtype=dtype)
    probe[..., 1::2] = -1
    plus, minus = module(probe).float(), module(-probe).float()
    gains = (0.5 * (plus - minus) * probe.float())[0]
    # a norm that removes the mean does not see what is added to all coordinates
    if (module(probe + 1).float() - plus).abs().max() < 1e-2 * (plus - minus).abs().max():
        states = states - states.mean(-1, keepdim=True)
    return states * gains


def _last_layer(inner: nn.Module, name: str) -> nn.Module:
    """The end of the list of layers that an attention module's layer stands in."""
    from torch import nn

    layer = layer_of(inner, name)
    lists = (m for m in inner.modules() if isinstance(m, nn.ModuleList) and any(c is layer for c in m))
    return next(lists)[-1]


def _watch(
    inner: Any, last: nn.Module, head: nn.Module
) -> tuple[list[nn.Module], torch.Tensor, torch.Tensor]:
    """After the last layer: modules that ran, residual ``[1, T, d]``, logits ``[1, T, V]``."""
    import torch

    residual: list[torch.Tensor] = []
    tail: list[nn.Module] = []
    reached, depth = False, 0

    def before(module: nn.Module, args: Any) -> None:
        nonlocal depth, reached
        reached = reached or (bool(residual) and module is head)
        if residual and not reached:
            tail.extend([module] if depth == 0 else [])
            depth += 1

    def after(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal depth
        if module is last:
            residual[:] = [output[0] if isinstance(output, (tuple, list)) else output]
        elif residual and not reached and depth:  # what began before the last layer ended has no depth
            depth -= 1

    handles = [
        handle
        for module in inner.modules()
        for handle in (module.register_forward_pre_hook(before), module.register_forward_hook(after))
    ]
    tried = torch.arange(_TRIED, device=input_device(inner))[None]
    try:
        with torch.no_grad(), evaluating(inner):
            logits = inner(input_ids=tried, attention_mask=torch.ones_like(tried), use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    if not reached:
        raise ModelError(
            f"logit lens: {type(inner).__name__} does not call its output embeddings after its last layer. "
            "Leave the lens out."
        )
    return tail, residual[0], logits.float()


def _after(
    inner: Any, tail: Sequence[nn.Module], residual: torch.Tensor, logits: torch.Tensor, head: nn.Module
) -> tuple[float, float | None]:
    """Factor and soft cap between the output embeddings and the logits.

    The factor is measured: families name it differently, and multiply with it or divide by it.
    """
    import torch

    with torch.no_grad(), evaluating(inner):
        for module in tail:
            residual = module(residual)
        raw = head(residual).float()
    own = logits.to(raw.device)
    error, best = float("inf"), (1.0, None)
    if raw.shape == own.shape:
        factor = float((raw * own).sum() / raw.square().sum().clamp_min(1e-30))
        cap = getattr(inner.config.get_text_config(), "final_logit_softcapping", None)
        candidates: list[Any] = [(1.0, None), (factor, None), *([(1.0, float(cap))] if cap else [])]
        errors = [float((_capped(raw * s, c) - own).abs().max()) for s, c in candidates]
        error = min(errors) / max(float(own.abs().max()), 1e-30)
        best = candidates[errors.index(min(errors))]
    if not error <= (_TOLERANCE if residual.dtype.itemsize >= 4 else _HALF_TOLERANCE):
        raise ModelError(
            f"logit lens: the last norm and output embeddings of {type(inner).__name__} do not give its own "
            "logits; something is done between them that is not known here. Leave the lens out."
        )
    return best


def _capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    return logits if cap is None else cap * (logits / cap).tanh()
