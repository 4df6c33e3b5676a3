"""What stands below a table: seeds, rows, label words, settings, how rates were chosen; sentences."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

from ia2.report.sweep.selection import BY, Arm, Select

_Key = TypeVar("_Key", bound=Hashable)
_Value = TypeVar("_Value", bound=Hashable)


def grouped(pairs: Iterable[tuple[_Key, _Value]]) -> dict[_Key, list[_Value]]:
    """Key → its values, each once, in their order.

    >>> grouped([("a", 1), ("b", 2), ("a", 3), ("a", 1)])
    {'a': [1, 3], 'b': [2]}
    """
    found: dict[_Key, dict[_Value, None]] = {}
    for key, value in pairs:
        found.setdefault(key, {})[value] = None
    return {key: list(values) for key, values in found.items()}


def about(arms: Iterable[Arm], select: Select) -> list[str]:
    """What a table of these arms is of.

    Args:
        arms: each counts once.
        select: how their rates and β were chosen.
    """
    arms = list({id(arm): arm for arm in arms}.values())
    trained = [arm for arm in arms if arm.is_trained]
    cells = [cell for arm in arms for cell in arm.runs.values()]
    adapters = ", ".join(sorted({arm.adapter for arm in trained})) or "none"
    seeds = sorted({cell.seed for cell in cells if cell.seed is not None})
    words = grouped((arm.task.verbaliser, arm.task.benchmark) for arm in arms if arm.task.verbaliser)
    rows = grouped((e.n, name) for cell in cells for name, e in cell.evaluations.items())
    verbalisers = f"verbaliser {_listed(words, '; ')}" if words else "free text"
    notes = [
        f"Seeds {span(seeds)}; {_listed({f'{n} test rows': rows[n] for n in sorted(rows)}, ', ')}; "
        f"adapter {adapters}; {verbalisers}.",
        _rates(trained, select),
    ]
    if icl := [arm for arm in arms if arm.recipe == "icl"]:
        fresh = all(arm.settings.get("icl_demonstrations") == "fresh" for arm in icl)
        notes.append(
            "ICL: new demonstrations for every query, as in the paper."
            if fresh
            else "ICL: the same N examples as the trained recipes."
        )
    if shared := _shared_settings(trained):
        notes.append(f"Settings of all trained recipes: {shared}.")
    if uneven := _uneven_settings(trained):
        notes.append(f"Settings that differ between benchmarks or N: {uneven}.")
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


def _rates(trained: Sequence[Arm], select: Select) -> str:
    """``Learning rate fixed beforehand: 0.001 (sft).``, or how it was chosen among how many."""
    rated = [arm for arm in trained if arm.tried[0].learning_rate is not None]
    searched = [arm for arm in rated if len(arm.tried) > 1]
    fixed = grouped((str(arm.tried[0]), arm.label) for arm in rated if len(arm.tried) == 1)
    chosen = grouped((arm.label, str(tried)) for arm in searched for tried in arm.chosen)
    parts = []
    if fixed:
        listed = "; ".join(f"{rate} ({', '.join(who)})" for rate, who in fixed.items())
        parts.append(f"Learning rate fixed beforehand: {listed}.")
    if chosen:
        count = {who: max(len(arm.tried) for arm in searched if arm.label == who) for who in chosen}
        listed = "; ".join(f"{who} {' or '.join(sorted(r))} of {count[who]}" for who, r in chosen.items())
        what = (
            "Learning rate and β"
            if any("β" in rate for rates in chosen.values() for rate in rates)
            else "Learning rate"
        )
        parts.append(f"{what} chosen by {BY[select]}, for each benchmark: {listed}.")
    return " ".join(parts) if parts else "Nothing trained."


def _shared_settings(arms: Sequence[Arm]) -> str:
    """Settings that all arms have; the adapter's type is said before."""
    shared = dict(arms[0].settings) if arms else {}
    for arm in arms[1:]:
        shared = {k: v for k, v in shared.items() if arm.settings.get(k) == v}
    return ", ".join(f"{name} = {value}" for name, value in sorted(shared.items()) if name != "adapter.type")


def _uneven_settings(arms: Sequence[Arm]) -> str:
    """Settings that are not the same in all arms of one name."""
    names = grouped((arm.label, name) for arm in arms for name in arm.settings)
    values = grouped(
        ((arm.label, name), str(arm.settings.get(name))) for arm in arms for name in names.get(arm.label, ())
    )
    return ", ".join(sorted({name for (_, name), found in values.items() if len(found) > 1}))
