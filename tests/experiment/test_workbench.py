"""What recipes share: targets that are reused or refused, stages, the choice of a rate."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
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
    taught,
    word_examples,
    wordy_model,
)

from ia2.adapters.weights import adapter_state
from ia2.data.examples import Example, Examples
from ia2.experiment.workbench import StageResult, Workbench
from ia2.models.load import BaseModel
from ia2.teacher.cache import TeacherCache
from ia2.utils.errors import ConfigError, DataError, RunFolderError

ROWS = icl_examples(9)
SHORT = {"align": {"epochs": 2}, "sft": {"epochs": 2}}


@pytest.fixture(scope="module")
def model(tiny_icl_model_path: Path) -> BaseModel:
    return icl_base(tiny_icl_model_path)


def made(model: BaseModel, folder: Path, rows: Any = ROWS, **settings: Any) -> Workbench:
    return bench_of(clone(model), rows[:6], rows[6:], folder, **{**SHORT, **settings})


# -------------------------------------------------------------------------------------- targets


def test_targets_are_found_again(model: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = made(model, tmp_path, targets="store")
    train, dev = taught(first)
    seconds = first.teaching.seconds("train")
    assert seconds > 0
    monkeypatch.setattr("ia2.teacher.teacher.answer_pass", None)  # nothing may be computed again
    again = made(model, tmp_path, targets="store")
    for old, new in zip((train, dev), taught(again), strict=True):
        assert old.answers == new.answers and old.rms == new.rms
        assert all(torch.equal(old.get(i), new.get(i)) for i in range(len(old.answers)))
    assert again.teaching.seconds("train") == seconds  # what it cost when it was made


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, {"contexts", "seed"}),
        ({"rows": icl_examples(9, seed=1)}, {"data", "queries"}),
        ({"model": "other"}, {"model"}),
        ({"context_draws": 2}, {"contexts", "permutations"}),
        ({"separator": "\n"}, {"answers", "contexts"}),
        ({"task": "generation", "max_answer_tokens": 3}, {"answers"}),
    ],
)
def test_targets_of_something_else_are_refused(
    change: dict[str, Any], named: set[str], model: BaseModel, tmp_path: Path
) -> None:
    taught(made(model, tmp_path, targets="store"))
    other = clone(model)
    if "model" in change:
        other.identity["weights"] = "others"
    settings = {k: v for k, v in change.items() if k not in ("rows", "model")}
    bench = made(other, tmp_path, change.get("rows", ROWS), targets="store", **settings)
    with pytest.raises(RunFolderError, match="these differ: ") as caught:
        taught(bench)
    told = str(caught.value).split("these differ: ")[1].split(". Choose")[0].split(", ")
    assert named <= set(told) <= named | {"contexts"}


def test_targets_are_kept_where_there_is_room(
    model: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = made(model, tmp_path)
    needed = bench.teaching.target_bytes()
    assert needed == (6 + 3) * 4 * 64 * 4  # rows · layers · width · bytes
    sampled = made(model, tmp_path, context_draws=3, permutation_targets="sample")
    assert sampled.teaching.target_bytes() == 3 * needed
    for free, mode in ((4 * needed, "store"), (4 * needed - 4, "online")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        assert made(model, tmp_path).teaching.mode() == mode


def test_averages_cannot_be_computed_online(
    model: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    bench = made(model, tmp_path, context_draws=2)
    with pytest.raises(ConfigError, match="permutation_targets to sample"):
        taught(bench)


def test_what_the_teacher_answers_rightly(model: BaseModel, tmp_path: Path, word_tokenizer: Any) -> None:
    assert made(model, tmp_path / "a", targets="memory").teaching.correct() == list(range(6))
    rows = word_examples(6, label_words=3)
    free = bench_of(
        base_of(wordy_model(), word_tokenizer),
        rows[:4],
        rows[4:],
        tmp_path / "b",
        task="generation",
        max_answer_tokens=6,
    )
    texts = [answer.text.strip() for answer in free.teaching.answers("train")]
    right = [i for i, text in enumerate(texts) if text == (rows[i].answer or "").strip()]
    assert free.teaching.correct() == right


def test_rows_of_the_stages(word_tokenizer: Any, tmp_path: Path) -> None:
    """Alignment runs on the teacher's answers, fine-tuning on the true ones with an end appended."""
    rows = word_examples(9, label_words=3)
    bench = bench_of(
        base_of(wordy_model(), word_tokenizer),
        rows[:6],
        rows[6:],
        tmp_path,
        task="generation",
        max_answer_tokens=6,
        targets="memory",
    )
    align, sft = align_rows(bench), bench.sft_rows()
    for part, examples in enumerate((rows[:6], rows[6:])):
        answers = taught(bench)[part].answers
        assert [row.answer for row in rows_of(align[part])] == [answer.ids for answer in answers]
        for row, aligned, example in zip(rows_of(sft[part]), rows_of(align[part]), examples, strict=True):
            assert row.query == aligned.query == tuple(word_tokenizer(example.query)["input_ids"])
            assert row.answer == (*word_tokenizer(example.answer)["input_ids"], 2)


# --------------------------------------------------------------------------------------- stages


def test_recipes_share_the_alignment_stage(model: BaseModel, tmp_path: Path) -> None:
    bench = made(model, tmp_path)
    aligned = bench.train("ia2")
    before = (aligned.stages[0].folder / "stage.json").stat().st_mtime_ns
    both = bench.train("ia2-sft")
    plain = bench.train("sft")
    assert [s.folder.parent.name for s in both.stages] == ["align", "align-sft"]
    assert plain.stages[0].folder.parent.name == "sft"
    assert (aligned.stages[0].folder / "stage.json").stat().st_mtime_ns == before
    assert all(torch.equal(t, both.stages[0].state[n]) for n, t in aligned.state.items())
    # the second stage went on from the first; plain fine-tuning started afresh
    assert any(not torch.equal(t, plain.state[n]) for n, t in both.state.items())
    assert all(torch.equal(t, plain.state[n]) for n, t in adapter_state(bench.model).items())


def test_stages_by_content_are_shared_by_whatever_has_them_in_common(
    model: BaseModel, tmp_path: Path
) -> None:
    bench = made(model, tmp_path, learning_rates=[1e-3])
    bench.by_content = True
    plain = bench.train("ia2-sft")
    bench.config = bench.config.model_copy(
        update={"sft": bench.config.sft.model_copy(update={"learning_rate": 1e-4})}
    )
    gentle = bench.train("ia2-sft")
    assert plain.stages[0].folder == gentle.stages[0].folder, "the same alignment"
    assert plain.stages[1].folder != gentle.stages[1].folder
    assert bench.train("ia2").stages[0].folder == plain.stages[0].folder
    assert len(list((tmp_path / "stages").iterdir())) == 3
    assert any(not torch.equal(plain.state[k], gentle.state[k]) for k in plain.state)


def test_order_of_recipes_does_not_matter(model: BaseModel, tmp_path: Path) -> None:
    one, other = made(model, tmp_path / "one"), made(model, tmp_path / "other")
    states = {r: one.train(r).state for r in ("ia2-sft", "sft")}
    for recipe in ("sft", "ia2-sft"):
        state = other.train(recipe).state
        assert all(torch.equal(t, states[recipe][n]) for n, t in state.items())


def test_a_finished_stage_is_reused_by_the_same_run_only(model: BaseModel, tmp_path: Path) -> None:
    first = made(model, tmp_path).train("sft")
    # these change how the work is cut, not its result
    again = made(model, tmp_path, micro_batch_size=2, activation_checkpointing=True, checkpoint_every=3)
    found = again.train("sft")
    assert all(torch.equal(t, found.state[n]) for n, t in first.state.items())
    assert found.stages[0].seconds == first.stages[0].seconds
    for change in ({"batch_size": 2}, {"seed": 1}, {"sft": {"epochs": 3}}, {"adapter": {"alpha": 16}}):
        with pytest.raises(RunFolderError, match="trained with other settings or data"):
            made(model, tmp_path, **change).train("sft")
    with pytest.raises(RunFolderError, match="trained with other settings or data"):
        made(model, tmp_path, icl_examples(9, seed=3)).train("sft")


def result(folder: Path, rate: float, loss: float) -> StageResult:
    state, diverged = {"rate": torch.tensor(rate)}, None if loss == loss else 1
    return StageResult("sft", rate, loss, 1, 0.0, folder, "", state, [], None, loss, diverged)


@pytest.mark.parametrize(
    ("losses", "chosen"),
    [
        ([0.5, 0.3, 0.4], 0.2),
        ([0.3, 0.3, 0.4], 0.1),  # the first of equals
        ([float("nan"), 0.3, 0.4], 0.2),  # a rate that diverged is never the best
        ([0.5, float("nan"), 0.4], 0.3),
    ],
)
def test_the_rate_of_the_best_dev_loss_is_chosen(
    losses: list[float],
    chosen: float,
    model: BaseModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rates = [0.1, 0.2, 0.3]
    bench = made(model, tmp_path, learning_rates=rates)
    by_rate = dict(zip(rates, losses, strict=True))
    monkeypatch.setattr(bench, "_stage", lambda stage, chain, rate, *_: result(tmp_path, rate, by_rate[rate]))
    used: list[Any] = []
    monkeypatch.setattr(bench, "use", used.append)
    best = bench.train("sft")
    assert best.learning_rate == chosen and best.selected_by == "dev loss"
    assert used == [best.state] and float(best.state["rate"]) == pytest.approx(chosen)
    assert [str(v) for v in best.tried.values()] == [str(v) for v in losses]


def test_without_dev_rows_the_first_rate_is_taken(model: BaseModel, tmp_path: Path) -> None:
    bench = bench_of(clone(model), ROWS, ROWS[:0], tmp_path, learning_rates=[1e-3, 1e-2], sft={"epochs": 1})
    best = bench.train("sft")
    assert (best.learning_rate, best.selected_by) == (1e-3, "first (no dev rows)")
    assert all(torch.equal(t, best.state[n]) for n, t in adapter_state(bench.model).items())


def test_a_stage_may_have_its_own_rate(model: BaseModel, tmp_path: Path) -> None:
    common = {"learning_rates": [1e-3], "sft": {"epochs": 2, "learning_rate": 2e-3}}
    own = made(model, tmp_path / "own", **common).train("sft")
    same = made(model, tmp_path / "same", learning_rates=[2e-3]).train("sft")
    assert all(torch.equal(t, same.state[n]) for n, t in own.state.items())


# -------------------------------------------------------------------------------------- the model


def test_closing_gives_the_base_back(model: BaseModel, tmp_path: Path) -> None:
    base = clone(model)
    ids = torch.tensor([[1, 5, 9, 12]])
    before, names = base.model(ids).logits, set(dict(base.model.named_parameters()))
    bench = bench_of(base, ROWS[:6], ROWS[6:], tmp_path, randomise=True)
    assert not torch.allclose(bench.model(ids).logits, before)
    bench.close()
    assert torch.equal(base.model(ids).logits, before)
    assert set(dict(base.model.named_parameters())) == names
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_the_same_seed_starts_from_the_same_adapter(model: BaseModel, tmp_path: Path) -> None:
    states = [adapter_state(made(model, tmp_path, seed=seed).model) for seed in (0, 0, 1)]
    assert all(torch.equal(t, states[1][n]) for n, t in states[0].items())
    assert any(not torch.equal(t, states[2][n]) for n, t in states[0].items())


def test_one_example_cannot_be_demonstrated(model: BaseModel, tmp_path: Path) -> None:
    bench = made(model, tmp_path)
    bench.data = type(bench.data)(ROWS[:1], ROWS[1:])
    with pytest.raises(DataError, match="at least two training examples"):
        Workbench(clone(model), bench.data, bench.task, bench.config, tmp_path)


@pytest.mark.parametrize(
    ("right", "labels", "said"),
    [
        (3, "aabb", None),
        (2, "aabb", "so few rows cannot tell"),
        (10, "a" * 16 + "b" * 16, "alignment is unlikely to help"),
    ],
)
def test_what_is_said_of_icl_before_training(
    right: int, labels: str, said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    rows = Examples([Example(f"q{i}", label, f"row {i}") for i, label in enumerate(labels)], name="rows")
    teaching = SimpleNamespace(
        examples={"train": rows},
        _judged=False,
        task=SimpleNamespace(kind="classification"),
        correct=lambda _: range(right),
    )
    with caplog.at_level(logging.WARNING, "ia2"):
        TeacherCache.warn_if_icl_fails(teaching)  # type: ignore[arg-type]
    assert len(caplog.messages) == (said is not None)
    assert said is None or said in caplog.messages[0]
