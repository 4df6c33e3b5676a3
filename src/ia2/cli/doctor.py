"""``ia2 doctor``, of a run, and ``ia2 env``, of the installation."""

from __future__ import annotations

import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ia2.cli.options import JSON, option
from ia2.utils.wording import counted

if TYPE_CHECKING:
    from ia2.report.doctor.diagnosis import Diagnosis

_FOLDERS = "Folders of `ia2 train`, `ia2 compare`, `ia2 curve`, finished or running; or seed-0 in one."
_ACCELERATE = (
    "Print where the configuration of accelerate of this name lies (ddp, fsdp2, zero3), and nothing else."
)


def doctor(
    folders: list[Path] = typer.Argument(..., help=_FOLDERS, metavar="RUN..."),
    json: bool = JSON,
    quiet: bool = option("Findings only: not which rules were checked.", "--quiet", "-q", default=False),
    strict: bool = option("Exit code 1 if there is a problem.", "--strict", default=False),
) -> None:
    """What is wrong with a run, in words: findings, their evidence, and what to try next."""
    from ia2.cli.output import print_json, start

    start(quiet)
    from ia2.report.doctor.diagnosis import diagnose_all
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
    from ia2.report.doctor.diagnosis import SEVERITIES

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
        for text in (finding.message, f"Evidence: {finding.evidence}.", f"Try: {finding.advice}."):
            _line(text, "  ")
    if quiet:
        return
    reasons: dict[str, list[str]] = {}
    for rule, reason in diagnosis.untold.items():
        reasons.setdefault(reason, []).append(rule)
    lines = [f"Checked, nothing found: {', '.join(diagnosis.clear)}."] if diagnosis.clear else []
    lines += [f"Not judged: {', '.join(rules)}: {reason}." for reason, rules in reasons.items()]
    lines += [f"Still to come: {'; '.join(diagnosis.missing)}."] if diagnosis.missing else []
    if lines:
        print()
    for line in lines:
        _line(line)


def _line(text: str, indent: str = "") -> None:
    """Wrapped in a terminal; in a pipe one line, for `grep`."""
    line = indent + text
    if sys.stdout.isatty():
        width = max(40, min(shutil.get_terminal_size().columns, 110))
        inner = indent + "  "
        line = textwrap.fill(
            line, width, subsequent_indent=inner, break_long_words=False, break_on_hyphens=False
        )
    print(line)


def env(json: bool = JSON, accelerate: str | None = option(_ACCELERATE, metavar="NAME")) -> None:
    """Versions, machine and caches: what to paste into a bug report.

    Several GPUs: accelerate launch --config_file "$(ia2 env --accelerate ddp)" --num_processes 8 -m ia2 …
    """
    if accelerate is not None:
        print(_accelerate_config(accelerate))
        return
    from ia2.cli.output import print_json, start
    from ia2.experiment.run_folder import machine, versions
    from ia2.models.gguf import installed_packaged_models
    from ia2.utils.files import cache_dir

    start(True)
    found = {
        "versions": versions(),
        "machine": machine(),
        "cache": str(cache_dir()),
        "packaged_models": installed_packaged_models(),
    }
    if json:
        print_json(found)
        return
    for section, values in found.items():
        print(f"{section}:")
        for name, value in values.items() if isinstance(values, dict) else [("", values)]:
            print(f"  {name + ': ' if name else ''}{value}")


def _accelerate_config(name: str) -> Path:
    from ia2.utils.errors import ConfigError, suggest

    folder = Path(__file__).parents[1] / "accelerate_configs"
    names = sorted(file.stem for file in folder.glob("*.yaml"))
    if name not in names:
        hint = suggest(name, names)
        raise ConfigError(f"--accelerate: there is no configuration '{name}', only {', '.join(names)}.{hint}")
    return folder / f"{name}.yaml"
