"""What a query is put behind: the demonstrations of in-context learning (ICL).

Training examples get each other (leave one out), in one or several random orders; dev examples and
the queries of an ICL evaluation get all of the training examples in fixed orders, so that this long
prefix is the same for all of them and is computed once. Demonstrations are never cut: if the context
window is short, whole ones are dropped, farthest from the query first, and counted.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ia2.console import logger
from ia2.errors import DataError
from ia2.examples import Example
from ia2.tokens import Ids, encode_answer, encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEPARATOR = "\n\n"


def render(demonstrations: Sequence[Example], query: str, separator: str = SEPARATOR) -> str:
    """``I ∘ X``: demonstrations, each followed by the separator, then the query."""
    shown = "".join(f"{demo.query}{demo.answer}{separator}" for demo in demonstrations)
    return shown + query


def leave_one_out_orders(count: int, permutations: int, seed: int) -> list[list[list[int]]]:
    """For each of ``count`` examples, ``permutations`` random orders of all the others.

    An example's orders depend on the seed and its own place only, so more permutations extend the
    list rather than replace it.
    """
    orders: list[list[list[int]]] = []
    for i in range(count):
        draw = random.Random(f"leave-one-out {seed} {i}")
        others = [j for j in range(count) if j != i]
        orders.append([draw.sample(others, len(others)) for _ in range(permutations)])
    return orders


def pool_orders(count: int, permutations: int, seed: int) -> list[list[int]]:
    """``permutations`` random orders of a whole pool."""
    draw = random.Random(f"pool {seed}")
    return [draw.sample(range(count), count) for _ in range(permutations)]


@dataclass
class Dropped:
    """How many whole demonstrations did not fit, over how many prompts."""

    demonstrations: int = 0
    prompts: int = 0
    of: int = 0

    def report(self, limit: int, what: str) -> None:
        """Say it in one line, if there is anything to say."""
        if self.demonstrations:
            logger.warning(
                "%s: %d demonstrations dropped, whole, from %d of %d prompts, to fit the context "
                "window of %d tokens.",
                what,
                self.demonstrations,
                self.prompts,
                self.of,
                limit,
            )


@dataclass
class Contexts:
    """Prompts with and without demonstrations for a set of queries.

    Attributes:
        queries: the examples to be answered.
        demonstrations: where demonstrations are drawn from.
        orders: per query, per permutation, indices into ``demonstrations``.
        max_length: tokens of the context window.
        reserve: tokens of it kept for the answer.
        what: names the prompts in messages.
    """

    tokenizer: PreTrainedTokenizerBase
    queries: Sequence[Example]
    demonstrations: Sequence[Example]
    orders: list[list[list[int]]]
    max_length: int
    reserve: int
    separator: str = SEPARATOR
    what: str = "contexts"
    dropped: Dropped = field(default_factory=Dropped)

    def __post_init__(self) -> None:
        self.dropped.of = sum(len(order) for order in self.orders)
        self._lengths = [
            len(encode_answer(self.tokenizer, f"{d.query}{d.answer}{self.separator}", d.source))
            for d in self.demonstrations
        ]
        self._bare = [encode_prompt(self.tokenizer, q.query, q.source) for q in self.queries]
        self._fit()

    @classmethod
    def leave_one_out(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        *,
        permutations: int = 1,
        seed: int = 0,
        max_length: int,
        reserve: int,
        separator: str = SEPARATOR,
    ) -> Contexts:
        """Each example behind all of the others, in random orders (METHOD: teacher pass)."""
        orders = leave_one_out_orders(len(examples), permutations, seed)
        return cls(
            tokenizer,
            examples,
            examples,
            orders,
            max_length,
            reserve,
            separator,
            "teacher contexts",
        )

    @classmethod
    def pool(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        queries: Sequence[Example],
        demonstrations: Sequence[Example],
        *,
        permutations: int = 1,
        seed: int = 0,
        max_length: int,
        reserve: int,
        separator: str = SEPARATOR,
    ) -> Contexts:
        """Every query behind the same demonstrations in the same orders."""
        orders = pool_orders(len(demonstrations), permutations, seed)
        per_query = [orders] * len(queries)
        return cls(
            tokenizer,
            queries,
            demonstrations,
            per_query,
            max_length,
            reserve,
            separator,
            "ICL prompts",
        )

    def __len__(self) -> int:
        return len(self.queries)

    @property
    def permutations(self) -> int:
        """Number of orders of each query."""
        return len(self.orders[0]) if self.orders else 0

    def query_ids(self, i: int) -> Ids:
        """Ids of query ``i`` on its own: ``X``."""
        return self._bare[i]

    def context_ids(self, i: int, k: int = 0) -> Ids:
        """Ids of query ``i`` behind its demonstrations in order ``k``: ``I ∘ X``."""
        demonstrations = [self.demonstrations[j] for j in self.orders[i][k]]
        text = render(demonstrations, self.queries[i].query, self.separator)
        return encode_prompt(self.tokenizer, text, self.queries[i].source)

    def _fit(self) -> None:
        """Drop whole demonstrations where a prompt does not fit; refuse where that leaves none."""
        budget = self.max_length - self.reserve
        # Queries that share an order must go on sharing it after some demonstrations have gone.
        longest: dict[int, int] = {}
        for i, orders in enumerate(self.orders):
            if len(self._bare[i]) > budget:
                raise DataError(
                    f"{self.queries[i].source}: the prompt has {len(self._bare[i])} tokens; the context "
                    f"window holds {self.max_length}, of which {self.reserve} are kept for the answer. "
                    "Shorten the row or take a model with a longer window."
                )
            for order in orders:
                longest[id(order)] = max(longest.get(id(order), 0), len(self._bare[i]))
        fitted: dict[int, list[int]] = {}
        for i, orders in enumerate(self.orders):
            replaced = []
            for order in orders:
                if id(order) not in fitted:
                    fitted[id(order)] = self._fitting(order, budget - longest[id(order)], i)
                kept = fitted[id(order)]
                if len(kept) < len(order):
                    self.dropped.demonstrations += len(order) - len(kept)
                    self.dropped.prompts += 1
                replaced.append(kept)
            self.orders[i] = replaced
        self.dropped.report(self.max_length, self.what)

    def _fitting(self, order: list[int], budget: int, i: int) -> list[int]:
        # Joint tokenisation may differ from the sum by a token at each boundary.
        total = sum(self._lengths[j] for j in order)
        start = 0
        while start < len(order) and total + (len(order) - start) > budget:
            total -= self._lengths[order[start]]
            start += 1
        if order and start == len(order):
            raise DataError(
                f"{self.queries[i].source}: no demonstration fits beside the prompt in the context window "
                f"of {self.max_length} tokens. Shorten the rows, lower max_answer_tokens, or take a model "
                "with a longer window."
            )
        return order[start:]
