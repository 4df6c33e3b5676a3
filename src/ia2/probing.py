"""``probe``: will alignment help here? ICL against the base and against guessing, before any training."""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ia2.adaptation import load_base_of
from ia2.adapter_weights import base_weights
from ia2.arms import METHOD
from ia2.config import ProbeConfig
from ia2.console import logger
from ia2.context import Contexts, DemonstrationContexts
from ia2.errors import DataError
from ia2.evaluation.run import evaluate_prompts
from ia2.examples import MAX_DEV, Examples, FewShotSplit
from ia2.manifest import begin
from ia2.models import BaseModel
from ia2.runs import machine
from ia2.schedule import Schedule
from ia2.stages import plan
from ia2.task import Task, make_task
from ia2.tokens import Ids
from ia2.workbench import Workbench, teacher_passes

# ICL must beat guessing and the base at this level (one-sided) before help is called likely.
SIGNIFICANCE = 0.05

# … and the base by this much accuracy: less leaves little for alignment to carry over.
HEADROOM = 0.05


@dataclass
class Probe:
    """What :func:`probe` found.

    Attributes:
        verdict: ``likely to help``, ``unclear`` or ``unlikely``.
        reason: one sentence.
        facts: accuracies, costs and what they are of; JSON-able.
    """

    verdict: str
    reason: str
    facts: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"verdict": self.verdict, "reason": self.reason, **self.facts}


def probe(model: str | BaseModel, examples: Examples, config: ProbeConfig | None = None) -> Probe:
    """Compare ICL, leaving each row out of its own demonstrations, with the base model and guessing.

    Where the settings give another context, the model with that context takes the place of ICL.

    Args:
        model: what :func:`ia2.models.load_base` takes, or a loaded base model.
        examples: labelled rows.
        config: settings; ``num_examples`` limits the demonstrations to that many less one.

    Raises:
        UserError: a mistake in data, settings or model.
    """
    config = config or ProbeConfig()
    base = load_base_of(model, config)
    task = make_task(examples, config, base.tokenizer, config.prompt_template)
    limit = min(config.num_examples or len(examples), config.max_queries)
    rows = examples
    if limit < 2:
        raise DataError(f"{examples.name}: at least two rows are needed.")
    if limit > len(examples):
        raise DataError(f"{examples.name}: asked for {limit} rows, there are {len(examples)}.")
    if limit < len(examples):
        drawn = sorted(random.Random(f"probe {config.seed}").sample(range(len(examples)), limit))
        rows = Examples([examples[i] for i in drawn], name=examples.name)
        logger.info("Probing on %d of %d rows, drawn with seed %d.", limit, len(examples), config.seed)
    with tempfile.TemporaryDirectory(prefix="ia2-probe-") as scratch:
        nothing = Examples([], name=rows.name)
        begin(Path(scratch))
        bench = Workbench(base, FewShotSplit(train=rows, dev=nothing), task, config, Path(scratch))
        try:
            bench.check([METHOD], nothing)
            return _probe(bench, rows, len(examples))
        finally:
            bench.close()


def _probe(bench: Workbench, rows: Examples, available: int) -> Probe:
    task = bench.task
    contexts = bench.train_contexts
    began = time.perf_counter()
    contexts.prepare()
    seconds_prepare = time.perf_counter() - began
    in_context = [contexts.context_ids(i) for i in range(len(rows))]
    bare = bench.prompts(rows, demonstrations=False)
    with base_weights(bench.model):
        began = time.perf_counter()
        demonstrations = isinstance(contexts, DemonstrationContexts)
        what = "ICL, leave one out" if demonstrations else "base, with its context"
        icl, icl_in_set = _right(bench, rows, in_context, what)
        seconds_icl = seconds_prepare + time.perf_counter() - began
        zero, zero_in_set = _right(bench, rows, bare, "base")
    guess = _majority(rows) if task.kind == "classification" else np.zeros(len(rows))
    step, evaluated = _training_seconds(bench)
    facts = {
        "rows": len(rows),
        "demonstrations": len(contexts.chosen(0)) if isinstance(contexts, DemonstrationContexts) else 0,
        "context": _context(bench, contexts),
        "accuracy": {
            "icl": float(icl.mean()),
            "base": float(zero.mean()),
            "icl_in_label_set": float(icl_in_set.mean()),
            "base_in_label_set": float(zero_in_set.mean()),
            "most_frequent_label": float(guess.mean()),
        },
        "chance": 1 / len(task.labels) if task.labels else 0.0,
        "cost": _cost(bench, seconds_icl, step, evaluated, available),
        "machine": machine(),
    }
    verdict, reason = judge(icl, zero, guess, task, in_label_set=icl_in_set, demonstrations=demonstrations)
    return Probe(verdict, reason, facts)


def _context(bench: Workbench, contexts: Contexts) -> str:
    """What comes before each row, in words."""
    config = bench.config
    if isinstance(contexts, DemonstrationContexts):
        count = len(contexts.chosen(0))
        which = f"the {count} others" if count == len(contexts) - 1 else f"{count} of the others"
        return f"{which} shown before it"
    if config.context_column:
        return f"the context in its column '{config.context_column}' before it"
    if config.context_function:
        return f"the context from {config.context_function} before it"
    return "the same text before it"


def judge(
    icl: np.ndarray,
    base: np.ndarray,
    guess: np.ndarray,
    task: Task,
    *,
    in_label_set: np.ndarray | None = None,
    demonstrations: bool = True,
) -> tuple[str, str]:
    """Verdict and reason from 0/1 arrays of right answers, ``[n]`` each.

    Args:
        icl: in-context learning, over the whole vocabulary.
        base: the model without demonstrations (or another context), over the whole vocabulary.
        guess: always giving the most frequent label.
        task: what counts as an answer.
        in_label_set: ICL when only the labels compete, as they do in a guess; by default ``icl``.
        demonstrations: whether the context is made of them; otherwise there is no talk of ICL.
    """
    from scipy.stats import binomtest

    n = len(icl)
    chosen = icl if in_label_set is None else in_label_set
    chance = max(float(guess.mean()), 1 / len(task.labels) if task.labels else 0.0)
    what = "always answering the most frequent label" if task.labels else "no answer at all"
    above_chance = (
        binomtest(int(chosen.sum()), n, min(chance, 1 - 1e-9), alternative="greater").pvalue
        if chance > 0
        else float(chosen.sum() == 0)
    )
    better = int(((icl == 1) & (base == 0)).sum())
    worse = int(((icl == 0) & (base == 1)).sum())
    above_base = (
        binomtest(better, better + worse, 0.5, alternative="greater").pvalue if better + worse else 1.0
    )
    among = f" ({chosen.mean():.0%} in the label set)" if in_label_set is not None else ""
    name, short, without, more = "ICL", "ICL", "the model without demonstrations", "more examples"
    if not demonstrations:
        name, short = "the model with its context", "with context"
        without, more = "without it", "another context"
    subject = name[0].upper() + name[1:]
    figures = f"{short} {icl.mean():.0%}{among}, base {base.mean():.0%}, {what} {chance:.0%}, on {n} rows"
    if chosen.mean() <= chance or (above_chance > SIGNIFICANCE and n >= 16):
        return (
            "unlikely",
            f"{subject} is at chance ({figures}): there is nothing in its activations to align with. Try "
            f"other label words (--label-map), {more} or a stronger model.",
        )
    if above_chance > SIGNIFICANCE:
        return (
            "unclear",
            f"too few rows to tell {name} from chance ({figures}). Give more labelled rows.",
        )
    if icl.mean() - base.mean() < HEADROOM:
        return (
            "unclear",
            f"{subject} is hardly better than {without} ({figures}): little to carry over.",
        )
    if above_base > SIGNIFICANCE:
        return (
            "unclear",
            f"{subject} looks better than the base, but the rows are too few to be sure ({figures}).",
        )
    return "likely to help", f"{subject} is clearly above the base and above chance ({figures})."


def _right(
    bench: Workbench, rows: Examples, prompts: Sequence[Ids], description: str
) -> tuple[np.ndarray, np.ndarray]:
    """0/1 arrays ``[n]``: right over the whole vocabulary, and when only the labels compete."""
    _, measured = evaluate_prompts(
        bench.model, bench.tokenizer, bench.task, rows, prompts, description=description
    )
    scopes = measured.plain
    return scopes["vocabulary"].correct, scopes.get("labels", scopes["vocabulary"]).correct


def _majority(rows: Examples) -> np.ndarray:
    """Whether a row has the most frequent label, ``[n]``.

    Of all rows, not of the others: among balanced rows the most frequent label of the others is never a
    row's own, and guessing would seem to be always wrong.
    """
    counts = Counter(rows.answers)
    guess = max(sorted(counts), key=lambda label: counts[label])
    return np.array([float(answer == guess) for answer in rows.answers])


def _training_seconds(bench: Workbench) -> tuple[float, float]:
    """Seconds of an optimiser step's forward and backward pass, and of a dev row, of the longest rows."""
    from ia2.trainer import SftTrainer, StageSettings

    rows, nothing = bench.sft_rows()
    count = min(bench.config.batch_size, len(rows))
    order = sorted(range(len(rows)), key=lambda i: -len(rows.row(i).query))[:count]
    with tempfile.TemporaryDirectory(prefix="ia2-probe-") as scratch:
        settings = StageSettings(Path(scratch), batch_size=bench.config.batch_size)
        trainer = SftTrainer(bench.model, rows, nothing, settings, bench.tokenizer)
        trainer.model.to(trainer.args.device)
        batch = trainer._prepare_inputs(trainer.data_collator([rows[i] for i in order]))
        times, forward = [], []
        for _ in range(3):
            began = time.perf_counter()
            losses = trainer.example_losses(bench.model, batch).sum()
            forward.append(time.perf_counter() - began)
            losses.backward()
            times.append(time.perf_counter() - began)
            bench.model.zero_grad()
    return min(times), min(forward) / count


def _cost(
    bench: Workbench, seconds_icl: float, step: float, dev_row: float, available: int
) -> dict[str, Any]:
    config = bench.config
    train = config.num_examples or max(2, available - available // 3)
    dev = min(train // 2, MAX_DEV) if config.num_examples else available - train
    stages = plan(METHOD, config)
    needed = next(each for each in teacher_passes(stages, config) if each is not None)
    per_query = seconds_icl / len(bench.data.train)
    # one order is one pass; generated answers are part of what was timed
    teacher = per_query * (train + dev) * config.demo_permutations
    per_epoch = -(-train // config.batch_size)
    most, training = 0, 0.0
    for stage in stages:
        steps = per_epoch * stage.settings.epochs
        settings, batch = stage.settings, min(config.batch_size, train)
        schedule = Schedule(per_epoch, settings.epochs, batch, dev, settings.eval_every)
        evaluations = schedule.total if dev else 0
        most = max(most, steps)
        training += steps * step + evaluations * dev * dev_row
    return {
        "num_train": train,
        "num_dev": dev,
        "teacher_seconds": teacher,
        "step_seconds": step,
        "evaluation_seconds": dev * dev_row,
        "max_steps_a_stage": most,
        "training_seconds_at_most": len(bench.learning_rates) * training,
        "target_bytes": bench.teaching.target_bytes(*needed) // len(bench.data.train) * (train + dev),
    }
