"""What stands below a table: seeds, rows, label words, settings, how rates were chosen; sentences."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

from ia2.config.recipes import is_trained
from ia2.report.sweep.selection import ChosenRuns, Select

_Key = TypeVar("_Key", bound=Hashable)
_Value = TypeVar("_Value", bound=Hashable)

_CHOSEN_BY: dict[Select, str] = {
    "dev": "dev loss, mean over seeds",
    "dev-per-seed": "dev loss, for each seed alone",
    "test": "test accuracy, mean over seeds, as in the paper: optimistic",
}


def grouped(pairs: Iterable[tuple[_Key, _Value]]) -> dict[_Key, list[_Value]]:
    """Key → its values, each once, in their order.

    >>> grouped([("a", 1), ("b", 2), ("a", 3), ("a", 1)])
    {'a': [1, 3], 'b': [2]}
    """
    values: dict[_Key, dict[_Value, None]] = {}
    for key, value in pairs:
        values.setdefault(key, {})[value] = None
    return {key: list(of) for key, of in values.items()}


def about(runs: Iterable[ChosenRuns], select: Select) -> list[str]:
    """What a table of these runs, each of which counts once, is of; ``select`` chose their rates and β."""
    shown = list({id(each): each for each in runs}.values())
    trained = [each for each in shown if is_trained(each.recipe)]
    cells = [cell for each in shown for cell in each.cells.values()]
    adapters = ", ".join(sorted({each.adapter for each in trained})) or "none"
    words = grouped((each.task.verbaliser, each.task.benchmark) for each in shown if each.task.verbaliser)
    rows = grouped((e.n, name) for cell in cells for name, e in cell.evaluations.items())
    verbalisers = f"verbaliser {_listed(words, '; ')}" if words else "free text"
    notes = [
        f"Seeds {span(sorted({cell.seed for cell in cells if cell.seed is not None}))}; "
        f"{_listed({f'{n} test rows': rows[n] for n in sorted(rows)}, ', ')}; "
        f"adapter {adapters}; {verbalisers}.",
        _rates(trained, select),
    ]
    if icl := [each for each in shown if each.recipe == "icl"]:
        fresh = all(each.settings.get("icl_demonstrations") == "fresh" for each in icl)
        notes.append(
            "ICL: new demonstrations for every query, as in the paper."
            if fresh
            else "ICL: the same N examples as the trained recipes."
        )
    notes += _settings(trained)
    if data := dict.fromkeys(note for cell in cells for note in cell.notes):
        notes.append(f"Data: {'; '.join(' '.join(note.split()).rstrip('.') for note in data)}.")
    return notes


def span(seeds: Sequence[int]) -> str:
    """``0–4`` for neighbours, else ``0, 2, 5``."""
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]}–{seeds[-1]}"
    return ", ".join(map(str, seeds)) or "none"


def _listed(names: dict[str, list[str]], between: str) -> str:
    """``200 test rows (AGN), 180 test rows (Intents)``; without names where there is one kind."""
    if len(names) == 1:
        return next(iter(names))
    return between.join(f"{kind} ({', '.join(of)})" for kind, of in names.items())


def _rates(trained: Sequence[ChosenRuns], select: Select) -> str:
    """``Learning rate fixed beforehand: 0.001 (sft).``, or how it was chosen among how many."""
    searched = [runs for runs in trained if len(runs.tried) > 1]
    fixed = grouped((runs.tried[0], runs.label) for runs in trained if len(runs.tried) == 1)
    chosen = grouped((runs.label, rate) for runs in searched for rate in runs.chosen)
    sentences = []
    if fixed:
        listed = "; ".join(f"{rate} ({', '.join(labels)})" for rate, labels in fixed.items())
        sentences.append(f"Learning rate fixed beforehand: {listed}.")
    if chosen:
        count = {label: max(len(runs.tried) for runs in searched if runs.label == label) for label in chosen}
        listed = "; ".join(
            f"{label} {' or '.join(sorted(r))} of {count[label]}" for label, r in chosen.items()
        )
        of_beta = " and β" if "β" in listed else ""
        sentences.append(
            f"Learning rate{of_beta} chosen by {_CHOSEN_BY[select]}, for each benchmark: {listed}."
        )
    return " ".join(sentences) or "Nothing trained."


def _settings(trained: Sequence[ChosenRuns]) -> list[str]:
    """Settings that all share, but the adapter's type, which is said before; and those that differ."""
    items = [{(name, str(value)) for name, value in runs.settings.items()} for runs in trained]
    shared = sorted(set.intersection(*items)) if items else []
    listed = ", ".join(f"{name} = {value}" for name, value in shared if name != "adapter.type")
    labels = grouped((runs.label, name) for runs in trained for name in runs.settings)
    values = grouped(
        ((runs.label, name), str(runs.settings.get(name)))
        for runs in trained
        for name in labels.get(runs.label, ())
    )
    uneven = ", ".join(sorted({name for (_, name), of in values.items() if len(of) > 1}))
    sentences = [f"Settings of all trained recipes: {listed}."] if listed else []
    return sentences + ([f"Settings that differ between benchmarks or N: {uneven}."] if uneven else [])
