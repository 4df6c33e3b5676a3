"""Rows as prompts and completions: templates, cells, chat messages; what is wrong with a row."""

from __future__ import annotations

import datetime
import numbers
import re
import shlex
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from typing import Any, NamedTuple

from ia2.utils.errors import DataError, suggest
from ia2.utils.wording import counted, flat, names_of, one_line, quoted, type_name

SHOWN_ROWS = 20
# For the example in an error message: which columns look like an answer, which like a text.
_KNOWN_NAMES = {
    "completion": ("label", "labels", "answer", "completion", "target", "output", "response", "class"),
    "prompt": ("text", "sentence", "question", "prompt", "input", "query", "content", "review"),
}
_COUNTER_NAMES = ("", "id", "idx", "index")
# So many columns are tried for it, and so many are looked at for a close name.
_TRIED_COLUMNS, _COMPARED_COLUMNS = 200, 2000


def unescape(template: str) -> str:
    r"""Turn ``\n``, ``\t`` and ``\\``, as typed in a shell, into the characters they stand for.

    Any other backslash stays as it is, so ``\boxed`` survives; ``\text`` must be typed ``\\text``.
    """
    meaning = {"n": "\n", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nt\\])", lambda match: meaning[match[1]], template)


class BadCell(Exception):
    """Why a row cannot be rendered; collected, never seen by a caller.

    The words are found when they are shown: close names take long to find, for a million rows.
    """

    def __init__(self, reason: str | Callable[[], str]) -> None:
        super().__init__()
        self._reason = reason

    def __str__(self) -> str:
        return self._reason if isinstance(self._reason, str) else self._reason()


class Template(NamedTuple):
    """Literal texts, each with the column after it; and the columns."""

    parts: tuple[tuple[str, str | None], ...]
    columns: tuple[str, ...]

    @classmethod
    @lru_cache(maxsize=1000)
    def parse(cls, template: str, what: str) -> Template:
        """A template; ``what`` is what errors call it.

        Raises:
            DataError: it is malformed, uses more than plain names, or names no column.
        """
        shown = f"{what} {template!r}"
        try:
            parsed = list(string.Formatter().parse(template))
        except ValueError as error:
            raise DataError(
                f"{shown} is malformed ({error}); write {{{{ and }}}} for literal braces"
            ) from error
        for _, column, spec, conversion in parsed:
            if column == "":
                raise DataError(
                    f"{shown} has an empty {{}}: write the name of a column between the braces, "
                    "or {{}} for literal ones"
                )
            # str.format would reach into objects here; a template from elsewhere must not.
            if column and (spec or conversion or re.search(r"[.\[\]{}]", column)):
                raise DataError(
                    f"{shown}: {quoted('{' + column + '}')} must be the plain name of a column, "
                    "without attributes, indices, conversions or format specifications"
                )
        columns = tuple(dict.fromkeys(column for _, column, _, _ in parsed if column))
        if not columns:
            raise DataError(f"{shown} names no column: write one in braces, as in '{{text}}'")
        return cls(tuple((literal, column) for literal, column, _, _ in parsed), columns)

    def render(self, row: Mapping[str, Any], what: str, labels: dict[str, str] | None) -> str:
        """The text of a row; ``labels`` are texts of cells.

        Raises:
            BadCell: it has none.
        """
        texts: dict[str, str] = {}
        for column in self.columns:
            if column not in row:
                raise BadCell(partial(_no_column, column, row))
            texts[column] = _cell_text(row[column], column)
        if not any(text.strip() for text in texts.values()):
            raise BadCell(f"empty {what} ({names_of(self.columns)})")
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


def _no_column(column: str, row: Mapping[str, Any]) -> str:
    near = suggest(column, _nameable(row)).strip()
    return f"no column {column!r}" + (f" ({near})" if near else "")


def _nameable(columns: Iterable[Any]) -> list[str]:
    """Those of the first columns that a template can name, and a message show."""
    first = map(str, islice(columns, _COMPARED_COLUMNS))
    return [name for name in first if flat(name) == name and _can_name(name)]


def _can_name(column: str) -> bool:
    try:
        return Template.parse(f"{{{column}}}", "template").columns == (column,)
    except DataError:
        return False


def _cell_text(value: Any, column: str) -> str:
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        value = value.item()  # rows of a data frame hold numpy scalars
    # Data frames write a missing value as NaN.
    if value is None or (isinstance(value, float) and value != value):
        raise BadCell(f"column {column!r} is missing (null)")
    if isinstance(value, Exception):  # a reader's, of a value that Python lacks
        raise BadCell(f"column {column!r} cannot be read ({one_line(value)})")
    if not isinstance(value, (str, numbers.Number, datetime.date, datetime.time)):
        raise BadCell(f"column {column!r} is {type_name(value)}, not text")
    return str(value)


def _mapped(value: Any, text: str, column: str, labels: dict[str, str]) -> str:
    if text in labels:
        return labels[text]
    if text in ("True", "False") and not isinstance(value, str) and text.lower() in labels:
        return labels[text.lower()]

    def unknown() -> str:
        known = list(labels)
        near = suggest(text, [name for name in known if flat(name) == name]).removesuffix(".")
        listed = names_of(known)
        return (
            f"column {column!r} has the label {quoted(text)}, which is not in the label map ({listed}).{near}"
        ).removesuffix(".")

    raise BadCell(unknown)


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
        _ = self.prompt, self.completion

    @property
    def prompt(self) -> Template:
        """The prompt's template."""
        given = self.prompt_template
        return Template.parse("{prompt}" if given is None else given, "prompt template")

    @property
    def completion(self) -> Template:
        """The completion's template."""
        given = self.completion_template
        return Template.parse("{completion}" if given is None else given, "completion template")

    @property
    def labels(self) -> dict[str, str] | None:
        """The label map between texts; None if there is none."""
        return {str(raw): str(text) for raw, text in (self.label_map or {}).items()} or None


AS_IS = RowFormat()


def with_messages(row: Mapping[str, Any], columns: Iterable[str]) -> Mapping[str, Any]:
    """A row of chat data with its question as the column ``prompt``, its answer as ``completion``.

    Only where these columns are wanted and the row has none of the two, but ``messages``.

    Raises:
        BadCell: the messages are not one of the user and, after it, one of the assistant.
    """
    own = ("prompt", "completion")
    if "messages" not in row or any(name in row for name in own) or not any(n in columns for n in own):
        return row
    messages = row["messages"]
    turns = messages if isinstance(messages, (list, tuple)) else []
    roles = [turn.get("role") if isinstance(turn, Mapping) else None for turn in turns]
    if roles not in (["user"], ["user", "assistant"]):
        shown = ", ".join(map(str, roles[:6])) or "none"
        raise BadCell(
            f"'messages' must be one of the user and one of the assistant after it (roles: {shown}); write "
            "other chats as the columns 'prompt' and 'completion'"
        )
    texts = [turn.get("content") for turn in turns]
    if not all(isinstance(text, str) for text in texts):
        raise BadCell("'messages': the content of a message is not text")
    return {**row, **dict(zip(own, texts, strict=False))}


# Reports


def bad_rows(place: str, reasons: Sequence[str]) -> DataError:
    """The error that counts bad rows (of each its source and what is wrong) and names the first twenty."""
    more = [f"and {len(reasons) - SHOWN_ROWS} more"] if len(reasons) > SHOWN_ROWS else []
    shown = "; ".join([*reasons[:SHOWN_ROWS], *more])
    return DataError(flat(f"{place}: {counted(len(reasons), 'bad row')}: {shown}"))


def check_columns(
    place: str, columns: list[str], format: RowFormat, labelled: bool, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse a format that names columns which no row has: the format is wrong, not the rows.

    Args:
        place: what was read.
        columns: of all rows.
        format: what was asked for.
        labelled: whether completions are wanted.
        rows: some of the rows, on which a template is tried before it is suggested.

    Raises:
        DataError: a column is missing; a template that can be used in its place is shown.
    """
    there = f"there are {names_of(columns)}"
    uncut = len(columns) == 1 and any(mark in columns[0] for mark in ";,|\t")
    if uncut:
        there += " (one column: cells are separated by commas in .csv files, by tabs in .tsv files)"
    roles = [("prompt", format.prompt_template, format.prompt)]
    if labelled:
        roles.append(("completion", format.completion_template, format.completion))
    missing = []
    for role, given, template in roles:
        for column in template.columns:
            if column in columns:
                continue
            if given is None:
                missing.append(role)
                continue
            near = "" if uncut else suggest(column, _nameable(columns))
            message = f"{place}: the {role} template {given!r} names the column {column!r}; {there}"
            raise DataError(flat(message) + (flat(f".{near}") if near else ""))
    if not missing:
        return
    used = [column for role, _, template in roles if role not in missing for column in template.columns]
    free = [column for column in columns if column not in used]
    message = f"{place}: no column {' or '.join(map(repr, missing))}; {flat(there)}: say what to make them of"
    if flags := _example(missing, free, rows, format.labels):
        raise DataError(f"{message}, for example {flags}")
    message += ", with " + " and ".join(f"--{role}-template" for role in missing)
    unusable = [column for column in columns[:_TRIED_COLUMNS] if not _can_name(column)]
    if unusable:
        message += (
            f" (no template can name {flat(names_of(unusable))}: rename columns with any of . : ! [ ] {{ }})"
        )
    elif unfit := [column for column in columns[:_TRIED_COLUMNS] if not _fits(column, rows, None)]:
        message += f" (not text in every row: {flat(names_of(unfit))})"
    raise DataError(message)


def _example(
    missing: list[str],
    columns: list[str],
    rows: Sequence[Mapping[str, Any]],
    labels: dict[str, str] | None,
) -> str:
    """Flags that make up for missing columns, as a shell takes them; only what has been tried."""
    lower = {column.lower(): column for column in reversed(columns)}
    texts = [*(c for c in columns if c.lower() not in _COUNTER_NAMES), *columns]
    order = {"prompt": texts, "completion": columns[::-1]}
    flags: dict[str, str] = {}  # by their columns
    # The answer first: it is the rarer name, and the text may be any other column.
    for role in sorted(missing):
        known = [lower[name] for name in _KNOWN_NAMES[role] if name in lower]
        for column in [*known, *order[role][:_TRIED_COLUMNS]]:
            fits = column not in flags and _fits(column, rows, labels if role == "completion" else None)
            if fits and (flag := _flag(role, column)):
                flags[column] = flag
                break
    if len(missing) > len(flags) == 1:  # one column alone is of use: it is the text
        return _flag("prompt", next(iter(flags))) or ""
    return " ".join(reversed(flags.values()))


def _fits(column: str, rows: Sequence[Mapping[str, Any]], labels: dict[str, str] | None) -> bool:
    """Whether a template of a column alone renders every one of the rows."""
    if not _can_name(column) or not rows:
        return False
    try:
        for row in rows:
            Template.parse(f"{{{column}}}", "template").render(row, column, labels)
    except BadCell:
        return False
    return True


def _flag(role: str, column: str) -> str | None:
    """``--prompt-template 'Text: {text}\\nLabel:'``, if the shell and the template's reader take it back."""
    # As a shell would have it typed; `unescape` undoes it.
    typed = column.replace("\\", r"\\").replace("\n", r"\n")
    for name in (typed.capitalize(), "Text"):
        template = f"{name}: {{{typed}}}\\nLabel:" if role == "prompt" else f" {{{typed}}}"
        flag = f"--{role}-template {shlex.quote(template)}"
        try:
            if Template.parse(unescape(shlex.split(flat(flag))[1]), "template").columns == (column,):
                return flag
        except (DataError, ValueError, IndexError):
            continue
    return None
