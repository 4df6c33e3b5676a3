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
        choice: ``all``; ``first-third``, ``middle-third`` or ``last-third``; indices, as a list or a text;
            ``top-K``, the K of the largest shift; or a glob over module names, such as
            ``model.layers.1?.self_attn`` (or of a module that contains it, ``model.layers.1?``).
        names: layer index → module name, of all layers that have attention: ``dict(capture)``.
        shift: gives one number a layer, in their order; called for ``top-K`` only.

    Raises:
        ConfigError: a layer that is not there, a glob that matches nothing, K out of range, or something
            that is none of these.
    """
    available = sorted(names)
    count = len(available)
    if not isinstance(choice, str):
        return _listed(choice, available)
    choice = choice.strip()
    if choice == "all":
        return available
    if choice in _THIRDS:
        if count < 3:
            raise ConfigError(
                f"layers: {choice} of {count} layers is not possible. Give all or a list such as "
                f"{available[0]}."
            )
        # rounded, so that the middle third lies in the middle: 4 layers are 1, 2 and 1
        first, end = (round((_THIRDS.index(choice) + n) * count / 3) for n in (0, 1))
        return available[first:end]
    if re.fullmatch(r"-?\d+(\s*,\s*-?\d+)*", choice):
        return _listed([int(part) for part in choice.split(",")], available)
    if top := re.fullmatch(r"top-(\d+)", choice):
        return _top(int(top[1]), available, shift)
    if not re.search(r"[.*?\[]", choice):
        raise ConfigError(
            f"layers: '{choice}' is none of all, {', '.join(_THIRDS)}, top-K, a list such as 0,5,6, and a "
            f"glob over module names such as {names[available[0]]}."
        )
    matching = [layer for layer in available if _matches(names[layer], choice)]
    if not matching:
        raise ConfigError(
            f"layers: the glob '{choice}' matches no attention module. They are named like "
            f"{names[available[0]]}."
        )
    return matching


def _listed(wanted: Sequence[int], available: list[int]) -> list[int]:
    if not wanted:
        raise ConfigError("layers: the list is empty. Name at least one, or give all.")
    if missing := sorted(set(wanted) - set(available)):
        listed = ", ".join(map(str, available))
        raise ConfigError(
            f"layers: {', '.join(map(str, missing))} not among those with attention. There are {listed}."
        )
    return sorted(set(wanted))


def _top(count: int, available: list[int], shift: Callable[[], Sequence[float]] | None) -> list[int]:
    if not 1 <= count <= len(available):
        raise ConfigError(
            f"layers: top-{count} is not possible; K is 1 to {len(available)}, the layers with attention."
        )
    if shift is None:
        raise ConfigError(f"layers: top-{count} needs the layers' shift under ICL, which is not known here.")
    ranked = sorted(zip(shift(), available, strict=True), key=lambda pair: -pair[0])  # ties in layer order
    return sorted(layer for _, layer in ranked[:count])


def _matches(name: str, glob: str) -> bool:
    """Whether a module or one that contains it matches."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[: n + 1]), glob) for n in range(len(parts)))


def layer_shift(icl: Iterable[torch.Tensor], base: Iterable[torch.Tensor]) -> list[float]:
    """How much each layer changes under ICL: the mean over examples of ``‖A_ICL − A_base‖²/‖A_ICL‖²``.

    Relative, since the size of activations differs by orders of magnitude between layers. ``icl`` and
    ``base`` are ``[L, G, d]`` of each example, with demonstrations and without.
    """
    shares = []
    for with_context, without in zip(icl, base, strict=True):
        reference = with_context.double()
        change = (reference - without.double()).pow(2).flatten(1).sum(1)
        # a layer that is silent in both has not changed
        shares.append(change / reference.pow(2).flatten(1).sum(1).clamp_min(1e-30))
    return (sum(shares[1:], shares[0]) / len(shares)).tolist() if shares else []
