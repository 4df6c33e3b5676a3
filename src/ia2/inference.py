"""Forward passes and generation for many prompts: the one place where batches are made.

:func:`answer_pass` gives logits and activations at answer positions; the teacher's targets, the
scoring of labels and the similarity measures are all made of it. :func:`generate_answers` writes
answers greedily. Both sort by length, share a common prefix through the KV cache, choose a batch size
that fits in memory and halve it when it does not.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ia2.console import Progress, logger, progress
from ia2.tokens import (
    Batch,
    Ids,
    answer_index,
    common_prefix,
    decode,
    encode_answer,
    fed_ids,
    pad_id,
    pad_rows,
)

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from ia2.capture import Capture

# Below this a shared prefix saves less than copying its cache costs.
MIN_SHARED_PREFIX = 16

# Tokens of one batch from which on more rows make a forward pass hardly faster (two cores; on a GPU a
# thousand or so, where bounds on padding matter less).
_EFFICIENT = 256

# Float32 logits of one batch; beyond this the vocabulary, not the model, fills the memory.
_MAX_LOGITS = 5 * 10**7

T = TypeVar("T")


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
    share_prefix: bool = True,
    description: str = "forward",
    batch_tokens: int | None = None,
) -> Iterator[AnswerOutput]:
    """One teacher-forced pass over (prompt, answer) pairs, without gradients.

    Args:
        model: causal model, bare or PEFT; put in evaluation mode for the duration.
        tokenizer: gives the padding id.
        pairs: prompt ids and answer ids; only ``prompt + answer[:-1]`` is fed.
        capture: an entered :class:`~ia2.capture.ActivationCapture` (or what is used as one), or None.
        spans: where attention weights are captured, the number of last ids of each row, as fed, that they
            are wanted over (see :meth:`~ia2.capture.ActivationCapture.at_answers`).
        logits: whether the language-model head is wanted at the answer positions.
        share_prefix: compute ids that all prompts begin with once.
        description: text of the progress bar.
        batch_tokens: tokens of one batch; None chooses from the free memory.

    Yields:
        One :class:`AnswerOutput` a pair, in the order in which batches finish (not of the input).

    Raises:
        ValueError: a span that is longer than its row, or attention weights without spans.
    """
    import torch

    rows = [fed_ids(prompt, answer) for prompt, answer in pairs]
    lengths = [len(answer) for _, answer in pairs]
    if spans is not None and any(not 1 <= s <= len(row) for s, row in zip(spans, rows, strict=True)):
        raise ValueError("spans must be between 1 and the number of ids that are fed")
    shared = 0
    if share_prefix and len(rows) > 1 and _takes_cache(model):
        # the answer positions themselves must stay outside the shared part
        limit = min(len(row) - g for row, g in zip(rows, lengths, strict=True))
        shared = min(common_prefix(rows), limit)
        if shared < MIN_SHARED_PREFIX:
            shared = 0
    suffixes = [row[shared:] for row in rows]
    vocabulary = model.get_output_embeddings().weight.shape[0] if logits else 0  # type: ignore[operator]
    # attention weights of all layers are held until the pass is over
    keys = max(map(len, rows), default=0) if capture is not None and capture.site == "weights" else 0
    budget = batch_tokens or token_budget(model, keys)
    plan = _plan(suffixes, lengths, budget, vocabulary)

    with _evaluating(model), progress(description, len(rows)) as bar:
        prefix = _prefill(model, rows[0][:shared], capture) if shared else None

        def run(members: list[int]) -> list[AnswerOutput]:
            batch = pad_rows([suffixes[i] for i in members], [lengths[i] for i in members], pad_id(tokenizer))
            # Here, not around the loop: this is a generator, and the caller's code runs between batches.
            # Not inference_mode: its tensors cannot be targets of a loss.
            own = [spans[i] for i in members] if spans is not None else None
            with torch.no_grad():
                return _run_batch(model, batch, members, prefix, shared, capture, own, logits)

        yield from _halving(plan, run, bar)


def _run_batch(
    model: nn.Module,
    batch: Batch,
    members: list[int],
    prefix: Any,
    shared: int,
    capture: Capture | None,
    spans: list[int] | None,
    logits: bool,
) -> list[AnswerOutput]:
    import torch

    device = _input_device(model)
    options: dict[str, Any] = {"use_cache": False}
    mask = batch.attention_mask
    if prefix is not None:
        cache = copy.deepcopy(prefix)
        cache.batch_repeat_interleave(len(members))
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
    stacked = capture.at_answers(batch, spans).cpu() if capture is not None else None
    scores = None
    if logits:
        index = answer_index(
            output.logits.shape[1],
            batch.row_lengths,
            batch.answer_lengths,
            batch.input_ids.shape[1],
        )
        scores = output.logits[index[0].to(device), index[1].to(device)].float().cpu()
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


@dataclass
class Generated:
    """A greedy answer.

    Attributes:
        ids: answer ids without the stop text; ends with the end-of-sequence id if ``ended``.
        text: the decoded answer.
        ended: the answer ended by itself (end of sequence or the stop text), not at the limit.
    """

    ids: Ids
    text: str
    ended: bool


def generate_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Ids],
    *,
    max_new_tokens: int,
    stop_texts: Sequence[str] = (),
    end_id: int | None = None,
    share_prefix: bool = True,
    description: str = "generating",
    batch_tokens: int | None = None,
) -> list[Generated]:
    """Greedy answers to prompts, batched, with a KV cache.

    An answer ends at the end of sequence, just before a stop text, or at ``max_new_tokens`` ids
    (METHOD: definitions). The end-of-sequence id is appended where it ended by itself.

    Returns:
        One :class:`Generated` a prompt, in input order.
    """
    import torch
    from transformers import GenerationConfig

    # Room to see a stop text that begins at the very last allowed id.
    lookahead = max((len(encode_answer(tokenizer, text)) for text in stop_texts), default=0)
    ends = _end_ids(model, tokenizer, end_id)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens + lookahead,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad_id(tokenizer),
        eos_token_id=ends or None,
        bos_token_id=tokenizer.bos_token_id,
        use_cache=True,
    )
    shared = 0
    if share_prefix and len(prompts) > 1 and _takes_cache(model):
        shared = min(common_prefix(prompts), min(len(p) for p in prompts) - 1)
        if shared < MIN_SHARED_PREFIX:
            shared = 0
    reach = max_new_tokens + lookahead
    plan = _plan(
        [p[shared:] for p in prompts],
        [1] * len(prompts),
        batch_tokens or token_budget(model),
        0,
        grow=reach,
        equal_lengths=_padding_counts(model, shared),
    )
    results: dict[int, Generated] = {}
    with _evaluating(model), _greedy(model), torch.no_grad(), progress(description, len(prompts)) as bar:
        prefix = _prefill(model, prompts[0][:shared], None) if shared else None
        device = _input_device(model)

        def run(members: list[int]) -> list[tuple[int, Generated]]:
            width = max(len(prompts[i]) for i in members)
            ids = torch.full((len(members), width), pad_id(tokenizer), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(members):
                prompt = torch.tensor(prompts[i])
                ids[row, :shared], mask[row, :shared] = prompt[:shared], 1
                rest = len(prompt) - shared
                ids[row, width - rest :], mask[row, width - rest :] = prompt[shared:], 1
            options: dict[str, Any] = {}
            if prefix is not None:
                options["past_key_values"] = copy.deepcopy(prefix)
                options["past_key_values"].batch_repeat_interleave(len(members))
            if stop_texts:
                options["stopping_criteria"] = [_StopAtText(tokenizer, stop_texts, width)]
            output = model.generate(  # type: ignore[operator]
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                **options,
            )
            return [
                (i, cut_answer(tokenizer, row[width:].tolist(), ends, stop_texts, max_new_tokens, end_id))
                for i, row in zip(members, output, strict=True)
            ]

        for i, answer in _halving(plan, run, bar):
            results[i] = answer
    return [results[i] for i in range(len(prompts))]


def cut_answer(
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    ends: Sequence[int],
    stop_texts: Sequence[str],
    limit: int,
    end_id: int | None = None,
) -> Generated:
    """Cut raw generated ids at the end of sequence, the stop text or the limit.

    ``end_id`` is appended where the answer ended by itself; by default the tokenizer's.
    """
    ids = list(ids)
    ended = False
    for place, token in enumerate(ids):
        if token in ends:
            ids, ended = ids[:place], True
            break
    text = decode(tokenizer, ids)
    stops = [place for place in (text.find(stop) for stop in stop_texts) if place >= 0]
    if stops:
        text = text[: min(stops)]
        kept = len(ids)
        while kept and len(decode(tokenizer, ids[:kept])) > len(text):
            kept -= 1
        exact = decode(tokenizer, ids[:kept]) == text
        # a token that reaches across the boundary is replaced by the ids of the text before it
        ids = ids[:kept] if exact else list(encode_answer(tokenizer, text)) if text else []
        ended = True
    if len(ids) > limit or (len(ids) == limit and not ended):
        ids, ended = ids[:limit], False
        text = decode(tokenizer, ids)
    end = tokenizer.eos_token_id if end_id is None else end_id
    if ended and end is not None:
        ids = [*ids, int(end)]
    if not ids:  # no end-of-sequence token and an answer that stops at once
        ids = [pad_id(tokenizer)]
    return Generated(tuple(ids), text, ended)


class _StopAtText:
    """Stopping criterion by row: the text generated so far contains a stop text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_texts: Sequence[str], start: int) -> None:
        self.tokenizer, self.stop_texts, self.start = tokenizer, stop_texts, start
        # enough ids to hold any stop text, whatever the tokens
        self.tail = max(len(text) for text in stop_texts) + 8

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        import torch

        tails = input_ids[:, max(self.start, input_ids.shape[1] - self.tail) :]
        texts = self.tokenizer.batch_decode(tails, skip_special_tokens=True)
        hits = [any(stop in text for stop in self.stop_texts) for text in texts]
        return torch.tensor(hits, device=input_ids.device, dtype=torch.bool)


def _end_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase, end_id: int | None) -> list[int]:
    """Ids that end an answer: the one given, the tokenizer's, those of the model's generation settings."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({int(i) for i in [*ids, tokenizer.eos_token_id, end_id] if i is not None})


# ---------------------------------------------------------------------------------------- batches


def _plan(
    rows: Sequence[Ids],
    answer_lengths: Sequence[int],
    budget: int,
    vocabulary: int,
    *,
    grow: int = 0,
    equal_lengths: bool = False,
) -> list[list[int]]:
    """Rows into batches, longest first, so that a batch that does not fit is met at once."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    batches: list[list[int]] = []
    for i in order:
        if batches:
            last = batches[-1]
            size = len(last) + 1
            width = len(rows[last[0]]) + grow
            keep = max(answer_lengths[j] for j in [*last, i]) + len(rows[last[0]]) - len(rows[i])
            fits = size * width <= budget and size * keep * vocabulary <= _MAX_LOGITS
            # Padding is computed and thrown away, and the head runs wherever any row's answer is; a
            # batch that is large enough to be efficient takes no row much shorter than its first.
            wasteful = not grow and size * width > _EFFICIENT and len(rows[i]) < 0.85 * width
            if fits and not wasteful and (not equal_lengths or len(rows[last[0]]) == len(rows[i])):
                last.append(i)
                continue
        batches.append([i])
    return batches


def _halving(plan: list[list[int]], run: Callable[[list[int]], list[T]], bar: Progress) -> Iterator[T]:
    """Run every batch; one that runs out of memory is split in two, down to single rows."""
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

    waiting = list(reversed(plan))
    while waiting:
        members = waiting.pop()
        try:
            results = run(members)
        except Exception as error:
            if len(members) == 1 or not should_reduce_batch_size(error):
                raise
            half = len(members) // 2
            logger.info("Out of memory with %d rows a batch; going on with %d.", len(members), half)
            clear_device_cache(garbage_collection=True)
            # batches after this one are as long or shorter, but as large: halve them too
            smaller = [members, *reversed(waiting)]
            halves = [part for b in smaller for part in (b[: (len(b) + 1) // 2], b[(len(b) + 1) // 2 :])]
            waiting = [part for part in reversed(halves) if part]
            continue
        yield from results
        bar.advance(len(members))


def give_back_memory() -> None:
    """Return freed memory to the system, where the C library (glibc) would keep it.

    Batches have thousands of sizes, and what is freed of one does not fit the next: over 2,000 examples
    the resident memory of a small model's teacher pass grew by 120 MB, of which 3 MB were in use.
    """
    import ctypes

    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another system, another C library
        return


def token_budget(model: Any, keys: int = 0) -> int:
    """Tokens of one batch that a forward pass without gradients has memory for.

    A quarter of the free memory over a generous estimate of the bytes a token needs. On a CPU larger
    batches are not faster, so the budget is small there.

    Args:
        model: bare or wrapped causal model.
        keys: length of the attention weights that are kept for every token, head and layer; 0: none are.
    """
    import psutil
    import torch

    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    width = getattr(config, "hidden_size", 1024)
    inner = getattr(config, "intermediate_size", None) or 4 * width
    layers = getattr(config, "num_hidden_layers", 32)
    parameter = next(iter(model.parameters()))
    # residual stream and attention, MLP, KV cache over all layers, float32 softmax and norms
    per_token = parameter.element_size() * (8 * width + 3 * inner + 2 * layers * width) + 16 * width
    per_token += parameter.element_size() * keys * layers * getattr(config, "num_attention_heads", 32)
    if parameter.device.type == "cuda":
        free, ceiling = torch.cuda.mem_get_info(parameter.device)[0], 131072
    else:
        free, ceiling = psutil.virtual_memory().available, 4096
    return max(512, min(ceiling, int(free // 4 // per_token)))


# ----------------------------------------------------------------------------------- shared prefix


def _prefill(model: Any, prefix: Ids, capture: Capture | None) -> Any:
    """KV cache of a prefix, batch 1. It is copied for every batch and never rewound."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    device = _input_device(model)
    if capture is not None:
        capture.disarm()  # nothing before the queries is an answer position
    with torch.no_grad():
        model(
            input_ids=torch.tensor([prefix], device=device),
            attention_mask=torch.ones(1, len(prefix), dtype=torch.long, device=device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    return cache


# Layers whose whole state is keys and values; "attention" is what older configurations say.
_KEYS_AND_VALUES = ("full_attention", "sliding_attention", "chunked_attention", "attention")

# Layers that carry a state from token to token: convolutions, state-space models, linear attention.
_RECURRENT = ("linear_attention", "conv", "hybrid", "hybrid_sliding", "mamba", "recurrent")


def _layer_kinds(model: Any) -> list[str]:
    return list(getattr(model.config.get_text_config(), "layer_types", None) or [])


def _takes_cache(model: Any) -> bool:
    """Whether a plain KV cache carries the whole state of a prefix."""
    from ia2.capture import unwrap

    if getattr(unwrap(model), "_is_stateful", False):
        return False  # recurrent or hybrid: the cache holds more than keys and values
    if any(kind not in _KEYS_AND_VALUES for kind in _layer_kinds(model)):
        return False
    # virtual tokens would come between the cached prefix and the query
    return not _has_virtual_tokens(model)


def _has_virtual_tokens(model: Any) -> bool:
    """Whether an active adapter puts tokens of its own before the sequence (prompt tuning)."""
    prompting = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    return bool(prompting) and not getattr(model, "_adapters_disabled", False)


def _padding_counts(model: Any, shared: int) -> bool:
    """Whether padding just before the query, behind ``shared`` cached ids, would change its answer.

    Attention skips padding; what matters is whether the distance over it counts. A recurrent layer reads
    it, unless the family silences it there.
    """
    from ia2.capture import unwrap

    if _has_virtual_tokens(model):
        return True  # they stand before the padding, and PEFT drops the position ids
    if _reads_padding(model):
        return True
    if not shared:
        return False
    # without position ids, distances may be those in the padded row (MPT)
    positioned = "position_ids" in inspect.signature(unwrap(model).forward).parameters
    return not positioned or _has_sliding_window(model)


def _reads_padding(model: Any) -> bool:
    """Whether padding on the left changes the state of recurrent layers."""
    from ia2.capture import unwrap

    inner = unwrap(model)
    recurrent = getattr(inner, "_is_stateful", False) or any(k in _RECURRENT for k in _layer_kinds(model))
    if not recurrent:
        return False
    # The function's name in every family of transformers that sets padding to zero before such a layer
    # (RecurrentGemma does not). LFM2's convolutions make something of zeros if they have a bias.
    silenced = hasattr(sys.modules.get(type(inner).__module__), "apply_mask_to_padding_states")
    return not silenced or bool(getattr(model.config.get_text_config(), "conv_bias", False))


def _has_sliding_window(model: Any) -> bool:
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return any("sliding" in kind or "chunked" in kind for kind in kinds)
    return getattr(config, "sliding_window", None) is not None


def _input_device(model: Any) -> torch.device:
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    return next(iter(embeddings.parameters())).device  # type: ignore[no-any-return]


@contextmanager
def _greedy(model: Any) -> Iterator[None]:
    """Without the settings that come with a model: ``generate`` would add its penalties to ours."""
    from transformers import GenerationConfig

    from ia2.capture import unwrap

    inner = unwrap(model)
    recommended, inner.generation_config = inner.generation_config, GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = recommended


class _evaluating:
    """Evaluation mode for the duration (dropout off: a teacher must not be random)."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.training = self.model.training
        self.model.eval()

    def __exit__(self, *exc: object) -> None:
        self.model.train(self.training)
