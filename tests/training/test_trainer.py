"""Stages: what is frozen, when they stop, which weights they end with, what an epoch is."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.benches import align_rows, base_of, bench_of, icl_base, icl_examples, word_examples, wordy_model

from ia2.adapters.weights import adapter_state
from ia2.experiment.workbench import Workbench
from ia2.training.dataset import AnswerDataset, EpochSampler, parts_of
from ia2.training.trainer import (
    AlignTrainer,
    ExampleTrainer,
    SftTrainer,
    StageSettings,
    last_complete_checkpoint,
)
from ia2.utils.errors import ConfigError


@pytest.fixture
def bench(tiny_icl_model_path: Path, tmp_path: Path) -> Workbench:
    """The small trained model with ten training and five dev examples."""
    rows = icl_examples(15)
    return bench_of(icl_base(tiny_icl_model_path), rows[:10], rows[10:], tmp_path / "run", targets="memory")


def trainer_of(bench: Workbench, kind: str, folder: Path, dev: bool = True, **changes: Any) -> ExampleTrainer:
    train, held = align_rows(bench) if kind == "align" else bench.sft_rows()
    settings = StageSettings(folder / "stage", **{"learning_rate": 3e-3, "epochs": 4, **changes})
    cls = AlignTrainer if kind == "align" else SftTrainer
    return cls(bench.model, train, held if dev else AnswerDataset.of([]), settings, bench.tokenizer)


def evaluations(trainer: ExampleTrainer) -> list[tuple[int, float]]:
    return [(e["step"], e["eval_loss"]) for e in trainer.state.log_history if "eval_loss" in e]


def loss_of(trainer: ExampleTrainer, dataset: AnswerDataset) -> float:
    return trainer._mean_loss(dataset)


# -------------------------------------------------------------------------------- does it learn


@pytest.mark.parametrize("objective", ["mse", "kl", "cosine"])
def test_alignment_lowers_l_ia2(objective: str, bench: Workbench, tmp_path: Path) -> None:
    train, dev = align_rows(bench)
    settings = StageSettings(tmp_path / "stage", learning_rate=5e-3, epochs=30)
    trainer = AlignTrainer(bench.model, train, dev, settings, bench.tokenizer, objective=objective)
    before = [loss_of(trainer, part) for part in (train, dev)]
    best = trainer.fit()
    after = [loss_of(trainer, part) for part in (train, dev)]
    assert after[0] < 0.5 * before[0]
    assert after[1] < 0.7 * before[1]
    assert best == pytest.approx(after[1], rel=1e-5)


def test_fine_tuning_lowers_cross_entropy(bench: Workbench, tmp_path: Path) -> None:
    trainer = trainer_of(bench, "sft", tmp_path, learning_rate=1e-2, epochs=30)
    before = loss_of(trainer, trainer.train_dataset)
    trainer.fit()
    assert loss_of(trainer, trainer.train_dataset) < 0.3 * before
    assert before > 1


def test_only_the_adapter_learns(bench: Workbench, tmp_path: Path) -> None:
    base = {n: p.clone() for n, p in bench.model.named_parameters() if "lora" not in n}
    for kind in ("align", "sft"):
        trainer_of(bench, kind, tmp_path, epochs=2).fit()
    assert all(torch.equal(p, base[n]) for n, p in bench.model.named_parameters() if n in base)
    assert any(float(t.abs().max()) > 0 for n, t in adapter_state(bench.model).items() if "lora_B" in n)


def test_paper_optimiser(bench: Workbench, tmp_path: Path) -> None:
    trainer = trainer_of(bench, "sft", tmp_path, epochs=2)
    trainer.fit()
    assert type(trainer.optimizer.optimizer).__name__ == "AdamW"
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0}
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {3e-3}
    assert trainer.args.max_grad_norm == 0 and trainer.args.train_batch_size == 4


# ------------------------------------------------------------------------------------- freezing


def test_adapters_behind_the_last_attention_are_frozen_meanwhile(
    tiny_icl_model_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = icl_examples(9)
    adapter = {"target_modules": ["q_proj", "o_proj", "down_proj"]}
    bench = bench_of(
        icl_base(tiny_icl_model_path), rows[:6], rows[6:], tmp_path, adapter=adapter, targets="memory"
    )
    initial = adapter_state(bench.model)
    last = [n for n, _ in bench.model.named_parameters() if "layers.3.mlp" in n and "lora" in n]
    parameters = dict(bench.model.named_parameters())
    everything = {n for n, p in parameters.items() if p.requires_grad}
    assert len(last) == 2
    with caplog.at_level(logging.INFO, "ia2"):
        trainer = trainer_of(bench, "align", tmp_path)
    assert {n for n, p in parameters.items() if p.requires_grad} == everything - set(last)
    lines = [r.getMessage() for r in caplog.records if "frozen" in r.getMessage()]
    assert len(lines) == 1 and lines[0].startswith("Alignment: 2 of 24 trained tensors")
    trainer.fit()
    assert {n for n, p in parameters.items() if p.requires_grad} == everything
    state = adapter_state(bench.model)
    moved = {n for n, t in state.items() if not torch.equal(t, initial[n])}
    assert moved == {n for n in state if "layers.3.mlp" not in n}
    # fine-tuning moves all of them
    trainer_of(bench, "sft", tmp_path).fit()
    assert all(not torch.equal(t, state[n]) for n, t in adapter_state(bench.model).items())


def test_freezing_ends_when_training_fails(bench: Workbench, tmp_path: Path) -> None:
    trainer = trainer_of(bench, "align", tmp_path)
    frozen = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
    trainer._pathless = [frozen]
    trainer.example_losses = None  # type: ignore[method-assign]
    with pytest.raises(TypeError):
        trainer.fit()
    assert frozen.requires_grad


def test_nothing_to_align_is_an_error(tiny_icl_model_path: Path, tmp_path: Path) -> None:
    rows = icl_examples(6)
    adapter = {
        "peft": {
            "peft_type": "LORA",
            "r": 2,
            "target_modules": ["down_proj"],
            "layers_to_transform": [3],
            "task_type": "CAUSAL_LM",
        }
    }
    bench = bench_of(
        icl_base(tiny_icl_model_path), rows[:4], rows[4:], tmp_path, adapter=adapter, targets="memory"
    )
    with pytest.raises(ConfigError, match="no adapter weight lies on a path"):
        trainer_of(bench, "align", tmp_path)


# ------------------------------------------------------------------------------------ the head


def test_the_head_runs_at_answer_positions_only(word_tokenizer: Any, tmp_path: Path) -> None:
    rows = word_examples(12, label_words=3)
    bench = bench_of(
        base_of(wordy_model(), word_tokenizer),
        rows[:8],
        rows[8:],
        tmp_path,
        task="generation",
        max_answer_tokens=7,
        targets="memory",
    )
    seen: list[int] = []
    head = bench.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    for kind in ("sft", "align"):
        trainer = trainer_of(bench, kind, tmp_path)
        seen.clear()
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
        trainer.example_losses(bench.model, batch)
        if kind == "align":
            assert seen == [1]
            continue
        answers = [g for part in parts_of(batch) for g in part.answer_lengths]
        assert seen == [sum(answers)]
        assert seen[0] < sum(part.input_ids.numel() for part in parts_of(batch))
    handle.remove()


def test_recomputation_really_happens(bench: Workbench, tmp_path: Path) -> None:
    calls = {}
    for on in (False, True):
        trainer = trainer_of(bench, "align", tmp_path, epochs=1, activation_checkpointing=on, eval_every=99)
        count = [0]
        # before, not after: recomputation stops as soon as it has what the backward pass needs
        layer = bench.base.model.model.layers[0].mlp
        handle = layer.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        trainer.fit()
        handle.remove()
        calls[on] = count[0]
    assert calls[True] == calls[False] + 3  # once more in each of the three steps
    assert not bench.base.model.is_gradient_checkpointing


# -------------------------------------------------------------------------------- early stopping


@pytest.mark.parametrize("kind", ["align", "sft"])
@pytest.mark.parametrize("restore", [True, False])
def test_restore_best(kind: str, restore: bool, bench: Workbench, tmp_path: Path) -> None:
    """With an absurd rate the dev loss gets worse at once; the best weights come back, or not."""
    states: dict[int, dict[str, torch.Tensor]] = {}
    trainer = trainer_of(
        bench, kind, tmp_path, learning_rate=0.3, restore_best=restore, patience=3, epochs=20
    )
    evaluate = trainer._mean_loss

    def recording(dataset: AnswerDataset) -> float:
        states[trainer.state.global_step] = adapter_state(bench.model)
        return evaluate(dataset)

    trainer._mean_loss = recording  # type: ignore[method-assign]
    best = trainer.fit()
    losses = dict(evaluations(trainer))
    best_step = min(losses, key=lambda step: losses[step])
    last_step = max(losses)
    assert best_step < last_step, "the dev loss ought to have worsened"
    assert best == losses[best_step] and trainer.best.step == best_step
    expected = states[best_step if restore else last_step]
    assert all(torch.equal(t, expected[n]) for n, t in adapter_state(bench.model).items())
    assert evaluate(trainer.eval_dataset) == losses[best_step if restore else last_step]


@pytest.mark.parametrize("eval_every", [None, 1, 2, 4])
def test_patience_counts_evaluations_and_none_is_made_twice(
    eval_every: int | None, bench: Workbench, tmp_path: Path
) -> None:
    """Ten examples, four a step: three steps an epoch."""
    trainer = trainer_of(bench, "sft", tmp_path, eval_every=eval_every, patience=4, epochs=50)
    scripted = iter([1.0, 0.8, 0.9, 0.9, 0.7, *[0.7] * 100])
    trainer._mean_loss = lambda dataset: next(scripted)  # type: ignore[method-assign]
    assert trainer.fit() == 0.7
    steps = [step for step, _ in evaluations(trainer)]
    # five dev rows may cost an evaluation an epoch
    every = eval_every or 3
    due = [0, *(s for s in range(1, 151) if s % every == 0 or s % 3 == 0)]
    # the fifth is the best; four more without improvement, or about as many steps
    assert steps == due[: 5 + (4 if eval_every else 3)]
    assert trainer.state.global_step == steps[-1]
    assert trainer.best.step == due[4]


def test_without_dev_rows_nothing_is_evaluated(bench: Workbench, tmp_path: Path) -> None:
    for kind in ("align", "sft"):
        trainer = trainer_of(bench, kind, tmp_path, dev=False, epochs=3)
        before = adapter_state(bench.model)
        assert str(trainer.fit()) == "nan"
        assert evaluations(trainer) == [] and trainer.state.global_step == 9
        after = adapter_state(bench.model)
        assert any(not torch.equal(t, before[n]) for n, t in after.items())


def test_evaluation_leaves_the_mode_alone(bench: Workbench, tmp_path: Path) -> None:
    trainer = trainer_of(bench, "align", tmp_path)
    for training in (True, False):
        bench.model.train(training)
        trainer.evaluate()
        assert bench.model.training is training


# ------------------------------------------------------------------------------------- resuming


class _Killed(BaseException):
    pass


@pytest.mark.parametrize(("kill_at", "patience"), [(3, 99), (12, 99), (4, 3), (9, 3)])
def test_resumed_at_any_step_it_ends_the_same(
    kill_at: int, patience: int, bench: Workbench, tmp_path: Path
) -> None:
    """Also at an epoch's end that no regular evaluation falls on, and where a stage stops early."""
    initial = adapter_state(bench.model)
    # evaluations at steps 0 2 3 4 6 8 9 10 12
    script = [2.0, 1.0, 0.9, 0.8, 0.85, 0.84, 0.83, 0.7, 0.6, 0.5]
    results = []
    for name in ("whole", "killed"):
        from ia2.adapters.weights import load_adapter_state

        load_adapter_state(bench.model, initial)
        steps: list[int] = []

        def scripted(trainer: ExampleTrainer) -> ExampleTrainer:
            due = [s for s in range(13) if s % 2 == 0 or s % 3 == 0]

            def loss(dataset: AnswerDataset, trainer: ExampleTrainer = trainer) -> float:
                steps.append(trainer.state.global_step)  # noqa: B023
                return script[due.index(trainer.state.global_step)]

            trainer._mean_loss = loss  # type: ignore[method-assign]
            return trainer

        options: dict[str, Any] = {"checkpoint_every": 1, "eval_every": 2, "patience": patience}
        trainer = scripted(trainer_of(bench, "align", tmp_path / name, **options))
        if name == "killed":
            save, reached = trainer.best.on_save, []

            def dying(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                save(args, state, control, **kwargs)  # noqa: B023
                if state.global_step == kill_at:
                    reached.append(True)  # noqa: B023
                    raise _Killed

            trainer.best.on_save = dying  # type: ignore[method-assign]
            try:
                trainer.fit()
            except _Killed:
                load_adapter_state(bench.model, initial)
                trainer = scripted(trainer_of(bench, "align", tmp_path / name, **options))
                trainer.fit()
            assert bool(reached) == (patience == 99 or kill_at < 9), "killed where it was meant to be"
        else:
            trainer.fit()
        results.append((adapter_state(bench.model), trainer.best.loss, trainer.best.step, steps))
        assert not list((tmp_path / name / "stage").glob("checkpoint-*"))
        if patience == 3:
            assert trainer.state.global_step == 9
    assert results[0][1:] == results[1][1:]
    for name, tensor in results[0][0].items():
        assert torch.equal(tensor, results[1][0][name])


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
        step = keys[start : start + slots]
        real = [weight for _, _, weight in step]
        assert sum(real) == min(per_step, count - start // slots * per_step)
        assert set(real) <= {0.0, 1.0} and real == sorted(real, reverse=True)


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[Any]:
        return list(EpochSampler(20, 4, 4, 3, seed, lambda: epoch))

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) and order(0, 0) != order(1, 0)
    # how micro-batches and processes cut a step does not matter
    wide = list(EpochSampler(20, 4, 6, 3, 0, lambda: 2))
    assert [key for key in wide if key[2]] == order(0, 2)


def test_sampled_permutations_change_from_epoch_to_epoch(tiny_icl_model_path: Path, tmp_path: Path) -> None:
    rows = icl_examples(9)
    bench = bench_of(
        icl_base(tiny_icl_model_path),
        rows[:6],
        rows[6:],
        tmp_path,
        context_draws=4,
        permutation_targets="sample",
        targets="memory",
    )
    trainer = trainer_of(bench, "align", tmp_path, epochs=6)
    drawn: list[tuple[int, ...]] = []
    get = trainer.train_dataset.targets.get
    trainer.train_dataset.targets.get = lambda i, k=0: drawn.append((i, k)) or get(i, k)
    trainer.fit()
    real = [dict(drawn[start : start + 8]) for start in range(0, len(drawn), 8)]
    assert len(real) == 6 and all(len(epoch) == 6 for epoch in real)
    assert {k for epoch in real for k in epoch.values()} == {0, 1, 2, 3}
    assert all(len({epoch[i] for epoch in real}) > 1 for i in range(6))
    # the dev loss is the mean over all orders
    dev = trainer.eval_dataset
    by_order = []
    for k in range(4):
        batch = trainer.data_collator([dev[(i, k, 1.0)] for i in range(len(dev))])
        by_order.append(float(trainer.example_losses(bench.model, batch).mean().detach()))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(by_order) / 4, rel=1e-5)
    assert max(by_order) - min(by_order) > 1e-4


# --------------------------------------------------------------------------------------- refusals


def test_reentrant_checkpointing_is_refused(bench: Workbench, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use_reentrant=True"):
        trainer_of(
            bench,
            "align",
            tmp_path,
            activation_checkpointing=True,
            activation_checkpointing_kwargs={"use_reentrant": True},
        )


def test_unknown_objective(bench: Workbench, tmp_path: Path) -> None:
    train, dev = align_rows(bench)
    with pytest.raises(ConfigError, match="'mae' is not one of mse, kl, cosine"):
        AlignTrainer(bench.model, train, dev, StageSettings(tmp_path), bench.tokenizer, objective="mae")


def test_rows_without_targets(bench: Workbench, tmp_path: Path) -> None:
    train, dev = bench.sft_rows()
    with pytest.raises(ConfigError, match="needs targets"):
        AlignTrainer(bench.model, train, dev, StageSettings(tmp_path), bench.tokenizer)


def test_dropout_is_off_for_the_online_teacher(tiny_icl_model_path: Path, tmp_path: Path) -> None:
    rows = icl_examples(9)
    bench = bench_of(
        icl_base(tiny_icl_model_path),
        rows[:6],
        rows[6:],
        tmp_path,
        targets="online",
        adapter={"dropout": 0.5},
        randomise=True,
    )
    trainer = trainer_of(bench, "align", tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    stored = bench.teaching.teacher().to_memory(bench.train_contexts)
    expected = torch.cat([stored.get(i) for i in range(6)], dim=1)
    bench.model.train()
    online = trainer.alignment.teacher(bench.model, batch)
    assert bench.model.training
    torch.testing.assert_close(online, expected, rtol=1e-4, atol=1e-5)
    assert not online.requires_grad
