"""What a page says of each run, ready to be laid out: sentences, tables, figures, rows, findings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia2.config.recipes import METHOD, describe
from ia2.evaluation.tables import MEASURES, comparison_notes, comparison_table, unlike
from ia2.report.analysis import analysis_heading, analysis_tables, analysis_verdict
from ia2.report.figures.style import Figure
from ia2.report.results import Run
from ia2.report.verdict import verdict
from ia2.utils.errors import UserError
from ia2.utils.files import digest
from ia2.utils.format import Table, fill
from ia2.utils.logging import muted
from ia2.utils.wording import estimate, rows_learnt_from

if TYPE_CHECKING:
    from ia2.report.sweep.printing import Printed

MAX_QUERY = 2_000
"""Characters of a query that a page holds."""

_KINDS = {
    "compare": "comparison of recipes",
    "curve": "curve over the number of training examples",
    "train": "adapter",
}


@dataclass(frozen=True)
class PageSection:
    """One run, analysis or sweep on the page.

    Attributes:
        about: what was run, sentences.
        recipes: name and description of each.
        more: further tables, folded away.
        notes: what could not be shown and why.
        doctor: ``diagnoses`` of the run, or of each size of a curve, and ``refusal``, why it could not read
            the run; None where it does not apply.
        rows: per-example predictions; None without any.
    """

    title: str
    kind: str
    verdict: list[str]
    about: list[str]
    tables: list[Table]
    figures: list[Figure]
    environment: list[tuple[str, str]]
    settings: list[tuple[str, str]] = field(default_factory=list)
    recipes: list[tuple[str, str]] = field(default_factory=list)
    more: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    doctor: dict[str, Any] | None = None
    rows: dict[str, Any] | None = None


def run_section(run: Run, figures: list[Figure]) -> PageSection:
    """Everything on one run; ``figures`` are those that can be drawn."""
    summary = run.summary
    tables = [] if run.table is None else [run.table]
    more: list[Table] = []
    notes: list[str] = []
    compared = next((part.summary for part in (run, *run.parts.values()) if "recipes" in part.summary), None)
    if run.kind == "compare":
        about, *below = comparison_notes(summary)
        tables = [replace(table, notes=tuple(below)) for table in tables] + _differences(summary)
        notes = list(_caveats(run))
    elif run.kind == "curve":
        about = f"Model {summary['model']}; {summary['title']}; N = {', '.join(map(str, summary['sizes']))}."
        more = [comparison_table(part.summary) for part in run.parts.values()]
        notes = ["Each N is a comparison of its own, with figures: run `ia2 report` on its folder."]
    else:
        about = _about_training(run)
    return PageSection(
        run.name,
        _KINDS[run.kind],
        verdict(run),
        [about],
        tables,
        figures,
        list(_environment(run)),
        list(_settings(run.facts["config"] if run.kind == "train" else summary["config"])),
        [(name, entry.get("description", "")) for name, entry in compared["recipes"].items()]
        if compared
        else [],
        more,
        notes,
        _examined(run.folder),
        _predictions(run, compared),
    )


def analysis_section(name: str, result: Mapping[str, Any], figures: list[Figure]) -> PageSection:
    """Everything on what ``ia2 analyze`` found in a run; ``figures`` are those that can be drawn."""
    sentences, tables = analysis_verdict(result), analysis_tables(result)
    return PageSection(
        f"Inside {name}",
        "analysis of activations and weights",
        sentences[:2],
        [f"{analysis_heading(result)}.", *sentences[2:]],
        tables[:1],
        figures,
        [
            ("Again", f"ia2 analyze {' '.join(result['runs'])} --parts {','.join(result['parts'])}"),
            ("Queries", f"{result['data']['name']}, {result['data']['fingerprint']}"),
            *_machine(result.get("machine"), result.get("versions")),
        ],
        more=tables[1:],
    )


def sweep_section(printed: Printed, drawn: bool) -> PageSection:
    """Overview, tables and figures of sweeps."""
    from ia2.report.sweep.printing import overview_lines, print_tables, verdict_lines
    from ia2.report.sweep.sweep_figures import sweep_figures

    report = printed.report
    sentences = verdict_lines(report)
    with muted():
        every = print_tables(report.where(icl_works=False), "all").tables
    machines = [
        fact
        for facts in report.results.facts
        for fact in _machine(facts.get("machine"), facts.get("versions"))
    ]
    return PageSection(
        report.results.name,
        "sweep",
        sentences,
        [line for line in overview_lines(report) if line not in sentences],
        printed.tables,
        sweep_figures(report) if drawn else [],
        [("Folders", ", ".join(Path(folder).resolve().name for folder in report.results.folders)), *machines],
        more=[table for table in every if table not in printed.tables],
        notes=["Cells of a sweep keep no queries, so there are no per-example predictions here."],
    )


def _about_training(run: Run) -> str:
    metrics = run.summary
    stages = describe(metrics["recipe"], run.facts["config"].get("schedules") or {})
    about = (
        f"Model {metrics['model']}; recipe {metrics['recipe']}: {stages}; {rows_learnt_from(metrics)}; "
        f"learning rate {metrics['learning_rate']:g}, {metrics['selected_by']}."
    )
    if metrics.get("diverged"):
        about += f" At {'; '.join(metrics['diverged'])} training diverged."
    if "similarity_to_icl" in metrics:
        about += f" asim to ICL {metrics['similarity_to_icl']['asim']:.3f}."
    return about


def _examined(folder: Path) -> dict[str, Any]:
    from ia2.report.doctor.diagnosis import diagnose_all

    try:
        return {"diagnoses": list(diagnose_all(folder)), "refusal": ""}
    except UserError as error:
        refusal = str(error)
    except (KeyError, TypeError, ValueError) as error:
        # runs of earlier versions lack what later rules look at; the rest of the page is worth having
        refusal = f"it is of another version of ia2 ({type(error).__name__}: {error})."
    return {"diagnoses": [], "refusal": refusal}


def _differences(summary: Mapping[str, Any]) -> list[Table]:
    rows = [
        {
            "difference": name,
            **{title: estimate(found.get(measure), signed=True) for measure, title in MEASURES.items()},
            "answers": unlike(found).removeprefix("; "),
        }
        for name, found in {**summary.get("headroom", {}), **summary["differences"]}.items()
    ]
    title = "Paired differences (accuracy: above zero is better; all others: below)."
    return [fill("differences", title, rows)] if rows else []


def _caveats(run: Run) -> Iterator[str]:
    if len(run.summary["design"]["seeds"]) == 1:
        yield "One draw of training examples: no intervals, and another draw may say something else."
    if not run.evaluations:
        yield (
            "Only the summary was kept: reliability, training curves and per-example predictions need the "
            "run's whole folder."
        )
    if not any(entry.get("tokens_per_query") for entry in run.summary["recipes"].values()):
        yield "This run did not count tokens per query, so there is no figure of cost; newer runs do."


# ---------------------------------------------------------------------------------------------- rows


def _predictions(run: Run, compared: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Per-example predictions, with the filters of the page and who was right where the other was not."""
    if not run.rows:
        return None
    arms = list(dict.fromkeys(arm for row in run.rows for arm in row["answers"]))
    kind = compared["design"]["task"] if compared else run.facts["task"]["kind"]
    note = (
        "Right means that the most probable label is the true one, and confidence is its share of the labels."
        if kind == "classification"
        else "Confidence is the probability of the whole answer."
    )
    return {
        "arms": arms,
        "rows": [_shown_row(row, arms) for row in run.rows],
        "total": run.num_rows,
        "parts": list(dict.fromkeys(row["part"] for row in run.rows if row["part"])),
        "seeds": sorted({row["seed"] for row in run.rows}),
        "choices": list(_choices(arms)),
        "agreement": _agreement(arms, run.rows),
        "note": note,
    }


def _shown_row(row: Mapping[str, Any], arms: Sequence[str]) -> dict[str, Any]:
    """With a sign an arm (``1`` right, ``0`` wrong, ``-`` neither), and the query cut where it is long."""
    right = [_right(row, arm) for arm in arms]
    query = row["query"]
    if len(query) > MAX_QUERY:
        query = f"{query[:MAX_QUERY]} … ({len(query) - MAX_QUERY:,} more characters)"
    return {
        **row,
        "query": query,
        "marks": "".join("-" if of is None else str(int(of)) for of in right),
        "differs": len({answer["predicted"] for answer in row["answers"].values()}) > 1,
    }


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


def _agreement(arms: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Table:
    """The first arm of the method (else the last arm) against every other."""
    first = next((arm for arm in arms if arm.split("@")[0] == METHOD), arms[-1])
    columns = {
        "both right": (True, True),
        f"only {first} right": (True, False),
        "only this one right": (False, True),
        "both wrong": (False, False),
    }
    found = []
    for other in arms:
        pairs = [(_right(row, first), _right(row, other)) for row in rows]
        if other != first and any(None not in pair for pair in pairs):
            counts = {title: str(pairs.count(pair)) for title, pair in columns.items()}
            found.append({"recipe": other, **counts})
    return fill("agreement", f"Rows that {first} and each other recipe answer rightly.", found)


def _right(row: Mapping[str, Any], arm: str) -> bool | None:
    correct = row["answers"].get(arm, {}).get("correct")
    return None if correct is None else bool(correct)


# --------------------------------------------------------------------------------------- environment


def _environment(run: Run) -> Iterator[tuple[str, str]]:
    summary, facts = run.summary, run.facts
    yield "Folder", run.name
    if run.kind != "curve" and (run.folder / "ia2_config.yaml").is_file():
        yield (
            "Again",
            f"ia2 {run.kind} --config ia2_config.yaml --output-dir NEW, with the file in this folder",
        )
    if run.kind == "train":
        seeds = [facts["config"]["seed"]]
    else:
        seeds = summary["seeds"] if run.kind == "curve" else summary["design"]["seeds"]
    yield "Seeds", ", ".join(map(str, seeds))
    for name, mark in _fingerprints(summary, facts):
        if mark:
            yield f"Data: {name}", str(mark)
    yield from _machine(summary.get("machine"), summary.get("versions") or facts.get("versions"))


def _fingerprints(summary: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and SHA-256 digests (first 16 digits) of rows."""
    data = summary.get("data")
    if data:
        for rows in filter(None, (data, data.get("test"))):
            yield rows["name"], rows["fingerprint"]
    else:
        for name, known in facts.get("data", {}).items():
            yield name, known if isinstance(known, str) else digest(known)


def _machine(
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


def _settings(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and values of what is set; of files only the name, since folders are nobody's business."""
    for name, value in config.items():
        if isinstance(value, dict) and value and name != "label_map":
            yield from _settings(value, f"{above}{name}.")
        elif value not in (None, "", [], {}):
            yield above + name, _shown_value(value)


def _shown_value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} = {inner}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    text = str(value)
    return f"…/{Path(text).name}" if isinstance(value, str) and Path(text).is_absolute() else text
