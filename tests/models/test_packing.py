"""Rows of a pack, and rows that share beginnings, come out as each row on its own."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from helpers.families import ALL, PACKED, SLIDING, WINDOW, counting_ids, llama
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from ia2.adapters.types import peft_config
from ia2.adapters.weights import attach
from ia2.config.sections import AdapterConfig
from ia2.models import packing
from ia2.models.capture import ActivationCapture, eager_attention
from ia2.models.packing import groups, packs, row_attention, tree_pass
from ia2.models.tokens import Ids
from ia2.training.dataset import AnswerRow, Collator, fed_rows, near_lengths, run_rows
from ia2.training.objectives import cross_entropy_losses

LLAMA = llama()


def rows_of(lengths: list[tuple[int, int]], seed: int = 0) -> list[AnswerRow]:
    draw = random.Random(seed)
    return [
        AnswerRow(tuple(draw.randint(4, 99) for _ in range(p)), tuple(draw.randint(4, 99) for _ in range(g)))
        for p, g in lengths
    ]


def losses_and_gradients(
    model: Any, rows: list[AnswerRow], packed: bool, attention: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Cross-entropies by row and, of their sum and that of the squared activations, gradients by name."""
    batch = Collator(0, packed)([{"row": r, "weight": 1.0, "target": None, "soft": None} for r in rows])
    fed = fed_rows(batch)
    model.zero_grad()
    with row_attention(model) if attention else torch.enable_grad():
        logits, activations = run_rows(model, fed, logits=True, capture=ActivationCapture(model))
        losses = cross_entropy_losses(logits, batch["answers"], fed.answer_lengths)
        (losses.sum() + activations.pow(2).mean()).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return losses.detach(), gradients


def same(model: Any, rows: list[AnswerRow], attention: bool) -> None:
    expected, gradients = losses_and_gradients(model, rows, False, False)
    found, own = losses_and_gradients(model, rows, True, attention)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert own.keys() == gradients.keys() and gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, atol=2e-5, rtol=1e-4, msg=name)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=7),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_any_rows_packed_give_the_padded_losses_and_gradients(
    lengths: list[tuple[int, int]], attention: bool, seed: int
) -> None:
    same(LLAMA, rows_of(lengths, seed), attention)


@pytest.mark.parametrize("name", list(ALL))
def test_which_families_pack(name: str) -> None:
    """Held against the padded losses, also where rows are longer than what a layer sees."""
    model = ALL[name]()
    assert packs(model) == (name in PACKED)
    if name in PACKED:
        rows = rows_of([(20, 4), (3, 1), (WINDOW, 2), (1, 6)])
        for attention in (True, False):
            same(model, rows, attention)


@pytest.mark.parametrize("kind", ["lora", "ia3", "prompt_tuning"])
def test_adapted_models(kind: str) -> None:
    """Virtual tokens would stand before the whole pack."""
    model = attach(llama(), peft_config(LLAMA, AdapterConfig(**_adapter(kind))), seed=0)
    assert packs(model) == (kind != "prompt_tuning")
    if packs(model):
        same(model, rows_of([(9, 3), (2, 2), (14, 1)]), True)


def _adapter(kind: str) -> dict[str, Any]:
    if kind == "prompt_tuning":
        return {"peft": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}}
    return {"type": kind}


def test_a_model_that_takes_masks_otherwise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that lets rows of a pack see each other, and one that refuses the mask."""
    monkeypatch.setattr(packing, "_row_attention", _seeing_all)
    assert not packs(llama())
    monkeypatch.setattr(packing, "_row_attention", _refusing)
    assert not packs(llama())


def _seeing_all(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, None, **options)


def _refusing(*_: Any, **__: Any) -> Any:
    raise ValueError("no such mask")


def test_it_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = llama(), []
    agrees = packing._agrees
    monkeypatch.setattr(packing, "_agrees", lambda m: calls.append(m) or agrees(m))
    assert [packs(model) for _ in range(3)] == [True] * 3
    with row_attention(model):
        assert packs(model)
    assert len(calls) == 1


def test_attention_is_as_before_afterwards() -> None:
    model = llama()
    with pytest.raises(KeyError), row_attention(model):
        assert model.config._attn_implementation == "ia2_rows"
        raise KeyError
    assert model.config._attn_implementation == "sdpa"


# ------------------------------------------------------------------------------------------- the trie


def alone(model: PreTrainedModel, row: Ids, count: int) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([row])).logits[0, -count:]


def tree(model: Any, rows: list[Ids], answers: list[int], size: int) -> tuple[dict[int, dict[int, Any]], int]:
    """Row → position → logits; and how many ids were fed."""
    found: dict[int, dict[int, Any]] = {i: {} for i in range(len(rows))}
    with torch.no_grad(), counting_ids(model) as fed:
        for output in tree_pass(model, rows, answers, logits=True, size=size):
            for row, first, kept in output.parts:
                for place, k in enumerate(kept):
                    assert first + place not in found[row], "a position came twice"
                    found[row][first + place] = output.logits[k]
    return found, sum(fed)


def compare(model: Any, rows: list[Ids], answers: list[int], size: int) -> int:
    found, fed = tree(model, rows, answers, size)
    for i, row in enumerate(rows):
        assert sorted(found[i]) == list(range(len(row) - answers[i], len(row)))
        logits = torch.stack([found[i][place] for place in sorted(found[i])])
        torch.testing.assert_close(logits, alone(model, row, answers[i]), atol=1e-5, rtol=1e-5)
    return fed


few = st.lists(st.sampled_from([4, 5, 6]), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(st.lists(few, min_size=1, max_size=12), st.integers(0, 10**6), st.sampled_from([1, 8, 20, 64, 300]))
def test_any_rows_come_out_as_each_alone(rows: list[list[int]], seed: int, size: int) -> None:
    """Rows of three different ids share beginnings at every length; some begin others, some are the same."""
    draw = random.Random(seed)
    rows = [*rows, rows[0], rows[0][: len(rows[0]) // 2 + 1], [*rows[-1], *rows[0]]]
    ids = [tuple(row) for row in rows]
    compare(LLAMA, ids, [draw.randint(1, len(row)) for row in ids], size)


@pytest.mark.parametrize("name", PACKED)
def test_families(name: str) -> None:
    """Behind a cache longer than a sliding window, with branches inside the pack and outside."""
    common = tuple(range(4, 34))
    ends = [(40, 41, 42), (40, 41, 43), (50,), tuple(range(60, 75)), (40, 51)]
    rows = [common + end for end in ends] + [(9, 8, 7), (9, 8, 6, 5)]
    fed = compare(ALL[name](), rows, [1, 2, 1, 3, 4, 2, 1], size=24)
    assert fed < sum(map(len, rows)) / 2
    assert name not in SLIDING or len(common) > WINDOW


def test_what_is_shared_is_computed_once() -> None:
    """Recursive halving: two halves, four quarters, eight eighths, each behind those before it."""
    draw = random.Random(0)
    blocks = [tuple(draw.randint(4, 99) for _ in range(20)) for _ in range(14)]
    rows = [
        blocks[a] + blocks[2 + 2 * a + b] + blocks[6 + 4 * a + 2 * b + c]
        for a in (0, 1)
        for b in (0, 1)
        for c in (0, 1)
    ]
    assert compare(LLAMA, rows, [1] * 8, size=50) == 20 * 14
    # in packs that hold everything, too
    assert compare(LLAMA, rows, [1] * 8, size=1000) == 20 * 14


def test_no_more_logits_than_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "MAX_LOGITS", 3 * LLAMA.config.vocab_size)
    rows = [tuple(range(4 + i, 12 + i)) for i in range(6)]
    with torch.no_grad():
        passes = list(tree_pass(LLAMA, rows, [1] * 6, logits=True, size=1000))
    assert [len(output.logits) for output in passes] == [3, 3]


def test_rows_that_share_nothing_are_not_compared_with_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pass as in training: attention takes one row at a time, and no mask is made."""
    seen: list[Any] = []
    attend = packing._row_attention

    def watching(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        seen.append(mask)
        return attend(module, query, key, value, mask, **options)

    model = llama()
    assert packs(model)
    monkeypatch.setattr(packing, "_row_attention", watching)
    compare(model, [(4, 5, 6), (7, 8), (9, 9, 9, 9)], [1, 1, 1], size=100)
    assert [mask.flatten().tolist() for mask in seen] == [[4, 3, 2]] * model.config.num_hidden_layers


# -------------------------------------------------------------------------------------- small parts


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 80))
def test_groups_hold_every_row_once_and_no_more_than_fits(lengths: list[int], size: int) -> None:
    found = groups(lengths, size)
    assert sorted(i for group in found for i in group) == list(range(len(lengths)))
    assert all(len(group) == 1 or sum(lengths[i] for i in group) <= size for group in found)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=20))
def test_padded_rows_are_of_near_lengths(lengths: list[int]) -> None:
    found = near_lengths(lengths)
    assert sorted(i for own in found for i in own) == list(range(len(lengths)))
    for own in found:
        widest = max(lengths[i] for i in own)
        assert sum(widest - lengths[i] for i in own if lengths[i] < 0.75 * widest) <= 32


def test_rows_of_far_lengths_are_padded_apart_and_give_the_same() -> None:
    """In two passes, which together feed less than the padded rectangle."""
    model = ALL["falcon"]().eval()
    prompts = [tuple(range(3, 3 + n)) for n in (8, 90, 6, 80)]
    items = [
        {"row": AnswerRow(prompt, (5, 6), response=None), "weight": 1.0, "target": None, "soft": None}
        for prompt in prompts
    ]
    fed = fed_rows(Collator(0)(items))
    shapes: list[tuple[int, ...]] = []
    with model.register_forward_pre_hook(
        lambda module, args, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    ):
        logits, activations = run_rows(model, fed, logits=True, capture=ActivationCapture(model))
    assert shapes == [(2, 91), (2, 9)]
    for i in range(len(prompts)):
        alone, own = run_rows(
            model, fed_rows(Collator(0)([items[i]])), logits=True, capture=ActivationCapture(model)
        )
        torch.testing.assert_close(logits[2 * i : 2 * i + 2], alone, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(activations[:, 2 * i : 2 * i + 2], own, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lengths", [(6, 9, 7), (8, 90, 6, 80)], ids=["one pass", "two"])
def test_attention_weights_keep_their_rows(lengths: tuple[int, ...]) -> None:
    """Rows of one padded pass and of several, each with a span of its own."""
    model = ALL["falcon"]().eval()
    items = [
        {
            "row": AnswerRow(tuple(range(3, 3 + n)), (5, 6), span=2 + i),
            "weight": 1.0,
            "target": None,
            "soft": None,
        }
        for i, n in enumerate(lengths)
    ]

    def weights(*some: dict[str, Any]) -> torch.Tensor:
        batch = Collator(0)(some)
        with eager_attention(model):
            capture = ActivationCapture(model, site="weights")
            found: torch.Tensor = run_rows(
                model, fed_rows(batch), logits=False, capture=capture, spans=batch["spans"]
            )[1]
        return found

    together = weights(*items)
    for i, item in enumerate(items):
        alone = weights(item)
        own = together[:, 2 * i : 2 * i + 2, :, -alone.shape[-1] :]
        torch.testing.assert_close(own, alone, atol=1e-5, rtol=1e-4)
        assert together[:, 2 * i : 2 * i + 2, :, : -alone.shape[-1]].abs().sum() == 0
