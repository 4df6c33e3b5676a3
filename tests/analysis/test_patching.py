from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from helpers.families import ALL, HEADS, llama
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from ia2.analysis import patching
from ia2.analysis.patching import AnswerRuns, Layout, Patch, Unit, patched_log_probs
from ia2.models.capture import ActivationCapture
from ia2.models.forward import answer_pass
from ia2.models.sites import SiteCapture, has_site
from ia2.utils.errors import ModelError

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
        found += [(Unit("output", layer),), (Unit("residual", layer),), (Unit("heads", layer, (0, 3)),)]
        found += [(Unit("heads", layer, (head,)),) for head in range(HEADS)]
        if has_site(model, "neurons"):
            found.append((Unit("neurons", layer, (0, 5, 9)),))
    found.append(tuple(Unit("output", layer) for layer in layers))
    found.append(
        (Unit("heads", layers[0], (1,)), Unit("residual", layers[0], (2, 3)), Unit("output", layers[-1]))
    )
    return found


def plain(model: Any, prompt: Ids, answer: Ids, source: Any, patch: Patch) -> float:
    """One patch in one row without a cache, element by element."""
    handles = []
    for unit in patch:
        capture = ActivationCapture(model, site=unit.site)
        values = source[unit.site][capture.layers.index(unit.layer)]
        width = values.shape[-1]
        each = width // HEADS if unit.site == "heads" else 1
        columns = (
            range(width) if unit.parts is None else [p * each + c for p in unit.parts for c in range(each)]
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

        module = capture.hooked[unit.layer]
        handles.append(
            module.register_forward_pre_hook(on_input)
            if unit.site in ("heads", "neurons")
            else module.register_forward_hook(on_output)
        )
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer[:-1]]), use_cache=False).logits
    for handle in handles:
        handle.remove()
    rows = logits[0, -len(answer) :].log_softmax(-1)
    return sum(float(rows[place, token]) for place, token in enumerate(answer))


@contextmanager
def layouts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Which way each example was run."""
    seen: list[str] = []
    of: Callable[..., Any] = AnswerRuns.of

    def watched(self: Any, prompt: Ids, answer: Ids) -> Any:
        found = of(self, prompt, answer)
        seen.append("packed" if found.packed else "rows")
        return found

    with monkeypatch.context() as patched:
        patched.setattr(AnswerRuns, "of", watched)
        yield seen


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


# ------------------------------------------------------------------------------------------ exactness

# Rows: windows shorter than the prompts, distances that are told by other means than position ids; and
# recurrent layers, where there is no cache.
WAYS = {
    **dict.fromkeys(("llama", "gpt2", "gpt_neox", "opt", "mixtral"), "packed"),
    **dict.fromkeys(("gemma3", "bloom", "mpt", "lfm2"), "rows"),
}


@pytest.mark.parametrize("family", WAYS)
def test_against_a_plain_implementation(
    family: str, word_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ALL[family]()
    with layouts(monkeypatch) as seen:
        change = compare(model, word_tokenizer)
    assert set(seen) == {WAYS[family]}
    assert np.median(np.abs(change[:, 1:])) > 1e-3  # not a comparison of nothing with nothing


def test_windows_longer_than_the_prompts_are_packed(
    word_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from helpers.families import _GROUPED, build
    from transformers import Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention"]
    model = build(Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=64, layer_types=kinds))
    with layouts(monkeypatch) as seen:
        compare(model, word_tokenizer)
    assert set(seen) == {"packed"}


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


def test_virtual_tokens(word_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    with layouts(monkeypatch) as seen:
        change = compare(model, word_tokenizer)
    assert set(seen) == {"rows"} and np.abs(change).max() > 1e-3


def test_ways_and_batches_do_not_matter(word_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    sources, _ = read(model, word_tokenizer, CONTEXTS)
    patches = some_patches(model, ActivationCapture(model).layers)
    found = patched_log_probs(model, PROMPTS, ANSWERS, sources, patches)
    with monkeypatch.context() as patched:
        patched.setattr(patching, "token_budget", lambda model: 4)
        small = patched_log_probs(model, PROMPTS, ANSWERS, sources, patches)
    np.testing.assert_allclose(small, found, atol=2e-5)
    alone = [
        patched_log_probs(model, [p], [a], [s], patches)[0]
        for p, a, s in zip(PROMPTS, ANSWERS, sources, strict=True)
    ]
    np.testing.assert_allclose(alone, found, atol=2e-5)

    # a family that does not take the mask as it is meant is found out, and run as rows
    logits = Layout.logits

    def unmasked(self: Layout, count: int) -> Any:
        return logits(self, count) + (0.1 * torch.arange(128) if self.packed else 0)

    with monkeypatch.context() as patched, layouts(monkeypatch) as seen:
        patched.setattr(Layout, "logits", unmasked)
        np.testing.assert_allclose(
            patched_log_probs(model, PROMPTS, ANSWERS, sources, patches), found, atol=2e-5
        )
    assert set(seen) == {"rows"}
    monkeypatch.setattr(patching, "_may_pack", lambda model: False)
    monkeypatch.setattr(patching, "token_budget", lambda model: 70)
    rows = patched_log_probs(model, PROMPTS, ANSWERS, sources, patches)
    np.testing.assert_allclose(rows, found, atol=2e-5)


def test_a_prompt_of_one_token(word_tokenizer: Any) -> None:
    model = llama()
    with SiteCapture(model, ["output"]) as capture:
        output = next(answer_pass(model, word_tokenizer, [(PROMPTS[0], (7,))], capture=capture))
        assert output.activations is not None
        source = capture.split(output.activations)
    patch = (Unit("output", 1),)
    found = patched_log_probs(model, [(9,)], [(7,)], [source], [patch])
    assert found[0, 0] == pytest.approx(plain(model, (9,), (7,), source, patch), abs=2e-5)


def test_what_does_not_fit_is_refused(word_tokenizer: Any) -> None:
    model = llama()
    sources, _ = read(model, word_tokenizer, CONTEXTS)
    with pytest.raises(ValueError, match=r"output are \(2, 1, 32\); \[2, 3, w\]"):
        patched_log_probs(model, PROMPTS[:1], ANSWERS[1:2], sources[:1], [(Unit("output", 0),)])
    with pytest.raises(ValueError, match="layer 7 has no attention"):
        patched_log_probs(model, PROMPTS[:1], ANSWERS[:1], sources[:1], [(Unit("output", 7),)])
    with pytest.raises(ValueError, match="not there; there are 4"):
        patched_log_probs(model, PROMPTS[:1], ANSWERS[:1], sources[:1], [(Unit("heads", 0, (4,)),)])
    odd = [{"heads": sources[0]["heads"][..., :30]}]
    with pytest.raises(ModelError, match="do not divide into 4 heads"):
        patched_log_probs(model, PROMPTS[:1], ANSWERS[:1], odd, [(Unit("heads", 0, (0,)),)])
