"""What the cells of a unit have to compute, in tokens, and how long that takes at a measured speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ia2.benchmarks import BenchmarkData
from ia2.config import AdaptConfig
from ia2.config_sections import JointConfig
from ia2.examples import Examples, FewShotSplit
from ia2.files import digest
from ia2.inference import MIN_SHARED_PREFIX
from ia2.models import BaseModel
from ia2.recipes import ALIGN, LABELLED, UNLABELLED
from ia2.schedule import Schedule
from ia2.stages import PlannedStage, plan
from ia2.sweeps.grid import Cell, Unit
from ia2.sweeps.unit import load_rows, task_of, without_held_back
from ia2.task import Task
from ia2.teaching import PARTS, SIMILARITY_QUERIES, Key
from ia2.tokens import common_prefix
from ia2.traits import takes_cache
from ia2.unlabelled import with_rest
from ia2.workbench import Pass, Workbench, answered_parts, held_out, teacher_passes

# Rows of a benchmark whose tokens are counted, and training examples whose contexts are.
_ROWS, _CONTEXTS = 100, 8

# Of one running stage: two checkpoints with weights, best weights and two moments, and what it leaves.
_CHECKPOINTS = 9

# A record: its settings and curves, and each test row's correctness and confidence.
_RECORD_BYTES, _ROW_BYTES = 4000, 10


@dataclass(frozen=True)
class Line:
    """Seconds as a line in the size of what is done; neither part is negative."""

    start: float
    slope: float

    @classmethod
    def through(cls, points: Sequence[tuple[float, float]]) -> Line:
        """Through the smallest and the largest of measured (size, seconds)."""
        (x, y), (high, top) = min(points), max(points)
        if high <= x:
            return cls(0.0, y / x)
        slope = (top - y) / (high - x)
        if slope <= 0:  # only noise grows
            return cls(max(y, top), 0.0)
        # no less than nothing is done in no time
        return cls(y - slope * x, slope) if y > slope * x else cls(0.0, top / high)

    def __call__(self, size: float) -> float:
        return self.start + self.slope * size


@dataclass(frozen=True)
class Speed:
    """How fast one model is here.

    Attributes:
        bare: tokens a second of prompts without context.
        context: of queries behind demonstrations that they share.
        teacher: of the teacher pass.
        decoding: seconds of one generated token by the rows of a batch; None where nothing is generated.
        batch_tokens: tokens of one batch of answers that are written.
        steps: seconds of an optimiser step by its tokens, for each adapter's digest.
        adapter_bytes: of its weights, for each adapter's digest.
        refused: adapters that cannot be trained, and why.
        device: type of the device.
        memory_bytes: most that was in use: of the process, or on an accelerator of the device.
        longest: tokens of the longest prompt that was measured.
        longest_context: tokens of the longest context of the grid, on average over its queries.
        loading: seconds to load the model.
        seconds: that the calibration took.
    """

    bare: float
    context: float
    teacher: float
    decoding: Line | None
    batch_tokens: int
    steps: Mapping[str, Line]
    adapter_bytes: Mapping[str, int]
    refused: Mapping[str, str]
    device: str
    memory_bytes: int
    longest: int
    longest_context: float
    loading: float
    seconds: float


# -------------------------------------------------------------------------------------------- tokens


@dataclass(frozen=True)
class Queries:
    """Test rows of one benchmark.

    Attributes:
        count: rows that are evaluated.
        tokens: of a query, on average.
        labels: rows that are fed for a query.
        answer: tokens of an answer: of a label on average, of a free answer at most.
        limit: tokens that are generated at most; 1: nothing is generated.
        free: answers are written in the evaluation too, not only by the teacher.
    """

    count: int
    tokens: float
    labels: int
    answer: float
    limit: int
    free: bool


@dataclass(frozen=True)
class Shape:
    """What units of one model, benchmark and N share, whatever their seed: counts of rows and tokens.

    Attributes:
        bench: a workbench with the first unit's split; nothing is trained on it.
        rows: of the benchmark and its OOD partners.
        tasks: of these.
        train, dev: numbers of examples.
        unlabelled: numbers of unlabelled rows to learn on and held out.
        own: tokens of some training prompts without context.
        context: tokens of a training example in its context, on average.
        prefix: tokens that all queries behind the training examples share.
        extra: tokens that come before each of them beside the shared ones.
        evaluated: the benchmark itself, then its OOD partners.
    """

    bench: Workbench = field(repr=False)
    rows: tuple[BenchmarkData, ...] = field(repr=False)
    tasks: tuple[Task, ...] = field(repr=False)
    train: int
    dev: int
    unlabelled: tuple[int, int]
    own: tuple[int, ...] = field(repr=False)
    context: float
    prefix: int
    extra: float
    evaluated: tuple[Queries, ...]

    @property
    def has_examples(self) -> bool:
        """Whether anything is learnt from or shown; the cells of ``base`` have none."""
        return self.context > 0

    def count(self, part: str) -> int:
        """Rows of a part (see :data:`ia2.teaching.PARTS`)."""
        parts = (*PARTS[LABELLED], *PARTS[UNLABELLED])
        return dict(zip(parts, (self.train, self.dev, *self.unlabelled), strict=True))[part]

    def trained_on(self, stage: PlannedStage) -> int:
        """Rows of an epoch."""
        return sum(self.count(PARTS[kind][0]) for kind in stage.rows)

    def step_tokens(self, config: AdaptConfig, answer: float, train: int) -> float:
        """Padded tokens of an optimiser step on ``train`` rows."""
        rows = min(config.batch_size, train)
        return padded(self.own, rows, config.micro_batch_size) + rows * (answer - 1)


def padded(lengths: Sequence[int], rows: int, micro: int | None = None) -> float:
    """Tokens of a step of so many rows, padded in each forward pass, on average."""
    size = min(micro or rows, rows)
    groups = [lengths[i : i + size] for i in range(0, len(lengths), size)]
    return rows * sum(max(group) for group in groups) / len(groups)


def kind_of(unit: Unit) -> str:
    """The same for units that differ in their seed alone."""
    first = unit.cells[0]
    config = first.config.model_dump(exclude={"seed", "recipe", "learning_rates", "joint", "adapter"})
    rows = [(benchmark.name, verbaliser) for benchmark, verbaliser in unit.benchmarks]
    drawn = first.spec["num_examples"], first.spec.get("hold_back", 0)
    return digest([unit.model, rows, first.spec["max_test"], *drawn, config])


def measure_shape(
    unit: Unit,
    base: BaseModel,
    rows: Mapping[tuple[str, str | None], BenchmarkData],
    scratch: Path,
) -> Shape:
    """Count the rows and tokens of a unit, from a sample of each benchmark's rows.

    Args:
        unit: its cells are not run.
        base: its model.
        rows: of all benchmarks, by name and verbaliser.
        scratch: folder that nothing is written to.

    Raises:
        UserError: what would keep the unit from running: too few rows, a prompt that does not fit.
    """
    first = unit.cells[0]
    config = first.config
    if config.demo_order in ("nearest", "search"):
        # as long as random ones, which need no forward pass
        config = config.model_copy(update={"demo_order": "random"})
    longest = config.max_answer_tokens
    data = tuple(
        # the pool of free answers depends on how long they may be
        without_held_back(
            load_rows(b, v, unit.data_dir, None, longest)
            if longest and b.kind == "generation"
            else rows[b.name, v],
            first.spec.get("hold_back", 0),
        )
        for b, v in unit.benchmarks
    )
    tasks = tuple(task_of(part, config, base, ood=n > 0) for n, part in enumerate(data))
    pool, count = data[0].pool, first.spec["num_examples"]
    split = FewShotSplit(pool[:2], Examples([], name=pool.name))
    if count is not None:
        split = pool.split(seed=first.spec["seed"], **{**config.drawn, "num_examples": count})
    rest = split.rest(pool)
    if config.unlabelled:
        split = with_rest(split, rest, data[0].test[: first.spec["max_test"]], config)
    bench = Workbench(base, split, tasks[0], config, scratch, unused=rest, by_content=True)
    evaluated = tuple(
        _queries(bench, part, task, first.spec["max_test"]) for part, task in zip(data, tasks, strict=True)
    )
    context, prefix, extra = 0.0, 0, 0.0
    if count is not None:
        seen = range(min(_CONTEXTS, len(split.train)))
        context = _mean([len(bench.train_contexts.context_ids(i)) for i in seen])
        test = data[0].test[:_CONTEXTS]
        behind = bench.prompts(test, demonstrations=True)
        prefix = shared_prefix(bench, behind)
        extra = max(0.0, _mean([len(ids) for ids in behind]) - prefix - _mean(_lengths(bench, test)))
    return Shape(
        bench,
        data,
        tasks,
        len(split.train),
        len(split.dev),
        (len(split.unlabelled), len(split.unlabelled_dev)),
        tuple(_lengths(bench, pool[:_ROWS])),
        context,
        prefix,
        extra,
        evaluated,
    )


def shared_prefix(bench: Workbench, prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that are computed once for all prompts."""
    shared = common_prefix([tuple(ids) for ids in prompts]) if len(prompts) > 1 else 0
    return shared if shared >= MIN_SHARED_PREFIX and takes_cache(bench.base.model) else 0


def _queries(bench: Workbench, data: BenchmarkData, task: Task, max_test: int | None) -> Queries:
    test = data.test[:max_test]
    labels, answer = 1, float(task.max_answer_tokens)
    if task.kind == "classification" and not task.single_token:
        labels, answer = len(task.labels), _mean([len(ids) for ids in task.label_ids])
    return Queries(
        len(test),
        _mean(_lengths(bench, test[:_ROWS])),
        labels,
        answer,
        task.max_answer_tokens,
        task.kind == "generation",
    )


def _lengths(bench: Workbench, examples: Examples) -> list[int]:
    rendering = bench.teaching.prompts.rendering
    return [int(n) for n in rendering.lengths((rendering.prompt_text((), e), e.source) for e in examples)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# ----------------------------------------------------------------------------------------- early stop


def steps_at_most(stage: PlannedStage, config: AdaptConfig, train: int) -> int:
    """Optimiser steps of all epochs of a stage."""
    return stage.settings.epochs * -(-train // min(config.batch_size, train))


def shares_of_steps(cells: Sequence[Cell], records: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Stage kind → the mean share of its steps that finished cells took before they stopped; ``""``: all."""
    found: dict[str, list[float]] = {}
    for cell in cells:
        record = records.get(cell.key)
        if record is None or record["training"] is None:
            continue
        stages = plan(cell.spec["recipe"], cell.config)
        for stage, trained in zip(stages, record["training"]["stages"], strict=True):
            data = record["data"]
            counts = {LABELLED: data["num_train"], UNLABELLED: data.get("num_unlabelled", 0)}
            rows = sum(counts[kind] for kind in stage.rows)
            share = trained["steps"] / steps_at_most(stage, cell.config, rows)
            found.setdefault(stage.kind, []).append(min(1.0, share))
    if found:
        found[""] = [share for shares in found.values() for share in shares]
    return {kind: _mean(shares) for kind, shares in found.items()}


# --------------------------------------------------------------------------------------------- seconds


@dataclass
class Cost:
    """Seconds of a cell.

    Attributes:
        teacher: teacher passes, and what ICL does on the test rows; the first cell of a unit pays.
        training: of all epochs, with dev evaluations.
        likely: of as many steps as finished cells took; as ``training`` where there are none.
        evaluation: on the benchmark's own and the OOD rows.
    """

    teacher: float = 0.0
    training: float = 0.0
    likely: float = 0.0
    evaluation: float = 0.0

    @property
    def at_most(self) -> float:
        """With every stage to its last epoch."""
        return self.teacher + self.training + self.evaluation

    @property
    def likely_total(self) -> float:
        """With stages that stop early."""
        return self.teacher + self.likely + self.evaluation


class UnitCosts:
    """Costs of a unit's cells, one after the other: what an earlier one has computed is there.

    Args:
        shape: of the unit.
        speed: of its model.
        shares: see :func:`shares_of_steps`.
    """

    def __init__(self, shape: Shape, speed: Speed, shares: Mapping[str, float]) -> None:
        self.shape, self.speed, self.shares = shape, speed, shares
        self._passes: set[Key] = set()
        self._stages: set[str] = set()
        self._referenced = False
        self.work_bytes = 0
        """Most that the unit's working files take, after the cells so far."""

    def cell(self, cell: Cell) -> Cost:
        """Seconds of the unit's next cell."""
        recipe, cost = cell.spec["recipe"], Cost()
        adapter = adapter_of(cell)
        chain = adapter
        stages = plan(recipe, cell.config)
        for stage, needed in zip(stages, teacher_passes(stages, cell.config), strict=True):
            rate = stage.settings.learning_rate or cell.spec["learning_rate"]
            beta = cell.spec["beta"] if stage.betas != [None] else None
            kept = cell.config.align.model_dump() if stage.aligns and stage.kind != ALIGN else None
            facts = [stage.kind, stage.settings.model_dump(), kept, rate, beta, cell.config.batch_size]
            chain = digest([chain, facts])
            if needed is not None:
                cost.teacher += self._teacher(answered_parts(stage), needed, cell.config)
            if chain not in self._stages:
                self._train(stage, cell.config, adapter, cost)
                self._stages.add(chain)
        if recipe != "base" and not self._referenced:
            self._referenced = True
            # of single tokens the evaluation of icl gives it
            if recipe != "icl" or self.shape.evaluated[0].limit > 1:
                cost.teacher += self._answered(self._some(self._compared, written=True), behind=True)
        cost.evaluation = self._evaluation(recipe)
        return cost

    def record_bytes(self) -> int:
        """About what the record of a cell takes."""
        return _RECORD_BYTES + _ROW_BYTES * sum(q.count for q in self.shape.evaluated)

    # ------------------------------------------------------------------------------------- teacher

    def _teacher(self, parts: set[str], needed: Pass, config: AdaptConfig) -> float:
        shape, own = self.shape, self.shape.evaluated[0]
        known = {key[0] for key in self._passes}
        if config.targets in ("auto", "store") and all(key[1:] != needed for key in self._passes):
            self.work_bytes += shape.bench.teaching.target_bytes(*needed)
        seconds = 0.0
        for part in sorted(parts):
            count = shape.count(part)
            if (part, *needed) in self._passes or not count:
                continue
            self._passes.add((part, *needed))
            orders, rest = config.context_draws, own.answer - 1
            written = own.limit > 1 and part not in known  # a later pass knows the answers
            if written and needed[0] not in ("weights", "soft"):
                orders -= 1  # the steps that write the answers give the targets of the first order
            # all but training examples, which leave themselves out, have their context in common
            prompts = count * (shape.extra + own.tokens) + shape.prefix
            if part == "train":
                prompts = count * shape.context
            seconds += (prompts + count * rest) * orders / self.speed.teacher
            if written:
                seconds += prompts / self.speed.teacher + self._decoding(count, own, shape.context)
        return seconds

    # ------------------------------------------------------------------------------------ training

    def _train(self, stage: PlannedStage, config: AdaptConfig, adapter: str, cost: Cost) -> None:
        shape, own = self.shape, self.shape.evaluated[0]
        orders = config.context_draws if config.permutation_targets == "sample" else 1
        passes, settings = 1, stage.settings
        train, held = shape.trained_on(stage), shape.count(held_out(stage))
        if stage.aligns and (stage.beside or (stage.answers == "ground_truth" and own.limit > 1)):
            passes += 1  # both answers, or both rows, are fed
        step = passes * self.speed.steps[adapter](shape.step_tokens(config, own.answer, train))
        if stage.teacher_answers and config.targets == "online":
            step += min(config.batch_size, train) * shape.context / self.speed.teacher
        dev = passes * held * (own.tokens + own.answer - 1) / self.speed.bare
        if stage.teacher_answers:
            dev *= orders
        per_epoch = -(-train // min(config.batch_size, train))
        rows, looked = min(config.batch_size, train), held * (orders if stage.teacher_answers else 1)
        schedule = Schedule(per_epoch, settings.epochs, rows, looked, settings.eval_every)

        def seconds(steps: float) -> float:
            return steps * (step + dev * schedule.total / (per_epoch * settings.epochs))

        steps = steps_at_most(stage, config, train)
        share = self.shares.get(stage.kind, self.shares.get("", 1.0))
        last = dev if isinstance(settings, JointConfig) else 0.0  # cross-entropy, to select by
        cost.training += seconds(steps) + last
        cost.likely += seconds(steps * share) + last
        size = self.speed.adapter_bytes[adapter]
        self.work_bytes += size if self._stages else size * _CHECKPOINTS

    # ---------------------------------------------------------------------------------- evaluation

    def _evaluation(self, recipe: str) -> float:
        seconds, behind = 0.0, recipe == "icl"
        seconds += self._answered(self._some(self.shape.dev), behind=behind)  # for temperatures
        for queries in self.shape.evaluated:
            seconds += self._answered(queries, behind=behind)
        own = self.shape.evaluated[0]
        # of icl, the base model's similarity to it; of single tokens the evaluation gives the activations
        if recipe == "icl" or (recipe != "base" and own.limit > 1):
            seconds += self._compared * (own.tokens + own.limit - 1) / self.speed.bare
        return seconds

    def _answered(self, queries: Queries, *, behind: bool) -> float:
        """Seconds to answer queries, behind the training examples or without them."""
        if not queries.count:
            return 0.0
        rate = self.speed.context if behind else self.speed.bare
        prefix = self.shape.prefix if behind else 0
        each = queries.tokens + (self.shape.extra if behind else 0.0)
        if queries.free:
            read = prefix + queries.count * each
            return read / rate + self._decoding(queries.count, queries, each)
        return (prefix + queries.count * queries.labels * (each + queries.answer - 1)) / rate

    def _decoding(self, rows: int, queries: Queries, width: float) -> float:
        """Seconds to write so many answers, each to its limit, behind prompts of that many tokens."""
        assert self.speed.decoding is not None
        size = min(rows, max(1, int(self.speed.batch_tokens // (width + queries.limit))))
        return -(-rows // size) * queries.limit * self.speed.decoding(size)

    @property
    def _compared(self) -> int:
        """Test queries that similarity to ICL is measured on."""
        return min(SIMILARITY_QUERIES, self.shape.evaluated[0].count)

    def _some(self, count: int, *, written: bool = False) -> Queries:
        """So many of the benchmark's own queries; ``written``: answered as the teacher does."""
        own = replace(self.shape.evaluated[0], count=count)
        return replace(own, labels=1, answer=float(own.limit), free=own.limit > 1) if written else own


def adapter_of(cell: Cell) -> str:
    """Digest of a cell's adapter and of what else its training steps depend on."""
    names = ("adapter", "micro_batch_size", "activation_checkpointing", "activation_checkpointing_kwargs")
    return digest(cell.config.model_dump(include=set(names)))
