"""``ia2 analyze``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ia2.cli.options import (
    BaseModelNow,
    ContextFunctions,
    Json,
    Parsers,
    Quiet,
    TrustRemoteCode,
    named_code,
)


def analyze(
    folders: Annotated[
        list[Path],
        typer.Argument(
            help="Finished folders of `ia2 train` or `ia2 compare` on one base model; or seed-0 in one.",
            metavar="RUN...",
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="Labelled rows to look at, in the runs' format. By default the runs' own test rows.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Split of --data, where it is a hub data set or a folder.", show_default=False),
    ] = None,
    data_config: Annotated[
        str | None,
        typer.Option(help="Configuration of --data, where it is one of these.", show_default=False),
    ] = None,
    parts: Annotated[
        str | None,
        typer.Option(
            help="What to analyse, comma-separated: activations, weights, lens, heads, neurons (these by "
            "default), causal, effects; or all. The last two take minutes an adapter.",
            show_default=False,
        ),
    ] = None,
    adapters: Annotated[
        str | None,
        typer.Option(help="Look at these alone, comma-separated: sft,ia2-sft.", show_default=False),
    ] = None,
    controls: Annotated[
        bool,
        typer.Option(
            help="Run what similarities are to be compared with: ICL with other demonstrations, other seeds, "
            "adapters that are shown the demonstrations. Most of the passes."
        ),
    ] = True,
    max_queries: Annotated[
        int, typer.Option(help="Look at no more queries of each training set than this, drawn once.", min=2)
    ] = 200,
    causal_queries: Annotated[
        int, typer.Option(help="Queries of each training set that the causal check is made on.", min=2)
    ] = 24,
    text: Annotated[
        str | None,
        typer.Option(
            help="Of effects: plain text on which forgetting is measured: paragraphs in a file, or JSONL "
            "with a column text. By default 40 paragraphs that come with ia2.",
            show_default=False,
        ),
    ] = None,
    benchmarks: Annotated[
        str | None,
        typer.Option(
            help="Of effects: other benchmarks on which forgetting is measured, comma-separated.",
            show_default=False,
        ),
    ] = None,
    data_dir: Annotated[
        str | None,
        typer.Option(help="Folder of mirrors of these benchmarks.", show_default=False),
    ] = None,
    model: BaseModelNow = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, … By default as the runs.", show_default=False)
    ] = None,
    trust_remote_code: TrustRemoteCode = None,
    parser: Parsers = None,
    context_function: ContextFunctions = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder for analysis.json. By default the first run's, where `ia2 report` finds it.",
            show_default=False,
        ),
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Draw the figures into this folder (SVG).", show_default=False)
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What happened inside trained adapters: activations, weights, heads and neurons against ICL's."""
    from ia2.cli.output import print_json, start

    start(quiet, folders=[output_dir, figures])
    from ia2.analysis.analyze import DEFAULT_PARTS, PARTS, AnalysisSettings
    from ia2.analysis.analyze import analyze as run
    from ia2.experiment.run_folder import ANALYSIS_FILE
    from ia2.report.analysis import analysis_figures, analysis_tables, analysis_verdict
    from ia2.report.figures.style import NO_MATPLOTLIB, matplotlib_is_there
    from ia2.utils.format import markdown
    from ia2.utils.logging import logger

    named = DEFAULT_PARTS if parts is None else tuple(PARTS) if parts == "all" else _listed(parts)
    folder = output_dir or folders[0]
    code = named_code(trust_remote_code, parser, context_function)
    result = run(
        folders,
        AnalysisSettings(named, controls, causal_queries, text, _listed(benchmarks), data_dir, code),
        data=data,
        split=split,
        data_config=data_config,
        max_queries=max_queries,
        adapters=_listed(adapters),
        device=device,
        base=model,
        output_dir=folder,
    )
    files = [folder / ANALYSIS_FILE]
    if figures is not None and not matplotlib_is_there():
        logger.info("No figures: %s", NO_MATPLOTLIB)
    elif figures is not None:
        files += [figure.save(figures / f"{figure.name}.svg") for figure in analysis_figures(result)]
    if json:
        print_json(result)
        return
    for table in analysis_tables(result):
        print(markdown(table))
    for line in analysis_verdict(result):
        print(line)
    print(f"\nFiles: {', '.join(map(str, files))}")
    if output_dir is None:
        print(f"Report: ia2 report {folder}")


def _listed(given: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (given or "").split(",") if part.strip())
