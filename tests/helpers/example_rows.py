"""Rows for the tests of examples, and how a refusal is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ia2.data.examples import Examples, RowFormat
from ia2.utils.errors import DataError, UserError

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
