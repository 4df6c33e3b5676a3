"""Heads: distances and tests against computations that keep everything, planted effects, attention mass."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.benches import icl_base, icl_examples
from helpers.families import ALL, HEADS, attention_layers
from helpers.prompts import leave_one_out
from scipy import stats

from ia2.analysis import heads as module
from ia2.analysis.conditions import OTHER
from ia2.analysis.heads import HeadAccumulator, attention_mass, summarise
from ia2.evaluation.effect_sizes import Difference
from ia2.models.capture import eager_attention
from ia2.models.forward import answer_pass
from ia2.models.sites import SiteCapture
from ia2.models.tokens import Ids, fed_ids
from ia2.report.figures.components import head_figures
from ia2.utils.files import finite
from ia2.utils.format import markdown

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


def test_without_a_control_by_hand() -> None:
    lengths = LENGTHS * 3
    ours, icl = tensors(lengths, 0), tensors(lengths, 1)
    ours = [a + 0.5 for a in ours]
    order = list(range(len(lengths)))
    random.Random(1).shuffle(order)
    view = metered(ours, icl, None, order)["sft"]
    assert view.test == "direction" and "control" not in view.maps
    differences = np.stack([(a - b).double().mean(1).numpy() for a, b in zip(ours, icl, strict=True)])
    differences = differences.reshape(-1, LAYERS, NUM, DIM)
    half = np.array([bool(random.Random(i).getrandbits(1)) for i in range(len(lengths))])
    assert 0 < half.sum() < len(half)
    direction = differences[~half].mean(0)
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    projected = (differences[half] * direction).sum(-1)
    expected = stats.ttest_1samp(projected, 0, alternative="greater")
    np.testing.assert_allclose(view.effects.p, expected.pvalue, rtol=1e-3)
    np.testing.assert_allclose(view.effects.d_z, projected.mean(0) / projected.std(0, ddof=1), rtol=1e-4)


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
    with pytest.raises(ValueError, match="not of 5 heads"):
        metered(icl, icl, icl, heads=5)
    meter = HeadAccumulator(NUM)
    meter.add("sft", 0, {"heads": icl[0]}, {"heads": icl[0]}, {"heads": icl[0]})
    with pytest.raises(ValueError, match="all of its examples have a control, or none"):
        meter.add("sft", 1, {"heads": icl[1]}, {"heads": icl[1]}, None)


def test_low_precision_is_compared_in_double() -> None:
    icl = [t.bfloat16() for t in tensors(LENGTHS, 1)]
    view = metered(icl, icl, None)["sft"]
    assert (view.maps["distance"] == 0).all() and np.allclose(view.maps["cosine"], 1, atol=1e-12)


# -------------------------------------------------------------------------------- planted and null


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


# ----------------------------------------------------------------------------------- attention mass


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
@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gemma3", "mistral", "bloom", "falcon", "mpt", "opt", "lfm2"]
)
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


def test_queries_that_do_not_fit(tiny_llama: Any, word_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="query lengths must be between"):
        attention_mass(tiny_llama, word_tokenizer, [(3, 4)], [(5,)], [3])


# ---------------------------------------------------------------------------------- a trained model


@pytest.fixture(scope="module")
def section(tiny_icl_model_path: Path) -> dict[str, Any]:
    """The tiny in-context learner with and without its demonstrations; other ones as the control."""
    base = icl_base(tiny_icl_model_path)
    trials, attention = [], []
    for seed in (0, 1):
        queries, others = icl_examples(16, seed=seed), icl_examples(16, seed=seed + 5)
        own = leave_one_out(base.tokenizer, queries, base.max_length, 1, seed=5)
        icl = [own.context_ids(i) for i in range(len(queries))]
        bare = [own.query_ids(i) for i in range(len(queries))]
        swapped = leave_one_out(base.tokenizer, others, base.max_length, 1, seed=5)
        # other demonstrations before the same query
        other = [swapped.context_ids(i)[: -len(swapped.query_ids(i))] + bare[i] for i in range(len(queries))]
        answers: list[Ids] = [(3,)] * len(queries)
        meter = HeadAccumulator(4)
        found = {}
        for view, prompts in (("icl", icl), ("icl-other", other), ("base", bare)):
            with SiteCapture(base.model, ["heads"]) as capture:
                pairs = list(zip(prompts, answers, strict=True))
                found[view] = {
                    o.index: capture.split(o.activations)
                    for o in answer_pass(base.model, base.tokenizer, pairs, capture=capture, logits=False)
                }
            for i, sites in found[view].items():
                meter.add(view, i, sites, found["icl"][i], found.get("icl-other", {}).get(i))
        trials.append(meter.finish())
        lengths = [len(ids) for ids in bare]
        attention.append(
            {
                view: attention_mass(base.model, base.tokenizer, prompts, answers, lengths)
                for view, prompts in (("icl", icl), ("base", bare))
            }
        )
    return finite(summarise(trials, range(4), 4, attention, top=5))  # type: ignore[return-value]


def test_the_tiny_learner(section: dict[str, Any]) -> None:
    json.dumps(section, allow_nan=False)
    base, other = section["views"]["base"], section["views"][OTHER.name]
    assert list(section["views"]) == [OTHER.name, "base"]
    assert (base["test"], other["test"]) == ("control", "direction")
    assert base["n"] == [16, 16] and np.shape(base["effect"]) == (4, 4) == np.shape(base["control"])
    # without demonstrations some heads are further from ICL than with other ones, and trials agree on them
    assert base["heads_further"] >= 3
    assert base["stability"]["spearman_of_share"] > 0.5
    assert base["stability"]["jaccard"] > base["stability"]["jaccard_by_chance"]
    assert np.sum(base["share_of_model"]) == pytest.approx(1, abs=0.01)
    shares = [head["share_of_model"] for head in base["top"]]
    assert len(shares) == 5 and shares == sorted(shares, reverse=True)
    first = base["top"][0]
    assert base["effect"][first["layer"]][first["head"]] == first["effect"]
    mass = {view: np.array(found["mass"]) for view, found in section["attention"]["views"].items()}
    assert mass["icl"][..., 1].max() > 0.5 and mass["base"][..., 1].max() == 0


# ------------------------------------------------------------------------------------------ figures


def test_figures(section: dict[str, Any], tmp_path: Path) -> None:
    maps, attention = head_figures(section)
    assert [len(maps.panels), len(attention.panels)] == [1, 3]  # the control has no map of the others' test
    for figure in (maps, attention):
        text = figure.save(tmp_path / f"{figure.name}.svg").read_text()
        assert "<svg" in text and "<image" not in text
        assert all(b"<svg" in picture.svg for picture in figure.pictures())
    table = markdown(maps.numbers)
    first = section["views"]["base"]["top"][0]
    assert f"layer {first['layer']}, head {first['head']} | {first['share_of_model']:.1%}" in table
    share = section["attention"]["views"]["icl"]["by_layer"][2]
    columns, rows = attention.numbers.texts()
    assert [row[columns.index("icl")] for row in rows if row[1] == "2"] == [f"{part:.1%}" for part in share]


def test_figures_of_little(tmp_path: Path) -> None:
    """One layer, one head, one example, no control, no attention."""
    icl = [torch.ones(1, 1, 4)]
    (figure,) = head_figures(finite(summarise([metered(icl, icl, None, heads=1)], [0], 1)))  # type: ignore[arg-type]
    figure.save(tmp_path / "heads.svg")
    assert "| – |" in markdown(figure.numbers) and "mean shift away from ICL" in figure.caption
    assert head_figures({"views": {}}) == []


def test_a_large_map_stays_a_small_file() -> None:
    rng = np.random.default_rng(0)
    ours, icl, other = (list(t) for t in zip(*drawn(rng, 4, np.ones((36, 32)), 2), strict=True))
    (figure,) = head_figures(summarise([metered(ours, icl, other, heads=32)], range(36), 32))
    (picture,) = figure.pictures()
    assert len(picture.svg) < 250_000
    assert picture.svg.count(b"<path") < 100
