"""Which layers are aligned: all, a list, a glob, a third of them, or those that change most under ICL."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ia2.utils.errors import ConfigError

if TYPE_CHECKING:
    import torch

_THIRDS = ("first-third", "middle-third", "last-third")


def choose_layers(
    choice: str | Sequence[int],
    names: Mapping[int, str],
    shift: Callable[[], Sequence[float]] | None = None,
) -> list[int]:
    """Layer indices that a setting stands for, in order.

    Args:
        choice: ``all``; ``first-third``, ``middle-third`` or ``last-third`` of the layers there are; a
            comma-separated list or a list of indices; ``top-K``, the K of the largest shift; or a glob
            over module names, such as ``model.layers.1?.self_attn`` (a name that contains the attention
            module, such as ``model.layers.1?``, matches too).
        names: layer index → module name, of all layers that have attention: ``dict(capture)``.
        shift: gives one number a layer, in their order; called for ``top-K`` only, for it is a pass of the
            teacher over the examples.

    Raises:
        ConfigError: a layer that is not there, a glob that matches nothing, K out of range, or something
            that is none of these.
    """
    available = sorted(names)
    if not isinstance(choice, str):
        return _listed(list(choice), available)
    choice = choice.strip()
    if choice == "all":
        return available
    if choice in _THIRDS:
        return _third(_THIRDS.index(choice), choice, available)
    if re.fullmatch(r"-?\d+(\s*,\s*-?\d+)*", choice):
        return _listed([int(part) for part in choice.split(",")], available)
    if top := re.fullmatch(r"top-(\d+)", choice):
        return _top(int(top[1]), available, shift)
    if re.search(r"[.*?\[]", choice):
        return _matching(choice, names)
    raise ConfigError(
        f"layers: '{choice}' is none of all, {', '.join(_THIRDS)}, top-K, a list such as 0,5,6, and a glob "
        f"over module names such as {names[available[0]]}."
    )


def _listed(wanted: list[int], available: list[int]) -> list[int]:
    if not wanted:
        raise ConfigError("layers: the list is empty. Name at least one, or give all.")
    if missing := sorted(set(wanted) - set(available)):
        listed = ", ".join(map(str, available))
        raise ConfigError(
            f"layers: {', '.join(map(str, missing))} not among those with attention. There are {listed}."
        )
    return sorted(set(wanted))


def _third(part: int, choice: str, available: list[int]) -> list[int]:
    count = len(available)
    if count < 3:
        raise ConfigError(
            f"layers: {choice} of {count} layers is not possible. Give all or a list such as {available[0]}."
        )
    # rounded, so that the middle third lies in the middle: 4 layers are 1, 2 and 1
    bounds = [round(place * count / 3) for place in range(4)]
    return available[bounds[part] : bounds[part + 1]]


def _top(count: int, available: list[int], shift: Callable[[], Sequence[float]] | None) -> list[int]:
    if not 1 <= count <= len(available):
        raise ConfigError(
            f"layers: top-{count} is not possible; K is 1 to {len(available)}, the layers with attention."
        )
    if shift is None:
        raise ConfigError(f"layers: top-{count} needs the layers' shift under ICL, which is not known here.")
    values = list(shift())
    places = sorted(range(len(available)), key=lambda place: -values[place])  # stable: ties in layer order
    return sorted(available[place] for place in places[:count])


def _matching(glob: str, names: Mapping[int, str]) -> list[int]:
    found = [
        layer
        for layer, name in names.items()
        if any(fnmatch.fnmatchcase(part, glob) for part in _with_ancestors(name))
    ]
    if not found:
        raise ConfigError(
            f"layers: the glob '{glob}' matches no attention module. They are named like {names[min(names)]}."
        )
    return sorted(found)


def _with_ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def layer_shift(icl: Iterable[torch.Tensor], base: Iterable[torch.Tensor]) -> list[float]:
    """How much each layer changes under ICL: the mean over examples of ``‖A_ICL − A_base‖²/‖A_ICL‖²``.

    Relative, since the size of activations differs by orders of magnitude between layers.

    Args:
        icl: ``[L, G, d]`` of each example, the base model with demonstrations.
        base: the same answers without them.

    Returns:
        L numbers; 0 where a layer says nothing at all.
    """
    total, count = None, 0
    for with_context, without in zip(icl, base, strict=True):
        reference = with_context.double()
        change = (reference - without.double()).pow(2).flatten(1).sum(1)
        # a layer that is silent in both has not changed
        share = change / reference.pow(2).flatten(1).sum(1).clamp_min(1e-30)
        total = share if total is None else total + share
        count += 1
    return [] if total is None else [float(value) for value in total / count]
