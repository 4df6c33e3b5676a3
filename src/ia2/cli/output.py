"""What commands print on stdout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ia2.utils.files import check_writable, json_text
from ia2.utils.logging import configure, escaped, terminal


def start(
    quiet: bool, *, files: Sequence[Path | None] = (), folders: Sequence[str | Path | None] = ()
) -> None:
    """Set up log lines and progress bars for this command, and see to it that its outputs can be written.

    Raises:
        RunFolderError: one of these files or folders cannot.
    """
    configure(quiet=quiet)
    for file in files:
        if file is not None:
            check_writable(file)
    for folder in folders:
        if folder is not None:
            check_writable(Path(folder), folder=True)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    print(escaped(json_text(value, indent=2, default=str)))


def print_metrics(metrics: dict[str, Any]) -> None:
    """The metrics of one adapter as a table."""
    from rich.table import Table

    from ia2.report.tables import metrics_rows

    if "chosen_because" in metrics:
        print(f"Recipe: {metrics['recipe']}. {metrics['chosen_because']}")
    found = metrics_rows(metrics)
    if found is None:
        print("Not evaluated: there were neither test nor dev rows.")
        return
    of, columns, rows = found
    table = Table(title=f"{metrics.get('recipe', '')} on {of}")
    for place, title in enumerate(columns):
        table.add_column(title, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    terminal().print(table)
    if "similarity_to_icl" in metrics:
        print(f"asim to ICL: {metrics['similarity_to_icl']['asim']:.3f}")
    if "note" in metrics:
        print(f"Note: {metrics['note']}.")


def print_comparison(summary: dict[str, Any]) -> None:
    """A comparison as a table with what it is of."""
    from rich.table import Table

    from ia2.report.tables import comparison_columns, comparison_lines, difference_lines

    columns = comparison_columns(summary)
    table = Table()
    table.add_column("recipe", no_wrap=True)
    for title, _ in columns:
        table.add_column(title, justify="right")
    for recipe, entry in summary["recipes"].items():
        table.add_row(recipe, *(cell(entry) for _, cell in columns))
    print_wide(table)
    for line in [*comparison_lines(summary), *difference_lines(summary)]:
        print(line)


def print_wide(table: Any) -> None:
    """A table that would be squeezed beyond reading in a pipe or a narrow log."""
    console = terminal()
    (console if console.is_terminal else terminal(width=160)).print(table)
