"""A word-level tokenizer whose ids fit the tiny random models of ``families``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

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
