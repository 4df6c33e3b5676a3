"""Figures of the section ``effects``: forgetting, diversity, sensitivity to wording."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ia2.report.style import FAINT, INK, Figure, Panel, arm_styles, numbers_table, plain_log
from ia2.wording import estimate

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
        section: what :func:`ia2.analysis.effects.summarise` gives, or the same from JSON.
        heading: what it is of: model, data, seeds.
    """
    found = (
        perplexity_figure(section, heading),
        benchmarks_figure(section, heading),
        diversity_figure(section, heading),
        wordings_figure(section, heading),
    )
    return [figure for figure in found if figure is not None]


def _dots(
    entries: Mapping[str, Mapping[str, Any]],
    views: Sequence[str],
    title: str,
    line: float | None = None,
    *,
    zero: bool = False,
) -> Callable[[Any], None]:
    """A dot and its interval a view, one below the other.

    Args:
        entries: view → value, low and high.
        views: all that there are, which settle the colours.
        title: of the panel.
        line: where nothing has changed, if there is such a place.
        zero: whether the axis begins at zero.
    """
    styles = arm_styles(views)
    known = {view: found for view, found in entries.items() if found["value"] is not None}

    def draw(axis: Any) -> None:
        if line is not None:
            axis.axvline(line, color=FAINT, linewidth=0.8, linestyle="--")
        for place, (view, found) in enumerate(known.items()):
            if found["low"] is not None and found["high"] is not None:
                axis.plot(
                    [found["low"], found["high"]], [place] * 2, color=styles[view]["color"], linewidth=1.8
                )
            axis.plot(found["value"], place, markersize=6, linestyle="none", **styles[view])
        axis.set_yticks(range(len(known)), list(known))
        axis.set_ylim(max(len(known), 1) - 0.5, -0.5)
        if line and max((found["value"] for found in known.values()), default=0) > _LARGE * line:
            plain_log(axis, "x")
        if zero:
            axis.set_xlim(0, max(1.05 * axis.get_xlim()[1], 1e-3))
        axis.set_title(title, fontsize=10)

    return draw


def _height(count: int) -> float:
    return max(1.7, 0.9 + 0.28 * count)


# ---------------------------------------------------------------------------------------- forgetting


def perplexity_figure(section: Mapping[str, Any], heading: str) -> Figure | None:
    """Perplexity of plain text as a multiple of the reference's; None where it was not measured."""
    part = section.get("perplexity")
    if not part:
        return None
    reference = section["reference"]
    ratios = {view: found["ratio"] for view, found in part["views"].items() if "ratio" in found}
    if not ratios:
        return None
    rows = [
        [view, estimate(found["perplexity"]), estimate(found.get("ratio"))]
        for view, found in part["views"].items()
    ]
    return Figure(
        "perplexity",
        "Has it forgotten how to read plain text?",
        heading,
        f"Perplexity per token on {part['texts']} held-out texts ({part['tokens']:,} tokens) as a multiple "
        f"of that of {reference}, with 95% intervals over texts and training sets. At the dashed line "
        "nothing has changed; to its right, text that has nothing to do with the task is harder to predict "
        "than before.",
        (
            Panel(
                _dots(ratios, section["views"], f"perplexity / {reference}", 1.0),
                width=5,
                height=_height(len(ratios)),
            ),
        ),
        numbers_table(
            "perplexity", "Perplexity of plain text", ["view", "perplexity", f"multiple of {reference}"], rows
        ),
    )


def benchmarks_figure(section: Mapping[str, Any], heading: str) -> Figure | None:
    """Accuracy on benchmarks that nothing was trained on, a panel each; None where none was measured."""
    part = section.get("benchmarks")
    if not part:
        return None
    drawn = {name: _main(found["scopes"]) for name, found in part.items()}
    panels = []
    for name, (_, found) in drawn.items():
        entries = {view: value["accuracy"] for view, value in found.items()}
        title = f"{name} ({part[name]['rows']} rows)"
        panels.append(Panel(_dots(entries, section["views"], title, zero=True), height=_height(len(entries))))
    rows = [
        [name, scope, view, estimate(value["accuracy"]), estimate(value.get("difference"), signed=True)]
        for name, found in part.items()
        for scope, entry in found["scopes"].items()
        for view, value in entry["views"].items()
    ]
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
            rows,
        ),
    )


def _main(scopes: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    scope = "labels" if "labels" in scopes else next(iter(scopes))
    return scope, scopes[scope]["views"]


# ----------------------------------------------------------------------------------------- diversity


def diversity_figure(section: Mapping[str, Any], heading: str) -> Figure | None:
    """What sampled continuations of plain text look like, a panel a measure; None where none was measured."""
    part = section.get("diversity")
    if not part:
        return None
    measures = part["measures"]
    panels = []
    for measure, found in measures.items():
        entries = {view: value["mean"] for view, value in found["views"].items()}
        panels.append(
            Panel(_dots(entries, section["views"], _TITLES[measure], zero=True), height=_height(len(entries)))
        )
    rows = [
        [measure, view, estimate(value["mean"]), estimate(value.get("difference"), signed=True)]
        for measure, found in measures.items()
        for view, value in found["views"].items()
    ]
    about = "; ".join(f"{_TITLES[measure]}: {found['about']}" for measure, found in measures.items())
    return Figure(
        "diversity",
        "What does it write when it goes on from plain text?",
        heading,
        f"Continuations of {part['openings']} openings, drawn at temperature 1, with 95% intervals over "
        f"openings and training sets. {about[:1].upper()}{about[1:]}.",
        tuple(panels),
        numbers_table(
            "diversity",
            "Continuations of plain text",
            ["measure", "view", "mean", f"less {section['reference']}"],
            rows,
        ),
    )


# ------------------------------------------------------------------------------------------ wordings


def wordings_figure(section: Mapping[str, Any], heading: str) -> Figure | None:
    """Accuracy of each view under each wording of the prompt; None where none was measured."""
    part = section.get("wordings")
    if not part:
        return None
    scope = "labels" if "labels" in part["scopes"] else next(iter(part["scopes"]))
    found = part["scopes"][scope]["views"]
    rows = [
        [view]
        + [estimate(value["accuracy"][name]) for name in part["wordings"]]
        + [estimate(value["spread"]), str(value["worst"]["wording"])]
        for view, value in found.items()
    ]
    told = "; ".join(f"{name}: {about}" for name, about in part["wordings"].items())
    left = f" Not tried: {', '.join(part['left_out'])}." if part["left_out"] else ""
    return Figure(
        "wordings",
        "Does it hang on the wording of the prompt?",
        heading,
        f"Accuracy on {part['rows']} queries whose prompt is written in other ways, with 95% intervals over "
        "rows and training sets. The dashed lines are each view's accuracy with the unchanged prompt. "
        f"{told[:1].upper()}{told[1:]}.{left}",
        (
            Panel(
                _accuracies(found, list(part["wordings"]), section["views"]),
                legend=True,
                width=6.2,
                height=0.9 + len(part["wordings"]) * (0.25 + 0.12 * len(found)),
            ),
        ),
        numbers_table(
            "wordings", "Accuracy by wording", ["view", *part["wordings"], "spread", "worst"], rows
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
                if entry["low"] is not None and entry["high"] is not None:
                    axis.plot([entry["low"], entry["high"]], [y, y], color=colour, linewidth=1.4)
                label = view if place == 0 else None
                axis.plot(entry["value"], y, markersize=5, linestyle="none", label=label, **styles[view])
        for place in range(1, len(wordings)):
            axis.axhline(place - 0.5, color=INK, linewidth=0.3, alpha=0.4)
        axis.set_yticks(range(len(wordings)), list(wordings))
        axis.set_ylim(len(wordings) - 0.5, -0.5)
        axis.set_xlim(-0.02, 1.02)
        axis.set_xlabel("accuracy")

    return draw
