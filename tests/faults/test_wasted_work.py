"""Nothing is computed that nothing uses, and nothing twice."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.benches import (
    base_of,
    bench_of,
    clone,
    icl_base,
    icl_examples,
    taught,
    word_examples,
    wordy_model,
)
from helpers.command_line import run, write_rows
from helpers.sweeping import grid_of, records

from ia2.analysis.checkpoints import find_checkpoints
from ia2.config import AdaptConfig, CompareConfig
from ia2.data.examples import Examples
from ia2.evaluation import scoring
from ia2.experiment import workbench
from ia2.experiment.adapt import AdaptResult, adapt
from ia2.experiment.compare import compare
from ia2.experiment.sweep.execute import sweep
from ia2.experiment.sweep.grid import GridConfig
from ia2.models.forward import answer_pass
from ia2.models.load import BaseModel
from ia2.prompts.demonstrations import ORDERS, Draw
from ia2.report.doctor.reading import read_facts
from ia2.teacher import cache, teacher
from ia2.training.trainer import ExampleTrainer
from ia2.utils.files import digest, finite

ROWS = icl_examples(12)
BRIEF: dict[str, Any] = {name: {"epochs": 1} for name in ("align", "sft", "joint", "soft")}


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


def adapted(base: BaseModel, folder: Path, **settings: Any) -> AdaptResult:
    changed = {**BRIEF, **{k: {**BRIEF.get(k, {}), **v} if k in BRIEF else v for k, v in settings.items()}}
    return adapt(clone(base), ROWS, AdaptConfig(**changed), output_dir=folder)


# ------------------------------------------------------------------------------------ teacher passes


@pytest.mark.parametrize(
    ("settings", "sites"),
    [
        ({"recipe": "soft-sft"}, ["soft", "soft"]),
        ({"recipe": "soft-sft", "soft": {"top_k": 3, "only_correct": True}}, ["soft", "soft"]),
        ({"recipe": "ia2-sft", "align": {"objective": "heads"}}, ["heads", "heads"]),
        ({"recipe": "ia2", "align": {"objective": "residual", "only_correct": True}}, ["residual"] * 2),
        ({"recipe": "ia2+sft", "joint": {"objective": "attention"}}, ["weights", "weights"]),
        ({"recipe": "ia2", "align": {"objective": "cosine"}}, ["output", "output"]),
        # the shift is that of attention outputs, and of training examples alone
        ({"recipe": "ia2", "align": {"objective": "heads", "layers": "top-2"}}, ["heads", "heads", "output"]),
        # where only answers are learnt from, only they are computed
        ({"recipe": "sft", "sft": {"answers": "icl_responses"}}, ["answers", "answers"]),
        ({"recipe": "ia2-sft", "sft": {"answers": "icl_responses"}}, ["output", "output"]),
        (
            {
                "recipe": "mine",
                "schedules": {"mine": [{"stage": "sft", "answers": "icl_responses"}, {"stage": "soft"}]},
            },
            ["soft", "soft"],
        ),
        ({"recipe": "sft"}, []),
    ],
)
def test_only_the_passes_that_a_recipe_learns_from(
    settings: dict[str, Any], sites: list[str], base: BaseModel, tmp_path: Path, passes: list[str]
) -> None:
    result = adapted(base, tmp_path / "out", **settings)
    ran = [site for site in passes if site != "ICL reference"]
    assert sorted(ran) == sites  # training and dev examples
    stores = {path.parent.name for path in (tmp_path / "out").glob("teacher/*/index.json")}
    assert len(stores) == len(sites)
    # and what they cost is what is told
    assert ("teacher" in result.metrics["seconds"]) == bool(sites)


def test_answers_alone_leave_no_activations(base: BaseModel, tmp_path: Path) -> None:
    adapted(base, tmp_path / "out", recipe="sft", sft={"answers": "icl_responses"})
    assert not list((tmp_path / "out" / "teacher").rglob("*.safetensors"))


@pytest.mark.parametrize("site", ["answers", "output", "soft"])
def test_answers_are_generated_once(
    site: str, tmp_path: Path, word_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever pass comes first: the second knows the answers."""
    rows = word_examples(8, label_words=3)
    free = {"task": "generation", "max_answer_tokens": 5, "targets": "memory"}
    base = base_of(wordy_model(), word_tokenizer)
    bench = bench_of(base, rows[:6], rows[6:], tmp_path, **free)
    first = taught(bench, site)
    monkeypatch.setattr(teacher, "generate_answers", None)
    for other in ("output", "soft", "answers"):
        second = taught(bench, other)
        assert [part.answers for part in second] == [part.answers for part in first]
    assert [len(bench.teaching.answers(part)) for part in ("train", "dev")] == [6, 2]


# --------------------------------------------------------------------------------------- re-opening


@pytest.mark.parametrize("targets", ["memory", "store", "online"])
@pytest.mark.parametrize("recipe", ["ia2-sft", "soft-sft", "ia2+sft"])
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
    config = CompareConfig(
        **BRIEF, targets="memory", seeds=1, folds=2, recipes=["base", "icl", "ia2-sft", "soft-sft"]
    )
    first = compare(clone(base), ROWS, config, output_dir=tmp_path / "out")
    assert set(passes) == {"output", "soft"}
    passes.clear()
    fits.clear()
    again = compare(clone(base), ROWS, config, output_dir=tmp_path / "out")
    assert (passes, fits) == ([], [])
    assert digest(finite(again.summary)) == digest(finite(first.summary))


# ----------------------------------------------------------------- ICL and what is compared with it


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


def compared(base: BaseModel, folder: Path, *recipes: str, **settings: Any) -> dict[str, Any]:
    config = CompareConfig(**BRIEF, targets="memory", seeds=1, num_examples=6, recipes=[*recipes], **settings)
    return compare(clone(base), ROWS, config, test=icl_examples(9, 1), output_dir=folder).summary


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
    asked.clear()
    alone = compared(base, tmp_path / "alone", "icl")
    assert asked == ["fitting temperature: 3", "evaluating icl: 9"]
    assert alone["recipes"]["icl"]["metrics"] == summary["recipes"]["icl"]["metrics"]
    for recipe in ("base", "sft"):
        one, two = summary["recipes"][recipe], apart["recipes"][recipe]
        assert one["metrics"] == two["metrics"]
        assert one["asim"]["value"] == pytest.approx(two["asim"]["value"], abs=1e-6)
        for name in ("asim_by_layer", "l2_by_layer", "variance_unexplained_by_layer"):
            assert one["similarity"][name] == pytest.approx(two["similarity"][name], rel=1e-5)


def test_prompts_that_differ_take_a_pass_of_their_own(
    base: BaseModel, tmp_path: Path, asked: list[str]
) -> None:
    """Fresh demonstrations are another ICL than the one that recipes learn from."""
    pool = icl_examples(30)
    config = CompareConfig(
        **BRIEF, targets="memory", seeds=1, num_examples=6, recipes=["icl", "sft"], icl_demonstrations="fresh"
    )
    compare(clone(base), pool, config, test=icl_examples(9, 1), output_dir=tmp_path / "out")
    assert [each for each in asked if "icl" in each.lower()] == ["evaluating icl: 9", "ICL reference: 9"]


def test_dev_rows_are_evaluated_in_one_pass(base: BaseModel, tmp_path: Path, asked: list[str]) -> None:
    """Without test rows: temperatures, metrics and similarity come of one pass, the reference of none."""
    result = adapted(base, tmp_path / "out", targets="memory", num_examples=6)
    assert asked == ["teacher pass (train): 6", "teacher pass (dev): 3", "evaluating ia2-sft: 3"]
    asked.clear()
    test = Examples(list(ROWS.split(num_examples=6, seed=0).dev), name="the same rows, as test rows")
    apart = adapt(
        clone(base), ROWS, AdaptConfig(**BRIEF, num_examples=6), test=test, output_dir=tmp_path / "apart"
    )
    assert len(asked) == 4
    assert result.metrics["temperatures"] == apart.metrics["temperatures"]
    assert [row.to_dict() for row in result.predictions] == [row.to_dict() for row in apart.predictions]
    for scope, found in result.metrics["dev"].items():
        assert found == apart.metrics["test"][scope]
    one, two = (each.metrics["similarity_to_icl"]["asim_by_layer"] for each in (result, apart))
    assert one == pytest.approx(two, rel=1e-5)


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("labels of one token", {}),
        ("labels of several tokens", {"labels": [" good film", " good food red", " bad"]}),
        ("free text", {"task": "generation", "max_answer_tokens": 5}),
    ],
)
def test_temperatures_are_fitted_on_what_is_evaluated(
    task: str, settings: dict[str, Any], tmp_path: Path, word_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same figures as of two passes, exactly."""
    rows = word_examples(9)
    if "labels" in settings:
        names = settings["labels"]
        rows = Examples([replace(row, answer=names[i % 3]) for i, row in enumerate(rows)], name="rows")
    bench = bench_of(base_of(wordy_model(), word_tokenizer), rows[:5], rows[5:], tmp_path, **settings)
    apart = bench.evaluate("base", Examples(list(rows[5:]), name="test"))
    monkeypatch.setattr(workbench, "temperature_losses", None)
    one = bench.evaluate("base", bench.data.dev)
    assert one.measured.temperatures == apart.measured.temperatures
    for found, expected in (
        (one.measured.plain, apart.measured.plain),
        (one.measured.scaled, apart.measured.scaled),
    ):
        assert found.keys() == expected.keys() != set()
        for scope in found:
            for mine, theirs in zip(found[scope].arrays(), expected[scope].arrays(), strict=True):
                np.testing.assert_array_equal(mine, theirs)
    assert [row.to_dict() for row in one.predictions] == [row.to_dict() for row in apart.predictions]


# -------------------------------------------------------------------------------------- temperatures


def test_temperatures_are_fitted_once_for_each_cell(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not again for every set of rows, nor where only a similarity is wanted."""
    fitted: list[int] = []
    fit = workbench.temperature_losses

    def counting(model: Any, tokenizer: Any, task: Any, examples: Any, prompts: Any) -> Any:
        fitted.append(len(examples))
        return fit(model, tokenizer, task, examples, prompts)

    monkeypatch.setattr(workbench, "temperature_losses", counting)
    grid = GridConfig(**grid_of(files, recipes=["icl", "sft"], ood=True))
    assert sweep(grid, tmp_path / "out").done == 2
    assert fitted == [2, 2]
    for record in records(tmp_path / "out"):
        assert set(record["evaluations"]) == {"Two", "Three"}
        assert all("scaled" in found["metrics"] for found in record["evaluations"].values())
        assert record["similarity"] is not None


# ------------------------------------------------------------------------------------------ stages


def test_a_stage_with_a_rate_of_its_own_is_trained_once(
    base: BaseModel, tmp_path: Path, fits: list[str]
) -> None:
    """Whatever rates are tried for the others; and it is found again, to be looked at and to go on from."""
    rates = {"learning_rates": [1e-3, 3e-3, 1e-2], "align": {"learning_rate": 2e-3}}
    first = adapted(base, tmp_path / "out", **rates)
    assert fits == ["AlignmentLoss"] + ["AnswerLoss"] * 3
    assert {str(path.parent.relative_to(tmp_path / "out")) for path in tmp_path.rglob("stage.json")} == {
        "align/lr-0.002",
        *(f"sft/lr-{rate:g}" for rate in (1e-3, 3e-3, 1e-2)),
    }
    fits.clear()
    (tmp_path / "out" / "metrics.json").unlink()
    shutil.rmtree(tmp_path / "out" / "sft")
    again = adapted(base, tmp_path / "out", **rates)
    assert fits == ["AnswerLoss"] * 3
    assert again.metrics["dev_loss_by_learning_rate"] == first.metrics["dev_loss_by_learning_rate"]


def test_a_stage_before_the_joint_one_is_trained_once(
    base: BaseModel, tmp_path: Path, fits: list[str]
) -> None:
    stages = [{"stage": "align"}, {"stage": "joint", "betas": [0.2, 0.5, 0.8]}, {"stage": "sft"}]
    adapted(base, tmp_path / "out", recipe="mine", schedules={"mine": stages}, learning_rates=[1e-3])
    assert sorted(fits) == ["AlignmentLoss"] + ["AnswerLoss"] * 3 + ["JointLoss"] * 3


def test_a_shared_stage_is_read_once(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [(row.query, row.answer or "") for row in word_examples(12)])
    brief = ("--align-epochs", 1, "--sft-epochs", 1, "--align-learning-rate", 2e-3, "--device", "cpu")
    trained = run(
        capsys, "train", "--model", files / "model", "--data", rows, "--learning-rates", 1e-3, 1e-2, *brief,
        "--output-dir", tmp_path / "out", "--quiet",
    )  # fmt: skip
    assert trained.status == 0, trained
    (read,) = read_facts(tmp_path / "out").rounds
    stages = [(stage.kind, stage.recipes) for stage in read.stages]
    assert stages == [("align", ["ia2-sft"]), ("sft", ["ia2-sft"]), ("sft", ["ia2-sft"])]
    assert find_checkpoints([tmp_path / "out"]).names == ["ia2-sft:align", "ia2-sft"]


def test_fresh_demonstrations_are_drawn_once(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was checked is what is used."""
    made: list[int] = []
    fresh = ORDERS["fresh"]

    def counting(draw: Draw) -> Any:
        made.append(len(draw.pool))
        return fresh(draw)

    monkeypatch.setitem(ORDERS, "fresh", counting)
    config = CompareConfig(**BRIEF, seeds=1, num_examples=4, recipes=["icl"], icl_demonstrations="fresh")
    compare(clone(base), ROWS, config, test=icl_examples(5, seed=4), output_dir=tmp_path / "out")
    assert made == [6, 6]  # of the test and of the dev rows
