"""The section ``weights``: where adapters change the weights, how much, and how far they agree.

Subspaces and their overlap: :mod:`ia2.analysis.subspaces`.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from ia2.analysis.subspaces import MEASURES, Floats, LowRank, effective_rank, low_rank, overlap
from ia2.config_sections import AdapterConfig
from ia2.console import progress
from ia2.evaluation.statistics import t_interval

if TYPE_CHECKING:
    import torch

_SIZES = ("norm", "relative_norm", "effective_rank")

# Fewer values than this have their range for an interval.
MIN_FOR_INTERVAL = 5

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


@dataclass(frozen=True)
class AdapterWeights:
    """One trained adapter.

    Attributes:
        name: of its arm, such as ``ia2-sft`` or ``ia2-sft@dora``.
        recipe: how it was trained.
        seed: of its training set and initial weights.
        fold: of that seed, or None.
        config: what kind of adapter it is.
        state: its weights by name, as :func:`ia2.adapter_weights.read_adapter_state` gives them.
    """

    name: str
    recipe: str
    seed: int
    fold: int | None
    config: AdapterConfig
    state: Mapping[str, torch.Tensor]

    @property
    def key(self) -> tuple[str, int, int | None]:
        """Arm, seed and fold."""
        return self.name, self.seed, self.fold


# -------------------------------------------------------------------------------- adapters, modules


@dataclass(frozen=True)
class _Read:
    """One adapter's factors by module, or (``full``) the weights that it has."""

    adapter: AdapterWeights
    factors: dict[str, tuple[torch.Tensor, torch.Tensor, float]]
    weights: Mapping[str, torch.Tensor]


def _kind(config: AdapterConfig) -> str:
    if config.peft is None:
        return config.type
    from ia2.adapters import _PEFT_NAMES

    name = str(config.peft.get("peft_type", "")).rsplit(".", 1)[-1]
    return _PEFT_NAMES.get(name, name)


def _scale(config: AdapterConfig, module: str, rank: int) -> float:
    if config.peft is None:
        alpha: Any = config.alpha or 8
        rooted = config.type == "rslora"
    else:
        from peft.utils.other import get_pattern_key

        pattern = config.peft.get("alpha_pattern") or {}
        alpha = pattern.get(get_pattern_key(list(pattern), module), config.peft.get("lora_alpha", 8))
        rooted = bool(config.peft.get("use_rslora"))
    return float(alpha) / (math.sqrt(rank) if rooted else rank)


def _read(adapter: AdapterWeights, base: Mapping[str, torch.Tensor]) -> _Read | str:
    """An adapter's updates, or why there are none."""
    kind = _kind(adapter.config)
    if kind in _WITHOUT_UPDATE:
        return f"{kind}: {_WITHOUT_UPDATE[kind]}"
    if kind == "full":
        there = {
            name: weight
            for name, weight in adapter.state.items()
            if weight.ndim == 2 and place(name)[0] is not None and _same(base.get(name), weight.shape)
        }
        return _Read(adapter, {}, there) if there else "full: its update shows only beside the base's weights"
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, weight in adapter.state.items():
        if found := _FACTOR.fullmatch(name.removeprefix("base_model.model.")):
            parts.setdefault(found["module"], {})[found["part"]] = weight
    factors = {
        module: (pair["A"], pair["B"], _scale(adapter.config, module, len(pair["A"])))
        for module, pair in parts.items()
        # experts in one tensor and convolutions have factors of another shape
        if len(pair) == 2 and pair["A"].ndim == pair["B"].ndim == 2 and len(pair["A"]) == pair["B"].shape[1]
    }
    if len(factors) < len(parts) or (adapter.config.peft or {}).get("target_parameters"):
        return f"{kind}: an update that is no product of two matrices"
    return _Read(adapter, factors, {}) if factors else f"{kind}: no low-rank update of a linear layer in it"


def place(module: str) -> tuple[int | None, str]:
    """Layer of a module and its kind: ``model.layers.3.self_attn.q_proj`` → ``(3, 'self_attn.q_proj')``.

    The first number in the name is the layer; further ones, of experts, are left out of the kind. A module
    outside the layers has None and its whole name.
    """
    parts = module.removesuffix(".weight").split(".")
    for n, part in enumerate(parts):
        if part.isdigit():
            return int(part), ".".join(p for p in parts[n + 1 :] if not p.isdigit())
    return None, ".".join(parts)


def _same(weight: torch.Tensor | None, shape: Sequence[int]) -> bool:
    """Whether a base weight can be measured: there, not packed into other numbers, and as large."""
    size = int(np.prod(shape))
    return weight is not None and weight.is_floating_point() and weight.numel() == size


def _array(tensor: torch.Tensor) -> Floats:
    return tensor.detach().double().cpu().numpy()  # type: ignore[no-any-return]


# -------------------------------------------------------------------------------------- the section


def overlaps(
    adapters: Sequence[AdapterWeights], base: Mapping[str, torch.Tensor] | None = None
) -> dict[str, Any]:
    """What adapters change, and how far they agree.

    Pairs are of two kinds: ``recipes``, two arms trained on the same training set; and ``seeds``, one arm
    with two seeds (on the same fold), the baseline of what training sets and initial weights alone do. Of
    DoRA the low-rank part is compared; its magnitudes are left out. Of full fine-tuning norms are given, and
    effective ranks where the matrix is small.

    Args:
        adapters: of one base model, in the order of the tables; each arm, seed and fold once.
        base: weights of the base model by name, as ``dict(model.named_parameters())`` gives them without any
            adapter attached; norms are then also given relative to these. Packed (quantised) ones are passed
            over.

    Returns:
        The section: ``measures``; ``adapters``; ``modules`` (``names``, ``layers``, ``kinds``: lists of M);
        ``updates`` by arm (norm, relative norm, effective rank: over seeds, ``by_layer``, ``by_kind``);
        ``pairs`` (by measure: ``overlap`` over seeds, ``random``, ``by_module`` ``[M]``, ``by_layer``,
        ``by_kind``; principal ``angles`` in degrees); ``skipped`` with reasons. Missing values are NaN.

    Raises:
        ValueError: an arm, seed and fold is there twice.
    """
    if len({adapter.key for adapter in adapters}) < len(adapters):
        raise ValueError("overlaps takes one adapter of each arm, seed and fold")
    base = base or {}
    found = [(adapter, _read(adapter, base)) for adapter in adapters]
    kept = [read for _, read in found if isinstance(read, _Read)]
    names = list(dict.fromkeys(name for r in kept for name in (*r.factors, *_modules(r.weights))))
    names.sort(key=lambda name: (place(name)[0] is None, place(name)[0] or 0))
    sizes = np.full((len(kept), len(names), 3), np.nan)  # norm, norm of the base weight, effective rank
    pairs = list(_pairs(kept))
    values = np.full((2, len(pairs), len(names), len(MEASURES)), np.nan)
    angles: list[list[Floats]] = [[] for _ in pairs]
    with progress("weights", len(names)) as bar:
        for m, name in enumerate(names):
            # one module at a time: the vectors of all would be as large as the adapters
            updates = [_update(read, name) for read in kept]
            for n, (read, update) in enumerate(zip(kept, updates, strict=True)):
                sizes[n, m] = _sizes(read, name, update, base)
            for p, (_, _, i, j) in enumerate(pairs):
                one, other = updates[i], updates[j]
                if one is not None and other is not None:
                    compared = overlap(one, other)
                    values[:, p, m] = compared.values, compared.random
                    if compared.angles.size:
                        angles[p].append(compared.angles)
            bar.advance()
    return {
        "measures": MEASURES,
        "adapters": [_about(read, sizes[n], names) for n, read in enumerate(kept)],
        "modules": {
            "names": names,
            "layers": [place(name)[0] for name in names],
            "kinds": [place(name)[1] for name in names],
        },
        "updates": _updates(kept, sizes, names),
        "pairs": _pair_entries([read.adapter for read in kept], pairs, values, angles, names),
        "skipped": [
            {"name": a.name, "seed": a.seed, "fold": a.fold, "reason": read}
            for a, read in found
            if isinstance(read, str)
        ],
    }


def _modules(weights: Mapping[str, torch.Tensor]) -> list[str]:
    return [name.removesuffix(".weight") for name in weights]


def _pairs(kept: Sequence[_Read]) -> Iterator[tuple[str, str, int, int]]:
    """Kind and label of a pair of low-rank adapters, and the places of the two."""
    order = {name: n for n, name in enumerate(dict.fromkeys(read.adapter.name for read in kept))}
    low_rank_ones = [n for n, read in enumerate(kept) if read.factors]
    for i, j in combinations(sorted(low_rank_ones, key=lambda n: order[kept[n].adapter.name]), 2):
        x, y = kept[i].adapter, kept[j].adapter
        if x.name != y.name and (x.seed, x.fold) == (y.seed, y.fold):
            yield "recipes", f"{x.name} – {y.name}", i, j
        if x.name == y.name and x.fold == y.fold and x.seed != y.seed:
            yield "seeds", x.name, i, j


def _update(read: _Read, name: str) -> LowRank | None:
    if name not in read.factors:
        return None
    a, b, scale = read.factors[name]
    return low_rank(_array(a), _array(b), scale)


def _sizes(
    read: _Read, name: str, update: LowRank | None, base: Mapping[str, torch.Tensor]
) -> tuple[float, float, float]:
    """Norm of an update, of the base weight, and effective rank."""
    weight = base.get(f"{name}.weight")
    if update is None:
        trained = read.weights.get(f"{name}.weight")
        if trained is None or weight is None:
            return math.nan, math.nan, math.nan
        change = trained.detach().float().cpu() - weight.detach().float().cpu()
        small = min(change.shape) <= _DENSE
        rank = effective_rank(np.linalg.svd(change.numpy(), compute_uv=False)) if small else math.nan
        return float(change.norm()), float(weight.detach().float().norm()), rank
    shape = (update.b.shape[0], update.right.shape[0])
    known = weight is not None and _same(weight, shape)
    norm = float(weight.detach().float().norm()) if known and weight is not None else math.nan
    return float(np.sqrt((update.sizes**2).sum())), norm, effective_rank(update.sizes)


# ---------------------------------------------------------------------------------------- summaries


def _about(read: _Read, sizes: Floats, names: Sequence[str]) -> dict[str, Any]:
    ranks = sorted({len(a) for a, _, _ in read.factors.values()})
    own = {*read.factors, *_modules(read.weights)}
    return {
        "name": read.adapter.name,
        "recipe": read.adapter.recipe,
        "seed": read.adapter.seed,
        "fold": read.adapter.fold,
        "type": _kind(read.adapter.config),
        "ranks": ranks,
        "modules": len(own),
        "norm": _root_sum(sizes[:, 0]),
        "zero": [name for n, name in enumerate(names) if name in own and sizes[n, 0] == 0],
    }


def _updates(kept: Sequence[_Read], sizes: Floats, names: Sequence[str]) -> dict[str, Any]:
    layers, kinds = [[part[n] for part in map(place, names)] for n in (0, 1)]
    entries: dict[str, Any] = {}
    for arm in dict.fromkeys(read.adapter.name for read in kept):
        own = [n for n, read in enumerate(kept) if read.adapter.name == arm]
        seeds = [kept[n].adapter.seed for n in own]
        entry: dict[str, Any] = _grouped(sizes[own], seeds)
        for group, of in (("layer", layers), ("kind", kinds)):
            values = list(dict.fromkeys(value for value in of if value is not None))
            parts = [_grouped(sizes[own][:, [o == value for o in of]], seeds) for value in values]
            entry[f"by_{group}"] = {
                f"{group}s": values,
                **{name: [part[name] for part in parts] for name in _SIZES},
            }
        entries[arm] = entry
    return entries


def _grouped(sizes: Floats, seeds: Sequence[int]) -> dict[str, Any]:
    """Sizes of some modules ``[adapters, modules, 3]``, over seeds: norms as if of one large matrix."""
    rows = []
    for one in sizes:
        known = one[~np.isnan(one[:, 1])]
        whole = _root_sum(known[:, 1])
        rows.append((_root_sum(one[:, 0]), _root_sum(known[:, 0]) / (whole or math.nan), _mean(one[:, 2])))
    return {name: over_seeds([row[n] for row in rows], seeds) for n, name in enumerate(_SIZES)}


def _root_sum(norms: Floats) -> float:
    known = norms[~np.isnan(norms)]
    return float(np.sqrt((known**2).sum())) if known.size else math.nan


def _pair_entries(
    adapters: Sequence[AdapterWeights],
    pairs: Sequence[tuple[str, str, int, int]],
    values: Floats,
    angles: Sequence[Sequence[Floats]],
    names: Sequence[str],
) -> list[dict[str, Any]]:
    layers, kinds = [[part[n] for part in map(place, names)] for n in (0, 1)]
    entries = []
    for kind, label in dict.fromkeys((kind, label) for kind, label, _, _ in pairs):
        own = [p for p, pair in enumerate(pairs) if pair[:2] == (kind, label)]
        seeds = [(adapters[pairs[p][2]].seed, adapters[pairs[p][3]].seed) for p in own]
        by_module, random = (_mean(part[own], 0) for part in values)
        entry: dict[str, Any] = {
            "kind": kind,
            "label": label,
            "names": [adapters[i].name for i in pairs[own[0]][2:]],
            "overlap": {},
            "random": dict(zip(MEASURES, _mean(random, 0).tolist(), strict=True)),
            "by_module": dict(zip(MEASURES, by_module.T.tolist(), strict=True)),
            "angles": _mean_angles([each for p in own for each in angles[p]]),
        }
        for n, measure in enumerate(MEASURES):
            # two pairs of seeds share adapters, so their spread is no standard error
            entry["overlap"][measure] = over_seeds(
                [_mean(values[0, p, :, n]) for p in own], seeds, interval=kind == "recipes"
            )
        for group, of in (("layer", layers), ("kind", kinds)):
            members = list(dict.fromkeys(value for value in of if value is not None))
            parts = [_mean(by_module[[o == value for o in of]], 0) for value in members]
            columns = np.array(parts).reshape(len(members), len(MEASURES)).T.tolist()
            entry[f"by_{group}"] = {f"{group}s": members, **dict(zip(MEASURES, columns, strict=True))}
        entries.append(entry)
    return entries


def over_seeds(values: Sequence[float], seeds: Sequence[Any], *, interval: bool = True) -> dict[str, Any]:
    """Mean over seeds (folds of one seed are averaged first), and how far seeds differ.

    Args:
        values: one of each adapter or pair.
        seeds: of each.
        interval: whether seeds are independent.

    Returns:
        ``value``, ``low``, ``high``, ``n`` seeds, and what the ends are (``ends``): from
        :data:`MIN_FOR_INTERVAL` seeds on ``95%``, Student's interval of the mean; otherwise ``range``, the
        lowest and the highest seed. NaN throughout where nothing is known.
    """
    by_seed: dict[Any, list[float]] = {}
    for value, seed in zip(values, seeds, strict=True):
        if not math.isnan(value):
            by_seed.setdefault(seed, []).append(value)
    means = np.array([np.mean(found) for found in by_seed.values()])
    if not means.size:
        return {"value": math.nan, "low": math.nan, "high": math.nan, "n": 0, "ends": "range"}
    low, high, ends = float(means.min()), float(means.max()), "range"
    if interval and len(means) >= MIN_FOR_INTERVAL:
        student = t_interval(means)
        low, high, ends = float(student.low), float(student.high), "95%"
    return {"value": float(means.mean()), "low": low, "high": high, "n": len(means), "ends": ends}


def _mean_angles(found: Sequence[Floats]) -> list[float]:
    """Mean of the smallest angle, of the second, …; where ranks differ, of those that have one."""
    width = max((len(angles) for angles in found), default=0)
    padded = [np.pad(angles, (0, width - len(angles)), constant_values=np.nan) for angles in found]
    return _mean(np.array(padded), 0).tolist() if padded else []


def _mean(values: Floats, axis: int | None = None) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mean of empty slice")
        return np.nanmean(values, axis=axis) if values.size else np.full(values.shape[1:], np.nan)[()]
