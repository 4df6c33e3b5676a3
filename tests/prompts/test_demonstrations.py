"""Demonstrations that are chosen: balanced, nearest, or in the best of many orders."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from helpers.benches import word_examples
from helpers.families import FAMILIES, llama
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from prompts.test_context import WORDS, rows
from transformers import PreTrainedTokenizerFast

from ia2.data.examples import Example
from ia2.models.tokens import encode_answer
from ia2.prompts.context import DemonstrationContexts, FixedOrders, LeaveOneOut
from ia2.prompts.demonstrations import (
    Balanced,
    Embedder,
    Nearest,
    Search,
    SearchedOrders,
    SharedPrefixes,
    embed,
    log_likelihoods,
    nearest_rows,
    other_halves,
)
from ia2.prompts.format import Rendering


def labelled(*answers: str) -> list[Example]:
    return [Example(f"query {i}", answer, f"row {i}") for i, answer in enumerate(answers)]


# ------------------------------------------------------------------------------------------ shared


def beginnings(rows: Sequence[Sequence[int]]) -> int:
    """Different beginnings of the rows, the rows themselves among them: what must be computed."""
    return len({tuple(row[: n + 1]) for row in rows for n in range(len(row))})


def promised(count: int) -> int:
    """Demonstrations that are computed: each half once for the other, and so within each."""
    return 0 if count < 2 else count + promised(count // 2) + promised(count - count // 2)


@given(
    count=st.integers(2, 40),
    seed=st.integers(0, 99),
    permutations=st.integers(1, 3),
    limit=st.integers(0, 41),
)
@settings(deadline=None)
def test_shared_orders(count: int, seed: int, permutations: int, limit: int) -> None:
    orders = SharedPrefixes(count, permutations, seed)
    longer = SharedPrefixes(count, permutations + 2, seed)
    for k in range(permutations):
        found = [orders.candidates(i, k, count) for i in range(count)]
        for i, order in enumerate(found):
            assert sorted(order) == [j for j in range(count) if j != i]
            # the nearest of those, where not all may be shown; more permutations extend the list
            assert longer.candidates(i, k, limit) == order[max(len(order) - limit, 0) :]
        assert beginnings(found) == promised(count) <= count * math.ceil(math.log2(count))


def test_shared_orders_are_as_random_as_independent_ones() -> None:
    """Over all draws, each order of the others comes equally often for each example."""
    for count in (4, 5):
        for i in range(count):
            seen: Counter[tuple[int, ...]] = Counter()
            for drawn in permutations(range(count)):
                parts = other_halves(count, drawn.index(i))
                seen[tuple(j for part in parts for j in drawn[part])] += 1
            assert set(seen.values()) == {count} and len(seen) == math.factorial(count - 1)


def test_shared_orders_depend_on_the_seed_and_the_permutation() -> None:
    orders = [SharedPrefixes(9, 2, seed) for seed in (0, 1)]
    drawn = [tuple(tuple(o.candidates(i, k, 9)) for i in range(9)) for o in orders for k in range(2)]
    assert len(set(drawn)) == 4


def test_tokens_of_shared_contexts(word_tokenizer: PreTrainedTokenizerFast) -> None:
    """64 rows of one length: tokens of six demonstrations and a query each, not of 63 and a query."""
    examples = [
        Example(f"Text: {WORDS[i % 10]} {WORDS[i // 10]}\nLabel:", " positive", f"row {i}") for i in range(64)
    ]
    rendering = Rendering(word_tokenizer)
    contexts = DemonstrationContexts(rendering, examples, examples, SharedPrefixes(64), 9999, 1)
    ids = [contexts.context_ids(i) for i in range(64)]
    (query,), (whole,) = {len(contexts.query_ids(i)) for i in range(64)}, set(map(len, ids))
    demonstration = (whole - query) // 63
    assert whole == 63 * demonstration + query
    # of two that share their beginning the next demonstrations begin alike too
    assert 64 * (5 * demonstration + query) < beginnings(ids) <= 64 * (6 * demonstration + query)


def test_shared_orders_in_a_short_window(word_tokenizer: PreTrainedTokenizerFast) -> None:
    """Whole demonstrations go, the farthest first; what is left is still none's own and in order."""
    examples = rows(24, length=3)
    orders = SharedPrefixes(24, 2, 1)
    for window in (60, 90, 200):
        contexts = DemonstrationContexts(Rendering(word_tokenizer), examples, examples, orders, window, 5)
        for i in range(24):
            for k in range(2):
                shown = contexts.chosen(i, k)
                assert 0 < len(shown) < 23 and i not in shown
                assert shown == orders.candidates(i, k, 24)[-len(shown) :]
                assert len(contexts.context_ids(i, k)) <= window - 5


# ---------------------------------------------------------------------------------------- balanced


def test_answers_alternate() -> None:
    examples = labelled(*"aabbccabc")
    for i in range(9):
        own = Balanced(examples, 2, leave_one_out=True)
        for k in range(2):
            order = own.candidates(i, k, 100)
            assert sorted(order) == [j for j in range(9) if j != i]  # all, where all may be shown
            nearest = [examples[j].answer for j in reversed(order)]
            assert sorted(nearest[:3]) == ["a", "b", "c"] == sorted(nearest[3:6])
            assert nearest[:3] == nearest[3:6]
    pool = Balanced(examples, leave_one_out=False)
    assert pool.shared and pool.candidates(0, 0, 9) == pool.candidates(5, 0, 9)


@pytest.mark.parametrize(("limit", "each"), [(2, 0), (3, 1), (5, 1), (6, 2), (7, 2), (9, 3)])
def test_equally_many_of_each(limit: int, each: int) -> None:
    examples = labelled(*"abc" * 40)
    orders = Balanced(examples, leave_one_out=True)
    seen: Counter[int] = Counter()
    for i in range(120):
        order = orders.candidates(i, 0, limit)
        seen.update(order)
        counts = Counter(examples[j].answer for j in order)
        assert i not in order and len(set(order)) == len(order)
        if each:
            assert set(counts.values()) == {each} and len(counts) == 3
        else:  # not one of each fits: as many different ones as do
            assert len(order) == limit == len(counts)
    assert len(seen) > 90  # each example draws its own


def test_rare_answers() -> None:
    """What has run out keeps the others from nothing."""
    examples = labelled(*"a" * 20, *"b" * 3)
    orders = Balanced(examples, leave_one_out=True)
    counts = Counter(examples[j].answer for j in orders.candidates(0, 0, 10))
    assert counts == {"a": 7, "b": 3}
    counts = Counter(examples[j].answer for j in orders.candidates(22, 0, 4))
    assert counts == {"a": 2, "b": 2}
    only = Balanced(labelled("a", "b", "a"), leave_one_out=True)  # the only b gets no b
    assert sorted(only.candidates(1, 0, 9)) == [0, 2]


@given(
    answers=st.lists(st.sampled_from("abcd"), min_size=1, max_size=14),
    limit=st.integers(0, 16),
    leave_one_out=st.booleans(),
)
@settings(deadline=None)
def test_balanced_orders(answers: list[str], limit: int, leave_one_out: bool) -> None:
    examples = labelled(*answers)
    orders = Balanced(examples, 2, leave_one_out=leave_one_out)
    for i in range(len(examples)):
        order = orders.candidates(i, 1, limit)
        available = [e.answer for j, e in enumerate(examples) if not (leave_one_out and j == i)]
        assert len(order) <= limit and len(set(order)) == len(order)
        assert not (leave_one_out and i in order)
        assert order == Balanced(examples, 5, leave_one_out=leave_one_out).candidates(i, 1, limit)
        if limit >= len(available):
            assert len(order) == len(available)
        counts = Counter(examples[j].answer for j in order)
        most = max(counts.values(), default=0)
        if limit >= len(set(available)):
            supply = Counter(available)
            assert all(counts[label] == min(supply[label], most) for label in supply)


def test_whole_rounds_are_shown_where_the_window_is_short(word_tokenizer: PreTrainedTokenizerFast) -> None:
    examples = rows(12)  # two labels, in turn
    for window in range(40, 160, 9):
        contexts = DemonstrationContexts(
            Rendering(word_tokenizer), examples, examples, Balanced(examples, leave_one_out=True), window, 5
        )
        for i in range(12):
            shown = [examples[j].answer for j in contexts.chosen(i)]
            counts = Counter(shown)
            assert len(contexts.context_ids(i)) <= window - 5
            assert len(shown) in (1, 11) or set(counts.values()) == {len(shown) // 2}
        assert contexts.dropped.demonstrations == sum(11 - len(contexts.chosen(i)) for i in range(12))
    five = DemonstrationContexts(
        Rendering(word_tokenizer), examples, examples, Balanced(examples, leave_one_out=True), 999, 5, most=5
    )
    assert {len(five.chosen(i)) for i in range(12)} == {4} and not five.dropped.demonstrations


def test_as_many_answers_as_examples() -> None:
    examples = labelled(*(f"answer {i}" for i in range(300)))
    order = Balanced(examples, leave_one_out=True).candidates(7, 0, 20)
    assert len(set(order)) == 20 and 7 not in order


# ----------------------------------------------------------------------------------------- nearest


def test_nearest_rows() -> None:
    angles = np.radians([0, 10, 25, 90, 180, 11])
    points = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    points *= np.array([[1], [5], [0.1], [2], [1], [3]], np.float32)  # lengths do not count
    found = nearest_rows(points, points, 3, leave_one_out=True)
    assert found.tolist() == [[1, 5, 2], [5, 0, 2], [5, 1, 0], [2, 5, 1], [3, 2, 5], [1, 0, 2]]
    other = np.array([[0.1, 9.0]], np.float32)
    assert nearest_rows(other, points, 2).tolist() == [[3, 2]]
    assert nearest_rows(points, points, 99).shape == (6, 6)
    assert nearest_rows(points, points, 99, leave_one_out=True).shape == (6, 5)
    assert nearest_rows(points[:1], points[:1], 5, leave_one_out=True).shape == (1, 0)
    twins = np.ones((5, 3), np.float32)
    assert nearest_rows(twins, twins, 2, leave_one_out=True).tolist() == [
        [1, 2],
        [0, 2],
        [0, 1],
        [0, 1],
        [0, 1],
    ]


@pytest.mark.parametrize("count", [1, 7, 59, 60])
def test_nearest_rows_block_by_block(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    points = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    whole = nearest_rows(points, points, count, leave_one_out=True)
    monkeypatch.setattr("ia2.prompts.demonstrations._SIMILARITIES", 60 * 7)
    blocks = nearest_rows(points, points, count, leave_one_out=True)
    assert (whole == blocks).all()
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    for i in range(60):
        others = sorted((j for j in range(60) if j != i), key=lambda j: -float(unit[i] @ unit[j]))
        assert whole[i].tolist() == others[:count]


def test_nearest_is_next_to_the_query() -> None:
    points = np.array([[1, 0], [1, 0.1], [0, 1], [1, 0.5]], np.float32)
    asked: list[str] = []

    def embedded() -> np.ndarray:
        asked.append("now")
        return points

    orders = Nearest(embedded, embedded, leave_one_out=True)
    assert not asked  # nothing is computed before it is needed
    assert orders.candidates(0, 0, 3) == [2, 3, 1]
    assert orders.candidates(0, 0, 1) == [1]
    assert len(asked) == 2
    pool = Nearest(lambda: points[:1], lambda: points, leave_one_out=False)
    assert pool.candidates(0, 0, 4) == [2, 3, 1, 0] and not pool.shared


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_means_of_the_last_hidden_state(
    family: str, word_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = FAMILIES[family]()
    prompts = [Rendering(word_tokenizer).query_ids(e) for e in [*rows(3), *rows(2, length=9)]]
    found = embed(model, word_tokenizer, prompts)
    assert found.dtype == np.float32 and found.shape[0] == 5
    for ids, row in zip(prompts, found, strict=True):
        with torch.no_grad():
            output = model(torch.tensor([ids]), output_hidden_states=True)
        last = output.hidden_states[-1][0].float().mean(0).numpy()
        np.testing.assert_allclose(row, last, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
def test_the_adapter_is_off(kind: str, word_tokenizer: PreTrainedTokenizerFast) -> None:
    examples = rows(4)
    rendering = Rendering(word_tokenizer)
    expected = Embedder(rendering, llama)(examples, 0)
    configs: dict[str, Any] = {
        "lora": LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False),
        "prefix": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }
    adapted: Any = get_peft_model(llama(), configs[kind]).eval()
    np.testing.assert_array_equal(Embedder(rendering, lambda: adapted)(examples, 0), expected)
    # also where it is off already, and stays so
    with adapted.disable_adapter():
        Embedder(rendering, lambda: adapted)(examples, 0)
        inside = embed(adapted, word_tokenizer, [rendering.query_ids(e) for e in examples])
    np.testing.assert_array_equal(inside, expected)


def test_many_are_embedded_in_parts(
    word_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    examples, rendering, model = rows(7), Rendering(word_tokenizer), llama()
    whole = Embedder(rendering, lambda: model)(examples, 0)
    monkeypatch.setattr("ia2.prompts.demonstrations._EMBEDDED", 3)
    caplog.set_level(logging.INFO, logger="ia2")
    np.testing.assert_allclose(Embedder(rendering, lambda: model)(examples, 55), whole, atol=1e-5)
    assert "demo_order nearest: embedding 7 prompts (7 forward rows, 55 tokens)" in caplog.text
    assert len(Embedder(rendering, lambda: model)([], 0)) == 0


# ------------------------------------------------------------------------------------------ search


def naive_log_likelihood(model: Any, prompt: tuple[int, ...], answer: tuple[int, ...]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0].float().log_softmax(-1)
    return sum(float(logits[len(prompt) - 1 + n, token]) for n, token in enumerate(answer))


def test_log_likelihoods(word_tokenizer: PreTrainedTokenizerFast) -> None:
    model, rendering = llama(), Rendering(word_tokenizer)
    pairs = [
        (rendering.query_ids(e), encode_answer(word_tokenizer, " positive film" if i % 2 else " bad"))
        for i, e in enumerate(rows(6))
    ]
    expected = [naive_log_likelihood(model, *pair) for pair in pairs]
    np.testing.assert_allclose(log_likelihoods(model, word_tokenizer, pairs), expected, rtol=1e-4)


def search_of(tokenizer: Any, examples: Any, model: Any, **changes: Any) -> Search:
    options = {"tries": 5, "seed": 1, "model": lambda: model, **changes}
    return Search(Rendering(tokenizer), examples, 250, 5, **options)


def test_search_finds_the_best_order(
    word_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    examples, model = word_examples(6, label_words=2), llama()
    caplog.set_level(logging.INFO, logger="ia2")
    search = search_of(word_tokenizer, examples, model)
    scores = search.scores()
    rendering, naive = Rendering(word_tokenizer), []
    for order in search.orders:
        found = []
        for i, example in enumerate(examples):
            ids = rendering.context_ids([examples[j] for j in order if j != i], example)
            found.append(
                naive_log_likelihood(model, ids, encode_answer(word_tokenizer, example.answer or ""))
            )
        naive.append(sum(found) / len(found))
    np.testing.assert_allclose(scores, naive, rtol=1e-4)
    ranks = np.argsort(-np.array(naive)).tolist()
    assert search.ranked == [search.orders[r] for r in ranks]
    rows_and_tokens = "demo_order search: 5 orders on 6 of 6 examples (30 forward rows, about "
    assert rows_and_tokens in caplog.text
    assert "mean log-likelihood" in caplog.text
    # what it is used for
    own = SearchedOrders(search, 2, leave_one_out=True)
    best, second = search.ranked[:2]
    assert own.candidates(3, 0, 9) == [j for j in best if j != 3]
    assert own.candidates(3, 1, 9) == [j for j in second if j != 3]
    pool = SearchedOrders(search, leave_one_out=False)
    assert pool.shared and pool.candidates(0, 0, 9) == best


def test_search_is_done_once_and_late(
    word_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(Search, "scores", lambda self: calls.append(1) or [0.0, 2.0, 1.0, 2.0, -1.0])
    search = search_of(word_tokenizer, word_examples(4), None)
    own = SearchedOrders(search, 3, leave_one_out=True)
    pool = SearchedOrders(search, leave_one_out=False)
    assert own.facts() != pool.facts() and not calls
    own.candidates(0, 0, 9), pool.candidates(0, 0, 9), own.candidates(1, 2, 9)
    assert calls == [1]
    assert search.ranked == [search.orders[r] for r in (1, 3, 2, 0, 4)]  # of equals, the first


def test_search_of_many_scores_some(
    word_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ia2.prompts.demonstrations.SEARCH_EXAMPLES", 4)
    caplog.set_level(logging.INFO, logger="ia2")
    search = search_of(word_tokenizer, word_examples(12), llama(), most=3)
    assert len(search.scores()) == 5
    assert "5 orders on 4 of 12 examples (20 forward rows" in caplog.text


def test_facts_tell_orders_apart() -> None:
    examples = labelled(*"abab")
    points = np.eye(4, dtype=np.float32)
    facts = [
        LeaveOneOut(4).facts(),
        SharedPrefixes(4).facts(),
        SharedPrefixes(4, seed=1).facts(),
        Balanced(examples, seed=0, leave_one_out=True).facts(),
        Balanced(examples, seed=1, leave_one_out=True).facts(),
        Balanced(examples, seed=0, leave_one_out=False).facts(),
        Nearest(lambda: points, lambda: points, leave_one_out=True).facts(),
        Nearest(lambda: points, lambda: points, leave_one_out=False).facts(),
        FixedOrders([[0, 1]]).facts(),
        FixedOrders([[1, 0]]).facts(),
    ]
    assert all(a != b for i, a in enumerate(facts) for b in facts[:i])
