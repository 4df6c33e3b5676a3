"""The section ``effects``: what training does beside the task it was for.

Forgetting: perplexity on held-out plain text, and accuracy on other benchmarks. Diversity: what sampled
continuations of plain text look like. Sensitivity to wording: accuracy when the prompt's literals change.
Functions take the model in the state it is in, and give numbers by row; :func:`summarise` compares
conditions with the base model, on the same rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ia2.analysis.conditions import BASE, Runner
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


class SideEffects:
    """Side effects of all training sets.

    Args:
        runners: of all training sets.
        text: file of plain text, or None for the packaged one.
        benchmarks: names of other benchmarks on which to look for forgetting.
        data_dir: folder of their mirrors.
        parsers: those that a benchmark's file may name.

    Raises:
        ConfigError: a benchmark is unknown.
        DataError: texts or rows cannot be had or do not fit the context window, or the model cannot tell a
            benchmark's labels apart; before anything is run.
    """

    def __init__(
        self,
        runners: Sequence[Runner],
        text: str | None = None,
        benchmarks: Sequence[str] = (),
        data_dir: str | None = None,
        parsers: Sequence[str] = (),
    ) -> None:
        self._texts = plain_texts(text)
        prompt_format = runners[0].teaching.prompts.format
        self._elsewhere = {
            Path(name).stem: other_benchmark(name, prompt_format, data_dir, parsers) for name in benchmarks
        }
        for task, rows in self._elsewhere.values():
            for runner in runners:
                runner.check_bare(rows, task.reserve)
        self._found: list[dict[str, Rows]] = []

    def add(self, runner: Runner, results: Mapping[str, Any]) -> None:
        """One training set: the base model and each checkpoint."""
        found: dict[str, Rows] = {}
        for name, checkpoint in ((BASE.name, None), *((c.name, c) for c in runner.set.checkpoints)):
            with runner.showing(checkpoint) as model:
                if checkpoint is None and self._found:
                    # what does not depend on the training set is measured once
                    known = self._found[0][name].items()
                    rows = {key: values for key, values in known if key[0] != "wordings"}
                else:
                    rows = self._measured(runner, model)
                found[name] = rows | self._worded(runner, model)
        self._found.append(found)

    def _measured(self, runner: Runner, model: Any) -> Rows:
        tokenizer, window = runner.base.tokenizer, runner.window(model)
        prompt_format = runner.teaching.prompts.format
        rows: Rows = {("perplexity",): perplexity(model, tokenizer, self._texts, window)}
        for name, (task, examples) in self._elsewhere.items():
            correct = accuracy(model, tokenizer, task, examples, prompt_format, window)
            rows |= {("benchmarks", name, scope): values for scope, values in correct.items()}
        starts = openings(tokenizer, self._texts[:_OPENINGS])
        diverse = diversity(model, tokenizer, starts, runner.task.names)
        return rows | {("diversity", measure): values for measure, values in diverse.items()}

    def _worded(self, runner: Runner, model: Any) -> Rows:
        """Accuracy under other wordings; of label tasks only."""
        if runner.task.kind != "classification":
            return {}
        queries = runner.set.queries[:_WORDING_QUERIES]
        worded = wordings(queries, list(runner.task.labels), runner.set.config.prompt_template)
        prompt_format, window = runner.teaching.prompts.format, runner.window(model)
        return wording_accuracy(model, runner.base.tokenizer, runner.task, worded, prompt_format, window)

    def section(self) -> dict[str, Any]:
        """Of all training sets."""
        return summarise(self._found)


# -------------------------------------------------------------------------------------- measurements


def other_benchmark(
    name: str | Path,
    prompt_format: PromptFormat,
    data_dir: str | Path | None = None,
    parsers: Sequence[str] = (),
) -> tuple[Task, Examples]:
    """A benchmark to look for forgetting on: its task, and test rows.

    Args:
        name: of :data:`ia2.data.benchmarks.BENCHMARKS`, or a YAML file.
        prompt_format: of the run, whose style of prompts it gets.
        data_dir: folder of mirrors.
        parsers: those that the file may name.

    Raises:
        ConfigError: the benchmark is unknown.
        DataError: its rows cannot be had, or the model cannot tell its labels apart.
    """
    from ia2.data.benchmarks import load_benchmark

    benchmark = load_benchmark(name, parsers)
    rows = benchmark.load(data_dir, None, _BENCHMARK_ROWS).test
    style = {
        "chat": prompt_format.chat,
        "thinking": prompt_format.thinking,
        "separator": prompt_format.separator,
    }
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
    """Which bare queries are answered rightly.

    Returns:
        Scope → 0 or 1, ``[n]``: ``vocabulary`` (the most probable token) and ``labels`` (the best of the
        label set, which a model can know that would rather say something else); of free text ``vocabulary``
        and ``answer``, which are the same.

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
    found: Rows = {}
    for name, examples in worded.items():
        try:
            correct = accuracy(model, tokenizer, task, examples, prompt_format, window, f"wording: {name}")
        except DataError as error:
            if name == UNCHANGED:
                raise
            logger.warning("The wording '%s' is left out: %s", name, error)
            continue
        found |= {("wordings", name, scope): values for scope, values in correct.items()}
    return found


# ----------------------------------------------------------------------------------------- summaries

_Found = Sequence[Mapping[str, Rows]]


def summarise(found: _Found) -> dict[str, Any]:
    """What was measured of each condition, and how it differs from the base model on the same rows.

    Args:
        found: of each training set, condition → what was measured of it.

    Returns:
        The section: ``views``, ``reference``, and where measured ``perplexity``, ``benchmarks``,
        ``diversity`` and ``wordings``. Every number is ``{"value", "low", "high"}``, with a 95% t-interval
        over training sets; of one over its rows, where it is a mean of them. Differences are paired by row.
    """
    views = list(dict.fromkeys(view for each in found for view in each))
    keys = list(dict.fromkeys(key for each in found for rows in each.values() for key in rows))

    def size(*key: str) -> int:
        return next(len(rows[key]) for each in found for rows in each.values() if key in rows)

    parts: dict[str, Any] = {}
    if ("perplexity",) in keys:
        parts["perplexity"] = _perplexity(found, views)
    for key in keys:
        means = _means(found, views, key, "mean" if key[0] == "diversity" else "accuracy")
        if key[0] == "benchmarks":
            entry = parts.setdefault("benchmarks", {}).setdefault(key[1], {"rows": size(*key), "scopes": {}})
            entry["scopes"][key[2]] = {"views": means}
        if key[0] == "diversity":
            entry = parts.setdefault("diversity", {"openings": size(*key), "measures": {}})
            entry["measures"][key[1]] = {"about": DIVERSITY[key[1]], "views": means}
    scopes = [key[2] for key in keys if key[:2] == ("wordings", UNCHANGED)]
    if scopes:
        parts["wordings"] = {"rows": size("wordings", UNCHANGED, scopes[0])} | _wordings(found, views, scopes)
    return {"views": views, "reference": BASE.name, **parts}


def _pairs(found: _Found, view: str, *keys: tuple[str, ...]) -> tuple[list[Any], list[Any]]:
    """Rows of a condition in each training set that has them; and beside the base model's."""
    alone, beside = [], []
    for each in found:
        own, base = (
            [each[name][key] for key in keys] if all(key in each.get(name, {}) for key in keys) else None
            for name in (view, BASE.name)
        )
        if own is not None:
            alone.append(own)
            if base is not None and view != BASE.name:
                beside.append((own, base))
    return alone, beside


def _means(found: _Found, views: Sequence[str], key: tuple[str, ...], name: str) -> dict[str, Any]:
    """Mean of the rows of each condition that has them, and what it differs by."""
    entries: dict[str, Any] = {}
    for view in views:
        alone, beside = _pairs(found, view, key)
        if alone:
            entries[view] = {name: mean_interval([own for (own,) in alone]).to_dict()}
        if beside:
            differences = [own - base for (own,), (base,) in beside]
            entries[view]["difference"] = mean_interval(differences).to_dict()
    return entries


def _perplexity(found: _Found, views: Sequence[str]) -> dict[str, Any]:
    def exponential(logs: Sequence[float]) -> dict[str, float | None]:
        ends = t_interval(logs).to_dict()
        return {end: None if value is None else float(np.exp(value)) for end, value in ends.items()}

    entries: dict[str, Any] = {}
    texts: Any = None
    for view in views:
        alone, beside = _pairs(found, view, ("perplexity",))
        if alone:
            (texts,) = alone[0]
            entries[view] = {
                "perplexity": exponential([n.sum() / t.sum() for n, t in (o[0].T for o in alone)])
            }
        if beside:
            ratios = [(o[:, 0].sum() - b[:, 0].sum()) / o[:, 1].sum() for (o,), (b,) in beside]
            entries[view]["ratio"] = exponential(ratios)
    return {"texts": len(texts), "tokens": int(texts[:, 1].sum()), "views": entries}


def _wordings(found: _Found, views: Sequence[str], scopes: Sequence[str]) -> dict[str, Any]:
    """Only wordings that were measured everywhere; the others are named."""
    measured = [{key[1] for key in rows if key[0] == "wordings"} for each in found for rows in each.values()]
    names = [name for name in WORDINGS if all(name in each for each in measured if each)]
    entries: dict[str, Any] = {}
    for scope in scopes:
        worded = {view: _under_wordings(found, view, names, scope) for view in views}
        entries[scope] = {"views": {view: value for view, value in worded.items() if value}}
    return {
        "wordings": {name: WORDINGS[name][0] for name in names},
        "left_out": [name for name in WORDINGS if name not in names],
        "scopes": entries,
    }


def _under_wordings(found: _Found, view: str, names: Sequence[str], scope: str) -> dict[str, Any]:
    """Accuracy under each wording, against the unchanged prompt; spread from best to worst."""

    def spread(rows: Sequence[np.ndarray]) -> float:
        return float(np.ptp([row.mean() for row in rows]))

    alone, beside = _pairs(found, view, *(("wordings", name, scope) for name in names))
    if not alone:
        return {}
    first = names.index(UNCHANGED)
    accuracies = {name: mean_interval([own[n] for own in alone]).to_dict() for n, name in enumerate(names)}
    worst = min(accuracies, key=lambda name: accuracies[name]["value"] or 0.0)
    entry: dict[str, Any] = {
        "accuracy": accuracies,
        "difference": {
            name: mean_interval([own[n] - own[first] for own in alone]).to_dict()
            for n, name in enumerate(names)
            if n != first
        },
        "spread": t_interval([spread(own) for own in alone]).to_dict(),
        "worst": {"wording": worst, "accuracy": accuracies[worst]["value"]},
    }
    if beside:
        differences = [spread(own) - spread(base) for own, base in beside]
        entry["spread_difference"] = t_interval(differences).to_dict()
    return entry
