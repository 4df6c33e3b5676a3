"""What the causal check found, over trials: fractions with intervals, and tests over queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from ia2.analysis.causal import CausalTrial, Patched

# A difference of the two runs below this many nats is nothing to give a fraction of.
MIN_GAP = 0.05

# A change counts as one if it is more than this share of the difference of the two runs, and more than this
# many nats, which rounding may make. With enough queries every head changes something.
MIN_FRACTION = 0.02
MIN_CHANGE = 1e-3

_RESAMPLES = 2000


def summarise(trials: Sequence[CausalTrial], *, seed: int = 0) -> dict[str, Any]:
    """The section ``causal`` of an analysis.

    Of each unit: ``recovered`` (in ``reverse``: ``broken``), the ratio of means over queries and trials, with
    the ends of its 95% interval, ``low`` and ``high``; ``change``, the mean change in log-probability in
    nats, with its interval; ``q``, the p value of a two-sided t test that the mean change is further from 0
    than ``least`` nats (a minimum-effect test, Murphy & Myors 1999), one value a query (the mean over
    trials), after Benjamini and Hochberg over the group's units; ``by_trial``, each trial's fraction.

    Intervals are percentiles of a crossed bootstrap, which draws queries and trials (Owen 2007). Fractions
    are NaN where the interval of the difference of the two runs, ``gap``, holds 0, or its mean is below
    :data:`MIN_GAP` nats; changes are there all the same.

    Args:
        trials: of one model, with the same units.
        seed: of the bootstrap.
    """
    units = trials[0].units
    section: dict[str, Any] = {
        "layers": units.layers,
        "heads": units.heads,
        "sets": list(units.sets),
        "queries": len({place for trial in trials for place in trial.places}),
        "trials": len(trials),
    }
    for direction, fraction in (("targets", "recovered"), ("reverse", "broken")):
        names = dict.fromkeys(name for trial in trials for name in getattr(trial, direction))
        section[direction] = {
            name: _target(
                [
                    (trial.places, getattr(trial, direction)[name])
                    for trial in trials
                    if name in getattr(trial, direction)
                ],
                fraction,
                seed,
            )
            for name in names
        }
    return section


def _target(found: Sequence[tuple[Sequence[int], Patched]], fraction: str, seed: int) -> dict[str, Any]:
    clean = np.concatenate([patched.clean for _, patched in found])
    gap = np.concatenate([patched.aim for _, patched in found]) - clean
    rows = _Rows(found, gap, seed)

    def groups_of(by_trial: Sequence[dict[str, np.ndarray]]) -> dict[str, Any]:
        return {
            group: rows.estimate(
                np.concatenate([values[group] for values in by_trial]) - _like(clean, by_trial[0][group]),
                fraction,
            )
            for group in by_trial[0]
        }

    low, high = rows.interval(gap[:, None])[:, 0]
    first = found[0][1]
    return {
        "clean": float(clean.mean()),
        "aim": float((clean + gap).mean()),
        "least": rows.least,
        "gap": {"value": float(gap.mean()), "low": float(low), "high": float(high)},
        **groups_of([patched.patched for _, patched in found]),
        "control": {
            control: groups_of([patched.controls[control] for _, patched in found])
            for control in first.controls
        },
    }


def _like(values: np.ndarray, shaped: np.ndarray) -> np.ndarray:
    return values.reshape(-1, *[1] * (shaped.ndim - 1))


class _Rows:
    """Rows of several trials, a row a query and trial, and how they are drawn again."""

    def __init__(self, found: Sequence[tuple[Sequence[int], Patched]], gap: np.ndarray, seed: int) -> None:
        self.gap, self.least = gap, max(MIN_CHANGE, MIN_FRACTION * abs(float(gap.mean())))
        self.trial = np.concatenate([np.full(len(places), t) for t, (places, _) in enumerate(found)])
        _, self.place = np.unique(np.concatenate([places for places, _ in found]), return_inverse=True)
        rng = np.random.default_rng(seed)
        weights = _drawn(rng, len(found))[:, self.trial] * _drawn(rng, self.place.max() + 1)[:, self.place]
        weights = weights[weights.sum(1) > 0]  # folds: the queries drawn may be of trials that are not
        self.weights = weights / weights.sum(1, keepdims=True)  # [R, n]

    def interval(self, values: np.ndarray) -> np.ndarray:
        """Ends of the interval of the mean of ``[n, U]``: ``[2, U]``."""
        return np.quantile(self.weights @ values, [0.025, 0.975], axis=0)

    def estimate(self, change: np.ndarray, fraction: str) -> dict[str, Any]:
        """One group; ``change`` is ``[n, …]``."""
        shape = change.shape[1:]
        flat = change.reshape(len(change), -1)
        value, low, high = self._fractions(flat)
        change_low, change_high = self.interval(flat)
        numbers = {
            fraction: value,
            "low": low,
            "high": high,
            "change": flat.mean(0),
            "change_low": change_low,
            "change_high": change_high,
            "q": self._q(flat),
        }
        trials = [self.trial == t for t in range(self.trial.max() + 1)]
        by_trial = np.stack([_ratio(flat[rows], self.gap[rows]) for rows in trials])
        return {
            **{name: values.reshape(shape).tolist() for name, values in numbers.items()},
            "by_trial": by_trial.reshape(-1, *shape).tolist(),
        }

    def _fractions(self, change: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ratio of means, ``[U]``, and the ends of its interval."""
        drawn = self.weights @ self.gap
        low, high = np.quantile(drawn, [0.025, 0.975])
        value = _ratio(change, self.gap)
        if low * high <= 0 or np.isnan(value).all():
            nothing = np.full(change.shape[1], np.nan)
            return nothing, nothing, nothing
        ends = np.quantile((self.weights @ change) / drawn[:, None], [0.025, 0.975], axis=0)
        return value, ends[0], ends[1]

    def _q(self, change: np.ndarray) -> np.ndarray:
        counts = np.bincount(self.place)[:, None]
        by_place = np.zeros((len(counts), change.shape[1]))
        np.add.at(by_place, self.place, change)
        by_place /= counts
        beyond = np.abs(by_place.mean(0)) - self.least
        with np.errstate(divide="ignore"):
            t = beyond / (by_place.std(0, ddof=1) / np.sqrt(len(by_place)))
        p = np.minimum(2 * stats.t.sf(t, len(by_place) - 1), 1)
        return np.asarray(stats.false_discovery_control(p))


def _ratio(change: np.ndarray, gap: np.ndarray) -> np.ndarray:
    mean = gap.mean()
    return change.mean(0) / mean if abs(mean) >= MIN_GAP else np.full(change.shape[1], np.nan)


def _drawn(rng: np.random.Generator, count: int) -> np.ndarray:
    """How often each of ``count`` is in each resample, ``[R, count]``."""
    if count == 1:
        return np.ones((_RESAMPLES, 1))
    return rng.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES).astype(float)
