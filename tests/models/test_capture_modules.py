"""Which modules are captured, and which are refused."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers.capturing import captured, ids, lora
from helpers.families import HYBRIDS, LAYERS, attention_layers, build, gpt2
from transformers import MambaConfig, PreTrainedModel, Zamba2Config

from ia2.models.capture import ActivationCapture, find_attention_modules
from ia2.utils.errors import ModelError


def test_glob(tiny_llama: PreTrainedModel) -> None:
    named = find_attention_modules(tiny_llama, "model.layers.*.self_attn.o_proj")
    assert {i: n for i, (n, _) in named.items()} == {
        i: f"model.layers.{i}.self_attn.o_proj" for i in range(LAYERS)
    }
    with torch.no_grad():
        by_glob = captured(tiny_llama, ids(), pattern="model.layers.*.self_attn.o_proj")
        default = captured(tiny_llama, ids())
    assert all(torch.equal(by_glob[i], default[i]) for i in range(LAYERS))
    only_last = find_attention_modules(tiny_llama, f"model.layers.{LAYERS - 1}.self_attn")
    assert list(only_last) == [LAYERS - 1]


def test_glob_through_peft(tiny_llama: PreTrainedModel) -> None:
    named = find_attention_modules(lora(tiny_llama), "model.layers.*.self_attn")
    assert list(named) == list(range(LAYERS))


def test_glob_that_matches_nothing(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(ModelError) as caught:
        find_attention_modules(tiny_llama, "model.layers.*.atention")
    message = str(caught.value)
    assert "'model.layers.*.atention'" in message
    assert "LlamaAttention (model.layers.0.self_attn)" in message


def test_model_without_attention() -> None:
    model = build(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(ModelError) as caught:
        find_attention_modules(model)
    assert "attention_modules" in str(caught.value)
    assert "MambaMixer" in str(caught.value)


def test_cross_attention_is_left_out() -> None:
    model = gpt2(add_cross_attention=True)
    assert [n for n, _ in find_attention_modules(model).values()] == [
        f"transformer.h.{i}.attn" for i in range(LAYERS)
    ]


def test_several_modules_of_one_layer_are_refused(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(ModelError, match="claim layer 0"):
        tiny_llama.model.layers[1].self_attn.layer_idx = 0
        find_attention_modules(tiny_llama)


@pytest.mark.parametrize("name", list(HYBRIDS))
def test_hybrid_matches_its_full_attention_layers_and_says_so(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = HYBRIDS[name]()
    listed = attention_layers(name)
    line = (
        f"Hybrid model: 2 of 4 layers have full attention ({listed[0]}, {listed[1]}); only these are aligned "
        "and compared."
    )
    with torch.no_grad(), caplog.at_level(logging.INFO), ActivationCapture(model) as capture:
        assert capture.layers == listed
        assert capture.total_layers == 4
        assert capture.describe() == line
        model(input_ids=ids(), use_cache=False)
        assert [t.shape for t in capture.take().values()] == [(2, 20, 32)] * 2
        # once for a model, also through an adapter and for a choice of its layers
        chosen = ActivationCapture(lora(model), layers=listed[:1])
        assert chosen.describe() == line
    assert caplog.messages.count(line) == 1


def test_nothing_is_said_where_every_layer_has_attention(
    tiny_llama: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert ActivationCapture(tiny_llama).describe() is None
        assert ActivationCapture(tiny_llama, layers=[1]).describe() is None
    assert caplog.messages == []


def test_layers_that_share_one_attention_are_refused() -> None:
    """Zamba2's attention layers all run the same module: no layer has one of its own."""
    model = build(
        Zamba2Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            mamba_headdim=16,
            mamba_d_state=4,
            n_mamba_heads=4,
            layers_block_type=["mamba", "hybrid"] * 2,
        )
    )
    with pytest.raises(ModelError, match="attention_modules"):
        find_attention_modules(model)


def test_choice_of_layers(tiny_llama: PreTrainedModel) -> None:
    with torch.no_grad():
        everything = captured(tiny_llama, ids())
        chosen = captured(tiny_llama, ids(), layers=[1])
    assert list(chosen) == [1]
    assert torch.equal(chosen[1], everything[1])
    with pytest.raises(ModelError, match=r"layers \[7\] have no self-attention; there are \[0, 1\]"):
        ActivationCapture(tiny_llama, layers=[1, 7])
