"""Orders of demonstrations: complete, reproducible, nobody's own, and what each promises."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ia2.config import AdaptConfig
from ia2.data.examples import Example
from ia2.prompts.demonstrations import ORDERS, Demonstrations, Order


def labelled(*answers: str) -> list[Example]:
    return [Example(f"query {i}", answer, f"row {i}") for i, answer in enumerate(answers)]


def order(
    name: str, pool: Sequence[Example], permutations: int = 1, seed: int = 0, **options: object
) -> Order:
    """Of the pool's own examples unless other queries are given."""
    options = {"queries": pool, "leave_one_out": True, **options}
    return ORDERS[name](
        Demonstrations(order=name, pool=pool, permutations=permutations, seed=seed, **options)
    )  # type: ignore[arg-type]


def test_every_order_of_the_settings_is_there() -> None:
    names = AdaptConfig.model_fields["demo_order"].annotation.__args__  # type: ignore[union-attr]
    assert {*names, "fresh"} == set(ORDERS)


def naive_order(count: int, i: int, k: int, seed: int) -> list[int]:
    """A random order of all the others, as it has been from the first release on."""
    draw = random.Random(f"leave-one-out {seed} {i}")
    others = [j for j in range(count) if j != i]
    return [draw.sample(others, len(others)) for _ in range(k + 1)][k]


@pytest.mark.parametrize("name", ["random", "shared", "balanced"])
@given(
    answers=st.lists(st.sampled_from("abcd"), min_size=1, max_size=14),
    permutations=st.integers(1, 3),
    seed=st.integers(0, 5),
    limit=st.integers(0, 15),
)
@settings(deadline=None)
def test_random_orders(name: str, answers: list[str], permutations: int, seed: int, limit: int) -> None:
    examples, count = labelled(*answers), len(answers)
    own, longer = (order(name, examples, permutations + n, seed) for n in (0, 2))
    pool = order(name, examples, permutations, seed, leave_one_out=False)
    assert pool.shared and not own.shared
    for k in range(permutations):
        assert sorted(pool.candidates(0, k, count)) == list(range(count))
        assert len(pool.candidates(0, k, limit)) <= limit
        for i in range(count):
            everyone, some = own.candidates(i, k, count), own.candidates(i, k, limit)
            assert sorted(everyone) == [j for j in range(count) if j != i]
            assert some == longer.candidates(i, k, limit), "more permutations extend the orders"
            assert len({*some} - {i}) == len(some) <= limit
            if name == "random":
                assert everyone == naive_order(count, i, k, seed)
            if name == "shared":
                assert some == everyone[max(len(everyone) - limit, 0) :]


@pytest.mark.parametrize("name", ["random", "shared", "balanced", "fresh"])
def test_seeds_and_queries_have_their_own(name: str) -> None:
    examples = labelled(*"abcd" * 4)

    def drawn(seed: int) -> list[list[int]]:
        return [order(name, examples, 1, seed).candidates(i, 0, 5) for i in range(16)]

    assert drawn(0) != drawn(1)
    assert len({tuple(row) for row in drawn(0)}) > 8


def beginnings(rows: Sequence[Sequence[int]]) -> int:
    """Different beginnings of the rows, the rows themselves among them: what must be computed."""
    return len({tuple(row[: n + 1]) for row in rows for n in range(len(row))})


@pytest.mark.parametrize("count", [2, 3, 8, 21, 40])
def test_shared_beginnings(count: int) -> None:
    def promised(n: int) -> int:  # each half once for the other, and so within each
        return 0 if n < 2 else n + promised(n // 2) + promised(n - n // 2)

    drawn = order("shared", labelled(*"a" * count))
    found = [drawn.candidates(i, 0, count) for i in range(count)]
    assert beginnings(found) == promised(count) <= count * math.ceil(math.log2(count))


def test_shared_orders_are_as_random_as_independent_ones() -> None:
    examples = labelled(*"aaaa")
    for i in range(4):
        seen = Counter(tuple(order("shared", examples, 1, s).candidates(i, 0, 4)) for s in range(1800))
        assert len(seen) == 6 and all(240 < count < 360 for count in seen.values())


# ---------------------------------------------------------------------------------------- balanced


@pytest.mark.parametrize(("limit", "each"), [(2, 0), (3, 1), (5, 1), (6, 2), (7, 2), (9, 3)])
def test_equally_many_of_each(limit: int, each: int) -> None:
    examples = labelled(*"abc" * 40)
    seen: Counter[int] = Counter()
    for i in range(120):
        shown = order("balanced", examples).candidates(i, 0, limit)
        seen.update(shown)
        counts = Counter(examples[j].answer for j in shown)
        # where not one of each fits: as many different ones as do
        assert counts == (dict.fromkeys("abc", each) if each else Counter(counts.keys()))
        assert each or len(shown) == limit
    assert len(seen) > 90  # each example draws its own


@pytest.mark.parametrize(
    ("answers", "i", "limit", "counts"),
    [
        ("a" * 20 + "bbb", 0, 10, {"a": 7, "b": 3}),  # what has run out keeps the others from nothing
        ("a" * 20 + "bbb", 22, 4, {"a": 2, "b": 2}),
        ("aba", 1, 9, {"a": 2}),  # the only b gets no b
    ],
)
def test_rare_answers(answers: str, i: int, limit: int, counts: dict[str, int]) -> None:
    examples = labelled(*answers)
    shown = order("balanced", examples).candidates(i, 0, limit)
    assert Counter(examples[j].answer for j in shown) == counts


# --------------------------------------------------------------------------------- asking the model


def test_nearest_is_next_to_the_query() -> None:
    pool = labelled(*"abcdefgh")
    points = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    points[5] = 7 * points[2] + 0.01  # lengths do not count
    asked: list[int] = []

    def embedded(examples: Sequence[Example]) -> np.ndarray:
        asked.append(len(examples))
        return points[[int(e.query.split()[1]) for e in examples]]

    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    own = order("nearest", pool, embed=embedded)
    others = order("nearest", pool, embed=embedded, queries=pool[:2], leave_one_out=False)
    assert not asked and not others.shared  # nothing is computed before it is needed
    for i in range(8):
        near = sorted((j for j in range(8) if j != i), key=lambda j: float(unit[i] @ unit[j]))
        assert own.candidates(i, 0, 9) == near
        assert own.candidates(i, 0, 2) == near[-2:]
    assert own.candidates(5, 0, 1) == [2] and others.candidates(1, 0, 8)[-1] == 1
    assert asked == [8, 8, 2, 8]


def test_the_best_orders_are_asked_for_late() -> None:
    asked: list[int] = []

    def search() -> list[list[int]]:
        asked.append(1)
        return [[3, 1, 0, 2], [0, 1, 2, 3], [2, 1, 3, 0]]

    own = order("search", labelled(*"abab"), 2, search=search)
    pool = order("search", labelled(*"abab"), 1, search=search, leave_one_out=False)
    assert pool.shared and not asked
    assert [own.candidates(i, 0, 2) for i in range(4)] == [[1, 2], [0, 2], [1, 0], [0, 2]]
    assert own.candidates(3, 1, 9) == [0, 1, 2] and asked == [1]
    assert [pool.candidates(9, 0, limit) for limit in (4, 2, 0)] == [[3, 1, 0, 2], [0, 2], []]
