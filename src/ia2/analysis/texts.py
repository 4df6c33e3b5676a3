"""Held-out plain text, which shows what a model has forgotten: the packaged paragraphs, or one's own."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from ia2.errors import DataError
from ia2.readers import READERS, Read, read_file
from ia2.rows import bad_rows
from ia2.user_files import read_text, user_path
from ia2.wording import names_of, type_name

COLUMN = "text"


def plain_texts(path: str | Path | None = None) -> list[str]:
    """Texts of a file, in order; without one, forty packaged paragraphs of English prose.

    Args:
        path: rows (``.jsonl``, ``.csv``, ``.parquet``) with the column ``text``, or any other file as plain
            text with blank lines between texts. A line break within a text is kept.

    Raises:
        DataError: no such file, not UTF-8, a row without a text, or no text at all. One line.
    """
    if path is None:
        return _paragraphs((files("ia2") / "data" / "plain_text.txt").read_text(encoding="utf-8"))
    file = user_path(path)
    of_rows = file.suffix.lower() in READERS
    texts = _column(file, read_file(file)) if of_rows else _paragraphs(read_text(file))
    if not texts:
        raise DataError(f"{file}: there is no text in it. Write texts with a blank line between them.")
    return texts


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def _column(file: Path, read: Iterable[Read]) -> list[str]:
    texts, bad = [], []
    for source, row, problem in read:
        problem = problem or _problem(row)
        if problem is None:
            texts.append(str(row[COLUMN]))
        else:
            bad.append(f"{source}: {problem}")
    if bad:
        raise bad_rows(str(file), bad)
    return texts


def _problem(row: Any) -> str | None:
    if not isinstance(row, dict):
        return f"not an object with columns but {type_name(row)}"
    if COLUMN not in row:
        return f"no column '{COLUMN}'; there are {names_of(list(map(str, row))) or 'none'}"
    value = row[COLUMN]
    if not isinstance(value, str) or not value.strip():
        return f"'{COLUMN}' is {'empty' if isinstance(value, str) else type_name(value)}"
    return None
