"""Activation patching: one run's activations put into another run, at the answer positions.

What stands at a position before the first answer position does not depend on the patch, so it is computed
once, into a KV cache, and many patches are then tried over the few answer positions alone (Vig et al. 2020,
arXiv 2004.12265; Meng et al. 2022, arXiv 2202.05262; Wang et al. 2023, arXiv 2211.00593, for single heads).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ia2.models.batching import MAX_LOGITS, in_halves, token_budget
from ia2.models.capture import ActivationCapture, unwrap
from ia2.models.families import evaluating, has_sliding_window, input_device, layer_kinds, takes_cache
from ia2.models.forward import MIN_SHARED_PREFIX, check_finite
from ia2.models.tokens import Ids, common_prefix
from ia2.utils.errors import ModelError
from ia2.utils.logging import logger, progress

if TYPE_CHECKING:
    import torch
    from torch import nn

# Positions of one pack: each looks at all of them, though its mask leaves it only its own run.
_PACK, _PACK_GPU = 256, 1024

# By how much log-probabilities of a pack may differ from those of a plain pass, nats.
_TOLERANCE, _TOLERANCE_HALF = 1e-2, 0.5


@dataclass(frozen=True)
class Unit:
    """What is replaced in one layer.

    Attributes:
        site: ``output``, ``heads``, ``residual`` or ``neurons`` (:data:`ia2.models.capture.SITES`).
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
:class:`~ia2.models.sites.SiteCapture` splits them."""


def patched_log_probs(
    model: nn.Module,
    prompts: Sequence[Ids],
    answers: Sequence[Ids],
    sources: Sequence[Source],
    patches: Sequence[Patch],
    *,
    pattern: str | None = None,
    description: str = "patching",
) -> np.ndarray:
    """Log-probability of each answer after each patch, without gradients.

    Args:
        model: causal model, bare or PEFT, in the state that is patched; in evaluation mode for the duration.
        prompts: prompt ids.
        answers: answer ids; only ``prompt + answer[:-1]`` is fed.
        sources: of each example, the activations that are put in.
        patches: what is replaced, each tried alone, on every example.
        pattern: optional glob over module names (see :func:`ia2.models.capture.find_attention_modules`).
        description: text of the progress bar.

    Returns:
        ``[n, len(patches)]``, nats, summed over an answer's tokens.

    Raises:
        ModelError: a site that the model does not have, heads that its width does not divide into, or logits
            that are not finite.
        ValueError: a source that does not fit its answer or the model, or an unknown unit.
    """
    import torch

    values = np.empty((len(prompts), len(patches)))
    patcher = _Patcher(model, sorted({unit.site for patch in patches for unit in patch}), pattern)
    with (
        evaluating(model),
        torch.no_grad(),
        patcher.hooked(),
        progress(description, len(prompts) * len(patches)) as bar,
    ):
        runs = AnswerRuns(model, prompts)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            patcher.use(sources[i], len(answer))
            layout = runs.of(prompt, answer)
            wanted = torch.tensor(answer)[None, :, None]

            def run(members: list[int], layout: Layout = layout, wanted: Any = wanted) -> list[Any]:
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
                    module.register_forward_pre_hook(lambda m, args, key=key: self._changed(key, args))
                    if site in ("heads", "neurons")
                    else module.register_forward_hook(lambda m, a, out, key=key: self._changed(key, out))
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

    def _changed(self, key: tuple[str, int], value: Any) -> Any:
        """What a module is given or gives, with the patches in it; None where there are none."""
        if not (todo := self._todo.get(key)):
            return None
        tensor = value[0] if isinstance(value, (tuple, list)) else value
        # [B, T, w], a pack's [1, B·T, w], or rows one behind the other, [B·T, w]
        rows = tensor.reshape(self._rows, -1, tensor.shape[-1]).clone()
        for row, columns, values in todo:
            rows[row][-self._positions :, columns] = values.to(rows.device, rows.dtype)
        changed = rows.reshape(tensor.shape)
        return type(value)((changed, *value[1:])) if isinstance(value, (tuple, list)) else changed


# ----------------------------------------------------------------------------- many runs of an answer


@dataclass(frozen=True)
class Layout:
    """How the answer positions of one example are run many times over.

    Attributes:
        model: that runs them.
        cache: of the ids before, batch 1, or None.
        past: how many these are.
        fed: ids of each run.
        positions: of ``fed``, the last ones, at which answers are predicted.
        packed: all runs in one sequence behind one cache, at the same positions, each seeing only itself;
            otherwise a run a row, each with a copy of the cache.
    """

    model: Any
    cache: Any
    past: int
    fed: Ids
    positions: int
    packed: bool = False

    @property
    def size(self) -> int:
        """Runs of one batch."""
        budget, each = token_budget(self.model), self.past + len(self.fed)
        if self.packed:
            pack = _PACK_GPU if input_device(self.model).type == "cuda" else _PACK
            budget, each = min(pack, budget), len(self.fed)
        vocabulary = int(self.model.get_output_embeddings().weight.shape[0])
        return max(1, min(budget // each, MAX_LOGITS // (self.positions * vocabulary)))

    def logits(self, count: int) -> torch.Tensor:
        """Of so many runs, ``[count, G, V]``."""
        import torch

        device = input_device(self.model)
        cache = copy.deepcopy(self.cache)
        if self.packed:
            g = len(self.fed)
            place = torch.arange(count * g, device=device)
            visible = (place[:, None] // g == place // g) & (place[:, None] >= place)
            visible = torch.cat([visible.new_ones(count * g, self.past), visible], dim=1)
            # numbers, not truth values: eager attention adds them
            mask = torch.zeros(visible.shape, dtype=self.model.dtype, device=device)
            mask.masked_fill_(~visible, torch.finfo(mask.dtype).min)
            output = self.model(
                input_ids=torch.tensor([self.fed * count], device=device),
                attention_mask=mask[None, None],
                position_ids=(self.past + place % g)[None],
                past_key_values=cache,
                use_cache=True,
            )
            return output.logits.reshape(count, g, -1)  # type: ignore[no-any-return]
        if cache is not None:
            cache.batch_repeat_interleave(count)
        output = self.model(
            input_ids=torch.tensor([self.fed], device=device).repeat(count, 1),
            attention_mask=torch.ones(count, self.past + len(self.fed), dtype=torch.long, device=device),
            logits_to_keep=self.positions,
            use_cache=cache is not None,
            **({} if cache is None else {"past_key_values": cache}),
        )
        return output.logits[:, -self.positions :]  # type: ignore[no-any-return]


class AnswerRuns:
    """Lays out the runs of each example.

    Packed, where the family takes such masks; else as rows behind a cache; where there is no cache, as rows
    with the whole prompt. What all prompts begin with is computed once.
    """

    def __init__(self, model: nn.Module, prompts: Sequence[Ids]) -> None:
        self._model = model
        self._cached = takes_cache(model)
        self._packs: bool | None = None if self._cached and _may_pack(model) else False
        self._shared: Any = None
        self._length = 0
        if self._cached and len(prompts) > 1:
            length = min(common_prefix(prompts), min(map(len, prompts)) - 1)
            if length >= MIN_SHARED_PREFIX:
                self._shared, self._length = self._read(None, 0, prompts[0][:length]), length

    def of(self, prompt: Ids, answer: Ids) -> Layout:
        """The layout of one example."""
        before, fed = prompt[:-1], (prompt[-1], *answer[:-1])
        if not self._cached or not before:
            return Layout(self._model, None, 0, (*before, *fed), len(fed))
        cache = copy.deepcopy(self._shared)
        if cache is None or len(before) > self._length:
            cache = self._read(cache, self._length, before[self._length :])
        rows = Layout(self._model, cache, len(before), fed, len(fed))
        if self._packs is False or not _sees_all(self._model, len(before) + len(fed)):
            return rows
        packed = replace(rows, packed=True)
        if self._packs is None:
            self._packs = self._agree(packed, rows)
        return packed if self._packs else rows

    def _read(self, cache: Any, done: int, ids: Ids) -> Any:
        """The KV cache after these ids, behind ``done`` that are in it; batch 1."""
        import torch
        from transformers import DynamicCache

        model: Any = self._model
        device = input_device(model)
        cache = DynamicCache(config=model.config) if cache is None else cache
        model(
            input_ids=torch.tensor([ids], device=device),
            attention_mask=torch.ones(1, done + len(ids), dtype=torch.long, device=device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return cache

    def _agree(self, packed: Layout, rows: Layout) -> bool:
        """Whether the model takes the mask as it is meant."""
        import torch

        a, b = (each.float().log_softmax(-1) for each in (packed.logits(3)[-1], rows.logits(1)[0]))
        difference = (a - b).abs().max().item()
        model: Any = self._model
        if difference <= (_TOLERANCE if model.dtype == torch.float32 else _TOLERANCE_HALF):
            return True
        logger.debug("Packed and plain passes differ by %.3g nats: they go on as rows.", difference)
        return False


def _may_pack(model: Any) -> bool:
    """Whether the family is one that hands a four-dimensional mask on as it is."""
    inner = unwrap(model)
    return (
        getattr(inner, "_supports_attention_backend", False)
        and "position_ids" in inspect.signature(inner.forward).parameters
        and inner.config._attn_implementation in ("sdpa", "eager")
    )


def _sees_all(model: Any, length: int) -> bool:
    """Whether every layer sees all of a sequence of this length, so that one mask serves all layers."""
    if not has_sliding_window(model):
        return True
    if any("chunked" in kind for kind in layer_kinds(model)):
        return False
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    return isinstance(window, int) and length <= window
