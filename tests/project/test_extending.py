"""What CONTRIBUTING.md says of adding something: done here with a patch, and seen to be used."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from helpers.benches import bench_of, icl_base, icl_examples
from helpers.command_line import run, write_rows
from pydantic import Field
from typer.testing import CliRunner

from ia2.adapters.types import ADAPTERS, AdapterType
from ia2.analysis import sections as analyses
from ia2.analysis.section import AnalysisSection
from ia2.cli import options
from ia2.cli.options import with_settings
from ia2.config import AdaptConfig, CompareConfig, TrainConfig
from ia2.config.reading import load_config, validate
from ia2.config.recipes import ADAPTER_NAMES, ALIGN, OBJECTIVE_NAMES, RECIPES, TRAINED, Recipe
from ia2.config.sections import SECTIONS, AdapterConfig, AlignConfig
from ia2.data.examples import Examples, FewShotSplit
from ia2.experiment.methods import arms
from ia2.experiment.workbench import Workbench
from ia2.models.load import BaseModel
from ia2.prompts.demonstrations import ORDERS, Demonstrations, Order
from ia2.prompts.task import make_task
from ia2.training.objectives import OBJECTIVES, Objective
from ia2.utils.errors import ConfigError

ROWS = icl_examples(12, task=1, num_classes=2)
BRIEF = {"epochs": 1, "restore_best": False}


@pytest.fixture
def learner(tiny_icl_model_path: Path) -> BaseModel:
    """The small trained model."""
    return icl_base(tiny_icl_model_path)


def small(base: BaseModel, folder: Path, **settings: Any) -> Workbench:
    return bench_of(
        base, ROWS[:6], ROWS[6:9], folder, align={**BRIEF, **settings.pop("align", {})}, **settings
    )


# ----------------------------------------------------------------------------------------- recipes


@pytest.fixture
def align_twice(monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe, as one entry."""
    monkeypatch.setitem(RECIPES, "align-twice", Recipe((ALIGN, ALIGN), "alignment, and once more"))
    return "align-twice"


def test_a_recipe_is_one_entry(align_twice: str, learner: BaseModel, tmp_path: Path) -> None:
    compared = arms(validate(CompareConfig, {"recipes": ["base", align_twice]}))
    assert [arm.description for arm in compared][1] == "alignment, and once more"
    trained = small(learner, tmp_path, recipe=align_twice).train(align_twice)
    assert [stage.name for stage in trained.stages] == ["align", "align"]
    first, second = (stage.state for stage in trained.stages)
    assert any(not torch.equal(first[name], second[name]) for name in first)


# -------------------------------------------------------------------------------------- objectives


@pytest.fixture
def absolute(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """An objective, as one entry and its name; gives the shapes that it was called with."""
    shapes: list[tuple[int, ...]] = []

    def loss(student: Any, teacher: Any, rms: Any, temperature: float) -> Any:
        shapes.append(tuple(student.shape))
        return (student - teacher).abs().mean(-1)

    monkeypatch.setitem(OBJECTIVES, "absolute", Objective("output", loss))
    # one line of recipes.py; settings have imported it
    for module in ("ia2.config.recipes", "ia2.config.sections"):
        monkeypatch.setattr(f"{module}.OBJECTIVE_NAMES", (*OBJECTIVE_NAMES, "absolute"))
    return shapes


def test_settings_know_every_objective() -> None:
    # names are kept apart from the functions, so that settings are checked without importing torch
    assert list(OBJECTIVE_NAMES) == list(OBJECTIVES)
    with pytest.raises(ConfigError, match="'absolute' is not one of"):
        validate(AdaptConfig, {"align": {"objective": "absolute"}})


def test_an_objective_is_one_entry_and_its_name(
    absolute: list[tuple[int, ...]], learner: BaseModel, tmp_path: Path
) -> None:
    compared = arms(validate(CompareConfig, {"recipes": ["ia2"], "objectives": ["mse", "absolute"]}))
    assert [arm.name for arm in compared] == ["ia2@mse", "ia2@absolute"]
    (stage,) = small(learner, tmp_path, align={"objective": "absolute", "epochs": 2}).train("ia2").stages
    config = learner.model.config
    assert absolute and all(
        shape[::2] == (config.num_hidden_layers, config.hidden_size) for shape in absolute
    )
    assert stage.steps == 4


# ---------------------------------------------------------------------------------------- adapters


@pytest.fixture
def values(monkeypatch: pytest.MonkeyPatch) -> str:
    """An adapter type, as one entry and its name."""

    def build(model: Any, config: AdapterConfig) -> Any:
        from peft import LoraConfig

        return LoraConfig(r=config.rank or 2, target_modules=["v_proj"], task_type="CAUSAL_LM")

    made = AdapterType(build, 5e-3, ("rank",), "low-rank updates of value projections")
    monkeypatch.setitem(ADAPTERS, "values", made)
    monkeypatch.setattr("ia2.config.sections.ADAPTER_NAMES", (*ADAPTER_NAMES, "values"))
    return "values"


def test_an_adapter_is_one_entry(values: str, learner: BaseModel, tmp_path: Path) -> None:
    compared = arms(validate(CompareConfig, {"recipes": ["icl", "ia2"], "adapters": ["lora", values]}))
    assert [arm.name for arm in compared] == ["icl", "ia2@lora", "ia2@values"]
    with pytest.raises(ConfigError, match=r"adapter\.alpha is not a setting of values; it has rank"):
        small(learner, tmp_path, adapter={"type": values, "alpha": 4}).check(["ia2"], ROWS[9:])
    bench = small(learner, tmp_path, adapter={"type": values, "rank": 3})
    bench.check(["ia2"], ROWS[9:])
    trained = bench.train("ia2")
    assert trained.learning_rate == 5e-3
    assert all("v_proj" in name for name in trained.state)
    assert {min(weights.shape) for weights in trained.state.values()} == {3}
    assert any("lora_B" in name and bool(weights.any()) for name, weights in trained.state.items())


# ---------------------------------------------------------------------------------------- analyses


class NormAccumulator:
    """The norm of attention outputs by condition, and nothing else."""

    sites = ("output",)

    def __init__(self) -> None:
        self.norms: dict[str, list[float]] = {}

    def add(self, condition: str, index: int, found: Any, icl: Any, other: Any) -> None:
        self.norms.setdefault(condition, []).append(float(found["output"].norm()))

    def finish(self) -> dict[str, list[float]]:
        return self.norms


def test_an_analysis_is_one_entry(
    tiny_icl_model_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [(row.query, row.answer or "") for row in ROWS])
    common = ("--quiet", "--json", "--output-dir", tmp_path / "out")
    trained = run(
        capsys, "train", "--model", tiny_icl_model_path, "--data", rows, "--test-data", rows,
        "--recipe", "sft", "--sft-epochs", "1", "--num-examples", "6", *common,
    )  # fmt: skip
    assert trained.status == 0, trained.err
    norms = AnalysisSection(
        "norms", lambda results, analysis: {"n": len(results), **results[0]}, lambda look: NormAccumulator()
    )
    monkeypatch.setitem(analyses.SECTIONS, "norms", norms)
    ran = run(capsys, "analyze", tmp_path / "out", "--parts", "norms", *common)
    assert ran.status == 0, ran.err
    assert ran.json["norms"]["n"] == 1 and len(ran.json["norms"]["icl"]) == len(ROWS)
    assert ran.json["norms"]["icl"] != ran.json["norms"]["sft"]


# --------------------------------------------------------------------- all of them, as a user does


def test_the_command_line_takes_what_was_added(
    align_twice: str,
    absolute: list[tuple[int, ...]],
    values: str,
    tiny_icl_model_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [(row.query, row.answer or "") for row in ROWS])
    ran = run(
        capsys, "train", "--model", tiny_icl_model_path, "--data", rows, "--output-dir", tmp_path / "out",
        "--recipe", align_twice, "--align-objective", "absolute", "--adapter-type", values,
        "--align-epochs", "1", "--quiet", "--json",
    )  # fmt: skip
    assert ran.status == 0, ran.err
    assert (ran.json["recipe"], ran.json["learning_rate"]) == (align_twice, 5e-3)
    assert absolute
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["target_modules"] == ["v_proj"]


def words(text: str | None) -> set[str]:
    return set(re.findall(r"[\w+-]+", text or ""))


def test_help_names_every_recipe_objective_and_adapter() -> None:
    assert set(TRAINED) <= words(AdaptConfig.model_fields["recipe"].description)
    assert set(OBJECTIVES) <= words(AlignConfig.model_fields["objective"].description)
    assert set(ADAPTERS) <= words(AdapterConfig.model_fields["type"].description)


# ---------------------------------------------------------------- demonstration orders, stage kinds


def in_file_order(draw: Demonstrations) -> Order:
    """All other demonstrations as they stand in the file."""

    def candidates(i: int, k: int, limit: int) -> list[int]:
        order = [j for j in range(len(draw.pool)) if not (draw.leave_one_out and j == i)]
        return order[max(0, len(order) - limit) :]

    return Order(candidates, shared=not draw.leave_one_out)


def test_an_order_is_a_function(learner: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ORDERS, "file", in_file_order)
    known = validate(AdaptConfig, {"align": BRIEF})
    config = known.model_copy(update={"demo_order": "file"})  # a Literal, which no patch reaches
    train, dev = ROWS[:6], ROWS[6:9]
    task = make_task(Examples([*train, *dev], name="rows"), config, learner.tokenizer)
    bench = Workbench(learner, FewShotSplit(train, dev), task, config, tmp_path)
    prompt_format = bench.teaching.prompts.format
    for contexts, queries in ((bench.train_contexts, train), (bench.teaching.contexts("dev"), dev)):
        for i, query in enumerate(queries):
            shown = [row for row in train if row is not query]
            assert contexts.context_ids(i) == prompt_format.context_ids(shown, query)
    (stage,) = bench.train("ia2").stages
    assert stage.steps == 2


def test_every_stage_kind_has_its_settings_and_its_heading() -> None:
    assert {kind for recipe in RECIPES.values() for kind in recipe.kinds()} <= set(SECTIONS)
    for kind, section in SECTIONS.items():
        assert AdaptConfig.model_fields[kind].annotation is section
    assert set(options._SECTIONS) == {"adapter", *SECTIONS}


# ---------------------------------------------------------------------------------------- settings


class Wider(TrainConfig):
    """The settings of `ia2 train` and one more."""

    warmth: float = Field(0.5, gt=0, description="How warm it is.")


def test_a_setting_is_one_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    app, given = typer.Typer(), []

    @with_settings(Wider)
    def command(config: Any) -> None:
        given.append(config.warmth)

    app.command()(command)
    shown = CliRunner().invoke(app, ["--help"]).output
    assert "--warmth" in shown
    assert "How warm it is. (default: 0.5)" in shown
    (tmp_path / "warm.yaml").write_text("warmth: 2\n")
    file = str(tmp_path / "warm.yaml")
    app(["--config", file], standalone_mode=False)
    app(["--config", file, "--warmth", "3"], standalone_mode=False)
    assert given == [2, 3]
    with pytest.raises(ConfigError, match="warmth: input should be greater than 0"):
        load_config(Wider, None, {"warmth": 0})
