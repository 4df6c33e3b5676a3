"""Numbers as sentences have them: counts of things, and durations."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str = "") -> str:
    """``1 seed``, ``3 seeds``; ``plural`` where an *s* at the end is not enough."""
    return f"{number} {noun}" if number == 1 else f"{number} {plural or noun + 's'}"


def in_words(seconds: float) -> str:
    """``3 h 20 min``, ``12 min``, ``40 s``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
