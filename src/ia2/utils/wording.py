"""Words of messages: counts of things, durations, names and reasons, each on one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SHOWN_NAMES = 30


def counted(number: int, noun: str, plural: str = "") -> str:
    """``1 seed``, ``3 seeds``; ``plural`` where an *s* at the end is not enough."""
    return f"{number} {noun}" if number == 1 else f"{number} {plural or noun + 's'}"


def in_words(seconds: float) -> str:
    """``3 h 20 min``, ``12 min``, ``40 s``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def flat(text: str) -> str:
    """``text`` without line breaks, which names of columns may hold."""
    return " ".join(text.splitlines())


def one_line(error: BaseException) -> str:
    """What an error says, on one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"


def quoted(value: str) -> str:
    """``value`` in quotation marks, cut to 60 characters."""
    return repr(value if len(value) <= 60 else value[:59] + "…")


def names_of(names: Sequence[str]) -> str:
    """``'a', 'b'``; of more than thirty the first, and how many there are."""
    more = f", … ({len(names)} in all)" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(map(quoted, names[:_SHOWN_NAMES])) + more


def type_name(value: Any) -> str:
    """``a list``, ``an int``, ``null``."""
    if value is None:
        return "null"
    kind = "dict" if isinstance(value, Mapping) else type(value).__name__
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def rows_learnt_from(counts: Mapping[str, Any]) -> str:
    """``8 training and 4 dev examples``, and unlabelled rows if there are any.

    Args:
        counts: ``num_train``, ``num_dev`` and, where there are some, ``num_unlabelled`` and
            ``num_unlabelled_dev``.
    """
    text = f"{counts['num_train']} training and {counts['num_dev']} dev examples"
    if counts.get("num_unlabelled"):
        text += f", {counts['num_unlabelled']} unlabelled rows and {counts['num_unlabelled_dev']} held out"
    return text


MISSING = "–"


def estimate(found: Mapping[str, Any] | None, *, signed: bool = False, percent: bool = False) -> str:
    """A mean with its 95% interval, ``0.812 [0.760, 0.864]``; the mean alone where there is none.

    Args:
        found: ``value``, ``low``, ``high``; None for what is not known.
        signed: for differences: a sign before each number, with a true minus.
        percent: in percent (percentage points), with one digit behind the point.

    >>> estimate({"value": 0.1, "low": -0.02, "high": 0.22}, signed=True, percent=True)
    '+10.0 [−2.0, +22.0]'
    """
    if found is None or found["value"] is None or found["value"] != found["value"]:
        return MISSING

    def one(x: float) -> str:
        text = f"{100 * x:.1f}" if percent else f"{x:.3f}"
        if not float(text):
            text = text.removeprefix("-")  # no minus before nothing
        return ("+" + text if signed and not text.startswith("-") else text).replace("-", "−")

    low, high = found["low"], found["high"]
    if low is None or high is None or low != low or high != high:
        return one(found["value"])
    return f"{one(found['value'])} [{one(low)}, {one(high)}]"
