"""Which demonstrations a query is shown, in which order: one function an order, in :data:`ORDERS`."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ia2.data.examples import Example


@dataclass(frozen=True)
class Demonstrations:
    """What demonstrations are drawn from, and how.

    Attributes:
        order: a name of :data:`ORDERS`.
        permutations: contexts of each query; more of them extend the orders rather than replace them.
        leave_one_out: queries are the pool, and none gets itself.
        most: at most so many demonstrations a query.
        embed: gives the embeddings of examples, ``[n, d]``.
        search: gives orders of the whole pool, the best first.
        settings: what the search depends on beside; JSON-able.
    """

    order: str
    queries: Sequence[Example]
    pool: Sequence[Example]
    permutations: int = 1
    seed: int = 0
    leave_one_out: bool = False
    most: int | None = None
    embed: Callable[[Sequence[Example]], np.ndarray] | None = None
    search: Callable[[], list[list[int]]] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """What the orders depend on, beside the examples and the model; JSON-able."""
        seed = {} if self.order == "nearest" else {"seed": self.seed}
        return {"order": self.order, "leave_one_out": self.leave_one_out, **seed, **self.settings}


class Order(NamedTuple):
    """Demonstrations of each query, in order.

    Attributes:
        candidates: ``(i, k, limit)`` → at most ``limit`` indices for query ``i`` in its context ``k``, the
            one next to the query last.
        shared: every query has the same ones.
        whole: ``(order, count)`` → how many of the last ``count`` to show, where not all can be shown.
    """

    candidates: Callable[[int, int, int], list[int]]
    shared: bool = False
    whole: Callable[[Sequence[int], int], int] = lambda order, count: count


def pool_orders(count: int, permutations: int, seed: int) -> list[list[int]]:
    """Random orders of a whole pool."""
    draw = random.Random(f"pool {seed}")
    return [draw.sample(range(count), count) for _ in range(permutations)]


def fixed(orders: Sequence[Sequence[int]], *, leave_one_out: bool = False) -> Order:
    """The same orders for every query."""
    rows = [np.array(order, np.int32) for order in orders]

    def candidates(i: int, k: int, limit: int) -> list[int]:
        order = rows[k]
        if leave_one_out:
            order = order[-limit - 1 :]
            order = order[order != i]
        return order[max(len(order) - limit, 0) :].tolist()  # type: ignore[no-any-return]

    return Order(candidates, shared=not leave_one_out)


def in_random_order(draw: Demonstrations) -> Order:
    """Of each example random orders of the others; of a pool the same random orders for every query."""
    if not draw.leave_one_out:
        return fixed(pool_orders(len(draw.pool), draw.permutations, draw.seed))
    others = range(len(draw.pool) - 1)

    def candidates(i: int, k: int, limit: int) -> list[int]:
        own = random.Random(f"leave-one-out {draw.seed} {i}")
        for _ in range(k + 1):  # what does not fit is not drawn: this costs as much as is shown
            drawn = own.sample(others, min(limit, len(others)))
        return [j + (j >= i) for j in drawn]

    return Order(candidates)


def drawn_afresh(draw: Demonstrations) -> Order:
    """For each query its own draw from a pool of rows that nothing else uses (the paper's ICL)."""
    rows = range(len(draw.pool))
    return Order(lambda i, k, n: random.Random(f"fresh {draw.seed} {i}").sample(rows, min(n, len(rows))))


def with_shared_beginnings(draw: Demonstrations) -> Order:
    """Random orders of the others, in which many examples' contexts begin alike.

    A random order of all is cut into halves. The contexts of one half begin with the other half, and go
    on in the same way within their own. Where every beginning is computed once, ``N log2 N``
    demonstrations are computed for N examples, not ``N²``. Each example's order by itself is as random as
    otherwise; the orders of different examples depend on each other. Where not all fit the window, contexts
    begin at different positions and share less.
    """
    if not draw.leave_one_out:
        return in_random_order(draw)
    count = len(draw.pool)
    draws = [random.Random(f"shared {draw.seed} {k}") for k in range(draw.permutations)]
    orders = [np.array(own.sample(range(count), count), np.int32) for own in draws]
    positions = [np.argsort(order) for order in orders]

    def candidates(i: int, k: int, limit: int) -> list[int]:
        halves, low, high = [], 0, count
        while high - low > 1:
            middle = (low + high) // 2
            if positions[k][i] < middle:
                halves.append(orders[k][middle:high])
                high = middle
            else:
                halves.append(orders[k][low:middle])
                low = middle
        shown: list[int] = []
        while halves and len(shown) < limit:
            shown[:0] = halves.pop().tolist()
        return shown[max(len(shown) - limit, 0) :]

    return Order(candidates)


def balanced(draw: Demonstrations) -> Order:
    """Answers alternate: one demonstration of each in turn, as long as there are any.

    Where not all fit, only whole rounds are shown, so that every answer comes equally often (one that
    has run out of demonstrations excepted).
    """
    numbers: dict[str | None, int] = {}
    labels = np.array([numbers.setdefault(demo.answer, len(numbers)) for demo in draw.pool], np.int32)
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])

    def whole(order: Sequence[int], count: int) -> int:
        complete = 0
        seen: set[int] = set()
        for shown, j in enumerate(reversed(order[-count - 1 :])):
            if labels[j] in seen:  # a round is over when an answer comes again
                complete, seen = shown, set()
            seen.add(labels[j])
        # not even one round fits: as many different answers as do
        return complete or count

    def candidates(i: int, k: int, limit: int) -> list[int]:
        draws = random.Random(f"balanced {draw.seed} {i if draw.leave_one_out else 'pool'} {k}")
        # one label more than can be shown, and one that may turn out to be empty
        picked = [members[n] for n in draws.sample(range(len(members)), min(limit + 2, len(members)))]
        if draw.leave_one_out:
            picked = [rows[rows != i] if labels[rows[0]] == labels[i] else rows for rows in picked]
        sizes = [len(rows) for rows in picked]
        rounds = bisect_left(
            range(max(sizes, default=0)),
            min(limit + 1, sum(sizes)),
            key=lambda r: sum(min(size, r) for size in sizes),
        )
        drawn = [rows[draws.sample(range(len(rows)), min(len(rows), rounds))].tolist() for rows in picked]
        nearest_first = [rows[r] for r in range(rounds) for rows in drawn if r < len(rows)]
        order = nearest_first[: limit + 1][::-1]
        return order if len(order) <= limit else order[len(order) - whole(order, limit) :]

    return Order(candidates, shared=not draw.leave_one_out, whole=whole)


def nearest(draw: Demonstrations) -> Order:
    """Each query's nearest demonstrations by the cosine of the base model's embeddings, the nearest last."""

    @cache
    def directions() -> list[np.ndarray]:
        assert draw.embed is not None
        both = draw.embed(draw.queries), draw.embed(draw.pool)
        return [rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in both]

    def candidates(i: int, k: int, limit: int) -> list[int]:
        queries, pool = directions()
        order = np.argsort(-(pool @ queries[i]), kind="stable")  # of equals, the first comes first
        if draw.leave_one_out:
            order = order[order != i]
        return order[:limit][::-1].tolist()  # type: ignore[no-any-return]

    return Order(candidates)


def best_of_many(draw: Demonstrations) -> Order:
    """The orders of the whole pool under which the base model finds the true answers most likely."""

    @cache
    def best() -> Order:
        assert draw.search is not None
        return fixed(draw.search()[: draw.permutations], leave_one_out=draw.leave_one_out)

    return Order(lambda i, k, limit: best().candidates(i, k, limit), shared=not draw.leave_one_out)


ORDERS: dict[str, Callable[[Demonstrations], Order]] = {
    "random": in_random_order,
    "shared": with_shared_beginnings,
    "balanced": balanced,
    "nearest": nearest,
    "search": best_of_many,
    "fresh": drawn_afresh,
}
"""``AdaptConfig.demo_order``, and ``fresh`` of ``icl_demonstrations``, → what makes the order."""
