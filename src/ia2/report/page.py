"""One HTML file on runs: whole in itself, readable without a network, without JavaScript, and on paper."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ia2.report.analysis import analysis_figures, read_analysis
from ia2.report.data import MAX_ROWS, Run, read_run
from ia2.report.figures.style import NO_MATPLOTLIB, Figure, matplotlib_is_there
from ia2.report.sections import SHOWN, Section, analysis_section, machine_facts, run_section
from ia2.utils.errors import ConfigError
from ia2.utils.files import write_text
from ia2.utils.logging import logger, muted

if TYPE_CHECKING:
    from ia2.report.sweep.printing import Printed

_TEMPLATES = Path(__file__).parent / "templates"


def try_report(folder: Path) -> Path | None:
    """``report.html`` in a run's folder, if all that it takes is installed."""
    if not matplotlib_is_there() or importlib.util.find_spec("jinja2") is None:
        return None
    return write_report([read_run(folder)], None, folder / "report.html")


def write_report(runs: Sequence[Run], sweep: Printed | None, output: Path) -> Path:
    """Write the page on runs, and on the cells of sweeps.

    Args:
        runs: finished runs.
        sweep: overview, tables and figures of sweeps.
        output: the file.

    Raises:
        ConfigError: jinja2 is missing.
        RunFolderError: the file cannot be written.
    """
    write_text(output, page(runs, sweep))
    return output


def page(runs: Sequence[Run], sweep: Printed | None = None) -> str:
    """The page as text.

    Raises:
        ConfigError: jinja2 is missing.
    """
    if importlib.util.find_spec("jinja2") is None:
        raise ConfigError("a page needs jinja2. pip install 'ia2[report]' brings it.")
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    drawable = matplotlib_is_there()
    if not drawable:
        logger.info("No figures: %s", NO_MATPLOTLIB)
    sections = []
    for run in runs:
        sections.append(run_section(run, _figures(run) if drawable else []))
        if (found := read_analysis(run.folder)) is not None:
            sections.append(analysis_section(run.name, found, analysis_figures(found) if drawable else []))
    if sweep is not None:
        sections.append(_sweep_section(sweep, drawable))
    figures = [[(figure, figure.pictures()) for figure in section.figures] for section in sections]
    style, script = ((_TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    # the autoescape holds for every value; only our own files are markup
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    titles = [section.title for section in sections]
    return environment.get_template("report.html").render(
        title=titles[0] if len(titles) == 1 else f"{titles[0]} and {len(titles) - 1} more",
        sections=list(zip(sections, figures, strict=True)),
        style=Markup(style),
        script=Markup(script),
        policy=_policy(style, script),
        drawable=drawable,
        no_matplotlib=NO_MATPLOTLIB,
        shown=SHOWN,
        limit=MAX_ROWS,
    )


def _policy(style: str, script: str) -> str:
    """Our own style and script, known by their digests, and pictures in the page; no request of any kind."""
    style_mark, script_mark = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)
    )
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{style_mark}'; "
        f"script-src 'sha256-{script_mark}'; base-uri 'none'; form-action 'none'"
    )


def _figures(run: Run) -> list[Figure]:
    from ia2.report.figures.run_figures import run_figures

    return run_figures(run)


def _sweep_section(printed: Printed, drawable: bool) -> Section:
    from ia2.report.sweep.printing import overview_lines, print_tables, verdict_lines
    from ia2.report.sweep.sweep_figures import sweep_figures

    report = printed.report
    with muted():
        every = print_tables(report.where(icl_works=False), "all").tables
    verdict = verdict_lines(report)
    first = printed.tables
    return Section(
        report.results.name,
        "sweep",
        verdict,
        [line for line in overview_lines(report) if line not in verdict],
        first,
        sweep_figures(report) if drawable else [],
        [
            ("Folders", ", ".join(Path(folder).resolve().name for folder in report.results.folders)),
            *(
                fact
                for facts in report.results.facts
                for fact in machine_facts(facts.get("machine"), facts.get("versions"))
            ),
        ],
        [],
        more=[table for table in every if table not in first],
        notes=["Cells of a sweep keep no queries, so there are no per-example predictions here."],
    )
