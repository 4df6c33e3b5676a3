"""Several sites in one pass are each site on its own."""

from __future__ import annotations

import pytest
import torch
from helpers.families import ALL
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ia2.models.capture import ActivationCapture
from ia2.models.forward import answer_pass
from ia2.models.sites import READABLE, SiteCapture, has_site

PAIRS = [
    (tuple(range(5, 30)), (7,)),
    ((*range(5, 30), 8, 9), (7, 9, 8)),
    ((*range(5, 30), 3), (2, 5)),
]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3", "qwen3_next", "mixtral"])
def test_one_pass_for_all(name: str, word_tokenizer: PreTrainedTokenizerFast) -> None:
    model = ALL[name]()
    sites = [site for site in READABLE if has_site(model, site)]
    assert ("neurons" in sites) == (name != "mixtral")
    found = {}
    with SiteCapture(model, sites) as capture:
        for output in answer_pass(model, word_tokenizer, PAIRS, capture=capture, logits=False):
            assert output.activations is not None
            found[output.index] = capture.split(output.activations)
    for site in sites:
        with ActivationCapture(model, site=site) as one:
            assert one.layers == capture.layers
            for output in answer_pass(model, word_tokenizer, PAIRS, capture=one, logits=False):
                assert output.activations is not None
                mine = found[output.index][site]
                torch.testing.assert_close(mine, output.activations, atol=1e-6, rtol=1e-5)


def test_hooks_are_gone_afterwards(tiny_llama: PreTrainedModel) -> None:
    with SiteCapture(tiny_llama, READABLE):
        assert any(m._forward_hooks or m._forward_pre_hooks for m in tiny_llama.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_llama.modules())


@pytest.mark.parametrize("sites", [(), ("weights",), ("output", "logits")])
def test_sites_that_do_not_stand_side_by_side(sites: tuple[str, ...], tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="some of output, heads, residual, neurons"):
        SiteCapture(tiny_llama, sites)
