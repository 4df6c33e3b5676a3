"""The control of alignment: a constant, one vector a layer, instead of what alignment learns.

What demonstrations change in attention outputs differs from query to query. If its mean, the same for every
query, does as well, alignment is not needed (METHOD.md §8).
"""

from __future__ import annotations

from typing import Any

import torch

from ia2.models.capture import ActivationCapture
from ia2.training.dataset import AnswerDataset, lengths_of, parts_of, run_parts
from ia2.training.trainer import AlignTrainer
from ia2.utils.errors import ConfigError

# How PEFT names the vector that LoRA adds.
BIAS = "lora_B.default.bias"


class ConstantTrainer(AlignTrainer):
    """Adds to each layer's attention outputs the mean of what the context adds to them.

    Layer by layer, from the first: each mean is of what is still missing with the vectors before it in
    place, so that it is met exactly. Nothing is trained by gradient, and nothing but biases changes.
    Arguments are those of :class:`~ia2.training.trainer.AlignTrainer`, with the objective left as it is.

    Raises:
        ConfigError: the adapter has no bias where attention writes its outputs.
    """

    def _freeze_pathless(self) -> list[torch.nn.Parameter]:
        return []  # no gradient is taken

    def fit(self) -> float:
        """Set the vectors, and return the alignment loss on the dev rows (NaN without them)."""
        biases = self._biases()
        for place, (bias, scaling) in enumerate(biases):
            bias.data += self._missing(place).to(bias) / scaling
        self.state.global_step, self.state.epoch = len(biases), 1.0
        return self.evaluate()["eval_loss"] if len(self.eval_dataset) else float("nan")

    def _biases(self) -> list[tuple[torch.nn.Parameter, float]]:
        """Each aligned layer's bias, and the factor that its adapter multiplies it by."""
        settings, layers = self.alignment.settings, self.alignment.capture.layers
        # what is given to the output projection is read at that module
        projections = ActivationCapture(self.model, settings.attention_modules, layers, site="heads").hooked
        found = []
        for layer in layers:
            projection: Any = projections[layer]
            bias = dict(projection.named_parameters()).get(BIAS)
            if bias is None:
                raise ConfigError(
                    "the stage constant writes into the output projection of attention, and the adapter has "
                    f"no bias there (layer {layer}). Leave out adapter.target_modules, or name it there."
                )
            found.append((bias, float(projection.scaling["default"])))
        return found

    def _missing(self, place: int) -> torch.Tensor:
        """Mean over the training rows of teacher less student, at one of the aligned layers, ``[d]``."""
        total: Any = 0.0
        dataset: AnswerDataset = self.train_dataset
        for batch in self.batches(dataset):
            parts = parts_of(batch, "response")
            _, student = run_parts(self.model, parts, logits=False, **self.alignment.watching(batch))
            assert student is not None
            teacher = self.alignment.teacher(self.model, batch).to(student.device)
            apart = (teacher[place].double() - student[place].double()).split(lengths_of(parts))
            total += torch.stack([rows.mean(0) for rows in apart]).sum(0)
        mean: torch.Tensor = total / (len(dataset) * dataset.permutations)
        return mean
