"""What ``ia2 report`` makes of runs: sorts folders, prints and writes their tables, draws their figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ia2.experiment.run_folder import REPORT_FILE
from ia2.report.analysis import analysis_figures, analysis_tables
from ia2.report.figures.style import drawable
from ia2.report.results import Run, kind_of, read_run
from ia2.report.verdict import verdict
from ia2.utils.errors import ConfigError
from ia2.utils.files import output_file, write_text
from ia2.utils.format import ENDINGS, FORMATS, Table


def sort_folders(folders: Sequence[Path], about_sweeps: Mapping[str, bool]) -> tuple[list[Run], list[Path]]:
    """Runs, read, and the folders of sweeps; the options about sweeps say whether each was given.

    Raises:
        RunFolderError: a folder holds no run, or an unfinished or damaged one.
        ConfigError: an option about sweeps, without any.
    """
    kinds = {folder: kind_of(folder) for folder in dict.fromkeys(folders)}
    sweeps = [folder for folder, kind in kinds.items() if kind == "sweep"]
    given = [name for name, is_given in about_sweeps.items() if is_given]
    if given and not sweeps:
        raise ConfigError(f"{given[0]} is about sweeps, and {folders[0]} is none. Leave it out.")
    return [read_run(folder) for folder, kind in kinds.items() if kind != "sweep"], sweeps


def check_output(output: Path, folders: Sequence[Path]) -> Path:
    """The file, if it can be one; the folders that are read for it hold no pages but ours.

    Raises:
        ConfigError: it is a folder, or a file of a run that is no report.
    """
    if output.is_dir():
        raise ConfigError(f"{output} is a folder. Name a file, such as {output / 'report.html'}.")
    if output.name != REPORT_FILE:  # an earlier report may be replaced
        output_file(output, *(() if output.suffix in (".html", ".htm") else folders))
    return output


def every_table(run: Run) -> list[Table]:
    """Those of the run, and of its analysis where there is one."""
    own = [] if run.table is None else [run.table]
    return own + ([] if run.analysis is None else analysis_tables(run.analysis))


def text(runs: Sequence[Run], formats: Sequence[str]) -> str:
    """Every table, formats one after the other."""
    return "\n".join(FORMATS[name](table) for name in formats for run in runs for table in every_table(run))


def to_dict(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """JSON-able."""
    return [
        {
            "name": run.name,
            "kind": run.kind,
            "folder": str(run.folder),
            "verdict": verdict(run),
            "tables": [table.to_dict() for table in every_table(run)],
        }
        for run in runs
    ]


def write_tables(runs: Sequence[Run], folder: Path, formats: Sequence[str]) -> list[Path]:
    """One file a table and format; of several runs in a folder each."""
    written = []
    for run, place in _places(runs, folder):
        for name in formats:
            for table in every_table(run):
                written.append(place / f"table-{table.name}.{ENDINGS[name]}")
                write_text(written[-1], FORMATS[name](table))
    return written


def draw(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Every figure as SVG; of several runs in a folder each. Says how to get matplotlib if it is missing."""
    if not drawable():
        return []
    from ia2.report.figures.runs import run_figures

    drawn = []
    for run, place in _places(runs, folder):
        figures = run_figures(run) + ([] if run.analysis is None else analysis_figures(run.analysis))
        drawn += [figure.save(place / f"{figure.name}.svg") for figure in figures]
    return drawn


def _places(runs: Sequence[Run], folder: Path) -> list[tuple[Run, Path]]:
    if len(runs) == 1:
        return [(runs[0], folder)]
    names = [run.name for run in runs]
    unique = [n if names.count(n) == 1 else f"{n}-{place}" for place, n in enumerate(names)]
    return [(run, folder / name) for run, name in zip(runs, unique, strict=True)]
