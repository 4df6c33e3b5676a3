"""Text becomes prompt ids: plainly, or through a model's chat template.

The answer is tokenised apart and its ids are appended (:mod:`ia2.models.tokens`), so one answer has the same
ids in every context.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ia2.data.examples import Example
from ia2.models.tokens import Ids, encode_answer, encode_prompt, encode_prompts, encode_texts, remembered
from ia2.prompts.templates import apply_template
from ia2.utils.errors import ConfigError, DataError
from ia2.utils.files import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]  # role and content
Preamble = str | Sequence[Message]

# Stands for a text whose position in a rendered template is looked for.
_MARK = "ia2-mark-7f3a"

# Texts that are tokenised together.
_BATCH = 512


class PromptFormat:
    """How one tokenizer's prompts are written.

    Args:
        tokenizer: of the model.
        separator: text after a demonstration, and after a free text.
        chat: ``off``: plain text. ``turns``: through the chat template, each demonstration a user turn
            and an assistant turn. ``single``: all demonstrations as plain text in the query's own turn.
        thinking: leave a chat model's thinking switched on.

    Raises:
        ConfigError: ``chat`` with a tokenizer that has no chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        separator: str = "\n\n",
        chat: Literal["off", "turns", "single"] = "off",
        thinking: bool = False,
    ) -> None:
        self.tokenizer, self.separator, self.chat, self.thinking = tokenizer, separator, chat, thinking
        if chat != "off" and not tokenizer.chat_template:
            name = getattr(tokenizer, "name_or_path", "") or "the model"
            raise ConfigError(
                f"chat is {chat}, but {name} has no chat template. Leave --chat out, or take an "
                "instruction-tuned model."
            )

    def query_ids(self, example: Example) -> Ids:
        """Ids of a query on its own, ``X``."""
        if self.chat == "off":
            return self.encode(example.query, example.source)
        # a template takes as long as the tokenizer
        kind, make = f"query {self._style}", lambda: self.context_ids((), example)
        return remembered(self.tokenizer, kind, example.query, make)

    def context_ids(
        self, demonstrations: Sequence[Example], example: Example, text: Preamble | None = None
    ) -> Ids:
        """Ids of a query behind its context, ``I ∘ X``: a text or chat messages, then demonstrations.

        Raises:
            DataError: chat messages without a chat template, or a template that refuses them.
        """
        return self.encode(self.prompt_text(demonstrations, example, text), example.source)

    def as_answer(self, answer: str) -> str:
        """A completion as the model is to write it: verbatim, but behind a chat template it begins a turn.

        Templates cut blanks off the beginning of a turn, so a true answer must have none either.
        """
        return answer if self.chat == "off" else answer.lstrip()

    @cached_property
    def end_id(self) -> int | None:
        """The id with which an answer ends: the template's end of turn, else the end of sequence."""
        end = self.tokenizer.eos_token_id
        if self.chat != "off":
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
            after = self._through_template(turns, "end of turn", prompt=False).partition(_MARK)[2]
            (ids,) = encode_texts(self.tokenizer, [after])
            if ids and ids[0] in self.tokenizer.all_special_ids:
                end = ids[0]
        return None if end is None else int(end)

    def facts(self) -> dict[str, Any]:
        """What a prompt depends on beside the texts and the tokenizer; JSON-able."""
        template = digest(self.tokenizer.chat_template) if self.chat != "off" else None
        style = {"separator": self.separator, "chat": self.chat, "thinking": self.thinking}
        return {**style, "template": template}

    @cached_property
    def _style(self) -> str:
        return digest(self.facts())

    def prompt_text(
        self, demonstrations: Sequence[Example], example: Example, text: Preamble | None = None
    ) -> str:
        """What :meth:`context_ids` makes ids of."""
        query = example.query
        if self.chat != "turns":
            query = "".join(self._plain(demo) for demo in demonstrations) + query
        if self.chat == "off":
            if text is None:
                return query
            if isinstance(text, str):
                return text + self.separator + query
            raise DataError(
                f"{example.source}: the context is made of chat messages, which need the model's chat "
                "template. Set chat to turns, or give a text."
            )
        system = [{"role": "system", "content": text}] if isinstance(text, str) else text or ()
        messages: list[Message] = [*system]
        if self.chat == "turns":
            for demo in demonstrations:
                messages.append({"role": "user", "content": demo.query})
                messages.append({"role": "assistant", "content": self.as_answer(demo.answer or "")})
        messages.append({"role": "user", "content": query})
        return self._through_template(self._acceptable(messages), example.source)

    def _plain(self, demonstration: Example) -> str:
        return f"{demonstration.query}{demonstration.answer}{self.separator}"

    def encode(self, text: str, source: str = "prompt") -> Ids:
        """Ids of a prompt text; a template brings its special tokens itself."""
        encode = encode_prompt if self.chat == "off" else encode_answer
        return encode(self.tokenizer, text, source)

    def _acceptable(self, messages: Sequence[Message]) -> list[Message]:
        """Without system messages where the template has no place for them; one turn a role at a time.

        Many templates insist on turns, so neighbours of one role become one message.
        """
        turns: list[Message] = []
        waiting: list[str] = []
        for message in messages:
            role, content = message["role"], message["content"]
            if role == "system" and not self._takes_system:
                waiting.append(content)
                continue
            if role == "user" and waiting:
                content, waiting = self.separator.join([*waiting, content]), []
            if turns and turns[-1]["role"] == role:
                turns[-1]["content"] += self.separator + content
            else:
                turns.append({"role": role, "content": content})
        return turns

    @cached_property
    def _takes_system(self) -> bool:
        # Some templates raise, others leave the message out.
        messages = [{"role": "system", "content": _MARK}, {"role": "user", "content": "a"}]
        try:
            return _MARK in self._through_template(messages, "system message")
        except DataError:
            return False

    def _through_template(self, messages: list[Message], source: str, *, prompt: bool = True) -> str:
        # the names under which templates know the switch; others ignore them
        switch = {"enable_thinking": self.thinking, "thinking": self.thinking}
        # Llama's templates write today's date otherwise, and tomorrow's prompts would differ
        date = "26 Jul 2024"
        return apply_template(
            self.tokenizer, messages, source, add_generation_prompt=prompt, date_string=date, **switch
        )

    def lengths(self, prompts: Iterable[tuple[str, str]]) -> np.ndarray:
        """Number of ids of each (prompt text, source of its query), ``[n]``; read batch by batch."""
        encode = encode_prompts if self.chat == "off" else encode_texts
        lengths: list[int] = []
        for batch in _batches(prompts):
            rows = encode(self.tokenizer, [text for text, _ in batch])
            # what has no tokens is mended or refused by encode
            lengths += [len(ids or self.encode(*prompt)) for ids, prompt in zip(rows, batch, strict=True)]
        return np.array(lengths, np.int32)

    def demonstration_lengths(self, demonstrations: Iterable[Example]) -> np.ndarray:
        """About how many ids each demonstration adds to a prompt, ``[n]``.

        Tokens may merge across a boundary: at most one more each, in practice.
        """
        if self.chat == "turns":
            probe = Example("a", None, "chat template")
            prompts = ((self.prompt_text([d], probe), d.source) for d in demonstrations)
            return self.lengths(prompts) - np.int32(len(self.query_ids(probe)))
        texts = map(self._plain, demonstrations)
        lengths = [len(ids) for batch in _batches(texts) for ids in encode_texts(self.tokenizer, batch)]
        return np.array(lengths, np.int32)


def _batches(items: Iterable[Any]) -> Iterator[list[Any]]:
    items = iter(items)
    while batch := list(itertools.islice(items, _BATCH)):
        yield batch
