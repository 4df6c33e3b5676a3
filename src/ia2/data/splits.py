"""Which rows are drawn to learn from, held out, or dealt into folds: by their answers and a seed alone."""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from itertools import islice, zip_longest

from ia2.utils.errors import ConfigError, DataError

MAX_DEV = 48
"""No more rows than this are held out when a number of examples is asked for (METHOD.md §3)."""

# None: not labelled.
Answers = Sequence[str | None]


def draw(
    answers: Answers,
    name: str,
    num_examples: int | None,
    seed: int,
    balanced: bool,
    dev: bool = True,
) -> tuple[list[int], list[int]]:
    """Rows to learn from and rows to hold out, in drawn order; as :meth:`ia2.Examples.split` says.

    Args:
        answers: of every row.
        name: what messages call the rows.
        num_examples: how many to learn from; None: two thirds, of each answer in proportion.
        seed: of the draw.
        balanced: of ``num_examples`` as many rows of each answer as there are; at random otherwise.
        dev: whether rows are held out; else all are to learn from.

    Raises:
        DataError: there are too few rows.
        ConfigError: ``num_examples`` is below two.
    """
    rng = random.Random(seed)
    order = list(range(len(answers)))
    rng.shuffle(order)
    pools = _by_answer(answers, order)
    rng.shuffle(pools)  # which answers get the odd row out is drawn, too
    if num_examples is None:
        held = _stratified_third(pools) if dev else set()
        train = set(order) - held
    else:
        wanted = _check_draw(name, len(answers), num_examples, dev)
        # Dev backwards, so that its odd row goes to an answer that got none of train.
        dealt = _dealt(pools) if balanced else order
        train = set(dealt[:num_examples])
        left = [[row for row in pool if row not in train] for pool in reversed(pools)]
        rest = _dealt(left) if balanced else order[num_examples:]
        held = set(rest[:wanted])
    return [row for row in order if row in train], [row for row in order if row in held]


def deal_folds(answers: Answers, name: str, k: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """``k`` pairs of rows (the rest, the held out), in drawn order; as :meth:`ia2.Examples.folds` says.

    Raises:
        DataError: there are fewer rows than folds.
        ConfigError: ``k`` is below two.
    """
    if k < 2:
        raise ConfigError(f"{k} folds were asked for: at least 2 are needed")
    if len(answers) < k:
        raise DataError(f"{name}: {k} folds need at least {k} rows, there are {len(answers)}")
    order = list(range(len(answers)))
    random.Random(seed).shuffle(order)
    pools = _by_answer(answers, order)
    # Unique answers, as one pool, go last: dealt in turn, every pool is spread evenly.
    pools.sort(key=lambda pool: len(pool) == 1)
    dealt = [row for pool in pools for row in pool]
    fold_of = {row: position % k for position, row in enumerate(dealt)}
    return [
        ([row for row in order if fold_of[row] != fold], [row for row in order if fold_of[row] == fold])
        for fold in range(k)
    ]


def _by_answer(answers: Answers, order: Sequence[int]) -> list[list[int]]:
    pools: dict[str | None, list[int]] = {}
    for row in order:
        pools.setdefault(answers[row], []).append(row)
    return list(pools.values())


def _check_draw(name: str, rows: int, num_examples: int, hold_out: bool) -> int:
    """How many rows are held out beside `num_examples`, if there are enough of both."""
    if num_examples < 2:
        raise ConfigError(
            f"num_examples is {num_examples}: at least 2 are needed, because each example "
            "is shown the others as demonstrations"
        )

    def held(n: int) -> int:
        return min(n // 2, MAX_DEV) if hold_out else 0

    dev = held(num_examples)
    if num_examples + dev > rows:
        fits = max((n for n in range(2, rows + 1) if n + held(n) <= rows), default=0)
        needed = f"; {num_examples + dev} are needed, as {dev} more are held out for dev" if dev else ""
        way_out = f"ask for at most {fits}, or leave" if fits else "leave"
        raise DataError(
            f"{name}: asked for {num_examples} examples, the data has {rows} rows{needed}: {way_out} the "
            "number out to use every row"
        )
    return dev


def _dealt(pools: Sequence[Sequence[int]]) -> list[int]:
    """One row of each pool in turn; a pool that has no more is passed over."""
    return [row for turn in zip_longest(*pools) for row in turn if row is not None]


def _stratified_third(pools: list[list[int]]) -> set[int]:
    """A third of the rows, in proportion to the pools, with one of each repeated answer first."""
    repeated = [pool for pool in pools if len(pool) > 1]
    unique = [row for pool in pools if len(pool) == 1 for row in pool]
    strata = [*repeated, unique]
    rows = sum(map(len, strata))
    wanted = rows - (2 * rows + 1) // 3  # the rest is two thirds, rounded, and never nothing
    # A repeated answer keeps a row in train; unique ones may all go either way.
    most = [len(pool) - 1 for pool in repeated] + [len(unique)]
    counts = [int(len(repeated) <= wanted)] * len(repeated) + [0]
    # The stratum furthest below its share is served next; ties fall to the drawn order.
    queue = [
        (counts[i] - len(pool) * wanted / max(rows, 1), i)
        for i, pool in enumerate(strata)
        if counts[i] < most[i]
    ]
    heapq.heapify(queue)
    for _ in range(wanted - sum(counts)):
        surplus, i = heapq.heappop(queue)
        counts[i] += 1
        if counts[i] < most[i]:
            heapq.heappush(queue, (surplus + 1, i))
    return {row for pool, count in zip(strata, counts, strict=True) for row in islice(pool, count)}
