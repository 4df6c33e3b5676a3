"""Analyses that are made while views run: which meters look at a trial, and what is made of all trials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ia2.analysis import activations, heads, lens, neurons
from ia2.analysis.sites import has_site, site_widths
from ia2.analysis.subjects import Study
from ia2.analysis.views import ICL, Look, Meter, View, gold_of, run_views, views_of
from ia2.capture import find_attention_modules
from ia2.console import logger
from ia2.errors import ModelError
from ia2.task import Task
from ia2.tokens import Ids

if TYPE_CHECKING:
    from ia2.models import BaseModel

# Queries whose attention is looked at: eager attention is slow, and means over heads settle soon.
ATTENTION_QUERIES = 48

# The site that each meter reads.
_SITES = {
    "activations": "output",
    "lens": "residual",
    "heads": "heads",
    "neurons": "neurons",
    "residual": "residual",
}


class Insides:
    """Runs the views of each trial once, whatever looks at them.

    Args:
        study: all trials.
        task: what counts as an answer.
        parts: what is analysed (see :data:`ia2.analysis.analyze.PARTS`); others are passed over.
        controls: whether controls are run.
    """

    def __init__(self, study: Study, task: Task, parts: Sequence[str], controls: bool) -> None:
        self.study, self.task, self.controls = study, task, controls
        self.parts = [part for part in ("activations", "lens", "heads", "neurons") if part in parts]
        self._views: list[list[View]] = []
        self._found: dict[str, list[Any]] = {}
        self._attention: list[dict[str, Any]] = []

    def look(self, look: Look) -> dict[str, Any]:
        """One trial; gives what its meters found."""
        if not self.parts:
            return {}
        if self.controls and look.others is None:
            logger.info("%s: too few other labelled rows for ICL with other demonstrations.", look.place)
        others = self.controls and look.others is not None
        views = views_of(look.trial, self.study.trials, controls=self.controls, others=others)
        answers: list[Ids] = []
        meters = self._meters(look, answers)
        sites = list(dict.fromkeys(_SITES[name] for name in meters))
        run_views(look, views, sites, list(meters.values()), answers)
        self._views.append(views)
        found = {name: meter.finish() for name, meter in meters.items()}
        for name, result in found.items():
            self._found.setdefault(name, []).append(result)
        if "heads" in self.parts:
            self._attention.append(self._attended(look, views, answers))
        return found

    def _meters(self, look: Look, answers: list[Ids]) -> dict[str, Any]:
        model, pattern = look.base.model, look.trial.config.attention_modules
        layers = list(find_attention_modules(model, pattern))
        meters: dict[str, Meter] = {}
        if "activations" in self.parts:
            site = _SITES["activations"]
            mean = look.mean_of_training([site])[site] if self.controls else None
            meters["activations"] = activations.ActivationMeter(layers, mean)
        if "lens" in self.parts:
            try:
                meters["lens"] = lens.LensMeter.for_task(
                    model,
                    layers,
                    self.task.label_ids,
                    gold_of(self.task, look.trial.queries),
                    answers=answers,
                    pattern=pattern,
                )
            except ModelError as error:
                logger.warning("%s The lens is left out.", error)
        if "heads" in self.parts:
            count = model.config.get_text_config().num_attention_heads
            meters["heads"] = heads.HeadMeter(layers, count)
        if "neurons" in self.parts:
            sites = ["residual"]
            if has_site(model, "neurons", pattern):
                sites.append("neurons")
            else:
                logger.info("No dense MLPs in this model: no neurons, only the residual stream.")
            for site, width in site_widths(model, sites, pattern).items():
                meters[site] = neurons.NeuronMeter(layers, width, site)
        return meters

    def _attended(self, look: Look, views: Sequence[View], answers: Sequence[Ids]) -> dict[str, Any]:
        """What attention goes to, of the views that have demonstrations."""
        members = range(min(ATTENTION_QUERIES, len(answers)))
        found = {}
        for view in [ICL, *(v for v in views if v.context == "own" and v.subject is not None)]:
            with look.showing(view.subject) as model:
                found[view.name] = heads.attention_mass(
                    model,
                    look.base.tokenizer,
                    look.prompts("own", members),
                    [answers[i] for i in members],
                    look.query_lengths(members),
                    attention_modules=look.trial.config.attention_modules,
                    description=f"{look.place}: attention of {view.name}",
                )
        return found

    def sections(self, base: BaseModel) -> dict[str, Any]:
        """The sections of all trials together, by name."""
        trials, found = self.study.trials, self._found
        pool = activations.Pool([t.seed for t in trials], [t.places for t in trials])
        sections: dict[str, Any] = {}
        if "activations" in found:
            sections["activations"] = activations.summarise(pool, found["activations"], self._views)
        if "lens" in found:
            sections["lens"] = lens.summarise(found["lens"])
        if "heads" in found:
            sections["heads"] = heads.summarise(found["heads"], self._attention)
        if "residual" in found:
            tokens = neurons.shift_tokens(base.model, base.tokenizer, found["residual"])
            by_site: dict[str, list[Any]] = {s: found[s] for s in ("neurons", "residual") if s in found}
            sections["neurons"] = neurons.summarise(by_site, tokens)
        return sections
