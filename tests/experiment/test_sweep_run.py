"""A grid run in one process: its records, and what is computed once."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.command_line import tree
from helpers.sweeping import cells_of, grid_of, records, swept

from ia2.adapters.weights import read_adapter_state
from ia2.config import AdaptConfig
from ia2.data.benchmarks import load_benchmark
from ia2.data.examples import Examples, FewShotSplit
from ia2.evaluation.metrics import STATISTICS
from ia2.experiment.sweep import job as unit
from ia2.experiment.sweep.execute import sweep
from ia2.experiment.sweep.grid import GridConfig, expand
from ia2.experiment.sweep.job import task_of
from ia2.experiment.sweep.workers import in_process
from ia2.experiment.workbench import Workbench
from ia2.models.load import BaseModel, load_base
from ia2.prompts.task import make_task
from ia2.teacher.teacher import Teacher
from ia2.training import trainer
from ia2.utils.files import read_json

ALL = ["base", "icl", "sft", "ia2", "ia2-sft", "sft-ia2", "ia2+sft", "soft-sft"]
VARIANTS = {"dora": {"adapter": {"type": "dora", "rank": 2}}, "cosine": {"align.objective": "cosine"}}


@pytest.fixture(scope="module")
def whole(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep of all recipes, with variants and an OOD partner."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    unit._loaded.clear()  # what other tests have loaded would not be loaded here
    done = swept(files, folder, recipes=ALL, variants=VARIANTS, ood=True)
    assert not done.failed
    return folder


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often something was computed: stages by kind, teacher passes, evaluations by recipe."""
    counts: Counter[str] = Counter()

    def counting(owner: Any, method: str, name: Callable[..., str]) -> None:
        original = getattr(owner, method)

        def wrapped(self: Any, *arguments: Any, **options: Any) -> Any:
            counts[name(self, *arguments)] += 1
            return original(self, *arguments, **options)

        monkeypatch.setattr(owner, method, wrapped)

    counting(trainer.ExampleTrainer, "fit", lambda self: type(self.loss).__name__)
    counting(Teacher, "teach", lambda self, *_: f"teacher {self.site}")
    counting(Workbench, "evaluate", lambda self, recipe, *_: f"evaluate {recipe}")
    counting(Workbench, "base_outputs", lambda self, *_: "base outputs")
    counting(unit, "load_base", lambda name: f"load {Path(name).name}")
    # what other tests have left in this process
    monkeypatch.setattr(unit, "_loaded", {})
    monkeypatch.setattr(unit, "_bare", {})
    return counts


def by_recipe(folder: Path) -> dict[str, dict[str, Any]]:
    """Records by recipe and variant."""
    found = {}
    for record in records(folder):
        spec = record["spec"]
        found["@".join(filter(None, (spec["recipe"], spec["variant"])))] = record
    return found


# ----------------------------------------------------------------------------------------------- records


def check_record(record: dict[str, Any]) -> None:
    """The format that statistics and tables read."""
    hexadecimal = set("0123456789abcdef")
    assert list(record) == ["key", "spec", "data", "training", "evaluations", "similarity", "cost"]
    assert len(record["key"]) == 16 and set(record["key"]) <= hexadecimal
    spec = record["spec"]
    assert list(spec) == [
        *("benchmark", "verbaliser", "model", "recipe", "variant", "num_examples", "seed"),
        *("learning_rate", "beta", "max_test", "settings"),
    ]
    trained = spec["recipe"] not in ("base", "icl")
    assert (spec["learning_rate"] is not None) == trained
    assert spec["beta"] is None  # of the paper's joint training, where it is asked for
    assert (spec["num_examples"] is None) == (spec["seed"] is None) == (spec["recipe"] == "base")
    data = record["data"]
    assert list(data) == ["pool", "test", "num_train", "num_dev", "notes"]
    assert len(data["pool"]) == len(data["test"]) == 16
    assert (data["num_train"], data["num_dev"]) == ((0, 0) if spec["recipe"] == "base" else (4, 2))
    training = record["training"]
    assert (training is not None) == trained
    if trained:
        assert list(training) == ["selection_loss", "stages"]
        assert isinstance(training["selection_loss"], float)
        for stage in training["stages"]:
            assert list(stage) == ["stage", "steps", "epochs", "dev_loss", "history"]
            assert stage["steps"] >= 1 and stage["epochs"] > 0 and isinstance(stage["dev_loss"], float)
            assert stage["history"] and all(len(point) == 2 for point in stage["history"])
    for place, (name, found) in enumerate(record["evaluations"].items()):
        assert found["role"] == ("ood" if place else "id") and name
        assert (name == spec["benchmark"]) == (place == 0)
        assert list(found) == [
            *("role", "n", "test", "verbaliser", "labels", "majority"),
            *("metrics", "rows"),
        ]
        count = {"Two": 2, "Three": 3, "Free": None}[name]
        assert found["labels"] == count
        assert found["majority"] is None if count is None else 1 / count <= found["majority"] <= 1
        scopes = {"vocabulary", "labels" if found["verbaliser"] else "answer"}
        metrics = dict(found["metrics"])
        scaled = metrics.pop("scaled", {})
        assert metrics.keys() == scopes
        assert bool(scaled) == (spec["recipe"] != "base")
        assert not scaled or scaled.keys() == scopes
        for values in (*metrics.values(), *scaled.values()):
            assert list(values) == ["accuracy", "ece", "ece_equal_width", "brier", "nll"]
            assert all(isinstance(value, float) for value in values.values())
        correct, confidence = found["rows"]["correct"], found["rows"]["confidence"]
        assert len(correct) == len(confidence) == found["n"] and set(correct) <= set("01")
        assert all(0 <= c <= 1 for c in confidence)
        assert metrics["vocabulary"]["accuracy"] == pytest.approx(correct.count("1") / found["n"])
    similarity = record["similarity"]
    assert (similarity is None) == (spec["recipe"] == "base")
    if similarity is not None:
        assert {"asim", "layers", "asim_by_layer"} <= similarity.keys()
    cost = record["cost"]
    assert list(cost) == ["seconds", "machine", "versions"]
    assert all(seconds >= 0 for seconds in cost["seconds"].values())
    kinds = [stage["stage"] for stage in training["stages"]] if trained else []
    # what cells of a unit have in common stands in the first of them
    shared = {"load", "reference"} & cost["seconds"].keys()
    assert set(cost["seconds"]) == {"evaluate", "other", *shared, *(["teacher"] if trained else []), *kinds}


def test_every_record_has_the_format(whole: Path) -> None:
    found = by_recipe(whole)
    # cosine changes what aligns, and nothing of the joint stage, which has an objective of its own
    assert set(found) == {
        *ALL,
        *(f"{recipe}@dora" for recipe in ALL[2:]),
        *(f"{recipe}@cosine" for recipe in ("ia2", "ia2-sft", "sft-ia2")),
    }
    for record in found.values():
        check_record(record)
        assert list(record["evaluations"]) == ["Two", "Three"]
    trained = {name: record["training"] for name, record in found.items() if record["training"]}
    stages = {name: [stage["stage"] for stage in t["stages"]] for name, t in trained.items()}
    assert stages["ia2-sft"] == ["align", "sft"] and stages["sft-ia2"] == ["sft", "align"]
    assert stages["ia2+sft"] == ["joint"] and stages["soft-sft"] == ["soft"]


def test_the_folder_says_what_it_is(whole: Path) -> None:
    assert sorted(tree(whole)) == ["cells.jsonl", "sweep.json"]  # made without a file; no working files
    summary = read_json(whole / "sweep.json")
    count = len(records(whole))
    assert summary["cells"] == {"done": count, "failed": 0, "total": count}
    assert summary["seconds"] > 0
    # cells that share a teacher pass or an alignment do not each count it
    each = sum(sum(record["cost"]["seconds"].values()) for record in records(whole))
    assert 0 < summary["work_seconds"] < round(each, 1)
    facts = ("name", "description", "select", "cells", "seconds", "work_seconds", "work_by_kind", "machine")
    assert summary.keys() == {*facts, "versions"}
    # what similarities are measured to comes of the evaluation of icl
    kinds = {"load", "teacher", "align", "sft", "joint", "soft", "evaluate", "other"}
    assert summary["work_by_kind"].keys() == kinds
    assert sum(summary["work_by_kind"].values()) == pytest.approx(summary["work_seconds"], abs=0.5)
    # a second of this process is a second of some kind
    assert summary["work_seconds"] == pytest.approx(summary["seconds"], rel=0.1)


def test_records_are_in_the_order_of_the_grid(files: Path, whole: Path) -> None:
    units = expand(GridConfig(**grid_of(files, recipes=ALL, variants=VARIANTS, ood=True)))
    named = [(cell.spec["recipe"], cell.spec["variant"]) for each in units for cell in each.cells]
    assert [(r["spec"]["recipe"], r["spec"]["variant"]) for r in records(whole)] == named


def bench_for(files: Path, base: BaseModel, folder: Path, name: str = "two") -> tuple[Workbench, Any]:
    """The workbench of a unit, made by hand."""
    data = load_benchmark(files / f"{name}.yaml").load()
    config = AdaptConfig(**data.benchmark.settings(), num_examples=4)
    rows = Examples([*data.pool, *data.test], name=data.benchmark.name)
    task = make_task(rows, config, base.tokenizer, data.benchmark.prompt)
    split = data.pool.split(num_examples=4, seed=0) if len(data.pool) else FewShotSplit(rows[:4], rows[4:])
    return Workbench(base, split, task, config, folder), data


@pytest.fixture
def base(files: Path) -> BaseModel:
    return load_base(str(files / "model"), dtype="float32", device="cpu")


def test_icl_and_its_null_baseline_are_what_a_workbench_finds(
    files: Path, base: BaseModel, whole: Path, tmp_path: Path
) -> None:
    bench, data = bench_for(files, base, tmp_path)
    reference = bench.teaching.reference(data.test)
    null = bench.evaluate("base", data.test, reference)
    icl = bench.evaluate("icl", data.test)
    found = by_recipe(whole)
    assert null.similarity is not None
    assert found["icl"]["similarity"] == null.similarity.to_dict()
    for recipe, own in (("base", null), ("icl", icl)):
        rows = found[recipe]["evaluations"]["Two"]["rows"]
        plain = own.measured.plain["vocabulary"]
        assert rows["correct"] == "".join(str(int(c)) for c in plain.correct)
        assert rows["confidence"] == pytest.approx(list(plain.confidence), rel=1e-4)


def test_another_label_set_is_evaluated_with_its_own_labels(
    files: Path, base: BaseModel, whole: Path, tmp_path: Path
) -> None:
    bench, data = bench_for(files, base, tmp_path, "three")
    own = bench.evaluate("base", data.test).measured
    for name, record in by_recipe(whole).items():
        found = record["evaluations"]["Three"]
        assert (found["verbaliser"], found["n"], found["role"]) == ("colours", 6, "ood")
        assert found["test"] == data.test.fingerprint
        if name == "base":
            for scope in ("vocabulary", "labels"):
                nll = STATISTICS["nll"](*own.plain[scope].arrays(), axis=-1)
                assert found["metrics"][scope]["nll"] == pytest.approx(float(nll), rel=1e-4)


def test_a_trained_recipe_is_what_a_workbench_trains(
    files: Path, base: BaseModel, whole: Path, tmp_path: Path
) -> None:
    bench, data = bench_for(files, base, tmp_path)
    brief = {name: {"epochs": 2} for name in ("align", "sft")}
    bench.config = AdaptConfig(**{**bench.config.model_dump(), **brief, "learning_rates": [1e-3]})
    trained = bench.train("ia2-sft")
    own = bench.evaluate("ia2-sft", data.test, bench.teaching.reference(data.test))
    bench.close()
    record = by_recipe(whole)["ia2-sft"]
    assert record["training"]["selection_loss"] == pytest.approx(trained.stages[-1].selection_loss)
    assert own.similarity is not None
    assert record["similarity"] == own.similarity.to_dict()


@pytest.mark.parametrize(
    "recipe", ["icl", "ia2-sft", "sft-ia2", "ia2+sft", "soft-sft", "sft@dora", "ia2@cosine"]
)
def test_a_record_does_not_depend_on_what_else_the_grid_has(
    recipe: str, files: Path, whole: Path, tmp_path: Path
) -> None:
    name, _, variant = recipe.partition("@")
    variants = {variant: VARIANTS[variant]} if variant else {}
    swept(files, tmp_path / "out", recipes=[name], variants=variants, plain=not variant, ood=True)
    (alone_,) = records(tmp_path / "out")
    with_others = by_recipe(whole)[recipe]
    for record in (alone_, with_others):
        del record["cost"]
    assert alone_ == with_others


def test_free_text(files: Path, tmp_path: Path) -> None:
    done = swept(files, tmp_path / "out", benchmarks=[str(files / "free.yaml")], recipes=ALL)
    assert not done.failed and done.done == len(ALL)
    for record in records(tmp_path / "out"):
        check_record(record)
        assert record["spec"]["verbaliser"] is None


@pytest.mark.parametrize("own", [None, 8])
def test_a_grids_own_limit_of_answers(own: int | None, files: Path, tmp_path: Path) -> None:
    """It goes before the benchmark's, for what is trained on and for what is generated."""
    entry = yaml.safe_load((files / "free.yaml").read_text())
    if own is not None:
        entry["max_answer_tokens"] = own
    file = files / f"limited-{own}.yaml"
    file.write_text(yaml.safe_dump({**entry, "name": f"Limited{own}"}))
    for limit in (5, 12):
        config = {"max_answer_tokens": limit}
        (cell,) = cells_of(
            **grid_of(files, benchmarks=[str(file)], recipes=["icl"], seeds=1, settings=config)
        )
        assert cell.config.max_answer_tokens == limit
        rows = load_benchmark(file).load(None, None, None, limit)
        for ood in (False, True):
            task = task_of(rows, cell.config, load_base(cell.spec["model"]), ood=ood)
            assert task.kind == "generation" and task.max_answer_tokens == limit


def test_the_first_test_rows_only(files: Path, whole: Path, tmp_path: Path) -> None:
    swept(files, tmp_path / "out", max_test=3, recipes=["base", "icl"], ood=True)
    for record in records(tmp_path / "out"):
        assert [found["n"] for found in record["evaluations"].values()] == [3, 3]
        full = by_recipe(whole)[record["spec"]["recipe"]]["evaluations"]["Two"]["rows"]
        own = record["evaluations"]["Two"]["rows"]
        assert own["correct"] == full["correct"][:3]
        assert own["confidence"] == pytest.approx(full["confidence"][:3], rel=1e-4)


# --------------------------------------------------------------------------------------- computed once


def test_rows_that_are_held_back_are_not_drawn(files: Path, tmp_path: Path) -> None:
    pool = load_benchmark(files / "two.yaml").load(files).pool
    for held in (None, 10):
        swept(files, tmp_path / f"{held}", recipes=["icl"], hold_back=held)
        (record,) = records(tmp_path / f"{held}")
        assert record["data"]["pool"] == pool[: len(pool) - (held or 0)].fingerprint
    grid = GridConfig(**grid_of(files, recipes=["icl"], hold_back=len(pool)))
    (failed,) = sweep(grid, tmp_path / "all").failed
    assert failed["error"] == "Two: hold_back 24 leaves nothing of a pool of 24 rows. Lower it."


def test_what_cells_share_is_computed_once(files: Path, counted: Counter[str], tmp_path: Path) -> None:
    swept(files, tmp_path / "out", recipes=["base", "icl", "sft", "ia2", "ia2-sft"], seeds=2, ood=True)
    seeds = 2
    assert counted["AlignmentLoss"] == seeds  # of ia2 and of ia2-sft
    assert counted["AnswerLoss"] == 2 * seeds  # of sft and of ia2-sft, which begin differently
    # train and dev rows; what ICL does on the test rows its evaluation gives
    assert counted["teacher output"] == 2 * seeds
    # once for all seeds, on both benchmarks; the null baseline of each seed is a similarity alone
    assert counted["evaluate base"] == 2
    assert counted["base outputs"] == 1  # of the null baseline, which no draw changes
    costs = [record["cost"]["seconds"] for record in records(tmp_path / "out")]
    assert sum("load" in cost for cost in costs) == counted["load model"] == 1
    assert not any("reference" in cost for cost in costs)
    counted.clear()
    swept(files, tmp_path / "without", recipes=["ia2", "sft"], seeds=2)  # then it takes a pass of its own
    assert counted["teacher output"] == 3 * seeds
    assert sum("reference" in r["cost"]["seconds"] for r in records(tmp_path / "without")) == seeds


def test_what_a_null_baseline_is_forced_on_depends_on_the_draw_of_free_text(
    files: Path, counted: Counter[str], tmp_path: Path
) -> None:
    free = [str(files / "free.yaml")]
    swept(files, tmp_path / "out", benchmarks=free, recipes=["icl"], seeds=2, max_test=2)
    assert counted["base outputs"] == 0  # nothing is kept for another draw
    first, second = (record["similarity"]["asim"] for record in records(tmp_path / "out"))
    assert first != second


def test_models_are_loaded_once_a_seed(files: Path, counted: Counter[str], tmp_path: Path) -> None:
    models = [str(files / "model"), str(shutil.copytree(files / "model", tmp_path / "other"))]
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    swept(files, tmp_path / "out", models=models, recipes=["icl"], num_examples=[4, 6], seeds=2, max_test=2)
    # the first seed's end with the other one, with which the second seed's begin
    assert (counted["load model"], counted["load other"]) == (2, 1)


def test_rates_and_betas_have_stages_of_their_own(files: Path, counted: Counter[str], tmp_path: Path) -> None:
    swept(files, tmp_path / "out", recipes=["ia2", "ia2+sft"], learning_rates=[1e-3, 1e-2], betas=[0.2, 0.8])
    assert (counted["AlignmentLoss"], counted["JointLoss"]) == (2, 4)
    assert counted["teacher output"] == 3  # train and dev rows, and the reference
    losses = [record["training"]["selection_loss"] for record in records(tmp_path / "out")]
    assert len(set(losses)) == 6


def test_the_second_run_does_nothing(files: Path, counted: Counter[str], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    first = swept(files, folder, recipes=["base", "icl", "ia2"], seeds=2)
    assert (first.done, first.trained, first.total) == (5, 5, 5)
    before = tree(folder)
    counted.clear()
    second = swept(files, folder, recipes=["base", "icl", "ia2"], seeds=2)
    assert (second.done, second.trained, second.total) == (5, 0, 5)
    assert not counted
    assert tree(folder) == before


def test_more_seeds_run_the_new_cells_only(files: Path, counted: Counter[str], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    swept(files, folder, recipes=["base", "sft"], seeds=1)
    before = records(folder)
    counted.clear()
    more = swept(files, folder, recipes=["base", "sft"], seeds=3)
    assert (more.done, more.trained) == (4, 2)
    assert counted["AnswerLoss"] == 2 and counted["evaluate base"] == 0
    assert all(record in records(folder) for record in before)
    assert [r["spec"]["seed"] for r in records(folder)] == [None, 0, 1, 2]


def test_what_the_grid_no_longer_names_is_kept_apart_and_comes_back(
    files: Path, counted: Counter[str], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    swept(files, folder, recipes=["icl", "sft"], seeds=2)
    every = {record["key"]: record for record in records(folder)}
    smaller = swept(files, folder, recipes=["icl"], seeds=1)
    assert (smaller.done, smaller.trained, smaller.total) == (1, 0, 1)
    assert len(records(folder)) == 1
    both = [*records(folder), *records(folder, "other.jsonl")]
    assert {record["key"]: record for record in both} == every
    counted.clear()
    again = swept(files, folder, recipes=["icl", "sft"], seeds=2)
    assert (again.done, again.trained) == (4, 0) and not counted
    assert {record["key"]: record for record in records(folder)} == every
    assert records(folder, "other.jsonl") == []


def test_a_variant_may_get_another_name(files: Path, counted: Counter[str], tmp_path: Path) -> None:
    for name in ("first", "second"):
        swept(files, tmp_path / "out", variants={name: {"sft.epochs": 1}}, plain=False)
        assert [record["spec"]["variant"] for record in records(tmp_path / "out")] == [name]
    assert counted["AnswerLoss"] == 1


def test_a_limit_says_what_is_run_not_what_is_kept(files: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    grid: dict[str, Any] = {"recipes": ["icl", "sft"], "seeds": 2}
    first = swept(files, folder, limit=1, **grid)
    assert (first.done, first.trained, first.total) == (1, 1, 4)
    assert [(r["spec"]["recipe"], r["spec"]["seed"]) for r in records(folder)] == [("icl", 0)]
    assert read_json(folder / "sweep.json")["cells"] == {"done": 1, "failed": 0, "total": 4}
    assert swept(files, folder, **grid).trained == 3
    before = tree(folder)
    assert swept(files, folder, limit=1, **grid).done == 4
    assert tree(folder) == before


def test_adapters_are_kept_if_that_is_wanted(files: Path, tmp_path: Path) -> None:
    grid = GridConfig(**grid_of(files, recipes=["ia2-sft"]))
    sweep(grid, tmp_path / "out", run=lambda work: in_process(work, keep=True))
    stages = sorted((tmp_path / "out" / "work").glob("*/stages/*"))
    assert sorted(read_json(stage / "stage.json")["stage"] for stage in stages) == ["align", "sft"]
    assert all(read_adapter_state(stage) for stage in stages)
    assert list((tmp_path / "out" / "work").glob("*/teacher/train"))


def test_a_failure_in_the_middle_leaves_the_model_as_it_was(
    files: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = trainer.AlignTrainer.fit
    times = Counter[str]()

    def failing(self: Any) -> float:
        times["fit"] += 1
        if times["fit"] == 1:
            fit(self)
            raise RuntimeError("the machine\nsighed")
        return fit(self)

    monkeypatch.setattr(trainer.AlignTrainer, "fit", failing)
    done = swept(files, tmp_path / "out", recipes=["ia2", "ia2-sft", "sft", "icl"], ood=True)
    assert [failure["error"] for failure in done.failed] == ["RuntimeError: the machine sighed"]
    expected = by_recipe(whole)
    for record in records(tmp_path / "out"):
        wanted = expected[record["spec"]["recipe"]]
        assert {**record, "cost": 0} == {**wanted, "cost": 0}
