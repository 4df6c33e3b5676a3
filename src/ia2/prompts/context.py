"""What a query is put behind: demonstrations of in-context learning (ICL), or a context of its own.

Training examples get each other (leave one out), in one or several orders; dev examples and the
queries of an ICL evaluation get the training examples in fixed orders, so that this long prefix is
the same for all of them and is computed once. Demonstrations are never cut: if the context window is
short, whole ones are left out and counted. With more examples than a window holds, each prompt draws
its own.

Prompts are made when they are asked for, so memory hardly grows with the number of examples: two
integers each, whatever the number of their demonstrations.
"""

from __future__ import annotations

import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ia2.data.examples import Example
from ia2.models.tokens import Ids
from ia2.prompts.format import SEPARATOR, Message, Rendering, render
from ia2.utils.errors import DataError
from ia2.utils.files import digest
from ia2.utils.logging import logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SEPARATOR", "Contexts", "DemonstrationContexts", "Given", "GivenContexts", "Orders", "render"]

# Queries and demonstrations that are looked at to count what does not fit; beyond, it is an estimate.
_LOOKED_AT = 1000, 10**6


# ----------------------------------------------------------------------------------------- orders


class Orders(ABC):
    """Which demonstrations a query could get, in which order: a pure function of the settings.

    Attributes:
        permutations: number of orders of each query.
        leave_one_out: queries are the demonstrations, and none gets itself.
        shared: every query has the same ones.
    """

    permutations: int = 1
    leave_one_out: bool = False
    shared: bool = False

    @abstractmethod
    def candidates(self, i: int, k: int, limit: int) -> list[int]:
        """At most ``limit`` demonstrations for query ``i`` in order ``k``, nearest to the query last."""

    def whole(self, order: Sequence[int], count: int) -> int:
        """How many of the last ``count`` of ``order`` to show, where not all can be shown."""
        return count

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the orders depend on, beside the examples and the model; JSON-able."""


class LeaveOneOut(Orders):
    """For each of ``count`` examples, random orders of the others.

    An example's orders depend on the seed and its own place only, so more permutations extend them
    rather than replace them. What does not fit is not drawn: this costs as much as is shown.
    """

    leave_one_out = True

    def __init__(self, count: int, permutations: int = 1, seed: int = 0) -> None:
        self.count, self.permutations, self.seed = count, permutations, seed

    def candidates(self, i: int, k: int, limit: int) -> list[int]:
        draw = random.Random(f"leave-one-out {self.seed} {i}")
        others = range(self.count - 1)
        for _ in range(k + 1):
            drawn = draw.sample(others, min(limit, len(others)))
        return [j + (j >= i) for j in drawn]

    def facts(self) -> dict[str, Any]:
        return {"order": "random", "leave_one_out": True, "seed": self.seed}


class FixedOrders(Orders):
    """The same orders for every query.

    Args:
        orders: of all demonstrations, the last nearest to the query.
        leave_one_out: queries are the demonstrations, and none gets itself.
    """

    def __init__(self, orders: Sequence[Sequence[int]], *, leave_one_out: bool = False) -> None:
        self._orders = [np.array(order, np.int32) for order in orders]
        self.permutations = len(orders)
        self.leave_one_out, self.shared = leave_one_out, not leave_one_out

    def candidates(self, i: int, k: int, limit: int) -> list[int]:
        order = self._orders[k]
        if self.leave_one_out:
            order = order[-limit - 1 :]
            order = order[order != i]
        return order[max(len(order) - limit, 0) :].tolist()  # type: ignore[no-any-return]

    def facts(self) -> dict[str, Any]:
        digests = [hashlib.sha256(order.tobytes()).hexdigest()[:16] for order in self._orders]
        return {"order": digests, "leave_one_out": self.leave_one_out}


class FreshOrders(Orders):
    """For each query its own draw from a pool of rows that nothing else uses (the paper's ICL)."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.count, self.seed = count, seed

    def candidates(self, i: int, k: int, limit: int) -> list[int]:
        return random.Random(f"fresh {self.seed} {i}").sample(range(self.count), min(limit, self.count))

    def facts(self) -> dict[str, Any]:
        return {"order": "fresh", "seed": self.seed}


def pool_orders(count: int, permutations: int, seed: int) -> list[list[int]]:
    """``permutations`` random orders of a whole pool; more permutations extend the list."""
    draw = random.Random(f"pool {seed}")
    return [draw.sample(range(count), count) for _ in range(permutations)]


# --------------------------------------------------------------------------------------- contexts


class Contexts(ABC):
    """Queries, each on its own and in its context; prompts are tokenised when they are asked for.

    Args:
        rendering: how text becomes ids.
        queries: the examples to be answered.
        max_length: tokens of the context window.
        reserve: tokens of it kept for the answer.
        what: names the prompts in messages.

    Raises:
        DataError: a query is longer than the window.
    """

    def __init__(
        self,
        rendering: Rendering,
        queries: Sequence[Example],
        max_length: int,
        reserve: int,
        what: str = "contexts",
    ) -> None:
        self.rendering, self.queries, self.what = rendering, queries, what
        self.max_length, self.reserve = max_length, reserve
        self._bare = bare_lengths(rendering, queries, max_length, reserve)
        self._suffix = np.full(len(queries), -1, np.int32)

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
    ) -> DemonstrationContexts:
        """Each example behind the others, as plain text in random orders (METHOD: teacher pass)."""
        rendering = Rendering(tokenizer, separator)
        orders = LeaveOneOut(len(examples), permutations, seed)
        return DemonstrationContexts(
            rendering, examples, examples, orders, max_length, reserve, "teacher contexts"
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
    ) -> DemonstrationContexts:
        """Every query behind the same demonstrations, as plain text in the same random orders."""
        rendering = Rendering(tokenizer, separator)
        orders = FixedOrders(pool_orders(len(demonstrations), permutations, seed))
        return DemonstrationContexts(
            rendering, queries, demonstrations, orders, max_length, reserve, "ICL prompts"
        )

    def __len__(self) -> int:
        return len(self.queries)

    @property
    @abstractmethod
    def permutations(self) -> int:
        """Number of contexts of each query."""

    def query_ids(self, i: int) -> Ids:
        """Ids of query ``i`` on its own: ``X``."""
        return self.rendering.query_ids(self.queries[i])

    @abstractmethod
    def context_ids(self, i: int, k: int = 0) -> Ids:
        """Ids of query ``i`` in its ``k``-th context: ``I ∘ X``."""

    def common_suffix(self, i: int) -> int:
        """Ids at the end of query ``i`` that are also the end of each of its contexts."""
        if self._suffix[i] < 0:
            query = self.query_ids(i)
            same = len(query)
            for k in range(self.permutations):
                context = self.context_ids(i, k)
                n = 0
                while n < min(same, len(context)) and query[-1 - n] == context[-1 - n]:
                    n += 1
                same = n
            self._suffix[i] = same
        return int(self._suffix[i])

    def cost(self, i: int) -> int:
        """About how many tokens have to be computed for query ``i`` alone; processes share by it."""
        return int(self._bare[i])

    def prepare(self) -> None:
        """Do now what would otherwise be done when the first context is asked for."""
        if len(self):
            self.context_ids(0)

    def facts(self) -> dict[str, Any]:
        """What the contexts depend on, beside tokenizer and model: small, JSON-able.

        Two that differ in any context differ here.
        """
        return {
            "rendering": self.rendering.facts(),
            "window": [self.max_length, self.reserve],
            "permutations": self.permutations,
            "queries": text_digest((query.query,) for query in self.queries),
            **self._facts(),
        }

    @abstractmethod
    def _facts(self) -> dict[str, Any]: ...


@dataclass
class Dropped:
    """How many whole demonstrations did not fit, over how many prompts.

    Attributes:
        demonstrations: left out of the prompts that were looked at.
        prompts: number of these that lack some.
        of: number of prompts that were looked at.
        total: number of all prompts; more than ``of`` where this is an estimate.
    """

    demonstrations: int = 0
    prompts: int = 0
    of: int = 0
    total: int = 0

    def report(self, limit: int, what: str) -> None:
        """Say it in one line, if there is anything to say."""
        if not self.demonstrations:
            return
        if self.total > self.of:
            text = (
                f"about {self.demonstrations / self.of:.1f} demonstrations dropped, whole, from each of "
                f"{self.total} prompts (by {self.of} of them)"
            )
        else:
            text = (
                f"{self.demonstrations} demonstrations dropped, whole, from {self.prompts} of "
                f"{self.total} prompts"
            )
        logger.warning("%s: %s, to fit the context window of %d tokens.", what, text, limit)


class DemonstrationContexts(Contexts):
    """Queries behind demonstrations: as many whole ones as fit.

    Args:
        rendering: how text becomes ids.
        queries: the examples to be answered.
        demonstrations: what demonstrations are drawn from.
        orders: which come, and in what order.
        max_length: tokens of the context window.
        reserve: tokens of it kept for the answer.
        what: names the prompts in messages.
        most: at most so many demonstrations a prompt.
        lengths: :meth:`Rendering.demonstration_lengths`, where they are known already.

    Raises:
        DataError: a query is longer than the window, or no demonstration fits beside it.
    """

    def __init__(
        self,
        rendering: Rendering,
        queries: Sequence[Example],
        demonstrations: Sequence[Example],
        orders: Orders,
        max_length: int,
        reserve: int,
        what: str = "contexts",
        most: int | None = None,
        lengths: np.ndarray | None = None,
    ) -> None:
        super().__init__(rendering, queries, max_length, reserve, what)
        self.demonstrations, self.orders, self.most = demonstrations, orders, most
        known = rendering.demonstration_lengths(demonstrations) if lengths is None else lengths
        # joint tokenisation may differ from the sum by a token at each boundary
        self._sizes = known + np.int32(1)
        room = max_length - reserve - self._bare
        if orders.shared and len(queries):
            # queries that share their demonstrations must share them all
            room = np.full(len(queries), room.min(), np.int32)
        self._room = room
        self._own = orders.leave_one_out
        self._shared: dict[int, list[int]] = {}
        self._check()

    @property
    def permutations(self) -> int:
        return self.orders.permutations

    def context_ids(self, i: int, k: int = 0) -> Ids:
        _ = self.dropped  # what was left out is said once, before it is used
        query = self.queries[i]
        shown = [self.demonstrations[j] for j in self.chosen(i, k)]
        ids = self.rendering.context_ids(shown, query)
        # Lengths of parts are an estimate where a chat template treats places differently.
        budget, planned = self.max_length - self.reserve, len(shown)
        while len(ids) > budget and len(shown) > 1:
            shown = shown[1:]
            ids = self.rendering.context_ids(shown, query)
        if len(shown) < planned:
            logger.warning("%s: %d more demonstrations dropped.", query.source, planned - len(shown))
        if len(ids) > budget:
            raise _nothing_fits(query, self.max_length)
        return ids

    def chosen(self, i: int, k: int = 0) -> list[int]:
        """Indices of the demonstrations that query ``i`` has in order ``k``, as they are shown."""
        if not self.orders.shared:
            return self._fitting(i, k)
        if k not in self._shared:
            self._shared[k] = self._fitting(i, k)
        return self._shared[k]

    def tokens(self, i: int, k: int = 0) -> int:
        """About how many tokens :meth:`context_ids` has."""
        return int(self._bare[i]) + int(self._sizes[self.chosen(i, k)].sum())

    def cost(self, i: int) -> int:
        own = int(self._bare[i])
        if self.orders.shared:
            return own
        return own + min(int(self._sizes.sum(dtype=np.int64)), max(int(self._room[i]), 0))

    @cached_property
    def dropped(self) -> Dropped:
        """What does not fit; counted and reported when the first context is asked for."""
        total = len(self.queries) * self.permutations
        found = Dropped(of=total, total=total)
        everything = int(self._sizes.sum(dtype=np.int64))
        if not total or everything <= self._room.min():
            return found
        others = len(self.demonstrations) - self._own
        if self.orders.shared:
            seen, weight = [0], len(self.queries)
        else:
            most, drawn = _LOOKED_AT
            most = max(1, min(most, drawn // max(1, self._limit * self.permutations**2)))
            step = -(-len(self.queries) // most)
            seen, weight = list(range(0, len(self.queries), step)), 1
            found.of = len(seen) * self.permutations
        for i in seen:
            for k in range(self.permutations):
                wanted = others
                if self.most is not None:
                    # what is not wanted is not missing
                    whole = self._limit == min(self.most, others)
                    wanted = len(self._candidates(i, k)) if whole else min(self.most, others)
                missing = wanted - len(self.chosen(i, k))
                found.demonstrations += missing * weight
                found.prompts += (missing > 0) * weight
        found.report(self.max_length, self.what)
        return found

    def _facts(self) -> dict[str, Any]:
        shown = ((demo.query, demo.answer) for demo in self.demonstrations)
        return {
            "orders": self.orders.facts(),
            "most": self.most,
            "demonstrations": text_digest(shown),
        }

    def _check(self) -> None:
        """Refuse a query that not even the shortest demonstration fits beside."""
        if not len(self.queries) or len(self.demonstrations) <= self._own:
            return
        first, second = self._shortest[0], self._shortest[-1]
        shortest = np.full(len(self.queries), self._sizes[first])
        if self._own:
            shortest[first] = self._sizes[second]
        if (bad := shortest > self._room).any():
            # the longest one, if it is what the others are measured by
            i = int(np.argmax(self._bare if self.orders.shared else bad))
            raise _nothing_fits(self.queries[i], self.max_length)

    @cached_property
    def _shortest(self) -> list[int]:
        """The two shortest demonstrations: one of them is not the query itself."""
        return np.argsort(self._sizes, kind="stable")[:2].tolist()  # type: ignore[no-any-return]

    @cached_property
    def _limit(self) -> int:
        """More demonstrations than this fit beside no query: the shortest ones, one after the other."""
        if not len(self.queries):
            return 0
        sums = np.cumsum(np.sort(self._sizes), dtype=np.int64)
        fit = int(np.searchsorted(sums, self._room.max(), side="right"))
        return fit if self.most is None else min(fit, self.most)

    def _candidates(self, i: int, k: int) -> list[int]:
        return self.orders.candidates(i, k, self._limit)

    def _fitting(self, i: int, k: int) -> list[int]:
        """Whole demonstrations that fit: those farthest from the query go first."""
        room = int(self._room[i])
        order = np.array(self._candidates(i, k), np.int64)
        # one that would not fit even alone keeps no other out
        order = order[self._sizes[order] <= room]
        sums = np.cumsum(self._sizes[order[::-1]], dtype=np.int64)
        count = int(np.searchsorted(sums, room, side="right"))
        if count < len(order):
            count = self.orders.whole(order.tolist(), count)
        if not count and len(self.demonstrations) > self._own:
            # all that were drawn are too long; the shortest is known to fit
            return [next(j for j in self._shortest if not (self._own and j == i))]
        return order[len(order) - count :].tolist()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Given:
    """A context that is no choice of demonstrations: a text or chat messages, or a row's own list."""

    text: str | Sequence[Message] | None = None
    demonstrations: Sequence[Example] = ()


class GivenContexts(Contexts):
    """Each query behind a context of its own, or all behind one.

    Args:
        rendering: how text becomes ids.
        queries: the examples to be answered.
        given: one for each query; looked up anew each time.
        max_length: tokens of the context window.
        reserve: tokens of it kept for the answer.
        what: names the prompts in messages.

    Raises:
        DataError: a query or a context is longer than the window. Of a row's own demonstrations whole
            ones are dropped instead, and counted.
    """

    def __init__(
        self,
        rendering: Rendering,
        queries: Sequence[Example],
        given: Sequence[Given],
        max_length: int,
        reserve: int,
        what: str = "contexts",
    ) -> None:
        super().__init__(rendering, queries, max_length, reserve, what)
        self.given = given
        self._digest = text_digest(_plain(given[i]) for i in range(len(queries)))
        self.dropped = Dropped(of=len(queries), total=len(queries))
        self._fit()

    @property
    def permutations(self) -> int:
        return 1

    def context_ids(self, i: int, k: int = 0) -> Ids:
        given, query = self.given[i], self.queries[i]
        shown = given.demonstrations[int(self._skipped[i]) :]
        return self.rendering.context_ids(shown, query, given.text)

    def _facts(self) -> dict[str, Any]:
        return {"given": self._digest}

    def _fit(self) -> None:
        self._skipped = np.zeros(len(self.queries), np.int32)
        budget = self.max_length - self.reserve
        texts = (
            (self.rendering.prompt_text(each.demonstrations, query, each.text), query.source)
            for query, each in zip(self.queries, self.given, strict=True)
        )
        lengths = self.rendering.lengths(texts)
        for i in np.flatnonzero(lengths > budget).tolist():
            demonstrations = self.given[i].demonstrations
            while lengths[i] > budget and self._skipped[i] + 1 < len(demonstrations):
                self._skipped[i] += 1
                lengths[i] = len(self.context_ids(i))
            if lengths[i] > budget:
                what = "the context is" if not demonstrations else "no demonstration of the row fits: it is"
                raise DataError(
                    f"{self.queries[i].source}: {what} too long: with the prompt it has {lengths[i]} tokens; "
                    f"the context window holds {self.max_length}, of which {self.reserve} are kept for the "
                    "answer. Shorten it, or take a model with a longer window."
                )
            self.dropped.demonstrations += int(self._skipped[i])
            self.dropped.prompts += 1
        self.dropped.report(self.max_length, self.what)


# -------------------------------------------------------------------------------------- small parts


def bare_lengths(
    rendering: Rendering, queries: Sequence[Example], max_length: int, reserve: int, virtual: int = 0
) -> np.ndarray:
    """Tokens of each query on its own, ``[n]``.

    Raises:
        DataError: one is longer than the window.
    """
    lengths = rendering.lengths((rendering.prompt_text((), query), query.source) for query in queries)
    for i in np.flatnonzero(lengths > max_length - reserve - virtual)[:1].tolist():
        taken = f" and {virtual} taken by the adapter's virtual tokens" if virtual else ""
        raise DataError(
            f"{queries[i].source}: the prompt has {lengths[i]} tokens; the context window holds "
            f"{max_length}, of which {reserve} are kept for the answer{taken}. Shorten the row, lower "
            "max_answer_tokens, or take a model with a longer window."
        )
    return lengths


def _nothing_fits(query: Example, max_length: int) -> DataError:
    return DataError(
        f"{query.source}: no demonstration fits beside the prompt in the context window of {max_length} "
        "tokens. Shorten the rows, lower max_answer_tokens, or take a model with a longer window."
    )


def text_digest(rows: Iterable[Any]) -> str:
    """Sixteen hex digits that change with any row and with their order; rows are read one by one."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(row).encode() + b"\n")
    return found.hexdigest()[:16]


def _plain(given: Given) -> Any:
    text = given.text if given.text is None or isinstance(given.text, str) else list(given.text)
    return digest([text, [[demo.query, demo.answer] for demo in given.demonstrations]])
