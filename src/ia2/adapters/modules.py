"""Which modules an adapter changes where none are named: projections of attention, ends of MLPs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ia2.models.capture import find_attention_modules, unwrap
from ia2.utils.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

# Leaf names of value projections: the paper adapts queries, keys and outputs.
_VALUE_NAMES = ("v_proj", "value", "v")

# Leaf names of output projections; elsewhere the last linear layer of the right width is taken.
_OUTPUT_NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo")


def attention_projections(model: nn.Module) -> list[str]:
    """Names of the query, key and output projections (or fused ones), shortest that are unambiguous.

    Returns names as PEFT's ``target_modules`` takes them: the leaf name where it occurs in attention
    only (``q_proj``), with its parent where another module has the same leaf (``attn.c_proj`` on
    GPT-2, whose MLP has a ``c_proj`` too).

    Raises:
        ModelError: the attention modules have no linear layers.
    """
    inner = unwrap(model)
    inside = [
        name
        for parent in _attention(inner)
        for name in _linear_layers(inner, parent)
        if name.rsplit(".", 1)[-1] not in _VALUE_NAMES
    ]
    if not inside:
        raise ModelError(
            f"no linear layers found in the attention modules of {type(inner).__name__}; "
            "give adapter.target_modules."
        )
    return _short_names(inner, inside)


def output_projections(model: nn.Module, placement: str) -> list[str]:
    """Names of the layers after which bottleneck adapters come, named as PEFT's ``target_modules``.

    ``pfeiffer``: the last linear layer of each MLP, also in a hybrid's layers without attention;
    ``houlsby``: also attention's output projection.

    Raises:
        ModelError: they are not recognised, as where the MLP is a mixture of experts.
    """
    inner = unwrap(model)
    width = inner.config.get_text_config().hidden_size
    found: list[str] = []
    for parent in _attention(inner):
        layer = re.match(r"(.*\.\d+)(\.|$)", parent)
        names = [n for n in _linear_layers(inner, layer[1] if layer else "") if _out(inner, n) == width]
        attention = [name for name in names if name.startswith(f"{parent}.")]
        known = [name for name in attention if name.rsplit(".", 1)[-1] in _OUTPUT_NAMES]
        # beside the MLP's last layer a few models have narrow ones that lead back to the full width
        mlp = [name for name in names if name not in attention]
        last = max(reversed(mlp), key=lambda n: _in(inner, n), default=None)
        if layer is None or not attention or last is None or _has_experts(inner, layer[1], parent):
            raise ModelError(
                f"where bottleneck adapters go in {type(inner).__name__} is not known: output projections of "
                f"attention and MLP were not recognised around {parent} (mixtures of experts have none). "
                "Give adapter.target_modules, such as mlp."
            )
        if placement == "houlsby":
            found.append((known or attention)[-1])
        stack, place = layer[1].rsplit(".", 1)[0], last.removeprefix(f"{layer[1]}.")
        alike = re.compile(rf"{re.escape(stack)}\.\d+\.{re.escape(place)}")
        found += [name for name in _linear_layers(inner, stack) if alike.fullmatch(name)]
    return _short_names(inner, found)


def _attention(inner: nn.Module) -> list[str]:
    linear = _linear_kinds()
    names = [name for name, _ in find_attention_modules(inner).values()]
    # where the output projection itself is hooked (Bloom), its parent is the attention module
    return [n.rsplit(".", 1)[0] if isinstance(inner.get_submodule(n), linear) else n for n in names]


def _linear_kinds() -> tuple[type, ...]:
    import torch
    from transformers.pytorch_utils import Conv1D

    return torch.nn.Linear, Conv1D


def _linear_layers(inner: nn.Module, parent: str) -> list[str]:
    kinds = _linear_kinds()
    root = inner.get_submodule(parent)
    return [n for n, module in root.named_modules(prefix=parent) if isinstance(module, kinds) and n != parent]


def _out(inner: nn.Module, name: str) -> int:
    module: Any = inner.get_submodule(name)
    return module.nf if hasattr(module, "nf") else module.out_features


def _in(inner: nn.Module, name: str) -> int:
    module: Any = inner.get_submodule(name)
    return module.nx if hasattr(module, "nx") else module.in_features


def _has_experts(inner: nn.Module, layer: str, attention: str) -> bool:
    """Whether a layer holds the weights of several experts in one tensor."""
    import torch

    modules = inner.get_submodule(layer).named_modules(prefix=layer)
    return any(
        weight.dim() == 3
        for name, module in modules
        if not f"{name}.".startswith(f"{attention}.") and not isinstance(module, torch.nn.Conv1d)
        for weight in module.parameters(recurse=False)
    )


def _short_names(inner: nn.Module, chosen: list[str]) -> list[str]:
    kinds = _linear_kinds()
    others = {
        name.rsplit(".", 1)[-1]
        for name, module in inner.named_modules()
        if isinstance(module, kinds) and name not in chosen
    }
    names: dict[str, None] = {}
    for name in chosen:
        leaf = name.rsplit(".", 1)[-1]
        names[leaf if leaf not in others else ".".join(name.split(".")[-2:])] = None
    return list(names)
