"""Text becomes ids in one place: plainly, or through chat templates of every temper."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from prompts.test_context import awkward, rows
from transformers import PreTrainedTokenizerFast

from ia2.data.examples import Example
from ia2.models.tokens import common_prefix, encode_answer, encode_prompt
from ia2.prompts.context import Contexts, DemonstrationContexts, FixedOrders, LeaveOneOut
from ia2.prompts.format import Rendering, render
from ia2.utils.errors import ConfigError, DataError

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


@lru_cache
def chatty(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer with a chat template, whose marks of turns are special tokens."""
    tokenizer = copy.deepcopy(awkward("gpt2"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATES[kind]
    return tokenizer


def shown(rendering: Rendering, ids: tuple[int, ...]) -> str:
    return str(rendering.tokenizer.decode(list(ids)))


DEMOS = [Example("Text: a\nLabel:", " good", "row 1"), Example("Text: b\nLabel:", " bad", "row 2")]
QUERY = Example("Text: c\nLabel:", " good", "row 3")


# ------------------------------------------------------------------------------------------- plain


@pytest.mark.parametrize("kind", ["gpt2", "unsplit"])
def test_plain_text_is_tokenised_as_ever(kind: str) -> None:
    tokenizer = awkward(kind)
    rendering = Rendering(tokenizer, "\n\n")
    assert rendering.query_ids(QUERY) == encode_prompt(tokenizer, QUERY.query)
    assert rendering.context_ids(DEMOS, QUERY) == encode_prompt(tokenizer, render(DEMOS, QUERY.query))
    with_text = rendering.context_ids([], QUERY, "Be brief.")
    assert with_text == encode_prompt(tokenizer, f"Be brief.\n\n{QUERY.query}")
    assert rendering.answer_text(QUERY) == " good"
    assert rendering.end_id == tokenizer.eos_token_id


def test_messages_need_a_template() -> None:
    with pytest.raises(DataError, match="row 3: the context is made of chat messages, which need"):
        Rendering(awkward("gpt2")).context_ids([], QUERY, [{"role": "user", "content": "hello"}])
    with pytest.raises(
        ConfigError, match=r"no chat template\. Leave --chat out, or take an instruction-tuned"
    ):
        Rendering(awkward("gpt2"), chat="turns")


# -------------------------------------------------------------------------------------------- chat


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("chat", ["turns", "single"])
def test_ids_are_those_of_the_template(kind: str, chat: Any) -> None:
    rendering = Rendering(chatty(kind), chat=chat)
    bare = [{"role": "user", "content": QUERY.query}]
    if chat == "turns":
        turns = [
            message
            for demo in DEMOS
            for message in (
                {"role": "user", "content": demo.query},
                {"role": "assistant", "content": (demo.answer or "").strip()},
            )
        ]
        context = [*turns, *bare]
    else:
        context = [{"role": "user", "content": render(DEMOS, QUERY.query)}]

    def template(messages: Any) -> tuple[int, ...]:
        options: Any = {"add_generation_prompt": True, "return_dict": False, "enable_thinking": False}
        return tuple(chatty(kind).apply_chat_template(messages, tokenize=True, **options))

    assert rendering.query_ids(QUERY) == template(bare)
    assert rendering.context_ids(DEMOS, QUERY) == template(context)
    assert rendering.context_ids([], QUERY) == rendering.query_ids(QUERY)


def test_answers_have_no_blank_before_them() -> None:
    rendering = Rendering(chatty("chatml"), chat="turns")
    assert rendering.answer_text(QUERY) == "good" == rendering.as_answer("\n good")
    assert rendering.as_answer("two words ") == "two words "
    # so that the answer behind a demonstration's prompt has the ids of that demonstration's turn
    whole = rendering.context_ids(DEMOS, QUERY)
    answer = encode_answer(chatty("chatml"), rendering.answer_text(DEMOS[0]))
    first = rendering.query_ids(DEMOS[0])
    assert whole[: len(first)] == first
    assert whole[len(first) : len(first) + len(answer)] == answer
    assert whole[len(first) + len(answer)] == rendering.end_id
    # in one turn, demonstrations are plain text
    assert "Label: good\n\n" in shown(
        rendering, Rendering(chatty("chatml"), chat="single").context_ids(DEMOS, QUERY)
    )


def test_thinking() -> None:
    off = Rendering(chatty("qwen"), chat="turns")
    on = Rendering(chatty("qwen"), chat="turns", thinking=True)
    block = encode_answer(chatty("qwen"), "<think>\n\n</think>\n\n")
    for ids in (off.query_ids(QUERY), off.context_ids(DEMOS, QUERY), off.context_ids([], QUERY, "Hm.")):
        assert shown(off, ids).count("<think>") == 1
        assert ids[-len(block) :] == block
    for ids in (on.query_ids(QUERY), on.context_ids(DEMOS, QUERY)):
        assert "<think>" not in shown(on, ids)
    assert off.facts() != on.facts()


@pytest.mark.parametrize("kind", TEMPLATES)
def test_free_text(kind: str) -> None:
    rendering = Rendering(chatty(kind), chat="turns")
    text = shown(rendering, rendering.context_ids(DEMOS, QUERY, "Be brief."))
    assert text.count("Be brief.") == 1  # neither refused nor swallowed
    if kind in ("chatml", "qwen"):
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nText: a")
    else:
        assert text.split("<|im_start|>", 1)[1].startswith(f"user\nBe brief.\n\n{DEMOS[0].query}<|im_end|>")


@pytest.mark.parametrize("kind", TEMPLATES)
def test_messages(kind: str) -> None:
    """TRL's ``privileged_context``: messages before the query's turn."""
    rendering = Rendering(chatty(kind), chat="turns")
    asked = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    text = shown(rendering, rendering.context_ids([], QUERY, asked))
    assert text.index("Who?") < text.index("Me.") < text.index(QUERY.query)
    assert text.count("<|im_start|>") == 4
    # a hint of the user and the query become one turn, since roles alternate
    hint = [{"role": "system", "content": "Rules."}, {"role": "user", "content": "A hint."}]
    text = shown(rendering, rendering.context_ids([], QUERY, hint))
    assert f"A hint.\n\n{QUERY.query}<|im_end|>" in text
    assert text.count("Rules.") == 1
    assert hint[1]["content"] == "A hint."  # what was given stays as it is


def test_a_template_that_refuses() -> None:
    rendering = Rendering(chatty("gemma"), chat="turns")
    with pytest.raises(DataError, match=r"row 3: the model's chat template refuses .*Roles must alternate"):
        rendering.context_ids([], QUERY, [{"role": "assistant", "content": "I begin."}])


def test_end_of_turn() -> None:
    tokenizer = chatty("gemma")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert Rendering(tokenizer, chat="turns").end_id == end != tokenizer.eos_token_id
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    assert Rendering(bare, chat="turns").end_id == tokenizer.eos_token_id


def test_facts() -> None:
    facts = [
        Rendering(chatty(kind), separator, chat, thinking).facts()
        for kind, separator, chat, thinking in (
            ("qwen", "\n\n", "off", False),
            ("qwen", "\n", "off", False),
            ("qwen", "\n\n", "turns", False),
            ("qwen", "\n\n", "turns", True),
            ("qwen", "\n\n", "single", False),
            ("gemma", "\n\n", "turns", False),
        )
    ]
    assert all(a != b for i, a in enumerate(facts) for b in facts[:i])


def test_todays_date_is_not_in_prompts() -> None:
    tokenizer = copy.deepcopy(chatty("chatml"))
    tokenizer.chat_template = (
        "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "Today: {{ date_string }}\n" + CHATML
    )
    rendering = Rendering(tokenizer, chat="turns")
    assert "Today: 26 Jul 2024" in shown(rendering, rendering.query_ids(QUERY))


# ----------------------------------------------------------------------------------------- lengths


@pytest.mark.parametrize("kind", ["gpt2", "unsplit", *TEMPLATES])
@pytest.mark.parametrize("chat", ["turns", "single"])
def test_lengths(kind: str, chat: Any) -> None:
    rendering = Rendering(chatty(kind), chat=chat) if kind in TEMPLATES else Rendering(awkward(kind))
    queries = [*rows(40), Example("", " x", "empty")]
    texts = [(rendering.prompt_text((), query), query.source) for query in queries]
    lengths = rendering.lengths(iter(texts))
    assert lengths.tolist() == [len(rendering.query_ids(query)) for query in queries]
    assert len(rendering.lengths([])) == len(rendering.demonstration_lengths([])) == 0
    # the parts add up to the whole, but for a token at each boundary
    demos = rows(7)
    total = int(rendering.demonstration_lengths(demos).sum()) + len(rendering.query_ids(QUERY))
    assert abs(len(rendering.context_ids(demos, QUERY)) - total) <= len(demos)


def test_words_without_special_tokens(word_tokenizer: PreTrainedTokenizerFast) -> None:
    rendering = Rendering(word_tokenizer)
    queries = rows(3)
    lengths = rendering.lengths((q.query, q.source) for q in queries)
    assert lengths.dtype == np.int32
    assert lengths.tolist() == [len(rendering.query_ids(q)) for q in queries]
    assert rendering.lengths([("", "empty")]).tolist() == [1]  # the beginning of sequence, as in a prompt


# ---------------------------------------------------------------------------------- whole contexts


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("chat", ["turns", "single"])
@pytest.mark.parametrize("window", [110, 150, 1000])
def test_contexts_of_a_chat_model(kind: str, chat: Any, window: int) -> None:
    rendering, examples = Rendering(chatty(kind), chat=chat), rows(9)
    contexts = DemonstrationContexts(rendering, examples, examples, LeaveOneOut(9, 2), window, 4)
    for i in range(9):
        for k in range(2):
            ids, order = contexts.context_ids(i, k), contexts.chosen(i, k)
            assert i not in order and order
            assert len(ids) <= window - 4
            # whole demonstrations
            assert ids == rendering.context_ids([examples[j] for j in order], examples[i])
        suffix = contexts.common_suffix(i)
        if chat == "turns":  # all but what comes before the first turn
            assert suffix >= len(contexts.query_ids(i)) - 1
        assert suffix > 5
    if window == 1000:
        assert contexts.dropped.demonstrations == 0
        assert all(len(contexts.chosen(i)) == 8 for i in range(9))
    else:
        assert contexts.dropped.demonstrations == sum(
            8 - len(contexts.chosen(i, k)) for i in range(9) for k in range(2)
        )


def test_pool_of_a_chat_model_shares_its_prefix() -> None:
    rendering = Rendering(chatty("chatml"), chat="turns")
    demos, queries = rows(5), rows(3, offset=30)
    contexts = DemonstrationContexts(rendering, queries, demos, FixedOrders([[0, 1, 2, 3, 4]]), 900, 4)
    prompts = [contexts.context_ids(i) for i in range(3)]
    assert common_prefix(prompts) > min(map(len, prompts)) * 0.7


def test_a_wrong_estimate_cuts_no_demonstration() -> None:
    """A template that makes later turns longer: lengths of parts do not add up."""
    tokenizer = copy.deepcopy(chatty("chatml"))
    tokenizer.chat_template = CHATML.replace(
        "{{ m.content }}", "{{ m.content }}{% for n in range(loop.index) %} the{% endfor %}"
    )
    rendering, examples = Rendering(tokenizer, chat="turns"), rows(9)
    contexts = DemonstrationContexts(rendering, examples, examples, LeaveOneOut(9), 160, 4)
    for i in range(9):
        ids, planned = contexts.context_ids(i), contexts.chosen(i)
        assert len(ids) <= 156
        known = [rendering.context_ids([examples[j] for j in planned[n:]], examples[i]) for n in range(9)]
        assert ids in known


def test_shorthands_are_plain(word_tokenizer: PreTrainedTokenizerFast) -> None:
    contexts = Contexts.pool(word_tokenizer, rows(2), rows(3), max_length=200, reserve=1, separator="|")
    assert contexts.rendering.chat == "off" and contexts.rendering.separator == "|"
