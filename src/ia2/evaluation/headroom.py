"""Does in-context learning know something that fine-tuning does not? One verdict for probes and reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ia2.utils.statistics import Interval, t_interval
from ia2.utils.wording import estimate


@dataclass(frozen=True)
class Judgement:
    """What was judged, and the numbers that it was judged by.

    Attributes:
        word: ``yes``, ``unclear`` or ``no``.
        reason: a clause; what it says of the numbers holds for them as they are printed.
        figures: the numbers in words: ICL, SFT, base, chance.
        headroom: ICL − SFT, paired; None without SFT.
    """

    word: str
    reason: str
    figures: str
    headroom: Interval | None


def judge(
    icl: Sequence[float],
    sft: Sequence[float] | None,
    base: Sequence[float] | None,
    chance: float,
    *,
    units: str = "draws",
    name: str = "ICL",
) -> Judgement:
    """Judge by ICL − SFT and by the base model among the labels: what there is to carry over.

    Args:
        icl: accuracy among the labels (free text: of the answer) of each unit, in [0, 1].
        sft: the same of fine-tuning, paired; None where it was not run.
        base: the same of the bare model; one number stands for all units. None where it was not run.
        chance: accuracy of guessing, always the most frequent label.
        units: what intervals are over: ``draws`` of training examples, or ``rows`` of one.
        name: of what the teacher has before the query.

    >>> judge([0.9, 0.92, 0.91], [0.7, 0.74, 0.71], [0.5], 0.5).word
    'yes'
    >>> judge([0.9], [0.7], [0.5], 0.5).reason
    'one draw cannot tell'
    """
    teacher = np.asarray(icl, float)
    mean = _printed(teacher.mean())
    figures = [f"{name} {mean:.1f}%"]
    less = above = None
    if sft is not None:
        figures.append(f"SFT {_printed(np.mean(sft)):.1f}%")
        less = t_interval(teacher - np.asarray(sft, float))
        figures.append(f"{name} − SFT {estimate(less.to_dict(), signed=True, percent=True)} points")
    if base is not None:
        figures.append(f"base {_printed(np.mean(base)):.1f}%")
        above = t_interval(teacher - np.asarray(base, float))
    figures.append(f"guessing {_printed(chance):.1f}%")

    def said(word: str, reason: str) -> Judgement:
        return Judgement(word, reason, ", ".join(figures), less)

    if mean <= _printed(chance):
        return said("no", f"{name} is not above guessing")
    if base is not None and mean <= _printed(np.mean(base)):
        return said("no", f"{name} is not above the bare model")
    if less is None:
        return said("unclear", "SFT was not run beside it")
    if less.units < 2:
        return said("unclear", f"one {units.removesuffix('s')} cannot tell")
    if _printed(less.high) < 0:
        return said("no", f"SFT is better than {name}")
    if _printed(less.low) <= 0:
        return said("unclear", f"{name} and SFT cannot be told apart")
    if above is None:
        return said("unclear", "the bare model was not run beside it")
    if _printed(above.low) <= 0:
        return said("unclear", f"{name} is above the bare model, but not for certain")
    return said("yes", f"{name} is better than SFT, and than the bare model")


def _printed(share: Any) -> float:
    """Percent as sentences have it, so that they never say more than the numbers in them."""
    return round(100 * float(share), 1)
