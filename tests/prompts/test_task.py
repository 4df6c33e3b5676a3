"""What kind of task rows are, and what is refused; labels and answers out of reach are in tests/faults."""

from __future__ import annotations

from typing import Any

import pytest

from ia2.config import AdaptConfig
from ia2.data.examples import Examples, RowFormat
from ia2.prompts.task import Task, make_task, stop_text
from ia2.utils.errors import ConfigError, DataError

WORDS = ["good", "bad", "great", "awful", "fine", "film", "food", "song"]
NUMBERED = RowFormat("Text: {text}", " {label}", {"0": "bad", "1": "good"})


def examples(*answers: str, prompts: list[str] | None = None) -> Examples:
    prompts = prompts or [f"{WORDS[i % len(WORDS)]} night" for i in range(len(answers))]
    rows = [{"prompt": p, "completion": a} for p, a in zip(prompts, answers, strict=True)]
    return Examples.from_rows(rows, name="rows")


def make(tokenizer: Any, rows: Examples, template: str | None = None, **settings: Any) -> Task:
    return make_task(rows, AdaptConfig(**settings), tokenizer, template)


@pytest.mark.parametrize(
    ("answers", "settings", "kind"),
    [
        ([" yes", " no"] * 3, {}, "classification"),
        ([f" {w} {v}" for w in WORDS[:3] for v in WORDS[3:6]], {}, "generation"),
        # half as many distinct answers as rows are labels
        ([f" {w} film" for w in WORDS[:5]] * 2, {}, "classification"),
        (([f" {w} film" for w in WORDS[:5]] * 2)[:9], {}, "generation"),
        # of few rows, answers of one word are
        ([" red", " green", " blue"], {}, "classification"),
        ([" red fish", " green fish", " blue fish"], {}, "generation"),
        # the setting wins over the look of it
        ([" yes", " no"] * 3, {"task": "generation"}, "generation"),
        ([" red fish", " green fish", " blue fish"], {"task": "classification"}, "classification"),
        ([" red fish", " fish"], {"labels": [" red fish", " fish"]}, "classification"),
    ],
)
def test_kind(answers: list[str], settings: dict[str, Any], kind: str, word_tokenizer: Any) -> None:
    assert make(word_tokenizer, examples(*answers), **settings).kind == kind


@pytest.mark.parametrize(
    ("answers", "settings", "limit", "ends"),
    [
        ([" yes", " no"] * 3, {}, 1, False),
        ([" good film", " bad"] * 3, {}, 10, True),
        ([" a b", " b"], {"task": "generation"}, 200, True),
        ([" a", " b"], {"task": "generation", "max_answer_tokens": 1}, 1, False),
    ],
)
def test_answers(
    answers: list[str], settings: dict[str, Any], limit: int, ends: bool, word_tokenizer: Any
) -> None:
    rows = examples(*answers)
    task = make(word_tokenizer, rows, **settings)
    assert task.max_answer_tokens == limit and task.single_token == (limit == 1)
    ids = tuple(word_tokenizer(answers[-1])["input_ids"])
    assert task.target_ids(word_tokenizer, rows[-1]) == (*ids, *([word_tokenizer.eos_token_id] * ends))
    assert task.labels == (() if task.kind == "generation" else tuple(sorted(set(answers))))


def test_a_label_that_begins_another_has_terminators(word_tokenizer: Any) -> None:
    rows = examples(*[" good", " good film"] * 3, prompts=[f"Text: {w}" for w in WORDS[:6]])
    task = make(word_tokenizer, rows)
    assert task.stop_texts == ("\n\nText:",)
    assert {word_tokenizer.decode([i]) for i in task.terminators} == {"\n\n", "</s>"}


def test_names_are_the_raw_labels(word_tokenizer: Any) -> None:
    """Or, of a label that no row has, its text."""
    rows = Examples.from_rows([{"text": w, "label": i % 2} for i, w in enumerate(WORDS)], format=NUMBERED)
    task = make(word_tokenizer, rows, "Text: {text}", labels=[" bad", " good", " fine"])
    assert (task.labels, task.names) == ((" bad", " fine", " good"), (0, "fine", 1))
    assert task.label_of(rows[1]) == 2


@pytest.mark.parametrize(
    ("answers", "settings", "message"),
    [
        ([" yes"] * 4, {}, "rows: all rows have the completion ' yes'"),
        ([" yes", " red", " no"], {"labels": [" yes", " no"]}, "rows:2: the completion ' red' is not one of"),
        ([" maybe", " perhaps", " yes"] * 2, {}, r"\[' maybe', ' perhaps'\] are the same tokens"),
        ([" good film", " bad"] * 3, {"max_answer_tokens": 1}, "label ' good film' has 2 tokens"),
        ([" yes", " no"], {"task": "generation", "labels": [" yes", " no"]}, "labels are given"),
        ([" yes", " no"] * 3, {"parser": "hsah"}, "Unknown answer parser 'hsah'"),
        (
            [" a b c", " a", " a b c d"],
            {"task": "generation", "max_answer_tokens": 2},
            r"rows:1: the completion has 3 tokens.*rows:3: the completion has 4",
        ),
    ],
)
def test_refused(answers: list[str], settings: dict[str, Any], message: str, word_tokenizer: Any) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        make(word_tokenizer, examples(*answers), **settings)


@pytest.mark.parametrize(
    ("prompts", "template", "expected"),
    [
        (["Text: good\nLabel:", "Text: bad\nLabel:"], None, "\n\nText:"),
        (["good\nLabel:", "bad\nLabel:"], "Text: {text}\nLabel:", "\n\nText:"),
        (["good\nLabel:", "bad\nLabel:"], None, "\n\n"),
        (["Question:\ngood", "Question:\nbad"], None, "\n\nQuestion:"),
        (["same", "same"], None, "\n\n"),
        ([f"{'x' * 60} a", f"{'x' * 60} b"], None, "\n\n" + "x" * 40),
    ],
)
def test_stop_text(prompts: list[str], template: str | None, expected: str) -> None:
    rows = examples(*[" a"] * len(prompts), prompts=prompts)
    assert stop_text(rows, "\n\n", template) == expected
