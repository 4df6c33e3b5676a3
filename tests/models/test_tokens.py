"""Ids and answer positions, over tokenizers that add, merge or lack what others do not."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.families import WIDTH, llama
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ia2.adapters.types import peft_config
from ia2.adapters.weights import attach
from ia2.config.sections import AdapterConfig
from ia2.models.capture import ActivationCapture
from ia2.models.tokens import (
    Batch,
    answer_index,
    common_prefix,
    decode,
    encode_answer,
    encode_prompt,
    fed_ids,
    pad_id,
    pad_rows,
)
from ia2.utils.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPECIAL = ["<pad>", "<s>", "</s>"]
CORPUS = [" ab ab ab", "a b ab", "Text: ab ab\nLabel: ab\n\nText:"] * 20


@lru_cache
def byte_level(kind: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which " a" followed by "b" merges; ``kind`` says what is put around a text."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS, trainer)
    template = {"bos": "<s> $A", "bos_eos": "<s> $A </s>", "eos": "$A </s>"}.get(kind)
    if template is not None:
        inner.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(t, inner.token_to_id(t)) for t in SPECIAL]
        )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    if kind == "no_pad":
        del names["pad_token"]
    if kind == "same":  # one token for everything, as GPT-2
        names = {"bos_token": "</s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


KINDS = ("plain", "bos", "eos", "bos_eos", "no_pad", "same")
PREFIX = {"bos": (1,), "bos_eos": (1,)}

texts = st.text(st.sampled_from("ab :\n.é€") | st.characters(codec="utf-8"), min_size=1, max_size=12)
marked = st.lists(texts | st.sampled_from(["</s>", "<s>", "<pad>"]), min_size=1, max_size=4).map("".join)
row = st.lists(st.integers(0, 3), max_size=6).map(tuple)
over_kinds = pytest.mark.parametrize("kind", KINDS)
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@over_kinds
@given(text=marked)
@example(text="a</s>")
@example(text="</s>")
@example(text="</s>a")
@quick
def test_prompt_is_what_stands_before_plus_the_text(kind: str, text: str) -> None:
    tokenizer = byte_level(kind)
    plain = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    assume(set(plain) != {1})  # a text of nothing but the first token could be either
    assert encode_prompt(tokenizer, text) == PREFIX.get(kind, ()) + plain


@over_kinds
@given(context=texts, query=texts, answer=texts)
@quick
def test_answer_ids_are_the_same_in_every_context(kind: str, context: str, query: str, answer: str) -> None:
    tokenizer = byte_level(kind)
    ids = encode_answer(tokenizer, answer)
    for prompt_text in (query, context + query):
        prompt = encode_prompt(tokenizer, prompt_text)
        whole = prompt + ids
        assert whole[len(prompt) :] == ids
        assert fed_ids(prompt, ids) == whole[:-1]
    assert decode(tokenizer, ids) == answer


def test_tokens_would_merge_across_the_boundary() -> None:
    """The premise of tokenising apart: as one text, prompt and answer share a token here."""
    tokenizer = byte_level("plain")
    joint = tuple(tokenizer(" ab")["input_ids"])
    apart = encode_prompt(tokenizer, " a") + encode_answer(tokenizer, "b")
    assert len(joint) < len(apart)
    assert decode(tokenizer, apart) == " ab"


def test_texts_without_tokens() -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:3: the completion '' has no tokens"):
        encode_answer(byte_level("plain"), "", "rows.jsonl:3")
    assert encode_prompt(byte_level("bos_eos"), "") == (1,)
    assert encode_prompt(byte_level("plain"), "") == (1,)  # there must be a position that predicts
    bare = PreTrainedTokenizerFast(tokenizer_object=byte_level("plain").backend_tokenizer)
    with pytest.raises(DataError, match=r"rows\.jsonl:4: the prompt '' has no tokens"):
        encode_prompt(bare, "", "rows.jsonl:4")


def test_pad_id() -> None:
    assert pad_id(byte_level("plain")) == 0
    assert pad_id(byte_level("no_pad")) == 2
    assert pad_id(byte_level("same")) == 2
    bare = PreTrainedTokenizerFast(tokenizer_object=byte_level("plain").backend_tokenizer)
    assert pad_id(bare) == 0


@given(rows=st.lists(row, max_size=5))
@settings(deadline=None)
def test_common_prefix(rows: list[tuple[int, ...]]) -> None:
    longest = max((len(r) for r in rows), default=0)
    shared = [n for n in range(longest + 1) if all(len(r) >= n and r[:n] == rows[0][:n] for r in rows)]
    assert common_prefix(rows) == max(shared, default=0)


pairs = st.lists(
    st.tuples(st.integers(1, 6), st.integers(1, 4)).map(
        lambda n: (tuple(range(10, 10 + n[0])), tuple(range(50, 50 + n[1])))
    ),
    min_size=1,
    max_size=4,
)


def as_batch(given_pairs: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> Batch:
    return pad_rows([fed_ids(p, a) for p, a in given_pairs], [len(a) for _, a in given_pairs], 0)


@given(given_pairs=pairs, lengthened=st.integers(-100, 5))
@settings(deadline=None)
def test_answer_index(given_pairs: list[Any], lengthened: int) -> None:
    """Each answer id but the last is fed one place after the position that predicts it."""
    batch = as_batch(given_pairs)
    fed_width = batch.input_ids.shape[1]
    keep = batch.keep()
    assert keep <= fed_width
    shift = max(lengthened, keep - fed_width)  # virtual tokens on the left, or only the last positions
    rows, positions = answer_index(fed_width + shift, batch.row_lengths, batch.answer_lengths, fed_width)
    assert positions.min() >= 0
    assert shift > keep - fed_width or positions.min() == 0  # keep() is no larger than it must be
    expected = [
        (i, len(prompt) - 1 + k + shift)
        for i, (prompt, answer) in enumerate(given_pairs)
        for k in range(len(answer))
    ]
    assert list(zip(rows.tolist(), positions.tolist(), strict=True)) == expected
    for (i, position), target in zip(expected, [t for _, a in given_pairs for t in a], strict=True):
        following = position - shift + 1
        if following < batch.row_lengths[i]:
            assert int(batch.input_ids[i, following]) == target


def test_padding_is_on_the_right_and_masked() -> None:
    batch = pad_rows([(5, 6, 7), (8,)], [1, 1], 9)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.keep() == 3


# --------------------------------------------------------------------------- against real forwards

UNEQUAL = [
    ((5, 6, 7, 8, 9, 10, 11), (40,)),
    ((12, 13), (41, 42, 43, 44)),
    ((14, 15, 16, 17), (45, 46)),
    ((18,), (47,)),
]


def one_by_one(model: PreTrainedModel) -> torch.Tensor:
    """Logits that predict each answer, from whole unpadded sequences, prompt and answer."""
    parts = []
    for prompt, answer in UNEQUAL:
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
        logits = logits[-len(prompt) - len(answer) :]  # virtual tokens come first
        parts.append(logits[len(prompt) - 1 : -1])
    return torch.cat(parts)


@pytest.mark.parametrize("kept", ["all", "few"])
@pytest.mark.parametrize("virtual", [0, 3])
def test_logits_and_activations_at_answers(kept: str, virtual: int) -> None:
    model: Any = llama()
    if virtual:
        settings_ = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": virtual}
        model = attach(model, peft_config(model, AdapterConfig(peft=settings_)), seed=0)
    batch = as_batch(UNEQUAL)
    options = {"logits_to_keep": batch.keep()} if kept == "few" else {}
    with torch.no_grad(), ActivationCapture(model) as capture:
        output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options)
        activations = capture.at_answers(batch)
        capture.disarm()
        width = output.logits.shape[1]
        assert width == (batch.keep() if kept == "few" else batch.input_ids.shape[1] + virtual)
        rows, positions = answer_index(
            width, batch.row_lengths, batch.answer_lengths, batch.input_ids.shape[1]
        )
        expected = one_by_one(model)
    torch.testing.assert_close(output.logits[rows, positions], expected, atol=1e-5, rtol=1e-4)
    assert activations.shape == (2, sum(len(a) for _, a in UNEQUAL), WIDTH)
