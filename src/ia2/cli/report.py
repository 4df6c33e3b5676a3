"""``ia2 report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ia2.cli.options import Json, Quiet


def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders that `ia2 sweep` wrote; merged.")],
    table: Annotated[
        str | None,
        typer.Option(
            help="A table of the paper (1 to 20), or full, tests, variants, thresholds, icl, or all. Without it: what "
            "was run, what came out, and table 1.",
            show_default=False,
        ),
    ] = None,
    latex: Annotated[bool, typer.Option("--latex", help="LaTeX (booktabs) instead of Markdown.")] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Markdown; with --latex both (default: Markdown).")
    ] = False,
    figures: Annotated[
        Path | None, typer.Option(help="Draw the figures into this folder (SVG).", show_default=False)
    ] = None,
    select: Annotated[
        Literal["dev", "dev-per-seed", "test"] | None,
        typer.Option(
            help="Choose rates and β by dev loss (mean over seeds, or each seed alone) or, as the paper, by "
            "test accuracy. By default what the grid says, else dev.",
            show_default=False,
        ),
    ] = None,
    where_icl_works: Annotated[
        bool, typer.Option("--where-icl-works", help="Only evaluations on which ICL works.")
    ] = False,
    benchmarks: Annotated[
        str | None, typer.Option(help="Only these benchmarks, comma-separated.", show_default=False)
    ] = None,
    models: Annotated[
        str | None, typer.Option(help="Only these models, comma-separated.", show_default=False)
    ] = None,
    sizes: Annotated[
        str | None, typer.Option(help="Only these N, comma-separated.", show_default=False)
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Only these seeds, comma-separated.", show_default=False)
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Write each table to a file here too.", show_default=False),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tables and figures of sweeps, from their cells alone: no model, no data."""
    from ia2.cli.output import print_json, start

    start(quiet)
    from ia2.sweeps.printing import Printed, make_report, print_tables

    made = make_report(folders, select, _list(benchmarks), _list(models), _list(sizes), _list(seeds))
    formats = [name for name, asked in (("markdown", markdown or not latex), ("latex", latex)) if asked]
    printed: Printed = print_tables(made, table, where_icl_works=where_icl_works)
    written = printed.write(output_dir, formats) if output_dir is not None else []
    drawn = printed.draw(figures) if figures is not None else []
    if json:
        print_json({**printed.to_dict(), "files": [str(path) for path in [*written, *drawn]]})
        return
    print(printed.text(formats), end="")
    if written or drawn:
        print(f"\nFiles: {', '.join(map(str, [*written, *drawn]))}")


def _list(given: str | None) -> list[str]:
    return [part.strip() for part in (given or "").split(",") if part.strip()]
