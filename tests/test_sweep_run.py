"""A grid run in one process: its records, what is computed once, and that nothing finished is lost."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import run, tree, write_rows
from launching import finish, kill_when, start
from sweeping import cells_of, grid_of, records, results, write_files, write_grid

from ia2 import console, trainer
from ia2.adapter_weights import read_adapter_state
from ia2.benchmarks import load_benchmark
from ia2.config import AdaptConfig
from ia2.errors import DataError, RunFolderError
from ia2.evaluation.metrics import STATISTICS
from ia2.examples import Examples, FewShotSplit
from ia2.files import read_json
from ia2.models import BaseModel, load_base
from ia2.sweeps import board as boards
from ia2.sweeps.board import Board, in_words
from ia2.sweeps.grid import GridConfig, expand
from ia2.sweeps.run import RETRIES, Sweep, sweep
from ia2.sweeps.store import alone
from ia2.sweeps.unit import Failed, Started, task_of
from ia2.sweeps.workers import Lost, in_process
from ia2.task import make_task
from ia2.teacher import Teacher
from ia2.workbench import Workbench

ALL = ["base", "icl", "sft", "ia2", "ia2-sft", "sft-ia2", "ia2+sft", "soft-sft"]
VARIANTS = {"dora": {"adapter": {"type": "dora", "rank": 2}}, "cosine": {"align.objective": "cosine"}}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("files"))


def swept(files: Path, folder: Path, limit: int | None = None, **values: Any) -> Sweep:
    return sweep(GridConfig(**grid_of(files, **values)), folder, limit=limit)


@pytest.fixture(scope="module")
def whole(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep of all recipes, with variants and an OOD partner."""
    folder = tmp_path_factory.mktemp("whole") / "out"
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

    counting(trainer.ExampleTrainer, "fit", lambda self: type(self).__name__)
    for method in ("to_store", "to_memory"):
        counting(Teacher, method, lambda self, *_, method=method: f"teacher {method} {self.site}")
    counting(Workbench, "evaluate", lambda self, recipe, *_: f"evaluate {recipe}")
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
    assert (spec["beta"] is not None) == (spec["recipe"] == "ia2+sft")
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
    assert set(cost["seconds"]) == {"evaluate", *(["teacher"] if trained else []), *kinds}


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
    assert summary.keys() == {*("name", "description", "select", "cells", "seconds", "machine", "versions")}


def test_records_are_in_the_order_of_the_grid(files: Path, whole: Path) -> None:
    units = expand(GridConfig(**grid_of(files, recipes=ALL, variants=VARIANTS, ood=True)))
    named = [(cell.spec["recipe"], cell.spec["variant"]) for unit in units for cell in unit.cells]
    assert [(r["spec"]["recipe"], r["spec"]["variant"]) for r in records(whole)] == named


def bench_for(files: Path, base: BaseModel, folder: Path, name: str = "two") -> tuple[Workbench, Any]:
    """The workbench of a unit, made by hand."""
    data = load_benchmark(files / f"{name}.yaml").load()
    config = AdaptConfig(**data.benchmark.settings(), num_examples=4)
    rows = Examples([*data.pool, *data.test], name=data.benchmark.name)
    task = make_task(rows, config, base.tokenizer, data.benchmark.prompt_template)
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


@pytest.mark.parametrize("recipe", [*ALL[1:], "ia2-sft@dora", "ia2@cosine"])
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


def test_what_cells_share_is_computed_once(files: Path, counted: Counter[str], tmp_path: Path) -> None:
    swept(files, tmp_path / "out", recipes=["base", "icl", "sft", "ia2", "ia2-sft"], seeds=2, ood=True)
    seeds = 2
    assert counted["AlignTrainer"] == seeds  # of ia2 and of ia2-sft
    assert counted["SftTrainer"] == 2 * seeds  # of sft and of ia2-sft, which begin differently
    assert counted["teacher to_store output"] == 2 * seeds  # train and dev rows
    assert counted["teacher to_memory output"] == seeds  # what ICL does on the test rows
    # once for all seeds, on both benchmarks, and the null baseline of each seed
    assert counted["evaluate base"] == 2 + seeds


def test_rates_and_betas_have_stages_of_their_own(files: Path, counted: Counter[str], tmp_path: Path) -> None:
    swept(files, tmp_path / "out", recipes=["ia2", "ia2+sft"], learning_rates=[1e-3, 1e-2], betas=[0.2, 0.8])
    assert (counted["AlignTrainer"], counted["MixedTrainer"]) == (2, 4)
    assert counted["teacher to_store output"] == 2
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
    assert counted["SftTrainer"] == 2 and counted["evaluate base"] == 0
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
    assert counted["SftTrainer"] == 1


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


# --------------------------------------------------------------------------------------------- failures


def test_a_bad_cell_does_not_stop_the_rest(files: Path, tmp_path: Path, caplog: Any) -> None:
    folder = tmp_path / "out"
    grid: dict[str, Any] = {
        "recipes": ["icl", "sft", "ia2"],
        "variants": {"bad": {"align.layers": [99]}, "good": {"align.objective": "kl"}},
    }
    with caplog.at_level(logging.INFO, "ia2"):
        done = swept(files, folder, **grid)
    assert (done.done, done.trained, len(done.failed), done.total) == (4, 4, 1, 5)
    (failure,) = read_json(folder / "failed.json")
    assert failure == done.failed[0]
    assert failure["spec"]["variant"] == "bad" and failure["spec"]["recipe"] == "ia2"
    assert "99" in failure["error"] and "\n" not in failure["error"]
    assert "Traceback" in failure["traceback"]
    assert any(failure["error"] in message for message in caplog.messages)
    assert read_json(folder / "sweep.json")["cells"] == {"done": 4, "failed": 1, "total": 5}
    # another start tries it again, and nothing else
    again = swept(files, folder, **grid)
    assert (again.trained, len(again.failed)) == (0, 1)
    # and once nothing fails, nothing is said to
    mended = swept(files, folder, **{**grid, "variants": {"good": {"align.objective": "kl"}}})
    assert not mended.failed and not (folder / "failed.json").exists()


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


def test_a_model_that_is_not_there(files: Path, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    done = swept(files, tmp_path / "out", models=[nowhere, str(files / "model")], recipes=["base", "icl"])
    assert (done.done, len(done.failed)) == (2, 2)
    assert all(nowhere in failure["error"] for failure in done.failed)


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with alone(tmp_path / "out"):
        assert "See to it that no other sweep works in this folder." in caplog.text
    assert not (tmp_path / "out" / ".lock").exists()


def test_the_command_says_what_failed_and_ends_with_1(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = grid_of(files, recipes=["icl", "ia2"], variants={"bad": {"align.layers": [99]}})
    file = write_grid(tmp_path / "grid.yaml", grid)
    ran = run(capsys, "sweep", file, "--output-dir", tmp_path / "out")
    assert ran.status == 1
    lines = ran.out.splitlines()
    assert lines[0] == f"2 of 3 cells are done (2 run now): {tmp_path / 'out'}"
    assert len(lines) == 3 and lines[1].startswith("failed: Two ia2: ")
    assert lines[2] == f"Tables and figures: ia2 report {tmp_path / 'out'}"
    # as JSON, and the rest as the log tells it
    ran = run(capsys, "sweep", file, "--output-dir", tmp_path / "out", "--json", "--quiet")
    assert ran.status == 1
    assert (ran.json["total"], ran.json["done"], ran.json["run"]) == (3, 2, 0)
    assert [failure["spec"]["variant"] for failure in ran.json["failed"]] == ["bad"]


def test_the_command_keeps_the_grid_and_takes_options(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write_grid(tmp_path / "brief.yaml", grid_of(files, recipes=["icl", "sft"]))
    ran = run(capsys, "sweep", file, "--limit", "1", "--keep-work")
    assert ran.status == 0
    assert ran.out == (
        "1 of 2 cells are done (1 run now): out/brief\nTables and figures: ia2 report out/brief\n"
    )
    folder = tmp_path / "out" / "brief"  # named after the file
    assert (folder / "grid.yaml").read_bytes() == file.read_bytes()
    assert "[1/1] Two " in ran.err
    ran = run(capsys, "sweep", file, "--keep-work", "--quiet")
    assert (ran.status, ran.err) == (0, "")
    assert len(list((folder / "work").glob("*/stages/*"))) == 1


def test_rows_come_from_the_folder_that_is_named(
    tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, count in (("train", 12), ("validation", 6)):
        rows = [{"sentence": f"{w} film", "label": i % 2} for i, w in enumerate("abcdefghabcd"[:count])]
        rows = [{**row, "sentence": f"{split[0]} {i} {row['sentence']}"} for i, row in enumerate(rows)]
        (tmp_path / "data" / "sst2").mkdir(parents=True, exist_ok=True)
        write_rows(tmp_path / "data" / "sst2" / f"{split}.jsonl", rows)
    file = write_grid(tmp_path / "grid.yaml", grid_of(files, benchmarks=["SST2"], recipes=["base"]))
    arguments = ("sweep", file, "--output-dir", tmp_path / "out", "--data-dir")
    assert run(capsys, *arguments, tmp_path / "data").status == 0
    (record,) = records(tmp_path / "out")
    assert record["evaluations"]["SST2"]["n"] == 6
    assert "no folder" in run(capsys, *arguments, tmp_path / "none").refusal()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--gpus-per-worker", "0.5"], ["--gpus-per-worker does nothing without --ray"]),
        (["--ray", "auto", "--workers", "2"], ["--workers does nothing beside --ray with an address"]),
        (["--limit", "0"], ["--limit"]),
        (["--workers", "0"], ["--workers"]),
    ],
)
def test_options_that_do_not_fit(
    options: list[str], parts: list[str], files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_grid(tmp_path / "grid.yaml", grid_of(files))
    message = run(capsys, "sweep", file, "--output-dir", tmp_path / "out", *options).refusal()
    assert all(part in message for part in parts)
    assert not (tmp_path / "out").exists()


def test_a_mistake_in_the_grid_writes_nothing(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_grid(tmp_path / "grid.yaml", grid_of(files, recipes=["stf"]))
    assert "'stf' is not one of" in run(capsys, "sweep", file, "--output-dir", tmp_path / "out").refusal()
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------- the folder


def test_a_folder_of_something_else_is_refused(files: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    with pytest.raises(RunFolderError, match=r"holds no sweep \(cat\.jpg"):
        swept(files, tmp_path / "photos", recipes=["base"])
    assert tree(tmp_path / "photos") == {"cat.jpg": b""}
    with pytest.raises(RunFolderError, match="is a file"):
        swept(files, tmp_path / "photos" / "cat.jpg", recipes=["base"])


@pytest.mark.parametrize("damage", [b'{"key": "12', b"[]", b'{"spec": {}}', b"\xe9"], ids=str)
def test_a_damaged_line_is_named(damage: bytes, files: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    swept(files, folder, recipes=["base", "icl"])
    with (folder / "cells.jsonl").open("ab") as file:
        file.write(damage)
    with pytest.raises(RunFolderError, match=r"cells\.jsonl:3: damaged .*Remove the line") as raised:
        swept(files, folder, recipes=["base", "icl"])
    assert "\n" not in str(raised.value)
    # as it says
    lines = (folder / "cells.jsonl").read_bytes().split(b"\n")
    (folder / "cells.jsonl").write_bytes(lines[1] + b"\n")
    assert swept(files, folder, recipes=["base", "icl"]).trained == 1


def test_texts_with_odd_line_ends_are_read_back(files: Path, tmp_path: Path) -> None:
    settings = {"separator": "\u2028\x85\x0b"}
    swept(files, tmp_path / "out", recipes=["base"], settings=settings)
    assert swept(files, tmp_path / "out", recipes=["base"], settings=settings).trained == 0


def test_two_sweeps_in_one_folder_are_refused(files: Path, tmp_path: Path) -> None:
    with alone(tmp_path / "out"), pytest.raises(RunFolderError, match="another `ia2 sweep` is at work there"):
        swept(files, tmp_path / "out", recipes=["base"])
    assert swept(files, tmp_path / "out", recipes=["base"]).done == 1
    assert sorted(tree(tmp_path / "out")) == ["cells.jsonl", "sweep.json"]


def test_an_interrupt_gathers_what_is_done(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid: dict[str, Any] = {"recipes": ["icl", "sft", "ia2"]}
    fit = trainer.AlignTrainer.fit

    def interrupted(self: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.AlignTrainer, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        swept(files, tmp_path / "out", **grid)
    assert [record["spec"]["recipe"] for record in records(tmp_path / "out")] == ["icl", "sft"]
    assert not (tmp_path / "out" / "cells").exists()
    monkeypatch.setattr(trainer.AlignTrainer, "fit", fit)
    assert swept(files, tmp_path / "out", **grid).trained == 1


def test_rows_that_changed_are_another_experiment(tmp_path: Path) -> None:
    files = write_files(tmp_path / "files")
    assert swept(files, tmp_path / "out", recipes=["base"]).trained == 1
    rows = (files / "two" / "test.jsonl").read_text().replace('"label": 1', '"label": 0')
    (files / "two" / "test.jsonl").write_text(rows)
    assert swept(files, tmp_path / "out", recipes=["base"]).trained == 1
    assert len(records(tmp_path / "out", "other.jsonl")) == 1


def test_missing_rows_are_one_line(tmp_path: Path) -> None:
    files = write_files(tmp_path / "files")
    (files / "two" / "test.jsonl").unlink()
    with pytest.raises(DataError, match=r"Two: no file test\.jsonl"):
        swept(files, tmp_path / "out")


# ----------------------------------------------------------------------------------- killed and run again

_LONG = {"align": {"epochs": 30}, "sft": {"epochs": 30}, "checkpoint_every": 3}


@pytest.fixture(scope="module")
def uninterrupted(files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A grid file, and the results of a sweep that nothing disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    values = grid_of(files, recipes=["base", "icl", "ia2", "ia2-sft"], seeds=2, settings=_LONG)
    file = write_grid(folder / "grid.yaml", values)
    sweep(GridConfig(**values), folder / "out")
    return file, results(folder / "out")


def _a_cell(folder: Path) -> bool:
    return any((folder / "cells").glob("*.json"))


def _a_checkpoint(folder: Path) -> bool:
    """Some stage is under way, of which something is saved."""
    return any((folder / "work").glob("*/stages/.*/checkpoint-*/trainer_state.json"))


@pytest.mark.slow
@pytest.mark.parametrize("when", [_a_cell, _a_checkpoint])
def test_a_killed_sweep_goes_on(
    when: Callable[[Path], bool], uninterrupted: tuple[Path, list[str]], tmp_path: Path
) -> None:
    file, expected = uninterrupted
    folder = tmp_path / "out"
    command = ["sweep", file, "--output-dir", folder]
    kill_when(start(command, tmp_path / "log"), lambda: when(folder), tmp_path / "log")
    known = sorted(path.stem for path in (folder / "cells").glob("*.json"))
    assert known and not (folder / "cells.jsonl").exists()
    said = finish(start(command, tmp_path / "again"), tmp_path / "again")
    left = len(expected) - len(known)
    assert f"{len(expected)} of {len(expected)} cells are done ({left} run now)" in said
    assert results(folder) == expected
    assert sorted(tree(folder)) == ["cells.jsonl", "grid.yaml", "sweep.json"]


# ------------------------------------------------------------------------------------------- lost workers


def test_a_cell_whose_worker_always_dies_is_given_up(files: Path, tmp_path: Path) -> None:
    grid = GridConfig(**grid_of(files, recipes=["icl", "sft", "ia2"]))
    lost: list[list[str]] = []

    def way(work: Path) -> Any:
        inner = in_process(work)

        def dying(queue: Any) -> Any:
            while queue:
                unit = queue.popleft()
                (sft,) = [c.key for c in unit.cells if c.spec["recipe"] == "sft"] or [None]
                titles = {cell.key: cell.spec["recipe"] for cell in unit.cells}
                for event in inner(type(queue)([unit])):
                    yield event
                    if isinstance(event, Started) and event.key == sft:
                        lost.append(list(titles.values()))
                        yield Lost(unit, "was eaten")
                        break

        return dying

    done = sweep(grid, tmp_path / "out", run=way)
    assert [r["spec"]["recipe"] for r in records(tmp_path / "out")] == ["icl", "ia2"]
    assert [failure["error"] for failure in done.failed] == [f"its worker was eaten, {RETRIES + 1} times"]
    # what was finished is not done again
    assert lost == [["icl", "sft", "ia2"], ["sft", "ia2"], ["sft", "ia2"]]


def test_a_worker_that_dies_now_and_then_is_nobodys_fault(files: Path, tmp_path: Path) -> None:
    grid = GridConfig(**grid_of(files, recipes=["icl", "sft", "ia2", "ia2-sft", "soft-sft"]))

    def way(work: Path) -> Any:
        def dying(queue: Any) -> Any:
            while queue:
                unit = queue.popleft()
                yield from in_process(work)(type(queue)([unit.only({unit.cells[0].key})]))
                if len(unit.cells) > 1:
                    yield Lost(unit, "was eaten")

        return dying

    done = sweep(grid, tmp_path / "out", run=way)
    assert (done.done, done.failed) == (5, [])


def test_a_cell_that_failed_before_its_worker_died_is_not_tried_again_now(
    files: Path, tmp_path: Path
) -> None:
    grid = GridConfig(**grid_of(files, recipes=["icl", "sft"]))

    def way(work: Path) -> Any:
        def dying(queue: Any) -> Any:
            unit = queue.popleft()
            yield Failed(unit.cells[0].key, "no")
            yield Lost(unit, "was eaten")
            assert [cell.spec["recipe"] for cell in queue[0].cells] == ["sft"]
            yield from in_process(work)(queue)

        return dying

    done = sweep(grid, tmp_path / "out", run=way)
    assert [failure["error"] for failure in done.failed] == ["no"]
    assert done.done == 1


# ------------------------------------------------------------------------------------------------- board


def board_of(files: Path, known: int = 0, seconds: float = 10.0) -> tuple[Board, list[Any], Any]:
    grid = GridConfig(**grid_of(files, recipes=["icl", "sft"], seeds=4))
    cells = [cell for unit in expand(grid) for cell in unit.cells]

    def record(cell: Any, took: float = seconds) -> dict[str, Any]:
        metrics = {"vocabulary": {"accuracy": 0.5, "ece": 0.25}}
        return {
            "spec": cell.spec,
            "evaluations": {"Two": {"metrics": metrics}},
            "cost": {"seconds": {"evaluate": took}},
        }

    return Board(cells, {cell.key: record(cell) for cell in cells[:known]}), cells, record


def test_time_left_is_by_cells_alike(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(boards.time, "monotonic", lambda: now[0])
    board, cells, record = board_of(files)
    assert board.seconds_left() is None
    with board:
        board.finished(cells[0], record(cells[0], 2.0))  # icl
        assert board.seconds_left() == pytest.approx(7 * 2.0)
        board.finished(cells[1], record(cells[1], 30.0))  # sft
        assert board.seconds_left() == pytest.approx(3 * 2.0 + 3 * 30.0)
        for cell in cells[3:6:2]:  # two sft at once, half as long
            board.started(cell)
        assert board.seconds_left() == pytest.approx(96 / 2)
        now[0] += 10
        assert board.seconds_left() == pytest.approx((96 - 20) / 2)
        now[0] += 1000
        assert board.seconds_left() == 0
        board.failed(cells[3], "no")
        board.finished(cells[5], record(cells[5], 30.0))
        assert board.seconds_left() == pytest.approx(3 * 2.0 + 30.0)


def test_time_left_is_known_from_earlier_starts(files: Path) -> None:
    board, _, _ = board_of(files, known=2, seconds=4.0)
    assert board.seconds_left() == pytest.approx(6 * 4.0)


def test_lines_where_there_is_no_terminal(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    board, cells, record = board_of(files, known=1)
    with caplog.at_level(logging.INFO, "ia2"), board, console.muted():
        board.started(cells[1])
        board.finished(cells[1], record(cells[1]))
        board.failed(cells[2], "no")
        unit = expand(GridConfig(**grid_of(files, recipes=["icl", "sft"])))[0]
        board.lost(unit, "was eaten")
        board.lost(unit.only({unit.cells[0].key}), "was eaten")
    path = files / "model"
    assert caplog.messages == [
        f"[2/8] Two {path} sft N=4 seed 0 rate 0.001: accuracy 0.500, ECE 0.250 (10 s, 60 s left)",
        f"Two {path} icl N=4 seed 1 failed: no",
        "A worker was eaten: 2 cells wait again.",
        "A worker was eaten: 1 cell waits again.",
    ]
    assert [r.levelname for r in caplog.records] == ["INFO", "WARNING", "WARNING", "WARNING"]


def test_quietly_only_what_failed(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console.configure(quiet=True)
    board, cells, record = board_of(files)
    with board:
        board.finished(cells[0], record(cells[0]))
        board.failed(cells[1], "no")
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.splitlines() == [f"{cells[1].title} failed: no"]


def test_a_bar_on_a_terminal(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    monkeypatch.setattr(boards, "is_shown", lambda: True)
    monkeypatch.setattr(
        boards, "_stderr", lambda: Console(stderr=True, force_terminal=True, width=120, no_color=True)
    )
    board, cells, record = board_of(files)
    with board:
        board.started(cells[1])
        board.finished(cells[0], record(cells[0]))
        shown = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
        shown.print(board._render())
        text = shown.export_text()
        board.failed(cells[2], "[no]")
    assert "1 done, 1 running, 0 failed, of 8, 70 s left" in text
    assert f"  {cells[1].title}" in text
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "accuracy 0.500" in captured.err
    assert "[no]" in captured.err  # no markup
    assert board._live is None


def test_nothing_is_drawn_if_nothing_is_left(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boards, "is_shown", lambda: True)
    board, _, _ = board_of(files, known=8)
    with board:
        assert board._live is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (720, "12 min"), (5390, "1 h 30 min"), (12000, "3 h 20 min")],
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_progress_is_shown_on_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal, quiet, shown in ((True, False, True), (True, True, False), (False, False, False)):
        monkeypatch.setattr("sys.stderr.isatty", lambda terminal=terminal: terminal)
        console.configure(quiet=quiet)
        assert console.is_shown() is shown
        with console.muted():
            assert console.is_shown() is False
        assert console.is_shown() is shown
    monkeypatch.undo()
    console.configure(quiet=True)
