"""Selection that wastes no label: every row is trained on, and was once a dev row (cross-fitting).

The rows are dealt into folds. A recipe is trained without each fold, at every rate and β, with the fold as
dev rows. The mean of the folds' dev losses chooses rate, β and the epochs of each stage; the temperature is
fitted on what the folds' models say of the rows that they were not trained on. Then the recipe is trained on
all rows, as chosen; or (``average``) the folds' weights are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from ia2.config.recipes import CONSTANT
from ia2.training.stages import PlannedStage, StageResult, TrainedRecipe, plan
from ia2.utils.logging import logger

if TYPE_CHECKING:
    import torch

    from ia2.experiment.workbench import Workbench

# More folds train on more rows each, and cost as much more.
FOLDS = 4


def folds_of(bench: Workbench) -> list[Workbench]:
    """The workbenches of the folds: all but one part of the training rows, and that part as dev rows.

    They put their weights on the adapter of ``bench``, and have a teacher each: its context must not hold
    the rows that the fold is judged by.

    Raises:
        DataError: a fold would leave fewer than two rows to train on.
    """
    rows = bench.data.train
    parts = rows.folds(min(FOLDS, len(rows)), bench.config.seed)
    return [
        bench.of(replace(bench.data, train=rest, dev=held), bench.folder / "folds" / str(place))
        for place, (rest, held) in enumerate(parts)
    ]


def cross_fitted(bench: Workbench, recipe: str) -> TrainedRecipe:
    """Choose by folds, then train on all rows, or average the folds' weights.

    Raises:
        DivergedError: at every rate some fold's training diverged.
        ConfigError: a loss that is not finite before anything is trained.
    """
    stages = plan(recipe, bench.config)
    betas: list[float | None] = next((s.betas for s in stages if s.betas != [None]), [None])
    folds = bench.folds
    for fold in folds:
        fold.config = bench.config  # one after the other, cells of a grid give a workbench theirs
    tried: dict[str, float] = {}
    diverged: dict[str, str] = {}
    best: tuple[float, float, float | None, list[list[StageResult]]] | None = None
    for rate, beta in product(bench.learning_rates(stages), betas):
        name = bench.attempt_name(rate, beta)
        runs = []
        for fold in folds:
            done = fold.attempt(stages, rate, beta)
            if done[-1].diverged is not None:
                diverged[name] = bench.divergence(recipe, stages, done)
                break
            runs.append(done)
        tried[name] = math.nan
        if len(runs) < len(folds):
            continue
        tried[name] = loss = float(np.mean([run[-1].selection_loss for run in runs]))
        if best is None or loss < best[0]:
            best = loss, rate, beta, runs
    if best is None:
        raise bench.all_diverged(recipe, diverged)
    _, rate, beta, runs = best
    temperatures = _temperatures(folds, runs)
    if bench.config.selection == "average":
        done = [_averaged([run[place] for run in runs]) for place in range(len(stages))]
    else:
        epochs = [best_epoch([run[place].history for run in runs]) for place in range(len(stages))]
        for place, stage in enumerate(stages):
            # a first stage of no epochs would leave no adapter; a constant has none to choose from
            if not place or stage.kind == CONSTANT:
                epochs[place] = max(1, epochs[place])
        logger.info(
            "%s: %d folds choose rate %s and %s.",
            recipe,
            len(folds),
            bench.attempt_name(rate, beta),
            ", ".join(f"{n} epochs of {stage.kind}" for n, stage in zip(epochs, stages, strict=True)),
        )
        kept = [_of_length(stage, n) for stage, n in zip(stages, epochs, strict=True) if n]
        done = bench.attempt(kept, rate, beta)
        if done[-1].diverged is not None:
            raise bench.all_diverged(recipe, {**diverged, "all rows": bench.divergence(recipe, kept, done)})
        spent = [sum(run[place].seconds for run in runs) for place in range(len(stages)) if epochs[place]]
        done = [replace(stage, seconds=stage.seconds + more) for stage, more in zip(done, spent, strict=True)]
    return TrainedRecipe(recipe, done, tried, "loss of the folds", diverged, temperatures)


def best_epoch(histories: Sequence[Sequence[dict[str, Any]]]) -> int:
    """The number of epochs at which the mean of the folds' dev losses is lowest; 0: before the first step.

    Args:
        histories: of each fold, entries with ``epoch`` and ``eval_loss`` (others are passed over). Between
            two evaluations a straight line is drawn; a fold that stopped early stays at its last loss.

    Example:
        >>> one = [{"epoch": e, "eval_loss": loss} for e, loss in enumerate([3.0, 1.0, 2.0])]
        >>> other = [{"epoch": 0, "eval_loss": 3.0}, {"epoch": 2, "eval_loss": 1.8}]
        >>> best_epoch([one, other])
        1
    """
    curves = [[(e["epoch"], e["eval_loss"]) for e in history if "eval_loss" in e] for history in histories]
    last = math.ceil(max(curve[-1][0] for curve in curves) - 1e-6)
    at = np.arange(last + 1)
    losses = [np.interp(at, *np.array(curve, float).T) for curve in curves]
    return int(np.mean(losses, axis=0).argmin())


def _of_length(stage: PlannedStage, epochs: int) -> PlannedStage:
    """The stage for so many epochs, without dev rows."""
    if stage.kind == CONSTANT:  # computed at once
        return stage
    settings = stage.settings.model_copy(update={"epochs": epochs, "restore_best": False})
    return replace(stage, settings=settings, label=f"{stage.label}~{epochs}-epochs")


def _averaged(results: Sequence[StageResult]) -> StageResult:
    """One stage of all folds, with the mean of their weights."""
    import torch

    def mean(name: str) -> torch.Tensor:
        return torch.stack([result.state[name].float() for result in results]).mean(0)

    first = results[0]
    return replace(
        first,
        state={name: mean(name).to(tensor.dtype) for name, tensor in first.state.items()},
        seconds=sum(result.seconds for result in results),
        dev_loss=float(np.mean([result.dev_loss for result in results])),
        selection_loss=float(np.mean([result.selection_loss for result in results])),
    )


def _temperatures(folds: Sequence[Workbench], runs: Sequence[Sequence[StageResult]]) -> dict[str, float]:
    """Fitted on every row, as the model says it that was trained without the row."""
    from ia2.evaluation.metrics import fitted_temperatures

    losses = []
    for fold, run in zip(folds, runs, strict=True):
        fold.use(run[-1].state)
        losses.append(fold.temperature_losses())
    return fitted_temperatures({scope: np.concatenate([p[scope] for p in losses]) for scope in losses[0]})
