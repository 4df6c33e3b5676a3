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

from ia2.config.recipes import METHOD, PLAIN
from ia2.experiment.sweep.records import filtered
from ia2.report.sweep.cells import TITLES, Place, Report
from ia2.report.sweep.own_tables import headroom
from ia2.report.sweep.printing import make_report, print_tables
from ia2.report.sweep.selection import ChosenRuns, differences
from ia2.utils.files import write_text
from ia2.utils.format import Column, Entry, Row, Table, fill, interval_entry, markdown
from ia2.utils.statistics import t_interval
from ia2.utils.wording import MISSING

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reproduction.md"
SMALL = ROOT / "results" / "small"
VARIANTS = ROOT / "results" / "small-variants"

SHOWN = ("base", "icl", PLAIN, "ia2", METHOD)
GAINS = {"accuracy": "accuracy", "nll": "NLL", "accuracy_vocabulary": "accuracy over the vocabulary"}
OTHERS = ("ia2+sft", "soft-sft")
COMPARED = (PLAIN, "ia2", METHOD, *OTHERS)


def results() -> Table:
    """Accuracy among the labels of every recipe, and what IA2 → SFT gains over SFT."""
    report = make_report([SMALL])
    rows: list[Row] = []
    for place in _places(report):
        pair = report.pair(place.task, place.size) if report.labelled(place.task) else None
        draws = differences(*pair, place.dataset, "accuracy") if pair else {}
        if pair is None or not draws:
            continue
        gaps = headroom(report, place)
        rows.append(
            {
                "model": place.task.model,
                "N": str(place.size),
                "source": place.task.benchmark,
                "eval": place.dataset,
                "draws": str(len(draws)),
                **{TITLES[name]: _mean(report, name, place) for name in SHOWN},
                **{
                    f"{TITLES[METHOD]} − SFT: {title} [95%]": _less(pair, place.dataset, measure)
                    for measure, title in GAINS.items()
                },
                **{column: entry for column, entry in gaps.items() if column != "base"},
            }
        )
    return fill("results", "", rows)


def _places(report: Report, *, own: bool = False) -> list[Place]:
    return [
        place
        for model in report.models
        for size in report.sizes
        for place in report.places(own=own, model=model, size=size)
    ]


def _mean(report: Report, recipe: str, place: Place) -> str:
    runs = report.plain(place.task, place.size, recipe)
    values = list(runs.values(place.dataset, "accuracy").values()) if runs else []
    return f"{100 * sum(values) / len(values):.1f}" if values else MISSING


def _less(pair: tuple[ChosenRuns | None, ...], dataset: str, measure: str) -> Entry:
    first, second = pair
    assert first is not None and second is not None
    interval = t_interval(list(differences(first, second, dataset, measure).values()))
    return interval_entry(interval, signed=True, percent=measure.startswith("accuracy"))


def others() -> Table:
    """Accuracy on the benchmark's own rows over the draws that joint training and distillation have."""
    report = make_report([SMALL])
    # a recipe and the answers that its cells here were fine-tuned on: they are no like for like
    answers = {runs.recipe: runs.answers for runs in reversed(report.runs)}
    rows: list[Row] = []
    for place in _places(report, own=True):
        compared = [report.plain(place.task, place.size, recipe) for recipe in COMPARED]
        seeds = set.intersection(*(set(runs.cells) - {None} if runs else set() for runs in compared))
        if not seeds:
            continue
        # other seeds of some recipes would otherwise be in their means alone
        benchmarks, models = [place.task.benchmark], [place.task.model]
        kept = filtered(report.results, benchmarks=benchmarks, models=models, seeds=sorted(seeds))
        same = Report(kept, report.select)
        row: dict[Column | str, Entry | str] = {
            "model": place.task.model,
            "N": str(place.size),
            "benchmark": place.dataset,
            "draws": str(len(seeds)),
        }
        for name in COMPARED:
            learned = f", {answers[name]} answers" if answers[name] else ""
            row[TITLES[name] + learned] = _mean(same, name, place)
        for name in OTHERS:
            pair = tuple(same.plain(place.task, place.size, recipe) for recipe in (name, METHOD))
            row[f"{TITLES[name]} less {TITLES[METHOD]} [95%]"] = _less(pair, place.dataset, "accuracy")
        rows.append(row)
    return fill("others", "", rows)


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
