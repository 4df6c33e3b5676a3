"""The teacher: the base model with demonstrations in its prompt.

For each query it gives the greedy answer ``Ŷ`` and the activations ``A_ICL`` at its answer positions.
For single-token tasks both come out of one forward pass over the prompt; otherwise the answer is
generated first and then fed once, behind the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ia2.adapters import base_weights
from ia2.capture import ActivationCapture
from ia2.console import logger
from ia2.context import Contexts
from ia2.files import atomic_dir
from ia2.inference import answer_pass, generate_answers
from ia2.targets import (
    MemoryTargets,
    Statistics,
    StoreWriter,
    TargetStore,
    TeacherAnswer,
    open_store,
)
from ia2.tokens import Ids, decode, pad_id

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

# Examples whose permutations are held in memory together while their targets are averaged.
_CHUNK = 64


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
        average: average the activations of an example's permutations into one target; otherwise
            every permutation's are kept.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    max_answer_tokens: int
    stop_texts: Sequence[str] = ()
    attention_modules: str | None = None
    average: bool = True

    @property
    def single_token(self) -> bool:
        """One forward pass over the prompt is enough."""
        return self.max_answer_tokens == 1

    def to_memory(self, contexts: Contexts, *, description: str = "teacher") -> MemoryTargets:
        """Targets of all queries, in memory."""
        with (
            base_weights(self.model),
            ActivationCapture(self.model, self.attention_modules) as capture,
        ):
            sink = MemoryTargets(capture.layers, self._kept(contexts))
            return sink.finish(self._run(contexts, capture, sink, description))

    def to_store(
        self,
        contexts: Contexts,
        folder: Path,
        fingerprint: Mapping[str, Any],
        *,
        description: str = "teacher",
    ) -> TargetStore:
        """Targets of all queries, on disk; reused when ``folder`` holds the same.

        Raises:
            RunFolderError: ``folder`` holds targets of something else, or there is no space.
        """
        if store := open_store(folder, fingerprint):
            logger.info("Teacher targets: reusing %s.", folder)
            return store
        with (
            base_weights(self.model),
            ActivationCapture(self.model, self.attention_modules) as capture,
            atomic_dir(folder) as temporary,
        ):
            writer = StoreWriter(temporary, capture.layers, self._kept(contexts))
            writer.finish(self._run(contexts, capture, writer, description), fingerprint)
        return TargetStore(folder)

    def scales(
        self, contexts: Contexts, *, description: str = "teacher"
    ) -> tuple[list[TeacherAnswer], list[int], list[float]]:
        """Answers, layers and each layer's root mean square, for targets that are computed online."""

        class Scales:
            def __init__(self) -> None:
                self.statistics = Statistics()

            def add(self, index: int, permutation: int, activations: torch.Tensor) -> None:
                self.statistics.add(activations)

        with (
            base_weights(self.model),
            ActivationCapture(self.model, self.attention_modules) as capture,
        ):
            sink = Scales()
            answers = self._run(contexts, capture, sink, description)
            return answers, capture.layers, sink.statistics.rms()

    def _kept(self, contexts: Contexts) -> int:
        return 1 if self.average else contexts.permutations

    def _run(
        self, contexts: Contexts, capture: ActivationCapture, sink: _Sink, description: str
    ) -> list[TeacherAnswer]:
        answers: list[TeacherAnswer | None] = [None] * len(contexts)
        for members in self._chunks(contexts):
            run = self._single if self.single_token else self._generated
            for i, answer in run(contexts, members, capture, sink, description):
                answers[i] = answer
        return [answer for answer in answers if answer is not None]

    def _chunks(self, contexts: Contexts) -> Iterator[list[int]]:
        # With one order there is nothing to collect, and a shared prefix is computed once for all.
        everything = list(range(len(contexts)))
        size = len(everything) if contexts.permutations == 1 else _CHUNK
        for start in range(0, len(everything), max(size, 1)):
            yield everything[start : start + size]

    def _single(
        self,
        contexts: Contexts,
        members: list[int],
        capture: ActivationCapture,
        sink: _Sink,
        description: str,
    ) -> Iterator[tuple[int, TeacherAnswer]]:
        """One pass gives answer and targets: the only answer position is the prompt's last token.

        With several permutations the answer is the argmax of their mean probability.
        """
        anything: Ids = (pad_id(self.tokenizer),)
        permutations = contexts.permutations
        votes: dict[int, torch.Tensor] = {}
        gather = self._gatherer(sink, permutations)
        for k in range(permutations):
            pairs = [(contexts.context_ids(i, k), anything) for i in members]
            text = description if permutations == 1 else f"{description} (order {k + 1}/{permutations})"
            for output in answer_pass(self.model, self.tokenizer, pairs, capture=capture, description=text):
                i = members[output.index]
                assert output.logits is not None and output.activations is not None
                gather(i, k, output.activations)
                if permutations == 1:
                    token = int(output.logits[0].argmax())
                    yield i, TeacherAnswer((token,), decode(self.tokenizer, [token]))
                else:
                    probability = output.logits[0].softmax(-1)
                    votes[i] = votes[i] + probability if i in votes else probability
        for i, vote in votes.items():
            token = int(vote.argmax())
            yield i, TeacherAnswer((token,), decode(self.tokenizer, [token]))

    def _generated(
        self,
        contexts: Contexts,
        members: list[int],
        capture: ActivationCapture,
        sink: _Sink,
        description: str,
    ) -> Iterator[tuple[int, TeacherAnswer]]:
        """Generate under the first order, then feed that answer under every order."""
        capture.disarm()  # generation runs through the hooked modules too
        generated = generate_answers(
            self.model,
            self.tokenizer,
            [contexts.context_ids(i, 0) for i in members],
            max_new_tokens=self.max_answer_tokens,
            stop_texts=self.stop_texts,
            description=f"{description}: answers",
        )
        gather = self._gatherer(sink, contexts.permutations)
        for k in range(contexts.permutations):
            pairs = [(contexts.context_ids(i, k), g.ids) for i, g in zip(members, generated, strict=True)]
            for output in answer_pass(
                self.model,
                self.tokenizer,
                pairs,
                capture=capture,
                logits=False,
                description=f"{description}: activations",
            ):
                assert output.activations is not None
                gather(members[output.index], k, output.activations)
        for i, g in zip(members, generated, strict=True):
            yield i, TeacherAnswer(g.ids, g.text, g.ended)

    def _gatherer(self, sink: _Sink, permutations: int) -> Callable[[int, int, torch.Tensor], None]:
        """Hand activations on, or their mean over the permutations once all have come."""
        if not self.average or permutations == 1:
            return sink.add
        sums: dict[int, tuple[torch.Tensor, int]] = {}

        def gather(i: int, k: int, activations: torch.Tensor) -> None:
            total, count = sums.get(i, (0, 0))
            total, count = total + activations.float(), count + 1
            if count < permutations:
                sums[i] = (total, count)
            else:
                sums.pop(i, None)
                sink.add(i, 0, (total / count).to(activations.dtype))

        return gather
