"""What ``ia2 report`` prints of sweeps: a table by its name, all of them, or an overview in sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ia2.config.recipes import METHOD, PLAIN
from ia2.experiment.sweep.records import filtered, load_results, seconds_by_kind, work_in_words
from ia2.report.sweep.cells import TITLES, Report
from ia2.report.sweep.comparisons import pairs_table, variants_table
from ia2.report.sweep.notes import grouped
from ia2.report.sweep.own_tables import full_table, icl_table, threshold_table
from ia2.report.sweep.paper import available, filled, paper_table, paper_tables
from ia2.report.sweep.selection import Select
from ia2.utils.errors import ConfigError, suggest
from ia2.utils.files import write_text
from ia2.utils.format import ENDINGS, FORMATS, Table
from ia2.utils.logging import logger
from ia2.utils.statistics import PairedTest, paired_test, side
from ia2.utils.wording import counted, estimate

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
    """Sentences and the tables behind them, ready to be written in any format."""

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
        results = self.report.results
        return {
            "name": results.name,
            "folders": list(results.folders),
            "cells": len(results.cells),
            "select": self.report.select,
            "lines": self.lines,
            "tables": [table.to_dict() for table in self.tables],
        }

    def write(self, folder: Path, formats: Sequence[str]) -> list[Path]:
        """One file a table name and format, ``table-1.md``; the sentences go to ``overview.md``."""
        texts: dict[Path, list[str]] = {}
        for name in formats:
            for table in self.tables:
                file = folder / f"table-{table.name}.{ENDINGS[name]}"
                texts.setdefault(file, []).append(FORMATS[name](table))
        written = {file: "\n".join(parts) for file, parts in texts.items()}
        if self.lines:
            written[folder / "overview.md"] = "\n\n".join(self.lines) + "\n"
        for file, text in written.items():
            write_text(file, text)
        return list(written)

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
    for flag, texts in (("--sizes", sizes), ("--seeds", seeds)):
        for text in texts:
            if not text.isdigit():
                raise ConfigError(f"{flag}: '{text}' is no number. Give some, such as 8,32.")
    results = filtered(
        load_results(folders),
        benchmarks=benchmarks,
        models=models,
        sizes=list(map(int, sizes)),
        seeds=list(map(int, seeds)),
    )
    by_grid: Select = "test" if results.select == "test" else "dev"
    return Report(results, select or by_grid, where_icl_works=where_icl_works)


def print_tables(report: Report, name: str | None) -> Printed:
    """The table of that name, ``all``, or (None) the overview.

    Raises:
        ConfigError: no table of that name, or no cells for it.
    """
    if name is None:
        tables = filled(report, 1) or [table for table in [full_table(report)] if table.rows]
        listed = ", ".join([*map(str, available(report)), *_OWN])
        lines = [*overview_lines(report), f"Tables that these cells fill (--table): {listed}."]
        return Printed(report, lines, tables)
    if name == "all":
        of_paper = {number: filled(report, number) for number in paper_tables()}
        if absent := [str(number) for number, tables in of_paper.items() if not tables]:
            logger.info("No cells for the paper's tables %s.", ", ".join(absent))
        own = [table for make, _ in _OWN.values() if (table := make(report)).rows]
        return Printed(report, [], [*(table for tables in of_paper.values() for table in tables), *own])
    if name.isdigit():
        return Printed(report, [], paper_table(report, int(name)))
    if name not in _OWN:
        raise ConfigError(
            f"there is no table '{name}'; there are 1 to {max(paper_tables())}, {', '.join(_OWN)} and all."
            f"{suggest(name, [*map(str, paper_tables()), *_OWN, 'all'])}"
        )
    make, needs = _OWN[name]
    table = make(report)
    if not table.rows:
        raise ConfigError(f"table {name} needs {needs}{report.where_words}; these are not there.")
    return Printed(report, [], [table])


# ------------------------------------------------------------------------------------------ overview


def overview_lines(report: Report) -> list[str]:
    """What was run, the verdict on IA2 → SFT, and whether ICL worked; sentences."""
    results = report.results
    count = len(results.cells)
    of = f"{count} of " if results.total not in (None, count) else ""
    failed = f", {results.failed} failed" if results.failed else ""
    seeds = {cell.seed for cell in results.cells if cell.seed is not None}
    seconds = seconds_by_kind(cell.seconds for cell in results.cells)
    took = f"; {work_in_words(seconds)}" if sum(seconds.values()) else ""
    sources = dict.fromkeys(task.benchmark for task in report.tasks)
    lines = [
        f"{results.name}: {of}{counted(results.total or count, 'cell')}{failed}{took}. Models "
        f"{', '.join(report.models)}; benchmarks {', '.join(sources)}; recipes {', '.join(report.labels)}; "
        f"N = {', '.join(map(str, report.sizes))}; {counted(len(seeds), 'seed')}.",
        *verdict_lines(report),
    ]
    everywhere = report.where(icl_works=False)
    for model in report.models:
        for size in report.sizes:
            places = everywhere.places(own=True, model=model, size=size)
            judged = ((p.task.benchmark, found.judged.word) for p in places if (found := report.icl(p)))
            if by := grouped((word, benchmark) for benchmark, word in judged):
                words = [word for word in ("yes", "unclear", "no") if word in by]
                listed = "; ".join(f"{word}: {', '.join(by[word])}" for word in words)
                lines.append(f"Does ICL work with {model} at N = {size}? {listed}.")
    return lines


def verdict_lines(report: Report) -> list[str]:
    """IA2 → SFT against SFT in two sentences: over all label and free-text tasks, and where ICL works."""
    everywhere, where = (_pooled(report.where(icl_works=works)) for works in (False, True))
    if "accuracy" not in everywhere:
        return [f"{METHOD} and {PLAIN} were not both run: there is no verdict."]
    if "accuracy" not in where:
        said = "there is no such benchmark among these."
    else:
        said = "the same, it works on all of them." if where == everywhere else _verdict(where)
    sizes = ", ".join(map(str, report.sizes))
    return [f"Over everything (N = {sizes}): {_verdict(everywhere)}", f"Where ICL works: {said}"]


def _pooled(report: Report) -> dict[str, PairedTest]:
    """IA2 → SFT less SFT over models, N, benchmarks and seeds, by measure, where there are any."""
    places = report.places(own=True)
    measures = ("accuracy", "nll", "accuracy_vocabulary")
    pairs = {measure: report.pooled(places, measure)[0] for measure in measures}
    return {measure: paired_test(found) for measure, found in pairs.items() if found}


def _verdict(found: dict[str, PairedTest]) -> str:
    accuracy = found["accuracy"]
    word = _word(accuracy, "more accurate", "less accurate", "no more accurate")
    text = f"{TITLES[METHOD]} is {word} than SFT, {_shown(accuracy, percent=True)} points"
    if "nll" in found and "accuracy_vocabulary" in found:
        text += (
            f" among the labels ({_shown(found['accuracy_vocabulary'], percent=True)} over the vocabulary), "
            f"and {_word(found['nll'], 'worse', 'better', 'no better')} in NLL, {_shown(found['nll'])}"
        )
    how = "95% t over benchmarks" if accuracy.clusters > 1 else "one benchmark: no interval over them"
    of = f"{counted(accuracy.clusters, 'benchmark')}, {counted(accuracy.pairs, 'pair')} of runs"
    return f"{text} ({of}; {how})."


def _shown(test: PairedTest, *, percent: bool = False) -> str:
    return estimate(test.whole.to_dict(), signed=True, percent=percent)


def _word(test: PairedTest, above: str, below: str, equal: str) -> str:
    value = float(test.whole.value)
    if abs(value) < 1e-12:
        return equal
    word = above if value > 0 else below
    if test.clusters < 2:  # the draws of one benchmark say nothing of others
        return f"{word} on this one benchmark"
    return word if side(test.whole.to_dict()) else f"not distinguishably {word}"
