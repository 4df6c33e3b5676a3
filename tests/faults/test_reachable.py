"""Answers that a model cannot give, or that no answer matches: refused in training rows, said of others."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import TASK, Ia2, names, write_rows

from ia2.config import AdaptConfig
from ia2.data.answers import exact_match, load_parser
from ia2.data.examples import Example, Examples
from ia2.models.generation import cut_answer
from ia2.prompts.task import Task, make_task
from ia2.utils.errors import DataError

WORDS = ["good", "bad", "great", "awful", "fine", "film", "food", "song"]


def rows_of(*answers: str, name: str = "rows") -> Examples:
    prompts = [f"Text: {WORDS[i % len(WORDS)]}\nLabel:" for i in range(len(answers))]
    pairs = enumerate(zip(prompts, answers, strict=True), 1)
    return Examples([Example(q, a, f"{name}:{i}") for i, (q, a) in pairs], name=name)


def make(tokenizer: Any, rows: Examples, task: str = "generation", **settings: Any) -> Task:
    return make_task(rows, AdaptConfig(task=task, **settings), tokenizer)


def refusal(tokenizer: Any, rows: Examples, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        make(tokenizer, rows, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("answer", "settings", "reason"),
    [
        (" a day\n\nText: b", {}, r"holds '\n\nText:', the text that ends an answer"),
        (" a\nText:b", {"separator": "\n"}, r"holds '\nText:'"),
        (" a</s> day", {}, "holds '</s>', a special token"),
        (" a <pad> b", {}, "holds '<pad>', a special token"),
        (" \n ", {}, "is empty"),
        (" a b c d", {"max_answer_tokens": 3}, "has 4 tokens, max_answer_tokens is 3"),
        (" zebra", {}, "is '' once it has been through the model's tokenizer"),
        (" a day", {"parser": "last-number"}, "holds nothing that the parser 'last-number' reads"),
        (" a day", {"parser": "boxed"}, "holds nothing that the parser 'boxed' reads"),
        (" one\n\n two", {}, None),
        (" a Text: b", {}, None),
        (" a", {"separator": " a\n"}, None),
    ],
)
def test_a_training_answer_out_of_reach_is_refused(
    word_tokenizer: Any, answer: str, settings: dict[str, Any], reason: str | None
) -> None:
    fine = {"last-number": " 1", "boxed": " the answer is b"}.get(settings.get("parser", ""), " b")
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.add_tokens([" answer", " is"])
    rows = rows_of(fine, answer, fine, answer)
    if reason is None:
        assert make(tokenizer, rows, **settings).kind == "generation"
        return
    line = refusal(tokenizer, rows, **settings)
    names(line, f"rows:2: the completion {reason}", f"rows:4: the completion {reason}")
    assert "rows:1" not in line
    many = refusal(tokenizer, rows_of(*[answer] * 20), **settings)
    names(many, "and 15 more rows: such an answer can never be given")


def test_what_is_refused_is_what_evaluation_would_count_as_wrong(word_tokenizer: Any) -> None:
    """The check against what generation and comparison do with the answer's own ids."""
    answers = [" a", " a\n\nText: b", " a</s> b", " a\n\nb", " zebra", " a Text:", " a\n\nText", " one two ."]
    parse = load_parser("text")
    for answer in answers:
        ids = [*word_tokenizer(answer, add_special_tokens=False)["input_ids"], 2]
        text = cut_answer(word_tokenizer, ids, [2], ["\n\nText:"], 200).text
        right = exact_match(parse(text), parse(answer))
        try:
            make(word_tokenizer, rows_of(answer, " b"))
        except DataError:
            assert not right, answer
        else:
            assert right, answer


def test_without_a_separator_nothing_cuts_an_answer(word_tokenizer: Any) -> None:
    """The empty text is found in every answer, and each was cut to nothing."""
    rows = Examples([Example(f"{w}\nLabel:", f" {w} day", w) for w in WORDS], name="rows")
    assert make(word_tokenizer, rows, separator="").stop_texts == ()
    nested = Examples([Example(r.query, (" a", " a b")[i % 2], r.source) for i, r in enumerate(rows)])
    task = make(word_tokenizer, nested, separator="", task="classification")
    assert task.terminators == (word_tokenizer.eos_token_id,)


def test_a_chat_answer_may_hold_the_separator(tiny_icl_model_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_icl_model_path)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n\n{% endfor %}"
    rows = Examples([Example("z1 a0", " L1\n\nz1 L2", "r:1"), Example("z1 b0", " L2", "r:2")], name="r")
    assert make(tokenizer, rows, chat="turns").stop_texts == ()
    names(refusal(tokenizer, rows), "r:1: the completion holds")


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ([" a\n\nText: b", " b"], r"the label ' a\n\nText: b' holds '\n\nText:'"),
        ([" a</s>", " b</s>"], "the label ' a</s>' holds '</s>', a special token"),
        ([" zebra", " b"], "the label ' zebra' is '' once"),
        ([" a", " a\n\nb", " c"], r"the label ' a\n\nb' goes on after ' a' with what ends an answer"),
    ],
)
def test_labels_out_of_reach_are_refused(word_tokenizer: Any, labels: list[str], reason: str) -> None:
    names(refusal(word_tokenizer, rows_of(*labels * 3), task="classification"), reason, "--label-map")
    # nested labels, and a blank line in one, are fine where they can be told
    fine = rows_of(*[" a", " a b", " c\n\nd"] * 3)
    assert make(word_tokenizer, fine, task="classification").terminators


def test_test_rows_out_of_reach_are_said(word_tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    def unreachable(rows: Examples, train: Examples, **settings: Any) -> list[bool]:
        caplog.clear()
        make(word_tokenizer, train, max_answer_tokens=3, **settings).check(
            word_tokenizer, rows, trained=False
        )
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        names(record.getMessage(), "count as wrong whatever the model answers")
        return [f"test:{n}:" in record.getMessage() for n in range(1, len(rows) + 1)]

    test = rows_of(" a", " a\n\nText: b", " a b c d", " b", " zebra", name="test")
    assert unreachable(test, rows_of(" a", " b")) == [False, True, True, False, True]
    # of a parser only what it reads need be in reach: a longer way to the same answer, and one that is cut
    test = rows_of(" a b c d 1", " 1\n\nText: b", " a\n\nText: 1", " a", name="test")
    found = unreachable(test, rows_of(" a 1", " b 0"), parser="last-number")
    assert found == [False, False, True, True]


def test_commands_refuse_or_say_it(train: Ia2, ia2: Ia2, here: Path) -> None:
    rows = [(f"z0 {q}", a) for q, a in TASK.examples(12, 0)]
    write_rows(here / "rows.jsonl", rows)
    write_rows(here / "spoilt.jsonl", [*rows[:2], (rows[2][0], " L1\n\nz0 L2"), *rows[3:]])
    write_rows(here / "long.jsonl", [*rows[:2], (rows[2][0], " L1" * 7), *rows[3:]])
    free = ["--task", "generation", "--max-answer-tokens", 6, "--recipe", "sft"]
    reason = "spoilt.jsonl:3: the completion holds '\\n\\nz0', the text that ends an answer"
    names(train(*free, "--data", "spoilt.jsonl").refusal(), reason)
    options = ["--model", "model", *free[:-2], "--data", "spoilt.jsonl"]
    names(ia2("compare", *options, "--output-dir", "out").refusal(), reason)
    names(ia2("probe", *options).refusal(), reason)
    assert not (here / "out").exists()
    evaluate = ["eval", "--adapter", "out", "--data", "long.jsonl"]
    for ran in (train(*free, "--test-data", "long.jsonl"), ia2(*evaluate)):
        assert ran.status == 0 and ran.err.count("long.jsonl:3: ") == 1
        names(ran.err, "1 of 12 rows to evaluate on count as wrong")
    assert ia2(*evaluate, "--data", "rows.jsonl").err == ""


def test_prompts_leave_room_for_a_long_stop_text(train: Ia2, ia2: Ia2, here: Path) -> None:
    """A model with learnt positions has no more of them than its window: 16 beyond the answer was too few."""
    separator = "\n\n" + "z1 z2 " * 20
    free = ["--task", "generation", "--max-answer-tokens", 2, "--recipe", "sft"]
    write_rows(here / "rows.jsonl", [(f"z0 {q}", a) for q, a in TASK.examples(12, 0)])
    assert train(*free, "--separator", separator).status == 0
    recorded = json.loads((here / "out" / "ia2_run.json").read_text())["task"]
    assert recorded["stop_tokens"] > 16
    write_rows(here / "new.jsonl", [{"prompt": " ".join(["z0"] * (512 - recorded["stop_tokens"]))}])
    line = ia2("predict", "--adapter", "out", "--data", "new.jsonl").refusal()
    names(line, "new.jsonl:1: the prompt has", "are kept")
