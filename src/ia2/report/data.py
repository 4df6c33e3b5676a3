"""What a report reads of a finished run: its summary, and the rows and stages behind it. No model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ia2.experiment.run_folder import not_finished, read_run_file
from ia2.report.tables import INTERVALS, MEASURES
from ia2.utils.errors import RunFolderError
from ia2.utils.files import read_json, read_lines, understood
from ia2.utils.logging import logger
from ia2.utils.manifest import RUN_FILE
from ia2.utils.statistics import main_scope

Kind = Literal["compare", "curve", "train", "sweep"]

# Written last, so it marks a run as finished.
_RESULT: dict[Kind, str] = {"curve": "curve.json", "compare": "compare.json", "train": "metrics.json"}
_SWEEP_FILES = ("cells.jsonl", "cells", "grid.yaml", "sweep.json")

MAX_ROWS = 5_000
"""Rows of per-example predictions that a page holds."""

MAX_QUERY = 2_000
"""Characters of a query that a page holds."""


@dataclass(frozen=True)
class Evaluation:
    """One arm on the test rows of one seed and fold.

    Attributes:
        seed: of the training examples.
        places: of the rows in the data, ``[n]``.
        confidence: of each prediction, ``[n]``.
        correct: 0 or 1, ``[n]``.
        asim: mean similarity to ICL; None where it was not measured.
        asim_by_layer: the same by layer, ``[L]``.
    """

    seed: int
    places: np.ndarray = field(repr=False)
    confidence: np.ndarray = field(repr=False)
    correct: np.ndarray = field(repr=False)
    asim: float | None = None
    asim_by_layer: tuple[float, ...] = ()


@dataclass(frozen=True)
class Stage:
    """One trained stage.

    Attributes:
        name: its chain of stages, ``align-sft``, behind what varies (``dora/align-sft``).
        where: seed and fold.
        rate: as its folder says.
        dev_loss: the best; None without dev rows.
        best_step: where it was.
        steps: taken.
        history: ``{"step", "loss"}`` and ``{"step", "eval_loss"}``, in turn.
        diverged: it did, so that there is no dev loss.
    """

    name: str
    where: str
    rate: str
    dev_loss: float | None
    best_step: int
    steps: int
    history: tuple[dict[str, float], ...] = field(repr=False)
    diverged: bool = False


@dataclass(frozen=True)
class Answer:
    """What one arm answered."""

    predicted: str
    correct: bool | None
    confidence: float


@dataclass(frozen=True)
class Row:
    """One test row of one seed, answered by every arm.

    Attributes:
        part: the comparison within a curve, ``N = 8``; empty otherwise.
        seed: of the training examples.
        source: file and line.
        query: the prompt.
        gold: the true answer; empty if unknown.
        answers: by arm.
    """

    part: str
    seed: int
    source: str
    query: str
    gold: str
    answers: dict[str, Answer]


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        kind: which command wrote it.
        folder: where it lies.
        summary: its main file.
        facts: ``ia2_run.json``; empty where only results were kept.
        evaluations: by arm; empty where only the summary was kept.
        stages: trained, every rate that was tried.
        rows: per-example predictions, up to :data:`MAX_ROWS`.
        num_rows: how many there are.
        parts: the comparisons of a curve, by N.
    """

    kind: Kind
    folder: Path
    summary: dict[str, Any] = field(repr=False)
    facts: dict[str, Any] = field(repr=False)
    evaluations: dict[str, list[Evaluation]] = field(repr=False)
    stages: list[Stage] = field(repr=False)
    rows: list[Row] = field(repr=False)
    num_rows: int
    parts: dict[int, Run] = field(default_factory=dict, repr=False)

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
    summary = read_json(folder / _RESULT[kind])
    facts = read_run_file(folder) if (folder / RUN_FILE).is_file() else {}
    with understood(folder):
        if kind == "train":
            return _train(folder, summary, facts)
        return _curve(folder, summary) if kind == "curve" else _compare(folder, summary, facts)


def _compare(folder: Path, summary: dict[str, Any], facts: dict[str, Any], part: str = "") -> Run:
    rates = summary["design"]["learning_rates"]
    if isinstance(rates, list):  # before several adapter types could be compared
        summary["design"]["learning_rates"] = {summary["config"]["adapter"]["type"]: rates}
    arms = list(summary["recipes"])
    scope = main_scope(summary["design"]["task"] == "classification")
    without_older_intervals(summary)
    evaluations: dict[str, list[Evaluation]] = {}
    rows: list[Row] = []
    total = 0
    for where, seed, _ in _rounds(folder):
        for arm in arms:
            file = where / "evaluations" / f"{arm}.json"
            if file.is_file():
                evaluations.setdefault(arm, []).append(_evaluation(read_json(file), seed, scope))
        found = _rows(where / "evaluations", arms, seed, part)
        total += len(found)
        rows += found[: MAX_ROWS - len(rows)]
    return Run("compare", folder, summary, facts, evaluations, _stages(folder), rows, total)


def _curve(folder: Path, summary: dict[str, Any]) -> Run:
    without_older_intervals(summary)
    parts: dict[int, Run] = {}
    for size in summary["sizes"]:
        where = folder / f"n-{size}"
        if (where / "compare.json").is_file():
            facts = read_run_file(where) if (where / RUN_FILE).is_file() else {}
            parts[size] = _compare(where, read_json(where / "compare.json"), facts, f"N = {size}")
        else:
            logger.warning("%s: no comparison is there any more; its rows are left out.", where)
    facts = next((part.facts for part in parts.values()), {})
    rows = [row for part in parts.values() for row in part.rows][:MAX_ROWS]
    total = sum(part.num_rows for part in parts.values())
    return Run("curve", folder, summary, facts, {}, [], rows, total, parts)


def _train(folder: Path, summary: dict[str, Any], facts: dict[str, Any]) -> Run:
    seed, arm = int(facts["config"]["seed"]), summary["recipe"]
    rows: list[Row] = []
    file = folder / "predictions.jsonl"
    found = read_lines(file) if file.is_file() else []
    rows = [_row([(arm, line)], seed, "") for line in found]
    known = [(n, a) for n, row in enumerate(rows) if (a := row.answers[arm]).correct is not None]
    evaluation = Evaluation(
        seed,
        np.array([n for n, _ in known], dtype=int),
        np.array([a.confidence for _, a in known], dtype=float),
        np.array([a.correct for _, a in known], dtype=float),
    )
    evaluations = {arm: [evaluation]} if known else {}
    return Run("train", folder, summary, facts, evaluations, _stages(folder), rows[:MAX_ROWS], len(rows))


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
    todo: list[Any] = [summary]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            if {"value", "low", "high"} <= set(value):
                value |= {"low": None, "high": None}
            todo += value.values()
        elif isinstance(value, list):
            todo += value
    for points in summary.get("curves", {}).values():
        for point in points:  # over the vocabulary, which is all that was kept
            point["accuracy_vocabulary"] = point.pop("accuracy")
            point.pop("ece", None)


def _of_means(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Differences of two recipes' means, without intervals."""
    scope = main_scope("labels" in first["metrics"])
    found: dict[str, Any] = {}
    for name in MEASURES:
        one, two = (entry["metrics"][scope].get(name, {}).get("value") for entry in (first, second))
        value = None if one is None or two is None else one - two
        found[name] = {"value": value, "low": None, "high": None}
    return found


def _number(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _rounds(folder: Path) -> Iterator[tuple[Path, int, str]]:
    """Folders of seeds and folds: the folder, its seed, and both in words."""
    seeds = [path for path in folder.glob("seed-*") if re.fullmatch(r"seed-\d+", path.name)]
    for where in sorted(seeds, key=_number):
        seed = _number(where)
        if (where / "evaluations").is_dir():
            yield where, seed, f"seed {seed}"
        folds = [path for path in where.glob("fold-*") if re.fullmatch(r"fold-\d+", path.name)]
        for fold in sorted(folds, key=_number):
            yield fold, seed, f"seed {seed}, fold {_number(fold)}"


def _evaluation(found: dict[str, Any], seed: int, scope: str) -> Evaluation:
    rows = found["measured"]["plain"][scope]
    similarity = found.get("similarity")
    return Evaluation(
        seed,
        np.array(found["places"], dtype=int),
        np.array(rows["confidence"], dtype=float),
        np.array(rows["correct"], dtype=float),
        None if similarity is None else float(similarity["asim"]),
        () if similarity is None else tuple(similarity["asim_by_layer"]),
    )


def _stages(folder: Path) -> list[Stage]:
    rounds = [(where, words) for where, _, words in _rounds(folder)] or [(folder, "")]
    found = []
    for where, words in rounds:
        for file in sorted(where.glob("**/stage.json")):
            value = read_json(file)
            chain = file.relative_to(where).parts[:-2]
            dev_loss = value.get("dev_loss")
            found.append(
                Stage(
                    "/".join(chain),
                    words,
                    file.parent.name,
                    None if dev_loss is None else float(dev_loss),
                    int(value["best_step"]),
                    int(value["steps"]),
                    tuple(value["history"]),
                    bool(value.get("diverged")),
                )
            )
    return found


def _rows(folder: Path, arms: Sequence[str], seed: int, part: str) -> list[Row]:
    """Rows of one seed and fold, by place: every arm was given the same ones in the same order."""
    files = [(arm, folder / f"{arm}.predictions.jsonl") for arm in arms]
    by_arm = {arm: read_lines(file) for arm, file in files if file.is_file()}
    lengths = {len(lines) for lines in by_arm.values()}
    if len(lengths) > 1:
        raise RunFolderError(f"{folder}: predictions of differing numbers of rows; a file is damaged.")
    count = lengths.pop() if lengths else 0
    return [_row([(arm, lines[n]) for arm, lines in by_arm.items()], seed, part) for n in range(count)]


def _row(found: Sequence[tuple[str, dict[str, Any]]], seed: int, part: str) -> Row:
    _, first = found[0]
    answers = {
        arm: Answer(_text(line["predicted"]), line["correct"], float(line["confidence"]))
        for arm, line in found
    }
    return Row(part, seed, _text(first["source"]), _text(first["query"]), _text(first["gold"]), answers)


def _text(value: Any) -> str:
    return "" if value is None else str(value)
