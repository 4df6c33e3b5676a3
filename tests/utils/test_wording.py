from __future__ import annotations

import pytest

from ia2.utils.wording import counted, in_words


@pytest.mark.parametrize(
    ("number", "noun", "plural", "words"),
    [
        (1, "seed", "", "1 seed"),
        (0, "seed", "", "0 seeds"),
        (12, "bad row", "", "12 bad rows"),
        (1, "query", "queries", "1 query"),
        (2, "query", "queries", "2 queries"),
    ],
)
def test_counts_in_words(number: int, noun: str, plural: str, words: str) -> None:
    assert counted(number, noun, plural) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (720, "12 min"), (5390, "1 h 30 min"), (12000, "3 h 20 min")],
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
