"""What each query is put behind: complete, reproducible, shared where it can be, and never cut."""

from __future__ import annotations

import random
import tracemalloc
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ia2.data.examples import Example
from ia2.models.tokens import common_prefix, decode, encode_prompt
from ia2.prompts.context import (
    SEPARATOR,
    Contexts,
    DemonstrationContexts,
    FixedOrders,
    Given,
    GivenContexts,
    LeaveOneOut,
    pool_orders,
    render,
)
from ia2.prompts.format import Rendering
from ia2.utils.errors import DataError
from ia2.utils.files import digest

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


def naive_orders(count: int, permutations: int, seed: int) -> list[list[list[int]]]:
    """Random orders of all the others, as they have been from the first release on."""
    orders = []
    for i in range(count):
        draw = random.Random(f"leave-one-out {seed} {i}")
        others = [j for j in range(count) if j != i]
        orders.append([draw.sample(others, len(others)) for _ in range(permutations)])
    return orders


@given(
    count=st.integers(1, 12), permutations=st.integers(1, 4), seed=st.integers(0, 5), limit=st.integers(0, 14)
)
@settings(deadline=None)
def test_leave_one_out_orders(count: int, permutations: int, seed: int, limit: int) -> None:
    orders = LeaveOneOut(count, permutations, seed)
    for i, expected in enumerate(naive_orders(count, permutations, seed)):
        assert [orders.candidates(i, k, count) for k in range(permutations)] == expected
        for k in range(permutations):
            drawn = orders.candidates(i, k, limit)
            assert len(set(drawn)) == len(drawn) == min(limit, count - 1)
            assert set(drawn) <= set(range(count)) - {i}
            assert drawn == LeaveOneOut(count, permutations + 2, seed).candidates(i, k, limit)


def test_fixed_orders() -> None:
    shared = FixedOrders([[3, 1, 0, 2]])
    assert shared.shared and not shared.leave_one_out
    assert [shared.candidates(9, 0, limit) for limit in (4, 2, 0)] == [[3, 1, 0, 2], [0, 2], []]
    own = FixedOrders([[3, 1, 0, 2], [0, 1, 2, 3]], leave_one_out=True)
    assert own.permutations == 2 and not own.shared
    assert [own.candidates(i, 0, 2) for i in range(4)] == [[1, 2], [0, 2], [1, 0], [0, 2]]
    assert own.candidates(3, 1, 9) == [0, 1, 2]


@given(count=st.integers(0, 12), permutations=st.integers(1, 4), seed=st.integers(0, 5))
@settings(deadline=None)
def test_pool_orders(count: int, permutations: int, seed: int) -> None:
    orders = pool_orders(count, permutations, seed)
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert pool_orders(count, permutations + 2, seed)[:permutations] == orders


def test_seeds_and_places_give_other_orders() -> None:
    def drawn(seed: int) -> list[list[int]]:
        return [LeaveOneOut(8, 2, seed).candidates(i, k, 8) for i in range(8) for k in range(2)]

    assert drawn(0) != drawn(1)
    assert pool_orders(8, 1, 0) != pool_orders(8, 1, 1)
    assert drawn(0)[0] != drawn(0)[1]


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
        order = contexts.chosen(0, k)
        prefix = render([demonstrations[j] for j in order], "")
        assert all(decode(word_tokenizer, row).startswith(prefix) for row in ids)
        assert common_prefix(ids) >= len(encode_prompt(word_tokenizer, prefix))
        assert all(contexts.chosen(i, k) == order for i in range(4))


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
    caplog.clear()
    contexts = Contexts.leave_one_out(word_tokenizer, examples, max_length=70, reserve=5)
    assert not caplog.text  # said when it is used
    contexts.prepare()
    contexts.context_ids(1)
    dropped = 0
    for i in range(8):
        assert len(contexts.context_ids(i)) <= 65
        kept = kept_blocks(word_tokenizer, contexts, i)
        assert 0 < len(kept) < 7
        # one more would not have fitted
        assert len(contexts.context_ids(i)) + 20 > 65
        dropped += 7 - len(kept)
    assert all(len(set(blocks)) == 7 for blocks in whole)
    assert len(set(caplog.text.splitlines())) == 1
    assert (contexts.dropped.demonstrations, contexts.dropped.prompts, contexts.dropped.of) == (dropped, 8, 8)
    assert f"{dropped} demonstrations dropped, whole, from 8 of 8 prompts" in caplog.text
    assert "70 tokens" in caplog.text


def test_pool_drops_the_same_ones_for_every_query(word_tokenizer: PreTrainedTokenizerFast) -> None:
    queries = [*rows(3, offset=50), *rows(1, length=20, offset=60)]
    contexts = Contexts.pool(word_tokenizer, queries, rows(8), permutations=2, max_length=80, reserve=5)
    full = pool_orders(8, 2, 0)
    for k in range(2):
        kept = {tuple(contexts.chosen(i, k)) for i in range(4)}
        assert len(kept) == 1
        assert 0 < len(kept.pop()) < 8
        assert list(full[k][-len(contexts.chosen(0, k)) :]) == contexts.chosen(0, k), "the farthest go first"
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
    for i in range(len(contexts)):
        available = len(examples) - (not pool)
        for k in range(contexts.permutations):
            order, ids = contexts.chosen(i, k), contexts.context_ids(i, k)
            assert len(ids) <= max_length - reserve
            # rendered from whole demonstrations, the query itself not among them
            assert pool or i not in order
            assert len(set(order)) == len(order)
            assert ids == encode_prompt(
                tokenizer, render([contexts.demonstrations[j] for j in order], contexts.queries[i].query)
            )
            assert order or available == 0
            dropped += available - len(order)
        suffix, query, ids = contexts.common_suffix(i), contexts.query_ids(i), contexts.context_ids(i)
        assert query[len(query) - suffix :] == ids[len(ids) - suffix :]
    assert contexts.dropped.demonstrations == dropped
    if pool:
        assert contexts.chosen(0) == contexts.chosen(1)


def test_common_suffix(word_tokenizer: PreTrainedTokenizerFast) -> None:
    contexts = Contexts.leave_one_out(word_tokenizer, rows(4), permutations=3, max_length=200, reserve=1)
    for i in range(4):
        query = contexts.query_ids(i)
        assert contexts.common_suffix(i) == len(query)  # no tokens merge, and none stands before a text
        assert all(contexts.context_ids(i, k)[-len(query) :] == query for k in range(3))
    bos = awkward("gpt2")
    other = Contexts.leave_one_out(bos, rows(4), max_length=500, reserve=1)
    assert 0 < other.common_suffix(0) == other.common_suffix(0) < len(other.query_ids(0))


# --------------------------------------------------------------------------- more than a window holds


def many(count: int) -> list[Example]:
    """Different examples of nearly the same length."""
    words = [f"{a}{b}" for a in "abcdefgh" for b in ("", " the", " a", " in", " and")]
    size = len(words)
    return [
        Example(
            f"Text: {words[i % size]} {words[i // size % size]} {i // size**2}\nLabel:",
            (" positive", " negative")[i % 2],
            f"row {i}",
        )
        for i in range(count)
    ]


def test_each_prompt_draws_its_own(word_tokenizer: PreTrainedTokenizerFast) -> None:
    examples = many(400)
    contexts = Contexts.leave_one_out(
        word_tokenizer, examples, permutations=2, max_length=150, reserve=5, seed=1
    )
    drawn = [[contexts.chosen(i, k) for k in range(2)] for i in range(400)]
    for i, orders in enumerate(drawn):
        for k, order in enumerate(orders):
            assert 8 <= len(order) <= 20 and len(set(order)) == len(order) and i not in order
            blocks = decode(word_tokenizer, contexts.context_ids(i, k)).split(SEPARATOR)
            assert blocks[:-1] == [examples[j].query + (examples[j].answer or "") for j in order]
    assert len({tuple(order) for orders in drawn for order in orders}) == 800
    used = np.bincount([j for orders in drawn for order in orders for j in order], minlength=400)
    assert used.min() > 0 and used.max() < 6 * used.mean()  # none is left out, none preferred
    again = Contexts.leave_one_out(
        word_tokenizer, examples, permutations=3, max_length=150, reserve=5, seed=1
    )
    assert [[again.chosen(i, k) for k in range(2)] for i in range(400)] == drawn


@pytest.mark.parametrize("most", [1, 5, 9])
def test_at_most_so_many(word_tokenizer: PreTrainedTokenizerFast, most: int) -> None:
    examples = many(10)
    rendering = Rendering(word_tokenizer)
    contexts = DemonstrationContexts(rendering, examples, examples, LeaveOneOut(10), 1000, 5, most=most)
    assert {len(contexts.chosen(i)) for i in range(10)} == {most}
    assert contexts.dropped.demonstrations == 0  # what was not wanted is not missing
    short = DemonstrationContexts(rendering, examples, examples, LeaveOneOut(10), 60, 5, most=most)
    lost = sum(most - len(short.chosen(i)) for i in range(10))
    assert short.dropped.demonstrations == lost and (lost > 0) == (most > 3)


def test_a_long_row_keeps_no_other_out(word_tokenizer: PreTrainedTokenizerFast) -> None:
    examples = [*rows(6), Example("Text: " + "the " * 60 + "\nLabel:", " positive", "long")]
    for seed in range(8):
        contexts = Contexts.pool(
            word_tokenizer, rows(2, offset=50), examples, max_length=70, reserve=5, seed=seed
        )
        assert len(contexts.chosen(0)) >= 3 and 6 not in contexts.chosen(0)
        assert contexts.dropped.demonstrations == 2 * (7 - len(contexts.chosen(0)))
    # even where chance gives nothing that fits
    long = [Example(f"{'the ' * 60}{i}", " positive", f"long {i}") for i in range(9)]
    mixed = [*rows(2), *long]
    one = DemonstrationContexts(
        Rendering(word_tokenizer), rows(5, offset=50), mixed, LeaveOneOutOfNothing(), 70, 5, most=1
    )
    assert {tuple(one.chosen(i)) for i in range(5)} == {(0,)}


class LeaveOneOutOfNothing(FixedOrders):
    """An order that ends in what is too long."""

    def __init__(self) -> None:
        super().__init__([list(range(11))])


def test_many_are_counted_on_a_sample(
    word_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ia2.prompts.context._LOOKED_AT", (1000, 200))
    contexts = Contexts.leave_one_out(word_tokenizer, many(100), max_length=150, reserve=5)
    dropped = contexts.dropped
    assert 0 < dropped.of < 20 and dropped.total == 100
    exact = np.mean([99 - len(contexts.chosen(i)) for i in range(100)])
    assert abs(dropped.demonstrations / dropped.of - exact) < 1
    assert f"demonstrations dropped, whole, from each of 100 prompts (by {dropped.of} of them)" in caplog.text


@pytest.mark.parametrize("count", [5_000, 20_000])
def test_memory_is_flat(word_tokenizer: PreTrainedTokenizerFast, count: int) -> None:
    examples = many(count)
    Contexts.leave_one_out(word_tokenizer, examples[:1000], max_length=150, reserve=5).prepare()
    tracemalloc.start()
    contexts = Contexts.leave_one_out(word_tokenizer, examples, max_length=150, reserve=5)
    contexts.prepare()
    for i in range(0, count, count // 100):
        assert len(contexts.context_ids(i)) <= 145
    contexts.facts()
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept / count < 40
    assert peak / count < (500 if count < 20_000 else 200)  # a batch of texts and their ids


# ---------------------------------------------------------------------------------- facts


def test_facts_change_with_the_contexts(word_tokenizer: PreTrainedTokenizerFast) -> None:
    examples = rows(6)
    plain: dict[str, Any] = {"max_length": 300, "reserve": 5}

    def facts(given: list[Example] = examples, **changes: Any) -> str:
        found = Contexts.leave_one_out(word_tokenizer, given, **{**plain, **changes}).facts()
        return digest(found)

    assert facts() == facts()
    renamed = [Example(e.query, e.answer, "elsewhere") for e in examples]
    assert facts(renamed) == facts()
    swapped = [examples[1], examples[0], *examples[2:]]
    other = [*examples[:5], Example(examples[5].query, " x", "row 5")]
    changed = [
        facts(seed=1),
        facts(permutations=2),
        facts(separator="\n"),
        facts(max_length=90),
        facts(reserve=7),
        facts(swapped),
        facts(other),
        digest(Contexts.pool(word_tokenizer, examples, examples, **plain).facts()),
        digest(Contexts.pool(word_tokenizer, examples, examples, seed=1, **plain).facts()),
    ]
    assert len({facts(), *changed}) == len(changed) + 1


# ---------------------------------------------------------------------------- contexts of other kinds


def test_given_contexts(word_tokenizer: PreTrainedTokenizerFast) -> None:
    queries = rows(3)
    rendering = Rendering(word_tokenizer)
    contexts = GivenContexts(rendering, queries, [Given("the film was good.")] * 3, 100, 5)
    assert contexts.permutations == 1 and len(contexts) == 3
    for i, query in enumerate(queries):
        text = decode(word_tokenizer, contexts.context_ids(i))
        assert text == f"the film was good.\n\n{query.query}"
        assert decode(word_tokenizer, contexts.query_ids(i)) == query.query
        assert contexts.common_suffix(i) == len(contexts.query_ids(i))
    other = GivenContexts(rendering, queries, [Given("the film was bad.")] * 3, 100, 5)
    assert digest(other.facts()) != digest(contexts.facts())


def test_given_demonstrations_are_dropped_whole(
    word_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    queries, shown = rows(3), rows(6, offset=20)
    given = [Given(demonstrations=shown), Given(demonstrations=shown[:1]), Given(demonstrations=shown)]
    contexts = GivenContexts(Rendering(word_tokenizer), queries, given, 60, 5)
    for i, query in enumerate(queries):
        ids = contexts.context_ids(i)
        assert len(ids) <= 55
        *blocks, last = decode(word_tokenizer, ids).split(SEPARATOR)
        whole = [d.query + (d.answer or "") for d in given[i].demonstrations]
        assert last == query.query and blocks == whole[-len(blocks) :]
    assert contexts.dropped.prompts == 2
    assert f"{contexts.dropped.demonstrations} demonstrations dropped, whole, from 2 of 3" in caplog.text


def test_given_contexts_that_are_too_long(word_tokenizer: PreTrainedTokenizerFast) -> None:
    queries, rendering = rows(2), Rendering(word_tokenizer)
    with pytest.raises(
        DataError, match=r"^row 1: the context is too long: with the prompt it has \d+ tokens"
    ):
        GivenContexts(rendering, queries, [Given("good"), Given("good " * 90)], 60, 5)
    long = Example("good " * 90, " positive", "long")
    with pytest.raises(DataError, match="row 0: no demonstration of the row fits"):
        GivenContexts(rendering, queries, [Given(demonstrations=[long])] * 2, 60, 5)
    with pytest.raises(DataError, match="long: the prompt has"):
        GivenContexts(rendering, [long], [Given("good")], 60, 5)
