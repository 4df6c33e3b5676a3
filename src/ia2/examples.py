"""Rows of a file, a folder or the hub become examples: a prompt and the answer it should get.

Nothing is dropped or mended in silence: whatever is wrong with the rows is reported at once, in one
line that names file, line and reason.
"""

from __future__ import annotations

import csv
import datetime
import hashlib
import heapq
import json
import numbers
import random
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, overload

from ia2.errors import ConfigError, DataError, suggest

__all__ = ["Example", "Examples", "FewShotSplit", "RowFormat", "unescape"]

MAX_DEV = 48
"""No more rows than this are held out when a number of examples is asked for (METHOD.md §3)."""

_SHOWN_ROWS = 20
_SHOWN_COLUMNS = 30
# Only for the example in an error message: which columns look like an answer, which like a text.
_ANSWER_NAMES = ("label", "labels", "answer", "completion", "target", "output", "response", "class")
_TEXT_NAMES = ("text", "sentence", "question", "prompt", "input", "query", "content", "review")
_COUNTER_NAMES = ("", "id", "idx", "index")

# Source, the row as read, and what is wrong with it (None: nothing so far).
_Read = tuple[str, Any, "str | None"]


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and the answer it should get."""

    query: str
    """The rendered prompt, verbatim."""
    answer: str | None
    """The rendered completion, verbatim, a leading space included. ``None``: not labelled."""
    source: str
    """``reviews.jsonl:12`` or, from the hub, ``owner/name[train]:12``. The first row is 1."""
    fields: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The row as it was read."""


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
            _Template.parse(self.prompt_template, "prompt template")
        if self.completion_template is not None:
            _Template.parse(self.completion_template, "completion template")


_AS_IS = RowFormat()


def unescape(template: str) -> str:
    r"""Turn ``\n``, ``\t`` and ``\\``, as typed in a shell, into the characters they stand for.

    Any other backslash stays as it is, so ``\boxed`` survives; ``\text`` must be typed ``\\text``.
    """
    meaning = {"n": "\n", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nt\\])", lambda match: meaning[match[1]], template)


class Examples(Sequence[Example]):
    """Examples in a fixed order, and where they came from."""

    def __init__(
        self, examples: Iterable[Example], *, name: str = "rows", label_column: str | None = None
    ) -> None:
        """Wrap examples that are already rendered.

        Args:
            examples: The examples.
            name: What messages call them.
            label_column: The one column that determines the answer, if there is one.
        """
        self._examples = tuple(examples)
        self.name = name
        self._label_column = label_column

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return self._pick(range(len(self))[index])
        return self._examples[index]

    def __iter__(self) -> Iterator[Example]:
        return iter(self._examples)

    def __repr__(self) -> str:
        return f"Examples(name={self.name!r}, rows={len(self)})"

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits that change with any query or answer, and with their order."""
        digest = hashlib.sha256()
        for example in self:
            # JSON keeps the two apart whatever they contain, and None apart from "None".
            digest.update(json.dumps([example.query, example.answer]).encode() + b"\n")
        return digest.hexdigest()[:16]

    @property
    def answers(self) -> list[str]:
        """The answers in order.

        Raises:
            DataError: A row has none: the rows were read with ``labelled=False``.
        """
        answers = [example.answer for example in self if example.answer is not None]
        if len(answers) != len(self):
            first = next(example.source for example in self if example.answer is None)
            raise DataError(
                f"{self.name}: the rows are not labelled ({first} is the first without an answer)"
            )
        return answers

    def label_set(self) -> tuple[str, ...]:
        """The distinct answers, sorted.

        Raises:
            DataError: The rows are not labelled.
        """
        return tuple(sorted(set(self.answers)))

    @property
    def raw_labels(self) -> dict[str, Any]:
        """Answer text to the raw value of the column it is made of, sorted by answer.

        Empty unless the completion template uses exactly one column, or a label map was applied to
        the column ``completion``. Of several raw values with one text, the first row's is kept.
        """
        if self._label_column is None:
            return {}
        raw: dict[str, Any] = {}
        for example in self:
            if example.answer is not None:
                raw.setdefault(example.answer, example.fields[self._label_column])
        return dict(sorted(raw.items()))

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[Mapping[str, Any]],
        *,
        format: RowFormat = _AS_IS,
        name: str = "rows",
        labelled: bool = True,
        sources: Sequence[str] | None = None,
    ) -> Examples:
        """Render rows that are already in memory.

        Args:
            rows: Column name to value.
            format: How a row becomes an example.
            name: What messages call the rows.
            labelled: Whether the rows have completions; if not, those columns are ignored.
            sources: Where each row came from; ``name:1``, ``name:2``, … if not given.

        Raises:
            DataError: There are no rows, a column is missing, or rows are bad (all are named).
            ConfigError: There are not as many sources as rows.
        """
        listed = list(rows)
        if sources is None:
            sources = [f"{name}:{number}" for number in range(1, len(listed) + 1)]
        elif len(sources) != len(listed):
            raise ConfigError(f"{len(sources)} sources were given for {len(listed)} rows")
        read = ((source, row, None) for source, row in zip(sources, listed, strict=True))
        return cls._render(read, name, name, format, labelled)

    @classmethod
    def from_file(cls, path: str | Path, *, format: RowFormat = _AS_IS, labelled: bool = True) -> Examples:
        """Read ``.jsonl``, ``.ndjson`` or ``.json`` (an object a line), ``.csv``, ``.tsv``
        (with a header) or ``.parquet``.

        Raises:
            DataError: The file is missing, unreadable, of another type, or empty; a column is
                missing, or rows are bad (all are named).
        """
        path = _user_path(path)
        reader = _READERS.get(path.suffix.lower())
        if not path.exists():
            raise DataError(_no_such_file(path))
        if not path.is_file():
            raise DataError(f"{path} is a folder, not a file")
        if reader is None:
            raise DataError(f"{path}: cannot read files of type '{path.suffix}', only {', '.join(_READERS)}")
        try:
            return cls._render(reader(path), path.name, str(path), format, labelled)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error

    @classmethod
    def from_hub(
        cls,
        source: str | Path,
        *,
        split: str | None = None,
        config: str | None = None,
        revision: str | None = None,
        format: RowFormat = _AS_IS,
        labelled: bool = True,
    ) -> Examples:
        """Read a data set of the Hugging Face hub, or a local folder that is laid out like one.

        Args:
            source: ``owner/name``, or a folder with ``train.jsonl``, ``data/train-*.parquet``, ….
            split: As ``datasets`` knows it, ``train[:100]`` included. ``None``: ``train``, or the
                only split.
            config: The configuration, for data sets that have several.
            revision: A branch, tag or commit of the hub.
            format: How a row becomes an example. Class labels are the hub's integers.
            labelled: Whether the rows have completions; if not, those columns are ignored.

        Raises:
            DataError: The data set or split cannot be had, a column is missing, or rows are bad.
            ConfigError: A revision of a local folder was asked for.
        """
        folder = _user_path(source)
        is_folder = folder.is_dir()
        if is_folder and revision is not None:
            raise ConfigError(f"{source} is a local folder: it has no revision '{revision}'")
        # Absolute, because `datasets` takes a folder called "json" or "csv" for one of its loaders.
        path = str(folder.resolve()) if is_folder else str(source)
        name = folder.resolve().name if is_folder else path
        split, rows = _load_split(path, str(source), split, config, revision)
        place = f"{name}[{split}]"

        def read() -> Iterator[_Read]:
            try:
                for number, row in enumerate(rows, 1):
                    yield f"{place}:{number}", row, None
            except Exception as error:  # decoding a column can fail in any library
                raise DataError(f"{place}: cannot be read ({_one_line(error)})") from error

        return cls._render(read(), name, place, format, labelled)

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        split: str | None = None,
        config: str | None = None,
        revision: str | None = None,
        format: RowFormat = _AS_IS,
        labelled: bool = True,
    ) -> Examples:
        """Read a file, a folder or, for anything else of the form ``owner/name``, the hub.

        Raises:
            DataError: There is no such file, or what :meth:`from_file` and :meth:`from_hub` raise.
            ConfigError: A split, configuration or revision of a single file was asked for.
        """
        path = _user_path(source)
        if path.is_file():
            for option, value in (("split", split), ("config", config), ("revision", revision)):
                if value is not None:
                    raise ConfigError(
                        f"{source} is a single file: it has no {option} '{value}'; leave it out"
                    )
            return cls.from_file(path, format=format, labelled=labelled)
        known_suffix = path.suffix.lower() in _READERS
        if not path.is_dir() and (
            known_suffix or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source), re.ASCII)
        ):
            hint = "" if known_suffix else "; a data set of the hub is written owner/name"
            raise DataError(_no_such_file(path, hint))
        return cls.from_hub(
            source, split=split, config=config, revision=revision, format=format, labelled=labelled
        )

    def split(
        self, *, num_examples: int | None = None, seed: int = 0, balanced: bool = False
    ) -> FewShotSplit:
        """Draw the examples to learn from, and others to stop early and select by.

        Args:
            num_examples: How many to learn from; half as many more, at most 48, are held out.
                ``None``: all rows are used, two thirds to learn from, with every answer that
                occurs twice on both sides as far as the sizes allow.
            seed: Same rows, same seed: same split. A larger draw contains a smaller one's train.
            balanced: As many rows of each answer as possible; needs ``num_examples``.

        Raises:
            DataError: There are too few rows, or too few of some answer.
            ConfigError: ``num_examples`` is below two, or missing with ``balanced``.
        """
        rng = random.Random(seed)
        order = list(range(len(self)))
        rng.shuffle(order)
        pools = self._by_answer(order)
        rng.shuffle(pools)  # which answers get the odd row out is drawn, too
        if num_examples is None:
            if balanced:
                raise ConfigError("a balanced draw needs num_examples: else every row is used")
            dev_rows = _stratified_third(pools)
            train_rows = set(order) - dev_rows
        else:
            wanted_dev = self._check_draw(num_examples)
            if balanced:
                train_rows, dev_rows = self._balanced_draw(pools, num_examples, wanted_dev)
            else:
                train_rows = set(order[:num_examples])
                dev_rows = set(order[num_examples : num_examples + wanted_dev])
        return FewShotSplit(
            train=self._pick([row for row in order if row in train_rows]),
            dev=self._pick([row for row in order if row in dev_rows]),
        )

    def folds(self, k: int, seed: int) -> list[tuple[Examples, Examples]]:
        """``k`` pairs (the rest, the held out); every row is held out once.

        Both are shuffled. Folds differ by at most one row, and by one row of each repeated answer.

        Raises:
            DataError: There are fewer rows than folds.
            ConfigError: ``k`` is below two.
        """
        if k < 2:
            raise ConfigError(f"{k} folds were asked for: at least 2 are needed")
        if len(self) < k:
            raise DataError(f"{self.name}: {k} folds need at least {k} rows, there are {len(self)}")
        order = list(range(len(self)))
        random.Random(seed).shuffle(order)
        pools = self._by_answer(order)
        # Unique answers, as one pool, go last: dealt in turn, every pool is spread evenly.
        dealt = [row for pool in pools if len(pool) > 1 for row in pool]
        dealt += [row for pool in pools if len(pool) == 1 for row in pool]
        fold_of = {row: position % k for position, row in enumerate(dealt)}
        return [
            (
                self._pick([row for row in order if fold_of[row] != fold]),
                self._pick([row for row in order if fold_of[row] == fold]),
            )
            for fold in range(k)
        ]

    def _pick(self, rows: Iterable[int]) -> Examples:
        return Examples(
            (self._examples[row] for row in rows), name=self.name, label_column=self._label_column
        )

    def _by_answer(self, order: Iterable[int]) -> list[list[int]]:
        pools: dict[str | None, list[int]] = {}
        for row in order:
            pools.setdefault(self._examples[row].answer, []).append(row)
        return list(pools.values())

    def _check_draw(self, num_examples: int) -> int:
        """How many rows are held out beside `num_examples`, if there are enough of both."""
        if num_examples < 2:
            raise ConfigError(
                f"num_examples is {num_examples}: at least 2 are needed, because each example "
                "is shown the others as demonstrations"
            )
        dev = min(num_examples // 2, MAX_DEV)
        needed, rows = num_examples + dev, len(self)
        if needed > rows:
            fits = max((n for n in range(2, rows) if n + min(n // 2, MAX_DEV) <= rows), default=0)
            way_out = f"ask for at most {fits}, or leave" if fits else "leave"
            raise DataError(
                f"{self.name}: asked for {num_examples} examples, the data has {rows} rows; "
                f"{needed} are needed, as {dev} more are held out for dev: {way_out} the number "
                "out to use every row"
            )
        return dev

    def _balanced_draw(
        self, pools: list[list[int]], num_examples: int, wanted_dev: int
    ) -> tuple[set[int], set[int]]:
        counts = _deal([len(pool) for pool in pools], num_examples)
        if max(counts) - min(counts) > 1:
            scarce = min(pools, key=len)
            fits = len(pools) * len(scarce) + sum(len(pool) > len(scarce) for pool in pools)
            answer = _shown(self._examples[scarce[0]].answer or "")
            raise DataError(
                f"{self.name}: a balanced draw of {num_examples} over {len(pools)} answers takes "
                f"up to {-(-num_examples // len(pools))} rows of each, but {answer} has only "
                f"{len(scarce)}: ask for at most {fits}, or for a draw that is not balanced"
            )
        train = {row for pool, count in zip(pools, counts, strict=True) for row in pool[:count]}
        # Backwards, so that the odd row of dev goes to an answer that got none of train.
        left = [pool[count:] for pool, count in zip(pools, counts, strict=True)][::-1]
        counts = _deal([len(pool) for pool in left], wanted_dev)
        return train, {row for pool, n in zip(left, counts, strict=True) for row in pool[:n]}

    @classmethod
    def _render(
        cls, read: Iterable[_Read], name: str, place: str, format: RowFormat, labelled: bool
    ) -> Examples:
        prompt = _Template.parse(format.prompt_template or "{prompt}", "prompt template")
        completion = None
        if labelled:
            completion = _Template.parse(format.completion_template or "{completion}", "completion template")
        labels = None
        if format.label_map:
            labels = {str(raw): str(text) for raw, text in format.label_map.items()}
        examples: list[Example] = []
        bad: list[str] = []
        columns: dict[str, None] = {}  # of all rows, in order of appearance
        for source, row, problem in read:
            reasons = [problem] if problem else []
            query, answer = "", None
            if not problem and not isinstance(row, Mapping):
                reasons.append(f"not an object with columns but {_kind(row)}")
            elif not problem:
                columns.update(dict.fromkeys(map(str, row)))
                try:
                    query = prompt.render(row, "prompt", None)
                except _BadCell as cell:
                    reasons.append(str(cell))
                try:
                    answer = completion.render(row, "completion", labels) if completion else None
                except _BadCell as cell:
                    reasons.append(str(cell))
            if reasons:
                bad.append(f"{source}: {' and '.join(reasons)}")
            else:
                examples.append(Example(query, answer, source, dict(row)))
        if columns:
            _check_columns(place, list(columns), format, prompt, completion)
        if bad:
            rows = "1 bad row" if len(bad) == 1 else f"{len(bad)} bad rows"
            more = [f"and {len(bad) - _SHOWN_ROWS} more"] if len(bad) > _SHOWN_ROWS else []
            raise DataError(_flat(f"{place}: {rows}: " + "; ".join(bad[:_SHOWN_ROWS] + more)))
        if not examples:
            raise DataError(f"{place} is empty: there is not a single row in it")
        verbatim = format.completion_template is None and labels is None
        single = completion is not None and len(completion.columns) == 1 and not verbatim
        column = completion.columns[0] if completion is not None and single else None
        return cls(examples, name=name, label_column=column)


@dataclass(frozen=True)
class FewShotSplit:
    """The examples to learn from, and those held out for early stopping and selection."""

    train: Examples
    dev: Examples


# Templates


class _BadCell(Exception):
    """Why a row cannot be rendered; collected, never seen by a caller."""


@dataclass(frozen=True, slots=True)
class _Template:
    parts: tuple[tuple[str, str | None], ...]  # literal text and the column after it
    columns: tuple[str, ...]

    @classmethod
    def parse(cls, template: str, what: str) -> _Template:
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
                    f"{shown}: {_shown('{' + column + '}')} must be the plain name of a column, "
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
                raise _BadCell(f"no column {column!r}" + (f" ({near})" if near else ""))
            texts[column] = _cell_text(row[column], column)
        if not any(text.strip() for text in texts.values()):
            raise _BadCell(f"empty {what} ({_names(self.columns)})")
        if labels is not None:
            for column in self.columns:
                texts[column] = _mapped(row[column], texts[column], column, labels)
        rendered = "".join(literal + (texts[column] if column else "") for literal, column in self.parts)
        if not rendered.strip():
            raise _BadCell(f"the {what} is empty after rendering")
        # JSON can spell half a surrogate pair, and no tokenizer takes it.
        if re.search("[\ud800-\udfff]", rendered):
            raise _BadCell(f"the {what} holds a surrogate, which is not a character")
        return rendered


def _cell_text(value: Any, column: str) -> str:
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        value = value.item()  # rows of a data frame hold numpy scalars
    # Data frames write a missing value as NaN.
    if value is None or (isinstance(value, float) and value != value):
        raise _BadCell(f"column {column!r} is missing (null)")
    if not isinstance(value, (str, numbers.Number, datetime.date, datetime.time)):
        raise _BadCell(f"column {column!r} is {_kind(value)}, not text")
    return str(value)


def _mapped(value: Any, text: str, column: str, labels: dict[str, str]) -> str:
    if text in labels:
        return labels[text]
    if text in ("True", "False") and not isinstance(value, str) and text.lower() in labels:
        return labels[text.lower()]
    known = list(labels)
    raise _BadCell(
        f"column {column!r} has the label {_shown(text)}, which is not in the label map "
        f"({_names(known)}).{suggest(text, known)}".removesuffix(".")
    )


def _check_columns(
    place: str,
    columns: list[str],
    format: RowFormat,
    prompt: _Template,
    completion: _Template | None,
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
                    f"there are {_names(columns)}" + (_flat(f".{near}") if near else "")
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


def _read_json_lines(path: Path) -> Iterator[_Read]:
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
                yield source, None, f"invalid JSON ({_one_line(error)})"


def _read_csv(path: Path) -> Iterator[_Read]:
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


def _read_parquet(path: Path) -> Iterator[_Read]:
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
        raise DataError(f"{path}: not a sound Parquet file{after} ({_one_line(error)})") from error


_READERS: dict[str, Callable[[Path], Iterator[_Read]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json_lines,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


def _user_path(path: str | Path) -> Path:
    try:
        path = Path(path).expanduser()
        path.exists()
    except RuntimeError:  # "~nobody": then it is a name like any other
        path = Path(path)
    except OSError as error:  # too long, or in a folder that may not be looked into
        raise DataError(f"{_shown(str(path))}: cannot be opened ({error.strerror})") from error
    return path


def _no_such_file(path: Path, hint: str = "") -> str:
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


def _load_split(
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
    said = _one_line(error.__cause__ or error)
    if folder.is_dir():
        names = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*.*"))]
        files = [name for name in names if Path(name).suffix.lower() in _READERS]
        if not files:
            return f"no file in this folder can be read, only {', '.join(_READERS)} ({said})"
        return f"cannot be read as a data set ({said}); give one file, such as {files[0]}, instead"
    said = _one_line(error)
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


def _flat(text: str) -> str:
    return " ".join(text.splitlines())  # names of columns may hold line breaks


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"


def _shown(value: str) -> str:
    return repr(value if len(value) <= 60 else value[:59] + "…")


def _names(names: Sequence[str]) -> str:
    more = f", … ({len(names)} in all)" if len(names) > _SHOWN_COLUMNS else ""
    return ", ".join(map(_shown, names[:_SHOWN_COLUMNS])) + more


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    kind = "dict" if isinstance(value, Mapping) else type(value).__name__
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


# Drawing


def _deal(sizes: Sequence[int], total: int) -> list[int]:
    """How many come from each pool if one is taken from each in turn, passing over empty ones."""
    counts = [0] * len(sizes)
    left = min(total, sum(sizes))
    while left:
        for pool, size in enumerate(sizes):
            if left and counts[pool] < size:
                counts[pool] += 1
                left -= 1
    return counts


def _stratified_third(pools: list[list[int]]) -> set[int]:
    """A third of the rows, in proportion to the pools, with one of each repeated answer first."""
    repeated = [pool for pool in pools if len(pool) > 1]
    unique = [row for pool in pools if len(pool) == 1 for row in pool]
    strata = [*repeated, unique]
    rows = sum(map(len, strata))
    wanted = rows - (2 * rows + 1) // 3  # the rest is two thirds, rounded, and never nothing
    # A repeated answer keeps a row in train; unique ones may all go either way.
    most = [len(pool) - 1 for pool in repeated] + [len(unique)]
    counts = [int(len(repeated) <= wanted)] * len(repeated) + [0]
    # The stratum furthest below its share is served next; ties fall to the drawn order.
    queue = [
        (counts[i] - len(pool) * wanted / max(rows, 1), i)
        for i, pool in enumerate(strata)
        if counts[i] < most[i]
    ]
    heapq.heapify(queue)
    for _ in range(wanted - sum(counts)):
        surplus, i = heapq.heappop(queue)
        counts[i] += 1
        if counts[i] < most[i]:
            heapq.heappush(queue, (surplus + 1, i))
    return {row for pool, count in zip(strata, counts, strict=True) for row in pool[:count]}
