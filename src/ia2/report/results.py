"""What a report reads of a finished run: its summary, and the rows and stages behind it. No model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ia2.evaluation.tables import (
    INTERVALS,
    MEASURES,
    comparison_table,
    curve_table,
    metrics_table,
    scope_of,
)
from ia2.experiment.run_folder import ANALYSIS_FILE, not_finished, read_run_file
from ia2.utils.errors import RunFolderError
from ia2.utils.files import read_json, read_lines, understood
from ia2.utils.format import Table
from ia2.utils.logging import logger
from ia2.utils.manifest import RUN_FILE
from ia2.utils.statistics import main_scope

Kind = Literal["compare", "curve", "train", "sweep"]

# Written last, so it marks a run as finished.
_RESULT: dict[Kind, str] = {"curve": "curve.json", "compare": "compare.json", "train": "metrics.json"}
_SWEEP_FILES = ("cells.jsonl", "cells", "grid.yaml", "sweep.json")

MAX_ROWS = 5_000
"""Rows of per-example predictions that a page holds."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        kind: which command wrote it.
        folder: where it lies.
        summary: its main file.
        facts: ``ia2_run.json``; empty where only results were kept.
        evaluations: by arm, one a seed and fold: ``places``, ``confidence``, ``correct`` of its rows and
            ``similarity``; empty where only the summary was kept.
        stages: what each ``stage.json`` holds, with ``name``, ``where`` and ``rate``; every rate tried.
        rows: test rows up to :data:`MAX_ROWS`, one a seed: ``part`` of a curve, ``seed``, ``source``,
            ``query``, ``gold`` and ``answers`` by arm (``predicted``, ``correct``, ``confidence``).
        num_rows: how many there are.
        parts: the comparisons of a curve, by N.
        analysis: what ``ia2 analyze`` found; None where it was not run.
    """

    kind: Kind
    folder: Path
    summary: dict[str, Any] = field(repr=False)
    facts: dict[str, Any] = field(repr=False)
    evaluations: dict[str, list[dict[str, Any]]] = field(default_factory=dict, repr=False)
    stages: list[dict[str, Any]] = field(default_factory=list, repr=False)
    rows: list[dict[str, Any]] = field(default_factory=list, repr=False)
    num_rows: int = 0
    parts: dict[int, Run] = field(default_factory=dict, repr=False)
    analysis: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """Of its folder, without the folders around it."""
        return self.folder.resolve().name or str(self.folder)

    @property
    def arms(self) -> list[str]:
        """What was evaluated."""
        if self.kind == "train":
            return [self.summary["recipe"]]
        return list(self.summary["recipes" if self.kind == "compare" else "curves"])

    @property
    def table(self) -> Table | None:
        """Its main table; None of an adapter that was not evaluated."""
        if self.kind == "train":
            return metrics_table(self.summary)
        return curve_table(self.summary) if self.kind == "curve" else comparison_table(self.summary)


def kind_of(folder: Path) -> Kind:
    """Which command wrote a folder.

    Raises:
        RunFolderError: none did, or it has not finished.
    """
    if not folder.is_dir():
        raise RunFolderError(f"{folder}: there is no such folder. Give one that ia2 wrote.")
    if any((folder / name).exists() for name in _SWEEP_FILES):
        return "sweep"
    for kind, name in _RESULT.items():
        if (folder / name).is_file():
            return kind
    if (folder / RUN_FILE).is_file() or any(folder.glob(f"n-*/{RUN_FILE}")):
        raise RunFolderError(not_finished(folder))
    raise RunFolderError(
        f"{folder}: no run of ia2 there. Give a folder that `ia2 compare`, `demo`, `curve`, `train` or "
        "`sweep` wrote."
    )


def read_run(folder: Path) -> Run:
    """Read a finished run of ``ia2 compare``, ``demo``, ``curve`` or ``train``.

    Raises:
        RunFolderError: no run, an unfinished or a damaged one.
    """
    kind = kind_of(folder)
    if kind == "sweep":
        raise RunFolderError(f"{folder}: a sweep, which `ia2 report` reads by its cells.")
    with understood(folder):
        if kind == "train":
            return _train(folder)
        return _curve(folder) if kind == "curve" else _compare(folder)


def read_analysis(folder: Path) -> dict[str, Any] | None:
    """The analysis in a run's folder, if there is one.

    Raises:
        RunFolderError: it is damaged.
    """
    file = folder / ANALYSIS_FILE
    if not file.is_file():
        return None
    found = read_json(file)
    if not isinstance(found, dict) or "format" not in found:
        raise RunFolderError(f"{file}: no analysis of `ia2 analyze`. Delete it, or run it again.")
    return found


def _facts(folder: Path) -> dict[str, Any]:
    return read_run_file(folder) if (folder / RUN_FILE).is_file() else {}


def _compare(folder: Path, part: str = "") -> Run:
    summary = read_json(folder / _RESULT["compare"])
    rates = summary["design"]["learning_rates"]
    if isinstance(rates, list):  # before several adapter types could be compared
        summary["design"]["learning_rates"] = {summary["config"]["adapter"]["type"]: rates}
    without_older_intervals(summary)
    arms, scope = list(summary["recipes"]), scope_of(summary)
    evaluations: dict[str, list[dict[str, Any]]] = {}
    rows: list[dict[str, Any]] = []
    total = 0
    for where, seed, _ in _rounds(folder):
        for arm in arms:
            file = where / "evaluations" / f"{arm}.json"
            if file.is_file():
                found = read_json(file)
                kept = {"places": found["places"], "similarity": found.get("similarity")}
                evaluations.setdefault(arm, []).append({**found["measured"]["plain"][scope], **kept})
        own = _rows(where / "evaluations", arms, seed, part)
        total += len(own)
        rows += own[: MAX_ROWS - len(rows)]
    stages, analysis = _stages(folder), read_analysis(folder)
    return Run("compare", folder, summary, _facts(folder), evaluations, stages, rows, total, {}, analysis)


def _curve(folder: Path) -> Run:
    summary = read_json(folder / _RESULT["curve"])
    without_older_intervals(summary)
    parts: dict[int, Run] = {}
    for size in summary["sizes"]:
        where = folder / f"n-{size}"
        if (where / _RESULT["compare"]).is_file():
            parts[size] = _compare(where, f"N = {size}")
        else:
            logger.warning("%s: no comparison is there any more; its rows are left out.", where)
    facts = next((part.facts for part in parts.values()), {})
    rows = [row for part in parts.values() for row in part.rows][:MAX_ROWS]
    total = sum(part.num_rows for part in parts.values())
    analysis = read_analysis(folder)
    return Run("curve", folder, summary, facts, {}, [], rows, total, parts, analysis)


def _train(folder: Path) -> Run:
    summary, facts = read_json(folder / _RESULT["train"]), _facts(folder)
    seed, arm = int(facts["config"]["seed"]), summary["recipe"]
    file = folder / "predictions.jsonl"
    rows = [_row({arm: line}, seed, "") for line in (read_lines(file) if file.is_file() else [])]
    answers = [(place, row["answers"][arm]) for place, row in enumerate(rows)]
    known = [(place, answer) for place, answer in answers if answer["correct"] is not None]
    evaluation = {
        "places": [place for place, _ in known],
        "confidence": [answer["confidence"] for _, answer in known],
        "correct": [float(answer["correct"]) for _, answer in known],
        "similarity": None,
    }
    evaluations = {arm: [evaluation]} if known else {}
    stages, analysis = _stages(folder), read_analysis(folder)
    return Run("train", folder, summary, facts, evaluations, stages, rows[:MAX_ROWS], len(rows), {}, analysis)


def without_older_intervals(summary: dict[str, Any]) -> None:
    """Take off what an older version says of uncertainty: intervals, and differences over the vocabulary.

    What it measured stays, and differences are those of the means. Where intervals are of draws, nothing is
    changed.
    """
    if summary.get("intervals") == INTERVALS:
        return
    recipes = summary.get("recipes", {})
    pairs = [name.split(" − ") for name in summary["differences"]] if recipes else []
    summary["differences"] = {f"{a} − {b}": _of_means(recipes[a], recipes[b]) for a, b in pairs}
    if {"icl", "sft"} <= set(recipes):
        summary["headroom"] = {"icl − sft": _of_means(recipes["icl"], recipes["sft"])}
    for points in summary.get("curves", {}).values():
        for point in points:  # over the vocabulary, which is all that was kept
            point["accuracy_vocabulary"] = point.pop("accuracy")
            point.pop("ece", None)
    todo: list[Any] = [summary]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            if {"value", "low", "high"} <= set(value):
                value |= {"low": None, "high": None}
            todo += value.values()
        elif isinstance(value, list):
            todo += value


def _of_means(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Differences of two recipes' means."""
    scope = main_scope("labels" in first["metrics"])
    found: dict[str, Any] = {}
    for name in MEASURES:
        one, two = (entry["metrics"][scope].get(name, {}).get("value") for entry in (first, second))
        found[name] = {"value": None if one is None or two is None else one - two, "low": None, "high": None}
    return found


def _numbered(folder: Path, name: str) -> list[tuple[int, Path]]:
    """Folders ``NAME-3``, by number."""
    found = [
        (match, path) for path in folder.glob(f"{name}-*") if (match := re.fullmatch(r"\w+-(\d+)", path.name))
    ]
    return sorted((int(match[1]), path) for match, path in found)


def _rounds(folder: Path) -> Iterator[tuple[Path, int, str]]:
    """Folders of seeds and folds: the folder, its seed, and both in words."""
    for seed, where in _numbered(folder, "seed"):
        if (where / "evaluations").is_dir():
            yield where, seed, f"seed {seed}"
        for number, fold in _numbered(where, "fold"):
            yield fold, seed, f"seed {seed}, fold {number}"


def _stages(folder: Path) -> list[dict[str, Any]]:
    rounds = [(where, words) for where, _, words in _rounds(folder)] or [(folder, "")]
    found = []
    for where, words in rounds:
        for file in sorted(where.glob("**/stage.json")):
            # the chain of stages, align-sft, behind what varies: dora/align-sft
            chain = "/".join(file.relative_to(where).parts[:-2])
            found.append({**read_json(file), "name": chain, "where": words, "rate": file.parent.name})
    return found


def _rows(folder: Path, arms: Sequence[str], seed: int, part: str) -> list[dict[str, Any]]:
    """Rows of one seed and fold, by place: every arm was given the same ones in the same order."""
    files = [(arm, folder / f"{arm}.predictions.jsonl") for arm in arms]
    by_arm = {arm: read_lines(file) for arm, file in files if file.is_file()}
    lengths = {len(lines) for lines in by_arm.values()}
    if len(lengths) > 1:
        raise RunFolderError(f"{folder}: predictions of differing numbers of rows; a file is damaged.")
    count = lengths.pop() if lengths else 0
    return [_row({arm: lines[n] for arm, lines in by_arm.items()}, seed, part) for n in range(count)]


def _row(lines: dict[str, dict[str, Any]], seed: int, part: str) -> dict[str, Any]:
    first = next(iter(lines.values()))
    answers = {
        arm: {
            "predicted": _text(line["predicted"]),
            "correct": line["correct"],
            "confidence": float(line["confidence"]),
        }
        for arm, line in lines.items()
    }
    texts = {name: _text(first[name]) for name in ("source", "query", "gold")}
    return {"part": part, "seed": seed, **texts, "answers": answers}


def _text(value: Any) -> str:
    return "" if value is None else str(value)
