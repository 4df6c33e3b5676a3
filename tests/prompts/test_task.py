from __future__ import annotations

import logging
from typing import Any

import pytest

from ia2.config import AdaptConfig
from ia2.data.examples import Examples, RowFormat
from ia2.prompts.task import FREE_TEXT_TOKENS, Task, make_task, stop_text
from ia2.utils.errors import ConfigError, DataError

WORDS = ["good", "bad", "great", "awful", "fine", "film", "food", "song"]


def examples(*answers: str, prompts: list[str] | None = None) -> Examples:
    prompts = prompts or [f"{WORDS[i % len(WORDS)]} night" for i in range(len(answers))]
    rows = [{"prompt": p, "completion": a} for p, a in zip(prompts, answers, strict=True)]
    return Examples.from_rows(rows, name="rows")


def make(tokenizer: Any, rows: Examples, template: str | None = None, **settings: Any) -> Task:
    return make_task(rows, AdaptConfig(**settings), tokenizer, template)


# -------------------------------------------------------------------------------------- detection


def test_repeated_answers_are_labels(word_tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ia2"):
        task = make(word_tokenizer, examples(*[" yes", " no"] * 3))
    assert (task.kind, task.labels, task.names) == ("classification", (" no", " yes"), ("no", "yes"))
    assert task.label_ids == tuple((word_tokenizer.convert_tokens_to_ids(x),) for x in task.labels)
    assert task.single_token
    assert (task.append_end, task.terminators) == (None, ())
    assert "2 labels (' no', ' yes'), one token each" in caplog.text


def test_mostly_different_answers_are_free_text(word_tokenizer: Any) -> None:
    task = make(word_tokenizer, examples(*[f" {w} {v}" for w in WORDS[:3] for v in WORDS[3:6]]))
    assert (task.kind, task.labels) == ("generation", ())
    assert task.max_answer_tokens == FREE_TEXT_TOKENS
    assert task.append_end == word_tokenizer.eos_token_id
    assert not task.single_token


def test_exactly_half_as_many_answers_as_rows_are_labels(word_tokenizer: Any) -> None:
    half = [f" {w} film" for w in WORDS[:5]]
    assert make(word_tokenizer, examples(*half, *half)).kind == "classification"
    assert make(word_tokenizer, examples(*half, *half[:4])).kind == "generation"


def test_few_rows_with_answers_of_one_word_are_labels(word_tokenizer: Any) -> None:
    assert make(word_tokenizer, examples(" red", " green", " blue")).kind == "classification"
    assert make(word_tokenizer, examples(" red fish", " green fish", " blue fish")).kind == "generation"


def test_the_setting_wins_over_the_look_of_it(word_tokenizer: Any) -> None:
    labels = examples(*[" yes", " no"] * 3)
    assert make(word_tokenizer, labels, task="generation").kind == "generation"
    free = examples(" red fish", " green fish", " blue fish")
    assert make(word_tokenizer, free, task="classification").kind == "classification"
    given = [" red fish", " green fish", " blue fish", " fish"]
    assert make(word_tokenizer, free, labels=given).labels == tuple(sorted(given))


# ----------------------------------------------------------------------------------------- labels


def test_labels_of_several_tokens(word_tokenizer: Any) -> None:
    task = make(word_tokenizer, examples(*[" good film", " bad"] * 3))
    assert [len(ids) for ids in task.label_ids] == [1, 2]
    assert not task.single_token
    assert task.max_answer_tokens > 2
    assert task.append_end == word_tokenizer.eos_token_id
    assert task.terminators == ()  # neither begins the other
    assert task.target_ids(word_tokenizer, examples(" bad")[0]) == (*task.label_ids[0], task.append_end)


def test_a_label_that_begins_another_has_terminators(word_tokenizer: Any) -> None:
    rows = examples(*[" good", " good film"] * 3, prompts=[f"Text: {w}" for w in WORDS[:6]])
    task = make(word_tokenizer, rows)
    ids = word_tokenizer.convert_tokens_to_ids
    assert task.stop_texts == ("\n\nText:",)
    assert set(task.terminators) == {ids("\n\n"), ids("</s>")}


def test_names_are_the_raw_labels(word_tokenizer: Any) -> None:
    rows = Examples.from_rows(
        [{"text": w, "label": i % 2} for i, w in enumerate(WORDS)],
        format=RowFormat("Text: {text}", " {label}", {"0": "bad", "1": "good"}),
    )
    task = make(word_tokenizer, rows, "Text: {text}")
    assert (task.labels, task.names) == ((" bad", " good"), (0, 1))
    assert task.label_of(rows[1]) == 1


def test_a_label_that_no_row_has_is_named_by_its_text(word_tokenizer: Any) -> None:
    rows = Examples.from_rows(
        [{"text": w, "label": i % 2} for i, w in enumerate(WORDS)],
        format=RowFormat("Text: {text}", " {label}", {"0": "bad", "1": "good"}),
    )
    task = make(word_tokenizer, rows, "Text: {text}", labels=[" bad", " good", " fine"])
    assert task.names == (0, "fine", 1)


def test_label_of_another_answer(word_tokenizer: Any) -> None:
    task = make(word_tokenizer, examples(*[" yes", " no"] * 3))
    with pytest.raises(
        DataError, match=r"rows:1: the completion ' red' is not one of the labels ' no', ' yes'\."
    ):
        task.label_of(examples(" red")[0])


def test_one_label_is_no_task(word_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="all rows have the completion ' yes'"):
        make(word_tokenizer, examples(*[" yes"] * 4))
    with pytest.raises(DataError, match="at least two labels"):
        make(word_tokenizer, examples(*[" yes"] * 4), labels=[" yes"])


def test_labels_that_are_the_same_tokens(word_tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"\[' maybe', ' perhaps'\] are the same tokens"):
        make(word_tokenizer, examples(*[" maybe", " perhaps", " yes"] * 2))


def test_several_tokens_where_one_was_declared(word_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="max_answer_tokens is 1, but the label ' good film' has 2 tokens"):
        make(word_tokenizer, examples(*[" good film", " bad"] * 3), max_answer_tokens=1)


def test_contradictions(word_tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="labels are given, but task is generation"):
        make(word_tokenizer, examples(" yes", " no"), task="generation", labels=[" yes", " no"])
    with pytest.raises(ConfigError, match="Unknown answer parser 'hsah'"):
        make(word_tokenizer, examples(*[" yes", " no"] * 3), parser="hsah")


# -------------------------------------------------------------------------------------- free text


def test_answers_longer_than_allowed_are_all_named(word_tokenizer: Any) -> None:
    rows = examples(" a b c", " a", " a b c d", *[" b a"] * 0)
    with pytest.raises(DataError, match=r"rows:1: the completion has 3 tokens.*rows:3: the completion has 4"):
        make(word_tokenizer, rows, task="generation", max_answer_tokens=2)


def test_a_free_answer_of_one_token_has_no_end(word_tokenizer: Any) -> None:
    task = make(word_tokenizer, examples(" a", " b"), task="generation", max_answer_tokens=1)
    assert task.single_token
    assert task.append_end is None


@pytest.mark.parametrize(
    ("prompts", "template", "expected"),
    [
        (["Text: good\nLabel:", "Text: bad\nLabel:"], None, "\n\nText:"),
        (["Text: good\nLabel:", "Text: bad\nLabel:"], "Text: {text}\nLabel:", "\n\nText:"),
        (["good\nLabel:", "bad\nLabel:"], "{text}\nLabel:", "\n\n"),
        (["good\nLabel:", "bad\nLabel:"], None, "\n\n"),
        (["Question:\ngood", "Question:\nbad"], None, "\n\nQuestion:"),
        (["same", "same"], None, "\n\n"),
        ([f"{'x' * 60} a", f"{'x' * 60} b"], None, "\n\n" + "x" * 40),
    ],
)
def test_stop_text(prompts: list[str], template: str | None, expected: str) -> None:
    rows = examples(*[" a"] * len(prompts), prompts=prompts)
    assert stop_text(rows, "\n\n", template) == expected


def test_stop_text_follows_the_separator() -> None:
    rows = examples(" a", " b", prompts=["Q: x", "Q: y"])
    assert stop_text(rows, "\n---\n", None) == "\n---\nQ:"
