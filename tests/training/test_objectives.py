"""Objectives against loops over tokens and numbers; their limits; that every example weighs the same."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ia2.teacher.targets import pack_targets
from ia2.training.objectives import (
    OBJECTIVES,
    alignment_losses,
    cross_entropy_losses,
    mean_by_example,
    soft_label_losses,
)

LAYERS, WIDTH, HEADS, VOCABULARY = 3, 16, 4, 11
LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=5)


def pair(objective: str, tokens: int = 5, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Student, teacher and rms of the shape that an objective compares."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, LAYERS, tokens, WIDTH, generator=generator, dtype=torch.float64)
    teacher = teacher * torch.tensor([0.1, 1.0, 7.0], dtype=torch.float64)[:, None, None]
    rms = teacher.pow(2).mean(dim=(1, 2)).sqrt()
    if OBJECTIVES[objective].site == "weights":
        student, teacher = (t.unflatten(-1, (HEADS, -1)).softmax(-1) for t in (student, teacher))
    return student, teacher, rms


def naive_kl(q: list[float], p: list[float], tau: float) -> float:
    weights = [[math.exp(x / tau) for x in row] for row in (p, q)]
    p, q = ([x / sum(row) for x in row] for row in weights)
    return tau**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def naive_cosine(a: list[float], b: list[float], tau: float) -> float:
    return 1 - sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def naive_mse(a: list[float], b: list[float], tau: float) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a)


def naive_attention(a: list[list[float]], b: list[list[float]], tau: float) -> float:
    heads = [sum(y * math.log(y / x) for x, y in zip(*rows, strict=True)) for rows in zip(a, b, strict=True)]
    return sum(heads) / len(heads)


NAIVE: dict[str, Callable[..., float]] = {
    "mse": naive_mse,
    "heads": naive_mse,
    "residual": naive_mse,
    "kl": naive_kl,
    "cosine": naive_cosine,
    "attention": naive_attention,
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_is_what_it_says(objective: str) -> None:
    student, teacher, rms = pair(objective)
    found = OBJECTIVES[objective].loss(student, teacher, rms, 0.7)
    for layer in range(LAYERS):
        for token in range(5):
            own = NAIVE[objective](
                student[layer, token].tolist(), teacher[layer, token].tolist(), 0.7 * float(rms[layer])
            )
            assert float(found[layer, token]) == pytest.approx(own, rel=1e-9)
    assert OBJECTIVES[objective].loss(teacher.clone(), teacher, rms, 1.0).abs().max() < 1e-12
    student = student[:, :2].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: OBJECTIVES[objective].loss(s, teacher[:, :2], rms, 0.8).sum(), student
    )


def test_twice_kl_tends_to_the_mse_of_centred_activations() -> None:
    student, teacher, rms = pair("kl")
    centred = [t - t.mean(-1, keepdim=True) for t in (student, teacher)]
    mse = OBJECTIVES["mse"].loss(*centred, rms, 1.0)
    errors = []
    for tau in (10.0, 100.0, 1000.0):
        twice = 2 * OBJECTIVES["kl"].loss(student, teacher, rms, tau)
        errors.append(float(((twice - mse) / mse).abs().max()))
    assert errors[-1] < 0.02
    assert errors[1] < errors[0] / 5 and errors[2] < errors[1] / 5  # the error falls as 1/τ


def test_a_silent_layer_and_an_ignored_key_give_no_infinity() -> None:
    zero = torch.zeros(1, 2, WIDTH)
    assert OBJECTIVES["kl"].loss(zero, zero, torch.zeros(1), 1.0).tolist() == [[0.0, 0.0]]
    student = torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2).requires_grad_()
    loss = alignment_losses("attention", student, torch.full((1, 1, 1, 2), 0.5), [1], torch.ones(1)).sum()
    assert 5 < float(loss.detach()) < 20
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(0, 99), st.sampled_from(sorted(OBJECTIVES)), st.booleans())
def test_an_examples_loss_is_its_own(lengths: list[int], seed: int, objective: str, normalise: bool) -> None:
    """Sum over layers, mean over its tokens, whatever the neighbours; compared in float32."""
    student, teacher, rms = (t.bfloat16() for t in pair(objective, sum(lengths), seed))
    together = alignment_losses(objective, student, teacher, lengths, rms, 0.7, normalise)
    assert together.dtype == torch.float32
    by_layer = OBJECTIVES[objective].loss(student.float(), teacher.float(), rms.float(), 0.7)
    if normalise:
        by_layer = by_layer / rms.float().pow(2)[:, None]
    alone = [part.sum(0).mean() for part in by_layer.split(lengths, dim=1)]
    torch.testing.assert_close(together, torch.stack(alone))


def test_keys_that_an_example_lacks_change_nothing() -> None:
    """Packed beside an example with a longer query, its weights have zeros on the left."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(LAYERS, 2, HEADS, 3), (LAYERS, 1, HEADS, 7), (LAYERS, 3, HEADS, 1)]
    students, teachers = (
        [torch.randn(shape, generator=generator).softmax(-1) for shape in shapes] for _ in range(2)
    )
    packed, lengths = pack_targets(students).requires_grad_(), [2, 1, 3]
    together = alignment_losses("attention", packed, pack_targets(teachers), lengths, torch.ones(LAYERS))
    for place, loss in enumerate(together):
        alone = alignment_losses(
            "attention", students[place], teachers[place], lengths[place : place + 1], torch.ones(LAYERS)
        )
        torch.testing.assert_close(loss, alone[0], rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(together.sum(), packed)
    assert gradient.isfinite().all() and not gradient[:, :2, :, :4].any()


@settings(max_examples=30, deadline=None)
@given(LENGTHS, st.integers(0, 99))
def test_weight_does_not_depend_on_length(lengths: list[int], seed: int) -> None:
    """Every example passes on the same gradient in total, be its answer one token or many."""
    per_token = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(seed)).requires_grad_()
    (gradient,) = torch.autograd.grad(mean_by_example(per_token, lengths).mean(), per_token)
    shares = torch.stack([part.sum() for part in gradient.split(lengths)])
    torch.testing.assert_close(shares, torch.full((len(lengths),), 1 / len(lengths)))


# ------------------------------------------------------------------------- answers and soft labels


def distributions(lengths: list[int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, sum(lengths), VOCABULARY, generator=generator) * 3
    return student.requires_grad_(), teacher.log_softmax(-1)


def dense(log_p: torch.Tensor, k: int | None, remainder: str) -> torch.Tensor:
    """What a teacher cut to its k most probable tokens says of the whole vocabulary, ``[T, V]``."""
    p = log_p.exp()
    if k is None:
        return p
    top = p.topk(k, dim=-1)
    kept = torch.zeros_like(p).scatter(-1, top.indices, top.values)
    if remainder == "drop" or k == VOCABULARY:
        return kept / kept.sum(-1, keepdim=True)
    rest = (1 - kept.sum(-1, keepdim=True)).clamp_min(0) / (VOCABULARY - k)
    return torch.where(kept > 0, kept, rest)


def cut(log_p: torch.Tensor, k: int | None) -> torch.Tensor:
    if k is None:
        return log_p[None]
    top = log_p.topk(k, dim=-1)
    return torch.stack([top.indices.float(), top.values])


@settings(max_examples=60, deadline=None)
@given(
    LENGTHS,
    st.integers(0, 99),
    st.none() | st.integers(1, VOCABULARY),
    st.sampled_from(["spread", "drop"]),
)
def test_soft_labels(lengths: list[int], seed: int, k: int | None, remainder: str) -> None:
    """Loss and gradient are torch's KL of the distribution written out."""
    student, log_p = distributions(lengths, seed)
    p = dense(log_p, k, remainder)
    per_token = torch.nn.functional.kl_div(student.log_softmax(-1), p, reduction="none").sum(-1)
    expected = torch.stack([part.mean() for part in per_token.split(lengths)])
    found = soft_label_losses(student, cut(log_p, k), lengths, remainder)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(losses.sum(), student)[0] for losses in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_soft_labels_of_a_teacher_that_is_certain() -> None:
    """Cross-entropy, itself checked by hand, and no nan from the tokens that are ruled out."""
    student, _ = distributions([3], 0)
    answers = torch.tensor([2, 0, 7])
    by_hand = -torch.log(student.softmax(-1))[torch.arange(3), answers]
    expected = torch.stack([by_hand[:1].mean(), by_hand[1:].mean()])
    torch.testing.assert_close(cross_entropy_losses(student, answers, [1, 2]), expected)
    log_p = torch.full((3, VOCABULARY), float("-inf"))
    log_p[torch.arange(3), answers] = 0.0
    for k, remainder in ((None, "spread"), (2, "spread"), (1, "drop")):
        found = soft_label_losses(student, cut(log_p, k), [1, 2], remainder)
        torch.testing.assert_close(found, expected)
        assert torch.autograd.grad(found.sum(), student)[0].isfinite().all()


def test_ids_of_large_vocabularies_survive_float32() -> None:
    student = torch.zeros(1, 300_000)
    student[0, 262_143] = 20.0
    teacher = torch.tensor([[[262_143.0]], [[0.0]]])
    assert float(soft_label_losses(student, teacher, [1], "spread")) < 0.01
