"""A section of ``analysis.json``: what it collects, and how training sets are summed up.

Each is a :class:`AnalysisSection` in its module, and an entry of :data:`ia2.analysis.sections.SECTIONS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from ia2.analysis.conditions import Accumulator, Condition, Runner, conditions_of
from ia2.models.capture import find_attention_modules
from ia2.models.tokens import Ids
from ia2.utils.logging import logger

if TYPE_CHECKING:
    from ia2.analysis.analyze import AnalysisSettings
    from ia2.models.load import BaseModel


@dataclass
class Analysis:
    """What all sections share.

    Attributes:
        base: the model.
        settings: what is analysed.
        runners: one a training set.
        prepared: section → what its ``prepare`` gave.
    """

    base: BaseModel
    settings: AnalysisSettings
    runners: list[Runner]
    prepared: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def layers(self) -> list[int]:
        """Indices of the layers with attention."""
        return list(find_attention_modules(self.base.model, self.runners[0].pattern))

    @property
    def num_heads(self) -> int:
        """Query heads of a layer."""
        return int(self.base.model.config.get_text_config().num_attention_heads)


@dataclass
class Look:
    """One training set while it is looked at.

    Attributes:
        analysis: it is of.
        runner: runs its conditions.
        answers: of the base model with demonstrations, of the queries that have been run.
        results: of the accumulators, by section, once all queries have been run.
    """

    analysis: Analysis
    runner: Runner
    answers: list[Ids] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def conditions(self) -> list[Condition]:
        """What is run beside ICL."""
        controls = self.analysis.settings.controls
        if controls and self.runner.others is None:
            logger.info("%s: too few other labelled rows for ICL with other demonstrations.", self.runner.set)
        sets = [runner.set for runner in self.analysis.runners]
        others = controls and self.runner.others is not None
        return conditions_of(self.runner.set, sets, controls=controls, others=others)


class AnalysisSection(NamedTuple):
    """One analysis.

    Attributes:
        about: a line of help.
        summarise: the section, of the results of all training sets.
        accumulate: what is fed by the passes that sections share; None where this training set has nothing
            for it. Its ``finish`` is the training set's result.
        measure: passes of its own; gives the training set's result instead.
        prepare: refuses what cannot be done, before anything is run; what it gives is ``Analysis.prepared``.
        default: whether it is made unless others are named.
    """

    about: str
    summarise: Callable[[list[Any], Analysis], dict[str, Any]]
    accumulate: Callable[[Look], Accumulator | None] | None = None
    measure: Callable[[Look], Any] | None = None
    prepare: Callable[[Analysis], Any] | None = None
    default: bool = True
