"""What a stage minimises: the loss of each row of a batch, ``[B]``, with gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ia2.adapters.weights import base_weights
from ia2.config.sections import AlignConfig
from ia2.models.capture import ActivationCapture
from ia2.teacher.targets import OnlineTargets, pack_soft
from ia2.training.dataset import AnswerDataset, fed_rows, run_rows
from ia2.training.objectives import OBJECTIVES, alignment_losses, cross_entropy_losses, soft_label_losses

if TYPE_CHECKING:
    from ia2.training.trainer import ExampleTrainer

# Training rows on which alignment is measured before the first step, where there are no dev rows.
_FIRST = 32


class Loss(ABC):
    """A loss of rows; subclasses say what it is.

    Attributes:
        packs: whether rows may be packed (attention weights are read in padded rows).
    """

    packs = True

    @abstractmethod
    def __call__(self, model: Any, batch: dict[str, Any], step: int = 0) -> Tensor:
        """Of each row of a collated batch, ``[B]``, at an optimiser step."""

    def dev_terms(self, rows: AnswerDataset) -> list[tuple[float, Loss, AnswerDataset]]:
        """What dev rows are judged by: weight, loss and rows of each term of the sum."""
        return [(1.0, self, rows)]

    def begin(self, trainer: ExampleTrainer) -> None:  # noqa: B027 - most losses need nothing
        """Called before a stage's first step, or its first after a restart."""


class AnswerLoss(Loss):
    """Cross-entropy, mean over each row's answer tokens."""

    def __call__(self, model: Any, batch: dict[str, Any], step: int = 0) -> Tensor:
        logits, _ = run_rows(model, fed_rows(batch), logits=True)
        return _cross_entropy(logits, batch)


class AlignmentLoss(Loss):
    """``L_IA2``: ``Σ_layers mean_tokens`` of the objective.

    Args:
        model: a PEFT model, adapter on.
        settings: objective, temperature, scale and layers, which are indices or ``all`` that have targets.
        targets: the teacher's targets of the training rows; gives layers and scales.
        attention_modules: glob, for models whose attention is not recognised.
    """

    def __init__(
        self, model: Any, settings: AlignConfig, targets: OnlineTargets, attention_modules: str | None = None
    ) -> None:
        self.model, self.settings = model, settings
        site = OBJECTIVES[settings.objective].site
        self.packs = site != "weights"
        layers = targets.layers if isinstance(settings.layers, str) else settings.layers
        self.capture = ActivationCapture(model, attention_modules, list(layers), site=site)
        self._rows = [targets.layers.index(layer) for layer in self.capture.layers]
        self._rms = torch.tensor(targets.rms)[self._rows]

    def __call__(self, model: Any, batch: dict[str, Any], step: int = 0) -> Tensor:
        return self.compare(batch, self.student(model, batch))

    def watching(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What :func:`run_rows` is given to capture what is compared."""
        return {"capture": self.capture, "spans": None if self.packs else batch["spans"]}

    def student(self, model: Any, batch: dict[str, Any]) -> Tensor:
        """``A`` at the answer positions of ``Ŷ``, ``[L, ΣG, …]``."""
        rows = fed_rows(batch, "response")
        activations: Tensor = run_rows(model, rows, logits=False, **self.watching(batch))[1]
        return activations

    def teacher(self, batch: dict[str, Any]) -> Tensor:
        """``A_ICL`` of the aligned layers, ``[L, ΣG, …]``: stored, or the base model's at this moment."""
        if "targets" in batch:
            activations: Tensor = batch["targets"][self._rows]
        else:
            _, activations = _teacher_pass(self.model, batch, logits=False, **self.watching(batch))
        return activations

    def compare(self, batch: dict[str, Any], student: Tensor) -> Tensor:
        """The loss of each row, given the student's activations."""
        return alignment_losses(
            self.settings.objective,
            student,
            self.teacher(batch).to(student.device),
            fed_rows(batch, "response").answer_lengths,
            self._rms.to(student.device),
            self.settings.temperature,
            self.settings.normalise,
        )


@dataclass
class JointLoss(Loss):
    """``w_align · L_IA2 + w_answer · cross-entropy``, with a weight that may change from step to step.

    The joint stage of ``ia2+sft`` (METHOD: stages), and fine-tuning that keeps a decaying alignment term.
    On the same rows one forward pass gives both terms, unless the answer and the teacher's answer differ
    beyond their last token. On different ones, every row that is aligned on comes with one ``beside`` it.

    Attributes:
        align: ``L_IA2``.
        align_weight: its weight at an optimiser step.
        answer_weight: weight of cross-entropy.
        dev_answers: judge dev rows by cross-entropy alone.
        relative: divide ``L_IA2`` by its value before the first step (METHOD: unlabelled queries).
    """

    align: AlignmentLoss
    align_weight: Callable[[int], float]
    answer_weight: float = 1.0
    dev_answers: bool = False
    relative: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        self.packs = self.align.packs

    def begin(self, trainer: ExampleTrainer) -> None:
        if not self.relative:
            return
        rows = trainer.eval_dataset
        if not len(rows):
            rows = replace(trainer.train_dataset, indices=trainer.train_dataset.indices[:_FIRST])
        first = trainer.everywhere(trainer.mean_loss(self.align, rows))
        # what is not finite stays so: the stage diverged before its first step
        self.scale = 1 / first if first > 0 else 0.0 if first == 0 else first

    def dev_terms(self, rows: AnswerDataset) -> list[tuple[float, Loss, AnswerDataset]]:
        if self.dev_answers:
            return [(self.answer_weight, AnswerLoss(), rows)]
        if rows.beside is None:
            return [(1.0, self, rows)]
        weight = self.align_weight(0) * self.scale
        return [(weight, self.align, rows), (self.answer_weight, AnswerLoss(), rows.beside)]

    def __call__(self, model: Any, batch: dict[str, Any], step: int = 0) -> Tensor:
        weight = self.align_weight(step) * self.scale
        if "beside" in batch:
            answers = AnswerLoss()(model, batch["beside"])
            return self.answer_weight * answers + weight * self.align(model, batch)
        # a weight that is not finite is one that diverged
        aligned, together = weight != 0, "response" not in batch
        watched = self.align.watching(batch) if aligned and together else {}
        logits, student = run_rows(model, fed_rows(batch), logits=True, **watched)
        losses = self.answer_weight * _cross_entropy(logits, batch)
        if not aligned:
            return losses
        if student is None:
            student = self.align.student(model, batch)
        return losses + weight * self.align.compare(batch, student)


@dataclass
class SoftLoss(Loss):
    """Distillation: KL of the teacher's token distributions on ``Ŷ`` to the model's (METHOD: stages).

    ``model`` is the teacher too, with the adapter off, where distributions are computed online.
    """

    model: Any
    top_k: int | None = None
    remainder: str = "drop"

    def __call__(self, model: Any, batch: dict[str, Any], step: int = 0) -> Tensor:
        if "soft" in batch:
            teacher = batch["soft"]
        else:
            logits, _ = _teacher_pass(self.model, batch, logits=True)
            teacher = pack_soft(logits.float().softmax(-1), self.top_k)
        rows = fed_rows(batch, "response")
        student, _ = run_rows(model, rows, logits=True)
        return soft_label_losses(student, teacher.to(student.device), rows.answer_lengths, self.remainder)


def _cross_entropy(logits: Tensor, batch: dict[str, Any]) -> Tensor:
    return cross_entropy_losses(logits, batch["answers"].to(logits.device), fed_rows(batch).answer_lengths)


def _teacher_pass(model: Any, batch: dict[str, Any], *, logits: bool, **watched: Any) -> tuple[Any, Any]:
    """:func:`run_rows` of the base model over the context part: dropout off, no gradient."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), base_weights(model):
            return run_rows(model, fed_rows(batch, "context"), logits=logits, **watched)
    finally:
        model.train(training)
