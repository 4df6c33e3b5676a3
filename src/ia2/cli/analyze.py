"""``ia2 analyze``."""

from __future__ import annotations

from pathlib import Path

import typer

from ia2.cli.options import (
    BASE_MODEL,
    CONTEXT_FUNCTIONS,
    FIGURES,
    JSON,
    PARSERS,
    QUIET,
    TRUST,
    listed,
    named_code,
    option,
)

_FOLDERS = "Finished folders of `ia2 train` or `ia2 compare` on one base model; or seed-0 in one."
_DATA = "Labelled rows to look at, in the runs' format. By default the runs' own test rows."
_PARTS = (
    "What to analyse, comma-separated: activations, weights, lens, heads, neurons (these by default), "
    "causal, effects; or all. The last two take minutes an adapter."
)
_CONTROLS = (
    "Run what similarities are to be compared with: ICL with other demonstrations, other seeds, adapters "
    "that are shown the demonstrations. Most of the passes."
)
_MAX_QUERIES = "Look at no more queries of each training set than this, drawn once."
_CAUSAL_QUERIES = "Queries of each training set that the causal check is made on."
_TEXT = (
    "Of effects: plain text on which forgetting is measured: paragraphs in a file, or JSONL with a column "
    "text. By default 40 paragraphs that come with ia2."
)
_BENCHMARKS = "Of effects: other benchmarks on which forgetting is measured, comma-separated."
_OUTPUT_DIR = "Folder for analysis.json. By default the first run's, where `ia2 report` finds it."


def analyze(
    folders: list[Path] = typer.Argument(..., metavar="RUN...", help=_FOLDERS),
    data: str | None = option(_DATA),
    split: str | None = option("Split of --data, where it is a hub data set or a folder."),
    data_config: str | None = option("Configuration of --data, where it is one of these."),
    parts: str | None = option(_PARTS),
    adapters: str | None = option("Look at these alone, comma-separated: sft,ia2-sft."),
    controls: bool = typer.Option(True, help=_CONTROLS),
    max_queries: int = option(_MAX_QUERIES, default=200, min=2),
    causal_queries: int = option(_CAUSAL_QUERIES, default=24, min=2),
    text: str | None = option(_TEXT),
    benchmarks: str | None = option(_BENCHMARKS),
    data_dir: str | None = option("Folder of mirrors of these benchmarks."),
    model: str | None = BASE_MODEL,
    device: str | None = option("cpu, cuda, … By default as the runs."),
    trust_remote_code: bool | None = TRUST,
    parser: list[str] | None = PARSERS,
    context_function: list[str] | None = CONTEXT_FUNCTIONS,
    output_dir: Path | None = option(_OUTPUT_DIR),
    figures: Path | None = FIGURES,
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """What happened inside trained adapters: activations, weights, heads and neurons against ICL's."""
    from ia2.cli.output import print_json, start

    start(quiet, folders=[output_dir, figures])
    from ia2.analysis.analyze import DEFAULT_PARTS, SECTIONS, AnalysisSettings
    from ia2.analysis.analyze import analyze as run
    from ia2.experiment.run_folder import ANALYSIS_FILE
    from ia2.report.analysis import analysis_figures, analysis_tables, analysis_verdict
    from ia2.report.figures.style import drawable
    from ia2.utils.format import markdown

    chosen = DEFAULT_PARTS if parts is None else tuple(SECTIONS) if parts == "all" else tuple(listed(parts))
    folder = output_dir or folders[0]
    code = named_code(trust_remote_code, parser, context_function)
    result = run(
        folders,
        AnalysisSettings(chosen, controls, causal_queries, text, tuple(listed(benchmarks)), data_dir, code),
        data=data,
        split=split,
        data_config=data_config,
        max_queries=max_queries,
        adapters=tuple(listed(adapters)),
        device=device,
        base=model,
        output_dir=folder,
    )
    files = [folder / ANALYSIS_FILE]
    if figures is not None and drawable():
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
