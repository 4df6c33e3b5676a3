"""All prompts of one run: bare queries, and queries in their context, as the settings say.

The context is made of demonstrations unless a text, a column of the rows or a function takes their
place; from here on there are only :class:`~ia2.prompts.context.Contexts`.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import numpy as np

from ia2.config import AdaptConfig
from ia2.data.examples import Example
from ia2.data.rows import bad_rows
from ia2.models.tokens import Ids
from ia2.prompts.context import (
    Contexts,
    DemonstrationContexts,
    FixedOrders,
    FreshOrders,
    Given,
    GivenContexts,
    LeaveOneOut,
    Orders,
    bare_lengths,
    pool_orders,
)
from ia2.prompts.demonstrations import Balanced, Embedder, Nearest, Search, SearchedOrders, SharedPrefixes
from ia2.prompts.format import Rendering
from ia2.utils.errors import ConfigError, DataError, UserError, suggest
from ia2.utils.user_files import read_text
from ia2.utils.wording import type_name

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

ContextFunction = Callable[[Example, Sequence[Example]], "str | list[dict[str, str]] | list[Example]"]
"""Makes the context of an example from it and the training examples (itself left out)."""

T = TypeVar("T")


class Prompts:
    """Prompts of one set of training examples, and of queries that are put behind them.

    Args:
        tokenizer: of the model.
        reserve: tokens of the context window kept for the answer.
        window: tokens of the context window.
        train: the training examples.
        config: settings.
        model: gives the model; called only by ways to choose demonstrations that need it.
        function: makes contexts, instead of ``config.context_function``.

    Raises:
        ConfigError: settings that contradict each other, a function that cannot be imported, or no chat
            template where one is needed.
        DataError: a context file that cannot be read.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        reserve: int,
        window: int,
        train: Sequence[Example],
        config: AdaptConfig,
        model: Callable[[], nn.Module],
        function: ContextFunction | None = None,
    ) -> None:
        self.reserve, self.window, self.train, self.config = reserve, window, train, config
        self.rendering = Rendering(tokenizer, config.separator, config.chat, config.thinking)
        self._text, self._function = given_text(config), function
        self._embedder = Embedder(self.rendering, model)
        self._model = model
        self._fresh: dict[tuple[tuple[Example, ...], int], Contexts] = {}
        self._pools: dict[tuple[tuple[Example, ...], int, int], Contexts] = {}
        if function is None and config.context_function:
            self._function = load_function(config.context_function)
        self._demonstrations = not (self._text or self._function or config.context_column)
        self._check(function is not None)

    def _check(self, given: bool) -> None:
        config = self.config
        others = ("context_text", "context_file", "context_column", "context_function")
        for name in others:
            # as from a shell variable that is not set; demonstrations are not what was asked for
            if getattr(config, name) is not None and not getattr(config, name).strip():
                raise ConfigError(f"{name} is empty. Leave it out to show demonstrations.")
        if given:
            if named := [name for name in others if getattr(config, name)]:
                raise ConfigError(f"a context function and {named[0]} are given; one context at a time.")
            if config.demo_order != "random" or config.context_draws != 1:
                raise ConfigError(
                    "demo_order and context_draws do nothing beside a context function. Leave them out."
                )
            if config.icl_demonstrations != "same":
                raise ConfigError("icl_demonstrations does nothing beside a context function. Leave it out.")
        if config.max_demonstrations and not self._demonstrations:
            raise ConfigError("max_demonstrations does nothing beside another context. Leave it out.")
        if config.demo_order == "nearest" and config.context_draws > 1:
            raise ConfigError(
                f"demo_order nearest gives one order, context_draws is {config.context_draws}. Leave "
                "it out, or choose another order."
            )
        if config.demo_order == "search" and config.context_draws > config.demo_search_orders:
            raise ConfigError(
                f"context_draws is {config.context_draws}, but the search tries "
                f"{config.demo_search_orders} orders. Raise demo_search_orders."
            )

    # ------------------------------------------------------------------------------- contexts

    @cached_property
    def train_contexts(self) -> Contexts:
        """Every training example in its context: by default, behind all the others.

        Raises:
            DataError: a prompt or its context does not fit the context window, or is malformed.
        """
        if not self._demonstrations:
            return self._given(self.train, partial(_without, self.train), "teacher contexts")
        orders = self._orders(self.config.context_draws, leave_one_out=True)
        return self._behind(self.train, orders, "teacher contexts")

    def pool_contexts(
        self, queries: Sequence[Example], permutations: int = 1, reserve: int | None = None
    ) -> Contexts:
        """Queries behind the training examples, or in the context that the settings give them.

        Args:
            queries: dev or test examples.
            permutations: orders of the demonstrations; a context of another kind is always one.
            reserve: tokens of the window kept for the answer, where these queries need others.

        Raises:
            DataError: see :attr:`train_contexts`.
        """
        reserve = reserve or self.reserve
        key = (tuple(queries), permutations, reserve)
        # kept, so that what was checked is what is used, and what does not fit is reported once
        if key not in self._pools:
            if self._demonstrations:
                orders = self._orders(permutations, queries=queries)
                self._pools[key] = self._behind(queries, orders, "ICL prompts", reserve)
            else:
                self._pools[key] = self._given(queries, lambda i: self.train, "ICL prompts", reserve)
        return self._pools[key]

    def fresh_contexts(
        self, queries: Sequence[Example], pool: Sequence[Example], reserve: int | None = None
    ) -> Contexts:
        """Queries behind as many demonstrations as there are training examples, drawn for each from a pool.

        The pool of one set of training examples is always the same.

        Raises:
            DataError: the pool is smaller than that; see :attr:`train_contexts`.
        """
        reserve = reserve or self.reserve
        count = min(len(self.train), self.config.max_demonstrations or len(self.train))
        if len(pool) < count:
            raise DataError(
                f"icl_demonstrations fresh draws {count} demonstrations for each query from rows that are in "
                f"no split; there are {len(pool)}. Give more rows, or set num_examples, or leave it out."
            )
        key = (tuple(queries), reserve)
        if key in self._fresh:
            return self._fresh[key]
        self._fresh[key] = DemonstrationContexts(
            self.rendering,
            queries,
            pool,
            FreshOrders(len(pool), self.config.seed),
            self.window,
            reserve,
            "ICL prompts",
            count,
        )
        return self._fresh[key]

    def query_prompts(self, examples: Sequence[Example]) -> Sequence[Ids]:
        """Bare prompts, tokenised when they are asked for.

        Raises:
            DataError: one is longer than the context window.
        """
        return query_prompts(self.rendering, examples, self.window, self.reserve)

    # ------------------------------------------------------------------------- demonstrations

    @cached_property
    def _lengths(self) -> np.ndarray:
        return self.rendering.demonstration_lengths(self.train)

    def _behind(
        self, queries: Sequence[Example], orders: Orders, what: str, reserve: int | None = None
    ) -> DemonstrationContexts:
        return DemonstrationContexts(
            self.rendering,
            queries,
            self.train,
            orders,
            self.window,
            reserve or self.reserve,
            what,
            self.config.max_demonstrations,
            self._lengths,
        )

    def _orders(
        self, permutations: int, *, queries: Sequence[Example] = (), leave_one_out: bool = False
    ) -> Orders:
        order, seed, count = self.config.demo_order, self.config.seed, len(self.train)
        if order == "balanced":
            return Balanced(self.train, permutations, seed, leave_one_out=leave_one_out)
        if order == "search":
            return SearchedOrders(self._search, permutations, leave_one_out=leave_one_out)
        if order == "nearest":
            train = lambda: self._embedded_train  # noqa: E731
            if leave_one_out:
                return Nearest(train, train, leave_one_out=True)
            return Nearest(lambda: self._embed(queries), train, leave_one_out=False)
        if leave_one_out and order == "shared":
            return SharedPrefixes(count, permutations, seed)
        if leave_one_out:
            return LeaveOneOut(count, permutations, seed)
        return FixedOrders(pool_orders(count, permutations, seed))

    @cached_property
    def _search(self) -> Search:
        return Search(
            self.rendering,
            self.train,
            self.window,
            self.reserve,
            tries=self.config.demo_search_orders,
            seed=self.config.seed,
            model=self._model,
            most=self.config.max_demonstrations,
            lengths=self._lengths,
        )

    @cached_property
    def _embedded_train(self) -> np.ndarray:
        return self._embed(self.train)

    def _embed(self, queries: Sequence[Example]) -> np.ndarray:
        lengths = bare_lengths(self.rendering, queries, self.window, self.reserve)
        return self._embedder(queries, int(lengths.sum(dtype=np.int64)))

    # ------------------------------------------------------------------------- other contexts

    def _given(
        self,
        queries: Sequence[Example],
        others: Callable[[int], Sequence[Example]],
        what: str,
        reserve: int | None = None,
    ) -> Contexts:
        given: Sequence[Given]
        if self._text is not None:
            same = Given(self._text)
            given = _Lazy(len(queries), lambda i: same)
        elif column := self.config.context_column:
            _check_column(queries, column)
            given = _Lazy(len(queries), lambda i: _from_column(queries[i], column))
        else:
            function = self._function
            assert function is not None
            # kept: it may be slow, or draw at random
            given = [_from_function(function, query, others(i)) for i, query in enumerate(queries)]
        return GivenContexts(self.rendering, queries, given, self.window, reserve or self.reserve, what)


def query_prompts(
    rendering: Rendering, examples: Sequence[Example], window: int, reserve: int, virtual: int = 0
) -> Sequence[Ids]:
    """Bare prompts, tokenised when they are asked for.

    Args:
        rendering: how text becomes ids.
        examples: the queries.
        window: tokens of the context window.
        reserve: tokens of it kept for the answer.
        virtual: tokens of it that an adapter's virtual tokens take.

    Raises:
        DataError: one is longer than the context window.
    """
    bare_lengths(rendering, examples, window, reserve, virtual)
    return _Lazy(len(examples), lambda i: rendering.query_ids(examples[i]))


class _Lazy(Sequence[T], Generic[T]):
    """Items that are made when they are asked for."""

    def __init__(self, count: int, make: Callable[[int], T]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        places = range(self._count)[index]
        if isinstance(places, range):
            return _Lazy(len(places), lambda i: self._make(places[i]))
        return self._make(places)


def _without(examples: Sequence[Example], i: int) -> Sequence[Example]:
    """All examples but one."""
    return _Lazy(len(examples) - 1, lambda j: examples[j + (j >= i)])


# ---------------------------------------------------------------------------------- reading them


def given_text(config: AdaptConfig) -> str | None:
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


def load_function(spec: str) -> ContextFunction:
    """A function by its import path ``package.module:function``.

    Raises:
        ConfigError: the path is none, the module does not import, or it has no such function.
    """
    module_name, colon, function_name = spec.partition(":")
    if not colon or not module_name or not function_name:
        raise ConfigError(f"context_function '{spec}' is no import path such as package.module:function.")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, TypeError, ValueError) as error:
        raise ConfigError(
            f"context_function '{spec}': cannot import '{module_name}' ({error}). Install it, or put its "
            "folder on PYTHONPATH."
        ) from error
    except Exception as error:
        raise ConfigError(
            f"context_function '{spec}': importing '{module_name}' fails with {_told(error)}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ConfigError(
            f"context_function '{spec}': '{module_name}' has no function '{function_name}'."
            f"{suggest(function_name, known)}"
        )
    return function  # type: ignore[no-any-return]


def _check_column(queries: Sequence[Example], column: str) -> None:
    """That every row's own context can be read.

    Raises:
        DataError: some cannot (all are counted, the first are named).
    """
    bad = []
    for query in queries:
        try:
            _from_column(query, column)
        except DataError as error:
            bad.append(str(error))
    if len(bad) == 1:
        raise DataError(bad[0])
    if bad:
        raise bad_rows("the context", bad)


def _from_column(example: Example, column: str) -> Given:
    if column not in example.fields:
        columns = [str(name) for name in example.fields]
        there = f"there are {', '.join(map(repr, columns[:30]))}" if columns else "the row has no columns"
        raise DataError(
            f"{example.source}: no column {column!r} for the context; {there}.{suggest(column, columns)}"
        )
    return read_given(example.fields[column], example.source, f"the context in column {column!r}")


def _told(error: Exception) -> str:
    """An error of the user's own code, with its line there."""
    said = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, SyntaxError):  # it names file and line itself
        return said
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{said} ({Path(frame.filename).name}, line {frame.lineno})"


def _from_function(function: ContextFunction, example: Example, others: Sequence[Example]) -> Given:
    what = f"the context from {getattr(function, '__name__', 'the function')}"
    try:
        value = function(example, others)
    except UserError:
        raise
    except Exception as error:
        raise DataError(f"{example.source}: {what} fails with {_told(error)}") from error
    return read_given(value, example.source, what)


def read_given(value: Any, source: str, what: str = "the context") -> Given:
    """A context from a row or a function.

    Args:
        value: a text; chat messages, each with ``role`` and ``content``; or demonstrations, each with
            ``prompt`` and ``completion`` or an :class:`Example`.
        source: names the row in messages.
        what: names the value in messages.

    Raises:
        DataError: it is empty or none of these.
    """
    place = f"{source}: {what}"
    wanted = "Give a text, chat messages (role and content), or demonstrations (prompt and completion)."
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"{place} is empty. {wanted}")
        return Given(value)
    if not isinstance(value, (list, tuple)):
        raise DataError(f"{place} is {type_name(value)}. {wanted}")
    if not value:
        raise DataError(f"{place} is an empty list. {wanted}")
    kinds = {_kind(item) for item in value}
    if kinds == {"messages"}:
        return Given([_strings(m, ("role", "content"), f"{place}: message {n}") for n, m in _numbered(value)])
    if kinds == {"demonstrations"}:
        found = []
        for n, item in _numbered(value):
            if isinstance(item, Example):
                if item.answer is None:
                    raise DataError(f"{place}: demonstration {n} ({item.source}) has no answer.")
                found.append(item)
                continue
            texts = _strings(item, ("prompt", "completion"), f"{place}: demonstration {n}")
            found.append(Example(texts["prompt"], texts["completion"], f"{source}, demonstration {n}"))
        return Given(demonstrations=tuple(found))
    if kinds == {"messages", "demonstrations"}:
        raise DataError(f"{place} mixes chat messages and demonstrations. {wanted}")
    n = next(n for n, item in _numbered(value) if _kind(item) is None)
    raise DataError(f"{place}: item {n} is neither a chat message nor a demonstration. {wanted}")


def _numbered(value: Sequence[Any]) -> list[tuple[int, Any]]:
    return list(enumerate(value, 1))


def _kind(item: Any) -> str | None:
    if isinstance(item, Example):
        return "demonstrations"
    if isinstance(item, Mapping):
        if {"role", "content"} <= set(item):
            return "messages"
        if {"prompt", "completion"} <= set(item):
            return "demonstrations"
    return None


def _strings(item: Mapping[str, Any], names: Sequence[str], place: str) -> dict[str, str]:
    for name in names:
        if not isinstance(item[name], str):
            raise DataError(f"{place}: {name} is {type_name(item[name])}, not text.")
    return {name: item[name] for name in names}
