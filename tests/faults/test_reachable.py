"""Answers that a model cannot give, or that no answer matches: refused in training rows, said of others."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.benches import base_of
from helpers.command_line import Ran, run, write_rows
from helpers.families import gpt2
from tiny_icl.tasks import sample_task

from ia2.config import AdaptConfig, TrainConfig
from ia2.data.answers import exact_match, load_parser
from ia2.data.examples import Example, Examples
from ia2.evaluation.scoring import answer_freely
from ia2.experiment.adapt import adapt
from ia2.models.generation import cut_answer
from ia2.prompts.builder import query_prompts
from ia2.prompts.format import PromptFormat
from ia2.prompts.task import Task, make_task
from ia2.utils.errors import DataError

WORDS = ["good", "bad", "great", "awful", "fine", "film", "food", "song"]
TASK = sample_task(0, num_classes=3)


def rows_of(*answers: str, name: str = "rows") -> Examples:
    return Examples(
        [
            Example(f"Text: {WORDS[i % len(WORDS)]}\nLabel:", answer, f"{name}:{i + 1}")
            for i, answer in enumerate(answers)
        ],
        name=name,
    )


def make(tokenizer: Any, rows: Examples, **settings: Any) -> Task:
    return make_task(rows, AdaptConfig(task=settings.pop("task", "generation"), **settings), tokenizer)


# --------------------------------------------------------------------------------------- training rows


@pytest.mark.parametrize(
    ("answer", "settings", "reason"),
    [
        (" a day\n\nText: b", {}, r"holds '\n\nText:', the text that ends an answer"),
        ("\n\nText:", {}, "holds"),
        (" a", {"separator": " a\n"}, None),
        (" a\nText:b", {"separator": "\n"}, r"holds '\nText:'"),
        (" a day</s>", {}, "holds '</s>', a special token"),
        (" a</s> day", {}, "holds '</s>', a special token"),
        (" a <pad> b", {}, "holds '<pad>', a special token"),
        (" \n ", {}, "is empty"),
        ("", {}, "is empty"),
        (" a b c d", {"max_answer_tokens": 3}, "has 4 tokens, max_answer_tokens is 3"),
        (" zebra", {}, "is '' once it has been through the model's tokenizer"),
        (" a day", {"parser": "last-number"}, "holds nothing that the parser 'last-number' reads"),
        (" a day", {"parser": "boxed"}, "holds nothing that the parser 'boxed' reads"),
        (" one\n\n two", {}, None),
        (" a Text: b", {}, None),
    ],
)
def test_a_training_answer_out_of_reach_is_refused(
    word_tokenizer: Any, answer: str, settings: dict[str, Any], reason: str | None
) -> None:
    fine = " 1" if settings.get("parser") == "last-number" else " b"
    if settings.get("parser") == "boxed":
        fine = " the answer is b"
        word_tokenizer = _with(word_tokenizer, " answer", " is")
    rows = rows_of(fine, answer, fine, answer)
    if reason is None:
        assert make(word_tokenizer, rows, **settings).kind == "generation"
        return
    with pytest.raises(DataError) as caught:
        make(word_tokenizer, rows, **settings)
    line = str(caught.value)
    assert f"rows:2: the completion {reason}" in line
    assert f"rows:4: the completion {reason}" in line
    assert "rows:1" not in line
    assert "\n" not in line


def _with(tokenizer: Any, *words: str) -> Any:
    """A copy that knows more words."""
    import copy

    more = copy.deepcopy(tokenizer)
    more.add_tokens(list(words))
    return more


def test_without_a_separator_nothing_cuts_an_answer(word_tokenizer: Any) -> None:
    """The empty text is found in every answer, and each was cut to nothing."""
    rows = Examples([Example(f"{w}\nLabel:", f" {w} day", w) for w in WORDS], name="rows")
    assert make(word_tokenizer, rows, separator="").stop_texts == ()
    nested = Examples([Example(r.query, (" a", " a b")[i % 2], r.source) for i, r in enumerate(rows)])
    task = make(word_tokenizer, nested, separator="", task="classification")
    assert task.terminators == (word_tokenizer.eos_token_id,)


def test_many_rows_are_counted(word_tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"rows:5: .*; and 15 more rows: such an answer can never be given"):
        make(word_tokenizer, rows_of(*[" a\n\nText: b"] * 20))


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
            refused = False
        except DataError:
            refused = True
        assert refused is not right, answer


def test_a_chat_answer_loses_its_blanks_and_may_hold_the_separator(tiny_icl_model_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_icl_model_path)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n\n{% endfor %}"
    rows = Examples([Example("z1 a0", " L1\n\nz1 L2", "r:1"), Example("z1 b0", " L2", "r:2")], name="r")
    assert make(tokenizer, rows, chat="turns").stop_texts == ()
    with pytest.raises(DataError, match="r:1: the completion holds"):
        make(tokenizer, rows)


# ---------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ([" a\n\nText: b", " b"], r"the label ' a\\n\\nText: b' holds '\\n\\nText:'"),
        ([" a</s>", " b</s>"], "the label ' a</s>' holds '</s>', a special token"),
        ([" zebra", " b"], "the label ' zebra' is '' once"),
        ([" a", " a\n\nb", " c"], r"the label ' a\\n\\nb' goes on after ' a' with what ends an answer"),
    ],
)
def test_labels_out_of_reach_are_refused(word_tokenizer: Any, labels: list[str], reason: str) -> None:
    with pytest.raises(DataError) as caught:
        make(word_tokenizer, rows_of(*labels * 3), task="classification")
    assert reason.replace("\\\\", "\\") in str(caught.value)
    assert "--label-map" in str(caught.value)


def test_nested_labels_and_labels_with_a_blank_line_are_fine_where_they_can_be_told(
    word_tokenizer: Any,
) -> None:
    assert make(word_tokenizer, rows_of(*[" a", " a b", " c\n\nd"] * 3), task="classification").terminators


# ------------------------------------------------------------------------------------------- test rows


def test_test_rows_out_of_reach_are_said(word_tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    task = make(word_tokenizer, rows_of(" a", " b"), max_answer_tokens=3)
    test = rows_of(" a", " a\n\nText: b", " a b c d", " b", " zebra", name="test")
    task.check(word_tokenizer, test, trained=False)
    (record,) = caplog.records
    line = record.getMessage()
    assert record.levelno == logging.WARNING
    assert "3 of 5 rows to evaluate on count as wrong whatever the model answers" in line
    assert [f"test:{n}:" in line for n in range(1, 6)] == [False, True, True, False, True]
    assert "test:3: the completion has 4 tokens, max_answer_tokens is 3" in line


def test_of_a_test_row_only_what_the_parser_reads_need_be_in_reach(
    word_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    task = make(word_tokenizer, rows_of(" a 1", " b 0"), max_answer_tokens=3, parser="last-number")
    # a longer way to the same answer; and one behind a stop text, which is never read
    test = rows_of(" a b c d 1", " 1\n\nText: b", " a\n\nText: 1", " a", name="test")
    task.check(word_tokenizer, test, trained=False)
    line = caplog.messages[0]
    assert [f"test:{n}:" in line for n in range(1, 5)] == [False, False, True, True]


# ------------------------------------------------------------------------------------- the commands

Command = Callable[..., Ran]


@pytest.fixture
def ia2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_icl_model_path: Path, capsys: Any) -> Command:
    """``ia2`` on the small model in a folder with rows.jsonl, and two files whose third row is spoilt."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(tiny_icl_model_path)
    rows = [(f"z0 {q}", a) for q, a in TASK.examples(12, 0)]
    write_rows(tmp_path / "rows.jsonl", rows)
    rows[2] = (rows[2][0], " L1\n\nz0 L2")
    write_rows(tmp_path / "spoilt.jsonl", rows)
    rows[2] = (rows[2][0], " L1" * 7)
    write_rows(tmp_path / "long.jsonl", rows)

    def command(name: str, *options: Any) -> Ran:
        return run(capsys, name, *options, "--quiet")

    return command


FREE = ["--model", "model", "--task", "generation", "--max-answer-tokens", 6]
FAST = ["--align-epochs", 1, "--sft-epochs", 1]


def test_every_command_that_trains_refuses_the_row(ia2: Command, tmp_path: Path) -> None:
    out = ["--output-dir", "out"]
    for command in (["train", *out], ["compare", *out], ["probe"]):
        line = ia2(*command, *FREE, "--data", "spoilt.jsonl").refusal()
        assert "spoilt.jsonl:3: the completion holds '\\n\\nz0', the text that ends an answer" in line
    curve = ["curve", *out, *FREE, "--sizes", 2, 4, "--test-data", "rows.jsonl", "--data", "spoilt.jsonl"]
    assert "spoilt.jsonl:3: " in ia2(*curve).refusal()
    assert not (tmp_path / "out").exists()


def test_train_and_eval_say_it_of_test_rows(ia2: Command) -> None:
    train = ["train", *FREE, *FAST, "--recipe", "sft", "--data", "rows.jsonl", "--output-dir", "out"]
    for ran in (
        ia2(*train, "--test-data", "long.jsonl"),
        ia2("eval", "--adapter", "out", "--data", "long.jsonl"),
    ):
        assert ran.status == 0, ran
        assert "1 of 12 rows to evaluate on count as wrong" in ran.err
        assert ran.err.count("long.jsonl:3: ") == 1
    assert ia2("eval", "--adapter", "out", "--data", "rows.jsonl").err == ""


# ------------------------------------------------------------------------------------------- reserve


@pytest.mark.parametrize("longest", [1, 4])
def test_prompts_leave_room_for_a_long_stop_text(word_tokenizer: Any, longest: int) -> None:
    """A model with learnt positions has no more of them than its window: 16 beyond the answer was too few."""
    separator = "\n\n" + " a b" * 15
    rows = rows_of(*[" a", " b", " c", " d", " e", " f"])
    task = make(word_tokenizer, rows, separator=separator, max_answer_tokens=longest)
    model = gpt2(n_positions=64)
    stop = len(word_tokenizer(task.stop_texts[0])["input_ids"])
    assert stop > 30
    assert task.reserve >= longest + stop
    rendering = PromptFormat(word_tokenizer, separator)
    fitting = Example(" ".join(["a"] * (64 - task.reserve)), " a", "row")
    prompts = query_prompts(rendering, [fitting], 64, task.reserve)
    assert len(prompts[0]) == 64 - task.reserve
    # nothing that the model says ends the answer: it runs to the last position
    task = dataclasses.replace(task, append_end=None)
    assert answer_freely(model, word_tokenizer, task, prompts).texts[0] is not None
    with pytest.raises(DataError, match="row: the prompt has"):
        longer = dataclasses.replace(fitting, query=f"{fitting.query} a")
        list(query_prompts(rendering, [longer], 64, task.reserve))


def test_usual_prompts_leave_what_they_left(word_tokenizer: Any) -> None:
    rows = rows_of(*[" a", " b", " c"])
    assert make(word_tokenizer, rows, max_answer_tokens=4).reserve == 20
    assert make(word_tokenizer, rows_of(*[" a", " b"] * 3), task="classification").reserve == 1


def test_the_reserve_is_recorded_with_the_adapter(
    word_tokenizer: Any, tmp_path: Path, tiny_llama: Any
) -> None:
    from ia2.experiment.run_folder import load_run

    config = TrainConfig(
        task="generation", max_answer_tokens=2, recipe="sft", separator="\n\n" + " a" * 30, sft={"epochs": 1}
    )
    result = adapt(base_of(tiny_llama, word_tokenizer), rows_of(*[" a", " b", " c"] * 2), config)
    result.save(tmp_path / "out")
    assert load_run(tmp_path / "out")[1].reserve == result.task.reserve > 30
