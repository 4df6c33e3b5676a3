"""What ``ia2 report`` prints: a table by its name, all of them, or an overview."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ia2.experiment.sweep.records import filtered, load_results
from ia2.report.sweep.cells import Report
from ia2.report.sweep.overview import overview_lines
from ia2.report.sweep.own_tables import full_table, icl_table, threshold_table
from ia2.report.sweep.paper import paper_tables
from ia2.report.sweep.paper_layouts import available, filled, paper_table
from ia2.report.sweep.selection import Select
from ia2.report.sweep.significance import pairs_table
from ia2.report.sweep.variants import variants_table
from ia2.utils.errors import ConfigError, suggest
from ia2.utils.files import write_text
from ia2.utils.format import ENDINGS, FORMATS, Table
from ia2.utils.logging import logger

# name → table and what it needs
_OWN: dict[str, tuple[Callable[[Report], Table], str]] = {
    "full": (full_table, "cells"),
    "tests": (pairs_table, "ia2-sft and another recipe on the same seeds"),
    "variants": (variants_table, "a variant of ia2-sft and the plain one on the same seeds"),
    "thresholds": (threshold_table, "ia2-sft and sft at two N or more, on the same seeds"),
    "icl": (icl_table, "cells of icl"),
}


@dataclass
class Printed:
    """Lines and tables, ready to be written in any format.

    Attributes:
        report: what they are made of.
        lines: sentences before the tables.
        tables: in order.
    """

    report: Report
    lines: list[str]
    tables: list[Table]

    def text(self, formats: Sequence[str]) -> str:
        """All of it for the terminal, formats one after the other."""
        parts = ["\n\n".join(self.lines) + "\n"] if self.lines else []
        parts += [FORMATS[name](table) for name in formats for table in self.tables]
        return "\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "name": self.report.results.name,
            "folders": list(self.report.results.folders),
            "cells": len(self.report.results.cells),
            "select": self.report.select,
            "lines": self.lines,
            "tables": [table.to_dict() for table in self.tables],
        }

    def write(self, folder: Path, formats: Sequence[str]) -> list[Path]:
        """One file a table name and format, ``table-1.md``; the sentences go to ``overview.md``."""
        written = []
        for name in formats:
            texts: dict[str, list[str]] = {}
            for table in self.tables:
                texts.setdefault(table.name, []).append(FORMATS[name](table))
            for table_name, found in texts.items():
                written.append(folder / f"table-{table_name}.{ENDINGS[name]}")
                write_text(written[-1], "\n".join(found))
        if self.lines:
            written.append(folder / "overview.md")
            write_text(written[-1], "\n\n".join(self.lines) + "\n")
        return written

    def draw(self, folder: Path) -> list[Path]:
        """Every figure that the cells have something for."""
        from ia2.report.sweep.sweep_figures import try_figures

        return try_figures(self.report, folder)


def make_report(
    folders: Sequence[Path],
    select: Select | None = None,
    benchmarks: Sequence[str] = (),
    models: Sequence[str] = (),
    sizes: Sequence[str] = (),
    seeds: Sequence[str] = (),
    *,
    where_icl_works: bool = False,
) -> Report:
    """Read folders and choose rates.

    Raises:
        UserError: a damaged or missing folder, or a name that no cell has.
    """
    results = load_results(folders)
    results = filtered(
        results,
        benchmarks=benchmarks,
        models=models,
        sizes=_numbers("--sizes", sizes),
        seeds=_numbers("--seeds", seeds),
    )
    chosen: Select = select or ("test" if results.select == "test" else "dev")
    return Report(results, chosen, where_icl_works=where_icl_works)


def _numbers(flag: str, given: Sequence[str]) -> list[int]:
    for text in given:
        if not text.isdigit():
            raise ConfigError(f"{flag}: '{text}' is no number. Give some, such as 8,32.")
    return [int(text) for text in given]


def print_tables(report: Report, name: str | None) -> Printed:
    """The table of that name, ``all``, or (None) the overview.

    Raises:
        ConfigError: no table of that name, or no cells for it.
    """
    if name is None:
        return _overview(report)
    if name == "all":
        return Printed(report, [], _all(report))
    if name.isdigit():
        return Printed(report, [], paper_table(report, int(name)))
    if name not in _OWN:
        known = [*map(str, paper_tables()), *_OWN, "all"]
        raise ConfigError(
            f"there is no table '{name}'; there are 1 to {max(paper_tables())}, {', '.join(_OWN)} and all."
            f"{suggest(name, known)}"
        )
    make, needs = _OWN[name]
    table = make(report)
    if not table.rows:
        raise ConfigError(f"table {name} needs {needs}{report.where_words}; these are not there.")
    return Printed(report, [], [table])


def _overview(report: Report) -> Printed:
    there = available(report)
    tables = filled(report, 1) or [table for table in [full_table(report)] if table.rows]
    listed = ", ".join([*map(str, there), *_OWN])
    lines = [*overview_lines(report), f"Tables that these cells fill (--table): {listed}."]
    return Printed(report, lines, tables)


def _all(report: Report) -> list[Table]:
    tables = [table for number in paper_tables() for table in filled(report, number)]
    tables += [table for make, _ in _OWN.values() if (table := make(report)).rows]
    absent = [str(number) for number in paper_tables() if str(number) not in {t.name for t in tables}]
    if absent:
        logger.info("No cells for the paper's tables %s.", ", ".join(absent))
    return tables
