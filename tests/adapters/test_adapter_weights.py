"""Adapters on a model: they start alike, come off without a trace, and go through files unchanged."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapting import EXPECTED, INPUTS, PEFT, PROMPTS, disturb, family, kinds, logits, lora
from helpers.families import FAMILIES
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ia2.adapters.types import peft_config
from ia2.adapters.weights import (
    adapter_state,
    attach,
    base_weights,
    detach,
    load_adapter_state,
    read_adapter_state,
    save_adapter,
)
from ia2.config.sections import AdapterConfig
from ia2.utils.errors import ConfigError, DataError


@family
def test_attach_and_detach(name: str) -> None:
    model = FAMILIES[name]().requires_grad_(False)
    before = logits(model)
    names = [n for n, _ in model.named_parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted = lora(model)
        trainable = [n for n, p in adapted.named_parameters() if p.requires_grad]
        assert len(trainable) == 2 * 2 * len(EXPECTED[name])  # layers × (A, B) × modules
        assert all("lora_" in n for n in trainable)
        assert torch.equal(logits(adapted), before)  # B starts at zero
        disturb(adapted)
        assert not torch.allclose(logits(adapted), before, atol=1e-3)
        base = detach(adapted)
        assert base is model
        assert [n for n, _ in base.named_parameters()] == names
        assert not hasattr(base, "peft_config")
        assert not any(p.requires_grad for p in base.parameters())
        assert torch.equal(logits(base), before)
        again = lora(base)  # without a word about a second adapter
        assert torch.equal(logits(again), before)


def test_failed_attach_leaves_the_base_usable(tiny_llama: PreTrainedModel) -> None:
    before = logits(tiny_llama)
    wrong = peft_config(
        tiny_llama, AdapterConfig.model_construct(peft={"peft_type": "LORA", "target_modules": ["query"]})
    )
    with pytest.raises(ConfigError):
        attach(tiny_llama, wrong, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted = lora(tiny_llama)
    assert torch.equal(logits(adapted), before)


def test_same_seed_same_weights() -> None:
    states = []
    for seed, disturbance in ((5, 1), (5, 2), (6, 2)):
        torch.manual_seed(disturbance)
        before = torch.random.get_rng_state()
        states.append(adapter_state(lora(FAMILIES["llama"](), seed)))
        assert torch.equal(torch.random.get_rng_state(), before), "the caller's random state moved"
    first, same, other = states
    assert first.keys() == same.keys() == other.keys()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_base_weights_restores_what_is_trained(tiny_llama: PreTrainedModel) -> None:
    adapted = lora(tiny_llama.requires_grad_(False))
    frozen = [p for n, p in adapted.named_parameters() if "layers.1" in n and "lora_A" in n]
    for parameter in frozen:
        parameter.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in adapted.named_parameters()}
    disturb(adapted)
    changed = logits(adapted)
    with base_weights(adapted):
        assert not torch.equal(logits(adapted), changed)
    assert {n: p.requires_grad for n, p in adapted.named_parameters()} == flags
    with pytest.raises(RuntimeError, match="inside"), base_weights(adapted):
        raise RuntimeError("inside")
    assert {n: p.requires_grad for n, p in adapted.named_parameters()} == flags
    assert torch.equal(logits(adapted), changed), "the adapter is on again after an error"


def test_base_weights_of_a_bare_model(tiny_llama: PreTrainedModel) -> None:
    before = logits(tiny_llama)
    with base_weights(tiny_llama):
        assert torch.equal(logits(tiny_llama), before)


@family
def test_state_round_trip(name: str) -> None:
    adapted = lora(FAMILIES[name]())
    disturb(adapted)
    expected, state = logits(adapted), adapter_state(adapted)
    disturb(adapted)
    assert not torch.equal(logits(adapted), expected)
    load_adapter_state(adapted, state)
    assert torch.equal(logits(adapted), expected)
    # the state is a copy
    disturb(adapted)
    fresh = lora(FAMILIES[name](), seed=9)
    load_adapter_state(fresh, state)
    assert torch.equal(logits(fresh), expected)


@pytest.mark.parametrize("kind", list(PEFT))
def test_file_that_peft_has_written(kind: str, tmp_path: Path) -> None:
    given = {"peft_type": kind, **PEFT[kind]}

    def adapted(seed: int) -> Any:
        model = FAMILIES["llama"]()
        return attach(model, peft_config(model, AdapterConfig(peft=given)), seed)

    first, second = adapted(0), adapted(1)
    before = adapter_state(second)
    expected = logits(second)
    disturb(first)
    first.save_pretrained(tmp_path)
    load_adapter_state(second, load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(logits(second), logits(first))
    load_adapter_state(second, before)
    assert torch.equal(logits(second), expected)


def test_state_of_other_shapes(tiny_llama: PreTrainedModel) -> None:
    state = adapter_state(lora(FAMILIES["llama"]()))
    config = peft_config(tiny_llama, AdapterConfig(rank=4, alpha=4))
    with pytest.raises(ConfigError, match="do not fit the model"):
        load_adapter_state(attach(tiny_llama, config, 0), state)


def test_state_of_another_adapter(tiny_llama: PreTrainedModel) -> None:
    state = adapter_state(lora(FAMILIES["llama"](), target_modules=["v_proj"]))
    adapted = lora(tiny_llama)
    with pytest.raises(ConfigError, match="do not fit the model"):
        load_adapter_state(adapted, state)


def test_part_of_a_state(tiny_llama: PreTrainedModel) -> None:
    adapted = lora(tiny_llama)
    state = adapter_state(adapted)
    missing = next(iter(state))
    del state[missing]
    with pytest.raises(ConfigError, match="do not fit the model"):
        load_adapter_state(adapted, state)


# ---------------------------------------------------------------------------------------- files


@kinds
def test_files_round_trip(kind: str, tmp_path: Path) -> None:
    def adapted(seed: int) -> Any:
        model = FAMILIES["llama"]()
        return attach(model, peft_config(model, AdapterConfig(type=kind)), seed)

    first, second = adapted(0), adapted(1)
    disturb(first, 0.1)
    (tmp_path / "README.md").write_text("mine")
    save_adapter(first, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    written = (
        {"model.safetensors"} if kind == "full" else {"adapter_config.json", "adapter_model.safetensors"}
    )
    assert written <= names
    assert ("encoder.safetensors" in names) == (kind == "p-tuning")
    assert (tmp_path / "README.md").read_text() == "mine", "PEFT's card is not wanted"

    state = read_adapter_state(tmp_path)
    load_adapter_state(second, state)
    assert torch.equal(logits(second), logits(first))
    ours = adapter_state(first)
    if kind not in ("prefix", "prompt"):  # PEFT's name for the one tensor that there is differs
        assert state.keys() == ours.keys()
        assert all(torch.equal(state[name], ours[name]) for name in ours)
    if kind != "full":
        plain = PeftModel.from_pretrained(FAMILIES["llama"](), tmp_path)
        assert torch.equal(logits(plain), logits(first))


@pytest.mark.parametrize("kind", ["lora", *PROMPTS, "full"])
def test_training_goes_on_exactly(kind: str, tmp_path: Path) -> None:
    def adapted() -> Any:
        model = FAMILIES["llama"]()
        return attach(model, peft_config(model, AdapterConfig(type=kind)), seed=0)

    def train(model: Any) -> None:
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(2):
            model(input_ids=INPUTS, use_cache=False).logits.square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()

    whole = adapted()
    train(whole)
    save_adapter(whole, tmp_path)
    train(whole)
    resumed = adapted()
    load_adapter_state(resumed, read_adapter_state(tmp_path))
    train(resumed)
    expected, state = adapter_state(whole), adapter_state(resumed)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_no_readme_is_left(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    save_adapter(lora(tiny_llama), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no adapter in it \(adapter_model\.safetensors or"):
        read_adapter_state(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not weights")
    with pytest.raises(DataError, match=r"adapter_model\.safetensors: cannot be read"):
        read_adapter_state(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}')
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    with pytest.raises(DataError, match=r"two\.safetensors: no such file"):
        read_adapter_state(tmp_path)
    save_file({"b": torch.ones(3)}, tmp_path / "two.safetensors")
    assert read_adapter_state(tmp_path).keys() == {"a", "b"}
    for broken in ("{", "{}", "[]"):
        index.write_text(broken)
        with pytest.raises(DataError, match=r"index\.json: not an index of weights"):
            read_adapter_state(tmp_path)
