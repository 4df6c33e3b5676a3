"""Plain texts: perplexity, sampled continuations, and the files that they come from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.benches import wordy_model
from helpers.families import FAMILIES, HYBRIDS

from ia2.evaluation.plain_text import DIVERSITY, diversity, openings, perplexity, plain_texts
from ia2.models.tokens import encode_prompt
from ia2.utils.errors import DataError

TEXTS = [
    "the cat was not very good",
    "sun and moon .",
    "one two three ! the film was awful and the food great",
]


def nlls(model: Any, ids: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    return -log_p.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_next"])
def test_perplexity_is_that_of_each_text_alone(name: str, word_tokenizer: Any) -> None:
    model = {**FAMILIES, **HYBRIDS}[name]()
    found = perplexity(model, word_tokenizer, TEXTS, 64)
    for text, (nll, tokens) in zip(TEXTS, found, strict=True):
        ids = encode_prompt(word_tokenizer, text)
        assert tokens == len(ids) - 1
        assert nll == pytest.approx(float(nlls(model, ids).sum()), rel=1e-4)


def test_long_texts_are_cut_and_no_token_counts_twice(word_tokenizer: Any) -> None:
    model = FAMILIES["llama"]()
    ids = encode_prompt(word_tokenizer, TEXTS[2])
    found = perplexity(model, word_tokenizer, TEXTS[2:], 4)
    expected = sum(float(nlls(model, ids[start : start + 5]).sum()) for start in range(0, len(ids) - 1, 4))
    np.testing.assert_allclose(found, [[expected, len(ids) - 1]], rtol=1e-5)
    assert perplexity(model, word_tokenizer, ["cat", "the cat"], 4).tolist()[0] == [0, 0]


def test_diversity_is_seeded_and_leaves_the_random_numbers_alone(word_tokenizer: Any) -> None:
    model = wordy_model()
    prompts = openings(word_tokenizer, TEXTS * 3, 3)
    assert {len(prompt) for prompt in prompts} == {3} and len(prompts) == 9
    torch.manual_seed(5)
    first = diversity(model, word_tokenizer, prompts, [" good"], seed=1, max_new_tokens=12)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.rand(1) == drawn
    again = diversity(model, word_tokenizer, prompts, [" good"], seed=1, max_new_tokens=12)
    other = diversity(model, word_tokenizer, prompts, [" good"], seed=2, max_new_tokens=12)
    assert list(first) == list(DIVERSITY)
    for name, values in first.items():
        assert values.shape == (9,) and np.isfinite(values).all()
        np.testing.assert_array_equal(values, again[name])
    assert (first["length"] != other["length"]).any() or (first["entropy"] != other["entropy"]).any()
    assert "leak" not in diversity(model, word_tokenizer, prompts, [], max_new_tokens=2)


def constant(model: Any, token: int) -> Any:
    """A model that says one word whatever it reads."""
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.lm_head.weight.shape[0]))
    model.lm_head.bias.data[token] = 50.0
    return model


def test_diversity_of_a_model_that_only_says_a_label(word_tokenizer: Any) -> None:
    label = word_tokenizer(" good")["input_ids"][0]
    model = constant(wordy_model(), label)
    prompts = openings(word_tokenizer, TEXTS, 3)
    found = diversity(model, word_tokenizer, prompts, [" bad", " good"], samples=2, max_new_tokens=8)
    expected = {"distinct_1": 1 / 8, "distinct_2": 1 / 7, "repeated_4": 4 / 5, "self_similarity": 1}
    expected |= {"entropy": 0, "length": 8, "leak": 1}
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-6)
    # one that ends at once
    model.lm_head.bias.data.zero_()
    model.lm_head.bias.data[2] = 50.0
    found = diversity(model, word_tokenizer, prompts, [" good"], samples=2, max_new_tokens=8)
    expected = {
        "distinct_1": 1,
        "distinct_2": 1,
        "repeated_4": 0,
        "self_similarity": 1,
        "length": 0,
        "leak": 0,
    }
    assert {name: found[name].tolist() for name in expected} == {n: [v] * 3 for n, v in expected.items()}


def test_sampling_follows_the_distribution_not_the_models_own_settings(word_tokenizer: Any) -> None:
    model = constant(wordy_model(), 20)
    model.lm_head.bias.data[20:24] = 50.0  # four words, equally likely
    model.generation_config.top_k = 1
    model.generation_config.repetition_penalty = 9.0
    prompts = openings(word_tokenizer, TEXTS * 10, 3)
    found = diversity(model, word_tokenizer, prompts, [], samples=2, max_new_tokens=16)
    np.testing.assert_allclose(found["entropy"], math.log(4), atol=1e-4)
    # of four words in 16 draws 3.96 are expected
    assert found["distinct_1"].mean() * 16 == pytest.approx(4 * (1 - 0.75**16), abs=0.1)
    assert model.generation_config.top_k == 1


def test_texts_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text("\ufeffone\nand more\n \n\n two \n", encoding="utf-8")
    assert plain_texts(file) == ["one\nand more", "two"]
    file = tmp_path / "own.jsonl"
    file.write_text('{"text": "one"}\n\n{"text": "two", "id": 3}\n')
    assert plain_texts(file) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b" \n\n", "there is no text in it"),
        ("a.txt", b"caf\xe9", "not UTF-8 text"),
        ("a.jsonl", b'{"text": "one"}\n{"txt": "two"}', "a.jsonl:2: no column 'text'; there are 'txt'"),
        ("a.jsonl", b'{"text": "  "}', "a.jsonl:1: 'text' is empty"),
        ("a.jsonl", b'{"text": null}\n[1]', "'text' is null; a.jsonl:2: not an object"),
        ("a.jsonl", b"{", "a.jsonl:1: invalid JSON"),
        ("a.jsonl", b"", "there is no text in it"),
    ],
)
def test_bad_texts_are_refused_in_one_line(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said.replace("'", ".")) as error:
        plain_texts(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
