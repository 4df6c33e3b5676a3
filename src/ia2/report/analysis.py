"""What an analysis says: sentences, a table of its views, and the figures of its sections."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ia2.errors import RunFolderError
from ia2.evaluation.statistics import side
from ia2.files import read_json
from ia2.report.style import Figure, numbers_table
from ia2.report.verdict import METHOD, RIVAL, arm_title
from ia2.runs import ANALYSIS_FILE
from ia2.sweeps.tables import Table
from ia2.wording import counted, estimate

# The maker of each section's figures, imported when there is something to draw.
_FIGURES = {
    "activations": "activation_figures",
    "lens": "lens_figures",
    "weights": "weight_figures",
    "heads": "head_figures",
    "neurons": "neuron_figures",
    "causal": "causal_figures",
    "effects": "effect_figures",
}


def read_analysis(folder: Path) -> dict[str, Any] | None:
    """The analysis in a run's folder, if there is one.

    Raises:
        RunFolderError: it is damaged.
    """
    file = folder / ANALYSIS_FILE
    if not file.is_file():
        return None
    found = read_json(file)
    if not isinstance(found, dict) or "format" not in found:
        raise RunFolderError(f"{file}: no analysis of `ia2 analyze`. Delete it, or run it again.")
    return found


def analysis_heading(result: Mapping[str, Any]) -> str:
    """What the figures are of."""
    one = len(result["seeds"]) == 1
    queries = counted(result["data"]["queries"], "query", "queries")
    return (
        f"{result['model']}: {result['data']['name']}, {result['num_train']} examples, {queries}"
        f"{'' if one else ' over all seeds'}, seed{'' if one else 's'} {', '.join(map(str, result['seeds']))}"
    )


def analysis_figures(result: Mapping[str, Any]) -> list[Figure]:
    """Every figure of every section."""
    heading = analysis_heading(result)
    figures: list[Figure] = []
    for name, maker in _FIGURES.items():
        if result.get(name):
            module = importlib.import_module(f"ia2.report.{_module_of(maker)}")
            make: Callable[[Any, str], list[Figure]] = getattr(module, maker)
            figures += make(result[name], heading)
    return figures


def _module_of(maker: str) -> str:
    return "head_figures" if maker == "neuron_figures" else maker


# ---------------------------------------------------------------------------------------- sentences


def analysis_verdict(result: Mapping[str, Any]) -> list[str]:
    """What came out, a sentence a section."""
    makers = (_activations, _weights, _lens, _heads, _causal, _effects)
    return [line for make in makers for line in make(result)]


def _activations(result: Mapping[str, Any]) -> Iterator[str]:
    section = result.get("activations")
    if not section:
        return
    views = {view["name"]: view for view in section["views"]}
    differences = {(d["a"], d["b"]): d["asim"] for d in section["differences"]}
    arms = [name for name in result["subjects"] if name in views]
    method = next((a for a in arms if a.partition("@")[0] == METHOD), None)
    rival = next((a for a in arms if a.partition("@")[0] == RIVAL), None)
    if method and rival:
        found = differences.get((method, rival)) or _turned(differences[rival, method])
        words = {1: "nearer to ICL inside than", -1: "further from ICL inside than", 0: "as near to ICL as"}
        yield (
            f"{arm_title(method)} is {words[side(found)]} {arm_title(rival)}: asim "
            f"{_value(views[method])} against {_value(views[rival])}, difference "
            f"{estimate(found, signed=True)}."
        )
    else:
        yield "asim to ICL: " + ", ".join(f"{arm_title(a)} {_value(views[a])}" for a in arms) + "."
    controls = [
        f"{words} {_value(views[name])}"
        for name, words in (
            ("base", "the base model without demonstrations"),
            ("icl-mean", "one constant, the mean ICL activation,"),
            ("icl-other", "ICL with other demonstrations"),
        )
        if name in views
    ]
    if controls:
        yield f"For comparison: {'; '.join(controls)}."
    if method and "centred" in views[method] and "base" in views:
        rest = (
            f"; ICL with other demonstrations {_centred(views['icl-other'])}" if "icl-other" in views else ""
        )
        yield (
            "With what all queries have in common taken off (centred cosine): "
            + ", ".join(f"{arm_title(a)} {_centred(views[a])}" for a in arms)
            + f"; the base model {_centred(views['base'])}{rest}."
        )


def _weights(result: Mapping[str, Any]) -> Iterator[str]:
    section = result.get("weights")
    if not section:
        return
    known = []
    for pair in section["pairs"]:
        value = pair["overlap"]["b"]["value"]
        if value is not None and value == value:
            between = " of two seeds" if pair["kind"] == "seeds" else ""
            known.append(f"{pair['label']}{between} {value:.2f}")
    if known:
        chance = section["pairs"][0]["random"]["b"]
        yield f"Overlap of the updates (by B; random subspaces {chance:.3f}): {'; '.join(known)}."
    for skipped in section["skipped"]:
        yield f"{arm_title(skipped['name'])}, seed {skipped['seed']}: {skipped['reason']}."


def _lens(result: Mapping[str, Any]) -> Iterator[str]:
    section = result.get("lens")
    if not section:
        return
    shown = [
        f"{arm_title(view['name'])} {'nowhere' if view['shows_at'] is None else view['shows_at']}"
        for view in section["views"]
        if view["name"] in ("icl", "base", *result["subjects"])
    ]
    yield (
        f"First layer (of {section['layers'][0]} to {section['layers'][-1]}) at which the logit lens shows "
        f"the task: {', '.join(shown)}."
    )


def _heads(result: Mapping[str, Any]) -> Iterator[str]:
    section = result.get("heads")
    if not section:
        return
    total = len(section["layers"]) * section["num_heads"]
    views = section["views"]
    found = [
        f"{arm_title(name)} {views[name]['heads_further']}"
        for name in ("base", *result["subjects"])
        if name in views and views[name]["test"] == "control"
    ]
    if found:
        yield (
            f"Heads (of {total}) further from ICL than ICL with other demonstrations is, in every training "
            f"set: {', '.join(found)}."
        )


def _causal(result: Mapping[str, Any]) -> Iterator[str]:
    section = result.get("causal")
    if not section:
        return
    for name, target in section["targets"].items():
        gap = target["gap"]
        whole = target["all"]["recovered"]
        if whole is None or whole != whole:
            yield (
                f"Causal check, {arm_title(name)}: it gives ICL's answer about as much probability as ICL "
                f"does (gap {estimate(gap, signed=True)} nats), so there is no fraction to recover."
            )
            continue
        layers = _largest(target["layers"], section["layers"], 3)
        flat = [(f"{section['layers'][i]}.{j}", v) for i, j, v in _cells(target["heads"]["recovered"])]
        heads = ", ".join(f"{n} ({v:.2f})" for n, v in sorted(flat, key=lambda pair: -pair[1])[:3])
        yield (
            f"Causal check, {arm_title(name)}: of a gap of {gap['value']:.2f} nats, ICL's attention outputs "
            f"at the answer recover {whole:.2f}; single layers {layers}; heads (layer.head) {heads}."
        )


def _largest(found: Mapping[str, Any], names: Sequence[int], count: int) -> str:
    known = [(n, v) for n, v in zip(names, found["recovered"], strict=True) if v is not None and v == v]
    return ", ".join(f"{n} ({v:.2f})" for n, v in sorted(known, key=lambda pair: -pair[1])[:count])


def _cells(rows: Sequence[Sequence[Any]]) -> Iterator[tuple[int, int, float]]:
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            if value is not None and value == value:
                yield i, j, value


def _effects(result: Mapping[str, Any]) -> Iterator[str]:
    section = result.get("effects")
    if not section:
        return
    arms = [name for name in result["subjects"] if name in section["views"]]
    perplexity = section.get("perplexity")
    if perplexity:
        found = [f"{arm_title(a)} {estimate(perplexity['views'][a]['ratio'])}" for a in arms]
        yield f"Perplexity on plain text, over the base model's: {', '.join(found)}."
    worded = section.get("wordings")
    if worded and "labels" in worded["scopes"]:
        views = worded["scopes"]["labels"]["views"]
        found = [
            f"{arm_title(a)} {estimate(views[a]['accuracy']['unchanged'])}, {_worst(views[a]['worst'])}"
            for a in arms
        ]
        yield (
            "Accuracy among the labels as trained, and under the worst of the other wordings: "
            f"{'; '.join(found)}."
        )


def _worst(found: Mapping[str, Any]) -> str:
    return f"{found['accuracy']:.2f} ({found['wording']})"


def _value(view: Mapping[str, Any]) -> str:
    return f"{view['asim']['value']:.3f}"


def _centred(view: Mapping[str, Any]) -> str:
    return f"{view['centred']['value']:.2f}" if "centred" in view else "–"


def _turned(found: Mapping[str, Any]) -> dict[str, Any]:
    return {"value": -found["value"], "low": -found["high"], "high": -found["low"]}


# -------------------------------------------------------------------------------------------- table


def analysis_tables(result: Mapping[str, Any]) -> list[Table]:
    """Similarity to ICL of every view; differences, paired."""
    section = result.get("activations")
    if not section:
        return []
    columns = ["view", "control", "asim", "centred", "variance unexplained", "L2"]
    rows = [
        [
            view["name"],
            view["control"] or "–",
            *(estimate(view.get(name)) for name in ("asim", "centred", "variance_unexplained", "l2")),
        ]
        for view in section["views"]
    ]
    similar = numbers_table(
        "views", "Similarity of attention outputs to ICL with 95% intervals", columns, rows
    )
    pairs: Sequence[Sequence[str]] = [
        [f"{d['a']} − {d['b']}", estimate(d["asim"], signed=True)] for d in section["differences"]
    ]
    differences = numbers_table(
        "view-differences", "Differences in asim, paired by query", ["difference", "asim"], pairs
    )
    return [similar, differences]
