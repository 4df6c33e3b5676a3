"""Text becomes ids in one place: plainly, or through chat templates of every temper."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from helpers.prompts import CHATML, TEMPLATES, awkward, chatty, rows
from prompts.test_context import written

from ia2.data.examples import Example
from ia2.models.tokens import encode_answer, encode_prompt
from ia2.prompts.format import PromptFormat
from ia2.utils.errors import ConfigError, DataError

DEMOS = [Example("Text: a\nLabel:", " good", "row 1"), Example("Text: b\nLabel:", " bad", "row 2")]
QUERY = Example("Text: c\nLabel:", " good", "row 3")


def shown(prompt_format: PromptFormat, ids: tuple[int, ...]) -> str:
    return str(prompt_format.tokenizer.decode(list(ids)))


@pytest.mark.parametrize("kind", ["gpt2", "unsplit"])
def test_plain_text(kind: str) -> None:
    tokenizer = awkward(kind)
    plain = PromptFormat(tokenizer)
    assert plain.query_ids(QUERY) == encode_prompt(tokenizer, QUERY.query)
    assert plain.context_ids(DEMOS, QUERY) == encode_prompt(tokenizer, written(DEMOS, QUERY))
    with_text = PromptFormat(tokenizer, "|").context_ids(DEMOS, QUERY, "Be brief.")
    assert with_text == encode_prompt(
        tokenizer, "Be brief.|Text: a\nLabel: good|Text: b\nLabel: bad|Text: c\nLabel:"
    )
    assert plain.as_answer(" good") == " good" and plain.end_id == tokenizer.eos_token_id


def test_messages_need_a_template() -> None:
    with pytest.raises(DataError, match="row 3: the context is made of chat messages, which need"):
        PromptFormat(awkward("gpt2")).context_ids([], QUERY, [{"role": "user", "content": "hello"}])
    with pytest.raises(ConfigError, match="no chat template"):
        PromptFormat(awkward("gpt2"), chat="turns")


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("chat", ["turns", "single"])
def test_ids_are_those_of_the_template(kind: str, chat: Any) -> None:
    prompt_format = PromptFormat(chatty(kind), chat=chat)
    bare = [{"role": "user", "content": QUERY.query}]
    turns = []
    for demo in DEMOS:
        turns.append({"role": "user", "content": demo.query})
        turns.append({"role": "assistant", "content": (demo.answer or "").strip()})
    context = [*turns, *bare] if chat == "turns" else [{"role": "user", "content": written(DEMOS, QUERY)}]

    def template(messages: Any) -> tuple[int, ...]:
        options: Any = {"add_generation_prompt": True, "return_dict": False, "enable_thinking": False}
        return tuple(chatty(kind).apply_chat_template(messages, tokenize=True, **options))

    assert prompt_format.query_ids(QUERY) == template(bare)
    assert prompt_format.context_ids(DEMOS, QUERY) == template(context)
    assert prompt_format.context_ids([], QUERY) == prompt_format.query_ids(QUERY)


def test_answers_have_no_blank_before_them() -> None:
    """So the answer behind a demonstration's prompt has the ids of that demonstration's turn."""
    prompt_format = PromptFormat(chatty("chatml"), chat="turns")
    assert prompt_format.as_answer("\n good") == "good" and prompt_format.as_answer("a b ") == "a b "
    turn = prompt_format.query_ids(DEMOS[0]) + encode_answer(chatty("chatml"), "good")
    whole = prompt_format.context_ids(DEMOS, QUERY)
    assert whole[: len(turn)] == turn and whole[len(turn)] == prompt_format.end_id


def test_thinking() -> None:
    off, on = (PromptFormat(chatty("qwen"), chat="turns", thinking=on) for on in (False, True))
    block = encode_answer(chatty("qwen"), "<think>\n\n</think>\n\n")
    for demos, text in (([], None), (DEMOS, None), ([], "Hm.")):
        ids = off.context_ids(demos, QUERY, text)
        assert ids[-len(block) :] == block and shown(off, ids).count("<think>") == 1
        assert "<think>" not in shown(on, on.context_ids(demos, QUERY, text))


@pytest.mark.parametrize("kind", TEMPLATES)
def test_texts_and_messages_before_the_query(kind: str) -> None:
    """Neither refused nor swallowed, whether the template has a place for system messages or not."""
    prompt_format = PromptFormat(chatty(kind), chat="turns")
    text = shown(prompt_format, prompt_format.context_ids(DEMOS, QUERY, "Be brief."))
    system = kind in ("chatml", "qwen")
    first = "system\nBe brief.<|im_end|>\n" if system else f"user\nBe brief.\n\n{DEMOS[0].query}<|im_end|>"
    assert text.count("Be brief.") == 1 and text.split("<|im_start|>", 1)[1].startswith(first)
    asked = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    text = shown(prompt_format, prompt_format.context_ids([], QUERY, asked))
    assert text.index("Who?") < text.index("Me.") < text.index(QUERY.query)
    # a hint of the user and the query become one turn, since roles alternate
    hint = [{"role": "system", "content": "Rules."}, {"role": "user", "content": "A hint."}]
    text = shown(prompt_format, prompt_format.context_ids([], QUERY, hint))
    assert f"A hint.\n\n{QUERY.query}<|im_end|>" in text and text.count("Rules.") == 1
    assert hint[1]["content"] == "A hint."  # what was given stays as it is


def test_a_template_that_refuses() -> None:
    prompt_format = PromptFormat(chatty("gemma"), chat="turns")
    with pytest.raises(DataError, match=r"row 3: the model's chat template refuses .*Roles must alternate"):
        prompt_format.context_ids([], QUERY, [{"role": "assistant", "content": "I begin."}])


def test_end_of_turn() -> None:
    tokenizer = copy.deepcopy(chatty("gemma"))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert PromptFormat(tokenizer, chat="turns").end_id == end != tokenizer.eos_token_id
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    assert PromptFormat(tokenizer, chat="turns").end_id == tokenizer.eos_token_id


def test_todays_date_is_not_in_prompts() -> None:
    tokenizer = copy.deepcopy(chatty("chatml"))
    tokenizer.chat_template = (
        "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "Today: {{ date_string }}\n" + CHATML
    )
    prompt_format = PromptFormat(tokenizer, chat="turns")
    assert "Today: 26 Jul 2024" in shown(prompt_format, prompt_format.query_ids(QUERY))


@pytest.mark.parametrize("kind", ["gpt2", "unsplit", *TEMPLATES])
@pytest.mark.parametrize("chat", ["turns", "single"])
def test_lengths(kind: str, chat: Any) -> None:
    known = kind in TEMPLATES
    prompt_format = PromptFormat(chatty(kind), chat=chat) if known else PromptFormat(awkward(kind))
    queries = [*rows(40), Example("", " x", "empty")]
    lengths = prompt_format.lengths((prompt_format.prompt_text((), q), q.source) for q in queries)
    assert lengths.tolist() == [len(prompt_format.query_ids(query)) for query in queries]
    assert len(prompt_format.lengths([])) == len(prompt_format.demonstration_lengths([])) == 0
    # the parts add up to the whole, but for a token at each boundary
    demos = rows(7)
    total = int(prompt_format.demonstration_lengths(demos).sum()) + len(prompt_format.query_ids(QUERY))
    assert abs(len(prompt_format.context_ids(demos, QUERY)) - total) <= len(demos)
