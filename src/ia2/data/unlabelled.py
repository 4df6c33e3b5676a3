"""Rows without labels: which of them are used, and which are held out.

The teacher answers each behind all training examples, and alignment learns from that (METHOD.md §8), so no
label is spent. What is also a labelled or a test row is left out.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from ia2.config import AdaptConfig
from ia2.data.examples import Example, Examples, FewShotSplit
from ia2.data.splits import MAX_DEV
from ia2.utils.errors import ConfigError, DataError
from ia2.utils.files import digest
from ia2.utils.logging import logger
from ia2.utils.wording import counted

# One of so many is held out.
_HELD_OUT = 5


def distinct(rows: Examples, known: Sequence[Examples]) -> Examples:
    """Rows whose prompt is in none of the ``known`` rows and comes for the first time; others are counted.

    Raises:
        DataError: fewer than two are left.
    """
    taken = {_essence(example) for part in known for example in part}
    others = [example for example in rows if _essence(example) not in taken]
    first: dict[str, Example] = {}
    for example in others:
        first.setdefault(_essence(example), example)
    kept = list(first.values())
    dropped = []
    if labelled := len(rows) - len(others):
        dropped.append(f"{labelled} that are labelled or test rows too")
    if repeated := len(others) - len(kept):
        dropped.append(f"{repeated} that repeat another")
    left_out = " and ".join(dropped)
    if len(kept) < 2:
        among = f" of {counted(len(rows), 'row')}, without {left_out}" if dropped else ""
        raise DataError(
            f"{rows.name}: at least two unlabelled rows are needed, and {len(kept)} can be used{among}. Give "
            "other rows, or leave out --unlabelled."
        )
    if dropped:
        logger.info("Unlabelled rows: %s of %d left out.", left_out, len(rows))
    return Examples(kept, name=rows.name)


def _essence(example: Example) -> str:
    return " ".join(example.query.split())


def distinct_from(
    rows: Examples | None, named: str | None, known: Sequence[Examples | None]
) -> Examples | None:
    """:func:`distinct` of rows that may not be there; ``named``: where the settings say that they lie.

    Raises:
        ConfigError: the settings name rows that were not given.
        DataError: fewer than two are left.
    """
    if rows is not None:
        return distinct(rows, [part for part in known if part is not None])
    if named:
        raise ConfigError(f"unlabelled is {named}, and no such rows were given. Pass them as unlabelled=….")
    return None


def with_unlabelled(split: FewShotSplit, rows: Sequence[Example], most: int, seed: int) -> FewShotSplit:
    """A split with at most so many unlabelled rows beside it: a fifth of them, at most 48, is held out.

    A larger draw of the same rows and seed contains a smaller one. Answers that rows have are left out.
    """
    if not len(rows):
        return split
    drawn = random.Random(f"unlabelled {seed}").sample(range(len(rows)), len(rows))[:most]
    # every fifth: of a larger draw too
    held = drawn[_HELD_OUT - 1 :: _HELD_OUT][:MAX_DEV] or drawn[-1:]
    name = rows.name if isinstance(rows, Examples) else "unlabelled"

    def part(places: Sequence[int]) -> Examples:
        return Examples([replace(rows[place], answer=None) for place in places], name=name)

    kept = [place for place in drawn if place not in held]
    return replace(split, unlabelled=part(kept), unlabelled_dev=part(held))


def with_rest(
    split: FewShotSplit, rest: Sequence[Example], test: Examples, config: AdaptConfig
) -> FewShotSplit:
    """A split beside which rows that are in no part of it are unlabelled: their labels are not looked at.

    Raises:
        DataError: there are not as many as ``max_unlabelled`` asks for.
    """
    rows = distinct(Examples(rest, name=split.train.name), [split.train, split.dev, test])
    if len(rows) < config.max_unlabelled:
        raise DataError(
            f"{rows.name}: asked for {config.max_unlabelled} unlabelled rows, {len(rows)} are left beside "
            "the labelled ones. Ask for fewer."
        )
    return with_unlabelled(split, rows, config.max_unlabelled, config.seed)


def unlabelled_facts(split: FewShotSplit) -> dict[str, str]:
    """Which rows they are, by content; nothing where there are none."""
    if not len(split.unlabelled):
        return {}
    return {"unlabelled": digest([split.unlabelled.fingerprint, split.unlabelled_dev.fingerprint])}


def counts_unlabelled(split: FewShotSplit) -> dict[str, int]:
    """How many there are, as results say; nothing where there are none."""
    if not len(split.unlabelled):
        return {}
    return {"num_unlabelled": len(split.unlabelled), "num_unlabelled_dev": len(split.unlabelled_dev)}
