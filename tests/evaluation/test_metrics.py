"""Rows that metrics are made of, worked out by hand and by brute force."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ia2.evaluation.calibration import TEMPERATURES, ece_equal_mass
from ia2.evaluation.metrics import (
    STATISTICS,
    Measured,
    fitted_temperatures,
    free_rows,
    free_temperature_losses,
    label_rows,
    label_temperature_losses,
    measure_free,
    measure_labels,
    summarise,
)
from ia2.evaluation.scoring import FreeAnswers, LabelScores

TOKENS = [3, 5, 6]  # of the three labels, in a vocabulary of eight
GOLD = np.array([0, 1, 2, 1, 0])


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def logits_of(n: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 8)) * 2


def scores_of(logits: np.ndarray, temperatures: tuple[float, ...] = (1.0,)) -> LabelScores:
    """What the scorer of one-token labels makes of logits ``[n, V]``."""
    p = np.stack([softmax(logits / t) for t in temperatures], axis=-1)
    return LabelScores(
        np.array(temperatures),
        np.log(p[:, TOKENS]),
        p.max(1),
        logits.argmax(1),
        (p**2).sum(1),
        True,
    )


def test_over_the_vocabulary() -> None:
    logits = logits_of()
    rows = label_rows(scores_of(logits), GOLD, TOKENS)["vocabulary"]
    p = softmax(logits)
    gold_tokens = np.array(TOKENS)[GOLD]
    truth = np.eye(8)[gold_tokens]
    np.testing.assert_allclose(rows.brier, ((p - truth) ** 2).sum(1))
    np.testing.assert_allclose(rows.nll, -np.log(p[np.arange(5), gold_tokens]))
    np.testing.assert_allclose(rows.confidence, p.max(1))
    np.testing.assert_array_equal(rows.correct, p.argmax(1) == gold_tokens)


def test_over_the_label_set() -> None:
    logits = logits_of()
    rows = label_rows(scores_of(logits), GOLD, TOKENS)["labels"]
    p = softmax(logits[:, TOKENS])
    np.testing.assert_allclose(rows.brier, ((p - np.eye(3)[GOLD]) ** 2).sum(1))
    np.testing.assert_allclose(rows.nll, -np.log(p[np.arange(5), GOLD]))
    np.testing.assert_allclose(rows.confidence, p.max(1))
    np.testing.assert_array_equal(rows.correct, p.argmax(1) == GOLD)


def test_labels_of_several_tokens_have_everything_else_as_one_outcome() -> None:
    p = np.array([[0.3, 0.1, 0.2], [0.05, 0.6, 0.05]])
    squares = (p**2).sum(1) + (1 - p.sum(1)) ** 2
    scores = LabelScores(
        np.array([1.0]),
        np.log(p)[:, :, None],
        np.array([[0.9], [0.9]]),
        np.array([0, 0]),
        squares[:, None],
        False,
    )
    rows = label_rows(scores, np.array([2, 1]), [0, 0, 0])["vocabulary"]
    np.testing.assert_allclose(rows.confidence, [0.3, 0.6])
    np.testing.assert_array_equal(rows.correct, [0, 1])
    np.testing.assert_allclose(rows.brier[0], 0.09 + 0.01 + 0.64 + 0.16)
    np.testing.assert_allclose(rows.nll, [-np.log(0.2), -np.log(0.6)])


def test_temperatures_make_dev_likelier_in_their_own_scope() -> None:
    rng = np.random.default_rng(1)
    gold = rng.integers(3, size=60)
    logits = logits_of(60, 2)
    logits[np.arange(60), np.array(TOKENS)[gold]] += 2
    logits *= 4  # overconfident
    dev = scores_of(logits, tuple(float(t) for t in TEMPERATURES))
    found = fitted_temperatures(label_temperature_losses(dev, gold))
    assert set(found) == {"vocabulary", "labels"}
    for scope, columns in (("vocabulary", slice(None)), ("labels", TOKENS)):
        truth = np.array(TOKENS)[gold] if scope == "vocabulary" else gold

        def nll(t: float, columns: object = columns, truth: np.ndarray = truth) -> float:
            p = softmax(logits[:, columns] / t)  # type: ignore[index]
            return float(-np.log(p[np.arange(60), truth]).mean())

        assert found[scope] > 1.5
        assert nll(found[scope]) <= min(nll(float(t)) for t in TEMPERATURES) + 1e-3


def test_scaled_rows_use_each_scope_s_temperature() -> None:
    logits = logits_of()
    temperatures = {"vocabulary": 2.0, "labels": 0.5}
    found = measure_labels(scores_of(logits, (1.0, 2.0)), GOLD, TOKENS, temperatures)
    p = softmax(logits / 2)
    np.testing.assert_allclose(found.scaled["vocabulary"].confidence, p.max(1))
    np.testing.assert_allclose(
        found.scaled["vocabulary"].nll, -np.log(p[np.arange(5), np.array(TOKENS)[GOLD]])
    )
    p = softmax(logits[:, TOKENS] / 0.5)
    np.testing.assert_allclose(found.scaled["labels"].confidence, p.max(1))
    np.testing.assert_allclose(found.scaled["labels"].brier, ((p - np.eye(3)[GOLD]) ** 2).sum(1))
    # scaling never changes an answer
    for scope in found.plain:
        np.testing.assert_array_equal(found.plain[scope].correct, found.scaled[scope].correct)
    np.testing.assert_allclose(found.plain["vocabulary"].confidence, softmax(logits).max(1))


def test_free_answers_are_right_or_wrong() -> None:
    answers = FreeAnswers([], [], np.array([0.9, 0.4]), np.log(np.array([0.5, 0.1])))
    correct = np.array([1.0, 0.0])
    rows = free_rows(answers, correct)
    np.testing.assert_allclose(rows["vocabulary"].confidence, [0.9, 0.4])
    np.testing.assert_allclose(rows["answer"].confidence, [0.5, 0.1])
    np.testing.assert_allclose(rows["vocabulary"].brier, [0.01, 0.16])
    np.testing.assert_allclose(rows["answer"].nll, [-np.log(0.5), -np.log(0.9)])
    hot = free_rows(answers, correct, 2.0)["vocabulary"].confidence
    np.testing.assert_allclose(hot, 1 / (1 + np.exp(-np.log([9.0, 4 / 6]) / 2)))


def test_certainty_stays_finite() -> None:
    answers = FreeAnswers([], [], np.array([1.0, 1.0, 0.0]), np.array([0.0, 0.0, -1e4]))
    for rows in free_rows(answers, np.array([1.0, 0.0, 1.0])).values():
        for column in rows.arrays():
            assert np.isfinite(column).all()


def test_free_temperatures() -> None:
    rng = np.random.default_rng(0)
    confidence = np.full(80, 0.99)
    correct = (rng.random(80) < 0.7).astype(float)
    answers = FreeAnswers([], [], confidence, np.log(confidence))
    found = fitted_temperatures(free_temperature_losses(answers, correct))
    assert found["vocabulary"] == found["answer"] > 2
    measured = measure_free(answers, correct, found)
    assert measured.scaled["answer"].confidence.mean() == pytest.approx(correct.mean(), abs=0.02)


def measured(n: int, seed: int, shift: float = 0.0) -> Measured:
    rng = np.random.default_rng(seed)
    gold = rng.integers(3, size=n)
    logits = logits_of(n, seed)
    logits[np.arange(n), np.array(TOKENS)[gold]] += 1 + shift
    temperatures = {"vocabulary": 1.5, "labels": 1.2}
    return measure_labels(scores_of(logits, (1.0, 1.5)), gold, TOKENS, temperatures)


def test_summary() -> None:
    run = measured(40, 3)
    found = summarise([run])
    assert (found["n"], found["runs"]) == (40, 1)
    for scope in ("vocabulary", "labels"):
        assert set(found[scope]) == set(STATISTICS)
        assert set(found["scaled"][scope]) == {*STATISTICS, "temperature"}
        for name in STATISTICS:
            interval = found[scope][name]
            assert (interval["low"], interval["high"]) == (None, None)  # one draw
        rows = run.plain[scope]
        assert found[scope]["accuracy"]["value"] == pytest.approx(rows.correct.mean())
        assert found[scope]["ece"]["value"] == pytest.approx(ece_equal_mass(rows.confidence, rows.correct))
        assert found[scope]["brier"]["value"] == pytest.approx(rows.brier.mean())
    assert found["scaled"]["labels"]["temperature"] == 1.2
    json.dumps(found, allow_nan=False)
