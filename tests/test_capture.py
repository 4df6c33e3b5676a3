"""The captured tensor is the attention output before the residual, in every family and every setting."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from families import FAMILIES, LAYERS, WIDTH, build, gpt2, llama
from torch import nn
from transformers import Lfm2Config, MambaConfig, PreTrainedModel, Qwen3NextConfig
from transformers.pytorch_utils import Conv1D

from ia2.adapters import attach, attention_projections, base_weights, peft_config
from ia2.capture import ActivationCapture, find_attention_modules
from ia2.config import AdapterConfig
from ia2.errors import ModelError
from ia2.tokens import pad_rows
from ia2.trainer import _disable_checkpointing, _enable_checkpointing

# Where each family keeps a layer, its attention and its output projection: written down from
# transformers' sources, so that the search in ia2.capture is checked against something else.
PLACES = {
    "llama": ("model.layers", "self_attn", "o_proj"),
    "qwen3": ("model.layers", "self_attn", "o_proj"),
    "gemma3": ("model.layers", "self_attn", "o_proj"),
    "mistral": ("model.layers", "self_attn", "o_proj"),
    "phi3": ("model.layers", "self_attn", "o_proj"),
    "gpt2": ("transformer.h", "attn", "c_proj"),
    "gpt_neox": ("gpt_neox.layers", "attention", "dense"),
    "gptj": ("transformer.h", "attn", "out_proj"),
    "opt": ("model.decoder.layers", "self_attn", "out_proj"),
    "falcon": ("transformer.h", "self_attention", "dense"),
    "bloom": ("transformer.h", "self_attention", "dense"),
    "mpt": ("transformer.blocks", "attn", "out_proj"),
}

family = pytest.mark.parametrize("name", list(FAMILIES))


def ids(rows: int = 2, width: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 100, (rows, width), generator=torch.Generator().manual_seed(seed))


def lora(model: PreTrainedModel, *, random_b: bool = True) -> Any:
    adapted = attach(model, peft_config(model, AdapterConfig(rank=2, alpha=4)), seed=0)
    if random_b:  # B starts at zero, where many mistakes do not show
        generator = torch.Generator().manual_seed(1)
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_B" in parameter_name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return adapted


def captured(model: nn.Module, inputs: torch.Tensor, **options: Any) -> dict[int, torch.Tensor]:
    with ActivationCapture(model, **options) as capture:
        model(input_ids=inputs, use_cache=False)
        return capture.take()


def test_every_family_is_covered() -> None:
    assert set(PLACES) == set(FAMILIES)


@family
def test_is_the_output_of_the_output_projection(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES[name]()
    layers, attention, projection = PLACES[name]
    outputs: dict[int, torch.Tensor] = {}
    for index in range(LAYERS):
        module = model.get_submodule(f"{layers}.{index}.{attention}.{projection}")

        def recorded(x: torch.Tensor, index: int = index, original: Any = module.forward) -> torch.Tensor:
            outputs[index] = original(x)
            return outputs[index]

        monkeypatch.setattr(module, "forward", recorded)
    with torch.no_grad():
        found = captured(model, ids())
    assert list(found) == list(range(LAYERS))
    for index, tensor in found.items():
        assert tensor.shape == (2, 20, WIDTH)
        assert torch.equal(tensor, outputs[index])


@family
def test_is_what_attention_adds_to_the_residual_stream(name: str) -> None:
    """With the first layer's MLP made zero, the layer changes its input by the activation alone."""
    model = FAMILIES[name]()
    layers, attention, _ = PLACES[name]
    layer = model.get_submodule(f"{layers}.0")
    silenced = 0
    for module_name, module in layer.named_modules():
        if not module_name.startswith(attention) and isinstance(module, (nn.Linear, Conv1D)):
            for parameter in module.parameters():
                parameter.data.zero_()
            silenced += 1
    assert silenced >= 2
    seen: list[torch.Tensor] = []
    keep_input = layer.register_forward_pre_hook(lambda m, a, k: seen.append(a[0]), with_kwargs=True)
    keep_output = layer.register_forward_hook(
        lambda m, a, o: seen.append(o[0] if isinstance(o, tuple) else o)
    )
    with torch.no_grad():
        activation = captured(model, ids())[0]
        if name == "gemma3":  # normed between the projection and the residual addition
            activation = layer.get_submodule("post_attention_layernorm")(activation)
    keep_input.remove()
    keep_output.remove()
    before, after = seen
    assert activation.std() > 0.01
    torch.testing.assert_close(after - before, activation, atol=1e-5, rtol=1e-5)


def no_dropout(model: nn.Module) -> None:
    """Dropout off in modules, and in the probabilities that attention functions are given."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for attribute, value in vars(module).items():
            if "dropout" in attribute and isinstance(value, float):
                setattr(module, attribute, 0.0)


@family
def test_gradients_survive_checkpointing(name: str) -> None:
    gradients = []
    recomputed = []
    for checkpointing in (False, True):
        model = lora(FAMILIES[name]())
        no_dropout(model)
        model.train()  # transformers checkpoints in training mode only
        if checkpointing:
            _enable_checkpointing(model, {})
        passes = []
        first = next(iter(find_attention_modules(model).values()))[1]
        first.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        batch = pad_rows([(5, 6, 7, 8, 9), (9, 8, 7)], [2, 1], 0)
        with ActivationCapture(model) as capture:
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            loss = capture.at_answers(batch).pow(2).mean()
            loss.backward()
            # the recomputation went through the hooks; nothing of it may stay
            assert capture._stored == {}
        if checkpointing:
            _disable_checkpointing(model)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        recomputed.append(len(passes))
    plain, checkpointed = gradients
    assert recomputed == [1, 2], "checkpointing did not happen"
    assert plain
    for parameter, gradient in plain.items():
        assert gradient is not None, parameter
        assert gradient.abs().max() > 0, parameter
        torch.testing.assert_close(checkpointed[parameter], gradient, atol=1e-7, rtol=1e-5)


@family
def test_through_peft(name: str) -> None:
    inputs = ids()
    with torch.no_grad():
        expected = captured(FAMILIES[name](), inputs)
        adapted = lora(FAMILIES[name]())
        changed = captured(adapted, inputs)
        with base_weights(adapted):
            restored = captured(adapted, inputs)
    assert list(expected) == list(changed) == list(restored)
    for index, tensor in expected.items():
        assert torch.equal(restored[index], tensor)
        assert not torch.allclose(changed[index], tensor, atol=1e-3)


def test_through_ddp_like_wrapper() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, **inputs: Any) -> Any:
            return self.module(**inputs)

    adapted = lora(llama())
    with torch.no_grad():
        expected = captured(adapted, ids())
        found = captured(Wrapper(adapted), ids())
    assert all(torch.equal(found[index], tensor) for index, tensor in expected.items())


# -------------------------------------------------------------------------------- which modules


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


HYBRIDS: dict[str, Any] = {
    "qwen3_next": lambda: Qwen3NextConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=0,
        layer_types=["linear_attention", "linear_attention", "full_attention", "full_attention"],
    ),
    "lfm2": lambda: Lfm2Config(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "conv", "full_attention", "full_attention"],
    ),
}


@pytest.mark.parametrize("name", list(HYBRIDS))
def test_hybrid_matches_its_full_attention_layers(name: str) -> None:
    model = build(HYBRIDS[name]())
    with torch.no_grad(), ActivationCapture(model) as capture:
        assert capture.layers == [2, 3]
        assert capture.total_layers == 4
        model(input_ids=ids(), use_cache=False)
        assert [t.shape for t in capture.take().values()] == [(2, 20, 32)] * 2


def test_choice_of_layers(tiny_llama: PreTrainedModel) -> None:
    with torch.no_grad():
        everything = captured(tiny_llama, ids())
        chosen = captured(tiny_llama, ids(), layers=[1])
    assert list(chosen) == [1]
    assert torch.equal(chosen[1], everything[1])
    with pytest.raises(ModelError, match=r"layers \[7\] have no self-attention; there are \[0, 1\]"):
        ActivationCapture(tiny_llama, layers=[1, 7])


# ---------------------------------------------------------------------------- what is held, when


def test_take_needs_a_forward_pass(tiny_llama: PreTrainedModel) -> None:
    with torch.no_grad(), ActivationCapture(tiny_llama) as capture:
        with pytest.raises(ModelError, match="did not reach"):
            capture.take()
        capture.arm()
        tiny_llama(input_ids=ids())
        capture.take()
        with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn"):
            capture.take()
        tiny_llama(input_ids=ids())  # not armed again: nothing is heard
        assert capture._stored == {}
        capture.arm()
        tiny_llama(input_ids=ids())
        capture.disarm()
        assert capture._stored == {}


def test_nothing_is_held_after_take(tiny_llama: PreTrainedModel) -> None:
    with torch.no_grad(), ActivationCapture(tiny_llama) as capture:
        tiny_llama(input_ids=ids(), use_cache=False)
        references = [weakref.ref(tensor) for tensor in capture.take().values()]
        gc.collect()
        assert [reference() for reference in references] == [None] * LAYERS


def test_hooks_are_removed(tiny_llama: PreTrainedModel) -> None:
    def hooks() -> int:
        return sum(len(module._forward_hooks) for module in tiny_llama.modules())

    before = hooks()
    capture = ActivationCapture(tiny_llama)
    assert hooks() == before
    with capture:
        assert hooks() == before + LAYERS
    assert hooks() == before
    with pytest.raises(RuntimeError, match="of the test"), capture:
        raise RuntimeError("of the test")
    assert hooks() == before
    with torch.no_grad(), capture:  # and it can be entered again
        tiny_llama(input_ids=ids())
        assert len(capture.take()) == LAYERS


def test_outputs_do_not_change(tiny_llama: PreTrainedModel) -> None:
    with torch.no_grad():
        before = tiny_llama(input_ids=ids()).logits
        with ActivationCapture(tiny_llama):
            during = tiny_llama(input_ids=ids()).logits
    assert torch.equal(before, during)


@family
def test_at_answers_equals_rows_on_their_own(name: str) -> None:
    model = FAMILIES[name]()
    rows = [tuple(ids(1, n, seed=n)[0].tolist()) for n in (5, 12, 9)]
    lengths = [1, 4, 9]
    batch = pad_rows(rows, lengths, 0)
    with torch.no_grad(), ActivationCapture(model) as capture:
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        together = capture.at_answers(batch)
        alone = []
        for row, length in zip(rows, lengths, strict=True):
            capture.arm()
            model(input_ids=torch.tensor([row]), use_cache=False)
            alone.append(torch.stack([layer[0, -length:] for layer in capture.take().values()]))
    assert together.shape == (LAYERS, sum(lengths), WIDTH)
    torch.testing.assert_close(together, torch.cat(alone, dim=1), atol=1e-5, rtol=1e-4)


def test_projections_of_every_family_are_inside_the_captured_modules() -> None:
    for make in FAMILIES.values():
        model = make()
        modules = [n for n, _ in find_attention_modules(model).values()]
        parents = [n.rsplit(".", 1)[0] for n in modules]
        for target in attention_projections(model):
            matched = [n for n, _ in model.named_modules() if n.endswith(f".{target}") or n == target]
            assert len(matched) == LAYERS
            assert all(any(n.startswith(f"{p}.") for p in [*modules, *parents]) for n in matched)
