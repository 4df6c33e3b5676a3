"""Nothing is computed that nothing uses, and nothing twice; published seconds are those of all starts."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.benches import clone, icl_base, icl_examples
from helpers.sweeping import records, swept

from ia2.config import AdaptConfig, CompareConfig, ProbeConfig
from ia2.data.examples import Examples
from ia2.evaluation import scoring
from ia2.experiment import workbench
from ia2.experiment.adapt import AdaptResult, adapt
from ia2.experiment.compare import compare
from ia2.experiment.probe import probe
from ia2.models.forward import answer_pass
from ia2.models.load import BaseModel
from ia2.teacher import cache, teacher
from ia2.training.schedule import Schedule
from ia2.training.trainer import ExampleTrainer
from ia2.utils.files import digest, finite, read_json

ROWS = icl_examples(12)
BRIEF: dict[str, Any] = {name: {"epochs": 1} for name in ("align", "sft", "joint", "soft")}
BRIEF |= {"selection": "dev"}


@pytest.fixture(scope="module")
def base(tiny_icl_model_path: Path) -> BaseModel:
    return icl_base(tiny_icl_model_path)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The site of every teacher pass, and whatever else runs a teacher, in order."""
    ran: list[str] = []
    teach = teacher.Teacher.teach

    def counting(self: Any, *arguments: Any, description: str, **options: Any) -> Any:
        ran.append(self.site if description.startswith("teacher pass") else description)
        return teach(self, *arguments, description=description, **options)

    monkeypatch.setattr(teacher.Teacher, "teach", counting)
    return ran


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What each pass over labels is for, and how many prompts it has."""
    ran: list[str] = []

    def counting(model: Any, tokenizer: Any, pairs: Any, *, description: str, **options: Any) -> Any:
        ran.append(f"{description}: {len(pairs)}")
        return answer_pass(model, tokenizer, pairs, description=description, **options)

    for module in (scoring, teacher, cache, workbench):
        monkeypatch.setattr(module, "answer_pass", counting)
    return ran


def adapted(base: BaseModel, folder: Path, **settings: Any) -> AdaptResult:
    changed = {**BRIEF, **{k: {**BRIEF.get(k, {}), **v} if k in BRIEF else v for k, v in settings.items()}}
    return adapt(clone(base), ROWS, AdaptConfig(**changed), output_dir=folder)


def compared(base: BaseModel, folder: Path, *recipes: str, rows: Examples = ROWS, **settings: Any) -> Any:
    shared = {"targets": "memory", "seeds": 1, "num_examples": 6, **settings}
    config = CompareConfig(**BRIEF, recipes=[*recipes], **shared)
    return compare(clone(base), rows, config, test=icl_examples(9, 1), output_dir=folder).summary


# ---------------------------------------------------------------------------------- teacher passes


@pytest.mark.parametrize(
    ("settings", "sites"),
    [
        ({"recipe": "soft-sft", "soft": {"top_k": 3, "only_correct": True}}, ["soft", "soft"]),
        ({"recipe": "ia2-sft", "align": {"objective": "heads"}}, ["heads", "heads"]),
        ({"recipe": "ia2", "align": {"objective": "residual", "only_correct": True}}, ["residual"] * 2),
        ({"recipe": "ia2+sft", "joint": {"objective": "attention"}}, ["weights", "weights"]),
        # the shift is that of attention outputs, and of training examples alone
        ({"recipe": "ia2", "align": {"objective": "heads", "layers": "top-2"}}, ["heads", "heads", "output"]),
        # where only answers are learnt from, only they are computed
        ({"recipe": "sft", "sft": {"answers": "icl_responses"}}, ["answers", "answers"]),
        ({"recipe": "ia2-sft", "sft": {"answers": "icl_responses"}}, ["output", "output"]),
        ({"recipe": "sft"}, []),
    ],
)
def test_only_the_passes_that_a_recipe_learns_from(
    settings: dict[str, Any], sites: list[str], base: BaseModel, tmp_path: Path, passes: list[str]
) -> None:
    result = adapted(base, tmp_path / "out", **settings)
    assert sorted(site for site in passes if site != "ICL reference") == sites  # training and dev examples
    stores = {path.parent.name for path in (tmp_path / "out").glob("teacher/*/index.json")}
    assert len(stores) == len(sites)
    if sites[:1] == ["answers"]:  # which leave no activations
        assert not list((tmp_path / "out" / "teacher").rglob("*.safetensors"))
    # and what they cost is what is told
    assert ("teacher" in result.metrics["seconds"]) == bool(sites)


@pytest.mark.parametrize("targets", ["memory", "store", "online"])
@pytest.mark.parametrize("recipe", ["ia2-sft", "soft-sft"])
def test_a_finished_run_opens_without_the_teacher(
    recipe: str, targets: str, base: BaseModel, tmp_path: Path, passes: list[str], fits: list[str]
) -> None:
    first = adapted(base, tmp_path / "out", recipe=recipe, targets=targets)
    assert passes and fits
    passes.clear()
    fits.clear()
    again = adapted(base, tmp_path / "out", recipe=recipe, targets=targets)
    assert (passes, fits) == ([], [])
    assert again.metrics == first.metrics


def test_a_stage_that_learns_nothing_from_the_teacher_goes_on_without_it(
    base: BaseModel, tmp_path: Path, passes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the alignment stage, whose targets were in memory."""
    fit = ExampleTrainer.fit

    def stopped(self: Any) -> float:
        if type(self.loss).__name__ == "AnswerLoss":
            raise KeyboardInterrupt
        return fit(self)

    with monkeypatch.context() as patched:
        patched.setattr(ExampleTrainer, "fit", stopped)
        with pytest.raises(KeyboardInterrupt):
            adapted(base, tmp_path / "out", targets="memory")
    assert passes == ["output", "output"]
    passes.clear()
    result = adapted(base, tmp_path / "out", targets="memory")
    assert [site for site in passes if site != "ICL reference"] == []
    assert result.metrics["seconds"]["teacher"] > 0


def test_a_finished_comparison_opens_without_the_teacher(
    base: BaseModel, tmp_path: Path, passes: list[str], fits: list[str]
) -> None:
    first = compared(base, tmp_path / "out", "base", "icl", "ia2-sft", "soft-sft")
    assert set(passes) == {"output", "soft"}
    passes.clear()
    fits.clear()
    again = compared(base, tmp_path / "out", "base", "icl", "ia2-sft", "soft-sft")
    assert (passes, fits) == ([], [])
    assert digest(finite(again)) == digest(finite(first))


# ------------------------------------------------------------------ ICL and what is compared with it


def test_an_evaluation_of_icl_gives_the_reference(base: BaseModel, tmp_path: Path, asked: list[str]) -> None:
    """One pass for both, and the figures are those of two passes."""
    summary = compared(base, tmp_path / "both", "base", "icl", "sft")
    assert asked == [
        f"{what}: {count}"
        for recipe in ("icl", "base", "sft")
        for what, count in (("fitting temperature", 3), (f"evaluating {recipe}", 9))
    ]
    asked.clear()
    apart = compared(base, tmp_path / "apart", "base", "sft")
    assert [each for each in asked if "ICL" in each] == ["ICL reference: 9"]
    for recipe in ("base", "sft"):
        one, two = summary["recipes"][recipe], apart["recipes"][recipe]
        assert one["metrics"] == two["metrics"]
        assert one["asim"]["value"] == pytest.approx(two["asim"]["value"], abs=1e-6)
        for name in ("asim_by_layer", "l2_by_layer", "variance_unexplained_by_layer"):
            assert one["similarity"][name] == pytest.approx(two["similarity"][name], rel=1e-5)
    # fresh demonstrations are another ICL than the one that recipes learn from
    asked.clear()
    fresh = {"rows": icl_examples(30), "icl_demonstrations": "fresh"}
    compared(base, tmp_path / "fresh", "icl", "sft", **fresh)
    assert [each for each in asked if "icl" in each.lower()] == ["evaluating icl: 9", "ICL reference: 9"]


def test_dev_rows_are_evaluated_in_one_pass(base: BaseModel, tmp_path: Path, asked: list[str]) -> None:
    """Without test rows: temperatures, metrics and similarity come of one pass, the reference of none."""
    result = adapted(base, tmp_path / "out", targets="memory", num_examples=6)
    assert asked == ["teacher pass (train): 6", "teacher pass (dev): 3", "evaluating ia2-sft: 3"]
    test = Examples(list(ROWS.split(num_examples=6, seed=0).dev), name="the same rows, as test rows")
    config = AdaptConfig(**BRIEF, num_examples=6)
    apart = adapt(clone(base), ROWS, config, test=test, output_dir=tmp_path / "apart")
    assert result.metrics["temperatures"] == apart.metrics["temperatures"]
    assert [row.to_dict() for row in result.predictions] == [row.to_dict() for row in apart.predictions]
    for scope, found in result.metrics["dev"].items():
        assert found == apart.metrics["test"][scope]
    one, two = (each.metrics["similarity_to_icl"]["asim_by_layer"] for each in (result, apart))
    assert one == pytest.approx(two, rel=1e-5)


# ------------------------------------------------------------------------------------------ stages


def test_a_stage_with_a_rate_of_its_own_is_trained_once(
    base: BaseModel, tmp_path: Path, fits: list[str]
) -> None:
    """Whatever rates are tried for the others; and it is found again, to go on from."""
    rates = {"learning_rates": [1e-3, 3e-3], "align": {"learning_rate": 2e-3}}
    first = adapted(base, tmp_path / "out", **rates)
    assert fits == ["AlignmentLoss"] + ["AnswerLoss"] * 2
    stages = {str(path.parent.relative_to(tmp_path / "out")) for path in tmp_path.rglob("stage.json")}
    assert stages == {"align/lr-0.002", "sft/lr-0.001", "sft/lr-0.003"}
    fits.clear()
    (tmp_path / "out" / "metrics.json").unlink()
    shutil.rmtree(tmp_path / "out" / "sft")
    again = adapted(base, tmp_path / "out", **rates)
    assert fits == ["AnswerLoss"] * 2
    assert again.metrics["dev_loss_by_learning_rate"] == first.metrics["dev_loss_by_learning_rate"]
    # and so is one before a joint stage with several β
    fits.clear()
    mine = [{"stage": "align"}, {"stage": "joint", "betas": [0.2, 0.8]}, {"stage": "sft"}]
    adapted(base, tmp_path / "joint", recipe="mine", schedules={"mine": mine}, learning_rates=[1e-3])
    assert sorted(fits) == ["AlignmentLoss"] + ["AnswerLoss"] * 2 + ["JointLoss"] * 2


# ----------------------------------------------------------------------------------------- seconds


def test_seconds_of_a_stage_and_a_cell_are_those_of_all_starts(
    base: BaseModel, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every optimiser step takes a while; at some the run is killed."""
    step, settings = ExampleTrainer.training_step, {"sft": {"epochs": 10, "patience": 99}}
    stops = {"at": -1}

    def slowly(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == stops["at"]:
            raise KeyboardInterrupt
        time.sleep(0.03)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(ExampleTrainer, "training_step", slowly)
    for stops["at"] in (8, 13):
        with pytest.raises(KeyboardInterrupt):
            adapted(base, tmp_path / "out", recipe="sft", checkpoint_every=5, **settings)
    stops["at"] = 8
    with pytest.raises(KeyboardInterrupt):
        swept(files, tmp_path / "cells", settings={**settings, "checkpoint_every": 5})
    stops["at"] = -1
    metrics = adapted(base, tmp_path / "out", recipe="sft", checkpoint_every=5, **settings).metrics
    assert metrics["steps"]["sft"] == 20 and metrics["seconds"]["sft"] >= 20 * 0.03
    (stage,) = (tmp_path / "out").glob("sft/lr-*/stage.json")
    assert read_json(stage)["seconds"] == metrics["seconds"]["sft"]
    assert swept(files, tmp_path / "cells", settings={**settings, "checkpoint_every": 5}).done == 1
    (record,) = records(tmp_path / "cells")
    assert record["cost"]["seconds"]["sft"] >= record["training"]["stages"][0]["steps"] * 0.03


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        (170, {"num_examples": 110}),  # 48 dev rows, not 55
        (30, {"num_examples": 3}),
        (3, {}),
        (30, {"align": {"epochs": 3}, "sft": {"epochs": 7}, "learning_rates": [1e-3, 1e-2], "batch_size": 7}),
    ],
)
def test_a_probe_counts_the_rows_and_steps_of_the_run(
    rows: int, settings: dict[str, Any], base: BaseModel
) -> None:
    examples = icl_examples(rows)
    config = ProbeConfig(**{"max_queries": 4, "selection": "dev", **settings})
    cost = probe(base, examples, config).facts["cost"]
    split = examples.split(num_examples=config.num_examples, seed=0, balanced=False)
    train, dev = len(split.train), len(split.dev)
    assert (cost["num_train"], cost["num_dev"]) == (train, dev)
    assert cost["target_bytes"] == 4 * 64 * 4 * (train + dev)  # layers, width, bytes
    batch = min(config.batch_size, train)
    per_epoch = -(-train // batch)
    steps, seconds = [], 0.0
    for section in (config.align, config.sft):
        epochs = section.length(per_epoch, config.selection)
        steps.append(per_epoch * epochs)
        schedule = Schedule(per_epoch, epochs, batch, dev)
        evaluations = sum(map(schedule.due, range(1, steps[-1] + 1))) if dev else 0
        seconds += cost["step_seconds"] * steps[-1] + cost["evaluation_seconds"] * evaluations
    assert cost["max_steps_a_stage"] == max(steps)
    assert cost["training_seconds_at_most"] == pytest.approx(seconds * len(config.learning_rates or [0]))
