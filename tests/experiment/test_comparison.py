"""Recipes side by side: which rows are whose, what is computed once, what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.benches import icl_base, icl_examples

from ia2.config import CompareConfig
from ia2.data.examples import Example, Examples
from ia2.evaluation.metrics import Measured, RowMeasures
from ia2.experiment.compare import Comparison, Outcome, _asim_interval, _merge, compare
from ia2.experiment.rounds import rounds_of
from ia2.models.load import BaseModel
from ia2.training import trainer
from ia2.utils.errors import DataError, RunFolderError
from ia2.utils.locks import LOCK

ROWS = icl_examples(18)
RECIPES = ["base", "icl", "sft", "ia2", "ia2-sft"]
BRIEF = {"epochs": 2}


def config(**changes: Any) -> CompareConfig:
    return CompareConfig(
        **{"align": BRIEF, "sft": BRIEF, "seeds": 2, "recipes": RECIPES, "selection": "dev", **changes}
    )


@pytest.fixture(scope="module")
def base(tiny_icl_model_path: Path) -> BaseModel:
    return icl_base(tiny_icl_model_path)


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that are trained, in order."""
    trained: list[str] = []
    fit = trainer.ExampleTrainer.fit

    def counting(self: Any) -> float:
        trained.append(type(self.loss).__name__)
        return fit(self)

    monkeypatch.setattr(trainer.ExampleTrainer, "fit", counting)
    return trained


@pytest.fixture(scope="module")
def crossed(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """A cross-fitted comparison, seed 3 and 4."""
    return compare(base, ROWS, config(seed=3), output_dir=tmp_path_factory.mktemp("crossed") / "out")


# ------------------------------------------------------------------------------------------- rounds


def test_cross_fitting_tests_every_row_once_a_seed_and_never_on_itself(tmp_path: Path) -> None:
    plans = rounds_of(ROWS, None, config(folds=4, seeds=3, seed=5), tmp_path)
    assert len(plans) == 12
    for seed in (5, 6, 7):
        of_seed = [plan for plan in plans if plan.seed == seed]
        tested = [place for plan in of_seed for place in plan.places]
        assert sorted(tested) == list(range(len(ROWS)))
        for plan in of_seed:
            assert [ROWS[place] for place in plan.places] == list(plan.test)
            parts = (plan.data.train, plan.data.dev, plan.test)
            train, dev, test = ({e.source for e in part} for part in parts)
            assert not (train & test or dev & test or train & dev)
            assert train | dev | test == {e.source for e in ROWS}
    assert len({plan.folder for plan in plans}) == 12
    assert {tuple(p.places) for p in plans if p.seed == 5} != {tuple(p.places) for p in plans if p.seed == 6}


def test_rows_that_read_the_same_keep_their_places(tmp_path: Path) -> None:
    rows = Examples([Example("a0", (" L1", " L2")[i % 2], "same") for i in range(6)])
    plans = rounds_of(rows, None, config(folds=3, seeds=1), tmp_path)
    assert sorted(place for plan in plans for place in plan.places) == list(range(6))


def test_with_test_data_there_is_one_round_a_seed(tmp_path: Path) -> None:
    test = icl_examples(5, seed=9)
    plans = rounds_of(ROWS, test, config(num_examples=8), tmp_path)
    assert [(plan.seed, plan.test, plan.places) for plan in plans] == [
        (s, test, [0, 1, 2, 3, 4]) for s in (0, 1)
    ]
    assert [(len(plan.data.train), len(plan.data.dev)) for plan in plans] == [(8, 4)] * 2


# ------------------------------------------------------------------------------------ cross-fitting


def test_cross_fitted_summary(crossed: Comparison) -> None:
    found = crossed.summary
    design = found["design"]
    assert (design["kind"], design["seeds"], design["num_test"]) == ("3-fold cross-fitting", [3, 4], 18)
    assert (design["num_train"], design["num_dev"]) == (8, 4)
    assert list(found["recipes"]) == RECIPES
    for recipe, entry in found["recipes"].items():
        assert (entry["metrics"]["n"], entry["metrics"]["runs"]) == (18, 2)
        assert set(entry["metrics"]["scaled"]) == {"vocabulary", "labels"}
        # ICL is what the others are compared with
        assert ("asim" in entry) == ("similarity" in entry) == (recipe != "icl")
        assert len(entry["learning_rates"]) == 6
        assert all((rate is None) == (recipe in ("base", "icl")) for rate in entry["learning_rates"])
    stages = {recipe: set(entry["seconds"]) for recipe, entry in found["recipes"].items()}
    assert stages["base"] == stages["icl"] == {"evaluate"}
    assert stages["sft"] == {"sft", "evaluate"}
    assert stages["ia2"] == {"teacher", "align", "evaluate"}
    assert stages["ia2-sft"] == {"teacher", "align", "sft", "evaluate"}
    assert set(found["differences"]) == {f"ia2-sft − {r}" for r in RECIPES[:-1]}
    assert found["recipes"]["icl"]["metrics"]["labels"]["accuracy"]["value"] > 0.6
    # two epochs are enough for the direction, not for more
    assert found["recipes"]["ia2"]["asim"]["value"] > found["recipes"]["base"]["asim"]["value"]


def test_cross_fitted_files(crossed: Comparison) -> None:
    folder = crossed.folder
    assert json.loads((folder / "compare.json").read_text()) == json.loads(
        json.dumps(crossed.summary, default=lambda value: value.tolist())
    )
    assert (folder / "table.md").read_text() == crossed.table()
    for seed in (3, 4):
        for recipe in RECIPES:
            sources: list[str] = []
            for fold in range(3):
                file = (
                    folder / f"seed-{seed}" / f"fold-{fold}" / "evaluations" / f"{recipe}.predictions.jsonl"
                )
                rows = [json.loads(line) for line in file.read_text().splitlines()]
                sources += [row["source"] for row in rows]
                for row in rows:
                    assert row["correct"] == (row["gold"] == row["predicted"])
                    assert sum(row["labels"].values()) == pytest.approx(1)
            assert sorted(sources) == sorted(example.source for example in ROWS)
    assert not list(folder.rglob("checkpoint-*"))
    assert [path.name for path in folder.rglob(".*")] == [LOCK]


def test_metrics_are_those_of_the_predictions(crossed: Comparison) -> None:
    for recipe in RECIPES:
        shares = []
        for seed in (3, 4):
            files = (crossed.folder / f"seed-{seed}").glob(f"fold-*/evaluations/{recipe}.predictions.jsonl")
            rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
            shares.append(np.mean([row["correct"] for row in rows]))
        found = crossed.summary["recipes"][recipe]["metrics"]["labels"]["accuracy"]["value"]
        assert found == pytest.approx(np.mean(shares))


def test_a_finished_comparison_is_read_not_run(crossed: Comparison, base: BaseModel, fits: list[str]) -> None:
    again = compare(base, ROWS, config(seed=3), output_dir=crossed.folder)
    assert fits == []
    assert {r: e["metrics"] for r, e in again.summary["recipes"].items()} == {
        r: e["metrics"] for r, e in crossed.summary["recipes"].items()
    }
    with pytest.raises(RunFolderError, match=r"batch_size|seed"):
        compare(base, ROWS, config(seed=4), output_dir=crossed.folder)


def test_what_an_earlier_start_lacks_is_made_up(
    crossed: Comparison, base: BaseModel, fits: list[str]
) -> None:
    first = json.loads((crossed.folder / "compare.json").read_text())
    (crossed.folder / "seed-4" / "fold-1" / "evaluations" / "ia2-sft.json").unlink()
    again = compare(base, ROWS, config(seed=3), output_dir=crossed.folder).summary
    assert fits == []  # the stages are there; only the evaluation is repeated
    for recipe, entry in again["recipes"].items():
        assert entry["metrics"] == first["recipes"][recipe]["metrics"]
        assert set(entry["seconds"]) == set(first["recipes"][recipe]["seconds"])
    teacher = again["recipes"]["ia2-sft"]["seconds"]["teacher"]
    assert teacher == pytest.approx(first["recipes"]["ia2-sft"]["seconds"]["teacher"])


# ---------------------------------------------------------------------------------------- test data


def test_with_test_data(base: BaseModel, tmp_path: Path, fits: list[str]) -> None:
    test = icl_examples(12, seed=9)
    settings = config(seeds=1, num_examples=8, max_test=7, learning_rates=[1e-3, 3e-3])
    found = compare(base, ROWS, settings, test=test, output_dir=tmp_path / "out").summary
    # sft twice, then one alignment a rate that ia2 and ia2-sft share
    assert fits == ["AnswerLoss"] * 2 + ["AlignmentLoss"] * 2 + ["AnswerLoss"] * 2
    assert found["design"]["num_test"] == 7
    assert found["data"]["test"]["name"] == test.name
    folder = tmp_path / "out" / "seed-0"
    stages = {str(p.relative_to(folder)) for p in folder.glob("*/lr-*")}
    assert stages == {
        f"{chain}/lr-{r}" for chain in ("sft", "align", "align-sft") for r in ("0.001", "0.003")
    }
    for recipe in RECIPES:
        assert len((folder / "evaluations" / f"{recipe}.predictions.jsonl").read_text().splitlines()) == 7
    # of the two rates the one with the better dev loss is evaluated
    for recipe, chain in (("sft", "sft"), ("ia2", "align"), ("ia2-sft", "align-sft")):
        losses = {
            rate: json.loads((folder / chain / f"lr-{rate:g}" / "stage.json").read_text())["dev_loss"]
            for rate in (1e-3, 3e-3)
        }
        assert found["recipes"][recipe]["learning_rates"] == [min(losses, key=losses.__getitem__)]


def test_icl_with_fresh_demonstrations(base: BaseModel, tmp_path: Path) -> None:
    rows, test = icl_examples(30), icl_examples(12, seed=9)
    found = {}
    for kind in ("same", "fresh"):
        settings = config(seeds=1, num_examples=4, recipes=["icl"], icl_demonstrations=kind)
        result = compare(base, rows, settings, test=test, output_dir=tmp_path / kind)
        file = tmp_path / kind / "seed-0" / "evaluations" / "icl.predictions.jsonl"
        found[kind] = [json.loads(line)["confidence"] for line in file.read_text().splitlines()]
        assert ("other examples for every query" in result.table()) == (kind == "fresh")
    assert found["same"] != found["fresh"]
    with pytest.raises(DataError, match="Give more rows, or set num_examples, or leave it out"):
        settings = config(seeds=1, recipes=["icl"], icl_demonstrations="fresh")
        compare(base, rows, settings, test=test, output_dir=tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_the_model_is_as_before(base: BaseModel, tmp_path: Path) -> None:
    before = {name: p.clone() for name, p in base.model.named_parameters()}
    compare(
        base,
        ROWS,
        config(seeds=1, recipes=["ia2"]),
        test=icl_examples(4, seed=9),
        output_dir=tmp_path / "out",
    )
    after = dict(base.model.named_parameters())
    assert list(before) == list(after)
    assert all((before[name] == after[name]).all() for name in before)


def test_an_unknown_label_in_the_test_rows(base: BaseModel, tmp_path: Path) -> None:
    test = Examples([*icl_examples(3), Example("a0", " none", "test:4")])
    with pytest.raises(DataError, match="test:4: the completion ' none' is not one of the labels"):
        compare(base, ROWS, config(), test=test, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------ folding


def outcome(places: list[int], asim: list[float] | None = None) -> Outcome:
    column = np.array(places, dtype=float)
    rows = {"labels": RowMeasures(column, column + 0.1, column + 0.2, column + 0.3)}
    return Outcome(
        places, Measured(rows, rows, {"labels": float(places[0])}), asim, None, {"sft": 1.0}, 1e-3, None, 12.0
    )


def test_folds_are_put_together_in_the_order_of_the_data() -> None:
    merged = _merge([outcome([4, 1]), outcome([0, 3, 2])])
    for part in (merged.plain, merged.scaled):
        np.testing.assert_allclose(part["labels"].confidence, [0, 1, 2, 3, 4])
        np.testing.assert_allclose(part["labels"].nll, [0.3, 1.3, 2.3, 3.3, 4.3])
    assert merged.temperatures == {"labels": 2.0}


def test_similarity_is_of_each_seed_s_queries_in_all_its_folds() -> None:
    values = np.linspace(0, 1, 20)
    seeds = []
    for start in (0, 7):
        order = [(start + i) % 20 for i in range(20)]
        seeds.append(
            [
                outcome(order[:10], values[order[:10]].tolist()),
                outcome(order[10:], values[order[10:]].tolist()),
            ]
        )
    both, one = _asim_interval(seeds), _asim_interval(seeds[:1])
    assert both["value"] == pytest.approx(0.5)
    assert (one["low"], one["high"]) == (None, None)


def test_outcomes_survive_their_file() -> None:
    given = outcome([2, 0], [0.1, 0.2])
    read = Outcome.from_dict(json.loads(json.dumps(given.to_dict(), default=lambda value: value.tolist())))
    np.testing.assert_array_equal(read.measured.plain["labels"].brier, given.measured.plain["labels"].brier)
    assert (read.places, read.asim, read.seconds, read.learning_rate) == (
        [2, 0],
        [0.1, 0.2],
        {"sft": 1.0},
        1e-3,
    )
