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

from ia2.files import write_text
from ia2.sweeps.layouts import headroom_entries
from ia2.sweeps.printing import make_report, print_tables
from ia2.sweeps.records import filtered
from ia2.sweeps.report import METHOD, RIVAL, TITLES, Report, answers_of
from ia2.sweeps.selection import Task
from ia2.sweeps.statistics import by_seed, summarise
from ia2.sweeps.tables import markdown
from ia2.wording import MISSING, estimate

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reproduction.md"
SMALL = ROOT / "results" / "small"
VARIANTS = ROOT / "results" / "small-variants"

SHOWN = ("base", "icl", RIVAL, "ia2", METHOD)
GAINS = {"accuracy": "accuracy", "nll": "NLL", "accuracy_vocabulary": "accuracy over the vocabulary"}
OTHERS = ("ia2+sft", "soft-sft")
COMPARED = (RIVAL, "ia2", METHOD, *OTHERS)


def results() -> list[str]:
    """Accuracy among the labels of every recipe, and what IA2 → SFT gains over SFT."""
    report = make_report([SMALL])
    columns = ["model", "N", "source", "eval", "draws", *(TITLES[recipe] for recipe in SHOWN)]
    columns += [f"{TITLES[METHOD]} − SFT: {title} [95%]" for title in GAINS.values()]
    columns += ["ICL − SFT [95%]", "ICL works"]
    lines = []
    for model in report.models:
        for size in report.sizes:
            for task in (task for task in report.tasks if task.model == model and report.labelled(task)):
                for dataset in report.datasets(task):
                    if line := _result(report, task, size, dataset):
                        lines.append(_row([model, str(size), task.benchmark, dataset, *line]))
    return [_row(columns), "|---" * len(columns) + "|", *lines]


def _result(report: Report, task: Task, size: int, dataset: str) -> list[str]:
    """The rest of a row of :func:`results`; empty without both recipes."""
    pair = report.pair(task, size)
    if pair is None or (less := report.compare(*pair, dataset, "accuracy")) is None:
        return []
    found = []
    for recipe in SHOWN:
        arm = report.plain(task, size, recipe)
        of = None if arm is None else summarise(arm, dataset, "accuracy")
        found.append(MISSING if of is None else f"{100 * of.mean:.1f}")
    for measure in GAINS:
        gain = report.compare(*pair, dataset, measure)
        percent = measure.startswith("accuracy")
        found.append(
            estimate(None if gain is None else gain.interval.to_dict(), signed=True, percent=percent)
        )
    _, headroom, works = headroom_entries(report, task, size, dataset)
    return [str(len(less.by_seed)), *found, headroom.text, works.text]


def others() -> list[str]:
    """Accuracy on the benchmark's own rows over the draws that joint training and distillation have."""
    report = make_report([SMALL])
    columns = ["model", "N", "benchmark", "draws", *(_with_answers(recipe) for recipe in COMPARED)]
    columns += [f"{TITLES[recipe]} less {TITLES[METHOD]} [95%]" for recipe in OTHERS]
    found = []
    for task in report.tasks:
        for size in report.sizes:
            line = _compared(report, task, size)
            if line is not None:
                found.append(((report.models.index(task.model), size), _row(line)))
    return [_row(columns), "|---" * len(columns) + "|", *(row for _, row in sorted(found, key=itemgetter(0)))]


def _with_answers(recipe: str) -> str:
    """A recipe and the answers that its cells here were fine-tuned on: they are no like for like."""
    answers = next(answers_of(arm) for arm in make_report([SMALL]).arms if arm.recipe == recipe)
    return TITLES[recipe] if answers is None else f"{TITLES[recipe]}, {answers} answers"


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
        line.append(estimate(less.interval.to_dict(), signed=True, percent=True))
    return line


def variants() -> list[str]:
    """``ia2 report results/small results/small-variants --table variants``."""
    return _rows(markdown(print_tables(make_report([SMALL, VARIANTS]), "variants").tables[0]))


TABLES: dict[str, Callable[[], list[str]]] = {
    "results": results,
    "others": others,
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
