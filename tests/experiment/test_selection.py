"""Choosing steps, rate, β and temperature without rows that are kept from training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.benches import bench_of, clone, icl_base, icl_examples

from ia2.config import AdaptConfig
from ia2.data.examples import Examples
from ia2.experiment.adapt import adapt
from ia2.experiment.cross_fitting import FOLDS, best_epoch
from ia2.experiment.workbench import Workbench
from ia2.models.load import BaseModel
from ia2.utils.errors import DataError

ROWS = icl_examples(10)
SHORT = {"align": {"epochs": 2}, "sft": {"epochs": 2}, "selection": "folds"}


@pytest.fixture(scope="module")
def model(tiny_icl_model_path: Path) -> BaseModel:
    return icl_base(tiny_icl_model_path)


def made(model: BaseModel, folder: Path, **settings: Any) -> Workbench:
    nothing = Examples([], name=ROWS.name)
    return bench_of(clone(model), ROWS[:8], nothing, folder, **{**SHORT, **settings})


def curve(*losses: float) -> list[dict[str, Any]]:
    return [{"epoch": epoch, "eval_loss": loss} for epoch, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("curves", "epochs"),
    [
        ([curve(3, 1, 2), curve(3, 2, 1.9)], 1),  # means 3, 1.5, 1.95
        ([curve(3, 1, 2), curve(3, 2, 0)], 2),
        ([curve(1, 2, 3)], 0),  # nothing is better than the weights before the first step
        ([curve(3, 2), curve(3, 2, 1, 0.5)], 3),  # one stopped early
        ([[{"epoch": 0.0, "eval_loss": 3.0}, {"epoch": 0.5, "eval_loss": 0.0}, {"epoch": 1, "eval_loss": 4.0},
           {"epoch": 1, "loss": -9.0}]], 0),  # whole epochs only; losses of training are passed over
    ],
)  # fmt: skip
def test_the_best_epoch_is_that_of_the_mean(curves: Any, epochs: int) -> None:
    assert best_epoch(curves) == epochs


def test_every_row_is_trained_on_and_judged_once(model: BaseModel, tmp_path: Path) -> None:
    bench = made(model, tmp_path, learning_rates=[1e-3, 1e-2])
    trained = bench.train("ia2-sft")
    held = [row for fold in bench.folds for row in fold.data.dev]
    assert len(bench.folds) == FOLDS and sorted(r.source for r in held) == sorted(r.source for r in ROWS[:8])
    for fold in bench.folds:
        inside = {row.source for row in fold.data.train}
        assert not inside & {row.source for row in fold.data.dev} and len(inside) == 6
        # its teacher has not seen the rows that the fold is judged by
        assert {row.source for row in fold.train_contexts.queries} == inside
    assert trained.selected_by == "loss of the folds" and set(trained.tried) == {"0.001", "0.01"}
    assert trained.learning_rate == float(min(trained.tried, key=trained.tried.__getitem__))
    for stage in trained.stages:
        assert "folds" not in stage.folder.parts and stage.steps == 2 * int(stage.folder.parent.name[-8])
        assert not any("eval_loss" in entry for entry in stage.history)  # no row is left to look at
    assert trained.temperatures is not None
    assert bench.evaluate("ia2-sft", ROWS[8:]).measured.temperatures == trained.temperatures
    # those of the untrained are their own
    assert bench.evaluate("base", ROWS[8:]).measured.temperatures.keys() == trained.temperatures.keys()
    assert bench.evaluate("icl", ROWS[8:]).measured.temperatures != trained.temperatures


def test_a_killed_run_finds_its_folds(
    model: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = made(model, tmp_path).train("ia2-sft")
    monkeypatch.setattr("ia2.experiment.workbench.run_stage", None)  # nothing may be trained again
    again = made(model, tmp_path).train("ia2-sft")
    assert again.tried == first.tried and again.temperatures == first.temperatures
    assert all(torch.equal(again.state[name], first.state[name]) for name in first.state)


def test_recipes_share_folders_only_of_equal_stages(model: BaseModel, tmp_path: Path) -> None:
    """What the folds choose for `ia2` need not be what they choose for `ia2-sft`."""
    bench = made(model, tmp_path, learning_rates=[1e-4, 1e-2])
    for recipe in ("ia2", "ia2-sft"):
        bench.train(recipe)


def test_folds_are_averaged(model: BaseModel, tmp_path: Path) -> None:
    bench = made(model, tmp_path, selection="average")
    trained = bench.train("sft")
    states = [fold.attempt(trained_stages(fold), trained.learning_rate)[-1].state for fold in bench.folds]
    for name, mean in trained.state.items():
        torch.testing.assert_close(mean, torch.stack([state[name] for state in states]).mean(0))
    assert trained.stages[0].seconds > 0


def trained_stages(fold: Workbench) -> Any:
    from ia2.training.stages import plan

    return plan("sft", fold.config)


def test_fine_tuning_may_keep_the_aligned_weights(model: BaseModel, tmp_path: Path) -> None:
    """At a rate that ruins everything, the weights before the first step are the best."""
    for selection in ("dev", "folds"):
        rows = (ROWS[:6], ROWS[6:]) if selection == "dev" else (ROWS, Examples([], name="none"))
        settings = {**SHORT, "selection": selection, "sft": {"epochs": 2, "learning_rate": 3.0}}
        bench = bench_of(clone(model), *rows, tmp_path / selection, **settings)
        trained = bench.train("ia2-sft")
        aligned = next(stage for stage in trained.stages if stage.name == "align")
        assert all(torch.equal(trained.state[name], aligned.state[name]) for name in aligned.state)


def test_adapt_trains_on_all_rows(model: BaseModel, tmp_path: Path) -> None:
    for selection in ("folds", "average", "last"):
        config = AdaptConfig(**{**SHORT, "selection": selection}, recipe="sft")
        result = adapt(clone(model), ROWS[:8], config, test=ROWS[8:], output_dir=tmp_path / selection)
        assert (result.metrics["num_train"], result.metrics["num_dev"]) == (8, 0)
        assert bool(result.metrics["temperatures"]) == (selection != "last")
    drawn = ROWS.split(num_examples=6, dev=False)
    assert [r.source for r in drawn.train] == [r.source for r in ROWS.split(num_examples=6).train]
    assert not len(drawn.dev)
    with pytest.raises(DataError, match="ask for at most 10"):
        ROWS.split(num_examples=11, dev=False)


@pytest.mark.parametrize("settings", [{"learning_rates": [1e-3, 1e-4]}, {"joint": {"betas": [0.2, 0.5]}}])
def test_nothing_to_choose_by_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="selection last chooses nothing"):
        AdaptConfig(selection="last", **settings)
