"""Quantised base models, wherever bitsandbytes can quantise on the CPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import gpt2, llama
from helpers.words import make_word_tokenizer
from torch import nn

from ia2.adapters.checks import check_adapter
from ia2.adapters.full_finetuning import FullModel
from ia2.adapters.types import ADAPTERS, peft_config
from ia2.adapters.weights import adapter_state, attach, base_weights, detach, load_adapter_state
from ia2.config.sections import AdapterConfig
from ia2.models.load import BaseModel, load_base
from ia2.utils.errors import ConfigError, ModelError

bitsandbytes = pytest.importorskip("bitsandbytes")
if "cpu" not in getattr(bitsandbytes, "supported_torch_devices", ()):
    pytest.skip(f"bitsandbytes {bitsandbytes.__version__} needs a GPU", allow_module_level=True)

INPUTS = torch.arange(4, 24).reshape(2, 10)
both = pytest.mark.parametrize("quantization", ["4bit", "8bit"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    # rows as long as bitsandbytes' blocks: shorter ones come out wrong on CPUs with AVX512
    llama(hidden_size=64).save_pretrained(folder)
    make_word_tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path, quantization: str | None, **options: Any) -> BaseModel:
    return load_base(str(folder), device="cpu", quantization=quantization, **options)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=INPUTS).logits


@both
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading(quantization: str, dtype: str, saved: Path) -> None:
    base = load(saved, quantization, dtype=dtype)
    kinds = {type(module).__name__ for module in base.model.modules()}
    assert {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[quantization] in kinds
    weight = base.model.model.layers[0].self_attn.q_proj.weight
    assert weight.dtype == {"4bit": torch.uint8, "8bit": torch.int8}[quantization]
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.identity["quantization"] == quantization
    plain = load(saved, None, dtype=dtype)
    assert "quantization" not in plain.identity, "stored results of plain models stay valid"
    assert base.identity == {**plain.identity, "quantization": quantization}  # of the same files
    assert base.identity == load(saved, quantization, dtype=dtype).identity
    exact, rough = logits(plain.model).float(), logits(base.model).float()
    assert nn.functional.cosine_similarity(exact.flatten(), rough.flatten(), dim=0) > 0.9
    if quantization == "4bit":
        layer = base.model.model.layers[0].self_attn.q_proj
        assert layer.compute_dtype == getattr(torch, dtype)
        assert layer.weight.quant_type == "nf4"


@both
@pytest.mark.parametrize("kind", list(ADAPTERS))
def test_training(kind: str, quantization: str, saved: Path) -> None:
    base = load(saved, quantization)
    before = logits(base.model)
    config = AdapterConfig(type=kind)
    refused = {
        "full": "cannot train the weights of a quantised model",
        "ia3": "ia3 does not work with quantised weights",
        "dora": "dora loses the scales of 8-bit weights on a CPU" if quantization == "8bit" else None,
    }
    if message := refused.get(kind):
        with pytest.raises(ConfigError, match=message):
            check_adapter(base.model, config)
        return
    check_adapter(base.model, config)
    model: Any = attach(base.model, peft_config(base.model, config), seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(2):  # B of LoRA is zero at first, so A has a gradient from the second step on
        optimiser.zero_grad()
        output = model(
            input_ids=INPUTS, attention_mask=torch.ones_like(INPUTS), logits_to_keep=3, use_cache=False
        )
        output.logits.square().mean().backward()
        optimiser.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    changed = logits(model)
    assert not torch.allclose(changed[:, -10:], before, atol=1e-4)
    with base_weights(model):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), changed)
    state = adapter_state(model)
    assert torch.equal(logits(detach(model)), before)
    again: Any = attach(base.model, peft_config(base.model, config), seed=1)
    load_adapter_state(again, state)
    assert torch.equal(logits(again), changed)


@both
def test_full_fine_tuning_itself_refuses(quantization: str, saved: Path) -> None:
    with pytest.raises(ConfigError, match="choose another adapter, such as lora"):
        FullModel(load(saved, quantization).model)


def test_transposed_layers(tmp_path: Path) -> None:
    gpt2(n_embd=64).save_pretrained(tmp_path)
    make_word_tokenizer().save_pretrained(tmp_path)
    base = load(tmp_path, "4bit")
    before = logits(base.model)
    model: Any = attach(base.model, peft_config(base.model, AdapterConfig()), seed=0)
    assert torch.equal(logits(model), before)
    model(input_ids=INPUTS).logits.sum().backward()
    assert any(p.grad is not None for p in model.parameters())


def test_what_is_refused(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"quantization '2bit' is unknown\. Choose one of 4bit, 8bit\."):
        load(saved, "2bit")
    base = load(saved, "4bit")
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is quantised already"):
        load(tmp_path, "8bit")
    monkeypatch.setattr(bitsandbytes, "supported_torch_devices", {"cuda"})
    with pytest.raises(ModelError, match=r"cannot quantise on the device cpu \(but on cuda\)"):
        load(saved, "4bit")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=re.escape("Run: pip install bitsandbytes")):
        load(saved, "4bit")


def test_rows_that_bitsandbytes_gets_wrong_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama().save_pretrained(tmp_path)  # rows of 32, half a block
    make_word_tokenizer().save_pretrained(tmp_path)
    right = bitsandbytes.functional.dequantize_4bit
    # what it does on CPUs with AVX512, wherever this runs
    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", lambda *given: -right(*given))
    with pytest.raises(ModelError, match="whose rows have 32 weights, wrongly in 4 bit on this cpu"):
        load(tmp_path, "4bit")
