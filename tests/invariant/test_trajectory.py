"""What must not change what is learnt: how a batch is cut, where targets live, what is recomputed.

In float64, since Adam divides by the gradient's size and so makes rounding errors visible.
"""

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
    rows_of,
    trainer_of,
    word_examples,
    wordy_model,
)

from ia2.training.losses import AnswerLoss

TRAIN, DEV = 10, 4  # ten examples, eight a step: the last step of an epoch has two


def trained(
    recipe: str, tokenizer: Any, folder: Path, **settings: Any
) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Adapter weights after three epochs, and the dev losses on the way."""
    rows = word_examples(TRAIN + DEV, label_words=4)
    base = base_of(wordy_model().double(), tokenizer)
    stage = {"epochs": 3, "restore_best": False, "patience": 99, "eval_every": 1}
    align = {**stage, **settings.pop("align", {})}
    defaults = {
        "recipe": recipe,
        "task": "generation",
        "max_answer_tokens": 7,
        "batch_size": 8,
        "learning_rates": [0.01],
        "targets": "memory",
    }
    bench = bench_of(
        base, rows[:TRAIN], rows[TRAIN:], folder, **{**defaults, **settings}, align=align, sft=stage
    )
    result = bench.train(recipe)
    assert result.stages[-1].steps == 6
    lengths = [len(row.answer) for part in (align_rows(bench), bench.sft_rows()) for row in rows_of(part[0])]
    assert len(set(lengths[:TRAIN])) > 1 and len(set(lengths[TRAIN:])) > 1
    losses = [e["eval_loss"] for s in result.stages for e in s.history if "eval_loss" in e]
    assert len(losses) == 7 * len(result.stages)  # one before the first step
    return result.state, losses


def assert_same(one: tuple[Any, Any], other: tuple[Any, Any], tolerance: float = 1e-6) -> None:
    assert one[0].keys() == other[0].keys()
    for name, tensor in one[0].items():
        torch.testing.assert_close(tensor, other[0][name], rtol=tolerance, atol=tolerance)
    assert one[1] == pytest.approx(other[1], rel=tolerance)


def test_accumulation_changes_nothing(word_tokenizer: Any, tmp_path: Path) -> None:
    whole = trained("ia2-sft", word_tokenizer, tmp_path / "whole")
    for micro in (1, 2):
        assert_same(whole, trained("ia2-sft", word_tokenizer, tmp_path / f"{micro}", micro_batch_size=micro))
    assert max(float(t.abs().max()) for n, t in whole[0].items() if "lora_B" in n) > 0.01


@pytest.mark.parametrize("settings", [{}, {"context_draws": 3, "permutation_targets": "sample"}])
def test_where_targets_live_changes_nothing(
    settings: dict[str, Any], word_tokenizer: Any, tmp_path: Path
) -> None:
    found = [
        trained("ia2", word_tokenizer, tmp_path / mode, targets=mode, **settings)
        for mode in ("memory", "store", "online")
    ]
    assert_same(found[0], found[1], 1e-9)
    assert_same(found[0], found[2])


@pytest.mark.parametrize("objective", ["kl", "cosine"])
def test_where_targets_live_changes_nothing_for_other_objectives(
    objective: str, word_tokenizer: Any, tmp_path: Path
) -> None:
    store, online = (
        trained("ia2", word_tokenizer, tmp_path / mode, targets=mode, align={"objective": objective})
        for mode in ("store", "online")
    )
    assert_same(store, online)


@pytest.mark.parametrize("recipe", ["ia2-sft"])
def test_recomputed_activations_change_nothing(recipe: str, word_tokenizer: Any, tmp_path: Path) -> None:
    plain = trained(recipe, word_tokenizer, tmp_path / "plain")
    recomputed = trained(
        recipe, word_tokenizer, tmp_path / "recomputed", activation_checkpointing=True, targets="online"
    )
    assert_same(plain, recomputed)


def test_attention_implementations_agree(tiny_icl_model_path: Path, tmp_path: Path) -> None:
    rows = icl_examples(12)
    losses = {}
    for name in ("eager", "sdpa"):
        base = icl_base(tiny_icl_model_path, attn_implementation=name)
        assert base.model.config._attn_implementation == name
        bench = bench_of(base, rows[:8], rows[8:], tmp_path / name, randomise=True)
        both = align_rows(bench)
        trainer = align_trainer(bench, both, tmp_path)
        losses[name] = [trainer.evaluate(part)["eval_loss"] for part in both]
    assert losses["eager"] == pytest.approx(losses["sdpa"], rel=1e-5)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["align", "sft"])
def test_neighbours_and_padding_change_no_examples_loss(
    kind: str, packed: bool, word_tokenizer: Any, tmp_path: Path
) -> None:
    rows = word_examples(TRAIN + DEV, label_words=4)
    base = base_of(wordy_model(), word_tokenizer)
    bench = bench_of(
        base, rows[:TRAIN], rows[TRAIN:], tmp_path, randomise=True, task="generation", max_answer_tokens=7
    )
    both = align_rows(bench) if kind == "align" else bench.sft_rows()
    train = both[0]
    trainers = [
        align_trainer(bench, both, tmp_path, micro_batch_size=micro)
        if kind == "align"
        else trainer_of(bench, AnswerLoss(), both, tmp_path, micro_batch_size=micro)
        for micro in (None, 1, 2)
    ]
    trainer = trainers[0]
    for each in trainers:
        assert each.data_collator.packed
        each.data_collator.packed = packed

    def losses(order: list[int]) -> dict[int, float]:
        batch = trainer._prepare_inputs(trainer.data_collator([train[i] for i in order]))
        if not packed:
            # what stands in the padding does not matter
            fed = batch["rows"]
            noise = torch.randint(3, 50, fed["input_ids"].shape)
            fed["input_ids"] = torch.where(fed["attention_mask"] == 1, fed["input_ids"], noise)
        return dict(zip(order, trainer.loss(bench.model, batch).tolist(), strict=True))

    alone = {i: losses([i])[i] for i in range(TRAIN)}
    assert len({len(row.query) + len(row.answer) for row in rows_of(train)}) > 1
    for order in (list(range(TRAIN)), [7, 2, 9, 0], [3, 3, 1]):
        for i, loss in losses(order).items():
            assert loss == pytest.approx(alone[i], rel=1e-5)
    # nor does the number of rows of one forward pass change the dev loss
    values = [t.evaluate(train)["eval_loss"] for t in trainers]
    assert values == pytest.approx([sum(alone.values()) / TRAIN] * 3, rel=1e-5)
