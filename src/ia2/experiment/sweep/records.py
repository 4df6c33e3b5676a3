"""Records of a sweep's cells, as they are read back: typed, checked, without torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ia2.experiment.sweep.store import CELLS, loose_cells, read_lines
from ia2.utils.errors import ConfigError, DataError, RunFolderError, suggest
from ia2.utils.files import read_json
from ia2.utils.logging import logger
from ia2.utils.statistics import main_scope
from ia2.utils.wording import in_words

MEASURES = {
    "accuracy": "accuracy",
    "nll": "NLL",
    "brier": "Brier",
    "ece": "ECE",
    "accuracy_vocabulary": "accuracy over the vocabulary",
    "ece_vocabulary": "ECE over the vocabulary",
}
"""What tables show, among the labels (of free text: of the whole answer) unless it says otherwise."""


@dataclass(frozen=True)
class Evaluation:
    """One cell's predictions on one benchmark's test rows.

    Attributes:
        dataset: the benchmark evaluated on.
        n: test rows.
        test: fingerprint of the test rows; equal ones are the same rows in the same order.
        metrics: scope → metric → value, as ``evaluation/metrics.py`` names them, and ``scaled``.
        majority: share of the most frequent label among the rows; None where it was not kept.
        num_labels: how many there are; None where it was not kept.
    """

    dataset: str
    n: int
    test: str
    metrics: dict[str, Any] = field(repr=False)
    majority: float | None = None
    num_labels: int | None = None

    @property
    def labelled(self) -> bool:
        """Whether answers are labels of a fixed set (free text otherwise)."""
        return "answer" not in self.metrics

    @property
    def scope(self) -> str:
        """Of the measures that come first: among the labels, or of the whole answer."""
        return main_scope(self.labelled)

    def value(self, measure: str) -> float:
        """A measure of :data:`MEASURES`."""
        name, _, vocabulary = measure.partition("_")
        return float(self.metrics["vocabulary" if vocabulary else self.scope][name])

    @property
    def scaled_ece(self) -> float | None:
        """ECE after temperature scaling; None where it was not recorded."""
        found = self.metrics.get("scaled", {}).get(self.scope, {}).get("ece")
        return None if found is None else float(found)


@dataclass(frozen=True)
class Record:
    """One finished cell of a grid; the fields of ``spec`` are explained in :mod:`ia2.experiment.sweep.grid`.

    Attributes:
        key: digest of all that the result depends on.
        num_examples, seed, learning_rate, beta: None where a recipe has none.
        settings: dotted setting → value, where it differs from the default and matters to the recipe.
        notes: how the data differ from the hub's.
        selection_loss: dev loss that rates are chosen by; None without training.
        similarity: to ICL's activations (asim, l2, …); None where it was not measured.
        seconds: by kind: teacher, stages and :data:`OVERHEAD`.
        source: file and line.
    """

    key: str
    benchmark: str
    verbaliser: str | None
    model: str
    recipe: str
    variant: str
    num_examples: int | None
    seed: int | None
    learning_rate: float | None
    beta: float | None
    max_test: int | None
    settings: dict[str, Any]
    notes: tuple[str, ...]
    selection_loss: float | None
    evaluations: dict[str, Evaluation] = field(repr=False)
    similarity: dict[str, Any] | None = field(repr=False)
    seconds: dict[str, float] = field(repr=False)
    source: str = ""

    @property
    def own(self) -> Evaluation | None:
        """The evaluation on the benchmark that it was trained on."""
        return self.evaluations.get(self.benchmark)


@dataclass(frozen=True)
class Results:
    """Cells of one or several folders.

    Attributes:
        name: of the grids.
        folders: where they lie.
        cells: without repeats.
        failed: cells that ended in an error.
        total: cells of the grids; None where a folder does not say.
        facts: ``sweep.json`` of each folder.
        select: what the grids choose rates by, where they agree; ``dev`` otherwise.
    """

    name: str
    folders: tuple[str, ...]
    cells: tuple[Record, ...]
    failed: int = 0
    total: int | None = None
    facts: tuple[dict[str, Any], ...] = ()
    select: str = "dev"


def load_results(folders: Sequence[str | Path]) -> Results:
    """Read the finished cells of sweep folders; unfinished sweeps too.

    Raises:
        RunFolderError: no sweep there, or a damaged line (file and line are named).
        DataError: no finished cell.
    """
    paths = [Path(folder) for folder in folders]
    found = [cell for path in paths for cell in _read_folder(path)]
    if not found:
        raise DataError(f"{', '.join(map(str, paths))}: no finished cells. Run `ia2 sweep` first.")
    cells: dict[str, Record] = {}
    for cell in found:
        cells.setdefault(cell.key, cell)
    if len(cells) < len(found):
        logger.info("%d cells are in several folders; each counts once.", len(found) - len(cells))
    facts = [_read_if_there(path / "sweep.json", {}) for path in paths]
    totals = [of.get("cells", {}).get("total") for of in facts]
    selects = {_select_of(path / "grid.yaml") for path in paths}
    names = dict.fromkeys(of.get("name") or path.name for of, path in zip(facts, paths, strict=True))
    return Results(
        ", ".join(names),
        tuple(map(str, paths)),
        tuple(cells.values()),
        failed=sum(len(_read_if_there(path / "failed.json", [])) for path in paths),
        total=None if None in totals else sum(totals),
        facts=tuple(facts),
        select=selects.pop() if len(selects) == 1 else "dev",
    )


def _read_if_there(file: Path, otherwise: Any) -> Any:
    return read_json(file) if file.is_file() else otherwise


def filtered(
    results: Results,
    *,
    benchmarks: Sequence[str] = (),
    models: Sequence[str] = (),
    sizes: Sequence[int] = (),
    seeds: Sequence[int] = (),
) -> Results:
    """The cells of some benchmarks, models, numbers of examples and seeds; nothing given keeps all.

    Raises:
        ConfigError: a name that no cell has.
    """
    kept = results.cells
    for what, field_name, asked in (
        ("benchmark", "benchmark", benchmarks),
        ("model", "model", models),
        ("N", "num_examples", sizes),
        ("seed", "seed", seeds),
    ):
        known = sorted({getattr(cell, field_name) for cell in results.cells} - {None})
        for name in asked:
            if name not in known:
                raise ConfigError(
                    f"{what} {name} is in none of the cells; there are {', '.join(map(str, known))}."
                    f"{suggest(str(name), list(map(str, known)))}"
                )
        if asked:  # the base model has neither N nor seed: it stands beside all
            kept = tuple(cell for cell in kept if getattr(cell, field_name) in (None, *asked))
    if not kept:
        raise ConfigError("no cell is all that was asked for. Ask for less at a time.")
    return replace(results, cells=kept)


def _read_folder(folder: Path) -> list[Record]:
    if not folder.is_dir():
        raise RunFolderError(f"{folder}: there is no such folder. Give one that `ia2 sweep` wrote.")
    gathered, loose = folder / CELLS, loose_cells(folder)
    if not gathered.is_file() and not loose:
        raise RunFolderError(f"{folder}: no cells.jsonl there. Give a folder that `ia2 sweep` wrote.")
    # cells that were finished since the file was written come last, and count
    lines = read_lines(gathered)
    lines += [(str(file), read_json(file)) for file in loose]
    cells = [_cell(record, where) for where, record in lines]
    return list({cell.key: cell for cell in cells}.values())


def _cell(record: Any, where: str) -> Record:
    try:
        return _parsed(record, where)
    except KeyError as error:
        problem = f"the key {error} is missing"
    except (TypeError, ValueError, AttributeError) as error:
        problem = str(error)
    raise RunFolderError(f"{where}: damaged ({problem}). Remove the line and run the sweep again.")


def _parsed(record: dict[str, Any], where: str) -> Record:
    spec, data = record["spec"], record.get("data") or {}
    training, cost = record.get("training") or {}, record.get("cost") or {}
    return Record(
        key=str(record["key"]),
        **{name: spec[name] for name in ("benchmark", "verbaliser", "model", "recipe")},
        variant=spec.get("variant") or "",
        **{name: spec[name] for name in ("num_examples", "seed", "learning_rate", "beta")},
        max_test=spec.get("max_test"),
        settings=dict(spec.get("settings") or {}),
        notes=tuple(data.get("notes") or ()),
        selection_loss=training.get("selection_loss"),
        evaluations={name: _evaluation(name, e) for name, e in record["evaluations"].items()},
        similarity=record.get("similarity"),
        seconds=dict(cost.get("seconds") or {}),
        source=where,
    )


OVERHEAD = ("evaluate", "load", "reference", "other")
"""Kinds of seconds beside teacher and training; no two cells share them.

``evaluate``: on its own test rows and others'. ``load``: the model; ``reference``: what ICL does on the first
test rows, which similarities are measured to, where the evaluation of ``icl`` did not give it: both stand in
the first cell that needed them. ``other``: everything else, such as reading and tokenising rows.
"""


def count_seconds(seconds: Mapping[str, float], counted: set[tuple[str, float]]) -> float:
    """A cell's seconds, less what is in ``counted``, where its own go too.

    Args:
        seconds: of one cell, by kind.
        counted: (kind, seconds) of the cells before.
    """
    return sum(_own(seconds, counted).values())


def _own(seconds: Mapping[str, float], counted: set[tuple[str, float]]) -> dict[str, float]:
    """A cell's seconds without what it shares with cells before.

    A teacher pass or an alignment that several cells share stands in the record of each of them, to the last
    digit of the clock.
    """
    own = {kind: took for kind, took in seconds.items() if kind in OVERHEAD or (kind, took) not in counted}
    counted.update(seconds.items())
    return own


def seconds_by_kind(cells: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """What went into cells by kind (teacher, stages, :data:`OVERHEAD`), the most first; shared parts once."""
    counted: set[tuple[str, float]] = set()
    total: Counter[str] = Counter()
    for seconds in cells:
        total.update(_own(seconds, counted))
    return dict(total.most_common())


def work_in_words(by_kind: Mapping[str, float]) -> str:
    """``2 h 05 min of work (align 40%, evaluate 31%, …)``; kinds of less than a hundredth are left out.

    >>> work_in_words({"align": 60.0, "teacher": 20.0})
    '80 s of work (align 75%, teacher 25%)'
    """
    total = sum(by_kind.values())
    shares = [f"{kind} {took / total:.0%}" for kind, took in by_kind.items() if took >= 0.01 * total]
    return f"{in_words(total)} of work ({', '.join(shares)})"


def _evaluation(dataset: str, record: dict[str, Any]) -> Evaluation:
    bits = record["rows"]["correct"]
    if not bits or set(bits) - {"0", "1"}:
        raise ValueError(f"rows.correct of {dataset} is not made of 0 and 1")
    confidence = np.asarray(record["rows"]["confidence"], float)
    if not len(bits) == len(confidence) == record["n"]:
        raise ValueError(
            f"{dataset} has n = {record['n']}, but {len(bits)} answers and {len(confidence)} confidences"
        )
    if not ((confidence >= 0) & (confidence <= 1 + 1e-6)).all():
        raise ValueError(f"a confidence of {dataset} is no probability")
    return Evaluation(
        dataset, len(bits), record["test"], record["metrics"], record.get("majority"), record.get("labels")
    )


def _select_of(grid: Path) -> str:
    if not grid.is_file():
        return "dev"
    import yaml

    try:
        given = yaml.safe_load(grid.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{grid}: damaged ({' '.join(str(error).split())}). Restore it.") from error
    return str(given.get("select", "dev")) if isinstance(given, dict) else "dev"
