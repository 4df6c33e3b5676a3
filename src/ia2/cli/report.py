"""``ia2 report``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import typer

from ia2.cli.options import FIGURES, JSON, QUIET, listed, option

_TABLE = (
    "Of sweeps: a table of the paper (1 to 20), or full, tests, variants, thresholds, icl, or all. Without "
    "it: what was run, what came out, and table 1."
)
_OUTPUT = (
    "The HTML file. Of runs it is report.html in the first folder, unless tables or figures alone are asked "
    "for; of sweeps alone it is written only if named."
)
_SELECT = (
    "Of sweeps: choose rates and β by dev loss (mean over seeds, or each seed alone) or, as the paper, by "
    "test accuracy. By default what the grid says, else dev."
)


def report(
    folders: list[Path] = typer.Argument(
        ..., help="Folders that `ia2 compare`, `demo`, `curve`, `train` or `sweep` wrote."
    ),
    table: str | None = option(_TABLE),
    output: Path | None = option(_OUTPUT, "--output", "--html"),
    latex: bool = option("Print tables in LaTeX (booktabs).", "--latex", default=False),
    markdown: bool = option("Print tables in Markdown; with --latex both.", "--markdown", default=False),
    figures: Path | None = FIGURES,
    select: Literal["dev", "dev-per-seed", "test"] | None = option(_SELECT),
    where_icl_works: bool = option(
        "Of sweeps: only evaluations on which ICL works.", "--where-icl-works", default=False
    ),
    benchmarks: str | None = option("Of sweeps: only these benchmarks, comma-separated."),
    models: str | None = option("Of sweeps: only these models, comma-separated."),
    sizes: str | None = option("Of sweeps: only these N, comma-separated."),
    seeds: str | None = option("Of sweeps: only these seeds, comma-separated."),
    output_dir: Path | None = option("Write each table to a file here too."),
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Show what came out: one HTML file of runs; tables and figures of runs and sweeps. No model, no data."""
    from ia2.cli.output import print_json, start

    start(quiet, files=[output], folders=[output_dir, figures])
    from ia2.report import printing
    from ia2.report.page import write_report
    from ia2.utils.files import unchecked

    if output is not None:
        printing.check_output(output, folders)
    only = {"--benchmarks": benchmarks, "--models": models, "--sizes": sizes, "--seeds": seeds}
    about_sweeps = {
        "--table": table,
        "--select": select,
        "--where-icl-works": where_icl_works or None,
        **only,
    }
    formats = [name for name, asked in (("markdown", markdown or not latex), ("latex", latex)) if asked]
    with unchecked(folders):
        runs, sweeps = printing.sort_folders(
            folders, {name: value is not None for name, value in about_sweeps.items()}
        )
        printed = None
        if sweeps:
            from ia2.report.sweep.printing import make_report, print_tables

            chosen = make_report(sweeps, select, *map(listed, only.values()), where_icl_works=where_icl_works)
            printed = print_tables(chosen, table)
        if output is None and runs and not (latex or markdown or figures or output_dir):
            output = folders[0] / "report.html"
        files: list[Path] = []
        if output is not None:
            files.append(write_report(runs, printed, output))
        if output_dir is not None:
            files += printing.write_tables(runs, output_dir, formats)
            files += printed.write(output_dir, formats) if printed else []
        if figures is not None:
            files += printing.draw(runs, figures) if runs else []
            files += printed.draw(figures) if printed else []
        if json:
            about_runs = {"runs": printing.to_dict(runs)} if runs else {}
            about_cells = printed.to_dict() if printed else {}
            print_json({**about_cells, **about_runs, "files": [str(path) for path in files]})
            return
        if runs and (latex or markdown):
            print(printing.text(runs, formats), end="")
        elif runs:
            for run in runs:
                print(f"{run.name}: {' '.join(printing.verdict(run))}")
        if printed:
            print(printed.text(formats), end="")
        if files:
            print(f"\nFiles: {', '.join(map(str, files))}")
