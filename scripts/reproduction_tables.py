"""Write the tables of docs/reproduction.md again from the committed cells.

    python scripts/reproduction_tables.py [--check]

Each stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; the text around them is left as it is. With
``--check`` nothing is written, and the exit code is 1 if the page says anything else than the cells.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path

from ia2.errors import ConfigError
from ia2.files import write_text
from ia2.sweeps.printing import make_report, print_tables
from ia2.sweeps.records import filtered
from ia2.sweeps.report import METHOD, RIVAL, TITLES, Report
from ia2.sweeps.selection import Task
from ia2.sweeps.statistics import by_seed
from ia2.sweeps.tables import markdown, signed

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reproduction.md"
SMALL = ROOT / "results" / "small"
VARIANTS = ROOT / "results" / "small-variants"

OTHERS = ("ia2+sft", "soft-sft")
COMPARED = (RIVAL, "ia2", METHOD, *OTHERS)


def results() -> list[str]:
    """Table 1 of every model and N, as one."""
    whole = make_report([SMALL])
    lines: list[str] = []
    for model in whole.models:
        for size in whole.sizes:
            try:
                found = print_tables(make_report([SMALL], models=[model], sizes=[str(size)]), "1").tables
            except ConfigError:  # no labels are trained on at this N
                continue
            for table in found:
                head, rule, *rows = _rows(markdown(table))
                lines = lines or [f"| model | N {head}", f"|---|---{rule}"]
                lines += [f"| {model} | {size} {row}" for row in rows]
    return lines


def others() -> list[str]:
    """Accuracy on the benchmark's own rows over the draws that joint training and distillation have."""
    report = make_report([SMALL])
    columns = ["model", "N", "benchmark", "draws", *(TITLES[recipe] for recipe in COMPARED)]
    columns += [f"{TITLES[recipe]} less {TITLES[METHOD]} [95%]" for recipe in OTHERS]
    found = []
    for task in report.tasks:
        for size in report.sizes:
            line = _compared(report, task, size)
            if line is not None:
                found.append(((report.models.index(task.model), size), _row(line)))
    return [_row(columns), "|---" * len(columns) + "|", *(row for _, row in sorted(found, key=itemgetter(0)))]


def _compared(report: Report, task: Task, size: int) -> list[str] | None:
    """A row of :func:`others`: means and differences over the seeds that all five recipes have."""
    there = [report.plain(task, size, recipe) for recipe in COMPARED]
    seeds = sorted(
        set.intersection(*({s for s in arm.runs if s is not None} if arm else set() for arm in there))
    )
    if not seeds:
        return None
    # other seeds of some recipes would otherwise be in their means alone
    kept = filtered(report.results, benchmarks=[task.benchmark], models=[task.model], seeds=seeds)
    same = Report(kept, report.select)
    arms = {recipe: arm for recipe in COMPARED if (arm := same.plain(task, size, recipe)) is not None}
    line = [task.model, str(size), task.benchmark, str(len(seeds))]
    for arm in arms.values():
        values = by_seed(arm, task.benchmark, "accuracy").values()
        line.append(f"{100 * sum(values) / len(values):.1f}")
    for recipe in OTHERS:
        less = same.compare(arms[recipe], arms[METHOD], task.benchmark, "accuracy")
        assert less is not None  # they have the same seeds
        line.append(signed(less.interval.value, less.interval.low, less.interval.high, percent=True))
    return line


def icl() -> list[str]:
    """``ia2 report results/small --table icl``."""
    return _rows(markdown(print_tables(make_report([SMALL]), "icl").tables[0]))


def variants() -> list[str]:
    """``ia2 report results/small results/small-variants --table variants``."""
    return _rows(markdown(print_tables(make_report([SMALL, VARIANTS]), "variants").tables[0]))


TABLES: dict[str, Callable[[], list[str]]] = {
    "results": results,
    "others": others,
    "icl": icl,
    "variants": variants,
}


def _row(fields: Sequence[str]) -> str:
    return f"| {' | '.join(fields)} |"


def _rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


def rewritten(text: str) -> str:
    """The page with its tables made again.

    Raises:
        ValueError: a table is not marked, or marked more than once.
    """
    for name, make in TABLES.items():
        block = re.compile(rf"(<!-- table: {name} -->\n\n).*?(\n\n<!-- end -->)", re.DOTALL)
        if len(block.findall(text)) != 1:
            raise ValueError(f"{PAGE.name}: table {name} is not marked once")
        made = "\n".join(make())
        text = block.sub(lambda found, made=made: found[1] + made + found[2], text)  # type: ignore[misc]
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args(arguments).check
    old = PAGE.read_text(encoding="utf-8")
    new = rewritten(old)
    changes = list(
        difflib.unified_diff(old.splitlines(), new.splitlines(), "page", "cells", n=0, lineterm="")
    )
    print("\n".join(changes) or f"{PAGE.name}: its tables are those of the cells.")
    if not check:
        write_text(PAGE, new)
    return int(check and bool(changes))


if __name__ == "__main__":
    sys.exit(main())
