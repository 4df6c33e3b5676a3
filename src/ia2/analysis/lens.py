"""Logit lens: what a model would answer if its residual stream went to the output after each layer.

The lens (nostalgebraist 2020) puts the residual stream behind the model's own last norm and unembedding. How
early the teacher's answer can be read, under demonstrations and in an adapted model without them, tells
whether they reach it along the same path.

**What it is not.** The basis of early layers differs from the last one's, and the lens then leans to
certain tokens (Belrose et al. 2023, section 3). A layer that shows nothing may still hold the answer. Compare
views at one layer rather than layers of one view, and with ``chance``: the share of the most common label,
which a lens that says the same for every query can also reach.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ia2.analysis.readings import (
    LabelTokens,
    Reading,
    divergence,
    greedy,
    read_labels,
    read_vocabulary,
)
from ia2.analysis.unembedding import Lens
from ia2.errors import ModelError
from ia2.evaluation.statistics import mean_interval
from ia2.tokens import Ids

if TYPE_CHECKING:
    import torch
    from torch import nn

MEASURES = ("agreement", "gold", "log_probability", "divergence", "divergence_from_answer", "top1")
"""What is measured of each view, layer and example; see :class:`LensMeter`."""

REFERENCE, BASE = "icl", "base"

# Answer positions of free text that are read. At each the logits of all layers cost L·V·d, on the demo model
# eight times what the forward pass costs there: to read a whole answer would cost more than to make it.
POSITIONS = 4

# Layers in a row at which the task must show before it is said to: with intervals of 95%, one in forty layers
# would show it by chance.
RUN = 3


@dataclass
class LensResult:
    """What the lens has read in one trial.

    Attributes:
        layers: layer indices, ``[L]``.
        examples: indices of those that were read, ``[n]``.
        views: view → measure → ``[n, L]``.
        over: ``labels`` or ``vocabulary``: what log-probabilities are normalised over.
        chance: what a lens that says the same for every example can reach, by measure.
    """

    layers: list[int]
    examples: list[int]
    views: dict[str, dict[str, np.ndarray]]
    over: str
    chance: dict[str, float]


@dataclass
class _Reference:
    """ICL's reading of an example, and the teacher's answer where it is read: ids, or the label's index."""

    reading: Reading
    answer: Ids
    label: int = -1


@dataclass
class LensMeter:
    """Reads the residual streams of views, one example at a time.

    With labels, one position is read, that of the token in which they differ
    (:class:`~ia2.analysis.readings.LabelTokens`): the first answer position, where labels are one token. For
    free text four positions are, spread evenly over the answer, and an example's value is their mean.
    Measures, each a number a view, layer and example:

    - ``agreement``: the first label is the teacher's (free text: the first token of the vocabulary is);
    - ``gold``: the first label is the right one;
    - ``log_probability``: of the teacher's answer, in nats, over the label set, or over the vocabulary if the
      lens reads all of it;
    - ``divergence``: Jensen-Shannon divergence (Lin 1991) from ICL at the same layer, in bits, 0 to 1, over
      the label set; for free text over ICL's first 32 tokens and one outcome for all others;
    - ``divergence_from_answer``: the same from ICL's last layer, which is its output (but for a hybrid model
      whose last layer has no attention);
    - ``top1``: the first token of the vocabulary is the teacher's; only with labels and the whole vocabulary.

    The teacher's label is its answer; where that is none of the labels, the one that its last layer puts
    first. Examples whose answer does not begin as all labels do are left out.

    All views go through one lens, the base model's: what differs is then in the streams, not in what reads
    them. A last norm or unembedding that was trained too (``full``) is thus not looked at; ``own`` does.

    Args:
        lens: for the label tokens, or for the vocabulary.
        layers: layer indices of the residual streams.
        answers: ids of the teacher's answer by example; may grow until an example is added. None reads them
            off ICL's last layer, whose first token at each position a greedy answer is.
        labels: tokens of the label set, or None for free text.
        gold: each example's label (index of the task's labels), or None.
        own: view → a lens of its own.
        positions: of free text that are read.

    Raises:
        ValueError: a lens for other tokens than the labels'.
    """

    lens: Lens
    layers: Sequence[int]
    answers: Sequence[Ids] | None = None
    labels: LabelTokens | None = None
    gold: Sequence[int] | None = None
    own: dict[str, Lens] = field(default_factory=dict)
    positions: int = POSITIONS

    def __post_init__(self) -> None:
        if self.lens.ids is not None and (self.labels is None or self.lens.ids != self.labels.ids):
            raise ValueError("a lens for some tokens needs the labels that these are")
        self._rows: dict[str, dict[int, np.ndarray]] = {}
        self._names: dict[str, list[str]] = {}
        self._teacher: dict[int, int] = {}
        self._references: dict[int, _Reference | None] = {}
        self._last = REFERENCE

    @classmethod
    def for_task(
        cls,
        model: nn.Module,
        layers: Sequence[int],
        label_ids: Sequence[Ids] = (),
        gold: Sequence[int] | None = None,
        *,
        answers: Sequence[Ids] | None = None,
        whole: bool = False,
        pattern: str | None = None,
    ) -> LensMeter:
        """A meter with the lens of a model as it is now: give it with its adapter off.

        Cost, on the demo model (30 layers, d = 576, V = 49,152; two CPU cores): to read the label tokens
        alone takes 1 to 4% of the forward pass that is read; a position over the whole vocabulary as long as
        eight tokens of a forward pass, by arithmetic. Measured: labels with the whole vocabulary 40% of a
        pass over prompts of 18 tokens, 14% with 8 demonstrations; free text of 40 tokens 80% and 20%.

        Args:
            model: bare or wrapped causal model.
            layers: as in the constructor.
            label_ids: ids of each label of the task; none for free text.
            gold: as in the constructor.
            answers: as in the constructor.
            whole: read the whole vocabulary though there are labels.
            pattern: glob over attention modules.

        Raises:
            ModelError: the model's read-out cannot be followed (see :meth:`Lens.of`).
        """
        labels = LabelTokens.of(label_ids)
        lens = Lens.of(model, labels.ids if labels is not None and not whole else None, pattern)
        return cls(lens, layers, answers, labels, gold)

    def add(
        self,
        view: str,
        index: int,
        found: Mapping[str, torch.Tensor],
        icl: Mapping[str, torch.Tensor],
        other: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Read one example of one view; the reference is read before its first view.

        Args:
            view: its name; ``icl`` is the reference itself.
            index: of the example.
            found: site → activations of the view; ``residual`` is read, ``[L, G, d]``.
            icl: the same of the base model with demonstrations.
            other: not used.

        Raises:
            ValueError: activations that do not fit the layers or the reference.
        """
        stream, beside = found["residual"], icl["residual"]
        if stream.shape != beside.shape or len(stream) != len(self.layers):
            raise ValueError(
                f"{list(stream.shape)} does not fit {list(beside.shape)}, {len(self.layers)} layers"
            )
        if view == REFERENCE and self._last != REFERENCE:
            self._references.clear()  # of the block of examples before, whose views have all been seen
        self._last = view
        if index not in self._references:
            self._references[index] = made = self._refer(index, beside)
            if made is not None:
                self._keep(REFERENCE, index, made, made.reading)
        reference = self._references[index]
        if view != REFERENCE and reference is not None:
            lens = self.own.get(view, self.lens)
            here = stream[:, self._places(stream.shape[1])]
            self._keep(view, index, reference, self._read(lens, here, reference.answer, reference.reading))

    def _places(self, count: int) -> list[int]:
        """Which of ``count`` answer positions are read; none where the answer is too short for a label."""
        if self.labels is None:
            return sorted(set(np.linspace(0, count - 1, self.positions).round().astype(int).tolist()))
        place = len(self.labels.prefix)
        return [place] if place < count else []

    def _refer(self, index: int, stream: torch.Tensor) -> _Reference | None:
        """ICL's reading; None where the answer does not begin as the labels do."""
        answer = self.answers[index] if self.answers is not None else None
        if answer is not None and len(answer) != stream.shape[1]:
            raise ValueError(f"example {index} has {stream.shape[1]} positions, its answer {len(answer)} ids")
        places = self._places(stream.shape[1])
        if not places:
            return None
        if self.labels is not None and answer is not None:
            prefix = self.labels.prefix
            if tuple(answer[: len(prefix)]) != prefix:
                return None
        here = stream[:, places]
        if answer is not None:
            said = tuple(answer[place] for place in places)
        else:
            said = greedy(self.lens, here) if self.lens.ids is None else ()
        reading = self._read(self.lens, here, said, None)
        if self.labels is None:
            return _Reference(reading, said)
        assert reading.labels is not None
        named = bool(said) and said[0] in self.labels.ids
        label = self.labels.ids.index(said[0]) if named else int(reading.labels[-1].argmax())
        self._teacher[index] = label
        return _Reference(reading, said, label)

    def _read(self, lens: Lens, stream: torch.Tensor, said: Ids, icl: Reading | None) -> Reading:
        if lens.ids is not None:
            return read_labels(lens, stream)
        columns = self.labels.ids if self.labels is not None else ()
        return read_vocabulary(lens, stream, said, columns, icl, compare=self.labels is None)

    def _keep(self, view: str, index: int, reference: _Reference, reading: Reading) -> None:
        """The measures of one reading, ``[L]`` each."""
        icl = reference.reading
        made: dict[str, Any] = {}
        if self.labels is not None:
            assert reading.labels is not None and icl.labels is not None
            first = reading.labels.argmax(-1)
            made["agreement"] = first == reference.label
            if self.gold is not None:
                made["gold"] = first == self.labels.of_label[self.gold[index]]
            made["log_probability"] = reading.labels[:, reference.label]
            made["divergence"] = divergence(reading.labels, icl.labels)
            made["divergence_from_answer"] = divergence(reading.labels, icl.labels[-1:])
            if reading.answer is not None:
                made |= {"log_probability": reading.answer, "top1": reading.top1}
        else:
            made = {"agreement": reading.top1, "log_probability": reading.answer}
            for name, mine, its in (
                ("divergence", reading.same, icl.same),
                ("divergence_from_answer", reading.last, icl.last[-1:] if icl.last is not None else None),
            ):
                assert mine is not None and its is not None
                made[name] = divergence(mine, its).mean(-1)
        names = self._names.setdefault(view, [name for name in MEASURES if name in made])
        # one array of numpy's own: small tensors are ten times as large
        rows = np.stack([made[name].double().numpy() for name in names])
        self._rows.setdefault(view, {})[index] = rows

    def finish(self) -> LensResult:
        """All examples of all views have been added.

        Raises:
            ModelError: no example could be read.
        """
        views = {}
        known = sorted(self._rows.get(REFERENCE, {}))
        if not known:
            raise ModelError(
                "logit lens: no answer of the model with demonstrations begins as the labels do."
            )
        for view, rows in self._rows.items():
            measures = np.stack([rows[i] for i in known], axis=1)
            views[view] = dict(zip(self._names[view], measures, strict=True))
        chance = {}
        if self.labels is not None:
            chance["agreement"] = _most_common([self._teacher[i] for i in known])
            if self.gold is not None:
                chance["gold"] = _most_common([self.labels.of_label[self.gold[i]] for i in known])
        over = "labels" if self.lens.ids is not None else "vocabulary"
        return LensResult(list(self.layers), known, views, over, chance)


def _most_common(labels: Sequence[int]) -> float:
    return float(np.bincount(labels).max() / len(labels))


# ------------------------------------------------------------------------------------------ all trials


def summarise(trials: Sequence[LensResult]) -> dict[str, Any]:
    """The section ``lens``: means by layer, with 95% t-intervals over trials (of one, over examples).

    ``shows_at`` of a view is the first layer at which the task shows, there and at the next two layers (as
    far as there are any): where the interval of ``agreement`` lies above chance and, for views other than the
    base model's, that of the paired difference to the base model's above 0.

    Args:
        trials: of one model and task.

    Returns:
        ``{"layers", "over", "chance": {measure: share}, "views": [{"name", "n", "shows_at",
        "<measure>_by_layer": {"value", "low", "high"}}]}``, lists ``[L]``; ``shows_at`` is a layer or None.
    """
    first = trials[0]
    chance = {name: float(np.mean([trial.chance[name] for trial in trials])) for name in first.chance}
    views = []
    for view in dict.fromkeys(name for trial in trials for name in trial.views):
        having = [trial for trial in trials if view in trial.views]
        names = list(having[0].views[view])
        runs = [np.concatenate([trial.views[view][name] for name in names], axis=1) for trial in having]
        means = mean_interval(runs)
        entry: dict[str, Any] = {"name": view, "n": sum(len(run) for run in runs), "shows_at": None}
        for place, name in enumerate(names):
            own = slice(place * len(first.layers), (place + 1) * len(first.layers))
            entry[f"{name}_by_layer"] = {
                "value": means.value[own].tolist(),
                "low": means.low[own].tolist(),
                "high": means.high[own].tolist(),
            }
        above = np.array(entry["agreement_by_layer"]["low"]) > chance.get("agreement", 0.0)
        if view != BASE and all(BASE in trial.views for trial in having):
            gain = [trial.views[view]["agreement"] - trial.views[BASE]["agreement"] for trial in having]
            above &= mean_interval(gain).low > 0
        if (start := _first_run(above)) is not None:
            entry["shows_at"] = first.layers[start]
        views.append(entry)
    return {"layers": first.layers, "over": first.over, "chance": chance, "views": views}


def _first_run(above: np.ndarray) -> int | None:
    """The first place from which on ``RUN`` are true, or all up to the end."""
    for place in np.flatnonzero(above):
        if above[place : place + RUN].all():
            return int(place)
    return None
