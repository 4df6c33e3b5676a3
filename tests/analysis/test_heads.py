"""Heads: distances and tests against computations that keep everything, planted effects, attention mass."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers.families import ALL, HEADS, attention_layers
from scipy import stats

from ia2.analysis.conditions import OTHER
from ia2.analysis.sections import heads as module
from ia2.analysis.sections.heads import HeadAccumulator, attention_mass
from ia2.evaluation.effect_sizes import Difference
from ia2.models.capture import eager_attention
from ia2.models.forward import answer_pass
from ia2.models.tokens import Ids, fed_ids

LAYERS, NUM, DIM = 2, 3, 4


def tensors(lengths: Sequence[int], seed: int, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(LAYERS, g, NUM * DIM, generator=generator) for g in lengths]


def metered(
    ours: list[torch.Tensor],
    icl: list[torch.Tensor],
    other: list[torch.Tensor] | None,
    order: Sequence[int] | None = None,
    heads: int = NUM,
    view: str = "sft",
) -> dict[str, Difference]:
    meter = HeadAccumulator(heads)
    for i in order or range(len(ours)):
        beside = None if other is None else {"heads": other[i]}
        meter.add(view, i, {"heads": ours[i]}, {"heads": icl[i]}, beside)
    return meter.finish()


LENGTHS = [1, 4, 2, 3, 1, 2]


def by_hand(ours: list[torch.Tensor], icl: list[torch.Tensor]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Squared distance, cosine and squared norm of ICL, ``[n, L, H]`` each, in loops."""
    shape = len(ours), LAYERS, NUM
    distance, cosine, energy = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for i, layer, head in np.ndindex(*shape):
        part = slice(head * DIM, (head + 1) * DIM)
        length = ours[i].shape[1]
        for g in range(length):
            a, b = ours[i][layer, g, part].double().numpy(), icl[i][layer, g, part].double().numpy()
            distance[i, layer, head] += ((a - b) ** 2).sum() / length
            cosine[i, layer, head] += a @ b / np.sqrt((a @ a) * (b @ b)) / length
            energy[i, layer, head] += (b @ b) / length
    return distance, cosine, energy


def test_against_a_control_by_hand() -> None:
    ours, icl, other = tensors(LENGTHS, 0), tensors(LENGTHS, 1), tensors(LENGTHS, 2, scale=0.7)
    view = metered(ours, icl, other, order=[3, 1, 5, 0, 4, 2])["sft"]
    distance, cosine, energy = by_hand(ours, icl)
    control, _, _ = by_hand(other, icl)
    scale = energy.mean(0)
    assert view.test == "control" and "control" in view.maps
    np.testing.assert_allclose(view.maps["distance"], (distance / scale).mean(0), rtol=1e-5)
    np.testing.assert_allclose(view.maps["control"], (control / scale).mean(0), rtol=1e-5)
    np.testing.assert_allclose(view.maps["cosine"], cosine.mean(0), rtol=1e-5)
    logs = np.log(distance / scale + 1e-5), np.log(control / scale + 1e-5)
    p = stats.ttest_rel(*logs).pvalue
    np.testing.assert_allclose(view.effects.p, p, rtol=1e-5)
    np.testing.assert_allclose(
        view.effects.q, stats.false_discovery_control(p.ravel()).reshape(p.shape), rtol=1e-5
    )
    differences = logs[0] - logs[1]
    np.testing.assert_allclose(view.effects.d_z, differences.mean(0) / differences.std(0, ddof=1), rtol=1e-5)
    mean = distance.mean(0)
    np.testing.assert_allclose(view.maps["share_of_layer"], mean / mean.sum(1, keepdims=True))
    layers = mean / scale.sum(1, keepdims=True)
    np.testing.assert_allclose(view.maps["share_of_model"], layers / layers.sum())


def test_edges() -> None:
    one = metered(tensors([2], 0), tensors([2], 1), tensors([2], 2))["sft"]
    assert np.isnan(one.effects.d_z).all() and not one.effects.significant.any()
    alone = metered(tensors([2], 0), tensors([2], 1), None)["sft"]
    assert np.isnan(alone.effects.q).all()
    icl = tensors(LENGTHS, 1)
    same = metered(icl, icl, icl)["sft"]
    assert (same.effects.d_z == 0).all() and (same.effects.p == 1).all()
    assert (same.maps["distance"] == 0).all()
    silent = [torch.cat([torch.zeros(LAYERS, t.shape[1], DIM), t[..., DIM:]], -1) for t in icl]
    view = metered(tensors(LENGTHS, 0), silent, tensors(LENGTHS, 2))["sft"]
    assert np.isnan(view.maps["distance"][:, 0]).all() and np.isfinite(view.maps["distance"][:, 1:]).all()
    assert np.isnan(view.effects.q[:, 0]).all() and np.isfinite(view.effects.q[:, 1:]).all()
    assert not metered(icl, icl, icl, view="icl")
    # the control against itself would tell nothing
    assert (
        metered(tensors(LENGTHS, 0), icl, tensors(LENGTHS, 0), view=OTHER.name)[OTHER.name].test
        == "direction"
    )


def drawn(rng: np.random.Generator, n: int, factor: np.ndarray, dim: int) -> list[tuple[torch.Tensor, ...]]:
    """Examples whose view is ``factor`` times as far from ICL as the control; hard queries move both."""
    examples = []
    for _ in range(n):
        difficulty = np.exp(rng.normal(0, 0.7))
        icl, a, b = rng.normal(size=(3, *factor.shape, dim))
        view, other = icl + difficulty * factor[..., None] * a, icl + difficulty * b
        examples.append(tuple(torch.from_numpy(t).reshape(len(factor), 1, -1) for t in (view, icl, other)))
    return examples


def test_planted_heads_are_found_and_few_others() -> None:
    factor = np.ones((4, 8))
    planted = [(0, 3), (2, 5), (3, 0), (3, 1)]
    for place in planted:
        factor[place] = 1.6
    factor[1, 1] = 0.6  # nearer than the control
    found, false, shares = 0, 0, []
    rng = np.random.default_rng(0)
    for _ in range(20):
        ours, icl, other = (list(t) for t in zip(*drawn(rng, 40, factor, 16), strict=True))
        view = metered(ours, icl, other, heads=8)["sft"]
        flagged = {(int(i), int(j)) for i, j in np.argwhere(view.effects.significant)}
        found += len(flagged & {*planted, (1, 1)})
        false = len(flagged - {*planted, (1, 1)})
        shares.append(false / max(1, len(flagged)))
        assert all(view.effects.d_z[p] > 0 for p in planted) and view.effects.d_z[1, 1] < 0
    assert found >= 0.98 * 20 * 5
    assert np.mean(shares) < 0.08


@pytest.mark.parametrize("controlled", [True, False])
def test_nothing_is_found_where_there_is_nothing(controlled: bool) -> None:
    """More dimensions than examples; 300 data sets of 8 heads."""
    rng = np.random.default_rng(1)
    p, any_flagged = [], 0
    for _ in range(300):
        ours, icl, other = (list(t) for t in zip(*drawn(rng, 14, np.ones((2, 4)), 24), strict=True))
        view = metered(ours, icl, other if controlled else None, heads=4)["sft"]
        p.append(view.effects.p)
        any_flagged += bool(view.effects.significant.any())
    assert any_flagged / 300 < 0.08
    assert 0.03 < (np.array(p) < 0.05).mean() < 0.065


def prompts_of(shared: int) -> tuple[list[Ids], list[Ids], list[int]]:
    rng = random.Random(shared)
    prefix = tuple(rng.choices(range(3, 128), k=shared))
    prompts = [prefix + tuple(rng.choices(range(3, 128), k=n)) for n in (9, 14, 11, 7)]
    answers = [tuple(rng.choices(range(3, 128), k=n)) for n in (1, 3, 2, 1)]
    # a query of one's own, one that begins in the shared part, no demonstrations, next to nothing
    return prompts, answers, [4, 14 + min(shared, 3), 11 + shared, 1]


def mass_by_hand(model: Any, prompt: Ids, answer: Ids, query: int) -> np.ndarray:
    with torch.no_grad():
        record = model(
            input_ids=torch.tensor([fed_ids(prompt, answer)]), use_cache=False, output_attentions=True
        ).attentions
    found = np.zeros((len(record), HEADS, 3))
    start = len(prompt) - query
    for layer, weights in enumerate(record):
        mean = weights[0, :, -len(answer) :].mean(1).numpy()
        found[layer, :, 0] = mean[:, 0]
        found[layer, :, 1] = mean[:, 1:start].sum(-1) if start > 1 else 0
        found[layer, :, 2] = mean[:, max(start, 1) :].sum(-1)
    return found


@pytest.mark.parametrize("shared", [0, 24])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "bloom", "lfm2"])
def test_attention_mass(name: str, shared: int, word_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ALL[name]()
    prompts, answers, queries = prompts_of(shared)
    found = attention_mass(model, word_tokenizer, prompts, answers, queries)
    assert found.shape == (4, len(attention_layers(name)), HEADS, 3)
    with eager_attention(model):
        for i, row in enumerate(zip(prompts, answers, queries, strict=True)):
            np.testing.assert_allclose(found[i], mass_by_hand(model, *row), atol=2e-5)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
    assert (found[2, ..., 1] == 0).all() and (found[0, ..., 1] > 0).any()
    # a layer and a row at a time
    passes = []
    monkeypatch.setattr(module, "_HELD", 1)
    monkeypatch.setattr(
        "ia2.models.forward.answer_pass", lambda *a, **k: passes.append(k) or answer_pass(*a, **k)
    )
    again = attention_mass(model, word_tokenizer, prompts, answers, queries)
    np.testing.assert_allclose(again, found, atol=2e-5)
    assert len(passes) == len(attention_layers(name))
