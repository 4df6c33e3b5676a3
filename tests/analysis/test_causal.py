"""The causal check: a mechanism that was planted is found, fractions and their tests, figures."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.benches import icl_base
from helpers.families import ALL, HEADS
from peft import LoraConfig, get_peft_model
from test_patching import CONTEXTS, PROMPTS, Ids, plain, random_ids
from tiny_icl import planted

from ia2.analysis.patching import Part
from ia2.analysis.sections import causal
from ia2.analysis.sections.causal import MAX_POSITIONS, Patched, Patches, intervene, partners
from ia2.models.load import BaseModel

PLANTED = (planted.LAYER, planted.HEAD)


@pytest.fixture(scope="module")
def planted_base() -> BaseModel:
    return icl_base(Path(__file__).parents[1] / "tiny_icl" / "planted_model")


@pytest.fixture(scope="module")
def queries(planted_base: BaseModel) -> tuple[list[Ids], list[Ids], list[Ids]]:
    """Prompts with demonstrations, without, and the right answers (which ICL gives)."""
    tokenizer = planted_base.tokenizer
    demos = "".join(f"{x}{y}\n\n" for x, y in planted.planted_examples(12, 1))
    rows = planted.planted_examples(16, 2)

    def ids(text: str, **options: Any) -> Ids:
        return tuple(tokenizer(text, **options)["input_ids"])

    return (
        [ids(demos + x) for x, _ in rows],
        [ids(x) for x, _ in rows],
        [ids(y, add_special_tokens=False) for _, y in rows],
    )


def sft(base: BaseModel, seed: int = 0, steps: int = 2) -> Any:
    """A copy of the model that is on its way to know the answers without demonstrations."""
    tokenizer = base.tokenizer
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    model = get_peft_model(copy.deepcopy(base.model), config)
    rows = planted.planted_examples(12, 1)
    prompts = torch.tensor([tokenizer(x)["input_ids"] for x, _ in rows])
    labels = torch.tensor([tokenizer(y, add_special_tokens=False)["input_ids"][0] for _, y in rows])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(input_ids=prompts).logits[:, -1], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def checked(models: dict[str, Any], tokenizer: Any, units: Patches, *rows: Any, **options: Any) -> Any:
    return intervene(lambda name: nullcontext(models[name]), list(models), tokenizer, units, *rows, **options)


@pytest.fixture(scope="module")
def section(planted_base: BaseModel, queries: Any) -> dict[str, Any]:
    """Two trials, that is two adapters, on the same queries."""
    model = planted_base.model
    some = {
        "planted head and another": (Part("heads", 1, (0, 3)),),
        "other heads": (Part("heads", 1, (0, 1, 2)),),
    }
    units = Patches.of(model, sets=some)
    found = []
    for seed in range(2):
        models = {"base": model, "sft": sft(planted_base, seed)}
        found.append(checked(models, planted_base.tokenizer, units, *queries, seed=seed))
    return causal.summarise(units, found)


@pytest.mark.parametrize("target", ["base", "sft"])
@pytest.mark.parametrize(("direction", "fraction"), [("targets", "recovered"), ("reverse", "broken")])
def test_the_planted_head_and_layer_are_found(
    section: dict[str, Any], target: str, direction: str, fraction: str
) -> None:
    found = section[direction][target]
    layer, head = PLANTED
    heads, layers = np.array(found["heads"][fraction]), np.array(found["layers"][fraction])
    assert np.unravel_index(heads.argmax(), heads.shape) == PLANTED and layers.argmax() == layer
    assert heads[PLANTED] > 0.5 and layers[layer] > 0.5
    assert found["heads"]["low"][layer][head] > 0.5 and found["layers"]["low"][layer] > 0.5
    assert found["heads"]["q"][layer][head] < 1e-6 and found["layers"]["q"][layer] < 1e-6
    assert np.array(found["all"][fraction]) > 0.5
    # everybody else: bystanders write where nothing reads, the first layer gathers the query
    others = np.ones_like(heads, dtype=bool)
    others[PLANTED] = False
    assert np.abs(heads[others]).max() < 0.05
    assert np.abs(np.delete(layers, layer)).max() < 0.1
    assert np.array(found["heads"]["high"])[others].max() < 0.1
    bystanders = others & (np.arange(4)[:, None] >= layer)
    assert np.abs(heads[bystanders]).max() < 0.01
    assert found["sets"][fraction][0] > 0.5 and abs(found["sets"][fraction][1]) < 0.05
    # and nobody else is taken for one that carries the task
    assert np.argwhere(np.array(found["heads"]["q"]) < 0.05).tolist() == [list(PLANTED)]
    assert np.flatnonzero(np.array(found["layers"]["q"]) < 0.05).tolist() == [layer]


@pytest.mark.parametrize("target", ["base", "sft"])
def test_controls_recover_nothing(section: dict[str, Any], target: str) -> None:
    """Another query's activation brings that query's answer, the run's own one on another query nothing."""
    control = section["targets"][target]["control"]
    other, own = control["other"], control["own"]
    assert other["heads"]["recovered"][planted.LAYER][planted.HEAD] < -0.1
    assert np.array(other["heads"]["high"]).max() < 0.1 and np.array(other["layers"]["high"]).max() < 0.1
    # a model on its way to knowing the answers also loses its own one
    assert np.array(own["layers"]["high"]).max() < 0.1 and np.array(own["all"]["high"]) < 0.1
    assert np.abs(own["layers"]["recovered"][planted.LAYER]) < 0.05


def test_long_answers_and_missing_neurons(word_tokenizer: Any) -> None:
    """Controls of queries whose answers are of other lengths; a mixture of experts has no neurons."""
    model = ALL["mixtral"]()
    answers = [random_ids(n, n) for n in (1, 3, MAX_POSITIONS + 4)]
    units = Patches.of(model)
    assert list(units.groups) == ["heads", "layers", "residual", "all"]
    trial = checked({"base": model}, word_tokenizer, units, CONTEXTS, PROMPTS, answers)
    forward, back = trial["targets"]["base"], trial["reverse"]["base"]
    cut = [answer[:MAX_POSITIONS] for answer in answers]
    for prompts, found in ((PROMPTS, forward), (CONTEXTS, back)):
        expected = [plain(model, p, a, {}, ()) for p, a in zip(prompts, cut, strict=True)]
        np.testing.assert_allclose(found.clean, expected, atol=1e-4)
    assert forward.values["other"]["heads"].shape == (3, 2, HEADS)
    np.testing.assert_allclose(forward.values[""]["residual"][:, -1], forward.aim, atol=1e-4)


def test_partners_have_other_answers_where_possible() -> None:
    answers: list[Ids] = [(1,)] * 4 + [(2,)] * 3 + [(3,)] * 1
    for seed in range(5):
        found = partners(answers, seed)
        assert sorted(found) == list(range(8))
        assert all(answers[i] != answers[j] for i, j in enumerate(found))
    many: list[Ids] = [(1,)] * 6 + [(2,)] * 2
    found = partners(many)
    assert sorted(found) == list(range(8)) and all(i != j for i, j in enumerate(found))
    assert sum(many[i] != many[j] for i, j in enumerate(found)) == 4
    assert partners([(1,), (1,), (1,)]) != [0, 1, 2] and partners(many, 1) != partners(many, 2)


def units(layers: int = 3, heads: int = 8) -> Patches:
    groups = {
        "heads": tuple((Part("heads", i, (h,)),) for i in range(layers) for h in range(heads)),
        "layers": tuple((Part("output", i),) for i in range(layers)),
        "all": ((),),
    }
    return Patches(list(range(layers)), heads, groups)


def made(gap: float, seed: int, n: int = 40, layers: int = 3, heads: int = 8) -> Patched:
    """Head 2 of the second layer recovers half of the gap; the others do nothing, with noise."""
    rng = np.random.default_rng(seed)
    clean = rng.normal(-3, 0.5, n)
    aim = clean + rng.normal(gap, 0.3, n)
    change = rng.normal(0, 0.05, (n, layers, heads))
    change[:, 1, 2] += (aim - clean) / 2
    by_layer = change.sum(2)
    patched = {
        "heads": clean[:, None, None] + change,
        "layers": clean[:, None] + by_layer,
        "all": clean + by_layer.sum(1),
    }
    other = {group: values - 0.01 for group, values in patched.items()}
    return Patched(list(range(n)), clean, aim, {"": patched, "other": other})


def summarise(runs: Sequence[Patched], of: Patches | None = None) -> dict[str, Any]:
    """The section of runs of one target."""
    return causal.summarise(of or units(), [{"targets": {"sft": run}} for run in runs])


def test_fractions_are_ratios_of_means() -> None:
    runs = [made(2.0, seed) for seed in range(3)]
    found = summarise(runs)["targets"]["sft"]["heads"]
    gap = np.concatenate([run.aim - run.clean for run in runs])
    change = np.concatenate([run.values[""]["heads"] - run.clean[:, None, None] for run in runs])
    np.testing.assert_allclose(found["recovered"], change.mean(0) / gap.mean(), rtol=1e-9)
    np.testing.assert_allclose(found["change"], change.mean(0), rtol=1e-9)
    np.testing.assert_allclose(found["by_trial"][0], change[:40].mean(0) / gap[:40].mean(), rtol=1e-9)
    low, high = (np.array(found[end]) for end in ("low", "high"))
    assert (low <= np.array(found["recovered"])).all() and (high >= np.array(found["recovered"])).all()
    assert 0.4 < low[1, 2] < 0.5 < high[1, 2] < 0.6
    assert np.argwhere(np.array(found["q"]) < 0.05).tolist() == [[1, 2]]
    # twice the same training set says no more about the heads than once
    twice, once = (summarise(part)["targets"]["sft"]["heads"] for part in ([runs[0]] * 2, runs[:1]))
    np.testing.assert_allclose(twice["q"], once["q"])
    np.testing.assert_allclose(twice["low"], once["low"], atol=0.02)


def test_small_changes_are_no_discoveries() -> None:
    """A mean change just at the least that counts is found as rarely as the level says."""
    hits = 0
    for seed in range(40):
        run = made(2.0, 100 + seed)
        noise = np.random.default_rng(seed).normal(0.02 * 2.0, 0.2, (40, 3))
        run.values[""]["layers"] = run.clean[:, None] + noise
        hits += (np.array(summarise([run])["targets"]["sft"]["layers"]["q"]) < 0.05).any()
    assert hits <= 6
    # far beyond it, nearly always
    run.values[""]["layers"] = run.clean[:, None] + noise + 0.5
    assert (np.array(summarise([run])["targets"]["sft"]["layers"]["q"]) < 0.05).all()
