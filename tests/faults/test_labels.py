"""Labels, names and prompts that nearly match: refused, or said once by the command and by the doctor."""

from __future__ import annotations

import csv
import io
import json
import logging
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.command_line import Ran, run, write_rows
from tiny_icl.tasks import sample_task

from ia2.cli.options import _options, _read, gather_lists
from ia2.config import AdaptConfig, TrainConfig
from ia2.data.examples import Examples, RowFormat
from ia2.evaluation.scoring import LabelScores, label_predictions
from ia2.experiment.predict import prediction_text
from ia2.models.tokens import encode_answer
from ia2.prompts.task import Task, make_task
from ia2.report.doctor.diagnosis import diagnose
from ia2.utils.errors import ConfigError, DataError

WORDS = ["good", "bad", "great", "awful", "fine", "film", "food", "song"]
TASK = sample_task(0, num_classes=3)


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
    rows = [
        {"prompt": prompt.format(WORDS[i % len(WORDS)]), "completion": answer}
        for i, answer in enumerate(answers)
    ]
    return Examples.from_rows(rows, name="rows")


def make(tokenizer: Any, rows: Examples, template: str | None = None, **settings: Any) -> Task:
    return make_task(rows, AdaptConfig(**settings), tokenizer, template)


def said(task: Task) -> str:
    return " | ".join(" ".join(parts) for parts in task.advice)


def flag(name: str, text: str) -> Any:
    """A setting as the command line reads it."""
    return _read(_options(TrainConfig, ())[name], text)


# -------------------------------------------------------------------------------------- one name each


@pytest.mark.parametrize(
    ("one", "other"),
    [(" positive", "positive"), (" positive", " positive "), (" positive", "\u00a0positive"), ("a", "a\n")],
)
def test_labels_that_differ_by_blanks_at_their_ends(byte_tokenizer: Any, one: str, other: str) -> None:
    """They had one name, and the probabilities under it did not sum to 1."""
    rows = rows_of(*[one, " negative"] * 2, other)
    with pytest.raises(DataError, match="differ by blanks only") as caught:
        make(byte_tokenizer, rows, task="classification")
    line = str(caught.value)
    assert repr(one) in line
    assert f"{other!r} (rows:5)" in line
    assert "\n" not in line
    # what it suggests is accepted, and mends it
    written = shlex.split(line.split("--label-map ")[1].rstrip("."))[0]
    mapped = RowFormat(label_map=flag("label_map", written))
    mended = Examples.from_rows([example.fields for example in rows], format=mapped, name="rows")
    assert make(byte_tokenizer, mended, task="classification").labels == tuple(sorted([one, " negative"]))


def test_given_labels_of_one_name(word_tokenizer: Any) -> None:
    rows = rows_of(*[" positive", " negative"] * 2)
    with pytest.raises(DataError, match="leave one of them out of labels"):
        make(word_tokenizer, rows, labels=[" positive", "positive", " negative"])


def test_a_text_that_is_called_like_another_label_s_raw_value(byte_tokenizer: Any) -> None:
    rows = Examples.from_rows(
        [{"text": w, "label": i % 2} for i, w in enumerate(WORDS)],
        format=RowFormat("Text: {text}", " {label}", {"0": "bad", "1": "good"}),
    )
    with pytest.raises(DataError, match=r"' 1' and ' good'.* would both be called '1'"):
        make(byte_tokenizer, rows, labels=[" bad", " good", " 1"])


def test_probabilities_by_name_sum_to_one(byte_tokenizer: Any) -> None:
    labels = [" yes", " Yes", " not very", " notvery", " caf\u00e9", " cafe\u0301"]
    task = make(byte_tokenizer, rows_of(*labels * 2))
    p = np.random.default_rng(0).random((2, len(labels), 1))
    scores = LabelScores(np.ones(1), np.log(p), p[:, 0], np.zeros(2, int), p[:, 0], False)
    found = label_predictions(byte_tokenizer, task, rows_of(*labels[:2]), scores)
    for row in found:
        assert len(row.details["labels"]) == len(labels)
        assert sum(row.details["labels"].values()) == pytest.approx(1)
    text = prediction_text([{"label": r.predicted, "labels": r.details["labels"]} for r in found], ".csv")
    for line in csv.DictReader(io.StringIO(text)):
        assert sum(float(v) for k, v in line.items() if k.startswith("p(")) == pytest.approx(1)


# ---------------------------------------------------------------------------------------- near matches


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (" yes", " Yes"),
        (" not very", " notvery"),
        (" not very", " not  very"),
        (" caf\u00e9", " cafe\u0301"),
        (" not very", " not\u00a0very"),
        (" yes", " y\u200bes"),
        (" yes", " yes\ufeff"),
        (" paper", " \u0440aper"),  # a Cyrillic letter
        (" OK", " \uff2f\uff2b"),  # full width
        (" e-mail", " e\u2011mail"),
        (" don't", " don\u2019t"),
        (" ma\u00dfe", " MASSE"),
        (" 1", " 1.0"),  # of one column: 1 and 1.0
        (" 01", " 1"),
        (" 1e3", " 1000"),
    ],
)
def test_labels_that_nearly_match_are_said(byte_tokenizer: Any, one: str, other: str) -> None:
    told = said(make(byte_tokenizer, rows_of(*[one, other, " third"] * 3)))
    assert "differ only by case, blanks, invisible or look-alike characters, or as numbers" in told
    assert repr(one) in told
    assert repr(other) in told
    assert "third" not in told
    assert other.isascii() or ascii(other) in told  # what cannot be seen is spelt


def test_raw_labels_that_nearly_match_are_said(byte_tokenizer: Any) -> None:
    """They name columns and keys, whatever the model writes for them."""
    rows = Examples.from_rows(
        [{"text": w, "label": ("yes", "Yes", "no")[i % 3]} for i, w in enumerate(WORDS)],
        format=RowFormat("Text: {text}", " {label}", {"yes": "good", "Yes": "fine", "no": "bad"}),
    )
    task = make(byte_tokenizer, rows, task="classification")
    assert sorted(task.names) == ["Yes", "no", "yes"]
    assert "'Yes', 'yes'" in said(task)


@pytest.mark.parametrize(
    "labels",
    [
        [" positive", " negative"],
        ["0", "1"],
        ["-1", "1"],
        [" C", " C++", " C#"],
        [" World", " Sports", " Sci/Tech"],
        [" 1", " 10"],
        [" cafe", " caf\u00e9"],
        [" \u0434\u0430", " \u043d\u0435\u0442"],
    ],
)
def test_usual_labels_are_not_remarked_on(
    byte_tokenizer: Any, labels: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert make(byte_tokenizer, rows_of(*labels * 3)).advice == ()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_labels_that_end_in_a_blank_are_said(byte_tokenizer: Any) -> None:
    given = flag("label_map", "0= positive ,1= negative")
    rows = Examples.from_rows(
        [{"prompt": f"Text: {w}\nLabel:", "completion": i % 2} for i, w in enumerate(WORDS)],
        format=RowFormat(label_map=given),
    )
    assert "' positive '" in said(make(byte_tokenizer, rows))


def test_a_completion_that_is_nearly_a_label(word_tokenizer: Any) -> None:
    rows = rows_of(" positive", " negative", "positive", " Positive", " red")
    with pytest.raises(DataError) as caught:
        make(word_tokenizer, rows, labels=[" positive", " negative"])
    line = str(caught.value)
    assert "rows:3: the completion 'positive' differs from the label ' positive' only by case" in line
    assert "rows:4: the completion ' Positive'" in line
    assert (
        "rows:5: the completion ' red' is not one of the labels. The labels are ' negative', ' positive'"
        in line
    )


def test_of_labels_that_begin_alike_the_teacher_says_the_longest(word_tokenizer: Any) -> None:
    task = make(word_tokenizer, rows_of(*[" good", " good film", " bad"] * 3))
    for label in task.labels:
        ids = (*encode_answer(word_tokenizer, label), 2)
        assert task.label_said(ids) == task.index[label]
    assert task.label_said(encode_answer(word_tokenizer, " film good")) is None


# --------------------------------------------------------------------------------- prompt and answer


@pytest.mark.parametrize(
    ("prompt", "answers", "better"),
    [
        ("Text: {}\nLabel: ", [" positive", " negative"], "Label:' + ' negative'"),
        ("Text: {}\nLabel: ", ["positive", "negative"], "Label:' + ' negative'"),
        ("Text: {}\nLabel:", ["positive", "negative"], "Label:' + ' negative'"),
        ("Text: {}\nLabel:", ["  positive", "  negative"], "Label:' + ' negative'"),
        ("Text: {}\nLabel:\u00a0", ["positive", "negative"], "Label:' + ' negative'"),
        ("Text: {}\nLabel:\n", [" positive", " negative"], "Label:\\n' + 'negative'"),
        ("Text: {} is ", ["0", "1"], " is' + ' 0'"),
    ],
)
def test_an_unlikely_joint_is_said(byte_tokenizer: Any, prompt: str, answers: list[str], better: str) -> None:
    rows = rows_of(*sorted(answers) * 3, prompt=prompt)
    told = said(make(byte_tokenizer, rows))
    assert "Prompt and answer meet as texts hardly ever do" in told
    assert "(rows:1 and 5 more rows)" in told
    assert better in told
    # so written, nothing is remarked on
    stem = prompt.rstrip(" \u00a0")
    body = [answer.strip() if stem.endswith("\n") else f" {answer.strip()}" for answer in answers]
    assert make(byte_tokenizer, rows_of(*sorted(body) * 3, prompt=stem)).advice == ()


@pytest.mark.parametrize(
    ("prompt", "answers"),
    [
        ("Text: {}\nLabel:", [" positive", " negative"]),
        ("Text: {}\nLabel:\n", ["positive", "negative"]),
        ("Text: {}\nLabel:", ["0", "1"]),  # Qwen writes " 0" as two tokens
        ("Text: {}\nLabel: (", ["a)", "b)"]),
        ('Text: {}\nLabel: "', ["positive", "negative"]),
        ("\u6587\u672c: {}\n\u6807\u7b7e\uff1a", ["\u6b63\u9762", "\u8d1f\u9762"]),
        ("{} =>", [" yes", " no"]),
        ("The {} was", [" good", " bad"]),
        ("{}\tlabel\t", ["yes", "no"]),
    ],
)
def test_usual_joints_are_not_remarked_on(byte_tokenizer: Any, prompt: str, answers: list[str]) -> None:
    assert make(byte_tokenizer, rows_of(*answers * 3, prompt=prompt)).advice == ()


def test_free_text_too_and_only_its_bad_rows(byte_tokenizer: Any) -> None:
    rows = rows_of(*[f" {w}" for w in WORDS[:3]], "a song", *[f" {w}" for w in WORDS[4:6]])
    assert "(rows:4)" in said(make(byte_tokenizer, rows, task="generation"))


def test_a_tokenizer_that_puts_the_blank_itself(prefixing_tokenizer: Any) -> None:
    """There `` positive`` behind ``Label:`` is two tokens, of which a text has one."""
    prompt = "Text: {} Label:"
    without = make(prefixing_tokenizer, rows_of(*["positive", "negative"] * 3, prompt=prompt))
    assert without.advice == ()
    assert without.single_token
    told = said(make(prefixing_tokenizer, rows_of(*[" negative", " positive"] * 3, prompt=prompt)))
    assert "Label:' + 'negative'" in told


def test_a_chat_template_joins_by_itself(tiny_icl_model_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_icl_model_path)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    rows = Examples.from_rows(
        [{"prompt": f"{q} ", "completion": a.strip()} for q, a in TASK.examples(6, 0)], name="rows"
    )
    assert make(tokenizer, rows, chat="turns").advice == ()
    assert make(tokenizer, rows).advice


# ------------------------------------------------------------------------------------ blanks, escapes


def test_blanks_in_flags_are_kept_where_they_count() -> None:
    assert flag("label_map", "0 = negative, 1=positive") == {"0": " negative", "1": "positive"}
    assert flag("labels", " positive, negative") == [" positive", " negative"]
    several = gather_lists(["--labels", " positive", " negative", "--seed", "1"], {"--labels"})
    assert flag("labels", several[1]) == [" positive", " negative"]
    assert flag("learning_rates", "1e-3, 1e-4") == ["1e-3", "1e-4"]


def test_flags_are_unescaped_alike() -> None:
    assert flag("label_map", r"0=no\n,1=yes\t") == {"0": "no\n", "1": "yes\t"}
    assert flag("labels", r" no\n, yes") == [" no\n", " yes"]
    assert flag("prompt_template", r"Text: {text}\nLabel:") == "Text: {text}\nLabel:"


@pytest.mark.parametrize("written", ["0=a,1=b,0=c", '{"0": "a", "1": "b", "0": "c"}', "0=a, 0 =b"])
def test_a_raw_label_that_is_mapped_twice(written: str) -> None:
    with pytest.raises(ConfigError, match=r"--label-map: .*'0' is there twice"):
        flag("label_map", written)


@pytest.mark.parametrize("where", ["template", "rows", "labels", "separator"])
def test_a_backslash_that_stays_one_is_said(byte_tokenizer: Any, where: str) -> None:
    """YAML keeps it between single quotes, and so does a cell of a CSV file."""
    prompt, answers, template, settings = "Text: {}\nLabel:", [" yes", " no"], None, {}
    if where == "template":
        template = r"Text: {text}\nLabel:"
    elif where == "rows":
        prompt = r"Text: {}\nLabel:"
    elif where == "labels":
        answers = [r" yes\n", r" no\t"]
    else:
        settings = {"separator": r"\n\n"}
    told = said(make(byte_tokenizer, rows_of(*answers * 3, prompt=prompt), template, **settings))
    assert "hold a backslash with an n or a t, not a line break" in told
    assert "double quotes" in told


def test_backslashes_of_some_rows_are_their_own(byte_tokenizer: Any) -> None:
    rows = rows_of(r" \text{a}", r" \boxed{4}", r" 3 \times 4", r" a \neq b", r" \nu")
    assert make(byte_tokenizer, rows, task="generation").advice == ()


# ------------------------------------------------------------------------------------- the commands


Command = Callable[..., Ran]


@pytest.fixture
def ia2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_icl_model_path: Path, capsys: Any) -> Command:
    """``ia2`` on rows.jsonl and the small model, with nothing but warnings."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(tiny_icl_model_path)

    def command(name: str, *options: Any) -> Ran:
        fast = ["--align-epochs", 1, "--sft-epochs", 1] if name != "probe" else []
        out = [] if name == "probe" else ["--output-dir", "out"]
        return run(capsys, name, "--model", "model", "--data", "rows.jsonl", *out, *fast, *options, "--quiet")

    return command


def blank_prompts(file: Path, count: int = 12, seed: int = 0) -> Path:
    return write_rows(file, [(f"{query} ", answer) for query, answer in TASK.examples(count, seed)])


def warned(ran: Ran) -> list[str]:
    assert ran.status == 0, ran
    return [line for line in ran.err.splitlines() if "hardly ever" in line]


def test_labels_of_one_name_leave_nothing_behind(ia2: Command, tmp_path: Path) -> None:
    rows = TASK.examples(12, 0)
    write_rows(tmp_path / "rows.jsonl", [*rows, (rows[0][0], rows[0][1].strip())])
    for command in ("train", "compare", "probe"):
        assert "differ by blanks only" in ia2(command).refusal()
    assert not (tmp_path / "out").exists()


def test_train_says_it_once_and_the_doctor_again(ia2: Command, tmp_path: Path) -> None:
    blank_prompts(tmp_path / "rows.jsonl")
    assert len(warned(ia2("train", "--recipe", "sft"))) == 1
    found = [f for f in diagnose(tmp_path / "out").findings if f.rule == "texts-hardly-read"]
    assert [f.severity for f in found] == ["warning"]
    assert found[0].message == "Prompt and answer meet as texts hardly ever do."
    assert "rows.jsonl:1 and 11 more rows" in found[0].evidence
    assert "--prompt-template" in found[0].advice
    # a run of usual rows has none
    write_rows(tmp_path / "rows.jsonl", TASK.examples(12, 0))
    assert not warned(ia2("train", "--recipe", "sft", "--overwrite"))
    assert "texts-hardly-read" in diagnose(tmp_path / "out").clear


@pytest.mark.usefixtures("undrawn")
def test_compare_curve_and_probe_say_it_once(ia2: Command, tmp_path: Path) -> None:
    blank_prompts(tmp_path / "rows.jsonl", 18)
    assert len(warned(ia2("probe"))) == 1
    assert len(warned(ia2("compare", "--recipes", "base", "--seeds", 2))) == 1
    assert "texts-hardly-read" in {f.rule for f in diagnose(tmp_path / "out").findings}
    test = write_rows(tmp_path / "test.jsonl", TASK.examples(6, 5))
    sizes = ["--sizes", 2, 4, "--recipes", "base", "--seeds", 1, "--test-data", test]
    assert len(warned(ia2("curve", *sizes, "--output-dir", "curve"))) == 1


def test_the_same_template_in_a_file_and_as_a_flag(ia2: Command, tmp_path: Path) -> None:
    rows = [{"text": query, "label": answer.strip()} for query, answer in TASK.examples(12, 0)]
    write_rows(tmp_path / "rows.jsonl", rows)
    shared = ["--completion-template", " {label}", "--recipe", "sft", "--overwrite"]
    told = []
    for quote in ("'", '"'):
        (tmp_path / "c.yaml").write_text(rf"prompt_template: {quote}z0\n\n{{text}}{quote}" + "\n")
        told.append("backslash" in ia2("train", "--config", "c.yaml", *shared).err)
    told.append("backslash" in ia2("train", "--prompt-template", r"z0\n\n{text}", *shared).err)
    assert told == [True, False, False]


def test_labels_with_blanks_on_the_command_line(ia2: Command, tmp_path: Path) -> None:
    """``--labels ' L1'`` lost its blank, and then no completion was one of the labels."""
    write_rows(tmp_path / "rows.jsonl", TASK.examples(12, 0))
    ran = ia2("train", "--recipe", "sft", "--labels", *TASK.answers)
    assert ran.status == 0, ran
    recorded = json.loads((tmp_path / "out" / "ia2_run.json").read_text())["task"]["labels"]
    assert recorded == sorted(TASK.answers)
    line = ia2("train", "--labels", *[a.strip() for a in TASK.answers], "--overwrite").refusal()
    assert "only by case, blanks" in line
    assert line.startswith("rows.jsonl: 12 bad rows: ")


def test_labels_in_test_rows_and_in_eval_are_named_at_once(ia2: Command, tmp_path: Path, capsys: Any) -> None:
    write_rows(tmp_path / "rows.jsonl", TASK.examples(12, 0))
    test = TASK.examples(6, 3)
    write_rows(tmp_path / "test.jsonl", [(q, a.strip() if i % 2 else a) for i, (q, a) in enumerate(test)])
    for command in ("train", "compare"):
        line = ia2(command, "--test-data", "test.jsonl").refusal()
        assert [f"test.jsonl:{n}:" in line for n in range(1, 7)] == [False, True] * 3
    assert ia2("train", "--recipe", "sft").status == 0
    line = run(capsys, "eval", "--adapter", "out", "--data", "test.jsonl", "--quiet").refusal()
    assert [f"test.jsonl:{n}:" in line for n in range(1, 7)] == [False, True] * 3
