"""One model, one set of examples, one seed: everything that recipes share, computed once each.

The teacher pass, the alignment stage that ``ia2`` and ``ia2-sft`` have in common, the reference that
similarities are measured against. What is finished lies in the run's folder and is found there when a
killed run is started again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia2.adapters import (
    adapter_state,
    attach,
    base_weights,
    detach,
    load_adapter_state,
    peft_config,
)
from ia2.analysis.similarity import Similarity, SimilarityMeter
from ia2.capture import ActivationCapture
from ia2.config import AdaptConfig, AlignConfig, SftConfig
from ia2.console import logger
from ia2.context import Contexts
from ia2.distributed import first_then_all, is_first, wait
from ia2.errors import ConfigError, DataError
from ia2.evaluation.metrics import Measured
from ia2.evaluation.run import evaluate_prompts, fit_temperatures
from ia2.evaluation.scoring import Prediction
from ia2.examples import Example, FewShotSplit
from ia2.files import digest, read_json, write_json
from ia2.inference import AnswerOutput, answer_pass
from ia2.models import BaseModel
from ia2.recipes import ALIGN, RECIPES
from ia2.stages import FORMAT, StageResult, TrainedRecipe, finished_stage, run_stage
from ia2.targets import MemoryTargets, OnlineTargets, Targets
from ia2.task import Task
from ia2.teacher import Teacher
from ia2.tokens import Ids, encode_prompt

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from ia2.batches import AnswerDataset

# Test queries that similarity to ICL is measured on; more would narrow its interval by little.
SIMILARITY_QUERIES = 100


@dataclass
class Evaluated:
    """A recipe on a set of rows."""

    predictions: list[Prediction]
    measured: Measured
    similarity: Similarity | None
    seconds: float


@dataclass
class IclReference:
    """What the base model does with demonstrations, on the first test queries: answers, activations."""

    targets: Targets
    count: int


@dataclass
class Workbench:
    """See the module's text.

    Args:
        base: the model; the workbench puts an adapter on it until :meth:`close`.
        data: training and dev examples.
        task: what counts as an answer.
        config: settings; its seed is used throughout.
        folder: where finished parts lie.
        one_recipe: the folder holds a single recipe, whose stages are then simply named.
    """

    base: BaseModel
    data: FewShotSplit
    task: Task
    config: AdaptConfig
    folder: Path
    one_recipe: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.data.train) < 2:
            raise DataError(f"{self.data.train.name}: at least two training examples are needed.")
        self.tokenizer = self.base.tokenizer
        self._pools: dict[tuple[tuple[Example, ...], int], Contexts] = {}

    @cached_property
    def model(self) -> PeftModel:
        """The base model with a fresh adapter, which is put on when it is first asked for."""
        configuration = peft_config(self.base.model, self.config.adapter)
        return attach(self.base.model, configuration, self.config.seed)

    @cached_property
    def _initial(self) -> dict[str, torch.Tensor]:
        return adapter_state(self.model)

    def close(self) -> None:
        """Take the adapter off; the base model is as before."""
        if "model" in self.__dict__:
            detach(self.model)
            del self.model

    def check(self, recipes: Sequence[str], test: Sequence[Example]) -> None:
        """Refuse what cannot work, before anything is trained or written.

        Args:
            recipes: those to be trained or evaluated.
            test: the rows they will be evaluated on.

        Raises:
            DataError: a prompt or all demonstrations of one do not fit the context window.
            ConfigError: an adapter that is unknown.
            ModelError: attention modules that are not found.
        """
        peft_config(self.base.model, self.config.adapter)
        ActivationCapture(self.base.model, self.config.attention_modules)
        if any(ALIGN in RECIPES[recipe] for recipe in recipes):
            contexts = self.train_contexts
            if len(self.data.dev):
                self.pool_contexts(self.data.dev, contexts.permutations)
        if any(RECIPES[recipe] for recipe in recipes):
            self.sft_rows()
            self.prompts(self.data.train, demonstrations=False)
        for rows in (self.data.dev, test):
            if any(recipe != "icl" for recipe in recipes):
                self.prompts(rows, demonstrations=False)
            if "icl" in recipes:
                self.pool_contexts(rows)
        if any(recipe != "icl" for recipe in recipes):
            self.pool_contexts(test[:SIMILARITY_QUERIES])

    # -------------------------------------------------------------------------------- contexts

    @property
    def _window(self) -> int:
        limit = self.base.max_length
        given = self.config.max_context_tokens
        return min(limit, given) if given else limit

    @cached_property
    def train_contexts(self) -> Contexts:
        """Every training example behind all the others."""
        return Contexts.leave_one_out(
            self.tokenizer,
            self.data.train,
            permutations=self.config.demo_permutations,
            seed=self.config.seed,
            max_length=self._window,
            reserve=self._reserve,
            separator=self.config.separator,
        )

    def pool_contexts(self, queries: Sequence[Example], permutations: int = 1) -> Contexts:
        """Queries behind all training examples in fixed orders, shared by all of them."""
        key = (tuple(queries), permutations)
        # kept, so that what was checked is what is used, and dropped demonstrations are reported once
        if key not in self._pools:
            self._pools[key] = Contexts.pool(
                self.tokenizer,
                queries,
                self.data.train,
                permutations=permutations,
                seed=self.config.seed,
                max_length=self._window,
                reserve=self._reserve,
                separator=self.config.separator,
            )
        return self._pools[key]

    @property
    def _reserve(self) -> int:
        # room for the answer, an end-of-sequence id and a stop text that is looked out for
        return 1 if self.task.single_token else self.task.max_answer_tokens + 16

    # --------------------------------------------------------------------------------- teacher

    @property
    def teacher(self) -> Teacher:
        """The base model as a teacher."""
        return Teacher(
            self.model,
            self.tokenizer,
            self.task.max_answer_tokens,
            self.task.stop_texts,
            self.config.attention_modules,
            average=self.config.permutation_targets == "mean",
        )

    def target_bytes(self) -> int:
        """Bytes that stored targets take at most (L·d numbers an answer token)."""
        import torch

        capture = ActivationCapture(self.model, self.config.attention_modules)
        config = self.base.model.config.get_text_config()
        size = torch.finfo(self.base.model.dtype).bits // 8
        kept = self.config.demo_permutations if self.config.permutation_targets == "sample" else 1
        examples = (len(self.data.train) + len(self.data.dev)) * kept
        return len(capture.layers) * config.hidden_size * size * self.task.max_answer_tokens * examples

    @cached_property
    def target_mode(self) -> str:
        """``store``, ``memory`` or ``online``; chosen from an estimate where left open."""
        mode = self.config.targets
        if mode != "auto":
            return mode
        needed = self.target_bytes()
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        mode = "store" if needed <= free // 4 else "online"
        logger.info(
            "Teacher targets: at most %.1f MB, %s.",
            needed / 1e6,
            "kept on disk"
            if mode == "store"
            else "more than a quarter of the free disk: recomputed each step",
        )
        return mode

    @cached_property
    def targets(self) -> tuple[Targets, Targets]:
        """The teacher's targets of the training and of the dev examples."""
        start = time.perf_counter()
        train = self._targets_of("train", self.train_contexts)
        dev: Targets = MemoryTargets([], 1)
        if len(self.data.dev):
            contexts = self.pool_contexts(self.data.dev, self.config.demo_permutations)
            dev = self._targets_of("dev", contexts)
        file = self.folder / "teacher" / "seconds.json"
        if is_first() and not file.exists():
            write_json(file, time.perf_counter() - start)
        wait()
        # a reused pass cost what it cost when it was made
        self.seconds["teacher"] = float(read_json(file))
        return train, dev

    def _targets_of(self, part: str, contexts: Contexts) -> Targets:
        description = f"teacher pass ({part})"
        if self.target_mode == "store":
            folder = self.folder / "teacher" / part
            fingerprint = self._targets_fingerprint(contexts)
            return first_then_all(
                lambda: self.teacher.to_store(contexts, folder, fingerprint, description=description)
            )
        if self.target_mode == "memory":
            return self.teacher.to_memory(contexts, description=description)
        answers, layers, rms = self.teacher.scales(contexts, description=description)
        kept = contexts.permutations if self.config.permutation_targets == "sample" else 1
        if contexts.permutations > 1 and kept == 1:
            raise ConfigError(
                "targets averaged over several demonstration orders cannot be computed online. Set "
                "permutation_targets to sample, or targets to store."
            )
        return OnlineTargets(answers, layers, rms, kept)

    def _targets_fingerprint(self, contexts: Contexts) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model": self.base.identity,
            "data": self.data.train.fingerprint,
            "queries": digest([query.query for query in contexts.queries]),
            "contexts": digest([contexts.orders, contexts.separator, contexts.max_length]),
            "answers": digest([self.task.max_answer_tokens, self.task.stop_texts]),
            "permutations": [contexts.permutations, self.config.permutation_targets],
            "attention_modules": self.config.attention_modules,
            "seed": self.config.seed,
        }

    def teacher_accuracy(self) -> tuple[int, int] | None:
        """How many training examples the teacher answers rightly, of how many; labels only."""
        if self.task.kind != "classification":
            return None
        answers = self.targets[0].answers
        gold = [self.task.label_ids[self.task.label_of(example)] for example in self.data.train]
        right = sum(a.ids[: len(g)] == g for a, g in zip(answers, gold, strict=True))
        return right, len(gold)

    # -------------------------------------------------------------------------------- training

    def train(self, recipe: str) -> TrainedRecipe:
        """Train a recipe at every learning rate and keep the one with the best dev loss."""
        best: TrainedRecipe | None = None
        tried: dict[str, float] = {}
        for rate in self.config.learning_rates:
            state, key, stages = self._initial, "", []
            for place, name in enumerate(RECIPES[recipe]):
                # `align` is the same stage in `ia2` and in `ia2-sft`: the folder names what came before
                chain = RECIPES[recipe][: place + 1]
                stage = self._stage(name, chain, rate, state, key)
                stages.append(stage)
                state, key = stage.state, stage.key
            candidate = TrainedRecipe(recipe, stages, tried, "dev loss")
            tried[f"{rate:g}"] = stages[-1].dev_loss
            loss = stages[-1].dev_loss
            # nan: a rate that diverged, or no dev rows, where the first rate stays
            if best is None or (loss == loss and not loss >= best.stages[-1].dev_loss):
                best = candidate
        assert best is not None
        if not len(self.data.dev):
            best.selected_by = "given" if len(self.config.learning_rates) == 1 else "first (no dev rows)"
        self.use(best.state)
        return best

    def use(self, state: dict[str, torch.Tensor]) -> None:
        """Put these adapter weights on the model."""
        load_adapter_state(self.model, state)

    def stage_folder(self, chain: Sequence[str], rate: float) -> Path:
        """Where a stage's result lies; ``chain`` names the stages up to this one."""
        name = chain[-1] if self.one_recipe else "-".join(chain)
        return self.folder / name / f"lr-{rate:g}"

    def _stage(
        self,
        name: str,
        chain: Sequence[str],
        tried: float,
        start: dict[str, torch.Tensor],
        parent: str,
    ) -> StageResult:
        settings: AlignConfig | SftConfig = self.config.align if name == ALIGN else self.config.sft
        rate = settings.learning_rate or tried
        folder = self.stage_folder(chain, tried)
        key = digest(
            {
                "format": FORMAT,
                "stage": name,
                "settings": settings.model_dump(),
                "parent": parent or digest([(k, list(v.shape)) for k, v in start.items()]),
                "rate": rate,
                "model": self.base.identity,
                "adapter": self.config.adapter.model_dump(),
                "train": self.data.train.fingerprint,
                "dev": self.data.dev.fingerprint,
                "targets": self._targets_fingerprint(self.train_contexts) if name == ALIGN else None,
                "batch_size": self.config.batch_size,
                "seed": self.config.seed,
                "labels": self.task.labels,
            }
        )
        if (folder / "stage.json").is_file():
            spent = self.folder / "teacher" / "seconds.json"
            if name == ALIGN and spent.is_file():
                self.seconds.setdefault("teacher", float(read_json(spent)))
            return finished_stage(name, tried, folder, key)
        rows = self.align_rows() if name == ALIGN else self.sft_rows()
        self.use(start)
        return run_stage(
            self.model, self.tokenizer, self.config, settings, rows, name, rate, tried, folder, key
        )

    def align_rows(self) -> tuple[AnswerDataset, AnswerDataset]:
        """Training and dev rows of the alignment stage: queries, the teacher's answers, targets."""
        from ia2.batches import AnswerDataset, Row

        train, dev = self.targets
        online = self.target_mode == "online"

        def rows(contexts: Contexts, targets: Targets) -> list[Row]:
            return [
                Row(
                    contexts.query_ids(i),
                    answer.ids,
                    tuple(contexts.context_ids(i, k) for k in range(targets.permutations)) if online else (),
                )
                for i, answer in enumerate(targets.answers)
            ]

        dev_rows = []
        if len(self.data.dev):
            dev_rows = rows(self.pool_contexts(self.data.dev, self.config.demo_permutations), dev)
        return (
            AnswerDataset(rows(self.train_contexts, train), train),
            AnswerDataset(dev_rows, dev),
        )

    def sft_rows(self) -> tuple[AnswerDataset, AnswerDataset]:
        """Training and dev rows of the supervised stage: queries and true answers."""
        from ia2.batches import AnswerDataset, Row

        def rows(examples: Sequence[Example]) -> list[Row]:
            return [
                Row(
                    encode_prompt(self.tokenizer, example.query, example.source),
                    self.task.target_ids(self.tokenizer, example),
                )
                for example in examples
            ]

        return AnswerDataset(rows(self.data.train)), AnswerDataset(rows(self.data.dev))

    # ------------------------------------------------------------------------------ evaluation

    def prompts(self, examples: Sequence[Example], *, demonstrations: bool) -> list[Ids]:
        """Prompt ids, with the training examples as demonstrations or without."""
        if demonstrations:
            contexts = self.pool_contexts(examples)
            return [contexts.context_ids(i) for i in range(len(examples))]
        prompts = [encode_prompt(self.tokenizer, e.query, e.source) for e in examples]
        for example, prompt in zip(examples, prompts, strict=True):
            if len(prompt) + self._reserve > self._window:
                raise DataError(
                    f"{example.source}: the prompt has {len(prompt)} tokens; the context window holds "
                    f"{self._window}, of which {self._reserve} are kept for the answer."
                )
        return prompts

    def icl_reference(self, test: Sequence[Example]) -> IclReference:
        """The base model's answers and activations with demonstrations on the first test queries."""
        subset = test[:SIMILARITY_QUERIES]
        contexts = self.pool_contexts(subset)
        targets = self.teacher.to_memory(contexts, description="ICL reference")
        return IclReference(targets, len(subset))

    def evaluate(
        self, recipe: str, test: Sequence[Example], reference: IclReference | None = None
    ) -> Evaluated:
        """Evaluate what the model is now: ``base`` and ``icl`` switch the adapter off.

        Args:
            recipe: its name; ``icl`` puts the training examples into the prompts.
            test: labelled rows.
            reference: measure similarity to these activations too (not for ``icl`` itself).
        """
        began = time.perf_counter()
        in_context = recipe == "icl"
        off = nullcontext() if RECIPES[recipe] else base_weights(self.model)
        # One-token answers need no teacher forcing, so one pass gives scores and activations.
        meter = capture = None
        if reference is not None and not in_context and self.task.single_token:
            meter = SimilarityMeter(reference.targets.layers)
            capture = ActivationCapture(self.model, self.config.attention_modules)

        def compare(output: AnswerOutput) -> None:
            if meter is not None and reference is not None and output.index < reference.count:
                _compare(meter, output, reference)

        with off:
            temperatures = None
            if len(self.data.dev):
                prompts = self.prompts(self.data.dev, demonstrations=in_context)
                temperatures = fit_temperatures(self.model, self.tokenizer, self.task, self.data.dev, prompts)
            with capture or nullcontext():
                predictions, measured = evaluate_prompts(
                    self.model,
                    self.tokenizer,
                    self.task,
                    test,
                    self.prompts(test, demonstrations=in_context),
                    temperatures,
                    capture=capture,
                    on_output=compare,
                    description=f"evaluating {recipe}",
                )
            seconds = time.perf_counter() - began
            similarity = meter.finish() if meter is not None else None
            if reference is not None and not in_context and similarity is None:
                similarity = self._similarity(recipe, test, reference)
        return Evaluated(predictions, measured, similarity, seconds)

    def _similarity(self, recipe: str, test: Sequence[Example], reference: IclReference) -> Similarity:
        """Both models teacher-forced on the ICL answer ``Ŷ`` (METHOD: measures)."""
        prompts = self.prompts(test[: reference.count], demonstrations=False)
        pairs = [
            (prompt, answer.ids) for prompt, answer in zip(prompts, reference.targets.answers, strict=True)
        ]
        meter = SimilarityMeter(reference.targets.layers)
        with ActivationCapture(self.model, self.config.attention_modules) as capture:
            for output in answer_pass(
                self.model,
                self.tokenizer,
                pairs,
                capture=capture,
                logits=False,
                description=f"similarity {recipe}",
            ):
                _compare(meter, output, reference)
        return meter.finish()


def _compare(meter: SimilarityMeter, output: AnswerOutput, reference: IclReference) -> None:
    target = reference.targets.get(output.index)
    assert output.activations is not None and target is not None
    meter.add(output.index, output.activations, target)
