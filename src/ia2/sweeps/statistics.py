"""Means, intervals, paired differences and tests over the cells of a sweep.

Two things make a sweep's numbers alike that are not independent: the seeds of one benchmark share its
test rows, and the N of one seed contain each other. Intervals of one benchmark therefore draw seeds, and
one set of rows for all of them (:func:`ia2.evaluation.calibration.clustered_interval`); tests over several
benchmarks are given twice, once over (benchmark, seed) as in the paper, and once with benchmarks as wholes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ia2.errors import DataError
from ia2.evaluation.calibration import Interval, clustered_interval, ece_equal_mass
from ia2.probing import HEADROOM, SIGNIFICANCE
from ia2.sweeps.records import Evaluation
from ia2.sweeps.selection import Arm

# each takes (confidence, correct), with rows along the axis
MEASURES: dict[str, Any] = {
    "accuracy": lambda confidence, correct, axis: correct.mean(axis),
    "ece": lambda confidence, correct, axis: ece_equal_mass(confidence, correct, axis=axis),
}

RESAMPLES = 4000


# ------------------------------------------------------------------------------------ one benchmark


@dataclass(frozen=True)
class Summary:
    """A measure of one arm on one benchmark's rows.

    Attributes:
        mean: over seeds.
        sd: over seeds, with n − 1; None with one seed.
        seeds: that there are.
    """

    mean: float
    sd: float | None
    seeds: tuple[int | None, ...]


def summarise(arm: Arm, dataset: str, measure: str) -> Summary | None:
    """Mean and standard deviation over the seeds that there are; None without any."""
    values = by_seed(arm, dataset, measure)
    return of_values(values)


def of_values(values: Mapping[int | None, float]) -> Summary | None:
    """The same, of given values by seed."""
    if not values:
        return None
    numbers = list(values.values())
    sd = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None
    return Summary(float(np.mean(numbers)), sd, tuple(values))


def by_seed(arm: Arm, dataset: str, measure: str) -> dict[int | None, float]:
    """Seed → value of a measure on all rows."""
    return {
        seed: float(MEASURES[measure](e.confidence, e.correct, axis=-1))
        for seed, e in _evaluations(arm, dataset).items()
    }


def metric_by_seed(arm: Arm, dataset: str, *path: str) -> dict[int | None, float]:
    """Seed → a recorded metric, such as ``("scaled", "vocabulary", "ece")``, where it was recorded."""
    found: dict[int | None, float] = {}
    for seed, evaluation in _evaluations(arm, dataset).items():
        value: Any = evaluation.metrics
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            found[seed] = float(value)
    return found


def interval(arm: Arm, dataset: str, measure: str) -> Interval | None:
    """Mean over seeds with its 95% interval over seeds and test rows, which the seeds share."""
    evaluations = list(_evaluations(arm, dataset).values())
    if not evaluations:
        return None
    _same_rows(evaluations)
    return clustered_interval(
        MEASURES[measure], [[e.confidence, e.correct] for e in evaluations], shared_rows=True
    )


@dataclass(frozen=True)
class Difference:
    """``first − second``, paired by seed and row.

    Attributes:
        interval: mean over seeds, 95% over seeds and rows.
        by_seed: of each seed that both have.
    """

    interval: Interval
    by_seed: dict[int, float]


def difference(first: Arm, second: Arm, dataset: str, measure: str) -> Difference | None:
    """Compare two arms on the same rows, seed by seed; ``base``, which has one run, stands for every seed.

    Returns:
        None without a seed that both have.

    Raises:
        DataError: they were evaluated on other rows.
    """
    runs = paired_runs(first, second, dataset)
    if not runs:
        return None
    found = clustered_interval(paired(measure), list(runs.values()), shared_rows=True)
    return Difference(found, {s: float(paired(measure)(*run, axis=-1)) for s, run in runs.items()})


def differences_by_seed(first: Arm, second: Arm, dataset: str, measure: str) -> dict[int, float]:
    """Seed → ``first − second`` on all rows, without the interval, which takes time."""
    runs = paired_runs(first, second, dataset)
    return {seed: float(paired(measure)(*run, axis=-1)) for seed, run in runs.items()}


def paired_runs(first: Arm, second: Arm, dataset: str) -> dict[int, list[np.ndarray]]:
    """Seed → confidence and right answers of the one, then of the other; rows are the same."""
    mine, other = _evaluations(first, dataset), _evaluations(second, dataset)
    seeds = sorted(s for s in {*mine, *other} if s is not None)
    # the base model has one run, whose seed is None
    pairs = {s: (mine.get(s, mine.get(None)), other.get(s, other.get(None))) for s in seeds}
    whole = {s: (a, b) for s, (a, b) in pairs.items() if a is not None and b is not None}
    _same_rows([evaluation for pair in whole.values() for evaluation in pair])
    return {s: [a.confidence, a.correct, b.confidence, b.correct] for s, (a, b) in whole.items()}


def paired(measure: str) -> Any:
    """A statistic of confidence and right answers of two arms: the first less the second."""
    statistic = MEASURES[measure]

    def difference(*columns: np.ndarray, axis: int) -> Any:
        return statistic(*columns[:2], axis=axis) - statistic(*columns[2:], axis=axis)

    return difference


def _evaluations(arm: Arm, dataset: str) -> dict[int | None, Evaluation]:
    return {s: cell.evaluations[dataset] for s, cell in arm.runs.items() if dataset in cell.evaluations}


def _same_rows(evaluations: Sequence[Evaluation]) -> None:
    for other in evaluations[1:]:
        first = evaluations[0]
        if (other.test, other.n) != (first.test, first.n):
            raise DataError(
                f"{first.dataset}: cells were evaluated on different test rows ({first.test}, {first.n} "
                f"rows; {other.test}, {other.n} rows): they cannot be compared. Report their folders apart."
            )


# --------------------------------------------------------------------------------- several benchmarks


@dataclass(frozen=True)
class PairedTest:
    """Whether differences over (benchmark, seed) are zero; all p-values are two-sided.

    Attributes:
        pairs: how many differences.
        clusters: how many benchmarks.
        mean: of all pairs.
        t, p_t: paired t-test over pairs (the paper's table 8).
        p_wilcoxon: signed-rank test over pairs.
        cluster_mean: mean of the benchmarks' means.
        low, high: its 95% bootstrap interval, drawing benchmarks and then seeds; NaN with one benchmark.
        p_cluster: t-test over the benchmarks' means; NaN with one benchmark.
        higher, lower: benchmarks whose mean difference is positive, negative.
    """

    pairs: int
    clusters: int
    mean: float
    t: float
    p_t: float
    p_wilcoxon: float
    cluster_mean: float
    low: float
    high: float
    p_cluster: float
    higher: int
    lower: int


def paired_test(differences: Mapping[str, Sequence[float]], *, seed: int = 0) -> PairedTest:
    """Test paired differences: benchmark → one of each seed.

    The pairs of one benchmark share their test rows and its peculiarities: tests over pairs take them for
    independent and so find too much. What the benchmarks' means say, and the interval that draws
    benchmarks as wholes (and seeds within them), is the honest answer to "does it hold elsewhere?".

    Raises:
        ValueError: no difference.
    """
    groups = [np.array(values, float) for values in differences.values() if len(values)]
    if not groups:
        raise ValueError("there are no differences to test")
    pairs = np.concatenate(groups)
    means = np.array([group.mean() for group in groups])
    t, p_t = _t_test(pairs)
    _, p_cluster = _t_test(means)
    low, high = _cluster_interval(groups, seed)
    return PairedTest(
        len(pairs),
        len(groups),
        float(pairs.mean()),
        t,
        p_t,
        _wilcoxon(pairs),
        float(means.mean()),
        low,
        high,
        p_cluster,
        int((means > 0).sum()),
        int((means < 0).sum()),
    )


def _t_test(values: np.ndarray) -> tuple[float, float]:
    from scipy import stats

    if len(values) < 2:
        return math.nan, math.nan
    # rounding is no variance: the same difference everywhere is either none or beyond a t-test
    if np.ptp(values) <= 1e-12:
        return (0.0, 1.0) if abs(values[0]) <= 1e-12 else (math.nan, math.nan)
    found = stats.ttest_1samp(values, 0.0)
    return float(found.statistic), float(found.pvalue)


def _wilcoxon(values: np.ndarray) -> float:
    from scipy import stats

    # accuracies are multiples of 1/n: rounding would break their ties
    rounded = np.round(values, 12)
    if not rounded.any():
        return 1.0
    return float(stats.wilcoxon(rounded).pvalue)


def _cluster_interval(groups: Sequence[np.ndarray], seed: int) -> tuple[float, float]:
    if len(groups) < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    drawn_means = np.stack(
        [g[rng.integers(len(g), size=(RESAMPLES, len(groups), len(g)))].mean(-1) for g in groups]
    )  # [benchmark, resample, place]
    chosen = rng.integers(len(groups), size=(RESAMPLES, len(groups)))
    resample, place = np.ogrid[:RESAMPLES, : len(groups)]
    drawn = drawn_means[chosen, resample, place].mean(-1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values of a family of tests, in the order given; NaN stays and counts not."""
    known = [i for i, p in enumerate(p_values) if not math.isnan(p)]
    adjusted = [math.nan] * len(p_values)
    running = 0.0
    for rank, i in enumerate(sorted(known, key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(known) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


# ------------------------------------------------------------------------------------ does ICL work?


@dataclass(frozen=True)
class IclVerdict:
    """Whether there is anything in context to align with (``ia2 probe`` judges alike).

    Attributes:
        verdict: ``yes``, ``unclear`` or ``no``.
        reason: in a few words.
        icl: accuracy, mean over seeds.
        base: accuracy of the base model without demonstrations; None where it was not run.
        chance: accuracy of guessing.
    """

    verdict: str
    reason: str
    icl: float
    base: float | None
    chance: float


def icl_works(icl: Arm, base: Arm | None, dataset: str, num_labels: int | None) -> IclVerdict | None:
    """Judge in-context learning as ``ia2 probe`` does, on the test rows of all seeds.

    Rows are the units of the tests, each with its mean over seeds (counts are rounded against ICL), so
    that seeds on the same rows do not count as more rows. Chance is one over the number of labels, or the
    share of the most frequent one where records have it.

    Args:
        icl: its cells.
        base: the base model's cell, if there is one.
        dataset: evaluated on.
        num_labels: of the benchmark, where records have none; None for free text, where guessing is never
            right.

    Returns:
        None where ICL was not evaluated on it.
    """
    from scipy.stats import binomtest

    evaluations = list(_evaluations(icl, dataset).values())
    if not evaluations:
        return None
    first = evaluations[0]
    n, accuracy = first.n, float(np.mean([e.accuracy for e in evaluations]))
    # among the labels alone, as a guess is
    chosen = accuracy
    inside = metric_by_seed(icl, dataset, "labels", "accuracy")
    if inside:
        chosen = float(np.mean(list(inside.values())))
    count = first.num_labels or num_labels
    _same_rows(evaluations)
    # records of older versions lack the share, which is the same for all
    majority = max(e.majority or 0.0 for e in evaluations)
    chance = max(majority, 1 / count if count and first.labelled else 0.0)
    bare = None
    if base is not None and (found := list(_evaluations(base, dataset).values())):
        bare = found[0]
    of_base = None if bare is None else bare.accuracy

    def verdict(word: str, reason: str) -> IclVerdict:
        return IclVerdict(word, reason, accuracy, of_base, chance)

    if first.labelled and chance == 0:
        return verdict("unclear", "number of labels unknown")
    # 1e-9: 0.57 · 100 is 56.999… in floating point
    right = math.floor(chosen * n + 1e-9)
    if chosen <= chance or (
        chance > 0 and binomtest(right, n, min(chance, 1 - 1e-9), alternative="greater").pvalue > SIGNIFICANCE
    ):
        return verdict("no", "at chance" if chance > 0 else "no answer right")
    if bare is None:
        return verdict("unclear", "above chance, base not run")
    _same_rows([first, bare])
    if accuracy - bare.accuracy < HEADROOM:
        return verdict("unclear", "hardly above base")
    mean = np.mean([e.correct for e in evaluations], axis=0)
    better = math.floor(np.clip(mean - bare.correct, 0, None).sum() + 1e-9)
    worse = math.ceil(np.clip(bare.correct - mean, 0, None).sum() - 1e-9)
    p = binomtest(better, better + worse, 0.5, alternative="greater").pvalue if better + worse else 1.0
    if p > SIGNIFICANCE:
        return verdict("unclear", "not clearly above base")
    return verdict("yes", "above chance and base")
