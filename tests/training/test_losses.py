"""Objectives: their limits, zeros, gradients, and that every example weighs the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ia2.config.recipes import OBJECTIVE_NAMES
from ia2.teacher.targets import pack_targets
from ia2.training.objectives import (
    OBJECTIVES,
    alignment_losses,
    cross_entropy_losses,
    mean_by_example,
    soft_label_losses,
)
from ia2.utils.errors import ConfigError

LAYERS, WIDTH, HEADS = 3, 16, 4


def given_to(
    objective: str, tokens: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, ...]:
    """Student, teacher and rms of the shape that an objective compares."""
    student, teacher, rms = pair(tokens, seed, dtype)
    if OBJECTIVES[objective].site == "weights":
        student, teacher = (t.unflatten(-1, (HEADS, -1)).softmax(-1) for t in (student, teacher))
    return student, teacher, rms


def pair(tokens: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, LAYERS, tokens, WIDTH, generator=generator, dtype=dtype)
    teacher = teacher * torch.tensor([0.1, 1.0, 7.0], dtype=dtype)[:, None, None]
    return student, teacher, teacher.pow(2).mean(dim=(1, 2)).sqrt()


def test_mse_is_the_mean_square() -> None:
    student, teacher, rms = pair()
    expected = ((student - teacher) ** 2).sum(-1) / WIDTH
    torch.testing.assert_close(OBJECTIVES["mse"].loss(student, teacher, rms, 1.0), expected)


def test_twice_kl_tends_to_the_mse_of_centred_activations() -> None:
    student, teacher, rms = pair()
    centred = OBJECTIVES["mse"].loss(
        student - student.mean(-1, keepdim=True), teacher - teacher.mean(-1, keepdim=True), rms, 1.0
    )
    errors = []
    for tau in (10.0, 100.0, 1000.0):
        twice = 2 * OBJECTIVES["kl"].loss(student, teacher, rms, tau)
        errors.append(float(((twice - centred) / centred).abs().max()))
    assert errors[-1] < 0.02
    assert errors[1] < errors[0] / 5 and errors[2] < errors[1] / 5  # the error falls as 1/τ


def test_kl_ignores_what_softmax_ignores_and_scales_with_the_square() -> None:
    student, teacher, rms = pair()
    plain = OBJECTIVES["kl"].loss(student, teacher, rms, 1.0)
    torch.testing.assert_close(OBJECTIVES["kl"].loss(student + 3, teacher - 2, rms, 1.0), plain)
    torch.testing.assert_close(OBJECTIVES["kl"].loss(2 * student, 2 * teacher, 2 * rms, 1.0), 4 * plain)


def test_kl_is_torchs_kl() -> None:
    student, teacher, rms = pair()
    tau = (0.7 * rms)[:, None, None]
    p, log_q = (teacher / tau).softmax(-1), (student / tau).log_softmax(-1)
    expected = torch.nn.functional.kl_div(log_q, p, reduction="none").sum(-1) * tau.squeeze(-1) ** 2
    torch.testing.assert_close(OBJECTIVES["kl"].loss(student, teacher, rms, 0.7), expected)


def test_a_silent_layer_gives_no_nan() -> None:
    zero = torch.zeros(1, 2, WIDTH)
    assert OBJECTIVES["kl"].loss(zero, zero, torch.zeros(1), 1.0).tolist() == [[0.0, 0.0]]


def test_cosine_sees_direction_only() -> None:
    student, teacher, rms = pair()
    losses = OBJECTIVES["cosine"].loss(student, teacher, rms, 1.0)
    torch.testing.assert_close(OBJECTIVES["cosine"].loss(3 * student, teacher, rms, 1.0), losses)
    torch.testing.assert_close(
        OBJECTIVES["cosine"].loss(-teacher, teacher, rms, 1.0), torch.full((3, 5), 2.0).double()
    )
    dot = (student * teacher).sum(-1) / student.norm(dim=-1) / teacher.norm(dim=-1)
    torch.testing.assert_close(losses, 1 - dot)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_zero_at_equality_and_positive_elsewhere(objective: str) -> None:
    student, teacher, rms = given_to(objective)
    same = OBJECTIVES[objective].loss(teacher.clone(), teacher, rms, 1.0)
    assert same.abs().max() < 1e-12
    assert OBJECTIVES[objective].loss(student, teacher, rms, 1.0).min() > 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_are_those_of_finite_differences(objective: str) -> None:
    student, teacher, rms = given_to(objective, tokens=2)
    student = student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: OBJECTIVES[objective].loss(s, teacher, rms, 0.8).sum(), student)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_down_the_gradient_lowers_the_loss(objective: str) -> None:
    student, teacher, rms = given_to(objective, dtype=torch.float32)
    student = student.detach().requires_grad_()
    before = alignment_losses(objective, student, teacher, [2, 3], rms).mean()
    (gradient,) = torch.autograd.grad(before, student)
    after = alignment_losses(objective, student - 1e-2 * gradient, teacher, [2, 3], rms).mean()
    assert float(after.detach()) < float(before.detach())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_half_precision_inputs_are_compared_in_float32(objective: str) -> None:
    student, teacher, rms = given_to(objective, dtype=torch.float32)
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
    student, teacher, rms = given_to(objective, sum(lengths), seed)
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


def test_names_of_the_settings_are_those_of_the_objectives() -> None:
    assert tuple(OBJECTIVES) == OBJECTIVE_NAMES
    assert [OBJECTIVES[n].site for n in OBJECTIVES] == ["output"] * 3 + ["heads", "residual", "weights"]


# ----------------------------------------------------------------------------------- normalisation


@pytest.mark.parametrize("objective", [n for n in OBJECTIVES if n != "attention"])
def test_normalised_by_the_mean_square_of_each_layer(objective: str) -> None:
    student, teacher, rms = given_to(objective, dtype=torch.float32)
    expected = sum(
        alignment_losses(objective, student[i : i + 1], teacher[i : i + 1], [2, 3], rms[i : i + 1])
        / rms[i] ** 2
        for i in range(LAYERS)
    )
    found = alignment_losses(objective, student, teacher, [2, 3], rms, normalise=True)
    torch.testing.assert_close(found, expected)
    plain = alignment_losses(objective, student, teacher, [2, 3], rms)
    assert not torch.allclose(found, plain)
    # a layer whose loss has the square of its activations' scale counts the same whatever that is
    if objective != "cosine":
        scales = torch.tensor([1e-2, 1.0, 1e3])
        scaled = [t * scales[:, None, None] for t in (student, teacher)]
        again = alignment_losses(objective, *scaled, [2, 3], rms * scales, normalise=True)
        torch.testing.assert_close(again, found, rtol=1e-4, atol=1e-5)
    silent = alignment_losses(objective, 0 * student, 0 * teacher, [2, 3], 0 * rms, normalise=True)
    assert silent.isfinite().all()


def test_attention_has_nothing_to_normalise_by() -> None:
    assert [n for n in OBJECTIVES if not OBJECTIVES[n].has_scale] == ["attention"]
    student, teacher, rms = given_to("attention")
    with pytest.raises(ConfigError, match="attention has no scale to normalise by"):
        alignment_losses("attention", student, teacher, [5], rms, normalise=True)


# --------------------------------------------------------------------------------------- attention


def naive_attention(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL number by number: ``[L, T]``."""
    layers, tokens, heads, keys = teacher.shape
    losses = torch.zeros(layers, tokens, dtype=teacher.dtype)
    for i in range(layers):
        for t in range(tokens):
            for h in range(heads):
                for s in range(keys):
                    p, q = teacher[i, t, h, s], student[i, t, h, s]
                    if p > 0:
                        losses[i, t] += p * (p / q).log() / heads
    return losses


def test_attention_is_the_mean_kl_of_the_heads() -> None:
    student, teacher, rms = given_to("attention", tokens=3)
    found = OBJECTIVES["attention"].loss(student, teacher, rms, 1.0)
    torch.testing.assert_close(found, naive_attention(student, teacher))


def test_keys_that_an_example_lacks_change_nothing() -> None:
    """Packed beside an example with a longer query, its weights have zeros on the left."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(LAYERS, 2, HEADS, 3), (LAYERS, 1, HEADS, 7), (LAYERS, 3, HEADS, 1)]
    students, teachers = (
        [torch.randn(shape, generator=generator).softmax(-1) for shape in shapes] for _ in range(2)
    )
    # a causal zero on the right, as at the first of several answer positions
    for part in (students[0], teachers[0]):
        part[:, 0, :, -1] = 0
        part /= part.sum(-1, keepdim=True)
    student = pack_targets(students).requires_grad_()
    teacher, lengths = pack_targets(teachers), [2, 1, 3]
    assert student.shape == (LAYERS, 6, HEADS, 7)
    together = alignment_losses("attention", student, teacher, lengths, torch.ones(LAYERS))
    for place, loss in enumerate(together):
        alone = naive_attention(students[place], teachers[place]).sum(0).mean()
        torch.testing.assert_close(loss, alone, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(together.sum(), student)
    assert gradient.isfinite().all()
    assert not gradient[:, :2, :, :4].any()
    assert not gradient[:, 0, :, -1].any()


def test_a_key_that_the_student_ignores_gives_no_infinity() -> None:
    student = torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2).requires_grad_()
    teacher = torch.tensor([0.5, 0.5]).reshape(1, 1, 1, 2)
    loss = alignment_losses("attention", student, teacher, [1], torch.ones(1)).sum()
    assert 5 < float(loss.detach()) < 20
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.isfinite().all()


# ------------------------------------------------------------------------------------- soft labels

VOCABULARY = 11


def distributions(lengths: list[int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, sum(lengths), VOCABULARY, generator=generator) * 3
    return student, teacher.log_softmax(-1)


def dense(log_p: torch.Tensor, k: int, remainder: str) -> torch.Tensor:
    """What a teacher cut to its k most probable tokens says of the whole vocabulary, ``[T, V]``."""
    p = log_p.exp()
    top = p.topk(k, dim=-1)
    kept = torch.zeros_like(p).scatter(-1, top.indices, top.values)
    if remainder == "drop":
        return kept / kept.sum(-1, keepdim=True)
    rest = (1 - kept.sum(-1, keepdim=True)) / (VOCABULARY - k)
    return torch.where(kept > 0, kept, rest)


def cut(log_p: torch.Tensor, k: int) -> torch.Tensor:
    top = log_p.topk(k, dim=-1)
    return torch.stack([top.indices.float(), top.values])


@settings(max_examples=30, deadline=None)
@given(_LENGTHS, st.integers(0, 99))
def test_soft_labels_over_the_whole_vocabulary(lengths: list[int], seed: int) -> None:
    student, log_p = distributions(lengths, seed)
    found = soft_label_losses(student, log_p[None], lengths)
    per_token = torch.nn.functional.kl_div(student.log_softmax(-1), log_p.exp(), reduction="none").sum(-1)
    torch.testing.assert_close(found, torch.stack([p.mean() for p in per_token.split(lengths)]))
    assert soft_label_losses(student.bfloat16(), log_p[None], lengths).dtype == torch.float32
    same = soft_label_losses(log_p, log_p[None], lengths)
    torch.testing.assert_close(same, torch.zeros(len(lengths)), atol=1e-6, rtol=0)


@settings(max_examples=60, deadline=None)
@given(_LENGTHS, st.integers(0, 99), st.integers(1, VOCABULARY), st.sampled_from(["spread", "drop"]))
def test_soft_labels_of_the_most_probable_tokens(
    lengths: list[int], seed: int, k: int, remainder: str
) -> None:
    """Loss and gradient are those of the distribution written out."""
    student, log_p = distributions(lengths, seed)
    student.requires_grad_()
    p = dense(log_p, k, "drop" if k == VOCABULARY else remainder)
    per_token = torch.nn.functional.kl_div(student.log_softmax(-1), p, reduction="none").sum(-1)
    expected = torch.stack([part.mean() for part in per_token.split(lengths)])
    found = soft_label_losses(student, cut(log_p, k), lengths, remainder)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(losses.sum(), student)[0] for losses in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_soft_labels_of_a_teacher_that_is_certain() -> None:
    """The whole mass on one token: cross-entropy, and no nan from the tokens that are ruled out."""
    student = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(0)).requires_grad_()
    answers = torch.tensor([2, 0, 7])
    log_p = torch.full((3, VOCABULARY), float("-inf"))
    log_p[torch.arange(3), answers] = 0.0
    expected = cross_entropy_losses(student, answers, [1, 2])
    for teacher, remainder in ((log_p[None], "spread"), (cut(log_p, 2), "spread"), (cut(log_p, 1), "drop")):
        found = soft_label_losses(student, teacher, [1, 2], remainder)
        torch.testing.assert_close(found, expected)
        (gradient,) = torch.autograd.grad(found.sum(), student)
        assert gradient.isfinite().all()


def test_ids_of_large_vocabularies_survive_float32() -> None:
    student = torch.zeros(1, 300_000)
    student[0, 262_143] = 20.0
    teacher = torch.tensor([[[262_143.0]], [[0.0]]])
    assert float(soft_label_losses(student, teacher, [1], "spread")) < 0.01
