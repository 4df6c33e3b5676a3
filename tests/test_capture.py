"""What is captured is what the site names, in every family and every setting."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from families import ALL, FAMILIES, HEADS, HYBRIDS, LAYERS, WIDTH, attention_layers, build, gpt2, llama
from torch import nn
from transformers import MambaConfig, PreTrainedModel, Zamba2Config
from transformers.pytorch_utils import Conv1D

from ia2.adapter_targets import attention_projections
from ia2.adapter_weights import attach, base_weights
from ia2.adapters import peft_config
from ia2.capture import SITES, ActivationCapture, eager_attention, find_attention_modules
from ia2.config_sections import AdapterConfig
from ia2.errors import ModelError
from ia2.example_trainer import _disable_checkpointing, _enable_checkpointing
from ia2.tokens import pad_rows

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
    "qwen2": ("model.layers", "self_attn", "o_proj"),
    "gemma2": ("model.layers", "self_attn", "o_proj"),
    "olmo2": ("model.layers", "self_attn", "o_proj"),
    "granite": ("model.layers", "self_attn", "o_proj"),
    "cohere": ("model.layers", "self_attn", "o_proj"),
    "stablelm": ("model.layers", "self_attn", "o_proj"),
    "smollm3": ("model.layers", "self_attn", "o_proj"),
    "mixtral": ("model.layers", "self_attn", "o_proj"),
    "qwen3_moe": ("model.layers", "self_attn", "o_proj"),
    "qwen3_next": ("model.layers", "self_attn", "o_proj"),
    "lfm2": ("model.layers", "self_attn", "out_proj"),
}

family = pytest.mark.parametrize("name", list(ALL))


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
            _enable_checkpointing(model, {})
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
            _disable_checkpointing(model)
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


# -------------------------------------------------------------------------------------- other sites


def watched(model: nn.Module, path: str) -> dict[str, torch.Tensor]:
    """Filled, by the next forward pass, with the ``output`` of a module."""
    seen: dict[str, torch.Tensor] = {}
    model.get_submodule(path).register_forward_hook(
        lambda m, a, o: seen.update(output=o[0] if isinstance(o, tuple) else o)
    )
    return seen


@family
def test_heads_are_what_the_output_projection_is_given(name: str) -> None:
    model = ALL[name]()
    layers, attention, projection = PLACES[name]
    with torch.no_grad():
        heads, outputs = captured(model, ids(), site="heads"), captured(model, ids())
        for index, tensor in heads.items():
            module = model.get_submodule(f"{layers}.{index}.{attention}.{projection}")
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            torch.testing.assert_close(
                nn.functional.linear(tensor, weight, module.bias), outputs[index], atol=1e-6, rtol=1e-5
            )
    assert list(heads) == attention_layers(name)


@family
def test_neurons_are_what_the_mlps_last_projection_is_given(name: str) -> None:
    model = ALL[name]()
    if name in ("mixtral", "qwen3_moe"):
        with pytest.raises(ModelError, match="no single MLP was recognised"):
            ActivationCapture(model, site="neurons")
        return
    endings = ("mlp.down_proj", "mlp.c_proj", "dense_4h_to_h", "fc_out", "fc2", "ffn.down_proj", "w2")
    capture = ActivationCapture(model, site="neurons")
    for index in attention_layers(name):
        names = [n for n, _ in model.named_modules() if n.startswith(f"{PLACES[name][0]}.{index}.")]
        (path,) = [n for n in names if n.endswith(endings)]
        module = model.get_submodule(path)
        assert capture.hooked[index] is module
        seen: dict[str, torch.Tensor] = {}
        # a copy: Falcon adds the attention's output in place
        module.register_forward_hook(lambda m, a, o, seen=seen: seen.update(output=o.clone()))
        with torch.no_grad():
            found = captured(model, ids(), site="neurons")[index]
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        expected = nn.functional.linear(found, weight, module.bias)
        torch.testing.assert_close(expected, seen["output"], atol=1e-5, rtol=1e-4)


@family
def test_residual_is_what_the_layer_hands_on(name: str) -> None:
    model = ALL[name]()
    seen = {i: watched(model, f"{PLACES[name][0]}.{i}") for i in attention_layers(name)}
    with torch.no_grad():
        found = captured(model, ids(), site="residual")
        record = model(input_ids=ids(), use_cache=False, output_hidden_states=True).hidden_states
    assert list(found) == attention_layers(name)
    for index, tensor in found.items():
        assert torch.equal(tensor, seen[index]["output"])
        if index + 2 < len(record):  # the last of transformers' own record is behind the final norm
            assert torch.equal(tensor, record[index + 1])


@family
def test_weights_are_the_attention_probabilities(name: str) -> None:
    model = ALL[name]()
    with torch.no_grad(), eager_attention(model):
        found = captured(model, ids(), site="weights")
        record = model(input_ids=ids(), use_cache=False, output_attentions=True).attentions
    assert list(found) == attention_layers(name)
    for tensor, expected in zip(found.values(), record, strict=True):
        assert tensor.shape == (2, HEADS, 20, 20)
        torch.testing.assert_close(tensor, expected)
        torch.testing.assert_close(tensor.sum(-1), torch.ones(2, HEADS, 20))
        assert tensor.triu(1).abs().max() == 0


def own_weights(model: nn.Module, row: Sequence[int], answer: int, span: int) -> torch.Tensor:
    """``[L, G, H, S]`` of a row on its own, from transformers' record."""
    record = model(input_ids=torch.tensor([row]), use_cache=False, output_attentions=True).attentions
    shares = torch.stack([layer[0, :, -answer:, -span:] for layer in record]).transpose(1, 2)
    return shares / shares.sum(-1, keepdim=True)


@family
def test_weights_at_answers_equal_rows_on_their_own(name: str) -> None:
    model = ALL[name]()
    rows = [tuple(ids(1, n, seed=n)[0].tolist()) for n in (5, 14, 9)]
    lengths, spans = [1, 4, 2], [2, 11, 9]
    batch = pad_rows(rows, lengths, 0)
    with torch.no_grad(), eager_attention(model):
        with ActivationCapture(model, site="weights") as capture:
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            together = capture.at_answers(batch, spans)
        assert together.shape == (len(attention_layers(name)), sum(lengths), HEADS, max(spans))
        start = 0
        for row, length, span in zip(rows, lengths, spans, strict=True):
            part = together[:, start : start + length]
            expected = own_weights(model, row, length, span)
            torch.testing.assert_close(part[..., -span:], expected, atol=1e-5, rtol=1e-4)
            assert not part[..., :-span].any()
            start += length


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_weights_beside_virtual_tokens(kind: str, tiny_llama: PreTrainedModel) -> None:
    """Counted from the right, what stands on the left does not matter, nor whether it is fed or cached."""
    given = AdapterConfig(peft={"peft_type": kind, "num_virtual_tokens": 3})
    model: Any = attach(tiny_llama, peft_config(tiny_llama, given), seed=0)
    rows = [tuple(ids(1, n, seed=n)[0].tolist()) for n in (5, 14)]
    lengths, spans = [1, 4], [5, 11]
    batch = pad_rows(rows, lengths, 0)
    found = []
    with torch.no_grad(), eager_attention(model), ActivationCapture(model, site="weights") as capture:
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        together = capture.at_answers(batch, spans)
        for row, length, span in zip(rows, lengths, spans, strict=True):
            capture.arm()
            model(
                input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row)).long(), use_cache=False
            )
            layers = torch.stack(list(capture.take().values()))[:, 0]
            assert layers.shape[-1] == len(row) + 3
            shares = layers[:, :, -length:, -span:].transpose(1, 2)
            found.append(shares / shares.sum(-1, keepdim=True))
    torch.testing.assert_close(together[:, :1, :, -5:], found[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together[:, 1:], found[1], atol=1e-5, rtol=1e-4)


@family
def test_eager_attention_is_for_the_duration(name: str) -> None:
    model = ALL[name]()
    adapted = lora(model)
    before = model.config._attn_implementation
    rates = {n: m.p for n, m in model.named_modules() if isinstance(m, nn.Dropout)}
    with torch.no_grad():
        plain = model(input_ids=ids()).logits
    with torch.no_grad(), eager_attention(adapted):
        assert model.config._attn_implementation == "eager"
        torch.testing.assert_close(model(input_ids=ids()).logits, plain, atol=1e-5, rtol=1e-5)
    assert model.config._attn_implementation == before
    with pytest.raises(RuntimeError, match="of the test"), eager_attention(model):
        raise RuntimeError("of the test")
    assert model.config._attn_implementation == before
    assert {n: m.p for n, m in model.named_modules() if isinstance(m, nn.Dropout)} == rates


def test_weights_have_no_dropout() -> None:
    model = gpt2(attn_pdrop=0.5, resid_pdrop=0.0, embd_pdrop=0.0)
    with torch.no_grad(), eager_attention(model):
        expected = captured(model, ids(), site="weights")
        model.train()
        assert all(torch.equal(w, expected[i]) for i, w in captured(model, ids(), site="weights").items())
    assert model.transformer.h[0].attn.attn_dropout.p == 0.5


def test_weights_need_eager_attention_and_spans(tiny_llama: PreTrainedModel) -> None:
    with torch.no_grad(), pytest.raises(ModelError) as caught:
        captured(tiny_llama, ids(), site="weights")
    assert "model.layers.0.self_attn gave no attention weights" in str(caught.value)
    assert "ia2.capture.eager_attention(model)" in str(caught.value)
    batch = pad_rows([(5, 6, 7)], [1], 0)
    with torch.no_grad(), eager_attention(tiny_llama), pytest.raises(ValueError, match="spans"):  # noqa: SIM117
        with ActivationCapture(tiny_llama, site="weights") as capture:
            tiny_llama(input_ids=batch.input_ids)
            capture.at_answers(batch)
    with pytest.raises(ValueError, match="'logits' is not one of output, heads"):
        ActivationCapture(tiny_llama, site="logits")


@pytest.mark.parametrize("site", SITES)
def test_sites_of_modules_that_are_named(site: str, tiny_llama: PreTrainedModel) -> None:
    """Whichever module a user's glob names, attention or its output projection, the sites are the same."""
    with torch.no_grad(), eager_attention(tiny_llama):
        expected = captured(tiny_llama, ids(), site=site)
        for pattern in ("model.layers.*.self_attn", "model.layers.*.self_attn.o_proj"):
            found = captured(tiny_llama, ids(), site=site, pattern=pattern)
            assert all(torch.equal(found[i], expected[i]) for i in range(LAYERS))


def test_sites_that_a_model_does_not_have() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer_idx, self.mixer = 0, nn.Linear(4, 4)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config, self.attention = llama().config, Attention()

    model = Model()
    with pytest.raises(
        ModelError, match=r"output projection of attention.*among \['mixer'\].*attention_modules"
    ):
        ActivationCapture(model, site="heads")
    with pytest.raises(ModelError, match="layer around attention"):
        ActivationCapture(model, site="residual")
    assert ActivationCapture(model, "attention.mixer", site="heads").layers == [0]


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
