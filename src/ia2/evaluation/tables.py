"""Tables of metrics: of one adapter, of a comparison of recipes, of a curve over N."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ia2.utils.format import Row, Table, fill
from ia2.utils.statistics import main_scope
from ia2.utils.wording import MISSING, counted, estimate, rows_learnt_from

INTERVALS = "t over draws"
"""How summaries of comparisons and curves say that their intervals are made."""

MEASURES = {"accuracy": "accuracy", "nll": "NLL", "brier": "Brier", "ece": "ECE"}
"""In the order in which they are shown: proper scores before ECE, which few rows cannot decide."""

SCOPES = {"labels": "among the labels", "answer": "of the whole answer", "vocabulary": "over the vocabulary"}
"""Where metrics are taken, in the order in which they are shown."""


def comparison_table(summary: Mapping[str, Any]) -> Table:
    """A recipe a row, from what ``compare.json`` holds; the notes have the paired differences too."""
    design, scope = summary["design"], scope_of(summary)
    rows: list[Row] = [
        {"recipe": name, **_compared(entry, scope)} for name, entry in summary["recipes"].items()
    ]
    title = f"{summary['model']} on {summary['data']['name']}, {design['num_train']} training examples."
    differences = [
        f"{name}: {_measures_less(found)} (paired by draw and row{unlike(found)})."
        for name, found in summary["differences"].items()
    ]
    return fill("comparison", title, rows, [*comparison_notes(summary), *differences])


def _compared(entry: Mapping[str, Any], scope: str) -> dict[str, str]:
    metrics = entry["metrics"]
    row = {title: estimate(metrics.get(scope, {}).get(name)) for name, title in MEASURES.items()}
    if scope == "labels":
        row = {f"accuracy {SCOPES[scope]}": row.pop("accuracy"), **row}
        row["acc. over the vocabulary"] = mean_of(metrics.get("vocabulary", {}).get("accuracy"))
    return {
        **row,
        "ECE, temp.-scaled": mean_of(metrics.get("scaled", {}).get(scope, {}).get("ece")),
        "asim to ICL": mean_of(entry.get("asim")),
        "answers": entry.get("answers") or MISSING,
        "seconds": _seconds(entry),
    }


def curve_table(summary: Mapping[str, Any]) -> Table:
    """Every measure by size and recipe, from what ``curve.json`` holds."""
    rows: list[Row] = []
    for name, title in {**MEASURES, "accuracy_vocabulary": "accuracy over the vocabulary"}.items():
        for recipe, points in summary["curves"].items():
            if any(name in point for point in points):
                values = [estimate(point.get(name)) for point in points]
                by_size = {f"N = {size}": value for size, value in zip(summary["sizes"], values, strict=True)}
                rows.append({"recipe": recipe, "measure": title, **by_size})
    title = f"{summary['model']} by the number of training examples N."
    return fill("curve", title, rows, [f"{summary['title']}.", *_curve_notes(summary)])


def metrics_table(metrics: Mapping[str, Any]) -> Table | None:
    """Metrics of one adapter by scope, from what ``metrics.json`` holds; None where it was not evaluated."""
    part = "test" if "test" in metrics else "dev"
    if part not in metrics:
        return None
    found = metrics[part]
    scopes = {scope: words for scope, words in SCOPES.items() if scope in found}
    rows: list[Row] = [
        {"metric": title, **{words: mean_of(found[scope][name]) for scope, words in scopes.items()}}
        for name, title in {**MEASURES, "ece_equal_width": "ECE, bins of equal width"}.items()
    ]
    if "scaled" in found:
        scaled = {words: mean_of(found["scaled"][scope]["ece"]) for scope, words in scopes.items()}
        rows.append({"metric": "ECE, temperature-scaled", **scaled})
    title = f"{metrics.get('recipe', 'The adapter')} on {found['n']} {part} rows, {_of_draws(1)}."
    return fill("metrics", title, rows, [f"{metrics['note'].capitalize()}."] if "note" in metrics else [])


# --------------------------------------------------------------------------------------- sentences


def scope_of(summary: Mapping[str, Any]) -> str:
    """The scope of a comparison's main metrics."""
    return main_scope(summary["design"]["task"] == "classification")


def mean_of(found: Mapping[str, Any] | None) -> str:
    """A mean without its interval, where there is no room."""
    return estimate(None if found is None else {**found, "low": None, "high": None})


def intervals_of(summary: Mapping[str, Any]) -> str:
    """What the intervals of a comparison or curve are of; of an older version's, that it has none."""
    if summary.get("intervals") != INTERVALS:
        return "written by an older version, whose intervals were too narrow and are left out"
    return _of_draws(len(summary["seeds"] if "seeds" in summary else summary["design"]["seeds"]))


def comparison_notes(summary: Mapping[str, Any]) -> list[str]:
    """What a comparison is of: first model, data and design, then how to read it and what is missing."""
    design, data = summary["design"], summary["data"]
    test = "test rows" if data["test"] else f"rows, {design['kind']}"
    seeds = ", ".join(map(str, design["seeds"]))
    intervals = intervals_of(summary)
    among = "NLL, Brier and ECE are among the labels. " if scope_of(summary) == "labels" else ""
    return [
        f"Model {summary['model']}; data {data['name']}; {rows_learnt_from(design)}, {design['num_test']} "
        f"{test}; seeds {seeds}; {_rates(design)}; ICL uses {design['icl_demonstrations']}.",
        f"{intervals[0].upper()}{intervals[1:]}. {among}ECE has an upward bias on few rows. Answers: what is "
        "learned in the last supervised stage. Seconds of training are per seed and fold.",
        _headroom(summary),
        *_left_out(summary),
        *(
            f"{name} diverged at {', '.join(entry['diverged'])}; another rate is chosen."
            for name, entry in summary["recipes"].items()
            if entry.get("diverged")
        ),
    ]


def unlike(difference: Mapping[str, Any]) -> str:
    """That the two of a difference learned other answers; empty where they learned the same."""
    answers = difference.get("answers")
    return "" if not answers else f"; not like for like: {answers[0]} answers against {answers[1]}"


def _curve_notes(summary: Mapping[str, Any]) -> Iterator[str]:
    scope = main_scope(summary.get("task") != "generation")
    yield f"Measures {SCOPES[scope]} unless they say otherwise; {intervals_of(summary)}."
    for size, diverged in summary.get("diverged", {}).items():
        yield from (f"N = {size}: {line}" for line in _left_out({"diverged": diverged}))
    for size, found in summary.get("headroom", {}).items():
        if found:
            yield f"N = {size}: headroom, icl − sft: accuracy {estimate(found['accuracy'], signed=True)}"
    for size, found in summary["differences"].items():
        if found:
            yield f"N = {size}: ia2-sft − sft: {_measures_less(found)}"


def _of_draws(count: int) -> str:
    if count < 2:
        return "one draw of training examples: no intervals"
    return f"95% t-intervals over {counted(count, 'draw')} of training examples"


def _headroom(summary: Mapping[str, Any]) -> str:
    """What alignment could carry over: ICL less SFT, and what the bare model does."""
    scope, base = scope_of(summary), summary["recipes"].get("base")
    bare = f"base {mean_of(base['metrics'][scope]['accuracy'])}" if base else "the base model was not run"
    listed = "; ".join(
        f"{name}: {estimate(found['accuracy'], signed=True)}"
        for name, found in (summary.get("headroom") or {}).items()
    )
    return f"Headroom, accuracy {SCOPES[scope]}: {listed or 'ICL and SFT were not both run'}; {bare}."


def _left_out(summary: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} diverged at every learning rate ({rates}) and is left out."
        for name, rates in summary.get("diverged", {}).items()
    ]


def _rates(design: Mapping[str, Any]) -> str:
    """``rate 0.001 by dev loss``, by adapter type where they differ; only the rate where nothing chose."""
    tried = {
        kind: "/".join(f"{rate:g}" for rate in rates) for kind, rates in design["learning_rates"].items()
    }
    if not tried:
        return "nothing trained"
    shown = next(iter(tried.values()))
    if len(set(tried.values())) > 1:
        shown = ", ".join(f"{rate} ({kind})" for kind, rate in tried.items())
    if any("/" in rate for rate in tried.values()) and not design["selected_by"]:
        return f"rates of the stages {shown}"
    return f"rate {shown}" + (f" by {design['selected_by']}" if design["selected_by"] else "")


def _seconds(entry: Mapping[str, Any]) -> str:
    """``teacher 3 + align 20 + sft 5``; a dash for recipes without training."""
    parts = [f"{name} {value:.0f}" for name, value in entry["seconds"].items() if name != "evaluate"]
    return " + ".join(parts) or MISSING


def _measures_less(found: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{title} {estimate(found[name], signed=True)}" for name, title in MEASURES.items() if name in found
    )
