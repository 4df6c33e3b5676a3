"""Greedy answers to many prompts, and what the model looks like inside while it writes them.

A prompt is read once. Prompts are read in batches that suit reading; what was read is then joined, padded on
the left, and the answers are written side by side: a step of writing takes as long as reading the weights,
however many rows take it. The position that predicts a token is the one that the step before it was fed, so
what is captured there *is* the activation at the answer position, and no second pass is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ia2.models.batching import in_halves, plan_batches, token_budget, writing_budget
from ia2.models.families import end_ids, evaluating, greedy, input_device, padding_counts, takes_cache
from ia2.models.forward import MIN_SHARED_PREFIX, check_finite
from ia2.models.tokens import Batch, Ids, common_prefix, decode, encode_answer, pad_id
from ia2.utils.logging import progress

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import LogitsProcessorList, PreTrainedTokenizerBase

    from ia2.models.capture import Capture


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
    capture: Capture | None = None,
    keep: Callable[[torch.Tensor], torch.Tensor] | None = None,
    on_answer: Callable[[int, Generated, torch.Tensor | None], None] | None = None,
) -> list[Generated]:
    """Greedy answers to prompts, batched, with a KV cache.

    An answer ends at the end of sequence, just before a stop text, or at ``max_new_tokens`` ids
    (METHOD: definitions). The end-of-sequence id is appended where it ended by itself.

    Args:
        model: causal model, bare or PEFT; put in evaluation mode for the duration.
        tokenizer: its tokenizer.
        prompts: ids of n prompts.
        max_new_tokens: ids of an answer at most.
        stop_texts: texts that end an answer.
        end_id: id that ends an answer beside the tokenizer's, and is appended in its place.
        share_prefix: read ids that all prompts begin with once.
        description: text of the progress bar.
        batch_tokens: tokens of one batch; None chooses from the free memory.
        capture: an entered :class:`~ia2.models.capture.ActivationCapture` (or what is used as one) of which
        the
            activations at the answer positions are wanted; not of the site ``weights``.
        keep: without a capture: what of the float32 logits ``[B, V]`` of a step is kept, ``[L, B, d]``.
        on_answer: called with the place of each prompt, its answer, and what was captured or kept at its
            answer positions, ``[L, G, d]``, in the order in which batches finish. That is None where the ids
            of the answer are not those that were written (a token that reaches into a stop text is replaced):
            such answers are for :func:`~ia2.models.forward.answer_pass`.

    Returns:
        One :class:`Generated` a prompt, in input order.

    Raises:
        ModelError: logits or activations that are not finite.
    """
    import torch
    from transformers import DynamicCache

    from ia2.models.joined_cache import read, read_joined

    # Room to see a stop text that begins at the very last allowed id.
    lookahead = max((len(encode_answer(tokenizer, text)) for text in stop_texts), default=0)
    reach = max_new_tokens + lookahead
    ends = end_ids(model, tokenizer, end_id)
    shortest = min(map(len, prompts), default=0)
    # the last id of a prompt begins its answer: what it says is wanted
    joins = takes_cache(model) and shortest > 1
    shared = min(common_prefix(prompts), shortest - 2) if share_prefix and joins and len(prompts) > 1 else 0
    if shared < MIN_SHARED_PREFIX:
        shared = 0
    reading = tokens = batch_tokens or token_budget(model)
    grow = reach
    if joins and not batch_tokens:
        # a quarter of a batch is read beside what is held of those before it
        reading = tokens // 4
        tokens, grow = writing_budget(model, reach, captured=capture is not None)
    equal = padding_counts(model)
    plan = plan_batches(prompts, [1] * len(prompts), tokens, 0, grow=grow, equal_lengths=equal)
    results: dict[int, Generated] = {}
    padding = pad_id(tokenizer)
    prefix = DynamicCache()

    def run(members: list[int]) -> list[tuple[int, Generated, torch.Tensor | None]]:
        ids, mask = _pad_left([prompts[i] for i in members], padding)
        width = ids.shape[1]
        cache = None
        if joins:
            own = [prompts[i][shared:-1] for i in members]
            cache = read_joined(model, own, prefix, budget=reading, room=reach, padding=padding)
        device = input_device(model)
        ending = _Ending(tokenizer, ends, stop_texts, width, drops=joins)
        rows, seen = _write(
            model, ids.to(device), mask.to(device), cache, reach, ending, padding, capture, keep
        )
        done = []
        for place, (i, row) in enumerate(zip(members, rows, strict=True)):
            written = row[width:]
            answer = cut_answer(tokenizer, written, ends, stop_texts, max_new_tokens, end_id)
            steps, seen[place] = seen[place], []
            # the last id is predicted, never fed
            fed = len(answer.ids) - 1
            same = list(answer.ids[:fed]) == written[:fed] and fed < len(steps)
            done.append((i, answer, torch.stack(steps[: fed + 1], dim=1) if same else None))
        return done

    with evaluating(model), greedy(model), torch.no_grad(), progress(description, len(prompts)) as bar:
        if capture is not None:
            capture.disarm()  # nothing before the last id of a prompt is an answer position
        if shared:
            read(model, [prompts[0][:shared]], prefix, padding)
        for i, answer, found in in_halves(plan, run, bar):
            results[i] = answer
            if on_answer is not None:
                on_answer(i, answer, found)
    return [results[i] for i in range(len(prompts))]


def _write(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    cache: Any,
    reach: int,
    ending: _Ending,
    padding: int,
    capture: Capture | None,
    keep: Callable[[torch.Tensor], torch.Tensor] | None,
) -> tuple[list[list[int]], list[list[torch.Tensor]]]:
    """Write behind left-padded rows; of each row all its ids, and what was seen at each step.

    Rows that have ended leave the batch once they are half of it.
    """
    import torch
    from torch.nn.functional import pad
    from transformers import GenerationConfig, LogitsProcessorList

    end = ids.shape[1] + reach
    rows: list[list[int]] = [[] for _ in ids]
    seen: list[list[torch.Tensor]] = [[] for _ in ids]
    places = list(range(len(ids)))  # of the rows that are still in the batch

    def look(given: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        check_finite(model, scores.amax(-1), "logits")
        found = None
        if capture is not None:
            last, ones = given[:, -1:], [1] * len(given)
            found = capture.at_answers(Batch(last, torch.ones_like(last), ones, ones)).cpu()
            check_finite(model, found, "activations")
            capture.arm()
        elif keep is not None:
            found = keep(scores).cpu()
        if found is not None:
            for place, part in zip(places, found.unbind(1), strict=True):
                seen[place].append(part)
        return scores

    while places:
        if capture is not None:
            capture.arm()
        ending.reset(len(places))
        ids = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                max_new_tokens=end - ids.shape[1],
                do_sample=False,
                num_beams=1,
                pad_token_id=padding,
                use_cache=True,
            ),
            logits_processor=LogitsProcessorList([look]),
            stopping_criteria=[ending],
            **({"past_key_values": cache} if cache is not None else {}),
        )
        going = [] if ids.shape[1] == end else [k for k, over in enumerate(ending.ended) if not over]
        for k in set(range(len(places))) - set(going):
            rows[places[k]] = ids[k].tolist()
        places = [places[k] for k in going]
        if places:
            index = torch.tensor(going, device=ids.device)
            ids, mask = ids[index], mask[index]
            mask = pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
            cache.batch_select_indices(index)
    if capture is not None:
        capture.disarm()
    return rows, seen


class _Ending:
    """Stopping criterion by row: an id that ends an answer, or a stop text in the text so far.

    With ``drops``, all rows stop once half have ended, so that these can be left out of what follows.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        ends: Sequence[int],
        stop_texts: Sequence[str],
        start: int,
        *,
        drops: bool,
    ) -> None:
        self.tokenizer, self.ends, self.stop_texts = tokenizer, list(ends), stop_texts
        self.start, self.drops = start, drops
        # enough ids to hold any stop text, whatever the tokens
        self.tail = max(map(len, stop_texts), default=0) + 8
        self.ended: list[bool] = []

    def reset(self, rows: int) -> None:
        """So many rows begin, or go on."""
        self.ended = [False] * rows

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        import torch

        last = input_ids[:, -1].tolist()
        texts = [""] * len(last)
        if self.stop_texts:
            tails = input_ids[:, max(self.start, input_ids.shape[1] - self.tail) :]
            texts = self.tokenizer.batch_decode(tails, skip_special_tokens=True)
        for k, (token, text) in enumerate(zip(last, texts, strict=True)):
            self.ended[k] |= token in self.ends or any(stop in text for stop in self.stop_texts)
        stops = [(self.drops and 2 * sum(self.ended) >= len(self.ended)) or over for over in self.ended]
        return torch.tensor(stops, device=input_ids.device, dtype=torch.bool)


def _pad_left(rows: Sequence[Ids], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    width = max(map(len, rows))
    ids = torch.tensor([[padding] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def refusing_nan(model: Any) -> LogitsProcessorList:
    """What ``generate`` is given to have ``check_finite`` see every token's logits."""
    from transformers import LogitsProcessorList

    def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        check_finite(model, scores.amax(-1), "logits")
        return scores

    return LogitsProcessorList([process])


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
