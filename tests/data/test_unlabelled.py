"""Unlabelled rows: which are used, behind what the teacher answers them, and what learns from that."""

from __future__ import annotations

import logging
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
    word_examples,
    wordy_model,
)
from helpers.command_line import names, run, tree, write_rows
from helpers.sweeping import cells_of, records, swept

from ia2 import AdaptConfig, CompareConfig, Examples, adapt
from ia2.adapters.weights import read_adapter_state
from ia2.config.recipes import LABELLED, UNLABELLED
from ia2.data.examples import Example, FewShotSplit
from ia2.data.unlabelled import distinct, with_unlabelled
from ia2.experiment.adapt import load_adapter
from ia2.experiment.rounds import draws
from ia2.experiment.workbench import Workbench, answered_parts, held_out, teacher_passes
from ia2.models.load import BaseModel
from ia2.training.constant import ConstantTrainer
from ia2.training.dataset import EpochSampler
from ia2.training.stages import StageJob, _trainer, plan
from ia2.training.trainer import AlignTrainer, MixedTrainer, SftTrainer, StageSettings
from ia2.utils.errors import ConfigError, DataError
from ia2.utils.files import read_json
from ia2.utils.logging import Progress

ROWS = icl_examples(12, task=1, num_classes=2)
MORE = icl_examples(20, seed=9, task=1, num_classes=2)
BRIEF: dict[str, Any] = {
    **{name: {"epochs": 2} for name in ("align", "sft", "joint", "soft")},
    "learning_rates": [3e-3],
}
FLAGS = ["--align-epochs", "2", "--sft-epochs", "2", "--learning-rates", "3e-3"]


@pytest.fixture(scope="module")
def learner(tiny_icl_model_path: Path) -> BaseModel:
    return icl_base(tiny_icl_model_path)


def texts(count: int, name: str = "more") -> Examples:
    return Examples([Example(f"query {i}", None, f"row {i}") for i in range(count)], name=name)


def bench(base: BaseModel, folder: Path, **settings: Any) -> Workbench:
    return bench_of(base, ROWS[:6], ROWS[6:9], folder, unlabelled=MORE[:10], **{**BRIEF, **settings})


# -------------------------------------------------------------------------------------- which rows


def test_rows_that_are_labelled_or_test_rows_or_repeated_are_left_out(caplog: Any) -> None:
    rows = Examples([*texts(6), Example("query  1 ", None, "again"), *texts(1)], name="more")
    with caplog.at_level(logging.INFO, "ia2"):
        kept = distinct(rows, [texts(2), texts(1)])
    assert [row.query for row in kept] == [f"query {i}" for i in range(2, 6)]
    # the last two repeat labelled rows, and count as such
    assert caplog.messages == ["Unlabelled rows: 4 that are labelled or test rows too of 8 left out."]
    caplog.clear()
    with caplog.at_level(logging.INFO, "ia2"):
        assert len(distinct(rows, [texts(0)])) == 6
    assert caplog.messages == ["Unlabelled rows: 2 that repeat another of 8 left out."]


@pytest.mark.parametrize(("known", "left"), [(6, 0), (5, 1)])
def test_too_few_are_refused(known: int, left: int) -> None:
    with pytest.raises(DataError) as caught:
        distinct(texts(6), [texts(known)])
    names(str(caught.value), "more: ", f"{left} can be used of 6 rows", f"without {known} ", "--unlabelled")


@pytest.mark.parametrize("tested", [True, False])
def test_the_file_that_is_drawn_from_may_be_that_of_the_unlabelled_rows(tested: bool) -> None:
    """What is drawn, held out or evaluated on is left out; other labelled rows are not."""
    rows = icl_examples(30)
    bare = Examples([Example(row.query, None, row.source) for row in rows], name="rows")
    config = CompareConfig(num_examples=6, folds=3, max_unlabelled=100)
    for draw in draws(rows, config, tested=tested, unlabelled=bare):
        parts = [
            draw.data.train,
            draw.data.dev,
            draw.held or [],
            draw.data.unlabelled,
            draw.data.unlabelled_dev,
        ]
        queries = [row.query for part in parts for row in part]
        assert sorted(queries) == sorted(row.query for row in rows)


@pytest.mark.parametrize(
    ("count", "most", "held"), [(2, 9, 1), (4, 9, 1), (10, 9, 1), (10, 10, 2), (400, 400, 48)]
)
def test_a_fifth_is_held_out(count: int, most: int, held: int) -> None:
    split = with_unlabelled(FewShotSplit(ROWS[:2], ROWS[2:3]), texts(count), most, seed=3)
    parts = [{row.query for row in part} for part in (split.unlabelled, split.unlabelled_dev)]
    assert [len(part) for part in parts] == [min(count, most) - held, held]
    assert not parts[0] & parts[1]


def test_a_larger_draw_contains_a_smaller_one_and_no_labels() -> None:
    before: tuple[set[str], set[str]] = (set(), set())
    for most in (5, 12, 40, 300):
        split = with_unlabelled(FewShotSplit(ROWS, ROWS[:0]), word_examples(300), most, seed=1)
        assert all(row.answer is None for part in (split.unlabelled, split.unlabelled_dev) for row in part)
        own = {row.source for row in split.unlabelled}, {row.source for row in split.unlabelled_dev}
        assert before[0] <= own[0] and before[1] <= own[1]
        before = own
    other = with_unlabelled(FewShotSplit(ROWS, ROWS[:0]), word_examples(300), 40, seed=2)
    assert {row.source for row in other.unlabelled} != before[0]


# ------------------------------------------------------------------------------------- the teacher


def test_the_teacher_answers_each_behind_all_training_examples(learner: BaseModel, tmp_path: Path) -> None:
    made = bench(clone(learner), tmp_path)
    teaching = made.teaching
    train, held = align_rows(made, UNLABELLED)
    assert [len(train), len(held)] == [8, 2]
    for part, rows in (("unlabelled", train), ("unlabelled-dev", held)):
        contexts = teaching.contexts(part)
        shared = teaching.prompts.pool_contexts(ROWS[6:9])  # as the dev examples'
        for i in range(len(rows)):
            assert sorted(contexts.chosen(i)) == list(range(6))
            assert contexts.chosen(i) == shared.chosen(0)
            prompt = torch.tensor([contexts.context_ids(i)])
            with torch.no_grad():
                answer = int(clone(learner).model(prompt).logits[0, -1].argmax())
            assert rows.row(i).answer == (answer,) == teaching.part_answers(part)[i].ids
            assert rows[i]["target"] is not None


def test_what_each_stage_learns_on_and_is_stopped_by() -> None:
    config = AdaptConfig(unlabelled="more")
    found = {
        recipe: [
            (stage.kind, stage.rows, sorted(answered_parts(stage)), held_out(stage))
            for stage in plan(recipe, config)
        ]
        for recipe in ("sft", "ia2-sft", "soft-sft", "pseudo-sft")
    }
    on, both = (UNLABELLED,), (LABELLED, UNLABELLED)
    aligned = ("align", on, ["unlabelled", "unlabelled-dev"], "unlabelled-dev")
    tuned = ("sft", (LABELLED,), [], "dev")
    assert found == {
        "sft": [tuned],
        "ia2-sft": [aligned, tuned],
        "soft-sft": [("soft", *aligned[1:]), tuned],
        "pseudo-sft": [("sft", both, ["unlabelled"], "dev")],
    }
    without = [(stage.rows, sorted(answered_parts(stage))) for stage in plan("ia2-sft", AdaptConfig())]
    assert without == [((LABELLED,), ["dev", "train"]), ((LABELLED,), [])]
    (both_kinds,) = plan("ia2", AdaptConfig(unlabelled="more", align={"rows": "both"}))
    assert answered_parts(both_kinds) == {"train", "unlabelled", "unlabelled-dev"}


def test_rows_of_both_kinds_are_aligned_on_together(learner: BaseModel, tmp_path: Path) -> None:
    made = bench(clone(learner), tmp_path, align={"rows": "both", "epochs": 1})
    (stage,) = plan("ia2", made.config)
    train, held = made._rows(stage, made._how(stage))
    ours, theirs = align_rows(made, LABELLED)[0], align_rows(made, UNLABELLED)
    assert [train.row(i) for i in range(len(train))] == [
        part.row(i) for part in (ours, theirs[0]) for i in range(len(part))
    ]
    assert all(torch.equal(train[6 + i]["target"], theirs[0][i]["target"]) for i in range(8))
    assert [held.row(i) for i in range(2)] == [theirs[1].row(i) for i in range(2)]
    # the root mean square is one over all answer tokens
    stacked = torch.stack([train[i]["target"] for i in range(len(train))]).double()
    assert train.targets is not None
    expected = stacked.pow(2).mean((0, 2, 3)).sqrt()
    assert torch.allclose(torch.tensor(train.targets.rms).double(), expected, rtol=1e-4)


def test_pseudo_labels_are_the_teachers_answers_beside_true_ones(learner: BaseModel, tmp_path: Path) -> None:
    made = bench(clone(learner), tmp_path)
    (stage,) = plan("pseudo-sft", made.config)
    train, dev = made._rows(stage, None)
    answers = [train.row(i).answer for i in range(len(train))]
    true = [made.sft_rows()[0].row(i).answer for i in range(6)]
    assert answers == true + [answer.ids for answer in made.teaching.part_answers("unlabelled")]
    assert [dev.row(i) for i in range(3)] == [made.sft_rows()[1].row(i) for i in range(3)]


def test_answers_of_several_tokens_are_written_for_unlabelled_rows(
    word_tokenizer: Any, tmp_path: Path
) -> None:
    rows = word_examples(30, label_words=3)
    base = base_of(wordy_model(), word_tokenizer)
    made = bench_of(
        base, rows[:5], rows[5:8], tmp_path, unlabelled=rows[8:20],
        task="generation", max_answer_tokens=6, batch_size=5, **BRIEF,
    )  # fmt: skip
    train, _ = align_rows(made, UNLABELLED)
    assert all(len(train.row(i).answer) > 1 for i in range(len(train)))
    trained = made.train("ia2-sft")
    assert [stage.name for stage in trained.stages] == ["align", "sft"]


@pytest.mark.parametrize("targets", ["memory", "online"])
def test_where_targets_lie_changes_nothing(targets: str, learner: BaseModel, tmp_path: Path) -> None:
    settings = {"align": {"rows": "both", "epochs": 2}}
    stored = bench(clone(learner), tmp_path / "store", targets="store", **settings).train("ia2")
    other = bench(clone(learner), tmp_path / targets, targets=targets, **settings).train("ia2")
    for name, value in stored.state.items():
        assert torch.allclose(value, other.state[name], atol=1e-3), name


# ------------------------------------------------------------------------------------ the joint stage


def joint(base: BaseModel, folder: Path, **settings: Any) -> tuple[Workbench, MixedTrainer]:
    """The joint stage's trainer on different rows, and an adapter that does something."""
    made = bench(base, folder, **settings)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in made.model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    (stage,) = plan("ia2+sft", made.config)
    how, needed = made._how(stage), teacher_passes([stage], made.config)[0]
    rows, beside = made._rows(stage, how, needed), made._beside(stage, needed)
    job = StageJob(stage, 1e-3, 1e-3, None, rows, folder / "joint", "key", how, beside)
    trainer = _trainer(made.model, made.tokenizer, made.config, job, folder / "stage", Progress())
    assert isinstance(trainer, MixedTrainer)
    return made, trainer


def test_a_joint_step_aligns_on_unlabelled_rows_and_fine_tunes_on_labelled(
    learner: BaseModel, tmp_path: Path
) -> None:
    made, trainer = joint(clone(learner), tmp_path)
    trainer.scale = 0.25
    train = trainer.train_dataset
    batch = trainer._prepare_inputs(trainer.data_collator([train[i, 0, 1.0, 5 - i] for i in range(4)]))
    found = trainer.example_losses(made.model, batch)
    settings = StageSettings(tmp_path / "other")
    align = AlignTrainer(made.model, *align_rows(made, UNLABELLED), settings, made.tokenizer)
    aligned = align.example_losses(
        made.model, trainer.data_collator([align.train_dataset[i] for i in range(4)])
    )
    sft = SftTrainer(made.model, *made.sft_rows(), settings, made.tokenizer)
    tuned = sft.example_losses(
        made.model, trainer.data_collator([sft.train_dataset[5 - i] for i in range(4)])
    )
    assert torch.allclose(found, 0.25 * aligned + 0.3 * tuned, rtol=1e-5)


def test_joint_dev_loss_is_relative_to_the_first(learner: BaseModel, tmp_path: Path) -> None:
    """No scale of the model is in it: before the first step alignment counts 1."""
    made, trainer = joint(clone(learner), tmp_path)
    first = trainer._first_alignment()
    settings = StageSettings(tmp_path / "other")
    align = AlignTrainer(made.model, *align_rows(made, UNLABELLED), settings, made.tokenizer)
    assert first == pytest.approx(align.evaluate()["eval_loss"], rel=1e-5)
    trainer.scale = 1 / first
    sft = SftTrainer(made.model, *made.sft_rows(), settings, made.tokenizer)
    expected = 1 + 0.3 * sft.evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("settings", [{"micro_batch_size": 1}, {"targets": "online"}])
def test_how_a_joint_step_is_cut_changes_nothing(
    settings: dict[str, Any], learner: BaseModel, tmp_path: Path
) -> None:
    whole = bench(clone(learner), tmp_path / "whole", batch_size=3).train("ia2+sft")
    parts = bench(clone(learner), tmp_path / "parts", batch_size=3, **settings).train("ia2+sft")
    assert whole.tried == pytest.approx(parts.tried, rel=1e-4)
    for name, value in whole.state.items():
        assert torch.allclose(value, parts.state[name], atol=1e-3), name


def test_every_labelled_row_comes_as_often_as_any_other() -> None:
    sampler = EpochSampler(20, 4, 6, 1, seed=3, epoch=lambda: 0, beside=6)
    keys = list(sampler)
    others = [key[3] for key in keys if key[2]]
    assert [sorted(others[n : n + 6]) for n in (0, 6, 12)] == [list(range(6))] * 3
    # fillers change nothing
    without = EpochSampler(20, 4, 4, 1, seed=3, epoch=lambda: 0, beside=6)
    assert list(without) == [key for key in keys if key[2]]


def test_the_paper_has_beta_and_the_teachers_answers() -> None:
    def stage(**given: Any) -> tuple[Any, ...]:
        unlabelled = given.pop("unlabelled", None)
        (planned,) = plan("ia2+sft", AdaptConfig(joint=given, unlabelled=unlabelled))
        return planned.betas, planned.answers, planned.beside, sorted(answered_parts(planned))

    assert stage() == ([None], "ground_truth", False, ["dev", "train"])
    assert stage(betas=[0.1]) == ([0.1], "icl_responses", False, ["dev", "train"])
    on = ["unlabelled", "unlabelled-dev"]
    assert stage(unlabelled="more") == ([None], "ground_truth", True, on)
    assert stage(unlabelled="more", betas=[0.1]) == ([0.1], "ground_truth", True, on)
    assert stage(unlabelled="more", answers="icl_responses")[3] == ["dev", "train", *on]
    with pytest.raises(ValueError, match="answer_weight does nothing beside betas"):
        AdaptConfig(joint={"betas": [0.1], "answer_weight": 1.0})


# ---------------------------------------------------------------------------------------- a constant


def test_the_constant_is_the_mean_of_what_the_context_adds(learner: BaseModel, tmp_path: Path) -> None:
    made = bench(clone(learner), tmp_path, adapter={"bias": True})
    (constant, _) = made.train("constant-sft").stages
    changed = {name for name, value in constant.state.items() if not torch.equal(value, made._initial[name])}
    layers = len(made.teaching.part_targets("unlabelled").layers)
    assert changed == {
        f"base_model.model.model.layers.{i}.self_attn.o_proj.lora_B.bias" for i in range(layers)
    }
    made.use(constant.state)
    # on average nothing is missing at any layer, for rows that it was computed from
    train, held = align_rows(made, UNLABELLED)
    settings = StageSettings(tmp_path / "other")
    again = ConstantTrainer(made.model, train, held, settings, made.tokenizer)
    for place in range(layers):
        assert float(again._missing(place).abs().max()) < 1e-5
    assert constant.dev_loss == pytest.approx(again.evaluate()["eval_loss"])
    made.use(made._initial)
    assert constant.dev_loss < again.evaluate()["eval_loss"]


@pytest.mark.usefixtures("undrawn")
def test_a_constant_survives_saving_and_a_comparison(
    tiny_icl_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: Any
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [(e.query, e.answer or "") for e in ROWS])
    more = write_rows(tmp_path / "more.jsonl", [{"prompt": e.query} for e in MORE])
    given = [*("--model", tiny_icl_model_path, "--data", data, "--unlabelled", more), *FLAGS]
    ran = run(capsys, "train", *given, "--recipe", "constant-sft", "--output-dir", tmp_path / "out")
    assert ran.status == 0, ran.err
    result, base = load_adapter(tmp_path / "out", base=str(tiny_icl_model_path))
    found = result.model(torch.tensor([[5, 6, 7]])).logits
    stage = tmp_path / "out" / "constant" / "lr-0.003"
    assert any("bias" in name for name in read_adapter_state(stage, ""))
    assert not torch.allclose(found, icl_base(tiny_icl_model_path).model(torch.tensor([[5, 6, 7]])).logits)
    ran = run(capsys, "predict", "--adapter", tmp_path / "out", "--data", data)
    assert ran.status == 0, ran.err
    del base
    # beside recipes whose adapters have no bias
    ran = run(
        capsys, "compare", *given, "--recipes", "sft,constant-sft,ia2", "--seeds", "1", "--folds", "2",
        "--output-dir", tmp_path / "compared",
    )  # fmt: skip
    assert ran.status == 0, ran.err
    for fold in ("fold-0", "fold-1"):
        place = tmp_path / "compared" / "seed-0" / fold
        biased = [
            any("bias" in name for name in read_adapter_state(place / stage / "lr-0.003", ""))
            for stage in ("sft", "constant-sft", "align")
        ]
        assert biased == [False, True, False]
    assert not [w for w in recwarn if "lora" in str(w.message).lower()]


def test_a_constant_needs_an_adapter_that_holds_it(learner: BaseModel, tmp_path: Path) -> None:
    config = AdaptConfig(**BRIEF, recipe="constant-sft", adapter={"type": "dora"})
    with pytest.raises(ConfigError) as caught:
        adapt(clone(learner), ROWS, config)
    assert str(caught.value) == (
        "recipe 'constant-sft': its stage constant needs an adapter that adds a vector to outputs: lora or "
        "rslora. Set adapter.type to one of them, or leave the recipe out."
    )
    made = bench(clone(learner), tmp_path, adapter={"bias": True, "target_modules": ["q_proj"]})
    with pytest.raises(ConfigError, match=r"the adapter has no bias there \(layer 0\)"):
        made.train("constant-sft")


# ----------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("recipe", "settings", "said"),
    [
        (
            "pseudo-sft",
            {},
            "recipe 'pseudo-sft': its stage sft needs unlabelled rows. Name some with --unlabelled (in a "
            "grid: unlabelled, a number).",
        ),
        (
            "ia2",
            {"align": {"rows": "unlabelled"}},
            "recipe 'ia2': its stage align needs unlabelled rows. Name some with --unlabelled (in a grid: "
            "unlabelled, a number).",
        ),
        (
            "ia2-sft",
            {"unlabelled": "more", "align": {"only_correct": True}},
            "recipe 'ia2-sft': its stage align learns on unlabelled rows, and only labels tell which answers "
            "are right. Leave out only_correct, or set align.rows to labelled.",
        ),
        (
            "sft",
            {"unlabelled": "more", "sft": {"rows": "both", "ia2_weight": 1.0}},
            "recipe 'sft': its stage sft learns on both rows, on which ia2_weight keeps no alignment. Leave "
            "one of them out, or take the stage joint.",
        ),
    ],
)
def test_what_cannot_work_is_refused(recipe: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(recipe, AdaptConfig(**settings))
    assert str(caught.value) == said


def test_rows_that_settings_name_must_be_given(learner: BaseModel) -> None:
    with pytest.raises(ConfigError, match=r"^unlabelled is more\.jsonl, and no such rows were given"):
        adapt(clone(learner), ROWS, AdaptConfig(unlabelled="more.jsonl"))


# ---------------------------------------------------------------------------------------- a run


def test_a_run_says_how_many_and_a_changed_file_is_another_run(learner: BaseModel, tmp_path: Path) -> None:
    config, out = AdaptConfig(**BRIEF), tmp_path / "out"

    def again(rows: Examples) -> Any:
        return adapt(clone(learner), ROWS[:9], config, test=ROWS[9:], unlabelled=rows, output_dir=out)

    # a test row among them is left out
    first = again(Examples([*MORE[:10], ROWS[9]], name="more")).metrics
    assert (first["num_unlabelled"], first["num_unlabelled_dev"]) == (8, 2)
    assert "| unlabelled rows | 8 (and 2 held out) |" in (out / "README.md").read_text()
    before = tree(out)
    assert again(MORE[:10]).metrics == first and tree(out) == before
    with pytest.raises(Exception, match=r"holds another run \(data of unlabelled differ\)"):
        again(MORE[:9])


@pytest.mark.usefixtures("undrawn")
def test_a_comparison_says_how_many(
    tiny_icl_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": e.query, "completion": e.answer} for e in ROWS])
    more = write_rows(tmp_path / "more.jsonl", [{"prompt": e.query, "completion": "?"} for e in MORE])
    out = tmp_path / "out"
    ran = run(
        capsys, "compare", "--model", tiny_icl_model_path, "--data", data, "--unlabelled", more, "--recipes",
        "sft,ia2-sft,pseudo-sft", "--seeds", "1", "--folds", "2", "--max-unlabelled", "10", *FLAGS,
        "--output-dir", out,
    )  # fmt: skip
    assert ran.status == 0, ran.err
    assert "more.jsonl: labels (completion) are not read." in ran.err
    design = read_json(out / "compare.json")["design"]
    assert (design["num_unlabelled"], design["num_unlabelled_dev"]) == (8, 2)
    assert "8 unlabelled" in (out / "table.md").read_text()


def test_a_grid_draws_them_from_the_rest_of_the_pool(files: Path, tmp_path: Path) -> None:
    made = swept(files, tmp_path / "out", recipes=["sft", "ia2-sft"], unlabelled=[0, 5, 8])
    assert not made.failed
    found = {(r["spec"]["recipe"], r["spec"]["variant"]): r["data"] for r in records(tmp_path / "out")}
    assert {name: data.get("num_unlabelled") for name, data in found.items()} == {
        ("sft", ""): None,
        ("ia2-sft", ""): None,
        ("ia2-sft", "unlabelled=5"): 4,
        ("ia2-sft", "unlabelled=8"): 7,
    }
    again = swept(files, tmp_path / "again", recipes=["ia2-sft"], unlabelled=19)
    assert [failure["error"] for failure in again.failed] == [
        "Two: asked for 19 unlabelled rows, 18 are left beside the labelled ones. Ask for fewer."
    ]


def test_unlabelled_rows_make_cells_of_their_own() -> None:
    cells = cells_of(recipes=["sft", "ia2-sft"], unlabelled=[0, 5, 8])
    assert [cell.spec["variant"] for cell in cells] == ["", "", "unlabelled=5", "unlabelled=8"]
    assert len({cell.key for cell in cells}) == 4
    # without them a cell is what it was
    assert {cell.key for cell in cells_of(recipes=["sft", "ia2-sft"])} < {cell.key for cell in cells}
