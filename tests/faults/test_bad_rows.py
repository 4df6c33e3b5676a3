"""All bad rows and labels are told at once, and whatever a message suggests is accepted."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import Ran, run, write_rows
from helpers.example_rows import jsonl, refuse, said
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_icl.tasks import sample_task

from ia2.config import TrainConfig
from ia2.config.reading import load_config
from ia2.data.examples import Examples, RowFormat, unescape
from ia2.utils.errors import ConfigError, DataError, suggest

TASK = sample_task(0, num_classes=3)
FAST = ("--align-epochs", 1, "--sft-epochs", 1, "--quiet")


def strangers(count: int, known: int = 3) -> list[tuple[str, str]]:
    """Rows of the task, then some whose labels it does not have."""
    return [*TASK.examples(known, seed=1), *((f"a{i}", f" other{i}") for i in range(count))]


def assert_all_named(line: str, file: str, first: int, count: int) -> None:
    """``count`` rows from line ``first`` on are counted, and the first twenty named."""
    assert f"{file}: {count} bad rows: " in line
    shown = min(count, 20)
    for i in range(shown):
        reason = f"{file}:{first + i}: the completion ' other{i}' is not one of the labels"
        assert reason in line
    assert f"{file}:{first + shown}" not in line
    assert (f"and {count - 20} more" in line) == (count > 20)
    assert "The labels are ' L" in line


# Labels


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_icl_model_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", TASK.examples(12, seed=0))
    (tmp_path / "model").symlink_to(tiny_icl_model_path)
    return tmp_path


@pytest.mark.parametrize("command", ["train", "compare", "curve"])
def test_labels_of_test_rows(here: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    write_rows(here / "test.jsonl", strangers(23))
    more = ("--sizes", 4, 6) if command == "curve" else ()
    given = (command, "--model", "model", "--data", "rows.jsonl", "--output-dir", "out", *FAST, *more)
    line = run(capsys, *given, "--test-data", "test.jsonl").refusal()
    assert_all_named(line, "test.jsonl", 4, 23)
    assert not (here / "out").exists()


def test_labels_of_both_files(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(here / "rows.jsonl", [*TASK.examples(12, seed=0), ("b", " none"), ("c", " none")])
    write_rows(here / "test.jsonl", strangers(2))
    labels = json.dumps(sorted(TASK.answers))
    given = ("train", "--model", "model", "--data", "rows.jsonl", "--output-dir", "out", *FAST)
    line = run(capsys, *given, "--test-data", "test.jsonl", "--labels", labels).refusal()
    assert "rows.jsonl and test.jsonl: 4 bad rows: rows.jsonl:13: the completion ' none'" in line
    for row in ("rows.jsonl:14", "test.jsonl:4", "test.jsonl:5"):
        assert f"{row}: the completion" in line


def test_bad_rows_of_both_files(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jsonl(here / "rows.jsonl", {"prompt": "a"}, {"prompt": "b", "completion": "x"}, "{")
    jsonl(here / "test.jsonl", {"prompt": "a", "completion": ""}, {"completion": "x"})
    given = ("--model", "model", "--data", "rows.jsonl", "--output-dir", "out", *FAST)
    for command in ("train", "compare"):
        line = run(capsys, command, *given, "--test-data", "test.jsonl").refusal()
        for reason in (
            "rows.jsonl:1: no column 'completion'; rows.jsonl:3: invalid JSON",
            "test.jsonl:1: empty completion ('completion'); test.jsonl:2: no column 'prompt'",
        ):
            assert reason in line


def test_labels_in_eval_and_analyze(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ("train", "--model", "model", "--data", "rows.jsonl", "--output-dir", "out", *FAST)
    assert run(capsys, *train, "--recipe", "sft").status == 0
    write_rows(here / "test.jsonl", strangers(21))
    line = run(capsys, "eval", "--adapter", "out", "--data", "test.jsonl", "--quiet").refusal()
    assert_all_named(line, "test.jsonl", 4, 21)
    line = run(capsys, "analyze", "out", "--data", "test.jsonl", "--quiet").refusal()
    assert_all_named(line, "test.jsonl", 4, 21)
    # without labels nothing is wrong with them
    assert run(capsys, "predict", "--adapter", "out", "--data", "test.jsonl", "--quiet").status == 0


def test_labels_in_probe_and_sweep(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(here / "rows.jsonl", strangers(5, known=12))
    labels = json.dumps(sorted(TASK.answers))
    line = run(
        capsys, "probe", "--model", "model", "--data", "rows.jsonl", "--labels", labels, "--quiet"
    ).refusal()
    assert_all_named(line, "rows.jsonl", 13, 5)


def test_contexts_of_rows(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": q, "completion": a, "hint": "b0"} for q, a in TASK.examples(12, seed=0)]
    rows[3]["hint"], rows[7]["hint"] = "", 5  # type: ignore[assignment]
    write_rows(here / "rows.jsonl", rows)
    given = ("probe", "--model", "model", "--data", "rows.jsonl", "--context-column", "hint", "--quiet")
    line = run(capsys, *given).refusal()
    assert "2 bad rows: rows.jsonl:4: the context in column 'hint' is empty" in line
    assert "rows.jsonl:8: the context in column 'hint' is an int" in line


def test_a_million_bad_rows_are_told_at_once() -> None:
    format = RowFormat("{text}", "{label}", {f"label {i}": "x" for i in range(3000)})
    rows = ({"text": "a", "label": f"lable {i} of a long name"} for i in range(50_000))
    with pytest.raises(DataError, match="50000 bad rows"):
        Examples.from_rows(rows, format=format)
    long = "x" * 150_000
    assert "'" + "x" * 59 + "…'" in refuse(
        {"text": "a", "label": long}, format=RowFormat("{text}", "{label}", {long[:-1] + "y": "x"})
    )
    assert suggest(long, [long[:-1]]) == ""


# Suggestions


def accepted(message: str, rows: list[dict[str, Any]]) -> bool:
    """Whether a message suggests templates; they are read as a shell and the command line read them."""
    if "for example " not in message:
        assert "--prompt-template" in message or "--completion-template" in message
        return False
    flags = shlex.split(message.split("for example ", 1)[1])
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    assert given
    assert set(given) <= {"--prompt-template", "--completion-template"}
    templates = {flag.strip("-").replace("-", "_"): unescape(text) for flag, text in given.items()}
    if "completion_template" in templates or any("completion" in row for row in rows):
        Examples.from_rows(rows, format=RowFormat(**templates))
    else:  # the answers are elsewhere
        Examples.from_rows(rows, format=RowFormat(**templates), labelled=False)
    return True


@pytest.mark.parametrize(
    ("row", "suggests"),
    [
        ({"reviews.text": "a", "reviews.rating": "b"}, False),
        ({"reviews": {"text": "a"}, "stars": 1}, True),
        ({"text;label": "a;b"}, True),
        ({"text": "a", "scores": [1, 2]}, True),
        ({"id": 1, "conversations": []}, True),
        ({"a!r": "x", "b:c": "y", "d{e": "z", "f}": "w"}, False),
        ({"it's": "x", 'so "far"': "y"}, True),
        ({"a\rb": "x", "c\u2028d": "y"}, False),
        ({"a\\nb": "x", "c\\": "y"}, True),
        ({"-x": "a", "--y": "b"}, True),
        ({"prompt": "a", "zahl": 1, "list": [1]}, True),
        ({"completion": "a", "satz": "b"}, True),
        ({"{": "x", "ok": "y"}, True),
    ],
    ids=str,
)
def test_templates_that_are_suggested_work(row: dict[str, Any], suggests: bool) -> None:
    assert accepted(refuse(row, format=RowFormat()), [row]) == suggests


def test_a_suggested_answer_is_in_the_label_map() -> None:
    rows = [{"note": "b", "label": "x", "stars": 1}]
    message = refuse(*rows, format=RowFormat(label_map={"1": "bad"}))
    assert message.endswith("--prompt-template 'Note: {note}\\nLabel:' --completion-template ' {stars}'")
    message = refuse(*rows, format=RowFormat(label_map={"2": "bad"}))
    assert "--completion-template" not in message


values = st.one_of(
    st.text("ab ", min_size=1).filter(str.strip),
    st.integers(),
    st.booleans(),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text("ab", max_size=2), st.integers(), max_size=2),
)
columns = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.text(
    "ab.[]{}!:;,'\"\\ \n\r\t-$", max_size=8
)


@given(st.lists(st.dictionaries(columns, values, min_size=1, max_size=5), min_size=1, max_size=4))
@settings(max_examples=400, deadline=None)
def test_whatever_is_suggested_works(rows: list[dict[str, Any]]) -> None:
    every = [{**rows[0], **row} for row in rows]
    try:
        Examples.from_rows(every)
    except DataError as error:
        message = str(error)
        assert "\n" not in message
        if "say what to make them of" in message:
            accepted(message, every)


@given(st.dictionaries(columns, st.just("x"), min_size=1, max_size=5), st.text("ab.[]{}: ", min_size=1))
@settings(max_examples=300, deadline=None)
def test_columns_that_are_meant_can_be_named(row: dict[str, Any], wanted: str) -> None:
    try:
        format = RowFormat(f"{{{wanted}}}", "{label}")
    except DataError:
        return
    try:
        Examples.from_rows([{**row, "label": "y"}], format=format)
    except DataError as error:
        if near := re.search(r"Did you mean '(.*)'\?", str(error)):
            Examples.from_rows([{**row, "label": "y"}], format=RowFormat(f"{{{near[1]}}}", "{label}"))


def test_a_table_with_another_separator(tmp_path: Path) -> None:
    for ending, mark in ((".csv", ";"), (".csv", "\t"), (".tsv", ",")):
        path = tmp_path / f"a{ending}"
        path.write_text(f"text{mark}label\na{mark}b\n")
        for format in (RowFormat(), RowFormat("{text}", "{label}")):
            with pytest.raises(DataError, match="cells are separated by commas in \\.csv files") as info:
                Examples.from_file(path, format=format)
            assert "Did you mean" not in said(info)


@given(st.lists(st.sampled_from("abcd"), min_size=3, max_size=40), st.integers(2, 60), st.booleans())
@settings(max_examples=200, deadline=None)
def test_numbers_that_are_suggested_work(answers: list[str], wanted: int, balanced: bool) -> None:
    rows = Examples.from_rows([{"prompt": f"{i}", "completion": a} for i, a in enumerate(answers)])
    try:
        rows.split(num_examples=wanted, balanced=balanced)
    except DataError as error:
        if found := re.search(r"ask for at most (\d+)", str(error)):
            fewer = int(found[1])
            assert fewer < wanted
            rows.split(num_examples=fewer, balanced=balanced)


# Chat data


def turns(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]


def test_messages_of_one_question_and_answer(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", *[{"messages": turns("user", "assistant"), "id": i} for i in range(2)])
    (first, _) = Examples.from_file(path)
    assert (first.query, first.answer) == ("user 0", "assistant 1")
    format = RowFormat("Q: {prompt}\nA:", " {completion}")
    assert Examples.from_file(path, format=format)[0].query == "Q: user 0\nA:"
    mapped = RowFormat(label_map={"assistant 1": "yes"})
    assert Examples.from_file(path, format=mapped).raw_labels == {"yes": "assistant 1"}
    asked = [{"messages": turns("user")}]
    assert Examples.from_rows(asked, labelled=False)[0].query == "user 0"
    own = [{"messages": turns("system"), "prompt": "p", "completion": "c"}]
    assert Examples.from_rows(own)[0].query == "p"


def test_messages_in_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"messages": turns("user", "assistant")}] * 2
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert Examples.from_file(tmp_path / "a.parquet").answers == ["assistant 1"] * 2


def test_other_messages_are_all_named() -> None:
    many = ("system", "user", "assistant")
    rows = [
        {"messages": m} for m in (turns("user", "assistant"), turns(*many), [], "text", [{"content": "a"}])
    ]
    rows.append({"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "b"}]})
    rows.append({"messages": turns("user")})
    message = refuse(*rows, format=RowFormat())
    wanted = "'messages' must be one of the user and one of the assistant after it"
    for number, roles in ((2, "system, user, assistant"), (3, "none"), (4, "none"), (5, "None")):
        assert (
            f"rows:{number}: {wanted} (roles: {roles}); write other chats as the columns 'prompt'" in message
        )
    assert "rows:6: 'messages': the content of a message is not text" in message
    assert message.endswith("rows:7: no column 'completion'")
    assert message.startswith("rows: 6 bad rows: ")


# Words of YAML


def settings_of(folder: Path, text: str) -> TrainConfig:
    file = folder / "settings.yaml"
    file.write_text(text, encoding="utf-8")
    config: TrainConfig = load_config(TrainConfig, file, {})
    return config


def test_numbers_and_booleans_in_a_label_map(tmp_path: Path) -> None:
    def label_map(text: str) -> Any:
        return settings_of(tmp_path, f"label_map: {text}\n").label_map

    assert label_map("{0: negative, 1: positive}") == {"0": "negative", "1": "positive"}
    # as written: 01 is not 1, and 1.10 not 1.1
    assert label_map("{01: a, 1.10: b, 1_0: c, 2020-01-01: d}") == {
        "01": "a",
        "1.10": "b",
        "1_0": "c",
        "2020-01-01": "d",
    }
    assert label_map("{true: a, False: b}") == {"true": "a", "False": "b"}
    assert label_map("{a: 0, b: 007, c: true}") == {"a": "0", "b": "007", "c": "true"}
    assert label_map("{'no': 'yes', \"on\": ' off'}") == {"no": "yes", "on": " off"}
    assert settings_of(tmp_path, "labels: [0, 1.50, ' a']").labels == ["0", "1.50", " a"]
    format = RowFormat("{t}", "{y}", label_map("{true: a, False: b}"))
    rows = [{"t": "1", "y": True}, {"t": "2", "y": False}]
    assert Examples.from_rows(rows, format=format).answers == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("labels: [no, yes]", "no"),
        ("seed: 1\nlabels:\n- x\n- Yes\n", "Yes"),
        ("label_map: {no: a, b: c}", "no"),
        ("label_map: {0: no, 1: yes}", "no"),
        ("label_map:\n  0: ON\n", "ON"),
        ("label_map:\n  a: &x b\n  off: *x\n", "off"),
    ],
)
def test_an_unquoted_no_is_explained(tmp_path: Path, text: str, word: str) -> None:
    with pytest.raises(ConfigError) as info:
        settings_of(tmp_path, text)
    line = next(i for i, row in enumerate(text.splitlines(), 1) if re.search(rf"\b{word}\b", row))
    truth = "true" if word.lower() in ("yes", "on") else "false"
    assert said(info) == (
        f"{tmp_path / 'settings.yaml'}: line {line}: YAML takes {word} without quotation marks for {truth}; "
        f"write '{word}'"
    )
    # and what it says is accepted, word by word
    for _ in range(4):
        try:
            settings_of(tmp_path, text)
            break
        except ConfigError as error:
            quoted = str(error).rsplit("write ", 1)[1]
            text = re.sub(rf"(?<!['\w]){quoted.strip(chr(39))}(?!['\w])", quoted, text, count=1)
    else:
        raise AssertionError(text)


def test_words_of_benchmarks_and_grids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = tmp_path / "own.yaml"
    text = (
        "name: Own\npath: own\ntest: {{split: test, rows: 9}}\nprompt: '{{text}}'\nlabel: label\n"
        "verbalisers: {{w: {{{}}}}}\n"
    )
    for words in ("0: no, 1: ' b'", "no: a, 1: ' b'"):
        entry.write_text(text.format(words))
        assert (
            "YAML takes no without quotation marks for false"
            in run(capsys, "benchmarks", "show", entry).refusal()
        )
    entry.write_text(text.format("01: ' a', true: ' b'"))
    from ia2.data.benchmarks import load_benchmark

    assert load_benchmark(entry).verbalisers == {"w": {"01": " a", "true": " b"}}
    grid = tmp_path / "grid.yaml"
    grid.write_text("benchmarks: [Intents]\nmodels: [demo]\nrecipes: [sft]\nsettings: {labels: [no, b]}\n")
    assert "line 4: YAML takes no without" in run(capsys, "sweep", grid).refusal()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("batch_size: yes", "batch_size: true is no number"),
        ("sft: {learning_rate: on}", "sft.learning_rate: true is no number"),
        ("learning_rates: [true]", "learning_rates: true is no number"),
        ("seed: off", "seed: false is no number"),
        ("seed: 010", "line 1: '010' is another number to YAML than it seems"),
        ("num_examples: 1:30", "line 1: '1:30' is another number to YAML"),
        ("chat: off", "YAML takes no and off without quotation marks for false"),
        ("separator: no", "YAML takes no and off without quotation marks for false"),
    ],
)
def test_what_yaml_makes_another_value_of(tmp_path: Path, text: str, reason: str) -> None:
    """A switch where a number belongs counted as 1, ``010`` as 8."""
    with pytest.raises(ConfigError) as info:
        settings_of(tmp_path, text)
    assert reason in said(info)


def test_numbers_that_are_what_they_seem(tmp_path: Path) -> None:
    assert settings_of(tmp_path, "seed: 0\nbatch_size: 1_0\nnum_examples: 8.0").num_examples == 8
    assert settings_of(tmp_path, "chat: 'off'\nlabels: ['010', b]").labels == ["010", "b"]


def test_switches_stay_switches(tmp_path: Path) -> None:
    assert settings_of(tmp_path, "balanced: yes\nnum_examples: 4\n").balanced is True


def test_json_on_the_command_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*options: str) -> str:
        ran: Ran = run(
            capsys, "train", "--model", "model", "--data", "rows.jsonl", "--output-dir", "out", *options
        )
        return ran.refusal()

    assert "--label-map: not a JSON object" in refused("--label-map", '{"a": "b", "a": "c"}')
    assert "the key 'a' is there twice" in refused("--label-map", '{"a": "b", "a": "c"}')
    assert "--labels: not a JSON list" in refused("--labels", "[" * 90_000)
    assert "NaN is no JSON" in refused("--adapter-peft", '{"peft_type": "IA3", "x": NaN}')
