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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ia2.analysis.patching import Patch, Unit, patched_log_probs
from ia2.analysis.sites import SiteCapture, has_site
from ia2.capture import ActivationCapture, unwrap
from ia2.errors import DataError
from ia2.inference import answer_pass
from ia2.tokens import Ids

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

# Of a long answer only the beginning is looked at: rows are positions times units.
MAX_POSITIONS = 16

# Groups whose units are too many for a second control.
_FINE = ("heads",)


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

    @property
    def sites(self) -> list[str]:
        """Sites that are read."""
        return list(dict.fromkeys(u.site for patches in self.groups.values() for p in patches for u in p))

    def shape(self, group: str) -> tuple[int, ...]:
        """Of a group's numbers: ``[L, H]``, ``[L]``, ``[]``, ``[len(sets)]``."""
        if group == "all":
            return ()
        return (len(self.layers), self.heads) if group == "heads" else (len(self.groups[group]),)


def units_of(model: nn.Module, pattern: str | None = None, sets: Mapping[str, Patch] | None = None) -> Units:
    """Every head, layer and MLP of a model.

    Args:
        model: bare or wrapped causal model.
        pattern: optional glob over module names (see :func:`ia2.capture.find_attention_modules`).
        sets: further patches by name, such as the neurons that differ most and as many drawn at random.

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


@dataclass
class Patched:
    """Log-probabilities of the answers in one run that is patched.

    Attributes:
        clean: as it is, ``[n]``, nats.
        aim: in the run that the activations come from, ``[n]``.
        patched: by group, ``[n, …]`` of the group's shape.
        controls: ``other`` and ``own`` → as ``patched``; groups that were left out are not there.
    """

    clean: np.ndarray
    aim: np.ndarray
    patched: dict[str, np.ndarray]
    controls: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)


@dataclass
class CausalTrial:
    """What one trial's queries gave.

    Attributes:
        units: what was patched.
        places: of the queries, the same for a query in every trial that has it.
        targets: target → ICL's activations in its run.
        reverse: target → its activations in ICL's run.
    """

    units: Units
    places: list[int]
    targets: dict[str, Patched] = field(default_factory=dict)
    reverse: dict[str, Patched] = field(default_factory=dict)


class CausalCheck:
    """The causal check of one trial; the caller has the model in the state that a call names.

    ::

        check = CausalCheck(tokenizer, units_of(model), icl_prompts, prompts, answers)
        check.read_icl(model)                      # base weights
        for name in targets:
            check.read_target(name, model)         # this adapter's weights (or base)
            check.read_reverse(name, model)        # base weights; lets go of what the target left
        trial = check.finish()

    Args:
        tokenizer: of the model.
        units: what is patched.
        icl_prompts: ids of the queries behind their demonstrations, ``I ∘ X``.
        prompts: ids of the queries alone, ``X``.
        answers: what ICL answers, ``Ŷ``; of each, the first :data:`MAX_POSITIONS` ids are looked at.
        places: names of the queries for :attr:`CausalTrial.places`; by default their numbers.
        controls: whether the controls are run: they double the time.
        pattern: optional glob over module names.
        seed: of the pairing with other queries.

    Raises:
        DataError: fewer than two queries.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        units: Units,
        icl_prompts: Sequence[Ids],
        prompts: Sequence[Ids],
        answers: Sequence[Ids],
        *,
        places: Sequence[int] | None = None,
        controls: bool = True,
        pattern: str | None = None,
        seed: int = 0,
    ) -> None:
        if len(prompts) < 2:
            raise DataError(
                f"the causal check needs at least two queries, and there is {len(prompts)}: give more rows."
            )
        self.tokenizer, self.units, self.controls, self.pattern = tokenizer, units, controls, pattern
        self.icl_prompts, self.prompts = list(icl_prompts), list(prompts)
        self.answers = [tuple(answer[:MAX_POSITIONS]) for answer in answers]
        self.partners = partners(self.answers, seed)
        self._trial = CausalTrial(units, list(range(len(prompts)) if places is None else places))
        self._own: dict[str, list[Any]] = {}

    def read_icl(self, model: nn.Module) -> None:
        """What ICL has at the answer positions; ``model`` has its base weights."""
        self._icl, self._icl_log_p = self._read(model, self.icl_prompts)

    def read_target(self, name: str, model: nn.Module) -> None:
        """ICL's activations in a target's run; ``model`` has the target's weights."""
        own, _ = self._read(model, self.prompts)
        found = self._patched(model, self.prompts, self._icl, self._icl_log_p, name)
        if self.controls:
            found.controls["other"] = self._control(
                model, self.prompts, self._icl, list(self.units.groups), name
            )
            coarse = [group for group in self.units.groups if group not in _FINE]
            found.controls["own"] = self._control(model, self.prompts, own, coarse, name)
        self._trial.targets[name] = found
        self._own[name] = own

    def read_reverse(self, name: str, model: nn.Module) -> None:
        """A target's activations, read before, in ICL's run; ``model`` has its base weights."""
        aim = self._trial.targets[name].clean
        own = self._own.pop(name)
        found = self._patched(model, self.icl_prompts, own, aim, f"{name}, reverse")
        if self.controls:
            coarse = [group for group in self.units.groups if group not in _FINE]
            found.controls["own"] = self._control(
                model, self.icl_prompts, self._icl, coarse, f"{name}, reverse"
            )
        self._trial.reverse[name] = found

    def finish(self) -> CausalTrial:
        """All targets have been read."""
        return self._trial

    def _read(self, model: nn.Module, prompts: Sequence[Ids]) -> tuple[list[Any], np.ndarray]:
        found: list[Any] = [None] * len(prompts)
        log_p = np.empty(len(prompts))
        pairs = list(zip(prompts, self.answers, strict=True))
        with SiteCapture(model, self.units.sites, self.pattern) as capture:
            for output in answer_pass(
                model, self.tokenizer, pairs, capture=capture, description="causal check"
            ):
                assert output.activations is not None and output.logits is not None
                found[output.index] = capture.split(output.activations)
                rows = output.logits.double().log_softmax(-1)
                answer = self.answers[output.index]
                log_p[output.index] = float(rows[range(len(answer)), list(answer)].sum())
        return found, log_p

    def _patched(
        self, model: nn.Module, prompts: Sequence[Ids], sources: Sequence[Any], aim: np.ndarray, name: str
    ) -> Patched:
        groups = list(self.units.groups)
        values = self._run(model, prompts, sources, groups, [()], f"causal check: {name}")
        return Patched(values[:, 0], aim, self._grouped(values[:, 1:], groups))

    def _control(
        self, model: nn.Module, prompts: Sequence[Ids], sources: Sequence[Any], groups: list[str], name: str
    ) -> dict[str, np.ndarray]:
        """Sources of other queries; position by position, the last one again where they are shorter."""
        others = [
            {site: _fitted(values, len(answer)) for site, values in sources[partner].items()}
            for partner, answer in zip(self.partners, self.answers, strict=True)
        ]
        return self._grouped(
            self._run(model, prompts, others, groups, [], f"causal check: {name}, control"), groups
        )

    def _run(
        self,
        model: nn.Module,
        prompts: Sequence[Ids],
        sources: Sequence[Any],
        groups: Sequence[str],
        first: list[Patch],
        description: str,
    ) -> np.ndarray:
        patches = [*first, *(patch for group in groups for patch in self.units.groups[group])]
        return patched_log_probs(
            model, prompts, self.answers, sources, patches, pattern=self.pattern, description=description
        )

    def _grouped(self, values: np.ndarray, groups: Sequence[str]) -> dict[str, np.ndarray]:
        found, start = {}, 0
        for group in groups:
            end = start + len(self.units.groups[group])
            found[group] = values[:, start:end].reshape(len(values), *self.units.shape(group))
            start = end
        return found


def _fitted(values: torch.Tensor, positions: int) -> torch.Tensor:
    return values[:, [min(g, values.shape[1] - 1) for g in range(positions)]]


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
