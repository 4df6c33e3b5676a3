"""Rows as they are read: files and hub data sets, templates, and what is wrong with a row.

Every reader yields each row with its source and, where it is bad, the reason; nothing raises at the
first bad row, so that all are reported together.
"""

from __future__ import annotations

import csv
import datetime
import json
import numbers
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ia2.errors import DataError, suggest

SHOWN_ROWS = 20
_SHOWN_COLUMNS = 30
# Only for the example in an error message: which columns look like an answer, which like a text.
_ANSWER_NAMES = ("label", "labels", "answer", "completion", "target", "output", "response", "class")
_TEXT_NAMES = ("text", "sentence", "question", "prompt", "input", "query", "content", "review")
_COUNTER_NAMES = ("", "id", "idx", "index")

# Source, the row as read, and what is wrong with it (None: nothing so far).
Read = tuple[str, Any, "str | None"]


@dataclass(frozen=True, slots=True)
class RowFormat:
    r"""How a row becomes an :class:`Example`.

    A template is text with ``{column}`` fields; ``{{`` and ``}}`` stand for braces. Nothing else of
    Python's format language is allowed. Templates from a shell go through :func:`unescape` first.

    Attributes:
        prompt_template: ``'Text: {text}\nLabel:'``. ``None``: the column ``prompt``.
        completion_template: ``' {label}'``. ``None``: the column ``completion``.
        label_map: Raw value to text, for every column that the completion is made of. A value
            that it lacks is an error. JSON's ``true`` is found under ``True`` and ``true``.

    Raises:
        DataError: A template is malformed, uses more than plain names, or names no column.
    """

    prompt_template: str | None = None
    completion_template: str | None = None
    label_map: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if self.prompt_template is not None:
            Template.parse(self.prompt_template, "prompt template")
        if self.completion_template is not None:
            Template.parse(self.completion_template, "completion template")


AS_IS = RowFormat()


def unescape(template: str) -> str:
    r"""Turn ``\n``, ``\t`` and ``\\``, as typed in a shell, into the characters they stand for.

    Any other backslash stays as it is, so ``\boxed`` survives; ``\text`` must be typed ``\\text``.
    """
    meaning = {"n": "\n", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nt\\])", lambda match: meaning[match[1]], template)


# Templates


class BadCell(Exception):
    """Why a row cannot be rendered; collected, never seen by a caller."""


@dataclass(frozen=True, slots=True)
class Template:
    parts: tuple[tuple[str, str | None], ...]  # literal text and the column after it
    columns: tuple[str, ...]

    @classmethod
    def parse(cls, template: str, what: str) -> Template:
        shown = f"{what} {template!r}"
        try:
            parsed = list(string.Formatter().parse(template))
        except ValueError as error:
            raise DataError(
                f"{shown} is malformed ({error}); write {{{{ and }}}} for literal braces"
            ) from error
        for _, column, spec, conversion in parsed:
            if column is None:
                continue
            if not column:
                raise DataError(
                    f"{shown} has an empty {{}}: write the name of a column between the braces, "
                    "or {{}} for literal ones"
                )
            # str.format would reach into objects here; a template from elsewhere must not.
            if spec or conversion or re.search(r"[.\[\]{}]", column):
                raise DataError(
                    f"{shown}: {quoted('{' + column + '}')} must be the plain name of a column, "
                    "without attributes, indices, conversions or format specifications"
                )
        columns = tuple(dict.fromkeys(column for _, column, _, _ in parsed if column))
        if not columns:
            raise DataError(f"{shown} names no column: write one in braces, as in '{{text}}'")
        return cls(tuple((literal, column) for literal, column, _, _ in parsed), columns)

    def render(self, row: Mapping[str, Any], what: str, labels: dict[str, str] | None) -> str:
        texts: dict[str, str] = {}
        for column in self.columns:
            if column not in row:
                near = suggest(column, [str(name) for name in row]).strip()
                raise BadCell(f"no column {column!r}" + (f" ({near})" if near else ""))
            texts[column] = _cell_text(row[column], column)
        if not any(text.strip() for text in texts.values()):
            raise BadCell(f"empty {what} ({_names(self.columns)})")
        if labels is not None:
            for column in self.columns:
                texts[column] = _mapped(row[column], texts[column], column, labels)
        rendered = "".join(literal + (texts[column] if column else "") for literal, column in self.parts)
        if not rendered.strip():
            raise BadCell(f"the {what} is empty after rendering")
        # JSON can spell half a surrogate pair, and no tokenizer takes it.
        if re.search("[\ud800-\udfff]", rendered):
            raise BadCell(f"the {what} holds a surrogate, which is not a character")
        return rendered


def _cell_text(value: Any, column: str) -> str:
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        value = value.item()  # rows of a data frame hold numpy scalars
    # Data frames write a missing value as NaN.
    if value is None or (isinstance(value, float) and value != value):
        raise BadCell(f"column {column!r} is missing (null)")
    if not isinstance(value, (str, numbers.Number, datetime.date, datetime.time)):
        raise BadCell(f"column {column!r} is {type_name(value)}, not text")
    return str(value)


def _mapped(value: Any, text: str, column: str, labels: dict[str, str]) -> str:
    if text in labels:
        return labels[text]
    if text in ("True", "False") and not isinstance(value, str) and text.lower() in labels:
        return labels[text.lower()]
    known = list(labels)
    raise BadCell(
        f"column {column!r} has the label {quoted(text)}, which is not in the label map "
        f"({_names(known)}).{suggest(text, known)}".removesuffix(".")
    )


def check_columns(
    place: str,
    columns: list[str],
    format: RowFormat,
    prompt: Template,
    completion: Template | None,
) -> None:
    """Columns that no row has: the format is wrong, not the rows."""
    missing_defaults, examples = [], []
    # As a shell would have it typed; `unescape` undoes it.
    typed = [column.replace("\\", r"\\").replace("\n", r"\n") for column in columns]
    text, answer = _guess_columns(typed)
    shown_prompt = f"{text.capitalize()}: {{{text}}}\\nLabel:"
    roles = [("prompt", format.prompt_template, prompt, shown_prompt)]
    if completion is not None:
        roles.append(("completion", format.completion_template, completion, f" {{{answer}}}"))
    for role, given, template, example in roles:
        for column in template.columns:
            if column in columns:
                continue
            if given is not None:
                near = suggest(column, columns)
                raise DataError(
                    f"{place}: the {role} template {given!r} names the column {column!r}; "
                    f"there are {_names(columns)}" + (flat(f".{near}") if near else "")
                )
            missing_defaults.append(column)
            examples.append(f"--{role}-template '{example}'")
    if missing_defaults:
        raise DataError(
            f"{place}: no column {' or '.join(map(repr, missing_defaults))}; there are "
            f"{_names(columns)}: say what to make them of, for example {' '.join(examples)}"
        )


def _guess_columns(columns: list[str]) -> tuple[str, str]:
    """The columns an example in a message may show as the text and as the answer."""
    lower = {column.lower(): column for column in reversed(columns)}
    answer = next((lower[name] for name in _ANSWER_NAMES if name in lower), columns[-1])
    others = [column for column in columns if column != answer]
    others = [column for column in others if column.lower() not in _COUNTER_NAMES] or others
    text = next((lower[name] for name in _TEXT_NAMES if lower.get(name) in others), None)
    if text is None and not others:
        return answer, "label"  # a single column: it is the text, and the answers are elsewhere
    return text or others[0], answer


# Files


def _read_json_lines(path: Path) -> Iterator[Read]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            source = f"{path.name}:{number}"
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")  # Windows editors put this mark first
                if path.suffix.lower() == ".json" and raw.lstrip().startswith(b"["):
                    raise DataError(
                        f"{path}: a JSON array, where one object a line is wanted; convert it with "
                        f"jq -c '.[]' {path.name} > {path.stem}.jsonl"
                    )
            if not raw.strip():
                continue
            try:
                yield source, json.loads(raw.decode("utf-8")), None
            except UnicodeDecodeError as error:
                yield source, None, f"not UTF-8 text (byte {error.start + 1} of the line)"
            except json.JSONDecodeError as error:
                yield source, None, f"invalid JSON at column {error.colno} ({error.msg})"
            except (ValueError, RecursionError) as error:  # absurdly long numbers, deep nesting
                yield source, None, f"invalid JSON ({one_line(error)})"


def _read_csv(path: Path) -> Iterator[Read]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    header: list[str] | None = None
    # Bytes that are no UTF-8 come through as surrogates, so that one bad row stays one bad row.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        # Strict, because the lenient reader drops quotes and swallows rows in silence.
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        while True:
            source = f"{path.name}:{reader.line_num + 1}"  # a quoted cell may span lines
            problem = None
            cells: list[str] = []
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                closed = "unexpected end" not in str(error)
                problem = f"invalid CSV ({error})" if closed else "a quote is never closed"
            if not cells and not problem:
                continue
            if re.search("[\udc80-\udcff]", "".join(cells)):
                problem = "not UTF-8 text"
            if header is None:
                twice = sorted({cell for cell in cells if cells.count(cell) > 1})
                problem = problem or (f"column {_names(twice)} is there twice" if twice else None)
                if problem:
                    raise DataError(f"{source}: the header: {problem}")
                header = cells
                continue
            if not problem and len(cells) != len(header):
                problem = f"{len(cells)} values for the {len(header)} columns {_names(header)}"
            yield source, dict(zip(header, cells, strict=False)), problem


def _read_parquet(path: Path) -> Iterator[Read]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name}:{number}", row, None
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        after = f" after row {number}" if number else ""
        raise DataError(f"{path}: not a sound Parquet file{after} ({one_line(error)})") from error


READERS: dict[str, Callable[[Path], Iterator[Read]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json_lines,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


def user_path(path: str | Path) -> Path:
    try:
        path = Path(path).expanduser()
        path.exists()
    except RuntimeError:  # "~nobody": then it is a name like any other
        path = Path(path)
    except OSError as error:  # too long, or in a folder that may not be looked into
        raise DataError(f"{quoted(str(path))}: cannot be opened ({error.strerror})") from error
    return path


def no_such_file(path: Path, hint: str = "") -> str:
    if not path.parent.is_dir():
        return f"no such file: {path} (there is no folder {path.parent} either){hint}"
    return f"no such file: {path}{hint}{_similar(path)}"


def _similar(path: Path) -> str:
    try:
        near = suggest(path.name, sorted(other.name for other in path.parent.iterdir()))
    except OSError:
        return ""
    return "." + near if near else ""


# The hub


def load_split(
    path: str, source: str, split: str | None, config: str | None, revision: str | None
) -> tuple[str, Iterable[Any]]:
    """The name of the split and its rows."""
    import datasets

    try:
        loaded = datasets.load_dataset(path, config, split=split, revision=revision)
    except Exception as error:  # a dozen unrelated types, those of the HTTP client among them
        known: list[str] = []
        if split is not None and "split" in str(error).lower():
            try:
                known = datasets.get_dataset_split_names(path, config, revision=revision)
            except Exception:  # then the first error has to do
                known = []
        if known:
            near = suggest(split or "", known)
            message = f"{source}: no split {split!r}; there are {_names(known)}"
            raise DataError(f"{message}.{near}" if near else message) from error
        raise DataError(f"{source}: {_hub_trouble(error, path)}") from error
    if split is not None:
        return split, loaded
    splits = [str(name) for name in loaded]
    if "train" not in splits and len(splits) != 1:
        raise DataError(f"{source}: say which split to read; there are {_names(splits)}")
    chosen = "train" if "train" in splits else splits[0]
    return chosen, loaded[chosen]


def _hub_trouble(error: Exception, path: str) -> str:
    """What happened, and what to do about it."""
    import datasets.exceptions

    folder = Path(path)
    said = one_line(error.__cause__ or error)
    if folder.is_dir():
        names = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*.*"))]
        files = [name for name in names if Path(name).suffix.lower() in READERS]
        if not files:
            return f"no file in this folder can be read, only {', '.join(READERS)} ({said})"
        return f"cannot be read as a data set ({said}); give one file, such as {files[0]}, instead"
    said = one_line(error)
    if isinstance(error, ConnectionError) or "offline" in said.lower():
        return (
            f"the hub cannot be reached ({said}); check the network and HF_HUB_OFFLINE, or give a "
            f"local file{_similar(folder)}"
        )
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return (
            f"no such file, folder or data set of the hub ({said}); check the spelling, or log in "
            f"with `hf auth login` if it is private or gated{_similar(folder)}"
        )
    return f"cannot be loaded from the hub ({said})"


# Words for messages


def flat(text: str) -> str:
    return " ".join(text.splitlines())  # names of columns may hold line breaks


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"


def quoted(value: str) -> str:
    return repr(value if len(value) <= 60 else value[:59] + "…")


def _names(names: Sequence[str]) -> str:
    more = f", … ({len(names)} in all)" if len(names) > _SHOWN_COLUMNS else ""
    return ", ".join(map(quoted, names[:_SHOWN_COLUMNS])) + more


def type_name(value: Any) -> str:
    if value is None:
        return "null"
    kind = "dict" if isinstance(value, Mapping) else type(value).__name__
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
