"""The training stages: fine-tuning, alignment with ICL activations, both at once, distillation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ia2.models.packing import row_attention
from ia2.teacher.targets import Targets, pack_soft
from ia2.training.alignment import Alignment, AlignmentSettings, teacher_pass
from ia2.training.dataset import AnswerDataset, lengths_of, parts_of, run_parts
from ia2.training.example_trainer import (
    BestWeights,
    ExampleTrainer,
    StageSettings,
    last_complete_checkpoint,
)
from ia2.training.objectives import cross_entropy_losses, soft_label_losses
from ia2.utils.errors import ConfigError
from ia2.utils.logging import Progress, logger

__all__ = [
    "AlignTrainer",
    "BestWeights",
    "ExampleTrainer",
    "MixedTrainer",
    "SftTrainer",
    "SoftTrainer",
    "StageSettings",
    "last_complete_checkpoint",
]

# Training rows on which alignment is measured before the first step, where there are no dev rows.
_FIRST = 32

# Rows that are looked at for a short one, to find the weights that alignment reaches.
_LOOK_AT = 64


class SftTrainer(ExampleTrainer):
    """Cross-entropy on the answers."""

    def example_losses(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """Mean cross-entropy over each row's answer tokens, ``[B]``."""
        parts = parts_of(batch)
        logits, _ = run_parts(model, parts, logits=True)
        assert logits is not None
        return cross_entropy_losses(logits, batch["answers"].to(logits.device), lengths_of(parts))


class AlignTrainer(ExampleTrainer):
    """Trains an adapter to give, without demonstrations, the activations that the base has with them.

    Minimises ``L_IA2`` (METHOD: stages). The language-model head does not run (but for one position),
    and adapters from which no path leads to an aligned activation are frozen meanwhile.

    Args:
        model: a PEFT model.
        train_dataset: rows with the teacher's answers, and targets; where the targets are online, the
            rows carry their contexts.
        eval_dataset: the same of the dev examples.
        settings: see :class:`StageSettings`.
        tokenizer: gives the padding id.
        objective: a key of :data:`ia2.training.objectives.OBJECTIVES`.
        temperature: τ of ``kl``.
        normalise: divide each layer's loss by the mean square of its targets.
        layers: layers to align; None: all that have targets.
        attention_modules: glob, for models whose attention is not recognised.
        progress: advanced once a step.

    Raises:
        ConfigError: reentrant activation checkpointing, an unknown objective, or an adapter none of
            whose weights reach an aligned activation.
    """

    def __init__(
        self,
        model: Any,
        train_dataset: AnswerDataset,
        eval_dataset: AnswerDataset,
        settings: StageSettings,
        tokenizer: Any,
        *,
        objective: str = "mse",
        temperature: float = 1.0,
        normalise: bool = False,
        layers: Sequence[int] | None = None,
        attention_modules: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        how = AlignmentSettings(objective, temperature, normalise, layers, attention_modules)
        self.alignment = Alignment(model, how, _targets_of(train_dataset))
        self._may_pack = how.site != "weights"
        super().__init__(model, train_dataset, eval_dataset, settings, tokenizer, progress)
        self._pathless = self._freeze_pathless()

    def example_losses(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """``Σ_layers mean_tokens`` of the objective for each row, ``[B]``."""
        _, student = run_parts(
            model, parts_of(batch, "response"), logits=False, **self.alignment.watching(batch)
        )
        assert student is not None
        return self.alignment.losses(self.model, batch, student)

    def _freeze_pathless(self) -> list[torch.nn.Parameter]:
        """Freeze adapter weights that L_IA2 does not reach, such as those behind the last attention.

        They would have no gradient, on which DDP fails. Found by one backward pass over a short training
        row, so any adapter and any choice of layers is covered.
        """
        dataset = self.train_dataset
        trainable = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        shortest = min(range(min(len(dataset), _LOOK_AT)), key=lambda i: len(dataset.row(i).query))
        batch = self._prepare_inputs(self.data_collator([dataset[shortest]]))
        self.model.to(self.args.device)
        with (
            torch.random.fork_rng(devices=range(torch.cuda.device_count())),
            row_attention(self.model),
        ):
            loss = self.example_losses(self.model, batch).sum()
            if loss.requires_grad:  # else not one weight is on the way
                loss.backward()
        without = [(n, p) for n, p in trainable if p.grad is None]
        for _, parameter in trainable:
            parameter.grad = None
        if len(without) == len(trainable):
            raise ConfigError(
                "no adapter weight lies on a path to an aligned activation; choose other target modules or "
                "layers."
            )
        if without:
            logger.info(
                "Alignment: %d of %d trained tensors lie behind the last aligned activation and are frozen "
                "in this stage (%s …).",
                len(without),
                len(trainable),
                without[0][0],
            )
        for _, parameter in without:
            parameter.requires_grad_(False)
        return [parameter for _, parameter in without]

    def fit(self) -> float:
        """Train (see :meth:`ExampleTrainer.fit`); frozen adapters are free again afterwards."""
        try:
            return super().fit()
        finally:
            for parameter in self._pathless:
                parameter.requires_grad_(True)


class MixedTrainer(ExampleTrainer):
    """``w_align · L_IA2 + w_answer · cross-entropy``, with weights that may change from step to step.

    The joint stage of ``ia2+sft`` (METHOD: stages), and fine-tuning that keeps a decaying alignment term.
    On the same rows one forward pass gives both terms, unless the answer and the teacher's answer differ
    beyond their last token. On different ones, every row that is aligned on comes with one ``beside`` it.

    Args:
        model: a PEFT model.
        train_dataset: rows with answers and the teacher's answers, and targets.
        eval_dataset: the same of the dev examples.
        settings: see :class:`StageSettings`.
        tokenizer: gives the padding id.
        how: how alignment is measured.
        align_weight: weight of ``L_IA2`` at an optimiser step.
        answer_weight: weight of cross-entropy.
        dev: judge dev rows by both terms, or by cross-entropy alone.
        beside: training and dev rows of the cross-entropy, where they are others.
        relative: divide ``L_IA2`` by its value before the first step (METHOD: unlabelled queries).
        progress: advanced once a step.
    """

    def __init__(
        self,
        model: Any,
        train_dataset: AnswerDataset,
        eval_dataset: AnswerDataset,
        settings: StageSettings,
        tokenizer: Any,
        *,
        how: AlignmentSettings,
        align_weight: Callable[[int], float],
        answer_weight: float = 1.0,
        dev: str = "both",
        beside: tuple[AnswerDataset, AnswerDataset] | None = None,
        relative: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.alignment = Alignment(model, how, _targets_of(train_dataset))
        self._may_pack = how.site != "weights"
        self.align_weight, self.answer_weight, self.dev = align_weight, answer_weight, dev
        self.relative, self.scale = relative, 1.0
        self._term: str | None = None  # of dev rows, where only one is asked for
        if beside is not None:
            train_dataset = replace(train_dataset, beside=beside[0])
            eval_dataset = replace(eval_dataset, beside=beside[1])
        super().__init__(model, train_dataset, eval_dataset, settings, tokenizer, progress)

    def fit(self) -> float:
        """Train (see :meth:`ExampleTrainer.fit`); a relative ``L_IA2`` is measured first, on dev rows."""
        if self.relative:
            first = self._first_alignment()
            self.scale = 1 / first if first > 0 else 0.0 if first == 0 else first
        return super().fit()

    def _first_alignment(self) -> float:
        """``L_IA2`` of the weights that the stage begins with, the same after a restart and everywhere."""
        rows = self.eval_dataset
        if not len(rows):
            rows = replace(self.train_dataset, indices=self.train_dataset.indices[:_FIRST])
        return self._everywhere(self._mean_of("alignment", rows))

    def example_losses(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """The weighted sum of both terms for each row, ``[B]``."""
        weight = self.align_weight(self.state.global_step) * self.scale
        if "beside" not in batch:
            return self._losses(model, batch, weight)
        answers = self._cross_entropy(model, batch["beside"])
        return self.answer_weight * answers + weight * self._alignment_losses(model, batch)

    def dev_losses(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """The same, or one term alone, ``[B]``."""
        if self._term == "alignment":
            return self._alignment_losses(model, batch)
        if self._term == "answers":
            return self._cross_entropy(model, batch)
        return self._losses(model, batch, self.align_weight(0) * self.scale if self.dev == "both" else 0.0)

    def _mean_loss(self, dataset: AnswerDataset) -> float:
        if dataset.beside is None or self._term is not None:
            return super()._mean_loss(dataset)
        # without dev rows of one kind the other is what is left to go by
        terms = [
            weight * self._mean_of(term, rows)
            for term, weight, rows in (
                ("alignment", self.align_weight(0) * self.scale, dataset),
                ("answers", self.answer_weight, dataset.beside),
            )
            if len(rows)
        ]
        return sum(terms) if terms else float("nan")

    def _mean_of(self, term: str, dataset: AnswerDataset) -> float:
        self._term = term
        try:
            return super()._mean_loss(dataset)
        finally:
            self._term = None

    def _cross_entropy(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        parts = parts_of(batch)
        logits, _ = run_parts(model, parts, logits=True)
        assert logits is not None
        return cross_entropy_losses(logits, batch["answers"].to(logits.device), lengths_of(parts))

    def _alignment_losses(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        watched = self.alignment.watching(batch)
        _, student = run_parts(model, parts_of(batch, "response"), logits=False, **watched)
        assert student is not None
        return self.alignment.losses(self.model, batch, student)

    def _losses(self, model: Any, batch: dict[str, Any], align_weight: float) -> torch.Tensor:
        """Both terms of the same rows."""
        parts = parts_of(batch)
        # a weight that is not finite is one that diverged
        watched = self.alignment.watching(batch) if align_weight != 0 else {}
        together = "response" not in batch
        logits, student = run_parts(model, parts, logits=True, **(watched if together else {}))
        assert logits is not None
        losses = self.answer_weight * cross_entropy_losses(
            logits, batch["answers"].to(logits.device), lengths_of(parts)
        )
        if not watched:
            return losses
        if student is None:
            return losses + align_weight * self._alignment_losses(model, batch)
        return losses + align_weight * self.alignment.losses(self.model, batch, student)


class SoftTrainer(ExampleTrainer):
    """Distillation: KL of the teacher's token distributions on ``Ŷ`` to the model's (METHOD: stages).

    Args:
        model: a PEFT model.
        train_dataset: rows of the teacher's answers, with its distributions (``soft``); where these are
            online, the rows carry their contexts.
        eval_dataset: the same of the dev examples.
        settings: see :class:`StageSettings`.
        tokenizer: gives the padding id.
        top_k: of distributions computed online; None: the whole vocabulary.
        remainder: what becomes of the mass outside the top k: ``spread`` or ``drop``.
        progress: advanced once a step.
    """

    def __init__(
        self,
        model: Any,
        train_dataset: AnswerDataset,
        eval_dataset: AnswerDataset,
        settings: StageSettings,
        tokenizer: Any,
        *,
        top_k: int | None = None,
        remainder: str = "drop",
        progress: Progress | None = None,
    ) -> None:
        self.top_k, self.remainder = top_k, remainder
        super().__init__(model, train_dataset, eval_dataset, settings, tokenizer, progress)

    def example_losses(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """``mean_tokens KL(teacher ‖ student)`` for each row, ``[B]``."""
        if "soft" in batch:
            teacher = batch["soft"]
        else:
            logits, _ = teacher_pass(self.model, batch, logits=True)
            assert logits is not None
            teacher = pack_soft(logits.float().softmax(-1), self.top_k)
        parts = parts_of(batch, "response")
        student, _ = run_parts(model, parts, logits=True)
        assert student is not None
        return soft_label_losses(student, teacher.to(student.device), lengths_of(parts), self.remainder)


def _targets_of(dataset: AnswerDataset) -> Targets:
    if dataset.targets is None:
        raise ConfigError("alignment needs targets; the training rows have none.")
    return dataset.targets
