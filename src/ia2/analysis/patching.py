"""Activation patching: one run's activations put into another run, at the answer positions.

What stands at a position before the first answer position does not depend on the patch, so it is computed
once, into a KV cache, and many patches are then tried over the few answer positions alone (Vig et al. 2020,
arXiv 2004.12265; Meng et al. 2022, arXiv 2202.05262; Wang et al. 2023, arXiv 2211.00593, for single heads).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ia2.models.batching import MAX_LOGITS, in_halves, token_budget
from ia2.models.capture import ActivationCapture, unwrap
from ia2.models.families import evaluating, input_device, takes_cache
from ia2.models.forward import MIN_SHARED_PREFIX, check_finite
from ia2.models.packing import layer_mask, packs
from ia2.models.tokens import Ids, common_prefix
from ia2.utils.errors import ModelError
from ia2.utils.logging import progress

if TYPE_CHECKING:
    import torch
    from torch import nn

# Positions of one pack: each looks at all of them, though its mask leaves it only its own run.
_PACK, _PACK_GPU = 256, 1024


class Part(NamedTuple):
    """What is replaced in one layer.

    Attributes:
        site: ``output``, ``heads``, ``residual`` or ``neurons`` (:data:`ia2.models.capture.SITES`).
        layer: index of a layer with attention.
        parts: heads (site ``heads``), else features or neurons; None: the whole site.
    """

    site: str
    layer: int
    parts: tuple[int, ...] | None = None


Patch = tuple[Part, ...]
"""Parts replaced together. The empty patch is the run as it is."""

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

    Only ``prompt + answer[:-1]`` is fed. Each patch is tried alone on every example, whose source is what is
    put in. The model is in evaluation mode for the duration.

    Returns:
        ``[n, len(patches)]``, nats, summed over an answer's tokens.

    Raises:
        ModelError: a site that the model does not have, heads that its width does not divide into, or logits
            that are not finite.
    """
    import torch

    values = np.empty((len(prompts), len(patches)))
    patcher = _Patcher(model, sorted({part.site for patch in patches for part in patch}), pattern)
    with (
        evaluating(model),
        torch.no_grad(),
        patcher.hooked(),
        progress(description, len(prompts) * len(patches)) as bar,
    ):
        runs = _Runs(model, prompts)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            cache, fed = runs.behind(prompt, answer)
            wanted = torch.tensor(answer)[None, :, None]

            def run(members: list[int], i: int = i, cache: Any = cache, fed: Ids = fed, wanted: Any = wanted):  # type: ignore[no-untyped-def]
                with patcher.patching([patches[j] for j in members], sources[i], wanted.shape[1]):
                    logits = runs.logits(cache, fed, len(members), wanted.shape[1])
                check_finite(model, logits.amax(-1), "logits")
                log_p = logits.float().log_softmax(-1)
                index = wanted.to(log_p.device).expand(len(members), -1, -1)
                return list(zip(members, log_p.gather(-1, index).sum((1, 2)).tolist(), strict=True))

            size = runs.batch(cache, fed, len(answer))
            plan = [list(range(s, min(s + size, len(patches)))) for s in range(0, len(patches), size)]
            for place, value in in_halves(plan, run, bar):
                values[i, place] = value
    return values


class _Patcher:
    """Hooks that replace, row by row, what a forward pass has at its last positions."""

    def __init__(self, model: nn.Module, sites: Sequence[str], pattern: str | None) -> None:
        config: Any = unwrap(model).config.get_text_config()
        self.heads = int(getattr(config, "num_attention_heads", 1))
        self._captures = {site: ActivationCapture(model, pattern, site=site) for site in sites}
        self._todo: dict[tuple[str, int], list[tuple[int, Any, torch.Tensor]]] = {}
        self._rows = self._positions = 0

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

    @contextmanager
    def patching(self, patches: Sequence[Patch], source: Source, positions: int) -> Iterator[None]:
        """The next forward pass has a row for each of these patches, taken from this source."""
        self._rows, self._positions = len(patches), positions
        for row, patch in enumerate(patches):
            for part in patch:
                values = source[part.site][self._captures[part.site].layers.index(part.layer)]
                columns = self._columns(part, values.shape[-1])
                entry = (row, columns, values[:, columns])
                self._todo.setdefault((part.site, part.layer), []).append(entry)
        try:
            yield
        finally:
            self._todo = {}

    def _columns(self, part: Part, width: int) -> Any:
        if part.parts is None:
            return slice(None)
        each = width // self.heads if part.site == "heads" else 1
        if part.site == "heads" and width % self.heads:
            raise ModelError(
                f"the {width} features before the output projection of layer {part.layer} do not divide "
                f"into {self.heads} heads. Patch whole layers (site output)."
            )
        return [own * each + column for own in part.parts for column in range(each)]

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


class _Runs:
    """Runs the answer positions of one example many times over.

    Where the family packs (:func:`ia2.models.packing.packs`) all runs are one sequence behind one cache, at
    the same positions, each seeing only itself; else rows, each with a copy of the cache; where there is no
    cache, with the whole prompt. What all prompts begin with is computed once.
    """

    def __init__(self, model: Any, prompts: Sequence[Ids]) -> None:
        self.model, self.device = model, input_device(model)
        self._cached = takes_cache(model)
        self._packed = packs(model)
        self._shared: Any = None
        self._length = 0
        if self._cached and len(prompts) > 1:
            length = min(common_prefix(prompts), min(map(len, prompts)) - 1)
            if length >= MIN_SHARED_PREFIX:
                self._shared, self._length = self._read(None, 0, prompts[0][:length]), length

    def behind(self, prompt: Ids, answer: Ids) -> tuple[Any, Ids]:
        """The cache of what comes before the answer positions of an example, and the ids of each run."""
        before, fed = prompt[:-1], (prompt[-1], *answer[:-1])
        if not self._cached or not before:
            return None, (*before, *fed)
        if self._shared is not None and len(before) == self._length:
            return self._shared, fed
        return self._read(_branch(self._shared), self._length, before[self._length :]), fed

    def _read(self, cache: Any, done: int, ids: Ids) -> Any:
        """The KV cache after these ids, behind ``done`` that are in it; batch 1."""
        import torch
        from transformers import DynamicCache

        if cache is None:
            # a pack's mask has all positions, whatever window a layer has
            cache = DynamicCache() if self._packed else DynamicCache(config=self.model.config)
        self.model(
            input_ids=torch.tensor([ids], device=self.device),
            attention_mask=torch.ones(1, done + len(ids), dtype=torch.long, device=self.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return cache

    def batch(self, cache: Any, fed: Ids, positions: int) -> int:
        """Runs of one batch."""
        budget, each = token_budget(self.model), len(fed)
        if cache is not None and self._packed:
            budget = min(budget, _PACK_GPU if self.device.type == "cuda" else _PACK)
        elif cache is not None:
            each += cache.get_seq_length()
        vocabulary = int(self.model.get_output_embeddings().weight.shape[0])
        return max(1, min(budget // each, MAX_LOGITS // (positions * vocabulary)))

    def logits(self, cache: Any, fed: Ids, count: int, positions: int) -> torch.Tensor:
        """Of so many runs at their last positions, ``[count, positions, V]``."""
        import torch

        g, device = len(fed), self.device
        past = 0 if cache is None else cache.get_seq_length()
        options: dict[str, Any] = {"use_cache": cache is not None}
        if cache is not None:
            options["past_key_values"] = _branch(cache)
        if cache is not None and self._packed:
            place = torch.arange(count * g, device=device)
            queries = past + place % g
            visible = (place[:, None] // g == place // g) & (place[:, None] >= place)
            visible = torch.cat([visible.new_ones(count * g, past), visible], dim=1)
            keys = torch.cat([torch.arange(past, device=device), queries])
            logits = self.model(
                input_ids=torch.tensor([fed * count], device=device),
                attention_mask=layer_mask(self.model, visible, queries, keys),
                position_ids=queries[None],
                **options,
            ).logits
            return logits.reshape(count, g, -1)  # type: ignore[no-any-return]
        if cache is not None:
            options["past_key_values"].batch_repeat_interleave(count)
        return self.model(  # type: ignore[no-any-return]
            input_ids=torch.tensor([fed], device=device).repeat(count, 1),
            attention_mask=torch.ones(count, past + g, dtype=torch.long, device=device),
            logits_to_keep=positions,
            **options,
        ).logits[:, -positions:]


def _branch(cache: Any) -> Any:
    """A cache that holds the same and grows on its own; layers replace their tensors when they grow."""
    branch = copy.copy(cache)
    if cache is not None:
        branch.layers = [copy.copy(layer) for layer in cache.layers]
    return branch
