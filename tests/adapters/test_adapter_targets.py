"""Which modules an adapter changes where none are named."""

from __future__ import annotations

import pytest
from helpers.adapting import EXPECTED, lora
from helpers.families import ALL, gpt2
from torch import nn
from transformers import PreTrainedModel

from ia2.adapters.modules import attention_projections
from ia2.utils.errors import ModelError


@pytest.mark.parametrize("name", list(ALL))
def test_projections(name: str) -> None:
    assert set(attention_projections(ALL[name]())) == EXPECTED[name]


def test_own_target_modules(tiny_llama: PreTrainedModel) -> None:
    adapted = lora(tiny_llama, target_modules=["v_proj"])
    trainable = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert trainable
    assert all("v_proj" in n for n in trainable)


def test_cross_attention_gets_no_adapter() -> None:
    model = gpt2(add_cross_attention=True)
    adapted = lora(model)
    assert not [n for n, p in adapted.named_parameters() if p.requires_grad and "crossattention" in n]


def test_attention_without_linear_layers() -> None:
    class Attention(nn.Module):
        layer_idx = 0

    class Config:
        model_type = "none"

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention()
            self.config = Config()

        def forward(self) -> None:
            raise NotImplementedError

    with pytest.raises(ModelError, match=r"no linear layers .* give adapter\.target_modules"):
        attention_projections(Model())
