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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ia2.errors import DataError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, source: str = "prompt") -> Ids:
    """Ids of a whole prompt, with the special tokens the tokenizer puts before a text.

    Special tokens that the tokenizer puts *after* a text (an end-of-sequence token, a ``[SEP]``) are
    left off: the answer follows directly.

    Raises:
        DataError: the text gives no token at all (there is then no position that predicts).
    """
    ids = list(tokenizer(text, add_special_tokens=True)["input_ids"])
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    # What the tokenizer appended is what follows the plain ids; the text may itself end in special tokens.
    for start in range(len(ids) - len(plain) + 1):
        if ids[start : start + len(plain)] == plain:
            ids = ids[: start + len(plain)]
            break
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise DataError(f"{source}: the prompt {text!r} has no tokens.")
    return tuple(ids)


def encode_answer(tokenizer: PreTrainedTokenizerBase, text: str, source: str = "answer") -> Ids:
    """Ids of an answer on its own, without special tokens.

    Raises:
        DataError: the text gives no token.
    """
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
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
    """Right-padded rows, or rows side by side in one (a pack, see :mod:`ia2.packing`).

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
