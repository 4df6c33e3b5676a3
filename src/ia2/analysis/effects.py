"""The section ``effects``: what training does beside the task it was for.

Forgetting: perplexity on held-out plain text, and accuracy on other benchmarks. Diversity: what sampled
continuations of plain text look like. Sensitivity to wording: accuracy when the prompt's literals change. All
functions take the model in the state it is in, so that a view is measured by calling them with its adapter
on; :func:`summarise` compares views with the base model, on the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ia2.analysis.diversity import DIVERSITY
from ia2.analysis.wordings import UNCHANGED, WORDINGS
from ia2.config import AdaptConfig
from ia2.config_reading import validate
from ia2.console import logger
from ia2.errors import DataError
from ia2.evaluation.run import evaluate_prompts
from ia2.evaluation.statistics import Statistic, mean_interval, over_draws
from ia2.examples import Example, Examples
from ia2.inference import answer_pass
from ia2.prompts import query_prompts
from ia2.rendering import Rendering
from ia2.task import Task, make_task
from ia2.tokens import Ids, encode_prompt

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Effects:
    """What was measured of one view in one trial; parts that were not are empty.

    Attributes:
        perplexity: of each text, from :func:`perplexity`, ``[n, 2]``.
        benchmarks: name → scope → 0 or 1 by row ``[n]``, from :func:`accuracy`.
        diversity: measure → by opening ``[n]``, from :func:`ia2.analysis.diversity.diversity`.
        wordings: name of a wording → scope → 0 or 1 by query ``[n]``, from :func:`wording_accuracy`.
    """

    perplexity: np.ndarray | None = None
    benchmarks: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    diversity: Mapping[str, np.ndarray] = field(default_factory=dict)
    wordings: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------- perplexity


def perplexity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    window: int,
    *,
    description: str = "perplexity",
) -> np.ndarray:
    """Negative log-likelihood of plain texts, every token given those before it.

    The very first token (the begin-of-sequence token, where the tokenizer has one) is given, not scored. A
    text longer than the window is cut into pieces; each begins with the last token of the one before.

    Args:
        model: as it is to be measured.
        tokenizer: its tokenizer.
        texts: plain texts.
        window: tokens that are fed at once, at least 1.
        description: text of the progress bar.

    Returns:
        Sum in nats and number of scored tokens of each text, ``[n, 2]``.
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
    for output in answer_pass(model, tokenizer, pieces, description=description):
        assert output.logits is not None
        answer = torch.tensor(pieces[output.index][1])
        log_p = output.logits.log_softmax(-1).gather(1, answer[:, None])
        found[owners[output.index]] += (-float(log_p.double().sum()), len(answer))
    return found


# ------------------------------------------------------------------------------------------ accuracy


def accuracy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
    rendering: Rendering,
    window: int,
    *,
    description: str = "accuracy",
) -> dict[str, np.ndarray]:
    """Which bare queries are answered rightly.

    Returns:
        Scope → 0 or 1, ``[n]``: ``vocabulary`` (the most probable token) and ``labels`` (the best of the
        label set, which a model can know that would rather say something else); of free text ``vocabulary``
        and ``answer``, which are the same.

    Raises:
        DataError: a query is longer than the window.
    """
    prompts = query_prompts(rendering, examples, window, task.reserve)
    _, measured = evaluate_prompts(model, tokenizer, task, examples, prompts, description=description)
    return {scope: rows.correct for scope, rows in measured.plain.items()}


def wording_accuracy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    worded: Mapping[str, Sequence[Example]],
    rendering: Rendering,
    window: int,
) -> dict[str, dict[str, np.ndarray]]:
    """:func:`accuracy` under every wording of the queries, from :func:`ia2.analysis.wordings.wordings`.

    Raises:
        DataError: a query is too long as it is. A wording that makes one too long is left out with a warning.
    """
    found = {}
    for name, examples in worded.items():
        try:
            found[name] = accuracy(
                model, tokenizer, task, examples, rendering, window, description=f"wording: {name}"
            )
        except DataError as error:
            if name == UNCHANGED:
                raise
            logger.warning("The wording '%s' is left out: %s", name, error)
    return found


def other_benchmark(
    name: str | Path,
    rendering: Rendering,
    *,
    data_dir: str | Path | None = None,
    verbaliser: str | None = None,
    max_test: int | None = None,
    parsers: Sequence[str] = (),
) -> tuple[Task, Examples]:
    """A benchmark to look for forgetting on: its task, and test rows.

    Args:
        name: of :data:`ia2.benchmarks.BENCHMARKS`, or a YAML file.
        rendering: of the run, whose style of prompts it gets.
        data_dir: folder of mirrors.
        verbaliser: taken where the benchmark has one of that name, else its default.
        max_test: only the first so many test rows.
        parsers: those that the file may name.

    Raises:
        ConfigError: the benchmark is unknown.
        DataError: its rows cannot be had, or the model cannot tell its labels apart.
    """
    from ia2.benchmarks import load_benchmark

    benchmark = load_benchmark(name, parsers)
    chosen = verbaliser if verbaliser in benchmark.verbalisers else None
    rows = benchmark.load(data_dir, chosen, max_test).test
    style = {"chat": rendering.chat, "thinking": rendering.thinking, "separator": rendering.separator}
    config = validate(AdaptConfig, {**benchmark.settings(chosen), **style}, benchmark.name)
    try:
        return make_task(rows, config, rendering.tokenizer, benchmark.prompt_template), rows
    except DataError as error:
        raise DataError(f"{benchmark.name}: {error}") from error


# ----------------------------------------------------------------------------------------- summaries

_Trials = Sequence[Mapping[str, Effects]]
_Runs = list[list[np.ndarray]]


def summarise(trials: _Trials, reference: str = "base") -> dict[str, Any]:
    """What was measured of each view, and how it differs from the reference on the same rows.

    Args:
        trials: for each training set view → what was measured of it.
        reference: the view that others are compared with, where a trial has it.

    Returns:
        The section: ``views``, ``reference``, and where measured ``perplexity``, ``benchmarks``,
        ``diversity`` and ``wordings``. Every number is ``{"value", "low", "high"}``, with a 95% t-interval
        over trials; of one trial over its rows, where it is a mean of them. Differences are paired by row.
    """
    views = list(dict.fromkeys(view for trial in trials for view in trial))
    benchmarks = dict.fromkeys(name for trial in trials for e in trial.values() for name in e.benchmarks)
    parts = {
        "perplexity": _perplexity(trials, views, reference),
        "benchmarks": {name: _benchmark(trials, views, reference, name) for name in benchmarks},
        "diversity": _diversity(trials, views, reference),
        "wordings": _wordings(trials, views, reference),
    }
    return {"views": views, "reference": reference, **{name: part for name, part in parts.items() if part}}


def _interval(statistic: Statistic, runs: _Runs) -> dict[str, float | None]:
    """Over trials; of one trial over its rows, where the statistic is a mean of them."""
    if len(runs) == 1 and statistic in (_mean, _mean_difference):
        rows = runs[0]
        return mean_interval([rows[0] - rows[1] if statistic is _mean_difference else rows[0]]).to_dict()
    return over_draws(statistic, runs).to_dict()


def _mean(*rows: np.ndarray, axis: int) -> Any:
    return rows[0].mean(axis)


def _mean_difference(*rows: np.ndarray, axis: int) -> Any:
    return rows[0].mean(axis) - rows[1].mean(axis)


def _runs(trials: _Trials, view: str, reference: str, rows: Callable[[Effects], Any]) -> tuple[_Runs, _Runs]:
    """Rows of a view in each trial that has them; and, beside the reference's, in each that has both."""
    alone: _Runs = []
    beside: _Runs = []
    for trial in trials:
        own, base = (rows(trial[name]) if name in trial else None for name in (view, reference))
        if own is not None:
            alone.append([own])
        if own is not None and base is not None and view != reference:
            beside.append([own, base])
    return alone, beside


def _by_view(
    trials: _Trials, views: Sequence[str], reference: str, rows: Callable[[Effects], Any], name: str
) -> dict[str, Any]:
    """Mean of the rows of each view that has them, and what it differs by."""
    found: dict[str, Any] = {}
    for view in views:
        alone, beside = _runs(trials, view, reference, rows)
        if alone:
            found[view] = {name: _interval(_mean, alone)}
        if beside:
            found[view]["difference"] = _interval(_mean_difference, beside)
    return found


def _perplexity(trials: _Trials, views: Sequence[str], reference: str) -> dict[str, Any]:
    def log_perplexity(*rows: np.ndarray, axis: int) -> Any:
        return rows[0].sum(axis) / rows[1].sum(axis)

    def log_ratio(*rows: np.ndarray, axis: int) -> Any:
        return (rows[0].sum(axis) - rows[2].sum(axis)) / rows[1].sum(axis)

    def exponential(found: Mapping[str, float | None]) -> dict[str, float | None]:
        return {end: None if value is None else float(np.exp(value)) for end, value in found.items()}

    entries = {}
    size: dict[str, int] = {}
    for view in views:
        alone, beside = _runs(trials, view, reference, lambda e: e.perplexity)
        if not alone:
            continue
        size = {"texts": len(alone[0][0]), "tokens": int(alone[0][0][:, 1].sum())}
        columns = [[*run[0].T] for run in alone]
        entries[view] = {"perplexity": exponential(_interval(log_perplexity, columns))}
        if beside:
            columns = [[*own.T, *base.T] for own, base in beside]
            entries[view]["ratio"] = exponential(_interval(log_ratio, columns))
    return {**size, "views": entries} if entries else {}


def _scopes(found: Sequence[Mapping[str, np.ndarray]]) -> list[str]:
    return list(dict.fromkeys(scope for each in found for scope in each))


def _benchmark(trials: _Trials, views: Sequence[str], reference: str, name: str) -> dict[str, Any]:
    def rows(scope: str, effects: Effects) -> np.ndarray | None:
        return effects.benchmarks.get(name, {}).get(scope)

    measured = [e.benchmarks[name] for trial in trials for e in trial.values() if name in e.benchmarks]
    return {
        "rows": len(next(iter(measured[0].values()))),
        "scopes": {
            scope: {"views": _by_view(trials, views, reference, partial(rows, scope), "accuracy")}
            for scope in _scopes(measured)
        },
    }


def _diversity(trials: _Trials, views: Sequence[str], reference: str) -> dict[str, Any]:
    def rows(measure: str, effects: Effects) -> np.ndarray | None:
        return effects.diversity.get(measure)

    measured = [e.diversity for trial in trials for e in trial.values() if e.diversity]
    if not measured:
        return {}
    return {
        "openings": len(next(iter(measured[0].values()))),
        "measures": {
            measure: {
                "about": DIVERSITY[measure],
                "views": _by_view(trials, views, reference, partial(rows, measure), "mean"),
            }
            for measure in _scopes(measured)
        },
    }


def _wordings(trials: _Trials, views: Sequence[str], reference: str) -> dict[str, Any]:
    """Only wordings that were measured everywhere; the others are named."""
    measured = [e.wordings for trial in trials for e in trial.values() if e.wordings]
    if not measured:
        return {}
    names = [name for name in WORDINGS if all(name in each for each in measured)]
    entry: dict[str, Any] = {
        "rows": len(next(iter(measured[0][UNCHANGED].values()))),
        "wordings": {name: WORDINGS[name][0] for name in names},
        "left_out": [name for name in WORDINGS if name not in names],
        "scopes": {},
    }
    for scope in _scopes([each[UNCHANGED] for each in measured]):
        found = {view: _under_wordings(trials, view, reference, names, scope) for view in views}
        entry["scopes"][scope] = {"views": {view: value for view, value in found.items() if value}}
    return entry


def _under_wordings(
    trials: _Trials, view: str, reference: str, names: Sequence[str], scope: str
) -> dict[str, Any]:
    """Accuracy under each wording, against the unchanged prompt; spread from best to worst."""

    def rows(effects: Effects) -> list[np.ndarray] | None:
        return [effects.wordings[name][scope] for name in names] if effects.wordings else None

    def spread(*rows: np.ndarray, axis: int) -> Any:
        means = [row.mean(axis) for row in rows]
        return np.max(means, axis=0) - np.min(means, axis=0)

    def spread_difference(*rows: np.ndarray, axis: int) -> Any:
        return spread(*rows[: len(names)], axis=axis) - spread(*rows[len(names) :], axis=axis)

    alone, beside = _runs(trials, view, reference, rows)
    if not alone:
        return {}
    runs = [run[0] for run in alone]
    first = names.index(UNCHANGED)
    accuracies = {name: _interval(_mean, [[run[n]] for run in runs]) for n, name in enumerate(names)}
    worst = min(accuracies, key=lambda name: accuracies[name]["value"] or 0.0)
    found = {
        "accuracy": accuracies,
        "difference": {
            name: _interval(_mean_difference, [[run[n], run[first]] for run in runs])
            for n, name in enumerate(names)
            if n != first
        },
        "spread": _interval(spread, [list(run) for run in runs]),
        "worst": {"wording": worst, "accuracy": accuracies[worst]["value"]},
    }
    if beside:
        both = [[*own, *base] for own, base in beside]
        found["spread_difference"] = _interval(spread_difference, both)
    return found
