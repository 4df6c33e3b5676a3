"""Train → save → load → evaluate on every model family, from a folder as a hub download leaves it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.benches import word_examples
from helpers.families import ALL, HYBRIDS, LAYERS, VOCABULARY, attention_layers
from helpers.words import make_word_tokenizer
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from ia2.adapters.weights import base_weights
from ia2.config import AdaptConfig
from ia2.data.examples import Examples, FewShotSplit
from ia2.experiment.adapt import adapt, load_adapter
from ia2.experiment.predict import evaluate_adapter

SETTINGS: dict[str, Any] = {
    "recipe": "ia2-sft",
    "learning_rates": [1e-2],
    "align": {"epochs": 2},
    "sft": {"epochs": 1},
}


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """The word tokenizer; for Qwen2, whose tokenizers AutoTokenizer always reads as its own kind, that kind.

    It is byte-level: the letters of the rows, and each label as one token.
    """
    if name != "qwen2":
        return make_word_tokenizer()
    labels = ["Ġpositive", "Ġnegative"]
    parts = [label[:n] for label in labels for n in range(2, len(label) + 1)]
    letters = "abcdefghijklmnopqrstuvwxyzLT:ĠĊ"
    vocabulary = {t: i for i, t in enumerate(["<pad>", "<s>", "</s>", *letters, *parts])}
    assert len(vocabulary) <= VOCABULARY
    return Qwen2Tokenizer(
        vocabulary,
        [(part[:-1], part[-1]) for part in parts],
        unk_token=None,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=256,
    )


@pytest.mark.parametrize("name", list(ALL))
def test_train_save_load_evaluate(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = ALL[name]()
    model.save_pretrained(tmp_path / "model")
    tokenizer_of(name).save_pretrained(tmp_path / "model")
    rows = word_examples(10)
    train, dev, test = (Examples(rows[a:b], name="words") for a, b in ((0, 4), (4, 6), (6, 10)))
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps({"prompt": r.query, "completion": r.answer}) + "\n" for r in test))

    with caplog.at_level(logging.INFO):
        trained = adapt(
            str(tmp_path / "model"),
            FewShotSplit(train, dev),
            AdaptConfig(**SETTINGS),
            test=test,
            output_dir=tmp_path / "run",
        )
    hybrid = [line for line in caplog.messages if line.startswith("Hybrid model")]
    listed = attention_layers(name)
    if name in HYBRIDS:
        assert hybrid == [
            f"Hybrid model: 2 of 4 layers have full attention ({listed[0]}, {listed[1]}); only these are "
            "aligned and compared."
        ]
    else:
        assert hybrid == []
        assert len(listed) == LAYERS

    _, predictions = evaluate_adapter(tmp_path / "run", str(file), device="cpu")
    assert [p.predicted for p in predictions] == [p.predicted for p in trained.predictions]
    assert [p.confidence for p in predictions] == pytest.approx([p.confidence for p in trained.predictions])

    loaded, _ = load_adapter(tmp_path / "run", device="cpu")
    ids = torch.arange(4, 24).reshape(2, 10)
    with torch.no_grad():
        before = trained.model(input_ids=ids).logits
        after = loaded.model(input_ids=ids).logits
        with base_weights(loaded.model):
            untouched = loaded.model(input_ids=ids).logits
        original = model(input_ids=ids).logits
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(untouched, original, atol=1e-5, rtol=1e-5)
    assert (after - untouched).abs().max() > 1e-2, "the adapter does nothing"
