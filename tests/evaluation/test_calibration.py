"""Calibration measures and temperature, each against something independent."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.classification import (
    binary_calibration_error,
)

from ia2.evaluation.calibration import (
    TEMPERATURES,
    ece_equal_mass,
    ece_equal_width,
    fit_temperature,
    reliability_bins,
    scale_label_log_probabilities,
)


def equal_mass_by_loop(confidence: list[float], correct: list[int], bins: int) -> float:
    n = len(confidence)
    rows = sorted(zip(confidence, correct, strict=True), key=lambda row: row[0])
    bins = min(bins, n)
    size = n // bins
    total = 0.0
    for b in range(bins):
        chunk = rows[b * size :] if b == bins - 1 else rows[b * size : (b + 1) * size]
        mean_confidence = sum(c for c, _ in chunk) / len(chunk)
        accuracy = sum(y for _, y in chunk) / len(chunk)
        total += len(chunk) / n * abs(mean_confidence - accuracy)
    return total


def torch_ece(confidence: np.ndarray, correct: np.ndarray, bins: int) -> float:
    return float(
        binary_calibration_error(
            torch.from_numpy(confidence), torch.from_numpy(correct.astype(np.int64)), n_bins=bins
        )
    )


rows = st.lists(
    st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]) | st.floats(0, 1), st.integers(0, 1)),
    min_size=1,
    max_size=70,
)


# --- ECE ---------------------------------------------------------------------------------------


@given(rows, st.integers(1, 20))
def test_equal_mass_is_the_loop(data: list[tuple[float, int]], bins: int) -> None:
    confidence, correct = [c for c, _ in data], [y for _, y in data]
    expected = equal_mass_by_loop(confidence, correct, bins)
    assert ece_equal_mass(confidence, correct, bins) == pytest.approx(expected, abs=1e-12)


def test_equal_mass_remainder_goes_to_the_last_bin() -> None:
    confidence = np.linspace(0.1, 0.8, 8)
    correct = np.array([0, 0, 0, 1, 1, 1, 1, 0])
    found = reliability_bins(confidence, correct, 3)
    assert found.count.tolist() == [2, 2, 4]
    assert found.accuracy.tolist() == [0, 0.5, 0.75]


@pytest.mark.parametrize("ece", [ece_equal_mass, ece_equal_width])
def test_batches_along_any_axis(ece: object) -> None:
    assert callable(ece)
    rng = np.random.default_rng(0)
    confidence, correct = rng.random((3, 4, 101)), rng.random((3, 4, 101)) < 0.5
    batch = ece(confidence, correct)
    assert batch.shape == (3, 4)
    np.testing.assert_allclose(batch[1, 2], ece(confidence[1, 2], correct[1, 2]), atol=1e-15)
    moved = ece(np.moveaxis(confidence, -1, 0), np.moveaxis(correct, -1, 0), axis=0)
    np.testing.assert_allclose(moved, batch, atol=1e-15)
    assert isinstance(float(ece(confidence[0, 0], correct[0, 0])), float)
    assert math.isnan(ece([], []))
    assert np.isnan(ece(np.zeros((2, 0)), np.zeros((2, 0)))).tolist() == [True, True]


@given(rows, st.sampled_from([1, 2, 4, 8, 16]))
def test_equal_width_is_torchmetrics_on_edges_too(data: list[tuple[float, int]], bins: int) -> None:
    confidence = np.array([c for c, _ in data])
    correct = np.array([y for _, y in data])
    expected = torch_ece(confidence, correct, bins)
    assert ece_equal_width(confidence, correct, bins) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bins", [1, 7, 10, 15, 16, 100])
def test_equal_width_is_torchmetrics_on_random_data(dtype: type, bins: int) -> None:
    rng = np.random.default_rng(bins)
    confidence = rng.beta(5, 1, 2000).astype(dtype)
    confidence[:20], confidence[20:40] = 0, 1
    correct = rng.random(2000) < 0.7
    expected = torch_ece(confidence, correct, bins)
    tolerance = 1e-5 if dtype == np.float32 else 1e-12
    assert ece_equal_width(confidence, correct, bins) == pytest.approx(expected, abs=tolerance)


@given(rows, st.integers(1, 20))
def test_reliability_bins_add_up_to_the_ece(data: list[tuple[float, int]], bins: int) -> None:
    confidence, correct = [c for c, _ in data], [y for _, y in data]
    found = reliability_bins(confidence, correct, bins)
    assert found.count.sum() == len(data) and len(found.count) == min(bins, len(data))
    total = float(found.count @ np.abs(found.confidence - found.accuracy)) / len(data)
    assert total == pytest.approx(ece_equal_mass(confidence, correct, bins), abs=1e-12)


# --- proper scores -----------------------------------------------------------------------------


# --- temperature -------------------------------------------------------------------------------


def nll_grid(log_p: np.ndarray, gold: np.ndarray) -> np.ndarray:
    row = np.arange(len(gold))
    scaled = [scale_label_log_probabilities(log_p, t)[row, gold] for t in TEMPERATURES]
    return -np.stack(scaled, axis=1)


@pytest.mark.parametrize("true", [0.3, 0.77, 1.0, 2.5, 6.0])
def test_temperature_is_recovered(true: float) -> None:
    rng = np.random.default_rng(0)
    logits = 2 * rng.standard_normal((40_000, 4))
    noise = rng.gumbel(size=logits.shape)
    gold = (logits + noise).argmax(axis=1)  # drawn from softmax(logits)
    # The model reports logits that are `true` times too sharp.
    assert fit_temperature(TEMPERATURES, nll_grid(true * logits, gold)) == pytest.approx(true, rel=0.03)


def test_parabola_is_exact_on_a_parabola() -> None:
    grid = (np.log(TEMPERATURES) - math.log(1.37)) ** 2
    assert fit_temperature(TEMPERATURES, np.stack([grid, grid])) == pytest.approx(1.37, rel=1e-9)
    uneven = np.array([0.2, 0.9, 1.5, 7.0])
    grid = (np.log(uneven) - math.log(1.2)) ** 2
    assert fit_temperature(uneven, grid[None]) == pytest.approx(1.2, rel=1e-9)


def test_temperature_at_the_ends_and_without_information() -> None:
    rising, flat = np.arange(33.0)[None], np.zeros((5, 33))
    # every row is right: the sharper the better, without end
    assert fit_temperature(TEMPERATURES, rising) == 1.0
    # and so sharp that it is zero to rounding
    assert fit_temperature(TEMPERATURES, np.maximum(0, rising - rising[:, 12:13])) == 1.0
    assert fit_temperature(TEMPERATURES, rising[:, ::-1]) == TEMPERATURES[-1]
    assert fit_temperature(TEMPERATURES, flat) == 1.0
    assert fit_temperature(TEMPERATURES, np.zeros((0, 33))) == 1.0
    assert fit_temperature(TEMPERATURES, np.full((2, 33), np.inf)) == 1.0
    with pytest.raises(ValueError, match="NaN"):
        fit_temperature(TEMPERATURES, np.full((1, 33), np.nan))
    part = np.full((1, 33), np.inf)
    part[0, 20] = 1.0
    assert fit_temperature(TEMPERATURES, part) == TEMPERATURES[20]


def test_scaling_label_log_probabilities() -> None:
    p = np.array([[0.7, 0.2, 0.1], [0.25, 0.5, 0.25]])
    np.testing.assert_allclose(np.exp(scale_label_log_probabilities(np.log(p), 1.0)), p)
    # Not normalised in, normalised out.
    np.testing.assert_allclose(np.exp(scale_label_log_probabilities(np.log(p) - 9, 1.0)), p)
    squared = p**2 / (p**2).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(scale_label_log_probabilities(np.log(p), 0.5)), squared)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = scale_label_log_probabilities([[-np.inf, -1.0, -1.0], [-np.inf] * 3], 0.1)
        tiny = scale_label_log_probabilities([[-1e3, 0.0]], 1e-308)
    np.testing.assert_allclose(np.exp(found), [[0, 0.5, 0.5], [1 / 3] * 3])
    np.testing.assert_allclose(np.exp(tiny), [[0.0, 1.0]])
    assert scale_label_log_probabilities(np.zeros((0, 3)), 2.0).shape == (0, 3)
