"""The reader of each format: the same whether a file is named or found in a folder.

Every reader yields each row with its source and, where it is bad, the reason; nothing raises at the
first bad row, so that all are reported together.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ia2.utils.errors import DataError
from ia2.utils.logging import warn_once
from ia2.utils.user_files import check_text, open_file, strict_json
from ia2.utils.wording import counted, names_of, one_line

# Source, the row as read, and what is wrong with it (None: nothing so far).
Read = tuple[str, Any, "str | None"]

PACKED = {".gz": "gunzip", ".bz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd", ".zip": "unzip"}
"""Endings of compressed files, and what unpacks them."""

# What is said of quotation marks, with the place.
_QUOTED_TSV = (
    "cells in quotation marks (%s): in TSV these are characters of the text. If they are meant to quote, "
    "save the file as CSV."
)
_QUOTED_LATE = (
    "cells in quotation marks behind a blank (%s): there these are characters of the text, as the blank is. "
    "If they are meant to quote, remove the blanks after the commas."
)
_QUOTED_ROWS = (
    "a quoted cell goes on over lines of which each could be a row (%s). Check that no quotation mark is "
    "missing there."
)

# Bytes that are no UTF-8 come through as surrogates, so that one bad row stays one bad row.
_BAD_BYTES = re.compile("[\udc80-\udcff]")
_NOT_UTF8 = "not UTF-8 text"


def read_file(path: Path, name: str | None = None) -> Iterator[Read]:
    """The rows of a file, by the reader of its type; ``name`` is what sources call it.

    Raises:
        DataError: it is missing, of another type, no regular file, or cannot be read at all.
    """
    suffix = path.suffix.lower()
    open_file(path).close()  # whatever its name says, what is no file is said first
    if suffix in PACKED:
        raise DataError(f"{path} is compressed: unpack it first, with {PACKED[suffix]}")
    if suffix not in READERS:
        raise DataError(f"{path}: cannot read files of type '{path.suffix}', only {', '.join(READERS)}")
    return _all_rows(path, name or path.name)


def _all_rows(path: Path, name: str) -> Iterator[Read]:
    try:
        yield from READERS[path.suffix.lower()](path, name)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or one_line(error)})") from error


def _open_text(path: Path, newline: str | None) -> io.TextIOWrapper:
    file = open_file(path)
    head = file.read(4096)
    file.seek(0)
    check_text(path, head)
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _read_json(path: Path, name: str) -> Iterator[Read]:
    # In JSON a line break is never part of a text, so every kind of it ends a row.
    with _open_text(path, newline=None) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if path.suffix.lower() == ".json" and line.lstrip().startswith("["):
                rows, problem = _json_value("\n" * (number - 1) + line + file.read())
                if problem is not None:
                    raise DataError(f"{path}: {problem}")
                yield from ((f"{name}:{place}", row, None) for place, row in enumerate(rows, 1))
                return
            yield (f"{name}:{number}", *_json_value(line.rstrip("\n")))


def _json_value(text: str) -> tuple[Any, str | None]:
    if bad := _BAD_BYTES.search(text):
        line = text.rfind("\n", 0, bad.start()) + 1
        before = text[line : bad.start()].encode("utf-8", "surrogatepass")
        return None, f"{_NOT_UTF8} (byte {len(before) + 1} of the line)"
    try:
        return strict_json(text), None
    except ValueError as error:
        return None, str(error)


def _read_table(path: Path, name: str, delimiter: str, quoting: Any) -> Iterator[Read]:
    csv.field_size_limit(2**31 - 1)
    header: list[str] | None = None
    lines: list[str] = []  # of the current row
    doubtful: dict[str, list[str]] = {}
    with _open_text(path, newline="") as file:
        # Strict, because the lenient reader drops quotes and swallows rows in silence.
        reader = csv.reader(_kept(file, lines), delimiter=delimiter, quoting=quoting, strict=True)
        while True:
            first = reader.line_num + 1
            source = f"{name}:{first}"  # a quoted cell may span lines
            lines.clear()
            cells: list[str] = []
            problem = None
            try:
                cells = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                problem = _quote_problem(error, first, reader.line_num)
            if not cells and not problem:
                continue
            whole = "".join(cells)
            if _BAD_BYTES.search(whole):
                problem = _NOT_UTF8
            elif "\0" in whole:
                problem = "a NUL byte, which is no text"
            if header is None:
                if problem := problem or _header_problem(cells):
                    raise DataError(f"{source}: the header: {problem}")
                header = cells
                continue
            if not problem and len(cells) != len(header):
                problem = f"{counted(len(cells), 'value')} for the {len(header)} columns {names_of(header)}"
            if not problem and (doubt := _doubt(cells, lines, delimiter, quoting)):
                doubtful.setdefault(doubt, []).append(source)
            yield source, dict(zip(header, cells, strict=False)), problem
    for doubt, sources in doubtful.items():
        rows = f"{sources[0]} is the first of {len(sources)}" if len(sources) > 1 else f"at {sources[0]}"
        warn_once(f"{path}: {doubt % rows}")  # a file may be read twice


def _kept(file: io.TextIOWrapper, lines: list[str]) -> Iterator[str]:
    for line in file:
        lines.append(line)
        yield line


def _quote_problem(error: csv.Error, first: int, last: int) -> str:
    swallowed = f", lines {first} to {last} with it" if last > first else ""
    if "unexpected end" in str(error):
        return f"a quote is never closed{swallowed}"
    return f"invalid CSV ({error}{swallowed})"


def _header_problem(cells: list[str]) -> str | None:
    if twice := _repeated(cells):
        return f"column {names_of(twice)} is there twice"
    # One is what data frames write for their row numbers.
    where = [str(number) for number, cell in enumerate(cells, 1) if not cell]
    if len(where) > 1:
        shown = ", ".join(where[:5]) + (", …" if len(where) > 5 else "")
        return f"{len(where)} columns have no name ({shown}): name or remove them"
    return None


def _repeated(columns: list[str]) -> list[str]:
    return sorted(column for column, count in Counter(columns).items() if count > 1 and column)


def _doubt(cells: list[str], lines: list[str], delimiter: str, quoting: Any) -> str | None:
    """What quotation marks of a row may be meant for, other than what they are read as."""
    if quoting == csv.QUOTE_NONE:
        if any(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in cells):
            return _QUOTED_TSV
    elif any(re.fullmatch(r' +".*"', cell, re.DOTALL) for cell in cells):
        return _QUOTED_LATE
    elif len(cells) > 1 < len(lines) and all(line.count(delimiter) == len(cells) - 1 for line in lines):
        return _QUOTED_ROWS
    return None


def _read_parquet(path: Path, name: str) -> Iterator[Read]:
    import pyarrow.parquet

    number = 0
    with open_file(path) as opened:
        try:
            with pyarrow.parquet.ParquetFile(opened, page_checksum_verification=True) as file:
                if twice := _repeated(file.schema_arrow.names):
                    raise DataError(f"{path}: column {names_of(twice)} is there twice")
                for batch in file.iter_batches(batch_size=4096):
                    for row in _rows_of(batch):
                        number += 1
                        yield f"{name}:{number}", row, None
        except (DataError, GeneratorExit):
            raise
        except Exception as error:  # a damaged file fails in many ways, and not in pyarrow alone
            after = f" after row {number}" if number else ""
            raise DataError(f"{path}: not a sound Parquet file{after} ({one_line(error)})") from error


def _rows_of(batch: Any) -> list[dict[str, Any]]:
    """Rows as Python values; a value that Python lacks is the error that says so, until it is used."""
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
        return rows
    except Exception:  # one date beyond Python's spoils all rows
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        return [{name: _cell(column, i) for name, column in columns.items()} for i in range(len(batch))]


def _cell(column: Any, place: int) -> Any:
    try:
        return column[place].as_py()
    except Exception as error:  # of whatever type the value's library has
        return ValueError(one_line(error))


READERS: dict[str, Callable[[Path, str], Iterator[Read]]] = {
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".csv": partial(_read_table, delimiter=",", quoting=csv.QUOTE_MINIMAL),
    ".tsv": partial(_read_table, delimiter="\t", quoting=csv.QUOTE_NONE),
    ".parquet": _read_parquet,
}
"""Ending of a file's name to the reader of its format."""
