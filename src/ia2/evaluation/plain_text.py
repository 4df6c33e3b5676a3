"""What a model makes of plain text: how probable it finds it, and how it goes on.

Perplexity shows what has been forgotten; sampled continuations how varied and how certain a model writes,
with labels in it or not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ia2.data.readers import READERS, read_file
from ia2.data.rows import bad_rows
from ia2.models.families import end_ids, evaluating, greedy, input_device
from ia2.models.forward import answer_pass
from ia2.models.generation import cut_answer, refusing_nan
from ia2.models.tokens import Ids, encode_prompt, pad_id
from ia2.utils.errors import DataError
from ia2.utils.logging import progress
from ia2.utils.user_files import read_text, user_path
from ia2.utils.wording import names_of, type_name

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

# Continuations that are sampled together. Fixed, since what is drawn depends on it.
_SAMPLED_ROWS = 32


def plain_texts(path: str | Path | None = None) -> list[str]:
    """Texts of a file, in order; without one, forty packaged paragraphs of English prose.

    Args:
        path: rows (``.jsonl``, ``.csv``, ``.parquet``) with the column ``text``, or any other file as plain
            text with blank lines between texts. A line break within a text is kept.

    Raises:
        DataError: no such file, not UTF-8, a row without a text, or no text at all. One line.
    """
    if path is None:
        return _paragraphs((files("ia2") / "data" / "plain_text.txt").read_text(encoding="utf-8"))
    file = user_path(path)
    if file.suffix.lower() not in READERS:
        texts = _paragraphs(read_text(file))
    else:
        read = [(source, row, _problem(row) if why is None else why) for source, row, why in read_file(file)]
        if bad := [f"{source}: {why}" for source, _, why in read if why is not None]:
            raise bad_rows(str(file), bad)
        texts = [str(row["text"]) for _, row, _ in read]
    if not texts:
        raise DataError(f"{file}: there is no text in it. Write texts with a blank line between them.")
    return texts


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def _problem(row: Any) -> str | None:
    if not isinstance(row, dict):
        return f"not an object with columns but {type_name(row)}"
    if "text" not in row:
        return f"no column 'text'; there are {names_of(list(map(str, row))) or 'none'}"
    text = row["text"]
    if isinstance(text, str) and text.strip():
        return None
    return f"'text' is {'empty' if isinstance(text, str) else type_name(text)}"


def perplexity(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], window: int
) -> np.ndarray:
    """Negative log-likelihood of plain texts: sum in nats and number of scored tokens of each, ``[n, 2]``.

    The very first token (the begin-of-sequence token, where the tokenizer has one) is given, not scored. A
    text longer than the window is cut into pieces; each begins with the last token of the one before.
    """
    import torch

    found = np.zeros((len(texts), 2))
    pieces: list[tuple[Ids, Ids]] = []
    owners: list[int] = []
    for n, text in enumerate(texts):
        ids = encode_prompt(tokenizer, text, f"text {n + 1}")
        for start in range(0, len(ids) - 1, window):
            pieces.append(((ids[start],), ids[start + 1 : start + window + 1]))
            owners.append(n)
    for output in answer_pass(model, tokenizer, pieces, description="perplexity"):
        assert output.logits is not None
        answer = torch.tensor(pieces[output.index][1])
        log_p = output.logits.log_softmax(-1).gather(1, answer[:, None])
        found[owners[output.index]] += (-float(log_p.double().sum()), len(answer))
    return found


# ------------------------------------------------------------------------------------- continuations

DIVERSITY = {
    "distinct_1": "share of a continuation's tokens that are different ones",
    "distinct_2": "share of its pairs of neighbouring tokens that are different ones (Li et al. 2016)",
    "repeated_4": "share of its runs of four tokens that it has had before",
    "self_similarity": "Jaccard index of the pairs of tokens of two continuations of one opening",
    "entropy": "entropy of the next token in nats, over the vocabulary",
    "length": "tokens before it ends or is cut",
    "leak": "share of continuations that begin with a label",
}
"""Measures of :func:`diversity`."""


def openings(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], tokens: int = 8) -> list[Ids]:
    """The first so many ids of each text that is longer, special tokens in front included."""
    found = [encode_prompt(tokenizer, text, f"text {n + 1}") for n, text in enumerate(texts)]
    return [ids[:tokens] for ids in found if len(ids) > tokens]


def diversity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Ids],
    labels: Sequence[str],
    *,
    seed: int = 0,
    samples: int = 2,
    max_new_tokens: int = 32,
) -> dict[str, np.ndarray]:
    """What a model writes when it goes on from :func:`openings`, drawn at temperature 1.

    Continuations are sampled, at least two of each opening: greedy ones repeat themselves whatever was
    trained. Without ``labels`` (of the task that was trained) there is no leak.

    Returns:
        Measure of :data:`DIVERSITY` → its mean over the continuations of each opening, ``[n]``. A
        continuation that is too short for a share of runs counts as 1 distinct and 0 repeated.
    """
    import torch

    asked = [prompt for prompt in prompts for _ in range(samples)]
    written = list(_sampled(model, tokenizer, asked, seed, max_new_tokens))
    entropy = np.zeros(len(asked))
    pairs = [(prompt, whole) for prompt, (whole, _, _) in zip(asked, written, strict=True)]
    for output in answer_pass(model, tokenizer, pairs, description="entropy"):
        assert output.logits is not None
        # at the positions that predict the continuation
        entropy[output.index] = float(torch.special.entr(output.logits.softmax(-1)).sum(-1).mean())
    rows: dict[str, Any] = {
        "distinct_1": [_distinct(ids, 1) for _, ids, _ in written],
        "distinct_2": [_distinct(ids, 2) for _, ids, _ in written],
        "repeated_4": [1 - _distinct(ids, 4) for _, ids, _ in written],
        "entropy": entropy,
        "length": [float(len(ids)) for _, ids, _ in written],
    }
    if labels:
        rows["leak"] = [float(begins_with_label(text, labels)) for _, _, text in written]
    found = {name: np.reshape(values, (-1, samples)).mean(1) for name, values in rows.items()}
    runs = [{*_runs(ids, 2)} for _, ids, _ in written]
    groups = [runs[start : start + samples] for start in range(0, len(runs), samples)]
    found["self_similarity"] = np.array(
        [np.mean([len(a & b) / len(a | b) if a | b else 1.0 for a, b in combinations(g, 2)]) for g in groups]
    )
    return {name: found[name] for name in DIVERSITY if name in found}


def _sampled(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Ids], seed: int, max_new_tokens: int
) -> Iterator[tuple[Ids, Ids, str]]:
    """Ids of each continuation with and without its end of sequence, and its text."""
    import torch
    from transformers import GenerationConfig

    ends = end_ids(model, tokenizer, None)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=pad_id(tokenizer),
        eos_token_id=ends or None,
        bos_token_id=tokenizer.bos_token_id,
        use_cache=True,
    )
    device = input_device(model)
    with evaluating(model), greedy(model), progress("sampling", len(prompts)) as bar:
        for start in range(0, len(prompts), _SAMPLED_ROWS):
            ids = torch.tensor(prompts[start : start + _SAMPLED_ROWS], device=device)
            # the caller's random numbers stay as they are
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
                torch.manual_seed(seed * 1_000_003 + start)
                output = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=config,
                    logits_processor=refusing_nan(model),
                )
            for row in output:
                answer = cut_answer(tokenizer, row[ids.shape[1] :].tolist(), ends, (), max_new_tokens)
                yield answer.ids, answer.ids[:-1] if answer.ended else answer.ids, answer.text
            bar.advance(len(ids))


def _runs(ids: Ids, n: int) -> list[Ids]:
    return [ids[start : start + n] for start in range(len(ids) - n + 1)]


def _distinct(ids: Ids, n: int) -> float:
    runs = _runs(ids, n)
    return len(set(runs)) / len(runs) if runs else 1.0


def begins_with_label(text: str, labels: Sequence[str]) -> bool:
    """Whether a text begins with a whole label, whatever its case and the white space before it.

    >>> begins_with_label(" Positive thoughts", [" positive"]), begins_with_label("positively", [" positive"])
    (True, False)
    """
    begun = text.lstrip().lower()
    names = [label.strip().lower() for label in labels]
    return any(name and begun.startswith(name) and not begun[len(name) :][:1].isalnum() for name in names)
