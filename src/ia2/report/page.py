"""One HTML file on runs: whole in itself, readable without a network, without JavaScript, and on paper."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ia2.report.analysis import analysis_figures
from ia2.report.figures import style as looks
from ia2.report.results import MAX_ROWS, Run, read_run
from ia2.report.sections import analysis_section, run_section, sweep_section
from ia2.utils.errors import ConfigError
from ia2.utils.files import write_text

if TYPE_CHECKING:
    from ia2.report.sweep.printing import Printed

SHOWN = 200
"""Rows of predictions that are printed, and shown before all others."""

_TEMPLATES = Path(__file__).parent / "templates"


def try_report(folder: Path) -> Path | None:
    """``report.html`` in a run's folder, if all that it takes is installed."""
    if not looks.matplotlib_is_there() or importlib.util.find_spec("jinja2") is None:
        return None
    return write_report([read_run(folder)], None, folder / "report.html")


def write_report(runs: Sequence[Run], sweep: Printed | None, output: Path) -> Path:
    """Write the page on runs, and on the cells of sweeps.

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

    from ia2.report.figures.runs import run_figures

    drawn = looks.drawable()
    sections = []
    for run in runs:
        sections.append(run_section(run, run_figures(run) if drawn else []))
        if run.analysis is not None:
            figures = analysis_figures(run.analysis) if drawn else []
            sections.append(analysis_section(run.name, run.analysis, figures))
    if sweep is not None:
        sections.append(sweep_section(sweep, drawn))
    style, script = ((_TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    # the autoescape holds for every value; only our own files are markup
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    titles = [section.title for section in sections]
    return environment.get_template("report.html").render(
        title=titles[0] if len(titles) == 1 else f"{titles[0]} and {len(titles) - 1} more",
        sections=sections,
        style=Markup(style),
        script=Markup(script),
        policy=_policy(style, script),
        drawable=drawn,
        no_matplotlib=looks.NO_MATPLOTLIB,
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
