"""What each query is put behind: complete, reproducible, shared where it can be, and never cut."""

from __future__ import annotations

import logging
from functools import lru_cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ia2.context import SEPARATOR, Contexts, leave_one_out_orders, pool_orders, render
from ia2.errors import DataError
from ia2.examples import Example
from ia2.tokens import common_prefix, decode, encode_prompt

WORDS = ["good", "bad", "film", "food", "cat", "dog", "red", "blue", "one", "two"]


def rows(count: int, length: int = 1, offset: int = 0) -> list[Example]:
    """Examples that differ from each other, with texts of ``length`` words and more."""
    out = []
    for i in range(offset, offset + count):
        text = " ".join([WORDS[i % 10], WORDS[i // 10 % 10]] + ["the"] * (length + i % 3))
        out.append(Example(f"Text: {text}\nLabel:", " positive" if i % 2 else " negative", f"row {i}"))
    return out


def test_render() -> None:
    first, second = Example("Q: a\nA:", " 1", "x"), Example("Q: b\nA:", " 2", "y")
    assert render([first, second], "Q: c\nA:") == "Q: a\nA: 1\n\nQ: b\nA: 2\n\nQ: c\nA:"
    assert render([], "Q: c\nA:") == "Q: c\nA:"
    assert render([first], "Q", separator="|") == "Q: a\nA: 1|Q"


@given(count=st.integers(0, 12), permutations=st.integers(1, 4), seed=st.integers(0, 5))
@settings(deadline=None)
def test_leave_one_out_orders(count: int, permutations: int, seed: int) -> None:
    orders = leave_one_out_orders(count, permutations, seed)
    assert len(orders) == count
    for i, of_query in enumerate(orders):
        assert len(of_query) == permutations
        for order in of_query:
            assert sorted(order) == [j for j in range(count) if j != i]
    assert orders == leave_one_out_orders(count, permutations, seed)
    more = leave_one_out_orders(count, permutations + 2, seed)
    assert [of_query[:permutations] for of_query in more] == orders


@given(count=st.integers(0, 12), permutations=st.integers(1, 4), seed=st.integers(0, 5))
@settings(deadline=None)
def test_pool_orders(count: int, permutations: int, seed: int) -> None:
    orders = pool_orders(count, permutations, seed)
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert pool_orders(count, permutations + 2, seed)[:permutations] == orders


def test_seeds_and_places_give_other_orders() -> None:
    assert leave_one_out_orders(8, 1, 0) != leave_one_out_orders(8, 1, 1)
    assert pool_orders(8, 1, 0) != pool_orders(8, 1, 1)
    drawn = leave_one_out_orders(8, 2, 0)
    assert drawn[0][0] != drawn[0][1]


def test_leave_one_out_contexts(word_tokenizer: PreTrainedTokenizerFast) -> None:
    examples = rows(5)
    contexts = Contexts.leave_one_out(
        word_tokenizer, examples, permutations=2, seed=3, max_length=1000, reserve=10
    )
    assert (len(contexts), contexts.permutations) == (5, 2)
    for i, query in enumerate(examples):
        assert decode(word_tokenizer, contexts.query_ids(i)) == query.query
        for k in range(2):
            blocks = decode(word_tokenizer, contexts.context_ids(i, k)).split(SEPARATOR)
            others = [e.query + e.answer for j, e in enumerate(examples) if j != i]  # type: ignore[operator]
            assert blocks[-1] == query.query
            assert sorted(blocks[:-1]) == sorted(others)
    assert contexts.dropped.demonstrations == 0


def test_pool_contexts_share_their_prefix(word_tokenizer: PreTrainedTokenizerFast) -> None:
    demonstrations, queries = rows(6), rows(4, offset=50)
    contexts = Contexts.pool(
        word_tokenizer, queries, demonstrations, permutations=2, max_length=1000, reserve=10
    )
    for k in range(2):
        ids = [contexts.context_ids(i, k) for i in range(4)]
        order = contexts.orders[0][k]
        prefix = render([demonstrations[j] for j in order], "")
        assert all(decode(word_tokenizer, row).startswith(prefix) for row in ids)
        assert common_prefix(ids) >= len(encode_prompt(word_tokenizer, prefix))
        assert all(contexts.orders[i][k] == order for i in range(4))


def test_one_example_has_no_demonstrations(word_tokenizer: PreTrainedTokenizerFast) -> None:
    contexts = Contexts.leave_one_out(word_tokenizer, rows(1), max_length=100, reserve=1)
    assert contexts.context_ids(0) == contexts.query_ids(0)


# ------------------------------------------------------------------------------ short context windows


def kept_blocks(tokenizer: PreTrainedTokenizerFast, contexts: Contexts, i: int, k: int = 0) -> list[str]:
    return decode(tokenizer, contexts.context_ids(i, k)).split(SEPARATOR)[:-1]


def test_whole_demonstrations_are_dropped_and_counted(
    word_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    examples = rows(8, length=3)
    roomy = Contexts.leave_one_out(word_tokenizer, examples, max_length=1000, reserve=5)
    whole = [kept_blocks(word_tokenizer, roomy, i) for i in range(8)]
    logging.getLogger("ia2").addHandler(caplog.handler)
    try:
        contexts = Contexts.leave_one_out(word_tokenizer, examples, max_length=70, reserve=5)
    finally:
        logging.getLogger("ia2").removeHandler(caplog.handler)
    dropped = 0
    for i in range(8):
        assert len(contexts.context_ids(i)) <= 65
        kept = kept_blocks(word_tokenizer, contexts, i)
        assert 0 < len(kept) < 7
        assert kept == whole[i][-len(kept) :], "the farthest from the query go first"
        dropped += 7 - len(kept)
    assert (contexts.dropped.demonstrations, contexts.dropped.prompts, contexts.dropped.of) == (dropped, 8, 8)
    assert f"{dropped} demonstrations dropped, whole, from 8 of 8 prompts" in caplog.text
    assert "70 tokens" in caplog.text


def test_pool_drops_the_same_ones_for_every_query(word_tokenizer: PreTrainedTokenizerFast) -> None:
    queries = [*rows(3, offset=50), *rows(1, length=20, offset=60)]
    contexts = Contexts.pool(word_tokenizer, queries, rows(8), permutations=2, max_length=80, reserve=5)
    for k in range(2):
        kept = {tuple(contexts.orders[i][k]) for i in range(4)}
        assert len(kept) == 1
        assert 0 < len(kept.pop()) < 8
    assert contexts.dropped.prompts == contexts.dropped.of == 8
    assert all(len(contexts.context_ids(i, k)) <= 75 for i in range(4) for k in range(2))


def test_query_that_is_too_long(word_tokenizer: PreTrainedTokenizerFast) -> None:
    examples = [*rows(3), *rows(1, length=60, offset=60)]
    with pytest.raises(DataError) as caught:
        Contexts.leave_one_out(word_tokenizer, examples, max_length=50, reserve=10)
    assert str(caught.value).startswith("row 60: the prompt has ")
    assert "the context window holds 50, of which 10 are kept for the answer" in str(caught.value)


def test_no_demonstration_fits(word_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"row \d: no demonstration fits beside the prompt"):
        Contexts.leave_one_out(word_tokenizer, rows(4), max_length=22, reserve=10)
    with pytest.raises(DataError, match="no demonstration fits"):
        Contexts.pool(word_tokenizer, rows(2), rows(3, length=50), max_length=60, reserve=10)


@lru_cache
def awkward(kind: str) -> PreTrainedTokenizerFast:
    """Tokenizers whose tokens depend on what comes next, across the boundaries of demonstrations."""
    corpus = [f"Text: {a} {b}\nLabel: positive\n\nText: {b}ab\nLabel: negative" for a in WORDS for b in WORDS]
    inner = Tokenizer(models.BPE())
    if kind == "gpt2":  # line breaks before a letter: all but the last are one token
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\s+(?!\S)|\s+| ?\w+| ?[^\s\w]+"), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:  # nothing stops a merge: tokens reach from one demonstration into the next
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(corpus, trainer)
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


words = st.lists(st.sampled_from(["", "ab", "Text: ", "\n", "\n\n", *WORDS]), max_size=5).map(" ".join)
example_rows = st.lists(
    st.builds(lambda q, a: (f"Text: {q}\nLabel:", a), words, words | st.sampled_from(["positive", " x\n"])),
    min_size=2,
    max_size=9,
)


@pytest.mark.parametrize("kind", ["gpt2", "unsplit"])
@given(texts=example_rows, max_length=st.integers(20, 160), pool=st.booleans())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_was_fitted_fits(kind: str, texts: list[tuple[str, str]], max_length: int, pool: bool) -> None:
    tokenizer = awkward(kind)
    reserve = 4
    examples = [Example(q, a or " y", f"row {i}") for i, (q, a) in enumerate(texts)]
    try:
        if pool:
            contexts = Contexts.pool(
                tokenizer, examples[:2], examples, permutations=2, max_length=max_length, reserve=reserve
            )
        else:
            contexts = Contexts.leave_one_out(tokenizer, examples, max_length=max_length, reserve=reserve)
    except DataError:
        return
    dropped = 0
    for i, orders in enumerate(contexts.orders):
        available = len(examples) - (not pool)
        for k, order in enumerate(orders):
            ids = contexts.context_ids(i, k)
            assert len(ids) <= max_length - reserve
            # rendered from whole demonstrations, the last of the full order
            assert ids == encode_prompt(
                tokenizer, render([contexts.demonstrations[j] for j in order], contexts.queries[i].query)
            )
            assert order or available == 0
            dropped += available - len(order)
    assert contexts.dropped.demonstrations == dropped
    if pool:
        assert contexts.orders[0] == contexts.orders[1]
