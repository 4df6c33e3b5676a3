"""Figures of side effects: forgetting, diversity, sensitivity to wording."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ia2.report.figures.marks import dots, grouped_dots
from ia2.report.figures.style import Figure, arm_styles, make_figure
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


def effect_figures(section: Json) -> list[Figure]:
    """Every figure that the section has something for."""
    makers = {
        "perplexity": _perplexity,
        "benchmarks": _benchmarks,
        "diversity": _diversity,
        "wordings": _wordings,
    }
    return [
        figure
        for part, make in makers.items()
        if section.get(part)
        for figure in make(section, section[part])
    ]


def _perplexity(section: Json, part: Json) -> list[Figure]:
    """As a multiple of the reference's; none without another view."""
    reference, views = section["reference"], part["views"]
    ratios = {view: found["ratio"] for view, found in views.items() if "ratio" in found}
    panel = dots(ratios, arm_styles(section["views"]), f"perplexity / {reference}", 1.0, 5)
    rows = [
        {
            "view": view,
            "perplexity": estimate(found["perplexity"]),
            f"multiple of {reference}": estimate(found.get("ratio")),
        }
        for view, found in views.items()
    ]
    of = {"reference": reference, "texts": part["texts"], "tokens": part["tokens"]}
    return [make_figure("perplexity", [panel], rows, **of)] if ratios else []


def _benchmarks(section: Json, part: Json) -> list[Figure]:
    """Accuracy on benchmarks that nothing was trained on, a panel each."""
    styles = arm_styles(section["views"])
    panels = []
    for name, found in part.items():
        entries = {view: value["accuracy"] for view, value in _main_scope(found).items()}
        panels.append(dots(entries, styles, f"{name} ({found['rows']} rows)"))
    rows = [
        {"benchmark": name, "scope": scope, "view": view, **_less(section, value, "accuracy")}
        for name, found in part.items()
        for scope, entry in found["scopes"].items()
        for view, value in entry["views"].items()
    ]
    return [make_figure("benchmarks", panels, rows)]


def _diversity(section: Json, part: Json) -> list[Figure]:
    """What sampled continuations of plain text look like, a panel a measure."""
    measures, styles = part["measures"], arm_styles(section["views"])
    panels = [
        dots({view: value["mean"] for view, value in found["views"].items()}, styles, _TITLES[measure])
        for measure, found in measures.items()
    ]
    rows = [
        {"measure": measure, "view": view, **_less(section, value, "mean")}
        for measure, found in measures.items()
        for view, value in found["views"].items()
    ]
    about = "; ".join(f"{_TITLES[measure]}: {found['about']}" for measure, found in measures.items())
    return [make_figure("diversity", panels, rows, openings=part["openings"], about=about)]


def _wordings(section: Json, part: Json) -> list[Figure]:
    """Accuracy of each view under each wording of the prompt."""
    views, wordings = _main_scope(part), list(part["wordings"])
    groups = {name: {view: value["accuracy"][name] for view, value in views.items()} for name in wordings}
    rows = [
        {
            "view": view,
            **{name: estimate(value["accuracy"][name]) for name in wordings},
            "spread": estimate(value["spread"]),
            "worst": str(value["worst"]["wording"]),
        }
        for view, value in views.items()
    ]
    about = "; ".join(f"{name}: {words}" for name, words in part["wordings"].items())
    left_out = f" Not tried: {', '.join(part['left_out'])}." if part["left_out"] else ""
    panel = grouped_dots(groups, arm_styles(section["views"]), "accuracy")
    return [make_figure("wordings", [panel], rows, about=about, left_out=left_out, count=part["rows"])]


def _less(section: Json, value: Json, name: str) -> dict[str, str]:
    """A mean, and its difference from the reference's."""
    difference = estimate(value.get("difference"), signed=True)
    return {name: estimate(value[name]), f"less {section['reference']}": difference}


def _main_scope(part: Json) -> Mapping[str, Any]:
    """Views in the scope that is drawn."""
    scopes = part["scopes"]
    found: Mapping[str, Any] = scopes.get("labels", next(iter(scopes.values())))["views"]
    return found
