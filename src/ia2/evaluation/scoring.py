"""Predictions: labels scored by log-probability, or free text generated and parsed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ia2.data.examples import Example
from ia2.models.forward import AnswerOutput, answer_pass, answers_pass
from ia2.models.generation import Generated, generate_answers
from ia2.models.tokens import Ids, decode
from ia2.prompts.task import Task
from ia2.utils.distributed import gathered, joined, share
from ia2.utils.files import json_lines, write_text

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from ia2.models.capture import ActivationCapture


@dataclass
class LabelScores:
    """Scores of n queries over C labels at T temperatures.

    Attributes:
        temperatures: ``[T]``; the first is 1.
        log_probability: of each whole label, ``[n, C, T]``; NaN where only the true label was asked for.
        top_probability: of the most probable first token over the vocabulary, ``[n, T]``.
        top_token: that token, ``[n]``.
        square_sum: sum of squared probabilities over the vocabulary (for the Brier score), ``[n, T]``;
            for labels of several tokens, over the labels and everything else as one outcome.
        single_token: whether every label is one token.
    """

    temperatures: np.ndarray
    log_probability: np.ndarray
    top_probability: np.ndarray
    top_token: np.ndarray
    square_sum: np.ndarray
    single_token: bool

    def join(self) -> LabelScores:
        """Those of all processes' shares, one behind the other; all of them must ask for it."""
        mine = self.log_probability, self.top_probability, self.top_token, self.square_sum
        log_p, top, token, squares = (np.concatenate(parts) for parts in zip(*gathered(mine), strict=True))
        return LabelScores(self.temperatures, log_p, top, token, squares, self.single_token)


class LabelScorer:
    """Collects :class:`LabelScores` from the outputs of a pass over every prompt and :attr:`answers`.

    Labels of one token need one row a query. Of several tokens, labels that begin alike share what is fed
    and its logits: a row ends before the last token of a label, and stands for all labels and beginnings
    of labels that it contains. Where one label begins another, the terminator is scored too.

    Args:
        task: what counts as an answer.
        count: number of queries.
        temperatures: of the logits.
        truth: the true label of each query; then others are scored at temperature 1 only.
    """

    def __init__(
        self,
        task: Task,
        count: int,
        temperatures: Sequence[float] = (1.0,),
        truth: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        self.task, self.truth = task, truth
        self.temperatures = np.asarray(temperatures, dtype=float)
        shape = (count, len(task.labels), len(self.temperatures))
        self._log_p = np.full(shape, np.nan)
        self._top = np.full((count, len(self.temperatures)), np.nan)
        self._token = np.zeros(count, dtype=int)
        self._squares = np.full((count, len(self.temperatures)), np.nan)
        self.answers: list[Ids] = [task.label_ids[0]]
        if not task.single_token:
            self._log_p[:] = 0
            if truth is not None:
                self._log_p[:, :, self.temperatures != 1] = np.nan
                self._log_p[np.arange(count), truth] = 0
            self._plan()

    def _plan(self) -> None:
        """The rows, and for each the steps of labels that are read off it."""
        ids, ends = self.task.label_ids, bool(self.task.terminators)
        # a label is a path of tokens; the distribution behind each of its beginnings is needed
        fed = {label if ends else label[:-1] for label in ids}
        inside = {row[:k] for row in fed for k in range(len(row))}
        rows = sorted(fed - inside)
        owner = {
            row[:k]: place for place, row in reversed(list(enumerate(rows))) for k in range(len(row) + 1)
        }
        # the last id is only predicted, never fed
        self.answers = [(*row, 0) for row in rows]
        # of each row: position, token (−1: any terminator), label
        self._steps: list[list[tuple[int, int, int]]] = [[] for _ in rows]
        for place, label in enumerate(ids):
            for k, token in enumerate((*label, -1) if ends else label):
                self._steps[owner[label[:k]]].append((k, token, place))

    def add(self, output: AnswerOutput) -> None:
        """Take one row's output."""
        assert output.logits is not None
        if self.task.single_token:
            self._add_single(output.index, output.logits[0])
            return
        query, row = divmod(output.index, len(self.answers))
        steps = np.array(self._steps[row])
        logits = output.logits.double()
        if (steps[:, 0] == 0).any():
            self._token[query] = int(logits[0].argmax())
        for t, temperature in enumerate(self.temperatures):
            mine = steps
            if self.truth is not None and temperature != 1:
                mine = steps[steps[:, 2] == self.truth[query]]
            if not len(mine):
                continue
            positions, places = np.unique(mine[:, 0], return_inverse=True)
            scaled = logits[positions] / temperature
            total = scaled.logsumexp(-1).numpy()
            ending = scaled[:, list(self.task.terminators)].logsumexp(-1).numpy()
            stepped = scaled.numpy()[places, mine[:, 1]]
            log_p = np.where(mine[:, 1] < 0, ending[places], stepped) - total[places]
            np.add.at(self._log_p[query, :, t], mine[:, 2], log_p)
            # rounding of the sum over terminators may lift it above log 1
            np.minimum(self._log_p[query, :, t], 0.0, out=self._log_p[query, :, t])
            if positions[0] == 0:
                self._top[query, t] = float((scaled[0].max() - total[0]).exp())

    def _add_single(self, query: int, logits: Any) -> None:
        import torch

        # float64 only for the few numbers that are kept
        scaled = logits[None, :] / torch.tensor(self.temperatures, dtype=logits.dtype)[:, None]
        log_p = scaled.log_softmax(-1)
        labels = [ids[0] for ids in self.task.label_ids]
        self._log_p[query] = log_p[:, labels].T.double().numpy()
        self._top[query] = log_p.max(-1).values.exp().numpy()
        self._squares[query] = log_p.mul(2).exp().sum(-1).numpy()
        self._token[query] = int(logits.argmax())

    def finish(self) -> LabelScores:
        """All outputs have been added."""
        if not self.task.single_token:
            p = np.exp(self._log_p)
            rest = np.clip(1 - p.sum(axis=1), 0, 1)
            self._squares = (p**2).sum(axis=1) + rest**2
        return LabelScores(
            self.temperatures,
            self._log_p,
            self._top,
            self._token,
            self._squares,
            self.task.single_token,
        )


def score_labels(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    prompts: Sequence[Ids],
    *,
    temperatures: Sequence[float] = (1.0,),
    truth: Sequence[int] | np.ndarray | None = None,
    capture: ActivationCapture | None = None,
    on_output: Callable[[AnswerOutput], None] | None = None,
    fit: Callable[[LabelScores], float] | None = None,
    description: str = "evaluating",
) -> LabelScores:
    """Score every label of every prompt (see :class:`LabelScorer`).

    Where several processes were launched, each scores a share of the prompts, and all get all scores.

    Args:
        model: as it is to be evaluated.
        tokenizer: of the model.
        task: labels.
        prompts: ids of n prompts.
        temperatures: of the logits.
        truth: the true label of each prompt, where only it is wanted at temperatures other than 1.
        capture: for labels of one token, an entered capture whose activations ``on_output`` gets.
        on_output: called with each output of this process's share as it comes, for labels of one token.
        fit: gives a temperature from these scores; those at 1 and at that one are returned.
        description: text of the progress bar.
    """
    mine = share(len(prompts), lambda i: len(prompts[i]))
    scorer = LabelScorer(task, len(mine), temperatures, None if truth is None else [truth[i] for i in mine])
    prompts = [prompts[i] for i in mine]
    kept: list[AnswerOutput] = []

    def add(output: AnswerOutput) -> None:
        scorer.add(output)
        if fit is not None:
            kept.append(replace(output, activations=None))

    if not task.single_token:
        for output in answers_pass(model, tokenizer, prompts, scorer.answers, description=description):
            add(output)
    else:
        pairs = [(prompt, scorer.answers[0]) for prompt in prompts]
        for output in answer_pass(model, tokenizer, pairs, capture=capture, description=description):
            add(output)
            if on_output is not None:
                on_output(replace(output, index=mine[output.index]))
    scores = scorer.finish().join()
    if fit is None:
        return scores
    scorer = LabelScorer(task, len(mine), [1.0, fit(scores)])
    for output in kept:
        scorer.add(output)
    return scorer.finish().join()


@dataclass
class FreeAnswers:
    """Generated answers of n queries.

    Attributes:
        texts: as generated.
        parsed: what the parser read; None where it found no answer.
        first_probability: of the first answer token over the vocabulary, ``[n]`` (the paper's confidence).
        sequence_log_probability: of the whole answer, ``[n]``.
    """

    texts: list[str]
    parsed: list[str | None]
    first_probability: np.ndarray
    sequence_log_probability: np.ndarray


def answer_freely(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    prompts: Sequence[Ids],
    *,
    description: str = "evaluating",
) -> FreeAnswers:
    """Generate an answer to every prompt and read it; confidences are those of the steps that wrote it.

    Where several processes were launched, each answers a share of the prompts, and all get all answers.
    """
    import torch

    from ia2.data.answers import load_parser

    parse = load_parser(task.parser)
    prompts = [prompts[i] for i in share(len(prompts), lambda i: len(prompts[i]))]
    first = np.zeros(len(prompts))
    total = np.zeros(len(prompts))
    unseen: list[int] = []
    end = tokenizer.eos_token_id if task.append_end is None else task.append_end

    def keep(logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the most probable token and of the one that ends an answer, ``[1, B, 2]``."""
        log_p = logits.log_softmax(-1)
        best = log_p.amax(-1)
        return torch.stack([best, best if end is None else log_p[:, end]], dim=-1)[None]

    def take(i: int, answer: Generated, log_p: torch.Tensor | None) -> None:
        if log_p is None or (end is None and not answer.text):
            unseen.append(i)
            return
        # what ended an answer need not be the token that stands for it
        chosen = [*log_p[0, :-1, 0].tolist(), float(log_p[0, -1, int(answer.ended)])]
        first[i], total[i] = np.exp(chosen[0]), sum(chosen)

    generated = generate_answers(
        model,
        tokenizer,
        prompts,
        max_new_tokens=task.max_answer_tokens,
        stop_texts=task.stop_texts,
        end_id=task.append_end,
        description=description,
        keep=keep,
        on_answer=take,
    )
    pairs = [(prompts[i], generated[i].ids) for i in unseen]
    for output in answer_pass(model, tokenizer, pairs, description=f"{description}: confidence"):
        assert output.logits is not None
        i = unseen[output.index]
        ids = torch.tensor(generated[i].ids)
        log_p = output.logits.log_softmax(-1)[torch.arange(len(ids)), ids]
        first[i], total[i] = float(log_p[0].exp()), float(log_p.sum())
    texts = joined([g.text for g in generated])
    first, total = np.concatenate(gathered(first)), np.concatenate(gathered(total))
    return FreeAnswers(texts, [parse(text) for text in texts], first, total)


@dataclass
class Prediction:
    """One query's prediction, as a row of ``predictions.jsonl``."""

    source: str
    query: str
    gold: Any
    predicted: Any
    correct: bool | None
    confidence: float
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """A flat JSON-able row."""
        row = dict(vars(self))
        return row | row.pop("details")


def label_predictions(
    tokenizer: PreTrainedTokenizerBase, task: Task, examples: Sequence[Example], scores: LabelScores
) -> list[Prediction]:
    """Per-example rows: the best label, its share of the label set, and the whole distribution."""
    log_p = scores.log_probability[:, :, 0]
    shares = np.exp(log_p - log_p.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    rows = []
    for i, example in enumerate(examples):
        best = int(log_p[i].argmax())
        known = example.answer is not None
        gold = task.label_of(example) if known else -1
        details = {
            "labels": {str(name): float(share) for name, share in zip(task.names, shares[i], strict=True)},
            "top_token": decode(tokenizer, [int(scores.top_token[i])]),
            "top_token_probability": float(scores.top_probability[i, 0]),
        }
        rows.append(
            Prediction(
                example.source,
                example.query,
                task.names[gold] if known else None,
                task.names[best],
                best == gold if known else None,
                float(shares[i, best]),
                details,
            )
        )
    return rows


def free_predictions(task: Task, examples: Sequence[Example], answers: FreeAnswers) -> list[Prediction]:
    """Per-example rows of generated answers."""
    from ia2.data.answers import exact_match, load_parser

    parse = load_parser(task.parser)
    rows = []
    for i, example in enumerate(examples):
        gold = None if example.answer is None else parse(example.answer)
        rows.append(
            Prediction(
                example.source,
                example.query,
                gold,
                answers.parsed[i],
                None if example.answer is None else exact_match(answers.parsed[i], gold),
                float(np.exp(answers.sequence_log_probability[i])),
                {
                    "answer": answers.texts[i],
                    "first_token_probability": float(answers.first_probability[i]),
                    "sequence_log_probability": float(answers.sequence_log_probability[i]),
                },
            )
        )
    return rows


def write_predictions(path: Path, rows: Iterable[Prediction], *, listed: bool = True) -> None:
    """Rows as JSON lines, whole or not at all; ``listed`` as in :func:`ia2.utils.files.write_bytes`."""
    write_text(path, json_lines(row.to_dict() for row in rows), listed=listed)
