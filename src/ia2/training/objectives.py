"""Objectives: how far adapted activations are from the teacher's, and how far answers are from the truth.

An alignment objective is a function of activations ``[L, T, …]`` (T answer tokens of all examples of a batch,
one after the other) that gives a loss per layer and token ``[L, T]``. The sum over layers, the mean over an
example's tokens and the mean over the examples of the effective batch follow in one place each (METHOD:
stages), so an example weighs the same whatever its answer's length.

To add an objective, write its function and add one entry to :data:`OBJECTIVES` (and its name to
``ia2.config.recipes.OBJECTIVE_NAMES``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

# Below this a probability of the student's counts as this: the logarithm of 0 is no loss.
_LEAST = 1e-12


class Objective(NamedTuple):
    """What is compared, and how.

    Attributes:
        site: where the activations are read (``ia2.models.capture.SITES``).
        loss: ``(student, teacher, rms, temperature) → [L, T]``. Student and teacher are ``[L, T, d]``, on
            the site ``weights`` ``[L, T, H, S]``; rms is the root mean square of each layer over the
            training targets, ``[L]``.
    """

    site: str
    loss: Callable[[Tensor, Tensor, Tensor, float], Tensor]


def mse(student: Tensor, teacher: Tensor, rms: Tensor, temperature: float) -> Tensor:
    """``mean_d (A − A_ICL)²`` (the paper, equation of L_IA2).

    The objectives ``heads`` and ``residual`` are the same of other activations: the outputs of all
    attention heads side by side, before the output projection mixes them (d = H·d_head); and the
    residual stream after the layer, which holds what the layer's MLP and all layers before have added.
    """
    return (student - teacher).pow(2).mean(-1)


def kl(student: Tensor, teacher: Tensor, rms: Tensor, temperature: float) -> Tensor:
    """Activations as soft targets over their d features (METHOD: alignment objectives).

    ``τ_l² · KL(p‖q)`` with ``p = softmax(A_ICL/τ_l)``, ``q = softmax(A/τ_l)``, ``τ_l = τ · rms_l``. As τ
    grows, twice this tends to the MSE of the activations centred over d.
    """
    tau = (temperature * rms).clamp_min(1e-12)[:, None, None]
    log_p = (teacher / tau).log_softmax(-1)
    log_q = (student / tau).log_softmax(-1)
    return tau.squeeze(-1).pow(2) * (log_p.exp() * (log_p - log_q)).sum(-1)


def cosine(student: Tensor, teacher: Tensor, rms: Tensor, temperature: float) -> Tensor:
    """``1 − cos(A, A_ICL)`` (METHOD: alignment objectives)."""
    import torch

    return 1 - torch.nn.functional.cosine_similarity(student, teacher, dim=-1)


def attention(student: Tensor, teacher: Tensor, rms: Tensor, temperature: float) -> Tensor:
    """``mean_h KL(w_ICL‖w)``: where each head looks, among the tokens that both contexts have.

    ``w_ICL`` and ``w`` are the attention probabilities over the query's own tokens and the answer so far,
    made to sum to 1 over these; what goes to the demonstrations, which the student does not have, and to
    tokens before the query is left out. Not in the paper: an ablation of what is aligned.
    """
    import torch

    log_ratio = teacher.clamp_min(_LEAST).log() - student.clamp_min(_LEAST).log()
    return torch.where(teacher > 0, teacher * log_ratio, 0).sum(-1).mean(-1)


OBJECTIVES: dict[str, Objective] = {
    "mse": Objective("output", mse),
    "kl": Objective("output", kl),
    "cosine": Objective("output", cosine),
    "heads": Objective("heads", mse),
    "residual": Objective("residual", mse),
    "attention": Objective("weights", attention),
}


def alignment_losses(
    objective: str,
    student: Tensor,
    teacher: Tensor,
    answer_lengths: Sequence[int],
    rms: Tensor,
    temperature: float = 1.0,
    normalise: bool = False,
) -> Tensor:
    """``L_IA2`` of every example of a batch: sum over layers, mean over the example's G tokens.

    Student and teacher are ``[L, T, d]`` with T = ΣG (attention weights ``[L, T, H, S]``), rms is ``[L]``.
    With ``normalise`` each layer's loss is divided by ``rms_l²`` (METHOD: alignment objectives), so that
    layers of large activations do not outweigh the others. Gives ``[B]``, in float32.
    """
    rms = rms.float()
    per_token = OBJECTIVES[objective].loss(student.float(), teacher.float(), rms, temperature)
    if normalise:
        per_token = per_token / rms.pow(2).clamp_min(_LEAST)[:, None]
    return mean_by_example(per_token.sum(0), answer_lengths)


def cross_entropy_losses(logits: Tensor, targets: Tensor, answer_lengths: Sequence[int]) -> Tensor:
    """Cross-entropy of every example of a batch, mean over its G answer tokens: ``[B]``, in float32.

    Logits are those at answer positions, ``[T, V]`` with T = ΣG; targets are answer ids, ``[T]``.
    """
    import torch

    per_token = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    return mean_by_example(per_token, answer_lengths)


def soft_label_losses(
    logits: Tensor, teacher: Tensor, answer_lengths: Sequence[int], remainder: str = "drop"
) -> Tensor:
    """``KL(p_ICL‖p)`` over the vocabulary, of every example of a batch: mean over its answer tokens.

    The objective of ``soft-sft`` (METHOD: recipes). With the k most probable tokens only, what is left of
    the teacher's mass, ``r = 1 − Σ_top p``, is either spread evenly over the other V − k tokens:
    ``Σ_top p·(log p − log q) + r·log(r/(V−k)) − r/(V−k)·Σ_rest log q``; or dropped, and p made to sum to 1.

    Args:
        logits: the student's, at answer positions, ``[T, V]``.
        teacher: ``[1, T, V]``, log-probabilities of the whole vocabulary; or ``[2, T, k]``, ids of the k
            most probable tokens (as float32) and their log-probabilities.
        answer_lengths: G of each example, ΣG = T.
        remainder: ``spread`` or ``drop``.
    """
    import torch

    log_q = logits.float().log_softmax(-1)
    if teacher.shape[0] == 1:
        return mean_by_example(_divergence(teacher[0].float(), log_q), answer_lengths)
    log_p = teacher[1].float()
    top = log_q.gather(-1, teacher[0].long())
    if remainder == "drop":
        return mean_by_example(_divergence(log_p.log_softmax(-1), top), answer_lengths)
    per_token = _divergence(log_p, top)
    others = log_q.shape[-1] - log_p.shape[-1]
    if others:
        # rounding may leave the sum a little above 1
        rest = (1 - log_p.exp().sum(-1)).clamp_min(0)
        share = rest / others
        per_token = per_token + torch.xlogy(rest, share) - share * (log_q.sum(-1) - top.sum(-1))
    return mean_by_example(per_token, answer_lengths)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``Σ p·(log p − log q)`` over the last axis; tokens that p rules out (log p = −∞) add nothing."""
    import torch

    return torch.where(log_p.isneginf(), 0, log_p.exp() * (log_p - log_q)).sum(-1)


def mean_by_example(per_token: Tensor, answer_lengths: Sequence[int]) -> Tensor:
    """Means of consecutive runs of ``[T]``, one for each example: ``[B]``."""
    import torch

    return torch.stack([part.mean() for part in per_token.split(list(answer_lengths))])
