"""Rows of a file, a folder or the hub become examples: a prompt and the answer it should get.

Nothing is dropped or mended in silence: whatever is wrong with the rows is reported at once, in one
line that names file, line and reason.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, overload

from ia2.data.hub import numbered, read_folder, read_hub
from ia2.data.readers import READERS, Read, read_file
from ia2.data.rows import AS_IS, SHOWN_ROWS, BadCell, RowFormat, bad_rows, check_columns, with_messages
from ia2.data.splits import deal_folds, draw
from ia2.utils.errors import ConfigError, DataError
from ia2.utils.user_files import no_such_file, user_path
from ia2.utils.wording import type_name

# On so many rows templates are tried before a message suggests them.
_TRIED_ROWS = 50


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and the answer it should get."""

    query: str
    """The rendered prompt, verbatim."""
    answer: str | None
    """The rendered completion, verbatim, a leading space included. ``None``: not labelled."""
    source: str
    """``reviews.jsonl:12`` (the line; of Parquet and JSON arrays, the row) or ``owner/name[train]:12``."""
    fields: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The row as it was read."""


class Examples(Sequence[Example]):
    """Examples in a fixed order, and where they came from.

    Args:
        examples: already rendered.
        name: what messages call them.
        label_column: the one column that determines the answer, if there is one.

    Example:
        >>> Examples.from_rows([{"text": "fine", "label": 1}], format=RowFormat("{text}:", " {label}"))[0]
        Example(query='fine:', answer=' 1', source='rows:1')
    """

    def __init__(
        self, examples: Iterable[Example], *, name: str = "rows", label_column: str | None = None
    ) -> None:
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
            DataError: a row has none: the rows were read with ``labelled=False``.
        """
        first = next((example.source for example in self if example.answer is None), None)
        if first is not None:
            raise DataError(
                f"{self.name}: the rows are not labelled ({first} is the first without an answer)"
            )
        return [example.answer for example in self if example.answer is not None]

    @property
    def raw_labels(self) -> dict[str, Any]:
        """Answer text to the raw value of the column it is made of, sorted by answer.

        Empty unless the completion template uses exactly one column, or a label map was applied to
        the column ``completion``. Of several raw values with one text, the first row's is kept.
        """
        raw: dict[str, Any] = {}
        for example in self:
            if example.answer is not None and self._label_column is not None:
                raw.setdefault(example.answer, example.fields[self._label_column])
        return dict(sorted(raw.items()))

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[Mapping[str, Any]],
        *,
        format: RowFormat = AS_IS,
        name: str = "rows",
        labelled: bool = True,
        sources: Sequence[str] | None = None,
    ) -> Examples:
        """Render rows that are already in memory; ``sources`` say where each came from (``name:1``, …).

        Raises:
            DataError: there are no rows, a column is missing, or rows are bad (all are named).
        """
        listed = list(rows)
        if sources is None:
            sources = [f"{name}:{number}" for number in range(1, len(listed) + 1)]
        read = ((source, row, None) for source, row in zip(sources, listed, strict=True))
        return cls._render(read, name, name, format, labelled)

    @classmethod
    def from_file(cls, path: str | Path, *, format: RowFormat = AS_IS, labelled: bool = True) -> Examples:
        """Read ``.jsonl``, ``.ndjson`` or ``.json`` (an object a line, or an array of objects),
        ``.csv``, ``.tsv`` (with a header) or ``.parquet``.

        Raises:
            DataError: the file is missing, no regular file, unreadable, of another type, or empty;
                a column is missing, or rows are bad (all are named).
        """
        path = user_path(path)
        return cls._render(read_file(path), path.name, str(path), format, labelled)

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        split: str | None = None,
        config: str | None = None,
        revision: str | None = None,
        format: RowFormat = AS_IS,
        labelled: bool = True,
    ) -> Examples:
        """Read a file, a folder in hub layout or, for anything else of the form ``owner/name``, the hub.

        Args:
            source: a file as :meth:`from_file` takes it; a folder with ``train.jsonl``,
                ``data/train-*.parquet``, …, whose files are read alike; ``owner/name``.
            split: as ``datasets`` knows it, ``train[:100]`` included. ``None``: ``train``, or the
                only split.
            config: the configuration, for data sets that have several.
            revision: a branch, tag or commit of the hub.
            format: how a row becomes an example. Class labels are the hub's integers.
            labelled: whether the rows have completions; if not, those columns are ignored.

        Raises:
            DataError: the rows or the split cannot be had, a column is missing, or rows are bad.
            ConfigError: a split, configuration or revision of what has none was asked for.
        """
        path = user_path(source)
        if path.exists() and not path.is_dir():
            for option, value in (("split", split), ("config", config), ("revision", revision)):
                if value is not None:
                    raise ConfigError(
                        f"{source} is a single file: it has no {option} '{value}'; leave it out"
                    )
            return cls.from_file(path, format=format, labelled=labelled)
        if path.is_dir():
            if revision is not None:
                raise ConfigError(f"{source} is a local folder: it has no revision '{revision}'")
            folder = path.absolute()
            split, read = read_folder(folder, str(source), split, config)
            return cls._render(read, folder.name, f"{folder.name}[{split}]", format, labelled)
        known_suffix = path.suffix.lower() in READERS
        if known_suffix or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source), re.ASCII):
            hint = "" if known_suffix else "; a data set of the hub is written owner/name"
            raise DataError(no_such_file(path, hint))
        name = str(source)
        split, rows = read_hub(name, split, config, revision)
        place = f"{name}[{split}]"
        return cls._render(numbered(place, rows), name, place, format, labelled)

    @classmethod
    def blocks(
        cls,
        source: str | Path,
        *,
        split: str | None = None,
        config: str | None = None,
        format: RowFormat = AS_IS,
        size: int = 1024,
    ) -> tuple[int, Iterator[Examples]]:
        """How many unlabelled rows there are, all of them checked, and the rows in blocks of ``size``.

        A file is read twice, first to check it, so that memory does not grow with its rows.

        Raises:
            DataError: what :meth:`load` raises, before any block is made.
            ConfigError: the same.
        """
        path = user_path(source)
        if not path.is_file() or split is not None or config is not None:
            rows = cls.load(source, split=split, config=config, format=format, labelled=False)
            return len(rows), (rows[n : n + size] for n in range(0, len(rows), size))

        def read() -> Iterator[Example]:
            return _rendered(read_file(path), str(path), format, labelled=False)

        count = sum(1 for _ in read())
        again = read()
        return count, (cls(block, name=path.name) for block in iter(lambda: list(islice(again, size)), []))

    def split(
        self,
        *,
        num_examples: int | None = None,
        seed: int = 0,
        balanced: bool = True,
        dev: bool = True,
    ) -> FewShotSplit:
        """Draw the examples to learn from, and others to stop early and select by.

        Args:
            num_examples: how many to learn from; half as many more, at most 48, are held out.
                ``None``: all rows are used, two thirds to learn from, with every answer that
                occurs twice on both sides as far as the sizes allow.
            seed: same rows, same seed: same split. A larger draw contains a smaller one's train.
            balanced: draw ``num_examples`` evenly over the answers, as far as there are rows of each,
                so that no label is missing; otherwise at random, as in the paper.
            dev: whether rows are held out; without, all are to learn from.

        Raises:
            DataError: there are too few rows.
            ConfigError: ``num_examples`` is below two.
        """
        answers = [example.answer for example in self]
        train, held = draw(answers, self.name, num_examples, seed, balanced, dev)
        return FewShotSplit(self._pick(train), self._pick(held))

    def folds(self, k: int, seed: int) -> list[tuple[Examples, Examples]]:
        """``k`` pairs (the rest, the held out); every row is held out once.

        Both are shuffled. Folds differ by at most one row, and by one row of each repeated answer.

        Raises:
            DataError: there are fewer rows than folds.
        """
        parts = deal_folds([example.answer for example in self], self.name, k, seed)
        return [(self._pick(rest), self._pick(held)) for rest, held in parts]

    def _pick(self, rows: Iterable[int]) -> Examples:
        picked = (self._examples[row] for row in rows)
        return Examples(picked, name=self.name, label_column=self._label_column)

    @classmethod
    def _render(
        cls, read: Iterable[Read], name: str, place: str, format: RowFormat, labelled: bool
    ) -> Examples:
        examples = list(_rendered(read, place, format, labelled=labelled))
        columns = format.completion.columns
        verbatim = format.completion_template is None and format.labels is None
        single = labelled and len(columns) == 1 and not verbatim
        return cls(examples, name=name, label_column=columns[0] if single else None)


def _rendered(read: Iterable[Read], place: str, format: RowFormat, *, labelled: bool) -> Iterator[Example]:
    """Rows as examples, one by one; what is wrong with any of them is told together, at the end."""
    prompt, completion, labels = format.prompt, format.completion if labelled else None, format.labels
    wanted = [*prompt.columns, *(completion.columns if completion else ())]
    count = 0
    bad: list[str] = []
    columns: dict[str, None] = {}  # of all rows, in order of appearance
    seen: list[Mapping[str, Any]] = []
    for source, row, problem in read:
        reasons: list[BadCell | str] = [problem] if problem else []
        query, answer = "", None
        if not problem and not isinstance(row, Mapping):
            reasons.append(f"not an object with columns but {type_name(row)}")
        elif not problem:
            try:
                row = with_messages(row, wanted)
            except BadCell as cell:
                reasons.append(cell)
                columns.update(dict.fromkeys(wanted))
            columns.update(dict.fromkeys(map(str, row)))
            seen += [row] if len(seen) < _TRIED_ROWS else []
        if not reasons:
            try:
                query = prompt.render(row, "prompt", None)
            except BadCell as cell:
                reasons.append(cell)
            try:
                answer = completion.render(row, "completion", labels) if completion else None
            except BadCell as cell:
                reasons.append(cell)
        if not reasons:
            count += 1
            yield Example(query, answer, source, dict(row))
        elif len(bad) < SHOWN_ROWS:
            bad.append(f"{source}: {' and '.join(map(str, reasons))}")
        else:
            bad.append(source)
    if columns:
        check_columns(place, list(columns), format, labelled, seen)
    if bad:
        raise bad_rows(place, bad)
    if not count:
        raise DataError(f"{place} is empty: there is not a single row in it")


@dataclass(frozen=True)
class FewShotSplit:
    """The examples to learn from, and those held out for early stopping and selection.

    Attributes:
        train: labelled examples to learn from.
        dev: labelled ones that are held out.
        unlabelled: rows without answers, to learn from what the teacher does with them.
        unlabelled_dev: the same, held out.
    """

    train: Examples
    dev: Examples
    unlabelled: Examples = field(default_factory=lambda: Examples([], name="unlabelled"))
    unlabelled_dev: Examples = field(default_factory=lambda: Examples([], name="unlabelled"))

    def rest(self, examples: Sequence[Example]) -> list[Example]:
        """Those of the examples it was drawn from that are in neither part."""
        used = {id(example) for part in (self.train, self.dev) for example in part}
        return [example for example in examples if id(example) not in used]
