"""Tables of comparisons, for the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ia2.sweeps.tables import Column as TableColumn
from ia2.sweeps.tables import Entry, Table
from ia2.wording import rows_learnt_from

Column = tuple[str, Callable[[dict[str, Any]], str]]


def comparison_columns(summary: dict[str, Any]) -> list[Column]:
    """Title and cell of each column; cells take a recipe's entry."""
    labelled = summary["design"]["task"] == "classification"
    main = "vocabulary" if labelled else "answer"

    def metric(scope: str, name: str) -> Callable[[dict[str, Any]], str]:
        return lambda entry: interval(entry["metrics"].get(scope, {}).get(name))

    def scaled(entry: dict[str, Any]) -> str:
        return interval(entry["metrics"].get("scaled", {}).get(main, {}).get("ece"))

    columns: list[Column] = [("accuracy", metric(main, "accuracy"))]
    if labelled:
        columns.append(("acc. in label set", metric("labels", "accuracy")))
    columns += [
        ("ECE", metric(main, "ece")),
        ("ECE, temp.-scaled", scaled),
        ("NLL", metric(main, "nll")),
        ("asim to ICL", lambda entry: interval(entry.get("asim"))),
        ("seconds", seconds),
    ]
    return columns


def interval(value: dict[str, Any] | None) -> str:
    """``0.812 [.76–.86]``: short enough for a table of seven columns in a terminal."""
    if value is None or value["value"] is None:
        return "–"
    if value["low"] is None or value["high"] is None:
        return f"{value['value']:.3f}"
    low, high = (f"{value[end]:.2f}".removeprefix("0") for end in ("low", "high"))
    return f"{value['value']:.3f} [{low}–{high}]"


def seconds(entry: dict[str, Any]) -> str:
    """``teacher 3 + align 20 + sft 5``; a dash for recipes without training."""
    parts = [f"{name} {value:.0f}" for name, value in entry["seconds"].items() if name != "evaluate"]
    return " + ".join(parts) if parts else "–"


def comparison_lines(summary: dict[str, Any]) -> list[str]:
    """What the table is of, in sentences."""
    design = summary["design"]
    data = summary["data"]
    test = "test rows" if data["test"] else f"rows, {design['kind']}"
    return [
        f"Model {summary['model']}; data {data['name']}; {rows_learnt_from(design)}, {design['num_test']} "
        f"{test}; seeds "
        f"{', '.join(map(str, design['seeds']))}; {rates(design)}; ICL uses "
        f"{design['icl_demonstrations']}.",
        "Means over seeds, 95% bootstrap intervals over seeds and rows. ECE has an upward bias on few rows. "
        "Seconds of training are per seed and fold.",
        *_diverged(summary.get("diverged", {})),
        *(
            f"{name} diverged at {', '.join(entry['diverged'])}; another rate is chosen."
            for name, entry in summary["recipes"].items()
            if entry.get("diverged")
        ),
    ]


def _diverged(found: dict[str, str]) -> list[str]:
    return [
        f"{name} diverged at every learning rate ({rates}) and is left out." for name, rates in found.items()
    ]


def rates(design: dict[str, Any]) -> str:
    """``rate 0.001 by dev loss``, by adapter type where they differ."""
    tried = {
        kind: "/".join(f"{rate:g}" for rate in rates) for kind, rates in design["learning_rates"].items()
    }
    if not tried:
        return "nothing trained"
    shown = next(iter(tried.values()))
    if len(set(tried.values())) > 1:
        shown = ", ".join(f"{rate} ({kind})" for kind, rate in tried.items())
    return f"rate {shown} by {design['selected_by']}"


def difference_lines(summary: dict[str, Any]) -> list[str]:
    """The paired differences, as sentences."""
    return [
        f"{name}: accuracy {signed(found['accuracy'])}, ECE {signed(found['ece'])} (paired by row, seed)"
        for name, found in summary["differences"].items()
    ]


def signed(value: dict[str, Any]) -> str:
    """``+0.09 [+0.02, +0.15]``."""
    if value["value"] is None:
        return "–"
    if value["low"] is None or value["high"] is None:
        return f"{value['value']:+.3f}"
    return f"{value['value']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"


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
    """Accuracy and ECE by size and recipe."""
    rows = [
        [recipe, title, *(interval(point[name]) for point in points)]
        for name, title in (("accuracy", "accuracy"), ("ece", "ECE"))
        for recipe, points in summary["curves"].items()
    ]
    columns = ["recipe", "measure", *(f"N = {size}" for size in summary["sizes"])]
    title = f"{summary['model']} by the number of training examples N."
    return _table(
        "curve", title, columns, rows, [f"{summary['title']}; 95% intervals.", *_curve_lines(summary)]
    )


def metrics_table(metrics: dict[str, Any]) -> Table | None:
    """Metrics of one adapter by scope; None where it was not evaluated."""
    part = "test" if "test" in metrics else "dev"
    if part not in metrics:
        return None
    found = metrics[part]
    scopes = {"vocabulary": "over the vocabulary", "labels": "over the label set", "answer": "whole answer"}
    shown = [scope for scope in scopes if scope in found]
    rows = [
        [name, *(interval(found[scope][name]) for scope in shown)]
        for name in ("accuracy", "ece", "ece_equal_width", "brier", "nll")
    ]
    if "scaled" in found:
        rows.append(["ece, temperature-scaled", *(interval(found["scaled"][s]["ece"]) for s in shown)])
    notes = [f"{metrics['note'].capitalize()}."] if "note" in metrics else []
    title = f"{metrics['recipe']} on {found['n']} {part} rows, with 95% intervals."
    return _table("metrics", title, ["metric", *(scopes[scope] for scope in shown)], rows, notes)


def _table(
    name: str, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]
) -> Table:
    entries = tuple(tuple(map(Entry, row)) for row in rows)
    return Table(name, title, tuple(map(TableColumn, columns)), entries, tuple(notes))


def comparison_markdown(summary: dict[str, Any]) -> str:
    """The table with what it is of and the paired differences."""
    columns = comparison_columns(summary)
    lines = [
        "| recipe | " + " | ".join(title for title, _ in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for recipe, entry in summary["recipes"].items():
        cells = [cell(entry) for _, cell in columns]
        lines.append(f"| `{recipe}` | " + " | ".join(cells) + " |")
    text = "\n".join(lines)
    notes = "\n\n".join(comparison_lines(summary))
    differences = "\n".join(f"- {line}" for line in difference_lines(summary))
    return f"{text}\n\n{notes}\n\n{differences}\n"


def curve_markdown(summary: dict[str, Any]) -> str:
    """Accuracy and ECE by size and recipe, and the paired differences to fine-tuning."""
    sizes = summary["sizes"]
    lines = [
        "| recipe | " + " | ".join(f"N = {size}" for size in sizes) + " |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    for name, title in (("accuracy", "accuracy"), ("ece", "ECE")):
        for recipe, points in summary["curves"].items():
            cells = [interval(point[name]) for point in points]
            lines.append(f"| `{recipe}`, {title} | " + " | ".join(cells) + " |")
    notes = [f"- {line}" for line in _curve_lines(summary)]
    text = "\n".join(lines)
    return (
        f"{text}\n\nModel {summary['model']}; {summary['title']}; 95% intervals.\n\n"
        + "\n".join(notes)
        + "\n"
    )


def _curve_lines(summary: dict[str, Any]) -> list[str]:
    left_out = [
        f"N = {size}: {line}"
        for size, found in summary.get("diverged", {}).items()
        for line in _diverged(found)
    ]
    return left_out + [
        f"N = {size}: ia2-sft − sft: accuracy {signed(found['accuracy'])}, ECE {signed(found['ece'])}"
        for size, found in summary["differences"].items()
        if found is not None
    ]
