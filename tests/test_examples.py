from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ia2.errors import ConfigError, DataError, UserError
from ia2.examples import Example, Examples, FewShotSplit, RowFormat, unescape

REVIEWS = RowFormat("Text: {text}\nLabel:", " {label}", {"0": "negative", "1": "positive"})


def jsonl(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def rows_of(answers: list[str]) -> Examples:
    return Examples.from_rows([{"prompt": f"q{i}", "completion": answer} for i, answer in enumerate(answers)])


def said(info: pytest.ExceptionInfo[UserError]) -> str:
    message = str(info.value)
    assert "\n" not in message
    return message


def refuse(*rows: Any, format: RowFormat = REVIEWS, labelled: bool = True) -> str:
    with pytest.raises(DataError) as info:
        Examples.from_rows(rows, format=format, labelled=labelled)
    return said(info)


def queries(examples: Examples) -> set[str]:
    return {example.query for example in examples}


# The container


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
        "import sys, ia2.examples; "
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
    assert "the column 'text'; there are 'txt', 'label'. Did you mean 'txt'?" in message
    assert "prompt template 'Text: {text}\\nLabel:'" in message
    message = refuse({"text": "a", "id": 3}, {"text": "a"})
    assert "the completion template ' {label}' names the column 'label'" in message
    assert message.endswith("there are 'text', 'id'")


def test_without_templates_the_message_shows_the_flags() -> None:
    message = refuse({"id": 1, "sentence": "fine", "label": 1}, format=RowFormat())
    assert "no column 'prompt' or 'completion'; there are 'id', 'sentence', 'label'" in message
    assert r"--prompt-template 'Sentence: {sentence}\nLabel:'" in message
    assert "--completion-template ' {label}'" in message
    message = refuse({"prompt": "x", "zahl": 1}, format=RowFormat())
    assert "--prompt-template" not in message
    assert "--completion-template ' {zahl}'" in message
    message = refuse({"x": "text"}, format=RowFormat())
    assert r"--prompt-template 'X: {x}\nLabel:' --completion-template ' {label}'" in message


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
    assert "Did you mean" in refuse(row, format=RowFormat("{the text}", "{the\nlabel}"))
    assert "Did you mean" in refuse(row, {"the text": "a"}, format=RowFormat("{the text}", "{the\nlabel}"))
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
    assert "rows:1: column 'y' has the label 'postive', which is not in the label map" in message
    assert "('positive', 'negative'). Did you mean 'positive'?; rows:2: column 'y'" in message
    assert message.endswith("('positive', 'negative')")
    assert "the label 'True'" in refuse(
        {"t": "a", "y": "True"}, format=RowFormat("{t}", "{y}", {"true": "x"})
    )


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
    assert "rows:1: not an object with columns but a list" in message
    assert "rows:2: not an object with columns but a str" in message
    assert "rows:3: not an object with columns but null" in message


def test_no_rows() -> None:
    assert "rows is empty" in refuse()


# Files


def test_jsonl(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "reviews.jsonl", {"text": "ä\u2028b", "label": 0}, "", {"text": "c", "label": 1})
    examples = Examples.from_file(path, format=REVIEWS)
    assert examples.name == "reviews.jsonl"
    assert [example.source for example in examples] == ["reviews.jsonl:1", "reviews.jsonl:3"]
    assert examples[0].query == "Text: ä\u2028b\nLabel:"
    for suffix in (".ndjson", ".json", ".JSONL"):
        other = path.rename(path.with_suffix(suffix))
        assert Examples.from_file(str(other), format=REVIEWS).fingerprint == examples.fingerprint
        path = other


def test_jsonl_with_a_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}\r\n\r\n')
    assert Examples.from_file(path).answers == ["b"]


def test_every_fault_of_a_jsonl_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(
        b'{"prompt": "a", "completion": "b"}\n'
        b'{"prompt": "a" "completion": "b"}\n'
        b'["a", "b"]\n'
        b'{"prompt": "caf\xe9", "completion": "b"}\n'
        b'{"prompt": "a", "completion": ""}\n'
        b'{"prompt": "a"}\n'
        b"\n"
        b'{"prompt": "a", "completion": NaN}\n' + b'{"prompt": "a", "completion": "b"'
        b"\n" + b"[" * 100_000 + b"\n"
    )
    with pytest.raises(DataError) as info:
        Examples.from_file(path)
    message = said(info)
    assert message.startswith(f"{path}: 8 bad rows: bad.jsonl:2: invalid JSON at column 16 (Exp")
    for part in (
        "bad.jsonl:3: not an object with columns but a list",
        "bad.jsonl:4: not UTF-8 text (byte 16 of the line)",
        "bad.jsonl:5: empty completion ('completion')",
        "bad.jsonl:6: no column 'completion'",
        "bad.jsonl:8: column 'completion' is missing (null)",
        "bad.jsonl:9: invalid JSON at column ",
        "bad.jsonl:10: invalid JSON",
    ):
        assert part in message


def test_a_json_array_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"prompt": "a", "completion": "b"}]')
    with pytest.raises(DataError, match=r"JSON array.*jq -c '\.\[\]' a\.json > a\.jsonl"):
        Examples.from_file(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "a.json"])
@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_files(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=rf"{name} is empty"):
        Examples.from_file(path)


def test_csv_and_tsv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbftext,label\r\n"one, ""two""\nthree",0\r\n\r\nfour,1\r\n"five\n\nsix",1')
    examples = Examples.from_file(path, format=REVIEWS)
    assert [example.source for example in examples] == ["a.csv:2", "a.csv:5", "a.csv:6"]
    assert examples[0].fields == {"text": 'one, "two"\nthree', "label": "0"}
    assert examples.raw_labels == {" negative": "0", " positive": "1"}
    path = tmp_path / "a.tsv"
    path.write_text("text\tlabel\na, b\t1\n")
    assert Examples.from_file(path, format=REVIEWS)[0].query == "Text: a, b\nLabel:"


def test_every_fault_of_a_csv_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'text,label\na,b,0\na\n"x\ny",2\ncaf\xe9,0\nfine,0\n"a"b,0\n,1\na,\n"never closed,0\n\n'
    )
    with pytest.raises(DataError) as info:
        Examples.from_file(path, format=REVIEWS)
    message = said(info)
    assert f"{path}: 8 bad rows: " in message
    for part in (
        "a.csv:2: 3 values for the 2 columns 'text', 'label'",
        "a.csv:3: 1 values for the 2 columns",
        "a.csv:4: column 'label' has the label '2'",
        "a.csv:6: not UTF-8 text",
        "a.csv:8: invalid CSV (",
        "a.csv:9: empty prompt ('text')",
        "a.csv:10: empty completion ('label')",
        "a.csv:11: a quote is never closed",
    ):
        assert part in message


def test_csv_headers(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\n")
    with pytest.raises(DataError, match="is empty"):
        Examples.from_file(path, format=REVIEWS)
    path.write_text("text,text,label\na,b,0\n")
    with pytest.raises(DataError, match=r"a\.csv:1: the header: column 'text' is there twice"):
        Examples.from_file(path, format=REVIEWS)
    path.write_text("text;label\na;0\n")
    with pytest.raises(DataError, match="there are 'text;label'"):
        Examples.from_file(path, format=REVIEWS)


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["a", "b", None], "label": [0, 1, 1]})
    parquet.write_table(table.slice(0, 2), path, row_group_size=1)
    examples = Examples.from_file(path, format=REVIEWS)
    assert [example.source for example in examples] == ["a.parquet:1", "a.parquet:2"]
    assert examples.answers == [" negative", " positive"]
    parquet.write_table(table, path)
    with pytest.raises(DataError, match=r"a\.parquet:3: column 'text' is missing \(null\)"):
        Examples.from_file(path, format=REVIEWS)
    parquet.write_table(table.slice(0, 0), path)
    with pytest.raises(DataError, match="is empty"):
        Examples.from_file(path, format=REVIEWS)
    path.write_bytes(b"no parquet at all")
    with pytest.raises(DataError, match="not a sound Parquet file") as info:
        Examples.from_file(path, format=REVIEWS)
    said(info)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    jsonl(tmp_path / "reviews.jsonl", {})
    (tmp_path / "a.xlsx").touch()
    (tmp_path / "folder.csv").mkdir()
    for load in (Examples.from_file, Examples.load):
        with pytest.raises(DataError, match=r"no such file: .*review\.jsonl\. Did you mean 'revi"):
            load(str(tmp_path / "review.jsonl"))
        with pytest.raises(DataError, match=r"there is no folder .*nowhere either"):
            load(str(tmp_path / "nowhere" / "a.csv"))
        with pytest.raises(DataError, match=r"files of type '\.xlsx', only \.jsonl, .*\.parquet"):
            load(tmp_path / "a.xlsx")
    for load in (Examples.from_file, Examples.load, Examples.from_hub):
        with pytest.raises(DataError, match=r"cannot be opened .*too long"):
            load("x" * 5000 + ".csv")
    with pytest.raises(DataError, match="is a folder, not a file"):
        Examples.from_file(tmp_path / "folder.csv")


# The hub


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to lay data sets out in; `datasets` neither calls out nor writes elsewhere."""
    datasets = pytest.importorskip("datasets")
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_folder_in_hub_layout(offline: Path) -> None:
    folder = offline / "reviews"
    folder.mkdir()
    jsonl(folder / "train.jsonl", {"text": "a", "label": 0}, {"text": "b", "label": 1})
    jsonl(folder / "test.jsonl", {"text": "c", "label": 1})
    examples = Examples.load("reviews", format=REVIEWS)
    assert examples.name == "reviews"
    assert [example.source for example in examples] == ["reviews[train]:1", "reviews[train]:2"]
    assert examples.raw_labels == {" negative": 0, " positive": 1}
    test = Examples.from_hub(folder, split="test", format=REVIEWS)
    assert test[0].source == "reviews[test]:1"
    assert len(Examples.load(str(folder), split="train[:1]", format=REVIEWS)) == 1
    assert len(Examples.load(folder, split="train", format=REVIEWS, labelled=False)) == 2
    with pytest.raises(DataError) as info:
        Examples.load("reviews", split="tset", format=REVIEWS)
    assert said(info) == "reviews: no split 'tset'; there are 'train', 'test'. Did you mean 'test'?"
    with pytest.raises(DataError, match=r"reviews\[train\]: the prompt template '\{txt\}' names"):
        Examples.load("reviews", format=RowFormat("{txt}", "{label}"))
    bad = RowFormat("{text}", " {label}", {"0": "x"})
    with pytest.raises(DataError, match=r"1 bad row: reviews\[train\]:2: column 'label'"):
        Examples.load("reviews", format=bad)
    with pytest.raises(ConfigError, match="it has no revision 'v1'"):
        Examples.load("reviews", revision="v1")


def test_class_labels_stay_integers(offline: Path) -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    folder = offline / "csv"  # the name of one of the loaders of `datasets`
    (folder / "data").mkdir(parents=True)
    data.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    examples = Examples.load("csv", format=REVIEWS)
    assert examples.answers == [" positive", " negative"]
    assert examples.raw_labels == {" negative": 0, " positive": 1}


def test_which_split(offline: Path) -> None:
    row = {"prompt": "a", "completion": "b"}
    for folder, names in (("one", ["test"]), ("two", ["validation", "test"])):
        (offline / folder).mkdir()
        for name in names:
            jsonl(offline / folder / f"{name}.jsonl", row)
    assert Examples.load("one")[0].source == "one[test]:1"
    with pytest.raises(DataError, match="two: say which split to read; there are 'validation', "):
        Examples.load("two")


def test_folders_without_usable_files(offline: Path) -> None:
    (offline / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: no file in this folder can be read, only \.json"):
        Examples.load("empty")
    (offline / "broken").mkdir()
    (offline / "broken" / "train.jsonl").write_text('{"prompt": \n')
    with pytest.raises(DataError, match=r"give one file, such as train\.jsonl, instead") as info:
        Examples.load("broken")
    assert said(info).startswith("broken: ")


def test_the_hub_cannot_be_reached(offline: Path) -> None:
    with pytest.raises(DataError, match=r"owner/name: the hub cannot be reached .*HF_HUB_OFFLINE"):
        Examples.load("owner/name")
    (offline / "data").mkdir()
    jsonl(offline / "data" / "reviews.jsonl", {})
    with pytest.raises(DataError, match=r"Did you mean 'reviews\.jsonl'\?"):
        Examples.load("data/reviews")


def test_what_the_hub_says_comes_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    error: Exception = ValueError("Config name is missing.\nPlease pick one: ['a', 'b']")
    with pytest.raises(DataError, match=r"missing\. Please pick one: \['a', 'b'\]") as info:
        Examples.load("owner/name")
    said(info)
    error = datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' doesn't exist " * 50)
    with pytest.raises(DataError, match="log in with `hf auth login`") as info:
        Examples.load("owner/name")
    assert len(said(info)) < 600


def test_what_reaches_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return [{"prompt": "a", "completion": "b"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    examples = Examples.load("o/n", split="test", config="c", revision="r")
    assert asked == [(("o/n", "c"), {"split": "test", "revision": "r"})]
    assert (examples.name, examples[0].source) == ("o/n", "o/n[test]:1")


@pytest.mark.parametrize("source", ["imdb", "/no/such", "./reviews", "a/b/c", "~x/y", "a/b.csv"])
def test_what_is_not_taken_for_a_hub_id(source: str) -> None:
    with pytest.raises(DataError, match="no such file"):
        Examples.load(source)


def test_a_file_has_no_splits(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"})
    assert len(Examples.load(str(path))) == 1
    for option in ("split", "config", "revision"):
        with pytest.raises(ConfigError, match=f"it has no {option} 'x'"):
            Examples.load(path, **{option: "x"})


# Splits

some_answers = st.lists(st.sampled_from("abcd"), min_size=1, max_size=60)
seeds = st.integers(0, 2**32)


def check_parts(examples: Examples, split: FewShotSplit) -> None:
    assert len(queries(split.train)) == len(split.train)
    assert len(queries(split.dev)) == len(split.dev)
    assert not queries(split.train) & queries(split.dev)
    assert queries(split.train) | queries(split.dev) <= queries(examples)


@given(answers=some_answers, seed=seeds)
@settings(max_examples=200, deadline=None)
def test_split_of_all_rows(answers: list[str], seed: int) -> None:
    examples = rows_of(answers)
    split = examples.split(seed=seed)
    check_parts(examples, split)
    assert len(split.train) == round(2 * len(answers) / 3)
    assert len(split.train) + len(split.dev) == len(answers)
    repeated = {answer for answer, count in Counter(answers).items() if count > 1}
    assert repeated <= set(split.train.answers)
    if len(repeated) <= len(split.dev):
        assert repeated <= set(split.dev.answers)
    again = examples.split(seed=seed)
    assert list(again.train) == list(split.train)
    assert list(again.dev) == list(split.dev)


@given(answers=some_answers, seed=seeds, num_examples=st.integers(2, 60))
@settings(max_examples=200, deadline=None)
def test_split_with_a_number(answers: list[str], seed: int, num_examples: int) -> None:
    examples = rows_of(answers)
    if num_examples + num_examples // 2 > len(answers):
        with pytest.raises(DataError, match=f"{num_examples + num_examples // 2} are needed"):
            examples.split(num_examples=num_examples, seed=seed)
        return
    split = examples.split(num_examples=num_examples, seed=seed)
    check_parts(examples, split)
    assert (len(split.train), len(split.dev)) == (num_examples, num_examples // 2)
    assert list(examples.split(num_examples=num_examples, seed=seed).dev) == list(split.dev)
    smaller = examples.split(num_examples=2, seed=seed)
    assert queries(smaller.train) <= queries(split.train)


@given(
    counts=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    seed=seeds,
    num_examples=st.integers(2, 40),
)
@settings(max_examples=200, deadline=None)
def test_balanced_split(counts: list[int], seed: int, num_examples: int) -> None:
    examples = rows_of([answer for answer, n in zip("abcde", counts, strict=False) for _ in range(n)])
    if num_examples + num_examples // 2 > len(examples):
        return
    floor, odd = divmod(num_examples, len(counts))
    possible = min(counts) >= floor and sum(n > floor for n in counts) >= odd
    if not possible:
        with pytest.raises(DataError, match="a balanced draw of") as info:
            examples.split(num_examples=num_examples, seed=seed, balanced=True)
        message = said(info)
        scarce = "abcde"[counts.index(min(counts))]
        assert f"has only {min(counts)}:" in message
        if counts.count(min(counts)) == 1:
            assert repr(scarce) in message
        fits = int(message.split("at most ")[1].split(",")[0])
        assert fits < num_examples
        examples.split(num_examples=fits, seed=seed, balanced=True)
        return
    split = examples.split(num_examples=num_examples, seed=seed, balanced=True)
    check_parts(examples, split)
    assert (len(split.train), len(split.dev)) == (num_examples, num_examples // 2)
    drawn = [Counter(split.train.answers)[answer] for answer in "abcde"[: len(counts)]]
    assert max(drawn) - min(drawn) <= 1
    # In dev no answer is behind by more than one unless all its rows are drawn.
    dev = Counter(split.dev.answers)
    for answer, count, used in zip("abcde", counts, drawn, strict=False):
        assert dev[answer] >= min(max(dev.values()) - 1, count - used)
    smaller = examples.split(num_examples=2, seed=seed, balanced=True)
    assert queries(smaller.train) <= queries(split.train)


@pytest.mark.parametrize(
    ("rows", "train", "dev"), [(1, 1, 0), (2, 1, 1), (3, 2, 1), (4, 3, 1), (5, 3, 2), (30, 20, 10)]
)
def test_sizes_of_the_default_split(rows: int, train: int, dev: int) -> None:
    for answers in ([str(i) for i in range(rows)], ["x"] * rows):
        split = rows_of(answers).split()
        assert (len(split.train), len(split.dev)) == (train, dev)


def test_dev_is_capped() -> None:
    examples = rows_of(["x"] * 200)
    split = examples.split(num_examples=128)
    assert (len(split.train), len(split.dev)) == (128, 48)
    assert len(examples.split(num_examples=152).train) == 152
    with pytest.raises(DataError, match=r"201 are needed.* ask for at most 152, or leave"):
        examples.split(num_examples=153)


def test_two_of_each_answer_reach_both_sides() -> None:
    split = rows_of(["a"] * 28 + ["b"] * 2).split(seed=3)
    assert Counter(split.train.answers) == {"a": 19, "b": 1}
    assert Counter(split.dev.answers) == {"a": 9, "b": 1}


def test_seeds_differ_and_order_is_shuffled() -> None:
    examples = rows_of(["a", "b"] * 30)
    one, other = examples.split(num_examples=20, seed=1), examples.split(num_examples=20, seed=2)
    assert queries(one.train) != queries(other.train)
    order = [int(example.query[1:]) for example in one.train]
    assert order != sorted(order)
    assert one.train.name == examples.name


def test_too_few_rows_to_draw() -> None:
    examples = rows_of(["x"] * 25)
    with pytest.raises(DataError) as info:
        examples.split(num_examples=20)
    assert said(info) == (
        "rows: asked for 20 examples, the data has 25 rows; 30 are needed, as 10 more are held "
        "out for dev: ask for at most 17, or leave the number out to use every row"
    )
    with pytest.raises(DataError, match=r"the data has 2 rows; 3 are needed.*: leave the number"):
        rows_of(["x", "x"]).split(num_examples=2)
    for few in (1, 0, -3):
        with pytest.raises(ConfigError, match=f"num_examples is {few}: at least 2 are needed"):
            examples.split(num_examples=few)


def test_a_balanced_draw_needs_enough_of_each_answer() -> None:
    with pytest.raises(DataError) as info:
        rows_of(["no"] * 30 + ["yes"] * 3).split(num_examples=8, balanced=True)
    assert said(info) == (
        "rows: a balanced draw of 8 over 2 answers takes up to 4 rows of each, but 'yes' has "
        "only 3: ask for at most 7, or for a draw that is not balanced"
    )
    with pytest.raises(ConfigError, match="a balanced draw needs num_examples"):
        rows_of(["a", "b"]).split(balanced=True)


def test_unlabelled_rows_can_be_split() -> None:
    examples = Examples.from_rows([{"prompt": str(i)} for i in range(9)], labelled=False)
    assert len(examples.split(num_examples=4, balanced=True).dev) == 2
    assert len(examples.folds(3, 0)) == 3


@given(answers=some_answers, seed=seeds, k=st.integers(2, 7))
@settings(max_examples=150, deadline=None)
def test_folds(answers: list[str], seed: int, k: int) -> None:
    examples = rows_of(answers)
    if len(examples) < k:
        with pytest.raises(DataError, match=f"{k} folds need at least {k} rows"):
            examples.folds(k, seed)
        return
    folds = examples.folds(k, seed)
    held = Counter(example.query for _, out in folds for example in out)
    assert held == dict.fromkeys(queries(examples), 1)
    for rest, out in folds:
        assert queries(rest) | queries(out) == queries(examples)
        assert len(rest) + len(out) == len(examples)
    sizes = [len(out) for _, out in folds]
    assert max(sizes) - min(sizes) <= 1
    for answer in {answer for answer, count in Counter(answers).items() if count > 1}:
        per_fold = [out.answers.count(answer) for _, out in folds]
        assert max(per_fold) - min(per_fold) <= 1
    assert [list(out) for _, out in examples.folds(k, seed)] == [list(out) for _, out in folds]


def test_one_fold_is_none() -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        rows_of(["a", "b"]).folds(1, 0)
