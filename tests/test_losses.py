"""Objectives: their limits, zeros, gradients, and that every example weighs the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ia2.losses import OBJECTIVES, alignment_losses, cross_entropy_losses, mean_by_example

LAYERS, WIDTH = 3, 16


def pair(tokens: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, LAYERS, tokens, WIDTH, generator=generator, dtype=dtype)
    teacher = teacher * torch.tensor([0.1, 1.0, 7.0], dtype=dtype)[:, None, None]
    return student, teacher, teacher.pow(2).mean(dim=(1, 2)).sqrt()


def test_mse_is_the_mean_square() -> None:
    student, teacher, rms = pair()
    expected = ((student - teacher) ** 2).sum(-1) / WIDTH
    torch.testing.assert_close(OBJECTIVES["mse"](student, teacher, rms, 1.0), expected)


def test_twice_kl_tends_to_the_mse_of_centred_activations() -> None:
    student, teacher, rms = pair()
    centred = OBJECTIVES["mse"](
        student - student.mean(-1, keepdim=True), teacher - teacher.mean(-1, keepdim=True), rms, 1.0
    )
    errors = []
    for tau in (10.0, 100.0, 1000.0):
        twice = 2 * OBJECTIVES["kl"](student, teacher, rms, tau)
        errors.append(float(((twice - centred) / centred).abs().max()))
    assert errors[-1] < 0.02
    assert errors[1] < errors[0] / 5 and errors[2] < errors[1] / 5  # the error falls as 1/τ


def test_kl_ignores_what_softmax_ignores_and_scales_with_the_square() -> None:
    student, teacher, rms = pair()
    plain = OBJECTIVES["kl"](student, teacher, rms, 1.0)
    torch.testing.assert_close(OBJECTIVES["kl"](student + 3, teacher - 2, rms, 1.0), plain)
    torch.testing.assert_close(OBJECTIVES["kl"](2 * student, 2 * teacher, 2 * rms, 1.0), 4 * plain)


def test_kl_is_torchs_kl() -> None:
    student, teacher, rms = pair()
    tau = (0.7 * rms)[:, None, None]
    p, log_q = (teacher / tau).softmax(-1), (student / tau).log_softmax(-1)
    expected = torch.nn.functional.kl_div(log_q, p, reduction="none").sum(-1) * tau.squeeze(-1) ** 2
    torch.testing.assert_close(OBJECTIVES["kl"](student, teacher, rms, 0.7), expected)


def test_a_silent_layer_gives_no_nan() -> None:
    zero = torch.zeros(1, 2, WIDTH)
    assert OBJECTIVES["kl"](zero, zero, torch.zeros(1), 1.0).tolist() == [[0.0, 0.0]]


def test_cosine_sees_direction_only() -> None:
    student, teacher, rms = pair()
    losses = OBJECTIVES["cosine"](student, teacher, rms, 1.0)
    torch.testing.assert_close(OBJECTIVES["cosine"](3 * student, teacher, rms, 1.0), losses)
    torch.testing.assert_close(
        OBJECTIVES["cosine"](-teacher, teacher, rms, 1.0), torch.full((3, 5), 2.0).double()
    )
    dot = (student * teacher).sum(-1) / student.norm(dim=-1) / teacher.norm(dim=-1)
    torch.testing.assert_close(losses, 1 - dot)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_zero_at_equality_and_positive_elsewhere(objective: str) -> None:
    student, teacher, rms = pair()
    same = OBJECTIVES[objective](teacher.clone(), teacher, rms, 1.0)
    assert same.abs().max() < 1e-12
    assert OBJECTIVES[objective](student, teacher, rms, 1.0).min() > 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_are_those_of_finite_differences(objective: str) -> None:
    student, teacher, rms = pair(tokens=2)
    student = student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: OBJECTIVES[objective](s, teacher, rms, 0.8).sum(), student)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_down_the_gradient_lowers_the_loss(objective: str) -> None:
    student, teacher, rms = pair(dtype=torch.float32)
    student.requires_grad_()
    before = alignment_losses(objective, student, teacher, [2, 3], rms).mean()
    (gradient,) = torch.autograd.grad(before, student)
    after = alignment_losses(objective, student - 1e-2 * gradient, teacher, [2, 3], rms).mean()
    assert float(after.detach()) < float(before.detach())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_half_precision_inputs_are_compared_in_float32(objective: str) -> None:
    student, teacher, rms = pair(dtype=torch.float32)
    half = [t.bfloat16() for t in (student, teacher, rms)]
    losses = alignment_losses(objective, *half[:2], [2, 3], half[2])
    assert losses.dtype == torch.float32
    wide = alignment_losses(objective, *(t.float() for t in half[:2]), [2, 3], half[2].float())
    assert torch.equal(losses, wide)


_LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(_LENGTHS, st.integers(0, 99), st.sampled_from(sorted(OBJECTIVES)))
def test_an_examples_loss_is_its_own(lengths: list[int], seed: int, objective: str) -> None:
    """Packed together or alone, whatever the neighbours' lengths."""
    student, teacher, rms = pair(sum(lengths), seed)
    together = alignment_losses(objective, student, teacher, lengths, rms)
    start = 0
    for length, loss in zip(lengths, together.tolist(), strict=True):
        part = slice(start, start + length)
        alone = alignment_losses(objective, student[:, part], teacher[:, part], [length], rms)
        assert loss == pytest.approx(float(alone), rel=1e-5)
        start += length


@settings(max_examples=40, deadline=None)
@given(_LENGTHS, st.integers(0, 99))
def test_weight_does_not_depend_on_length(lengths: list[int], seed: int) -> None:
    """An answer whose tokens all have the loss c counts c, be it one token or many."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(len(lengths), generator=generator)
    per_token = torch.cat([value.repeat(n) for value, n in zip(values, lengths, strict=True)])
    torch.testing.assert_close(mean_by_example(per_token, lengths), values)
    # and every example passes on the same gradient in total
    per_token.requires_grad_()
    (gradient,) = torch.autograd.grad(mean_by_example(per_token, lengths).mean(), per_token)
    shares = torch.stack([part.sum() for part in gradient.split(lengths)])
    torch.testing.assert_close(shares, torch.full((len(lengths),), 1 / len(lengths)))


@settings(max_examples=30, deadline=None)
@given(_LENGTHS, st.integers(0, 99))
def test_cross_entropy_by_example(lengths: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(sum(lengths), 11, generator=generator)
    targets = torch.randint(0, 11, (sum(lengths),), generator=generator)
    log_p = torch.log(logits.softmax(-1))[torch.arange(len(targets)), targets]
    expected = torch.stack([-part.mean() for part in log_p.split(lengths)])
    torch.testing.assert_close(cross_entropy_losses(logits, targets, lengths), expected)
    assert cross_entropy_losses(logits.bfloat16(), targets, lengths).dtype == torch.float32


def test_sum_over_layers() -> None:
    student, teacher, rms = pair(dtype=torch.float32)
    whole = alignment_losses("mse", student, teacher, [5], rms)
    layers = [
        alignment_losses("mse", student[i : i + 1], teacher[i : i + 1], [5], rms[i : i + 1])
        for i in range(LAYERS)
    ]
    torch.testing.assert_close(whole, torch.stack(layers).sum(0))
