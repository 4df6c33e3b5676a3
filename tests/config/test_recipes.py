"""Every recipe, schedule and stage option, on small models: what is minimised, and on which answers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.benches import (
    align_rows,
    base_of,
    bench_of,
    clone,
    icl_base,
    icl_examples,
    rows_of,
    word_examples,
    wordy_model,
)

from ia2.adapters.types import ADAPTERS
from ia2.adapters.weights import base_weights
from ia2.config import AdaptConfig
from ia2.config.reading import validate
from ia2.config.recipes import ADAPTER_NAMES, OBJECTIVE_NAMES, RECIPES, TRAINED, is_trained
from ia2.experiment.workbench import Workbench
from ia2.models.load import BaseModel
from ia2.teacher.targets import pack_soft
from ia2.training.alignment import AlignmentSettings
from ia2.training.dataset import parts_of
from ia2.training.objectives import OBJECTIVES
from ia2.training.stages import plan
from ia2.training.trainer import AlignTrainer, MixedTrainer, SftTrainer, SoftTrainer, StageSettings
from ia2.utils.errors import ConfigError, DataError

BRIEF = {"epochs": 2}
ROWS = icl_examples(12, task=1, num_classes=2)


@pytest.fixture
def learner(tiny_icl_model_path: Path) -> BaseModel:
    """The small trained model."""
    return icl_base(tiny_icl_model_path)


@pytest.fixture
def wordy(word_tokenizer: Any) -> BaseModel:
    """A random model with free answers of several tokens."""
    return base_of(wordy_model(), word_tokenizer)


def small(base: BaseModel, folder: Path, **settings: Any) -> Workbench:
    sections = {name: {**BRIEF, **settings.pop(name, {})} for name in ("align", "sft", "joint", "soft")}
    return bench_of(base, ROWS[:6], ROWS[6:9], folder, **sections, learning_rates=[3e-3], **settings)


def free(base: BaseModel, folder: Path, **settings: Any) -> Workbench:
    """A workbench whose answers have several tokens, with an adapter that does something."""
    rows = word_examples(8, label_words=3)
    settings = {"task": "generation", "max_answer_tokens": 6, "batch_size": 5, **settings}
    return bench_of(base, rows[:5], rows[5:], folder, randomise=True, **settings)


def test_names_that_settings_know() -> None:
    assert list(OBJECTIVE_NAMES) == list(OBJECTIVES) and list(ADAPTER_NAMES) == list(ADAPTERS)
    assert [name for name in RECIPES if not is_trained(name)] == ["base", "icl"]


@pytest.mark.parametrize("rows", [0, 6], ids=["", "unlabelled"])
@pytest.mark.parametrize("recipe", TRAINED)
def test_a_recipe_trains_and_is_found_again(
    recipe: str, rows: int, learner: BaseModel, tmp_path: Path
) -> None:
    needs = {"adapter": {"bias": True}} if "constant" in RECIPES[recipe].kinds() else {}
    bench = small(learner, tmp_path, unlabelled=ROWS[9 : 9 + rows], **needs)
    if recipe == "pseudo-sft" and not rows:
        with pytest.raises(ConfigError, match=r"^recipe 'pseudo-sft': its stage sft needs unlabelled rows"):
            bench.train(recipe)
        return
    trained = bench.train(recipe)
    assert [stage.name for stage in trained.stages] == list(RECIPES[recipe].kinds(unlabelled=rows > 0))
    assert all(stage.steps and math.isfinite(stage.dev_loss) for stage in trained.stages)
    changed = [name for name, value in trained.state.items() if not torch.equal(value, bench._initial[name])]
    assert changed
    bench.close()
    again = small(clone(learner), tmp_path, unlabelled=ROWS[9 : 9 + rows], **needs).train(recipe)
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
    assert [stage.kind for stage in planned] == ["align", "sft", "align"]
    assert planned[0].settings.epochs == 1 and planned[2].settings.epochs == BRIEF["epochs"]
    assert planned[0].label != planned[2].label == "align"  # changed settings have a folder of their own
    trained = bench.train("thrice")
    assert [stage.name for stage in trained.stages] == ["align", "sft", "align"]
    assert len({stage.folder for stage in trained.stages}) == 3


@pytest.mark.parametrize(
    ("schedules", "told"),
    [
        ({"ia2": [{"stage": "sft"}]}, "schedules.ia2: 'ia2' is a recipe already"),
        ({"a/b": [{"stage": "sft"}]}, "'a/b' names a folder too"),
        ({"mine": []}, "schedules.mine: no stages"),
        ({"mine": [{"epochs": 3}]}, "schedules.mine.0: the key stage must be one of"),
        (
            {"mine": [{"stage": "sft"}, {"stage": "align", "epoch": 3}]},
            "schedules.mine.1: unknown key 'epoch'",
        ),
        ({"mine": [{"stage": "sft", "epochs": 0}]}, "schedules.mine.0: epochs"),
    ],
)
def test_bad_schedules(schedules: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(AdaptConfig, {"schedules": schedules})
    assert told in str(caught.value)


def test_icl_responses_replace_the_true_answers(wordy: BaseModel, tmp_path: Path) -> None:
    bench = free(wordy, tmp_path, sft={"answers": "icl_responses"})
    (stage,) = plan("sft", bench.config)
    rows = bench._rows(stage, None)
    for part, answers in enumerate(bench.teaching.answers()):
        assert [row.answer for row in rows_of(rows[part])] == [answer.ids for answer in answers]
    true = [row.answer for row in rows_of(bench.sft_rows()[0])]
    assert true != [row.answer for row in rows_of(rows[0])]


def test_only_correct(learner: BaseModel, tmp_path: Path) -> None:
    bench = small(learner, tmp_path, align={"only_correct": True})
    answers = bench.teaching.answers()[0]
    (stage,) = plan("ia2", bench.config)
    gold = [bench.task.label_ids[bench.task.label_of(example)] for example in bench.data.train]
    right = [i for i, (a, g) in enumerate(zip(answers, gold, strict=True)) if a.ids == g]
    train, _ = bench._rows(stage, bench._how(stage))
    assert list(train.indices) == right
    # the targets are those of the examples that are left, not of the first ones
    assert all(
        torch.equal(train[place]["target"], bench.teaching.targets()[0].get(i))
        for place, i in enumerate(right)
    )


def test_only_correct_needs_an_example(wordy: BaseModel, tmp_path: Path) -> None:
    bench = free(wordy, tmp_path, align={"only_correct": True})
    with pytest.raises(DataError, match="the teacher answers none rightly"):
        bench.train("ia2")


def settings_of(folder: Path) -> StageSettings:
    return StageSettings(folder / "stage", batch_size=5)


@pytest.mark.parametrize("answers", ["icl_responses", "ground_truth"])
def test_the_joint_loss_is_the_weighted_sum(answers: str, wordy: BaseModel, tmp_path: Path) -> None:
    bench = free(wordy, tmp_path, joint={"answers": answers})
    (stage,) = plan("ia2+sft", bench.config)
    how = bench._how(stage)
    train, dev = bench._rows(stage, how)
    beta = 0.3
    mixed = MixedTrainer(
        bench.model,
        train,
        dev,
        settings_of(tmp_path),
        bench.tokenizer,
        how=how,
        align_weight=lambda step: 1 - beta,
        answer_weight=beta,
    )
    batch = mixed._prepare_inputs(mixed.data_collator([train[i] for i in range(5)]))
    # true answers are other tokens than the teacher's, so they are fed apart
    assert ("response" in batch) == (answers == "ground_truth")
    align = AlignTrainer(bench.model, *align_rows(bench), settings_of(tmp_path), bench.tokenizer)
    aligned = align.example_losses(bench.model, batch)
    sft = SftTrainer(bench.model, train, dev, settings_of(tmp_path), bench.tokenizer)
    expected = (1 - beta) * aligned + beta * sft.example_losses(bench.model, batch)
    assert torch.allclose(mixed.example_losses(bench.model, batch), expected, rtol=1e-5)
    assert torch.allclose(mixed.dev_losses(bench.model, batch), expected, rtol=1e-5)


def test_a_kept_alignment_term_decays(wordy: BaseModel, tmp_path: Path) -> None:
    bench = free(wordy, tmp_path, sft={"ia2_weight": 0.5, "epochs": 10, "ia2_decay_epochs": 4})
    (stage,) = plan("sft", bench.config)
    from ia2.training.stages import StageJob, _trainer
    from ia2.utils.logging import Progress

    how = bench._how(stage)
    rows = bench._rows(stage, how)
    job = StageJob(stage, 1e-3, 1e-3, None, rows, tmp_path / "sft", "key", how)
    trainer = _trainer(bench.model, bench.tokenizer, bench.config, job, tmp_path / "stage", Progress())
    assert isinstance(trainer, MixedTrainer)
    # one step an epoch: four steps to zero
    weights = [trainer.align_weight(step) for step in range(6)]
    assert weights == pytest.approx([0.5, 0.375, 0.25, 0.125, 0, 0])
    batch = trainer._prepare_inputs(trainer.data_collator([rows[0][i] for i in range(5)]))
    plain = SftTrainer(bench.model, *bench.sft_rows(), settings_of(tmp_path), bench.tokenizer)
    cross_entropy = plain.example_losses(bench.model, batch)
    assert torch.allclose(trainer.dev_losses(bench.model, batch), cross_entropy, rtol=1e-5)
    align = AlignTrainer(bench.model, *align_rows(bench), settings_of(tmp_path), bench.tokenizer)
    expected = cross_entropy + 0.5 * align.example_losses(bench.model, batch)
    assert torch.allclose(trainer.example_losses(bench.model, batch), expected, rtol=1e-5)
    trainer.state.global_step = 7
    assert torch.allclose(trainer.example_losses(bench.model, batch), cross_entropy, rtol=1e-5)


def test_the_best_beta_is_chosen_by_cross_entropy(learner: BaseModel, tmp_path: Path) -> None:
    bench = small(learner, tmp_path, joint={"betas": [0.1, 0.9], "epochs": 4})
    trained = bench.train("ia2+sft")
    assert set(trained.tried) == {"0.003, β 0.1", "0.003, β 0.9"}
    best = min(trained.tried, key=trained.tried.__getitem__)
    assert best.endswith(f"{trained.beta:g}")
    sft = SftTrainer(bench.model, *bench.sft_rows(), settings_of(tmp_path), bench.tokenizer)
    assert sft.evaluate()["eval_loss"] == pytest.approx(trained.tried[best], rel=1e-4)


@pytest.mark.parametrize("top_k", [None, 4])
def test_distillation_is_the_divergence_from_the_teacher(
    top_k: int | None, wordy: BaseModel, tmp_path: Path
) -> None:
    bench = free(wordy, tmp_path, soft={"top_k": top_k})
    (stage,) = plan("soft-sft", bench.config)
    train, dev = bench._rows(stage, None)
    trainer = SoftTrainer(
        bench.model, train, dev, settings_of(tmp_path), bench.tokenizer, top_k=top_k, remainder="spread"
    )
    batch = trainer._prepare_inputs(trainer.data_collator([train[i] for i in range(5)]))
    found = trainer.example_losses(bench.model, batch).tolist()
    contexts = bench.train_contexts
    for i, value in enumerate(found):
        answer = bench.teaching.answers()[0][i].ids
        with torch.no_grad():
            student = _log_p(bench.model, contexts.query_ids(i), answer)
            with base_weights(bench.model):
                teacher = _log_p(bench.model, contexts.context_ids(i), answer)
        p = teacher.exp()
        if top_k is not None:
            kept = torch.zeros_like(p).scatter(1, p.topk(top_k).indices, 1.0) * p
            rest = (1 - kept.sum(-1, keepdim=True)) / (p.shape[-1] - top_k)
            p = torch.where(kept > 0, kept, rest)
        expected = (p * (p.log() - student)).sum(-1).mean()
        assert value == pytest.approx(float(expected), rel=1e-4)


def _log_p(model: Any, prompt: tuple[int, ...], answer: tuple[int, ...]) -> torch.Tensor:
    ids = torch.tensor([[*prompt, *answer[:-1]]])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits[0, -len(answer) :].log_softmax(-1)


@pytest.mark.parametrize("recipe", ["soft-sft", "ia2+sft"])
def test_online_targets_give_the_same_loss(recipe: str, wordy: BaseModel, tmp_path: Path) -> None:
    losses = []
    for mode in ("memory", "online"):
        bench = free(clone(wordy), tmp_path / mode, targets=mode, soft={"top_k": 5})
        (stage,) = plan(recipe, bench.config)
        how = bench._how(stage) if stage.aligns else None
        rows = bench._rows(stage, how)
        trainer: Any
        if how is None:
            trainer = SoftTrainer(
                bench.model, *rows, settings_of(tmp_path), bench.tokenizer, top_k=5, remainder="spread"
            )
        else:
            trainer = MixedTrainer(
                bench.model,
                *rows,
                settings_of(tmp_path),
                bench.tokenizer,
                how=how,
                align_weight=lambda s: 0.5,
            )
        batch = trainer._prepare_inputs(trainer.data_collator([rows[0][i] for i in range(5)]))
        assert ("context" in batch) == (mode == "online")
        losses.append(trainer.example_losses(bench.model, batch).tolist())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_soft_targets_are_kept_exactly() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2, 0.0]])
    assert torch.allclose(pack_soft(p, None).exp(), p[None], atol=1e-6)
    ids, log_p = pack_soft(p, 2)
    assert ids.tolist() == [[0.0, 1.0]] and log_p.exp().tolist()[0] == pytest.approx([0.5, 0.3])


@pytest.mark.parametrize("objective", ["mse", "kl", "cosine", "heads", "residual", "attention"])
def test_every_objective_lowers_its_loss(objective: str, learner: BaseModel, tmp_path: Path) -> None:
    bench = small(learner, tmp_path, align={"objective": objective, "epochs": 6})
    (stage,) = bench.train("ia2").stages
    losses = [entry["eval_loss"] for entry in stage.history if "eval_loss" in entry]
    assert min(losses[1:]) < losses[0]


@pytest.mark.parametrize(
    ("layers", "count"), [("all", None), ("middle-third", None), ("top-2", 2), ([0], 1), ("1,2", 2)]
)
def test_layers_can_be_chosen(layers: Any, count: int | None, learner: BaseModel, tmp_path: Path) -> None:
    bench = small(learner, tmp_path, align={"layers": layers})
    (stage,) = plan("ia2", bench.config)
    how = bench._how(stage)
    assert (how.layers is None) == (layers == "all")
    if count is not None:
        assert how.layers is not None and len(how.layers) == count
    if layers == "top-2":
        shift = bench.teaching.shift()
        assert set(how.layers or ()) == set(sorted(range(len(shift)), key=lambda i: -shift[i])[:2])
    train, dev = bench._rows(stage, how)
    trainer = AlignTrainer(bench.model, train, dev, settings_of(tmp_path), bench.tokenizer, layers=how.layers)
    batch = trainer._prepare_inputs(trainer.data_collator([train[i] for i in range(4)]))
    student_layers = trainer.alignment.capture.layers
    assert student_layers == list(how.layers or bench.teaching.targets()[0].layers)
    trainer.example_losses(bench.model, batch)


def test_a_part_that_would_be_fed_the_same_is_fed_once(learner: BaseModel, tmp_path: Path) -> None:
    # labels of one token: query alone is fed, whatever the answers
    bench = small(learner, tmp_path, joint={"answers": "ground_truth"})
    (stage,) = plan("ia2+sft", bench.config)
    train, _ = bench._rows(stage, bench._how(stage))
    trainer = MixedTrainer(
        bench.model,
        train,
        train,
        settings_of(tmp_path),
        bench.tokenizer,
        how=AlignmentSettings(),
        align_weight=lambda step: 1.0,
    )
    batch = trainer.data_collator([train[i] for i in range(3)])
    assert (
        "response" not in batch and parts_of(batch, "response")[0].input_ids is batch["parts"][0]["input_ids"]
    )
