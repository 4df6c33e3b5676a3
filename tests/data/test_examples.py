"""Rows become examples: templates, columns, cells."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import names
from helpers.example_rows import REVIEWS, jsonl, refuse, said
from hypothesis import given, settings
from hypothesis import strategies as st

from ia2.data.examples import Example, Examples, RowFormat, unescape
from ia2.utils.errors import ConfigError, DataError


def test_a_sequence_of_examples() -> None:
    examples = Examples.from_rows(
        [{"prompt": "a ", "completion": " x"}, {"prompt": "b", "completion": "y\n"}], name="mine"
    )
    assert list(examples) == [Example("a ", " x", "mine:1"), Example("b", "y\n", "mine:2")]
    assert examples[-1].answer == "y\n"
    assert isinstance(examples[:1], Examples)
    assert len(examples[:1]) == 1
    assert examples[:1].name == "mine"
    assert examples.answers == [" x", "y\n"]
    assert examples[0].fields == {"prompt": "a ", "completion": " x"}
    assert repr(examples) == "Examples(name='mine', rows=2)"
    assert examples[1] in examples
    assert pickle.loads(pickle.dumps(examples)).fingerprint == examples.fingerprint
    with pytest.raises(IndexError):
        examples[2]


def test_fields_take_no_part_in_equality_or_repr() -> None:
    one, other = Example("q", "a", "f:1", {"x": 1}), Example("q", "a", "f:1", {"x": 2})
    assert one == other
    assert hash(one) == hash(other)
    assert "fields" not in repr(one)


def test_fingerprint_depends_on_queries_answers_and_order_only() -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    print_ = Examples.from_rows(rows).fingerprint
    assert len(print_) == 16
    assert int(print_, 16) >= 0
    assert Examples.from_rows(rows, name="else").fingerprint == print_
    others = [
        Examples.from_rows(rows[::-1]),
        Examples.from_rows(rows[:1]),
        Examples.from_rows(rows, labelled=False),
        Examples.from_rows([{"prompt": "ab", "completion": "x"}, rows[1]]),
    ]
    assert len({print_, *(other.fingerprint for other in others)}) == 5
    none = Examples([Example("q", None, "s")])
    assert none.fingerprint != Examples([Example("q", "None", "s")]).fingerprint


def test_labels() -> None:
    examples = Examples.from_rows(
        [{"text": "x", "label": 1}, {"text": "y", "label": 0}, {"text": "z", "label": 1}],
        format=REVIEWS,
    )
    assert examples.answers == [" positive", " negative", " positive"]
    assert examples.label_set() == (" negative", " positive")
    assert examples.raw_labels == {" negative": 0, " positive": 1}
    assert list(examples.raw_labels) == [" negative", " positive"]
    assert examples[:1].raw_labels == {" positive": 1}


def test_raw_labels_need_one_column() -> None:
    row = {"prompt": "p", "completion": "0", "b": "1"}
    assert Examples.from_rows([row]).raw_labels == {}
    mapped = RowFormat(label_map={"0": "no"})
    assert Examples.from_rows([row], format=mapped).raw_labels == {"no": "0"}
    twice = RowFormat(completion_template="{b}{b}")
    assert Examples.from_rows([row], format=twice).raw_labels == {"11": "1"}
    two = RowFormat(completion_template="{completion}{b}")
    assert Examples.from_rows([row], format=two).raw_labels == {}
    assert Examples.from_rows([row], format=mapped, labelled=False).raw_labels == {}


def test_unlabelled_rows() -> None:
    format = RowFormat("{text}", " {nowhere}", {"a": "b"})
    examples = Examples.from_rows([{"text": "x", "label": None}], format=format, labelled=False)
    assert examples[0].answer is None
    with pytest.raises(DataError, match=r"rows: the rows are not labelled \(rows:1 is the first"):
        _ = examples.answers
    with pytest.raises(DataError):
        examples.label_set()
    assert "no column 'prompt'; there are 'txt'" in refuse({"txt": "x"}, format=RowFormat(), labelled=False)


def test_own_sources() -> None:
    rows = [{"prompt": "a", "completion": "b"}]
    assert Examples.from_rows(rows, sources=["sheet!A2"])[0].source == "sheet!A2"
    with pytest.raises(ConfigError, match="2 sources were given for 1 rows"):
        Examples.from_rows(rows, sources=["x", "y"])


def test_import_stays_light() -> None:
    code = (
        "import sys, ia2.data.examples; "
        "assert not {'torch', 'transformers', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Templates


def test_templates_keep_text_verbatim() -> None:
    format = RowFormat("{{{a}}} {b}\n ", " {a}")
    (example,) = Examples.from_rows([{"a": "{b} \n", "b": "{0.x}"}], format=format)
    assert example.query == "{{b} \n} {0.x}\n "
    assert example.answer == " {b} \n"


@pytest.mark.parametrize("name", ["Review Text", "0", "größe", "a-b", "a/b"])
def test_any_column_name_without_dots_and_brackets(name: str) -> None:
    format = RowFormat(f"{{{name}}}", f"{{{name}}}")
    assert Examples.from_rows([{name: "v"}], format=format)[0].query == "v"


@pytest.mark.parametrize(
    "template",
    ["{a.__class__}", "{a[0]}", "{a!r}", "{a:>9}", "{a:{b}}", "{a.b.c}", "{a!s:x}"],
)
def test_templates_allow_plain_names_only(template: str) -> None:
    with pytest.raises(DataError, match="must be the plain name of a column") as info:
        RowFormat(prompt_template=template)
    assert repr(template) in said(info)
    with pytest.raises(DataError, match="completion template"):
        RowFormat(completion_template=template)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("Text: {text", "is malformed"),
        ("Text: }", "write {{ and }} for literal braces"),
        (r"\boxed{}", "has an empty {}"),
        ("Text:\nLabel:", "names no column"),
        ("{{text}}", "names no column"),
        ("", "names no column"),
    ],
)
def test_malformed_templates(template: str, words: str) -> None:
    with pytest.raises(DataError) as info:
        RowFormat(prompt_template=template)
    assert words in said(info)


plain_names = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=6)
cells = st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=12)


@given(
    row=st.dictionaries(plain_names, cells.filter(str.strip), min_size=1, max_size=4),
    literals=st.lists(st.text(max_size=6), min_size=5, max_size=5),
)
@settings(max_examples=150, deadline=None)
def test_templates_put_literals_and_cells_together(row: dict[str, str], literals: list[str]) -> None:
    template = wanted = ""
    for literal, (name, value) in zip(literals, row.items(), strict=False):
        template += literal.replace("{", "{{").replace("}", "}}") + f"{{{name}}}"
        wanted += literal + value
    (example,) = Examples.from_rows([row], format=RowFormat(template, template))
    assert example.query == example.answer == wanted


@given(st.text(max_size=20))
@settings(deadline=None)
def test_any_template_is_taken_or_refused_as_data_error(template: str) -> None:
    try:
        RowFormat(template)
    except DataError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r"Text: {text}\nLabel:", "Text: {text}\nLabel:"),
        (r"a\tb", "a\tb"),
        (r"a\\nb", r"a\nb"),
        (r"\\\n", "\\\n"),
        (r"\boxed{{x}}", r"\boxed{{x}}"),
        ("trailing\\", "trailing\\"),
        ("already\n", "already\n"),
    ],
)
def test_unescape(typed: str, meant: str) -> None:
    assert unescape(typed) == meant


@given(st.text(alphabet="\\nt\n\tab"))
@settings(deadline=None)
def test_unescape_undoes_escaping(text: str) -> None:
    typed = text.replace("\\", r"\\").replace("\n", r"\n").replace("\t", r"\t")
    assert unescape(typed) == text


def test_row_format_does_not_unescape() -> None:
    assert Examples.from_rows([{"a": "x"}], format=RowFormat(r"{a}\n", "{a}"))[0].query == r"x\n"


# Columns


def test_a_template_with_an_unknown_column() -> None:
    message = refuse({"txt": "a", "label": 0})
    names(message, "'text'", "'txt', 'label'", "Did you mean 'txt'?", "'Text: {text}\\nLabel:'")
    message = refuse({"text": "a", "id": 3}, {"text": "a"})
    names(message, "completion template ' {label}'", "'label'", "'text', 'id'")


def test_without_templates_the_message_shows_the_flags() -> None:
    message = refuse({"id": 1, "sentence": "fine", "label": 1}, format=RowFormat())
    names(message, "'prompt'", "'completion'", "'id', 'sentence', 'label'")
    assert r"--prompt-template 'Sentence: {sentence}\nLabel:'" in message
    assert "--completion-template ' {label}'" in message
    message = refuse({"prompt": "x", "zahl": 1}, format=RowFormat())
    assert "--prompt-template" not in message
    assert "--completion-template ' {zahl}'" in message
    message = refuse({"x": "text"}, format=RowFormat())
    assert message.endswith(r"for example --prompt-template 'X: {x}\nLabel:'")


def test_the_flags_shown_work(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"headline": "h", "sport": True})
    with pytest.raises(DataError) as info:
        Examples.from_file(path)
    _, prompt, _, completion, _ = said(info).split("'")[-5:]
    examples = Examples.from_file(path, format=RowFormat(unescape(prompt), completion))
    assert (examples[0].query, examples[0].answer) == ("Headline: h\nLabel:", " True")


def test_messages_stay_on_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="plain name") as info:
        RowFormat("{a\n.b}")
    said(info)
    row = {"the\ntext": "a", "the\nlabel": "b"}
    message = refuse(row, format=RowFormat())
    assert r"--prompt-template 'The\ntext: {the\ntext}\nLabel:'" in message
    # a name that one line cannot show is not suggested
    assert "Did you mean" not in refuse(row, format=RowFormat("{the text}", "{the\nlabel}"))
    refuse(row, {"the text": "a"}, format=RowFormat("{the text}", "{the\nlabel}"))
    assert "not in the label map" in refuse(
        {"prompt": "p", "completion": "a\nb"}, format=RowFormat(label_map={"a b\n": "x"})
    )


def test_a_column_missing_from_some_rows_only() -> None:
    message = refuse({"tex": "a", "label": 0}, {"text": "b", "label": 0}, {"text": "c"}, {"text": "d"})
    assert message == (
        "rows: 3 bad rows: rows:1: no column 'text' (Did you mean 'tex'?); "
        "rows:3: no column 'label'; rows:4: no column 'label'"
    )


def test_many_columns_are_cut_short() -> None:
    message = refuse({f"c{i}": i for i in range(300)})
    assert "(300 in all)" in message
    assert len(message) < 600


# Cells


@pytest.mark.parametrize(
    ("value", "text"),
    [(3, " 3"), (-1.5, " -1.5"), (True, " True"), (False, " False"), (0, " 0"), ("x ", " x ")],
)
def test_numbers_and_booleans_are_written_out(value: Any, text: str) -> None:
    row = {"text": value, "label": value}
    (example,) = Examples.from_rows([row], format=RowFormat("{text}", " {label}"))
    assert example.query == text[1:]
    assert example.answer == text


def test_numpy_scalars_are_cells() -> None:
    numpy = pytest.importorskip("numpy")
    rows = [{"text": numpy.str_("a"), "label": numpy.int64(1)}]
    assert Examples.from_rows(rows, format=REVIEWS)[0].answer == " positive"
    assert "column 'text' is a ndarray, not text" in refuse({"text": numpy.zeros(2), "label": 0})


@pytest.mark.parametrize("keys", [("true", "false"), ("True", "False")])
def test_booleans_in_the_label_map(keys: tuple[str, str]) -> None:
    format = RowFormat("{t}", " {y}", {keys[0]: "yes", keys[1]: "no"})
    examples = Examples.from_rows([{"t": "a", "y": True}, {"t": "b", "y": False}], format=format)
    assert examples.answers == [" yes", " no"]
    assert examples.raw_labels == {" yes": True, " no": False}


def test_label_map_applies_to_the_completion_only() -> None:
    format = RowFormat("{a} {b}", "{a}", {"x": "y"})
    (example,) = Examples.from_rows([{"a": "x", "b": "x"}], format=format)
    assert (example.query, example.answer) == ("x x", "y")
    assert Examples.from_rows(
        [{"prompt": "x", "completion": "x"}], format=RowFormat(label_map={"x": " y"})
    ).answers == [" y"]


def test_a_label_that_is_not_in_the_map() -> None:
    format = RowFormat("{t}", " {y}", {"positive": "1", "negative": "0"})
    message = refuse({"t": "a", "y": "postive"}, {"t": "a", "y": 3}, format=format)
    names(message, "rows:1: column 'y'", "'postive'", "Did you mean 'positive'?", "rows:2: column 'y'")
    assert message.endswith("('positive', 'negative')")
    assert "'True'" in refuse({"t": "a", "y": "True"}, format=RowFormat("{t}", "{y}", {"true": "x"}))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": None, "label": 0}, "column 'text' is missing (null)"),
        ({"text": float("nan"), "label": 0}, "column 'text' is missing (null)"),
        ({"text": "", "label": 0}, "empty prompt ('text')"),
        ({"text": " \n", "label": 0}, "empty prompt ('text')"),
        ({"text": "a", "label": None}, "column 'label' is missing (null)"),
        ({"text": "a", "label": ""}, "empty completion ('label')"),
        ({"text": "a", "label": " "}, "empty completion ('label')"),
        ({"text": ["a"], "label": 0}, "column 'text' is a list, not text"),
        ({"text": "a", "label": {"x": 1}}, "column 'label' is a dict, not text"),
        ({"text": b"a", "label": 0}, "column 'text' is a bytes, not text"),
        ({"text": "a \ud800", "label": 0}, "the prompt holds a surrogate, which is not"),
        ({"text": None, "label": []}, "(null) and column 'label' is a list, not text"),
    ],
)
def test_bad_cells(row: dict[str, Any], reason: str) -> None:
    message = refuse({"text": "fine", "label": 0}, row)
    assert message.startswith("rows: 1 bad row: rows:2: ")
    assert reason in message


def test_an_answer_mapped_to_nothing_is_empty() -> None:
    format = RowFormat("{t}", " {y}", {"0": ""})
    assert "the completion is empty after rendering" in refuse({"t": "a", "y": 0}, format=format)


def test_one_blank_column_of_several_is_fine() -> None:
    format = RowFormat("{title} {body}", " {label}")
    rows = [{"title": "", "body": "b", "label": "x"}]
    assert Examples.from_rows(rows, format=format)[0].query == " b"


def test_every_bad_row_is_counted_and_twenty_are_shown() -> None:
    rows = [{"text": "a", "label": 7}] * 25 + [{"text": "a", "label": 0}]
    message = refuse(*rows)
    assert message.startswith("rows: 25 bad rows: rows:1: ")
    assert "rows:20: " in message
    assert "rows:21: " not in message
    assert message.endswith("; and 5 more")


def test_rows_that_are_no_objects() -> None:
    message = refuse(["a"], "text", None, {"text": "a", "label": 0})
    names(message, "rows:1: ", "a list; rows:2: ", "a str; rows:3: ", "null")


def test_no_rows() -> None:
    assert "rows is empty" in refuse()
