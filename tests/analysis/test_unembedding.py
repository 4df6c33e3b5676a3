"""The model's own read-out of every family, and what a direction of the residual stream adds to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.adapting import lora
from helpers.families import ALL, FAMILIES, build, llama
from transformers import CohereConfig, Gemma2Config, GraniteConfig, LlamaForCausalLM, OPTConfig

from ia2.adapters.full_finetuning import FullModel
from ia2.analysis.unembedding import Lens
from ia2.models.capture import ActivationCapture
from ia2.utils.errors import ModelError

IDS = torch.tensor([[5, 17, 40, 33, 21, 60, 12]])
FEW = (9, 5, 77)


def streams(model: Any, ids: torch.Tensor = IDS) -> tuple[torch.Tensor, torch.Tensor]:
    """Residual streams ``[L, T, d]`` and the model's own logits ``[T, V]``."""
    with torch.no_grad(), ActivationCapture(model, site="residual") as capture:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        return torch.stack([layer[0] for layer in capture.take().values()]), logits


def check(model: Any, tolerance: float = 1e-5) -> Lens:
    """The lens of the last layer is the model's own logits."""
    stream, logits = streams(model)
    lens = Lens.of(model)
    assert torch.allclose(lens.logits(stream[-1]), logits.float(), atol=tolerance)
    few = Lens.of(model, FEW).logits(stream[-1])
    assert torch.allclose(few, logits.float()[:, FEW], atol=tolerance)
    assert not torch.allclose(lens.logits(stream[0]), logits.float(), atol=0.1)
    return lens


@pytest.mark.parametrize("name", ALL)
def test_last_layer_is_the_models_own_output(name: str) -> None:
    check(ALL[name]())


def changed(name: str, config: type, **fields: Any) -> Any:
    known = FAMILIES[name]().config.to_dict() if name in FAMILIES else {}
    return build(config(**{**known, **fields}))


def test_logits_that_are_scaled_or_capped() -> None:
    assert check(changed("granite", GraniteConfig, logits_scaling=4.0)).scale == pytest.approx(0.25)
    assert check(changed("cohere", CohereConfig, logit_scale=3.0)).scale == pytest.approx(3.0)
    # a cap that the logits reach
    assert check(changed("gemma2", Gemma2Config, final_logit_softcapping=1.5)).cap == 1.5


def test_opt_without_a_last_norm_and_with_a_projection() -> None:
    bare = check(changed("opt", OPTConfig, do_layer_norm_before=False))
    assert bare.tail == ()
    both = check(changed("opt", OPTConfig, word_embed_proj_dim=16))
    assert [type(module).__name__ for module in both.tail] == ["LayerNorm", "Linear"]


def test_lens_stays_the_base_models() -> None:
    model = llama(tie_word_embeddings=False)
    stream, logits = streams(model)
    whole, few = Lens.of(model), Lens.of(model, FEW)
    full = FullModel(model)
    with torch.no_grad():
        for parameter in full.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    assert not torch.allclose(streams(full)[1], logits, atol=0.1)
    for lens, columns in ((whole, slice(None)), (few, list(FEW))):
        assert torch.allclose(lens.logits(stream[-1]), logits[:, columns], atol=1e-5)
    check(full)  # and a new one is of the weights that are on
    with full.disable_adapter():
        assert torch.allclose(Lens.of(full).logits(stream[-1]), logits, atol=1e-5)


def test_output_embeddings_with_an_adapter_are_called() -> None:
    model = lora(llama(tie_word_embeddings=False), target_modules=["q_proj", "lm_head"])
    before = streams(model)[1]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lm_head" in name and "lora_B" in name:
                parameter.normal_()
    assert not torch.allclose(streams(model)[1], before, atol=0.1)
    assert check(model).weight is None


def test_what_cannot_be_followed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    forward = LlamaForCausalLM.forward

    def bent(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = output.logits**3
        return output

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "forward", bent)
        with pytest.raises(ModelError, match="do not give its own logits"):
            Lens.of(model)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    with pytest.raises(ModelError, match="no output embeddings"):
        Lens.of(model)
    # one that is never called
    monkeypatch.setattr(model, "get_output_embeddings", lambda: torch.nn.Linear(32, 128))
    with pytest.raises(ModelError, match="does not call"):
        Lens.of(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_what_a_small_step_does_to_the_logits(name: str) -> None:
    """From a residual stream at right angles to the step, so that the norm's divisor stays what it is."""
    model: Any = FAMILIES[name]()
    lens = Lens.of(model)
    rng = np.random.default_rng(0)
    stream, shift = rng.normal(size=(2, 32))
    stream -= stream.mean()
    centred = shift - shift.mean()
    stream -= centred * (stream @ centred) / (centred @ centred)
    assert abs(stream @ shift) < 1e-9
    step = torch.from_numpy(0.02 * shift)[None], torch.from_numpy(stream)[None]
    change = (lens.logits(step[1] + step[0]) - lens.logits(step[1] - step[0]))[0].double().numpy()
    change = (change - change.mean()) / change.std()
    # a soft cap bends what is added
    np.testing.assert_allclose(lens.promotes(shift[None])[0], change, atol=0.1 if lens.cap else 0.02)
