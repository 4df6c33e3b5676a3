"""All prompts of one run, as the settings say: demonstrations, texts, columns, functions."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.benches import word_examples
from helpers.families import llama
from helpers.prompts import builder, chatty, rows
from prompts.test_context import written
from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from ia2.data.examples import Example
from ia2.models.tokens import encode_prompt
from ia2.prompts.builder import PromptBuilder
from ia2.utils.errors import ConfigError, DataError
from ia2.utils.files import digest


def texts(prompts: PromptBuilder, contexts: Any) -> list[str]:
    return [prompts.format.tokenizer.decode(list(contexts.context_ids(i))) for i in range(len(contexts))]


# ---------------------------------------------------------------------------------- demonstrations


def test_what_was_made_is_kept(word_tokenizer: PreTrainedTokenizerFast) -> None:
    train, dev = rows(6), rows(3, offset=40)
    prompts = builder(word_tokenizer, train, context_draws=2)
    assert prompts.train_contexts is prompts.train_contexts and prompts.train_contexts.permutations == 2
    pool = prompts.pool_contexts(dev, 2)
    assert pool is prompts.pool_contexts(list(dev), 2) and pool is not prompts.pool_contexts(dev)
    bare = prompts.query_prompts(dev)
    assert list(bare) == [encode_prompt(word_tokenizer, e.query) for e in dev]
    assert list(bare[1:]) == list(bare)[1:] and bare[-1] == list(bare)[2]
    with pytest.raises(DataError, match="row 60: "):
        prompts.query_prompts([*dev, *rows(1, length=600, offset=60)])


def test_balanced(word_tokenizer: PreTrainedTokenizerFast) -> None:
    """Whole rounds only, where the window is short too."""
    for window in range(40, 160, 9):
        prompts = builder(word_tokenizer, rows(12), window, demo_order="balanced")
        contexts = prompts.train_contexts
        for i in range(12):
            counts = Counter(rows(12)[j].answer for j in contexts.chosen(i))
            assert len(contexts.chosen(i)) in (1, 11) or len(set(counts.values())) == 1
    prompts = builder(word_tokenizer, rows(9), demo_order="balanced", max_demonstrations=4)
    for contexts in (prompts.train_contexts, prompts.pool_contexts(rows(2, offset=30))):
        for text in texts(prompts, contexts):
            assert text.count("Label: positive") == text.count("Label: negative") == 2


def test_nearest(word_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture) -> None:
    train = word_examples(12)
    twin = Example(train[4].query, " positive", "twin")
    settings: Any = {"demo_order": "nearest", "max_demonstrations": 3}
    prompts = builder(word_tokenizer, [*train, twin], model=llama(), **settings)
    caplog.set_level(logging.INFO, logger="ia2")
    contexts = prompts.train_contexts
    assert not caplog.text  # checked without the model
    assert contexts.chosen(4)[-1] == 12 and contexts.chosen(12)[-1] == 4
    pool = prompts.pool_contexts([Example(train[n].query, None, "test") for n in (7, 2)])
    assert [pool.chosen(i)[-1] for i in range(2)] == [7, 2]
    assert caplog.text.count("embedding 13 prompts") == caplog.text.count("embedding 2 prompts") == 1
    again = builder(word_tokenizer, [*train, twin], model=llama(), **settings).train_contexts
    assert [again.chosen(i) for i in range(13)] == [contexts.chosen(i) for i in range(13)]


def test_search(word_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ia2")
    prompts = builder(
        word_tokenizer, word_examples(5), model=llama(), demo_order="search", demo_search_orders=4,
        context_draws=2,
    )  # fmt: skip
    contexts, pool = prompts.train_contexts, prompts.pool_contexts(rows(3, offset=30), 2)
    contexts.facts(), pool.facts()
    assert "search" not in caplog.text
    orders = [pool.chosen(0, k) for k in range(2)]
    assert all(sorted(order) == list(range(5)) for order in orders) and orders[0] != orders[1]
    for i in range(5):
        assert [contexts.chosen(i, k) for k in range(2)] == [[j for j in order if j != i] for order in orders]
    assert caplog.text.count("forward rows") == 1


def test_fresh_demonstrations_for_every_query(word_tokenizer: PreTrainedTokenizerFast) -> None:
    unused, queries = rows(30, offset=60), rows(8, offset=40)

    def shown(**settings: Any) -> list[tuple[int, ...]]:
        prompts = builder(word_tokenizer, rows(3), icl_demonstrations="fresh", **settings)
        contexts = prompts.fresh_contexts(queries, unused)
        for i, query in enumerate(queries):
            text = written([unused[j] for j in contexts.chosen(i)], query)
            assert contexts.context_ids(i) == encode_prompt(word_tokenizer, text)
        return [tuple(contexts.chosen(i)) for i in range(8)]

    assert len(set(shown())) == 8 and {len(set(row)) for row in shown()} == {3}
    assert shown() == shown() != shown(seed=1)
    assert {len(row) for row in shown(max_demonstrations=2)} == {2}
    with pytest.raises(DataError, match=r"fresh .*3 .*2\. .*num_examples"):
        builder(word_tokenizer, rows(3)).fresh_contexts(queries, unused[:2])


def test_whatever_changes_a_context_changes_the_facts(word_tokenizer: PreTrainedTokenizerFast) -> None:
    train = rows(6)
    settings: list[dict[str, Any]] = [
        {},
        {"window": 90},
        {"reserve": 7},
        {"train": [train[1], train[0], *train[2:]]},
        {"train": [*train[:5], Example(train[5].query, " x", "row 5")]},
        {"seed": 1},
        {"context_draws": 2},
        {"separator": "\n"},
        {"max_demonstrations": 2},
        {"demo_order": "shared"},
        {"demo_order": "balanced"},
        {"demo_order": "nearest"},
        {"demo_order": "search"},
        {"demo_order": "search", "demo_search_orders": 9},
        {"context_text": "good"},
        {"context_text": "bad"},
    ]

    def facts(**settings: Any) -> str:
        return digest(
            builder(word_tokenizer, settings.pop("train", train), **settings).train_contexts.facts()
        )

    assert len({facts(**each) for each in settings}) == len(settings)
    assert facts(train=[Example(e.query, e.answer, "elsewhere") for e in train]) == facts()


# ------------------------------------------------------------------------------------- other kinds


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"demo_order": "nearest", "context_draws": 2}, r"demo_order nearest.* context_draws is 2"),
        ({"demo_order": "search", "context_draws": 9}, r"context_draws is 9.* 8"),
        ({"context_text": "x", "max_demonstrations": 2}, "max_demonstrations"),
        ({"context_text": " "}, "context_text is empty"),
        ({"chat": "turns"}, "chat"),
        ({"function": len, "context_text": "y"}, r"context_text .*one context"),
        ({"function": len, "demo_order": "balanced"}, "demo_order"),
        ({"function": len, "icl_demonstrations": "fresh"}, "icl_demonstrations"),
        ({"context_file": "missing.txt"}, "context_file: missing.txt: no such file"),
        ({"context_file": "empty.txt"}, "empty.txt is empty"),
        ({"context_file": "latin.txt"}, "line 1 is not UTF-8 text"),
        ({"context_function": "textwrap"}, "'textwrap' is no import path such as package.module:function"),
        ({"context_function": "textwrap:fil"}, "has no function 'fil'. Did you mean 'fill'"),
        ({"context_function": "no_such_module:f"}, "cannot import 'no_such_module'"),
        ({"context_function": ".relative:f"}, "cannot import '.relative'"),
    ],
)
def test_refused_settings(
    settings: dict[str, Any],
    named: str,
    word_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_bytes(b" \n")
    Path("latin.txt").write_bytes(b"ab\xe4c")
    with pytest.raises((ConfigError, DataError, ValidationError), match=named):
        builder(word_tokenizer, rows(3), **settings)


def test_text(word_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "context.txt").write_text("the film was good.\n", encoding="utf-8")
    train, dev = rows(3), rows(2, offset=30)
    for settings in ({"context_text": "the film was good."}, {"context_file": str(tmp_path / "context.txt")}):
        prompts = builder(word_tokenizer, train, **settings)  # type: ignore[arg-type]
        for contexts, queries in ((prompts.train_contexts, train), (prompts.pool_contexts(dev, 3), dev)):
            assert contexts.permutations == 1
            assert texts(prompts, contexts) == [f"the film was good.\n\n{e.query}" for e in queries]


def with_hints(*values: Any) -> list[Example]:
    return [
        Example(base.query, base.answer, f"reviews.jsonl:{i + 1}", {"text": "x", "hint": value})
        for i, (base, value) in enumerate(zip(rows(len(values)), values, strict=True))
    ]


def test_columns(word_tokenizer: PreTrainedTokenizerFast) -> None:
    """A text, chat messages (TRL's ``privileged_context``) or demonstrations, row by row."""
    demos = [{"prompt": "film one:", "completion": " good"}, {"prompt": "film two:", "completion": " bad"}]
    train = with_hints("film one", demos, demos[:1])
    prompts = builder(word_tokenizer, train, context_column="hint")
    before = ["film one\n\n", "film one: good\n\nfilm two: bad\n\n", "film one: good\n\n"]
    assert texts(prompts, prompts.train_contexts) == [b + e.query for b, e in zip(before, train, strict=True)]
    assert texts(prompts, prompts.pool_contexts(train[:1], 3)) == [before[0] + train[0].query]
    messages = [{"role": "system", "content": "Know this."}, {"role": "user", "content": "A hint."}]
    train = with_hints(messages, "A text.", demos)
    prompts = builder(chatty("chatml"), train, context_column="hint", chat="turns")
    first, second, third = texts(prompts, prompts.train_contexts)
    assert first == (
        "<|im_start|>system\nKnow this.<|im_end|>\n"
        f"<|im_start|>user\nA hint.\n\n{train[0].query}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert second.startswith("<|im_start|>system\nA text.<|im_end|>\n<|im_start|>user\nText: ")
    assert "<|im_start|>assistant\nbad<|im_end|>" in third
    with pytest.raises(DataError, match=r"reviews.jsonl:1: the context is made of chat messages"):
        builder(chatty("chatml"), train, context_column="hint").train_contexts  # noqa: B018


def broken(example: Example, others: Any) -> Any:
    raise KeyError("lost")


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "'hint' is null. Give a text"),
        ("  ", "is empty"),
        ([], "is an empty list"),
        (3, "is an int. Give a text"),
        (["x"], "item 1 is neither a chat message nor a demonstration"),
        ([{"role": "user", "content": 3}], "message 1: content is an int, not text"),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": 1}],
            "demonstration 2: completion",
        ),
        ([{"role": "user", "content": "a"}, {"prompt": "a", "completion": "b"}], "mixes chat messages and"),
        ([Example("a", None, "elsewhere")], r"demonstration 1 \(elsewhere\)"),
    ],
)
def test_a_bad_value_names_the_row(value: Any, told: str, word_tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = builder(word_tokenizer, with_hints("fine", value), context_column="hint")
    with pytest.raises(DataError, match=rf"^reviews.jsonl:2: the context in column .*{told}"):
        prompts.train_contexts  # noqa: B018


def test_columns_and_functions_that_fail(word_tokenizer: PreTrainedTokenizerFast) -> None:
    for settings, told in (
        ({"context_column": "hints"}, r"2 bad rows: reviews.jsonl:1: .*'hints'.*Did you mean 'hint'\?"),
        ({"function": broken}, r"reviews.jsonl:1: .*KeyError: 'lost' \(test_builder\.py, line \d+\)"),
        ({"function": lambda e, o: None}, r"reviews.jsonl:1: .*<lambda> is null"),
    ):
        with pytest.raises(DataError, match=told):
            builder(word_tokenizer, with_hints("fine", "fine"), **settings).train_contexts  # type: ignore[arg-type]  # noqa: B018


def test_function(word_tokenizer: PreTrainedTokenizerFast) -> None:
    train, dev = rows(5), rows(2, offset=30)
    calls: Counter[str] = Counter()

    def context(example: Example, others: Sequence[Example]) -> Any:
        calls[example.source] += 1
        assert example not in others
        if example.source == "row 0":
            return f"good {len(others)}"
        return [others[-1], others[0]] if example.source == "row 4" else list(others)[:1]

    prompts = builder(word_tokenizer, train, function=context)
    contexts = prompts.train_contexts
    found = texts(prompts, contexts)
    assert found[0].endswith(f"\n\n{train[0].query}")
    assert found[1] == written([train[0]], train[1])
    assert found[4] == written([train[3], train[0]], train[4])
    assert texts(prompts, prompts.pool_contexts(dev))[1] == written([train[0]], dev[1])
    texts(prompts, contexts), contexts.facts()
    assert set(calls.values()) == {1}  # asked once: it may be slow, or draw at random
