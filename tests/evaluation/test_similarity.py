from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from ia2.evaluation.similarity import Similarity, SimilarityMeter

LAYERS, WIDTH = 3, 8


def tensors(lengths: list[int], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(LAYERS, g, WIDTH, generator=generator) + 0.3 for g in lengths]


def measured(
    ours: list[torch.Tensor], reference: list[torch.Tensor], order: list[int] | None = None
) -> Similarity:
    meter = SimilarityMeter([0, 1, 2])
    for i in order or range(len(ours)):
        meter.add(i, ours[i], reference[i])
    return meter.finish()


def test_against_loops() -> None:
    lengths = [1, 4, 2, 3]
    ours, reference = tensors(lengths, 0), tensors(lengths, 1)
    found = measured(ours, reference, order=[2, 0, 3, 1])
    asim, l2 = np.zeros((4, LAYERS)), np.zeros((4, LAYERS))
    unexplained = np.zeros(LAYERS)
    for layer in range(LAYERS):
        flat = np.concatenate([r[layer].double().numpy() for r in reference])
        mean = flat.mean(0)
        distance = deviation = 0.0
        for i in range(4):
            for g in range(lengths[i]):
                a, b = ours[i][layer, g].double().numpy(), reference[i][layer, g].double().numpy()
                asim[i, layer] += a @ b / np.sqrt(a @ a) / np.sqrt(b @ b) / lengths[i]
                l2[i, layer] += np.sqrt(((a - b) ** 2).sum()) / lengths[i]
                distance += ((a - b) ** 2).sum()
                deviation += ((b - mean) ** 2).sum()
        unexplained[layer] = distance / deviation
    np.testing.assert_allclose(found.asim, asim, rtol=1e-10)
    np.testing.assert_allclose(found.l2, l2, rtol=1e-10)
    np.testing.assert_allclose(found.unexplained.mean(0), unexplained, rtol=1e-8)
    summary = found.to_dict()
    assert summary["n"] == 4
    assert summary["asim"] == pytest.approx(asim.mean())
    assert summary["l2_by_layer"] == pytest.approx(l2.mean(0).tolist())
    assert summary["variance_unexplained"] == pytest.approx(unexplained.mean())
    json.dumps(summary)


def test_the_mean_of_the_reference_explains_nothing() -> None:
    reference = tensors([2, 3], 1)
    mean = torch.cat(reference, dim=1).double().mean(1, keepdim=True)
    found = measured([mean.expand(LAYERS, r.shape[1], WIDTH) for r in reference], reference)
    np.testing.assert_allclose(found.unexplained.mean(0), 1, rtol=1e-10)


def test_one_token_has_no_variance() -> None:
    found = measured(tensors([1], 0), tensors([1], 1))
    assert np.isnan(found.unexplained).all()
    assert np.isfinite(found.asim).all()


def test_low_precision_is_compared_in_double() -> None:
    reference = [t.bfloat16() for t in tensors([3], 1)]
    np.testing.assert_allclose(measured(reference, reference).asim, 1, rtol=1e-12)
