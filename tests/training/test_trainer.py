"""The trainer: what is frozen, when it stops, which weights it ends with, what an epoch is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.benches import (
    align_rows,
    align_trainer,
    base_of,
    bench_of,
    icl_base,
    icl_examples,
    trainer_of,
    word_examples,
    wordy_model,
)

from ia2.adapters.weights import adapter_state, load_adapter_state
from ia2.experiment.workbench import Workbench
from ia2.training.best_weights import last_complete_checkpoint
from ia2.training.dataset import AnswerDataset, EpochSampler, fed_rows
from ia2.training.losses import AlignmentLoss, AnswerLoss
from ia2.training.trainer import ExampleTrainer
from ia2.utils.errors import ConfigError


@pytest.fixture
def bench(tiny_icl_model_path: Path, tmp_path: Path) -> Workbench:
    """The small trained model with ten training and five dev examples."""
    return learner(tiny_icl_model_path, tmp_path / "run", 10, 5)


def learner(path: Path, folder: Path, train: int = 6, dev: int = 3, **settings: Any) -> Workbench:
    rows = icl_examples(train + dev)
    settings = {"targets": "memory", **settings}
    return bench_of(icl_base(path), rows[:train], rows[train:], folder, **settings)


def made(bench: Workbench, kind: str, folder: Path, **changes: Any) -> ExampleTrainer:
    """A trainer of either kind; ``changes`` are of its stage, but for the rate and ``config``."""
    options = {"learning_rate": changes.pop("learning_rate", 3e-3), **changes.pop("config", {})}
    stage = {"epochs": 4, **changes}
    if kind == "align":
        return align_trainer(bench, align_rows(bench), folder, align=stage, **options)
    return trainer_of(bench, AnswerLoss(), bench.sft_rows(), folder, stage=stage, **options)


def evaluations(trainer: ExampleTrainer) -> dict[int, float]:
    return {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}


@pytest.mark.parametrize(("kind", "ratio"), [("align", 0.5), ("sft", 0.3)])
def test_training_lowers_the_loss_and_moves_the_adapter_alone(
    kind: str, ratio: float, bench: Workbench, tmp_path: Path
) -> None:
    base = {n: p.clone() for n, p in bench.model.named_parameters() if "lora" not in n}
    trainer = made(bench, kind, tmp_path, epochs=30, learning_rate=5e-3 if kind == "align" else 1e-2)
    before = trainer._dev_loss(trainer.train_dataset)
    best = trainer.fit()
    assert trainer._dev_loss(trainer.train_dataset) < ratio * before
    assert best == pytest.approx(trainer._dev_loss(trainer.eval_dataset), rel=1e-5)
    assert all(torch.equal(p, base[n]) for n, p in bench.model.named_parameters() if n in base)
    # the paper's optimiser
    assert type(trainer.optimizer.optimizer).__name__ == "AdamW"
    assert (trainer.args.max_grad_norm, trainer.args.train_batch_size) == (0, 4)
    for group in trainer.optimizer.param_groups:
        assert (group["weight_decay"], group["lr"]) == (0, 5e-3 if kind == "align" else 1e-2)


def test_adapters_behind_the_last_attention_are_frozen_meanwhile(
    tiny_icl_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = {"target_modules": ["q_proj", "o_proj", "down_proj"]}
    bench = learner(tiny_icl_model_path, tmp_path, adapter=adapter)
    initial = adapter_state(bench.model)
    parameters = dict(bench.model.named_parameters())

    def free() -> set[str]:
        return {name for name, parameter in parameters.items() if parameter.requires_grad}

    whole = free()
    trainer = made(bench, "align", tmp_path)
    assert whole - free() == {n for n in whole if "layers.3.mlp" in n} and len(whole - free()) == 2
    trainer.fit()
    assert free() == whole
    moved = {n for n, t in adapter_state(bench.model).items() if not torch.equal(t, initial[n])}
    assert moved == {n for n in initial if "layers.3.mlp" not in n}
    # free again when training fails, too
    trainer = made(bench, "align", tmp_path)
    monkeypatch.setattr(AlignmentLoss, "compare", None)
    with pytest.raises(TypeError):
        trainer.fit()
    assert free() == whole


def test_what_cannot_be_aligned_is_refused(
    bench: Workbench, tiny_icl_model_path: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="needs targets"):
        align_trainer(bench, bench.sft_rows(), tmp_path)
    peft = {"peft_type": "LORA", "r": 2, "target_modules": ["down_proj"], "task_type": "CAUSAL_LM"}
    behind = learner(tiny_icl_model_path, tmp_path, adapter={"peft": {**peft, "layers_to_transform": [3]}})
    with pytest.raises(ConfigError, match="no adapter weight lies on a path"):
        made(behind, "align", tmp_path)


def test_the_head_runs_at_answer_positions_only(word_tokenizer: Any, tmp_path: Path) -> None:
    rows = word_examples(12, label_words=3)
    settings = {"task": "generation", "max_answer_tokens": 7, "targets": "memory"}
    bench = bench_of(base_of(wordy_model(), word_tokenizer), rows[:8], rows[8:], tmp_path, **settings)
    seen: list[int] = []
    head = bench.model.get_output_embeddings()
    head.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    for kind in ("sft", "align"):
        trainer = made(bench, kind, tmp_path)
        seen.clear()
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
        trainer.loss(bench.model, batch)
        fed = fed_rows(batch)
        assert seen == [1 if kind == "align" else sum(fed.answer_lengths)] != [fed.input_ids.numel()]


def test_recomputation_really_happens(bench: Workbench, tmp_path: Path) -> None:
    calls = {}
    for on in (False, True):
        config = {"activation_checkpointing": on}
        trainer = made(bench, "align", tmp_path, epochs=1, eval_every=99, config=config)
        count: list[int] = []
        # before, not after: recomputation stops as soon as it has what the backward pass needs
        layer = bench.base.model.model.layers[0].mlp
        handle = layer.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        trainer.fit()
        handle.remove()
        calls[on] = len(count)
    assert calls[True] == calls[False] + 3  # once more in each of the three steps
    assert not bench.base.model.is_gradient_checkpointing


def test_dropout_is_off_for_the_online_teacher(tiny_icl_model_path: Path, tmp_path: Path) -> None:
    bench = learner(tiny_icl_model_path, tmp_path, targets="online", adapter={"dropout": 0.5}, randomise=True)
    trainer = made(bench, "align", tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    stored = bench.teaching.teacher().teach(bench.train_contexts)
    bench.model.train()
    online = trainer.loss.teacher(batch)  # type: ignore[attr-defined]
    assert bench.model.training and not online.requires_grad
    expected = torch.cat([stored.get(i) for i in range(6)], dim=1)
    torch.testing.assert_close(online, expected, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------- early stopping


@pytest.mark.parametrize("restore", [True, False])
def test_restore_best(restore: bool, bench: Workbench, tmp_path: Path) -> None:
    """With an absurd rate the dev loss gets worse at once; the best weights come back, or not."""
    states: dict[int, dict[str, torch.Tensor]] = {}
    trainer = made(bench, "align", tmp_path, learning_rate=0.3, restore_best=restore, patience=3, epochs=20)
    evaluate = trainer._dev_loss

    def recording(dataset: AnswerDataset) -> float:
        states[trainer.state.global_step] = adapter_state(bench.model)
        return evaluate(dataset)

    trainer._dev_loss = recording  # type: ignore[method-assign]
    best = trainer.fit()
    losses = evaluations(trainer)
    best_step, last_step = min(losses, key=lambda step: losses[step]), max(losses)
    assert best_step < last_step, "the dev loss ought to have worsened"
    assert best == losses[best_step] and trainer.best.step == best_step
    expected = states[best_step if restore else last_step]
    assert all(torch.equal(t, expected[n]) for n, t in adapter_state(bench.model).items())


@pytest.mark.parametrize("eval_every", [None, 2])
def test_patience_counts_evaluations_and_none_is_made_twice(
    eval_every: int | None, bench: Workbench, tmp_path: Path
) -> None:
    """Ten examples, four a step: three steps an epoch."""
    trainer = made(bench, "sft", tmp_path, eval_every=eval_every, patience=4, epochs=50)
    scripted = iter([1.0, 0.8, 0.9, 0.9, 0.7, *[0.7] * 100])
    trainer._dev_loss = lambda dataset: next(scripted)  # type: ignore[method-assign]
    assert trainer.fit() == 0.7
    every = eval_every or 3  # five dev rows may cost an evaluation an epoch
    due = [0, *(s for s in range(1, 151) if s % every == 0 or s % 3 == 0)]
    # the fifth is the best; four more without improvement, or about as many steps
    steps = list(evaluations(trainer))
    assert steps == due[: 5 + (4 if eval_every else 3)]
    assert (trainer.state.global_step, trainer.best.step) == (steps[-1], due[4])


def test_without_dev_rows_nothing_is_evaluated(bench: Workbench, tmp_path: Path) -> None:
    before = adapter_state(bench.model)
    rows = (bench.sft_rows()[0], AnswerDataset.of([]))
    trainer = trainer_of(bench, AnswerLoss(), rows, tmp_path, stage={"epochs": 3})
    assert str(trainer.fit()) == "nan"
    assert not evaluations(trainer) and trainer.state.global_step == 9
    assert any(not torch.equal(t, before[n]) for n, t in adapter_state(bench.model).items())


# ------------------------------------------------------------------------------------- resuming


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("kill_at", "patience"), [(3, 99), (12, 99), (4, 3), (9, 3)])
def test_resumed_at_any_step_it_ends_the_same(
    kill_at: int, patience: int, bench: Workbench, tmp_path: Path
) -> None:
    """Also at an epoch's end that no regular evaluation falls on, and where a stage stops early."""
    initial = adapter_state(bench.model)
    due = [0, 2, 3, 4, 6, 8, 9, 10, 12]
    script = dict(zip(due, [2.0, 1.0, 0.9, 0.8, 0.85, 0.84, 0.83, 0.7, 0.6], strict=True))
    results = []
    for name in ("whole", "killed"):
        steps: list[int] = []

        def started(name: str = name, steps: list[int] = steps) -> ExampleTrainer:
            load_adapter_state(bench.model, initial)
            trainer = made(
                bench,
                "align",
                tmp_path / name,
                eval_every=2,
                patience=patience,
                config={"checkpoint_every": 1},
            )

            def loss(dataset: AnswerDataset) -> float:
                steps.append(trainer.state.global_step)
                return script[steps[-1]]

            trainer._dev_loss = loss  # type: ignore[method-assign]
            return trainer

        trainer = started()
        if name == "killed":
            save = trainer.best.on_save

            def dying(args: Any, state: Any, *rest: Any, save: Any = save, **kwargs: Any) -> None:
                save(args, state, *rest, **kwargs)
                if state.global_step == kill_at:
                    raise Killed

            trainer.best.on_save = dying  # type: ignore[method-assign]
            if patience == 3 and kill_at == 9:  # it stops there, which leaves no checkpoint
                trainer.fit()
            else:
                with pytest.raises(Killed):
                    trainer.fit()
                trainer = started()
        if not (name == "killed" and patience == 3 and kill_at == 9):
            trainer.fit()
        results.append((adapter_state(bench.model), trainer.best.loss, trainer.best.step, steps))
        assert not list((tmp_path / name / "stage").glob("checkpoint-*"))
        assert trainer.state.global_step == (9 if patience == 3 else 12)
    assert results[0][1:] == results[1][1:]
    assert all(torch.equal(tensor, results[1][0][name]) for name, tensor in results[0][0].items())


def test_an_unfinished_checkpoint_is_not_resumed_from(tmp_path: Path) -> None:
    assert last_complete_checkpoint(tmp_path) is None
    for step, complete in ((5, True), (10, True), (15, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if complete:
            (folder / "complete.json").write_text("{}")
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


# --------------------------------------------------------------------------------------- epochs


@pytest.mark.parametrize(("count", "per_step", "slots"), [(10, 4, 4), (10, 4, 6), (7, 7, 8), (5, 1, 2)])
def test_an_epoch_holds_every_example_once(count: int, per_step: int, slots: int) -> None:
    sampler = EpochSampler(count, per_step, slots, 1, seed=3, epoch=lambda: 0)
    keys = list(sampler)
    assert len(keys) == len(sampler) == sampler.steps * slots
    assert sorted(i for i, _, weight in keys if weight) == list(range(count))
    for start in range(0, len(keys), slots):
        real = [weight for _, _, weight in keys[start : start + slots]]
        assert sum(real) == min(per_step, count - start // slots * per_step)
        assert set(real) <= {0.0, 1.0} and real == sorted(real, reverse=True)


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int, slots: int = 4) -> list[Any]:
        return [key for key in EpochSampler(20, 4, slots, 3, seed, lambda: epoch, beside=6) if key[2]]

    assert order(0, 0) == order(0, 0) not in (order(0, 1), order(1, 0))
    # how micro-batches and processes cut a step does not matter
    assert order(0, 2, 6) == order(0, 2)
    # rows of another loss come equally often
    others = [key[3] for key in order(0, 2)]
    assert [sorted(others[n : n + 6]) for n in (0, 6, 12)] == [list(range(6))] * 3


def test_sampled_permutations_change_from_epoch_to_epoch(tiny_icl_model_path: Path, tmp_path: Path) -> None:
    sampled = {"context_draws": 4, "permutation_targets": "sample"}
    bench = learner(tiny_icl_model_path, tmp_path, **sampled)
    trainer = made(bench, "align", tmp_path, epochs=6)
    drawn: list[tuple[int, ...]] = []
    get = trainer.train_dataset.targets.get
    trainer.train_dataset.targets.get = lambda i, k=0: drawn.append((i, k)) or get(i, k)
    trainer.fit()
    real = [dict(drawn[start : start + 8]) for start in range(0, len(drawn), 8)]
    assert len(real) == 6 and all(len(epoch) == 6 for epoch in real)
    assert {k for epoch in real for k in epoch.values()} == {0, 1, 2, 3}
    # the dev loss is the mean over all orders
    dev = trainer.eval_dataset
    by_order = []
    for k in range(4):
        batch = trainer.data_collator([dev[(i, k, 1.0)] for i in range(len(dev))])
        by_order.append(float(trainer.loss(bench.model, batch).mean().detach()))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(by_order) / 4, rel=1e-5)
    assert max(by_order) - min(by_order) > 1e-4
