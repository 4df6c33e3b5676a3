"""Tables of comparisons, for the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ia2.utils.format import Column as TableColumn
from ia2.utils.format import Entry, Table, pipes
from ia2.utils.statistics import main_scope
from ia2.utils.wording import MISSING, counted, estimate, rows_learnt_from

Column = tuple[str, Callable[[dict[str, Any]], str]]

INTERVALS = "t over draws"
"""How summaries of comparisons and curves say that their intervals are made."""

MEASURES = {"accuracy": "accuracy", "nll": "NLL", "brier": "Brier", "ece": "ECE"}
"""In the order in which they are shown: proper scores before ECE, which few rows cannot decide."""

SCOPES = {"labels": "among the labels", "answer": "of the whole answer", "vocabulary": "over the vocabulary"}
"""Where metrics are taken, in the order in which they are shown."""


def comparison_columns(summary: dict[str, Any]) -> list[Column]:
    """Title and cell of each column; cells take a recipe's entry."""
    labelled = summary["design"]["task"] == "classification"
    main = main_scope(labelled)

    def metric(scope: str, name: str) -> Callable[[dict[str, Any]], str]:
        return lambda entry: estimate(entry["metrics"].get(scope, {}).get(name))

    def scaled(entry: dict[str, Any]) -> str:
        return mean_of(entry["metrics"].get("scaled", {}).get(main, {}).get("ece"))

    among = f" {SCOPES[main]}" if labelled else ""
    columns: list[Column] = [
        (f"{title}{among}" if name == "accuracy" else title, metric(main, name))
        for name, title in MEASURES.items()
    ]
    if labelled:
        columns.append(
            (
                "acc. over the vocabulary",
                lambda e: mean_of(e["metrics"].get("vocabulary", {}).get("accuracy")),
            )
        )
    return [
        *columns,
        ("ECE, temp.-scaled", scaled),
        ("asim to ICL", lambda entry: mean_of(entry.get("asim"))),
        ("answers", lambda entry: entry.get("answers") or MISSING),
        ("seconds", seconds),
    ]


def mean_of(found: Mapping[str, Any] | None) -> str:
    """A mean without its interval, where a table has no room."""
    return estimate(None if found is None else {**found, "low": None, "high": None})


def seconds(entry: dict[str, Any]) -> str:
    """``teacher 3 + align 20 + sft 5``; a dash for recipes without training."""
    parts = [f"{name} {value:.0f}" for name, value in entry["seconds"].items() if name != "evaluate"]
    return " + ".join(parts) if parts else MISSING


def of_draws(count: int) -> str:
    """What intervals are of: ``95% t-intervals over 5 draws``, or that one draw has none."""
    if count < 2:
        return "one draw of training examples: no intervals"
    return f"95% t-intervals over {counted(count, 'draw')} of training examples"


def intervals_of(summary: Mapping[str, Any]) -> str:
    """The same of a comparison or curve; of one that an older version wrote, that it has none."""
    if summary.get("intervals") != INTERVALS:
        return "written by an older version, whose intervals were too narrow and are left out"
    return of_draws(len(summary["seeds"] if "seeds" in summary else summary["design"]["seeds"]))


def comparison_lines(summary: dict[str, Any]) -> list[str]:
    """What the table is of, in sentences."""
    design = summary["design"]
    data = summary["data"]
    test = "test rows" if data["test"] else f"rows, {design['kind']}"
    how = intervals_of(summary)
    among = "NLL, Brier and ECE are among the labels. " if design["task"] == "classification" else ""
    return [
        f"Model {summary['model']}; data {data['name']}; {rows_learnt_from(design)}, {design['num_test']} "
        f"{test}; seeds "
        f"{', '.join(map(str, design['seeds']))}; {rates(design)}; ICL uses "
        f"{design['icl_demonstrations']}.",
        f"{how[0].upper()}{how[1:]}. {among}ECE has an upward bias on few rows. Answers: what "
        "is learned in the "
        "last supervised stage. Seconds of training are per seed and fold.",
        *_headroom_lines(summary),
        *_diverged(summary.get("diverged", {})),
        *(
            f"{name} diverged at {', '.join(entry['diverged'])}; another rate is chosen."
            for name, entry in summary["recipes"].items()
            if entry.get("diverged")
        ),
    ]


def _headroom_lines(summary: Mapping[str, Any]) -> list[str]:
    """What alignment could carry over: ICL less SFT, and what the bare model does."""
    scope = main_scope(summary["design"]["task"] == "classification")
    base = summary["recipes"].get("base")
    bare = f"base {mean_of(base['metrics'][scope]['accuracy'])}" if base else "the base model was not run"
    found = summary.get("headroom") or {}
    listed = "; ".join(f"{name}: {estimate(less['accuracy'], signed=True)}" for name, less in found.items())
    return [f"Headroom, accuracy {SCOPES[scope]}: {listed or 'ICL and SFT were not both run'}; {bare}."]


def _diverged(found: dict[str, str]) -> list[str]:
    return [
        f"{name} diverged at every learning rate ({rates}) and is left out." for name, rates in found.items()
    ]


def rates(design: dict[str, Any]) -> str:
    """``rate 0.001 by dev loss``, by adapter type where they differ; only the rate where nothing chose."""
    tried = {
        kind: "/".join(f"{rate:g}" for rate in rates) for kind, rates in design["learning_rates"].items()
    }
    if not tried:
        return "nothing trained"
    shown = next(iter(tried.values()))
    if len(set(tried.values())) > 1:
        shown = ", ".join(f"{rate} ({kind})" for kind, rate in tried.items())
    return f"rate {shown}" + (f" by {design['selected_by']}" if design["selected_by"] else "")


def difference_lines(summary: dict[str, Any]) -> list[str]:
    """The paired differences, as sentences."""
    return [
        f"{name}: {_less(found)} (paired by draw and row{unlike(found)})"
        for name, found in summary["differences"].items()
    ]


def unlike(found: Mapping[str, Any]) -> str:
    """That the two of a difference learned other answers; empty where they learned the same."""
    answers = found.get("answers")
    return "" if not answers else f"; not like for like: {answers[0]} answers against {answers[1]}"


def _less(found: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{title} {estimate(found[name], signed=True)}" for name, title in MEASURES.items() if name in found
    )


def comparison_table(summary: dict[str, Any]) -> Table:
    """The same table as one that LaTeX and pages can set; the differences are among its notes."""
    columns = comparison_columns(summary)
    design = summary["design"]
    return _table(
        "comparison",
        f"{summary['model']} on {summary['data']['name']}, {design['num_train']} training examples.",
        ["recipe", *(title for title, _ in columns)],
        [[name, *(cell(entry) for _, cell in columns)] for name, entry in summary["recipes"].items()],
        [*comparison_lines(summary), *(f"{line}." for line in difference_lines(summary))],
    )


def curve_table(summary: dict[str, Any]) -> Table:
    """Every measure by size and recipe."""
    columns = ["recipe", "measure", *(f"N = {size}" for size in summary["sizes"])]
    rows = [[recipe, title, *cells] for recipe, title, cells in _curve_rows(summary)]
    title = f"{summary['model']} by the number of training examples N."
    return _table("curve", title, columns, rows, [f"{summary['title']}.", *_curve_lines(summary)])


def _curve_rows(summary: Mapping[str, Any]) -> list[tuple[str, str, list[str]]]:
    """Recipe, measure and its number at each size; only what was measured."""
    found = []
    for name, title in {**MEASURES, "accuracy_vocabulary": "accuracy over the vocabulary"}.items():
        for recipe, points in summary["curves"].items():
            if any(name in point for point in points):
                found.append((recipe, title, [estimate(point.get(name)) for point in points]))
    return found


def metrics_rows(metrics: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]] | None:
    """Of one adapter: what it was measured on, columns and rows; None where it was not evaluated."""
    part = "test" if "test" in metrics else "dev"
    if part not in metrics:
        return None
    found = metrics[part]
    shown = [scope for scope in SCOPES if scope in found]
    names = {**MEASURES, "ece_equal_width": "ECE, bins of equal width"}
    rows = [[title, *(mean_of(found[scope][name]) for scope in shown)] for name, title in names.items()]
    if "scaled" in found:
        rows.append(["ECE, temperature-scaled", *(mean_of(found["scaled"][s]["ece"]) for s in shown)])
    of = f"{found['n']} {part} rows, {of_draws(1)}"
    return of, ["metric", *(SCOPES[scope] for scope in shown)], rows


def metrics_table(metrics: dict[str, Any]) -> Table | None:
    """Metrics of one adapter by scope; None where it was not evaluated."""
    found = metrics_rows(metrics)
    if found is None:
        return None
    of, columns, rows = found
    notes = [f"{metrics['note'].capitalize()}."] if "note" in metrics else []
    return _table("metrics", f"{metrics['recipe']} on {of}.", columns, rows, notes)


def _table(
    name: str, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]
) -> Table:
    entries = tuple(tuple(map(Entry, row)) for row in rows)
    return Table(name, title, tuple(map(TableColumn, columns)), entries, tuple(notes))


def comparison_markdown(summary: dict[str, Any]) -> str:
    """The table with what it is of and the paired differences."""
    columns = comparison_columns(summary)
    rows = [
        [f"`{name}`", *(cell(entry) for _, cell in columns)] for name, entry in summary["recipes"].items()
    ]
    text = pipes(["recipe", *(title for title, _ in columns)], rows)
    notes = "\n\n".join(comparison_lines(summary))
    differences = "\n".join(f"- {line}" for line in difference_lines(summary))
    return f"{text}\n\n{notes}\n\n{differences}\n"


def curve_markdown(summary: dict[str, Any]) -> str:
    """Every measure by size and recipe, and the paired differences to fine-tuning."""
    rows = [[f"`{recipe}`, {title}", *cells] for recipe, title, cells in _curve_rows(summary)]
    text = pipes(["recipe", *(f"N = {size}" for size in summary["sizes"])], rows)
    notes = "\n".join(f"- {line}" for line in _curve_lines(summary))
    return f"{text}\n\nModel {summary['model']}; {summary['title']}.\n\n{notes}\n"


def _curve_lines(summary: dict[str, Any]) -> list[str]:
    scope = main_scope(summary.get("task") != "generation")
    left_out = [
        f"N = {size}: {line}"
        for size, found in summary.get("diverged", {}).items()
        for line in _diverged(found)
    ]
    headroom = [
        f"N = {size}: headroom, icl − sft: accuracy {estimate(found['accuracy'], signed=True)}"
        for size, found in summary.get("headroom", {}).items()
        if found
    ]
    return [
        f"Measures {SCOPES[scope]} unless they say otherwise; {intervals_of(summary)}.",
        *left_out,
        *headroom,
        *(
            f"N = {size}: ia2-sft − sft: {_less(found)}"
            for size, found in summary["differences"].items()
            if found
        ),
    ]
