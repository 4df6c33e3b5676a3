"""The rounds of a comparison: what is drawn for training, and on what it is evaluated.

No model library is imported here: a run's folder is read with these too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ia2.config import CompareConfig
from ia2.data.examples import Example, Examples, FewShotSplit
from ia2.data.unlabelled import distinct, with_unlabelled


@dataclass
class Round:
    """One training set and the rows it is evaluated on, with their places in the data.

    Attributes:
        seed: of the draw.
        data: training and dev examples.
        unused: rows in no part.
        test: evaluated on.
        places: of the test rows in the data.
        folder: of what the round leaves.
        fold: None with test data.
    """

    seed: int
    data: FewShotSplit
    unused: Sequence[Example]
    test: Examples
    places: list[int]
    folder: Path
    fold: int | None = None


@dataclass(frozen=True)
class Draw:
    """The rows of one round.

    Attributes:
        seed: of the draw.
        fold: None with test data.
        data: training and dev examples.
        unused: rows in neither, nor held out.
        held: the fold's held-out rows; None with test data.
    """

    seed: int
    fold: int | None
    data: FewShotSplit
    unused: Sequence[Example]
    held: Examples | None


def drawn_test(test: Examples, count: int) -> Examples:
    """So many of the test rows, in their order; the same whatever the seed."""
    kept = sorted(random.Random("max_test").sample(range(len(test)), count))
    return Examples([test[i] for i in kept], name=test.name)


def place_of(seed: int, fold: int | None) -> str:
    """A round's folder within that of its comparison."""
    return f"seed-{seed}" if fold is None else f"seed-{seed}/fold-{fold}"


def places(config: CompareConfig, *, tested: bool) -> Iterator[tuple[int, int | None]]:
    """Seed and fold of every round; ``tested``: there are test rows, and so no folds."""
    for seed in range(config.seed, config.seed + config.seeds):
        if tested:
            yield seed, None
        else:
            yield from ((seed, fold) for fold in range(config.folds))


def draws(
    examples: Examples, config: CompareConfig, *, tested: bool, unlabelled: Examples | None = None
) -> Iterator[Draw]:
    """The rows of every round, in the order of :func:`places`.

    Each draws from all ``unlabelled`` rows but those that it trains on, holds out or is evaluated on.

    Raises:
        DataError: there are too few rows.
    """
    for seed in range(config.seed, config.seed + config.seeds):
        pools: list[tuple[int | None, Examples, Examples | None]]
        if tested:
            pools = [(None, examples, None)]
        else:
            pools = [(i, rest, held) for i, (rest, held) in enumerate(examples.folds(config.folds, seed))]
        for fold, pool, held in pools:
            split = pool.split(seed=seed, **config.drawn)
            rest = split.rest(pool)
            if unlabelled is not None:
                own = [part for part in (split.train, split.dev, held) if part is not None]
                split = with_unlabelled(split, distinct(unlabelled, own), config.max_unlabelled, seed)
            yield Draw(seed, fold, split, rest, held)


def rounds_of(
    examples: Examples,
    test: Examples | None,
    config: CompareConfig,
    folder: Path,
    unlabelled: Examples | None = None,
) -> list[Round]:
    """The training sets of a comparison and what each is evaluated on; its folder need not be there yet.

    Raises:
        DataError: there are too few rows.
    """
    where = {id(example): place for place, example in enumerate(examples)}
    rounds: list[Round] = []
    for draw in draws(examples, config, tested=test is not None, unlabelled=unlabelled):
        path = folder / place_of(draw.seed, draw.fold)
        if draw.held is not None:
            evaluated, positions = draw.held, [where[id(example)] for example in draw.held]
        else:
            assert test is not None
            evaluated, positions = test, list(range(len(test)))
        rounds.append(Round(draw.seed, draw.data, draw.unused, evaluated, positions, path, draw.fold))
    return rounds
