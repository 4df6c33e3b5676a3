"""Neurons and residual directions: running sums against all vectors, planted effects, tokens, figures."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from benches import icl_base, icl_examples
from families import FAMILIES
from scipy import stats

from ia2.analysis.neurons import Coordinates, NeuronMeter, shift_tokens, summarise
from ia2.analysis.sites import SiteCapture
from ia2.analysis.unembedding import Lens
from ia2.context import Contexts
from ia2.files import finite
from ia2.inference import answer_pass
from ia2.report.head_figures import neuron_figures
from ia2.sweeps.tables import markdown

LAYERS, WIDTH = 3, 20


def metered(
    ours: Any, icl: Any, order: Any = None, site: str = "neurons", views: tuple[str, ...] = ("sft",)
) -> Coordinates:
    meter = NeuronMeter(list(range(ours[0].shape[0])), ours[0].shape[-1], site)
    for view in views:
        for i in order or range(len(ours)):
            meter.add(view, i, {site: ours[i]}, {site: icl[i]}, None)
    return meter.finish()


def examples(n: int, seed: int, shape: tuple[int, int] = (LAYERS, WIDTH), long: bool = True) -> Any:
    generator = torch.Generator().manual_seed(seed)
    lengths = [1 + i % 4 if long else 1 for i in range(n)]
    return [torch.randn(shape[0], g, shape[1], generator=generator) for g in lengths]


def test_against_keeping_everything() -> None:
    ours, icl = examples(15, 0), examples(15, 1)
    ours = [a + 1000.0 * (torch.arange(WIDTH) == 3) for a in ours]  # a mean far above the spread
    order = list(range(15))
    random.Random(0).shuffle(order)
    view = metered(ours, icl, order).views["sft"]
    kept = np.stack([(a.double() - b.double()).mean(1).numpy() for a, b in zip(ours, icl, strict=True)])
    assert view.n == 15
    np.testing.assert_allclose(view.shift, kept.mean(0))
    np.testing.assert_allclose(view.effects.d_z, (kept.mean(0) / kept.std(0, ddof=1)).clip(-1000, 1000))
    plain = np.arange(WIDTH) != 3
    p = stats.ttest_1samp(kept, 0).pvalue
    np.testing.assert_allclose(view.effects.p[:, plain], p[:, plain])
    q = stats.false_discovery_control(view.effects.p.ravel())
    np.testing.assert_allclose(view.effects.q.ravel(), q)
    products = np.einsum("ilf,jlf->lij", kept, kept)
    n, own = len(kept), np.einsum("lii->l", products)
    # the mean product of two different examples, over the mean product of one with itself
    np.testing.assert_allclose(view.common_shift, (products.sum((1, 2)) - own) / (n - 1) / own)


def test_edges() -> None:
    icl = examples(4, 1)
    same = metered(icl, icl).views["sft"]
    assert (same.effects.d_z == 0).all() and (same.effects.p == 1).all() and np.isnan(same.common_shift).all()
    one = metered(icl[:1], examples(1, 2)).views["sft"]
    assert np.isnan(one.effects.q).all() and np.isnan(one.common_shift).all()
    assert not metered(icl, icl, views=("icl",)).views
    half = [t.bfloat16() for t in icl]
    assert (metered(half, half).views["sft"].shift == 0).all()
    with pytest.raises(ValueError, match="is not \\[layers, width\\]"):
        NeuronMeter([0], WIDTH).add("sft", 0, {"neurons": icl[0]}, {"neurons": icl[0]}, None)


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
        flags = metered(ours, icl).views["sft"].effects.significant
        flagged = {(int(i), int(j)) for i, j in np.argwhere(flags)}
        found += len(flagged & planted)
        shares.append(len(flagged - planted) / max(1, len(flagged)))
        null = metered([a + b for a, b in zip(icl, noise, strict=True)], icl).views["sft"]
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
        shares.append(metered(ours, icl, site="residual").views["sft"].common_shift[0])
    assert np.mean(shares) == pytest.approx(strength**2 / (1 + strength**2), abs=0.01)


def test_summary_over_trials() -> None:
    strong = torch.zeros(LAYERS, 1, WIDTH)
    strong[1, 0, 4], strong[2, 0, 9] = 5.0, -4.0
    trials = []
    for seed in range(3):
        icl, noise = examples(12, 2 * seed), examples(12, 2 * seed + 1)
        ours = [a + b + strong for a, b in zip(icl, noise, strict=True)]
        trials.append(metered(ours, icl, views=("icl-other", "sft")))
    section = summarise({"neurons": trials, "residual": []}, top=4)
    json.dumps(section, allow_nan=False)
    assert list(section) == ["neurons"] and section["neurons"]["trials"] == 3
    found = section["neurons"]["views"]["sft"]
    effects = [t.views["sft"].effects for t in trials]
    assert found["n"] == [12, 12, 12]
    assert [(t["layer"], t["index"]) for t in found["top"][:2]] == [(1, 4), (2, 9)]
    assert len(found["top"]) == 4
    first, second = found["top"][:2]
    assert first["effect"] == pytest.approx(np.mean([e.d_z[1, 4] for e in effects]), rel=1e-3)
    assert first["shift"] == pytest.approx(5, abs=0.5) and second["shift"] == pytest.approx(-4, abs=0.5)
    assert first["significant"] == 3
    counts = np.mean([e.significant.sum(1) for e in effects], axis=0)
    assert found["significant"] == pytest.approx(counts, rel=1e-3)
    assert found["share_significant"] == pytest.approx(counts.sum() / LAYERS / WIDTH, rel=1e-3)
    assert found["effect_quantiles"]["1"][1] == pytest.approx(first["effect"], rel=1e-3)
    assert found["stability"]["k"] == 4
    assert found["stability"]["jaccard"] > found["stability"]["jaccard_by_chance"]
    low, high = found["common_shift_range"]
    assert all(a <= b <= c for a, b, c in zip(low, found["common_shift"], high, strict=True))


# -------------------------------------------------------------------------------------------- tokens


def promoted(model: Any, tokenizer: Any, shift: np.ndarray, k: int) -> dict[str, Any]:
    """What :func:`shift_tokens` says of one direction."""
    view: Any = SimpleNamespace(layers=[0], views={"a": SimpleNamespace(shift=shift[None])})
    (found,) = shift_tokens(model, tokenizer, [view], k)["a"]
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_what_a_small_step_does_to_the_logits(name: str, word_tokenizer: Any) -> None:
    """From a residual stream at right angles to the step, so that the norm's divisor stays what it is."""
    model: Any = FAMILIES[name]()
    lens = Lens.of(model)
    rng = np.random.default_rng(0)
    stream, shift = rng.normal(size=(2, 32))
    stream -= stream.mean()
    centred = shift - shift.mean()
    stream -= centred * (stream @ centred) / (centred @ centred)
    assert abs(stream @ shift) < 1e-9
    step = torch.from_numpy(0.02 * shift)[None], torch.from_numpy(stream)[None]
    change = (lens.logits(step[1] + step[0]) - lens.logits(step[1] - step[0]))[0].double().numpy()
    found = promoted(model, word_tokenizer, shift, k=3)
    change = (change - change.mean()) / change.std()
    assert len(found["promoted"]) == len(found["suppressed"]) == 3
    tolerance = 0.1 if lens.cap else 0.02  # a soft cap bends what is added
    known = change[: len(word_tokenizer)]
    for kind, sign in (("promoted", 1), ("suppressed", -1)):
        for entry in found[kind]:
            assert entry["score"] == pytest.approx(change[entry["id"]], abs=tolerance)
            assert entry["token"] == word_tokenizer.decode([entry["id"]])
        best = np.sort(-sign * known)[:3] * -sign
        assert [e["score"] for e in found[kind]] == pytest.approx(best, abs=tolerance)


def test_half_precision_and_long_directions(word_tokenizer: Any) -> None:
    model = FAMILIES["llama"]()
    shift = np.random.default_rng(1).normal(size=32)
    full = promoted(model, word_tokenizer, shift, k=2)
    assert promoted(model, word_tokenizer, 1e6 * shift, k=2) == full
    half = promoted(model.bfloat16(), word_tokenizer, 1e-6 * shift, k=2)
    assert half["promoted"][0]["id"] == full["promoted"][0]["id"]
    assert half["promoted"][0]["score"] == pytest.approx(full["promoted"][0]["score"], rel=0.02)


# ---------------------------------------------------------------------------------- a trained model


@pytest.fixture(scope="module")
def section(tiny_icl_model_path: Path) -> dict[str, Any]:
    base = icl_base(tiny_icl_model_path)
    rows = icl_examples(16)
    contexts = Contexts.leave_one_out(
        base.tokenizer, rows, permutations=1, seed=5, max_length=base.max_length, reserve=1
    )
    sites = ("neurons", "residual")
    found = {}
    for view in ("icl", "base"):
        prompts = [contexts.context_ids(i) if view == "icl" else contexts.query_ids(i) for i in range(16)]
        with SiteCapture(base.model, sites) as capture:
            pairs = [(prompt, (3,)) for prompt in prompts]
            found[view] = {
                o.index: capture.split(o.activations)
                for o in answer_pass(base.model, base.tokenizer, pairs, capture=capture, logits=False)
            }
    meters = [NeuronMeter([0, 1, 2, 3], 256, "neurons"), NeuronMeter([0, 1, 2, 3], 64, "residual")]
    for i in range(16):
        for meter in meters:
            meter.add("base", i, found["base"][i], found["icl"][i], None)
    neurons, residual = (meter.finish() for meter in meters)
    tokens = shift_tokens(base.model, base.tokenizer, [residual], k=3)
    return finite(summarise({"neurons": [neurons], "residual": [residual]}, tokens))  # type: ignore[return-value]


def test_the_tiny_learner(section: dict[str, Any]) -> None:
    json.dumps(section, allow_nan=False)
    neurons, residual = section["neurons"]["views"]["base"], section["residual"]["views"]["base"]
    assert (section["neurons"]["width"], section["residual"]["width"]) == (256, 64)
    assert neurons["share_significant"] > 0.1 and len(neurons["top"]) == 50
    assert all(entry["q"] < 0.05 for entry in neurons["top"][:10])
    # what demonstrations add is partly the same for all queries (that there are labels to choose from)
    assert 0.05 < residual["common_shift"][-1] < 0.95
    assert [t["layer"] for t in residual["tokens"]] == [2, 3] and "tokens" not in neurons
    assert len(residual["tokens"][0]["promoted"]) == 3


def test_figures(section: dict[str, Any], tmp_path: Path) -> None:
    neurons, shift = neuron_figures(section, "tiny: 16 queries")
    for figure in (neurons, shift):
        assert "tiny: 16 queries" in figure.save(tmp_path / f"{figure.name}.svg").read_text()
        assert all(b"<svg" in picture.svg for picture in figure.pictures())
    counts = section["neurons"]["views"]["base"]["significant"]
    assert f"| 2 | {counts[2]:,.0f} |" in markdown(neurons.numbers)
    common = section["residual"]["views"]["base"]["common_shift"]
    assert f"| 3 | {common[3]:.3f} |" in markdown(shift.numbers)


def test_figures_of_little(tmp_path: Path) -> None:
    """One layer and one example; a family without neurons of its own."""
    ours, icl = examples(1, 0, (1, 8)), examples(1, 1, (1, 8))
    views = ("icl-other", "sft", "sft+demos", "ia2+sft~seed", "mine@dora")
    section = finite(summarise({"residual": [metered(ours, icl, site="residual", views=views)]}))
    (figure,) = neuron_figures(section, "x")  # type: ignore[arg-type]
    text = figure.save(tmp_path / "shift.svg").read_text()
    # adapters' controls are in the numbers only
    assert all((view in text) == (view not in ("sft+demos", "ia2+sft~seed")) for view in views)
    assert "| 0 | – | – | – | – | – |" in markdown(figure.numbers)
    assert neuron_figures({}, "x") == []
