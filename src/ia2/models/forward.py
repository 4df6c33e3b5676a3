"""Forward passes and generation for many prompts: the one place where batches are made.

:func:`answer_pass` gives logits and activations at answer positions; the teacher's targets, the
scoring of labels and the similarity measures are all made of it. :func:`answers_pass` gives the logits of
many short answers behind each prompt (answers are written by :mod:`ia2.models.generation`). All sort by
length, share a common prefix through the KV cache, choose a batch size that fits in memory and halve it
when it does not.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ia2.models.batching import in_halves, plan_batches, token_budget
from ia2.models.capture import unwrap
from ia2.models.families import (
    evaluating,
    input_device,
    takes_cache,
)
from ia2.models.packing import pack_size, packs, tree_pass
from ia2.models.sharding import stepping
from ia2.models.tokens import (
    Batch,
    Ids,
    common_prefix,
    fed_ids,
    pad_id,
    pad_rows,
)
from ia2.utils.errors import ModelError
from ia2.utils.logging import Progress, logger, progress

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from ia2.models.capture import Capture

# Below this a shared prefix saves less than copying its cache costs.
MIN_SHARED_PREFIX = 16


@dataclass
class AnswerOutput:
    """What a forward pass says at the answer positions of one row.

    Attributes:
        index: the row's place in the input.
        logits: ``[G, V]`` float32, or None.
        activations: ``[L, G, d]`` in the model's dtype; attention weights ``[L, G, H, S]`` over the row's
            own span, in float32; or None.
    """

    index: int
    logits: torch.Tensor | None
    activations: torch.Tensor | None


def answer_pass(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[Ids, Ids]],
    *,
    capture: Capture | None = None,
    spans: Sequence[int] | None = None,
    logits: bool = True,
    description: str = "forward",
    batch_tokens: int | None = None,
) -> Iterator[AnswerOutput]:
    """One teacher-forced pass over (prompt, answer) pairs, without gradients.

    Ids that rows begin with alike are computed once, and nothing is padded, where the model allows it (see
    :mod:`ia2.models.packing`); elsewhere rows are padded, and share what *all* begin with.

    Args:
        model: causal model, bare or PEFT; put in evaluation mode for the duration.
        tokenizer: gives the padding id.
        pairs: prompt ids and answer ids; only ``prompt + answer[:-1]`` is fed.
        capture: an entered :class:`~ia2.models.capture.ActivationCapture` (or what is used as one), or None.
        spans: where attention weights are captured, the number of last ids of each row, as fed, that they
            are wanted over (see :meth:`~ia2.models.capture.ActivationCapture.at_answers`).
        logits: whether the language-model head is wanted at the answer positions.
        description: text of the progress bar.
        batch_tokens: tokens of one batch; None chooses from the free memory.

    Yields:
        One :class:`AnswerOutput` a pair, in the order in which batches finish (not of the input).

    Raises:
        ModelError: logits or activations that are not finite.
        ValueError: a span that is longer than its row, or attention weights without spans.
    """
    rows = [fed_ids(prompt, answer) for prompt, answer in pairs]
    lengths = [len(answer) for _, answer in pairs]
    if spans is not None and any(not 1 <= s <= len(row) for s, row in zip(spans, rows, strict=True)):
        raise ValueError("spans must be between 1 and the number of ids that are fed")
    weights = capture is not None and capture.site == "weights"
    with evaluating(model), progress(description, len(rows)) as bar:
        # of one row there is nothing to share or to pad, and to find out whether a model packs costs more
        if len(rows) > 1 and not weights and packs(model):
            yield from _packed(model, rows, lengths, capture, logits, bar, batch_tokens)
        else:
            yield from _padded(model, tokenizer, rows, lengths, capture, spans, logits, bar, batch_tokens)


def answers_pass(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Ids],
    answers: Sequence[Ids],
    *,
    description: str = "forward",
) -> Iterator[AnswerOutput]:
    """Logits of every answer behind every prompt: :func:`answer_pass` over all pairs of them.

    Args:
        model: causal model, bare or PEFT; put in evaluation mode for the duration.
        tokenizer: gives the padding id.
        prompts: ids of n prompts.
        answers: ids of C answers; of each all but the last are fed.
        description: text of the progress bar.

    Yields:
        n · C outputs in the order in which batches finish; ``index`` is prompt · C + answer.
    """
    pairs = [(prompt, answer) for prompt in prompts for answer in answers]
    yield from answer_pass(model, tokenizer, pairs, description=description)


def _packed(
    model: nn.Module,
    rows: Sequence[Ids],
    lengths: Sequence[int],
    capture: Capture | None,
    logits: bool,
    bar: Progress,
    batch_tokens: int | None,
) -> Iterator[AnswerOutput]:
    """Rows as a trie of what they begin with (see :func:`ia2.models.packing.tree_pass`)."""
    import torch
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

    size = min(pack_size(model), batch_tokens or token_budget(model))
    waiting = list(range(len(rows)))
    while waiting:
        collected = _Collected(lengths)
        outputs = tree_pass(
            model,
            [rows[i] for i in waiting],
            [lengths[i] for i in waiting],
            logits=logits,
            size=size,
            before=capture.arm if capture is not None else lambda: None,
        )
        done: set[int] = set()
        try:
            while True:
                # Here, not around the loop: this is a generator, and the caller's code runs between passes.
                # Not inference_mode: its tensors cannot be targets of a loss.
                with torch.no_grad():
                    output = next(outputs, None)
                if output is None:
                    break
                scores = stacked = None
                if capture is not None:
                    stacked = capture.at_answers(output.batch).cpu()
                    check_finite(model, stacked, "activations")
                if output.logits is not None:
                    scores = output.logits.float().cpu()
                    check_finite(model, scores.amax(-1), "logits")
                for place, first, kept in output.parts:
                    row = waiting[place]
                    found = collected.add(row, first - (len(rows[row]) - lengths[row]), kept, scores, stacked)
                    if found is not None:
                        yield found
                        bar.advance()
                        done.add(row)
        except Exception as error:
            if size <= 1 or stepping() or not should_reduce_batch_size(error):
                raise
            size //= 2
            logger.info("Out of memory; going on with at most %d tokens together.", size)
            clear_device_cache(garbage_collection=True)
            waiting = [i for i in waiting if i not in done]
            continue
        return


class _Collected:
    """Outputs of rows whose answer positions may come in several passes."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = lengths
        self._parts: dict[int, list[tuple[int, int, Any, Any]]] = {}

    def add(self, row: int, first: int, kept: list[int], scores: Any, stacked: Any) -> AnswerOutput | None:
        """Take a row's positions from ``first`` on; gives the row's output once all have come."""
        import torch

        parts = self._parts.setdefault(row, [])
        own = scores[kept] if scores is not None else None
        parts.append((first, len(kept), own, stacked[:, kept] if stacked is not None else None))
        if sum(count for _, count, _, _ in parts) < self.lengths[row]:
            return None
        parts = sorted(self._parts.pop(row), key=lambda part: part[0])
        return AnswerOutput(
            row,
            torch.cat([part[2] for part in parts]) if scores is not None else None,
            torch.cat([part[3] for part in parts], dim=1) if stacked is not None else None,
        )


def _padded(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Ids],
    lengths: Sequence[int],
    capture: Capture | None,
    spans: Sequence[int] | None,
    logits: bool,
    bar: Progress,
    batch_tokens: int | None,
) -> Iterator[AnswerOutput]:
    """Right-padded rows, behind what all of them begin with."""
    import torch

    shared = 0
    if len(rows) > 1 and takes_cache(model):
        # the answer positions themselves must stay outside the shared part
        limit = min(len(row) - g for row, g in zip(rows, lengths, strict=True))
        shared = min(common_prefix(rows), limit)
        if shared < MIN_SHARED_PREFIX:
            shared = 0
    suffixes = [row[shared:] for row in rows]
    vocabulary = _vocabulary(model) if logits else 0
    # attention weights of all layers are held until the pass is over
    keys = max(map(len, rows), default=0) if capture is not None and capture.site == "weights" else 0
    budget = batch_tokens or token_budget(model, keys)
    plan = plan_batches(suffixes, lengths, budget, vocabulary)
    prefix = _prefill(model, rows[0][:shared], capture) if shared else None

    def run(members: list[int]) -> list[AnswerOutput]:
        batch = pad_rows([suffixes[i] for i in members], [lengths[i] for i in members], pad_id(tokenizer))
        own = [spans[i] for i in members] if spans is not None else None
        with torch.no_grad():  # here, for the reasons that _packed has
            cache = _repeated(prefix, len(members))
            return _run_batch(model, batch, members, cache, shared, capture, own, logits)

    yield from in_halves(plan, run, bar)


def _run_batch(
    model: nn.Module,
    batch: Batch,
    members: list[int],
    cache: Any,
    shared: int,
    capture: Capture | None,
    spans: list[int] | None,
    logits: bool,
) -> list[AnswerOutput]:
    import torch

    device = input_device(model)
    options: dict[str, Any] = {"use_cache": False}
    mask = batch.attention_mask
    assert mask is not None
    if cache is not None:
        options = {"use_cache": True, "past_key_values": cache}
        mask = torch.cat([torch.ones(len(members), shared, dtype=mask.dtype), mask], dim=1)
    keep = batch.keep() if logits else 1
    if capture is not None:
        capture.arm()
    output = model(
        input_ids=batch.input_ids.to(device),
        attention_mask=mask.to(device),
        logits_to_keep=keep,
        **options,
    )
    stacked = None
    if capture is not None:
        stacked = capture.at_answers(batch, spans).cpu()
        check_finite(model, stacked, "activations")
    scores = None
    if logits:
        index = batch.index(output.logits.shape[1])
        scores = output.logits[index[0].to(device), index[1].to(device)].float().cpu()
        check_finite(model, scores.amax(-1), "logits")
    results = []
    start = 0
    for place, (member, g) in enumerate(zip(members, batch.answer_lengths, strict=True)):
        part = slice(start, start + g)
        activations = stacked[:, part] if stacked is not None else None
        if activations is not None and spans is not None:
            activations = activations[..., -spans[place] :]
        results.append(
            AnswerOutput(
                member,
                scores[part] if scores is not None else None,
                activations.clone() if activations is not None else None,
            )
        )
        start += g
    return results


def check_finite(model: Any, values: torch.Tensor, name: str) -> None:
    """Refuse what a pass gave if it is not finite; nothing made of it would mean anything.

    Args:
        model: that gave it.
        values: any shape. Of logits the maxima: single tokens may be ruled out by -inf.
        name: what they are: ``logits``, ``activations`` …

    Raises:
        ModelError: a value is not finite.
    """
    import torch

    if bool(torch.isfinite(values).all()):
        return
    advice = half_precision(model)
    if not advice:
        adapted = hasattr(model, "disable_adapter") and not getattr(model, "_adapters_disabled", False)
        advice = "Its weights are damaged: get them again."
        if adapted:
            advice = "The adapter on it is of no use: train it again, at lower learning rates."
    config = unwrap(model).config
    called = getattr(config, "_name_or_path", "") or type(unwrap(model)).__name__
    dtype = str(next(iter(model.parameters())).dtype).removeprefix("torch.")
    raise ModelError(f"{called}: its {name} are not finite in {dtype}. {advice}")


def half_precision(model: Any) -> str:
    """What to do about numbers that are not finite, where float16 is what makes them so; else empty."""
    import torch

    if next(iter(unwrap(model).parameters())).dtype != torch.float16:
        return ""
    return "float16 ends at 65504: load the model with --dtype bfloat16 or float32."


# ----------------------------------------------------------------------------------- shared prefix


def _prefill(model: Any, prefix: Ids, capture: Capture | None) -> Any:
    """KV cache of a prefix, batch 1; copied for every batch (:func:`_repeated`) and never rewound."""
    import torch
    from transformers import DynamicCache

    device = input_device(model)
    ids = torch.tensor([prefix], device=device)
    cache = DynamicCache(config=model.config)
    if capture is not None:
        capture.disarm()  # nothing before the queries is an answer position
    with torch.no_grad():
        model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    return cache


def _repeated(prefix: Any, count: int) -> Any:
    """A copy of the cache of a shared prefix for so many rows; None of none."""
    if prefix is None:
        return None
    cache = copy.deepcopy(prefix)
    cache.batch_repeat_interleave(count)
    return cache


def _vocabulary(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[0])
