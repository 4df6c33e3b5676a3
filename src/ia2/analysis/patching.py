"""Activation patching: one run's activations put into another run, at the answer positions.

What stands at a position before the first answer position does not depend on the patch, so it is computed
once, into a KV cache, and many patches are then tried over the few answer positions alone (Vig et al. 2020,
arXiv 2004.12265; Meng et al. 2022, arXiv 2202.05262; Wang et al. 2023, arXiv 2211.00593, for single heads).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ia2.analysis.answer_runs import AnswerRuns
from ia2.batching import in_halves
from ia2.capture import ActivationCapture, unwrap
from ia2.console import progress
from ia2.errors import ModelError
from ia2.inference import check_finite
from ia2.tokens import Ids
from ia2.traits import evaluating

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Unit:
    """What is replaced in one layer.

    Attributes:
        site: ``output``, ``heads``, ``residual`` or ``neurons`` (:data:`ia2.capture.SITES`).
        layer: index of a layer with attention.
        parts: heads (site ``heads``), else features or neurons; None: the whole site.
    """

    site: str
    layer: int
    parts: tuple[int, ...] | None = None


Patch = tuple[Unit, ...]
"""Units replaced together. The empty patch is the run as it is."""

Source = Mapping[str, "torch.Tensor"]
"""Site → ``[L, G, w]``: activations at one example's answer positions, as
:class:`~ia2.analysis.sites.SiteCapture` splits them."""


def patched_log_probs(
    model: nn.Module,
    prompts: Sequence[Ids],
    answers: Sequence[Ids],
    sources: Sequence[Source],
    patches: Sequence[Patch],
    *,
    scored: Sequence[Ids] | None = None,
    pattern: str | None = None,
    batch_tokens: int | None = None,
    description: str = "patching",
) -> np.ndarray:
    """Log-probability of each answer after each patch, without gradients.

    Args:
        model: causal model, bare or PEFT, in the state that is patched; in evaluation mode for the duration.
        prompts: prompt ids.
        answers: answer ids; only ``prompt + answer[:-1]`` is fed.
        sources: of each example, the activations that are put in.
        patches: what is replaced, each tried alone, on every example.
        scored: ids whose log-probability is wanted at the same positions; by default the answers.
        pattern: optional glob over module names (see :func:`ia2.capture.find_attention_modules`).
        batch_tokens: tokens of one batch; None chooses from the free memory.
        description: text of the progress bar.

    Returns:
        ``[n, len(patches)]``, nats, summed over an answer's tokens.

    Raises:
        ModelError: a site that the model does not have, heads that its width does not divide into, or logits
            that are not finite.
        ValueError: a source that does not fit its answer or the model, or an unknown unit.
    """
    import torch

    scored = answers if scored is None else scored
    values = np.empty((len(prompts), len(patches)))
    patcher = _Patcher(model, sorted({unit.site for patch in patches for unit in patch}), pattern)
    with (
        evaluating(model),
        torch.no_grad(),
        patcher.hooked(),
        progress(description, len(prompts) * len(patches)) as bar,
    ):
        runs = AnswerRuns(model, prompts, batch_tokens)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            patcher.use(sources[i], len(answer))
            layout = runs.of(prompt, answer)
            wanted = torch.tensor(scored[i])[None, :, None]

            def run(members: list[int], layout: Any = layout, wanted: Any = wanted) -> list[Any]:
                with patcher.patching([patches[j] for j in members]):
                    logits = layout.logits(len(members))
                check_finite(model, logits.amax(-1), "logits")
                log_p = logits.float().log_softmax(-1)
                index = wanted.to(log_p.device).expand(len(members), -1, -1)
                return list(zip(members, log_p.gather(-1, index).sum((1, 2)).tolist(), strict=True))

            size = layout.size
            plan = [list(range(s, min(s + size, len(patches)))) for s in range(0, len(patches), size)]
            for place, value in in_halves(plan, run, bar):
                values[i, place] = value
    return values


# ------------------------------------------------------------------------------------------- hooks


class _Patcher:
    """Hooks that replace, row by row, what a forward pass has at its last positions."""

    def __init__(self, model: nn.Module, sites: Sequence[str], pattern: str | None) -> None:
        config: Any = unwrap(model).config.get_text_config()
        self.heads = int(getattr(config, "num_attention_heads", 1))
        self._captures = {site: ActivationCapture(model, pattern, site=site) for site in sites}
        self._todo: dict[tuple[str, int], list[tuple[int, Any, torch.Tensor]]] = {}
        self._rows = 0

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """The hooks are there; they do nothing but inside :meth:`patching`."""
        handles = []
        for site, capture in self._captures.items():
            for layer, module in capture.hooked.items():
                key = (site, layer)
                # On the wrapper that PEFT puts around a projection, so that the adapter sees the patch too.
                handles.append(
                    module.register_forward_pre_hook(self._on_input(key))
                    if site in ("heads", "neurons")
                    else module.register_forward_hook(self._on_output(key))
                )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def use(self, source: Source, positions: int) -> None:
        """From now on patches are taken from here.

        Raises:
            ValueError: other layers than the model's, or another number of positions.
        """
        for site, capture in self._captures.items():
            shape = tuple(source[site].shape) if site in source else None
            if shape is None or shape[:2] != (len(capture.layers), positions):
                raise ValueError(
                    f"the source's {site} are {shape}; [{len(capture.layers)}, {positions}, w] are needed"
                )
        self._source, self._positions = source, positions

    @contextmanager
    def patching(self, patches: Sequence[Patch]) -> Iterator[None]:
        """The next forward pass has a row for each of these."""
        self._rows = len(patches)
        for row, patch in enumerate(patches):
            for unit in patch:
                layers = self._captures[unit.site].layers
                if unit.layer not in layers:
                    raise ValueError(f"layer {unit.layer} has no attention; there are {layers}")
                values = self._source[unit.site][layers.index(unit.layer)]
                columns = self._columns(unit, values.shape[-1])
                entry = (row, columns, values[:, columns])
                self._todo.setdefault((unit.site, unit.layer), []).append(entry)
        try:
            yield
        finally:
            self._todo = {}

    def _columns(self, unit: Unit, width: int) -> Any:
        if unit.parts is None:
            return slice(None)
        each = 1
        if unit.site == "heads":
            if width % self.heads:
                raise ModelError(
                    f"the {width} features before the output projection of layer {unit.layer} do not divide "
                    f"into {self.heads} heads. Patch whole layers (site output)."
                )
            each = width // self.heads
        if not all(0 <= part < width // each for part in unit.parts):
            raise ValueError(f"{unit} has a part that is not there; there are {width // each}")
        return [part * each + column for part in unit.parts for column in range(each)]

    def _on_input(self, key: tuple[str, int]) -> Any:
        def replace(module: nn.Module, args: tuple[Any, ...]) -> Any:
            return (self._replaced(args[0], todo), *args[1:]) if (todo := self._todo.get(key)) else None

        return replace

    def _on_output(self, key: tuple[str, int]) -> Any:
        def replace(module: nn.Module, args: Any, output: Any) -> Any:
            if not (todo := self._todo.get(key)):
                return None
            if isinstance(output, (tuple, list)):
                return type(output)((self._replaced(output[0], todo), *output[1:]))
            return self._replaced(output, todo)

        return replace

    def _replaced(self, tensor: torch.Tensor, todo: Sequence[tuple[int, Any, torch.Tensor]]) -> torch.Tensor:
        # [B, T, w], a pack's [1, B·T, w], or rows one behind the other, [B·T, w]
        rows = tensor.reshape(self._rows, -1, tensor.shape[-1]).clone()
        for row, columns, values in todo:
            rows[row][-self._positions :, columns] = values.to(rows.device, rows.dtype)
        return rows.reshape(tensor.shape)
