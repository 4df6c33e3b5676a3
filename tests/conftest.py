"""Shared fixtures: a word-level tokenizer, tiny random models, the small trained model, shared data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

# Before transformers is imported: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_WORDS = """
    Text Label Question Answer positive negative yes no 0 1 a b c d e f g h red green blue good bad great
    awful fine film food song day night cat dog bird fish sun one two three the was is very not and in
"""
_SIGNS = [":", "\n", "\n\n", ".", ",", "!", "?", " "]


def make_word_tokenizer(model_max_length: int = 256) -> PreTrainedTokenizerFast:
    """One id a word, with and without a blank before it, so that decoding gives the text back."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = _WORDS.split()
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *_SIGNS, *words, *(f" {word}" for word in words)]
    vocabulary = {token: place for place, token in enumerate(tokens)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n\n|\n|[:.,!?]| ?[A-Za-z0-9]+| "), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=model_max_length,
    )


@pytest.fixture(scope="session")
def word_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer without special tokens around a text; its ids fit ``families``."""
    return make_word_tokenizer()


@pytest.fixture
def tiny_llama() -> PreTrainedModel:
    """A fresh tiny random Llama (see ``families``), which the test may change."""
    from families import llama

    return llama()


@pytest.fixture(scope="session")
def tiny_icl_model_path() -> Path:
    """Folder of the small model, kept in the repository, that has learnt to learn in context."""
    path = Path(__file__).parent / "tiny_icl" / "model"
    if not (path / "config.json").is_file():
        pytest.skip(f"the small trained model is not in {path}")
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the benchmarks' files: ``IA2_TEST_DATA``, else ``shared/data`` beside the repository."""
    given = os.environ.get("IA2_TEST_DATA")
    path = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no benchmark data in {path}; set IA2_TEST_DATA")
    return path
