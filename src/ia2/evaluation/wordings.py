"""The same queries in other words: how much hangs on the literals of a prompt.

What a query asks about stays as it is; only what the prompt's template writes around it changes, as a user
would who types it from memory (Sclar et al. 2024 describe how sensitive models are to it). Every change is a
function of the text alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from ia2.data.examples import Example
from ia2.data.rows import Template
from ia2.prompts.task import common_beginning

UNCHANGED = "unchanged"

# The words before a colon at the end of a literal: "Text" of "Text:", "Label" of "\nLabel:".
_WORDS = re.compile(r"[^\n:]*[^\n:\s](?=:\s*$)")
_OPENING = re.compile(r"[^\n:]{1,40}:[ \t]*")
_CUE = re.compile(r"\n+[^\n:]{1,40}:[ \t]*$")


def _reworded(literal: str, *words: str) -> str:
    found = _WORDS.search(literal)
    if found is None:
        return literal
    other = next(word for word in words if word.lower() != found[0].strip().lower())
    return literal[: found.start()] + other + literal[found.end() :]


def _spaced(opening: str) -> str:
    """With a blank behind the colon, or without the one that is there."""
    if not opening.rstrip().endswith(":"):
        return opening
    return opening.rstrip(" ") if opening.endswith(" ") else f"{opening} "


def _instruction(labels: Sequence[str]) -> str:
    names = ", ".join(label.strip() for label in labels)
    return f"Answer with one of: {names}.\n" if labels else "Answer the following.\n"


WORDINGS: dict[str, tuple[str, Callable[[str, str, str, Sequence[str]], str]]] = {
    UNCHANGED: ("as it was trained", lambda o, m, c, labels: o + m + c),
    "opening": (
        "another opening word (Input:)",
        lambda o, m, c, labels: _reworded(o, "Input", "Passage") + m + c,
    ),
    "cue": ("another cue (Answer:)", lambda o, m, c, labels: o + m + _reworded(c, "Answer", "Output")),
    "blank line": (
        "an empty line before the cue",
        lambda o, m, c, labels: o + m + ("\n" if c.startswith("\n") else "") + c,
    ),
    "lower case": (
        "opening word and cue in lower case",
        lambda o, m, c, labels: o.lower() + m + c.lower(),
    ),
    "blank": (
        "a blank behind the opening's colon, or none",
        lambda o, m, c, labels: _spaced(o) + m + c,
    ),
    "instruction": (
        "a line in front that names the labels",
        lambda o, m, c, labels: _instruction(labels) + o + m + c,
    ),
}
"""Name → what is changed, and the change of a query's opening, middle and cue."""


def wordings(
    queries: Sequence[Example], labels: Sequence[str], template: str | None = None
) -> dict[str, list[Example]]:
    """The queries under every change that does something to them; ``unchanged`` comes first.

    Args:
        queries: as they are rendered.
        labels: of the task; none for free text.
        template: the prompt template, ``Text: {text}\\nLabel:``. Without one (or where it does not fit), the
            opening and the cue are what all queries begin and end with, up to a colon.

    Returns:
        Name → queries in the same order. A change that leaves every query as it was is not there.
    """
    opening, cue = _literals([query.query for query in queries], template)
    found = {}
    for name, (_, change) in WORDINGS.items():
        texts = [query.query[len(opening) : len(query.query) - len(cue)] for query in queries]
        changed = [
            replace(query, query=change(opening, text, cue, labels))
            for query, text in zip(queries, texts, strict=True)
        ]
        if name == UNCHANGED or any(a.query != b.query for a, b in zip(changed, queries, strict=True)):
            found[name] = changed
    return found


def _literals(texts: Sequence[str], template: str | None) -> tuple[str, str]:
    """What comes before and after the part that differs from query to query."""

    def fits(opening: str, cue: str) -> bool:
        least = len(opening) + len(cue)
        return all(len(t) >= least and t.startswith(opening) and t.endswith(cue) for t in texts)

    if template is not None:
        parts = Template.parse(template, "prompt template").parts
        opening, cue = parts[0][0], parts[-1][0] if parts[-1][1] is None else ""
        if fits(opening, cue):
            return opening, cue
    before = _OPENING.match(common_beginning(texts))
    after = _CUE.search(common_beginning([text[::-1] for text in texts])[::-1])
    opening, cue = before[0] if before else "", after[0] if after else ""
    return (opening, cue) if fits(opening, cue) else ("", "")
