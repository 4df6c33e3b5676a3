"""The paper's tables 1 to 20, filled with the cells of a sweep, beside its figures (``paper.yaml``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ia2.config.recipes import METHOD, PLAIN, is_trained
from ia2.report.sweep.cells import TITLES, Place, Report
from ia2.report.sweep.comparisons import significance_table
from ia2.report.sweep.notes import about, grouped
from ia2.report.sweep.own_tables import headroom
from ia2.report.sweep.selection import ChosenRuns, differences
from ia2.utils.errors import ConfigError
from ia2.utils.format import Column, Entry, Mark, Row, Table, fill, interval_entry, mean_entry, mean_sd
from ia2.utils.statistics import t_interval
from ia2.utils.wording import MISSING

# Measure → title. The paper's accuracy and ECE are over the vocabulary.
_OF_LABELS = {
    "accuracy": "acc",
    "nll": "NLL",
    "accuracy_vocabulary": "acc (voc.)",
    "ece_vocabulary": "ECE (voc.)",
}
_OF_TEXT = {"accuracy": "acc"}

_ANSWERS = {"ground_truth": "the true answers", "icl_responses": "ICL's responses"}

Figures = Mapping[str, Sequence[float | None]]
"""Recipe → accuracy in percent, its sd and, of labels, ECE and its sd; None where the paper gives none."""


class PaperRow(NamedTuple):
    """What one row of a table is of; ``adapter`` is ``r8 qko``, in the ablation of LoRA's settings alone."""

    source: str
    dataset: str
    model: str
    num_examples: int
    adapter: str = ""


class PaperTable(NamedTuple):
    """What one of the paper's tables shows; ``paper.yaml`` explains its keys."""

    kind: str
    adapter: str
    answers: str
    recipes: list[str]
    rows: Mapping[PaperRow, Figures]
    by: str = ""
    ood: bool = True
    needs: str = ""


@lru_cache(maxsize=1)
def paper_tables() -> dict[int, PaperTable]:
    """All tables by number."""
    import yaml

    text = Path(__file__).with_name("paper.yaml").read_text(encoding="utf-8")
    return {number: _parsed(entry) for number, entry in yaml.safe_load(text)["tables"].items()}


def _parsed(entry: dict[str, Any]) -> PaperTable:
    by, models, sizes = entry.get("by"), entry.pop("model", None), entry.pop("num_examples", None)
    rows = {}
    for name, figures in entry.pop("rows").items():
        source, dataset, *more = name.split("/")
        model, size = (of.get(source, of.get("*")) if isinstance(of, dict) else of for of in (models, sizes))
        row = PaperRow(source, dataset, str(model), int(more[0] if by == "size" else size or 0))
        if by == "adapter":
            row = row._replace(adapter=more[0])
        rows[row] = dict(zip(entry["recipes"], figures, strict=True))
    return PaperTable(rows=rows, **entry)


def paper_table(report: Report, number: int) -> list[Table]:
    """One of the paper's tables: one for its own models and N, or one for each model and N there is.

    Raises:
        ConfigError: there is no such table, or no cells for it.
    """
    if number not in paper_tables():
        raise ConfigError(f"the paper has no table {number}; there are 1 to {max(paper_tables())}.")
    if tables := filled(report, number):
        return tables
    paper = paper_tables()[number]
    kind = {"labels": "label tasks", "free": "free-text tasks"}.get(paper.kind, "some task")
    needed = f"{', '.join(filter(is_trained, paper.recipes))} on {kind}, adapter {paper.adapter}"
    if paper.kind == "tests":
        needed += ", two seeds or benchmarks"
    if paper.by == "adapter":
        needed += " with two ranks or sets of modules"
    if paper.answers != "ground_truth":
        needed += f", sft.answers {paper.answers}"
    if report.where_icl_works:
        needed += ", where ICL works"
    there = ", ".join(map(str, available(report))) or "none of the paper's tables"
    raise ConfigError(f"table {number} needs cells of {needed}; these are not there. The cells fill {there}.")


def filled(report: Report, number: int) -> list[Table]:
    """The same; none where there are no cells for it."""
    paper = paper_tables()[number]
    if paper.kind == "tests":
        return [table for table in [significance_table(report)] if table.rows]
    tables = [_table(report, number, paper, lines) for lines in _contents(report, paper)]
    if len(tables) > 1:  # a label in LaTeX is there once
        tables = [replace(table, label=f"{number}-{n}") for n, table in enumerate(tables, 1)]
    return tables


def available(report: Report) -> list[int]:
    """Numbers of the paper's tables that the cells can fill, wherever ICL works."""
    everywhere = report.where(icl_works=False)
    return [number for number in paper_tables() if filled(everywhere, number)]


# --------------------------------------------------------------------------------------------- lines


class _Line(NamedTuple):
    """One evaluation, and the runs of each recipe shown of it; ``adapter`` is that of the ablation."""

    place: Place
    adapter: str
    runs: dict[str, ChosenRuns | None]


def _contents(report: Report, paper: PaperTable) -> Iterator[list[_Line]]:
    """The lines of each table to print: the paper's models together, others by model; its N, or each."""
    models = {row.source: row.model for row in paper.rows}
    groups: dict[str, list[_Line]] = {}
    for line in _lines(report, paper):
        task = line.place.task
        # SciQr on the 3B model and SST2 on the 1B one are rows of one table in the paper
        own = task.model in models.values() and models.get(task.benchmark, task.model) == task.model
        groups.setdefault("" if own else task.model, []).append(line)
    for lines in groups.values():
        there = {line.place.size for line in lines}
        asked = there & {row.num_examples for row in paper.rows}
        sizes = [{size} for size in sorted(asked or there)]
        if paper.by:
            sizes = [there] if paper.by == "size" else [asked] if asked else sizes
        for of in sizes:
            table = [line for line in lines if line.place.size in of]
            ablates = paper.by != "adapter" or len({line.adapter for line in table}) > 1
            recipes = {recipe for line in table for recipe, runs in line.runs.items() if runs}
            # not only recipes that it shares with others
            if ablates and paper.needs in ("", *recipes) and recipes & {METHOD, PLAIN}:
                yield table


def _lines(report: Report, paper: PaperTable) -> list[_Line]:
    """Those with a trained recipe; what the paper does not have comes behind what it has."""
    lines = []
    for place in report.places(own=not paper.ood):
        task, _, size = place
        if paper.kind in ("labels", "free") and report.labelled(task) != (paper.kind == "labels"):
            continue
        adapters = {""}
        if paper.by == "adapter":
            adapters = {r.rank_and_modules for r in report.of(task, size) if r.adapter == paper.adapter}
        for adapter in adapters:
            asked = {"adapter": paper.adapter, "answers": paper.answers, "rank_and_modules": adapter}
            runs = {recipe: report.plain(task, size, recipe, **asked) for recipe in paper.recipes}
            if any(each is not None and is_trained(recipe) for recipe, each in runs.items()):
                lines.append(_Line(place, adapter, runs))
    rows = [(row.source, row.dataset) for row in paper.rows]
    sources = [source for source, _ in rows]

    def order(line: _Line) -> tuple[Any, ...]:
        task, dataset, size = line.place
        source = sources.index(task.benchmark) if task.benchmark in sources else len(rows)
        row = (task.benchmark, dataset)
        places = source, report.tasks.index(task), rows.index(row) if row in rows else len(rows)
        return line.adapter != "r8 qko", line.adapter, *places, size

    return sorted(lines, key=order)


# ------------------------------------------------------------------------------------------- tables


def _table(report: Report, number: int, paper: PaperTable, lines: Sequence[_Line]) -> Table:
    labelled = any(report.labelled(line.place.task) for line in lines)
    measures = _OF_LABELS if labelled else _OF_TEXT
    verbalisers = grouped((line.place.task.benchmark, line.place.task.verbaliser) for line in lines)
    rows: list[Row] = []
    beside = 0
    for line in lines:
        task, dataset, size = line.place
        several = len(verbalisers[task.benchmark]) > 1
        rows.append(
            {
                "source": task.source if several else task.benchmark,
                "eval": line.place.evaluated,
                **({"N": str(size)} if paper.by == "size" else {}),
                **({"LoRA": line.adapter} if paper.by == "adapter" else {}),
                **_means(report, line, measures),
                **_gaps(report, paper, line, measures),
                **headroom(report, line.place),
            }
        )
        figures = paper.rows.get(PaperRow(task.benchmark, dataset, task.model, size, line.adapter))
        if figures is not None:
            beside += 1
            rows.append({"eval": Entry("the paper", "paper"), **_figures(figures, labelled)})
    models = ", ".join(dict.fromkeys(line.place.task.model for line in lines))
    sizes = sorted({line.place.size for line in lines})
    of = "N" if paper.by == "size" else f"N = {', '.join(map(str, sizes))}"
    title = (
        f"Table {number} of the paper, from these cells: accuracy in percent"
        f"{' among the labels, then over the vocabulary as in the paper' if labelled else ''}, mean (sd over "
        f"draws), {models}, {of}."
    )
    return fill(str(number), title, rows, _notes(report, paper, lines, beside, labelled))


def _means(report: Report, line: _Line, measures: Mapping[str, str]) -> dict[Any, Entry | str]:
    """The mean of each recipe and measure, the best trained recipes of each measure set off."""
    task, dataset, size = line.place
    expected = report.expected_seeds(task, size)
    found: dict[tuple[str, str], Entry] = {}
    for measure in measures:
        percent = measure.startswith("accuracy")
        if not _measured(report, line, measure):
            found |= {(recipe, measure): Entry("n/a") for recipe in line.runs}
            continue
        for recipe, runs in line.runs.items():
            values = runs.values(dataset, measure) if runs else {}
            # means over fewer seeds are said once
            seeds = expected if measure == "accuracy" else 0
            found[recipe, measure] = mean_entry(values, percent=percent, expected=seeds)
        trained = [(recipe, measure) for recipe in line.runs if is_trained(recipe)]
        found |= zip(trained, ranked([found[key] for key in trained], higher=percent), strict=True)
    return {Column(title, TITLES[r]): found[r, name] for r in line.runs for name, title in measures.items()}


def ranked(entries: Sequence[Entry], *, higher: bool) -> list[Entry]:
    """Set off the best and the second best of a row, as they are printed; ties share a mark."""
    # what looks equal is not told apart
    printed = [None if e.value is None else float(e.text.split()[0].rstrip(",")) for e in entries]
    values = sorted({number for number in printed if number is not None}, reverse=higher)
    if sum(number is not None for number in printed) < 2:
        return list(entries)
    marks: dict[float | None, Mark] = {values[0]: "best", **dict.fromkeys(values[1:2], "second")}  # type: ignore[dict-item]
    return [replace(e, mark=marks.get(number, "")) for e, number in zip(entries, printed, strict=True)]


def _gaps(
    report: Report, paper: PaperTable, line: _Line, measures: Mapping[str, str]
) -> dict[Any, Entry | str]:
    """Paired differences of the method to SFT and, in a table of gaps, to ICL."""

    def less(rival: str, measure: str) -> Entry:
        if not _measured(report, line, measure):
            return Entry("n/a")
        method, other = line.runs.get(METHOD), line.runs.get(rival)
        found = differences(method, other, line.place.dataset, measure) if method and other else {}
        interval = t_interval(list(found.values())) if found else None
        percent = measure.startswith("accuracy")
        return interval_entry(interval, signed=True, percent=percent, seeds=sorted(found))

    gaps: dict[Any, Entry | str] = {}
    if paper.kind == "gaps":
        gaps[Column("acc [95%]", f"{TITLES[METHOD]} − ICL")] = less("icl", "accuracy")
    for measure, title in measures.items():
        gaps[Column(f"{title} [95%]", f"{TITLES[METHOD]} − SFT")] = less(PLAIN, measure)
    return gaps


def _measured(report: Report, line: _Line, measure: str) -> bool:
    """Free text has accuracy alone."""
    return measure in _OF_TEXT or report.labelled(line.place.task)


def _figures(figures: Figures, labelled: bool) -> dict[Any, Entry | str]:
    """The paper's numbers: its accuracies of labels are over the vocabulary."""
    found: dict[Any, Entry | str] = {}
    for recipe, (accuracy, sd, *ece) in figures.items():
        measure = "accuracy_vocabulary" if ece and labelled else "accuracy"
        assert accuracy is not None
        text = mean_sd(accuracy / 100, None if sd is None else sd / 100, percent=True)
        found[Column(_OF_LABELS[measure], TITLES[recipe])] = Entry(text, "paper")
        if ece and ece[0] is not None:
            text = mean_sd(ece[0], ece[1], percent=False)
            found[Column(_OF_LABELS["ece_vocabulary"], TITLES[recipe])] = Entry(text, "paper")
    return found


def _notes(
    report: Report, paper: PaperTable, lines: Sequence[_Line], beside: int, labelled: bool
) -> list[str]:
    used = [runs for line in lines for runs in line.runs.values() if runs is not None]
    notes = [*about(used, report.select), f"Fine-tuned on {_ANSWERS[paper.answers]}."]
    if beside:
        notes.append(
            "In italics: the paper's figures (ICLR 2026, arXiv 2509.22621), five runs, rates chosen by test "
            "performance."
        )
    if beside < len(lines):
        theirs = ", ".join(dict.fromkeys(f"{row.model} at N = {row.num_examples}" for row in paper.rows))
        notes.append(f"The paper's figures are of {theirs}: not beside other models, N or benchmarks.")
    variants = sorted({runs.label for runs in used if runs.variant})
    if variants and paper.by != "adapter":
        notes.append(f"Variants of the grid that stand here: {', '.join(variants)}.")
    notes.append(
        "Bold: best trained recipe of the row, underlined: second. Intervals: 95% t over draws, paired; one "
        f"draw has none.{' NLL is among the labels; ECE: 15 bins of equal mass.' if labelled else ''}"
    )
    there = {line.place.task.benchmark for line in lines}
    if absent := [s for s in dict.fromkeys(row.source for row in paper.rows) if s not in there]:
        notes.append(f"Not trained on here: {', '.join(absent)}.")
    return notes + _missing(report, lines)


def _missing(report: Report, lines: Sequence[_Line]) -> list[str]:
    """Recipes without cells, and those with fewer seeds than others."""
    missing: dict[str, list[str]] = {}
    fewer = []
    for (task, dataset, size), _, by_recipe in lines:
        expected = report.expected_seeds(task, size)
        for recipe, runs in by_recipe.items():
            seeds = list(runs.evaluations(dataset)) if runs else []
            if not seeds:
                missing.setdefault(recipe, []).append(dataset)
            elif None not in seeds and len(seeds) < expected:
                fewer.append(f"{recipe} on {dataset} ({len(seeds)} of {expected})")
    notes = []
    if missing:
        count, asked = sum(map(len, missing.values())), sum(len(line.runs) for line in lines)
        listed = "; ".join(f"{recipe} on {', '.join(where)}" for recipe, where in missing.items())
        notes.append(f"Missing ({MISSING}): {count} of {asked}: {listed}.")
    if fewer:
        notes.append(f"Means over fewer seeds than others of their row: {'; '.join(fewer)}.")
    return notes
