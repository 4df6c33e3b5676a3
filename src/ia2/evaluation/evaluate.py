"""Evaluate a model on prompts, whatever the task: predictions and the rows that metrics are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ia2.data.answers import exact_match, load_parser
from ia2.data.examples import Example
from ia2.evaluation.calibration import TEMPERATURES
from ia2.evaluation.metrics import (
    Measured,
    fitted_temperatures,
    free_temperature_losses,
    label_temperature_losses,
    measure_free,
    measure_labels,
)
from ia2.evaluation.scoring import (
    FreeAnswers,
    LabelScores,
    Prediction,
    answer_freely,
    free_predictions,
    label_predictions,
    score_labels,
)
from ia2.models.forward import AnswerOutput
from ia2.models.tokens import Ids
from ia2.prompts.task import Task

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from ia2.models.capture import ActivationCapture

_GRID = [float(t) for t in TEMPERATURES]


def temperature_losses(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
    prompts: Sequence[Ids],
) -> dict[str, np.ndarray]:
    """What :func:`ia2.evaluation.metrics.fitted_temperatures` takes, of these (dev) rows."""
    description = "fitting temperature"
    if task.kind == "classification":
        gold = _gold(task, examples)
        scores = score_labels(
            model, tokenizer, task, prompts, temperatures=_GRID, truth=gold, description=description
        )
        return label_temperature_losses(scores, gold)
    answers = answer_freely(model, tokenizer, task, prompts, description=description)
    return free_temperature_losses(answers, _right(task, examples, answers))


def evaluate_prompts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
    prompts: Sequence[Ids],
    temperatures: dict[str, float] | None = None,
    *,
    fit: bool = False,
    capture: ActivationCapture | None = None,
    on_output: Callable[[AnswerOutput], None] | None = None,
    description: str = "evaluating",
) -> tuple[list[Prediction], Measured]:
    """Predictions and measured rows of labelled examples.

    Args:
        model: as it is to be evaluated.
        tokenizer: of the model.
        task: what counts as an answer.
        examples: labelled rows.
        prompts: what the model is asked for each, with or without demonstrations.
        temperatures: from :func:`~ia2.evaluation.metrics.fitted_temperatures`; None leaves scaled metrics
            out.
        fit: these are the dev rows: fit the temperatures on them, in the same pass.
        capture: for labels of one token, an entered capture whose activations ``on_output`` gets.
        on_output: called with every row's output, for labels of one token.
        description: text of the progress bar.

    Raises:
        DataError: an answer that is not among the labels.
    """
    if task.kind == "classification":
        gold = _gold(task, examples)
        asked = [1.0] if temperatures is None else [1.0, temperatures["vocabulary"]]
        fitted: dict[str, float] = {}

        def fitting(scores: LabelScores) -> float:
            fitted.update(fitted_temperatures(label_temperature_losses(scores, gold)))
            return fitted["vocabulary"]

        scores = score_labels(
            model,
            tokenizer,
            task,
            prompts,
            temperatures=_GRID if fit else asked,
            truth=gold if fit else None,
            capture=capture,
            on_output=on_output,
            fit=fitting if fit else None,
            description=description,
        )
        temperatures = fitted or temperatures
        first = [ids[0] for ids in task.label_ids]
        return (
            label_predictions(tokenizer, task, examples, scores),
            measure_labels(scores, gold, first, temperatures),
        )
    answers = answer_freely(model, tokenizer, task, prompts, description=description)
    right = _right(task, examples, answers)
    if fit:
        temperatures = fitted_temperatures(free_temperature_losses(answers, right))
    return free_predictions(task, examples, answers), measure_free(answers, right, temperatures)


def _gold(task: Task, examples: Sequence[Example]) -> np.ndarray:
    task.check_labels(examples)
    return np.array([task.label_of(example) for example in examples])


def _right(task: Task, examples: Sequence[Example], answers: FreeAnswers) -> np.ndarray:
    parse = load_parser(task.parser)
    pairs = zip(answers.parsed, examples, strict=True)
    return np.array([exact_match(a, parse(e.answer or "")) for a, e in pairs], dtype=float)
