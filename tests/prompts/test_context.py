"""What each query is put behind: whole demonstrations, as many as fit, and never cut."""

from __future__ import annotations

import copy
import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from helpers.prompts import CHATML, TEMPLATES, awkward, builder, chatty, leave_one_out, rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ia2.data.examples import Example
from ia2.models.tokens import common_prefix, decode, encode_prompt
from ia2.prompts.context import Context, Contexts
from ia2.prompts.format import PromptFormat
from ia2.utils.errors import DataError

SEPARATOR = "\n\n"


def written(demonstrations: Sequence[Example], query: Example) -> str:
    return "".join(f"{demo.query}{demo.answer}{SEPARATOR}" for demo in demonstrations) + query.query


def test_a_pool_is_the_same_for_every_query(word_tokenizer: PreTrainedTokenizerFast) -> None:
    """So that the long beginning is computed once; what one query lacks, all lack, the farthest first."""
    queries = [*rows(3, offset=50), *rows(1, length=20, offset=60)]
    for window in (1000, 80):
        contexts = builder(word_tokenizer, rows(8), window).pool_contexts(queries, 2)
        full = builder(word_tokenizer, rows(8), 1000).pool_contexts(queries, 2)
        for k in range(2):
            (order,) = {tuple(contexts.chosen(i, k)) for i in range(4)}
            assert list(order) == full.chosen(0, k)[-len(order) :]
            assert len(order) == 8 if window == 1000 else 0 < len(order) < 8
            ids = [contexts.context_ids(i, k) for i in range(4)]
            assert max(map(len, ids)) <= window - 5
            shared = encode_prompt(
                word_tokenizer, written([rows(8)[j] for j in order], Example("", None, ""))
            )
            assert common_prefix(ids) >= len(shared)
        assert contexts.dropped == (
            4 * sum(8 - len(contexts.chosen(0, k)) for k in range(2)),
            *contexts.dropped[1:],
        )


def test_whole_demonstrations_are_dropped_and_counted(
    word_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    contexts = leave_one_out(word_tokenizer, rows(8, length=3), 70, 5)
    assert not caplog.text  # said when it is used, and once
    contexts.prepare()
    dropped = 0
    for i in range(8):
        size, kept = len(contexts.context_ids(i)), len(contexts.chosen(i))
        assert size <= 65 < size + 20, "one more would not have fitted"
        dropped += 7 - kept
    assert contexts.dropped == (dropped, 8, 8, 8)
    assert len(set(caplog.text.splitlines())) == 1
    assert f"{dropped} demonstrations dropped, whole, from 8 of 8 prompts" in caplog.text


@pytest.mark.parametrize(
    ("train", "queries", "window", "message"),
    [
        (
            [*rows(3), *rows(1, 60, 60)],
            None,
            50,
            r"row 60: the prompt has \d+ tokens; the context window holds 50",
        ),
        (rows(4), None, 17, r"row \d: no demonstration fits beside the prompt"),
        (rows(3, 50), [*rows(2), *rows(1, 7, 40)], 55, "row 40: no demonstration fits"),
    ],
)
def test_what_does_not_fit_is_named(
    train: Any, queries: Any, window: int, message: str, word_tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = builder(word_tokenizer, train, window)
    with pytest.raises(DataError, match=message):
        prompts.train_contexts if queries is None else prompts.pool_contexts(queries)


words = st.lists(st.sampled_from(["", "ab", "Text: ", "\n", "\n\n", "good", "film"]), max_size=5).map(
    " ".join
)
example_rows = st.lists(
    st.builds(lambda q, a: (f"Text: {q}\nLabel:", a), words, words | st.sampled_from(["positive", " x\n"])),
    min_size=2,
    max_size=9,
)


@pytest.mark.parametrize("kind", ["gpt2", "unsplit", *TEMPLATES])
@given(
    texts=example_rows,
    window=st.integers(20, 200),
    pool=st.booleans(),
    chat=st.sampled_from(["turns", "single"]),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_was_fitted_fits(
    kind: str, texts: list[tuple[str, str]], window: int, pool: bool, chat: str
) -> None:
    """Whatever tokens merge, and whatever a template puts between turns."""
    tokenizer, chat = (chatty(kind), chat) if kind in TEMPLATES else (awkward(kind), "off")
    examples = [Example(q, a or " y", f"row {i}") for i, (q, a) in enumerate(texts)]
    prompts = builder(tokenizer, examples, window, 4, chat=chat, context_draws=2)
    try:
        contexts = prompts.pool_contexts(examples[:2], 2) if pool else prompts.train_contexts
    except DataError:
        return
    available, dropped = len(examples) - (not pool), 0
    for i, query in enumerate(contexts.queries):
        suffix = contexts.common_suffix(i)
        for k in range(2):
            order, ids = contexts.chosen(i, k), contexts.context_ids(i, k)
            assert len(ids) <= window - 4
            assert order or not available
            assert pool or i not in order
            assert ids == prompts.format.context_ids([examples[j] for j in order], query)
            assert ids[len(ids) - suffix :] == contexts.query_ids(i)[-suffix or len(ids) :]
            dropped += available - len(order)
    assert contexts.dropped.demonstrations == dropped


def test_common_suffix(word_tokenizer: PreTrainedTokenizerFast) -> None:
    contexts = leave_one_out(word_tokenizer, rows(4), 200, 1, permutations=3)
    assert [contexts.common_suffix(i) for i in range(4)] == [len(contexts.query_ids(i)) for i in range(4)]
    # a beginning of sequence stands before the query alone
    other = leave_one_out(awkward("gpt2"), rows(4), 500, 1)
    assert 0 < other.common_suffix(0) < len(other.query_ids(0))


def test_a_wrong_estimate_cuts_no_demonstration() -> None:
    """A template that makes later turns longer: lengths of parts do not add up."""
    tokenizer = copy.deepcopy(chatty("chatml"))
    tokenizer.chat_template = CHATML.replace(
        "{{ m.content }}", "{{ m.content }}{% for n in range(loop.index) %} the{% endfor %}"
    )
    examples = rows(9)
    contexts = leave_one_out(tokenizer, examples, 10_000, 4)
    prompt_format = PromptFormat(tokenizer, chat="turns")
    contexts = builder(tokenizer, examples, 160, 4, chat="turns").train_contexts
    for i in range(9):
        ids, planned = contexts.context_ids(i), contexts.chosen(i)
        assert len(ids) <= 156
        assert ids in [
            prompt_format.context_ids([examples[j] for j in planned[n:]], examples[i]) for n in range(9)
        ]


# --------------------------------------------------------------------------- more than a window holds


def many(count: int) -> list[Example]:
    """Different examples of nearly the same length."""
    parts = [f"{a}{b}" for a in "abcdefgh" for b in ("", " the", " a", " in", " and")]
    size = len(parts)
    texts = [f"{parts[i % size]} {parts[i // size % size]} {i // size**2}" for i in range(count)]
    return [
        Example(f"Text: {text}\nLabel:", (" positive", " negative")[i % 2], f"row {i}")
        for i, text in enumerate(texts)
    ]


@pytest.mark.parametrize("most", [1, 5, 9])
def test_at_most_so_many(word_tokenizer: PreTrainedTokenizerFast, most: int) -> None:
    def shown(window: int) -> tuple[list[int], int]:
        contexts = builder(word_tokenizer, many(10), window, max_demonstrations=most).train_contexts
        return [len(contexts.chosen(i)) for i in range(10)], contexts.dropped.demonstrations

    assert shown(1000) == ([most] * 10, 0)  # what was not wanted is not missing
    counts, dropped = shown(60)
    assert dropped == 10 * most - sum(counts) and (dropped > 0) == (most > 3)


def test_a_long_row_keeps_no_other_out(word_tokenizer: PreTrainedTokenizerFast) -> None:
    long = [Example(f"{'the ' * 60}{i}", " positive", f"long {i}") for i in range(9)]
    for seed in range(8):
        contexts = builder(word_tokenizer, [*rows(6), long[0]], 70, seed=seed).pool_contexts(
            rows(2, offset=50)
        )
        assert len(contexts.chosen(0)) >= 3 and 6 not in contexts.chosen(0)
        # even where chance gives nothing that fits
        one = builder(word_tokenizer, [*rows(2), *long], 70, seed=seed, max_demonstrations=1)
        assert one.pool_contexts(rows(5, offset=50)).chosen(0)[0] in (0, 1)


def test_many_are_counted_on_a_sample(
    word_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ia2.prompts.context._LOOKED_AT", 20)
    contexts = leave_one_out(word_tokenizer, many(100), 150, 5)
    dropped = contexts.dropped
    assert 0 < dropped.of <= 20 and dropped.total == 100
    exact = np.mean([99 - len(contexts.chosen(i)) for i in range(100)])
    assert abs(dropped.demonstrations / dropped.of - exact) < 1
    assert f"dropped, whole, from each of 100 prompts (by {dropped.of} of them)" in caplog.text


@pytest.mark.parametrize("count", [5_000, 20_000])
def test_memory_is_flat(word_tokenizer: PreTrainedTokenizerFast, count: int) -> None:
    examples = many(count)
    leave_one_out(word_tokenizer, examples[:1000], 150, 5).prepare()
    tracemalloc.start()
    contexts = leave_one_out(word_tokenizer, examples, 150, 5)
    contexts.prepare()
    for i in range(0, count, count // 100):
        assert len(contexts.context_ids(i)) <= 145
    contexts.facts()
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept / count < 60
    assert peak / count < (500 if count < 20_000 else 200)  # a batch of texts and their ids


# ---------------------------------------------------------------------------- contexts of other kinds


def own(tokenizer: Any, queries: Sequence[Example], *contexts: Context) -> Contexts:
    return Contexts(PromptFormat(tokenizer), queries, 60, 5, "contexts", contexts)


def test_own_demonstrations_are_dropped_whole(
    word_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    queries, pool = rows(3), rows(6, offset=20)
    shown = [pool, pool[:1], pool]
    contexts = own(word_tokenizer, queries, *(Context(demonstrations=each) for each in shown))
    for i, query in enumerate(queries):
        ids = contexts.context_ids(i)
        assert len(ids) <= 55
        texts = [written(shown[i][n:], query) for n in range(6)]
        assert decode(word_tokenizer, ids) in texts
    assert contexts.dropped.prompts == 2
    assert f"{contexts.dropped.demonstrations} demonstrations dropped, whole, from 2 of 3" in caplog.text


def test_own_contexts_that_are_too_long(word_tokenizer: PreTrainedTokenizerFast) -> None:
    long = Example("good " * 90, " positive", "long")
    for queries, context, message in (
        (rows(2), Context("good " * 90), r"^row 1: the context is too long: with the prompt it has \d+"),
        (rows(2), Context(demonstrations=[long]), "row 1: no demonstration of the row fits"),
        ([rows(1)[0], long], Context("good"), "long: the prompt has"),
    ):
        with pytest.raises(DataError, match=message):
            own(word_tokenizer, queries, Context("good"), context)
