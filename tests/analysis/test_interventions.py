"""The causal check: a mechanism that was planted is found, fractions and their tests, figures."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.benches import icl_base
from helpers.families import ALL, HEADS, llama
from peft import LoraConfig, get_peft_model
from test_patching import ANSWERS, CONTEXTS, PROMPTS, Ids, plain, random_ids
from tiny_icl import planted

from ia2.analysis import interventions
from ia2.analysis.interventions import MAX_POSITIONS, Patched, Units, intervene, partners, units_of
from ia2.analysis.patching import Unit
from ia2.models.load import BaseModel
from ia2.report.figures.causal import causal_figures
from ia2.utils.errors import DataError
from ia2.utils.files import finite

PLANTED = (planted.LAYER, planted.HEAD)


# ---------------------------------------------------------------------------------- planted mechanism


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


def test_one_head_carries_the_task(planted_base: BaseModel) -> None:
    """By ablation: without this head the answers are guesses, without any other one they are right."""
    model = planted_base.model
    assert planted.accuracy(model, tasks=60) > 0.98
    for layer in range(4):
        for head in range(4):
            with planted.without_head(model, layer, head):
                accuracy = planted.accuracy(model, tasks=60)
            right = accuracy < 0.3 if (layer, head) == PLANTED else accuracy > 0.95
            assert right, (layer, head, accuracy)


def checked(models: dict[str, Any], tokenizer: Any, units: Units, *rows: Any, **options: Any) -> Any:
    return intervene(lambda name: nullcontext(models[name]), list(models), tokenizer, units, *rows, **options)


@pytest.fixture(scope="module")
def section(planted_base: BaseModel, queries: Any) -> dict[str, Any]:
    """Two trials, that is two adapters, on the same queries."""
    model = planted_base.model
    some = {
        "planted head and another": (Unit("heads", 1, (0, 3)),),
        "other heads": (Unit("heads", 1, (0, 1, 2)),),
    }
    units = units_of(model, sets=some)
    found = []
    for seed in range(2):
        models = {"base": model, "sft": sft(planted_base, seed)}
        found.append(checked(models, planted_base.tokenizer, units, *queries, seed=seed))
    return interventions.summarise(units, found)


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


def test_what_the_section_holds(section: dict[str, Any]) -> None:
    assert (section["queries"], section["trials"], section["heads"]) == (16, 2, 4)
    assert section["sets"] == ["planted head and another", "other heads"]
    found = section["targets"]["sft"]
    assert found["gap"]["low"] < found["gap"]["value"] < found["gap"]["high"]
    assert found["aim"] - found["clean"] == pytest.approx(found["gap"]["value"])
    assert np.shape(found["heads"]["by_trial"]) == (2, 4, 4) and np.shape(found["all"]["by_trial"]) == (2,)
    for trial in found["heads"]["by_trial"]:
        assert np.unravel_index(np.argmax(trial), (4, 4)) == PLANTED
    last = found["residual"]
    assert last["recovered"][3] == pytest.approx(1, abs=1e-3)
    assert last["change"][3] == pytest.approx(found["gap"]["value"], abs=1e-3)
    # where the runs are exchanged, so are their log-probabilities
    assert section["reverse"]["sft"]["clean"] == pytest.approx(found["aim"], abs=1e-4)
    assert section["reverse"]["sft"]["aim"] == pytest.approx(found["clean"], abs=1e-4)


def test_long_answers_and_missing_neurons(word_tokenizer: Any) -> None:
    """Controls of queries whose answers are of other lengths; a mixture of experts has no neurons."""
    model = ALL["mixtral"]()
    answers = [random_ids(n, n) for n in (1, 3, MAX_POSITIONS + 4)]
    units = units_of(model)
    assert list(units.groups) == ["heads", "layers", "residual", "all"]
    trial = checked({"base": model}, word_tokenizer, units, CONTEXTS, PROMPTS, answers)
    forward, back = trial["targets"]["base"], trial["reverse"]["base"]
    cut = [answer[:MAX_POSITIONS] for answer in answers]
    for prompts, found in ((PROMPTS, forward), (CONTEXTS, back)):
        expected = [plain(model, p, a, {}, ()) for p, a in zip(prompts, cut, strict=True)]
        np.testing.assert_allclose(found.clean, expected, atol=1e-4)
    assert forward.values["other"]["heads"].shape == (3, 2, HEADS)
    np.testing.assert_allclose(forward.values[""]["residual"][:, -1], forward.aim, atol=1e-4)


# ----------------------------------------------------------------------------------------- statistics


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


def test_one_query_is_refused(word_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="at least two queries, and there is 1"):
        checked({}, word_tokenizer, units_of(llama()), CONTEXTS[:1], PROMPTS[:1], ANSWERS[:1])


def units(layers: int = 3, heads: int = 8) -> Units:
    groups = {
        "heads": tuple((Unit("heads", i, (h,)),) for i in range(layers) for h in range(heads)),
        "layers": tuple((Unit("output", i),) for i in range(layers)),
        "all": ((),),
    }
    return Units(list(range(layers)), heads, groups)


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


def summarise(runs: Sequence[Patched], of: Units | None = None) -> dict[str, Any]:
    """The section of runs of one target."""
    return interventions.summarise(of or units(), [{"targets": {"sft": run}} for run in runs])


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


def test_no_fraction_of_nothing() -> None:
    found = summarise([made(0.0, 0)])["targets"]["sft"]
    assert found["gap"]["low"] < 0 < found["gap"]["high"]
    for group in ("heads", "layers", "all"):
        assert all(np.isnan(np.array(found[group][key])).all() for key in ("recovered", "low", "high"))
        keys = ("change", "change_low", "change_high", "q")
        assert all(np.isfinite(np.array(found[group][key])).all() for key in keys)
    # certain, but too small to divide by; a change that is always the same has no variance to test with
    run = made(0.0, 0)
    run.aim = run.clean + 0.02
    run.values[""]["layers"] = run.clean[:, None] + np.array([0, 0.5, 5e-4])
    found = summarise([run])["targets"]["sft"]
    assert found["gap"]["low"] > 0 and np.isnan(found["layers"]["recovered"]).all()
    assert found["layers"]["q"][0] == 1 and found["layers"]["q"][2] == 1 and found["layers"]["q"][1] < 1e-9


# -------------------------------------------------------------------------------------------- figures


def test_figures(section: dict[str, Any], tmp_path: Path) -> None:
    kept = json.loads(json.dumps(section))
    figures = {figure.name: figure for figure in causal_figures(kept)}
    assert list(figures) == [
        "causal-heads",
        "causal-layers",
        "causal-heads-reverse",
        "causal-layers-reverse",
    ]
    for name, figure in figures.items():
        assert figure.save(tmp_path / f"{name}.svg").stat().st_size > 5000
        assert len(figure.panels) == 2 and len(figure.pictures()) == 2
    layer, head = PLANTED
    found = section["targets"]["base"]["heads"]
    first = [entry.text for entry in figures["causal-heads"].numbers.rows[0]]
    assert first[0] == "base" and first[2] == f"layer {layer}, head {head}"
    assert first[3].startswith(f"{found['recovered'][layer][head]:.3f} [{found['low'][layer][head]:.3f},")
    by_layer = [entry.text for entry in figures["causal-layers"].numbers.rows[layer]]
    assert by_layer[:2] == ["base", str(layer)]
    assert by_layer[2].startswith(f"{section['targets']['base']['layers']['recovered'][layer]:.3f}")
    assert figures["causal-layers"].numbers.rows[4][1].text == "all at once"


@pytest.mark.parametrize("case", ["no fraction", "null", "one layer", "no controls", "no heads", "nothing"])
def test_figures_of_odd_sections(case: str, tmp_path: Path) -> None:
    run = made(0.0 if case in ("no fraction", "null") else 2.0, 0)
    of = units()
    if case == "one layer":
        of = Units([0], 1, of.groups)
        for values in run.values.values():
            values["heads"], values["layers"] = values["heads"][:, :1, :1], values["layers"][:, :1]
    if case == "no controls":
        del run.values["other"]
    if case == "no heads":
        for values in run.values.values():
            del values["heads"]
    section = summarise([] if case == "nothing" else [run], of)
    figures = causal_figures(finite(section) if case == "null" else section)  # type: ignore[arg-type]
    names = {"no heads": ["causal-layers"], "nothing": []}
    assert [figure.name for figure in figures] == names.get(case, ["causal-heads", "causal-layers"])
    for figure in figures:
        assert figure.save(tmp_path / f"{figure.name}.svg").stat().st_size > 3000
        cells = [entry.text for row in figure.numbers.rows for entry in row]
        assert not any("nan" in cell for cell in cells)
        changes = figure.name == "causal-layers" and case in ("no fraction", "null")
        assert ("sft (change, nats)" in cells) == changes
