"""Signatures of what goes wrong: each rule is a function from a run's facts to findings.

A rule says what it saw in numbers, and what to try next. A rule that a run cannot tell about
says why (:class:`CannotTell`). To add one: a function in ``training_rules.py`` or ``result_rules.py`` and its
line in ``RULES``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ia2.experiment.run_folder import find_runs
from ia2.report.doctor import result_rules, training_rules
from ia2.report.doctor.facts import Facts
from ia2.report.doctor.findings import SEVERITIES, CannotTell, Finding, Severity
from ia2.report.doctor.reading import read_facts
from ia2.utils.errors import RunFolderError
from ia2.utils.files import finite

__all__ = ["RULES", "SEVERITIES", "CannotTell", "Diagnosis", "Finding", "diagnose", "diagnose_all", "judge"]

Rule = Callable[[Facts], Iterable[Finding]]


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
    return [judge(read_facts(run, part)) for run, part in find_runs(Path(folder))]


def judge(facts: Facts) -> Diagnosis:
    """Judge facts by all rules."""
    findings: list[Finding] = []
    clear, untold = [], {}
    for name, rule in RULES.items():
        try:
            found = list(rule(facts))
        except CannotTell as reason:
            untold[name] = str(reason)
            continue
        findings += found
        if not found:
            clear.append(name)
    # the sort is stable: within a severity, the order of the rules
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return Diagnosis(
        facts.folder, facts.kind, facts.finished, facts.missing, tuple(findings), tuple(clear), untold
    )


RULES: dict[str, Rule] = {
    "icl-at-chance": training_rules.icl_at_chance,
    "diverged": training_rules.diverged,
    "alignment-not-learnt": training_rules.alignment_not_learnt,
    "rate-at-edge": training_rules.rate_at_edge,
    "dev-too-small": training_rules.dev_too_small,
    "asim-no-gain": result_rules.asim_no_gain,
    "sft-undid-alignment": result_rules.sft_undid_alignment,
    "alignment-not-carried-over": result_rules.alignment_not_carried_over,
    "labels-of-several-tokens": result_rules.labels_of_several_tokens,
    "worse-than-base": result_rules.worse_than_base,
    "worse-than-guessing": result_rules.worse_than_guessing,
    "worse-than-sft": result_rules.worse_than_sft,
    "label-missing": training_rules.label_missing,
    "texts-hardly-read": training_rules.texts_hardly_read,
    "repeated-rows": training_rules.repeated_rows,
    "evaluated-on-dev": training_rules.evaluated_on_dev,
}
"""Every rule by its id, in the order in which findings of one severity are shown."""
