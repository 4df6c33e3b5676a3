"""Subspaces of low-rank updates, against dense decompositions, and the section made of them."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from helpers.adapting import disturb
from helpers.families import llama

from ia2.adapters.types import ADAPTERS, peft_config
from ia2.adapters.weights import adapter_state, attach, detach, read_adapter_state, save_adapter
from ia2.analysis.sections.weights import AdapterWeights, over_seeds, overlaps, place
from ia2.analysis.subspaces import MEASURES, low_rank, overlap
from ia2.config.sections import AdapterConfig
from ia2.utils.files import finite

RNG = np.random.default_rng(0)
OUT, IN = 40, 24


def factors(rank: int, out: int = OUT, width: int = IN) -> tuple[np.ndarray, np.ndarray]:
    return RNG.normal(size=(rank, width)), RNG.normal(size=(out, rank)) * np.geomspace(1, 20, rank)


def dense(a: np.ndarray, b: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Leading vectors and values from a decomposition of the whole matrix."""
    u, s, vt = np.linalg.svd(scale * b @ a)
    r = len(a)
    return u[:, :r], s[:r], vt[:r].T


@pytest.mark.parametrize("rank", [1, 4, 24])
def test_an_update_as_a_dense_decomposition_has_it(rank: int) -> None:
    a, b = factors(rank)
    found = low_rank(a, b, 0.5)
    u, s, v = dense(a, b, 0.5)
    np.testing.assert_allclose(found.sizes, s, rtol=1e-9)
    np.testing.assert_allclose(found.left * found.sizes @ found.right.T, 0.5 * b @ a, atol=1e-9)
    for ours, theirs in ((found.left, u), (found.right, v), (found.b, np.linalg.svd(b)[0][:, :rank])):
        np.testing.assert_allclose(ours @ ours.T, theirs @ theirs.T, atol=1e-9)  # vectors up to their signs


@pytest.mark.parametrize("ranks", [(4, 4), (2, 7), (24, 24)])
def test_an_overlap_as_dense_decompositions_have_it(ranks: tuple[int, int]) -> None:
    (a1, b1), (a2, b2) = map(factors, ranks)
    values, _, found_angles = overlap(low_rank(a1, b1, 2.0), low_rank(a2, b2, 0.25))
    (u1, _, v1), (u2, _, v2) = dense(a1, b1, 2.0), dense(a2, b2, 0.25)
    d1, d2 = 2.0 * b1 @ a1, 0.25 * b2 @ a2
    columns = [np.linalg.svd(b)[0][:, : b.shape[1]] for b in (b1, b2)]
    least = min(ranks)
    expected = {
        "b": ((columns[0].T @ columns[1]) ** 2).sum() / least,
        "left": ((u1.T @ u2) ** 2).sum() / least,
        "right": ((v1.T @ v2) ** 2).sum() / least,
        "weighted": ((d1 @ d1.T) * (d2 @ d2.T)).sum() / np.linalg.norm(d1 @ d1.T) / np.linalg.norm(d2 @ d2.T),
        "cosine": (d1 * d2).sum() / np.linalg.norm(d1) / np.linalg.norm(d2),
    }
    assert dict(zip(MEASURES, values, strict=True)) == pytest.approx(expected, abs=1e-10)
    assert values[1] == pytest.approx(values[0])  # A has full rank: the same subspace
    angles = np.sort(np.degrees(scipy.linalg.subspace_angles(*columns)))
    np.testing.assert_allclose(found_angles, angles, atol=1e-5)


@pytest.mark.parametrize("ranks", [(3, 3), (2, 6)])
def test_random_subspaces_have_the_random_baseline(ranks: tuple[int, int]) -> None:
    found = [overlap(*(low_rank(*factors(rank), 1.0) for rank in ranks)) for _ in range(400)]
    values, random, _ = zip(*found, strict=True)
    np.testing.assert_allclose(np.mean(values, 0), np.mean(random, 0), atol=0.02)
    np.testing.assert_allclose(random[0][[0, 2, 4]], [max(ranks) / OUT, max(ranks) / IN, 0])


def test_directions_that_are_only_rounding_are_none() -> None:
    a, b = factors(4)
    b[:, 3] = b[:, 2]
    found = low_rank(a, b.astype(np.float32), 1.0)
    assert found.b.shape[1] == 3 and len(found.sizes) == 3
    nothing = low_rank(a, np.zeros_like(b), 1.0)
    assert nothing.left.shape == (OUT, 0)
    values, _, angles = overlap(found, nothing)
    assert np.isnan(values).all() and not angles.size


def made(name: str, seed: int, model: Any = None, by: float = 0.1, **settings: Any) -> AdapterWeights:
    """An adapter on a tiny Llama whose B is random (its values depend on arm and seed)."""
    config = AdapterConfig(**{"rank": 2, "alpha": 2, **settings})
    model = attach(model or llama(), peft_config(llama(), config), seed)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {seed}".encode()))
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * by
    return AdapterWeights(name, name.split("@")[0], seed, None, config, adapter_state(model))


@pytest.fixture(scope="module")
def section() -> dict[str, Any]:
    arms = [made(name, seed) for seed in (0, 1, 2) for name in ("sft", "ia2", "ia2-sft")]
    return overlaps(arms, dict(llama().named_parameters()))


def test_the_section_against_dense_matrices(section: dict[str, Any]) -> None:
    arms = {(name, seed): made(name, seed) for seed in (0, 1, 2) for name in ("sft", "ia2")}
    names = section["modules"]["names"]
    assert len(names) == 6 and section["modules"]["layers"] == [0, 0, 0, 1, 1, 1]

    def update(arm: AdapterWeights, module: str) -> np.ndarray:
        a, b = (arm.state[f"base_model.model.{module}.lora_{part}.weight"].double().numpy() for part in "AB")
        return b @ a  # rank 2, alpha 2

    base = dict(llama().named_parameters())
    values, norms = np.zeros((3, len(names))), np.zeros((3, len(names)))
    for seed in range(3):
        for m, module in enumerate(names):
            one, other = (update(arms[name, seed], module) for name in ("sft", "ia2"))
            u1, u2 = (np.linalg.svd(d)[0][:, :2] for d in (one, other))
            values[seed, m] = ((u1.T @ u2) ** 2).sum() / 2
            norms[seed, m] = np.linalg.norm(one)
    pair = next(p for p in section["pairs"] if p["label"] == "sft – ia2")
    np.testing.assert_allclose(pair["by_module"]["b"], values.mean(0), rtol=1e-6)
    np.testing.assert_allclose(pair["overlap"]["b"]["value"], values.mean(), rtol=1e-6)
    assert pair["overlap"]["b"]["low"] == pytest.approx(values.mean(1).min())
    assert pair["overlap"]["b"]["ends"] == "range"
    layers = np.array(section["modules"]["layers"])
    np.testing.assert_allclose(
        pair["by_layer"]["b"], [values[:, layers == n].mean() for n in (0, 1)], rtol=1e-6
    )
    # k_proj has fewer outputs (grouped heads)
    widths = [base[f"{module}.weight"].shape[0] for module in names]
    assert pair["random"]["b"] == pytest.approx(np.mean([2 / width for width in widths]))
    whole = np.sqrt((norms**2).sum(1))
    entry = section["updates"]["sft"]
    assert entry["norm"]["value"] == pytest.approx(whole.mean())
    weights = math.sqrt(sum(float(base[f"{m}.weight"].detach().double().norm() ** 2) for m in names))
    assert entry["relative_norm"]["value"] == pytest.approx((whole / weights).mean(), rel=1e-5)
    first = np.sqrt((norms[:, layers == 0] ** 2).sum(1)).mean()
    assert entry["by_layer"]["norm"][0]["value"] == pytest.approx(first)
    assert 1 < entry["effective_rank"]["value"] <= 2
    json.dumps(finite(section), allow_nan=False)


def test_scales_follow_the_settings() -> None:
    """Norms of the same factors, by the scale that the model itself applies."""
    settings = [
        {"alpha": 6.0},
        {"type": "rslora", "rank": 4, "alpha": 6.0},
        {"type": "lora", "rank": None, "alpha": None},
        {"type": "dora"},
    ]
    pattern = {"peft_type": "LORA", "r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "o_proj"]}
    pattern |= {"alpha_pattern": {"layers.1.self_attn.o_proj": 11}, "use_rslora": True}
    for given in [*settings, {"rank": None, "alpha": None, "peft": pattern}]:
        arm = made("sft", 0, **given)
        found = overlaps([arm])["updates"]["sft"]["by_layer"]["norm"]
        model = attach(llama(), peft_config(llama(), arm.config), 0)
        model.load_state_dict(
            {k.replace(".weight", ".default.weight"): v for k, v in arm.state.items() if "lora_" in k},
            strict=False,
        )
        squares = [0.0, 0.0]
        for name, module in model.named_modules():
            if hasattr(module, "lora_A") and hasattr(module, "scaling"):
                a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
                update = (module.scaling["default"] * b @ a).detach()
                squares[place(name)[0] or 0] += float(update.norm()) ** 2
        assert [entry["value"] for entry in found] == pytest.approx(np.sqrt(squares).tolist(), rel=1e-5)


@pytest.mark.parametrize("kind", list(ADAPTERS))
def test_every_adapter_type_is_looked_at_or_skipped_with_a_reason(kind: str, tmp_path: Path) -> None:
    config = AdapterConfig(type=kind)
    model = attach(llama(), peft_config(llama(), config), 0)
    disturb(model, 0.01)
    save_adapter(model, tmp_path)
    weights = AdapterWeights(f"sft@{kind}", "sft", 0, None, config, read_adapter_state(tmp_path))
    section = overlaps([weights], dict(llama().named_parameters()))
    low = kind in ("lora", "rslora", "dora")
    assert bool(section["skipped"]) == (not low and kind != "full")
    if section["skipped"]:
        assert section["skipped"][0]["reason"].startswith(f"{kind}: ")
    else:
        assert section["updates"][f"sft@{kind}"]["norm"]["value"] > 0
        assert section["updates"][f"sft@{kind}"]["relative_norm"]["value"] > 0


def test_full_fine_tuning() -> None:
    model, base = llama(), dict(llama().named_parameters())
    full = attach(model, peft_config(model, AdapterConfig(type="full")), 0)
    change = torch.outer(torch.arange(32.0), torch.arange(32.0)) * 1e-3
    state = adapter_state(full)
    state["model.layers.1.self_attn.q_proj.weight"] += change
    weights = [AdapterWeights("sft@full", "sft", 0, None, AdapterConfig(type="full"), state), made("ia2", 0)]
    section = overlaps(weights, base)
    entry = section["updates"]["sft@full"]
    assert entry["norm"]["value"] == pytest.approx(float(change.norm()), rel=1e-4)
    where = entry["by_kind"]["kinds"].index("self_attn.q_proj")
    assert entry["by_kind"]["norm"][where]["value"] == pytest.approx(float(change.norm()), rel=1e-4)
    assert entry["by_layer"]["norm"][0]["value"] == 0
    assert section["pairs"] == []  # no subspace to compare
    assert overlaps(weights[:1])["skipped"][0]["reason"].startswith("full: ")
    detach(full)


def test_folds_are_averaged_before_seeds() -> None:
    values = over_seeds([1.0, 3.0, 10.0], [0, 0, 1])
    assert (values["value"], values["low"], values["high"], values["n"]) == (6, 2, 10, 2)
    five = over_seeds([1.0, 2.0, 3.0, 4.0, 5.0], range(5))
    half = scipy.stats.t.ppf(0.975, 4) * math.sqrt(2.5 / 5)
    assert (five["low"], five["high"], five["ends"]) == (
        pytest.approx(3 - half),
        pytest.approx(3 + half),
        "95%",
    )
    assert over_seeds([1.0, 2.0, 3.0, 4.0, 5.0], range(5), interval=False)["high"] == 5
    assert over_seeds([math.nan], [0])["n"] == 0
