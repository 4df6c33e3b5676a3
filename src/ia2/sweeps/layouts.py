"""The paper's tables 1 to 20, filled with the cells of a sweep, beside the paper's figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ia2.errors import ConfigError
from ia2.recipes import is_trained
from ia2.sweeps.paper import Figure, PaperTable, paper_tables
from ia2.sweeps.report import METHOD, RIVAL, TITLES, Report, adapter_label, adapter_type
from ia2.sweeps.selection import Arm, Task
from ia2.sweeps.significance import significance_table
from ia2.sweeps.statistics import Summary, summarise
from ia2.sweeps.tables import MISSING, Column, Entry, Table, mean_sd, ranked, signed

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
                rows = [row for row in rows if _icl_word(report, row) == "yes"]
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
    with_ece = paper.kind != "free" and any(report.labelled(row.task) for row in rows)
    if paper.kind == "gaps":
        with_ece = False
    counted = _Counted()
    columns = _columns(paper, with_ece, rows)
    body, beside = [], 0
    for row in rows:
        body.append(_ours(report, paper, row, rows, with_ece, counted))
        theirs = _theirs(paper, row, with_ece, len(columns))
        if theirs:
            body.append(theirs)
            beside += 1
    of = "N" if paper.by == "size" else f"N = {', '.join(map(str, sizes))}"
    title = (
        f"Table {paper.number} of the paper, from these cells: accuracy in percent"
        f"{' and ECE' if with_ece else ''}, mean (sd over seeds), {models}, {of}."
    )
    return Table(
        str(paper.number),
        title,
        columns,
        tuple(body),
        tuple(_notes(report, paper, rows, beside, with_ece) + counted.notes()),
    )


def _columns(paper: PaperTable, with_ece: bool, rows: Sequence[_Row]) -> tuple[Column, ...]:
    columns = [Column("source"), Column("eval")]
    if paper.by:
        columns.append(Column("N" if paper.by == "size" else "LoRA"))
    for recipe in paper.recipes:
        columns.append(Column("acc", TITLES[recipe]))
        if with_ece:
            columns.append(Column("ECE", TITLES[recipe]))
    method = TITLES[METHOD]
    if paper.kind == "gaps":
        columns.append(Column("acc [95%]", f"{method} − ICL"))
    columns.append(Column("acc [95%]", f"{method} − SFT"))
    if with_ece:
        columns.append(Column("ECE [95%]", f"{method} − SFT"))
    return (*columns, Column("ICL works"))


def _ours(
    report: Report, paper: PaperTable, row: _Row, rows: Sequence[_Row], with_ece: bool, counted: _Counted
) -> tuple[Entry, ...]:
    expected = report.expected_seeds(row.task, row.size)
    labelled = report.labelled(row.task)
    measures = ["accuracy"] + ["ece"] * with_ece
    entries: dict[str, list[Entry]] = {}
    for measure in measures:
        entries[measure] = ranked(
            [_entry(row, recipe, measure, expected, labelled, counted) for recipe in paper.recipes],
            higher=measure == "accuracy",
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
    found += [_less(report, row, RIVAL, m) if m == "accuracy" or labelled else Entry("n/a") for m in measures]
    return (*found, Entry(_icl_word(report, row, reason=True)))


def _entry(row: _Row, recipe: str, measure: str, expected: int, labelled: bool, counted: _Counted) -> Entry:
    if measure == "ece" and not labelled:
        return Entry("n/a")
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
        mean_sd(found.mean, found.sd, percent=first, seeds=seeds if first else None), value=as_value(found)
    )


def as_value(found: Summary) -> dict[str, object]:
    """A summary for JSON."""
    return {"mean": found.mean, "sd": found.sd, "seeds": [s for s in found.seeds if s is not None]}


def _less(report: Report, row: _Row, rival: str, measure: str) -> Entry:
    method = row.arms.get(METHOD)
    other = row.arms.get(rival)
    if method is None or other is None:
        return Entry(MISSING)
    found = report.compare(method, other, row.dataset, measure)
    if found is None:
        return Entry(MISSING)
    of = found.interval
    return Entry(
        signed(of.value, of.low, of.high, percent=measure == "accuracy"),
        value={**of.to_dict(), "seeds": sorted(found.by_seed)},
    )


def _icl_word(report: Report, row: _Row, *, reason: bool = False) -> str:
    found = report.icl(row.task, row.size, row.dataset)
    if found is None:
        return MISSING
    return f"{found.verdict}: {found.reason}" if reason and found.verdict != "yes" else found.verdict


def _theirs(paper: PaperTable, row: _Row, with_ece: bool, width: int) -> tuple[Entry, ...] | None:
    """The paper's row below ours, where model, N and settings are the same."""
    match = paper.find(row.task.benchmark, row.dataset, row.task.model, row.size, row.adapter)
    if match is None:
        return None
    entries = [Entry(""), Entry("the paper", "paper")] + [Entry("")] * bool(paper.by)
    for recipe in paper.recipes:
        figure = match.figures[recipe]
        entries.append(_figure(figure, "accuracy"))
        if with_ece:
            entries.append(_figure(figure, "ece"))
    return (*entries, *[Entry("")] * (width - len(entries)))


def _figure(figure: Figure, measure: str) -> Entry:
    if measure == "ece":
        return Entry(
            "n/a" if figure.ece is None else mean_sd(figure.ece, figure.ece_sd, percent=False), "paper"
        )
    sd = None if figure.accuracy_sd is None else figure.accuracy_sd / 100
    return Entry(mean_sd(figure.accuracy / 100, sd, percent=True), "paper")


def _notes(report: Report, paper: PaperTable, rows: Sequence[_Row], beside: int, with_ece: bool) -> list[str]:
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
        "Bold: best trained recipe of the row, underlined: second. Intervals: 95% bootstrap over seeds and "
        f"test rows, paired.{' ECE: 15 bins of equal mass.' if with_ece else ''}"
    )
    there = {task.benchmark for task in tasks}
    if absent := [s for s in dict.fromkeys(row.source for row in paper.rows) if s not in there]:
        notes.append(f"Not trained on here: {', '.join(absent)}.")
    return notes
