"""Adapters: where they go, that they start alike, and that the base comes back as it was."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, gpt2
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from ia2.adapters import (
    adapter_state,
    attach,
    attention_projections,
    base_weights,
    detach,
    load_adapter_state,
    peft_config,
)
from ia2.config import AdapterConfig
from ia2.errors import ConfigError, ModelError

SEPARATE = {"q_proj", "k_proj", "o_proj"}
EXPECTED = {
    "llama": SEPARATE,
    "qwen3": SEPARATE,
    "gemma3": SEPARATE,
    "mistral": SEPARATE,
    "phi3": {"qkv_proj", "o_proj"},
    "gpt2": {"c_attn", "attn.c_proj"},  # the MLP has a c_proj too
    "gpt_neox": {"query_key_value", "dense"},
    "gptj": {"q_proj", "k_proj", "out_proj"},
    "opt": {"q_proj", "k_proj", "out_proj"},
    "falcon": {"query_key_value", "dense"},
    "bloom": {"query_key_value", "dense"},
    "mpt": {"Wqkv", "out_proj"},
}
family = pytest.mark.parametrize("name", list(FAMILIES))
INPUTS = torch.arange(4, 24).reshape(2, 10)

PEFT: dict[str, dict[str, Any]] = {
    "IA3": {"target_modules": ["q_proj", "k_proj"], "feedforward_modules": ["q_proj", "k_proj"]},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "P_TUNING": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "LORA": {"r": 2, "target_modules": ["q_proj"], "use_dora": True},
}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=INPUTS).logits


def lora(model: PreTrainedModel, seed: int = 0, **fields: Any) -> Any:
    return attach(model, peft_config(model, AdapterConfig(rank=2, alpha=2, **fields)), seed)


def disturb(model: nn.Module) -> None:
    """Make the adapter do something: LoRA and others start as the identity."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.5)


@family
def test_projections(name: str) -> None:
    assert set(attention_projections(FAMILIES[name]())) == EXPECTED[name]


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


@pytest.mark.parametrize("kind", list(PEFT))
def test_any_peft_configuration(kind: str, tiny_llama: PreTrainedModel) -> None:
    before = logits(tiny_llama)
    given = {"peft_type": kind, **PEFT[kind]}
    adapted = attach(tiny_llama, peft_config(tiny_llama, AdapterConfig(peft=given)), seed=0)
    assert not adapted.training
    disturb(adapted)
    changed = logits(adapted)
    assert changed.shape != before.shape or not torch.allclose(changed, before, atol=1e-3)
    with base_weights(adapted):
        assert torch.equal(logits(adapted), before)
    assert torch.equal(logits(adapted), changed)
    state = adapter_state(adapted)
    base = detach(adapted)
    assert not hasattr(base, "peft_config")
    assert torch.equal(logits(base), before)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = attach(base, peft_config(base, AdapterConfig(peft=given)), seed=1)
    load_adapter_state(again, state)
    assert torch.equal(logits(again), changed)


def test_unknown_type(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match=r"adapter type 'lore' is unknown\. Choose one of lora") as caught:
        peft_config(tiny_llama, AdapterConfig.model_construct(type="lore", peft=None))
    assert str(caught.value).endswith("Did you mean 'lora'?")


def test_peft_dictionaries_that_do_not_fit(tiny_llama: PreTrainedModel) -> None:
    def configure(**given: Any) -> Any:
        return peft_config(tiny_llama, AdapterConfig.model_construct(peft=given))

    with pytest.raises(ConfigError, match="needs the key peft_type"):
        configure(r=3)
    with pytest.raises(ConfigError, match="PEFT does not take this configuration"):
        configure(peft_type="LORA", ranks=3)
    with pytest.raises(ConfigError, match="PEFT does not take this configuration"):
        configure(peft_type="LORE")
    with pytest.raises(ConfigError, match="the adapter does not fit LlamaForCausalLM"):
        attach(tiny_llama, configure(peft_type="LORA", target_modules=["query"]), seed=0)


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


def test_own_target_modules(tiny_llama: PreTrainedModel) -> None:
    adapted = lora(tiny_llama, target_modules=["v_proj"])
    trainable = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert trainable
    assert all("v_proj" in n for n in trainable)


def test_cross_attention_gets_no_adapter() -> None:
    model = gpt2(add_cross_attention=True)
    adapted = lora(model)
    assert not [n for n, p in adapted.named_parameters() if p.requires_grad and "crossattention" in n]


def test_attention_without_linear_layers() -> None:
    class Attention(nn.Module):
        layer_idx = 0

    class Config:
        model_type = "none"

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention()
            self.config = Config()

        def forward(self) -> None:
            raise NotImplementedError

    with pytest.raises(ModelError, match=r"no linear layers .* give adapter\.target_modules"):
        attention_projections(Model())


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
