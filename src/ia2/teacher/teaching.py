"""What the teacher gave on one split: contexts, answers, targets, and a reference for similarities.

All variants of a comparison share it, whatever adapter or objective they have; each kind of target is
computed once, when a stage first asks for it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia2.config import AdaptConfig
from ia2.data.answers import exact_match, load_parser
from ia2.data.examples import Example, Examples, FewShotSplit
from ia2.models.capture import ActivationCapture, eager_attention
from ia2.models.forward import AnswerOutput, answer_pass
from ia2.models.load import BaseModel
from ia2.models.tokens import Ids, decode
from ia2.prompts.builder import PromptBuilder
from ia2.prompts.context import Contexts
from ia2.prompts.own_context import ContextFunction
from ia2.prompts.task import Task
from ia2.teacher.layer_choice import layer_shift
from ia2.teacher.targets import MemoryTargets, OnlineTargets, Targets, TeacherAnswer
from ia2.teacher.teacher import ANSWERS, Teacher
from ia2.utils.distributed import gathered, is_first, wait
from ia2.utils.errors import ConfigError
from ia2.utils.files import digest, read_json, write_json
from ia2.utils.logging import logger
from ia2.utils.statistics import t_interval

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 3  # of target stores and stage folders; bump when their meaning changes

# Test queries that similarity to ICL is measured on; more would narrow its interval by little.
SIMILARITY_QUERIES = 100

# Training examples that a layer's shift under ICL is measured on.
_SHIFT_EXAMPLES = 256

PARTS = {"labelled": ("train", "dev"), "unlabelled": ("unlabelled", "unlabelled-dev")}
"""Kind of rows → what is trained on and what is held out."""

Key = tuple[str, str, "int | None"]
"""Of targets: the part whose queries are answered, site and top k."""


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
        data: training and dev examples, and unlabelled rows if there are any.
        task: what counts as an answer.
        config: settings; those of adapter and stages do not matter here.
        folder: where targets lie.
        function: makes contexts, instead of ``config.context_function``.

    Attributes:
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
        self.seconds: dict[str, float] = {}
        self._targets: dict[Key, Targets] = {}
        self._parts = {
            "train": data.train,
            "dev": data.dev,
            "unlabelled": data.unlabelled,
            "unlabelled-dev": data.unlabelled_dev,
        }
        self._modes: dict[tuple[str, int | None], str] = {}
        self._shifts: dict[str, list[float]] = {}
        self._judged = False
        window = base.max_length
        if config.max_context_tokens:
            window = min(window, config.max_context_tokens)
        self.reserve = task.reserve
        self.window = window
        self.prompts = PromptBuilder(base, self.reserve, window, data.train, config, function)

    @property
    def model(self) -> Any:
        """The base model, in whatever wrapping it has now."""
        return self.base.current

    @property
    def train_contexts(self) -> Contexts:
        """Every training example in its context: by default, behind all the others."""
        return self.prompts.train_contexts

    @property
    def dev_contexts(self) -> Contexts:
        """The dev examples behind all training examples."""
        return self.contexts("dev")

    def examples(self, part: str) -> Examples:
        """Rows of a part, a value of :data:`PARTS`."""
        return self._parts[part]

    def contexts(self, part: str) -> Contexts:
        """A part's queries in their contexts: training examples leave themselves out, all others need not."""
        if part == "train":
            return self.train_contexts
        return self.prompts.pool_contexts(self._parts[part], self.config.context_draws)

    def check_contexts(self, parts: Iterable[str]) -> None:
        """Refuse queries of these parts that do not fit the context window.

        Raises:
            DataError: there is one.
        """
        for part in parts:
            if len(self._parts[part]):
                _ = self.contexts(part)

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
        kept = self.config.context_draws if self.config.permutation_targets == "sample" else 1
        examples = sum(map(len, self._parts.values())) * kept
        return per_token * self.task.max_answer_tokens * examples

    def mode(self, site: str = "output", top_k: int | None = None) -> str:
        """``store``, ``memory`` or ``online``, of all parts; chosen from an estimate where left open."""
        if self.config.targets != "auto":
            return self.config.targets
        if (site, top_k) not in self._modes:
            self._modes[site, top_k] = self._estimated_mode(site, top_k)
        return self._modes[site, top_k]

    def _estimated_mode(self, site: str, top_k: int | None) -> str:
        needed = self.target_bytes(site, top_k)
        self.folder.mkdir(parents=True, exist_ok=True)
        fits = needed <= shutil.disk_usage(self.folder).free // 4
        averaged = self.config.context_draws > 1 and self.config.permutation_targets == "mean"
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

    def targets(
        self, site: str = "output", top_k: int | None = None, rows: str = "labelled"
    ) -> tuple[Targets, Targets]:
        """The teacher's targets of the rows that are trained on, and of those that are held out.

        Args:
            site: ``output``, ``heads``, ``residual``, ``weights``, ``soft`` for token distributions, or
                ``answers`` for no targets at all.
            top_k: of token distributions.
            rows: ``labelled`` (training and dev examples) or ``unlabelled``.

        Raises:
            ModelError: activations that this model does not give.
            RunFolderError: the folder holds targets of something else, or the disk is full.
        """
        train, dev = (self.part_targets(part, site, top_k) for part in PARTS[rows])
        return train, dev

    def part_targets(self, part: str, site: str = "output", top_k: int | None = None) -> Targets:
        """The teacher's targets of one part, a value of :data:`PARTS`; see :meth:`targets`."""
        if not len(self._parts[part]):
            return MemoryTargets([], 1)
        key = (part, site, top_k)
        if key not in self._targets:
            known = self._targets_of(part)
            with eager_attention(self.model) if site == "weights" else nullcontext():
                self._targets[key] = self._compute(part, site, top_k, known.answers if known else None)
            wait()
            name = pass_name(site, top_k)
            self.seconds[name] = self.seconds.get(name, 0.0) + self.known_seconds(*key)
        return self._targets[key]

    def _targets_of(self, part: str) -> Targets | None:
        """What the first pass over a part gave."""
        return next((targets for key, targets in self._targets.items() if key[0] == part), None)

    def known_seconds(self, part: str, site: str, top_k: int | None = None) -> float:
        """What a teacher pass cost, also one that an earlier start has made; 0 if there was none."""
        file = self._place(part, site, top_k, ".seconds.json")
        return float(read_json(file)) if file.is_file() else 0.0

    def _place(self, part: str, site: str, top_k: int | None, suffix: str = "") -> Path:
        name = part if site == "output" else f"{part}-{pass_name(site, top_k)}"
        return self.folder / "teacher" / f"{name}{suffix}"

    def _compute(
        self, part: str, site: str, top_k: int | None, answers: Sequence[TeacherAnswer] | None
    ) -> Targets:
        contexts, mode = self.contexts(part), self.mode(site, top_k)
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

    def answers(self, rows: str = "labelled") -> tuple[list[TeacherAnswer], list[TeacherAnswer]]:
        """The teacher's answers to the rows trained on and to the held-out ones, from whichever pass ran."""
        train, dev = map(self.part_answers, PARTS[rows])
        return train, dev

    def part_answers(self, part: str) -> list[TeacherAnswer]:
        """The teacher's answers to one part."""
        return (self._targets_of(part) or self.part_targets(part, ANSWERS)).answers

    def correct(self, part: str = "train") -> list[int]:
        """Indices of a labelled part's examples that the teacher answers rightly."""
        pairs = zip(self._parts[part], self.part_answers(part), strict=True)
        return [i for i, (example, answer) in enumerate(pairs) if self._is_right(example, answer)]

    def warn_if_icl_fails(self, *, unlabelled: bool = False) -> None:
        """When ICL is no better than chance, alignment cannot help; said once, before training.

        Args:
            unlabelled: unlabelled rows are learnt on, so the dev rows, whose context is theirs, tell.
        """
        part = "dev" if unlabelled else "train"
        examples = self._parts[part]
        if self.task.kind != "classification" or self._judged or not len(examples):
            return
        self._judged = True
        right, count, answers = len(self.correct(part)), len(examples), examples.answers
        frequent = max(answers.count(label) for label in set(answers))
        what = "dev rows" if unlabelled else "training examples"
        logger.info("In context, the base model answers %d of %d %s rightly.", right, count, what)
        if right <= frequent:
            # of a handful of rows, half may be right by chance where most would be
            certain = t_interval([1.0] * right + [0.0] * (count - right)).high
            few = not certain <= frequent / count
            logger.warning(
                "In context it is right on %d of %d, no better than always giving the most frequent label "
                "(%d): %s. `ia2 probe` tells more.",
                right,
                count,
                frequent,
                "so few rows cannot tell whether alignment helps" if few else "alignment is unlikely to help",
            )

    def _is_right(self, example: Example, answer: TeacherAnswer) -> bool:
        if self.task.kind == "classification":
            return self.task.label_said(answer.ids) == self.task.label_of(example)
        parse = load_parser(self.task.parser)
        return exact_match(parse(answer.text), parse(example.answer or ""))

    def shift(self, part: str = "train") -> list[float]:
        """How much each layer's attention outputs change under ICL, ``[L]`` (see :func:`layer_shift`).

        Measured on the first rows of a part, whatever activations the objective compares.

        Raises:
            ConfigError: targets that are computed online.
        """
        if part not in self._shifts:
            self._shifts[part] = self._measure_shift(part)
        return self._shifts[part]

    def _measure_shift(self, part: str) -> list[float]:
        train, contexts = self.part_targets(part), self.contexts(part)
        count = min(len(train.answers), _SHIFT_EXAMPLES)
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
        dev = self._targets.get(("dev", "output", None))
        known = dev is not None and not isinstance(dev, OnlineTargets)
        if dev is not None and known and contexts is self.dev_contexts:  # of these very prompts
            return IclReference(dev, len(subset))
        contexts.prepare()
        targets = self.teacher().to_memory(contexts, description="ICL reference")
        return IclReference(targets, len(subset))
