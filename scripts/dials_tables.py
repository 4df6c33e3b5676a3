"""What `scripts/dials.py` turns, and the table and figure of what came out."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np

from ia2.report.figures.style import FAINT, canvas, legend, recipe_style
from ia2.utils.errors import DataError
from ia2.utils.files import write_text
from ia2.utils.statistics import Interval, bounded, t_interval

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path.insert(0, str(TESTS))
from tiny_icl.tasks import SURFACE_PER_CLASS  # noqa: E402

RULES = 40
FIRST_RULE = 10_000  # no test, no other result and not the choice of settings uses these
TEST_ROWS = 100

# Chosen on five other rules (N = 8, 4 classes) by NLL, each stage for itself: rates 1e-3, 3e-3, 1e-2; 12, 24,
# 48 steps. Fine-tuning after alignment has the rate that was best for both kinds of alignment, at N = 4 too.
TAUGHT_STEPS = 48
ALIGN = {"stage": "align", "learning_rate": 1e-2}
SOFT = {"stage": "soft", "learning_rate": 3e-3}
SFT = {"stage": "sft", "epochs": 12, "learning_rate": 1e-2}
AFTER = {"stage": "sft", "epochs": 12, "learning_rate": 1e-3}
BATCH = 32  # all labelled rows in one step
LABELLED = {**ALIGN, "rows": "labelled", "epochs": TAUGHT_STEPS}

# Arm → its name and stages. "own" aligns on the labelled rows behind all of them, themselves included.
ARMS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "base": ("base", []),
    "icl": ("ICL", []),
    "sft": ("SFT", [SFT]),
    "loo": ("IA2, leave one out", [LABELLED]),
    "loo-sft": ("IA2 → SFT, leave one out", [LABELLED, AFTER]),
    "own": ("IA2, own rows behind all N", [ALIGN]),
    "own-sft": ("IA2 → SFT, own rows behind all N", [ALIGN, AFTER]),
    "more": ("IA2, unlabelled rows", [ALIGN]),
    "more-sft": ("IA2 → SFT, unlabelled rows", [ALIGN, AFTER]),
    "more-sft-fast": ("the same, SFT at its own rate", [ALIGN, SFT]),
    "soft": ("soft labels, unlabelled rows", [SOFT]),
    "soft-sft": ("soft labels → SFT, unlabelled rows", [SOFT, AFTER]),
}


@dataclass(frozen=True)
class Point:
    """Where the dials stand."""

    n: int = 8  # labelled rows
    classes: int = 4
    wrong: int = 0  # of the labelled rows, so many have a wrong label where the teacher reads them
    surface: int = SURFACE_PER_CLASS  # forms a class that labelled rows have; others have all
    unlabelled: int = 32  # rows


USUAL = Point()
# Dial → its points, the usual one among them. Few labelled rows cover few forms anyway: hence N = 16 there.
DIALS = {
    "wrong": [Point(wrong=k) for k in (0, 2, 4, 8)],
    "n": [Point(n=n) for n in (4, 8, 16)],
    "classes": [Point(classes=c) for c in (2, 4)],
    "surface": [Point(n=16, surface=s) for s in (1, SURFACE_PER_CLASS)],
    "unlabelled": [Point(unlabelled=m) for m in (8, 32, 128)],
}
TITLES = {
    "usual": "usual point",
    "wrong": "wrong labels before the teacher",
    "n": "labelled rows N",
    "classes": "classes",
    "surface": "forms of a class in labelled rows",
    "unlabelled": "unlabelled rows",
}
# What shares the folds' weights stands together; `last` chooses nothing, and so is tried with two lengths.
SELECTIONS = (("dev",), ("folds", "average"), ("last",), ("last, twice as long",))
SIZES = (8, 16, 32)  # N of `dev`, which holds out N/2 beside; the others train on all 3N/2
RECIPES = {"sft": "SFT", "loo-sft": "IA2 → SFT, leave one out", "more-sft": "IA2 → SFT, unlabelled rows"}
STEPS = 24  # of each stage at most; about the best for fine-tuning alone


def depends(arm: str, point: Point) -> Point:
    """A point at which this arm is the same."""
    if arm in ("base", "sft"):
        point = replace(point, wrong=USUAL.wrong)
    return point if arm.startswith(("more", "soft")) else replace(point, unlabelled=USUAL.unlabelled)


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# What the table gives the paired differences of.
LESS = {
    "sft": ("icl", "loo-sft", "own-sft", "more-sft", "soft-sft"),
    "loo-sft": ("more-sft",),
    "soft-sft": ("more-sft",),
    "more": ("more-sft",),
    "more-sft": ("more-sft-fast",),
}
PAIRS = [(one, other) for other, ones in LESS.items() for one in ones]
GAINS = ("loo-sft", "more-sft")
MEASURES = {"accuracy": ("accuracy, %", 100, 1), "nll": ("NLL", 1, 2), "scaled_nll": ("NLL, scaled", 1, 2)}


def interval_of(lines: Sequence[dict[str, Any]], measure: str, arm: str, less: str = "") -> Interval | None:
    """Of an arm, or of one less another, paired by rule; None where a line lacks it."""
    values = [[line["arms"].get(each, {}).get(measure) for each in (arm, less or arm)] for line in lines]
    if any(None in pair for pair in values):
        return None
    if less:
        return t_interval([one - other for one, other in values])
    return bounded(t_interval([one for one, _ in values]), measure)


def cell(lines: Sequence[dict[str, Any]], measure: str, arm: str, less: str = "") -> str:
    """The interval in a table; of a single rule the value alone."""
    found = interval_of(lines, measure, arm, less)
    if found is None:
        return "–"
    _, scale, digits = MEASURES[measure]
    form = f"{'+' if less else ''}.{digits}f"
    ends = f" [{scale * found.low:{form}}, {scale * found.high:{form}}]" if found.units > 1 else ""
    return f"{scale * found.value:{form}}{ends}".replace("-", "−")


def title_of(point: Point) -> str:
    """What is not as usual at a point."""
    usual = asdict(USUAL)
    return ", ".join(f"{k} {v}" for k, v in asdict(point).items() if v != usual[k]) or "usual"


def grouped(lines: Sequence[dict[str, Any]]) -> dict[Any, list[dict[str, Any]]]:
    """Lines of each point, of the rules that every point has."""
    found: dict[Any, dict[int, dict[str, Any]]] = {}
    for line in lines:
        point = Point(**line["point"]) if line["study"] == "dials" else line["point"]["n"]
        found.setdefault(point, {})[line["rule"]] = line
    rules = sorted(set.intersection(*(set(by_rule) for by_rule in found.values())))
    return {point: [by_rule[rule] for rule in rules] for point, by_rule in found.items()}


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)) + "\n"


def dials_tables(points: dict[Any, list[dict[str, Any]]]) -> str:
    """Markdown of one model's points: each arm, paired differences, how often the teacher is right."""
    parts = [f"Usual: {', '.join(f'{k} {v}' for k, v in asdict(USUAL).items())}.\n"]
    for measure in ("accuracy", "nll"):
        name = MEASURES[measure][0]
        heads = {(arm,): title for arm, (title, _) in ARMS.items()}
        for columns in (heads, {(a, b): f"{ARMS[a][0]} − {ARMS[b][0]}" for a, b in PAIRS}):
            rows = [[title_of(p), *(cell(v, measure, *arms) for arms in columns)] for p, v in points.items()]
            parts.append(markdown([name, *columns.values()], rows))
    taught = {"loo": "labelled, leave one out", "own": "labelled, behind all N", "more": "unlabelled"}
    rows = []
    for point, lines in points.items():
        seen = [[line["teacher_right"].get(name) for line in lines] for name in taught]
        rows.append([title_of(point), *("–" if None in v else f"{100 * np.mean(v):.1f}" for v in seen)])
    parts.append(markdown(["rows that the teacher answers rightly, %", *taught.values()], rows))
    told = [lines for p, lines in points.items() if not p.wrong and p.unlabelled == USUAL.unlabelled]
    for arm in GAINS:
        both = [[line["arms"][a]["accuracy"] for a in ("icl", arm, "sft")] for line in chain(*told)]
        icl, gained, sft = np.array(both).T
        if np.ptp(icl - sft) and np.ptp(gained - sft):
            r = np.corrcoef(icl - sft, gained - sft)[0, 1]
            parts.append(
                f"Gain of {ARMS[arm][0]} with ICL − SFT, no wrong labels, {len(both)} lines: r {r:.2f}\n"
            )
    return "\n".join(parts)


def selection_table(points: dict[Any, list[dict[str, Any]]]) -> str:
    """Markdown of the ways to select: each, and less dev; at each number of labels, and their mean."""
    shown = {str(n + n // 2): lines for n, lines in points.items()}
    shown["all"] = [{"arms": mean_arms(lines)} for lines in zip(*points.values(), strict=True)]
    rows = []
    for recipe, (labels, lines), chosen in product(RECIPES, shown.items(), chain(*SELECTIONS)):
        arm, dev = f"{recipe}/{chosen}", f"{recipe}/dev"
        each = [(cell(lines, m, arm), "" if arm == dev else cell(lines, m, arm, dev)) for m in MEASURES]
        rows.append([RECIPES[recipe], labels, chosen, *chain(*each)])
    heads = [text for name, *_ in MEASURES.values() for text in (name, "less dev")]
    return markdown(["recipe", "labels", "selection", *heads], rows)


def mean_arms(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """One rule's arms, averaged over its points."""
    first = lines[0]["arms"]
    return {
        arm: {m: float(np.mean([line["arms"][arm][m] for line in lines])) for m in first[arm]}
        for arm in first
    }


def draw(models: dict[str, dict[Any, list[dict[str, Any]]]], path: Path) -> None:
    """Gain over SFT against ICL less SFT, every point with its intervals; hollow: the second model."""
    dial_of = {point: dial for dial in reversed(DIALS) for point in DIALS[dial]} | {USUAL: "usual"}
    looks = dict(zip(TITLES, ("soft-sft", "icl", "sft", "ia2", "ia2-sft", "sft-ia2"), strict=True))
    with canvas(path, 1, 2, 8.4, 4.6) as (figure, panels):
        panels[0][1].sharex(panels[0][0])
        panels[0][1].sharey(panels[0][0])
        for axes, arm in zip(panels.flat, GAINS, strict=True):
            axes.axhline(0, color=FAINT, linewidth=0.8)
            axes.axline((0, 0), slope=1, color=FAINT, linewidth=0.8, linestyle=":")
            every = [(place, *item) for place, found in enumerate(models.values()) for item in found.items()]
            for place, point, lines in every:
                x, y = (interval_of(lines, "accuracy", one, "sft") for one in ("icl", arm))
                if x is None or y is None or depends(arm, point) != point:  # the same as another point
                    continue
                dial = dial_of[point]
                style = {**recipe_style(looks[dial]), "markersize": 5, "linewidth": 0.8, "linestyle": "none"}
                known = axes.get_legend_handles_labels()[1]
                axes.errorbar(
                    *(x.value, y.value, *([[v.value - v.low], [v.high - v.value]] for v in (y, x))),
                    markerfacecolor="white" if place else style["color"],
                    label=None if TITLES[dial] in known else TITLES[dial],
                    **style,
                )
                if dial != "usual":
                    text = {"fontsize": 7, "color": style["color"], "textcoords": "offset points"}
                    axes.annotate(str(getattr(point, dial)), (x.value, y.value), (4, 3), **text)
            axes.set(xlabel="ICL − SFT, accuracy", ylabel="gain over SFT, accuracy")
            axes.set_title(ARMS[arm][0], fontsize=10)
        legend(figure, panels.flat[1], 3)
        rules = len(next(iter(next(iter(models.values())).values())))
        title = f"{rules} hidden rules a point, paired; 95% t-intervals; dotted: all that ICL has over SFT"
        figure.suptitle(title, fontsize=10)


def write_report(folder: Path) -> None:
    """table.md and dials.svg of a folder's files."""
    parts, models = ["# Dials\n\nMeans and 95% t-intervals over rules; differences are paired by rule.\n"], {}
    for file in sorted(folder.glob("*.jsonl")):
        points = grouped(read_lines(file))
        rules = len(next(iter(points.values())))
        selects = isinstance(next(iter(points)), int)
        body = selection_table(points) if selects else dials_tables(points)
        parts.append(f"## {file.stem}: {rules} rules a point\n\n{body}")
        if not selects:
            models[file.stem] = points
    if len(parts) == 1:
        raise DataError(f"{folder}: holds no .jsonl file. Run the study first.")
    write_text(folder / "table.md", "\n".join(parts))
    if models:
        draw(models, folder / "dials.svg")
