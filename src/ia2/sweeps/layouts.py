"""The paper's tables 1 to 20, filled with the cells of a sweep, beside the paper's figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ia2.errors import ConfigError
from ia2.recipes import is_trained
from ia2.sweeps.paper import Figure, PaperTable, paper_tables
from ia2.sweeps.report import METHOD, RIVAL, TITLES, Report, adapter_label, adapter_type
from ia2.sweeps.selection import Arm, Task
from ia2.sweeps.significance import significance_table
from ia2.sweeps.statistics import Difference, Summary, summarise
from ia2.sweeps.tables import Column, Entry, Table, mean_sd, ranked
from ia2.wording import MISSING, estimate

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

    task: Task
    dataset: str
    size: int
    adapter: str  # of the ablation; empty elsewhere
    arms: dict[str, Arm | None]


@dataclass
class _Counted:
    """What is missing of a table, to be said below it."""

    asked: int = 0
    missing: dict[str, list[str]] = field(default_factory=dict)
    fewer: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        found = []
        if self.missing:
            count = sum(map(len, self.missing.values()))
            listed = "; ".join(f"{who} on {', '.join(where)}" for who, where in self.missing.items())
            found.append(f"Missing ({MISSING}): {count} of {self.asked}: {listed}.")
        if self.fewer:
            found.append(f"Means over fewer seeds than others of their row: {'; '.join(self.fewer)}.")
        return found


def paper_table(report: Report, number: int, *, where_icl_works: bool = False) -> list[Table]:
    """One of the paper's tables: one for its own models and N, or one for each model and N there is.

    Args:
        report: the cells.
        number: 1 to 20.
        where_icl_works: leave out evaluations on which ICL does not work (:meth:`Report.icl`).

    Raises:
        ConfigError: there is no such table, or no cells for it.
    """
    paper = _known(number)
    if paper.kind == "tests":
        found = significance_table(report, where_icl_works=where_icl_works)
        if found is None:
            raise ConfigError(_nothing(report, paper, where_icl_works))
        return [found]
    tables = []
    for models, tasks in _groups(report, paper):
        for sizes in _sizes(report, paper, tasks):
            rows = _rows(report, paper, tasks, sizes)
            if where_icl_works:
                rows = [row for row in rows if _works(report, row)]
            if rows and _fills(paper, rows):
                tables.append(_table(report, paper, models, sizes, rows))
    if not tables:
        raise ConfigError(_nothing(report, paper, where_icl_works))
    if len(tables) > 1:  # a label in LaTeX is there once
        tables = [replace(table, label=f"{number}-{n}") for n, table in enumerate(tables, 1)]
    return tables


def available(report: Report) -> list[int]:
    """Numbers of the paper's tables that the cells can fill."""
    found = []
    for number, paper in paper_tables().items():
        if paper.kind == "tests":
            fills = any(report.pair(task, size) for task in report.tasks for size in report.sizes)
        else:
            fills = any(
                _fills(paper, _rows(report, paper, tasks, sizes))
                for _, tasks in _groups(report, paper)
                for sizes in _sizes(report, paper, tasks)
            )
        if fills:
            found.append(number)
    return found


def _known(number: int) -> PaperTable:
    tables = paper_tables()
    if number not in tables:
        raise ConfigError(f"the paper has no table {number}; there are 1 to {max(tables)}.")
    return tables[number]


def _nothing(report: Report, paper: PaperTable, where_icl_works: bool) -> str:
    what = {"labels": "label tasks", "free": "free-text tasks"}.get(paper.kind, "some task")
    asked = f"{', '.join(r for r in paper.recipes if is_trained(r))} on {what}, adapter {paper.adapter}"
    if paper.kind == "tests":
        asked += ", two seeds or benchmarks"
    if paper.by == "adapter":
        asked += " with two ranks or sets of modules"
    if paper.answers != "ground_truth":
        asked += f", sft.answers {paper.answers}"
    if where_icl_works:
        asked += ", where ICL works"
    there = ", ".join(map(str, available(report))) or "none of the paper's tables"
    return f"table {paper.number} needs cells of {asked}; these are not there. The cells fill {there}."


# --------------------------------------------------------------------------------------------- rows


def _groups(report: Report, paper: PaperTable) -> list[tuple[str, list[Task]]]:
    """The tasks of each table to print: those of the paper's models together, others by model."""
    groups: dict[str, list[Task]] = {}
    for task in report.tasks:
        if paper.kind in ("labels", "free") and report.labelled(task) != (paper.kind == "labels"):
            continue
        # SciQr on the 3B model and SST2 on the 1B one are rows of one table in the paper
        own = task.model in paper.models and paper.model_of(task.benchmark) in (None, task.model)
        groups.setdefault("" if own else task.model, []).append(task)
    order = list(dict.fromkeys(row.source for row in paper.rows))
    found = []
    for tasks in groups.values():
        tasks.sort(key=lambda t: order.index(t.benchmark) if t.benchmark in order else len(order))
        found.append((", ".join(dict.fromkeys(task.model for task in tasks)), tasks))
    return found


def _sizes(report: Report, paper: PaperTable, tasks: Sequence[Task]) -> list[list[int]]:
    """The N of each table to print: the paper's, or each there is."""
    there = sorted({a.num_examples for a in report.arms if a.task in tasks and a.num_examples is not None})
    if paper.by == "size":
        return [there]
    asked = sorted({row.num_examples for row in paper.rows if row.num_examples in there})
    if asked:
        return [asked] if paper.by == "adapter" else [[size] for size in asked]
    return [[size] for size in there]


def _rows(report: Report, paper: PaperTable, tasks: Sequence[Task], sizes: Sequence[int]) -> list[_Row]:
    rows = []
    labels = [""]
    if paper.by == "adapter":
        arms = [a for a in report.arms if a.task in tasks and is_trained(a.recipe)]
        labels = sorted(
            {adapter_label(a) for a in arms if adapter_type(a) == paper.adapter},
            key=lambda label: (label != "r8 qko", label),
        )
    order = [(row.source, row.dataset) for row in paper.rows]
    for label in labels:
        for task in tasks:
            datasets = report.datasets(task)
            if paper.number in (4, 5):  # without OOD evaluations
                datasets = [d for d in datasets if d == task.benchmark]
            # stable: what the paper does not have comes behind what it has
            datasets.sort(key=lambda d: (*_place(order, (task.benchmark, d)),))
            for dataset in datasets:
                for size in sizes:
                    arms_of = {
                        recipe: report.plain(
                            task, size, recipe, adapter=paper.adapter, answers=paper.answers, label=label
                        )
                        for recipe in paper.recipes
                    }
                    if any(arm is not None and is_trained(arm.recipe) for arm in arms_of.values()):
                        rows.append(_Row(task, dataset, size, label, arms_of))
    return rows


def _place(order: Sequence[tuple[str, str]], row: tuple[str, str]) -> tuple[int]:
    return (order.index(row),) if row in order else (len(order),)


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
    labelled = any(report.labelled(row.task) for row in rows)
    measures = _OF_LABELS if labelled else _OF_TEXT
    counted = _Counted()
    columns = _columns(paper, measures)
    body, beside = [], 0
    for row in rows:
        body.append(_ours(report, paper, row, rows, measures, counted))
        theirs = _theirs(paper, row, measures, len(columns))
        if theirs:
            body.append(theirs)
            beside += 1
    of = "N" if paper.by == "size" else f"N = {', '.join(map(str, sizes))}"
    title = (
        f"Table {paper.number} of the paper, from these cells: accuracy in percent"
        f"{' among the labels, then over the vocabulary as in the paper' if labelled else ''}, mean (sd over "
        f"draws), {models}, {of}."
    )
    return Table(
        str(paper.number),
        title,
        columns,
        tuple(body),
        tuple(_notes(report, paper, rows, beside, labelled) + counted.notes()),
    )


def _columns(paper: PaperTable, measures: Mapping[str, str]) -> tuple[Column, ...]:
    columns = [Column("source"), Column("eval")]
    if paper.by:
        columns.append(Column("N" if paper.by == "size" else "LoRA"))
    for recipe in paper.recipes:
        columns += [Column(title, TITLES[recipe]) for title in measures.values()]
    method = TITLES[METHOD]
    if paper.kind == "gaps":
        columns.append(Column("acc [95%]", f"{method} − ICL"))
    columns += [Column(f"{title} [95%]", f"{method} − SFT") for title in measures.values()]
    return (*columns, Column("base"), Column("ICL − SFT [95%]"), Column("ICL works"))


def _ours(
    report: Report,
    paper: PaperTable,
    row: _Row,
    rows: Sequence[_Row],
    measures: Mapping[str, str],
    counted: _Counted,
) -> tuple[Entry, ...]:
    expected = report.expected_seeds(row.task, row.size)
    known = _OF_LABELS if report.labelled(row.task) else _OF_TEXT
    entries: dict[str, list[Entry]] = {}
    for measure in measures:
        if measure not in known:
            entries[measure] = [Entry("n/a")] * len(paper.recipes)
            continue
        entries[measure] = ranked(
            [_entry(row, recipe, measure, expected, counted) for recipe in paper.recipes],
            higher=_percent(measure),
            shown=[is_trained(recipe) for recipe in paper.recipes],
        )
    several = len({other.task.verbaliser for other in rows if other.task.benchmark == row.task.benchmark}) > 1
    source = f"{row.task.benchmark}, {row.task.verbaliser}" if several else row.task.benchmark
    found = [Entry(source), Entry(row.dataset + (" (OOD)" if row.dataset != row.task.benchmark else ""))]
    if paper.by:
        found.append(Entry(str(row.size) if paper.by == "size" else row.adapter))
    for place in range(len(paper.recipes)):
        found += [entries[measure][place] for measure in measures]
    if paper.kind == "gaps":
        found.append(_less(report, row, "icl", "accuracy"))
    found += [_less(report, row, RIVAL, m) if m in known else Entry("n/a") for m in measures]
    return (*found, *headroom_entries(report, row.task, row.size, row.dataset))


def headroom_entries(report: Report, task: Task, size: int, dataset: str) -> tuple[Entry, Entry, Entry]:
    """The base model, ICL − SFT, both among the labels and in percent, and whether ICL works."""
    found = report.icl(task, size, dataset)
    if found is None:
        return Entry(MISSING), Entry(MISSING), Entry(MISSING)
    base = MISSING if found.base is None else f"{100 * found.base:.1f}"
    less = None if found.headroom is None else found.headroom.to_dict()
    word = found.verdict if found.verdict == "yes" else f"{found.verdict}: {found.reason}"
    return Entry(base), Entry(estimate(less, signed=True, percent=True), value=less), Entry(word)


def _percent(measure: str) -> bool:
    """Accuracies are in percent, and more of them is better."""
    return measure.startswith("accuracy")


def _entry(row: _Row, recipe: str, measure: str, expected: int, counted: _Counted) -> Entry:
    arm = row.arms[recipe]
    found = None if arm is None else summarise(arm, row.dataset, measure)
    first = measure == "accuracy"
    counted.asked += first
    if found is None:
        if first:
            counted.missing.setdefault(recipe, []).append(row.dataset)
        return Entry(MISSING)
    seeds = None
    if None not in found.seeds and len(found.seeds) < expected:
        seeds = (len(found.seeds), expected)
        if first:
            counted.fewer.append(f"{recipe} on {row.dataset} ({seeds[0]} of {seeds[1]})")
    return Entry(
        mean_sd(found.mean, found.sd, percent=_percent(measure), seeds=seeds if first else None),
        value=as_value(found),
    )


def as_value(found: Summary) -> dict[str, object]:
    """A summary for JSON."""
    return {"mean": found.mean, "sd": found.sd, "seeds": [s for s in found.seeds if s is not None]}


def _less(report: Report, row: _Row, rival: str, measure: str) -> Entry:
    method = row.arms.get(METHOD)
    other = row.arms.get(rival)
    if method is None or other is None:
        return Entry(MISSING)
    return less_entry(report.compare(method, other, row.dataset, measure), percent=_percent(measure))


def less_entry(found: Difference | None, *, percent: bool) -> Entry:
    """A difference with its interval."""
    if found is None:
        return Entry(MISSING)
    of = found.interval.to_dict()
    return Entry(estimate(of, signed=True, percent=percent), value={**of, "seeds": sorted(found.by_seed)})


def _works(report: Report, row: _Row) -> bool:
    found = report.icl(row.task, row.size, row.dataset)
    return found is not None and found.verdict == "yes"


def _theirs(
    paper: PaperTable, row: _Row, measures: Mapping[str, str], width: int
) -> tuple[Entry, ...] | None:
    """The paper's row below ours, where model, N and settings are the same."""
    match = paper.find(row.task.benchmark, row.dataset, row.task.model, row.size, row.adapter)
    if match is None:
        return None
    entries = [Entry(""), Entry("the paper", "paper")] + [Entry("")] * bool(paper.by)
    for recipe in paper.recipes:
        entries += [
            _figure(match.figures[recipe], measure, labelled=len(measures) > 1) for measure in measures
        ]
    return (*entries, *[Entry("")] * (width - len(entries)))


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
    unique = list({id(arm): arm for arm in arms}.values())
    tasks = list(dict.fromkeys(row.task for row in rows))
    notes = report.about(tasks, unique)
    notes.append(f"Fine-tuned on {_ANSWERS[paper.answers]}.")
    if beside:
        notes.append(
            "In italics: the paper's figures (ICLR 2026, arXiv 2509.22621), five runs, rates chosen by test "
            "performance."
        )
    if beside < len(rows):
        theirs = ", ".join(dict.fromkeys(f"{row.model} at N = {row.num_examples}" for row in paper.rows))
        notes.append(f"The paper's figures are of {theirs}: not beside other models, N or benchmarks.")
    variants = sorted({arm.label for arm in unique if arm.variant})
    if variants and paper.by != "adapter":
        notes.append(f"Variants of the grid that stand here: {', '.join(variants)}.")
    notes.append(
        "Bold: best trained recipe of the row, underlined: second. Intervals: 95% t over "
        "draws, paired; one draw "
        f"has none.{' NLL is among the labels; ECE: 15 bins of equal mass.' if labelled else ''}"
    )
    there = {task.benchmark for task in tasks}
    if absent := [s for s in dict.fromkeys(row.source for row in paper.rows) if s not in there]:
        notes.append(f"Not trained on here: {', '.join(absent)}.")
    return notes
