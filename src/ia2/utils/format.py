"""Tables of numbers, and how they are written in Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np

from ia2.utils.statistics import Interval
from ia2.utils.wording import MISSING, estimate

Mark = Literal["", "best", "second", "paper"]

# What TeX would take for something else, and signs that its text fonts lack.
_TEX = {
    "\\": r"\textbackslash{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "→": r"$\rightarrow$",
    "−": "$-$",
    "–": "--",
    "±": r"$\pm$",
    "≈": r"$\approx$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "β": r"$\beta$",
    "·": r"$\cdot$",
    "³": r"\textsuperscript{3}",
    "…": r"\ldots{}",
}
_MARKDOWN_MARKS: dict[Mark, tuple[str, str]] = {
    "": ("", ""),
    "best": ("**", "**"),
    "second": ("<u>", "</u>"),
    "paper": ("*", "*"),
}
_TEX_MARKS: dict[Mark, str] = {"": "{}", "best": r"\textbf{{{}}}", "second": r"\underline{{{}}}"}
_TEX_MARKS["paper"] = r"\textit{{{}}}"


@dataclass(frozen=True)
class Entry:
    """One field of a table: its text, how it is set off, and the numbers behind it for JSON."""

    text: str
    mark: Mark = ""
    value: Any = None


@dataclass(frozen=True)
class Column:
    """Title of a column, under the title of a group of columns."""

    title: str
    group: str = ""

    @property
    def full(self) -> str:
        """Both titles in one."""
        return f"{self.group} {self.title}".strip()


@dataclass(frozen=True)
class Table:
    """Rows of entries, and what they are of.

    Attributes:
        name: as ``--table`` takes it.
        title: first sentence of the caption.
        columns: of every row.
        rows: ``[rows][columns]``.
        notes: further sentences: models, sizes, seeds, how rates were chosen, what is missing.
        label: in LaTeX; the name, unless there are several tables of that name.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Entry, ...], ...]
    notes: tuple[str, ...] = ()
    label: str = ""

    def texts(self) -> tuple[list[str], list[list[str]]]:
        """Titles of columns, and the texts of each row."""
        return [column.full for column in self.columns], [[e.text for e in row] for row in self.rows]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; entries with numbers behind them give these too."""
        return {
            "table": self.name,
            "title": self.title,
            "columns": [column.full for column in self.columns],
            "rows": [
                {
                    column.full: entry.text if entry.value is None else {"text": entry.text, **entry.value}
                    for column, entry in zip(self.columns, row, strict=True)
                }
                for row in self.rows
            ],
            "notes": list(self.notes),
        }


Row = Mapping[Any, Entry | str]
"""Column (or its title) → entry."""


def fill(name: str, title: str, rows: Iterable[Row], notes: Sequence[str] = ()) -> Table:
    """A table of rows that name their columns, in the order of their first mention; what lacks is empty."""
    lines = [{_column(column): _entry(entry) for column, entry in row.items()} for row in rows]
    columns = tuple(dict.fromkeys(column for line in lines for column in line))
    entries = tuple(tuple(line.get(column, Entry("")) for column in columns) for line in lines)
    return Table(name, title, columns, entries, tuple(notes))


def _column(column: Column | str) -> Column:
    return Column(column) if isinstance(column, str) else column


def _entry(entry: Entry | str) -> Entry:
    return Entry(entry) if isinstance(entry, str) else entry


def pipes(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns and rows of texts as a Markdown table."""
    head, *body = (f"| {' | '.join(fields)} |" for fields in (columns, *rows))
    return "\n".join([head, "|---" * len(columns) + "|", *body])


def markdown(table: Table) -> str:
    """The table with its caption above and its notes below."""
    rows = pipes([_plain(c.full) for c in table.columns], [list(map(_marked, row)) for row in table.rows])
    notes = "".join(f"\n- {_plain(note)}" for note in table.notes)
    return f"**{_plain(table.title)}**\n\n{rows}\n" + (f"{notes}\n" if notes else "")


def _marked(entry: Entry) -> str:
    text = _plain(entry.text)
    if not text:
        return ""
    before, after = _MARKDOWN_MARKS[entry.mark]
    return f"{before}{text}{after}"


def _plain(text: str) -> str:
    """Text that ends no table field and begins no markup."""
    text = " ".join(text.split()).replace("\\", "\\\\")
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("`", "\\`")


def latex(table: Table) -> str:
    """A ``table`` with booktabs rules; columns of one group have its title above them."""
    escaped = [
        [_TEX_MARKS[e.mark].format(escape(e.text)) if e.text else "" for e in row] for row in table.rows
    ]
    lines = [
        r"\begin{table}",
        r"\centering",
        r"\small",
        f"\\caption{{{escape(table.title)}}}",
        f"\\label{{tab:ia2-{_label(table.label or table.name)}}}",
        f"\\begin{{tabular}}{{{''.join('c' if c.group else 'l' for c in table.columns)}}}",
        r"\toprule",
    ]
    if any(column.group for column in table.columns):
        lines += _groups(table.columns)
    lines.append(_row([escape(column.title) for column in table.columns]))
    lines.append(r"\midrule")
    lines += map(_row, escaped)
    lines += [r"\bottomrule", r"\end{tabular}"]
    if table.notes:
        lines += [r"\par\smallskip", r"\begin{minipage}{\linewidth}\footnotesize"]
        lines += [escape(note) + r" \\" for note in table.notes[:-1]]
        lines += [escape(table.notes[-1]), r"\end{minipage}"]
    lines.append(r"\end{table}")
    return "\n".join(lines) + "\n"


def _groups(columns: Sequence[Column]) -> list[str]:
    titles, rules, place = [], [], 1
    for group, members in groupby(columns, key=lambda column: column.group):
        width = len(list(members))
        titles.append(f"\\multicolumn{{{width}}}{{c}}{{{escape(group)}}}" if group else " & " * (width - 1))
        if group:
            rules.append(f"\\cmidrule(lr){{{place}-{place + width - 1}}}")
        place += width
    return [" & ".join(titles) + r" \\", " ".join(rules)]


def _row(fields: Sequence[str]) -> str:
    return " & ".join(fields) + r" \\"


def escape(text: str) -> str:
    """Text as LaTeX sets it verbatim (in text mode)."""
    # one pass: the escapes are made of signs that are escaped themselves
    return "".join(_TEX.get(sign, sign) for sign in " ".join(text.split()))


def _label(name: str) -> str:
    return "".join(sign if sign.isalnum() else "-" for sign in name.lower())


FORMATS: dict[str, Callable[[Table], str]] = {"markdown": markdown, "latex": latex}
"""How a table is written, and by what."""

ENDINGS = {"markdown": "md", "latex": "tex"}
"""Endings of files by format."""


# ------------------------------------------------------------------------------------------ entries


def interval_entry(
    interval: Interval | None, *, signed: bool = False, percent: bool = False, **more: Any
) -> Entry:
    """A mean with its interval, or a dash; ``more`` is for JSON."""
    if interval is None:
        return Entry(MISSING)
    ends = interval.to_dict()
    return Entry(estimate(ends, signed=signed, percent=percent), value={**ends, **more})


def mean_entry(values: Mapping[int | None, float], *, percent: bool = False, expected: int = 0) -> Entry:
    """A mean (standard deviation) over seeds, or a dash; fewer seeds than ``expected`` are said."""
    numbers = list(values.values())
    if not numbers:
        return Entry(MISSING)
    mean, sd = float(np.mean(numbers)), float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None
    text = mean_sd(mean, sd, percent=percent)
    seeds = [seed for seed in values if seed is not None]
    if 0 < len(seeds) < expected:
        text += f", {len(seeds)} of {expected} seeds"
    return Entry(text, value={"mean": mean, "sd": sd, "seeds": seeds})


def mean_sd(mean: float, sd: float | None, *, percent: bool) -> str:
    """``90.4 (2.3)`` in percent or ``0.06 (0.01)``."""
    shown = [f"{100 * x:.1f}" if percent else f"{x:.2f}" for x in (mean, sd) if x is not None]
    return shown[0] + (f" ({shown[1]})" if len(shown) > 1 else "")
