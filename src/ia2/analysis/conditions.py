"""Conditions: a model in some state, on prompts with or without demonstrations, run over the queries.

Every condition is teacher-forced on the base model's own answer with its demonstrations, ``Ŷ`` (METHOD:
measures), and read at answer positions only. Queries go by in blocks, so that memory does not grow with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ia2.adapters.types import peft_config
from ia2.adapters.weights import (
    attach,
    base_weights,
    detach,
    load_adapter_state,
    read_adapter_state,
    virtual_tokens,
    virtual_tokens_of,
)
from ia2.analysis.checkpoints import Checkpoint, TrainingSet
from ia2.data.examples import Example
from ia2.models.batching import give_back_memory
from ia2.models.forward import AnswerOutput, answer_pass
from ia2.models.generation import generate_answers
from ia2.models.load import BaseModel
from ia2.models.sites import SiteCapture
from ia2.models.tokens import Ids
from ia2.prompts.builder import PromptBuilder, query_prompts
from ia2.prompts.task import Task
from ia2.teacher.cache import TeacherCache
from ia2.utils.errors import DataError
from ia2.utils.files import digest

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

Activations = Mapping[str, "torch.Tensor"]
"""Site → ``[L, G, w]``, at one query's answer positions."""

# Activations of one condition of one block of queries; the reference and its control are held beside it.
_BLOCK_BYTES = 192 * 2**20
_MAX_BLOCK = 256


@dataclass(frozen=True)
class Condition:
    """A model and its prompts.

    Attributes:
        name: ``icl``, ``base``, a checkpoint's name; controls ``icl-other``, ``NAME+demos``, ``NAME~seed``.
        checkpoint: whose adapter is on; None for the base model.
        context: demonstrations before the query: ``none``, the training set's ``own``, or ``other`` ones.
        control: what it is a control for, in words; empty for what is itself of interest.
        of: the condition that it is a control of.
    """

    name: str
    checkpoint: Checkpoint | None = None
    context: str = "none"
    control: str = ""
    of: str = ""

    @property
    def kind(self) -> str:
        """``base``, ``adapter`` or ``control``."""
        if self.control and self.name != "base":
            return "control"
        return "adapter" if self.checkpoint is not None else "base"


ICL = Condition("icl", context="own")
BASE = Condition("base", control="no demonstrations")
MEAN = Condition("icl-mean", context="own", control="one constant", of="icl")
OTHER = Condition("icl-other", context="other", control="other demonstrations", of="icl")


def conditions_of(
    training_set: TrainingSet, sets: Sequence[TrainingSet], *, controls: bool, others: bool
) -> list[Condition]:
    """The conditions of one of the training sets, beside ICL; ``others``: there are other demonstrations."""
    plain = [BASE, *(Condition(c.name, c) for c in training_set.checkpoints)]
    if not controls:
        return plain
    conditions = [*([OTHER] if others else []), MEAN, *plain]
    for c in training_set.checkpoints:
        conditions.append(Condition(f"{c.name}+demos", c, "own", "with demonstrations", c.name))
        if twin := _other_seed(c, training_set, sets):
            conditions.append(Condition(f"{c.name}~seed", twin, "none", "other seed", c.name))
    return conditions


def _other_seed(
    checkpoint: Checkpoint, training_set: TrainingSet, sets: Sequence[TrainingSet]
) -> Checkpoint | None:
    """The same recipe of another seed; of several the one that has seen fewest of the queries in training."""
    asked = {row.query for row in training_set.queries}
    twins = [
        (sum(row.query in asked for row in other.data.train), (other.seed - training_set.seed) % 2**32, n, c)
        for n, other in enumerate(sets)
        for c in other.checkpoints
        if other.seed != training_set.seed and c.name == checkpoint.name
    ]
    return min(twins, key=lambda twin: twin[:3])[3] if twins else None


def by_condition(results: Sequence[Mapping[str, T]]) -> dict[str, list[T]]:
    """What each training set has of every condition; one may be missing in some.

    >>> by_condition([{"base": 1, "sft": 2}, {"base": 3}])
    {'base': [1, 3], 'sft': [2]}
    """
    names = dict.fromkeys(name for each in results for name in each)
    return {name: [each[name] for each in results if name in each] for name in names}


class Accumulator(Protocol):
    """Makes something of the activations of one training set; ``sites`` is what it reads of each layer."""

    sites: tuple[str, ...]

    def add(
        self, condition: str, index: int, found: Activations, icl: Activations, other: Activations | None
    ) -> None:
        """One query in one condition, beside ICL and, where it was run, ICL with other demonstrations.

        ICL itself comes first, with itself as the reference; ``icl-mean`` is the accumulator's to make.
        """

    def finish(self) -> Any:
        """What it is of the training set."""


class Runner:
    """Runs the conditions of one training set; ``folder`` is for what little a teacher writes."""

    def __init__(self, base: BaseModel, task: Task, training_set: TrainingSet, folder: Path) -> None:
        self.base, self.task, self.set = base, task, training_set
        self.teaching = TeacherCache(base, training_set.data, task, training_set.config, folder)
        self.pattern = training_set.config.attention_modules
        self._on = ""
        self.others = training_set.other_demonstrations()
        own = self.teaching.prompts
        self._builders = {"own": own}
        if self.others is not None:
            settings = training_set.config
            self._builders["other"] = PromptBuilder(base, own.reserve, own.window, self.others, settings)

    # ----------------------------------------------------------------------------------- models

    @contextmanager
    def showing(self, checkpoint: Checkpoint | None) -> Iterator[Any]:
        """The model with this adapter on, or (None) the base model."""
        if checkpoint is None:
            with base_weights(self.base.current):
                yield self.base.current
            return
        adapter, seed = checkpoint.config.adapter, checkpoint.config.seed
        key = digest([adapter.model_dump(), seed])
        if key != self._on:
            self.close()
            self.base.adapted = attach(self.base.model, peft_config(self.base.model, adapter), seed)
            self._on = key
        load_adapter_state(self.base.adapted, read_adapter_state(checkpoint.weights))
        yield self.base.adapted

    def close(self) -> None:
        """Take the adapter off."""
        if self.base.adapted is not None:
            detach(self.base.adapted)
            self.base.adapted = None
        self._on = ""

    def window(self, model: Any) -> int:
        """Tokens of the context window that prompts of this model may fill."""
        taken = 0 if getattr(model, "_adapters_disabled", False) else virtual_tokens(model)
        return int(self.teaching.prompts.window) - taken

    # ---------------------------------------------------------------------------------- prompts

    def prompts(self, context: str, members: Sequence[int]) -> list[Ids]:
        """Prompt ids of some queries, ``X`` or ``I ∘ X``."""
        if context == "none":
            bare = self.teaching.prompts.query_prompts(self.set.queries)
            return [bare[i] for i in members]
        contexts = self._contexts(context)
        return [contexts.context_ids(i) for i in members]

    def _contexts(self, context: str) -> Any:
        return self._builders[context].pool_contexts(self.set.queries)

    def query_lengths(self, members: Sequence[int]) -> list[int]:
        """Ids at the end of each query that are the same with and without demonstrations."""
        contexts = self._contexts("own")
        return [contexts.common_suffix(i) for i in members]

    def gold(self) -> list[int] | None:
        """Index of each query's label; None for free text."""
        if self.task.kind != "classification":
            return None
        self.task.check_labels(self.set.queries)
        return [self.task.label_of(row) for row in self.set.queries]

    def check(self, controls: bool) -> None:
        """Refuse prompts that do not fit and labels that are none, before anything is run."""
        self.gold()
        self.check_bare(self.set.queries, self.teaching.prompts.reserve)
        for context in self._builders if controls else ("own",):
            self._contexts(context).prepare()

    def check_bare(self, rows: Sequence[Example], reserve: int) -> None:
        """Refuse rows that the virtual tokens of an adapter leave no room for."""
        made = [peft_config(self.base.model, c.config.adapter) for c in self.set.checkpoints]
        virtual = max(map(virtual_tokens_of, made), default=0)
        query_prompts(self.teaching.prompts.format, rows, self.teaching.prompts.window, reserve, virtual)

    # ------------------------------------------------------------------------------------- runs

    def _pass(
        self,
        condition: Condition,
        pairs: Sequence[tuple[Ids, Ids]],
        sites: Sequence[str],
        description: str,
        logits: bool = False,
    ) -> Iterator[tuple[AnswerOutput, dict[str, torch.Tensor]]]:
        with self.showing(condition.checkpoint) as model, SiteCapture(model, sites, self.pattern) as capture:
            longest = max(len(prompt) + len(answer) - 1 for prompt, answer in pairs)
            if longest > (window := self.window(model)):
                # demonstrations were fitted to the base model's window; virtual tokens take some of it
                raise DataError(
                    f"{self.set}, {condition.name}: {longest} tokens do not fit the {window} that the "
                    "adapter's virtual tokens leave of the context window. Leave the controls out "
                    "(--no-controls)."
                )
            description = f"{self.set}: {description}"
            tokenizer = self.base.tokenizer
            passes = answer_pass(
                model, tokenizer, pairs, capture=capture, logits=logits, description=description
            )
            for output in passes:
                assert output.activations is not None
                yield output, capture.split(output.activations)

    def run(
        self,
        condition: Condition,
        members: Sequence[int],
        answers: Sequence[Ids],
        sites: Sequence[str],
        on_logits: Callable[[int, Any], None] | None = None,
    ) -> list[dict[str, torch.Tensor]]:
        """One pass of a condition over some queries, forced on ``answers``: site → ``[L, G, w]`` of each.

        ``on_logits`` is called with each member's place and ``[G, V]`` float32.
        """
        activations: list[Any] = [None] * len(members)
        pairs = list(zip(self.prompts(condition.context, members), answers, strict=True))
        wanted = on_logits is not None
        for output, at_sites in self._pass(condition, pairs, sites, condition.name, wanted):
            activations[output.index] = at_sites
            if on_logits is not None:
                on_logits(output.index, output.logits)
        return activations

    def reference(
        self, members: Sequence[int], sites: Sequence[str]
    ) -> tuple[list[Ids], list[dict[str, torch.Tensor]]]:
        """The base model's answers with demonstrations, and what it looks like inside while it gives them."""
        if self.task.single_token:
            # the only answer position is the prompt's last token, so one pass gives answer and activations
            answers: list[Ids] = [(0,)] * len(members)

            def keep(place: int, logits: torch.Tensor) -> None:
                answers[place] = (int(logits[0].argmax()),)

            return answers, self.run(ICL, members, list(answers), sites, keep)
        with self.showing(None) as model:
            generated = generate_answers(
                model,
                self.base.tokenizer,
                self.prompts("own", members),
                max_new_tokens=self.task.max_answer_tokens,
                stop_texts=self.task.stop_texts,
                end_id=self.task.append_end,
                description=f"{self.set}: answers",
            )
        answers = [g.ids for g in generated]
        return answers, self.run(ICL, members, answers, sites)

    def mean_of_training(self, site: str) -> torch.Tensor:
        """Mean activations of ICL over the training examples, each behind the others, ``[L, w]`` float64.

        Teacher-forced on the true answers. What ICL activations have in common whatever the query: an
        adapter that learnt no more than this constant is as near to ICL as it is.
        """
        contexts = self.teaching.contexts("train")
        pairs = [
            (contexts.context_ids(i), self.task.target_ids(self.base.tokenizer, row))
            for i, row in enumerate(self.set.data.train)
        ]
        total: Any = 0.0
        for _, activations in self._pass(ICL, pairs, [site], "mean over training examples"):
            total = total + activations[site].double().sum(1)
        return total / sum(len(answer) for _, answer in pairs)  # type: ignore[no-any-return]

    def blocks(self, sites: Sequence[str]) -> Iterator[range]:
        """Queries whose activations are held at once."""
        config = self.base.model.config.get_text_config()
        width = config.hidden_size
        inner = getattr(config, "intermediate_size", None) or 4 * width
        floats = sum(inner if site == "neurons" else width for site in sites)
        size = next(iter(self.base.model.parameters())).element_size()
        each = int(config.num_hidden_layers) * self.task.max_answer_tokens * floats * size
        count, step = len(self.set.queries), max(1, min(_MAX_BLOCK, _BLOCK_BYTES // max(each, 1)))
        for start in range(0, count, step):
            yield range(start, min(start + step, count))
            give_back_memory()


def run_conditions(
    runner: Runner,
    conditions: Sequence[Condition],
    accumulators: Sequence[Accumulator],
    answers: list[Ids],
    members: Sequence[int],
) -> None:
    """Every condition over a block of queries; accumulators are given every query of every condition once.

    ``icl`` is always run, as the reference, and ``icl-other`` where it is there. The base model's answers
    with demonstrations are added to ``answers``, before accumulators hear of their queries.
    """
    sites = sites_of(accumulators)
    forced, icl = runner.reference(members, sites)
    answers += forced
    other = runner.run(OTHER, members, forced, sites) if OTHER in conditions else None

    def hand_on(condition: Condition, activations: Sequence[Activations]) -> None:
        for place, index in enumerate(members):
            beside = None if other is None else other[place]
            for accumulator in accumulators:
                accumulator.add(condition.name, index, activations[place], icl[place], beside)

    hand_on(ICL, icl)
    if other is not None:
        hand_on(OTHER, other)
    for condition in conditions:
        if condition not in (ICL, OTHER, MEAN):
            hand_on(condition, runner.run(condition, members, forced, sites))


def sites_of(accumulators: Sequence[Accumulator]) -> list[str]:
    """All that they read."""
    return list(dict.fromkeys(site for accumulator in accumulators for site in accumulator.sites))
