"""What the teacher gave on one split: contexts, answers, targets, and a reference for similarities.

All variants of a comparison share it, whatever adapter or objective they have; each kind of target is
computed once, when a stage first asks for it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ia2.config import AdaptConfig
from ia2.data.answers import exact_match, load_parser
from ia2.data.examples import Example, Examples, FewShotSplit
from ia2.models.capture import ActivationCapture, eager_attention
from ia2.models.forward import answer_pass
from ia2.models.load import BaseModel
from ia2.models.tokens import Ids
from ia2.prompts.builder import PromptBuilder
from ia2.prompts.context import Contexts
from ia2.prompts.own_context import ContextFunction
from ia2.prompts.task import Task
from ia2.teacher.layer_choice import layer_shift
from ia2.teacher.targets import OnlineTargets, TargetStore, TeacherAnswer
from ia2.teacher.teacher import ANSWERS, Teacher
from ia2.utils.distributed import is_first, wait
from ia2.utils.errors import ConfigError
from ia2.utils.files import digest, read_json, write_json
from ia2.utils.logging import logger
from ia2.utils.statistics import t_interval

FORMAT = 3  # of target stores and stage folders; bump when their meaning changes

# Test queries that similarity to ICL is measured on; more would narrow its interval by little.
SIMILARITY_QUERIES = 100

# Training examples that a layer's shift under ICL is measured on.
_SHIFT_EXAMPLES = 256

PARTS = {"labelled": ("train", "dev"), "unlabelled": ("unlabelled", "unlabelled-dev")}
"""Kind of rows → the part that is trained on and the part that is held out."""

Key = tuple[str, str, "int | None"]
"""Of targets: the part whose queries are answered, site and top k."""


class TeacherCache:
    """See the module's text.

    Args:
        base: the model.
        data: training and dev examples, and unlabelled rows if there are any.
        task: what counts as an answer.
        config: settings; those of adapter and stages do not matter here.
        folder: where targets lie.
        function: makes contexts, instead of ``config.context_function``.

    Attributes:
        examples: part, a value of :data:`PARTS` → its rows.
        prompts: of all rows.
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
        parts = (data.train, data.dev, data.unlabelled, data.unlabelled_dev)
        self.examples: dict[str, Examples] = dict(zip(sum(PARTS.values(), ()), parts, strict=True))
        window = min(base.max_length, config.max_context_tokens or base.max_length)
        self.prompts = PromptBuilder(base, task.reserve, window, data.train, config, function)
        self._targets: dict[Key, OnlineTargets] = {}
        self._modes: dict[tuple[str, int | None], str] = {}
        self._shifts: dict[str, list[float]] = {}
        self._judged = False

    def contexts(self, part: str) -> Contexts:
        """A part's queries in their contexts: training examples leave themselves out, all others need not."""
        if part == "train":
            return self.prompts.train_contexts
        return self.prompts.pool_contexts(self.examples[part], self.config.context_draws)

    # --------------------------------------------------------------------------------- targets

    def teacher(self, site: str = "output", top_k: int | None = None) -> Teacher:
        """The base model as a teacher of one kind of target."""
        return Teacher(
            self.base.current,
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
            layers = len(ActivationCapture(self.base.current, self.config.attention_modules).layers)
            keys = config.num_attention_heads * max(1, self.prompts.window // 4)
            per_token = layers * size * (keys if site == "weights" else config.hidden_size)
        kept = self.config.context_draws if self.config.permutation_targets == "sample" else 1
        examples = sum(map(len, self.examples.values())) * kept
        return per_token * self.task.max_answer_tokens * examples

    def mode(self, site: str = "output", top_k: int | None = None) -> str:
        """``store``, ``memory`` or ``online``, of all parts; chosen from an estimate where left open."""
        if self.config.targets != "auto":
            return self.config.targets
        if known := self._modes.get((site, top_k)):
            return known
        needed = self.target_bytes(site, top_k)
        self.folder.mkdir(parents=True, exist_ok=True)
        fits = needed <= shutil.disk_usage(self.folder).free // 4
        if not fits and self.config.context_draws > 1 and self.config.permutation_targets == "mean":
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
        self._modes[site, top_k] = "store" if fits else "online"
        return self._modes[site, top_k]

    def targets(self, part: str, site: str = "output", top_k: int | None = None) -> OnlineTargets:
        """The teacher's targets of one part; ``site`` and ``top_k`` are those of :class:`Teacher`.

        Raises:
            ModelError: activations that this model does not give.
            RunFolderError: the folder holds targets of something else, or the disk is full.
        """
        if not len(self.examples[part]):
            return TargetStore([])
        key = (part, site, top_k)
        if key not in self._targets:
            with eager_attention(self.base.current) if site == "weights" else nullcontext():
                self._targets[key] = self._computed(key)
            wait()
        return self._targets[key]

    def _computed(self, key: Key) -> OnlineTargets:
        part, site, top_k = key
        contexts, mode, known = self.contexts(part), self.mode(site, top_k), self._first_pass(part)
        what = "" if site == "output" else f", {site}"
        options: dict[str, Any] = {"answers": known.answers if known else None}
        options["description"] = f"teacher pass ({part}{what})"
        began = time.perf_counter()
        # orders of demonstrations that need the model must not run through the teacher's hooks
        contexts.prepare()
        teacher = self.teacher(site, top_k)
        targets: OnlineTargets
        if mode == "store":
            fingerprint = self.fingerprint(contexts, site, top_k)
            targets = teacher.to_store(contexts, self._file(key), fingerprint, **options)
        else:
            targets = teacher.teach(contexts, TargetStore if mode == "memory" else OnlineTargets, **options)
        file = self._file(key, ".seconds.json")
        # what an earlier start made costs what it cost then
        if is_first() and not file.exists():
            write_json(file, time.perf_counter() - began)
        return targets

    def _first_pass(self, part: str) -> OnlineTargets | None:
        return next((targets for key, targets in self._targets.items() if key[0] == part), None)

    def seconds(self, part: str, site: str = "output", top_k: int | None = None) -> float:
        """What a teacher pass cost, also one that an earlier start has made; 0 if there was none."""
        file = self._file((part, site, top_k), ".seconds.json")
        return float(read_json(file)) if file.is_file() else 0.0

    def _file(self, key: Key, suffix: str = "") -> Path:
        part, site, top_k = key
        names = [part, *([site] if site != "output" else []), *([str(top_k)] if top_k is not None else [])]
        return self.folder / "teacher" / f"{'-'.join(names)}{suffix}"

    def fingerprint(
        self, contexts: Contexts, site: str = "output", top_k: int | None = None
    ) -> dict[str, Any]:
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

    def answers(self, part: str = "train") -> list[TeacherAnswer]:
        """The teacher's answers to one part, from whichever pass ran."""
        return (self._first_pass(part) or self.targets(part, ANSWERS)).answers

    def correct(self, part: str = "train") -> list[int]:
        """Indices of a labelled part's examples that the teacher answers rightly."""
        pairs = zip(self.examples[part], self.answers(part), strict=True)
        return [i for i, (example, answer) in enumerate(pairs) if self._is_right(example, answer)]

    def _is_right(self, example: Example, answer: TeacherAnswer) -> bool:
        if self.task.kind == "classification":
            return self.task.label_said(answer.ids) == self.task.label_of(example)
        parse = load_parser(self.task.parser)
        return exact_match(parse(answer.text), parse(example.answer or ""))

    def warn_if_icl_fails(self, *, unlabelled: bool = False) -> None:
        """When ICL is no better than chance, alignment cannot help; said once, before training."""
        # where unlabelled rows are learnt on, dev rows tell: their context is the same
        part = "dev" if unlabelled else "train"
        count, answers = len(self.examples[part]), self.examples[part].answers
        if self.task.kind != "classification" or self._judged or not count:
            return
        self._judged = True
        right = len(self.correct(part))
        frequent = max(answers.count(label) for label in set(answers))
        what = "dev rows" if unlabelled else "training examples"
        logger.info("In context, the base model answers %d of %d %s rightly.", right, count, what)
        if right <= frequent:
            # of a handful of rows, half may be right by chance where most would be
            certain = t_interval([1.0] * right + [0.0] * (count - right)).high <= frequent / count
            logger.warning(
                "In context it is right on %d of %d, no better than always giving the most frequent label "
                "(%d): %s. `ia2 probe` tells more.",
                right,
                count,
                frequent,
                "alignment is unlikely to help"
                if certain
                else "so few rows cannot tell whether alignment helps",
            )

    def shift(self, part: str = "train") -> list[float]:
        """How much each layer's attention outputs change under ICL, ``[L]`` (see :func:`layer_shift`).

        Measured on the first rows of a part, whatever activations the objective compares.

        Raises:
            ConfigError: targets that are computed online.
        """
        if part in self._shifts:
            return self._shifts[part]
        targets, contexts = self.targets(part), self.contexts(part)
        if targets.online:
            raise ConfigError(
                "layers chosen by their shift under ICL need stored targets. Set targets to store or memory, "
                "or choose the layers by name."
            )
        icl, base = [], []
        answers = targets.answers[:_SHIFT_EXAMPLES]
        pairs = [(contexts.query_ids(i), answer.ids) for i, answer in enumerate(answers)]
        with self.teacher().watching() as capture:
            for output in answer_pass(
                self.base.current,
                self.base.tokenizer,
                pairs,
                capture=capture,
                logits=False,
                description="shift of each layer under ICL",
            ):
                icl.append(targets.get(output.index))
                base.append(output.activations)
        self._shifts[part] = layer_shift(icl, base)  # type: ignore[arg-type]
        return self._shifts[part]

    # ------------------------------------------------------------------------------- reference

    def has_context(self, rows: Sequence[Example]) -> bool:
        """Whether these rows can be put in context; rows to be answered may lack a context column."""
        column = self.config.context_column
        return column is None or all(row.fields.get(column) is not None for row in rows)

    def refers_to(self, test: Sequence[Example], prompts: Sequence[Ids]) -> bool:
        """Whether these prompts, of ICL, are those that :meth:`reference` has of the same rows."""
        contexts = self.prompts.pool_contexts(test[:SIMILARITY_QUERIES])
        return all(contexts.context_ids(i) == prompts[i] for i in range(len(contexts)))

    def reference(self, test: Sequence[Example]) -> OnlineTargets | None:
        """The base model's answers and activations with demonstrations on the first test queries.

        None where the rows have no context to be compared with; says so.
        """
        subset = test[:SIMILARITY_QUERIES]
        if not self.has_context(subset):
            logger.info(
                "The rows to evaluate have no column %r: no similarity to the teacher is measured.",
                self.config.context_column,
            )
            return None
        contexts = self.prompts.pool_contexts(subset)
        dev = self._targets.get(("dev", "output", None))
        if dev is not None and not dev.online and contexts is self.contexts("dev"):  # of these very prompts
            return dev
        contexts.prepare()
        return self.teacher().teach(contexts, description="ICL reference")
