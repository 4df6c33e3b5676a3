"""The control of alignment: a constant, one vector a layer, instead of what alignment learns.

What demonstrations change in attention outputs differs from query to query. If its mean, the same for every
query, does as well, alignment is not needed (METHOD.md §8).
"""

from __future__ import annotations

from typing import Any

import torch

from ia2.models.capture import ActivationCapture
from ia2.training.dataset import fed_rows
from ia2.training.losses import AlignmentLoss
from ia2.training.trainer import ExampleTrainer
from ia2.utils.errors import ConfigError

# How PEFT names the vector that LoRA adds.
BIAS = "lora_B.default.bias"


class ConstantTrainer(ExampleTrainer):
    """Adds to each layer's attention outputs the mean of what the context adds to them.

    Layer by layer, from the first: each mean is of what is still missing with the vectors before it in
    place, so that it is met exactly. Nothing is trained by gradient, and nothing but biases changes.

    Raises:
        ConfigError: the adapter has no bias where attention writes its outputs.
    """

    loss: AlignmentLoss

    def fit(self) -> float:
        """Set the vectors, and return the alignment loss on the dev rows (NaN without them)."""
        biases = self._biases()
        for place, (bias, scaling) in enumerate(biases):
            bias.data += self._missing(place).to(bias) / scaling
        self.state.global_step, self.state.epoch = len(biases), 1.0
        return self.evaluate()["eval_loss"] if len(self.eval_dataset) else float("nan")

    def _biases(self) -> list[tuple[torch.nn.Parameter, float]]:
        """Each aligned layer's bias, and the factor that its adapter multiplies it by."""
        layers = self.loss.capture.layers
        # what is given to the output projection is read at that module
        capture = ActivationCapture(self.model, self.config.attention_modules, layers, site="heads")
        biases = []
        for layer in layers:
            projection: Any = capture.hooked[layer]
            bias = dict(projection.named_parameters()).get(BIAS)
            if bias is None:
                raise ConfigError(
                    "the stage constant writes into the output projection of attention, and the adapter has "
                    f"no bias there (layer {layer}). Leave out adapter.target_modules, or name it there."
                )
            biases.append((bias, float(projection.scaling["default"])))
        return biases

    def _missing(self, place: int) -> torch.Tensor:
        """Mean over the training rows of teacher less student, at one of the aligned layers, ``[d]``."""
        dataset = self.train_dataset
        total: Any = 0.0
        for batch in self.batches(dataset):
            student = self.loss.student(self.model, batch)
            teacher = self.loss.teacher(batch).to(student.device)
            apart = teacher[place].double() - student[place].double()
            lengths = fed_rows(batch, "response").answer_lengths
            total += torch.stack([rows.mean(0) for rows in apart.split(lengths)]).sum(0)
        mean: torch.Tensor = total / (len(dataset) * dataset.permutations)
        return mean
