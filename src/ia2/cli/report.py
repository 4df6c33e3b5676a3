"""``ia2 report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ia2.cli.options import Json, Quiet


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(help="Folders that `ia2 compare`, `demo`, `curve`, `train` or `sweep` wrote."),
    ],
    table: Annotated[
        str | None,
        typer.Option(
            help="Of sweeps: a table of the paper (1 to 20), or full, tests, variants, thresholds, icl, or "
            "all. Without it: what was run, what came out, and table 1.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "--html",
            help="The HTML file. Of runs it is report.html in the first folder, unless tables or figures "
            "alone are asked for; of sweeps alone it is written only if named.",
            show_default=False,
        ),
    ] = None,
    latex: Annotated[bool, typer.Option("--latex", help="Print tables in LaTeX (booktabs).")] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print tables in Markdown; with --latex both.")
    ] = False,
    figures: Annotated[
        Path | None, typer.Option(help="Draw the figures into this folder (SVG).", show_default=False)
    ] = None,
    select: Annotated[
        Literal["dev", "dev-per-seed", "test"] | None,
        typer.Option(
            help="Of sweeps: choose rates and β by dev loss (mean over seeds, or each seed alone) or, as the "
            "paper, by test accuracy. By default what the grid says, else dev.",
            show_default=False,
        ),
    ] = None,
    where_icl_works: Annotated[
        bool, typer.Option("--where-icl-works", help="Of sweeps: only evaluations on which ICL works.")
    ] = False,
    benchmarks: Annotated[
        str | None,
        typer.Option(help="Of sweeps: only these benchmarks, comma-separated.", show_default=False),
    ] = None,
    models: Annotated[
        str | None, typer.Option(help="Of sweeps: only these models, comma-separated.", show_default=False)
    ] = None,
    sizes: Annotated[
        str | None, typer.Option(help="Of sweeps: only these N, comma-separated.", show_default=False)
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Of sweeps: only these seeds, comma-separated.", show_default=False)
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Write each table to a file here too.", show_default=False),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what came out: one HTML file of runs; tables and figures of runs and sweeps. No model, no data."""
    from ia2.cli.output import print_json, start

    start(quiet, files=[output], folders=[output_dir, figures])
    from ia2.report import printing
    from ia2.report.page import write_report
    from ia2.utils.files import unchecked

    if output is not None:
        printing.check_output(output, folders)
    about_sweeps = {
        "--table": table is not None,
        "--select": select is not None,
        "--where-icl-works": where_icl_works,
        "--benchmarks": benchmarks is not None,
        "--models": models is not None,
        "--sizes": sizes is not None,
        "--seeds": seeds is not None,
    }
    with unchecked(folders):
        runs, sweeps = printing.sort_folders(folders, about_sweeps)
        printed = None
        if sweeps:
            from ia2.report.sweep.printing import make_report, print_tables

            asked = map(_list, (benchmarks, models, sizes, seeds))
            printed = print_tables(
                make_report(sweeps, select, *asked, where_icl_works=where_icl_works), table
            )
        if output is None and runs and not (latex or markdown or figures or output_dir):
            output = folders[0] / "report.html"
        files: list[Path] = []
        if output is not None:
            files.append(write_report(runs, printed, output))
        formats = [name for name, asked in (("markdown", markdown or not latex), ("latex", latex)) if asked]
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
        for run in runs if not (latex or markdown) else ():
            print(f"{run.name}: {' '.join(printing.verdict(run))}")
        if printed:
            print(printed.text(formats), end="")
        if files:
            print(f"\nFiles: {', '.join(map(str, files))}")


def _list(given: str | None) -> list[str]:
    return [part.strip() for part in (given or "").split(",") if part.strip()]
