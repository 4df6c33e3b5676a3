"""Tables of comparisons, for the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
        f"Model {summary['model']}; data {data['name']}; {design['num_train']} training and "
        f"{design['num_dev']} dev examples, {design['num_test']} {test}; seeds "
        f"{', '.join(map(str, design['seeds']))}; {rates(design)}; ICL uses "
        f"{design['icl_demonstrations']}.",
        "Means over seeds, 95% bootstrap intervals over seeds and rows. ECE has an upward bias on few rows. "
        "Seconds of training are per seed and fold.",
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
    notes = [
        f"- N = {size}: ia2-sft − sft: accuracy {signed(found['accuracy'])}, ECE {signed(found['ece'])}"
        for size, found in summary["differences"].items()
        if found is not None
    ]
    text = "\n".join(lines)
    return (
        f"{text}\n\nModel {summary['model']}; {summary['title']}; 95% intervals.\n\n"
        + "\n".join(notes)
        + "\n"
    )
