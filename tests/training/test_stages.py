"""Every recipe, schedule and stage option, on small models: what is minimised, and on which answers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.benches import (
    align_rows,
    align_trainer,
    base_of,
    bench_of,
    clone,
    icl_base,
    icl_examples,
    rows_of,
    trainer_of,
    word_examples,
    wordy_model,
)

from ia2.adapters.weights import base_weights
from ia2.config import AdaptConfig
from ia2.config.recipes import LABELLED, RECIPES, TRAINED, UNLABELLED
from ia2.config.sections import AlignConfig
from ia2.experiment.workbench import Workbench, answered_parts, held_out
from ia2.models.load import BaseModel
from ia2.training.constant import ConstantTrainer
from ia2.training.losses import AlignmentLoss, AnswerLoss, JointLoss
from ia2.training.objectives import OBJECTIVES
from ia2.training.run_stage import StageJob, stage_loss
from ia2.training.stages import PlannedStage, plan
from ia2.utils.errors import ConfigError, DataError

ROWS = icl_examples(12, task=1, num_classes=2)
MORE = icl_examples(10, seed=9, task=1, num_classes=2)


@pytest.fixture
def learner(tiny_icl_model_path: Path) -> BaseModel:
    """The small trained model."""
    return icl_base(tiny_icl_model_path)


@pytest.fixture
def wordy(word_tokenizer: Any) -> BaseModel:
    """A random model with free answers of several tokens."""
    return base_of(wordy_model(), word_tokenizer)


def small(base: BaseModel, folder: Path, **settings: Any) -> Workbench:
    sections = {name: {"epochs": 2, **settings.pop(name, {})} for name in ("align", "sft", "joint", "soft")}
    return bench_of(base, ROWS[:6], ROWS[6:9], folder, **sections, learning_rates=[3e-3], **settings)


def free(base: BaseModel, folder: Path, **settings: Any) -> Workbench:
    """A workbench whose answers have several tokens, with an adapter that does something."""
    rows = word_examples(18, label_words=3)
    settings = {"task": "generation", "max_answer_tokens": 6, "batch_size": 5, **settings}
    unlabelled = rows[8:] if settings.pop("unlabelled", False) else ()
    return bench_of(base, rows[:5], rows[5:8], folder, randomise=True, unlabelled=unlabelled, **settings)


def job_of(bench: Workbench, recipe: str) -> StageJob:
    """The job of a recipe's one stage."""
    (stage,) = plan(recipe, bench.config)
    align = bench._how(stage) if stage.aligns else None
    return StageJob(stage, 1e-3, 1e-3, None, bench._rows(stage, align), Path(), "key", align)


def losses_of(bench: Workbench, job: StageJob, folder: Path) -> tuple[Any, dict[str, Any], list[float]]:
    """The job's loss, a batch of its first five rows, and the loss of each."""
    trainer = trainer_of(bench, stage_loss(bench.model, bench.config, job), job.rows, folder)
    train = job.rows[0]
    beside = (2,) if train.beside is not None else ()
    batch = trainer.data_collator([train[(i, 0, 1.0, *beside)] for i in range(5)])
    return trainer.loss, batch, trainer.loss(bench.model, batch).tolist()


# ----------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("rows", [0, 6], ids=["", "unlabelled"])
@pytest.mark.parametrize("recipe", TRAINED)
def test_a_recipe_trains_and_is_found_again(
    recipe: str, rows: int, learner: BaseModel, tmp_path: Path
) -> None:
    settings = {"adapter": {"bias": True}} if "constant" in RECIPES[recipe].kinds() else {}

    def bench(base: BaseModel) -> Workbench:
        return small(base, tmp_path, unlabelled=MORE[:rows], **settings)

    first = bench(learner)
    if recipe == "pseudo-sft" and not rows:
        with pytest.raises(ConfigError, match=r"^recipe 'pseudo-sft': its stage sft needs unlabelled rows"):
            first.train(recipe)
        return
    trained = first.train(recipe)
    assert [stage.name for stage in trained.stages] == list(RECIPES[recipe].kinds(unlabelled=rows > 0))
    assert all(stage.steps and math.isfinite(stage.dev_loss) for stage in trained.stages)
    assert any(not torch.equal(value, first._initial[name]) for name, value in trained.state.items())
    first.close()
    again = bench(clone(learner)).train(recipe)
    assert [stage.steps for stage in again.stages] == [stage.steps for stage in trained.stages]
    assert all(torch.equal(again.state[name], value) for name, value in trained.state.items())


def test_a_schedule_is_a_recipe(learner: BaseModel, tmp_path: Path) -> None:
    stages = [
        {"stage": "align", "objective": "cosine", "epochs": 1},
        {"stage": "sft", "learning_rate": 1e-4},
        {"stage": "align"},
    ]
    bench = small(learner, tmp_path, recipe="thrice", schedules={"thrice": stages})
    planned = plan("thrice", bench.config)
    assert [(stage.kind, stage.settings.epochs) for stage in planned] == [
        ("align", 1),
        ("sft", 2),
        ("align", 2),
    ]
    assert planned[0].label != planned[2].label == "align"  # changed settings have a folder of their own
    trained = bench.train("thrice")
    assert [stage.name for stage in trained.stages] == ["align", "sft", "align"]
    assert len({stage.folder for stage in trained.stages}) == 3


def test_what_each_stage_learns_on_and_is_stopped_by() -> None:
    def learnt(recipe: str, **settings: Any) -> list[Any]:
        stages = plan(recipe, AdaptConfig(**settings))
        return [(stage.kind, stage.rows, sorted(answered_parts(stage)), held_out(stage)) for stage in stages]

    on, both, parts = (UNLABELLED,), (LABELLED, UNLABELLED), ["unlabelled", "unlabelled-dev"]
    tuned = ("sft", (LABELLED,), [], "dev")
    for recipe, kind in (("ia2-sft", "align"), ("soft-sft", "soft")):
        assert learnt(recipe, unlabelled="more") == [(kind, on, parts, "unlabelled-dev"), tuned]
    assert learnt("pseudo-sft", unlabelled="more") == [("sft", both, ["unlabelled"], "dev")]
    assert learnt("ia2-sft") == [("align", (LABELLED,), ["dev", "train"], "dev"), tuned]
    assert learnt("ia2", unlabelled="more", align={"rows": "both"})[0][2] == ["train", *parts]


def test_the_paper_has_beta_and_the_teachers_answers() -> None:
    def joint(unlabelled: str | None = None, **settings: Any) -> PlannedStage:
        return plan("ia2+sft", AdaptConfig(joint=settings, unlabelled=unlabelled))[0]

    assert (joint().betas, joint().answers, joint().beside) == ([None], "ground_truth", False)
    assert (joint(betas=[0.1]).betas, joint(betas=[0.1]).answers) == ([0.1], "icl_responses")
    beside = joint("more", betas=[0.1])
    assert (beside.answers, beside.beside) == ("ground_truth", True)
    assert {"dev", "train"} < answered_parts(joint("more", answers="icl_responses"))


@pytest.mark.parametrize(
    ("recipe", "settings", "named"),
    [
        ("pseudo-sft", {}, "stage sft needs unlabelled rows"),
        ("ia2", {"align": {"rows": "unlabelled"}}, "stage align needs unlabelled rows"),
        ("ia2-sft", {"unlabelled": "more", "align": {"only_correct": True}}, "align.rows to labelled"),
        ("sft", {"unlabelled": "more", "sft": {"rows": "both", "ia2_weight": 1.0}}, "ia2_weight"),
        ("constant-sft", {"adapter": {"type": "dora"}}, "lora or rslora"),
    ],
)
def test_what_cannot_work_is_refused(recipe: str, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"^recipe '{recipe}': .*{named}"):
        plan(recipe, AdaptConfig(**settings))


# ---------------------------------------------------------------------------------------- the rows


def test_icl_responses_replace_the_true_answers(wordy: BaseModel, tmp_path: Path) -> None:
    bench = free(wordy, tmp_path, sft={"answers": "icl_responses"})
    job = job_of(bench, "sft")
    for rows, answers in zip(job.rows, map(bench.teaching.answers, ("train", "dev")), strict=True):
        assert [row.answer for row in rows_of(rows)] == [answer.ids for answer in answers]
    assert [row.answer for row in rows_of(bench.sft_rows()[0])] != [
        row.answer for row in rows_of(job.rows[0])
    ]


def test_only_correct(learner: BaseModel, wordy: BaseModel, tmp_path: Path) -> None:
    bench = small(learner, tmp_path / "some", align={"only_correct": True})
    gold = [bench.task.label_ids[bench.task.label_of(example)] for example in bench.data.train]
    right = [i for i, answer in enumerate(bench.teaching.answers("train")) if answer.ids == gold[i]]
    train = job_of(bench, "ia2").rows[0]
    assert list(train.indices) == right
    # the targets are those of the examples that are left, not of the first ones
    for place, i in enumerate(right):
        assert torch.equal(train[place]["target"], bench.teaching.targets("train").get(i))
    with pytest.raises(DataError, match="the teacher answers none rightly"):
        free(wordy, tmp_path / "none", align={"only_correct": True}).train("ia2")


def test_rows_of_both_kinds_are_aligned_on_together(wordy: BaseModel, tmp_path: Path) -> None:
    bench = free(wordy, tmp_path, unlabelled=True, align={"rows": "both"})
    train, held = job_of(bench, "ia2").rows
    ours, theirs = align_rows(bench, LABELLED)[0], align_rows(bench, UNLABELLED)
    assert rows_of(train) == [*rows_of(ours), *rows_of(theirs[0])] and rows_of(held) == rows_of(theirs[1])
    assert torch.equal(train[5]["target"], theirs[0][0]["target"])
    # the root mean square is one over all answer tokens
    targets = torch.cat([train[i]["target"] for i in range(len(train))], dim=1).double()
    assert train.targets is not None
    assert train.targets.rms == pytest.approx(targets.pow(2).mean((1, 2)).sqrt().tolist(), rel=1e-4)
    pseudo = job_of(bench, "pseudo-sft").rows[0]
    assert [row.answer for row in rows_of(pseudo)] == [
        *(row.answer for row in rows_of(bench.sft_rows()[0])),
        *(answer.ids for answer in bench.teaching.answers("unlabelled")),
    ]


# -------------------------------------------------------------------------------------- the losses


@pytest.mark.parametrize("targets", ["memory", "online"])
@pytest.mark.parametrize("answers", ["icl_responses", "ground_truth"])
def test_the_joint_loss_is_the_weighted_sum(
    answers: str, targets: str, wordy: BaseModel, tmp_path: Path
) -> None:
    memory = free(clone(wordy), tmp_path / "memory", targets="memory")
    bench = free(wordy, tmp_path, targets=targets, joint={"answers": answers, "betas": [0.3]})
    job = replace(job_of(bench, "ia2+sft"), beta=0.3)
    loss, batch, found = losses_of(bench, job, tmp_path)
    # true answers are other tokens than the teacher's, so they are fed apart
    assert ("response" in batch, "context" in batch) == (answers == "ground_truth", targets == "online")
    aligned, tuned = loss.align(bench.model, batch), AnswerLoss()(bench.model, batch)
    assert found == pytest.approx((0.7 * aligned + 0.3 * tuned).tolist(), rel=1e-5)
    align = align_trainer(memory, align_rows(memory), tmp_path)
    same = align.loss(memory.model, align.data_collator([align.train_dataset[i] for i in range(5)]))
    assert aligned.tolist() == pytest.approx(same.tolist(), rel=1e-4)


def test_a_joint_step_aligns_on_unlabelled_rows_and_fine_tunes_on_labelled(
    wordy: BaseModel, tmp_path: Path
) -> None:
    bench = free(wordy, tmp_path, unlabelled=True)
    job = job_of(bench, "ia2+sft")
    loss, batch, _ = losses_of(bench, job, tmp_path)
    trainer = trainer_of(bench, loss, job.rows, tmp_path)
    align = align_trainer(bench, align_rows(bench, UNLABELLED), tmp_path)
    tuned = trainer_of(bench, AnswerLoss(), bench.sft_rows(), tmp_path)
    loss.begin(trainer)
    assert 1 / loss.scale == pytest.approx(align.evaluate()["eval_loss"], rel=1e-5)
    expected = loss.scale * align.loss(bench.model, batch) + 0.3 * AnswerLoss()(bench.model, batch["beside"])
    assert loss(bench.model, batch).tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    # no scale of the model is in the dev loss: before the first step alignment counts 1
    expected = 1 + 0.3 * tuned.evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_kept_alignment_term_decays(wordy: BaseModel, tmp_path: Path) -> None:
    bench = free(wordy, tmp_path, sft={"ia2_weight": 0.5, "epochs": 10, "ia2_decay_epochs": 4})
    job = job_of(bench, "sft")
    loss, batch, found = losses_of(bench, job, tmp_path)
    assert isinstance(loss, JointLoss)
    # one step an epoch: four steps to zero
    assert [loss.align_weight(s) for s in range(6)] == pytest.approx([0.5, 0.375, 0.25, 0.125, 0, 0])
    tuned = AnswerLoss()(bench.model, batch)
    expected = tuned + 0.5 * loss.align(bench.model, batch)
    assert found == pytest.approx(expected.tolist(), rel=1e-5)
    assert loss(bench.model, batch, 7).tolist() == pytest.approx(tuned.tolist(), rel=1e-5)
    # dev rows are judged by cross-entropy alone
    plain = trainer_of(bench, AnswerLoss(), bench.sft_rows(), tmp_path).evaluate()["eval_loss"]
    kept = trainer_of(bench, loss, job.rows, tmp_path).evaluate()["eval_loss"]
    assert kept == pytest.approx(plain, rel=1e-5)


def test_the_best_beta_is_chosen_by_cross_entropy(learner: BaseModel, tmp_path: Path) -> None:
    bench = small(learner, tmp_path, joint={"betas": [0.1, 0.9], "epochs": 4})
    trained = bench.train("ia2+sft")
    assert set(trained.tried) == {"0.003, β 0.1", "0.003, β 0.9"}
    best = min(trained.tried, key=trained.tried.__getitem__)
    assert best.endswith(f"{trained.beta:g}")
    loss = trainer_of(bench, AnswerLoss(), bench.sft_rows(), tmp_path).evaluate()["eval_loss"]
    assert loss == pytest.approx(trained.tried[best], rel=1e-4)


@pytest.mark.parametrize("targets", ["memory", "online"])
@pytest.mark.parametrize("top_k", [None, 4])
def test_distillation_is_the_divergence_from_the_teacher(
    top_k: int | None, targets: str, wordy: BaseModel, tmp_path: Path
) -> None:
    soft = {"top_k": top_k, **({"remainder": "spread"} if top_k else {})}
    bench = free(wordy, tmp_path, soft=soft, targets=targets)
    _, _, found = losses_of(bench, job_of(bench, "soft-sft"), tmp_path)
    contexts = bench.train_contexts
    for i, value in enumerate(found):
        answer = bench.teaching.answers("train")[i].ids
        with torch.no_grad():
            student = log_p(bench.model, contexts.query_ids(i), answer)
            with base_weights(bench.model):
                p = log_p(bench.model, contexts.context_ids(i), answer).exp()
        if top_k is not None:
            kept = torch.zeros_like(p).scatter(1, p.topk(top_k).indices, 1.0) * p
            rest = (1 - kept.sum(-1, keepdim=True)) / (p.shape[-1] - top_k)
            p = torch.where(kept > 0, kept, rest)
        expected = (p * (p.log() - student)).sum(-1).mean()
        assert value == pytest.approx(float(expected), rel=1e-4)


def log_p(model: Any, prompt: tuple[int, ...], answer: tuple[int, ...]) -> torch.Tensor:
    ids = torch.tensor([[*prompt, *answer[:-1]]])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits[0, -len(answer) :].log_softmax(-1)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_lowers_its_loss(objective: str, learner: BaseModel, tmp_path: Path) -> None:
    bench = small(learner, tmp_path, align={"objective": objective, "epochs": 6})
    (stage,) = bench.train("ia2").stages
    losses = [entry["eval_loss"] for entry in stage.history if "eval_loss" in entry]
    assert min(losses[1:]) < losses[0]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("all", [0, 1, 2, 3]), ("middle-third", None), ("top-2", None), ([0], [0]), ("1,2", [1, 2])],
)
def test_layers_can_be_chosen(
    layers: Any, expected: list[int] | None, learner: BaseModel, tmp_path: Path
) -> None:
    bench = small(learner, tmp_path, align={"layers": layers})
    job = job_of(bench, "ia2")
    if layers == "top-2":
        shift = bench.teaching.shift()
        expected = sorted(sorted(range(len(shift)), key=lambda i: -shift[i])[:2])
    loss = stage_loss(bench.model, bench.config, job)
    assert isinstance(loss, AlignmentLoss)
    assert loss.capture.layers == expected or (expected is None and 0 < len(loss.capture.layers) < 4)
    losses_of(bench, job, tmp_path)


# -------------------------------------------------------------------------------------- a constant


def test_the_constant_is_the_mean_of_what_the_context_adds(learner: BaseModel, tmp_path: Path) -> None:
    bench = bench_of(
        learner, ROWS[:6], ROWS[6:9], tmp_path, unlabelled=MORE, adapter={"bias": True}, sft={"epochs": 1}
    )
    (constant, _) = bench.train("constant-sft").stages
    changed = {name for name, value in constant.state.items() if not torch.equal(value, bench._initial[name])}
    layers = range(4)
    assert changed == {f"base_model.model.model.layers.{i}.self_attn.o_proj.lora_B.bias" for i in layers}
    bench.use(constant.state)
    # on average nothing is missing at any layer, for rows that it was computed from
    job = job_of(bench, "ia2")
    loss = stage_loss(bench.model, bench.config, job)
    options = {"output_dir": tmp_path / "other"}
    again = ConstantTrainer(bench.model, loss, *job.rows, bench.tokenizer, **options)
    assert all(float(again._missing(place).abs().max()) < 1e-5 for place in layers)
    assert constant.dev_loss == pytest.approx(again.evaluate()["eval_loss"])
    bench.use(bench._initial)
    assert constant.dev_loss < again.evaluate()["eval_loss"]


def test_a_constant_needs_a_bias_where_attention_writes(learner: BaseModel, tmp_path: Path) -> None:
    bench = small(learner, tmp_path, adapter={"bias": True, "target_modules": ["q_proj"]})
    with pytest.raises(ConfigError, match=r"the adapter has no bias there \(layer 0\)"):
        bench.train("constant-sft")


@pytest.mark.parametrize(
    ("recipe", "rates"),
    [
        ("sft", [3e-4]),
        ("ia2", [1e-3]),
        ("ia2-sft", [1e-3, 1e-4]),
        ("sft-ia2", [3e-4, 1e-3]),
        ("ia2+sft", [3e-4]),
        ("soft-sft", [3e-4]),
    ],
)
def test_each_stage_has_a_rate_of_its_own_where_none_is_given(recipe: str, rates: list[float]) -> None:
    assert [s.settings.learning_rate for s in plan(recipe, AdaptConfig())] == pytest.approx(rates)
    # a given one is that of every stage
    assert {s.settings.learning_rate for s in plan(recipe, AdaptConfig(learning_rates=[2e-3]))} == {None}


@pytest.mark.parametrize(("rows", "align", "sft"), [(8, 60, 30), (32, 64, 32), (256, 64, 192), (3, 60, 30)])
def test_without_held_out_rows_lengths_are_in_steps(rows: int, align: int, sft: int) -> None:
    per_epoch = -(-rows // 4)
    config = AdaptConfig()
    assert config.align.length(per_epoch, config.selection) * per_epoch == align
    assert config.sft.length(per_epoch, config.selection) * per_epoch == sft
    assert (
        config.align.length(per_epoch, "dev") == 50 and AlignConfig(epochs=7).length(per_epoch, "last") == 7
    )


def test_several_rates_are_chosen_by_held_out_rows() -> None:
    assert AdaptConfig().selection == "last"
    assert AdaptConfig(learning_rates=[1e-3, 1e-4]).selection == "dev"
    assert AdaptConfig(joint={"betas": [0.1, 0.5]}).selection == "dev"
    with pytest.raises(ValueError, match="selection last chooses nothing"):
        AdaptConfig(learning_rates=[1e-3, 1e-4], selection="last")
