"""Token ids, answer positions and right-padded batches.

The unit that flows through the package is *one answer in two contexts*. Prompt and answer are
tokenised apart and their ids concatenated, so the answer ids are the same in every context. For a
prompt of P ids and an answer of G ids the model is fed ``prompt + answer[:-1]``, P + G − 1 ids; the
**answer positions**, whose logits predict the answer, are then simply the last G positions::

    position    0 … P-2   P-1        P          …  P+G-2
    fed         prompt    prompt[-1] answer[0]  …  answer[G-2]
    predicts              answer[0]  answer[1]  …  answer[G-1]

Counting from the right end of a row also stays true when an adapter lengthens the sequence on the
left (prompt tuning, p-tuning).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ia2.utils.errors import DataError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]


# Ids that are kept for each tokenizer, of so many texts.
_KEPT_IDS = 1 << 19
_KEPT_TEXTS = 1 << 14
_WAYS = 8


class _Kept:
    """Ids of the texts that were asked for last, in memory that never grows (some 2.5 MB).

    Ids lie in a ring, the newest over the oldest. A text is known by a digest of 64 bits, and has one of a
    few slots in a table.
    """

    def __init__(self) -> None:
        self._ring = array("i", bytes(4 * _KEPT_IDS))
        self._end = 0  # ids written so far
        self._keys = array("Q", bytes(8 * _KEPT_TEXTS))
        self._starts = array("q", [-_KEPT_IDS - 1]) * _KEPT_TEXTS
        self._lengths = array("i", bytes(4 * _KEPT_TEXTS))

    def get(self, key: int) -> Ids | None:
        """None where they were never there, or others have taken their place."""
        first = self._first(key)
        try:
            slot = self._keys.index(key, first, first + _WAYS)
        except ValueError:
            return None
        if (start := self._starts[slot]) < self._end - _KEPT_IDS:
            return None
        place = start % _KEPT_IDS
        return tuple(self._ring[place : place + self._lengths[slot]])

    def put(self, key: int, ids: Ids) -> None:
        if len(ids) > _KEPT_IDS:
            return
        if self._end % _KEPT_IDS + len(ids) > _KEPT_IDS:  # in one piece
            self._end += _KEPT_IDS - self._end % _KEPT_IDS
        first = self._first(key)
        slots = range(first, first + _WAYS)
        slot = min(slots, key=lambda n: (self._keys[n] != key, self._starts[n]))
        self._keys[slot], self._starts[slot], self._lengths[slot] = key, self._end, len(ids)
        place = self._end % _KEPT_IDS
        self._ring[place : place + len(ids)] = array("i", ids)
        self._end += len(ids)

    @staticmethod
    def _first(key: int) -> int:
        return key % (_KEPT_TEXTS // _WAYS) * _WAYS


_KEPT: WeakKeyDictionary[Any, _Kept] = WeakKeyDictionary()


def remembered(tokenizer: PreTrainedTokenizerBase, kind: str, text: str, make: Callable[[], Ids]) -> Ids:
    """The ids of a text, made once while they are among those that were asked for last.

    Args:
        tokenizer: whose ids they are; it must not change meanwhile.
        kind: tells apart ids of one text that are made in different ways.
        text: what they are made of.
        make: makes them.

    Example:
        >>> class Tokenizer: ...
        >>> tokenizer = Tokenizer()
        >>> remembered(tokenizer, "answer", "a b", lambda: (1, 2))
        (1, 2)
        >>> remembered(tokenizer, "answer", "a b", lambda: 1 / 0)
        (1, 2)
    """
    kept, key = _kept(tokenizer), _key(kind, text)
    ids = kept.get(key)
    if ids is None:
        ids = make()
        kept.put(key, ids)
    return ids


def _kept(tokenizer: PreTrainedTokenizerBase) -> _Kept:
    if tokenizer not in _KEPT:
        _KEPT[tokenizer] = _Kept()
    return _KEPT[tokenizer]


def _key(kind: str, text: str) -> int:
    told = f"{kind}\0{text}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "little")


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special: bool) -> list[Ids]:
    """What the tokenizer makes of texts, each tokenised once, those that are new in one call."""
    kept, kind = _kept(tokenizer), f"special {special}"
    keys = [_key(kind, text) for text in texts]
    found = {key: kept.get(key) for key in keys}
    new = {key: text for key, text in zip(keys, texts, strict=True) if found[key] is None}
    if new:
        made = tokenizer(
            list(new.values()),
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        for key, ids in zip(new, made, strict=True):
            found[key] = row = tuple(ids)
            kept.put(key, row)
    return [found[key] or () for key in keys]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Ids]:
    """Ids of whole prompts, as of :func:`encode_prompt`; empty where a text has no token.

    Example:
        >>> class Letters:
        ...     def __call__(self, texts, add_special_tokens, **options):
        ...         first = [1] if add_special_tokens else []
        ...         return {"input_ids": [[*first, *map(ord, text)] for text in texts]}
        >>> encode_prompts(Letters(), ["ab", ""])
        [(1, 97, 98), ()]
    """
    rows = _encode(tokenizer, texts, True)
    (probe,), (plain_probe,) = _encode(tokenizer, ["a"], True), _encode(tokenizer, ["a"], False)
    before = len(probe) - len(plain_probe)
    if probe[before:] == plain_probe:  # this tokenizer puts nothing behind a text
        return [ids if len(ids) > before else () for ids in rows]
    found = []
    for ids, plain in zip(rows, _encode(tokenizer, texts, False), strict=True):
        # What was appended is what follows the plain ids; the text may itself end in special tokens.
        starts = range(len(ids) - len(plain) + 1)
        start = next((n for n in starts if ids[n : n + len(plain)] == plain), None)
        found.append(ids if start is None else ids[: start + len(plain)])
    return found


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, source: str = "prompt") -> Ids:
    """Ids of a whole prompt, with the special tokens the tokenizer puts before a text.

    Special tokens that the tokenizer puts *after* a text (an end-of-sequence token, a ``[SEP]``) are
    left off: the answer follows directly.

    Raises:
        DataError: the text gives no token at all (there is then no position that predicts).
    """
    (ids,) = encode_prompts(tokenizer, [text])
    if not ids and tokenizer.bos_token_id is not None:
        ids = (int(tokenizer.bos_token_id),)
    if not ids:
        raise DataError(f"{source}: the prompt {text!r} has no tokens.")
    return ids


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Ids]:
    """Ids of texts on their own, without special tokens; each text is tokenised once.

    Example:
        >>> class Letters:
        ...     def __call__(self, texts, **options):
        ...         return {"input_ids": [list(map(ord, text)) for text in texts]}
        >>> encode_texts(Letters(), [" a", " b"])
        [(32, 97), (32, 98)]
    """
    return _encode(tokenizer, texts, False)


def encode_answer(tokenizer: PreTrainedTokenizerBase, text: str, source: str = "answer") -> Ids:
    """Ids of an answer on its own, without special tokens.

    Raises:
        DataError: the text gives no token.
    """
    (ids,) = encode_texts(tokenizer, [text])
    if not ids:
        raise DataError(f"{source}: the completion {text!r} has no tokens.")
    return ids


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of an answer, special tokens left out, spaces as generated."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to fill rows with. Padding is masked, so any id in the vocabulary serves."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id):
        if token is not None:
            return int(token)
    return 0


def fed_ids(prompt: Ids, answer: Ids) -> Ids:
    """What the model is fed so that its last ``len(answer)`` positions predict the answer."""
    return prompt + answer[:-1]


def common_prefix(rows: Sequence[Ids]) -> int:
    """Number of leading ids that all rows share.

    Prefixes are found by comparing ids: text cannot be split reliably, since tokens merge across
    boundaries.
    """
    if not rows:
        return 0
    first, last = min(rows), max(rows)  # in lexicographic order the extremes differ earliest
    length = 0
    for a, b in zip(first, last, strict=False):
        if a != b:
            break
        length += 1
    return length


@dataclass(frozen=True)
class Batch:
    """Right-padded rows, or rows side by side in one (a pack, see :mod:`ia2.models.packing`).

    Attributes:
        input_ids: ``[B, T]``; of a pack ``[1, T]``.
        attention_mask: ``[B, T]``, 1 for real ids (and for a cached prefix, where there is one); None of a
            pack, whose mask depends on the model.
        answer_lengths: G of each row.
        row_lengths: real ids of each row.
        position_ids: of a pack, each id's position in its own row, ``[1, T]``.
        kept: of a pack, where its answer positions are, ``[ΣG]``.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    answer_lengths: list[int]
    row_lengths: list[int]
    position_ids: torch.Tensor | None = None
    kept: torch.Tensor | None = None

    def of(self, members: Sequence[int]) -> Batch:
        """Some of the padded rows, no wider than the longest of them."""
        lengths = [self.row_lengths[i] for i in members]
        assert self.attention_mask is not None
        return Batch(
            self.input_ids[list(members), : max(lengths)],
            self.attention_mask[list(members), : max(lengths)],
            [self.answer_lengths[i] for i in members],
            lengths,
        )

    def keep(self, device: torch.device | str = "cpu") -> int | torch.Tensor:
        """Where the head is to run, as ``logits_to_keep`` of a transformers model takes it.

        Of a pack the answer positions, on ``device``; of padded rows, how many positions from the right end
        hold every row's.
        """
        if self.kept is not None:
            return self.kept.to(device)
        starts = [n - g for n, g in zip(self.row_lengths, self.answer_lengths, strict=True)]
        return int(self.input_ids.shape[1] - min(starts))

    def index(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the answer positions are in a tensor whose second axis is the sequence, ``width`` long.

        Returns:
            Row and position indices, each ``[ΣG]`` (see :func:`answer_index`).
        """
        if self.kept is None:
            return answer_index(width, self.row_lengths, self.answer_lengths, self.input_ids.shape[1])
        import torch

        return torch.zeros_like(self.kept), self.kept


def pad_rows(rows: Sequence[Ids], answer_lengths: Sequence[int], padding: int) -> Batch:
    """Right-pad rows of ids (see :func:`fed_ids`) into a batch."""
    import torch

    width = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), width), padding, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = 1
    return Batch(input_ids, mask, list(answer_lengths), [len(row) for row in rows])


def answer_index(
    width: int, row_lengths: Sequence[int], answer_lengths: Sequence[int], fed_width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the answer positions are in a tensor whose second axis is the sequence.

    Args:
        width: length of that axis. It may be shorter than what was fed (only the last positions
            were kept) or longer (virtual tokens on the left).
        row_lengths: real ids of each row as fed.
        answer_lengths: G of each row.
        fed_width: padded width as fed.

    Returns:
        Row and position indices, each ``[ΣG]``, rows in order, positions from left to right.
    """
    import torch

    rows: list[int] = []
    positions: list[int] = []
    for row, (n, g) in enumerate(zip(row_lengths, answer_lengths, strict=True)):
        end = width - (fed_width - n)
        rows += [row] * g
        positions += range(end - g, end)
    return torch.tensor(rows), torch.tensor(positions)
