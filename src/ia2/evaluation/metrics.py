"""Accuracy and calibration from scores, with intervals, before and after temperature scaling.

Two confidences are kept apart (METHOD: measures): over the whole **vocabulary** (is the most probable
token the label, and how probable was it) and over the **label set** (renormalised). For free text they
are the probability of the first token and of the whole answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ia2.evaluation.calibration import (
    TEMPERATURES,
    brier_rows,
    ece_equal_mass,
    ece_equal_width,
    fit_temperature,
    scale_label_log_probabilities,
)
from ia2.evaluation.scoring import FreeAnswers, LabelScores
from ia2.utils.statistics import Statistic, bounded, over_draws

_TINY = 1e-12
_LEAST = float(np.log(np.finfo(float).tiny))


@dataclass(frozen=True)
class RowMeasures:
    """Per-row numbers of one scope; every metric is a statistic of these.

    Attributes:
        confidence: of the prediction, ``[n]``.
        correct: 0 or 1, ``[n]``.
        brier: squared error of the distribution, ``[n]``.
        nll: minus log-probability of the truth, in nats, ``[n]``; finite, since the least positive float
            stands for a probability of 0.
    """

    confidence: np.ndarray
    correct: np.ndarray
    brier: np.ndarray
    nll: np.ndarray

    def arrays(self) -> tuple[np.ndarray, ...]:
        """In the order that the statistics take."""
        return self.confidence, self.correct, self.brier, self.nll

    @classmethod
    def concatenate(cls, parts: Sequence[RowMeasures]) -> RowMeasures:
        """Rows of several folds as one."""
        return cls(*(np.concatenate(columns) for columns in zip(*(p.arrays() for p in parts), strict=True)))


# each takes (confidence, correct, brier, nll), with rows along the axis
STATISTICS: dict[str, Statistic] = {
    "accuracy": lambda confidence, correct, brier, nll, axis: correct.mean(axis),
    "ece": lambda confidence, correct, brier, nll, axis: ece_equal_mass(confidence, correct, axis=axis),
    "ece_equal_width": lambda confidence, correct, brier, nll, axis: ece_equal_width(
        confidence, correct, axis=axis
    ),
    "brier": lambda confidence, correct, brier, nll, axis: brier.mean(axis),
    "nll": lambda confidence, correct, brier, nll, axis: nll.mean(axis),
}


@dataclass(frozen=True)
class Measured:
    """Rows of every scope, plain and temperature-scaled, and the temperatures used.

    Attributes:
        plain: scope → rows.
        scaled: scope → rows after temperature scaling on dev; empty without dev rows.
        temperatures: scope → temperature.
    """

    plain: dict[str, RowMeasures]
    scaled: dict[str, RowMeasures]
    temperatures: dict[str, float]


def label_rows(
    scores: LabelScores, gold: np.ndarray, label_tokens: Sequence[int], t: int = 0
) -> dict[str, RowMeasures]:
    """Rows of both scopes at temperature number ``t``, of label indices ``[n]`` and each label's token."""
    n = np.arange(len(gold))
    log_p = scores.log_probability[:, :, t]
    gold_log_p = np.maximum(log_p[n, gold], _LEAST)
    if scores.single_token:
        confidence = scores.top_probability[:, t]
        correct = scores.top_token == np.asarray(label_tokens)[gold]
    else:
        # the distribution over the labels as wholes, everything else being one more outcome
        best = log_p.argmax(1)
        confidence, correct = np.exp(log_p[n, best]), best == gold
    # of float32 sums, whose rounding must not make it negative
    brier = np.maximum(scores.square_sum[:, t] - 2 * np.exp(gold_log_p) + 1, 0.0)
    vocabulary = RowMeasures(confidence, correct.astype(float), brier, -gold_log_p)
    return {"vocabulary": vocabulary, "labels": _label_set_rows(log_p, gold, 1.0)}


def _label_set_rows(log_p: np.ndarray, gold: np.ndarray, temperature: float) -> RowMeasures:
    scaled = scale_label_log_probabilities(log_p, temperature)
    p = np.exp(scaled)
    n = np.arange(len(gold))
    best = scaled.argmax(1)
    return RowMeasures(
        p[n, best],
        (best == gold).astype(float),
        brier_rows(p, gold),
        -np.maximum(scaled[n, gold], np.log(_TINY)),
    )


def fitted_temperatures(losses: dict[str, np.ndarray]) -> dict[str, float]:
    """The best temperature of each scope, of losses at ``calibration.TEMPERATURES``: scope → ``[n, T]``."""
    return {scope: fit_temperature(TEMPERATURES, nll) for scope, nll in losses.items()}


def label_temperature_losses(dev: LabelScores, gold: np.ndarray) -> dict[str, np.ndarray]:
    """What :func:`fitted_temperatures` takes, from dev scores taken at ``calibration.TEMPERATURES``."""
    at_one = dev.log_probability[:, :, int(np.argmin(np.abs(dev.temperatures - 1)))]
    return {
        "vocabulary": -dev.log_probability[np.arange(len(gold)), gold, :],
        "labels": np.stack([_label_set_rows(at_one, gold, float(t)).nll for t in TEMPERATURES], axis=1),
    }


def measure_labels(
    scores: LabelScores,
    gold: np.ndarray,
    label_tokens: Sequence[int],
    temperatures: dict[str, float] | None,
) -> Measured:
    """Rows of a labelled evaluation.

    Args:
        scores: taken at temperatures ``(1,)``, or ``(1, T)`` with T the vocabulary's temperature.
        gold: label indices, ``[n]``.
        label_tokens: see :func:`label_rows`.
        temperatures: from :func:`fitted_temperatures`, or None without dev rows.
    """
    plain = label_rows(scores, gold, label_tokens)
    if temperatures is None:
        return Measured(plain, {}, {})
    scaled = {
        "vocabulary": label_rows(scores, gold, label_tokens, t=1)["vocabulary"],
        "labels": _label_set_rows(scores.log_probability[:, :, 0], gold, temperatures["labels"]),
    }
    return Measured(plain, scaled, temperatures)


def free_rows(answers: FreeAnswers, correct: np.ndarray, temperature: float = 1.0) -> dict[str, RowMeasures]:
    """Rows of free-form answers: confidence of the first token, and of the whole answer.

    Being right is a binary outcome here, so Brier and NLL are those of the confidence in it;
    temperature acts on its logit.
    """
    rows = {}
    for scope, p in (
        ("vocabulary", answers.first_probability),
        ("answer", np.exp(answers.sequence_log_probability)),
    ):
        clipped = np.clip(p, _TINY, 1 - 1e-7)
        p = 1 / (1 + np.exp(-np.log(clipped / (1 - clipped)) / temperature))
        rows[scope] = RowMeasures(
            p,
            correct.astype(float),
            (p - correct) ** 2,
            -np.log(np.where(correct > 0, p, 1 - p) + _TINY),
        )
    return rows


def free_temperature_losses(answers: FreeAnswers, correct: np.ndarray) -> dict[str, np.ndarray]:
    """What :func:`fitted_temperatures` takes, from dev answers."""
    grids = [free_rows(answers, correct, float(t)) for t in TEMPERATURES]
    return {scope: np.stack([grid[scope].nll for grid in grids], axis=1) for scope in grids[0]}


def measure_free(
    answers: FreeAnswers, correct: np.ndarray, temperatures: dict[str, float] | None
) -> Measured:
    """Rows of a free-form evaluation; ``temperatures`` come from :func:`fitted_temperatures`."""
    plain = free_rows(answers, correct)
    if temperatures is None:
        return Measured(plain, {}, {})
    scaled = {s: free_rows(answers, correct, temperatures[s])[s] for s in plain}
    return Measured(plain, scaled, temperatures)


def summarise(runs: Sequence[Measured]) -> dict[str, Any]:
    """Every metric of every scope, mean over draws, with 95% t-intervals over draws; one draw has none.

    Args:
        runs: one for each draw; all with the same scopes.

    Returns:
        ``{"n", "runs", scope: {metric: {"value", "low", "high"}}, "scaled": {scope: …}}``.
    """
    result: dict[str, Any] = {
        "runs": len(runs),
        "n": len(next(iter(runs[0].plain.values())).correct),
    }
    for scope in runs[0].plain:
        result[scope] = _intervals([run.plain[scope] for run in runs])
    if all(run.scaled for run in runs):
        result["scaled"] = {
            scope: {
                **_intervals([run.scaled[scope] for run in runs]),
                "temperature": float(np.mean([run.temperatures[scope] for run in runs])),
            }
            for scope in runs[0].scaled
        }
    return result


def _intervals(runs: Sequence[RowMeasures]) -> dict[str, Any]:
    rows = [run.arrays() for run in runs]
    return {name: bounded(over_draws(of, rows), name).to_dict() for name, of in STATISTICS.items()}
