"""What all training stages have in common, on ``transformers.Trainer``.

Every stage weighs every *example* the same: the loss of an optimiser step is the mean over the examples
of the effective batch (all micro-batches, all processes) of a mean over the example's answer tokens. So
batch 1 × accumulation 8, batch 8 × accumulation 1 and two processes follow the same trajectory.
"""

from __future__ import annotations

import math
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from ia2.adapters.weights import adapter_state, load_adapter_state
from ia2.config import REENTRANT
from ia2.models.packing import packs, row_attention
from ia2.models.tokens import pad_id
from ia2.training.callbacks import BestWeights, Steps, last_complete_checkpoint
from ia2.training.dataset import AnswerDataset, Collator, EpochSampler
from ia2.training.schedule import Schedule
from ia2.utils.distributed import shards_model
from ia2.utils.errors import ConfigError, RunFolderError
from ia2.utils.imports import for_training
from ia2.utils.logging import Progress, logger
from ia2.utils.manifest import begin, root_of

with for_training():
    from transformers import PrinterCallback, Trainer, TrainingArguments

# Rows of one forward pass of the dev evaluation.
_EVAL_ROWS = 32

# The weights in a checkpoint.
_WEIGHTS = "adapter_state.safetensors"


@dataclass
class StageSettings:
    """What a stage needs to know beside model and data.

    Attributes:
        output_dir: where checkpoints go while it runs.
        learning_rate: constant.
        epochs: at most.
        batch_size: examples of one optimiser step, over all processes.
        micro_batch_size: rows of one forward pass and process; None: all at once.
        eval_every: optimiser steps between dev evaluations, besides each epoch's end; None: see
            :class:`~ia2.training.schedule.Schedule`.
        patience: dev evaluations without improvement before stopping; fewer where they are seldom.
        restore_best: end with the weights of the best dev loss.
        seed: of the order and of dropout.
        checkpoint_every: optimiser steps between checkpoints.
        activation_checkpointing: recompute activations in the backward pass.
        activation_checkpointing_kwargs: passed on; ``use_reentrant`` must be false.
        report_to: trackers.
    """

    output_dir: Path
    learning_rate: float = 1e-3
    epochs: int = 50
    batch_size: int = 4
    micro_batch_size: int | None = None
    eval_every: int | None = None
    patience: int = 5
    restore_best: bool = True
    seed: int = 0
    checkpoint_every: int = 100
    activation_checkpointing: bool = False
    activation_checkpointing_kwargs: dict[str, Any] = field(default_factory=dict)
    report_to: list[str] = field(default_factory=list)


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that transformers does not know, or whose package is not installed.

    Raises:
        ConfigError: there is one.
    """
    from transformers.integrations import get_available_reporting_integrations

    known = ["all", "none", *get_available_reporting_integrations()]
    for name in names:
        if name not in known:
            raise ConfigError(f"report_to: '{name}' is not installed. There are {', '.join(known)}.")


class ExampleTrainer(Trainer, ABC):
    """A Trainer whose unit is the example; subclasses say what one example's loss is.

    Adam with a constant rate, no weight decay, no clipping, a fresh optimiser in each stage; dev loss
    every few steps and at each epoch's end; stops early and restores the best weights (METHOD: paper
    hyper-parameters).

    Args:
        model: a PEFT model.
        train_dataset: what to train on.
        eval_dataset: dev rows; empty means no early stopping.
        settings: see :class:`StageSettings`.
        tokenizer: gives the padding id.
        progress: advanced once a step.

    Raises:
        ConfigError: reentrant activation checkpointing.
    """

    # transformers 5.18 and later; earlier ones look at model_accepts_loss_kwargs
    loss_is_scaled_for_ga = True

    # attention weights are read in padded rows
    _may_pack = True

    # narrower than the parent's, which may lack any of them
    model: Any
    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        model: Any,
        train_dataset: AnswerDataset,
        eval_dataset: AnswerDataset,
        settings: StageSettings,
        tokenizer: Any,
        progress: Progress | None = None,
    ) -> None:
        self._began = time.perf_counter()
        if settings.activation_checkpointing_kwargs.get("use_reentrant"):
            raise ConfigError(REENTRANT + ".")
        self.settings = settings
        self._orders: dict[int, tuple[AnswerDataset, list[int]]] = {}
        self._loss_is_finite: torch.Tensor | None = None  # of this process, since the last step
        collator = Collator(pad_id(tokenizer), alike=shards_model())
        arguments = self._arguments(settings, len(train_dataset), next(model.parameters()).device)
        self.schedule = Schedule(
            self.steps_per_epoch,
            settings.epochs,
            self._per_step,
            len(eval_dataset) * eval_dataset.permutations + len(eval_dataset.beside or ()),
            settings.eval_every,
            settings.patience,
        )
        self.best = BestWeights(self.schedule.waits, settings.restore_best)
        super().__init__(
            model=model,
            args=arguments,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=[self.best, Steps(progress or Progress())],
        )
        self.best.trainer = self
        collator.packed = self._may_pack and packs(model)
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True
        if settings.activation_checkpointing:
            _enable_checkpointing(self.model, settings.activation_checkpointing_kwargs)

    @property
    def seconds(self) -> float:
        """Spent so far, by earlier starts up to the checkpoint that this one went on from too."""
        return self.best.seconds_before + time.perf_counter() - self._began

    def _arguments(self, settings: StageSettings, count: int, device: torch.device) -> TrainingArguments:
        on_cpu = device.type == "cpu"
        probe = TrainingArguments(output_dir=str(settings.output_dir), use_cpu=on_cpu, report_to=[])
        world = probe.world_size
        self._per_step = min(settings.batch_size, count)
        per_process = -(-self._per_step // world)
        micro = min(settings.micro_batch_size or per_process, per_process)
        accumulation = -(-per_process // micro)
        self._slots = micro * accumulation * world
        self.steps_per_epoch = -(-count // self._per_step)
        arguments = TrainingArguments(
            output_dir=str(settings.output_dir),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            weight_decay=0.0,
            max_grad_norm=0.0,
            num_train_epochs=settings.epochs,
            # BestWeights asks for both, by the stage's schedule
            eval_strategy="no",
            logging_strategy="no",
            save_strategy="steps",
            save_steps=settings.checkpoint_every,
            save_total_limit=2,
            seed=settings.seed,
            use_cpu=on_cpu,
            report_to=settings.report_to,
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=not on_cpu,
            ddp_find_unused_parameters=False,
        )
        # nn.DataParallel would replicate the hooked modules; several GPUs are for `accelerate launch`
        arguments._n_gpu = min(arguments.n_gpu, 1)
        return arguments

    # ------------------------------------------------------------------------------------ the loss

    @abstractmethod
    def example_losses(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """Loss of each row of a batch, ``[B]``, with gradient."""

    def dev_losses(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """What a dev row is judged by, ``[B]``: the same, unless a subclass says otherwise."""
        return self.example_losses(model, batch)

    def compute_loss(  # type: ignore[override]
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """This micro-batch's share of the mean over the examples of the effective batch."""
        losses = self.example_losses(model, inputs)
        total = (losses * inputs["weights"].to(losses.device)).sum()
        count = num_items_in_batch if num_items_in_batch is not None else inputs["weights"].sum()
        finite = torch.isfinite(total.detach())
        self._loss_is_finite = finite if self._loss_is_finite is None else self._loss_is_finite & finite
        # gradients are averaged over processes afterwards, hence the factor
        return total / torch.as_tensor(count, device=total.device) * self.args.world_size

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward over a micro-batch, both with the same attention."""
        with row_attention(self.model):
            return super().training_step(*args, **kwargs)

    def step_is_finite(self) -> tuple[bool, bool]:
        """Whether the loss of the last step, and the weights after it, are finite; alike everywhere."""
        loss, self._loss_is_finite = self._loss_is_finite, None
        assert loss is not None and self.optimizer is not None
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]
        own = [w.to_local() if hasattr(w, "to_local") else w for w in weights]  # of a sharded weight
        largest = torch.nn.utils.get_total_norm([w.detach() for w in own if w.numel()], float("inf"))
        found = torch.stack([loss, torch.isfinite(largest).to(loss.device)]).int()
        if self.args.world_size > 1:
            found = self.accelerator.gather(found[None]).amin(0)
        return bool(found[0]), bool(found[1])

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor]:
        """The micro-batches of one optimiser step, and the number of examples in it everywhere."""
        batches = []
        for _ in range(num_batches):
            try:
                batches.append(next(epoch_iterator))
            except StopIteration:
                break
        count = torch.stack([batch["weights"].sum() for batch in batches]).sum().to(device)
        if self.args.world_size > 1:
            count = self.accelerator.gather(count.reshape(1)).sum()
        return batches, count

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        return EpochSampler(
            len(dataset),
            self._per_step,
            self._slots,
            dataset.permutations,
            self.settings.seed,
            lambda: self.state.global_step // self.steps_per_epoch,
            len(dataset.beside) if dataset.beside is not None else 0,
        )

    # -------------------------------------------------------------------------------- evaluation

    def evaluate(  # type: ignore[override]
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss over the dev examples; every process computes it and uses the first one's."""
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        loss = self._everywhere(self._mean_loss(dataset))
        metrics = {f"{metric_key_prefix}_loss": loss}
        if math.isfinite(loss):
            self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _everywhere(self, value: float) -> float:
        """The first process's value, in all of them."""
        if self.args.world_size > 1:
            from accelerate.utils import broadcast

            value = float(broadcast(torch.tensor(value, dtype=torch.float64, device=self.args.device)))
        return value

    def _mean_loss(self, dataset: AnswerDataset) -> float:
        if not len(dataset):
            return float("nan")
        total = 0.0
        for batch in self.batches(dataset):
            losses = self.dev_losses(self.model, batch)
            total += float(losses.double().sum()) / dataset.permutations
        return total / len(dataset)

    def batches(self, dataset: AnswerDataset) -> Iterator[dict[str, Any]]:
        """All rows with every target that they have, the longest first, for passes without gradient.

        The model is in evaluation mode meanwhile.
        """
        if id(dataset) not in self._orders:
            by_length = sorted(range(len(dataset)), key=lambda i: -len(dataset.row(i).query))
            self._orders[id(dataset)] = dataset, by_length  # kept, so that no other gets its id
        _, order = self._orders[id(dataset)]
        size = self.settings.micro_batch_size or _EVAL_ROWS
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), row_attention(self.model):
                for start in range(0, len(order), size):
                    for keys in _permuted(order[start : start + size], dataset.permutations):
                        yield self._prepare_inputs(self.data_collator([dataset[key] for key in keys]))
        finally:
            self.model.train(training)

    # ------------------------------------------------------------------------------- checkpoints

    # Our own file rather than PEFT's: that keeps what p-tuning's encoder computes, not the encoder.

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        from safetensors.torch import save_file

        folder = Path(output_dir or self.settings.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(adapter_state(self.model), folder / _WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        from safetensors.torch import load_file

        load_adapter_state(self.model, load_file(Path(resume_from_checkpoint) / _WEIGHTS))

    def fit(self) -> float:
        """Train, from the last complete checkpoint if there is one.

        Leaves the model with the weights that the settings ask for and no checkpoint behind.

        Returns:
            The best dev loss; NaN without dev rows, and where training diverged (``best.diverged``), which
            leaves weights that are of no use.
        """
        if root_of(self.settings.output_dir / "any") is None and self.is_world_process_zero():
            begin(self.settings.output_dir)  # a checkpoint without digests cannot be trusted
        self.accelerator.wait_for_everyone()
        checkpoint = last_complete_checkpoint(self.settings.output_dir)
        if checkpoint is not None:
            logger.info("Continuing from %s.", checkpoint)
        try:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except UnpicklingError as error:
            raise RunFolderError(
                f"{checkpoint}: holds more than numbers, and code in it is not run. Delete it and run the "
                "same command again."
            ) from error
        self.best.restore(self.model)
        self.model.eval()
        if self.settings.activation_checkpointing:
            _disable_checkpointing(self.model)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            for leftover in self.settings.output_dir.glob("checkpoint-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        return self.best.loss


def _permuted(indices: Sequence[int], permutations: int) -> Iterator[list[tuple[int, int, float]]]:
    for k in range(permutations):
        yield [(i, k, 1.0) for i in indices]


def _enable_checkpointing(model: Any, options: dict[str, Any]) -> None:
    """Non-reentrant activation checkpointing, under the name that this transformers knows."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    options = {**options, "use_reentrant": False}
    enable = getattr(inner, "activation_checkpointing_enable", None)
    if enable is not None:
        enable(activation_checkpointing_kwargs=options)
    else:
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _disable_checkpointing(model: Any) -> None:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    disable = getattr(inner, "activation_checkpointing_disable", None)
    (disable or inner.gradient_checkpointing_disable)()
