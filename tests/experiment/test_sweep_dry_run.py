"""``ia2 sweep --dry-run``: one real cell of each kind, and the time that the others will take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import run
from helpers.sweeping import cells_of, grid_of, records, results, swept, write_grid

from ia2.experiment.sweep.execute import sweep
from ia2.experiment.sweep.grid import GridConfig
from ia2.experiment.sweep.pace import WorkLeft, first_of_kinds


def record(**seconds: float) -> dict[str, Any]:
    return {"cost": {"seconds": seconds}}


def test_the_first_cell_of_each_kind_without_a_finished_one() -> None:
    cells = cells_of(recipes=["base", "sft"], num_examples=[4, 8], seeds=2, learning_rates=[0.1, 0.2])
    first = [cell for cell in cells if cell.key in first_of_kinds(cells, {})]
    kinds = [(cell.spec["recipe"], cell.spec["num_examples"], cell.spec["seed"]) for cell in first]
    assert kinds == [("base", None, None), ("sft", 4, 0), ("sft", 8, 0)]
    later = next(cell for cell in cells if cell.spec["num_examples"] == 8 and cell.spec["seed"] == 1)
    assert first_of_kinds(cells, {later.key}) == {cell.key for cell in first[:2]}


def test_time_left_is_that_of_finished_cells_of_the_kind() -> None:
    cells = cells_of(benchmarks=["SST2", "AGN"], recipes=["sft", "ia2"], seeds=3)
    sst2 = [c for c in cells if (c.spec["benchmark"], c.spec["recipe"]) == ("SST2", "sft")]
    agn = [c for c in cells if (c.spec["benchmark"], c.spec["recipe"]) == ("AGN", "sft")]
    # loading happens once, whatever the number of cells
    known = {sst2[0].key: record(load=500.0, sft=10.0)}
    left = WorkLeft.of(cells, known)
    assert [kind.seconds_left for kind in left.kinds] == [50.0, None]
    assert (left.cells, left.untimed, left.seconds) == (11, 6, 50.0)
    assert "5 cells, about 25 s with 2 workers; 6 cells" in left.text(workers=2)
    # a benchmark with finished cells has its own pace
    known[agn[0].key] = record(sft=100.0)
    assert WorkLeft.of(cells, known).kinds[0].seconds_left == pytest.approx(2 * 10.0 + 2 * 100.0)
    # what cells share is paid by the first of them
    known = {
        sst2[0].key: record(teacher=40.5, sft=1.0),
        sst2[1].key: record(teacher=40.5, sft=2.0),
    }
    assert WorkLeft.of(sst2, known).seconds == pytest.approx((41.5 + 2.0) / 2)


def test_timed_cells_are_real_and_not_run_again(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_grid(tmp_path / "grid.yaml", grid_of(files, recipes=["base", "sft"], seeds=3))
    options = ("sweep", file, "--dry-run", "--output-dir", tmp_path / "out", "--quiet")
    values = run(capsys, *options, "--json").json
    assert (values["run"], values["cells_left"], values["cells_not_timed"]) == (2, 2, 0)
    kinds = [(k["recipe"], k["num_examples"], k["cells"], k["done"]) for k in values["kinds"]]
    assert kinds == [("base", None, 1, 1), ("sft", 4, 3, 1)]
    timed = next(r for r in records(tmp_path / "out") if r["spec"]["recipe"] == "sft")["cost"]["seconds"]
    own = sum(timed.values()) - timed.get("load", 0.0)
    assert values["seconds_left"] == pytest.approx(2 * own)
    # a second one has nothing to time
    again = run(capsys, *options, "--json").json
    assert (again["run"], again["seconds_left"]) == (0, values["seconds_left"])
    assert run(capsys, "sweep", file, "--output-dir", tmp_path / "out", "--quiet", "--json").json["run"] == 2
    swept(files, tmp_path / "at-once", recipes=["base", "sft"], seeds=3)
    assert results(tmp_path / "out") == results(tmp_path / "at-once")
    assert "Nothing is left to do." in run(capsys, *options).out


def test_a_kind_that_cannot_be_timed_is_told_and_the_others_are_timed(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [str(files / "model"), str(tmp_path / "no-model")]
    file = write_grid(tmp_path / "grid.yaml", grid_of(files, recipes=["sft"], models=models, seeds=2))
    ran = run(capsys, "sweep", file, "--dry-run", "--output-dir", tmp_path / "out", "--quiet", "--json")
    assert ran.status == 1
    assert [kind["seconds_left"] is None for kind in ran.json["kinds"]] == [False, True]
    assert [failure["spec"]["model"] for failure in ran.json["failed"]] == [models[1]]


def test_only_the_first_cells_count(files: Path, tmp_path: Path) -> None:
    grid = GridConfig(**grid_of(files, recipes=["base", "icl", "sft"], seeds=2))
    done = sweep(grid, tmp_path, limit=3, one_of_each=True)
    assert [kind.cells for kind in done.left.kinds] == [1, 1, 1]
    assert (done.trained, done.left.cells, done.total) == (3, 0, 5)
