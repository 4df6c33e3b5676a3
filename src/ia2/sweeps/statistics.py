"""Means, paired differences and tests over the cells of a sweep; intervals are Student's, over draws.

The unit is a cell: a draw of training examples, whose test rows make one number. Tests over several
benchmarks are given twice, once over (benchmark, seed) as in the paper, and once with benchmarks as wholes,
since the draws of one benchmark share its test rows and its peculiarities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ia2.errors import DataError
from ia2.evaluation.headroom import Judgement, judge
from ia2.evaluation.statistics import Interval, bounded, t_interval, t_test, wilcoxon
from ia2.sweeps.records import Evaluation
from ia2.sweeps.selection import Arm

MEASURES = {
    "accuracy": "accuracy",
    "nll": "NLL",
    "brier": "Brier",
    "ece": "ECE",
    "accuracy_vocabulary": "accuracy over the vocabulary",
    "ece_vocabulary": "ECE over the vocabulary",
}
"""What tables show, among the labels (of free text: of the whole answer) unless it says otherwise."""


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
    return of_values(by_seed(arm, dataset, measure))


def of_values(values: Mapping[int | None, float]) -> Summary | None:
    """The same, of given values by seed."""
    if not values:
        return None
    numbers = list(values.values())
    sd = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None
    return Summary(float(np.mean(numbers)), sd, tuple(values))


def by_seed(arm: Arm, dataset: str, measure: str) -> dict[int | None, float]:
    """Seed → value of a measure on all rows."""
    return {seed: e.value(measure) for seed, e in evaluations_of(arm, dataset).items()}


def metric_by_seed(arm: Arm, dataset: str, *path: str) -> dict[int | None, float]:
    """Seed → a recorded metric, such as ``("scaled", "labels", "ece")``, where it was recorded."""
    found: dict[int | None, float] = {}
    for seed, evaluation in evaluations_of(arm, dataset).items():
        value: Any = evaluation.metrics
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            found[seed] = float(value)
    return found


def interval(arm: Arm, dataset: str, measure: str) -> Interval | None:
    """Mean with its 95% t-interval over draws; None without any."""
    values = list(by_seed(arm, dataset, measure).values())
    return bounded(t_interval(values), measure) if values else None


@dataclass(frozen=True)
class Difference:
    """``first − second``, paired by draw.

    Attributes:
        interval: mean over draws, 95% over draws.
        by_seed: of each draw that both have.
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
    found = differences_by_seed(first, second, dataset, measure)
    return Difference(t_interval(list(found.values())), found) if found else None


def differences_by_seed(first: Arm, second: Arm, dataset: str, measure: str) -> dict[int, float]:
    """Seed → ``first − second`` on all rows."""
    pairs = _paired(first, second, dataset)
    return {seed: a.value(measure) - b.value(measure) for seed, (a, b) in pairs.items()}


def _paired(first: Arm, second: Arm, dataset: str) -> dict[int, tuple[Evaluation, Evaluation]]:
    mine, other = evaluations_of(first, dataset), evaluations_of(second, dataset)
    seeds = sorted(s for s in {*mine, *other} if s is not None)
    # the base model has one run, whose seed is None
    pairs = {s: (mine.get(s, mine.get(None)), other.get(s, other.get(None))) for s in seeds}
    whole = {s: (a, b) for s, (a, b) in pairs.items() if a is not None and b is not None}
    same_rows([evaluation for pair in whole.values() for evaluation in pair])
    return whole


def evaluations_of(arm: Arm, dataset: str) -> dict[int | None, Evaluation]:
    """Seed → what a cell of the arm did on a benchmark's rows."""
    return {s: cell.evaluations[dataset] for s, cell in arm.runs.items() if dataset in cell.evaluations}


def same_rows(evaluations: Sequence[Evaluation]) -> None:
    """Refuse evaluations on different test rows."""
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
        whole: the mean of the benchmarks' means, with its 95% t-interval over benchmarks.
        p_cluster: t-test over the benchmarks' means; NaN with one benchmark.
        higher, lower: benchmarks whose mean difference is positive, negative.
    """

    pairs: int
    clusters: int
    mean: float
    t: float
    p_t: float
    p_wilcoxon: float
    whole: Interval
    p_cluster: float
    higher: int
    lower: int


def paired_test(differences: Mapping[str, Sequence[float]]) -> PairedTest:
    """Test paired differences: benchmark → one of each seed.

    The pairs of one benchmark share their test rows and its peculiarities: tests over pairs take them for
    independent and so find too much. What the benchmarks' means say is the honest answer to "does it hold
    elsewhere?".

    Raises:
        ValueError: no difference.
    """
    groups = [np.array(values, float) for values in differences.values() if len(values)]
    if not groups:
        raise ValueError("there are no differences to test")
    pairs = np.concatenate(groups)
    means = np.array([group.mean() for group in groups])
    t, p_t = t_test(pairs)
    return PairedTest(
        len(pairs),
        len(groups),
        float(pairs.mean()),
        t,
        p_t,
        wilcoxon(pairs),
        t_interval(means),
        t_test(means)[1],
        int((means > 0).sum()),
        int((means < 0).sum()),
    )


# ------------------------------------------------------------------------------------ does ICL work?


@dataclass(frozen=True)
class IclVerdict:
    """Whether there is anything in context that fine-tuning lacks (``ia2 probe`` judges alike).

    Attributes:
        judged: word, reason and numbers.
        icl: accuracy, mean over seeds.
        base: accuracy of the base model without demonstrations; None where it was not run.
        chance: accuracy of guessing.
        headroom: ICL − SFT; None where they have no seed together.
    """

    judged: Judgement
    icl: float
    base: float | None
    chance: float
    headroom: Interval | None

    @property
    def verdict(self) -> str:
        """``yes``, ``unclear`` or ``no``."""
        return self.judged.word

    @property
    def reason(self) -> str:
        """In a few words."""
        return self.judged.reason


def icl_works(
    icl: Arm, sft: Arm | None, base: Arm | None, dataset: str, num_labels: int | None
) -> IclVerdict | None:
    """Judge in-context learning by ICL − SFT, and by the base model, among the labels.

    Chance is one over the number of labels, or the share of the most frequent one where records have it.

    Args:
        icl: its cells.
        sft: those of plain fine-tuning; only draws that both have count.
        base: the base model's cell, if there is one.
        dataset: evaluated on.
        num_labels: of the benchmark, where records have none; None for free text, where guessing is never
            right.

    Returns:
        None where ICL was not evaluated on it.
    """
    evaluations = evaluations_of(icl, dataset)
    if not evaluations:
        return None
    first = next(iter(evaluations.values()))
    same_rows(list(evaluations.values()))
    # records of older versions lack the share, which is the same for all
    majority = max(e.majority or 0.0 for e in evaluations.values())
    count = first.num_labels or num_labels
    chance = max(majority, 1 / count if count and first.labelled else 0.0)
    pairs = {} if sft is None else _paired(icl, sft, dataset)
    bare = None
    if base is not None and (found := list(evaluations_of(base, dataset).values())):
        bare = found[0]
        same_rows([first, bare])
    judged = judge(
        [a.value("accuracy") for a, _ in pairs.values()]
        or [e.value("accuracy") for e in evaluations.values()],
        [b.value("accuracy") for _, b in pairs.values()] or None,
        None if bare is None else [bare.value("accuracy")],
        chance,
    )
    if first.labelled and chance == 0:
        judged = replace(judged, word="unclear", reason="number of labels unknown")
    return IclVerdict(
        judged,
        float(np.mean([e.value("accuracy") for e in evaluations.values()])),
        None if bare is None else bare.value("accuracy"),
        chance,
        judged.headroom,
    )
