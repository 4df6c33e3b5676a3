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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia2.adapters.weights import base_weights
from ia2.models.batching import give_back_memory
from ia2.models.capture import ActivationCapture
from ia2.models.forward import AnswerOutput, answer_pass
from ia2.models.generation import Generated, generate_answers
from ia2.models.tokens import Ids, decode, pad_id
from ia2.prompts.context import Contexts
from ia2.teacher.targets import OnlineTargets, TargetStore, TeacherAnswer, open_store, pack_soft
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


@dataclass
class Teacher:
    """The base model as a teacher.

    Attributes:
        model: base or PEFT model; adapters are switched off here.
        tokenizer: its tokenizer.
        max_answer_tokens: G at most; 1 for single-token tasks.
        stop_texts: texts that end a generated answer.
        attention_modules: optional glob (see ``capture``).
        average: average an example's permutations into one target; otherwise each one's are kept.
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

    def teach(
        self,
        contexts: Contexts,
        new: Callable[[Sequence[int], int], OnlineTargets] = TargetStore,
        *,
        answers: Sequence[TeacherAnswer] | None = None,
        description: str = "teacher",
    ) -> OnlineTargets:
        """Targets of all queries in their contexts.

        Args:
            contexts: queries in their contexts.
            new: makes of layers and permutations what takes the targets; the default keeps them in memory.
            answers: the teacher's answers, where an earlier pass has found them.
            description: text of the progress bar.
        """
        with self.watching() as capture:
            layers = capture.layers if capture is not None else []
            targets = new(layers, 1 if self.average else contexts.permutations)
            run = _Pass(self, contexts, capture, targets)
            found: list[TeacherAnswer] = []
            mine = share(len(contexts), contexts.cost)
            # in chunks, so that memory does not grow with the number of examples
            for start in range(0, len(mine), _CHUNK):
                members = list(mine[start : start + _CHUNK])
                run.description = description
                if len(mine) > _CHUNK:
                    run.description += f" {start}–{start + len(members)} of {len(mine)}"
                found += run.answers(members, None if answers is None else [answers[i] for i in members])
                give_back_memory()
            targets.finish(joined(found))
        return targets

    def to_store(
        self, contexts: Contexts, folder: Path, fingerprint: Mapping[str, Any], **options: Any
    ) -> TargetStore:
        """:meth:`teach` on disk; reused when ``folder`` holds the same.

        Each process writes shards of its own, and the first one the index.

        Raises:
            RunFolderError: ``folder`` holds targets of something else, or there is no space.
        """
        store = open_store(folder, fingerprint)
        wait()  # nothing is there yet for a process that looks later
        if store is not None:
            logger.info("Teacher targets: reusing %s.", folder)
            return store
        with atomic_dir(folder) if is_first() else nullcontext() as made:
            temporary = gathered(made)[0]  # the first process has made it
            self.teach(contexts, partial(TargetStore, folder=temporary, fingerprint=fingerprint), **options)
        wait()
        return TargetStore.read(folder)

    @contextmanager
    def watching(self) -> Iterator[ActivationCapture | None]:
        """Adapter off, hooks in place."""
        with base_weights(self.model):
            if self.site in ("soft", ANSWERS):
                yield None
                return
            with ActivationCapture(self.model, self.attention_modules, site=self.site) as capture:
                yield capture


@dataclass
class _Pass:
    """One run of a teacher over queries in their contexts."""

    teacher: Teacher
    contexts: Contexts
    capture: ActivationCapture | None
    targets: OnlineTargets
    description: str = ""
    sums: dict[int, tuple[torch.Tensor, int]] = field(default_factory=dict)

    def answers(self, members: list[int], known: list[TeacherAnswer] | None) -> list[TeacherAnswer]:
        """Answers of some queries; their targets are handed on."""
        if known is not None:
            self._feed(members, known, range(self.contexts.permutations))
            return known
        return self._single(members) if self.teacher.max_answer_tokens == 1 else self._generated(members)

    def _single(self, members: list[int]) -> list[TeacherAnswer]:
        """One pass gives answer and targets: the only answer position is the prompt's last token.

        With several permutations the answer is the argmax of their mean probability.
        """
        tokenizer, permutations = self.teacher.tokenizer, self.contexts.permutations
        votes: dict[int, torch.Tensor] = {}

        def vote(i: int, output: AnswerOutput) -> None:
            assert output.logits is not None
            # the argmax needs no probabilities where there is a single vote
            own = output.logits[0] if permutations == 1 else output.logits[0].softmax(-1)
            votes[i] = votes[i] + own if i in votes else own

        anything = [TeacherAnswer((pad_id(tokenizer),), "")] * len(members)
        self._feed(members, anything, range(permutations), vote)
        tokens = [int(votes[i].argmax()) for i in members]
        return [TeacherAnswer((token,), decode(tokenizer, [token])) for token in tokens]

    def _generated(self, members: list[int]) -> list[TeacherAnswer]:
        """Generate under the first order, and feed what generation does not give the targets of."""
        teacher, contexts = self.teacher, self.contexts
        if self.capture is not None:
            self.capture.disarm()  # generation runs through the hooked modules too
        # Not attention weights, which have spans, nor whole distributions, which would fill the memory.
        soft = teacher.site == "soft" and teacher.top_k is not None and contexts.permutations == 1
        unseen: list[int] = []

        def take(place: int, answer: Generated, seen: torch.Tensor | None) -> None:
            if seen is None:
                unseen.append(place)
            elif soft:
                self.targets.add(members[place], 0, seen)
            else:
                self._gather(members[place], 0, seen)

        generated = generate_answers(
            teacher.model,
            teacher.tokenizer,
            [contexts.context_ids(i, 0) for i in members],
            max_new_tokens=teacher.max_answer_tokens,
            stop_texts=teacher.stop_texts,
            end_id=teacher.end_id,
            description=f"{self.description}: answers",
            capture=self.capture if teacher.site != "weights" else None,
            keep=(lambda logits: pack_soft(logits.softmax(-1), teacher.top_k)) if soft else None,
            on_answer=take,
        )
        answers = [TeacherAnswer(g.ids, g.text, g.ended) for g in generated]
        places = sorted(unseen)
        self._feed([members[place] for place in places], [answers[place] for place in places], [0])
        self._feed(members, answers, range(1, contexts.permutations))
        return answers

    def _feed(
        self,
        members: list[int],
        answers: Sequence[TeacherAnswer],
        orders: Sequence[int],
        on_output: Callable[[int, AnswerOutput], None] | None = None,
    ) -> None:
        """Feed each answer under some orders, and hand on what is to be kept."""
        teacher, contexts = self.teacher, self.contexts
        if teacher.site == ANSWERS and on_output is None:
            return
        spans = None
        if teacher.site == "weights":
            spans = [span(contexts, i, answer.ids) for i, answer in zip(members, answers, strict=True)]
        for k in orders:
            pairs = [(contexts.context_ids(i, k), a.ids) for i, a in zip(members, answers, strict=True)]
            order = "" if contexts.permutations == 1 else f" (order {k + 1}/{contexts.permutations})"
            for output in answer_pass(
                teacher.model,
                teacher.tokenizer,
                pairs,
                capture=self.capture,
                logits=on_output is not None or teacher.site == "soft",
                spans=spans,
                description=self.description + order,
            ):
                i = members[output.index]
                if teacher.site == "soft":
                    assert output.logits is not None
                    self._gather(i, k, output.logits.softmax(-1)[None])
                elif teacher.site != ANSWERS:
                    assert output.activations is not None
                    self._gather(i, k, output.activations)
                if on_output is not None:
                    on_output(i, output)

    def _gather(self, i: int, k: int, tensor: torch.Tensor) -> None:
        """Hand a target on, or its mean over the permutations once all have come."""
        permutations = self.contexts.permutations
        if self.teacher.average and permutations > 1:
            total, count = self.sums.pop(i, (0, 0))
            if count + 1 < permutations:
                self.sums[i] = (total + tensor.float(), count + 1)
                return
            k, tensor = 0, ((total + tensor.float()) / permutations).to(tensor.dtype)
        soft = self.teacher.site == "soft"
        self.targets.add(i, k, pack_soft(tensor[0], self.teacher.top_k) if soft else tensor)


def span(contexts: Contexts, i: int, answer: Ids) -> int:
    """Fed ids at the end of a row that are the same with and without context."""
    return contexts.common_suffix(i) + len(answer) - 1
