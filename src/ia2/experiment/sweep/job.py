"""What a worker does: the cells of one unit, one after the other, sharing model, data and teacher."""

from __future__ import annotations

import gc
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia2.config import AdaptConfig
from ia2.config.recipes import is_trained
from ia2.data.benchmarks import Benchmark, BenchmarkData
from ia2.data.examples import Examples, FewShotSplit
from ia2.data.unlabelled import counts_unlabelled, with_rest
from ia2.evaluation.metrics import STATISTICS, Measured, RowMeasures
from ia2.evaluation.similarity import Similarity
from ia2.experiment.run_folder import machine, versions
from ia2.experiment.sweep.grid import Cell, Unit
from ia2.experiment.sweep.records import count_seconds
from ia2.experiment.workbench import Evaluated, Workbench
from ia2.models.load import BaseModel, content_of, load_base
from ia2.prompts.task import Task, make_task
from ia2.teacher.cache import SIMILARITY_QUERIES
from ia2.teacher.targets import OnlineTargets
from ia2.training.stages import TrainedRecipe
from ia2.utils.errors import DataError, DivergedError, UserError
from ia2.utils.files import digest, finite
from ia2.utils.manifest import begin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ia2.models.forward import AnswerOutput


@dataclass(frozen=True)
class Finished:
    """A cell that is done; its record is what the sweep keeps."""

    key: str
    record: dict[str, Any]


@dataclass(frozen=True)
class Failed:
    """A cell that could not be done."""

    key: str
    error: str
    traceback: str = ""


@dataclass(frozen=True)
class Started:
    """A cell that is being done."""

    key: str


Event = Started | Finished | Failed


def run_unit(unit: Unit, work: Path, *, keep: bool = False) -> Iterator[Event]:
    """Do the cells of a unit.

    What is finished within a cell (teacher passes, stages) lies in ``work`` and is found there when the
    unit is started again.

    Args:
        unit: model, benchmarks and cells.
        work: folder for working files of all units.
        keep: leave this unit's adapters and targets there at the end.

    Yields:
        For every cell that it begins, and that it ended well or badly. A bad cell does not stop the rest.
    """
    folder = work / unit.key
    begin(folder)  # of its own: other units are done at the same time, perhaps elsewhere
    shared: _Shared | None = None
    failed = False
    try:
        for cell in unit.cells:
            began = time.perf_counter()
            yield Started(cell.key)
            try:
                if shared is None:
                    shared = _Shared(unit, folder)
                yield Finished(cell.key, shared.run(cell, began))
            except Exception as error:  # whatever it is, it is reported with its cell, and the others go on
                failed = True
                # a rate that is too high is a result, not a fault to look for
                trace = "" if isinstance(error, DivergedError) else traceback.format_exc()
                yield Failed(cell.key, describe(error), trace)
                if shared is not None:
                    shared.leave()
    finally:
        if shared is not None:
            shared.leave()
    if not failed and not keep:
        shutil.rmtree(folder, ignore_errors=True)


def describe(error: BaseException) -> str:
    """An error as one line; a user's mistake speaks for itself."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}".rstrip(": ")


@lru_cache(maxsize=8)
def _rows(
    settled: str, verbaliser: str | None, data_dir: str | None, max_test: int | None, longest: int | None
) -> BenchmarkData:
    return Benchmark.model_validate_json(settled).load(data_dir, verbaliser, max_test, longest)


def load_rows(
    benchmark: Benchmark,
    verbaliser: str | None,
    data_dir: str | None,
    max_test: int | None,
    longest: int | None = None,
) -> BenchmarkData:
    """A benchmark's rows, read once a process; ``longest``: tokens of a free-text answer."""
    longest = longest if benchmark.kind == "generation" else None
    return _rows(benchmark.model_dump_json(), verbaliser, data_dir, max_test, longest)


def without_held_back(rows: BenchmarkData, count: int) -> BenchmarkData:
    """A benchmark's rows less the last ``count`` of its pool.

    Raises:
        DataError: none would be left.
    """
    if not count or not len(rows.pool):
        return rows
    if count >= len(rows.pool):
        raise DataError(
            f"{rows.benchmark.name}: hold_back {count:,} leaves nothing of a pool of {len(rows.pool):,} "
            "rows. Lower it."
        )
    return replace(rows, pool=rows.pool[:-count])


def forget_rows() -> None:
    """Have :func:`load_rows` read everything again."""
    _rows.cache_clear()


_loaded: dict[str, BaseModel] = {}
# What the loaded model does without demonstrations, which no draw changes: activations of some rows each.
_bare: dict[str, list[AnswerOutput]] = {}
_BARE = 8


def _model(name: str, options: dict[str, Any]) -> BaseModel:
    """The base model, kept for the next unit; one at a time."""
    # by content too: its files may have changed since an earlier sweep of this process
    content = content_of(name, revision=options["revision"], code=options["trust_remote_code"])
    key = digest([name, options, content])
    if key not in _loaded:
        _loaded.clear()
        _bare.clear()
        gc.collect()
        _loaded[key] = load_base(name, **options)
    return _loaded[key]


def task_of(rows: BenchmarkData, config: AdaptConfig, base: BaseModel, *, ood: bool) -> Task:
    """What counts as an answer to a benchmark's rows.

    Args:
        rows: of the benchmark.
        config: a cell's settings, those of the benchmark that it is trained on among them.
        base: whose tokenizer counts.
        ood: it is another benchmark, whose own settings take their place; a limit of answers stays.
    """
    benchmark = rows.benchmark
    if ood:
        own = {"task": "auto", "labels": None, "parser": "text", **benchmark.settings(rows.verbaliser)}
        if config.max_answer_tokens is not None:
            own["max_answer_tokens"] = config.max_answer_tokens
        config = config.model_copy(update=own)
    # a test row's own free-text answer may be longer than what is generated
    checked = rows.pool if benchmark.kind == "generation" else [*rows.pool, *rows.test]
    every = Examples(checked, name=benchmark.name)
    return make_task(every, config, base.tokenizer, benchmark.prompt, rows.test)


class _Shared:
    """A unit's model, rows, teacher and ICL reference."""

    def __init__(self, unit: Unit, folder: Path) -> None:
        self.unit, self.folder = unit, folder
        first = unit.cells[0]
        self.max_test = first.spec["max_test"]
        began, known = time.perf_counter(), list(_loaded)
        self.base = _model(unit.model, unit.options)
        # what the present cell spent and no other cell has a part in, by kind
        self._own: dict[str, float] = {}
        if list(_loaded) != known:
            self._own["load"] = time.perf_counter() - began
        self._counted: set[tuple[str, float]] = set()
        longest = first.config.max_answer_tokens
        self.rows = [
            without_held_back(
                load_rows(b, v, unit.data_dir, self.max_test, longest), first.spec.get("hold_back", 0)
            )
            for b, v in unit.benchmarks
        ]
        self.tasks = [task_of(rows, first.config, self.base, ood=n > 0) for n, rows in enumerate(self.rows)]
        self.bench: Workbench | None = None
        self._on: tuple[str, Workbench] | None = None
        self._reference: OnlineTargets | None = None
        spec = first.spec
        pool = self.rows[0].pool
        # without demonstrations and training no example is used; the workbench asks for some
        nothing = FewShotSplit(pool[:2], Examples([], name=pool.name))
        self.data = nothing
        if spec["num_examples"] is not None:
            self.data = pool.split(
                seed=spec["seed"], **{**first.config.drawn, "num_examples": spec["num_examples"]}
            )
        self.unused = self.data.rest(pool)
        if first.config.unlabelled:
            self.data = with_rest(self.data, self.unused, self.rows[0].test, first.config)

    def run(self, cell: Cell, begun: float) -> dict[str, Any]:
        """A cell's record; ``begun``: when, by the clock of this process."""
        recipe, test = cell.spec["recipe"], self.rows[0].test
        bench = self._bench(cell)
        elsewhere = [(t, rows.test) for t, rows in zip(self.tasks[1:], self.rows[1:], strict=True)]
        bench.check([recipe], test, elsewhere)
        trained = bench.train(recipe) if is_trained(recipe) else None
        reference = None if recipe in ("base", "icl") else self.reference()
        evaluations: dict[str, Any] = {}
        similarity = temperatures = None
        began = time.perf_counter()
        for place, (rows, task) in enumerate(zip(self.rows, self.tasks, strict=True)):
            refer = recipe == "icl" and not place and self._reference is None
            compared = None if place else reference
            found = bench.evaluate(recipe, rows.test, compared, task, temperatures, refer=refer)
            self._reference = self._reference or found.reference
            temperatures = found.measured.temperatures or None
            role = "ood" if place else "id"
            evaluations[rows.benchmark.name] = _evaluation(rows, task, found, role)
            similarity = similarity or found.similarity
        self._own["evaluate"] = time.perf_counter() - began
        if recipe == "icl" and (reference := self.reference()) is not None:
            began = time.perf_counter()
            similarity = self._baseline(bench, test, reference)
            self._own["evaluate"] += time.perf_counter() - began
        seconds = self._seconds(bench, trained, begun)
        first = self.rows[0]
        return finite(
            {
                "key": cell.key,
                "spec": cell.spec,
                "data": {
                    "pool": first.pool.fingerprint,
                    "test": first.test.fingerprint,
                    "num_train": 0 if recipe == "base" else len(self.data.train),
                    "num_dev": len(self.data.dev),
                    **counts_unlabelled(self.data),
                    "notes": [f"{r.benchmark.name}: {note}" for r in self.rows for note in r.notes],
                },
                "training": None if trained is None else _training(trained),
                "evaluations": evaluations,
                "similarity": None if similarity is None else similarity.to_dict(),
                "cost": {"seconds": seconds, "machine": machine(), "versions": versions()},
            }
        )

    def _seconds(self, bench: Workbench, trained: TrainedRecipe | None, begun: float) -> dict[str, float]:
        """What a cell cost, by kind (:data:`ia2.experiment.sweep.records.OVERHEAD`)."""
        seconds = {} if trained is None else {"teacher": bench.teacher_seconds, **trained.seconds}
        seconds |= self._own
        self._own = {}
        # of what an earlier start has made there is nothing in this time
        spent = count_seconds(seconds, self._counted)
        return {**seconds, "other": max(0.0, time.perf_counter() - begun - spent)}

    def _bench(self, cell: Cell) -> Workbench:
        """The workbench with a cell's settings; an adapter stays on while it is the same."""
        if self.bench is None:
            if cell.spec["num_examples"] is None:  # no rows to fit a temperature on
                cell = replace(cell, config=cell.config.model_copy(update={"selection": "dev"}))
            self.bench = Workbench(
                self.base,
                self.data,
                self.tasks[0],
                cell.config,
                self.folder,
                unused=self.unused,
                by_content=True,
            )
        if not is_trained(cell.spec["recipe"]):
            return self.bench
        kind = digest(cell.config.adapter.model_dump())
        if self._on is not None and self._on[0] != kind:
            self.leave()
        known = self._on[1] if self._on is not None else self.bench.with_config(cell.config, kind)
        known.config = cell.config
        self._on = (kind, known)
        return known

    def leave(self) -> None:
        """Take the adapter off the model."""
        if self._on is not None:
            self._on[1].close()
            self._on = None

    def reference(self) -> OnlineTargets | None:
        """What ICL does on the first test queries; once a unit."""
        assert self.bench is not None
        if self._reference is None:
            began = time.perf_counter()
            self._reference = self.bench.teaching.reference(self.rows[0].test)
            self._own["reference"] = time.perf_counter() - began
        return self._reference

    def _baseline(self, bench: Workbench, test: Examples, reference: OnlineTargets) -> Similarity:
        """The null baseline of every similarity: the base model without demonstrations (METHOD: fairness)."""
        rows = test[:SIMILARITY_QUERIES]
        if not self.tasks[0].single_token:  # what is fed depends on the draw: its ICL answers
            return bench.base_similarity(rows, reference)
        prompts = list(bench.prompts(rows))
        key = digest([prompts, bench.config.attention_modules])
        if key not in _bare:
            while len(_bare) >= _BARE:
                del _bare[next(iter(_bare))]
            _bare[key] = bench.base_outputs(rows, reference)
        return bench.base_similarity(rows, reference, _bare[key])


def _training(trained: TrainedRecipe) -> dict[str, Any]:
    return {
        "selection_loss": trained.stages[-1].selection_loss,
        "stages": [
            {
                "stage": stage.name,
                "steps": stage.steps,
                "epochs": max((entry.get("epoch", 0.0) for entry in stage.history), default=0.0),
                "dev_loss": stage.dev_loss,
                "history": _curve(stage.history),
            }
            for stage in trained.stages
        ],
    }


def _curve(history: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Step and dev loss of every dev evaluation."""
    return [[entry["step"], _short(entry["eval_loss"])] for entry in history if "eval_loss" in entry]


def _evaluation(rows: BenchmarkData, task: Task, found: Evaluated, role: str) -> dict[str, Any]:
    measured: Measured = found.measured
    metrics: dict[str, Any] = {scope: _metrics(columns) for scope, columns in measured.plain.items()}
    if measured.scaled:
        metrics["scaled"] = {scope: _metrics(columns) for scope, columns in measured.scaled.items()}
    main = measured.plain["vocabulary"]
    return {
        "role": role,
        "n": len(rows.test),
        "test": rows.test.fingerprint,
        "verbaliser": rows.verbaliser,
        "labels": len(task.labels) or None,
        "majority": _majority(rows) if task.labels else None,
        "metrics": metrics,
        "rows": {
            "correct": "".join(str(int(c)) for c in main.correct),
            "confidence": [_short(c) for c in main.confidence],
        },
    }


def _majority(rows: BenchmarkData) -> float:
    """Share of the most frequent label: what guessing comes to."""
    return max(Counter(rows.test.answers).values()) / len(rows.test)


def _metrics(columns: RowMeasures) -> dict[str, float]:
    return {name: float(statistic(*columns.arrays(), axis=-1)) for name, statistic in STATISTICS.items()}


def _short(value: float) -> float:
    """Five significant digits: rows make up most of a record."""
    return float(f"{value:.5g}")
