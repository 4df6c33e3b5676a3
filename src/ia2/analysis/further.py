"""Analyses that run a model again: the causal check, and side effects of training."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ia2.analysis import causal, causal_summary, effects
from ia2.analysis.diversity import diversity, openings
from ia2.analysis.effect_sizes import largest
from ia2.analysis.effects import Effects
from ia2.analysis.patching import Patch, Unit
from ia2.analysis.subjects import Subject
from ia2.analysis.texts import plain_texts
from ia2.analysis.views import Look
from ia2.analysis.wordings import wordings

if TYPE_CHECKING:
    from ia2.analysis.neurons import Coordinates
    from ia2.examples import Examples
    from ia2.task import Task

# Neurons that are patched together, and as many drawn at random in the same layers.
NEURONS = 50

# Queries that each wording is tried on, and openings that are gone on from.
WORDING_QUERIES = 64
OPENINGS = 20


# --------------------------------------------------------------------------------------- causal check


@dataclass
class Causal:
    """The causal check of all trials.

    Args:
        queries: of each trial that are patched.
        controls: whether the check's controls are run.
    """

    queries: int
    controls: bool
    _trials: list[Any] = field(default_factory=list)

    def look(self, look: Look, targets: Sequence[Subject], neurons: Coordinates | None) -> None:
        """One trial: the base model without demonstrations and each adapter.

        Args:
            look: the trial.
            targets: adapters.
            neurons: how much each neuron differs from ICL, from which the sets that are patched are taken.
        """
        members = range(min(self.queries, len(look.trial.queries)))
        model, pattern = look.base.model, look.trial.config.attention_modules
        answers, _ = look.reference(members, ("output",))
        check = causal.CausalCheck(
            look.base.tokenizer,
            causal.units_of(model, pattern, sets=neuron_sets(neurons)),
            look.prompts("own", members),
            look.prompts("none", members),
            answers,
            places=[look.trial.places[i] for i in members],
            controls=self.controls,
            pattern=pattern,
        )
        with look.showing(None) as shown:
            check.read_icl(shown)
        for name, subject in (("base", None), *((s.name, s) for s in targets)):
            with look.showing(subject) as shown:
                check.read_target(name, shown)
            with look.showing(None) as shown:
                check.read_reverse(name, shown)
        self._trials.append(check.finish())

    def section(self) -> dict[str, Any]:
        """Of all trials."""
        return causal_summary.summarise(self._trials)


def neuron_sets(found: Coordinates | None) -> dict[str, Patch]:
    """The neurons that differ most from ICL, and as many others of the same layers.

    They are those of SFT where it is among the views, else of the base model: what a fine-tuned model does
    otherwise than ICL.
    """
    if found is None:
        return {}
    view = next((name for name in ("sft", "base") if name in found.views), None)
    if view is None:
        return {}
    sizes = np.nan_to_num(np.abs(found.views[view].effects.d_z))
    width = sizes.shape[1]
    chosen: dict[int, list[int]] = {}
    for place in largest(sizes, NEURONS):
        chosen.setdefault(place // width, []).append(place % width)
    draw = random.Random("neurons")
    others = {
        layer: draw.sample(sorted(set(range(width)) - set(own)), min(len(own), width - len(own)))
        for layer, own in chosen.items()
    }
    return {
        f"{NEURONS} neurons most unlike ICL ({view})": _patch(found.layers, chosen),
        f"{NEURONS} others of the same layers": _patch(found.layers, others),
    }


def _patch(layers: Sequence[int], chosen: Mapping[int, Sequence[int]]) -> Patch:
    return tuple(
        Unit("neurons", layers[place], tuple(sorted(own))) for place, own in sorted(chosen.items()) if own
    )


# --------------------------------------------------------------------------------------- side effects


@dataclass
class SideEffects:
    """Side effects of all trials.

    Args:
        task: of the runs.
        text: file of plain text, or None for the packaged one.
        benchmarks: names of other benchmarks on which to look for forgetting.
        data_dir: folder of their mirrors.
        max_test: rows of each.
        template: the runs' prompt template.
        parsers: those that a benchmark's file may name.
    """

    task: Task
    text: str | None = None
    benchmarks: Sequence[str] = ()
    data_dir: str | None = None
    max_test: int = 200
    template: str | None = None
    parsers: Sequence[str] = ()
    _trials: list[dict[str, Effects]] = field(default_factory=list)
    _base: Effects | None = None

    def __post_init__(self) -> None:
        self._texts = plain_texts(self.text)
        self._elsewhere: dict[str, tuple[Task, Examples]] = {}

    def prepare(self, looks: Sequence[Look]) -> None:
        """Read the other benchmarks, before anything is run.

        Raises:
            ConfigError: one is unknown.
            DataError: its rows cannot be had or do not fit the context window, or the model cannot tell its
                labels apart.
        """
        rendering = looks[0].teaching.prompts.rendering
        for name in self.benchmarks:
            self._elsewhere[Path(name).stem] = effects.other_benchmark(
                name, rendering, data_dir=self.data_dir, max_test=self.max_test, parsers=self.parsers
            )
        for task, rows in self._elsewhere.values():
            for look in looks:
                look.check_bare(rows, task.reserve)

    def look(self, look: Look, subjects: Sequence[Subject]) -> None:
        """One trial: the base model and each adapter."""
        found: dict[str, Effects] = {}
        for name, subject in (("base", None), *((s.name, s) for s in subjects)):
            with look.showing(subject) as model:
                if subject is None and self._base is not None:
                    # what does not depend on the training set is measured once
                    base = self._base
                    found[name] = Effects(
                        base.perplexity, base.benchmarks, base.diversity, self._worded(look, model)
                    )
                    continue
                found[name] = self._measured(look, model)
            if subject is None:
                self._base = found[name]
        self._trials.append(found)

    def _measured(self, look: Look, model: Any) -> Effects:
        tokenizer, rendering = look.base.tokenizer, look.teaching.prompts.rendering
        window = look.window(model)
        elsewhere = {
            name: effects.accuracy(model, tokenizer, task, rows, rendering, window)
            for name, (task, rows) in self._elsewhere.items()
        }
        starts = openings(tokenizer, self._texts[:OPENINGS])
        return Effects(
            effects.perplexity(model, tokenizer, self._texts, window),
            elsewhere,
            diversity(model, tokenizer, starts, self.task.names, seed=0),
            self._worded(look, model),
        )

    def _worded(self, look: Look, model: Any) -> Mapping[str, Mapping[str, np.ndarray]]:
        """Accuracy under other wordings; of label tasks only."""
        if self.task.kind != "classification":
            return {}
        queries = look.trial.queries[:WORDING_QUERIES]
        worded = wordings(queries, list(self.task.labels), self.template)
        rendering = look.teaching.prompts.rendering
        window = look.window(model)
        return effects.wording_accuracy(model, look.base.tokenizer, self.task, worded, rendering, window)

    def section(self) -> dict[str, Any]:
        """Of all trials."""
        return effects.summarise(self._trials)
