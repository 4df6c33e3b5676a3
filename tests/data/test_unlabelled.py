"""Unlabelled rows: which are used, what the teacher answers them, and what a run says of them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.benches import align_rows, bench_of, clone, icl_base, icl_examples, word_examples
from helpers.command_line import names, run, tree, write_rows
from helpers.sweeping import records, swept

from ia2 import AdaptConfig, CompareConfig, Examples, adapt
from ia2.adapters.weights import read_adapter_state
from ia2.config.recipes import UNLABELLED
from ia2.data.examples import Example, FewShotSplit
from ia2.data.unlabelled import distinct, with_unlabelled
from ia2.experiment.rounds import draws
from ia2.experiment.workbench import Workbench
from ia2.models.load import BaseModel
from ia2.utils.errors import ConfigError, DataError
from ia2.utils.files import read_json

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
            assert rows.row(i).answer == (answer,) == teaching.answers(part)[i].ids
            assert rows[i]["target"] is not None


@pytest.mark.parametrize(
    ("recipe", "whole", "cut"),
    [
        ("ia2", {"targets": "store"}, {"targets": "memory"}),
        ("ia2", {"targets": "store"}, {"targets": "online"}),
        ("ia2+sft", {}, {"micro_batch_size": 1}),
    ],
)
def test_where_targets_lie_and_how_a_step_is_cut_changes_nothing(
    recipe: str, whole: dict[str, Any], cut: dict[str, Any], learner: BaseModel, tmp_path: Path
) -> None:
    shared = {"align": {"rows": "both", "epochs": 2}, "batch_size": 3}
    one = bench(clone(learner), tmp_path / "one", **shared, **whole).train(recipe)
    other = bench(clone(learner), tmp_path / "other", **shared, **cut).train(recipe)
    for name, value in one.state.items():
        assert torch.allclose(value, other.state[name], atol=1e-3), name


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
def test_a_constant_survives_a_comparison_beside_adapters_without_bias(
    tiny_icl_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: Any
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [(e.query, e.answer or "") for e in ROWS])
    more = write_rows(tmp_path / "more.jsonl", [{"prompt": e.query, "completion": "?"} for e in MORE])
    ran = run(
        capsys, "compare", "--model", tiny_icl_model_path, "--data", data, "--unlabelled", more, "--recipes",
        "sft,constant-sft,ia2", "--seeds", "1", "--folds", "2", "--max-unlabelled", "10", *FLAGS,
        "--output-dir", tmp_path / "out",
    )  # fmt: skip
    assert ran.status == 0, ran.err
    biased = []
    for stage in ("sft", "constant-sft", "align"):
        state = read_adapter_state(tmp_path / "out" / "seed-0" / "fold-0" / stage / "lr-0.003", "")
        biased.append(any("bias" in name for name in state))
    assert biased == [False, True, False]
    assert not [w for w in recwarn if "lora" in str(w.message).lower()]
    # and it says which rows it used
    assert "more.jsonl: labels (completion) are not read." in ran.err
    design = read_json(tmp_path / "out" / "compare.json")["design"]
    assert (design["num_unlabelled"], design["num_unlabelled_dev"]) == (8, 2)
    assert "8 unlabelled" in (tmp_path / "out" / "table.md").read_text()


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
