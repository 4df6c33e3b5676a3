"""Where adapters change the weights, how much, and how far they agree."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from ia2.analysis.section import Analysis, AnalysisSection, Look
from ia2.analysis.subspaces import MEASURES, Floats, LowRank, effective_rank, low_rank, overlap
from ia2.config.sections import AdapterConfig
from ia2.utils.logging import progress
from ia2.utils.statistics import t_interval

if TYPE_CHECKING:
    import torch

_SIZES = ("norm", "relative_norm", "effective_rank")

# Fewer seeds than this have their range for an interval.
_MIN_FOR_INTERVAL = 5

# A full update's singular values are taken up to this many rows or columns, whichever are fewer.
_DENSE = 768

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])(?:\.default)?\.weight")

_WITHOUT_UPDATE = {
    "vera": "all updates lie between the same random projections, so subspaces say nothing",
    "ia3": "factors on inputs, no low-rank update",
    "prefix": "keys and values before the prompt, no update of weights",
    "prompt": "embeddings before the prompt, no update of weights",
    "p-tuning": "embeddings before the prompt, no update of weights",
    "bottleneck": "networks between layers, no update of weights",
}


# -------------------------------------------------------------------------------- adapters, modules


@dataclass
class AdapterWeights:
    """One trained adapter, and once it is read, A, B and scale of each module's update.

    ``weights`` are, of each module, the trained weight of full fine-tuning.
    """

    name: str
    recipe: str
    seed: int
    fold: int | None
    config: AdapterConfig
    state: Mapping[str, torch.Tensor]
    factors: dict[str, tuple[torch.Tensor, torch.Tensor, float]] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Its type."""
        if self.config.peft is None:
            return self.config.type
        from ia2.adapters.types import _PEFT_NAMES

        name = str(self.config.peft.get("peft_type", "")).rsplit(".", 1)[-1]
        return _PEFT_NAMES.get(name, name)

    @property
    def modules(self) -> list[str]:
        """Those that it changes."""
        return [*self.factors, *self.weights]

    def read(self, base: Mapping[str, torch.Tensor]) -> str:
        """Find the updates; gives the reason where there are none."""
        if self.kind in _WITHOUT_UPDATE:
            return f"{self.kind}: {_WITHOUT_UPDATE[self.kind]}"
        if self.kind == "full":
            self.weights = {
                name.removesuffix(".weight"): weight
                for name, weight in self.state.items()
                if weight.ndim == 2 and place(name)[0] is not None and _same(base.get(name), weight.shape)
            }
            return "" if self.weights else "full: its update shows only beside the base's weights"
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for name, weight in self.state.items():
            if found := _FACTOR.fullmatch(name.removeprefix("base_model.model.")):
                parts.setdefault(found["module"], {})[found["part"]] = weight
        for module, pair in parts.items():
            # experts in one tensor and convolutions have factors of another shape
            plain = len(pair) == 2 and pair["A"].ndim == pair["B"].ndim == 2
            if plain and len(pair["A"]) == pair["B"].shape[1]:
                self.factors[module] = pair["A"], pair["B"], self._scale(module, len(pair["A"]))
        if len(self.factors) < len(parts) or (self.config.peft or {}).get("target_parameters"):
            self.factors = {}
            return f"{self.kind}: an update that is no product of two matrices"
        return "" if self.factors else f"{self.kind}: no low-rank update of a linear layer in it"

    def _scale(self, module: str, rank: int) -> float:
        if self.config.peft is None:
            alpha: Any = self.config.alpha or 8
            rooted = self.config.type == "rslora"
        else:
            from peft.utils.other import get_pattern_key

            pattern = self.config.peft.get("alpha_pattern") or {}
            default = self.config.peft.get("lora_alpha", 8)
            alpha = pattern.get(get_pattern_key(list(pattern), module), default)
            rooted = bool(self.config.peft.get("use_rslora"))
        return float(alpha) / (math.sqrt(rank) if rooted else rank)

    def update(self, module: str) -> LowRank | None:
        """Of one module; None where it has no low-rank one."""
        if module not in self.factors:
            return None
        a, b, scale = self.factors[module]
        return low_rank(a.detach().double().cpu(), b.detach().double().cpu(), scale)

    def sizes(
        self, module: str, update: LowRank | None, base: Mapping[str, torch.Tensor]
    ) -> tuple[float, float, float]:
        """Norm of an update, of the base weight, and effective rank; NaN where unknown."""
        weight = base.get(f"{module}.weight")
        if update is not None:
            norm = math.nan
            if weight is not None and _same(weight, (len(update.b), len(update.right))):
                norm = float(weight.detach().float().norm())
            return float(np.sqrt((update.sizes**2).sum())), norm, effective_rank(update.sizes)
        trained = self.weights.get(module)
        if trained is None or weight is None:
            return math.nan, math.nan, math.nan
        change = trained.detach().float().cpu() - weight.detach().float().cpu()
        small = min(change.shape) <= _DENSE
        rank = effective_rank(np.linalg.svd(change.numpy(), compute_uv=False)) if small else math.nan
        return float(change.norm()), float(weight.detach().float().norm()), rank


def place(module: str) -> tuple[int | None, str]:
    """Layer of a module (the first number in its name; None outside the layers) and its kind.

    >>> place("model.layers.3.self_attn.q_proj"), place("model.layers.2.mlp.experts.11.w1.weight")
    ((3, 'self_attn.q_proj'), (2, 'mlp.experts.w1'))
    """
    parts = module.removesuffix(".weight").split(".")
    for n, part in enumerate(parts):
        if part.isdigit():
            return int(part), ".".join(p for p in parts[n + 1 :] if not p.isdigit())
    return None, ".".join(parts)


def _same(weight: torch.Tensor | None, shape: Sequence[int]) -> bool:
    """Whether a base weight can be measured: there, not packed into other numbers, and as large."""
    return weight is not None and weight.is_floating_point() and weight.numel() == int(np.prod(shape))


# -------------------------------------------------------------------------------------- the section


def overlaps(
    adapters: Sequence[AdapterWeights], base: Mapping[str, torch.Tensor] | None = None
) -> dict[str, Any]:
    """What adapters change, and how far they agree.

    Pairs are of two kinds: ``recipes``, two arms trained on the same training set; and ``seeds``, one arm
    with two seeds (on the same fold), the baseline of what training sets and initial weights alone do. Of
    DoRA the low-rank part is compared. Of full fine-tuning norms are given, and effective ranks where the
    matrix is small.

    Adapters come in the order of the tables, each arm, seed and fold once. With weights of the base model
    (by name, no adapter attached) norms are also relative to these; quantised ones are passed over.

    Returns:
        The section: ``measures``; ``adapters``; ``modules`` (``names``, ``layers``, ``kinds``: lists of M);
        ``updates`` by arm (norm, relative norm, effective rank: over seeds, ``by_layer``, ``by_kind``);
        ``pairs`` (by measure: ``overlap`` over seeds, ``random``, ``by_module`` ``[M]``, ``by_layer``,
        ``by_kind``; principal ``angles`` in degrees); ``skipped`` with reasons. Missing values are NaN.
    """
    base = base or {}
    reasons = [adapter.read(base) for adapter in adapters]
    kept = [adapter for adapter, reason in zip(adapters, reasons, strict=True) if not reason]
    names = list(dict.fromkeys(name for adapter in kept for name in adapter.modules))
    names.sort(key=lambda name: (place(name)[0] is None, place(name)[0] or 0))
    sizes = np.full((len(kept), len(names), 3), np.nan)  # norm, norm of the base weight, effective rank
    pairs = list(_pairs(kept))
    values = np.full((2, len(pairs), len(names), len(MEASURES)), np.nan)  # measured, of random subspaces
    angles: list[list[Floats]] = [[] for _ in pairs]
    with progress("weights", len(names)) as bar:
        for m, name in enumerate(names):
            # one module at a time: the vectors of all would be as large as the adapters
            updates = [adapter.update(name) for adapter in kept]
            for n, (adapter, update) in enumerate(zip(kept, updates, strict=True)):
                sizes[n, m] = adapter.sizes(name, update, base)
            for p, (_, _, i, j) in enumerate(pairs):
                one, other = updates[i], updates[j]
                if one is not None and other is not None:
                    values[0, p, m], values[1, p, m], degrees = overlap(one, other)
                    angles[p] += [degrees] if degrees.size else []
            bar.advance()
    layers, kinds = [[part[n] for part in map(place, names)] for n in (0, 1)]
    groups = {"layer": layers, "kind": kinds}
    return {
        "measures": MEASURES,
        "adapters": [
            {
                "name": adapter.name,
                "recipe": adapter.recipe,
                "seed": adapter.seed,
                "fold": adapter.fold,
                "type": adapter.kind,
                "ranks": sorted({len(a) for a, _, _ in adapter.factors.values()}),
                "modules": len(adapter.modules),
                "norm": _root_sum(sizes[n, :, 0]),
                "zero": [name for m, name in enumerate(names) if sizes[n, m, 0] == 0],
            }
            for n, adapter in enumerate(kept)
        ],
        "modules": {"names": names, "layers": layers, "kinds": kinds},
        "updates": {
            arm: _update_entry([n for n, a in enumerate(kept) if a.name == arm], kept, sizes, groups)
            for arm in dict.fromkeys(adapter.name for adapter in kept)
        },
        "pairs": [
            _pair_entry(key, pairs, kept, values, angles, groups)
            for key in dict.fromkeys(pair[:2] for pair in pairs)
        ],
        "skipped": [
            {"name": a.name, "seed": a.seed, "fold": a.fold, "reason": reason}
            for a, reason in zip(adapters, reasons, strict=True)
            if reason
        ],
    }


_Pair = tuple[str, str, int, int]
_Groups = Mapping[str, Sequence[Any]]


def _pairs(kept: Sequence[AdapterWeights]) -> Iterator[_Pair]:
    """Kind and label of a pair of low-rank adapters, and the places of the two."""
    order = {name: n for n, name in enumerate(dict.fromkeys(adapter.name for adapter in kept))}
    low_rank_ones = [n for n, adapter in enumerate(kept) if adapter.factors]
    for i, j in combinations(sorted(low_rank_ones, key=lambda n: order[kept[n].name]), 2):
        x, y = kept[i], kept[j]
        if x.name != y.name and (x.seed, x.fold) == (y.seed, y.fold):
            yield "recipes", f"{x.name} – {y.name}", i, j
        if x.name == y.name and x.fold == y.fold and x.seed != y.seed:
            yield "seeds", x.name, i, j


def _by(groups: _Groups) -> Iterator[tuple[str, list[Any], list[list[bool]]]]:
    """Name of a grouping of modules, its groups, and which modules are in each."""
    for name, of in groups.items():
        members = list(dict.fromkeys(value for value in of if value is not None))
        yield name, members, [[value == member for value in of] for member in members]


def _update_entry(
    own: Sequence[int], kept: Sequence[AdapterWeights], sizes: Floats, groups: _Groups
) -> dict[str, Any]:
    seeds = [kept[n].seed for n in own]

    def of(modules: Any) -> dict[str, Any]:
        """Sizes of some modules, over seeds: norms as if of one large matrix."""
        rows = []
        for one in sizes[own][:, modules]:
            known = one[~np.isnan(one[:, 1])]
            relative = _root_sum(known[:, 0]) / (_root_sum(known[:, 1]) or math.nan)
            rows.append((_root_sum(one[:, 0]), relative, _mean(one[:, 2])))
        return {name: over_seeds([row[n] for row in rows], seeds) for n, name in enumerate(_SIZES)}

    entry = of(slice(None))
    for name, members, masks in _by(groups):
        parts = [of(mask) for mask in masks]
        entry[f"by_{name}"] = {f"{name}s": members, **{s: [part[s] for part in parts] for s in _SIZES}}
    return entry


def _pair_entry(
    key: tuple[str, str],
    pairs: Sequence[_Pair],
    kept: Sequence[AdapterWeights],
    values: Floats,
    angles: Sequence[Sequence[Floats]],
    groups: _Groups,
) -> dict[str, Any]:
    own = [p for p, pair in enumerate(pairs) if pair[:2] == key]
    kind, label, first, second = pairs[own[0]]
    seeds = [(kept[pairs[p][2]].seed, kept[pairs[p][3]].seed) for p in own]
    by_module, random = (_mean(part[own], 0) for part in values)
    degrees = [each for p in own for each in angles[p]]
    width = max(map(len, degrees), default=0)
    padded = np.array([np.pad(d, (0, width - len(d)), constant_values=np.nan) for d in degrees])
    entry: dict[str, Any] = {
        "kind": kind,
        "label": label,
        "names": [kept[first].name, kept[second].name],
        # two pairs of seeds share adapters, so their spread is no standard error
        "overlap": {
            measure: over_seeds([_mean(values[0, p, :, n]) for p in own], seeds, interval=kind == "recipes")
            for n, measure in enumerate(MEASURES)
        },
        "random": dict(zip(MEASURES, _mean(random, 0).tolist(), strict=True)),
        "by_module": dict(zip(MEASURES, by_module.T.tolist(), strict=True)),
        # of the smallest angle, of the second, …; where ranks differ, of those that have one
        "angles": _mean(padded, 0).tolist() if degrees else [],
    }
    for name, members, masks in _by(groups):
        columns = np.array([_mean(by_module[mask], 0) for mask in masks]).reshape(len(members), len(MEASURES))
        entry[f"by_{name}"] = {f"{name}s": members, **dict(zip(MEASURES, columns.T.tolist(), strict=True))}
    return entry


def over_seeds(values: Sequence[float], seeds: Sequence[Any], *, interval: bool = True) -> dict[str, Any]:
    """Mean over seeds (folds of one are averaged first), and how far they differ: 95% interval, or range.

    Student's interval is taken from five seeds on, if they are independent (``interval``).
    """
    by_seed: dict[Any, list[float]] = {}
    for value, seed in zip(values, seeds, strict=True):
        if not math.isnan(value):
            by_seed.setdefault(seed, []).append(value)
    means = np.array([np.mean(own) for own in by_seed.values()])
    if not means.size:
        return {"value": math.nan, "low": math.nan, "high": math.nan, "n": 0, "ends": "range"}
    low, high, ends = float(means.min()), float(means.max()), "range"
    if interval and len(means) >= _MIN_FOR_INTERVAL:
        student = t_interval(means)
        low, high, ends = float(student.low), float(student.high), "95%"
    return {"value": float(means.mean()), "low": low, "high": high, "n": len(means), "ends": ends}


def _root_sum(norms: Floats) -> float:
    known = norms[~np.isnan(norms)]
    return float(np.sqrt((known**2).sum())) if known.size else math.nan


def _mean(values: Floats, axis: int | None = None) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mean of empty slice")
        return np.nanmean(values, axis=axis) if values.size else np.full(values.shape[1:], np.nan)[()]


def _adapters(look: Look) -> list[AdapterWeights]:
    from ia2.adapters.weights import read_adapter_state

    of = look.runner.set
    return [
        AdapterWeights(c.name, c.recipe, c.seed, of.fold, c.config.adapter, read_adapter_state(c.weights))
        for c in of.checkpoints
    ]


def _summarise(results: list[list[AdapterWeights]], analysis: Analysis) -> dict[str, Any]:
    adapters = [adapter for own in results for adapter in own]
    return overlaps(adapters, dict(analysis.base.model.named_parameters()))


SECTION = AnalysisSection("subspaces and sizes of the updates", _summarise, measure=_adapters)
