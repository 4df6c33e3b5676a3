"""Adapter types: every one in every family, and what its settings become."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from helpers.adapting import INPUTS, PEFT, PROMPTS, SEPARATE, disturb, family, kinds, logits
from helpers.families import ALL, FAMILIES
from transformers import GenerationConfig, PreTrainedModel

from ia2.adapters.checks import check_adapter
from ia2.adapters.types import ADAPTERS, default_learning_rate, narrowed, peft_config
from ia2.adapters.weights import (
    adapter_state,
    attach,
    base_weights,
    detach,
    load_adapter_state,
    virtual_tokens,
)
from ia2.config import AdaptConfig
from ia2.config.reading import validate
from ia2.config.sections import AdapterConfig
from ia2.utils.errors import ConfigError, ModelError

# What cannot work, and what is said of it; everything else must.
REFUSED = {
    ("bottleneck", "mixtral"): "mixtures of experts have none",
    ("bottleneck", "qwen3_moe"): "mixtures of experts have none",
    ("prefix", "qwen3_next"): "has recurrent or convolutional ones",
    ("prefix", "lfm2"): "has recurrent or convolutional ones",
}


@pytest.mark.parametrize("name", list(ALL))
@kinds
def test_every_type_in_every_family(kind: str, name: str) -> None:
    model = ALL[name]().requires_grad_(False)
    before = logits(model)
    config = AdapterConfig(type=kind)
    if (kind, name) in REFUSED:
        with pytest.raises(ModelError, match=REFUSED[kind, name]):
            check_adapter(model, config)
        assert torch.equal(logits(model), before)
        return
    check_adapter(model, config)
    adapted: Any = attach(model, peft_config(model, config), seed=0)
    tokens = virtual_tokens(adapted)
    assert tokens == (16 if kind in PROMPTS else 0)
    if kind not in PROMPTS:
        assert torch.equal(logits(adapted), before), "a fresh adapter changes nothing"

    adapted.train()
    mask = torch.ones_like(INPUTS)
    mask[1, -3:] = 0
    output = adapted(input_ids=INPUTS, attention_mask=mask, logits_to_keep=4, use_cache=False)
    assert output.logits.shape[1] == 4
    output.logits.square().sum().backward()
    trained = [(n, p) for n, p in adapted.named_parameters() if p.requires_grad]
    assert trained
    assert not [n for n, p in trained if p.grad is None]
    assert any(p.grad.abs().sum() > 0 for _, p in trained)

    adapted.eval()
    disturb(adapted, 0.05)
    changed = logits(adapted)
    assert not torch.allclose(changed[:, -10:], before, atol=1e-4)
    with base_weights(adapted):
        assert torch.equal(logits(adapted), before)
    assert torch.equal(logits(adapted), changed)
    base = detach(adapted)
    assert base is model
    assert not any(p.requires_grad for p in base.parameters())
    assert torch.equal(logits(base), before)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "falcon", "bloom", "mpt", "qwen3_next"])
@pytest.mark.parametrize("kind", [*PROMPTS, "bottleneck", "full"])
@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_generates_what_it_predicts(kind: str, name: str) -> None:
    """PEFT puts virtual tokens into a generation by itself: the cache, positions and mask must fit."""
    if (kind, name) in REFUSED:
        return
    model = ALL[name]()
    adapted: Any = attach(model, peft_config(model, AdapterConfig(type=kind)), seed=0)
    disturb(adapted, 0.2)
    ids = INPUTS
    with torch.no_grad():
        for _ in range(10):
            output = adapted(
                input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=1, use_cache=False
            )
            ids = torch.cat([ids, output.logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        model.generation_config = GenerationConfig()
        settings = GenerationConfig(max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=None)
        generated = adapted.generate(
            input_ids=INPUTS, attention_mask=torch.ones_like(INPUTS), generation_config=settings
        )
    assert torch.equal(generated, ids)


@family
def test_virtual_tokens_count_as_tokens(name: str) -> None:
    """Virtual tokens with the embeddings, or keys and values, of real ones do what those would do."""
    model = FAMILIES[name]()
    start = torch.arange(30, 35)[None]
    with torch.no_grad():
        expected = model(input_ids=torch.cat([start.expand(2, -1), INPUTS], dim=1)).logits[:, 5:]
        cache = model(input_ids=start, use_cache=True).past_key_values
        keys = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
    values = {
        "prompt": model.get_input_embeddings()(start[0]),
        # [layers, 2, heads, tokens, width] → [tokens, layers · 2 · heads · width]
        "prefix": torch.stack(keys).permute(3, 0, 1, 2, 4).flatten(1),
    }
    for kind, value in values.items():
        config = peft_config(model, AdapterConfig(type=kind, virtual_tokens=5))
        adapted: Any = attach(model, config, seed=0)
        adapted.prompt_encoder["default"].embedding.weight.data.copy_(value)
        assert torch.allclose(logits(adapted)[:, -10:], expected, atol=1e-4)
        detach(adapted)


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


def test_unknown_type() -> None:
    with pytest.raises(ConfigError, match=r"adapter\.type: 'lore' is not one of lora, rslora") as caught:
        validate(AdaptConfig, {"adapter": {"type": "lore"}})
    assert str(caught.value).endswith("Did you mean 'lora'?")


def test_peft_dictionaries_that_do_not_fit(tiny_llama: PreTrainedModel) -> None:
    def configure(**given: Any) -> Any:
        return peft_config(tiny_llama, AdapterConfig.model_construct(peft=given))

    with pytest.raises(ConfigError, match="needs the key peft_type"):
        configure(r=3)
    with pytest.raises(ConfigError, match="PEFT does not take this configuration"):
        configure(peft_type="LORA", ranks=3)
    with pytest.raises(ConfigError, match=r"PEFT has no peft_type 'LORE'\. Did you mean 'LORA'"):
        configure(peft_type="LORE")
    with pytest.raises(ConfigError, match="the adapter does not fit LlamaForCausalLM"):
        attach(tiny_llama, configure(peft_type="LORA", target_modules=["query"]), seed=0)


def test_settings_of_the_types() -> None:
    fields = set(AdapterConfig.model_fields) - {"type", "peft"}
    assert all(set(kind.settings) <= fields for kind in ADAPTERS.values())
    assert fields == {name for kind in ADAPTERS.values() for name in kind.settings}


def test_narrowed() -> None:
    config = AdapterConfig(type="lora", rank=4, alpha=2, target_modules=["q_proj"])
    assert narrowed(config, "dora") == AdapterConfig(type="dora", rank=4, alpha=2, target_modules=["q_proj"])
    assert narrowed(config, "ia3") == AdapterConfig(type="ia3", target_modules=["q_proj"])
    assert narrowed(config, "prefix") == AdapterConfig(type="prefix")
    assert narrowed(AdapterConfig(peft={"peft_type": "LORA"}), "full") == AdapterConfig(type="full")


def test_default_learning_rates() -> None:
    for name, kind in ADAPTERS.items():
        assert default_learning_rate(AdapterConfig(type=name)) == kind.learning_rate

    def given(peft_type: str) -> float:
        return default_learning_rate(AdapterConfig(peft={"peft_type": peft_type}))

    assert given("IA3") == ADAPTERS["ia3"].learning_rate
    assert given("P_TUNING") == ADAPTERS["p-tuning"].learning_rate
    assert given("LOHA") == 1e-3


def test_settings_reach_peft(tiny_llama: PreTrainedModel) -> None:
    def made(**fields: Any) -> Any:
        return peft_config(tiny_llama, AdapterConfig(**fields))

    assert (made().r, made().lora_alpha, made().lora_dropout) == (8, 8, 0.0)
    assert made(type="rslora", rank=2).use_rslora
    assert made(type="dora", dropout=0.1).use_dora
    assert made(type="dora", dropout=0.1).lora_dropout == 0.1
    assert made(type="vera").r == 256
    ia3 = made(type="ia3")
    assert ia3.target_modules == ia3.feedforward_modules == SEPARATE
    assert made(type="prefix", virtual_tokens=3).num_virtual_tokens == 3
    # two key-value heads of width 8, not the four heads of the queries
    prefix = made(type="prefix")
    assert (prefix.num_layers, prefix.num_attention_heads, prefix.token_dim) == (2, 2, 16)
    assert made(type="p-tuning").encoder_hidden_size == 32
    assert made(type="bottleneck", bottleneck_size=3).bottleneck_size == 3


def test_prompts_start_as_real_tokens(tiny_llama: PreTrainedModel) -> None:
    adapted: Any = attach(tiny_llama, peft_config(tiny_llama, AdapterConfig(type="prompt")), seed=0)
    weight = adapted.prompt_encoder["default"].embedding.weight
    table = tiny_llama.get_input_embeddings().weight
    assert all((row == table).all(1).any() for row in weight)
