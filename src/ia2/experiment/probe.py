"""``probe``: will alignment help here? ICL against quick fine-tuning on rows held out, and the bare model."""

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

from ia2.adapters.weights import base_weights
from ia2.config import AdaptConfig, ProbeConfig
from ia2.config.recipes import METHOD, PLAIN
from ia2.config.sections import MAX_EPOCHS
from ia2.data.examples import Examples, FewShotSplit
from ia2.data.splits import MAX_DEV
from ia2.evaluation.evaluate import evaluate_prompts
from ia2.evaluation.headroom import Judgement, judge
from ia2.experiment.adapt import load_base_of
from ia2.experiment.run_folder import machine
from ia2.experiment.workbench import Workbench, teacher_passes
from ia2.models.load import BaseModel
from ia2.models.tokens import Ids
from ia2.prompts.context import Contexts
from ia2.prompts.own_context import ContextFunction
from ia2.prompts.task import make_task
from ia2.training.schedule import Schedule
from ia2.training.stages import plan
from ia2.utils.errors import DataError, DivergedError
from ia2.utils.logging import logger
from ia2.utils.manifest import begin
from ia2.utils.statistics import main_scope

# Fine-tuning is tried on so many folds, for about so many steps each: enough for a few rows, and quick.
FOLDS, STEPS = 3, 30

_WORDS = {"yes": "likely to help", "unclear": "unclear", "no": "unlikely"}


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


def probe(
    model: str | BaseModel,
    examples: Examples,
    config: ProbeConfig | None = None,
    context: ContextFunction | None = None,
) -> Probe:
    """Compare ICL with quick fine-tuning, the base model and guessing, on rows that neither has seen.

    Folds of the rows are held out; ICL and fine-tuning have the others, so that both know the same.
    Fine-tuning is :data:`STEPS` steps at one rate, a part of what a run would take. Where the settings give
    another context, the model with that context takes the place of ICL.

    Args:
        model: what :func:`ia2.models.load.load_base` takes, or a loaded base model.
        examples: labelled rows.
        config: settings; ``num_examples`` limits the demonstrations to that many less one.
        context: makes the context of an example, as for :func:`ia2.adapt`.

    Raises:
        UserError: a mistake in data, settings or model.
    """
    config = config or ProbeConfig()
    # a file of settings may be one for training
    config = config.model_copy(update={"unlabelled": None})
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
        data = FewShotSplit(train=rows, dev=nothing)
        bench = Workbench(base, data, task, config, Path(scratch), function=context)
        try:
            bench.check([METHOD], nothing)
            return _probe(bench, rows, examples)
        finally:
            bench.close()


def choose_recipe(
    base: BaseModel, examples: Examples, config: AdaptConfig, context: ContextFunction | None = None
) -> tuple[str, str]:
    """What ``recipe: auto`` stands for, and why.

    Plain fine-tuning where the probe's verdict is *unlikely*, since alignment carries over what in-context
    learning does, and where alignment would learn from training examples that the teacher answers no better
    than guessing (``results/dials``: 19% right, 30 points lost); else the method.

    Args:
        base: the loaded model.
        examples: the labelled rows that are trained on or held out.
        config: settings of the run.
        context: makes the context of an example, if the user gave such a function.

    Returns:
        The recipe, and a sentence.

    Raises:
        UserError: a mistake in data, settings or model.
    """
    if len(examples) < FOLDS:
        return METHOD, f"{len(examples)} rows are too few to probe."
    given = {k: v for k, v in config.model_dump().items() if k in ProbeConfig.model_fields}
    settings = ProbeConfig(**{**given, "recipe": METHOD, "num_examples": None})
    found = probe(base, examples, settings, context)
    if found.verdict == _WORDS["no"]:
        return PLAIN, found.reason
    right = found.facts["accuracy"]
    guessing = max(found.facts["chance"], right["most_frequent_label"])
    if config.unlabelled is None and right["icl_leave_one_out"] <= guessing:
        return PLAIN, (
            f"The teacher is right on {right['icl_leave_one_out']:.1%} of the training examples, guessing on "
            f"{guessing:.1%}, and alignment would learn from these. Rows without labels (--unlabelled) would "
            "be answered behind all examples."
        )
    return METHOD, found.reason


def _probe(bench: Workbench, rows: Examples, examples: Examples) -> Probe:
    task = bench.task
    contexts = bench.train_contexts
    began = time.perf_counter()
    contexts.prepare()
    seconds_prepare = time.perf_counter() - began
    in_context = [contexts.context_ids(i) for i in range(len(rows))]
    bare = bench.prompts(rows, demonstrations=False)
    with base_weights(bench.model):
        began = time.perf_counter()
        demonstrations = contexts.selection is not None
        what = "ICL, leave one out" if demonstrations else "base, with its context"
        icl, icl_in_set = _right(bench, rows, in_context, what)
        seconds_icl = seconds_prepare + time.perf_counter() - began
        zero, zero_in_set = _right(bench, rows, bare, "base")
    guess = _majority(rows) if task.kind == "classification" else np.zeros(len(rows))
    step, evaluated = _training_seconds(bench)
    teacher = _teacher(bench, rows, examples) if demonstrations else None
    bench.close()
    tried = _held_out(bench, rows)
    if demonstrations and teacher is None and tried is not None:
        teacher = {
            "rows": len(rows),
            "demonstrations": tried.about["rows"],
            "accuracy": float(tried.icl.mean()),
        }
    chance = max(float(guess.mean()), 1 / len(task.labels) if task.labels else 0.0)
    judged = judge(
        (icl_in_set if tried is None else tried.icl).tolist(),
        None if tried is None else tried.sft.tolist(),
        zero_in_set.tolist(),
        chance,
        units="rows",
        name="ICL" if demonstrations else "the context",
    )
    facts = {
        "rows": len(rows),
        "demonstrations": len(contexts.chosen(0)),
        "context": _context(bench, contexts),
        "accuracy": {
            "icl": None if tried is None else float(tried.icl.mean()),
            "sft": None if tried is None else float(tried.sft.mean()),
            "icl_leave_one_out": float(icl_in_set.mean()),
            "base": float(zero_in_set.mean()),
            "icl_leave_one_out_vocabulary": float(icl.mean()),
            "base_vocabulary": float(zero.mean()),
            "most_frequent_label": float(guess.mean()),
        },
        "headroom": None if judged.headroom is None else judged.headroom.to_dict(),
        "sft": None if tried is None else tried.about,
        "chance": 1 / len(task.labels) if task.labels else 0.0,
        "teacher_of_unlabelled": teacher,
        "unlabelled": teacher and unlabelled_sentence(float(icl_in_set.mean()), **teacher),
        "cost": _cost(bench, seconds_icl, step, evaluated, len(examples)),
        "machine": machine(),
    }
    return Probe(_WORDS[judged.word], reason_of(judged, len(rows)), facts)


def reason_of(judged: Judgement, rows: int) -> str:
    """One sentence with the numbers, and what to do."""
    said = judged.reason[0].upper() + judged.reason[1:]
    if "guessing" in said or ("above the bare model" in said and judged.word == "no"):
        todo = "Try other label words (--label-map), more examples or a stronger model."
    elif judged.word == "no":
        todo = "Fine-tune without alignment: --recipe sft."
    elif judged.word == "yes":
        todo = "What is gained, `ia2 compare` tells."
    else:
        todo = "More labelled rows would tell, and so does `ia2 compare`."
    return f"{said} ({judged.figures}, on {rows} rows). {todo}"


def unlabelled_sentence(leave_one_out: float, *, accuracy: float, rows: int, demonstrations: int) -> str:
    """What rows without labels would bring: targets that are right more often, or only more of them.

    Args:
        leave_one_out: how often the teacher is right on training examples, with the others as demonstrations.
        accuracy: how often it is right on rows that are none of its demonstrations, as unlabelled rows are.
        rows: how many these were.
        demonstrations: how many it had.

    >>> said = unlabelled_sentence(0.25, accuracy=0.75, rows=24, demonstrations=8)
    >>> said.partition(": ")[2]
    'rows without labels (--unlabelled) would give alignment more targets, and better ones.'
    """
    gain = "more targets, and better ones" if accuracy > leave_one_out else "more targets, not better ones"
    return (
        f"The teacher is right on {leave_one_out:.1%} of the training examples (leave one out) and on "
        f"{accuracy:.1%} of {rows} other rows ({demonstrations} demonstrations): rows without labels "
        f"(--unlabelled) would give alignment {gain}."
    )


def _teacher(bench: Workbench, rows: Examples, examples: Examples) -> dict[str, Any] | None:
    """The teacher with all demonstrations, on labelled rows that are not among them; None where none are."""
    shown = {id(row) for row in rows}
    others = [row for row in examples if id(row) not in shown][:MAX_DEV]
    if not others:
        return None
    measured = bench.evaluate("icl", Examples(others, name=examples.name)).measured
    right = measured.plain[main_scope(bench.task.kind == "classification")].correct
    return {"rows": len(others), "demonstrations": len(rows), "accuracy": float(right.mean())}


@dataclass
class _Tried:
    """ICL and fine-tuning on held-out rows, in the order of the rows.

    Attributes:
        icl, sft: 0 or 1, among the labels (free text: of the answer), ``[n]``.
        about: folds, training rows, steps and rate.
    """

    icl: np.ndarray
    sft: np.ndarray
    about: dict[str, Any]


def _held_out(bench: Workbench, rows: Examples) -> _Tried | None:
    """Both by folds; None where there are too few rows, or where fine-tuning diverged."""
    if len(rows) < FOLDS:
        return None
    folds = rows.folds(FOLDS, bench.config.seed)
    smallest = min(len(rest) for rest, _ in folds)
    per_epoch = -(-smallest // bench.config.batch_size)
    stages = plan(PLAIN, bench.config)
    rate = bench.learning_rates(stages)[0]
    epochs = min(bench.config.sft.epochs or MAX_EPOCHS, max(1, round(STEPS / per_epoch)))
    config = bench.config.model_copy(
        update={
            "learning_rates": [rate],
            "selection": "last",
            "sft": bench.config.sft.model_copy(update={"epochs": epochs}),
            "icl_demonstrations": "same",
        }
    )
    number_of = {id(row): n for n, row in enumerate(rows)}
    found = {recipe: np.zeros(len(rows)) for recipe in ("icl", "sft")}
    scope = main_scope(bench.task.kind == "classification")
    for number, (rest, held) in enumerate(folds):
        data = FewShotSplit(train=rest, dev=Examples([], name=rows.name))
        place = bench.folder / f"fold-{number}"
        fold = Workbench(
            bench.base, data, bench.task, config, place, bench.one_recipe, function=bench.function
        )
        try:
            for recipe, right in found.items():
                if recipe == "sft":
                    fold.train(recipe)
                measured = fold.evaluate(recipe, held).measured
                right[[number_of[id(row)] for row in held]] = measured.plain[scope].correct
        except DivergedError as error:
            logger.warning("SFT diverged, so ICL cannot be held against it: %s", error.rates)
            return None
        finally:
            fold.close()
    rate = config.sft.learning_rate or rate
    about = {"folds": FOLDS, "rows": smallest, "steps": epochs * per_epoch, "rate": rate}
    return _Tried(found["icl"], found["sft"], about)


def _context(bench: Workbench, contexts: Contexts) -> str:
    """What comes before each row, in words."""
    config = bench.config
    if contexts.selection is not None:
        count = len(contexts.chosen(0))
        which = f"the {count} others" if count == len(contexts) - 1 else f"{count} of the others"
        return f"{which} shown before it"
    if config.context_column:
        return f"the context in its column '{config.context_column}' before it"
    if config.context_function:
        return f"the context from {config.context_function} before it"
    return "the same text before it"


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
    from ia2.training.losses import AnswerLoss
    from ia2.training.trainer import ExampleTrainer

    rows, nothing = bench.sft_rows()
    count = min(bench.config.batch_size, len(rows))
    order = rows.longest_first[:count]
    with tempfile.TemporaryDirectory(prefix="ia2-probe-") as scratch:
        trainer = ExampleTrainer(
            bench.model,
            AnswerLoss(),
            rows,
            nothing,
            bench.tokenizer,
            output_dir=Path(scratch),
            config=AdaptConfig(batch_size=bench.config.batch_size),
        )
        trainer.model.to(trainer.args.device)
        batch = trainer._prepare_inputs(trainer.data_collator([rows[i] for i in order]))
        times, forward = [], []
        for _ in range(3):
            began = time.perf_counter()
            losses = trainer.loss(bench.model, batch).sum()
            forward.append(time.perf_counter() - began)
            losses.backward()
            times.append(time.perf_counter() - began)
            bench.model.zero_grad()
    return min(times), min(forward) / count


def _cost(
    bench: Workbench, seconds_icl: float, step: float, dev_row: float, available: int
) -> dict[str, Any]:
    config = bench.config
    train, dev = config.num_examples or available, 0
    if config.selection == "dev":
        train = config.num_examples or max(2, available - available // 3)
        dev = min(train // 2, MAX_DEV) if config.num_examples else available - train
    stages = plan(METHOD, config)
    needed = next(each for each in teacher_passes(stages, config) if each is not None)
    per_query = seconds_icl / len(bench.data.train)
    # one order is one pass; generated answers are part of what was timed
    teacher = per_query * (train + dev) * config.context_draws
    per_epoch = -(-train // config.batch_size)
    most, training = 0, 0.0
    for stage in stages:
        settings, batch = stage.settings, min(config.batch_size, train)
        epochs = settings.length(per_epoch, config.selection)
        steps = per_epoch * epochs
        schedule = Schedule(per_epoch, epochs, batch, dev, settings.eval_every)
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
        "training_seconds_at_most": len(bench.learning_rates(stages)) * training,
        "target_bytes": bench.teaching.target_bytes(*needed) // len(bench.data.train) * (train + dev),
    }
