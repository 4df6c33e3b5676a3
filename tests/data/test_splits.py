"""Training and dev rows: sizes, balance, seeds, folds."""

from __future__ import annotations

from collections import Counter

import pytest
from helpers.example_rows import queries, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st

from ia2.data.examples import Examples, FewShotSplit
from ia2.utils.errors import ConfigError, DataError

some_answers = st.lists(st.sampled_from("abcd"), min_size=1, max_size=60)
seeds = st.integers(0, 2**32)


def check_parts(examples: Examples, split: FewShotSplit) -> None:
    assert len(queries(split.train)) == len(split.train)
    assert len(queries(split.dev)) == len(split.dev)
    assert not queries(split.train) & queries(split.dev)
    assert queries(split.train) | queries(split.dev) <= queries(examples)


@given(answers=some_answers, seed=seeds)
@settings(max_examples=200, deadline=None)
def test_split_of_all_rows(answers: list[str], seed: int) -> None:
    examples = rows_of(answers)
    split = examples.split(seed=seed)
    check_parts(examples, split)
    assert len(split.train) == round(2 * len(answers) / 3)
    assert len(split.train) + len(split.dev) == len(answers)
    repeated = {answer for answer, count in Counter(answers).items() if count > 1}
    assert repeated <= set(split.train.answers)
    if len(repeated) <= len(split.dev):
        assert repeated <= set(split.dev.answers)
    again = examples.split(seed=seed)
    assert list(again.train) == list(split.train)
    assert list(again.dev) == list(split.dev)


@given(answers=some_answers, seed=seeds, num_examples=st.integers(2, 60))
@settings(max_examples=200, deadline=None)
def test_split_with_a_number(answers: list[str], seed: int, num_examples: int) -> None:
    examples = rows_of(answers)
    if num_examples + num_examples // 2 > len(answers):
        with pytest.raises(DataError, match=f"{num_examples + num_examples // 2} are needed"):
            examples.split(num_examples=num_examples, seed=seed)
        return
    split = examples.split(num_examples=num_examples, seed=seed)
    check_parts(examples, split)
    assert (len(split.train), len(split.dev)) == (num_examples, num_examples // 2)
    assert list(examples.split(num_examples=num_examples, seed=seed).dev) == list(split.dev)
    smaller = examples.split(num_examples=2, seed=seed)
    assert queries(smaller.train) <= queries(split.train)


@given(
    counts=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    seed=seeds,
    num_examples=st.integers(2, 40),
)
@settings(max_examples=100, deadline=None)
def test_balanced_split(counts: list[int], seed: int, num_examples: int) -> None:
    examples = rows_of([answer for answer, n in zip("abcde", counts, strict=False) for _ in range(n)])
    if num_examples + num_examples // 2 > len(examples):
        return
    split = examples.split(num_examples=num_examples, seed=seed)
    check_parts(examples, split)
    drawn = [Counter(split.train.answers)[answer] for answer in "abcde"[: len(counts)]]
    # in train and in dev nobody is behind by more than one unless all its rows are drawn
    assert all(got >= min(max(drawn) - 1, count) for got, count in zip(drawn, counts, strict=True))
    dev = Counter(split.dev.answers)
    for answer, count, used in zip("abcde", counts, drawn, strict=False):
        assert dev[answer] >= min(max(dev.values()) - 1, count - used)


@pytest.mark.parametrize(
    ("rows", "train", "dev"), [(1, 1, 0), (2, 1, 1), (3, 2, 1), (4, 3, 1), (5, 3, 2), (30, 20, 10)]
)
def test_sizes_of_the_default_split(rows: int, train: int, dev: int) -> None:
    for answers in ([str(i) for i in range(rows)], ["x"] * rows):
        split = rows_of(answers).split()
        assert (len(split.train), len(split.dev)) == (train, dev)


def test_dev_is_capped_and_too_few_rows_are_refused() -> None:
    examples = rows_of(["x"] * 200)
    split = examples.split(num_examples=128)
    assert (len(split.train), len(split.dev)) == (128, 48)
    with pytest.raises(DataError, match=r"^rows: .*201 are needed.* ask for at most 152, or leave"):
        examples.split(num_examples=153)
    with pytest.raises(DataError, match=r"200 rows: ask for at most 200"):
        examples.split(num_examples=201, dev=False)
    with pytest.raises(DataError, match=r"the data has 2 rows; 3 are needed.*: leave the number"):
        rows_of(["x", "x"]).split(num_examples=2)
    with pytest.raises(ConfigError, match="num_examples is 1: at least 2"):
        examples.split(num_examples=1)


def test_seeds_differ_and_draws_are_balanced_unless_they_are_to_be_random() -> None:
    examples = rows_of(["a", "b", "c", "d"] * 25)
    for balanced in (True, False):
        drawn = [examples.split(num_examples=8, seed=s, balanced=balanced).train for s in range(40)]
        assert (min(len(set(rows.answers)) for rows in drawn) == 4) == balanced
    assert queries(drawn[0]) != queries(drawn[1])
    order = [int(example.query[1:]) for example in drawn[0]]
    assert order != sorted(order)
    bare = Examples.from_rows([{"prompt": str(i)} for i in range(9)], labelled=False)
    assert len(bare.split(num_examples=4).dev) == 2 and len(bare.folds(3, 0)) == 3


@given(answers=some_answers, seed=seeds, k=st.integers(2, 7))
@settings(max_examples=150, deadline=None)
def test_folds(answers: list[str], seed: int, k: int) -> None:
    examples = rows_of(answers)
    if len(examples) < k:
        with pytest.raises(DataError, match=f"{k} folds need at least {k} rows"):
            examples.folds(k, seed)
        return
    folds = examples.folds(k, seed)
    held = Counter(example.query for _, out in folds for example in out)
    assert held == dict.fromkeys(queries(examples), 1)
    for rest, out in folds:
        assert queries(rest) | queries(out) == queries(examples)
        assert len(rest) + len(out) == len(examples)
    sizes = [len(out) for _, out in folds]
    assert max(sizes) - min(sizes) <= 1
    for answer in {answer for answer, count in Counter(answers).items() if count > 1}:
        per_fold = [out.answers.count(answer) for _, out in folds]
        assert max(per_fold) - min(per_fold) <= 1
    assert [list(out) for _, out in examples.folds(k, seed)] == [list(out) for _, out in folds]


def test_one_fold_is_none() -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        rows_of(["a", "b"]).folds(1, 0)
