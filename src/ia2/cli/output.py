"""What commands print on stdout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ia2.config import CompareConfig, TrainConfig
from ia2.utils.errors import ConfigError
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


def start_run(config: TrainConfig | CompareConfig, quiet: bool) -> str:
    """Start a command that writes a run; gives the run's folder."""
    folder = config.output_dir
    start(quiet, folders=[folder])
    if not folder:
        raise ConfigError("no output folder given. Name one with --output-dir.")
    return folder


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    print(escaped(json_text(value, indent=2, default=str)))


def print_metrics(metrics: dict[str, Any]) -> None:
    """The metrics of one adapter as a table."""
    from ia2.evaluation.tables import metrics_table

    if "chosen_because" in metrics:
        print(f"Recipe: {metrics['recipe']}. {metrics['chosen_because']}")
    table = metrics_table(metrics)
    if table is None:
        print("Not evaluated: there were neither test nor dev rows. Name some with --test-data, or ask")
        print("`ia2 compare`, which holds out each row in turn.")
        return
    print_table(*table.texts(), title=table.title.rstrip("."), wide=False)
    if "similarity_to_icl" in metrics:
        print(f"asim to ICL: {metrics['similarity_to_icl']['asim']:.3f}")
    for note in table.notes:
        print(f"Note: {note}")


def print_comparison(summary: dict[str, Any]) -> None:
    """A comparison as a table with what it is of."""
    from ia2.evaluation.tables import comparison_table

    table = comparison_table(summary)
    print_table(*table.texts())
    for note in table.notes:
        print(note)


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    numbers: bool = True,
    wide: bool = True,
) -> None:
    """A table whose first column names the rows.

    Args:
        columns: their titles.
        rows: their cells.
        title: above it.
        numbers: the other columns are numbers, written to the right.
        wide: it would be squeezed beyond reading in a pipe or a narrow log.
    """
    from rich.table import Table

    table = Table(title=title)
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if numbers and place else "left", no_wrap=wide and not place)
    for row in rows:
        table.add_row(*row)
    console = terminal()
    (terminal(width=160) if wide and not console.is_terminal else console).print(table)
