"""What the base model says of demonstrations, held against passes written out."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from helpers.benches import word_examples
from helpers.families import FAMILIES, llama
from helpers.prompts import rows
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import PreTrainedTokenizerFast

from ia2.models.tokens import encode_answer
from ia2.prompts import ranking
from ia2.prompts.demonstrations import pool_orders
from ia2.prompts.format import PromptFormat
from ia2.prompts.ranking import embed_queries, log_likelihoods, search_orders


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_means_of_the_last_hidden_state(
    family: str, word_tokenizer: PreTrainedTokenizerFast
) -> None:
    model, prompt_format = FAMILIES[family](), PromptFormat(word_tokenizer)
    queries = [*rows(3), *rows(2, length=9)]
    found = embed_queries(model, prompt_format, queries)
    assert found.dtype == np.float32 and found.shape[0] == 5
    for query, row in zip(queries, found, strict=True):
        with torch.no_grad():
            ids = torch.tensor([prompt_format.query_ids(query)])
            last = model(ids, output_hidden_states=True).hidden_states[-1][0].float().mean(0).numpy()
        np.testing.assert_allclose(row, last, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
def test_the_adapter_is_off(kind: str, word_tokenizer: PreTrainedTokenizerFast) -> None:
    prompt_format = PromptFormat(word_tokenizer)
    expected = embed_queries(llama(), prompt_format, rows(4))
    configs: dict[str, Any] = {
        "lora": LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False),
        "prefix": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }
    adapted: Any = get_peft_model(llama(), configs[kind]).eval()
    np.testing.assert_array_equal(embed_queries(adapted, prompt_format, rows(4)), expected)
    with adapted.disable_adapter():  # also where it is off already
        np.testing.assert_array_equal(embed_queries(adapted, prompt_format, rows(4)), expected)


def naive_log_likelihood(model: Any, prompt: tuple[int, ...], answer: tuple[int, ...]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0].float().log_softmax(-1)
    return sum(float(logits[len(prompt) - 1 + n, token]) for n, token in enumerate(answer))


def test_the_search_finds_the_best_order(
    word_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    examples, model, prompt_format = word_examples(6, label_words=2), llama(), PromptFormat(word_tokenizer)
    caplog.set_level(logging.INFO, logger="ia2")
    ranked = search_orders(model, prompt_format, examples, window=250, reserve=5, tries=5, seed=1)
    orders = pool_orders(6, 5, 1)
    naive = []
    for order in orders:
        pairs = [
            (
                prompt_format.context_ids([examples[j] for j in order if j != i], example),
                encode_answer(word_tokenizer, example.answer or ""),
            )
            for i, example in enumerate(examples)
        ]
        scores = [naive_log_likelihood(model, *pair) for pair in pairs]
        np.testing.assert_allclose(log_likelihoods(model, word_tokenizer, pairs), scores, rtol=1e-4)
        naive.append(np.mean(scores))
    assert ranked == [orders[r] for r in np.argsort(-np.array(naive))]
    assert "5 orders on 6 of 6 examples (30 forward rows, " in caplog.text


def test_a_search_over_many_scores_some(
    word_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ranking, "SEARCH_EXAMPLES", 4)
    caplog.set_level(logging.INFO, logger="ia2")
    search_orders(
        llama(),
        PromptFormat(word_tokenizer),
        word_examples(12),
        window=250,
        reserve=5,
        tries=5,
        seed=1,
        most=3,
    )
    assert "5 orders on 4 of 12 examples (20 forward rows" in caplog.text
