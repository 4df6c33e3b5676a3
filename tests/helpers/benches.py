"""What several test modules build: small data sets, and workbenches on small models."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from helpers.families import build, llama
from tiny_icl.tasks import sample_task

from ia2.config import AdaptConfig
from ia2.config.recipes import LABELLED
from ia2.config.sections import AlignConfig, StageConfig
from ia2.data.examples import Example, Examples, FewShotSplit
from ia2.data.unlabelled import with_unlabelled
from ia2.experiment.workbench import Workbench
from ia2.models.load import BaseModel, load_base
from ia2.prompts.task import make_task
from ia2.teacher.cache import PARTS
from ia2.teacher.targets import OnlineTargets
from ia2.training.dataset import AnswerDataset, AnswerRow
from ia2.training.losses import Loss
from ia2.training.trainer import AlignTrainer, ExampleTrainer

_WORDS = tuple(
    "good bad great awful fine film food song day night cat dog bird fish sun one two three".split()  # noqa: SIM905
)


def icl_examples(count: int, seed: int = 0, task: int = 0, num_classes: int = 3) -> Examples:
    """Rows of one of the tasks that the small trained model learns in context."""
    pairs = sample_task(task, num_classes).examples(count, seed)
    return Examples([Example(q, a, f"row {i + 1}") for i, (q, a) in enumerate(pairs)], name=f"icl-{task}")


def word_examples(count: int, seed: int = 0, label_words: int | None = None) -> Examples:
    """Rows for the word tokenizer; answers are one of two labels, or ``label_words`` random words.

    The prompts begin differently, so that a bare blank line is the stop text.
    """
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        query = " ".join(rng.choices(_WORDS, k=rng.randint(2, 7))) + "\nLabel:"
        words = rng.choices(_WORDS, k=rng.randint(1, label_words)) if label_words else None
        answer = "".join(f" {w}" for w in words) if words else (" positive", " negative")[i % 2]
        rows.append(Example(f"{_WORDS[i % len(_WORDS)]} {query}", answer, f"row {i + 1}"))
    return Examples(rows, name="words")


def wordy_model(**changes: Any) -> Any:
    """A tiny random Llama whose greedy answers end early now and then, so that lengths differ."""
    model = build(llama(tie_word_embeddings=False, **changes).config, seed=3)
    with torch.no_grad():
        model.lm_head.weight[2] *= 2  # end of sequence
        model.lm_head.weight[6] *= 2  # blank line
    return model


def base_of(model: Any, tokenizer: Any, name: str = "tiny") -> BaseModel:
    """A model in memory, as :func:`ia2.models.load.load_base` would give it."""
    return BaseModel(model.requires_grad_(False), tokenizer, name, name, identity={"model": name})


def icl_base(path: Path, **options: Any) -> BaseModel:
    """The small trained model."""
    return load_base(str(path), device="cpu", dtype="float32", **options)


def bench_of(
    base: BaseModel,
    train: Examples,
    dev: Examples,
    folder: Path,
    randomise: bool = False,
    unlabelled: Sequence[Example] = (),
    **settings: Any,
) -> Workbench:
    """A workbench; ``randomise`` gives LoRA's B random values, so that the adapter does something."""
    config = AdaptConfig(**settings, **({"unlabelled": "rows"} if len(unlabelled) else {}))
    task = make_task(Examples([*train, *dev], name=train.name), config, base.tokenizer)
    split = with_unlabelled(FewShotSplit(train, dev), unlabelled, config.max_unlabelled, config.seed)
    bench = Workbench(base, split, task, config, folder)
    if randomise:
        generator = torch.Generator().manual_seed(7)
        for name, parameter in bench.model.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return bench


def rows_of(dataset: AnswerDataset) -> list[AnswerRow]:
    """All rows of a dataset."""
    return [dataset.row(place) for place in range(len(dataset))]


def clone(base: BaseModel) -> BaseModel:
    """A second copy, for tests that need the untouched base beside the adapted one."""
    return BaseModel(
        copy.deepcopy(base.model), base.tokenizer, base.name, base.path, identity=dict(base.identity)
    )


def trainer_of(
    bench: Workbench,
    loss: Loss,
    rows: tuple[AnswerDataset, AnswerDataset],
    folder: Path,
    *,
    learning_rate: float = 1e-3,
    stage: Mapping[str, Any] | None = None,
    **config: Any,
) -> ExampleTrainer:
    """A trainer of training and dev rows, with settings of the stage and of the configuration."""
    return ExampleTrainer(
        bench.model,
        loss,
        *rows,
        bench.tokenizer,
        output_dir=folder / "stage",
        learning_rate=learning_rate,
        stage=StageConfig(**(stage or {})),
        config=AdaptConfig(**config),
    )


def align_trainer(
    bench: Workbench,
    rows: tuple[AnswerDataset, AnswerDataset],
    folder: Path,
    *,
    learning_rate: float = 1e-3,
    align: Mapping[str, Any] | None = None,
    **config: Any,
) -> AlignTrainer:
    """The same of the alignment stage."""
    return AlignTrainer(
        bench.model,
        *rows,
        bench.tokenizer,
        output_dir=folder / "stage",
        learning_rate=learning_rate,
        align=AlignConfig(**(align or {})),
        config=AdaptConfig(**config),
    )


def taught(bench: Workbench, site: str = "output", top_k: int | None = None) -> list[OnlineTargets]:
    """What the teacher gave for the labelled rows: those trained on, and those held out."""
    return [bench.teaching.targets(part, site, top_k) for part in PARTS[LABELLED]]


def align_rows(bench: Workbench, rows: str = LABELLED) -> tuple[AnswerDataset, AnswerDataset]:
    """Training and held-out rows of the alignment stage: queries, the teacher's answers, targets."""
    train, dev = (bench.teacher_rows(part, targets=bench.teaching.targets(part)) for part in PARTS[rows])
    return train, dev
