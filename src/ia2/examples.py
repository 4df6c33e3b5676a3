"""Rows of a file, a folder or the hub become examples: a prompt and the answer it should get.

Nothing is dropped or mended in silence: whatever is wrong with the rows is reported at once, in one
line that names file, line and reason.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, overload

from ia2.errors import ConfigError, DataError
from ia2.hub import numbered, read_folder, read_hub
from ia2.readers import READERS, Read, read_file
from ia2.rows import (
    AS_IS,
    SHOWN_ROWS,
    BadCell,
    RowFormat,
    Template,
    bad_rows,
    check_columns,
    unescape,
    with_messages,
)
from ia2.user_files import no_such_file, user_path
from ia2.wording import quoted, type_name

__all__ = ["Example", "Examples", "FewShotSplit", "RowFormat", "unescape"]

MAX_DEV = 48
"""No more rows than this are held out when a number of examples is asked for (METHOD.md §3)."""

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
        format: RowFormat = AS_IS,
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
    def from_file(cls, path: str | Path, *, format: RowFormat = AS_IS, labelled: bool = True) -> Examples:
        """Read ``.jsonl``, ``.ndjson`` or ``.json`` (an object a line, or an array of objects),
        ``.csv``, ``.tsv`` (with a header) or ``.parquet``.

        Raises:
            DataError: The file is missing, no regular file, unreadable, of another type, or empty;
                a column is missing, or rows are bad (all are named).
        """
        path = user_path(path)
        return cls._render(read_file(path), path.name, str(path), format, labelled)

    @classmethod
    def from_hub(
        cls,
        source: str | Path,
        *,
        split: str | None = None,
        config: str | None = None,
        revision: str | None = None,
        format: RowFormat = AS_IS,
        labelled: bool = True,
    ) -> Examples:
        """Read a data set of the Hugging Face hub, or a local folder that is laid out like one.

        A folder's files are read as :meth:`from_file` reads them, and sources name the file.

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
        folder = user_path(source)
        if folder.is_dir():
            if revision is not None:
                raise ConfigError(f"{source} is a local folder: it has no revision '{revision}'")
            folder = folder.absolute()
            split, read = read_folder(folder, str(source), split, config)
            return cls._render(read, folder.name, f"{folder.name}[{split}]", format, labelled)
        name = str(source)
        split, rows = read_hub(name, split, config, revision)
        place = f"{name}[{split}]"
        return cls._render(numbered(place, rows), name, place, format, labelled)

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
        """Read a file, a folder or, for anything else of the form ``owner/name``, the hub.

        Raises:
            DataError: There is no such file, or what :meth:`from_file` and :meth:`from_hub` raise.
            ConfigError: A split, configuration or revision of a single file was asked for.
        """
        path = user_path(source)
        if path.exists() and not path.is_dir():
            for option, value in (("split", split), ("config", config), ("revision", revision)):
                if value is not None:
                    raise ConfigError(
                        f"{source} is a single file: it has no {option} '{value}'; leave it out"
                    )
            return cls.from_file(path, format=format, labelled=labelled)
        known_suffix = path.suffix.lower() in READERS
        if not path.is_dir() and (
            known_suffix or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source), re.ASCII)
        ):
            hint = "" if known_suffix else "; a data set of the hub is written owner/name"
            raise DataError(no_such_file(path, hint))
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
            answer = quoted(self._examples[scarce[0]].answer or "")
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
        cls, read: Iterable[Read], name: str, place: str, format: RowFormat, labelled: bool
    ) -> Examples:
        prompt = Template.parse(format.prompt_template or "{prompt}", "prompt template")
        completion = None
        if labelled:
            completion = Template.parse(format.completion_template or "{completion}", "completion template")
        labels = None
        if format.label_map:
            labels = {str(raw): str(text) for raw, text in format.label_map.items()}
        wanted = [*prompt.columns, *(completion.columns if completion else ())]
        examples: list[Example] = []
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
                examples.append(Example(query, answer, source, dict(row)))
            elif len(bad) < SHOWN_ROWS:
                bad.append(f"{source}: {' and '.join(map(str, reasons))}")
            else:
                bad.append(source)
        if columns:
            check_columns(place, list(columns), format, prompt, completion, seen)
        if bad:
            raise bad_rows(place, bad)
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

    def rest(self, examples: Sequence[Example]) -> list[Example]:
        """Those of the examples it was drawn from that are in neither part."""
        used = {id(example) for part in (self.train, self.dev) for example in part}
        return [example for example in examples if id(example) not in used]


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
