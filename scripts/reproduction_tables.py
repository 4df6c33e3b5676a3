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
from pathlib import Path

from ia2.experiment.sweep.records import filtered
from ia2.report.sweep.cells import METHOD, RIVAL, TITLES, Place, Report
from ia2.report.sweep.entries import interval_entry
from ia2.report.sweep.own_tables import headroom_fields
from ia2.report.sweep.printing import make_report, print_tables
from ia2.report.sweep.selection import Arm, Task, differences
from ia2.utils.files import write_text
from ia2.utils.format import Entry, Fields, Table, fill, markdown
from ia2.utils.statistics import t_interval
from ia2.utils.wording import MISSING

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reproduction.md"
SMALL = ROOT / "results" / "small"
VARIANTS = ROOT / "results" / "small-variants"

SHOWN = ("base", "icl", RIVAL, "ia2", METHOD)
GAINS = {"accuracy": "accuracy", "nll": "NLL", "accuracy_vocabulary": "accuracy over the vocabulary"}
OTHERS = ("ia2+sft", "soft-sft")
COMPARED = (RIVAL, "ia2", METHOD, *OTHERS)


def results() -> Table:
    """Accuracy among the labels of every recipe, and what IA2 → SFT gains over SFT."""
    report = make_report([SMALL])
    rows = [
        (place, pair)
        for model in report.models
        for size in report.sizes
        for place in report.places(model=model, size=size)
        if report.labelled(place.task) and (pair := report.pair(place.task, size))
        if differences(*pair, place.dataset, "accuracy")
    ]
    fields: Fields = [
        ("model", lambda place, pair: place.task.model),
        ("N", lambda place, pair: str(place.size)),
        ("source", lambda place, pair: place.task.benchmark),
        ("eval", lambda place, pair: place.dataset),
        ("draws", lambda place, pair: str(len(differences(*pair, place.dataset, "accuracy")))),
        *(
            (
                TITLES[name],
                lambda place, pair, name=name: _mean(report, name, place.task, place.size, place.dataset),
            )
            for name in SHOWN
        ),
        *(
            (
                f"{TITLES[METHOD]} − SFT: {title} [95%]",
                lambda place, pair, measure=measure: _less(pair, place.dataset, measure),
            )
            for measure, title in GAINS.items()
        ),
        *headroom_fields(report)[1:],
    ]
    return fill("results", "", fields, rows)


def _mean(report: Report, recipe: str, task: Task, size: int, dataset: str) -> str:
    arm = report.plain(task, size, recipe)
    values = list(arm.values(dataset, "accuracy").values()) if arm else []
    return f"{100 * sum(values) / len(values):.1f}" if values else MISSING


def _less(pair: tuple[Arm, Arm], dataset: str, measure: str) -> Entry:
    found = t_interval(list(differences(*pair, dataset, measure).values()))
    return interval_entry(found, signed=True, percent=measure.startswith("accuracy"))


def others() -> Table:
    """Accuracy on the benchmark's own rows over the draws that joint training and distillation have."""
    report = make_report([SMALL])
    places = [
        place
        for model in report.models
        for size in report.sizes
        for place in report.places(own=True, model=model, size=size)
    ]
    rows = [(place, *found) for place in places if (found := _compared(report, place))]
    # a recipe and the answers that its cells here were fine-tuned on: they are no like for like
    answers = {arm.recipe: arm.answers for arm in reversed(report.arms)}
    titles = {
        name: TITLES[name] + (f", {answers[name]} answers" if answers[name] else "") for name in COMPARED
    }
    fields: Fields = [
        ("model", lambda place, *_: place.task.model),
        ("N", lambda place, *_: str(place.size)),
        ("benchmark", lambda place, *_: place.dataset),
        ("draws", lambda place, seeds, _: str(len(seeds))),
        *(
            (
                title,
                lambda place, _, same, name=name: _mean(same, name, place.task, place.size, place.dataset),
            )
            for name, title in titles.items()
        ),
        *(
            (
                f"{TITLES[name]} less {TITLES[METHOD]} [95%]",
                lambda place, _, same, name=name: _less(
                    tuple(same.plain(place.task, place.size, recipe) for recipe in (name, METHOD)),
                    place.dataset,
                    "accuracy",
                ),
            )
            for name in OTHERS
        ),
    ]
    return fill("others", "", fields, rows)


def _compared(report: Report, place: Place) -> tuple[list[int], Report] | None:
    """The seeds that all five recipes have, and the cells of these seeds alone."""
    there = [report.plain(place.task, place.size, recipe) for recipe in COMPARED]
    seeds = sorted(set.intersection(*(set(arm.runs) - {None} if arm else set() for arm in there)))
    if not seeds:
        return None
    # other seeds of some recipes would otherwise be in their means alone
    kept = filtered(report.results, benchmarks=[place.task.benchmark], models=[place.task.model], seeds=seeds)
    return seeds, Report(kept, report.select)


def variants() -> Table:
    """``ia2 report results/small results/small-variants --table variants``."""
    return print_tables(make_report([SMALL, VARIANTS]), "variants").tables[0]


TABLES: dict[str, Callable[[], Table]] = {"results": results, "others": others, "variants": variants}


def rewritten(text: str) -> str:
    """The page with its tables made again.

    Raises:
        ValueError: a table is not marked, or marked more than once.
    """
    for name, make in TABLES.items():
        block = re.compile(rf"(<!-- table: {name} -->\n\n).*?(\n\n<!-- end -->)", re.DOTALL)
        if len(block.findall(text)) != 1:
            raise ValueError(f"{PAGE.name}: table {name} is not marked once")
        made = "\n".join(line for line in markdown(make()).splitlines() if line.startswith("|"))
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
