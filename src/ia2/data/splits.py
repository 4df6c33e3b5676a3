"""Which rows are drawn to learn from, held out, or dealt into folds: by their answers and a seed alone."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Sequence

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
        if balanced:
            train, held = _balanced_draw(pools, num_examples, wanted)
        else:
            train = set(order[:num_examples])
            held = set(order[num_examples : num_examples + wanted])
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
    dealt = [row for pool in pools if len(pool) > 1 for row in pool]
    dealt += [row for pool in pools if len(pool) == 1 for row in pool]
    fold_of = {row: position % k for position, row in enumerate(dealt)}
    return [
        (
            [row for row in order if fold_of[row] != fold],
            [row for row in order if fold_of[row] == fold],
        )
        for fold in range(k)
    ]


def _by_answer(answers: Answers, order: Iterable[int]) -> list[list[int]]:
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
    dev = min(num_examples // 2, MAX_DEV) if hold_out else 0
    needed = num_examples + dev
    if needed > rows and not hold_out:
        raise DataError(
            f"{name}: asked for {num_examples} examples, the data has {rows} rows: ask for at most {rows}, "
            "or leave the number out to use every row"
        )
    if needed > rows:
        fits = max((n for n in range(2, rows) if n + min(n // 2, MAX_DEV) <= rows), default=0)
        way_out = f"ask for at most {fits}, or leave" if fits else "leave"
        raise DataError(
            f"{name}: asked for {num_examples} examples, the data has {rows} rows; "
            f"{needed} are needed, as {dev} more are held out for dev: {way_out} the number "
            "out to use every row"
        )
    return dev


def _balanced_draw(pools: list[list[int]], num_examples: int, wanted_dev: int) -> tuple[set[int], set[int]]:
    """One row of each answer in turn; an answer that has no more is passed over."""
    counts = _deal([len(pool) for pool in pools], num_examples)
    train = {row for pool, count in zip(pools, counts, strict=True) for row in pool[:count]}
    # Backwards, so that the odd row of dev goes to an answer that got none of train.
    left = [pool[count:] for pool, count in zip(pools, counts, strict=True)][::-1]
    counts = _deal([len(pool) for pool in left], wanted_dev)
    return train, {row for pool, n in zip(left, counts, strict=True) for row in pool[:n]}


def _deal(sizes: Sequence[int], total: int) -> list[int]:
    """How many come from each pool if one is taken from each in turn, passing over empty ones."""
    counts = [0] * len(sizes)
    left = min(total, sum(sizes))
    while left:
        for pool, size in enumerate(sizes):
            if left and counts[pool] < size:
                counts[pool] += 1
                left -= 1
    return counts


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
    return {row for pool, count in zip(strata, counts, strict=True) for row in pool[:count]}
