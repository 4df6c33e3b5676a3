"""How a model reads its last residual stream: the final norm and the unembedding, of any causal family.

Found by watching a small forward pass, not by names: what runs between the last layer and the output
embeddings, the output embeddings, and what is done to the logits after them (Granite and Cohere scale them,
Gemma 2 soft-caps them). What was found is then checked on that pass against the model's own logits.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ia2.capture import find_attention_modules, layer_of, unwrap
from ia2.errors import ModelError
from ia2.tokens import Ids
from ia2.traits import evaluating, input_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn

# Ids of the pass that is watched: low ones, for high ones may stand for images.
_TRIED = 8

# Largest difference from the model's own logits, as a share of the largest logit: in float32, and in half
# precision, where sums over a row of 50,000 logits' inputs are rounded at every step.
_TOLERANCE = 1e-4
_HALF_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Lens:
    """Residual streams to logits, as the model itself reads the last one.

    It stays what it was when it was made, whatever adapter is put on the model afterwards: the norm is copied
    and the unembedding held by its tensor, which no adapter of this package changes in place. (Output
    embeddings that are not a plain linear layer, such as a quantised one or one with an adapter of its own,
    are called as they are at the time.)

    Attributes:
        tail: modules between the last layer and the output embeddings, in order; OPT may have none.
        head: output embeddings, if they are not plain.
        weight: of plain ones, ``[V, d]`` or, with ``ids``, ``[C, d]`` in float32.
        bias: of plain ones, or None.
        scale: what logits are multiplied with.
        cap: logits are ``cap · tanh(logits / cap)``; None without.
        ids: tokens whose logits are wanted; None for the vocabulary.
        device: where residual streams are taken to.
        dtype: what they are taken to.
        vocabulary: V.
    """

    tail: tuple[nn.Module, ...]
    head: nn.Module | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    scale: float
    cap: float | None
    ids: Ids | None
    device: torch.device
    dtype: torch.dtype
    vocabulary: int

    @classmethod
    def of(cls, model: nn.Module, ids: Sequence[int] | None = None, pattern: str | None = None) -> Lens:
        """The lens of a model as it is now: with its adapter off, the base model's.

        Args:
            model: bare or wrapped causal model.
            ids: the only tokens whose logits are wanted, which then cost next to nothing.
            pattern: glob over attention modules (see :func:`ia2.capture.find_attention_modules`).

        Raises:
            ModelError: what comes after the last layer cannot be followed, or gives other logits.
        """
        inner = unwrap(model)
        name, _ = list(find_attention_modules(inner, pattern).values())[-1]
        head = inner.get_output_embeddings()
        if head is None:
            raise ModelError(
                f"logit lens: {type(inner).__name__} has no output embeddings. Leave the lens out."
            )
        watched = _watch(inner, _last_layer(inner, name), head)
        plain = _is_plain(head)
        # a chosen few in float32: rounded to half precision, labels would tie
        chosen = None if ids is None else list(ids)
        weight = bias = None
        if plain:
            weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
            if chosen is not None:
                weight, bias = weight[chosen].float(), None if bias is None else bias[chosen].float()
        scale, cap = _after(inner, watched, head)
        return cls(
            tail=tuple(copy.deepcopy(module).requires_grad_(False) for module in watched.tail),
            head=None if plain else head,
            weight=weight,
            bias=bias,
            scale=scale,
            cap=cap,
            ids=None if ids is None else tuple(ids),
            device=watched.residual.device,
            dtype=watched.residual.dtype,
            vocabulary=watched.logits.shape[-1],
        )

    def logits(self, residual: torch.Tensor) -> torch.Tensor:
        """Logits ``[..., V]``, or ``[..., C]``, of residual streams ``[..., d]``.

        In float32, on the device of the output embeddings.
        """
        import torch

        with torch.no_grad():
            states = residual.reshape(1, -1, residual.shape[-1]).to(self.device, self.dtype)
            for module in self.tail:
                states = module(states)
            if self.weight is not None:
                states = states.to(self.weight.device, self.weight.dtype)
                raw = torch.nn.functional.linear(states, self.weight, self.bias).float()
            else:
                assert self.head is not None
                raw = self.head(states).float()
                raw = raw if self.ids is None else raw[..., list(self.ids)]
            return _capped(raw * self.scale, self.cap).reshape(*residual.shape[:-1], -1)


@dataclass
class _Watched:
    """What a forward pass did from the last layer on."""

    tail: list[nn.Module]
    residual: torch.Tensor  # [1, T, d]
    logits: torch.Tensor  # [1, T, V], float32


def _is_plain(head: nn.Module) -> bool:
    from torch import nn

    # exactly: a quantised or adapted layer is a linear layer to isinstance
    return type(head) is nn.Linear and head.weight.device.type != "meta"


def _last_layer(inner: nn.Module, name: str) -> nn.Module:
    """The end of the list of layers that an attention module's layer stands in."""
    from torch import nn

    layer = layer_of(inner, name)
    for module in inner.modules():
        if isinstance(module, nn.ModuleList) and any(child is layer for child in module):
            return module[-1]
    raise ModelError(f"logit lens: the layers around {name} stand in no list. Leave the lens out.")


def _watch(inner: Any, last: nn.Module, head: nn.Module) -> _Watched:
    import torch

    residual: list[torch.Tensor] = []
    tail: list[nn.Module] = []
    reached = False
    depth = 0

    def before(module: nn.Module, args: Any) -> None:
        nonlocal depth, reached
        if not residual or reached:
            return
        if module is head:
            reached = True
            return
        if depth == 0:
            tail.append(module)
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
    return _Watched(tail, residual[0], logits.float())


def _after(inner: Any, watched: _Watched, head: nn.Module) -> tuple[float, float | None]:
    """Factor and soft cap between the output embeddings and the logits.

    The factor is measured: families name it differently, and multiply with it or divide by it.
    """
    import torch

    with torch.no_grad(), evaluating(inner):
        states = watched.residual
        for module in watched.tail:
            states = module(states)
        raw = head(states).float()
    own = watched.logits.to(raw.device)
    error = float("inf")
    best: tuple[float, float | None] = (1.0, None)
    if raw.shape == own.shape:
        factor = float((raw * own).sum() / raw.square().sum().clamp_min(1e-30))
        cap = getattr(inner.config.get_text_config(), "final_logit_softcapping", None)
        candidates = [(1.0, None), (factor, None), *([(1.0, float(cap))] if cap else [])]
        errors = [float((_capped(raw * s, c) - own).abs().max()) for s, c in candidates]
        error = min(errors) / max(float(own.abs().max()), 1e-30)
        best = candidates[errors.index(min(errors))]
    tolerance = _TOLERANCE if watched.residual.dtype.itemsize >= 4 else _HALF_TOLERANCE
    if not error <= tolerance:
        raise ModelError(
            f"logit lens: the last norm and output embeddings of {type(inner).__name__} do not give its own "
            "logits; something is done between them that is not known here. Leave the lens out."
        )
    return best


def _capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    return logits if cap is None else cap * (logits / cap).tanh()
