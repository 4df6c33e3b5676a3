"""``ia2 sweep --dry-run``: cells counted and timed, on a tiny model; nothing is run or written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import run, tree
from sweeping import grid_of, write_grid

from ia2.errors import DataError, RunFolderError
from ia2.models import load_base
from ia2.sweeps import estimate as module
from ia2.sweeps import speed as speeds
from ia2.sweeps.costs import Cost, Line, Speed, UnitCosts, adapter_of, measure_shape, padded
from ia2.sweeps.estimate import Estimate, estimate
from ia2.sweeps.grid import GridConfig, Unit, expand
from ia2.sweeps.run import read_benchmarks, sweep

ALL = ["base", "icl", "sft", "ia2", "ia2-sft", "ia2+sft", "soft-sft"]


def grid(files: Path, **values: Any) -> GridConfig:
    return GridConfig(**grid_of(files, **values))


class _Every(dict):  # type: ignore[type-arg]
    """The same for every key."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def __missing__(self, key: str) -> Any:
        return self.value


def speed_of(**changes: Any) -> Speed:
    """A machine on which a token takes a second, whatever is done with it, and loading ten."""
    known = Speed(
        bare=1.0,
        context=1.0,
        teacher=1.0,
        decoding=Line(0.0, 1.0),
        batch_tokens=1000,
        steps=_Every(Line(0.0, 1.0)),
        adapter_bytes=_Every(100),
        refused={},
        device="cpu",
        memory_bytes=10**9,
        longest=10,
        longest_context=10.0,
        loading=10.0,
        seconds=1.0,
    )
    return dataclasses.replace(known, **changes)


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimates at :func:`speed_of`, without a calibration."""
    monkeypatch.setattr(speeds, "measure", lambda *arguments: speed_of())
    # what loading took is measured by the caller, and of no importance here
    monkeypatch.setattr(module.time, "perf_counter", lambda: 0.0)


@pytest.fixture
def costs(files: Path, tmp_path: Path) -> Callable[..., list[Cost]]:
    """Costs of the cells of the first unit of a grid, at :func:`speed_of`."""
    base = load_base(str(files / "model"), device="cpu", dtype="float32")

    def found(shares: dict[str, float] | None = None, **values: Any) -> list[Cost]:
        chosen = grid(files, **values)
        unit: Unit = expand(chosen)[0]
        shape = measure_shape(unit, base, read_benchmarks(chosen), tmp_path / "nothing")
        unit_costs = UnitCosts(shape, speed_of(), shares or {})
        return [unit_costs.cell(cell) for cell in unit.cells]

    return found


# ------------------------------------------------------------------------------------------- pieces


def test_a_line_never_goes_below_nothing() -> None:
    assert Line.through([(10, 3.0), (20, 5.0)]) == Line(1.0, 0.2)
    assert Line.through([(10, 1.0), (20, 4.0)]) == Line(0.0, 0.2)
    assert Line.through([(10, 4.0), (20, 3.0)]) == Line(4.0, 0.0)
    assert Line.through([(10, 2.0)]) == Line(0.0, 0.2)
    assert Line.through([(10, 3.0), (20, 5.0)])(30) == pytest.approx(7.0)


def test_padding_counts_in_every_forward_pass() -> None:
    assert padded([2, 4, 6, 8], 4) == 32
    assert padded([2, 4, 6, 8], 4, 2) == 4 * (4 + 8) / 2
    assert padded([5, 3], 4) == 20


# ------------------------------------------------------------------------------------------- one unit


def test_seconds_grow_with_epochs_examples_and_test_rows(costs: Callable[..., list[Cost]]) -> None:
    (short,) = costs(settings={"sft": {"epochs": 2}})
    (long,) = costs(settings={"sft": {"epochs": 6}})
    assert short.training > 0
    assert long.training == pytest.approx(3 * short.training)
    assert (long.teacher, long.evaluation) == (short.teacher, short.evaluation)
    (more,) = costs(settings={"sft": {"epochs": 2}}, num_examples=[8])
    assert more.training > 1.9 * short.training
    assert more.teacher > short.teacher
    (fewer,) = costs(settings={"sft": {"epochs": 2}}, max_test=4)
    assert 0 < fewer.evaluation < short.evaluation
    (ood,) = costs(settings={"sft": {"epochs": 2}}, ood=True)
    assert ood.evaluation > short.evaluation
    assert ood.training == short.training


def test_what_cells_share_is_paid_once(costs: Callable[..., list[Cost]]) -> None:
    sft, ia2, both, soft = costs(recipes=["sft", "ia2", "ia2-sft", "soft-sft"])
    # the first cell pays for the reference that similarities are measured against
    assert sft.teacher > 0
    assert ia2.teacher > 0
    assert both.teacher == 0
    assert soft.teacher == pytest.approx(ia2.teacher)
    # its alignment is that of ia2; its fine-tuning is as long as the plain one
    assert both.training == pytest.approx(sft.training)
    (alone,) = costs(recipes=["ia2-sft"])
    assert alone.training == pytest.approx(sft.training + ia2.training)


def test_more_orders_make_a_longer_teacher_pass(costs: Callable[..., list[Cost]]) -> None:
    (one,) = costs(recipes=["ia2"])
    (eight,) = costs(recipes=["ia2"], settings={"context_draws": 8})
    (none,) = costs(recipes=["sft"])
    assert eight.teacher - none.teacher == pytest.approx(8 * (one.teacher - none.teacher))
    (online,) = costs(recipes=["ia2"], settings={"targets": "online"})
    assert online.training > one.training


def test_icl_reads_the_demonstrations_and_base_does_not(costs: Callable[..., list[Cost]]) -> None:
    (base,), (icl,) = costs(recipes=["base"]), costs(recipes=["icl"])
    assert base.training == icl.training == base.teacher == 0
    assert icl.evaluation > base.evaluation > 0
    (fresh,) = costs(recipes=["icl"], settings={"icl_demonstrations": "fresh"})
    # they are shared by no two queries
    assert fresh.evaluation > icl.evaluation


def test_stages_that_stop_early_are_likely_shorter(costs: Callable[..., list[Cost]]) -> None:
    (cell,) = costs({"sft": 0.25, "": 0.9})
    assert cell.likely == pytest.approx(cell.training / 4)
    assert cell.likely_total == cell.teacher + cell.likely + cell.evaluation < cell.at_most
    (other,) = costs({"align": 0.25, "": 0.5})
    assert other.likely == pytest.approx(other.training / 2)
    (unknown,) = costs()
    assert unknown.likely == unknown.training


def test_written_answers_cost_their_tokens(
    files: Path, tmp_path: Path, costs: Callable[..., list[Cost]]
) -> None:
    entry = (files / "free.yaml").read_text().replace("path: free", f"path: {files / 'free'}")
    longer = tmp_path / "longer.yaml"
    longer.write_text(entry.replace("max_answer_tokens: 3", "max_answer_tokens: 12"))
    short, long = (costs(recipes=["ia2"], benchmarks=[str(f)])[0] for f in (files / "free.yaml", longer))
    assert long.evaluation > short.evaluation > 0
    assert long.teacher > short.teacher > 0
    assert long.training > short.training


# ------------------------------------------------------------------------------------- a whole grid


@pytest.fixture(scope="module")
def measured(files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Estimate, Path]:
    """A real calibration, and the folder that it was for."""
    folder = tmp_path_factory.mktemp("measured") / "out"
    benchmarks = [str(files / name) for name in ("two.yaml", "free.yaml")]
    chosen = grid(files, recipes=ALL, benchmarks=benchmarks, num_examples=[4, 6], seeds=2, ood=True)
    return estimate(chosen, folder), folder


def test_every_cell_is_counted_and_timed(measured: tuple[Estimate, Path]) -> None:
    found, folder = measured
    # two benchmarks: base once, the six others for two sizes and two seeds
    assert len(found.cells) == 2 * (1 + 6 * 2 * 2)
    assert found.units == 2 * (1 + 2 * 2)
    assert found.done == 0
    assert not found.unknown
    for each in found.cells:
        assert each.cost is not None
        assert each.cost.at_most >= each.cost.likely_total > 0
        assert (each.cost.training > 0) == (each.cell.spec["recipe"] not in ("base", "icl"))
    total = found.total()
    assert found.wall[0] >= total.at_most > 0
    assert found.memory_bytes > 10**8  # the process holds torch
    assert found.work_bytes > 0
    assert found.record_bytes > 1000 * len(found.cells)
    assert not folder.exists()


def test_the_text_says_what_is_an_upper_bound(measured: tuple[Estimate, Path]) -> None:
    found, _ = measured
    lines = found.text().splitlines()
    assert lines[0] == "sweep: 50 cells in 10 units, none finished."
    assert lines[2].split() == ["model", "benchmark", "N", "seeds", *ALL, "cells", "done", "at", "most"]
    two = next(line for line in lines if "Two (digits)" in line).split()
    assert two[3:][:3] == ["4,", "6", "2"]
    assert two[6:15] == ["1", *["4"] * 6, "25", "0"]
    assert any(line.startswith("Time    at most") and "upper bound" in line for line in lines)
    assert any(line.startswith("Disk    at most") for line in lines)
    assert any(line.startswith("Memory") for line in lines)
    assert lines[-1].startswith("Measured in ")
    assert len(set(map(len, lines[2:5]))) == 1  # aligned


def test_json_is_json(measured: tuple[Estimate, Path]) -> None:
    found, folder = measured
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["cells"] == {"total": 50, "done": 0, "estimated": 50}
    assert values["folder"] == str(folder)
    assert [cell["title"] for cell in values["list"]] == [each.cell.title for each in found.cells]
    assert sum(group["cells"] for group in values["groups"]) == 50
    assert values["hours"]["at_most"] == pytest.approx(found.wall[0] / 3600)
    assert values["hours"]["likely"] is None  # nothing has been run
    assert values["gigabytes"]["memory"] > 0.1
    (rates,) = values["calibration"]["models"].values()
    assert all(rate > 0 for rate in rates["tokens_a_second"].values())


def test_what_is_finished_is_no_work(files: Path, tmp_path: Path) -> None:
    chosen = grid(files, recipes=ALL, settings={"sft": {"epochs": 8, "patience": 1}})
    assert sweep(chosen, tmp_path / "out", limit=4).done == 4
    before = tree(tmp_path / "out")
    found = estimate(chosen, tmp_path / "out")
    assert (found.done, len(found.cells), found.stopped) == (4, 7, 2)  # of which base and icl train nothing
    assert [each.cost is None for each in found.cells] == [each.done for each in found.cells]
    assert set(found.shares) == {"sft", "align", ""}
    assert all(0 < share <= 1 for share in found.shares.values())
    assert 0 < found.wall[1] <= found.wall[0]
    assert found.to_dict()["hours"]["likely"] <= found.to_dict()["hours"]["at_most"]
    assert "4 finished" in found.text()
    assert "likely" in found.text()
    assert tree(tmp_path / "out") == before


def test_a_finished_grid_needs_no_calibration(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = grid(files, recipes=["base", "icl"])
    sweep(chosen, tmp_path)
    monkeypatch.setattr(module, "load_base", None)
    found = estimate(chosen, tmp_path)
    assert found.done == 2
    assert found.text().endswith("Nothing is left to do.")


def test_steps_are_those_that_training_takes(files: Path, tmp_path: Path) -> None:
    """Without early stopping the share of the estimated steps is all of them."""
    patient = {"epochs": 3, "patience": 99}
    settings = {"align": patient, "sft": patient, "joint": patient, "batch_size": 3}
    chosen = grid(files, recipes=["ia2-sft", "ia2+sft"], num_examples=[5], settings=settings)
    sweep(chosen, tmp_path)
    assert estimate(chosen, tmp_path).shares == {"align": 1.0, "sft": 1.0, "joint": 1.0, "": 1.0}


def test_workers_divide_the_time_but_not_a_unit(files: Path, tmp_path: Path, fixed: None) -> None:
    chosen = grid(files, recipes=["sft", "ia2"], seeds=4)
    one, two, many = (estimate(chosen, tmp_path, workers=n) for n in (1, 2, 64))
    total = one.total().at_most
    loading = 10.0
    assert one.wall[0] == pytest.approx(total + loading)
    assert two.wall[0] == pytest.approx(total / 2 + loading)
    assert many.wall[0] == pytest.approx(total / 4 + loading, rel=0.1)  # four units
    assert two.memory_bytes == 2 * one.memory_bytes
    assert two.work_bytes == pytest.approx(2 * one.work_bytes)


def test_only_the_first_cells_are_counted(files: Path, tmp_path: Path, fixed: None) -> None:
    found = estimate(grid(files, recipes=ALL), tmp_path, limit=3)
    assert [each.cell.spec["recipe"] for each in found.cells] == ALL[:3]


# ---------------------------------------------------------------------------------- what is not there


def test_a_model_that_is_not_there_is_named_and_the_others_are_timed(
    files: Path, tmp_path: Path, fixed: None
) -> None:
    models = [str(files / "model"), str(tmp_path / "no-model")]
    found = estimate(grid(files, recipes=["base", "sft"], models=models), tmp_path / "out")
    assert [each.cost is not None for each in found.cells] == [True, True, False, False]
    assert list(found.unknown.values()) == [2]
    assert "no-model: no such file or folder" in found.text()
    assert found.to_dict()["not_estimated"][0]["cells"] == 2


def test_rows_that_are_not_there_are_counted_all_the_same(files: Path, tmp_path: Path) -> None:
    benchmarks = ["SST2", "AGN"]
    chosen = grid(files, recipes=["base", "sft"], benchmarks=benchmarks, seeds=3, data_dir=str(tmp_path))
    found = estimate(chosen, tmp_path / "out")
    assert len(found.cells) == 2 * (1 + 3)
    assert list(found.unknown.values()) == [4, 4]
    assert not found.speeds
    values = found.to_dict()
    assert values["hours"] == {"at_most": None, "likely": None}
    assert values["cells"]["estimated"] == 0
    json.dumps(values, allow_nan=False)
    assert "Not estimated (4 cells): SST2: no file" in found.text()
    assert "Time" not in found.text()


def test_a_hub_that_cannot_be_reached_is_asked_once(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load(benchmark: Any, *_: Any) -> Any:
        asked.append(benchmark.name)
        raise DataError(f"{benchmark.name}: the hub cannot be reached (no network).")

    monkeypatch.setattr(module, "load_rows", load)
    benchmarks = ["SST2", "AGN", "GSM8K", str(files / "two.yaml")]
    found = estimate(grid(files, benchmarks=benchmarks), tmp_path)
    assert asked == ["SST2", "Two"]  # one's own rows are not on the hub
    assert list(found.unknown.values()) == [3, 1]


def test_many_reasons_are_cut_short(files: Path, tmp_path: Path, fixed: None) -> None:
    models = [str(tmp_path / f"model-{n}") for n in range(6)]
    found = estimate(grid(files, models=models), tmp_path / "out")
    lines = [line for line in found.text().splitlines() if line.startswith("Not estimated")]
    assert len(lines) == 4
    assert lines[-1] == "Not estimated (3 cells): other reasons; --json has them all."
    assert len(found.to_dict()["not_estimated"]) == 6


def test_an_adapter_that_cannot_be_trained_leaves_the_rest(files: Path, tmp_path: Path) -> None:
    adapter = {"adapter": {"target_modules": ["no_such_module"]}}
    chosen = grid(files, recipes=["icl", "sft"], variants={"wrong": adapter})
    found = estimate(chosen, tmp_path / "out")
    by_title = {f"{e.cell.spec['recipe']} {e.cell.spec['variant']}": e.cost for e in found.cells}
    assert by_title["sft wrong"] is None
    assert by_title["icl "] is not None
    assert by_title["sft "] is not None
    (reason,) = found.unknown
    assert "no_such_module" in reason


def test_too_few_rows_are_a_reason(files: Path, tmp_path: Path, fixed: None) -> None:
    found = estimate(grid(files, num_examples=[4, 200]), tmp_path)
    assert [each.cost is not None for each in found.cells] == [True, False]
    (reason,) = found.unknown
    assert "200" in reason


def test_a_folder_of_something_else_is_refused(files: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="holds no sweep"):
        estimate(grid(files), tmp_path)


def test_adapters_are_told_apart_and_rates_are_not(files: Path) -> None:
    chosen = grid(files, learning_rates=[0.1, 0.2], axes={"adapter.type": ["lora", "ia3"]})
    cells = [cell for unit in expand(chosen) for cell in unit.cells]
    assert len(cells) == 4
    assert len({adapter_of(cell) for cell in cells}) == 2


# -------------------------------------------------------------------------------------- the command


def test_the_command_prints_and_writes_nothing(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fixed: None
) -> None:
    file = write_grid(tmp_path / "grid.yaml", grid_of(files, recipes=["base", "sft"]))
    options = ("sweep", file, "--dry-run", "--output-dir", tmp_path / "out", "--quiet")
    text = run(capsys, *options)
    assert text.status == 0
    assert text.out.startswith("sweep: 2 cells in 2 units, none finished.")
    values = run(capsys, *options, "--json").json
    assert [cell["title"].split()[2] for cell in values["list"]] == ["base", "sft"]
    assert list(tmp_path.iterdir()) == [file]
