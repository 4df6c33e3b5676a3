"""All prompts of one run, as the settings say: demonstrations, texts, columns, functions."""

from __future__ import annotations

import logging
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.benches import word_examples
from helpers.command_line import names
from helpers.families import llama
from prompts.test_context import naive_orders, rows
from prompts.test_rendering import chatty
from transformers import PreTrainedTokenizerFast

from ia2.config import AdaptConfig
from ia2.config.reading import validate
from ia2.data.examples import Example
from ia2.models.tokens import decode, encode_prompt
from ia2.prompts.builder import Prompts, load_function, query_prompts, read_given
from ia2.prompts.context import render
from ia2.prompts.format import Rendering
from ia2.utils.errors import ConfigError, DataError
from ia2.utils.files import digest


def no_model() -> Any:
    raise AssertionError("the model is not needed")


def made(
    tokenizer: Any,
    train: Any,
    model: Any = no_model,
    window: int = 400,
    function: Any = None,
    **settings: Any,
) -> Prompts:
    return Prompts(tokenizer, 5, window, train, AdaptConfig(**settings), model, function)


def texts(prompts: Prompts, contexts: Any) -> list[str]:
    return [decode(prompts.rendering.tokenizer, contexts.context_ids(i)) for i in range(len(contexts))]


# ---------------------------------------------------------------------------------- demonstrations


def test_by_default_as_ever(word_tokenizer: PreTrainedTokenizerFast) -> None:
    train, dev = rows(6), rows(3, offset=40)
    prompts = made(word_tokenizer, train, seed=2, context_draws=2)
    contexts = prompts.train_contexts
    assert contexts is prompts.train_contexts
    for i, orders in enumerate(naive_orders(6, 2, seed=2)):
        for k, order in enumerate(orders):
            text = render([train[j] for j in order], train[i].query)
            assert contexts.context_ids(i, k) == encode_prompt(word_tokenizer, text)
    pool = prompts.pool_contexts(dev, 2)
    assert pool is prompts.pool_contexts(list(dev), 2) and pool is not prompts.pool_contexts(dev)
    assert pool.permutations == 2
    assert len({tuple(pool.chosen(i, 1)) for i in range(3)}) == 1  # type: ignore[attr-defined]
    bare = prompts.query_prompts(dev)
    assert list(bare) == [encode_prompt(word_tokenizer, e.query) for e in dev]
    assert len(bare) == 3 and list(bare[1:]) == list(bare)[1:] and bare[-1] == list(bare)[2]
    assert [contexts.query_ids(i) for i in range(6)] == list(prompts.query_prompts(train))


def test_a_bare_prompt_that_is_too_long(word_tokenizer: PreTrainedTokenizerFast) -> None:
    examples = [*rows(2), *rows(1, length=60, offset=60)]
    with pytest.raises(DataError, match=r"^.*row 60: .* 50"):
        made(word_tokenizer, examples, window=50).query_prompts(examples)
    with pytest.raises(DataError, match="row 60: "):
        query_prompts(Rendering(word_tokenizer), examples, 50, 5)


def test_at_most_so_many_for_all(word_tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = made(word_tokenizer, rows(9), max_demonstrations=3)
    contexts: Any = prompts.train_contexts
    assert {len(contexts.chosen(i)) for i in range(9)} == {3}
    assert len({tuple(sorted(contexts.chosen(i))) for i in range(9)}) > 4
    pool: Any = prompts.pool_contexts(rows(4, offset=30))
    assert len(pool.chosen(0)) == 3 and {tuple(pool.chosen(i)) for i in range(4)} == {tuple(pool.chosen(0))}


def test_balanced(word_tokenizer: PreTrainedTokenizerFast) -> None:
    train = rows(9)
    prompts = made(word_tokenizer, train, demo_order="balanced", max_demonstrations=4)
    for contexts in (prompts.train_contexts, prompts.pool_contexts(rows(2, offset=30))):
        for text in texts(prompts, contexts):
            assert text.count("Label: positive") == text.count("Label: negative") == 2


def test_shared(word_tokenizer: PreTrainedTokenizerFast) -> None:
    """Orders of the training examples only: dev and test rows have one order as it is."""
    train, queries = rows(9), rows(4, offset=30)
    plain, prompts = made(word_tokenizer, train), made(word_tokenizer, train, demo_order="shared")
    own: Any = prompts.train_contexts
    firsts = Counter(own.chosen(i)[0] for i in range(9))
    assert sorted(firsts.values()) == [4, 5]  # each half begins alike
    assert all(sorted(own.chosen(i)) == [j for j in range(9) if j != i] for i in range(9))
    assert texts(prompts, prompts.pool_contexts(queries)) == texts(plain, plain.pool_contexts(queries))


def test_nearest(word_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture) -> None:
    train = word_examples(12)
    twin = Example(train[4].query, " positive", "twin")
    model = llama()
    prompts = made(word_tokenizer, [*train, twin], lambda: model, demo_order="nearest", max_demonstrations=3)
    caplog.set_level(logging.INFO, logger="ia2")
    contexts: Any = prompts.train_contexts
    assert not caplog.text  # checked without the model
    assert contexts.chosen(4)[-1] == 12 and contexts.chosen(12)[-1] == 4
    queries = [Example(train[7].query, None, "test 1"), Example(train[2].query, None, "test 2")]
    pool: Any = prompts.pool_contexts(queries)
    assert [pool.chosen(i)[-1] for i in range(2)] == [7, 2]
    assert caplog.text.count("embedding 13 prompts") == caplog.text.count("embedding 2 prompts") == 1
    assert decode(word_tokenizer, pool.context_ids(0)).endswith(
        f"{train[7].query}{train[7].answer}\n\n{train[7].query}"
    )
    again: Any = made(
        word_tokenizer, [*train, twin], lambda: model, demo_order="nearest", max_demonstrations=3
    ).train_contexts
    assert [again.chosen(i) for i in range(13)] == [contexts.chosen(i) for i in range(13)]
    assert digest(again.facts()) == digest(contexts.facts())


def test_search(word_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture) -> None:
    train, model = word_examples(5), llama()
    caplog.set_level(logging.INFO, logger="ia2")
    prompts = made(
        word_tokenizer,
        train,
        lambda: model,
        demo_order="search",
        demo_search_orders=4,
        context_draws=2,
    )
    contexts: Any = prompts.train_contexts
    pool: Any = prompts.pool_contexts(rows(3, offset=30), 2)
    contexts.facts(), pool.facts()
    assert "search" not in caplog.text
    pool.prepare()
    orders = [pool.chosen(0, k) for k in range(2)]
    assert all(sorted(order) == list(range(5)) for order in orders) and orders[0] != orders[1]
    for i in range(5):
        assert [contexts.chosen(i, k) for k in range(2)] == [[j for j in order if j != i] for order in orders]
    assert caplog.text.count("forward rows") == 1


def test_settings_that_contradict_each_other(word_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"demo_order nearest.* context_draws is 2"):
        made(word_tokenizer, rows(3), demo_order="nearest", context_draws=2)
    with pytest.raises(ConfigError, match=r"context_draws is 9.* 8"):
        made(word_tokenizer, rows(3), demo_order="search", context_draws=9)
    with pytest.raises(ConfigError, match=r"context function.* context_text"):
        made(word_tokenizer, rows(3), function=lambda e, o: "x", context_text="y")
    with pytest.raises(ConfigError, match=r"demo_order.* context function"):
        made(word_tokenizer, rows(3), function=lambda e, o: "x", demo_order="balanced")
    with pytest.raises(ConfigError, match=r"icl_demonstrations.* context function"):
        made(word_tokenizer, rows(3), function=lambda e, o: "x", icl_demonstrations="fresh")
    with pytest.raises(ConfigError, match=r"icl_demonstrations.* context_text"):
        validate(AdaptConfig, {"context_text": "x", "icl_demonstrations": "fresh"})
    with pytest.raises(ConfigError, match="max_demonstrations"):
        made(word_tokenizer, rows(3), context_text="x", max_demonstrations=2)
    with pytest.raises(ConfigError, match="chat"):
        made(word_tokenizer, rows(3), chat="turns")


def test_fresh_demonstrations_for_every_query(word_tokenizer: PreTrainedTokenizerFast) -> None:
    train, unused, queries = rows(3), rows(30, offset=60), rows(8, offset=40)
    prompts = made(word_tokenizer, train, icl_demonstrations="fresh")
    contexts = prompts.fresh_contexts(queries, unused)
    shown = [tuple(contexts.chosen(i)) for i in range(8)]
    assert all(len(chosen) == 3 and len(set(chosen)) == 3 for chosen in shown)
    assert len(set(shown)) == 8, "every query has its own"
    for i, chosen in enumerate(shown):
        text = render([unused[j] for j in chosen], queries[i].query)
        assert contexts.context_ids(i) == encode_prompt(word_tokenizer, text)
    again = made(word_tokenizer, train, icl_demonstrations="fresh").fresh_contexts(queries, unused)
    assert [tuple(again.chosen(i)) for i in range(8)] == shown
    other = made(word_tokenizer, train, icl_demonstrations="fresh", seed=1).fresh_contexts(queries, unused)
    assert [tuple(other.chosen(i)) for i in range(8)] != shown
    few = made(word_tokenizer, train, icl_demonstrations="fresh", max_demonstrations=2)
    assert len(few.fresh_contexts(queries, unused).chosen(0)) == 2
    with pytest.raises(DataError, match=r"fresh .*3 .*2\. .*num_examples"):
        prompts.fresh_contexts(queries, unused[:2])


def test_settings_change_the_facts(word_tokenizer: PreTrainedTokenizerFast) -> None:
    train = rows(6)
    settings: list[dict[str, Any]] = [
        {},
        {"seed": 1},
        {"context_draws": 2},
        {"separator": "\n"},
        {"max_demonstrations": 2},
        {"demo_order": "shared"},
        {"demo_order": "shared", "context_draws": 2},
        {"demo_order": "balanced"},
        {"demo_order": "nearest"},
        {"demo_order": "search"},
        {"demo_order": "search", "demo_search_orders": 9},
        {"context_text": "good"},
        {"context_text": "bad"},
    ]
    found = [digest(made(word_tokenizer, train, **each).train_contexts.facts()) for each in settings]
    assert len(set(found)) == len(found)


# ------------------------------------------------------------------------------------- chat models


@pytest.mark.parametrize("chat", ["turns", "single"])
def test_chat(chat: Any) -> None:
    train, dev = rows(4), rows(2, offset=30)
    prompts = made(chatty("qwen"), train, chat=chat)
    thoughtful = made(chatty("qwen"), train, chat=chat, thinking=True)
    for own, given in ((prompts, True), (thoughtful, False)):
        contexts = own.train_contexts
        for i in range(4):
            for ids in (contexts.context_ids(i), contexts.query_ids(i)):
                assert ("<think>" in decode(chatty("qwen"), ids)) == given
        ids = own.pool_contexts(dev).context_ids(0)
        text = str(chatty("qwen").decode(list(ids)))
        assert text.count("<|im_start|>user") == (5 if chat == "turns" else 1)
        assert all(e.query in text for e in [*train, dev[0]])
    assert digest(prompts.train_contexts.facts()) != digest(thoughtful.train_contexts.facts())


# ------------------------------------------------------------------------------------- other kinds


def test_text(word_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    train, dev = rows(3), rows(2, offset=30)
    prompts = made(word_tokenizer, train, context_text="the film was good.")
    for contexts, queries in ((prompts.train_contexts, train), (prompts.pool_contexts(dev, 3), dev)):
        assert contexts.permutations == 1
        assert texts(prompts, contexts) == [f"the film was good.\n\n{e.query}" for e in queries]
    file = tmp_path / "context.txt"
    file.write_text("the film was good.\n", encoding="utf-8")
    same = made(word_tokenizer, train, context_file=str(file))
    assert digest(same.train_contexts.facts()) == digest(prompts.train_contexts.facts())
    chat = made(chatty("chatml"), train, context_text="Be brief.", chat="turns")
    text = chatty("chatml").decode(list(chat.train_contexts.context_ids(0)))
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_context_files_that_cannot_be_read(word_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def refused(name: str, content: bytes | None) -> str:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError) as caught:
            made(word_tokenizer, rows(3), context_file=str(tmp_path / name))
        return str(caught.value)

    assert "no such file" in refused("missing.txt", None)
    assert "is empty" in refused("empty.txt", b" \n")
    assert "line 1 is not UTF-8 text" in refused("latin.txt", b"ab\xe4c")
    assert "is a folder" in refused("", None)


def row(i: int, value: Any) -> Example:
    base = rows(1, offset=i)[0]
    return Example(base.query, base.answer, f"reviews.jsonl:{i + 1}", {"text": "x", "hint": value})


def test_column_of_texts(word_tokenizer: PreTrainedTokenizerFast) -> None:
    """TRL's ``privileged_context`` as a text, for training and dev rows alike."""
    train, dev = [row(i, f"film {w}") for i, w in enumerate(["one", "two"])], [row(7, "food three")]
    prompts = made(word_tokenizer, train, context_column="hint")
    assert texts(prompts, prompts.train_contexts) == [
        f"film {w}\n\n{e.query}" for w, e in zip(["one", "two"], train, strict=True)
    ]
    assert texts(prompts, prompts.pool_contexts(dev)) == [f"food three\n\n{dev[0].query}"]
    changed = made(word_tokenizer, [row(0, "film one"), row(1, "film a")], context_column="hint")
    assert digest(changed.train_contexts.facts()) != digest(prompts.train_contexts.facts())


def test_column_of_messages() -> None:
    messages = [{"role": "system", "content": "Know this."}, {"role": "user", "content": "A hint."}]
    train = [row(0, messages), row(1, "A text.")]
    prompts = made(chatty("chatml"), train, context_column="hint", chat="turns")
    first, second = (chatty("chatml").decode(list(prompts.train_contexts.context_ids(i))) for i in range(2))
    assert first == (
        "<|im_start|>system\nKnow this.<|im_end|>\n"
        f"<|im_start|>user\nA hint.\n\n{train[0].query}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert second.startswith("<|im_start|>system\nA text.<|im_end|>\n<|im_start|>user\nText: ")
    with pytest.raises(DataError, match=r"reviews.jsonl:1: the context is made of chat messages"):
        made(chatty("chatml"), train, context_column="hint").train_contexts  # noqa: B018


def test_column_of_demonstrations(word_tokenizer: PreTrainedTokenizerFast) -> None:
    demos = [{"prompt": "film one:", "completion": " good"}, {"prompt": "film two:", "completion": " bad"}]
    train = [row(0, demos), row(1, demos[:1])]
    prompts = made(word_tokenizer, train, context_column="hint")
    assert texts(prompts, prompts.train_contexts) == [
        f"film one: good\n\nfilm two: bad\n\n{train[0].query}",
        f"film one: good\n\n{train[1].query}",
    ]
    chat = made(chatty("chatml"), train, context_column="hint", chat="turns")
    text = chatty("chatml").decode(list(chat.train_contexts.context_ids(0)))
    assert "<|im_start|>assistant\nbad<|im_end|>" in text


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "is null. Give a text"),
        ("  ", "is empty"),
        ([], "is an empty list"),
        (3, "is an int. Give a text"),
        (["x"], "item 1 is neither a chat message nor a demonstration"),
        ([{"role": "user"}], "item 1 is neither"),
        ([{"role": "user", "content": 3}], "message 1: content is an int, not text"),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}],
            "demonstration 2: completion",
        ),
        ([{"role": "user", "content": "a"}, {"prompt": "a", "completion": "b"}], "mixes chat messages and"),
    ],
)
def test_bad_values_name_the_row(value: Any, told: str, word_tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = made(word_tokenizer, [row(0, "fine"), row(1, value)], context_column="hint")
    with pytest.raises(DataError) as caught:
        prompts.train_contexts  # noqa: B018
    message = str(caught.value)
    assert message.startswith("reviews.jsonl:2: the context in column 'hint'") and told in message
    assert "\n" not in message


def test_a_missing_column(word_tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = made(word_tokenizer, [row(0, "fine"), row(1, "fine")], context_column="hints")
    with pytest.raises(DataError) as caught:
        prompts.train_contexts  # noqa: B018
    line = str(caught.value)
    names(line, "2 bad rows: reviews.jsonl:1: ", "reviews.jsonl:2: ", "'hints'", "Did you mean 'hint'?")
    bare = made(word_tokenizer, rows(2), context_column="hint")
    with pytest.raises(DataError, match=r"2 bad rows: row 0: .*'hint'"):
        bare.train_contexts  # noqa: B018


def test_function(word_tokenizer: PreTrainedTokenizerFast) -> None:
    train, dev = rows(5), rows(2, offset=30)
    calls: Counter[str] = Counter()

    def context(example: Example, others: Any) -> Any:
        calls[example.source] += 1
        assert example not in others
        if example.source == "row 0":
            return f"good {len(others)}"
        return [others[-1], others[0]] if example.source == "row 4" else list(others)[:1]

    prompts = made(word_tokenizer, train, function=context)
    contexts = prompts.train_contexts
    found = texts(prompts, contexts)
    assert found[0].endswith(f"\n\n{train[0].query}")
    assert found[1] == render([train[0]], train[1].query)
    assert found[4] == render([train[3], train[0]], train[4].query)
    pool = prompts.pool_contexts(dev)
    assert texts(prompts, pool)[1] == render([train[0]], dev[1].query)
    texts(prompts, contexts), contexts.facts()
    assert set(calls.values()) == {1}  # asked once: it may be slow, or draw at random


def test_function_that_fails(word_tokenizer: PreTrainedTokenizerFast) -> None:
    def broken(example: Example, others: Any) -> Any:
        raise KeyError("lost")

    with pytest.raises(DataError, match=r"row 0: .*KeyError: 'lost' \(test_prompts\.py, line \d+\)"):
        made(word_tokenizer, rows(2), function=broken).train_contexts  # noqa: B018
    unlabelled = made(word_tokenizer, rows(2), function=lambda e, o: [Example("a", None, "elsewhere")])
    with pytest.raises(DataError, match=r"demonstration 1 \(elsewhere\)"):
        unlabelled.train_contexts  # noqa: B018
    nothing = made(word_tokenizer, rows(2), function=lambda e, o: None)
    with pytest.raises(DataError, match=r"row 0: .*<lambda>"):
        nothing.train_contexts  # noqa: B018


def test_function_by_its_import_path(
    word_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = types.ModuleType("my_contexts")
    module.hint = lambda example, others: "good food"
    module.other = 3
    monkeypatch.setitem(sys.modules, "my_contexts", module)
    prompts = made(word_tokenizer, rows(2), context_function="my_contexts:hint")
    assert texts(prompts, prompts.train_contexts)[1].startswith("good food\n\n")
    for spec, told in (
        ("my_contexts", "is no import path such as package.module:function"),
        ("my_contexts:hit", "has no function 'hit'. Did you mean 'hint'?"),
        ("my_contexts:other", "has no function 'other'"),
        ("no_such_module_here:f", "cannot import 'no_such_module_here'"),
        (".relative:f", "cannot import '.relative'"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_function(spec)
        assert f"context_function '{spec}'" in str(caught.value) and told in str(caught.value)


def test_examples_of_a_list_may_be_shared(word_tokenizer: PreTrainedTokenizerFast) -> None:
    given = read_given(rows(2), "row 9")
    assert list(given.demonstrations) == rows(2) and given.text is None
    assert read_given("text", "row 9").text == "text"


def test_nothing_of_the_model_is_asked_for_without_need(word_tokenizer: PreTrainedTokenizerFast) -> None:
    train = rows(6)
    for settings in ({}, {"demo_order": "balanced"}, {"context_text": "good"}):
        prompts = made(word_tokenizer, train, **settings)  # type: ignore[arg-type]
        prompts.train_contexts.prepare()
        prompts.pool_contexts(train[:2]).prepare()
        prompts.query_prompts(train)
    assert np.all([prompts.train_contexts.common_suffix(i) > 0 for i in range(6)])
