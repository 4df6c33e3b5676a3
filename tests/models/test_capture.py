"""What is captured is what attention gives, in every family, and nothing is held."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers.capturing import PLACES, captured, family, ids, lora
from helpers.families import ALL, FAMILIES, LAYERS, WIDTH, attention_layers, llama
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ia2.adapters.modules import attention_projections
from ia2.adapters.weights import base_weights
from ia2.models.capture import SITES, ActivationCapture, eager_attention, find_attention_modules
from ia2.models.tokens import pad_rows
from ia2.training.trainer import checkpoint_activations
from ia2.utils.errors import ModelError


def test_every_family_is_covered() -> None:
    assert set(PLACES) == set(ALL)


@family
def test_is_the_output_of_the_output_projection(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ALL[name]()
    layers, attention, projection = PLACES[name]
    outputs: dict[int, torch.Tensor] = {}
    for index in attention_layers(name):
        module = model.get_submodule(f"{layers}.{index}.{attention}.{projection}")

        def recorded(x: torch.Tensor, index: int = index, original: Any = module.forward) -> torch.Tensor:
            outputs[index] = original(x)
            return outputs[index]

        monkeypatch.setattr(module, "forward", recorded)
    with torch.no_grad():
        found = captured(model, ids())
    assert list(found) == attention_layers(name)
    for index, tensor in found.items():
        assert tensor.shape == (2, 20, WIDTH)
        assert torch.equal(tensor, outputs[index])


@family
def test_is_what_attention_adds_to_the_residual_stream(name: str) -> None:
    """With the first such layer's MLP made zero, it changes its input by the activation alone."""
    model = ALL[name]()
    layers, attention, _ = PLACES[name]
    first = attention_layers(name)[0]
    layer = model.get_submodule(f"{layers}.{first}")
    silenced = 0
    for module_name, module in layer.named_modules():
        linear = isinstance(module, (nn.Linear, Conv1D)) or type(module).__name__.endswith("Experts")
        if not module_name.startswith(attention) and linear:
            for parameter in module.parameters():
                parameter.data.zero_()
            silenced += 1
    assert silenced >= (1 if name in ("mixtral", "qwen3_moe") else 2)
    seen: list[torch.Tensor] = []
    keep_input = layer.register_forward_pre_hook(lambda m, a, k: seen.append(a[0]), with_kwargs=True)
    keep_output = layer.register_forward_hook(
        lambda m, a, o: seen.append(o[0] if isinstance(o, tuple) else o)
    )
    with torch.no_grad():
        activation = captured(model, ids())[first]
        if name in ("gemma2", "gemma3", "olmo2"):  # normed between the projection and the residual addition
            activation = layer.get_submodule("post_attention_layernorm")(activation)
        if name == "granite":
            activation = activation * 0.7
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


def projected(values: torch.Tensor) -> torch.Tensor:
    """A number that depends on every entry, in a way of its own."""
    factors = torch.randn(values.shape, generator=torch.Generator().manual_seed(3))
    return (values * factors).pow(2).mean()


@family
@pytest.mark.parametrize("site", [site for site in SITES if site != "neurons"])  # no objective reads these
def test_gradients_survive_checkpointing(name: str, site: str) -> None:
    gradients = []
    recomputed = []
    for checkpointing in (False, True):
        model = lora(ALL[name]())
        no_dropout(model)
        model.train()  # transformers checkpoints in training mode only
        if checkpointing:
            checkpoint_activations(model, {})
        passes = []
        first = next(iter(find_attention_modules(model).values()))[1]
        first.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        batch = pad_rows([(5, 6, 7, 8, 9), (9, 8, 7)], [2, 1], 0)
        spans = [3, 2] if site == "weights" else None
        # the recomputation, in the backward pass, must be in eager attention too
        with (
            eager_attention(model) if spans else nullcontext(),
            ActivationCapture(model, site=site) as capture,
        ):
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            projected(capture.at_answers(batch, spans)).backward()
            # the recomputation went through the hooks; nothing of it may stay
            assert capture._stored == {}
        if checkpointing:
            checkpoint_activations(model, None)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        recomputed.append(len(passes))
    plain, checkpointed = gradients
    assert recomputed == [1, 2], "checkpointing did not happen"
    assert plain
    beyond = []
    for parameter, gradient in plain.items():
        if gradient is None:
            beyond.append(parameter)
            assert checkpointed[parameter] is None
            continue
        assert gradient.abs().max() > 0, parameter
        torch.testing.assert_close(checkpointed[parameter], gradient, atol=1e-7, rtol=1e-5)
    # only what comes after the site in the last layer: the output projection
    last = f".{attention_layers(name)[-1]}."
    assert all(last in parameter and PLACES[name][2] in parameter for parameter in beyond)
    assert bool(beyond) == (site in ("heads", "weights"))


@family
def test_through_peft(name: str) -> None:
    inputs = ids()
    with torch.no_grad():
        expected = captured(ALL[name](), inputs)
        adapted = lora(ALL[name]())
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
@pytest.mark.parametrize("site", ["output", "heads", "residual"])
def test_at_answers_equals_rows_on_their_own(name: str, site: str) -> None:
    model = ALL[name]()
    rows = [tuple(ids(1, n, seed=n)[0].tolist()) for n in (5, 12, 9)]
    lengths = [1, 4, 9]
    batch = pad_rows(rows, lengths, 0)
    with torch.no_grad(), ActivationCapture(model, site=site) as capture:
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        together = capture.at_answers(batch)
        alone = []
        for row, length in zip(rows, lengths, strict=True):
            capture.arm()
            model(input_ids=torch.tensor([row]), use_cache=False)
            alone.append(torch.stack([layer[0, -length:] for layer in capture.take().values()]))
    assert together.shape == (len(attention_layers(name)), sum(lengths), WIDTH)
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
