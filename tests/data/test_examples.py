"""Rows become examples: templates, columns, cells; files, folders and the hub."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import names
from helpers.example_rows import REVIEWS, jsonl, refuse, said
from hypothesis import given, settings
from hypothesis import strategies as st

from ia2.data.examples import Example, Examples, RowFormat
from ia2.data.rows import unescape
from ia2.utils.errors import ConfigError, DataError

ROW = {"prompt": "a", "completion": "b"}


def test_a_sequence_of_examples() -> None:
    examples = Examples.from_rows(
        [{"prompt": "a ", "completion": " x"}, {"prompt": "b", "completion": "y\n"}], name="mine"
    )
    assert list(examples) == [Example("a ", " x", "mine:1"), Example("b", "y\n", "mine:2")]
    assert isinstance(examples[:1], Examples) and examples[:1].name == "mine"
    assert examples.answers == [" x", "y\n"]
    assert examples[0].fields == {"prompt": "a ", "completion": " x"}
    assert pickle.loads(pickle.dumps(examples)).fingerprint == examples.fingerprint
    assert Examples.from_rows([ROW], sources=["sheet!A2"])[0].source == "sheet!A2"


def test_fingerprint_depends_on_queries_answers_and_order_only() -> None:
    rows = [ROW, {"prompt": "c", "completion": "d"}]
    own = Examples.from_rows(rows).fingerprint
    assert len(own) == 16 and int(own, 16) >= 0
    assert Examples.from_rows(rows, name="else").fingerprint == own
    others = [
        Examples.from_rows(rows[::-1]),
        Examples.from_rows(rows[:1]),
        Examples.from_rows(rows, labelled=False),
        Examples.from_rows([{"prompt": "ab", "completion": "x"}, rows[1]]),
        Examples([Example("q", None, "s")]),
        Examples([Example("q", "None", "s")]),
    ]
    assert len({own, *(other.fingerprint for other in others)}) == 7


def test_raw_labels_are_those_of_one_column() -> None:
    rows = [{"text": "x", "label": 1}, {"text": "y", "label": 0}, {"text": "z", "label": 1}]
    examples = Examples.from_rows(rows, format=REVIEWS)
    assert list(examples.raw_labels.items()) == [(" negative", 0), (" positive", 1)]
    assert examples[:1].raw_labels == {" positive": 1}
    row = {"prompt": "p", "completion": "0", "b": "1"}
    mapped = RowFormat(label_map={"0": "no"})
    for format, raw in (
        (RowFormat(), {}),
        (mapped, {"no": "0"}),
        (RowFormat(completion_template="{b}{b}"), {"11": "1"}),
        (RowFormat(completion_template="{completion}{b}"), {}),
    ):
        assert Examples.from_rows([row], format=format).raw_labels == raw
    assert Examples.from_rows([row], format=mapped, labelled=False).raw_labels == {}


def test_unlabelled_rows() -> None:
    format = RowFormat("{text}", " {nowhere}", {"a": "b"})
    examples = Examples.from_rows([{"text": "x", "label": None}], format=format, labelled=False)
    assert examples[0].answer is None
    with pytest.raises(DataError, match=r"rows: .*rows:1"):
        _ = examples.answers


# Templates


def test_templates_keep_text_verbatim() -> None:
    format = RowFormat("{{{a}}} {b}\\n\n ", " {a}")
    (example,) = Examples.from_rows([{"a": "{b} \n", "b": "{0.x}"}], format=format)
    assert (example.query, example.answer) == ("{{b} \n} {0.x}\\n\n ", " {b} \n")


@pytest.mark.parametrize("name", ["Review Text", "0", "größe", "a-b", "a/b"])
def test_any_column_name_without_dots_and_brackets(name: str) -> None:
    format = RowFormat(f"{{{name}}}", f"{{{name}}}")
    assert Examples.from_rows([{name: "v"}], format=format)[0].query == "v"


@pytest.mark.parametrize(
    "template",
    [
        *("{a.__class__}", "{a[0]}", "{a!r}", "{a:>9}", "{a:{b}}", "{a!s:x}", "{a\n.b}"),
        *("Text: {text", "}", r"\boxed{}", "x", "{{text}}", ""),
    ],
)
def test_other_templates_are_refused(template: str) -> None:
    for format in ({"prompt_template": template}, {"completion_template": template}):
        with pytest.raises(DataError) as info:
            RowFormat(**format)
        assert repr(template) in said(info)


plain_names = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=6)
cells = st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=12)


@given(
    row=st.dictionaries(plain_names, cells.filter(str.strip), min_size=1, max_size=4),
    literals=st.lists(st.text(max_size=6), min_size=5, max_size=5),
)
@settings(max_examples=100, deadline=None)
def test_templates_put_literals_and_cells_together(row: dict[str, str], literals: list[str]) -> None:
    template = wanted = ""
    for literal, (name, value) in zip(literals, row.items(), strict=False):
        template += literal.replace("{", "{{").replace("}", "}}") + f"{{{name}}}"
        wanted += literal + value
    (example,) = Examples.from_rows([row], format=RowFormat(template, template))
    assert example.query == example.answer == wanted


@given(st.text(alphabet="\\nt\n\tab"))
@settings(deadline=None)
def test_unescape_undoes_escaping(text: str) -> None:
    typed = text.replace("\\", r"\\").replace("\n", r"\n").replace("\t", r"\t")
    assert unescape(typed) == text
    assert unescape(r"\boxed{{x}}") == r"\boxed{{x}}"


# Columns and cells


def test_a_template_with_an_unknown_column() -> None:
    message = refuse({"txt": "a", "label": 0})
    names(message, "'text'", "'txt', 'label'", "Did you mean 'txt'?", "'Text: {text}\\nLabel:'")
    names(refuse({f"c{i}": i for i in range(300)}), "(300 in all)")
    message = refuse({"tex": "a", "label": 0}, {"text": "b", "label": 0}, {"text": "c"})
    names(
        message, "2 bad rows", "rows:1: no column 'text' (Did you mean 'tex'?)", "rows:3: no column 'label'"
    )


def test_without_templates_the_message_shows_flags_that_work(tmp_path: Path) -> None:
    message = refuse({"id": 1, "sentence": "fine", "label": 1}, format=RowFormat())
    names(message, "'prompt'", "'completion'", "'id', 'sentence', 'label'")
    assert message.endswith(
        r"--prompt-template 'Sentence: {sentence}\nLabel:' --completion-template ' {label}'"
    )
    message = refuse({"prompt": "x", "zahl": 1}, format=RowFormat())
    assert "--prompt-template" not in message and "--completion-template ' {zahl}'" in message
    path = jsonl(tmp_path / "a.jsonl", {"headline": "h", "sport": True})
    with pytest.raises(DataError) as info:
        Examples.from_file(path)
    _, prompt, _, completion, _ = said(info).split("'")[-5:]
    examples = Examples.from_file(path, format=RowFormat(unescape(prompt), completion))
    assert (examples[0].query, examples[0].answer) == ("Headline: h\nLabel:", " True")


def test_numbers_and_booleans_are_written_out() -> None:
    numpy = pytest.importorskip("numpy")
    for value, text in ((3, "3"), (-1.5, "-1.5"), (True, "True"), (numpy.int64(1), "1"), ("x ", "x ")):
        (example,) = Examples.from_rows([{"t": value}], format=RowFormat("{t}", " {t}"))
        assert (example.query, example.answer) == (text, f" {text}")
    format = RowFormat("{title} {body}", " {label}")  # one blank column of several is fine
    assert Examples.from_rows([{"title": "", "body": "b", "label": "x"}], format=format)[0].query == " b"


def test_the_label_map_applies_to_the_completion_only() -> None:
    format = RowFormat("{a} {b}", "{a}", {"x": "y"})
    (example,) = Examples.from_rows([{"a": "x", "b": "x"}], format=format)
    assert (example.query, example.answer) == ("x x", "y")
    for keys in (("true", "false"), ("True", "False")):
        format = RowFormat("{t}", " {y}", {keys[0]: "yes", keys[1]: "no"})
        rows = [{"t": "a", "y": True}, {"t": "b", "y": False}]
        assert Examples.from_rows(rows, format=format).raw_labels == {" yes": True, " no": False}
    format = RowFormat("{t}", " {y}", {"positive": "1", "negative": "0"})
    message = refuse({"t": "a", "y": "postive"}, {"t": "a", "y": 3}, format=format)
    names(message, "rows:1: ", "'y'", "'postive'", "Did you mean 'positive'?", "rows:2: ", "'negative'")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": None, "label": 0}, "'text' is missing"),
        ({"text": float("nan"), "label": 0}, "'text' is missing"),
        ({"text": " \n", "label": 0}, "empty prompt"),
        ({"text": "a", "label": " "}, "empty completion"),
        ({"text": "a", "label": {"x": 1}}, "'label' is a dict"),
        ({"text": b"a", "label": 0}, "'text' is a bytes"),
        ({"text": "a \ud800", "label": 0}, "surrogate"),
        ({"text": None, "label": []}, "'label' is a list"),
        ({"text": "a", "label": 2}, "empty after rendering"),
        (["a"], "a list"),
    ],
)
def test_bad_cells(row: Any, reason: str) -> None:
    format = RowFormat("{text}", "{label}", {"0": "no", "2": ""})
    message = refuse({"text": "fine", "label": 0}, row, format=format)
    assert message.startswith("rows: 1 bad row: rows:2: ") and reason in message


def test_every_bad_row_is_counted_and_twenty_are_shown() -> None:
    message = refuse(*[{"text": "a", "label": 7}] * 25, {"text": "a", "label": 0})
    names(message, "rows: 25 bad rows: rows:1: ", "rows:20: ", "and 5 more")
    assert "rows:21: " not in message
    assert "rows is empty" in refuse()


# Files


def test_every_fault_of_a_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(
        b'{"prompt": "a", "completion": "b"}\n'
        b'{"prompt": "a" "completion": "b"}\n["a", "b"]\n{"prompt": "caf\xe9", "completion": "b"}\n\n'
        b'{"prompt": "a"}\n' + b"[" * 100_000 + b"\n"
    )
    with pytest.raises(DataError) as info:
        Examples.from_file(path)
    named = [f"bad.jsonl:{line}: " for line in (2, 3, 4, 6, 7)]
    names(said(info), f"{path}: 5 bad rows: ", *named, "not UTF-8", "no column 'completion'")
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,label\na,b,0\n"x\ny",2\ncaf\xe9,0\nfine,0\n"a"b,0\na,\n"never closed,0\n\n')
    with pytest.raises(DataError) as info:
        Examples.from_file(path, format=REVIEWS)
    named = [f"a.csv:{line}: " for line in (2, 3, 5, 7, 8, 9)]
    names(said(info), f"{path}: 6 bad rows: ", *named, "3 values", "'2'", "not UTF-8", "never closed")


def test_sources_are_lines_or_places(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbftext,label\r\n"one, ""two""\nthree",0\r\n\r\nfour,1\r\n')
    examples = Examples.from_file(path, format=REVIEWS)
    assert [example.source for example in examples] == ["a.csv:2", "a.csv:5"]
    assert examples[0].fields == {"text": 'one, "two"\nthree', "label": "0"}
    path = tmp_path / "a.json"
    path.write_text('\n[{"prompt": "a",\n"completion": "b"}, {"prompt": "c", "completion": "d"}]')
    assert [e.source for e in Examples.from_file(path)] == ["a.json:1", "a.json:2"]
    path.write_text('[{"prompt": "a"},\n{"completion" "b"}]')
    with pytest.raises(DataError, match=r"a\.json: invalid JSON at line 2, column 15"):
        Examples.from_file(path)


def test_names_of_files_that_cannot_be_read(tmp_path: Path) -> None:
    jsonl(tmp_path / "reviews.jsonl", ROW)
    (tmp_path / "a.xlsx").touch()
    for name, told in (("review.jsonl", "reviews.jsonl"), ("no/a.csv", "no"), ("a.xlsx", ".parquet")):
        with pytest.raises(DataError) as info:
            Examples.load(tmp_path / name)
        names(said(info), name, told)
    for option in ("split", "config", "revision"):
        with pytest.raises(ConfigError, match=f"it has no {option} 'x'"):
            Examples.load(tmp_path / "reviews.jsonl", **{option: "x"})
    with pytest.raises(ConfigError, match="it has no revision 'x'"):
        Examples.load(tmp_path, revision="x")


# The hub


@pytest.mark.parametrize("source", ["imdb", "/no/such", "./reviews", "a/b/c", "~x/y", "a/b.csv"])
def test_what_is_not_taken_for_a_hub_id(source: str) -> None:
    with pytest.raises(DataError, match="no such file"):
        Examples.load(source)


def test_a_folder_as_datasets_writes_it(offline: Path) -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    (offline / "hub" / "data").mkdir(parents=True)
    data.to_parquet(offline / "hub" / "data" / "train-00000-of-00001.parquet")
    examples = Examples.load("hub", format=REVIEWS)
    assert examples.answers == [" positive", " negative"]
    assert examples[0].source == "hub/data/train-00000-of-00001.parquet:1"
    assert len(Examples.load("hub", split="train[:1]", format=REVIEWS)) == 1


def test_the_hub_cannot_be_reached(offline: Path) -> None:
    with pytest.raises(DataError, match=r"owner/name: .*HF_HUB_OFFLINE"):
        Examples.load("owner/name")
    (offline / "data").mkdir()
    jsonl(offline / "data" / "reviews.jsonl", {})
    with pytest.raises(DataError, match=r"Did you mean 'reviews\.jsonl'\?"):
        Examples.load("data/reviews")


def test_what_reaches_the_hub_and_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return [ROW]

    monkeypatch.setattr(datasets, "load_dataset", load)
    examples = Examples.load("o/n", split="test", config="c", revision="r")
    assert asked == [(("o/n", "c"), {"split": "test", "revision": "r"})]
    assert (examples.name, examples[0].source) == ("o/n", "o/n[test]:1")

    def refusal(error: Exception) -> str:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(datasets, "load_dataset", fail)
        with pytest.raises(DataError, match=r"^owner/name: ") as info:
            Examples.load("owner/name")
        return said(info)

    assert "Please pick one: ['a', 'b']" in refusal(ValueError("missing.\nPlease pick one: ['a', 'b']"))
    line = refusal(datasets.exceptions.DatasetNotFoundError("no " * 500))
    assert "hf auth login" in line and len(line) < 600
