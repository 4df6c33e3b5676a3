"""What a page says of each run, ready to be laid out: sentences, tables, figures, rows, findings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia2.config.recipes import describe
from ia2.report.analysis import analysis_heading, analysis_tables, analysis_verdict
from ia2.report.data import MAX_QUERY, Answer, Row, Run
from ia2.report.figures.style import Figure, numbers_table
from ia2.report.printing import tables, verdict
from ia2.report.tables import MEASURES, comparison_lines, comparison_table, unlike
from ia2.report.verdict import METHOD
from ia2.utils.errors import UserError
from ia2.utils.files import digest
from ia2.utils.format import Table
from ia2.utils.wording import estimate, rows_learnt_from

if TYPE_CHECKING:
    from ia2.report.doctor.diagnosis import Diagnosis

SHOWN = 200
"""Rows of predictions that are printed, and shown before all others."""


@dataclass(frozen=True)
class Rows:
    """Per-example predictions.

    Attributes:
        arms: columns.
        rows: in the file.
        total: in the run.
        parts: whether rows are of several comparisons.
        choices: value and words of each filter.
        agreement: who was right where the other was not.
        note: what right and confidence mean here.
    """

    arms: list[str]
    rows: list[Row]
    total: int
    parts: list[str]
    seeds: list[int]
    choices: list[tuple[str, str]]
    agreement: Table
    note: str

    def marks(self, row: Row) -> str:
        """A sign an arm: ``1`` right, ``0`` wrong, ``-`` neither."""
        found = (row.answers.get(arm) for arm in self.arms)
        return "".join("-" if a is None or a.correct is None else str(int(a.correct)) for a in found)

    def differs(self, row: Row) -> bool:
        """Whether two arms predict different things."""
        return len({answer.predicted for answer in row.answers.values()}) > 1

    def query(self, row: Row) -> str:
        """The query, cut where it is very long."""
        if len(row.query) <= MAX_QUERY:
            return row.query
        return f"{row.query[:MAX_QUERY]} … ({len(row.query) - MAX_QUERY:,} more characters)"


@dataclass(frozen=True)
class Doctor:
    """What the doctor says.

    Attributes:
        diagnoses: of the run, or of each size of a curve.
        refusal: why it could not read the run; empty where it could.
    """

    diagnoses: list[Diagnosis]
    refusal: str = ""


@dataclass(frozen=True)
class Section:
    """One run on the page.

    Attributes:
        title: heading.
        what: the kind of run in words.
        verdict: sentences.
        about: what was run, sentences.
        recipes: name and description of each.
        tables: the results; the first is the table.
        more: further tables, folded away.
        figures: to be drawn.
        notes: what could not be shown and why.
        doctor: what it found; None where it does not apply.
        rows: per-example predictions; None without any.
        environment: term and value.
        settings: name and value of every setting given.
    """

    title: str
    what: str
    verdict: list[str]
    about: list[str]
    tables: list[Table]
    figures: list[Figure]
    environment: list[tuple[str, str]]
    settings: list[tuple[str, str]]
    recipes: list[tuple[str, str]] = field(default_factory=list)
    more: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    doctor: Doctor | None = None
    rows: Rows | None = None


def run_section(run: Run, figures: Sequence[Figure]) -> Section:
    """Everything on one run; ``figures`` are those that can be drawn."""
    if run.kind == "train":
        return _training(run, list(figures))
    return _curve(run, list(figures)) if run.kind == "curve" else _comparison(run, list(figures))


def _comparison(run: Run, figures: list[Figure]) -> Section:
    summary = run.summary
    config = summary["config"]
    recipes = [(name, entry.get("description", "")) for name, entry in summary["recipes"].items()]
    table = comparison_table(summary)
    bare = Table(table.name, table.title, table.columns, table.rows, tuple(comparison_lines(summary)[1:]))
    return Section(
        run.name,
        "comparison of recipes",
        verdict(run),
        comparison_lines(summary)[:1],
        [bare, *_differences(summary)],
        figures,
        _environment(run, summary, "compare"),
        _settings(config),
        recipes=recipes,
        notes=_caveats(run),
        doctor=_examined(run.folder),
        rows=_rows(run),
    )


def _curve(run: Run, figures: list[Figure]) -> Section:
    summary = run.summary
    parts = {size: part.summary for size, part in run.parts.items()}
    first = next(iter(parts.values()), None)
    return Section(
        run.name,
        "curve over the number of training examples",
        verdict(run),
        [f"Model {summary['model']}; {summary['title']}; N = {', '.join(map(str, summary['sizes']))}."],
        tables(run),
        figures,
        _environment(run, summary, "curve"),
        _settings(summary["config"]),
        recipes=[(n, e.get("description", "")) for n, e in first["recipes"].items()] if first else [],
        doctor=_examined(run.folder),
        more=[comparison_table(part) for part in parts.values()],
        notes=["Each N is a comparison of its own, with figures: run `ia2 report` on its folder."],
        rows=_rows(run),
    )


def _training(run: Run, figures: list[Figure]) -> Section:
    metrics, facts = run.summary, run.facts
    about = (
        f"Model {metrics['model']}; recipe {metrics['recipe']}: "
        f"{describe(metrics['recipe'], facts['config'].get('schedules') or {})}; "
        f"{rows_learnt_from(metrics)}; learning rate {metrics['learning_rate']:g}, {metrics['selected_by']}."
    )
    if metrics.get("diverged"):
        about += f" At {'; '.join(metrics['diverged'])} training diverged."
    if "similarity_to_icl" in metrics:
        about += f" asim to ICL {metrics['similarity_to_icl']['asim']:.3f}."
    return Section(
        run.name,
        "adapter",
        verdict(run),
        [about],
        tables(run),
        figures,
        _environment(run, metrics, "train"),
        _settings(facts["config"]),
        doctor=_examined(run.folder),
        rows=_rows(run),
    )


def analysis_section(name: str, result: Mapping[str, Any], figures: Sequence[Figure]) -> Section:
    """Everything on what ``ia2 analyze`` found in a run; ``figures`` are those that can be drawn."""
    verdict = analysis_verdict(result)
    found = analysis_tables(result)
    return Section(
        f"Inside {name}",
        "analysis of activations and weights",
        verdict[:2],
        [f"{analysis_heading(result)}.", *verdict[2:]],
        found[:1],
        list(figures),
        [
            ("Again", f"ia2 analyze {' '.join(result['runs'])} --parts {','.join(result['parts'])}"),
            ("Queries", f"{result['data']['name']}, {result['data']['fingerprint']}"),
            *machine_facts(result.get("machine"), result.get("versions")),
        ],
        [],
        more=found[1:],
    )


def _examined(folder: Path) -> Doctor:
    from ia2.report.doctor.diagnosis import diagnose_all

    try:
        return Doctor(list(diagnose_all(folder)))
    except UserError as error:
        return Doctor([], str(error))
    except (KeyError, TypeError, ValueError) as error:
        # runs of earlier versions lack what later rules look at; the rest of the page is worth having
        return Doctor([], f"it is of another version of ia2 ({type(error).__name__}: {error}).")


def _differences(summary: Mapping[str, Any]) -> list[Table]:
    rows = [
        [
            name,
            *(estimate(found.get(measure), signed=True) for measure in MEASURES),
            unlike(found).removeprefix("; "),
        ]
        for name, found in {**summary.get("headroom", {}), **summary["differences"]}.items()
    ]
    if not rows:
        return []
    columns = ["difference", "accuracy", "NLL", "Brier", "ECE", "answers"]
    title = "Paired differences (accuracy: above zero is better; all others: below)"
    return [numbers_table("differences", title, columns, rows)]


def _caveats(run: Run) -> list[str]:
    summary, notes = run.summary, []
    if len(summary["design"]["seeds"]) == 1:
        notes.append(
            "One draw of training examples: there are no intervals, and another draw may say something else."
        )
    if not run.evaluations:
        notes.append(
            "Only the summary was kept: reliability, training curves and per-example predictions need the "
            "run's whole folder."
        )
    if not any(entry.get("tokens_per_query") for entry in summary["recipes"].values()):
        notes.append("This run did not count tokens per query, so there is no figure of cost; newer runs do.")
    return notes


# ---------------------------------------------------------------------------------------------- rows


def _rows(run: Run) -> Rows | None:
    if not run.rows:
        return None
    arms = list(dict.fromkeys(arm for row in run.rows for arm in row.answers))
    labelled = _labelled(run)
    note = (
        "Right means that the most probable label is the true one, and confidence is its share of the labels."
        if labelled
        else "Confidence is the probability of the whole answer."
    )
    return Rows(
        arms,
        run.rows,
        run.num_rows,
        list(dict.fromkeys(row.part for row in run.rows if row.part)),
        sorted({row.seed for row in run.rows}),
        list(_choices(arms)),
        _agreement(arms, run.rows),
        note,
    )


def _labelled(run: Run) -> bool:
    if run.kind == "train":
        return run.facts["task"]["kind"] == "classification"
    first = run if run.kind == "compare" else next(iter(run.parts.values()))
    return bool(first.summary["design"]["task"] == "classification")


def _choices(arms: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Filters: ``x`` differ, ``m`` mixed, ``n`` none right, ``w:3`` wrong, ``r:3:1`` right where 1 is not."""
    yield "", "all rows"
    place = {arm.split("@")[0]: n for n, arm in reversed(list(enumerate(arms)))}
    if len(arms) > 1:
        yield "x", "the methods disagree"
        yield "m", "some are right, some wrong"
        yield "n", "all are wrong"
    for other in ("sft", "icl"):
        if METHOD in place and other in place:
            for one, two in ((place[METHOD], place[other]), (place[other], place[METHOD])):
                yield f"r:{one}:{two}", f"{arms[one]} is right, {arms[two]} wrong"
    for n, arm in enumerate(arms):
        yield f"w:{n}", f"{arm} is wrong"


def _agreement(arms: Sequence[str], rows: Sequence[Row]) -> Table:
    """The first arm of the method (else the last arm) against every other."""
    first = next((arm for arm in arms if arm.split("@")[0] == METHOD), arms[-1])
    found = []
    for other in arms:
        pairs = [(_right(row.answers.get(first)), _right(row.answers.get(other))) for row in rows]
        known = [pair for pair in pairs if None not in pair]
        if other == first or not known:
            continue
        counts = [known.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))]
        found.append([other, *(str(count) for count in counts)])
    columns = ["recipe", "both right", f"only {first} right", "only this one right", "both wrong"]
    return numbers_table(
        "agreement", f"Rows that {first} and each other recipe answer rightly", columns, found
    )


def _right(answer: Answer | None) -> bool | None:
    return None if answer is None else answer.correct


# --------------------------------------------------------------------------------------- environment


def _environment(run: Run, summary: Mapping[str, Any], command: str) -> list[tuple[str, str]]:
    facts = run.facts
    found = [
        ("Folder", run.name),
        ("Again", f"ia2 {command} --config ia2_config.yaml --output-dir NEW, with the file in this folder"),
        ("Seeds", _seeds(run, summary)),
        *((f"Data: {name}", str(mark)) for name, mark in _fingerprints(summary, facts) if mark),
        *machine_facts(summary.get("machine"), summary.get("versions") or facts.get("versions")),
    ]
    if run.kind == "curve" or not (run.folder / "ia2_config.yaml").is_file():
        del found[1]
    return found


def machine_facts(
    machine: Mapping[str, Any] | None, versions: Mapping[str, str] | None
) -> Iterator[tuple[str, str]]:
    """Machine and versions, as far as they are known."""
    if machine:
        devices = ", ".join(machine.get("accelerators") or []) or "no accelerator"
        yield (
            "Machine",
            f"{machine.get('platform')}, {machine.get('cpu_cores')} cores ({machine.get('threads')} threads "
            f"used), {machine.get('memory_gb')} GB, {devices}",
        )
    if versions:
        yield "Versions", ", ".join(f"{name} {number}" for name, number in versions.items())


def _seeds(run: Run, summary: Mapping[str, Any]) -> str:
    if run.kind == "train":
        return str(run.facts["config"]["seed"])
    seeds = summary["seeds"] if run.kind == "curve" else summary["design"]["seeds"]
    return ", ".join(map(str, seeds))


def _fingerprints(summary: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and SHA-256 digests (first 16 digits) of rows."""
    data = summary.get("data")
    if data:
        yield data["name"], data["fingerprint"]
        if data.get("test"):
            yield data["test"]["name"], data["test"]["fingerprint"]
    else:
        for name, known in facts.get("data", {}).items():
            yield name, known if isinstance(known, str) else digest(known)


def _settings(config: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Dotted names and values of what is set; of files only the name, since folders are nobody's business."""
    found: list[tuple[str, str]] = []
    for name, value in config.items():
        if isinstance(value, dict) and value and name != "label_map":
            found += _settings(value, f"{above}{name}.")
        elif value not in (None, "", [], {}):
            found.append((above + name, _shown(value)))
    return found


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} = {inner}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    text = str(value)
    return f"…/{Path(text).name}" if isinstance(value, str) and Path(text).is_absolute() else text
