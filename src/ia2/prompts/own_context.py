"""Contexts of the user's own: a text, a column of the rows, or a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ia2.config import AdaptConfig
from ia2.data.examples import Example
from ia2.data.rows import bad_rows
from ia2.prompts.context import Context
from ia2.utils.errors import DataError, UserError, suggest
from ia2.utils.imports import failure
from ia2.utils.user_files import read_text
from ia2.utils.wording import type_name

ContextFunction = Callable[[Example, Sequence[Example]], "str | list[dict[str, str]] | list[Example]"]
"""Makes the context of an example from it and the training examples (itself left out)."""

_WANTED = "Give a text, chat messages (role and content), or demonstrations (prompt and completion)."
_MESSAGE, _DEMONSTRATION = ("role", "content"), ("prompt", "completion")


def context_text(config: AdaptConfig) -> str | None:
    """The free text of the settings.

    Raises:
        DataError: its file is missing, unreadable or empty.
    """
    if not config.context_file:
        return config.context_text or None
    try:
        text = read_text(config.context_file)
    except DataError as error:
        raise DataError(f"context_file: {error}") from None
    text = text.rstrip("\n")  # the one at the end of every file; the separator follows
    if not text.strip():
        raise DataError(f"context_file: {config.context_file} is empty. Give a file with text in it.")
    return text


def own_contexts(
    queries: Sequence[Example],
    source: str | ContextFunction | None,
    others: Callable[[int], Sequence[Example]],
) -> list[Context]:
    """The context of each query, from a column of the rows or from a function, which is asked once.

    The function gets ``others(i)`` beside query ``i``.

    Raises:
        DataError: a context cannot be read or made (of a column, all are counted, the first are named).
    """
    if callable(source):
        return [_of_function(source, query, others(i)) for i, query in enumerate(queries)]
    contexts, bad = [], []
    for query in queries:
        try:
            contexts.append(_of_column(query, str(source)))
        except DataError as error:
            bad.append(str(error))
    if bad:
        raise DataError(bad[0]) if len(bad) == 1 else bad_rows("the context", bad)
    return contexts


def _of_column(example: Example, column: str) -> Context:
    if column not in example.fields:
        columns = [str(name) for name in example.fields]
        there = f"there are {', '.join(map(repr, columns[:30]))}" if columns else "the row has no columns"
        raise DataError(
            f"{example.source}: no column {column!r} for the context; {there}.{suggest(column, columns)}"
        )
    return read_context(example.fields[column], example.source, f"the context in column {column!r}")


def _of_function(function: ContextFunction, example: Example, others: Sequence[Example]) -> Context:
    what = f"the context from {getattr(function, '__name__', 'the function')}"
    try:
        value = function(example, others)
    except UserError:
        raise
    except Exception as error:
        raise DataError(f"{example.source}: {what} fails with {failure(error)}") from error
    return read_context(value, example.source, what)


def read_context(value: Any, source: str, what: str = "the context") -> Context:
    """A context from a row or a function; ``source`` and ``what`` name it in messages.

    Raises:
        DataError: it is empty or none of these.
    """
    where = f"{source}: {what}"
    if isinstance(value, str) and value.strip():
        return Context(value)
    if not isinstance(value, (str, list, tuple)):
        raise DataError(f"{where} is {type_name(value)}. {_WANTED}")
    if isinstance(value, str) or not value:
        raise DataError(f"{where} is {'empty' if isinstance(value, str) else 'an empty list'}. {_WANTED}")
    kinds = [_keys_of(item) for item in value]
    if None in kinds:
        number = kinds.index(None) + 1
        raise DataError(f"{where}: item {number} is neither a chat message nor a demonstration. {_WANTED}")
    if len(set(kinds)) > 1:
        raise DataError(f"{where} mixes chat messages and demonstrations. {_WANTED}")
    if kinds[0] == _MESSAGE:
        return Context([_texts(m, _MESSAGE, f"{where}: message {n}") for n, m in enumerate(value, 1)])
    demonstrations = []
    for n, item in enumerate(value, 1):
        if not isinstance(item, Example):
            prompt, completion = _texts(item, _DEMONSTRATION, f"{where}: demonstration {n}").values()
            item = Example(prompt, completion, f"{source}, demonstration {n}")
        elif item.answer is None:
            raise DataError(f"{where}: demonstration {n} ({item.source}) has no answer.")
        demonstrations.append(item)
    return Context(demonstrations=tuple(demonstrations))


def _keys_of(item: Any) -> tuple[str, str] | None:
    if isinstance(item, Example):
        return _DEMONSTRATION
    keys = set(item) if isinstance(item, Mapping) else set()
    return next((kind for kind in (_MESSAGE, _DEMONSTRATION) if keys.issuperset(kind)), None)


def _texts(item: Mapping[str, Any], names: Sequence[str], where: str) -> dict[str, str]:
    for name in names:
        if not isinstance(item[name], str):
            raise DataError(f"{where}: {name} is {type_name(item[name])}, not text.")
    return {name: item[name] for name in names}
