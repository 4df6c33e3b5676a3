"""The causal check: which layers and heads carry what the demonstrations say.

Into a run without demonstrations (of an adapter, or of the base model) goes the activation that one layer,
head or set of neurons has with them, at the answer positions, and the log-probability of the ICL answer is
measured again. The *recovered fraction* of a unit is

    mean(patched − target) / mean(icl − target)

over queries: 0, nothing changed; 1, this unit alone brings all that demonstrations bring. The reverse puts
the target's activation into the run with demonstrations: the *broken fraction* is the same with the runs
exchanged (Wang et al. 2023, arXiv 2211.00593; Heimersheim & Nanda 2024, arXiv 2404.15255, on the two
directions: the one finds what suffices, the other what is needed). Units that act on one another share an
effect, so fractions do not add up to 1.

Controls: the unit's activation on *another query*, with demonstrations (``other``) or in the patched run
itself (``own``). What a unit does for any query whatever is not the answer to this one.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ia2.analysis.conditions import Runner, by_condition
from ia2.analysis.patching import Patch, Unit, patched_log_probs
from ia2.evaluation.effect_sizes import CrossedRows, Difference, largest
from ia2.models.capture import ActivationCapture, unwrap
from ia2.models.forward import answer_pass
from ia2.models.sites import SiteCapture, has_site
from ia2.models.tokens import Ids
from ia2.utils.errors import DataError

if TYPE_CHECKING:
    from torch import nn

# Of a long answer only the beginning is looked at: rows are positions times units.
MAX_POSITIONS = 16

# Neurons that are patched together, and as many drawn at random in the same layers.
NEURONS = 50

# Groups whose units are too many for a second control.
_FINE = ("heads",)

# A change counts as one if it is more than this share of the difference of the two runs, and more than this
# many nats, which rounding may make. With enough queries every head changes something.
MIN_FRACTION = 0.02
MIN_CHANGE = 1e-3

FRACTIONS = {"targets": "recovered", "reverse": "broken"}
"""Direction → what the fraction is called."""


# -------------------------------------------------------------------------------- what is patched


@dataclass(frozen=True)
class Units:
    """What is patched, in groups.

    Attributes:
        layers: indices of the layers with attention, L of them.
        heads: heads of a layer, H.
        groups: ``heads`` (L·H patches, a layer's one after the other), ``layers`` (attention outputs, L),
            ``residual`` (the stream after each layer, L), ``neurons`` (all neurons of each layer, L), ``all``
            (all attention outputs at once) and ``sets``. A group that the model does not have is not there.
        sets: names of the patches of the group ``sets``.
    """

    layers: list[int]
    heads: int
    groups: dict[str, tuple[Patch, ...]]
    sets: tuple[str, ...] = ()

    def shape(self, group: str) -> tuple[int, ...]:
        """Of a group's numbers: ``[L, H]``, ``[L]``, ``[]``, ``[len(sets)]``."""
        if group == "all":
            return ()
        return (len(self.layers), self.heads) if group == "heads" else (len(self.groups[group]),)


def units_of(model: nn.Module, pattern: str | None = None, sets: Mapping[str, Patch] | None = None) -> Units:
    """Every head, layer and MLP of a model, and further patches by name.

    Raises:
        ModelError: no attention modules.
    """
    layers = ActivationCapture(model, pattern).layers
    heads = int(getattr(unwrap(model).config.get_text_config(), "num_attention_heads", 1))
    groups: dict[str, tuple[Patch, ...]] = {}
    if has_site(model, "heads", pattern):
        groups["heads"] = tuple((Unit("heads", layer, (h,)),) for layer in layers for h in range(heads))
    for group, site in (("layers", "output"), ("residual", "residual"), ("neurons", "neurons")):
        if has_site(model, site, pattern):
            groups[group] = tuple((Unit(site, layer),) for layer in layers)
    groups["all"] = (tuple(Unit("output", layer) for layer in layers),)
    if sets:
        groups["sets"] = tuple(sets.values())
    return Units(layers, heads, groups, tuple(sets or ()))


def neuron_sets(found: Mapping[str, Difference], layers: Sequence[int]) -> dict[str, Patch]:
    """The neurons that differ most from ICL, and as many others of the same layers.

    They are those of SFT where it was looked at, else of the base model: what a fine-tuned model does
    otherwise than ICL.
    """
    name = next((name for name in ("sft", "base") if name in found), None)
    if name is None:
        return {}
    sizes = np.nan_to_num(np.abs(found[name].effects.d_z))
    width = sizes.shape[1]
    chosen: dict[int, list[int]] = {}
    for place in largest(sizes, NEURONS):
        chosen.setdefault(place // width, []).append(place % width)
    draw = random.Random("neurons")
    others = {
        layer: draw.sample(sorted(set(range(width)) - set(own)), min(len(own), width - len(own)))
        for layer, own in chosen.items()
    }

    def patch(parts: Mapping[int, Sequence[int]]) -> Patch:
        return tuple(
            Unit("neurons", layers[i], tuple(sorted(own))) for i, own in sorted(parts.items()) if own
        )

    return {
        f"{NEURONS} neurons most unlike ICL ({name})": patch(chosen),
        f"{NEURONS} others of the same layers": patch(others),
    }


# -------------------------------------------------------------------------------------- running it


@dataclass
class Patched:
    """Log-probabilities of one training set's answers in one run that is patched.

    Attributes:
        places: of the queries, the same for a query in every training set that has it.
        clean: of the answers in the run as it is, ``[n]``, nats.
        aim: in the run that the activations come from, ``[n]``.
        values: ``""`` (patched) and the controls ``other`` and ``own`` → group → ``[n, …]`` of its shape.
    """

    places: Sequence[int]
    clean: np.ndarray
    aim: np.ndarray
    values: dict[str, dict[str, np.ndarray]]


def intervene(
    shown: Callable[[str], AbstractContextManager[Any]],
    targets: Sequence[str],
    tokenizer: Any,
    units: Units,
    icl_prompts: Sequence[Ids],
    prompts: Sequence[Ids],
    answers: Sequence[Ids],
    *,
    places: Sequence[int] | None = None,
    controls: bool = True,
    pattern: str | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Patched]]:
    """The causal check of one training set.

    Args:
        shown: gives the model of a target, or with its base weights (``base``).
        targets: whose runs are patched.
        tokenizer: of the model.
        units: what is patched.
        icl_prompts: ids of the queries behind their demonstrations, ``I ∘ X``.
        prompts: ids of the queries alone, ``X``.
        answers: what ICL answers, ``Ŷ``; of each, the first :data:`MAX_POSITIONS` ids are looked at.
        places: names of the queries; by default their numbers.
        controls: whether the controls are run: they double the time.
        pattern: optional glob over module names.
        seed: of the pairing with other queries.

    Returns:
        ``targets``: target → ICL's activations in its run; ``reverse``: its activations in ICL's run.

    Raises:
        DataError: fewer than two queries.
    """
    if len(prompts) < 2:
        raise DataError(
            f"the causal check needs at least two queries, and there is {len(prompts)}: give more rows."
        )
    answers = [tuple(answer[:MAX_POSITIONS]) for answer in answers]
    paired = partners(answers, seed)
    sites = list(dict.fromkeys(u.site for patches in units.groups.values() for p in patches for u in p))
    coarse = [group for group in units.groups if group not in _FINE]

    def read(model: Any, prompts: Sequence[Ids]) -> tuple[list[Any], np.ndarray]:
        found: list[Any] = [None] * len(prompts)
        log_p = np.empty(len(prompts))
        pairs = list(zip(prompts, answers, strict=True))
        with SiteCapture(model, sites, pattern) as capture:
            for output in answer_pass(model, tokenizer, pairs, capture=capture, description="causal check"):
                assert output.activations is not None and output.logits is not None
                found[output.index] = capture.split(output.activations)
                rows, answer = output.logits.double().log_softmax(-1), answers[output.index]
                log_p[output.index] = float(rows[range(len(answer)), list(answer)].sum())
        return found, log_p

    def of_others(sources: Sequence[Any]) -> list[Any]:
        """Sources of other queries; position by position, the last one again where they are shorter."""
        return [
            {s: v[:, [min(g, v.shape[1] - 1) for g in range(len(answer))]] for s, v in sources[p].items()}
            for p, answer in zip(paired, answers, strict=True)
        ]

    def run(
        model: Any, prompts: Sequence[Ids], sources: Sequence[Any], groups: Sequence[str], name: str
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        patches: list[Patch] = [(), *(patch for group in groups for patch in units.groups[group])]
        values = patched_log_probs(
            model, prompts, answers, sources, patches, pattern=pattern, description=f"causal check: {name}"
        )
        ends = np.cumsum([len(units.groups[group]) for group in groups])[:-1]
        parts = np.split(values[:, 1:], ends, axis=1)
        return values[:, 0], {
            group: part.reshape(len(part), *units.shape(group))
            for group, part in zip(groups, parts, strict=True)
        }

    def patched(
        model: Any,
        prompts: Sequence[Ids],
        sources: Sequence[Any],
        aim: np.ndarray,
        name: str,
        others: Mapping[str, tuple[Sequence[Any], Sequence[str]]],
    ) -> Patched:
        clean, values = run(model, prompts, sources, list(units.groups), name)
        found = {"": values}
        for control, (of, groups) in others.items() if controls else ():
            found[control] = run(model, prompts, of_others(of), groups, f"{name}, control")[1]
        return Patched(list(range(len(prompts))) if places is None else places, clean, aim, found)

    with shown("base") as model:
        icl, icl_log_p = read(model, icl_prompts)
    found: dict[str, dict[str, Patched]] = {"targets": {}, "reverse": {}}
    for name in targets:
        with shown(name) as model:
            own, _ = read(model, prompts)
            controls_of = {"other": (icl, list(units.groups)), "own": (own, coarse)}
            forward = patched(model, prompts, icl, icl_log_p, name, controls_of)
        with shown("base") as model:
            back = patched(model, icl_prompts, own, forward.clean, f"{name}, reverse", {"own": (icl, coarse)})
        found["targets"][name], found["reverse"][name] = forward, back
    return found


def partners(answers: Sequence[Ids], seed: int = 0) -> list[int]:
    """For each query another one, with another answer where that is possible; each serves once.

    In the order of the answers, the one as many places further on as the commonest answer has queries: no
    answer then meets itself unless more than half of the queries have it.
    """
    order = list(range(len(answers)))
    random.Random(f"partners {seed}").shuffle(order)
    order.sort(key=lambda i: answers[i])
    commonest = max(Counter(answers).values())
    step = commonest if commonest < len(order) else 1
    found = [0] * len(order)
    for place, i in enumerate(order):
        found[i] = order[(place + step) % len(order)]
    return found


class Interventions:
    """The causal check of all training sets: of the base model and of each checkpoint.

    Args:
        queries: of each training set that are patched.
        controls: whether the check's controls are run.
    """

    def __init__(self, queries: int, controls: bool) -> None:
        self.queries, self.controls = queries, controls
        self._units: Units | None = None
        self._found: list[dict[str, dict[str, Patched]]] = []

    def add(self, runner: Runner, results: Mapping[str, Any]) -> None:
        """One training set; sets of neurons are taken from how much each differs from ICL."""
        members = range(min(self.queries, len(runner.set.queries)))
        answers, _ = runner.reference(members, ("output",))
        model = runner.base.model
        neurons = results.get("neurons", {}).get("neurons", {})
        sets = neuron_sets(neurons, ActivationCapture(model, runner.pattern).layers)
        units = units_of(model, runner.pattern, sets)
        self._units = self._units or units
        checkpoints = {"base": None, **{c.name: c for c in runner.set.checkpoints}}
        self._found.append(
            intervene(
                lambda name: runner.showing(checkpoints[name]),
                list(checkpoints),
                runner.base.tokenizer,
                units,
                runner.prompts("own", members),
                runner.prompts("none", members),
                answers,
                places=[runner.set.places[i] for i in members],
                controls=self.controls,
                pattern=runner.pattern,
            )
        )

    def section(self) -> dict[str, Any]:
        """Of all training sets."""
        assert self._units is not None
        return summarise(self._units, self._found)


# ------------------------------------------------------------------------------------------- summary


def summarise(
    units: Units, found: Sequence[Mapping[str, Mapping[str, Patched]]], *, seed: int = 0
) -> dict[str, Any]:
    """The section ``causal`` of an analysis, over training sets with the same units.

    Of each unit: ``recovered`` (in ``reverse``: ``broken``), the ratio of means over queries and training
    sets, with the ends of its 95% interval, ``low`` and ``high``; ``change``, the mean change in
    log-probability in nats, with its interval; ``q``, the p value of a two-sided t test that the mean change
    is further from 0 than ``least`` nats (a minimum-effect test, Murphy & Myors 1999), one value a query (the
    mean over training sets), after Benjamini and Hochberg over the group's units; ``by_trial``, each training
    set's fraction.

    Intervals are percentiles of a crossed bootstrap, which draws queries and training sets (Owen 2007).
    Fractions are NaN where the interval of the difference of the two runs, ``gap``, holds 0, or its mean is
    below 0.05 nats; changes are there all the same.
    """
    places = {p for each in found for runs in each.values() for run in runs.values() for p in run.places}
    section: dict[str, Any] = {
        "layers": units.layers,
        "heads": units.heads,
        "sets": list(units.sets),
        "queries": len(places),
        "trials": len(found),
    }
    for direction, fraction in FRACTIONS.items():
        section[direction] = {
            name: _target(own, fraction, seed)
            for name, own in by_condition([each.get(direction, {}) for each in found]).items()
        }
    return section


def _target(found: Sequence[Patched], fraction: str, seed: int) -> dict[str, Any]:
    clean = np.concatenate([run.clean for run in found])
    gap = np.concatenate([run.aim for run in found]) - clean
    least = max(MIN_CHANGE, MIN_FRACTION * abs(float(gap.mean())))
    rows = CrossedRows([run.places for run in found], gap, seed)

    def groups_of(control: str) -> dict[str, Any]:
        made = {}
        for group in found[0].values[control]:
            values = np.concatenate([run.values[control][group] for run in found])
            change = values - clean.reshape(-1, *[1] * (values.ndim - 1))
            made[group] = rows.estimate(change, fraction, least)
        return made

    low, high = rows.interval(gap[:, None])[:, 0]
    return {
        "clean": float(clean.mean()),
        "aim": float((clean + gap).mean()),
        "least": least,
        "gap": {"value": float(gap.mean()), "low": float(low), "high": float(high)},
        **groups_of(""),
        "control": {control: groups_of(control) for control in found[0].values if control},
    }
