"""Tables of a grid like paper/evidence.yaml: what each arm gains over fine-tuning, over task × draw.

    python scripts/evidence.py results/evidence/grid [--peers results/evidence/peers.jsonl]

Accuracy and NLL are among the labels. Differences are paired: of the same draw of the same task, on the same
rows. Intervals are Student's, 95%, over task × draw. Of an arm that was run at several rates, fine-tuning
among them, the rate with the best mean accuracy stands.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ia2.experiment.sweep.store import CELLS, read_lines
from ia2.utils.errors import UserError
from ia2.utils.files import read_json
from ia2.utils.statistics import Interval, t_interval
from ia2.utils.wording import MISSING, estimate

RIVAL, TEACHER = "sft", "icl"
# Also each arm less these, which learn from the same teacher on the same unlabelled rows.
PEERS = ("soft-sft", "pseudo")
BASE = "base"


class Setting(NamedTuple):
    """Cells of one table."""

    model: str
    num_examples: int


class Draw(NamedTuple):
    """What differences are paired by."""

    task: str
    evaluated: str
    seed: int


Measures = dict[Draw, dict[str, float]]


def arms_of(cells: Sequence[dict[str, Any]]) -> dict[Setting, dict[str, Measures]]:
    """Arms of each model and N (recipe and variant, such as how many unlabelled rows), at their best rate.

    Args:
        cells: records as a sweep writes them.
    """
    found: dict[Setting, dict[str, dict[float, Measures]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(dict))
    )
    bare: dict[str, dict[tuple[str, str], dict[str, float]]] = defaultdict(dict)
    for cell in cells:
        spec = cell["spec"]
        task = f"{spec['benchmark']}, {spec['verbaliser']}"
        for dataset, evaluation in cell["evaluations"].items():
            measured = evaluation["metrics"]["labels"]
            values = {"accuracy": measured["accuracy"], "nll": measured["nll"]}
            if spec["recipe"] == BASE:
                bare[spec["model"]][task, dataset] = values
                continue
            name = ", ".join(filter(None, [spec["recipe"], spec["variant"]]))
            setting = Setting(spec["model"], spec["num_examples"])
            rate = spec["learning_rate"] or 0.0
            found[setting][name][rate][Draw(task, dataset, spec["seed"])] = values
    best: dict[Setting, dict[str, Measures]] = {}
    for setting, arms in found.items():
        best[setting] = {name: max(rates.values(), key=_accuracy) for name, rates in arms.items()}
        known = bare[setting.model]
        draws = best[setting].get(RIVAL, {})
        if all(draw[:2] in known for draw in draws):
            best[setting][BASE] = {draw: known[draw[:2]] for draw in draws}
    return best


def _accuracy(measures: Measures) -> float:
    return float(np.mean([each["accuracy"] for each in measures.values()]))


def less(first: Measures, second: Measures, measure: str, draws: Sequence[Draw]) -> Interval | None:
    """The paired difference over the draws that both have; None where they have none."""
    both = [draw for draw in draws if draw in first and draw in second]
    return t_interval([first[d][measure] - second[d][measure] for d in both]) if both else None


def tables(arms: dict[str, Measures], peers: Measures) -> list[str]:
    """Markdown: arms against fine-tuning, in and out of distribution, and accuracy by task."""
    rival = arms.get(RIVAL, {})
    every = sorted({draw for measures in arms.values() for draw in measures})
    inside = [d for d in every if d.task.partition(",")[0] == d.evaluated]
    outside = [d for d in every if d not in inside]
    if peers:
        arms = {**arms, "MiniLM + logistic regression": peers}
    lines = [
        "| arm | task × draw | accuracy less SFT | NLL less SFT | less soft labels | less pseudo-labels "
        "| out of distribution: accuracy less SFT |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, measures in sorted(arms.items(), key=lambda arm: -_accuracy(arm[1])):
        if name == RIVAL:
            continue
        count = sum(draw in measures and draw in rival for draw in inside)
        rows = [
            _points(less(measures, rival, "accuracy", inside)),
            _nats(less(measures, rival, "nll", inside)),
        ]
        for peer in PEERS:
            # on as many unlabelled rows, else on those that the peer has
            same = [
                a for a in arms if a.startswith(f"{peer},") and a.partition(",")[2] == name.partition(",")[2]
            ]
            other = arms[same[0]] if same and same[0] != name else {}
            rows.append(_points(less(measures, other, "accuracy", inside)))
        rows.append(_points(less(measures, rival, "accuracy", outside)))
        lines.append(f"| {name} | {count} | " + " | ".join(rows) + " |")
    tasks = sorted({draw.task for draw in inside})
    lines += ["", "| arm | " + " | ".join(tasks) + " |", "|---" * (1 + len(tasks)) + "|"]
    for name, measures in sorted(arms.items(), key=lambda arm: -_accuracy(arm[1])):
        cells = [
            [v["accuracy"] for d, v in measures.items() if d in inside and d.task == task] for task in tasks
        ]
        said = [f"{100 * np.mean(values):.1f} ({len(values)})" if values else MISSING for values in cells]
        lines.append(f"| {name} | " + " | ".join(said) + " |")
    return lines


def _points(found: Interval | None) -> str:
    return MISSING if found is None else estimate(found.to_dict(), signed=True, percent=True)


def _nats(found: Interval | None) -> str:
    return MISSING if found is None else estimate(found.to_dict(), signed=True)


def peers_of(lines: Sequence[dict[str, Any]], num_examples: int) -> Measures:
    """What ``scripts/peers.py`` wrote, of one N."""
    found: Measures = {}
    for line in lines:
        if line["peer"] != "embeddings" or line["num_examples"] != num_examples:
            continue
        for dataset, measured in line["evaluations"].items():
            draw = Draw(f"{line['benchmark']}, {line['verbaliser']}", dataset, line["seed"])
            found[draw] = {"accuracy": measured["accuracy"], "nll": measured["nll"]}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """What the command does; its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="of a sweep")
    parser.add_argument("--peers", type=Path, help="what scripts/peers.py wrote")
    options = parser.parse_args(arguments)
    try:
        cells = [record for _, record in read_lines(options.folder / CELLS)]
        lines = [] if options.peers is None else list(map(json.loads, options.peers.read_text().splitlines()))
        done = read_json(options.folder / "sweep.json")["cells"]
    except (UserError, OSError) as error:
        print(f"evidence: error: {error}", file=sys.stderr)
        return 2
    print(f"{done['done']} of {done['total']} cells.")
    for setting, arms in sorted(arms_of(cells).items()):
        print(f"\n### {setting.model}, N = {setting.num_examples}\n")
        print("\n".join(tables(arms, peers_of(lines, setting.num_examples))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
