"""One trainer of all stages, on ``transformers.Trainer``; a stage is told apart by its loss.

Every *example* weighs the same: the loss of an optimiser step is the mean over the examples of the effective
batch (all micro-batches, all processes) of a mean over the example's answer tokens. So batch 1 × accumulation
8, batch 8 × accumulation 1 and two processes follow the same trajectory.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ia2.adapters.weights import adapter_state, load_adapter_state
from ia2.config import AdaptConfig
from ia2.config.sections import AlignConfig, StageConfig, StageSection
from ia2.models.packing import packs, row_attention
from ia2.models.tokens import pad_id
from ia2.training.best_weights import BestWeights, last_complete_checkpoint
from ia2.training.dataset import AnswerDataset, Collator, EpochSampler
from ia2.training.losses import AlignmentLoss, Loss
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

# Rows that are looked at for a short one, to find the weights that alignment reaches.
_LOOK_AT = 64

# The weights in a checkpoint.
_WEIGHTS = "adapter_state.safetensors"


class ExampleTrainer(Trainer):
    """A Trainer whose unit is the example, and whose loss is given.

    Adam with a constant rate, no weight decay, no clipping, a fresh optimiser in each stage; stops early and
    restores the best weights (METHOD: paper hyper-parameters).

    Args:
        model: a PEFT model.
        loss: what one example's loss is.
        train_dataset: what to train on.
        eval_dataset: dev rows; empty means no early stopping.
        tokenizer: gives the padding id.
        stage: epochs, and when to look at the dev rows and to stop.
        config: batch size, seed, checkpoints and trackers.
        output_dir: where checkpoints go while it runs.
        learning_rate: constant.
        progress: advanced once a step.
    """

    # transformers 5.18 and later; earlier ones look at model_accepts_loss_kwargs
    loss_is_scaled_for_ga = True

    # narrower than the parent's, which may lack any of them
    model: Any
    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        model: Any,
        loss: Loss,
        train_dataset: AnswerDataset,
        eval_dataset: AnswerDataset,
        tokenizer: Any,
        *,
        output_dir: Path,
        stage: StageSection | None = None,
        config: AdaptConfig | None = None,
        learning_rate: float = 1e-3,
        progress: Progress | None = None,
    ) -> None:
        self._began = time.perf_counter()
        self.loss, self.stage, self.config = loss, stage or StageConfig(), config or AdaptConfig()
        self.output_dir, self.progress = output_dir, progress or Progress()
        self._loss_is_finite: torch.Tensor | None = None  # of this process, since the last step
        collator = Collator(pad_id(tokenizer), alike=shards_model())
        device = next(model.parameters()).device
        arguments = self._arguments(len(train_dataset), learning_rate, on_cpu=device.type == "cpu")
        self.schedule = Schedule(
            self.steps_per_epoch,
            self.epochs,
            self._per_step,
            len(eval_dataset) * eval_dataset.permutations + len(eval_dataset.beside or ()),
            self.stage.eval_every,
            self.stage.patience,
        )
        self.best = BestWeights(self, self.schedule.waits, self.stage.restore_best)
        super().__init__(
            model=model,
            args=arguments,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=[self.best],
        )
        collator.packed = loss.packs and packs(model)
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True
        if self.config.activation_checkpointing:
            checkpoint_activations(self.model, self.config.activation_checkpointing_kwargs or {})

    @property
    def seconds(self) -> float:
        """Spent so far, by earlier starts up to the checkpoint that this one went on from too."""
        return self.best.seconds_before + time.perf_counter() - self._began

    def _arguments(self, count: int, learning_rate: float, *, on_cpu: bool) -> TrainingArguments:
        config, output_dir = self.config, str(self.output_dir)
        world = TrainingArguments(output_dir=output_dir, use_cpu=on_cpu, report_to=[]).world_size
        self._per_step = min(config.batch_size, count)
        per_process = -(-self._per_step // world)
        micro = min(config.micro_batch_size or per_process, per_process)
        accumulation = -(-per_process // micro)
        self._slots = micro * accumulation * world
        self.steps_per_epoch = -(-count // self._per_step)
        self.epochs = self.stage.length(self.steps_per_epoch, config.selection)
        arguments = TrainingArguments(
            output_dir=output_dir,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            weight_decay=0.0,
            max_grad_norm=0.0,
            num_train_epochs=self.epochs,
            # BestWeights asks for both, by the stage's schedule
            eval_strategy="no",
            logging_strategy="no",
            save_strategy="steps",
            save_steps=config.checkpoint_every,
            save_total_limit=2,
            seed=config.seed,
            use_cpu=on_cpu,
            report_to=config.report_to,
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=not on_cpu,
            ddp_find_unused_parameters=False,
        )
        # nn.DataParallel would replicate the hooked modules; several GPUs are for `accelerate launch`
        arguments._n_gpu = min(arguments.n_gpu, 1)
        return arguments

    def compute_loss(  # type: ignore[override]
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """This micro-batch's share of the mean over the examples of the effective batch."""
        losses = self.loss(model, inputs, self.state.global_step)
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
        finite = torch.stack([loss, torch.isfinite(largest).to(loss.device)]).int()
        if self.args.world_size > 1:
            finite = self.accelerator.gather(finite[None]).amin(0)
        return bool(finite[0]), bool(finite[1])

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor]:
        """The micro-batches of one optimiser step, and the number of examples in it everywhere."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
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
            self.config.seed,
            lambda: self.state.global_step // self.steps_per_epoch,
            len(dataset.beside) if dataset.beside is not None else 0,
        )

    def evaluate(  # type: ignore[override]
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss over the dev examples; every process computes it and uses the first one's."""
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        loss = self.everywhere(self._dev_loss(dataset))
        metrics = {f"{metric_key_prefix}_loss": loss}
        if math.isfinite(loss):
            self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def everywhere(self, value: float) -> float:
        """The first process's value, in all of them."""
        if self.args.world_size > 1:
            from accelerate.utils import broadcast

            value = float(broadcast(torch.tensor(value, dtype=torch.float64, device=self.args.device)))
        return value

    def _dev_loss(self, dataset: AnswerDataset) -> float:
        # without dev rows of one kind the other is what is left to go by
        # without dev rows of one kind the other is what is left to go by
        terms = [term for term in self.loss.dev_terms(dataset) if len(term[2])]
        losses = [weight * self.mean_loss(loss, rows) for weight, loss, rows in terms]
        return sum(losses) if losses else float("nan")

    def mean_loss(self, loss: Loss, dataset: AnswerDataset) -> float:
        """Mean of a loss over all rows, with every target that they have."""
        total = 0.0
        for batch in self.batches(dataset):
            total += float(loss(self.model, batch).double().sum()) / dataset.permutations
        return total / len(dataset)

    def batches(self, dataset: AnswerDataset) -> Iterator[dict[str, Any]]:
        """All rows with every target that they have, the longest first, for passes without gradient."""
        order, size = dataset.longest_first, self.config.micro_batch_size or _EVAL_ROWS
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), row_attention(self.model):
                for start in range(0, len(order), size):
                    for permutation in range(dataset.permutations):
                        rows = [dataset[i, permutation, 1.0] for i in order[start : start + size]]
                        yield self._prepare_inputs(self.data_collator(rows))
        finally:
            self.model.train(training)

    # Our own file rather than PEFT's: that keeps what p-tuning's encoder computes, not the encoder.

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(adapter_state(self.model), folder / _WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter_state(self.model, load_file(Path(resume_from_checkpoint) / _WEIGHTS))

    def fit(self) -> float:
        """Train, from the last complete checkpoint if there is one.

        Leaves the model with the weights that the settings ask for and no checkpoint behind.

        Returns:
            The best dev loss; NaN without dev rows, and where training diverged (``best.diverged``).
        """
        self.loss.begin(self)
        if root_of(self.output_dir / "any") is None and self.is_world_process_zero():
            begin(self.output_dir)  # a checkpoint without digests cannot be trusted
        self.accelerator.wait_for_everyone()
        checkpoint = last_complete_checkpoint(self.output_dir)
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
        if self.config.activation_checkpointing:
            checkpoint_activations(self.model, None)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            for leftover in self.output_dir.glob("checkpoint-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        return self.best.loss


class AlignTrainer(ExampleTrainer):
    """Trains an adapter to give, without demonstrations, the activations that the base has with them.

    Minimises ``L_IA2`` (METHOD: stages). The language-model head does not run (but for one position),
    and adapters from which no path leads to an aligned activation are frozen meanwhile.

    Args:
        model: a PEFT model.
        train_dataset: rows with the teacher's answers, and targets; where the targets are online, the
            rows carry their contexts.
        eval_dataset: the same of the dev examples.
        tokenizer: gives the padding id.
        align: objective and layers (indices, or ``all`` that have targets), epochs and patience.
        config: see :class:`ExampleTrainer`, as for ``output_dir``, ``learning_rate`` and ``progress``.

    Raises:
        ConfigError: no weight of the adapter reaches an aligned activation, or there are no targets.
    """

    def __init__(
        self,
        model: Any,
        train_dataset: AnswerDataset,
        eval_dataset: AnswerDataset,
        tokenizer: Any,
        *,
        align: AlignConfig | None = None,
        config: AdaptConfig | None = None,
        **options: Any,
    ) -> None:
        align, config = align or AlignConfig(), config or AdaptConfig()
        if train_dataset.targets is None:
            raise ConfigError("alignment needs targets; the training rows have none.")
        loss = AlignmentLoss(model, align, train_dataset.targets, config.attention_modules)
        super().__init__(
            model, loss, train_dataset, eval_dataset, tokenizer, stage=align, config=config, **options
        )
        self._pathless = self._freeze_pathless()

    def _freeze_pathless(self) -> list[torch.nn.Parameter]:
        """Freeze adapter weights that have no gradient of L_IA2, on which DDP fails: found by one pass."""
        dataset = self.train_dataset
        trainable = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        shortest = min(range(min(len(dataset), _LOOK_AT)), key=lambda i: len(dataset.row(i).query))
        batch = self._prepare_inputs(self.data_collator([dataset[shortest]]))
        self.model.to(self.args.device)
        devices = range(torch.cuda.device_count())
        with torch.random.fork_rng(devices=devices), row_attention(self.model):
            loss = self.loss(self.model, batch).sum()
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
                f"Alignment: {len(without)} of {len(trainable)} trained tensors lie behind the last aligned "
                f"activation and are frozen in this stage ({without[0][0]} …)."
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


def checkpoint_activations(model: Any, options: Mapping[str, Any] | None) -> None:
    """Switch activation checkpointing on, never reentrant, or off (``options`` None)."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    # as this transformers calls it
    name = "activation" if hasattr(inner, "activation_checkpointing_enable") else "gradient"
    if options is None:
        getattr(inner, f"{name}_checkpointing_disable")()
    else:
        arguments = {f"{name}_checkpointing_kwargs": {**options, "use_reentrant": False}}
        getattr(inner, f"{name}_checkpointing_enable")(**arguments)
