"""Accuracy and calibration over the number of training examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.benches import icl_base, icl_examples

from ia2.config import CurveConfig
from ia2.config.reading import validate
from ia2.experiment.curve import curve
from ia2.experiment.run_folder import find_runs
from ia2.report.figures.runs import try_summary_figure
from ia2.utils.errors import ConfigError, DataError
from ia2.utils.files import read_json

BRIEF = {"epochs": 1}


def config(**changes: Any) -> CurveConfig:
    values = {
        "recipes": ["base", "sft", "ia2-sft"],
        "sizes": [2, 4],
        "seeds": 1,
        "align": BRIEF,
        "sft": BRIEF,
        **changes,
    }
    found: CurveConfig = validate(CurveConfig, values)
    return found


def test_a_point_for_every_size(tiny_icl_model_path: Path, tmp_path: Path) -> None:
    rows = icl_examples(30, task=1, num_classes=2)
    base = icl_base(tiny_icl_model_path)
    result = curve(base, rows[:10], config(), test=rows[10:], output_dir=tmp_path / "run")
    summary = read_json(tmp_path / "run" / "curve.json")
    assert summary["sizes"] == [2, 4] and set(summary["curves"]) == {"base", "sft", "ia2-sft"}
    for recipe, points in summary["curves"].items():
        assert [point["num_train"] for point in points] == [2, 4]
        for point in points:
            single = read_json(tmp_path / "run" / f"n-{point['num_train']}" / "compare.json")
            assert point["accuracy"] == single["recipes"][recipe]["metrics"]["labels"]["accuracy"]
            assert (
                point["accuracy_vocabulary"] == single["recipes"][recipe]["metrics"]["vocabulary"]["accuracy"]
            )
    assert "N = 2" in result.table() and "ia2-sft − sft" in result.table()
    # `ia2 doctor` and `ia2 analyze` take the folder for its sizes
    assert find_runs(tmp_path / "run") == [(tmp_path / "run" / f"n-{size}", "") for size in (2, 4)]
    try_summary_figure(result.summary, tmp_path)
    assert "training examples N" in (tmp_path / "curve.svg").read_text()


def test_refusals(tiny_icl_model_path: Path, tmp_path: Path) -> None:
    rows = icl_examples(10, task=1, num_classes=2)
    with pytest.raises(DataError, match="the largest size, 8, needs 12 rows"):
        curve("nowhere", rows, config(sizes=[2, 8]), test=rows, output_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match="num_examples does nothing to a curve"):
        curve("nowhere", rows, config(num_examples=4), test=rows, output_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match="sizes must rise"):
        config(sizes=[4, 2])
    assert not (tmp_path / "run").exists()
