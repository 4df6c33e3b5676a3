"""``L_IA2`` of a batch: which activations are compared, on which layers, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ia2.adapters.weights import base_weights
from ia2.models.capture import ActivationCapture
from ia2.training.dataset import lengths_of, parts_of, run_parts
from ia2.training.objectives import OBJECTIVES, alignment_losses
from ia2.utils.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from ia2.teacher.targets import Targets


@dataclass(frozen=True)
class AlignmentSettings:
    """How alignment is measured.

    Attributes:
        objective: a key of :data:`ia2.training.objectives.OBJECTIVES`.
        temperature: τ of ``kl``.
        normalise: divide each layer's loss by the mean square of its targets.
        layers: layer indices; None aligns all that have targets.
        attention_modules: glob, for models whose attention is not recognised.
    """

    objective: str = "mse"
    temperature: float = 1.0
    normalise: bool = False
    layers: Sequence[int] | None = None
    attention_modules: str | None = None

    @property
    def site(self) -> str:
        """Which activations the objective compares (see :class:`~ia2.models.capture.ActivationCapture`)."""
        return OBJECTIVES[self.objective].site


class Alignment:
    """Captures the student's activations and compares them with the teacher's.

    Args:
        model: a PEFT model, adapter on.
        settings: see :class:`AlignmentSettings`.
        targets: the teacher's targets of the training examples; gives layers and scales.

    Raises:
        ConfigError: an unknown objective.
        ModelError: activations that this model does not give.
    """

    def __init__(self, model: Any, settings: AlignmentSettings, targets: Targets) -> None:
        import torch

        if settings.objective not in OBJECTIVES:
            raise ConfigError(f"objective '{settings.objective}' is not one of {', '.join(OBJECTIVES)}.")
        self.settings = settings
        layers = list(targets.layers if settings.layers is None else settings.layers)
        self.capture = ActivationCapture(model, settings.attention_modules, layers, site=settings.site)
        self._rows = [targets.layers.index(layer) for layer in self.capture.layers]
        self._rms = torch.tensor(targets.rms)[self._rows]

    def watching(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What :func:`ia2.training.dataset.run_parts` is given to capture what is compared."""
        spans = batch["spans"] if self.settings.site == "weights" else None
        return {"capture": self.capture, "spans": spans}

    def teacher(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """``A_ICL`` of the aligned layers, ``[L, ΣG, …]``: stored, or the base model's at this moment."""
        if "targets" in batch:
            return batch["targets"][self._rows]  # type: ignore[no-any-return]
        _, found = teacher_pass(model, batch, logits=False, **self.watching(batch))
        assert found is not None
        return found

    def losses(self, model: Any, batch: dict[str, Any], student: torch.Tensor) -> torch.Tensor:
        """``Σ_layers mean_tokens`` of the objective for each row, ``[B]``.

        Args:
            model: runs the teacher where targets are computed online.
            batch: collated rows.
            student: what the pass left at the answer positions of ``Ŷ``, ``[L, ΣG, …]``, with gradient.
        """
        return alignment_losses(
            self.settings.objective,
            student,
            self.teacher(model, batch).to(student.device),
            lengths_of(parts_of(batch, "response")),
            self._rms.to(student.device),
            self.settings.temperature,
            self.settings.normalise,
        )


def teacher_pass(
    model: Any, batch: dict[str, Any], *, logits: bool, **watched: Any
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The base model over the context part of a batch: dropout off, no gradient.

    Returns:
        As :func:`ia2.training.dataset.run_parts`.
    """
    import torch

    training = model.training
    model.eval()
    try:
        with torch.no_grad(), base_weights(model):
            return run_parts(model, parts_of(batch, "context"), logits=logits, **watched)
    finally:
        model.train(training)
