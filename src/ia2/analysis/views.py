"""Views: a model in some state, on prompts with or without demonstrations, run over a trial's queries.

Every view is teacher-forced on the base model's own answer with its demonstrations, ``Ŷ`` (METHOD:
measures), and read at answer positions only. Queries go by in blocks, all views of a block one after the
other, so that memory does not grow with their number; what is made of the activations is the business of
*meters*.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ia2.adapter_weights import (
    base_weights,
    load_adapter_state,
    read_adapter_state,
    virtual_tokens,
    virtual_tokens_of,
)
from ia2.adapters import peft_config
from ia2.analysis.sites import SiteCapture
from ia2.analysis.subjects import Subject, Trial
from ia2.batching import give_back_memory
from ia2.errors import DataError
from ia2.examples import Example, Examples
from ia2.files import digest
from ia2.generation import generate_answers
from ia2.inference import answer_pass
from ia2.models import BaseModel
from ia2.prompts import Prompts, query_prompts
from ia2.task import Task
from ia2.tokens import Ids
from ia2.workbench import Workbench

if TYPE_CHECKING:
    import torch

    Found = Mapping[str, torch.Tensor]

# Activations of one view of one block of queries; the reference and its control are held beside it.
_BLOCK_BYTES = 192 * 2**20
_MAX_BLOCK = 256

_OTHERS_SEED = "other demonstrations"


@dataclass(frozen=True)
class View:
    """What is looked at.

    Attributes:
        name: ``icl``, ``base``, a subject's name; controls ``icl-other``, ``NAME+demos``, ``NAME~seed``.
        subject: whose adapter is on; None for the base model.
        context: demonstrations before the query: ``none``, the trial's ``own``, or ``other`` ones.
        control: what it is a control for, in words; empty for what is itself of interest.
        of: the view that it is a control of.
    """

    name: str
    subject: Subject | None = None
    context: str = "none"
    control: str = ""
    of: str = ""

    @property
    def kind(self) -> str:
        """``base``, ``adapter`` or ``control``."""
        if self.control and self.name != "base":
            return "control"
        return "adapter" if self.subject is not None else "base"


ICL = View("icl", context="own")
BASE = View("base", control="no demonstrations")
MEAN = View("icl-mean", context="own", control="one constant", of="icl")
OTHER = View("icl-other", context="other", control="other demonstrations", of="icl")


class Meter(Protocol):
    """Makes something of activations; see :func:`run_views`."""

    def add(self, view: str, index: int, found: Found, icl: Found, other: Found | None) -> None:
        """One query's activations in one view, site → ``[L, G, w]``, beside those with demonstrations."""


@dataclass
class Look:
    """One trial, with the model and its prompts at hand.

    Args:
        base: the model.
        task: what counts as an answer.
        trial: training examples, queries and adapters.
        folder: for what little a workbench writes.
    """

    base: BaseModel
    task: Task
    trial: Trial
    folder: Path
    _bench: Workbench = field(init=False)
    _on: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self._bench = Workbench(self.base, self.trial.data, self.task, self.trial.config, self.folder)
        self.teaching = self._bench.teaching
        self.others = _other_demonstrations(self.trial)

    @property
    def place(self) -> str:
        """The trial in words."""
        seed = f"seed {self.trial.seed}"
        return seed if self.trial.fold is None else f"{seed}, fold {self.trial.fold}"

    # ----------------------------------------------------------------------------------- models

    @contextmanager
    def showing(self, subject: Subject | None) -> Iterator[Any]:
        """The model with this adapter on, or (None) the base model."""
        if subject is None:
            with base_weights(self.teaching.model):
                yield self.teaching.model
            return
        key = digest([subject.config.adapter.model_dump(), subject.config.seed])
        if key != self._on:
            self.close()
            self._bench = self._bench.with_config(subject.config, "")
            _ = self._bench.model
            self._on = key
        load_adapter_state(self._bench.model, read_adapter_state(subject.weights))
        yield self._bench.model

    def close(self) -> None:
        """Take the adapter off."""
        self._bench.close()
        self._on = ""

    # ---------------------------------------------------------------------------------- prompts

    def prompts(self, context: str = "none", members: Sequence[int] | None = None) -> list[Ids]:
        """Prompt ids of the queries (or of some), ``X`` or ``I ∘ X``."""
        queries = self.trial.queries
        members = range(len(queries)) if members is None else members
        if context == "none":
            bare = self.teaching.prompts.query_prompts(queries)
            return [bare[i] for i in members]
        contexts = self._contexts(context)
        return [contexts.context_ids(i) for i in members]

    def _contexts(self, context: str) -> Any:
        if context == "own":
            return self.teaching.prompts.pool_contexts(self.trial.queries)
        if not hasattr(self, "_other"):
            assert self.others is not None
            teaching = self.teaching
            self._other = Prompts(
                self.base.tokenizer,
                teaching.reserve,
                teaching.window,
                self.others,
                self.trial.config,
                lambda: teaching.model,
            ).pool_contexts(self.trial.queries)
        return self._other

    def window(self, model: Any) -> int:
        """Tokens of the context window that prompts of this model may fill."""
        taken = 0 if getattr(model, "_adapters_disabled", False) else virtual_tokens(model)
        return int(self.teaching.window) - taken

    def query_lengths(self, members: Sequence[int]) -> list[int]:
        """Ids at the end of each query that are the same with and without demonstrations."""
        contexts = self._contexts("own")
        return [contexts.common_suffix(i) for i in members]

    def check(self, controls: bool) -> None:
        """Refuse prompts that do not fit and labels that are none, before anything is run."""
        gold_of(self.task, self.trial.queries)
        self.check_bare(self.trial.queries, self.teaching.reserve)
        self._contexts("own").prepare()
        if controls and self.others is not None:
            self._contexts("other").prepare()

    def check_bare(self, rows: Sequence[Example], reserve: int) -> None:
        """Refuse rows that the virtual tokens of an adapter leave no room for."""
        made = [peft_config(self.base.model, s.config.adapter) for s in self.trial.subjects]
        virtual = max(map(virtual_tokens_of, made), default=0)
        query_prompts(self.teaching.prompts.rendering, rows, self.teaching.window, reserve, virtual)

    # ------------------------------------------------------------------------------------- runs

    def run(
        self,
        view: View,
        members: Sequence[int],
        answers: Sequence[Ids],
        sites: Sequence[str],
        *,
        logits: bool = False,
        on_logits: Any = None,
    ) -> list[dict[str, torch.Tensor]]:
        """One pass of one view over some queries: site → ``[L, G, w]`` of each.

        Args:
            view: model and context.
            members: the queries.
            answers: what they are forced on.
            sites: what is read.
            logits: whether the head is run too.
            on_logits: called with each member's place and ``[G, V]`` float32.
        """
        found: list[Any] = [None] * len(members)
        pattern = self.trial.config.attention_modules
        with self.showing(view.subject) as model, SiteCapture(model, sites, pattern) as capture:
            pairs = list(zip(self.prompts(view.context, members), answers, strict=True))
            longest = max(len(prompt) + len(answer) - 1 for prompt, answer in pairs)
            if longest > (window := self.window(model)):
                # demonstrations were fitted to the base model's window; virtual tokens take some of it
                raise DataError(
                    f"{self.place}, {view.name}: {longest} tokens do not fit the {window} that the adapter's "
                    "virtual tokens leave of the context window. Leave the controls out (--no-controls)."
                )
            for output in answer_pass(
                model,
                self.base.tokenizer,
                pairs,
                capture=capture,
                logits=logits,
                description=f"{self.place}: {view.name}",
            ):
                assert output.activations is not None
                found[output.index] = capture.split(output.activations)
                if on_logits is not None:
                    on_logits(output.index, output.logits)
        return found

    def reference(
        self, members: Sequence[int], sites: Sequence[str]
    ) -> tuple[list[Ids], list[dict[str, torch.Tensor]]]:
        """The base model's answers with demonstrations, and what it looks like inside while it gives them."""
        if self.task.single_token:
            # the only answer position is the prompt's last token, so one pass gives answer and activations
            answers: list[Ids] = [(0,)] * len(members)

            def keep(place: int, logits: torch.Tensor) -> None:
                answers[place] = (int(logits[0].argmax()),)

            anything = list(answers)
            found = self.run(ICL, members, anything, sites, logits=True, on_logits=keep)
            return answers, found
        with self.showing(None) as model:
            generated = generate_answers(
                model,
                self.base.tokenizer,
                self.prompts("own", members),
                max_new_tokens=self.task.max_answer_tokens,
                stop_texts=self.task.stop_texts,
                end_id=self.task.append_end,
                description=f"{self.place}: answers",
            )
        answers = [g.ids for g in generated]
        return answers, self.run(ICL, members, answers, sites)

    def mean_of_training(self, sites: Sequence[str]) -> dict[str, torch.Tensor]:
        """Mean activations of ICL over the training examples, each behind the others: site → ``[L, w]``.

        Teacher-forced on the true answers. What ICL activations have in common whatever the query: an
        adapter that learnt no more than this constant is as near to ICL as it is.
        """
        contexts, rows = self.teaching.train_contexts, self.trial.data.train
        pairs = [
            (contexts.context_ids(i), self.task.target_ids(self.base.tokenizer, row))
            for i, row in enumerate(rows)
        ]
        sums: dict[str, torch.Tensor] = {}
        count = 0
        pattern = self.trial.config.attention_modules
        with self.showing(None) as model, SiteCapture(model, sites, pattern) as capture:
            for output in answer_pass(
                model,
                self.base.tokenizer,
                pairs,
                capture=capture,
                logits=False,
                description=f"{self.place}: mean over training examples",
            ):
                assert output.activations is not None
                for site, tensor in capture.split(output.activations).items():
                    total = tensor.double().sum(1)
                    sums[site] = sums[site] + total if site in sums else total
                count += output.activations.shape[1]
        return {site: total / count for site, total in sums.items()}

    def block_size(self, sites: Sequence[str], longest_answer: int) -> int:
        """Queries whose activations are held at once."""
        config = self.base.model.config.get_text_config()
        width = config.hidden_size
        inner = getattr(config, "intermediate_size", None) or 4 * width
        floats = sum(inner if site == "neurons" else width for site in sites)
        size = next(iter(self.base.model.parameters())).element_size()
        each = int(config.num_hidden_layers) * longest_answer * floats * size
        return max(1, min(_MAX_BLOCK, _BLOCK_BYTES // max(each, 1)))


def run_views(
    look: Look,
    views: Sequence[View],
    sites: Sequence[str],
    meters: Sequence[Meter],
    answers: list[Ids],
) -> None:
    """Every view over all queries of a trial; each meter is given every query of every view once.

    Meters are told of ``icl`` itself too, with itself as the reference; ``icl-mean`` is theirs to make.

    Args:
        look: the trial.
        views: in order; ``icl`` is always run, as the reference, and ``icl-other`` where it is among them.
        sites: what is read of each layer.
        meters: what is made of it.
        answers: an empty list; the base model's answers with demonstrations are added to it, those of a
            query before meters hear of it.
    """
    count = len(look.trial.queries)
    step = look.block_size(sites, look.task.max_answer_tokens)
    for start in range(0, count, step):
        run_block(look, views, sites, meters, answers, range(start, min(start + step, count)))
        give_back_memory()


def run_block(
    look: Look,
    views: Sequence[View],
    sites: Sequence[str],
    meters: Sequence[Meter],
    answers: list[Ids],
    members: range,
) -> None:
    """:func:`run_views` of the next queries."""
    forced, icl = look.reference(members, sites)
    answers += forced
    other = None
    if any(view.name == OTHER.name for view in views):
        other = look.run(OTHER, members, forced, sites)

    def hand_on(view: str, found: Sequence[Found]) -> None:
        for place, activations in enumerate(found):
            beside = None if other is None else other[place]
            for meter in meters:
                meter.add(view, members[place], activations, icl[place], beside)

    hand_on(ICL.name, icl)
    if other is not None:
        hand_on(OTHER.name, other)
    for view in views:
        if view.name not in (ICL.name, OTHER.name, MEAN.name):
            hand_on(view.name, look.run(view, members, forced, sites))


def views_of(trial: Trial, every: Sequence[Trial], *, controls: bool, others: bool) -> list[View]:
    """The views of one trial.

    Args:
        trial: whose.
        every: all trials, among which adapters of another seed are looked for.
        controls: beside the base model and the adapters, what their similarities are to be compared with.
        others: whether there are other demonstrations.
    """
    views = [BASE, *(View(subject.name, subject) for subject in trial.subjects)]
    if not controls:
        return views
    views.insert(0, MEAN)
    if others:
        views.insert(0, OTHER)
    for subject in trial.subjects:
        views.append(View(f"{subject.name}+demos", subject, "own", "with demonstrations", subject.name))
        twin = _other_seed(subject, trial, every)
        if twin is not None:
            views.append(View(f"{subject.name}~seed", twin, "none", "other seed", subject.name))
    return views


def _other_seed(subject: Subject, trial: Trial, every: Sequence[Trial]) -> Subject | None:
    """The same recipe of another seed; of several the one that has seen fewest of the queries in training."""
    asked = {row.query for row in trial.queries}
    found = [
        (sum(row.query in asked for row in other.data.train), (other.seed - trial.seed) % 2**32, number)
        for number, other in enumerate(every)
        if other.seed != trial.seed and any(s.name == subject.name for s in other.subjects)
    ]
    if not found:
        return None
    _, _, number = min(found)
    return next(s for s in every[number].subjects if s.name == subject.name)


def _other_demonstrations(trial: Trial) -> Examples | None:
    """As many other labelled rows as there are training examples, or None if there are too few.

    None too where the context is no demonstrations.
    """
    config = trial.config
    if config.context_text or config.context_file or config.context_column or config.context_function:
        return None
    rows = Examples(list(trial.others), name=trial.data.train.name)
    count = len(trial.data.train)
    if len(rows) < count:
        return None
    return Examples(random.Random(f"{_OTHERS_SEED} {trial.seed}").sample(list(rows), count), name=rows.name)


def gold_of(task: Task, queries: Sequence[Example]) -> list[int] | None:
    """Index of each query's label; None for free text."""
    if task.kind != "classification":
        return None
    task.check_labels(queries)
    return [task.label_of(row) for row in queries]
