"""The same queries in other words: how much hangs on the literals of a prompt.

What a query asks about stays as it is; only what the prompt's template writes around it changes, as a user
would who types it from memory (Sclar et al. 2024 describe how sensitive models are to it). Every change is a
function of the text alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ia2.examples import Example
from ia2.rows import Template
from ia2.task import common_beginning

UNCHANGED = "unchanged"

# The words before a colon at the end of a literal: "Text" of "Text:", "Label" of "\nLabel:".
_WORDS = re.compile(r"[^\n:]*[^\n:\s](?=:\s*$)")
_OPENING = re.compile(r"[^\n:]{1,40}:[ \t]*")
_CUE = re.compile(r"\n+[^\n:]{1,40}:[ \t]*$")


@dataclass(frozen=True)
class Parts:
    """A query, cut where the template's own words end and begin again; together they are the query."""

    opening: str
    middle: str
    cue: str

    def text(self) -> str:
        """The query."""
        return self.opening + self.middle + self.cue


def _reworded(literal: str, words: Sequence[str]) -> str:
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


def _instruction(parts: Parts, labels: Sequence[str]) -> str:
    names = ", ".join(label.strip() for label in labels)
    line = f"Answer with one of: {names}.\n" if labels else "Answer the following.\n"
    return line + parts.text()


_Change = Callable[[Parts, Sequence[str]], str]

WORDINGS: dict[str, tuple[str, _Change]] = {
    UNCHANGED: ("as it was trained", lambda p, labels: p.text()),
    "opening": (
        "another opening word (Input:)",
        lambda p, labels: replace(p, opening=_reworded(p.opening, ("Input", "Passage"))).text(),
    ),
    "cue": (
        "another cue (Answer:)",
        lambda p, labels: replace(p, cue=_reworded(p.cue, ("Answer", "Output"))).text(),
    ),
    "blank line": (
        "an empty line before the cue",
        lambda p, labels: replace(p, cue=f"\n{p.cue}" if p.cue.startswith("\n") else p.cue).text(),
    ),
    "lower case": (
        "opening word and cue in lower case",
        lambda p, labels: replace(p, opening=p.opening.lower(), cue=p.cue.lower()).text(),
    ),
    "blank": (
        "a blank behind the opening's colon, or none",
        lambda p, labels: replace(p, opening=_spaced(p.opening)).text(),
    ),
    "instruction": ("a line in front that names the labels", _instruction),
}
"""Name → what is changed, and the change."""


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
        changed = []
        for query in queries:
            end = len(query.query) - len(cue)
            parts = Parts(opening, query.query[len(opening) : end], cue)
            changed.append(replace(query, query=change(parts, labels)))
        if name == UNCHANGED or any(a.query != b.query for a, b in zip(changed, queries, strict=True)):
            found[name] = changed
    return found


def _literals(texts: Sequence[str], template: str | None) -> tuple[str, str]:
    """What comes before and after the part that differs from query to query."""
    if template is not None:
        parts = Template.parse(template, "prompt template").parts
        opening, cue = parts[0][0], parts[-1][0] if parts[-1][1] is None else ""
        fits = (
            len(t) >= len(opening) + len(cue) and t.startswith(opening) and t.endswith(cue) for t in texts
        )
        if all(fits):
            return opening, cue
    before = _OPENING.match(common_beginning(texts))
    after = _CUE.search(common_beginning([text[::-1] for text in texts])[::-1])
    opening, cue = before[0] if before else "", after[0] if after else ""
    if any(len(text) < len(opening) + len(cue) for text in texts):
        return "", ""
    return opening, cue
