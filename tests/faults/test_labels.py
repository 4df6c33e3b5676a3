"""Labels, names and prompts that nearly match: refused, or said once by the command and by the doctor."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import TASK, Ia2, Ran, names, write_rows

from ia2.cli.options import gather_lists, settings_of
from ia2.config import AdaptConfig, TrainConfig
from ia2.data.examples import Examples, RowFormat
from ia2.models.tokens import encode_answer
from ia2.prompts.task import Task, make_task
from ia2.utils.errors import DataError

WORDS = ["good", "bad", "great", "awful", "fine", "film", "food", "song"]
YES_NO = [" yes", " no"]


@pytest.fixture(scope="module")
def byte_tokenizer() -> Any:
    """A token a byte, as GPT-2 writes them: nothing is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({token: place for place, token in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


@pytest.fixture(scope="module")
def prefixing_tokenizer() -> Any:
    """Words as Llama 2 writes them: a blank is put before every text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["</s>", "<unk>", "▁", "▁Text:", "▁Label:", *(f"▁{w}" for w in [*WORDS, "positive", "negative"])]
    inner = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, "<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    inner.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")


def rows_of(*answers: str, prompt: str = "Text: {}\nLabel:") -> Examples:
    pairs = [(prompt.format(WORDS[i % len(WORDS)]), answer) for i, answer in enumerate(answers)]
    return Examples.from_rows([{"prompt": q, "completion": a} for q, a in pairs], name="rows")


def make(tokenizer: Any, rows: Examples, template: str | None = None, **settings: Any) -> Task:
    return make_task(rows, AdaptConfig(**settings), tokenizer, template)


def advice(task: Task) -> str:
    return " | ".join(" ".join(parts) for parts in task.advice)


def refusal(tokenizer: Any, rows: Examples, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        make(tokenizer, rows, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def flag(name: str, text: str) -> Any:
    """A setting as the command line reads it."""
    return settings_of(TrainConfig)[name].read(text)


# ----------------------------------------------------------------------------------- one name each


@pytest.mark.parametrize(
    ("one", "other"),
    [(" positive", "positive"), (" positive", " positive "), (" positive", "\u00a0positive"), ("a", "a\n")],
)
def test_labels_that_differ_by_blanks_at_their_ends(byte_tokenizer: Any, one: str, other: str) -> None:
    """They had one name, and the probabilities under it did not sum to 1."""
    rows = rows_of(*[one, " negative"] * 2, other)
    line = refusal(byte_tokenizer, rows, task="classification")
    names(line, "differ by blanks only", repr(one), f"{other!r} (rows:5)")
    # what it suggests is accepted, and mends it
    written = shlex.split(line.split("--label-map ")[1].rstrip("."))[0]
    mapped = RowFormat(label_map=flag("label_map", written))
    mended = Examples.from_rows([example.fields for example in rows], format=mapped, name="rows")
    assert make(byte_tokenizer, mended, task="classification").labels == tuple(sorted([one, " negative"]))


def test_names_are_told_apart(byte_tokenizer: Any, word_tokenizer: Any) -> None:
    rows = rows_of(*[" positive", " negative"] * 2)
    line = refusal(word_tokenizer, rows, labels=[" positive", "positive", " negative"])
    names(line, "leave one of them out of labels")
    digits = RowFormat("Text: {text}", " {label}", {"0": "bad", "1": "good"})
    rows = Examples.from_rows([{"text": w, "label": i % 2} for i, w in enumerate(WORDS)], format=digits)
    names(refusal(byte_tokenizer, rows, labels=[" bad", " good", " 1"]), "would both be called '1'")
    labels = [" yes", " Yes", " not very", " notvery", " caf\u00e9", " cafe\u0301"]
    assert len(set(make(byte_tokenizer, rows_of(*labels * 2)).names)) == len(labels)


def test_a_completion_that_is_nearly_a_label(word_tokenizer: Any) -> None:
    rows = rows_of(" positive", " negative", "positive", " Positive", " red")
    line = refusal(word_tokenizer, rows, labels=[" positive", " negative"])
    names(line, "rows:3: the completion 'positive' differs from the label ' positive' only by case")
    names(line, "rows:4: the completion ' Positive'", "rows:5: the completion ' red' is not one of the")


def test_of_labels_that_begin_alike_the_teacher_says_the_longest(word_tokenizer: Any) -> None:
    task = make(word_tokenizer, rows_of(*[" good", " good film", " bad"] * 3))
    for label in task.labels:
        assert task.label_said((*encode_answer(word_tokenizer, label), 2)) == task.index[label]
    assert task.label_said(encode_answer(word_tokenizer, " film good")) is None


# ------------------------------------------------------------------------------ what is remarked on


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (" yes", " Yes"),
        (" not very", " not  very"),
        (" caf\u00e9", " cafe\u0301"),
        (" not very", " not\u00a0very"),
        (" yes", " y\u200bes"),
        (" paper", " \u0440aper"),  # a Cyrillic letter
        (" OK", " \uff2f\uff2b"),  # full width
        (" e-mail", " e\u2011mail"),
        (" ma\u00dfe", " MASSE"),
        (" 1", " 1.0"),  # of one column: 1 and 1.0
        (" 1e3", " 1000"),
    ],
)
def test_labels_that_nearly_match_are_said(byte_tokenizer: Any, one: str, other: str) -> None:
    told = advice(make(byte_tokenizer, rows_of(*[one, other, " third"] * 3)))
    names(told, "differ only by case, blanks, invisible or look-alike characters, or as numbers")
    names(told, repr(one), repr(other))
    assert "third" not in told
    assert other.isascii() or ascii(other) in told  # what cannot be seen is spelt


@pytest.mark.parametrize(
    ("prompt", "answers", "better"),
    [
        ("Text: {}\nLabel: ", [" positive", " negative"], "Label:' + ' negative'"),
        ("Text: {}\nLabel:", ["positive", "negative"], "Label:' + ' negative'"),
        ("Text: {}\nLabel:", ["  positive", "  negative"], "Label:' + ' negative'"),
        ("Text: {}\nLabel:\u00a0", ["positive", "negative"], "Label:' + ' negative'"),
        ("Text: {}\nLabel:\n", [" positive", " negative"], "Label:\\n' + 'negative'"),
        ("Text: {} is ", ["0", "1"], " is' + ' 0'"),
    ],
)
def test_an_unlikely_joint_is_said(byte_tokenizer: Any, prompt: str, answers: list[str], better: str) -> None:
    told = advice(make(byte_tokenizer, rows_of(*sorted(answers) * 3, prompt=prompt)))
    names(told, "Prompt and answer meet as texts hardly ever do", "(rows:1 and 5 more rows)", better)
    # so written, nothing is remarked on
    stem = prompt.rstrip(" \u00a0")
    body = [answer.strip() if stem.endswith("\n") else f" {answer.strip()}" for answer in answers]
    assert make(byte_tokenizer, rows_of(*sorted(body) * 3, prompt=stem)).advice == ()


@pytest.mark.parametrize(
    ("prompt", "answers", "settings", "named"),
    [
        (r"Text: {}\nLabel:", YES_NO, {}, "hold a backslash with an n or a t, not a line break"),
        ("Text: {}\nLabel:", [r" yes\n", r" no\t"], {}, "hold a backslash with an n or a t"),
        ("Text: {}\nLabel:", YES_NO, {"separator": r"\n\n"}, "hold a backslash"),
        ("Text: {}\nLabel:", YES_NO, {"template": r"Text: {text}\nLabel:"}, "double quotes"),
        ("Text: {}\nLabel:", [" good", "a song", " bad"], {"task": "generation"}, "(rows:2 and 2 more rows)"),
    ],
)
def test_other_remarks(
    byte_tokenizer: Any, prompt: str, answers: list[str], settings: dict[str, Any], named: str
) -> None:
    """YAML keeps a backslash between single quotes, and so does a cell of a CSV file."""
    names(advice(make(byte_tokenizer, rows_of(*answers * 3, prompt=prompt), **settings)), named)


@pytest.mark.parametrize(
    ("prompt", "answers", "settings"),
    [
        *(
            ("Text: {}\nLabel:", answers, {})
            for answers in (
                [" positive", " negative"], ["0", "1"], ["-1", "1"], [" C", " C++", " C#"],
                [" 1", " 10"], [" cafe", " caf\u00e9"], [" \u0434\u0430", " \u043d\u0435\u0442"],
            )
        ),
        ("Text: {}\nLabel:\n", ["positive", "negative"], {}),
        ("Text: {}\nLabel: (", ["a)", "b)"], {}),
        ('Text: {}\nLabel: "', ["positive", "negative"], {}),
        ("\u6587\u672c: {}\n\u6807\u7b7e\uff1a", ["\u6b63\u9762", "\u8d1f\u9762"], {}),
        ("{}\tlabel\t", ["yes", "no"], {}),
        # the backslashes of some rows are their own
        ("Text: {}\nLabel:", [r" \text{a}", r" \boxed{4}", r" 3 \times 4", r" \nu"], {"task": "generation"}),
    ],
)  # fmt: skip
def test_usual_rows_are_not_remarked_on(
    byte_tokenizer: Any, prompt: str, answers: list[str], settings: dict[str, Any], caplog: Any
) -> None:
    assert make(byte_tokenizer, rows_of(*answers * 3, prompt=prompt), **settings).advice == ()
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_tokenizer_that_puts_the_blank_itself(prefixing_tokenizer: Any) -> None:
    """There `` positive`` behind ``Label:`` is two tokens, of which a text has one."""
    prompt = "Text: {} Label:"
    without = make(prefixing_tokenizer, rows_of(*["positive", "negative"] * 3, prompt=prompt))
    assert without.advice == () and without.single_token
    blank = make(prefixing_tokenizer, rows_of(*[" negative", " positive"] * 3, prompt=prompt))
    names(advice(blank), "Label:' + 'negative'")


def test_a_chat_template_joins_by_itself(tiny_icl_model_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_icl_model_path)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    pairs = [{"prompt": f"{q} ", "completion": a.strip()} for q, a in TASK.examples(6, 0)]
    rows = Examples.from_rows(pairs, name="rows")
    assert make(tokenizer, rows, chat="turns").advice == ()
    assert make(tokenizer, rows).advice


# --------------------------------------------------------------------------------------- the commands


def test_blanks_in_flags_are_kept_where_they_count() -> None:
    assert flag("label_map", "0 = negative, 1=positive") == {"0": " negative", "1": "positive"}
    several = gather_lists(["--labels", " positive", " negative", "--seed", "1"], {"--labels"})
    assert flag("labels", several[1]) == flag("labels", " positive, negative") == [" positive", " negative"]
    assert flag("learning_rates", "1e-3, 1e-4") == ["1e-3", "1e-4"]
    assert flag("label_map", r"0=no\n,1=yes\t") == {"0": "no\n", "1": "yes\t"}
    assert flag("labels", r" no\n, yes") == [" no\n", " yes"]


def warned(ran: Ran) -> list[str]:
    assert ran.status == 0, ran
    return [line for line in ran.err.splitlines() if "hardly ever" in line]


@pytest.mark.usefixtures("undrawn")
def test_commands_say_it_once_and_the_doctor_again(train: Ia2, ia2: Ia2, here: Path) -> None:
    write_rows(here / "blank.jsonl", [(f"{query} ", answer) for query, answer in TASK.examples(12, 0)])
    shared = ["--data", "blank.jsonl", "--recipe", "sft"]
    assert len(warned(train(*shared))) == 1
    found = ia2("doctor", "out", "--json").json["runs"][0]["findings"]
    (finding,) = [f for f in found if f["rule"] == "texts-hardly-read"]
    assert finding["severity"] == "warning"
    names(finding["evidence"] + finding["advice"], "blank.jsonl:1 and 11 more rows", "--prompt-template")
    options = ["--model", "model", "--data", "blank.jsonl"]
    assert len(warned(ia2("probe", *options))) == 1
    compare = ["compare", *options, "--recipes", "base", "--seeds", 2, "--output-dir", "compared"]
    assert len(warned(ia2(*compare))) == 1
    assert not warned(train("--recipe", "sft", "--overwrite"))


def test_labels_with_blanks_on_the_command_line(train: Ia2, here: Path) -> None:
    """``--labels ' L1'`` lost its blank, and then no completion was one of the labels."""
    assert train("--recipe", "sft", "--labels", *TASK.answers).status == 0
    recorded = json.loads((here / "out" / "ia2_run.json").read_text())["task"]["labels"]
    assert recorded == sorted(TASK.answers)
    line = train("--labels", *[a.strip() for a in TASK.answers], "--overwrite").refusal()
    names(line, "rows.jsonl: 12 bad rows: ", "only by case, blanks")
