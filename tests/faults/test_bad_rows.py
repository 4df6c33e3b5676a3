"""All bad rows and labels are told at once, and whatever a message suggests is accepted."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import TASK, Ia2, names, write_rows
from helpers.example_rows import jsonl, refuse, said
from hypothesis import given, settings
from hypothesis import strategies as st

from ia2.config import TrainConfig
from ia2.config.reading import load_config
from ia2.data.benchmarks import load_benchmark
from ia2.data.examples import Examples, RowFormat
from ia2.data.rows import unescape
from ia2.utils.errors import ConfigError, DataError, suggest

LABELS = json.dumps(sorted(TASK.answers))


def strangers(count: int, known: int = 3) -> list[tuple[str, str]]:
    """Rows of the task, then some whose labels it does not have."""
    return [*TASK.examples(known, seed=1), *((f"a{i}", f" other{i}") for i in range(count))]


@pytest.mark.parametrize(
    "command",
    [
        "train --model model --data rows.jsonl --output-dir out --recipe ia2-sft --test-data",
        "curve --model model --data rows.jsonl --output-dir out --sizes 2,4 --test-data",
        "eval --adapter run --data",
        "analyze run --data",
        f"probe --model model --labels {shlex.quote(LABELS)} --data",
    ],
)
def test_every_row_with_another_label_is_named(command: str, here: Path, finished: Path, ia2: Ia2) -> None:
    (here / "run").symlink_to(finished)
    write_rows(here / "other.jsonl", strangers(23, known=12))
    line = ia2(*shlex.split(command), "other.jsonl").refusal()
    reasons = [f"other.jsonl:{13 + i}: the completion ' other{i}' is not one of" for i in range(21)]
    names(line, "other.jsonl: 23 bad rows: ", *reasons[:20], "and 3 more", "The labels are ' L")
    assert reasons[20] not in line and not (here / "out").exists()
    # without labels nothing is wrong with them
    assert ia2("predict", "--adapter", "run", "--data", "other.jsonl").status == 0


def test_bad_rows_of_both_files(here: Path, train: Ia2) -> None:
    write_rows(here / "rows.jsonl", [*TASK.examples(12, seed=0), ("b", " none"), ("c", " none")])
    write_rows(here / "test.jsonl", strangers(2))
    line = train("--test-data", "test.jsonl", "--labels", LABELS).refusal()
    rows = ("rows.jsonl:13", "rows.jsonl:14", "test.jsonl:4", "test.jsonl:5")
    names(line, "rows.jsonl and test.jsonl: 4 bad rows: ", *(f"{row}: the completion" for row in rows))
    jsonl(here / "rows.jsonl", {"prompt": "a"}, {"prompt": "b", "completion": "x"}, "{")
    jsonl(here / "test.jsonl", {"prompt": "a", "completion": ""}, {"completion": "x"})
    line = train("--test-data", "test.jsonl").refusal()
    names(line, "rows.jsonl:1: no column 'completion'; rows.jsonl:3: invalid JSON")
    names(line, "test.jsonl:1: empty completion ('completion'); test.jsonl:2: no column 'prompt'")


def test_contexts_of_rows(here: Path, ia2: Ia2) -> None:
    rows = [{"prompt": q, "completion": a, "hint": "b0"} for q, a in TASK.examples(12, seed=0)]
    rows[3]["hint"], rows[7]["hint"] = "", 5  # type: ignore[assignment]
    write_rows(here / "rows.jsonl", rows)
    line = ia2("probe", "--model", "model", "--data", "rows.jsonl", "--context-column", "hint").refusal()
    names(line, "rows.jsonl:4: the context in column 'hint' is empty", "rows.jsonl:8: ", "is an int")


def test_a_million_bad_rows_are_told_at_once() -> None:
    format = RowFormat("{text}", "{label}", {f"label {i}": "x" for i in range(3000)})
    rows = ({"text": "a", "label": f"lable {i} of a long name"} for i in range(50_000))
    with pytest.raises(DataError, match="50000 bad rows"):
        Examples.from_rows(rows, format=format)
    long = "x" * 150_000
    known = RowFormat("{text}", "{label}", {long[:-1] + "y": "x"})
    assert "'" + "x" * 59 + "…'" in refuse({"text": "a", "label": long}, format=known)
    assert suggest(long, [long[:-1]]) == ""


# ------------------------------------------------------------------------------------- suggestions


def accepted(message: str, rows: list[dict[str, Any]]) -> bool:
    """Whether a message suggests templates; they are read as a shell and the command line read them."""
    if "for example " not in message:
        names(message, "-template")
        return False
    flags = shlex.split(message.split("for example ", 1)[1])
    suggested = dict(zip(flags[::2], flags[1::2], strict=True))
    assert suggested and set(suggested) <= {"--prompt-template", "--completion-template"}
    templates = {flag.strip("-").replace("-", "_"): unescape(text) for flag, text in suggested.items()}
    answered = "completion_template" in templates or any("completion" in row for row in rows)
    Examples.from_rows(rows, format=RowFormat(**templates), labelled=answered)
    return True


@pytest.mark.parametrize(
    ("row", "suggests"),
    [
        ({"reviews.text": "a", "reviews.rating": "b"}, False),
        ({"reviews": {"text": "a"}, "stars": 1}, True),
        ({"a!r": "x", "b:c": "y", "d{e": "z", "f}": "w"}, False),
        ({"it's": "x", 'so "far"': "y"}, True),
        ({"a\\nb": "x", "c\\": "y"}, True),
        ({"-x": "a", "--y": "b"}, True),
        ({"prompt": "a", "zahl": 1, "list": [1]}, True),
    ],
    ids=str,
)
def test_templates_that_are_suggested_work(row: dict[str, Any], suggests: bool) -> None:
    assert accepted(refuse(row, format=RowFormat()), [row]) == suggests


def test_a_suggested_answer_is_in_the_label_map() -> None:
    row = {"note": "b", "label": "x", "stars": 1}
    message = refuse(row, format=RowFormat(label_map={"1": "bad"}))
    assert message.endswith("--prompt-template 'Note: {note}\\nLabel:' --completion-template ' {stars}'")
    assert "--completion-template" not in refuse(row, format=RowFormat(label_map={"2": "bad"}))


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
@settings(max_examples=200, deadline=None)
def test_whatever_is_suggested_works(rows: list[dict[str, Any]]) -> None:
    rows = [{**rows[0], **row} for row in rows]
    try:
        Examples.from_rows(rows)
    except DataError as error:
        assert "\n" not in str(error)
        if "say what to make them of" in str(error):
            accepted(str(error), rows)


@given(st.dictionaries(columns, st.just("x"), min_size=1, max_size=5), st.text("ab.[]{}: ", min_size=1))
@settings(max_examples=200, deadline=None)
def test_columns_that_are_meant_can_be_named(row: dict[str, Any], wanted: str) -> None:
    rows = [{**row, "label": "y"}]
    try:
        Examples.from_rows(rows, format=RowFormat(f"{{{wanted}}}", "{label}"))
    except DataError as error:
        if near := re.search(r"Did you mean '(.*)'\?", str(error)):
            Examples.from_rows(rows, format=RowFormat(f"{{{near[1]}}}", "{label}"))


@given(st.lists(st.sampled_from("abcd"), min_size=3, max_size=40), st.integers(2, 60), st.booleans())
@settings(max_examples=100, deadline=None)
def test_numbers_that_are_suggested_work(answers: list[str], wanted: int, balanced: bool) -> None:
    rows = Examples.from_rows([{"prompt": f"{i}", "completion": a} for i, a in enumerate(answers)])
    try:
        rows.split(num_examples=wanted, balanced=balanced)
    except DataError as error:
        if found := re.search(r"ask for at most (\d+)", str(error)):
            assert int(found[1]) < wanted
            rows.split(num_examples=int(found[1]), balanced=balanced)


# --------------------------------------------------------------------------------------- chat data


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
    assert Examples.from_rows([{"messages": turns("user")}], labelled=False)[0].query == "user 0"


def test_other_messages_are_all_named() -> None:
    many = turns("system", "user", "assistant")
    others: list[Any] = [turns("user", "assistant"), many, [], "text", [{"content": "a"}]]
    others.append([{"role": "user", "content": None}, {"role": "assistant", "content": "b"}])
    message = refuse(*({"messages": m} for m in (*others, turns("user"))), format=RowFormat())
    assert message.startswith("rows: 6 bad rows: ") and message.endswith("rows:7: no column 'completion'")
    for number, roles in ((2, "system, user, assistant"), (3, "none"), (4, "none"), (5, "None")):
        names(message, f"rows:{number}: 'messages' must be one of the user", f"(roles: {roles})")
    names(message, "rows:6: 'messages': the content of a message is not text")


# ----------------------------------------------------------------------------------- words of YAML


def settings_of(folder: Path, text: str) -> TrainConfig:
    file = folder / "settings.yaml"
    file.write_text(text, encoding="utf-8")
    config: TrainConfig = load_config(TrainConfig, file, {})
    return config


def test_numbers_and_booleans_in_a_label_map(tmp_path: Path) -> None:
    for text, expected in {
        # as written: 01 is not 1, and 1.10 not 1.1
        "{01: a, 1.10: b, 1_0: c, 2020-01-01: d}": {"01": "a", "1.10": "b", "1_0": "c", "2020-01-01": "d"},
        "{true: a, False: b}": {"true": "a", "False": "b"},
        "{a: 0, b: 007, c: true}": {"a": "0", "b": "007", "c": "true"},
        "{'no': 'yes', \"on\": ' off'}": {"no": "yes", "on": " off"},
    }.items():
        assert settings_of(tmp_path, f"label_map: {text}\n").label_map == expected
    assert settings_of(tmp_path, "labels: [0, 1.50, ' a', '010']").labels == ["0", "1.50", " a", "010"]
    assert settings_of(tmp_path, "balanced: yes\nnum_examples: 8.0\n").num_examples == 8
    format = RowFormat("{t}", "{y}", {"true": "a", "False": "b"})
    rows = [{"t": "1", "y": True}, {"t": "2", "y": False}]
    assert Examples.from_rows(rows, format=format).answers == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("labels: [no, yes]", "no"),
        ("seed: 1\nlabels:\n- x\n- Yes\n", "Yes"),
        ("label_map: {no: a, b: c}", "no"),
        ("label_map: {0: no, 1: yes}", "no"),
        ("label_map:\n  a: &x b\n  off: *x\n", "off"),
    ],
)
def test_an_unquoted_no_is_explained(tmp_path: Path, text: str, word: str) -> None:
    with pytest.raises(ConfigError) as info:
        settings_of(tmp_path, text)
    line = next(i for i, row in enumerate(text.splitlines(), 1) if re.search(rf"\b{word}\b", row))
    names(
        said(info),
        f"settings.yaml: line {line}: YAML takes {word} without quotation marks",
        f"write '{word}'",
    )
    # and what it says is accepted, word by word
    for _ in range(4):
        try:
            settings_of(tmp_path, text)
            return
        except ConfigError as error:
            quoted = str(error).rsplit("write ", 1)[1]
            text = re.sub(rf"(?<!['\w]){quoted.strip(chr(39))}(?!['\w])", quoted, text, count=1)
    raise AssertionError(text)


def test_words_of_benchmarks_and_grids(tmp_path: Path, ia2: Ia2) -> None:
    entry = tmp_path / "own.yaml"
    text = "name: Own\npath: own\ntest: {split: test, rows: 9}\nprompt: '{text}'\nlabel: label\n"
    for words in ("0: no, 1: ' b'", "no: a, 1: ' b'"):
        entry.write_text(f"{text}verbalisers: {{w: {{{words}}}}}\n")
        names(ia2("benchmarks", "show", entry).refusal(), "YAML takes no without quotation marks for false")
    entry.write_text(f"{text}verbalisers: {{w: {{01: ' a', true: ' b'}}}}\n")
    assert load_benchmark(entry).verbalisers == {"w": {"01": " a", "true": " b"}}
    grid = tmp_path / "grid.yaml"
    grid.write_text("benchmarks: [Intents]\nmodels: [demo]\nrecipes: [sft]\nsettings: {labels: [no, b]}\n")
    names(ia2("sweep", grid).refusal(), "line 4: YAML takes no without")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("sft: {learning_rate: on}", "sft.learning_rate: true is no number"),
        ("learning_rates: [true]", "learning_rates: true is no number"),
        ("seed: 010", "line 1: '010' is another number to YAML than it seems"),
        ("num_examples: 1:30", "line 1: '1:30' is another number to YAML"),
        ("chat: off", "YAML takes no and off without quotation marks for false"),
    ],
)
def test_what_yaml_makes_another_value_of(tmp_path: Path, text: str, reason: str) -> None:
    """A switch where a number belongs counted as 1, ``010`` as 8."""
    with pytest.raises(ConfigError) as info:
        settings_of(tmp_path, text)
    names(said(info), reason)
