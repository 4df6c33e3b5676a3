"""Figures of side effects: forgetting, diversity, sensitivity to wording."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ia2.report.figures.marks import dots, grouped_dots
from ia2.report.figures.style import Figure, arm_styles, numbers_table
from ia2.utils.wording import estimate

Json = Mapping[str, Any]

_TITLES = {
    "distinct_1": "distinct tokens",
    "distinct_2": "distinct pairs",
    "repeated_4": "repeated runs of four",
    "self_similarity": "likeness of two samples",
    "entropy": "entropy (nats)",
    "length": "length (tokens)",
    "leak": "begins with a label",
}


def effect_figures(section: Json, heading: str) -> list[Figure]:
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


def _perplexity(section: Json, part: Json, heading: str) -> Figure | None:
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
        (dots(ratios, arm_styles(section["views"]), f"perplexity / {reference}", 1.0, 5),),
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


def _benchmarks(section: Json, part: Json, heading: str) -> Figure:
    """Accuracy on benchmarks that nothing was trained on, a panel each."""
    styles = arm_styles(section["views"])
    panels = []
    for name, found in part.items():
        entries = {view: value["accuracy"] for view, value in _main_scope(found).items()}
        panels.append(dots(entries, styles, f"{name} ({found['rows']} rows)"))
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
                [
                    name,
                    scope,
                    view,
                    estimate(value["accuracy"]),
                    estimate(value.get("difference"), signed=True),
                ]
                for name, found in part.items()
                for scope, entry in found["scopes"].items()
                for view, value in entry["views"].items()
            ],
        ),
    )


def _diversity(section: Json, part: Json, heading: str) -> Figure:
    """What sampled continuations of plain text look like, a panel a measure."""
    measures, styles = part["measures"], arm_styles(section["views"])
    about = "; ".join(f"{_TITLES[measure]}: {found['about']}" for measure, found in measures.items())
    return Figure(
        "diversity",
        "What does it write when it goes on from plain text?",
        heading,
        f"Continuations of {part['openings']} openings, drawn at temperature 1, with 95% intervals over "
        f"openings and training sets. {_capital(about)}.",
        tuple(
            dots({view: value["mean"] for view, value in found["views"].items()}, styles, _TITLES[measure])
            for measure, found in measures.items()
        ),
        numbers_table(
            "diversity",
            "Continuations of plain text",
            ["measure", "view", "mean", f"less {section['reference']}"],
            [
                [measure, view, estimate(value["mean"]), estimate(value.get("difference"), signed=True)]
                for measure, found in measures.items()
                for view, value in found["views"].items()
            ],
        ),
    )


def _wordings(section: Json, part: Json, heading: str) -> Figure:
    """Accuracy of each view under each wording of the prompt."""
    views, wordings = _main_scope(part), list(part["wordings"])
    about = "; ".join(f"{name}: {words}" for name, words in part["wordings"].items())
    left_out = f" Not tried: {', '.join(part['left_out'])}." if part["left_out"] else ""
    groups = {name: {view: value["accuracy"][name] for view, value in views.items()} for name in wordings}
    return Figure(
        "wordings",
        "Does it hang on the wording of the prompt?",
        heading,
        f"Accuracy on {part['rows']} queries whose prompt is written in other ways, with 95% intervals over "
        "rows and training sets. The dashed lines are each view's accuracy with the unchanged prompt. "
        f"{_capital(about)}.{left_out}",
        (grouped_dots(groups, arm_styles(section["views"]), "accuracy"),),
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
                for view, value in views.items()
            ],
        ),
    )


def _main_scope(part: Json) -> Mapping[str, Any]:
    """Views in the scope that is drawn."""
    scopes = part["scopes"]
    found: Mapping[str, Any] = scopes.get("labels", next(iter(scopes.values())))["views"]
    return found


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
