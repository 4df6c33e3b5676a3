"""Objectives: how far adapted activations are from the teacher's, and how far answers are from the truth.

Every alignment objective is a function of packed activations ``[L, T, d]`` (T answer tokens of all
examples of a batch, one after the other) that gives a loss per layer and token ``[L, T]``. The sum
over layers, the mean over an example's tokens and the mean over the examples of the effective batch
follow in one place each (METHOD: stages), so an example weighs the same whatever its answer's length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Objective = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor", float], "torch.Tensor"]


def mse(student: torch.Tensor, teacher: torch.Tensor, rms: torch.Tensor, temperature: float) -> torch.Tensor:
    """``mean_d (A − A_ICL)²`` (the paper, equation of L_IA2).

    Args:
        student: ``A``, ``[L, T, d]``.
        teacher: ``A_ICL``, ``[L, T, d]``.
        rms: unused.
        temperature: unused.

    Returns:
        ``[L, T]``.
    """
    return (student - teacher).pow(2).mean(-1)


def kl(student: torch.Tensor, teacher: torch.Tensor, rms: torch.Tensor, temperature: float) -> torch.Tensor:
    """Activations as soft targets over their d features.

    ``τ_l² · KL(p‖q)`` with ``p = softmax(A_ICL/τ_l)``, ``q = softmax(A/τ_l)``, ``τ_l = τ · rms_l``. As τ
    grows, twice this tends to the MSE of the activations centred over d.

    Args:
        student: ``A``, ``[L, T, d]``.
        teacher: ``A_ICL``, ``[L, T, d]``.
        rms: root mean square of each layer over the training targets, ``[L]``.
        temperature: τ.

    Returns:
        ``[L, T]``.
    """
    tau = (temperature * rms).clamp_min(1e-12)[:, None, None]
    log_p = (teacher / tau).log_softmax(-1)
    log_q = (student / tau).log_softmax(-1)
    return tau.squeeze(-1).pow(2) * (log_p.exp() * (log_p - log_q)).sum(-1)


def cosine(
    student: torch.Tensor, teacher: torch.Tensor, rms: torch.Tensor, temperature: float
) -> torch.Tensor:
    """``1 − cos(A, A_ICL)``; arguments as in :func:`mse`.

    Returns:
        ``[L, T]``.
    """
    import torch

    return 1 - torch.nn.functional.cosine_similarity(student, teacher, dim=-1)


OBJECTIVES: dict[str, Objective] = {"mse": mse, "kl": kl, "cosine": cosine}


def alignment_losses(
    objective: str,
    student: torch.Tensor,
    teacher: torch.Tensor,
    answer_lengths: Sequence[int],
    rms: torch.Tensor,
    temperature: float = 1.0,
) -> torch.Tensor:
    """``L_IA2`` of every example of a batch: sum over layers, mean over the example's tokens.

    Args:
        objective: a key of :data:`OBJECTIVES`.
        student: ``[L, T, d]`` with T = ΣG.
        teacher: ``[L, T, d]``.
        answer_lengths: G of each example.
        rms: ``[L]``.
        temperature: τ of ``kl``.

    Returns:
        ``[B]``, in float32.
    """
    per_token = OBJECTIVES[objective](student.float(), teacher.float(), rms.float(), temperature)
    return mean_by_example(per_token.sum(0), answer_lengths)


def cross_entropy_losses(
    logits: torch.Tensor, targets: torch.Tensor, answer_lengths: Sequence[int]
) -> torch.Tensor:
    """Cross-entropy of every example of a batch: mean over its answer tokens.

    Args:
        logits: at answer positions, ``[T, V]``.
        targets: answer ids, ``[T]``.
        answer_lengths: G of each example, ΣG = T.

    Returns:
        ``[B]``, in float32.
    """
    import torch

    per_token = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    return mean_by_example(per_token, answer_lengths)


def mean_by_example(per_token: torch.Tensor, answer_lengths: Sequence[int]) -> torch.Tensor:
    """Means of consecutive runs of ``[T]``, one for each example: ``[B]``."""
    import torch

    return torch.stack([part.mean() for part in per_token.split(list(answer_lengths))])
