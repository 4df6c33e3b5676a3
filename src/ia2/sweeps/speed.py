"""A short calibration: how fast a model is on this machine, and how much memory it takes.

What is timed is what a worker runs: evaluation, the teacher's passes and real optimiser steps, on real rows.
Of repetitions the fastest counts.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ia2.adapter_checks import check_adapter
from ia2.adapter_weights import adapter_state
from ia2.batching import give_back_memory, writing_budget
from ia2.config import AdaptConfig
from ia2.errors import UserError
from ia2.evaluation.run import evaluate_prompts
from ia2.examples import Example, Examples, FewShotSplit
from ia2.generation import generate_answers
from ia2.inference import answer_pass
from ia2.models import BaseModel
from ia2.sweeps.costs import Line, Shape, Speed, padded, shared_prefix
from ia2.tokens import Ids
from ia2.workbench import Workbench

# Seconds that one repetition of a pass is to take, if rows are small enough; and rows of it.
_SECONDS, _FEWEST, _MOST = 2.0, 4, 64

# A pass or step is repeated unless it has taken this long; and how often passes are at most.
_LONG, _REPETITIONS = 3.0, 2

# Optimiser steps of one measurement; the first warms up.
_STEPS = 4

# Tokens that are generated for each row of a measurement.
_WRITTEN = 12


def measure(
    base: BaseModel,
    shapes: Sequence[Shape],
    adapters: Mapping[str, AdaptConfig],
    loading: float,
    scratch: Path,
) -> Speed:
    """Time the passes of one model.

    Args:
        base: the model.
        shapes: of the units that it is to do.
        adapters: digest → settings of a run with that adapter (see :func:`ia2.sweeps.costs.adapter_of`).
        loading: seconds that it took to load the model.
        scratch: folder for what training writes.

    Raises:
        UserError: a prompt that cannot be made.
    """
    began = time.perf_counter()
    by_query = sorted(shapes, key=lambda shape: shape.evaluated[0].tokens)
    split = [shape for shape in by_query if shape.has_examples]
    lines: dict[str, Line] = {}
    sizes: dict[str, int] = {}
    refused: dict[str, str] = {}
    with _Peak(base) as peak:
        for name, config in adapters.items():
            try:
                lines[name], sizes[name] = _steps(base, split, config, scratch)
            except UserError as error:
                refused[name] = str(error)
        trained = next((config for name, config in adapters.items() if name in lines), None)
        passes = _Passes(base, by_query, trained)
    gc.collect()
    give_back_memory()
    return Speed(
        passes.bare,
        passes.context,
        passes.teacher,
        passes.decoding,
        writing_budget(base.model, 1, captured=False)[0],
        lines,
        sizes,
        refused,
        base.device.type,
        peak.bytes,
        passes.longest,
        max(shape.context for shape in shapes),
        loading,
        time.perf_counter() - began,
    )


# ---------------------------------------------------------------------------------------------- steps


def _steps(base: BaseModel, shapes: Sequence[Shape], config: AdaptConfig, scratch: Path) -> tuple[Line, int]:
    """Seconds of an optimiser step by its tokens, and bytes of the adapter's weights.

    Measured on usual rows of the benchmark with the shortest queries, and on the longest of that with the
    longest: there a step takes most memory, too.
    """
    check_adapter(base.model, config.adapter, activation_checkpointing=config.activation_checkpointing)
    points, size = [], 0
    for shape, longest in ((shapes[0], False), (shapes[-1], True)):
        order = sorted(range(len(shape.own)), key=lambda i: shape.own[i])
        rows = min(config.batch_size, shape.train, len(order))
        start = len(order) - rows if longest else (len(order) - rows) // 2
        # a workbench wants two examples, also where a step takes one
        chosen = order[max(0, min(start, len(order) - 2)) :][: max(2, rows)]
        seconds, size = _step(base, shape, [shape.rows[0].pool[i] for i in chosen], rows, config, scratch)
        lengths = [
            shape.own[i] + len(shape.tasks[0].target_ids(base.tokenizer, shape.rows[0].pool[i])) - 1
            for i in chosen
        ]
        points.append((padded(lengths, rows, config.micro_batch_size), seconds))
        if seconds > _LONG:
            break  # a slow machine: one point has to do
    return Line.through(points), size


def _step(
    base: BaseModel, shape: Shape, examples: Sequence[Example], rows: int, config: AdaptConfig, scratch: Path
) -> tuple[float, int]:
    """Seconds of the fastest of some steps on these examples, and bytes of the adapter's weights."""
    from ia2.trainer import SftTrainer, StageSettings

    train = Examples(examples, name=shape.rows[0].pool.name)
    changes = {"adapter": config.adapter}
    bench = Workbench(
        base,
        FewShotSplit(train, Examples([], name=train.name)),
        shape.tasks[0],
        shape.bench.config.model_copy(update=changes),
        scratch,
    )
    settings = StageSettings(
        scratch / "stage",
        epochs=_STEPS,
        batch_size=rows,
        micro_batch_size=config.micro_batch_size,
        activation_checkpointing=config.activation_checkpointing,
        activation_checkpointing_kwargs=config.activation_checkpointing_kwargs or {},
    )
    try:
        trainer = SftTrainer(bench.model, *bench.sft_rows(), settings, bench.tokenizer)
        clock = _clock(base)
        trainer.add_callback(clock)
        trainer.fit()
        size = sum(t.numel() * t.element_size() for t in adapter_state(bench.model).values())
    finally:
        bench.close()
    return min(clock.seconds[1:] or clock.seconds), size


def _clock(base: BaseModel) -> Any:
    """A callback that times optimiser steps, and keeps checkpoints from being written."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self._began = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._began = _now(base)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seconds.append(_now(base) - self._began)
            control.should_save = False
            control.should_training_stop |= sum(self.seconds) > _LONG

    return Clock()


# ---------------------------------------------------------------------------------------------- passes


class _Passes:
    """Passes without gradients, timed.

    Args:
        base: the model.
        shapes: of all units, shortest queries first.
        config: settings of a run that is trained: prompts without context are timed with its adapter on.
    """

    def __init__(self, base: BaseModel, shapes: Sequence[Shape], config: AdaptConfig | None) -> None:
        self.base, self.longest = base, 0
        self.bare = self._bare(shapes[len(shapes) // 2], config)
        self.context = self.teacher = self.bare
        split = [shape for shape in shapes if shape.has_examples]
        if split:
            affordable = self.bare * _SECONDS
            by_context = sorted(split, key=lambda shape: shape.context)
            shape = [by_context[0], *(s for s in by_context if s.context <= affordable)][-1]
            self.context, self.teacher = self._behind(shape), self._teacher(shape)
        writing = [shape for shape in shapes if any(q.limit > 1 for q in shape.evaluated)]
        self.decoding = self._decode(writing[0]) if writing else None

    def _bare(self, shape: Shape, config: AdaptConfig | None) -> float:
        bench = shape.bench if config is None else shape.bench.with_config(config, "calibration")
        test = shape.rows[0].test
        try:
            model = self.base.model if config is None else bench.model
            few = bench.prompts(test[:_FEWEST])
            self._see(few)
            seconds = self._evaluate(model, shape, few)
            if (count := _between(_SECONDS * len(few) / seconds, len(test))) <= len(few):
                return _fed(shape, few) / seconds
            prompts = bench.prompts(test[:count])
            self._see(prompts)
            return _fed(shape, prompts) / self._evaluate(model, shape, prompts)
        finally:
            bench.close()

    def _behind(self, shape: Shape) -> float:
        test = shape.rows[0].test
        room = self.bare * _SECONDS - shape.prefix
        each = shape.extra + shape.evaluated[0].tokens
        prompts = shape.bench.prompts(test[: _between(room / each, len(test))], demonstrations=True)
        self._see(prompts)
        prefix = shared_prefix(shape.bench, prompts)
        fed = _fed(shape, prompts) - prefix * (len(prompts) * shape.evaluated[0].labels - 1)
        return fed / self._evaluate(self.base.model, shape, prompts)

    def _teacher(self, shape: Shape) -> float:
        contexts = shape.bench.train_contexts
        count = max(2, min(shape.train, _MOST, int(self.bare * _SECONDS / shape.context)))
        prompts = [contexts.context_ids(i) for i in range(count)]
        self._see(prompts)
        pairs = [(prompt, (0,)) for prompt in prompts]
        with shape.bench.teaching.teacher().watching() as capture:

            def run() -> None:
                for _ in answer_pass(self.base.model, self.base.tokenizer, pairs, capture=capture):
                    pass

            seconds = _fastest(run, self.base)
        return sum(map(len, prompts)) / seconds

    def _decode(self, shape: Shape) -> Line:
        """Seconds of one generated token, by the rows of a batch."""
        own = max(shape.evaluated, key=lambda queries: queries.limit)
        test = shape.rows[shape.evaluated.index(own)].test
        fits = int(writing_budget(self.base.model, 1, captured=False)[0] // (own.tokens + own.limit))
        points = []
        for rows in sorted({min(2, len(test)), max(1, min(fits, _MOST, len(test)))}):
            prompts = shape.bench.prompts(test[:rows])
            written: list[int] = []

            def run(prompts: Sequence[Ids] = prompts, written: list[int] = written) -> None:
                found = generate_answers(
                    self.base.model, self.base.tokenizer, prompts, max_new_tokens=_WRITTEN, batch_tokens=10**9
                )
                written.append(max(len(answer.ids) for answer in found))

            seconds = _fastest(run, self.base)
            # reading the prompts is counted elsewhere
            points.append(
                (float(rows), max(seconds - sum(map(len, prompts)) / self.bare, seconds / 2) / max(written))
            )
        return Line.through(points)

    def _evaluate(self, model: Any, shape: Shape, prompts: Sequence[Ids]) -> float:
        """Seconds of the evaluation's forward pass over the first test rows."""
        task, rows = shape.tasks[0], shape.rows[0].test[: len(prompts)]
        tokenizer = self.base.tokenizer

        def run() -> None:
            if task.kind == "classification":
                evaluate_prompts(model, tokenizer, task, rows, prompts)
                return
            # their own answers may be longer than what is generated
            pairs = [(prompt, (0,)) for prompt in prompts]
            for _ in answer_pass(model, tokenizer, pairs):
                pass

        return _fastest(run, self.base)

    def _see(self, prompts: Sequence[Ids]) -> None:
        self.longest = max(self.longest, *(len(prompt) for prompt in prompts))


def _fed(shape: Shape, prompts: Sequence[Ids]) -> float:
    """Tokens that an evaluation of the first test rows feeds."""
    own = shape.evaluated[0]
    answer = 1.0 if own.free else own.answer
    return own.labels * sum(len(prompt) + answer - 1 for prompt in prompts)


# ---------------------------------------------------------------------------------------- time, memory


def _between(count: float, most: int) -> int:
    return min(most, _MOST, max(_FEWEST, int(count)))


def _now(base: BaseModel) -> float:
    """The time when the device has done all it was asked to do."""
    import torch

    if base.device.type == "cuda":
        torch.cuda.synchronize(base.device)
    return time.perf_counter()


def _fastest(run: Callable[[], None], base: BaseModel) -> float:
    """Seconds of the fastest repetition."""
    seconds: list[float] = []
    while len(seconds) < _REPETITIONS and sum(seconds) < _LONG:
        began = _now(base)
        run()
        seconds.append(_now(base) - began)
    return min(seconds)


class _Peak:
    """Most memory in use meanwhile: of the process, on CUDA of the device.

    Attributes:
        bytes: known at the end.
    """

    def __init__(self, base: BaseModel) -> None:
        self._device = base.device if base.device.type == "cuda" else None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.bytes = 0

    def __enter__(self) -> _Peak:
        import torch

        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        import torch

        if self._device is not None:
            self.bytes = torch.cuda.max_memory_allocated(self._device)
        else:
            self._over.set()
            self._thread.join()

    def _watch(self) -> None:
        import psutil

        process = psutil.Process()
        while True:
            self.bytes = max(self.bytes, process.memory_info().rss)
            if self._over.wait(0.02):
                return
