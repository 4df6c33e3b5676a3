"""The causal check: which layers and heads carry what the demonstrations say.

Into a run without demonstrations (of an adapter, or of the base model) goes the activation that one layer,
head or set of neurons has with them, at the answer positions, and the log-probability of the ICL answer is
measured again. The *recovered fraction* of what was replaced is

    mean(patched − target) / mean(icl − target)

over queries: 0, nothing changed; 1, this alone brings all that demonstrations bring. The reverse puts the
target's activation into the run with demonstrations: the *broken fraction* is the same with the runs
exchanged (Wang et al. 2023, arXiv 2211.00593; Heimersheim & Nanda 2024, arXiv 2404.15255, on the two
directions: the one finds what suffices, the other what is needed). What acts on one another shares an
effect, so fractions do not add up to 1.

Controls: the activation on *another query*, with demonstrations (``other``) or in the patched run itself
(``own``). What is done for any query whatever is not the answer to this one.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ia2.analysis.conditions import by_condition
from ia2.analysis.patching import Part, Patch, patched_log_probs
from ia2.analysis.section import AnalysisSection, Look
from ia2.evaluation.effect_sizes import CrossedRows, Difference, largest
from ia2.models.capture import ActivationCapture, unwrap
from ia2.models.forward import answer_pass
from ia2.models.sites import SiteCapture, has_site
from ia2.models.tokens import Ids

if TYPE_CHECKING:
    from torch import nn

# Of a long answer only the beginning is looked at: rows are positions times patches.
MAX_POSITIONS = 16

# Neurons that are patched together, and as many drawn at random in the same layers.
NEURONS = 50

# A change counts as one if it is more than this share of the difference of the two runs, and more than this
# many nats, which rounding may make. With enough queries every head changes something.
MIN_FRACTION = 0.02
MIN_CHANGE = 1e-3

FRACTIONS = {"targets": "recovered", "reverse": "broken"}
"""Direction → what the fraction is called."""


@dataclass(frozen=True)
class Patches:
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

    @classmethod
    def of(
        cls, model: nn.Module, pattern: str | None = None, sets: Mapping[str, Patch] | None = None
    ) -> Patches:
        """Every head, layer and MLP of a model, and further patches by name."""
        layers = ActivationCapture(model, pattern).layers
        heads = int(getattr(unwrap(model).config.get_text_config(), "num_attention_heads", 1))
        groups: dict[str, tuple[Patch, ...]] = {}
        if has_site(model, "heads", pattern):
            groups["heads"] = tuple((Part("heads", layer, (h,)),) for layer in layers for h in range(heads))
        for group, site in (("layers", "output"), ("residual", "residual"), ("neurons", "neurons")):
            if has_site(model, site, pattern):
                groups[group] = tuple((Part(site, layer),) for layer in layers)
        groups["all"] = (tuple(Part("output", layer) for layer in layers),)
        if sets:
            groups["sets"] = tuple(sets.values())
        return cls(layers, heads, groups, tuple(sets or ()))

    @property
    def sites(self) -> list[str]:
        """All sites that are patched."""
        parts = [part for patches in self.groups.values() for patch in patches for part in patch]
        return list(dict.fromkeys(part.site for part in parts))

    def split(self, values: np.ndarray, groups: Sequence[str]) -> dict[str, np.ndarray]:
        """``[n, patches of the groups]`` → group → ``[n, L, H]``, ``[n, L]``, ``[n]`` or ``[n, sets]``."""
        parts, start = {}, 0
        for group in groups:
            count = len(self.groups[group])
            shape = {"heads": (len(self.layers), self.heads), "all": ()}.get(group, (count,))
            parts[group] = values[:, start : start + count].reshape(len(values), *shape)
            start += count
        return parts


def neuron_sets(differences: Mapping[str, Difference], layers: Sequence[int]) -> dict[str, Patch]:
    """The neurons that differ most from ICL, and as many others of the same layers.

    They are those of SFT where it was looked at, else of the base model: what a fine-tuned model does
    otherwise than ICL.
    """
    name = next((name for name in ("sft", "base") if name in differences), None)
    if name is None:
        return {}
    sizes = np.nan_to_num(np.abs(differences[name].effects.d_z))
    width = sizes.shape[1]
    chosen: dict[int, list[int]] = {}
    for place in largest(sizes, NEURONS):
        chosen.setdefault(place // width, []).append(place % width)
    draw = random.Random("neurons")
    others = {
        layer: draw.sample(sorted(set(range(width)) - set(own)), min(len(own), width - len(own)))
        for layer, own in chosen.items()
    }

    def patch(neurons: Mapping[int, Sequence[int]]) -> Patch:
        by_layer = [(layers[i], tuple(sorted(own))) for i, own in sorted(neurons.items()) if own]
        return tuple(Part("neurons", layer, own) for layer, own in by_layer)

    return {
        f"{NEURONS} neurons most unlike ICL ({name})": patch(chosen),
        f"{NEURONS} others of the same layers": patch(others),
    }


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
    patches: Patches,
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

    ``shown`` gives the model of a target, or with its base weights (``base``), whose run is patched. Prompts
    are those of at least two queries with demonstrations and without; of each answer ``Ŷ`` the first
    :data:`MAX_POSITIONS` ids are looked at. ``places`` are names of the queries, by default their numbers.
    Controls double the time; ``seed`` pairs queries with others.

    Returns:
        ``targets``: target → ICL's activations in its run; ``reverse``: its activations in ICL's run.
    """
    answers = [tuple(answer[:MAX_POSITIONS]) for answer in answers]
    paired = partners(answers, seed)
    groups = list(patches.groups)
    coarse = [group for group in groups if group != "heads"]  # too many for a second control

    def read(model: Any, prompts: Sequence[Ids]) -> tuple[list[Any], np.ndarray]:
        sources: list[Any] = [None] * len(prompts)
        log_p = np.empty(len(prompts))
        pairs = list(zip(prompts, answers, strict=True))
        with SiteCapture(model, patches.sites, pattern) as capture:
            for output in answer_pass(model, tokenizer, pairs, capture=capture, description="causal check"):
                assert output.activations is not None and output.logits is not None
                sources[output.index] = capture.split(output.activations)
                rows, answer = output.logits.double().log_softmax(-1), answers[output.index]
                log_p[output.index] = float(rows[range(len(answer)), list(answer)].sum())
        return sources, log_p

    def of_others(sources: Sequence[Any]) -> list[Any]:
        """Sources of other queries; position by position, the last one again where they are shorter."""
        return [
            {s: v[:, [min(g, v.shape[1] - 1) for g in range(len(answer))]] for s, v in sources[p].items()}
            for p, answer in zip(paired, answers, strict=True)
        ]

    def patched(
        model: Any,
        prompts: Sequence[Ids],
        sources: Sequence[Any],
        aim: np.ndarray,
        name: str,
        others: Mapping[str, tuple[Sequence[Any], list[str]]],
    ) -> Patched:
        runs = {"": (sources, groups)}
        if controls:
            runs |= {control: (of_others(of), own) for control, (of, own) in others.items()}
        values = {}
        clean = aim
        for control, (of, own) in runs.items():
            tried: list[Patch] = [(), *(patch for group in own for patch in patches.groups[group])]
            description = f"causal check: {name}{', control' if control else ''}"
            log_p = patched_log_probs(
                model, prompts, answers, of, tried, pattern=pattern, description=description
            )
            values[control] = patches.split(log_p[:, 1:], own)
            clean = clean if control else log_p[:, 0]
        return Patched(list(range(len(prompts))) if places is None else places, clean, aim, values)

    with shown("base") as model:
        icl, icl_log_p = read(model, icl_prompts)
    results: dict[str, dict[str, Patched]] = {"targets": {}, "reverse": {}}
    for name in targets:
        with shown(name) as model:
            own, _ = read(model, prompts)
            forward = patched(
                model, prompts, icl, icl_log_p, name, {"other": (icl, groups), "own": (own, coarse)}
            )
        with shown("base") as model:
            back = patched(model, icl_prompts, own, forward.clean, f"{name}, reverse", {"own": (icl, coarse)})
        results["targets"][name], results["reverse"][name] = forward, back
    return results


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
    partner = [0] * len(order)
    for place, i in enumerate(order):
        partner[i] = order[(place + step) % len(order)]
    return partner


def summarise(
    patches: Patches, results: Sequence[Mapping[str, Mapping[str, Patched]]], *, seed: int = 0
) -> dict[str, Any]:
    """The section, over training sets with the same patches.

    Of each patch: ``recovered`` (in ``reverse``: ``broken``), the ratio of means over queries and training
    sets, with the ends of its 95% interval, ``low`` and ``high``; ``change``, the mean change in
    log-probability in nats, with its interval; ``q``, the p value of a two-sided t test that the mean change
    is further from 0 than ``least`` nats (a minimum-effect test, Murphy & Myors 1999), one value a query (the
    mean over training sets), after Benjamini and Hochberg over the group; ``by_trial``, each training set's
    fraction.

    Intervals are percentiles of a crossed bootstrap, which draws queries and training sets (Owen 2007).
    Fractions are NaN where the interval of the difference of the two runs, ``gap``, holds 0, or its mean is
    below 0.05 nats; changes are there all the same.
    """
    places = {p for each in results for runs in each.values() for run in runs.values() for p in run.places}
    section: dict[str, Any] = {
        "layers": patches.layers,
        "heads": patches.heads,
        "sets": list(patches.sets),
        "queries": len(places),
        "trials": len(results),
    }
    for direction, fraction in FRACTIONS.items():
        by_target = by_condition([each.get(direction, {}) for each in results])
        section[direction] = {name: _target(own, fraction, seed) for name, own in by_target.items()}
    return section


def _target(runs: Sequence[Patched], fraction: str, seed: int) -> dict[str, Any]:
    clean = np.concatenate([run.clean for run in runs])
    gap = np.concatenate([run.aim for run in runs]) - clean
    least = max(MIN_CHANGE, MIN_FRACTION * abs(float(gap.mean())))
    rows = CrossedRows([run.places for run in runs], gap, seed)
    groups: dict[str, dict[str, Any]] = {}
    for control, own in runs[0].values.items():
        groups[control] = {}
        for group in own:
            values = np.concatenate([run.values[control][group] for run in runs])
            change = values - clean.reshape(-1, *[1] * (values.ndim - 1))
            groups[control][group] = rows.estimate(change, fraction, least)
    low, high = rows.interval(gap[:, None])[:, 0]
    return {
        "clean": float(clean.mean()),
        "aim": float((clean + gap).mean()),
        "least": least,
        "gap": {"value": float(gap.mean()), "low": float(low), "high": float(high)},
        **groups.pop(""),
        "control": groups,
    }


def _measure(look: Look) -> tuple[Patches, dict[str, dict[str, Patched]]]:
    """The base model and each checkpoint; sets of neurons are taken from how much each differs from ICL."""
    runner, settings = look.runner, look.analysis.settings
    members = range(min(settings.causal_queries, len(runner.set.queries)))
    answers, _ = runner.reference(members, ("output",))
    neurons = look.results.get("neurons", {}).get("neurons", {})
    patches = Patches.of(runner.base.model, runner.pattern, neuron_sets(neurons, look.analysis.layers))
    checkpoints = {"base": None, **{c.name: c for c in runner.set.checkpoints}}
    return patches, intervene(
        lambda name: runner.showing(checkpoints[name]),
        list(checkpoints),
        runner.base.tokenizer,
        patches,
        runner.prompts("own", members),
        runner.prompts("none", members),
        answers,
        places=[runner.set.places[i] for i in members],
        controls=settings.controls,
        pattern=runner.pattern,
    )


SECTION = AnalysisSection(
    "whose activations, put into another run, change the answer (minutes an adapter)",
    lambda results, analysis: summarise(results[0][0], [patched for _, patched in results]),
    measure=_measure,
    default=False,
)
