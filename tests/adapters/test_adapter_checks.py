"""Adapters that cannot work are refused, and told why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.families import HYBRIDS, build
from transformers import Gemma4TextConfig, PreTrainedModel

from ia2.adapters.checks import check_adapter
from ia2.config.sections import AdapterConfig
from ia2.utils.errors import ConfigError, ModelError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"type": "prefix", "rank": 4}, "adapter.rank is not a setting of prefix; it has virtual_tokens."),
        ({"type": "full", "dropout": 0.1}, "adapter.dropout is not a setting of full; it has none."),
        (
            {"virtual_tokens": 4},
            "adapter.virtual_tokens is not a setting of lora; it has rank, alpha, dropout,",
        ),
        ({"type": "bottleneck", "placement": "houlsby", "target_modules": ["mlp"]}, "placement does nothing"),
        ({"target_modules": ["q_prj"]}, "has no module named 'q_prj'. Did you mean 'q_proj'?"),
        ({"peft": {"peft_type": "IA3"}, "rank": 4}, "adapter.rank is given beside it"),
        ({"peft": {"peft_type": "IA3"}, "type": "ia3"}, "adapter.type is given beside it"),
    ],
)
def test_refused_settings(fields: dict[str, Any], message: str, tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(ConfigError) as caught:
        check_adapter(tiny_llama, AdapterConfig(**fields))
    text = str(caught.value)
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize("fields", [{"type": "prefix"}, {"peft": {"peft_type": "PREFIX_TUNING"}}])
def test_prefix_tuning_needs_its_cache(fields: dict[str, Any], tiny_llama: PreTrainedModel) -> None:
    fields.get("peft", {}).setdefault("num_virtual_tokens", 3)
    config = AdapterConfig(**fields)
    check_adapter(tiny_llama, config)
    with pytest.raises(ConfigError, match="prefix tuning does not work with activation_checkpointing"):
        check_adapter(tiny_llama, config, activation_checkpointing=True)
    for name in HYBRIDS:
        with pytest.raises(ModelError, match="has recurrent or convolutional ones"):
            check_adapter(HYBRIDS[name](), config)


def test_models_with_a_table_in_every_layer() -> None:
    model = build(
        Gemma4TextConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=128,
            num_kv_shared_layers=0,
            pad_token_id=0,
        )
    )
    for kind in ("prompt", "p-tuning"):
        with pytest.raises(ModelError, match="looks ids up in a table of every layer"):
            check_adapter(model, AdapterConfig(type=kind))
    # its two layers have heads of two widths
    with pytest.raises(ModelError, match="keys and values of one size in all layers"):
        check_adapter(model, AdapterConfig(type="prefix"))
    check_adapter(model, AdapterConfig(type="bottleneck"))


def test_models_that_read_no_embeddings(tiny_llama: PreTrainedModel, monkeypatch: Any) -> None:
    whole = tiny_llama.forward
    config = AdapterConfig(type="prompt")

    def refuses(inputs_embeds: Any = None, **given: Any) -> Any:
        if inputs_embeds is not None:
            raise ValueError("no embeddings here")
        return whole(**given)

    def differs(inputs_embeds: Any = None, **given: Any) -> Any:
        scaled = {} if inputs_embeds is None else {"inputs_embeds": inputs_embeds + 1}
        return whole(**given, **scaled)

    def forgets(position_ids: Any = None, **given: Any) -> Any:
        ids = given.get("input_ids")
        if position_ids is None and ids is not None:
            position_ids = torch.arange(ids.shape[1])[None]
        return whole(**given, position_ids=position_ids)

    for forward, message in (
        (refuses, r"takes no embeddings instead of ids \(no embeddings here\)"),
        (differs, "does not do with embeddings what it does with the ids"),
        (forgets, "counts positions anew at every step"),
    ):
        monkeypatch.setattr(tiny_llama, "forward", forward)
        with pytest.raises(ModelError, match=message):
            check_adapter(tiny_llama, config)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to …"),
    ],
)
def test_no_memory_is_not_a_model_without_embeddings(
    error: RuntimeError, tiny_llama: PreTrainedModel, monkeypatch: Any
) -> None:
    whole = tiny_llama.forward

    def full(inputs_embeds: Any = None, **given: Any) -> Any:
        if inputs_embeds is not None:
            raise error
        return whole(**given)

    monkeypatch.setattr(tiny_llama, "forward", full)
    with pytest.raises(RuntimeError) as caught:
        check_adapter(tiny_llama, AdapterConfig(type="prompt"))
    assert caught.value is error


def test_quantised_weights_are_refused_where_they_do_not_work(tiny_llama: PreTrainedModel) -> None:
    """The refusals alone; ``test_quantised`` has quantised models."""
    model: Any = tiny_llama
    model.is_quantized = model.is_loaded_in_8bit = True
    for kind, message in (
        ("full", "cannot train the weights of a quantised model"),
        ("ia3", "ia3 does not work with quantised weights"),
        ("dora", "dora loses the scales of 8-bit weights on a CPU"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_adapter(model, AdapterConfig(type=kind))
    check_adapter(model, AdapterConfig())
