"""Full fine-tuning: everything is trained, and the base is there all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import FAMILIES, llama
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from ia2.adapters.full_finetuning import FullModel
from ia2.adapters.types import peft_config
from ia2.adapters.weights import (
    adapter_state,
    attach,
    base_weights,
    detach,
    load_adapter_state,
    read_adapter_state,
    save_adapter,
    virtual_tokens,
)
from ia2.config.sections import AdapterConfig
from ia2.models.capture import ActivationCapture, unwrap
from ia2.utils.errors import ConfigError, ModelError

INPUTS = torch.arange(4, 24).reshape(2, 10)


def full(model: Any) -> Any:
    return attach(model, peft_config(model, AdapterConfig(type="full")), seed=0)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=INPUTS).logits


def train(model: Any, steps: int = 3, rate: float = 1e-3) -> Any:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        model(input_ids=INPUTS, labels=INPUTS, use_cache=False).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return optimiser


def test_interface(tiny_llama: PreTrainedModel) -> None:
    model = full(tiny_llama)
    assert isinstance(model, FullModel)
    assert not model.training
    assert unwrap(model) is model.get_base_model() is tiny_llama
    assert model.config is tiny_llama.config
    assert (model.device, model.dtype) == (tiny_llama.device, torch.float32)
    assert model.get_input_embeddings() is tiny_llama.get_input_embeddings()
    assert model.get_output_embeddings() is tiny_llama.get_output_embeddings()
    assert not model.active_peft_config.is_prompt_learning
    assert virtual_tokens(model) == 0
    with pytest.raises(AttributeError, match="no_such_thing"):
        model.no_such_thing  # noqa: B018


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mixtral"])
def test_everything_is_trained_and_the_base_stays(name: str) -> None:
    base = FAMILIES[name]().requires_grad_(False)
    before, originals = logits(base), dict(base.named_parameters())
    copies = {n: p.clone() for n, p in originals.items()}
    model = full(base)
    assert torch.equal(logits(model), before)
    train(model)
    assert all(p.requires_grad for p in model.parameters())
    assert len(list(model.parameters())) == len(originals)
    changed = logits(model)
    assert not torch.allclose(changed, before, atol=1e-3)
    with base_weights(model):
        assert torch.equal(logits(model), before)
        assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(logits(model), changed)
    assert all(p.requires_grad for p in model.parameters())
    assert detach(model) is base
    assert {n: id(p) for n, p in base.named_parameters()} == {n: id(p) for n, p in originals.items()}
    assert all(torch.equal(p, copies[n]) for n, p in originals.items())
    assert torch.equal(logits(base), before)


def test_nested_and_after_an_error(tiny_llama: PreTrainedModel) -> None:
    before = logits(tiny_llama)
    model = full(tiny_llama)
    train(model)
    changed = logits(model)
    with base_weights(model):
        with base_weights(model):
            assert torch.equal(logits(model), before)
        assert torch.equal(logits(model), before), "leaving the inner one does not end the outer one"
        with pytest.raises(RuntimeError, match="inside"), base_weights(model):
            raise RuntimeError("inside")
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), changed)


def test_training_goes_on_after_the_teacher(tiny_llama: PreTrainedModel) -> None:
    """The optimiser's parameters, and a graph that waits for its backward pass, survive the exchange."""
    plain, interrupted = full(llama()), full(tiny_llama)
    for model in (plain, interrupted):
        optimiser = train(model, steps=1)
        loss = model(input_ids=INPUTS, labels=INPUTS).loss
        if model is interrupted:
            with base_weights(model):
                logits(model)
        loss.backward()
        optimiser.step()
    expected, state = adapter_state(plain), adapter_state(interrupted)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_captured_activations(tiny_llama: PreTrainedModel) -> None:
    def read(model: Any) -> torch.Tensor:
        with ActivationCapture(model) as capture, torch.no_grad():
            model(input_ids=INPUTS)
            return torch.stack(list(capture.take().values()))

    before = read(tiny_llama)
    model = full(tiny_llama)
    train(model)
    assert not torch.equal(read(model), before)
    with base_weights(model):
        assert torch.equal(read(model), before)


def test_generation(tiny_llama: PreTrainedModel) -> None:
    options = {"input_ids": INPUTS, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    before = tiny_llama.generate(**options)
    model = full(tiny_llama)
    assert torch.equal(model.generate(**options), before)
    train(model, rate=0.02)
    assert not torch.equal(model.generate(**options), before)
    with base_weights(model):
        assert torch.equal(model.generate(**options), before)


def test_tied_weights() -> None:
    base = llama(tie_word_embeddings=True)
    model = full(base)
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert head is table
    train(model)
    state = adapter_state(model)
    assert "lm_head.weight" not in state
    assert "model.embed_tokens.weight" in state
    other = full(llama(tie_word_embeddings=True))
    load_adapter_state(other, state)
    assert torch.equal(logits(other), logits(model))
    with base_weights(model):
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight is not table
    detach(model)
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_moe", "gpt2", "phi3"])
def test_files(name: str, tmp_path: Path) -> None:
    """What is saved is an ordinary model, also where its files name weights otherwise (experts)."""
    model = full(FAMILIES[name]())
    train(model)
    save_adapter(model, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(plain), logits(model))
    other = full(FAMILIES[name]())
    load_adapter_state(other, read_adapter_state(tmp_path))
    assert torch.equal(logits(other), logits(model))


def test_shards(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    model = full(tiny_llama)
    train(model)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    state, expected = read_adapter_state(tmp_path), adapter_state(model)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_weights_of_another_model(tiny_llama: PreTrainedModel) -> None:
    model = full(tiny_llama)
    before = logits(model)
    state = adapter_state(model)
    part = {name: tensor for name, tensor in state.items() if "layers.1" not in name}
    wider = adapter_state(full(llama(intermediate_size=96)))
    for wrong in (part, wider, {**state, "stranger": torch.ones(1)}, {}):
        with pytest.raises(ConfigError, match="do not fit the model"):
            load_adapter_state(model, wrong)
        assert torch.equal(logits(model), before)


def test_bfloat16_is_trained_as_float32(tmp_path: Path) -> None:
    """At this rate bfloat16 weights would hardly move: a step is smaller than half their spacing."""
    base = llama().to(torch.bfloat16)
    before, originals = logits(base), {n: p.clone() for n, p in base.named_parameters()}
    model = full(base)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    train(model, steps=1, rate=1e-5)
    moved = [(p != originals[n].float()).float().mean() for n, p in base.named_parameters() if "layers" in n]
    assert min(moved) > 0.9
    output = logits(model)
    assert output.dtype == torch.bfloat16, "computed as the base is"
    assert torch.allclose(output, before, atol=0.2)
    with base_weights(model):
        assert torch.equal(logits(model), before)
    save_adapter(model, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}
    assert base.config.dtype == llama().to(torch.bfloat16).config.dtype
    generated = model.generate(input_ids=INPUTS, max_new_tokens=3, do_sample=False)
    assert generated.shape[1] > INPUTS.shape[1]
    assert detach(model).dtype == torch.bfloat16
    assert torch.equal(logits(base), before)


def test_the_trainer_takes_it(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    model = full(tiny_llama)
    before = logits(model)
    rows = [{"input_ids": row, "labels": row} for row in INPUTS]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        learning_rate=1e-3,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert not torch.allclose(logits(model.eval()), before, atol=1e-3)


def test_not_while_the_base_is_in_place(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    model = full(tiny_llama)
    state = adapter_state(model)
    with base_weights(model):
        for action in (
            lambda: adapter_state(model),
            lambda: load_adapter_state(model, state),
            lambda: save_adapter(model, tmp_path),
        ):
            with pytest.raises(RuntimeError, match="the original weights are in place"):
                action()


def test_weights_that_something_has_replaced(tiny_llama: PreTrainedModel) -> None:
    model = full(tiny_llama)
    tiny_llama.lm_head.weight = nn.Parameter(tiny_llama.lm_head.weight.detach().clone())
    with (
        pytest.raises(ModelError, match=r"weight of a Linear was replaced .* Set targets to store"),
        base_weights(model),
    ):
        pass
