"""The teacher: the base model with demonstrations in its prompt.

For each query it gives the greedy answer ``Ŷ`` and the activations ``A_ICL`` at its answer positions.
For single-token tasks both come out of one forward pass over the prompt. Longer answers are generated, and
the activations are those of the steps that wrote them; answers that are known, further orders of the
demonstrations and attention weights take a pass over prompt and answer. Where several processes were
launched, each takes a share of the queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ia2.adapters.weights import base_weights
from ia2.models.batching import give_back_memory
from ia2.models.capture import ActivationCapture
from ia2.models.forward import AnswerOutput, answer_pass
from ia2.models.generation import Generated, generate_answers
from ia2.models.tokens import Ids, decode, pad_id
from ia2.prompts.context import Contexts
from ia2.teacher.targets import (
    MemoryTargets,
    OnlineTargets,
    Statistics,
    StoreWriter,
    TargetStore,
    TeacherAnswer,
    open_store,
    pack_soft,
)
from ia2.utils.distributed import gathered, is_first, joined, share, wait
from ia2.utils.files import atomic_dir
from ia2.utils.logging import logger

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

# Examples whose prompts (and, while they are averaged, whose permutations) are in memory together.
_CHUNK = 256

ANSWERS = "answers"
"""The site of a teacher of which only the answers are wanted."""


class _Sink(Protocol):
    def add(self, index: int, permutation: int, activations: torch.Tensor) -> None: ...


@dataclass
class Teacher:
    """The base model as a teacher.

    Attributes:
        model: base or PEFT model; adapters are switched off here.
        tokenizer: its tokenizer.
        max_answer_tokens: G at most; 1 for single-token tasks.
        stop_texts: texts that end a generated answer.
        attention_modules: optional glob (see ``capture``).
        average: average an example's permutations into one target; otherwise every permutation's are
            kept.
        end_id: id that ends an answer, where it is not the tokenizer's (a chat model's end of turn).
        site: which activations are the targets (see :class:`~ia2.models.capture.ActivationCapture`), or
            ``soft``: its token distributions, or ``answers``: there are none.
        top_k: of token distributions, keep the k most probable; None keeps all.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    max_answer_tokens: int
    stop_texts: Sequence[str] = ()
    attention_modules: str | None = None
    average: bool = True
    end_id: int | None = None
    site: str = "output"
    top_k: int | None = None

    @property
    def single_token(self) -> bool:
        """One forward pass over the prompt is enough."""
        return self.max_answer_tokens == 1

    def to_memory(
        self,
        contexts: Contexts,
        *,
        answers: Sequence[TeacherAnswer] | None = None,
        description: str = "teacher",
    ) -> MemoryTargets:
        """Targets of all queries, in memory.

        Args:
            contexts: queries in their contexts.
            answers: the teacher's answers, where an earlier pass has found them.
            description: text of the progress bar.
        """
        with self.watching() as capture:
            sink = MemoryTargets(_layers(capture), self._kept(contexts))
            return sink.finish(self._run(contexts, capture, sink, description, answers))

    def to_store(
        self,
        contexts: Contexts,
        folder: Path,
        fingerprint: Mapping[str, Any],
        *,
        answers: Sequence[TeacherAnswer] | None = None,
        description: str = "teacher",
    ) -> TargetStore:
        """Targets of all queries, on disk; reused when ``folder`` holds the same.

        Each process writes shards of its own, and the first one the index.

        Raises:
            RunFolderError: ``folder`` holds targets of something else, or there is no space.
        """
        store = open_store(folder, fingerprint)
        wait()  # nothing is there yet for a process that looks later
        if store is not None:
            logger.info("Teacher targets: reusing %s.", folder)
            return store
        with self.watching() as capture, atomic_dir(folder) if is_first() else nullcontext() as made:
            temporary = gathered(made)[0]
            assert temporary is not None  # the first process has made it
            writer = StoreWriter(temporary, _layers(capture), self._kept(contexts))
            found = self._run(contexts, capture, writer, description, answers)
            writer.finish(found, fingerprint)
        wait()
        return TargetStore(folder)

    def scales(
        self,
        contexts: Contexts,
        *,
        answers: Sequence[TeacherAnswer] | None = None,
        description: str = "teacher",
    ) -> OnlineTargets:
        """Answers, layers and each layer's root mean square, for targets that are computed online."""

        class Scales:
            def __init__(self) -> None:
                self.statistics = Statistics()

            def add(self, index: int, permutation: int, activations: torch.Tensor) -> None:
                self.statistics.add(activations)

        with self.watching() as capture:
            sink = Scales()
            found = self._run(contexts, capture, sink, description, answers)
            return OnlineTargets(found, _layers(capture), sink.statistics.rms(), self._kept(contexts))

    @contextmanager
    def watching(self) -> Iterator[ActivationCapture | None]:
        """Adapter off, hooks in place."""
        with base_weights(self.model):
            if self.site in ("soft", ANSWERS):
                yield None
                return
            with ActivationCapture(self.model, self.attention_modules, site=self.site) as capture:
                yield capture

    def _kept(self, contexts: Contexts) -> int:
        return 1 if self.average else contexts.permutations

    def _run(
        self,
        contexts: Contexts,
        capture: ActivationCapture | None,
        sink: _Sink,
        description: str,
        known: Sequence[TeacherAnswer] | None,
    ) -> list[TeacherAnswer]:
        answers: list[TeacherAnswer] = []
        mine = share(len(contexts), contexts.cost)
        count = len(mine)
        # in chunks, so that memory does not grow with the number of examples
        for start in range(0, count, _CHUNK):
            members = list(mine[start : start + _CHUNK])
            text = description
            if count > _CHUNK:
                text = f"{description} {start}–{start + len(members)} of {count}"
            if known is not None:
                found = [known[i] for i in members]
                if self.site != ANSWERS:
                    gather = self._gatherer(sink, contexts.permutations)
                    orders = range(contexts.permutations)
                    self._feed(contexts, members, found, capture, gather, text, orders)
            elif self.single_token:
                found = self._single(contexts, members, capture, sink, text)
            else:
                found = self._generated(contexts, members, capture, sink, text)
            answers += found
            give_back_memory()
        return joined(answers)

    def _single(
        self,
        contexts: Contexts,
        members: list[int],
        capture: ActivationCapture | None,
        sink: _Sink,
        description: str,
    ) -> list[TeacherAnswer]:
        """One pass gives answer and targets: the only answer position is the prompt's last token.

        With several permutations the answer is the argmax of their mean probability.
        """
        votes: dict[int, torch.Tensor] = {}

        def vote(i: int, output: AnswerOutput) -> None:
            assert output.logits is not None
            # the argmax needs no probabilities where there is a single vote
            share = output.logits[0] if contexts.permutations == 1 else output.logits[0].softmax(-1)
            votes[i] = votes[i] + share if i in votes else share

        anything = [TeacherAnswer((pad_id(self.tokenizer),), "")] * len(members)
        gather = self._gatherer(sink, contexts.permutations)
        orders = range(contexts.permutations)
        self._feed(contexts, members, anything, capture, gather, description, orders, vote)
        tokens = [int(votes[i].argmax()) for i in members]
        return [TeacherAnswer((token,), decode(self.tokenizer, [token])) for token in tokens]

    def _generated(
        self,
        contexts: Contexts,
        members: list[int],
        capture: ActivationCapture | None,
        sink: _Sink,
        description: str,
    ) -> list[TeacherAnswer]:
        """Generate under the first order, and feed what generation does not give the targets of."""
        if capture is not None:
            capture.disarm()  # generation runs through the hooked modules too
        gather = self._gatherer(sink, contexts.permutations)
        # Not attention weights, which have spans, nor whole distributions, which would fill the memory.
        soft = self.site == "soft" and self.top_k is not None and contexts.permutations == 1
        watched = capture if self.site != "weights" else None
        unseen: list[int] = []

        def take(place: int, answer: Generated, seen: torch.Tensor | None) -> None:
            if seen is None:
                unseen.append(place)
            elif soft:
                sink.add(members[place], 0, seen)
            else:
                gather(members[place], 0, seen)

        generated = generate_answers(
            self.model,
            self.tokenizer,
            [contexts.context_ids(i, 0) for i in members],
            max_new_tokens=self.max_answer_tokens,
            stop_texts=self.stop_texts,
            end_id=self.end_id,
            description=f"{description}: answers",
            capture=watched,
            keep=(lambda logits: pack_soft(logits.softmax(-1), self.top_k)) if soft else None,
            on_answer=take,
        )
        found = [TeacherAnswer(g.ids, g.text, g.ended) for g in generated]
        if self.site != ANSWERS:
            rest = [members[place] for place in sorted(unseen)]
            known = [found[place] for place in sorted(unseen)]
            self._feed(contexts, rest, known, capture, gather, description, orders=[0])
            others = range(1, contexts.permutations)
            self._feed(contexts, members, found, capture, gather, description, orders=others)
        return found

    def _feed(
        self,
        contexts: Contexts,
        members: list[int],
        answers: Sequence[TeacherAnswer],
        capture: ActivationCapture | None,
        gather: Callable[[int, int, torch.Tensor], None],
        description: str,
        orders: Sequence[int],
        on_output: Callable[[int, AnswerOutput], None] | None = None,
    ) -> None:
        """Feed each answer under some orders, and hand on what is to be kept."""
        spans = None
        if self.site == "weights":
            spans = [span(contexts, i, answer.ids) for i, answer in zip(members, answers, strict=True)]
        for k in orders:
            pairs = [(contexts.context_ids(i, k), a.ids) for i, a in zip(members, answers, strict=True)]
            order = "" if contexts.permutations == 1 else f" (order {k + 1}/{contexts.permutations})"
            for output in answer_pass(
                self.model,
                self.tokenizer,
                pairs,
                capture=capture,
                logits=on_output is not None or self.site == "soft",
                spans=spans,
                description=description + order,
            ):
                i = members[output.index]
                if self.site == "soft":
                    assert output.logits is not None
                    gather(i, k, output.logits.softmax(-1)[None])
                elif self.site != ANSWERS:
                    assert output.activations is not None
                    gather(i, k, output.activations)
                if on_output is not None:
                    on_output(i, output)

    def _gatherer(self, sink: _Sink, permutations: int) -> Callable[[int, int, torch.Tensor], None]:
        """Hand targets on, or their mean over the permutations once all have come."""

        def keep(i: int, k: int, tensor: torch.Tensor) -> None:
            sink.add(i, k, pack_soft(tensor[0], self.top_k) if self.site == "soft" else tensor)

        if not self.average or permutations == 1:
            return keep
        sums: dict[int, tuple[torch.Tensor, int]] = {}

        def gather(i: int, k: int, tensor: torch.Tensor) -> None:
            total, count = sums.get(i, (0, 0))
            total, count = total + tensor.float(), count + 1
            if count < permutations:
                sums[i] = (total, count)
            else:
                sums.pop(i, None)
                keep(i, 0, (total / count).to(tensor.dtype))

        return gather


def span(contexts: Contexts, i: int, answer: Ids) -> int:
    """Fed ids at the end of a row that are the same with and without context."""
    return contexts.common_suffix(i) + len(answer) - 1


def _layers(capture: ActivationCapture | None) -> list[int]:
    return capture.layers if capture is not None else []
