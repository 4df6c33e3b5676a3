"""The verdict on a run in two sentences: IA2 → SFT against SFT, and against in-context learning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ia2.config.recipes import METHOD, PLAIN
from ia2.evaluation.tables import SCOPES, intervals_of, mean_of
from ia2.report.results import Run
from ia2.utils.statistics import main_scope, side
from ia2.utils.wording import counted, estimate

TEACHER = "icl"

_TITLES = {METHOD: "IA2 → SFT", "ia2": "IA2", PLAIN: "SFT", TEACHER: "in-context learning"}

# (better, worse) of a higher value
_WORDS = {
    "accuracy": ("more accurate", "less accurate"),
    "nll": ("worse in NLL", "better in NLL"),
}
# where there is neither: alike, and over several N
_ALIKE = {
    "accuracy": ("as accurate", "neither more nor less accurate"),
    "nll": ("as good in NLL", "neither better nor worse in NLL"),
}
_NOTHING: Mapping[str, Any] = {"value": None, "low": None, "high": None}


def verdict(run: Run) -> list[str]:
    """Two sentences."""
    if run.kind == "train":
        return _training_verdict(run.summary)
    if run.kind == "curve":
        return curve_verdict(run.summary, {size: part.summary for size, part in run.parts.items()})
    return comparison_verdict(run.summary)


def comparison_verdict(summary: Mapping[str, Any]) -> list[str]:
    """Two sentences on a comparison, from its paired differences."""
    design = summary["design"]
    lines = []
    for other in (PLAIN, TEACHER):
        (name, rival), found = _difference(summary, other)
        if found is None:
            lines.append(_absent(summary, other))
            continue
        title, of = arm_title(rival), ""
        if other == PLAIN:
            of = f"; {counted(design['num_test'], 'test row')}, {intervals_of(summary)}"
        else:
            title += f" ({design['icl_demonstrations']} in every prompt)"
        lines.append(f"{arm_title(name)} {_outcome(found, title)}: it is {_judged(found)}{of}.")
    return lines


def curve_verdict(summary: Mapping[str, Any], parts: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Two sentences on a curve, from its comparisons by N: where the method is better, worse or neither."""
    against_sft = {int(size): found for size, found in summary["differences"].items() if found}
    against_icl = {size: found for size, part in parts.items() if (found := _difference(part, TEACHER)[1])}
    return [_over_sizes(PLAIN, against_sft), _over_sizes(TEACHER, against_icl)]


def _training_verdict(metrics: Mapping[str, Any]) -> list[str]:
    """On a single adapter, which was compared with nothing."""
    part = "test" if "test" in metrics else "dev"
    first = "The adapter was not evaluated: there were neither test nor dev rows."
    if part in metrics:
        found = metrics[part]
        scope = main_scope("labels" in found)
        note = f"; {metrics['note']}" if "note" in metrics else ""
        first = (
            f"{arm_title(metrics['recipe'])} reaches an accuracy {SCOPES[scope]} of "
            f"{mean_of(found[scope]['accuracy'])} and an NLL of {mean_of(found[scope]['nll'])} on "
            f"{found['n']} {part} rows (one draw of training examples{note})."
        )
    return [
        first,
        "Nothing else was trained beside it, so this run cannot say whether it is better than SFT or "
        "in-context learning: `ia2 compare` can.",
    ]


def _outcome(found: Mapping[str, Any], other: str) -> str:
    """``beats SFT``, ``loses to SFT in accuracy``, ``cannot be told from SFT``."""
    accuracy, score = side(found["accuracy"]), -side(found.get("nll") or _NOTHING)
    if accuracy == score == 0:
        return f"cannot be told from {other} here"
    if accuracy == score:
        return f"beats {other}" if accuracy > 0 else f"loses to {other}"
    if accuracy == 0 or score == 0:
        measure = "accuracy" if accuracy else "NLL"
        return f"{'beats' if accuracy + score > 0 else 'loses to'} {other} in {measure}"
    won, lost = ("accuracy", "NLL") if accuracy > 0 else ("NLL", "accuracy")
    return f"beats {other} in {won} and loses to it in {lost}"


def _difference(summary: Mapping[str, Any], other: str) -> tuple[tuple[str, str], Mapping[str, Any] | None]:
    """The first difference of an arm of the method and one of another recipe, with their names."""
    for name, found in summary["differences"].items():
        first, second = name.split(" − ")
        if (first.split("@")[0], second.split("@")[0]) == (METHOD, other):
            return (first, second), found
    return ("", ""), None


def _absent(summary: Mapping[str, Any], other: str) -> str:
    names = {name.split("@")[0] for name in summary["recipes"]}
    missing = [arm_title(name) for name in (METHOD, other) if name not in names]
    return (
        f"Without {' and '.join(missing) or arm_title(other)} in this comparison there is no verdict on "
        f"IA2 → SFT against {arm_title(other)}."
    )


def _judged(found: Mapping[str, Any]) -> str:
    """``more accurate (+0.10 [+0.04, +0.20]) but worse in NLL (+0.05 [+0.01, +0.09])``."""
    known = {name: found[name] for name in _WORDS if found.get(name)}
    sides = {name: side(value) for name, value in known.items()}
    parts = [f"{_word(name, of, sides[name])} ({estimate(of, signed=True)})" for name, of in known.items()]
    # a higher accuracy and a lower NLL pull the same way
    joined = "and" if sides["accuracy"] == -sides.get("nll", 0) else "but"
    return f" {joined} ".join(parts)


def _word(name: str, found: Mapping[str, Any], mark: int) -> str:
    above, below = _WORDS[name]
    if mark:
        return above if mark > 0 else below
    if not found["value"]:
        return _ALIKE[name][0]
    return f"not distinguishably {above if found['value'] > 0 else below}"


def _over_sizes(other: str, found: Mapping[int, Mapping[str, Any]]) -> str:
    if not found:
        return f"{arm_title(METHOD)} and {arm_title(other)} were not both run: there is no verdict on them."
    parts = []
    for name, (above, below) in _WORDS.items():
        by_side: dict[int, list[int]] = {1: [], -1: [], 0: []}
        for size in sorted(found):
            by_side[side(found[size].get(name) or _NOTHING)].append(size)
        words = {1: above, -1: below, 0: f"{_ALIKE[name][1]} for certain"}
        texts = [f"{words[mark]} at N = {_listed(sizes)}" for mark, sizes in by_side.items() if sizes]
        parts.append(", ".join(texts))
    return (
        f"{arm_title(METHOD)} against {arm_title(other)}: {'; '.join(parts)} (95% t-intervals over draws, "
        "paired)."
    )


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))


def arm_title(arm: str) -> str:
    """A recipe as sentences have it, with its variant."""
    recipe, _, variant = arm.partition("@")
    return _TITLES.get(recipe, recipe) + (f" ({variant})" if variant else "")
