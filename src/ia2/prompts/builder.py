"""All prompts of one set of training examples: bare queries, and queries in their contexts.

The context is made of demonstrations unless a text, a column of the rows or a function takes their place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Generic, TypeVar, overload

import numpy as np

from ia2.config import AdaptConfig
from ia2.config.reading import validate
from ia2.data.examples import Example
from ia2.models.load import BaseModel
from ia2.models.tokens import Ids
from ia2.prompts.context import Context, Contexts, bare_lengths
from ia2.prompts.demonstrations import Demonstrations
from ia2.prompts.format import PromptFormat
from ia2.prompts.own_context import ContextFunction, context_text, own_contexts
from ia2.prompts.ranking import embed_queries, search_orders
from ia2.utils.errors import DataError
from ia2.utils.imports import load_function

T = TypeVar("T")


class PromptBuilder:
    """Prompts of one set of training examples, and of queries that are put behind them.

    Args:
        base: the model; run only by orders of demonstrations that need it.
        reserve: tokens of the context window kept for the answer.
        window: tokens of the context window.
        train: the training examples.
        config: settings.
        function: makes contexts, instead of ``config.context_function``.

    Raises:
        ConfigError: settings that contradict the function, a function that cannot be imported, or no chat
            template where one is needed.
        DataError: a context file that cannot be read.
    """

    def __init__(
        self,
        base: BaseModel,
        reserve: int,
        window: int,
        train: Sequence[Example],
        config: AdaptConfig,
        function: ContextFunction | None = None,
    ) -> None:
        if function is not None:  # it contradicts what a function by its import path would
            validate(type(config), {**config.model_dump(), "context_function": "given:function"})
        self.base, self.reserve, self.window, self.train, self.config = base, reserve, window, train, config
        self.format = PromptFormat(base.tokenizer, config.separator, config.chat, config.thinking)
        self._text, self._function = context_text(config), function
        if config.context_function:
            self._function = load_function(config.context_function, "context_function")
        self._known: dict[tuple[object, ...], Contexts] = {}

    @property
    def shows_demonstrations(self) -> bool:
        """Whether contexts are made of demonstrations."""
        return not (self._text or self._function or self.config.context_column)

    @cached_property
    def train_contexts(self) -> Contexts:
        """Every training example in its context: by default, behind all the others.

        Raises:
            DataError: a prompt or its context does not fit the context window, or is malformed.
        """
        draws = self.config.context_draws
        return self._contexts("teacher contexts", self.train, permutations=draws, leave_one_out=True)

    def pool_contexts(
        self, queries: Sequence[Example], permutations: int = 1, reserve: int | None = None
    ) -> Contexts:
        """Queries behind the training examples, or in the context that the settings give them.

        In so many orders (a context of another kind is always one). ``reserve``: tokens of the window kept
        for the answer, where these queries need others. Errors are those of :attr:`train_contexts`.
        """
        return self._contexts("ICL prompts", queries, reserve, permutations=permutations)

    def fresh_contexts(
        self, queries: Sequence[Example], pool: Sequence[Example], reserve: int | None = None
    ) -> Contexts:
        """Queries behind as many demonstrations as there are training examples, drawn for each from a pool.

        The pool of one set of training examples is always the same.

        Raises:
            DataError: the pool is smaller than that; see :attr:`train_contexts`.
        """
        most = min(len(self.train), self.config.max_demonstrations or len(self.train))
        if len(pool) < most:
            raise DataError(
                f"icl_demonstrations fresh draws {most} demonstrations for each query from rows that are in "
                f"no split; there are {len(pool)}. Give more rows, or set num_examples, or leave it out."
            )
        return self._contexts("ICL prompts", queries, reserve, order="fresh", pool=pool, most=most)

    def query_prompts(self, examples: Sequence[Example]) -> Sequence[Ids]:
        """Bare prompts; see :func:`query_prompts`."""
        return query_prompts(self.format, examples, self.window, self.reserve)

    def _contexts(
        self,
        name: str,
        queries: Sequence[Example],
        reserve: int | None = None,
        *,
        order: str | None = None,
        pool: Sequence[Example] | None = None,
        **changes: Any,
    ) -> Contexts:
        """Made once, so that what was checked is what is used, and what does not fit is reported once."""
        key = (name, order, tuple(queries), reserve, changes.get("permutations"))
        if key not in self._known:
            source: Demonstrations | list[Context]
            if order or self.shows_demonstrations:
                source = self._draw(order or self.config.demo_order, queries, pool or self.train, **changes)
            else:
                source = self._own(queries, **changes)
            lengths = self._lengths if pool is None and isinstance(source, Demonstrations) else None
            reserve = reserve or self.reserve
            self._known[key] = Contexts(self.format, queries, self.window, reserve, name, source, lengths)
        return self._known[key]

    def _draw(
        self, order: str, queries: Sequence[Example], pool: Sequence[Example], **changes: Any
    ) -> Demonstrations:
        config = self.config
        options = {"most": config.max_demonstrations, "seed": config.seed, **changes}
        if order == "search":
            window = [self.window, self.reserve, config.max_demonstrations]
            options["settings"] = {"tries": config.demo_search_orders, "window": window}
        return Demonstrations(
            order, queries, pool, embed=self._embed, search=lambda: self._ranked_orders, **options
        )

    def _own(
        self, queries: Sequence[Example], permutations: int = 1, leave_one_out: bool = False
    ) -> list[Context]:
        """Each query's context, where it is not made of the training examples."""
        if self._text is not None:
            return [Context(self._text)] * len(queries)
        train = self.train

        def others(i: int) -> Sequence[Example]:
            return [*train[:i], *train[i + 1 :]] if leave_one_out else train

        return own_contexts(queries, self.config.context_column or self._function, others)

    @cached_property
    def _lengths(self) -> np.ndarray:
        return self.format.demonstration_lengths(self.train)

    @cached_property
    def _ranked_orders(self) -> list[list[int]]:
        return search_orders(
            self.base.current,
            self.format,
            self.train,
            window=self.window,
            reserve=self.reserve,
            tries=self.config.demo_search_orders,
            seed=self.config.seed,
            most=self.config.max_demonstrations,
        )

    @cached_property
    def _embedded_train(self) -> np.ndarray:
        return embed_queries(self.base.current, self.format, self.train)

    def _embed(self, queries: Sequence[Example]) -> np.ndarray:
        if queries is self.train:
            return self._embedded_train
        return embed_queries(self.base.current, self.format, queries)


def query_prompts(
    prompt_format: PromptFormat, examples: Sequence[Example], window: int, reserve: int, virtual: int = 0
) -> Sequence[Ids]:
    """Bare prompts, tokenised when they are asked for; see :func:`~ia2.prompts.context.bare_lengths`.

    Raises:
        DataError: one is longer than the context window.
    """
    bare_lengths(prompt_format, examples, window, reserve, virtual)
    return _Lazy(len(examples), lambda i: prompt_format.query_ids(examples[i]))


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
        rows = range(self._count)[index]
        if isinstance(rows, range):
            return _Lazy(len(rows), lambda i: self._make(rows[i]))
        return self._make(rows)
