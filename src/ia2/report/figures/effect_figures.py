"""Figures of the section ``effects``: forgetting, diversity, sensitivity to wording."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ia2.report.figures.style import FAINT, INK, Figure, Panel, arm_styles, numbers_table, plain_log
from ia2.utils.wording import estimate

# A ratio beyond this leaves nothing to see of the others on a linear axis.
_LARGE = 5

_TITLES = {
    "distinct_1": "distinct tokens",
    "distinct_2": "distinct pairs",
    "repeated_4": "repeated runs of four",
    "self_similarity": "likeness of two samples",
    "entropy": "entropy (nats)",
    "length": "length (tokens)",
    "leak": "begins with a label",
}


def effect_figures(section: Mapping[str, Any], heading: str) -> list[Figure]:
    """Every figure that the section has something for.

    Args:
        section: ``effects`` of ``analysis.json``.
        heading: what it is of: model, data, seeds.
    """
    makers = {
        "perplexity": _perplexity,
        "benchmarks": _benchmarks,
        "diversity": _diversity,
        "wordings": _wordings,
    }
    found = [make(section, section[part], heading) for part, make in makers.items() if section.get(part)]
    return [figure for figure in found if figure is not None]


def _dots(
    views: Sequence[str],
    entries: Mapping[str, Mapping[str, Any]],
    title: str,
    line: float | None = None,
    width: float = 3.6,
) -> Panel:
    """A dot and its interval a view, one below the other.

    Args:
        views: all that there are, which settle the colours.
        entries: view → value, low and high.
        title: of the panel.
        line: where nothing has changed, if there is such a place; else the axis begins at zero.
        width: inches.
    """
    styles = arm_styles(views)
    known = {view: found for view, found in entries.items() if found["value"] is not None}

    def draw(axis: Any) -> None:
        if line is not None:
            axis.axvline(line, color=FAINT, linewidth=0.8, linestyle="--")
        for place, (view, found) in enumerate(known.items()):
            _bar(axis, found, place, styles[view]["color"], 1.8)
            axis.plot(found["value"], place, markersize=6, linestyle="none", **styles[view])
        axis.set_yticks(range(len(known)), list(known))
        axis.set_ylim(max(len(known), 1) - 0.5, -0.5)
        if line is None:
            axis.set_xlim(0, max(1.05 * axis.get_xlim()[1], 1e-3))
        elif max((found["value"] for found in known.values()), default=0) > _LARGE * line:
            plain_log(axis, "x")
        axis.set_title(title, fontsize=10)

    return Panel(draw, width=width, height=max(1.7, 0.9 + 0.28 * len(entries)))


def _bar(axis: Any, found: Mapping[str, Any], y: float, colour: str, width: float) -> None:
    """The interval, where there is one."""
    if found["low"] is not None and found["high"] is not None:
        axis.plot([found["low"], found["high"]], [y, y], color=colour, linewidth=width)


def _main(scopes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Views in the scope that is drawn."""
    return scopes["labels" if "labels" in scopes else next(iter(scopes))]["views"]  # type: ignore[no-any-return]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _perplexity(section: Mapping[str, Any], part: Mapping[str, Any], heading: str) -> Figure | None:
    """As a multiple of the reference's."""
    reference = section["reference"]
    ratios = {view: found["ratio"] for view, found in part["views"].items() if "ratio" in found}
    if not ratios:
        return None
    return Figure(
        "perplexity",
        "Has it forgotten how to read plain text?",
        heading,
        f"Perplexity per token on {part['texts']} held-out texts ({part['tokens']:,} tokens) as a multiple "
        f"of that of {reference}, with 95% intervals over texts and training sets. At the dashed line "
        "nothing has changed; to its right, text that has nothing to do with the task is harder to predict "
        "than before.",
        (_dots(section["views"], ratios, f"perplexity / {reference}", 1.0, 5),),
        numbers_table(
            "perplexity",
            "Perplexity of plain text",
            ["view", "perplexity", f"multiple of {reference}"],
            [
                [view, estimate(found["perplexity"]), estimate(found.get("ratio"))]
                for view, found in part["views"].items()
            ],
        ),
    )


def _benchmarks(section: Mapping[str, Any], part: Mapping[str, Any], heading: str) -> Figure:
    """Accuracy on benchmarks that nothing was trained on, a panel each."""
    panels = []
    for name, found in part.items():
        entries = {view: value["accuracy"] for view, value in _main(found["scopes"]).items()}
        panels.append(_dots(section["views"], entries, f"{name} ({found['rows']} rows)"))
    return Figure(
        "benchmarks",
        "Has it forgotten other tasks?",
        heading,
        "Accuracy on the bare queries of other benchmarks, without demonstrations, with 95% intervals over "
        "rows and training sets: where there are labels, the best of the label set, since a model that was "
        "not told how to answer may say something else. The numbers have both, and differences by row.",
        tuple(panels),
        numbers_table(
            "benchmarks",
            "Accuracy on other benchmarks",
            ["benchmark", "scope", "view", "accuracy", f"less {section['reference']}"],
            [
                [name, scope, view, *_beside(value, "accuracy")]
                for name, found in part.items()
                for scope, entry in found["scopes"].items()
                for view, value in entry["views"].items()
            ],
        ),
    )


def _beside(value: Mapping[str, Any], name: str) -> tuple[str, str]:
    """A mean, and its difference from the reference's."""
    return estimate(value[name]), estimate(value.get("difference"), signed=True)


def _diversity(section: Mapping[str, Any], part: Mapping[str, Any], heading: str) -> Figure:
    """What sampled continuations of plain text look like, a panel a measure."""
    measures = part["measures"]
    about = "; ".join(f"{_TITLES[measure]}: {found['about']}" for measure, found in measures.items())
    return Figure(
        "diversity",
        "What does it write when it goes on from plain text?",
        heading,
        f"Continuations of {part['openings']} openings, drawn at temperature 1, with 95% intervals over "
        f"openings and training sets. {_capital(about)}.",
        tuple(
            _dots(section["views"], {view: v["mean"] for view, v in found["views"].items()}, _TITLES[measure])
            for measure, found in measures.items()
        ),
        numbers_table(
            "diversity",
            "Continuations of plain text",
            ["measure", "view", "mean", f"less {section['reference']}"],
            [
                [measure, view, *_beside(value, "mean")]
                for measure, found in measures.items()
                for view, value in found["views"].items()
            ],
        ),
    )


def _wordings(section: Mapping[str, Any], part: Mapping[str, Any], heading: str) -> Figure:
    """Accuracy of each view under each wording of the prompt."""
    found, wordings = _main(part["scopes"]), list(part["wordings"])
    told = "; ".join(f"{name}: {about}" for name, about in part["wordings"].items())
    left = f" Not tried: {', '.join(part['left_out'])}." if part["left_out"] else ""
    height = 0.9 + len(wordings) * (0.25 + 0.12 * len(found))
    return Figure(
        "wordings",
        "Does it hang on the wording of the prompt?",
        heading,
        f"Accuracy on {part['rows']} queries whose prompt is written in other ways, with 95% intervals over "
        "rows and training sets. The dashed lines are each view's accuracy with the unchanged prompt. "
        f"{_capital(told)}.{left}",
        (Panel(_accuracies(found, wordings, section["views"]), legend=True, width=6.2, height=height),),
        numbers_table(
            "wordings",
            "Accuracy by wording",
            ["view", *wordings, "spread", "worst"],
            [
                [
                    view,
                    *(estimate(value["accuracy"][name]) for name in wordings),
                    estimate(value["spread"]),
                    str(value["worst"]["wording"]),
                ]
                for view, value in found.items()
            ],
        ),
    )


def _accuracies(
    found: Mapping[str, Any], wordings: Sequence[str], views: Sequence[str]
) -> Callable[[Any], None]:
    styles = arm_styles(views)
    step = 0.8 / max(len(found), 1)

    def draw(axis: Any) -> None:
        for n, (view, value) in enumerate(found.items()):
            colour = styles[view]["color"]
            unchanged = value["accuracy"][wordings[0]]["value"]
            axis.axvline(unchanged, color=colour, linewidth=0.7, linestyle="--", alpha=0.7)
            for place, name in enumerate(wordings):
                entry, y = value["accuracy"][name], place + (n - (len(found) - 1) / 2) * step
                _bar(axis, entry, y, colour, 1.4)
                label = view if place == 0 else None
                axis.plot(entry["value"], y, markersize=5, linestyle="none", label=label, **styles[view])
        for place in range(1, len(wordings)):
            axis.axhline(place - 0.5, color=INK, linewidth=0.3, alpha=0.4)
        axis.set_yticks(range(len(wordings)), list(wordings))
        axis.set_ylim(len(wordings) - 0.5, -0.5)
        axis.set_xlim(-0.02, 1.02)
        axis.set_xlabel("accuracy")

    return draw
