from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers.families import ALL, HEADS, llama
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from ia2.analysis import patching
from ia2.analysis.patching import Part, Patch, patched_log_probs
from ia2.models.capture import ActivationCapture
from ia2.models.forward import answer_pass
from ia2.models.sites import SiteCapture, has_site

Ids = tuple[int, ...]


def random_ids(count: int, seed: int) -> Ids:
    return tuple(np.random.default_rng(seed).integers(4, 120, count).tolist())


SHARED = random_ids(20, 0)
PROMPTS = [SHARED + random_ids(n, n) for n in (5, 3, 9)]
ANSWERS = [random_ids(1, 21), random_ids(3, 22), random_ids(2, 23)]
CONTEXTS = [random_ids(4, 31) + prompt for prompt in PROMPTS]


def sites_of(model: Any) -> list[str]:
    return ["output", "heads", "residual", *(["neurons"] if has_site(model, "neurons") else [])]


def read(model: Any, tokenizer: Any, prompts: Sequence[Ids]) -> tuple[list[Any], np.ndarray]:
    """Activations at answer positions and log-probabilities of the answers."""
    found: list[Any] = [None] * len(prompts)
    log_p = np.empty(len(prompts))
    with SiteCapture(model, sites_of(model)) as capture:
        for output in answer_pass(
            model, tokenizer, list(zip(prompts, ANSWERS, strict=True)), capture=capture
        ):
            assert output.activations is not None and output.logits is not None
            found[output.index] = capture.split(output.activations)
            answer = ANSWERS[output.index]
            rows = output.logits.log_softmax(-1)
            log_p[output.index] = sum(float(rows[g, token]) for g, token in enumerate(answer))
    return found, log_p


def some_patches(model: Any, layers: Sequence[int]) -> list[Patch]:
    """Every head and layer, two heads at once, some neurons, and many things at once."""
    found: list[Patch] = [()]
    for layer in layers:
        found += [(Part("output", layer),), (Part("residual", layer),), (Part("heads", layer, (0, 3)),)]
        found += [(Part("heads", layer, (head,)),) for head in range(HEADS)]
        if has_site(model, "neurons"):
            found.append((Part("neurons", layer, (0, 5, 9)),))
    found.append(tuple(Part("output", layer) for layer in layers))
    found.append(
        (Part("heads", layers[0], (1,)), Part("residual", layers[0], (2, 3)), Part("output", layers[-1]))
    )
    return found


def plain(model: Any, prompt: Ids, answer: Ids, source: Any, patch: Patch) -> float:
    """One patch in one row without a cache, element by element."""
    handles = []
    for part in patch:
        capture = ActivationCapture(model, site=part.site)
        values = source[part.site][capture.layers.index(part.layer)]
        width = values.shape[-1]
        each = width // HEADS if part.site == "heads" else 1
        columns = (
            range(width) if part.parts is None else [p * each + c for p in part.parts for c in range(each)]
        )

        def put(tensor: Any, values: Any = values, columns: Any = columns) -> Any:
            changed = tensor.clone().reshape(-1, tensor.shape[-1])
            for place in range(len(answer)):
                for column in columns:
                    changed[len(changed) - len(answer) + place, column] = values[place, column]
            return changed.reshape(tensor.shape)

        def on_output(module: Any, args: Any, output: Any, put: Any = put) -> Any:
            return (put(output[0]), *output[1:]) if isinstance(output, tuple) else put(output)

        def on_input(module: Any, args: Any, put: Any = put) -> Any:
            return (put(args[0]), *args[1:])

        module = capture.hooked[part.layer]
        handles.append(
            module.register_forward_pre_hook(on_input)
            if part.site in ("heads", "neurons")
            else module.register_forward_hook(on_output)
        )
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer[:-1]]), use_cache=False).logits
    for handle in handles:
        handle.remove()
    rows = logits[0, -len(answer) :].log_softmax(-1)
    return sum(float(rows[place, token]) for place, token in enumerate(answer))


def compare(model: Any, tokenizer: Any, source_model: Any = None) -> np.ndarray:
    """Against the plain implementation; the change that each patch makes, ``[n, U]``."""
    sources, _ = read(source_model or model, tokenizer, CONTEXTS)
    layers = ActivationCapture(model).layers
    patches = some_patches(model, layers)
    found = patched_log_probs(model, PROMPTS, ANSWERS, sources, patches)
    expected = [
        [plain(model, prompt, answer, source, patch) for patch in patches]
        for prompt, answer, source in zip(PROMPTS, ANSWERS, sources, strict=True)
    ]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    return found - found[:, :1]


# Packed, where the family takes it, and as rows: distances told by other means than position ids, virtual
# tokens, and recurrent layers, where there is no cache.
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma3", "bloom", "lfm2"])
def test_against_a_plain_implementation(family: str, word_tokenizer: Any) -> None:
    change = compare(ALL[family](), word_tokenizer)
    assert np.median(np.abs(change[:, 1:])) > 1e-3  # not a comparison of nothing with nothing


def test_virtual_tokens(word_tokenizer: Any) -> None:
    torch.manual_seed(0)
    model = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    assert np.abs(compare(model, word_tokenizer)).max() > 1e-3


def test_rows_batches_and_company_do_not_matter(word_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    sources, _ = read(model, word_tokenizer, CONTEXTS)
    patches = some_patches(model, ActivationCapture(model).layers)
    expected = patched_log_probs(model, PROMPTS, ANSWERS, sources, patches)
    for budget, packed in ((4, True), (70, False)):
        monkeypatch.setattr(patching, "token_budget", lambda model, budget=budget: budget)
        monkeypatch.setattr(patching, "packs", lambda model, packed=packed: packed)
        found = patched_log_probs(model, PROMPTS, ANSWERS, sources, patches)
        np.testing.assert_allclose(found, expected, atol=2e-5)
    alone = [
        patched_log_probs(model, [p], [a], [s], patches)[0]
        for p, a, s in zip(PROMPTS, ANSWERS, sources, strict=True)
    ]
    np.testing.assert_allclose(alone, expected, atol=2e-5)


def test_adapters_see_the_patch(word_tokenizer: Any) -> None:
    """Projections of the patched model are LoRA layers, which get the base model's activations."""
    base = llama()
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False, lora_alpha=16
    )
    model = get_peft_model(llama(), config).eval()
    change = compare(model, word_tokenizer, source_model=base)
    sources, _ = read(base, word_tokenizer, CONTEXTS)
    with model.disable_adapter():
        without = patched_log_probs(
            model, PROMPTS, ANSWERS, sources, some_patches(model, ActivationCapture(model).layers)
        )
    assert np.abs(change - (without - without[:, :1])).max() > 0.01
