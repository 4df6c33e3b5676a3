"""Several sites of every layer, read in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from ia2.models.capture import ActivationCapture
from ia2.utils.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ia2.models.tokens import Batch

READABLE = ("output", "heads", "residual", "neurons")
"""Sites that stand side by side; attention weights need a pass of their own."""


class SiteCapture:
    """As :class:`~ia2.models.capture.ActivationCapture`, of several sites side by side.

    ::

        with SiteCapture(model, ("output", "residual")) as capture:
            for output in answer_pass(model, tokenizer, pairs, capture=capture):
                found = capture.split(output.activations)     # {"output": [L, G, d], "residual": [L, G, d]}

    Args:
        model: bare or wrapped causal model.
        sites: some of :data:`READABLE`; at least one.
        pattern: optional glob over module names.

    Raises:
        ModelError: a site that the model does not have.
        ValueError: a site that cannot be read beside others.
    """

    site = "several"

    def __init__(self, model: nn.Module, sites: Sequence[str], pattern: str | None = None) -> None:
        if not sites or set(sites) - set(READABLE):
            raise ValueError(f"sites {list(sites)}: some of {', '.join(READABLE)}")
        self.captures = {site: ActivationCapture(model, pattern, site=site) for site in dict.fromkeys(sites)}
        self.layers = next(iter(self.captures.values())).layers
        self._widths: list[int] = []

    def __enter__(self) -> SiteCapture:
        with ExitStack() as stack:
            for capture in self.captures.values():
                stack.enter_context(capture)
            self._entered = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._entered.close()

    def arm(self) -> None:
        """Start listening for the next forward pass."""
        for capture in self.captures.values():
            capture.arm()

    def disarm(self) -> None:
        """Stop listening, and let go of what was heard."""
        for capture in self.captures.values():
            capture.disarm()

    def at_answers(self, batch: Batch, spans: Sequence[int] | None = None) -> torch.Tensor:
        """What the pass over ``batch`` left at its answer positions, sites side by side: ``[L, ΣG, Σw]``.

        Raises:
            ValueError: spans, which are for attention weights.
        """
        import torch

        if spans is not None:
            raise ValueError("spans are for attention weights, which are read on their own")
        parts = [capture.at_answers(batch) for capture in self.captures.values()]
        self._widths = [part.shape[-1] for part in parts]
        return torch.cat(parts, dim=-1)

    def split(self, activations: torch.Tensor) -> dict[str, torch.Tensor]:
        """``[L, G, Σw]`` of one row → site → ``[L, G, w]``."""
        return dict(zip(self.captures, activations.split(self._widths, dim=-1), strict=True))


def has_site(model: nn.Module, site: str, pattern: str | None = None) -> bool:
    """Whether a site can be read of this model; a mixture of experts has no ``neurons``."""
    try:
        ActivationCapture(model, pattern, site=site)
    except ModelError:
        return False
    return True
