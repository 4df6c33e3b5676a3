"""Classification tasks for the tiny in-context-learning model (pure Python, no torch).

The vocabulary has ``len(CLASSES)`` hidden classes.  Each has its own surface tokens, and that
partition is the same in every task.  What a task draws at random is the map from the few classes
it uses to label tokens, so the map can only be read off demonstrations (or be trained in).

A query is a few tokens: one carries the class, at a random place among fillers that say nothing.
The answer is the label token of that class, written with a leading space::

    ("z3 b2 z0 z7", " L3")

Words are split at spaces; ``SEPARATOR`` is a token, any other run of newlines is unknown.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
SPECIAL_TOKENS = (PAD, BOS, EOS, UNK)
SEPARATOR = "\n\n"
CLASS_NAMES = "abcdefgh"
SURFACE_PER_CLASS = 6
CLASSES = tuple(tuple(f"{c}{i}" for i in range(SURFACE_PER_CLASS)) for c in CLASS_NAMES)
FILLERS = tuple(f"z{i}" for i in range(12))
LABELS = tuple(f"L{i}" for i in range(8))
VOCABULARY = (
    *SPECIAL_TOKENS,
    SEPARATOR,
    *(token for surface in CLASSES for token in surface),
    *FILLERS,
    *LABELS,
)
QUERY_LENGTHS = (3, 4)
NUM_CLASSES_IN_USE = (2, 3, 4)


@dataclass(frozen=True)
class Task:
    """One hidden map from classes to labels: class ``classes[i]`` has the label ``labels[i]``."""

    classes: tuple[int, ...]
    labels: tuple[str, ...]

    @property
    def answers(self) -> tuple[str, ...]:
        """The answer texts in use, in the order of ``classes``."""
        return tuple(f" {label}" for label in self.labels)

    def query(
        self,
        which: int,
        rng: random.Random,
        *,
        surface: int = SURFACE_PER_CLASS,
        lengths: Sequence[int] = QUERY_LENGTHS,
    ) -> list[str]:
        """Tokens of a query of class ``classes[which]``."""
        tokens = [rng.choice(FILLERS) for _ in range(rng.choice(lengths))]
        tokens[rng.randrange(len(tokens))] = CLASSES[self.classes[which]][rng.randrange(surface)]
        return tokens

    def examples(self, n: int, seed: int) -> list[tuple[str, str]]:
        """``n`` pairs of query and answer text, in random order, with the answers balanced.

        The counts of any two classes differ by at most one; which classes get one more is random.
        """
        rng = random.Random(f"examples {seed}")
        order = balanced(len(self.classes), n, rng)
        return [(" ".join(self.query(i, rng)), self.answers[i]) for i in order]


def balanced(num_classes: int, n: int, rng: random.Random) -> list[int]:
    """``n`` class indices in random order, each as often as any other, give or take one."""
    classes = list(range(num_classes))
    rng.shuffle(classes)
    order = [classes[i % num_classes] for i in range(n)]
    rng.shuffle(order)
    return order


def draw_task(rng: random.Random, num_classes: int | None = None) -> Task:
    """A task drawn with ``rng``; ``num_classes`` is drawn from NUM_CLASSES_IN_USE if not given."""
    if num_classes is None:
        num_classes = rng.choice(NUM_CLASSES_IN_USE)
    classes = tuple(rng.sample(range(len(CLASSES)), num_classes))
    return Task(classes, tuple(rng.sample(LABELS, num_classes)))


def sample_task(seed: int, num_classes: int | None = None) -> Task:
    """The task of this seed (the same on every call)."""
    return draw_task(random.Random(f"task {seed}"), num_classes)
