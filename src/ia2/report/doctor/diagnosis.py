"""What is wrong with a run: its facts, judged by every rule."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ia2.experiment.run_folder import find_runs
from ia2.report.doctor import result_rules, training_rules
from ia2.report.doctor.facts import CannotTell, Facts, Finding, Severity
from ia2.report.doctor.reading import read_facts
from ia2.utils.errors import RunFolderError
from ia2.utils.files import finite

RULES = {rule.__name__.replace("_", "-"): rule for rule in (*training_rules.RULES, *result_rules.RULES)}
"""Every rule by its id, in the order in which findings of one severity are shown."""

SEVERITIES: tuple[Severity, ...] = ("problem", "warning", "note")


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with one run.

    Attributes:
        folder: of the run.
        kind: ``train`` or ``compare``.
        finished: whether the run has come to its end.
        missing: what is still to come.
        findings: problems first.
        clear: ids of the rules that found nothing.
        untold: id → why it could not be judged.
    """

    folder: Path
    kind: str
    finished: bool
    missing: tuple[str, ...]
    findings: tuple[Finding, ...]
    clear: tuple[str, ...]
    untold: dict[str, str]

    def count(self, severity: Severity) -> int:
        """Findings of this severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        found: dict[str, Any] = finite({**asdict(self), "folder": str(self.folder)})
        return found


def diagnose(folder: str | Path) -> Diagnosis:
    """Judge one run by all rules.

    Args:
        folder: of a run of ``ia2 train`` or ``ia2 compare``, finished or not, or a round's in one.

    Raises:
        RunFolderError: there is no such run, or several (a curve: see :func:`diagnose_all`).
    """
    found = diagnose_all(folder)
    if len(found) > 1:
        raise RunFolderError(f"{folder}: {len(found)} runs; diagnose_all() judges each.")
    return found[0]


def diagnose_all(folder: str | Path) -> list[Diagnosis]:
    """Judge every run that a folder stands for: one, or each size of a curve.

    Raises:
        RunFolderError: there is none.
    """
    return [_judge(read_facts(run, part)) for run, part in find_runs(Path(folder))]


def _judge(facts: Facts) -> Diagnosis:
    findings: list[Finding] = []
    clear, untold = [], {}
    for name, rule in RULES.items():
        try:
            found = [replace(finding, rule=name) for finding in rule(facts)]
        except CannotTell as reason:
            untold[name] = str(reason)
            continue
        findings += found
        if not found:
            clear.append(name)
    # the sort is stable: within a severity, the order of the rules
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    missing = tuple(facts.missing)
    return Diagnosis(facts.folder, facts.kind, not missing, missing, tuple(findings), tuple(clear), untold)
