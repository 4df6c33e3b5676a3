"""Neurons and residual directions: running sums against all vectors, planted effects, tokens, figures."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from helpers.families import llama
from scipy import stats

from ia2.analysis.sections.neurons import NeuronAccumulator, shift_tokens
from ia2.analysis.unembedding import Lens
from ia2.evaluation.effect_sizes import Difference

LAYERS, WIDTH = 3, 20


def metered(
    ours: Any, icl: Any, order: Any = None, site: str = "neurons", views: tuple[str, ...] = ("sft",)
) -> dict[str, Difference]:
    meter = NeuronAccumulator([site])
    for view in views:
        for i in order or range(len(ours)):
            meter.add(view, i, {site: ours[i]}, {site: icl[i]}, None)
    return meter.finish()[site]


def examples(n: int, seed: int, shape: tuple[int, int] = (LAYERS, WIDTH), long: bool = True) -> Any:
    generator = torch.Generator().manual_seed(seed)
    lengths = [1 + i % 4 if long else 1 for i in range(n)]
    return [torch.randn(shape[0], g, shape[1], generator=generator) for g in lengths]


def test_against_keeping_everything() -> None:
    ours, icl = examples(15, 0), examples(15, 1)
    ours = [a + 1000.0 * (torch.arange(WIDTH) == 3) for a in ours]  # a mean far above the spread
    order = list(range(15))
    random.Random(0).shuffle(order)
    view = metered(ours, icl, order)["sft"]
    kept = np.stack([(a.double() - b.double()).mean(1).numpy() for a, b in zip(ours, icl, strict=True)])
    assert view.n == 15
    np.testing.assert_allclose(view.maps["shift"], kept.mean(0))
    np.testing.assert_allclose(view.effects.d_z, (kept.mean(0) / kept.std(0, ddof=1)).clip(-1000, 1000))
    plain = np.arange(WIDTH) != 3
    p = stats.ttest_1samp(kept, 0).pvalue
    np.testing.assert_allclose(view.effects.p[:, plain], p[:, plain])
    q = stats.false_discovery_control(view.effects.p.ravel())
    np.testing.assert_allclose(view.effects.q.ravel(), q)
    products = np.einsum("ilf,jlf->lij", kept, kept)
    n, own = len(kept), np.einsum("lii->l", products)
    # the mean product of two different examples, over the mean product of one with itself
    np.testing.assert_allclose(view.maps["common_shift"], (products.sum((1, 2)) - own) / (n - 1) / own)


def test_edges() -> None:
    icl = examples(4, 1)
    same = metered(icl, icl)["sft"]
    assert (
        (same.effects.d_z == 0).all()
        and (same.effects.p == 1).all()
        and np.isnan(same.maps["common_shift"]).all()
    )
    one = metered(icl[:1], examples(1, 2))["sft"]
    assert np.isnan(one.effects.q).all() and np.isnan(one.maps["common_shift"]).all()
    assert not metered(icl, icl, views=("icl",))
    half = [t.bfloat16() for t in icl]
    assert (metered(half, half)["sft"].maps["shift"] == 0).all()


def test_planted_neurons_are_found_and_few_others() -> None:
    shape = (4, 200)
    planted = {(0, 7), (1, 100), (1, 101), (3, 0), (3, 199)}
    shift = torch.zeros(shape)
    for place in planted:
        shift[place] = 2.0
    found, shares, nothing = 0, [], 0
    for seed in range(30):
        icl, noise = examples(30, 2 * seed, shape, False), examples(30, 2 * seed + 1, shape, False)
        ours = [a + b + shift[:, None] for a, b in zip(icl, noise, strict=True)]
        flags = metered(ours, icl)["sft"].effects.significant
        flagged = {(int(i), int(j)) for i, j in np.argwhere(flags)}
        found += len(flagged & planted)
        shares.append(len(flagged - planted) / max(1, len(flagged)))
        null = metered([a + b for a, b in zip(icl, noise, strict=True)], icl)["sft"]
        nothing += bool(null.effects.significant.any())
    assert found == 30 * len(planted)
    assert np.mean(shares) < 0.08
    assert nothing <= 4


@pytest.mark.parametrize("strength", [0.0, 0.5, 2.0])
def test_the_common_shift_is_unbiased(strength: float) -> None:
    """With few examples too: ‖m‖² alone would be off by 1/n."""
    direction = torch.full((1, 1, 40), strength)
    shares = []
    for seed in range(200):
        icl, noise = examples(6, 2 * seed, (1, 40), False), examples(6, 2 * seed + 1, (1, 40), False)
        ours = [a + b + direction for a, b in zip(icl, noise, strict=True)]
        shares.append(metered(ours, icl, site="residual")["sft"].maps["common_shift"][0])
    assert np.mean(shares) == pytest.approx(strength**2 / (1 + strength**2), abs=0.01)


def test_tokens_of_a_shift(word_tokenizer: Any) -> None:
    """At half of the depth, three quarters and the end; the strongest first, by the lens's own scores."""
    model = llama()
    lens = Lens.of(model)
    trial = metered(examples(4, 0, (8, 32)), examples(4, 1, (8, 32)), site="residual")
    found = shift_tokens(lens, word_tokenizer, [trial], range(8), k=2)["sft"]
    assert [entry["layer"] for entry in found] == [4, 6, 7]
    scores = lens.promotes(trial["sft"].maps["shift"][[4]])[0, : len(word_tokenizer)]
    best = int(scores.argmax())
    assert found[0]["promoted"][0] == {
        "token": word_tokenizer.decode([best]),
        "id": best,
        "score": pytest.approx(scores[best], rel=1e-3),
    }
    assert found[0]["suppressed"][0]["id"] == int(scores.argmin())
