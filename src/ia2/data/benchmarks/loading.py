"""Rows of a benchmark: read from the hub, a folder of mirrors or one's own files; filtered; drawn."""

from __future__ import annotations

import math
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ia2.config import FREE_TEXT_TOKENS
from ia2.data.benchmarks.entry import NOT_EMPTY, Benchmark, label_key
from ia2.data.examples import Examples
from ia2.data.hub import numbered, read_folder, read_hub
from ia2.data.readers import READERS, Read, read_file
from ia2.data.rows import BadCell, Template, bad_rows
from ia2.utils.errors import DataError
from ia2.utils.user_files import user_path
from ia2.utils.wording import names_of, type_name

DATA_DIR = "IA2_DATA_DIR"

# Rows are drawn once, whatever the seed of a run.
_DRAW_SEED = 0

# The hub's own conversion of data sets that are loading scripts, which `datasets` 4 and later refuse.
_CONVERTED = "refs/convert/parquet"

_PIECE = re.compile(r"\d|[^\W\d_]{1,8}|[^\w\s]|_|\n")

# The most that any answer of GSM8K, HMathA and SciQ has with the tokenizers of `demo` and `demo-gemma`; with
# Qwen's one has 1.31, which is 47 tokens.
_TOKENS_A_PIECE = 1.27

# Where it was read, and its columns.
SourcedRow = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class BenchmarkData:
    """A benchmark's rows, rendered with one verbaliser."""

    benchmark: Benchmark
    verbaliser: str | None
    pool: Examples
    """Training and dev rows are drawn from these; empty for an OOD test set."""
    test: Examples
    """Other rows, in drawn order."""
    notes: list[str] = field(default_factory=list)
    """What differs from the hub, and what was left out: to be printed beside results."""

    @property
    def fingerprint(self) -> dict[str, str]:
        """Sixteen hex digits for each of pool and test."""
        return {"pool": self.pool.fingerprint, "test": self.test.fingerprint}


def load(
    benchmark: Benchmark,
    data_dir: str | Path | None,
    verbaliser: str | None,
    max_test: int | None,
    max_answer_tokens: int | None,
) -> BenchmarkData:
    """What :meth:`Benchmark.load` does."""
    verbaliser = benchmark.check_verbaliser(verbaliser)
    mirrors = _mirrors(benchmark, data_dir)
    notes = mirror_notes(mirrors, benchmark.mirror) if mirrors and benchmark.mirror else []
    rows = _rows(benchmark, benchmark.test.split, mirrors, notes)
    test, pool = rows[: benchmark.test.rows], rows[benchmark.test.rows :]
    if benchmark.pool is None:
        pool = []
    else:
        if benchmark.pool.split != benchmark.test.split:
            pool = _rows(benchmark, benchmark.pool.split, mirrors, notes)
        pool = _pool(benchmark, pool, test, max_answer_tokens, notes)[: benchmark.pool.rows]
    pool_rows = _render(benchmark, verbaliser, pool)
    return BenchmarkData(
        benchmark, verbaliser, pool_rows, _render(benchmark, verbaliser, test[:max_test]), notes
    )


def _render(benchmark: Benchmark, verbaliser: str | None, rows: list[SourcedRow]) -> Examples:
    if not rows:
        return Examples([], name=benchmark.name)
    if benchmark.choices is not None:
        read = ((source, row, None) for source, row in rows)
        rows = _sound(benchmark.name, read, lambda row: _with_choices(benchmark, row))
    return Examples.from_rows(
        [row for _, row in rows],
        format=benchmark.row_format(verbaliser),
        name=benchmark.name,
        sources=[source for source, _ in rows],
    )


# Where rows come from


def _mirrors(benchmark: Benchmark, data_dir: str | Path | None) -> Path | None:
    """The folder of mirrors to read, if any."""
    given = data_dir if data_dir is not None else os.environ.get(DATA_DIR)
    if benchmark.path is not None or not given:
        return None
    folder = user_path(given)
    if not folder.is_dir():
        raise DataError(
            f"{benchmark.name}: no folder {folder}. Give a folder of mirrors (--data-dir or {DATA_DIR}), or "
            f"leave it out to read {benchmark.hub} from the hub."
        )
    return folder


def _rows(benchmark: Benchmark, split: str, mirrors: Path | None, notes: list[str]) -> list[SourcedRow]:
    """The rows of a split that pass the filter, in drawn order; ``notes`` are told what was left out."""
    if benchmark.path is not None:
        read = _own_file(benchmark, benchmark.path, split)
    elif mirrors is not None:
        file = mirrors / (benchmark.mirror or "") / f"{split}.jsonl"
        if not file.exists():
            raise DataError(
                f"{benchmark.name}: no file {file}. Put the rows of {benchmark.source} there, one JSON "
                f"object a line, or leave --data-dir and {DATA_DIR} out to read them from the hub."
            )
        read = read_file(file)
    else:
        read = _hub(benchmark, split)
    place = f"{benchmark.name} ({split})"
    all_rows = _sound(place, read, lambda row: _shortened(benchmark, row))
    rows, failed = [], Counter[str]()
    for source, row in all_rows:
        column = _fails(benchmark, row)
        if column is None:
            rows.append((source, row))
        else:
            failed[column] += 1
    if not rows:
        raise DataError(f"{place}: none of {len(all_rows)} rows passes the filter.")
    random.Random(_DRAW_SEED).shuffle(rows)
    # A filter by value says what the benchmark is; one for emptiness loses rows.
    notes += [
        f"{count:,} of {len(all_rows):,} rows of {split} are left out: {column} is empty"
        for column, count in failed.items()
        if benchmark.filter[column] == NOT_EMPTY
    ]
    return rows


def _sound(
    place: str, read: Iterable[Read], change: Callable[[dict[str, Any]], dict[str, Any]]
) -> list[SourcedRow]:
    """Rows as ``change`` makes them; bad ones are all named."""
    rows: list[SourcedRow] = []
    bad: list[str] = []
    for source, row, problem in read:
        if problem is None and not isinstance(row, Mapping):
            problem = f"not an object with columns but {type_name(row)}"
        if problem is None:
            try:
                rows.append((source, change(dict(row))))
            except DataError as error:
                problem = str(error)
        if problem is not None:
            bad.append(f"{source}: {problem}")
    if bad:
        raise bad_rows(place, bad)
    if not rows:
        raise DataError(f"{place}: there is not a single row.")
    return rows


def _own_file(benchmark: Benchmark, folder: Path, split: str) -> Iterable[Read]:
    files = [file for suffix in READERS if (file := folder / f"{split}{suffix}").exists()]
    if len(files) > 1:
        raise DataError(
            f"{benchmark.name}: the split {split} is there twice, as {' and '.join(map(str, files))}. Remove "
            "one of them."
        )
    if files:
        return read_file(files[0])
    raise DataError(
        f"{benchmark.name}: no file {split}.jsonl in {folder}. Each split is a file there, of the types "
        f"{', '.join(READERS)}."
    )


def _hub(benchmark: Benchmark, split: str) -> Iterable[Read]:
    path = str(benchmark.hub)
    folder = user_path(path)
    if folder.is_dir():
        return read_folder(folder.absolute(), path, split, benchmark.config)[1]
    try:
        _, rows = read_hub(path, split, benchmark.config, benchmark.revision)
    except DataError as error:
        converted = _converted(path, split, benchmark, error)
        if converted is None:
            raise DataError(
                f"{benchmark.name}: {str(error).rstrip('.')}. Without the hub, give a folder of mirrors by "
                f"--data-dir or {DATA_DIR}: {benchmark.mirror}/{split}.jsonl in it is read."
            ) from error
        rows = converted
    return numbered(f"{benchmark.hub}[{split}]", rows)


def _converted(path: str, split: str, benchmark: Benchmark, error: DataError) -> Iterable[Any] | None:
    """The hub's Parquet conversion of a data set that is a script; None if there is none.

    The last two signs are of a later run: offline, or with the conversion alone in the cache.
    """
    import datasets

    signs = ("scripts are no longer supported", "cannot be reached", "Couldn't find cache")
    if benchmark.revision or not any(sign in str(error) for sign in signs):
        return None
    config = benchmark.config or "default"
    try:
        rows: Iterable[Any] = datasets.load_dataset(path, data_dir=config, split=split, revision=_CONVERTED)
    except Exception:  # of many types; the first error says more
        return None
    return rows


def mirror_notes(mirrors: Path, folder: str) -> list[str]:
    """What the mirrors' ``README.md`` says of one folder in its column "differs from the hub?".

    Nothing if it has no such table, or says "no".
    """
    readme = mirrors / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    column = None
    for line in text.splitlines():
        if not line.lstrip().startswith("|"):
            column = None  # the table has ended
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if cells[0].lower() == "folder":
            column = next((i for i, cell in enumerate(cells) if cell.lower().startswith("differs")), None)
        elif column is not None and cells[0].strip("`") == folder and len(cells) > column:
            said = re.sub(r"^yes:\s*|\s*\(see below\)", "", re.sub(r"[*`]", "", cells[column]))
            same = said.lower().rstrip(".") in ("", "no")
            return [] if same else [f"the mirror differs from the hub: {said}"]
    return []


# Which rows count, and what is made of them


def _fails(benchmark: Benchmark, row: Mapping[str, Any]) -> str | None:
    """The first column of the filter that a row does not pass."""
    for column, wanted in benchmark.filter.items():
        value = row[column]
        if wanted == NOT_EMPTY:
            if value is None or not str(value).strip():
                return column
        elif label_key(value) not in map(label_key, wanted):
            return column
    return None


def _shortened(benchmark: Benchmark, row: dict[str, Any]) -> dict[str, Any]:
    for column in benchmark.filter:
        if column not in row:
            there = names_of(list(row))
            raise DataError(f"{benchmark.name} filters by the column '{column}'; there are {there}")
    for column, characters in benchmark.shorten.items():
        text = str(_reach(row, column))
        if len(text) > characters:
            row[column] = (text[:characters].rsplit(maxsplit=1) or [""])[0]
    return row


def _with_choices(benchmark: Benchmark, row: dict[str, Any]) -> dict[str, Any]:
    """A row with the lines of all choices, and the label of the right one."""
    choices = benchmark.choices
    assert choices is not None
    if choices.right is not None:
        texts = [str(_reach(row, column)) for column in (choices.right, *choices.wrong)]
        right = 0
    else:
        texts = [str(text) for text in _reach(row, choices.texts or "")]
        keys, key = list(_reach(row, choices.keys or "")), _reach(row, choices.answer or "")
        if key not in keys:
            raise DataError(f"the right choice {key!r} is not among {', '.join(map(str, keys))}")
        right = keys.index(key)
    if len(texts) != len(choices.labels):
        raise DataError(f"{len(texts)} choices, where there are {len(choices.labels)} labels")
    order = list(range(len(texts)))
    if choices.shuffle:
        # By the row's own texts, so that a row looks the same wherever it stands in a file.
        random.Random("\n".join([*_asked(benchmark, row), *texts])).shuffle(order)
    line = Template.parse(choices.line, "line")
    cells = [
        {"label": label, "choice": texts[place]} for label, place in zip(choices.labels, order, strict=True)
    ]
    lines = "".join(line.render(cell, "choice", None) for cell in cells)
    return {**row, "choices": lines, "label": choices.labels[order.index(right)]}


def _asked(benchmark: Benchmark, row: Mapping[str, Any]) -> tuple[str, ...]:
    """The question of a row, without the choices, which may be in another order."""
    return tuple(str(row.get(column)) for column in benchmark.prompt_columns if column != "choices")


def _reach(row: Mapping[str, Any], column: str) -> Any:
    """A column's value; a dot reaches inside it."""
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, Mapping) or value.get(part) is None:
            raise DataError(f"the column '{column}' is missing")
        value = value[part]
    return value


# Drawing


def _pool(
    benchmark: Benchmark,
    rows: list[SourcedRow],
    test: list[SourcedRow],
    max_answer_tokens: int | None,
    notes: list[str],
) -> list[SourcedRow]:
    """The rows whose question is no test row's, and whose answer is not too long."""
    assert benchmark.pool is not None
    tested = {_asked(benchmark, row) for _, row in test}
    limit = max_answer_tokens or benchmark.max_answer_tokens or FREE_TEXT_TOKENS
    others = [(source, row) for source, row in rows if _asked(benchmark, row) not in tested]
    kept = others
    if benchmark.answer is not None:
        answer = Template.parse(benchmark.answer, "answer")
        kept = [(source, row) for source, row in others if _tokens_of(answer, row) <= limit]
    reasons = (
        (len(rows) - len(others), "they repeat a test row"),
        (len(others) - len(kept), f"their answers can have more than {limit} tokens"),
    )
    left_out = [
        f"{count:,} of {len(rows):,} rows of {benchmark.pool.split} are left out of the pool: {why}"
        for count, why in reasons
        if count
    ]
    if not kept:
        why = "; ".join(left_out) or f"all are test rows. Lower test.rows ({benchmark.test.rows})"
        raise DataError(f"{benchmark.name}: no row is left for training: {why}.")
    notes += left_out
    return kept


def _tokens_of(answer: Template, row: Mapping[str, Any]) -> int:
    try:
        return tokens_at_most(answer.render(row, "answer", None))
    except BadCell:
        return 0  # said of the row when it is rendered


def tokens_at_most(text: str) -> int:
    """Upper estimate of the tokens of a text, without a tokenizer, so that rows do not depend on one.

    Digits, signs, line breaks and runs of up to eight letters are counted.
    """
    return math.ceil(len(_PIECE.findall(text)) * _TOKENS_A_PIECE)
