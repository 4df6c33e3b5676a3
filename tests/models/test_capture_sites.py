"""Heads, neurons, residual streams and attention weights, in every family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.capturing import PLACES, captured, family, ids, lora
from helpers.families import ALL, HEADS, LAYERS, attention_layers, gpt2, llama
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ia2.adapters.types import peft_config
from ia2.adapters.weights import attach
from ia2.config.sections import AdapterConfig
from ia2.models.capture import SITES, ActivationCapture, eager_attention
from ia2.models.tokens import pad_rows
from ia2.utils.errors import ModelError


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
        # earlier releases of transformers run Gemma 2 with SDPA, which leaves out its soft cap: 2e-5 here
        close = 1e-4 if name == "gemma2" and before == "sdpa" else 1e-5
        torch.testing.assert_close(model(input_ids=ids()).logits, plain, atol=close, rtol=close)
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
    assert "ia2.models.capture.eager_attention(model)" in str(caught.value)
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
