"""Bottleneck adapters: where they go, what they compute, and that PEFT takes them for its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft.mapping
import pytest
import torch
from helpers.families import ALL
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from ia2.adapters import bottleneck
from ia2.adapters.bottleneck import BottleneckConfig, BottleneckLayer
from ia2.adapters.checks import check_adapter
from ia2.adapters.modules import output_projections
from ia2.adapters.types import peft_config
from ia2.adapters.weights import adapter_state, attach, base_weights, detach, load_adapter_state
from ia2.config.sections import AdapterConfig
from ia2.utils.errors import ConfigError, ModelError

# Output projections of attention and MLP, as PEFT's target_modules.
MODERN = ("o_proj", "down_proj")
EXPECTED = {
    "llama": MODERN,
    "qwen3": MODERN,
    "gemma3": MODERN,
    "mistral": MODERN,
    "phi3": MODERN,
    "gpt2": ("c_proj", "c_proj"),  # both are called so, and nothing else is
    "gpt_neox": ("dense", "dense_4h_to_h"),
    "gptj": ("out_proj", "fc_out"),
    "opt": ("out_proj", "fc2"),
    "falcon": ("dense", "dense_4h_to_h"),
    "bloom": ("dense", "dense_4h_to_h"),
    "mpt": ("out_proj", "down_proj"),
    "qwen2": MODERN,
    "gemma2": MODERN,
    "olmo2": MODERN,
    "granite": MODERN,
    "cohere": MODERN,
    "stablelm": MODERN,
    "smollm3": MODERN,
    "qwen3_next": MODERN,
    "lfm2": ("self_attn.out_proj", "w2"),  # a convolution has an out_proj too
}
INPUTS = torch.arange(4, 24).reshape(2, 10)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=INPUTS).logits


def adapted(model: Any, **fields: Any) -> Any:
    return get_peft_model(
        model, BottleneckConfig(**{"target_modules": ["o_proj"], "task_type": "CAUSAL_LM", **fields})
    ).eval()


def disturb(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)


@pytest.mark.parametrize("name", list(EXPECTED))
def test_targets(name: str) -> None:
    model = ALL[name]()
    attention, mlp = EXPECTED[name]
    assert set(output_projections(model, "houlsby")) == {attention, mlp}
    assert output_projections(model, "pfeiffer") == ["mlp.c_proj" if name == "gpt2" else mlp]


def test_placements(tiny_llama: PreTrainedModel) -> None:
    for placement, leaves in (("houlsby", {"o_proj", "down_proj"}), ("pfeiffer", {"down_proj"})):
        config = AdapterConfig(type="bottleneck", placement=placement, bottleneck_size=3)
        model: Any = attach(tiny_llama, peft_config(tiny_llama, config), seed=0)
        found = {n: m for n, m in model.named_modules() if isinstance(m, BottleneckLayer)}
        assert {name.rsplit(".", 1)[-1] for name in found} == leaves
        assert len(found) == 2 * len(leaves)  # layers × places
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert len(trained) == 4 * len(found)  # weight and bias, down and up
        assert all("bottleneck_" in name for name in trained)
        detach(model)


@pytest.mark.parametrize("name", ["gelu", "relu"])
def test_what_is_computed(name: str) -> None:
    base = nn.Linear(5, 4)
    layer = BottleneckLayer(base, "default", BottleneckConfig(bottleneck_size=3, non_linearity=name), width=4)
    x = torch.randn(2, 7, 5)
    assert torch.equal(layer(x), base(x)), "up is zero at first"
    disturb(layer.bottleneck_up)
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    y = base(x)
    assert torch.allclose(layer(x), y + up(getattr(nn.functional, name)(down(y))))
    layer.enable_adapters(False)
    assert torch.equal(layer(x), y)


def test_life_in_peft(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    before = logits(tiny_llama)
    model = adapted(tiny_llama, bottleneck_size=3, non_linearity="relu")
    assert torch.equal(logits(model), before)
    disturb(model)
    changed = logits(model)
    assert not torch.allclose(changed, before, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    with base_weights(model):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), changed)

    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "BOTTLENECK"
    assert (written["bottleneck_size"], written["non_linearity"]) == (3, "relu")
    loaded = PeftModel.from_pretrained(ALL["llama"](), tmp_path)
    assert torch.equal(logits(loaded), changed)
    assert not any(p.requires_grad for p in loaded.parameters())
    trainable = PeftModel.from_pretrained(ALL["llama"](), tmp_path, is_trainable=True)
    assert any(p.requires_grad for p in trainable.parameters())

    state = adapter_state(model)
    disturb(model)
    load_adapter_state(model, state)
    assert torch.equal(logits(model), changed)
    base = model.unload()
    assert base is tiny_llama
    assert not [m for m in base.modules() if isinstance(m, BottleneckLayer)]
    assert torch.equal(logits(base), before)


def test_several_adapters(tiny_llama: PreTrainedModel) -> None:
    model = adapted(tiny_llama)
    disturb(model)
    first = logits(model)
    model.add_adapter("other", BottleneckConfig(target_modules=["o_proj"], bottleneck_size=2))
    model.set_adapter("other")
    assert not torch.equal(logits(model), first)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("other")
    assert torch.equal(logits(model), first)


def test_no_merging(tiny_llama: PreTrainedModel) -> None:
    model = adapted(tiny_llama)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ModelError, match="cannot be merged"):
            merge()
    assert [m for m in model.modules() if isinstance(m, BottleneckLayer)], "nothing has come off"


def test_through_a_peft_dictionary(tiny_llama: PreTrainedModel) -> None:
    given = {"peft_type": "BOTTLENECK", "target_modules": ["v_proj"], "bottleneck_size": 2}
    config = peft_config(tiny_llama, AdapterConfig(peft=given))
    assert isinstance(config, BottleneckConfig)
    model: Any = attach(tiny_llama, config, seed=0)
    layers = [m for m in model.modules() if isinstance(m, BottleneckLayer)]
    assert {layer.width for layer in layers} == {16}  # two key-value heads of width 8


def test_bfloat16() -> None:
    model = ALL["llama"]().to(torch.bfloat16)
    before = logits(model)
    wrapped = adapted(model)
    assert {p.dtype for p in wrapped.parameters() if p.requires_grad} == {torch.float32}, "as PEFT's own"
    disturb(wrapped)
    changed = logits(wrapped)
    assert changed.dtype == torch.bfloat16
    assert not torch.equal(changed, before)
    with base_weights(wrapped):
        assert torch.equal(logits(wrapped), before)


def test_whole_modules() -> None:
    """Behind the experts of a mixture, which is what its users are told to do."""
    model = ALL["mixtral"]()
    before = logits(model)
    config = AdapterConfig(type="bottleneck", target_modules=["mlp"])
    check_adapter(model, config)
    wrapped: Any = attach(model, peft_config(model, config), seed=0)
    assert torch.equal(logits(wrapped), before)
    wrapped(input_ids=INPUTS).logits.sum().backward()
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    assert len(trained) == 2 * 4
    assert all(p.grad is not None for p in trained)


def test_modules_that_return_no_tensor(tiny_llama: PreTrainedModel) -> None:
    model = adapted(tiny_llama, target_modules=["self_attn"])
    with pytest.raises(ModelError, match="width 32, but LlamaAttention returns tuple"):
        logits(model)


def test_settings_that_are_refused() -> None:
    with pytest.raises(ValueError, match="non_linearity 'tanh' is not one of gelu, relu"):
        BottleneckConfig(non_linearity="tanh")
    with pytest.raises(ValueError, match="bottleneck_size must be at least 1"):
        BottleneckConfig(bottleneck_size=0)


@pytest.mark.parametrize("place", ["mapping.PEFT_TYPE_TO_TUNER_MAPPING", "tuner._get_adapter_state_dict"])
def test_a_peft_that_works_otherwise(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name = place.split(".")
    monkeypatch.delattr({"mapping": peft.mapping, "tuner": bottleneck.BaseTuner}[owner], name)
    with pytest.raises(ConfigError, match=r"do not work with PEFT .* choose another adapter, such as lora"):
        bottleneck._register()
