"""Tokenizers of every temper, with and without chat templates, and prompts of small examples."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ia2.config import AdaptConfig
from ia2.data.examples import Example
from ia2.models.load import BaseModel
from ia2.prompts.builder import PromptBuilder
from ia2.prompts.context import Contexts

WORDS = ["good", "bad", "film", "food", "cat", "dog", "red", "blue", "one", "two"]

CHATML = """\
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

QWEN = """\
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""

GEMMA = """\
{{ bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{%- set role = 'model' if m.role == 'assistant' else m.role %}<|im_start|>{{ role }}
{{ m.content | trim }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>model
{% endif %}"""

# leaves system messages out without a word
DEAF = CHATML.replace(
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n",
    "{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endif %}",
)

TEMPLATES = {"chatml": CHATML, "qwen": QWEN, "gemma": GEMMA, "deaf": DEAF}


def rows(count: int, length: int = 1, offset: int = 0) -> list[Example]:
    """Examples that differ from each other, with texts of ``length`` words and more."""
    out = []
    for i in range(offset, offset + count):
        text = " ".join([WORDS[i % 10], WORDS[i // 10 % 10]] + ["the"] * (length + i % 3))
        out.append(Example(f"Text: {text}\nLabel:", " positive" if i % 2 else " negative", f"row {i}"))
    return out


@lru_cache
def awkward(kind: str) -> PreTrainedTokenizerFast:
    """Tokenizers whose tokens depend on what comes next, across the boundaries of demonstrations."""
    corpus = [f"Text: {a} {b}\nLabel: positive\n\nText: {b}ab\nLabel: negative" for a in WORDS for b in WORDS]
    inner = Tokenizer(models.BPE())
    if kind == "gpt2":  # line breaks before a letter: all but the last are one token
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\s+(?!\S)|\s+| ?\w+| ?[^\s\w]+"), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:  # nothing stops a merge: tokens reach from one demonstration into the next
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(corpus, trainer)
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


@lru_cache
def chatty(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer with a chat template, whose marks of turns are special tokens."""
    tokenizer = copy.deepcopy(awkward("gpt2"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATES[kind]
    return tokenizer


def builder(
    tokenizer: Any,
    train: Sequence[Example],
    window: int = 400,
    reserve: int = 5,
    model: Any = None,
    function: Any = None,
    **settings: Any,
) -> PromptBuilder:
    """Prompts of training examples; without a model nothing may ask for it."""
    base = BaseModel(model, tokenizer, "tiny", "tiny", identity={"model": "tiny"})
    return PromptBuilder(base, reserve, window, train, AdaptConfig(**settings), function)


def leave_one_out(
    tokenizer: Any, train: Sequence[Example], window: int, reserve: int, permutations: int = 1, seed: int = 0
) -> Contexts:
    """Each example behind the others, in random orders."""
    return builder(tokenizer, train, window, reserve, context_draws=permutations, seed=seed).train_contexts
