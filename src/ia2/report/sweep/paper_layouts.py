"""The paper's tables 1 to 20, filled with the cells of a sweep, beside the paper's figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ia2.config.recipes import is_trained
from ia2.report.sweep.cells import METHOD, RIVAL, TITLES, Place, Report
from ia2.report.sweep.entries import interval_entry, mean_entry, mean_sd, ranked
from ia2.report.sweep.notes import about, grouped
from ia2.report.sweep.own_tables import headroom_fields
from ia2.report.sweep.paper import Figure, PaperRow, PaperTable, paper_tables
from ia2.report.sweep.selection import Arm, Task, differences
from ia2.report.sweep.significance import significance_table
from ia2.utils.errors import ConfigError
from ia2.utils.format import Column, Entry, Fields, Table, fill
from ia2.utils.statistics import t_interval
from ia2.utils.wording import MISSING

# Of each recipe: measure → title. The paper's accuracy and ECE are over the vocabulary.
_OF_LABELS = {
    "accuracy": "acc",
    "nll": "NLL",
    "accuracy_vocabulary": "acc (voc.)",
    "ece_vocabulary": "ECE (voc.)",
}
_OF_TEXT = {"accuracy": "acc"}

_ANSWERS = {"ground_truth": "the true answers", "icl_responses": "ICL's responses"}


@dataclass(frozen=True)
class _Row:
    """One evaluation, and the arm of each recipe that is shown of it."""

    place: Place
    adapter: str  # of the ablation; empty elsewhere
    arms: dict[str, Arm | None]


def paper_table(report: Report, number: int) -> list[Table]:
    """One of the paper's tables: one for its own models and N, or one for each model and N there is.

    Raises:
        ConfigError: there is no such table, or no cells for it.
    """
    if number not in paper_tables():
        raise ConfigError(f"the paper has no table {number}; there are 1 to {max(paper_tables())}.")
    tables = filled(report, number)
    if not tables:
        raise ConfigError(_nothing(report, paper_tables()[number]))
    return tables


def filled(report: Report, number: int) -> list[Table]:
    """The same; none where there are no cells for it."""
    paper = paper_tables()[number]
    if paper.kind == "tests":
        return [table for table in [significance_table(report)] if table.rows]
    tables = [_table(report, paper, *found) for found in _contents(report, paper)]
    if len(tables) > 1:  # a label in LaTeX is there once
        tables = [replace(table, label=f"{number}-{n}") for n, table in enumerate(tables, 1)]
    return tables


def available(report: Report) -> list[int]:
    """Numbers of the paper's tables that the cells can fill, wherever ICL works."""
    report = report.where(icl_works=False)
    paired = any(report.pair(task, size) for task in report.tasks for size in report.sizes)
    return [
        number
        for number, paper in paper_tables().items()
        if (paired if paper.kind == "tests" else any(_contents(report, paper)))
    ]


def _nothing(report: Report, paper: PaperTable) -> str:
    what = {"labels": "label tasks", "free": "free-text tasks"}.get(paper.kind, "some task")
    asked = f"{', '.join(r for r in paper.recipes if is_trained(r))} on {what}, adapter {paper.adapter}"
    if paper.kind == "tests":
        asked += ", two seeds or benchmarks"
    if paper.by == "adapter":
        asked += " with two ranks or sets of modules"
    if paper.answers != "ground_truth":
        asked += f", sft.answers {paper.answers}"
    if report.where_icl_works:
        asked += ", where ICL works"
    there = ", ".join(map(str, available(report))) or "none of the paper's tables"
    return f"table {paper.number} needs cells of {asked}; these are not there. The cells fill {there}."


# --------------------------------------------------------------------------------------------- rows


def _contents(report: Report, paper: PaperTable) -> Iterator[tuple[str, list[int], list[_Row]]]:
    """Models, N and rows of each table to print."""
    for tasks in _groups(report, paper):
        for sizes in _sizes(report, paper, tasks):
            rows = _rows(report, paper, tasks, sizes)
            if report.where_icl_works:
                rows = [row for row in rows if report.works(row.place)]
            if _fills(paper, rows):
                yield ", ".join(dict.fromkeys(task.model for task in tasks)), sizes, rows


def _groups(report: Report, paper: PaperTable) -> list[list[Task]]:
    """The tasks of each table to print: those of the paper's models together, others by model."""
    groups: dict[str, list[Task]] = {}
    for task in report.tasks:
        if paper.kind not in ("labels", "free") or report.labelled(task) == (paper.kind == "labels"):
            # SciQr on the 3B model and SST2 on the 1B one are rows of one table in the paper
            own = task.model in paper.models and paper.model_of(task.benchmark) in (None, task.model)
            groups.setdefault("" if own else task.model, []).append(task)
    place = _place_in(list(dict.fromkeys(row.source for row in paper.rows)))
    return [sorted(tasks, key=lambda task: place(task.benchmark)) for tasks in groups.values()]


def _sizes(report: Report, paper: PaperTable, tasks: Sequence[Task]) -> list[list[int]]:
    """The N of each table to print: the paper's, or each there is."""
    there = sorted({a.num_examples for a in report.arms if a.task in tasks and a.num_examples is not None})
    if paper.by == "size":
        return [there]
    asked = sorted({row.num_examples for row in paper.rows if row.num_examples in there})
    if asked and paper.by == "adapter":
        return [asked]
    return [[size] for size in asked or there]


def _rows(report: Report, paper: PaperTable, tasks: Sequence[Task], sizes: Sequence[int]) -> list[_Row]:
    """Those with a trained recipe; what the paper does not have comes behind what it has."""
    adapters = {""}
    if paper.by == "adapter":
        arms = [arm for arm in report.arms if arm.task in tasks and arm.is_trained]
        adapters = {arm.rank_and_modules for arm in arms if arm.adapter == paper.adapter}
    place_of = _place_in([(row.source, row.dataset) for row in paper.rows])
    rows = []
    for adapter in sorted(adapters, key=lambda name: (name != "r8 qko", name)):
        asked = {"adapter": paper.adapter, "answers": paper.answers, "rank_and_modules": adapter}
        for task in tasks:
            for dataset in sorted(report.datasets(task), key=lambda name: place_of((task.benchmark, name))):
                if paper.number in (4, 5) and dataset != task.benchmark:
                    continue  # without OOD evaluations
                for size in sizes:
                    arms_of = {recipe: report.plain(task, size, recipe, **asked) for recipe in paper.recipes}
                    if any(arm is not None and arm.is_trained for arm in arms_of.values()):
                        rows.append(_Row(Place(task, dataset, size), adapter, arms_of))
    return rows


def _place_in(order: Sequence[object]) -> Callable[[object], int]:
    """The place of a thing in an order; things that are not in it come last."""
    return lambda thing: order.index(thing) if thing in order else len(order)


def _fills(paper: PaperTable, rows: Sequence[_Row]) -> bool:
    """Whether there is what the table is about, not only recipes that it shares with others."""
    if paper.by == "adapter" and len({row.adapter for row in rows}) < 2:
        return False
    if paper.number == 4 and not any(row.arms["soft-sft"] for row in rows):
        return False
    return any(row.arms[METHOD] or row.arms[RIVAL] for row in rows)


# ------------------------------------------------------------------------------------------- tables


def _table(
    report: Report, paper: PaperTable, models: str, sizes: Sequence[int], rows: Sequence[_Row]
) -> Table:
    labelled = any(report.labelled(row.place.task) for row in rows)
    measures = _OF_LABELS if labelled else _OF_TEXT
    printed: list[tuple[_Row, dict[tuple[str, str], Entry], PaperRow | None]] = []
    for row in rows:
        printed.append((row, _entries(report, paper, row, measures), None))
        task, dataset, size = row.place
        match = paper.find(task.benchmark, dataset, task.model, size, row.adapter)
        if match is not None:
            printed.append((row, {}, match))
    beside = len(printed) - len(rows)
    of = "N" if paper.by == "size" else f"N = {', '.join(map(str, sizes))}"
    title = (
        f"Table {paper.number} of the paper, from these cells: accuracy in percent"
        f"{' among the labels, then over the vocabulary as in the paper' if labelled else ''}, mean (sd over "
        f"draws), {models}, {of}."
    )
    notes = [*_notes(report, paper, rows, beside, labelled), *_missing(report, paper, rows)]
    return fill(str(paper.number), title, _fields(report, paper, rows, measures), printed, notes)


def _fields(report: Report, paper: PaperTable, rows: Sequence[_Row], measures: Mapping[str, str]) -> Fields:
    """Columns, and the entries of our row or, given its figures, of the paper's below it."""
    verbalisers = grouped((row.place.task.benchmark, row.place.task.verbaliser) for row in rows)

    def source(row: _Row) -> str:
        task = row.place.task
        return task.source if len(verbalisers[task.benchmark]) > 1 else task.benchmark

    def ours(make: Callable[[_Row], Entry | str]) -> Callable[..., Entry | str]:
        return lambda row, _, match: make(row) if match is None else ""

    def of_place(make: Callable[[Place], Entry | str]) -> Callable[..., Entry | str]:
        return ours(lambda row: make(row.place))

    def less(rival: str, measure: str) -> Callable[..., Entry | str]:
        return ours(lambda row: _less(report, row, rival, measure))

    def of_recipe(recipe: str, measure: str) -> Callable[..., Entry | str]:
        return lambda _, entries, match: (
            entries[recipe, measure]
            if match is None
            else _figure(match.figures[recipe], measure, labelled=len(measures) > 1)
        )

    method = TITLES[METHOD]
    by = {
        "size": [("N", ours(lambda row: str(row.place.size)))],
        "adapter": [("LoRA", ours(lambda row: row.adapter))],
    }
    gaps = [(Column("acc [95%]", f"{method} − ICL"), less("icl", "accuracy"))]
    return [
        ("source", ours(source)),
        ("eval", lambda row, _, match: Entry("the paper", "paper") if match else row.place.evaluated),
        *by.get(paper.by, []),
        *(
            (Column(of, TITLES[r]), of_recipe(r, name))
            for r in paper.recipes
            for name, of in measures.items()
        ),
        *(gaps if paper.kind == "gaps" else []),
        *((Column(f"{of} [95%]", f"{method} − SFT"), less(RIVAL, name)) for name, of in measures.items()),
        *((of, of_place(make)) for of, make in headroom_fields(report)),
    ]


def _entries(
    report: Report, paper: PaperTable, row: _Row, measures: Mapping[str, str]
) -> dict[tuple[str, str], Entry]:
    """(recipe, measure) → its mean, the best trained recipes of each measure set off."""
    task, dataset, size = row.place
    expected = report.expected_seeds(task, size)
    found: dict[tuple[str, str], Entry] = {}
    for measure in measures:
        if not _measured(report, row, measure):
            found |= {(recipe, measure): Entry("n/a") for recipe in paper.recipes}
            continue
        values = [arm.values(dataset, measure) if arm else {} for arm in row.arms.values()]
        # means over fewer seeds are said once
        seeds = expected if measure == "accuracy" else 0
        entries = [mean_entry(of, percent=_percent(measure), expected=seeds) for of in values]
        trained = [is_trained(recipe) for recipe in row.arms]
        marked = ranked(entries, higher=_percent(measure), shown=trained)
        found |= {(recipe, measure): entry for recipe, entry in zip(row.arms, marked, strict=True)}
    return found


def _measured(report: Report, row: _Row, measure: str) -> bool:
    """Free text has accuracy alone."""
    return measure in _OF_TEXT or report.labelled(row.place.task)


def _percent(measure: str) -> bool:
    """Accuracies are in percent, and more of them is better."""
    return measure.startswith("accuracy")


def _less(report: Report, row: _Row, rival: str, measure: str) -> Entry:
    method, other = row.arms.get(METHOD), row.arms.get(rival)
    if not _measured(report, row, measure):
        return Entry("n/a")
    found = differences(method, other, row.place.dataset, measure) if method and other else {}
    interval = t_interval(list(found.values())) if found else None
    return interval_entry(interval, signed=True, percent=_percent(measure), seeds=sorted(found))


def _missing(report: Report, paper: PaperTable, rows: Sequence[_Row]) -> list[str]:
    """Recipes without cells, and those with fewer seeds than others."""
    missing: dict[str, list[str]] = {}
    fewer = []
    for row in rows:
        task, dataset, size = row.place
        expected = report.expected_seeds(task, size)
        for recipe, arm in row.arms.items():
            seeds = list(arm.evaluations(dataset)) if arm else []
            if not seeds:
                missing.setdefault(recipe, []).append(dataset)
            elif None not in seeds and len(seeds) < expected:
                fewer.append(f"{recipe} on {dataset} ({len(seeds)} of {expected})")
    notes = []
    if missing:
        count, asked = sum(map(len, missing.values())), len(rows) * len(paper.recipes)
        listed = "; ".join(f"{recipe} on {', '.join(where)}" for recipe, where in missing.items())
        notes.append(f"Missing ({MISSING}): {count} of {asked}: {listed}.")
    if fewer:
        notes.append(f"Means over fewer seeds than others of their row: {'; '.join(fewer)}.")
    return notes


def _figure(figure: Figure, measure: str, *, labelled: bool) -> Entry:
    """The paper's number: its accuracies of labels are over the vocabulary."""
    if measure == "ece_vocabulary" and figure.ece is not None:
        return Entry(mean_sd(figure.ece, figure.ece_sd, percent=False), "paper")
    of_text = figure.ece is None or not labelled
    if measure == ("accuracy" if of_text else "accuracy_vocabulary"):
        sd = None if figure.accuracy_sd is None else figure.accuracy_sd / 100
        return Entry(mean_sd(figure.accuracy / 100, sd, percent=True), "paper")
    return Entry("")


def _notes(report: Report, paper: PaperTable, rows: Sequence[_Row], beside: int, labelled: bool) -> list[str]:
    arms = [arm for row in rows for arm in row.arms.values() if arm is not None]
    notes = [*about(arms, report.select), f"Fine-tuned on {_ANSWERS[paper.answers]}."]
    if beside:
        notes.append(
            "In italics: the paper's figures (ICLR 2026, arXiv 2509.22621), five runs, rates chosen by test "
            "performance."
        )
    if beside < len(rows):
        theirs = ", ".join(dict.fromkeys(f"{row.model} at N = {row.num_examples}" for row in paper.rows))
        notes.append(f"The paper's figures are of {theirs}: not beside other models, N or benchmarks.")
    variants = sorted({arm.label for arm in arms if arm.variant})
    if variants and paper.by != "adapter":
        notes.append(f"Variants of the grid that stand here: {', '.join(variants)}.")
    notes.append(
        "Bold: best trained recipe of the row, underlined: second. Intervals: 95% t over "
        "draws, paired; one draw "
        f"has none.{' NLL is among the labels; ECE: 15 bins of equal mass.' if labelled else ''}"
    )
    there = {row.place.task.benchmark for row in rows}
    if absent := [s for s in dict.fromkeys(row.source for row in paper.rows) if s not in there]:
        notes.append(f"Not trained on here: {', '.join(absent)}.")
    return notes
