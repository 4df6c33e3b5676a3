"""What the teacher gave on one split: contexts, answers, targets, and a reference for similarities.

All variants of a comparison share it, whatever adapter or objective they have; each kind of target is
computed once, when a stage first asks for it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia2.capture import ActivationCapture, eager_attention
from ia2.config import AdaptConfig
from ia2.console import logger
from ia2.context import Contexts
from ia2.distributed import gathered, is_first, wait
from ia2.errors import ConfigError
from ia2.evaluation.answers import exact_match, load_parser
from ia2.examples import Example, FewShotSplit
from ia2.files import digest, read_json, write_json
from ia2.inference import AnswerOutput, answer_pass
from ia2.layers import layer_shift
from ia2.models import BaseModel
from ia2.prompts import ContextFunction, Prompts
from ia2.targets import MemoryTargets, OnlineTargets, Targets, TeacherAnswer
from ia2.task import Task
from ia2.teacher import ANSWERS, Teacher
from ia2.tokens import Ids, decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 3  # of target stores and stage folders; bump when their meaning changes

# Test queries that similarity to ICL is measured on; more would narrow its interval by little.
SIMILARITY_QUERIES = 100

# Training examples that a layer's shift under ICL is measured on.
_SHIFT_EXAMPLES = 256


def pass_name(site: str, top_k: int | None) -> str:
    """Of a teacher pass."""
    return site if top_k is None else f"{site}-{top_k}"


@dataclass
class IclReference:
    """What the base model does with demonstrations, on the first test queries: answers, activations."""

    targets: Targets
    count: int


class TakenReference:
    """An :class:`IclReference` out of a pass that evaluates ICL, for answers of one token.

    Args:
        layers: whose activations are captured.
        count: of queries; outputs of later ones are let go.
    """

    def __init__(self, layers: Sequence[int], count: int) -> None:
        self.count, self._targets = count, MemoryTargets(list(layers))
        self._said: dict[int, int] = {}

    def add(self, output: AnswerOutput) -> None:
        """Take one query's output."""
        if output.index < self.count:
            assert output.logits is not None and output.activations is not None
            self._targets.add(output.index, 0, output.activations)
            self._said[output.index] = int(output.logits[0].argmax())

    def finish(self, tokenizer: PreTrainedTokenizerBase) -> IclReference:
        """All outputs have been added, here or in other processes of the launch."""
        said = {i: token for part in gathered(self._said) for i, token in part.items()}
        tokens = [said[i] for i in range(self.count)]
        answers = [TeacherAnswer((token,), decode(tokenizer, [token])) for token in tokens]
        return IclReference(self._targets.finish(answers), self.count)


class Teaching:
    """See the module's text.

    Args:
        base: the model.
        data: training and dev examples.
        task: what counts as an answer.
        config: settings; those of adapter and stages do not matter here.
        folder: where targets lie.
        function: makes contexts, instead of ``config.context_function``.

    Attributes:
        adapted: the base model with an adapter, while one is on it.
        seconds: cost of each teacher pass, by name.
    """

    def __init__(
        self,
        base: BaseModel,
        data: FewShotSplit,
        task: Task,
        config: AdaptConfig,
        folder: Path,
        function: ContextFunction | None = None,
    ) -> None:
        self.base, self.data, self.task, self.config, self.folder = base, data, task, config, folder
        self.adapted: Any = None
        self.seconds: dict[str, float] = {}
        self._targets: dict[tuple[str, int | None], tuple[Targets, Targets]] = {}
        self._judged = False
        window = base.max_length
        if config.max_context_tokens:
            window = min(window, config.max_context_tokens)
        self.reserve = task.reserve
        self.window = window
        self.prompts = Prompts(
            base.tokenizer, self.reserve, window, data.train, config, lambda: self.model, function
        )

    @property
    def model(self) -> Any:
        """The base model, in whatever wrapping it has now."""
        return self.base.model if self.adapted is None else self.adapted

    @property
    def train_contexts(self) -> Contexts:
        """Every training example in its context: by default, behind all the others."""
        return self.prompts.train_contexts

    @property
    def dev_contexts(self) -> Contexts:
        """The dev examples behind all training examples."""
        return self.prompts.pool_contexts(self.data.dev, self.train_contexts.permutations)

    # --------------------------------------------------------------------------------- targets

    def teacher(self, site: str = "output", top_k: int | None = None) -> Teacher:
        """The base model as a teacher of one kind of target."""
        return Teacher(
            self.model,
            self.base.tokenizer,
            self.task.max_answer_tokens,
            self.task.stop_texts,
            self.config.attention_modules,
            average=self.config.permutation_targets == "mean",
            end_id=self.task.append_end,
            site=site,
            top_k=top_k,
        )

    def target_bytes(self, site: str = "output", top_k: int | None = None) -> int:
        """Bytes that stored targets of one kind take at most."""
        import torch

        config = self.base.model.config.get_text_config()
        size = torch.finfo(self.base.model.dtype).bits // 8
        if site == ANSWERS:
            per_token = 0
        elif site == "soft":
            per_token = 4 * (2 * top_k if top_k else int(config.vocab_size))
        else:
            layers = len(ActivationCapture(self.model, self.config.attention_modules).layers)
            width = config.hidden_size
            if site == "weights":
                width = config.num_attention_heads * max(1, self.window // 4)
            per_token = layers * width * size
        kept = self.config.demo_permutations if self.config.permutation_targets == "sample" else 1
        examples = (len(self.data.train) + len(self.data.dev)) * kept
        return per_token * self.task.max_answer_tokens * examples

    def mode(self, site: str = "output", top_k: int | None = None) -> str:
        """``store``, ``memory`` or ``online``; chosen from an estimate where left open."""
        if self.config.targets != "auto":
            return self.config.targets
        needed = self.target_bytes(site, top_k)
        self.folder.mkdir(parents=True, exist_ok=True)
        fits = needed <= shutil.disk_usage(self.folder).free // 4
        averaged = self.config.demo_permutations > 1 and self.config.permutation_targets == "mean"
        if not fits and averaged:
            raise ConfigError(
                f"the teacher's targets take up to {needed / 1e9:.1f} GB, more than a quarter of the free "
                "disk, and targets averaged over demonstration orders cannot be recomputed each step. Set "
                "permutation_targets to sample, or free some space and set targets to store."
            )
        logger.info(
            "Teacher targets (%s): at most %.1f MB, %s.",
            site,
            needed / 1e6,
            "kept on disk" if fits else "more than a quarter of the free disk: recomputed each step",
        )
        return "store" if fits else "online"

    def targets(self, site: str = "output", top_k: int | None = None) -> tuple[Targets, Targets]:
        """The teacher's targets of the training and of the dev examples.

        Args:
            site: ``output``, ``heads``, ``residual``, ``weights``, ``soft`` for token distributions, or
                ``answers`` for no targets at all.
            top_k: of token distributions.

        Raises:
            ModelError: activations that this model does not give.
            RunFolderError: the folder holds targets of something else, or the disk is full.
        """
        key = (site, top_k)
        if key not in self._targets:
            self._targets[key] = self._compute(site, top_k)
        return self._targets[key]

    def _compute(self, site: str, top_k: int | None) -> tuple[Targets, Targets]:
        mode = self.mode(site, top_k)
        first = next(iter(self._targets.values()), None)
        with eager_attention(self.model) if site == "weights" else nullcontext():
            train = self._part("train", self.train_contexts, site, top_k, mode, first and first[0].answers)
            dev: Targets = MemoryTargets([], 1)
            if len(self.data.dev):
                dev = self._part("dev", self.dev_contexts, site, top_k, mode, first and first[1].answers)
        wait()
        self.seconds[pass_name(site, top_k)] = self.known_seconds(site, top_k)
        return train, dev

    def known_seconds(self, site: str, top_k: int | None = None) -> float:
        """What a teacher pass cost, also one that an earlier start has made; 0 if there was none."""
        files = [self._place(part, site, top_k, ".seconds.json") for part in ("train", "dev")]
        return sum(float(read_json(file)) for file in files if file.is_file())

    def _place(self, part: str, site: str, top_k: int | None, suffix: str = "") -> Path:
        name = part if site == "output" else f"{part}-{pass_name(site, top_k)}"
        return self.folder / "teacher" / f"{name}{suffix}"

    def _part(
        self,
        part: str,
        contexts: Contexts,
        site: str,
        top_k: int | None,
        mode: str,
        answers: Sequence[TeacherAnswer] | None,
    ) -> Targets:
        what = "" if site == "output" else f", {site}"
        options: dict[str, Any] = {"answers": answers, "description": f"teacher pass ({part}{what})"}
        began = time.perf_counter()
        # ways to choose demonstrations that need the model must not run through the teacher's hooks
        contexts.prepare()
        teacher = self.teacher(site, top_k)
        targets: Targets
        if mode == "store":
            folder = self._place(part, site, top_k)
            fingerprint = self.fingerprint(contexts, site, top_k)
            targets = teacher.to_store(contexts, folder, fingerprint, **options)
        elif mode == "memory":
            targets = teacher.to_memory(contexts, **options)
        else:
            targets = teacher.scales(contexts, **options)
        file = self._place(part, site, top_k, ".seconds.json")
        # what an earlier start made costs what it cost then
        if is_first() and not file.exists():
            write_json(file, time.perf_counter() - began)
        return targets

    def fingerprint(self, contexts: Contexts, site: str, top_k: int | None = None) -> dict[str, Any]:
        """Everything that targets depend on."""
        return {
            "format": FORMAT,
            "model": self.base.identity,
            "data": self.data.train.fingerprint,
            "queries": digest([query.query for query in contexts.queries]),
            "contexts": digest(contexts.facts()),
            "answers": digest([self.task.max_answer_tokens, self.task.stop_texts]),
            "permutations": [contexts.permutations, self.config.permutation_targets],
            "attention_modules": self.config.attention_modules,
            "seed": self.config.seed,
            "site": [site, top_k],
        }

    # --------------------------------------------------------------------- what the teacher said

    def answers(self) -> tuple[list[TeacherAnswer], list[TeacherAnswer]]:
        """The teacher's answers to the training and to the dev examples, from whichever pass ran."""
        train, dev = next(iter(self._targets.values()), None) or self.targets(ANSWERS)
        return train.answers, dev.answers

    def correct(self) -> tuple[list[int], list[int]]:
        """Indices of the training and of the dev examples that the teacher answers rightly."""
        train, dev = self.answers()
        return (
            [i for i, example in enumerate(self.data.train) if self._is_right(example, train[i])],
            [i for i, example in enumerate(self.data.dev) if self._is_right(example, dev[i])],
        )

    def warn_if_icl_fails(self) -> None:
        """When ICL is no better than chance, alignment cannot help; said once, before training."""
        if self.task.kind != "classification" or self._judged:
            return
        self._judged = True
        right, count = len(self.correct()[0]), len(self.data.train)
        answers = self.data.train.answers
        frequent = max(answers.count(label) for label in set(answers))
        logger.info("In context, the base model answers %d of %d training examples rightly.", right, count)
        if right <= frequent:
            logger.warning(
                "In context it is right on %d of %d, no better than always giving the most frequent label "
                "(%d): alignment is unlikely to help. `ia2 probe` tells more.",
                right,
                count,
                frequent,
            )

    def _is_right(self, example: Example, answer: TeacherAnswer) -> bool:
        if self.task.kind == "classification":
            return self.task.label_said(answer.ids) == self.task.label_of(example)
        parse = load_parser(self.task.parser)
        return exact_match(parse(answer.text), parse(example.answer or ""))

    @cached_property
    def shift(self) -> list[float]:
        """How much each layer's attention outputs change under ICL, ``[L]`` (see :func:`layer_shift`).

        Measured on the first training examples, whatever activations the objective compares.

        Raises:
            ConfigError: targets that are computed online.
        """
        train, _ = self.targets()
        count = min(len(train.answers), _SHIFT_EXAMPLES)
        contexts = self.train_contexts
        pairs = [(contexts.query_ids(i), train.answers[i].ids) for i in range(count)]
        with self.teacher().watching() as capture:
            outputs = list(
                answer_pass(
                    self.model,
                    self.base.tokenizer,
                    pairs,
                    capture=capture,
                    logits=False,
                    description="shift of each layer under ICL",
                )
            )
        icl = [train.get(output.index) for output in outputs]
        base = [output.activations for output in outputs]
        if any(tensor is None for tensor in icl):
            raise ConfigError(
                "layers chosen by their shift under ICL need stored targets. Set targets to store or memory, "
                "or choose the layers by name."
            )
        return layer_shift([t for t in icl if t is not None], [t for t in base if t is not None])

    # ------------------------------------------------------------------------------- reference

    def has_context(self, rows: Sequence[Example]) -> bool:
        """Whether these rows can be put in context; rows to be answered may lack a context column."""
        column = self.config.context_column
        return column is None or all(row.fields.get(column) is not None for row in rows)

    def try_reference(self, test: Sequence[Example]) -> IclReference | None:
        """:meth:`reference`, or None where the rows have no context to be compared with; says so."""
        if self.has_context(test[:SIMILARITY_QUERIES]):
            return self.reference(test)
        logger.info(
            "The rows to evaluate have no column %r: no similarity to the teacher is measured.",
            self.config.context_column,
        )
        return None

    def refers_to(self, test: Sequence[Example], prompts: Sequence[Ids]) -> bool:
        """Whether these prompts, of ICL, are those that :meth:`reference` has of the same rows."""
        contexts = self.prompts.pool_contexts(test[:SIMILARITY_QUERIES])
        return all(contexts.context_ids(i) == prompts[i] for i in range(len(contexts)))

    def reference(self, test: Sequence[Example]) -> IclReference:
        """The base model's answers and activations with demonstrations on the first test queries."""
        subset = test[:SIMILARITY_QUERIES]
        contexts = self.prompts.pool_contexts(subset)
        if len(self.data.dev) and contexts is self.dev_contexts and ("output", None) in self._targets:
            dev = self._targets["output", None][1]
            if not isinstance(dev, OnlineTargets):  # of these very prompts
                return IclReference(dev, len(subset))
        contexts.prepare()
        targets = self.teacher().to_memory(contexts, description="ICL reference")
        return IclReference(targets, len(subset))
