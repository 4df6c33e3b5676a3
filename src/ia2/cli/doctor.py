"""``ia2 doctor``."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ia2.cli.options import Json
from ia2.utils.wording import counted

if TYPE_CHECKING:
    from ia2.report.doctor.signatures import Diagnosis


def doctor(
    folders: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of `ia2 train`, `ia2 compare`, `ia2 curve`, finished or running; or seed-0 in one.",
            metavar="RUN...",
        ),
    ],
    json: Json = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Findings only: not which rules were checked.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit code 1 if there is a problem.")] = False,
) -> None:
    """What is wrong with a run, in words: findings, their evidence, and what to try next."""
    from ia2.cli.output import print_json, start

    start(quiet)
    from ia2.report.doctor.signatures import diagnose_all
    from ia2.utils.files import unchecked

    with unchecked(folders):
        found = [diagnosis for folder in folders for diagnosis in diagnose_all(folder)]
    problems = sum(diagnosis.count("problem") for diagnosis in found)
    if json:
        print_json({"problems": problems, "runs": [diagnosis.to_dict() for diagnosis in found]})
    else:
        for place, diagnosis in enumerate(found):
            _print(diagnosis, quiet, first=not place)
    if strict and problems:
        raise typer.Exit(1)


def _print(diagnosis: Diagnosis, quiet: bool, first: bool) -> None:
    from ia2.report.doctor.signatures import SEVERITIES

    if not first:
        print()
    counts = [(diagnosis.count(severity), severity) for severity in SEVERITIES]
    found = ", ".join(counted(n, word) for n, word in counts if n) or "nothing found"
    state = "finished" if diagnosis.finished else "not finished"
    _line(f"{diagnosis.folder} ({diagnosis.kind}, {state}): {found[0].upper()}{found[1:]}.")
    for finding in diagnosis.findings:
        where = f" ({finding.where})" if finding.where else ""
        print()
        _line(f"{finding.severity.upper()} {finding.rule}{where}")
        _line(finding.message, "  ")
        _line(f"Evidence: {finding.evidence}.", "  ")
        _line(f"Try: {finding.advice}.", "  ")
    if quiet:
        return
    if diagnosis.clear or diagnosis.untold or diagnosis.missing:
        print()
    if diagnosis.clear:
        _line(f"Checked, nothing found: {', '.join(diagnosis.clear)}.")
    reasons: dict[str, list[str]] = {}
    for rule, reason in diagnosis.untold.items():
        reasons.setdefault(reason, []).append(rule)
    for reason, rules in reasons.items():
        _line(f"Not judged: {', '.join(rules)}: {reason}.")
    if diagnosis.missing:
        _line(f"Still to come: {'; '.join(diagnosis.missing)}.")


def _line(text: str, indent: str = "") -> None:
    """Wrapped in a terminal; in a pipe one line, for `grep`."""
    import shutil
    import sys

    if not sys.stdout.isatty():
        print(indent + text)
        return
    width = max(40, min(shutil.get_terminal_size().columns, 110))
    print(
        textwrap.fill(
            text,
            width,
            initial_indent=indent,
            subsequent_indent=indent + "  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    )
