"""Tables of metrics: of one adapter, of a comparison of recipes, of a curve over N."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ia2.evaluation.statistics import main_scope
from ia2.utils.format import Fields, Table, fill
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

    def metric(name: str, of: str = scope) -> Any:
        return lambda _, entry: entry["metrics"].get(of, {}).get(name)

    columns = {title: metric(name) for name, title in MEASURES.items()}
    means = {
        "ECE, temp.-scaled": lambda _, entry: entry["metrics"].get("scaled", {}).get(scope, {}).get("ece"),
        "asim to ICL": lambda _, entry: entry.get("asim"),
    }
    if scope == "labels":
        columns = {f"accuracy {SCOPES[scope]}": columns.pop("accuracy"), **columns}
        means = {"acc. over the vocabulary": metric("accuracy", "vocabulary"), **means}
    fields: Fields = [
        ("recipe", lambda name, _: name),
        *((title, lambda *row, of=of: estimate(of(*row))) for title, of in columns.items()),
        *((title, lambda *row, of=of: mean_of(of(*row))) for title, of in means.items()),
        ("answers", lambda _, entry: entry.get("answers") or MISSING),
        ("seconds", lambda _, entry: _seconds(entry)),
    ]
    title = f"{summary['model']} on {summary['data']['name']}, {design['num_train']} training examples."
    differences = [
        f"{name}: {_measures_less(found)} (paired by draw and row{unlike(found)})."
        for name, found in summary["differences"].items()
    ]
    notes = [*comparison_notes(summary), *differences]
    return fill("comparison", title, fields, summary["recipes"].items(), notes)


def curve_table(summary: Mapping[str, Any]) -> Table:
    """Every measure by size and recipe, from what ``curve.json`` holds."""
    names = {**MEASURES, "accuracy_vocabulary": "accuracy over the vocabulary"}
    rows = [
        (recipe, title, [point.get(name) for point in points])
        for name, title in names.items()
        for recipe, points in summary["curves"].items()
        if any(name in point for point in points)
    ]
    fields: Fields = [
        ("recipe", lambda recipe, *_: recipe),
        ("measure", lambda _, title, __: title),
        *(
            (f"N = {size}", lambda _, __, found, place=place: estimate(found[place]))
            for place, size in enumerate(summary["sizes"])
        ),
    ]
    title = f"{summary['model']} by the number of training examples N."
    return fill("curve", title, fields, rows, [f"{summary['title']}.", *_curve_notes(summary)])


def metrics_table(metrics: Mapping[str, Any]) -> Table | None:
    """Metrics of one adapter by scope, from what ``metrics.json`` holds; None where it was not evaluated."""
    part = "test" if "test" in metrics else "dev"
    if part not in metrics:
        return None
    found = metrics[part]
    names = {**MEASURES, "ece_equal_width": "ECE, bins of equal width"}
    rows = [
        (title, {scope: found[scope][name] for scope in SCOPES if scope in found})
        for name, title in names.items()
    ]
    if "scaled" in found:
        rows.append(("ECE, temperature-scaled", {scope: of["ece"] for scope, of in found["scaled"].items()}))
    fields: Fields = [
        ("metric", lambda title, _: title),
        *(
            (words, lambda _, by_scope, scope=scope: mean_of(by_scope.get(scope)))
            for scope, words in SCOPES.items()
            if scope in found
        ),
    ]
    title = f"{metrics.get('recipe', 'The adapter')} on {found['n']} {part} rows, {_of_draws(1)}."
    notes = [f"{metrics['note'].capitalize()}."] if "note" in metrics else []
    return fill("metrics", title, fields, rows, notes)


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
    return f"rate {shown}" + (f" by {design['selected_by']}" if design["selected_by"] else "")


def _seconds(entry: Mapping[str, Any]) -> str:
    """``teacher 3 + align 20 + sft 5``; a dash for recipes without training."""
    parts = [f"{name} {value:.0f}" for name, value in entry["seconds"].items() if name != "evaluate"]
    return " + ".join(parts) or MISSING


def _measures_less(found: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{title} {estimate(found[name], signed=True)}" for name, title in MEASURES.items() if name in found
    )
