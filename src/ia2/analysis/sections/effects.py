"""Side effects: what training does beside the task it was for.

Forgetting: perplexity on held-out plain text, and accuracy on other benchmarks. Diversity: what sampled
continuations of plain text look like. Sensitivity to wording: accuracy when the prompt's literals change.
Functions take the model in the state it is in, and give numbers by row; :func:`summarise` compares
conditions with the base model, on the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ia2.analysis.conditions import BASE, Runner
from ia2.analysis.section import Analysis, AnalysisSection, Look
from ia2.config import AdaptConfig
from ia2.config.reading import validate
from ia2.data.examples import Example, Examples
from ia2.evaluation.evaluate import evaluate_prompts
from ia2.evaluation.plain_text import DIVERSITY, diversity, openings, perplexity, plain_texts
from ia2.evaluation.wordings import UNCHANGED, WORDINGS, wordings
from ia2.prompts.builder import query_prompts
from ia2.prompts.format import PromptFormat
from ia2.prompts.task import Task, make_task
from ia2.utils.errors import DataError
from ia2.utils.logging import logger
from ia2.utils.statistics import mean_interval, t_interval

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

Rows = dict[tuple[str, ...], np.ndarray]
"""What was measured of one condition, by row: ``("perplexity",)`` ``[n, 2]``; ``("benchmarks", name,
scope)``, ``("wordings", wording, scope)`` and ``("diversity", measure)`` ``[n]``."""

# Rows of each other benchmark; queries that each wording is tried on; openings that are gone on from.
_BENCHMARK_ROWS, _WORDING_QUERIES, _OPENINGS = 200, 64, 20


class Materials(NamedTuple):
    """What is measured on beside the runs' queries; ``base`` is kept of the first training set."""

    texts: list[str]
    benchmarks: dict[str, tuple[Task, Examples]]
    base: Rows


def _prepare(analysis: Analysis) -> Materials:
    settings, runners = analysis.settings, analysis.runners
    texts = plain_texts(settings.text)
    prompt_format, parsers = runners[0].teaching.prompts.format, settings.code.get("parser") or ()
    benchmarks = {
        Path(name).stem: other_benchmark(name, prompt_format, settings.data_dir, parsers)
        for name in settings.benchmarks
    }
    for task, rows in benchmarks.values():
        for runner in runners:
            runner.check_bare(rows, task.reserve)
    return Materials(texts, benchmarks, {})


def _measure(look: Look) -> dict[str, Rows]:
    """The base model and each checkpoint."""
    runner, materials = look.runner, look.analysis.prepared["effects"]
    found: dict[str, Rows] = {}
    for name, checkpoint in ((BASE.name, None), *((c.name, c) for c in runner.set.checkpoints)):
        with runner.showing(checkpoint) as model:
            # of the base model what does not depend on the training set is measured once
            known = materials.base if checkpoint is None else {}
            measured = known or _measured(runner, model, materials)
            if checkpoint is None:
                materials.base.update(measured)
            found[name] = measured | _worded(runner, model)
    return found


def _measured(runner: Runner, model: Any, materials: Materials) -> Rows:
    tokenizer, window = runner.base.tokenizer, runner.window(model)
    prompt_format = runner.teaching.prompts.format
    rows: Rows = {("perplexity",): perplexity(model, tokenizer, materials.texts, window)}
    for name, (task, examples) in materials.benchmarks.items():
        correct = accuracy(model, tokenizer, task, examples, prompt_format, window)
        rows |= {("benchmarks", name, scope): values for scope, values in correct.items()}
    starts = openings(tokenizer, materials.texts[:_OPENINGS])
    diverse = diversity(model, tokenizer, starts, runner.task.names)
    return rows | {("diversity", measure): values for measure, values in diverse.items()}


def _worded(runner: Runner, model: Any) -> Rows:
    """Accuracy under other wordings; of label tasks only."""
    if runner.task.kind != "classification":
        return {}
    queries = runner.set.queries[:_WORDING_QUERIES]
    worded = wordings(queries, list(runner.task.labels), runner.set.config.prompt_template)
    prompt_format, window = runner.teaching.prompts.format, runner.window(model)
    return wording_accuracy(model, runner.base.tokenizer, runner.task, worded, prompt_format, window)


def other_benchmark(
    name: str | Path,
    prompt_format: PromptFormat,
    data_dir: str | Path | None = None,
    parsers: Sequence[str] = (),
) -> tuple[Task, Examples]:
    """A benchmark (a name, or a YAML file) to look for forgetting on: its task, and test rows.

    Raises:
        ConfigError: the benchmark is unknown.
        DataError: its rows cannot be had, or the model cannot tell its labels apart.
    """
    from ia2.data.benchmarks import load_benchmark

    benchmark = load_benchmark(name, parsers)
    rows = benchmark.load(data_dir, None, _BENCHMARK_ROWS).test
    style = {key: getattr(prompt_format, key) for key in ("chat", "thinking", "separator")}
    config = validate(AdaptConfig, {**benchmark.settings(None), **style}, benchmark.name)
    try:
        return make_task(rows, config, prompt_format.tokenizer, benchmark.prompt), rows
    except DataError as error:
        raise DataError(f"{benchmark.name}: {error}") from error


def accuracy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
    prompt_format: PromptFormat,
    window: int,
    description: str = "accuracy",
) -> dict[str, np.ndarray]:
    """Which bare queries are answered rightly: scope → 0 or 1, ``[n]``.

    ``vocabulary`` (the most probable token) and ``labels`` (the best of the label set, which a model can know
    that would rather say something else); of free text ``vocabulary`` and ``answer``, which are the same.

    Raises:
        DataError: a query is longer than the window.
    """
    prompts = query_prompts(prompt_format, examples, window, task.reserve)
    _, measured = evaluate_prompts(model, tokenizer, task, examples, prompts, description=description)
    return {scope: rows.correct for scope, rows in measured.plain.items()}


def wording_accuracy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    worded: Mapping[str, Sequence[Example]],
    prompt_format: PromptFormat,
    window: int,
) -> Rows:
    """:func:`accuracy` under every wording of the queries, from :func:`wordings`.

    Raises:
        DataError: a query is too long as it is. A wording that makes one too long is left out with a warning.
    """
    rows: Rows = {}
    for name, examples in worded.items():
        try:
            correct = accuracy(model, tokenizer, task, examples, prompt_format, window, f"wording: {name}")
        except DataError as error:
            if name == UNCHANGED:
                raise
            logger.warning("The wording '%s' is left out: %s", name, error)
            continue
        rows |= {("wordings", name, scope): values for scope, values in correct.items()}
    return rows


# ----------------------------------------------------------------------------------------- summaries

_Results = Sequence[Mapping[str, Rows]]
_Estimate = dict[str, Any]


def summarise(results: _Results) -> dict[str, Any]:
    """What was measured of each condition of each training set, and how it differs from the base model.

    Returns:
        The section: ``views``, ``reference``, and where measured ``perplexity``, ``benchmarks``,
        ``diversity`` and ``wordings``. Every number is ``{"value", "low", "high"}``, with a 95% t-interval
        over training sets; of one over its rows, where it is a mean of them. Differences are paired by row.
    """
    views = list(dict.fromkeys(view for each in results for view in each))
    keys = list(dict.fromkeys(key for each in results for rows in each.values() for key in rows))
    parts: dict[str, Any] = {}
    for key in keys:
        first = next(rows[key] for each in results for rows in each.values() if key in rows)
        if key[0] == "perplexity":
            measured = {"perplexity": _perplexity, "ratio": _ratio}
            parts["perplexity"] = {
                "texts": len(first),
                "tokens": int(first[:, 1].sum()),
                "views": _views(results, views, (key,), measured),
            }
        elif key[0] == "benchmarks":
            entry = parts.setdefault("benchmarks", {}).setdefault(key[1], {"rows": len(first), "scopes": {}})
            entry["scopes"][key[2]] = {"views": _views(results, views, (key,), {"accuracy": _mean, **_LESS})}
        elif key[0] == "diversity":
            entry = parts.setdefault("diversity", {"openings": len(first), "measures": {}})
            means = _views(results, views, (key,), {"mean": _mean, **_LESS})
            entry["measures"][key[1]] = {"about": DIVERSITY[key[1]], "views": means}
        elif key[1] == UNCHANGED and "wordings" not in parts:
            parts["wordings"] = {"rows": len(first)} | _wordings(results, views, keys)
    return {"views": views, "reference": BASE.name, **parts}


def _views(
    results: _Results,
    views: Sequence[str],
    keys: Sequence[tuple[str, ...]],
    measures: Mapping[str, Callable[..., _Estimate]],
) -> dict[str, dict[str, Any]]:
    """Measures of each condition that has all of these rows; a measure of two is of it and the base model."""
    entries: dict[str, dict[str, Any]] = {}
    for view in views:
        alone, beside = [], []
        for each in results:
            own, base = (
                [each[name][key] for key in keys] if set(keys) <= set(each.get(name, ())) else None
                for name in (view, BASE.name)
            )
            alone += [] if own is None else [own]
            beside += [] if own is None or base is None or view == BASE.name else [(own, base)]
        for name, measure in measures.items():
            runs = beside if measure in _OF_TWO else alone
            if runs:
                entries.setdefault(view, {})[name] = measure(runs)
    return entries


def _mean(alone: Sequence[Any]) -> _Estimate:
    return mean_interval([own for (own,) in alone]).to_dict()


def _less_base(beside: Sequence[Any]) -> _Estimate:
    return mean_interval([own - base for (own,), (base,) in beside]).to_dict()


def _perplexity(alone: Sequence[Any]) -> _Estimate:
    return _exponential([own[:, 0].sum() / own[:, 1].sum() for (own,) in alone])


def _ratio(beside: Sequence[Any]) -> _Estimate:
    return _exponential([(o[:, 0].sum() - b[:, 0].sum()) / o[:, 1].sum() for (o,), (b,) in beside])


def _exponential(logs: Sequence[float]) -> _Estimate:
    ends = t_interval(logs).to_dict()
    return {end: None if value is None else float(np.exp(value)) for end, value in ends.items()}


def _spread(rows: Sequence[np.ndarray]) -> float:
    """From best to worst wording."""
    return float(np.ptp([row.mean() for row in rows]))


def _spread_of(alone: Sequence[Any]) -> _Estimate:
    return t_interval([_spread(own) for own in alone]).to_dict()


def _spread_less_base(beside: Sequence[Any]) -> _Estimate:
    return t_interval([_spread(own) - _spread(base) for own, base in beside]).to_dict()


_LESS = {"difference": _less_base}
_OF_TWO = (_less_base, _ratio, _spread_less_base)


def _wordings(results: _Results, views: Sequence[str], keys: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    """Accuracy under each wording that was measured everywhere, against the unchanged prompt."""
    measured = [
        {key[1] for key in rows if key[0] == "wordings"} for each in results for rows in each.values()
    ]
    names = [name for name in WORDINGS if all(name in each for each in measured if each)]
    first = names.index(UNCHANGED)

    def by_wording(alone: Sequence[Any]) -> _Estimate:
        return {name: mean_interval([own[n] for own in alone]).to_dict() for n, name in enumerate(names)}

    def less_unchanged(alone: Sequence[Any]) -> _Estimate:
        changes = {name: [own[n] - own[first] for own in alone] for n, name in enumerate(names) if n != first}
        return {name: mean_interval(change).to_dict() for name, change in changes.items()}

    def worst(alone: Sequence[Any]) -> _Estimate:
        means = {name: entry["value"] for name, entry in by_wording(alone).items()}
        name = min(means, key=lambda name: means[name] or 0.0)
        return {"wording": name, "accuracy": means[name]}

    measures = {
        "accuracy": by_wording,
        "difference": less_unchanged,
        "spread": _spread_of,
        "worst": worst,
        "spread_difference": _spread_less_base,
    }
    scopes = {}
    for scope in [key[2] for key in keys if key[:2] == ("wordings", UNCHANGED)]:
        worded = [("wordings", name, scope) for name in names]
        scopes[scope] = {"views": _views(results, views, worded, measures)}
    return {
        "wordings": {name: WORDINGS[name][0] for name in names},
        "left_out": [name for name in WORDINGS if name not in names],
        "scopes": scopes,
    }


SECTION = AnalysisSection(
    "side effects: forgetting, diversity, sensitivity to wording (minutes an adapter)",
    lambda results, analysis: summarise(results),
    measure=_measure,
    prepare=_prepare,
    default=False,
)
