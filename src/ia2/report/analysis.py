"""What an analysis says: sentences, tables of its conditions, and the figures of its sections."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ia2.config.recipes import METHOD, PLAIN
from ia2.report.figures.style import Figure
from ia2.report.verdict import arm_title
from ia2.utils.format import Table, fill
from ia2.utils.statistics import side
from ia2.utils.wording import MISSING, counted, estimate


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
    from ia2.report.figures.activations import activation_figures, lens_figures
    from ia2.report.figures.causal import causal_figures
    from ia2.report.figures.components import head_figures, neuron_figures, weight_figures
    from ia2.report.figures.effects import effect_figures

    makers = {
        "activations": activation_figures,
        "lens": lens_figures,
        "weights": weight_figures,
        "heads": head_figures,
        "neurons": neuron_figures,
        "causal": causal_figures,
        "effects": effect_figures,
    }
    heading = analysis_heading(result)
    made = (make(result[name]) for name, make in makers.items() if result.get(name))
    return [replace(figure, heading=heading) for figures in made for figure in figures]


# ---------------------------------------------------------------------------------------- sentences


def analysis_verdict(result: Mapping[str, Any]) -> list[str]:
    """What came out, a sentence a section."""
    makers = {
        "activations": _activations,
        "weights": _weights,
        "lens": _lens,
        "heads": _heads,
        "causal": _causal,
        "effects": _effects,
    }
    made = (make(result[name], result["subjects"]) for name, make in makers.items() if result.get(name))
    return [line for lines in made for line in lines]


def _each(names: Iterable[str], say: Callable[[str], str], between: str = ", ") -> str:
    """``SFT 0.5, IA2 0.9``."""
    return between.join(f"{arm_title(name)} {say(name)}" for name in names)


def _activations(section: Mapping[str, Any], subjects: Sequence[str]) -> Iterator[str]:
    views = {view["name"]: view for view in section["views"]}
    differences = {(d["a"], d["b"]): d["asim"] for d in section["differences"]}
    arms = [name for name in subjects if name in views]
    method, rival = (next((a for a in arms if a.partition("@")[0] == of), None) for of in (METHOD, PLAIN))

    def asim(name: str) -> str:
        return f"{views[name]['asim']['value']:.3f}"

    def centred(name: str) -> str:
        return f"{views[name]['centred']['value']:.2f}" if "centred" in views[name] else MISSING

    if method and rival:
        found = differences.get((method, rival)) or _turned(differences[rival, method])
        words = {1: "nearer to ICL inside than", -1: "further from ICL inside than", 0: "as near to ICL as"}
        yield (
            f"{arm_title(method)} is {words[side(found)]} {arm_title(rival)}: asim {asim(method)} against "
            f"{asim(rival)}, difference {estimate(found, signed=True)}."
        )
    else:
        yield f"asim to ICL: {_each(arms, asim)}."
    controls = {
        "base": "the base model without demonstrations",
        "icl-mean": "one constant, the mean ICL activation,",
        "icl-other": "ICL with other demonstrations",
    }
    if told := [f"{words} {asim(name)}" for name, words in controls.items() if name in views]:
        yield f"For comparison: {'; '.join(told)}."
    if method and "centred" in views[method] and "base" in views:
        other = f"; ICL with other demonstrations {centred('icl-other')}" if "icl-other" in views else ""
        yield (
            "With what all queries have in common taken off (centred cosine): "
            f"{_each(arms, centred)}; the base model {centred('base')}{other}."
        )


def _weights(section: Mapping[str, Any], subjects: Sequence[str]) -> Iterator[str]:
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


def _lens(section: Mapping[str, Any], subjects: Sequence[str]) -> Iterator[str]:
    shows = {view["name"]: view["shows_at"] for view in section["views"]}
    shown = [name for name in shows if name in ("icl", "base", *subjects)]
    yield (
        f"First layer (of {section['layers'][0]} to {section['layers'][-1]}) at which the logit lens shows "
        f"the task: {_each(shown, lambda name: 'nowhere' if shows[name] is None else str(shows[name]))}."
    )


def _heads(section: Mapping[str, Any], subjects: Sequence[str]) -> Iterator[str]:
    views = section["views"]
    tested = [name for name in ("base", *subjects) if name in views and views[name]["test"] == "control"]
    if tested:
        total = len(section["layers"]) * section["num_heads"]
        yield (
            f"Heads (of {total}) further from ICL than ICL with other "
            "demonstrations is, in every training set: "
            f"{_each(tested, lambda name: str(views[name]['heads_further']))}."
        )


def _causal(section: Mapping[str, Any], subjects: Sequence[str]) -> Iterator[str]:
    names = section["layers"]
    for name, target in section["targets"].items():
        gap, whole = target["gap"], target["all"]["recovered"]
        if whole is None or whole != whole:
            yield (
                f"Causal check, {arm_title(name)}: it gives ICL's answer about as much probability as ICL "
                f"does (gap {estimate(gap, signed=True)} nats), so there is no fraction to recover."
            )
            continue
        layers = dict(zip(map(str, names), target["layers"]["recovered"], strict=True))
        heads = {
            f"{layer}.{head}": value
            for layer, row in zip(names, target["heads"]["recovered"], strict=True)
            for head, value in enumerate(row)
        }
        yield (
            f"Causal check, {arm_title(name)}: of a gap of {gap['value']:.2f} nats, ICL's attention outputs "
            f"at the answer recover {whole:.2f}; single layers {_largest(layers)}; heads (layer.head) "
            f"{_largest(heads)}."
        )


def _largest(found: Mapping[str, float | None], count: int = 3) -> str:
    known = [(name, value) for name, value in found.items() if value is not None and value == value]
    return ", ".join(f"{n} ({v:.2f})" for n, v in sorted(known, key=lambda pair: -pair[1])[:count])


def _effects(section: Mapping[str, Any], subjects: Sequence[str]) -> Iterator[str]:
    arms = [name for name in subjects if name in section["views"]]
    if perplexity := section.get("perplexity"):
        ratios = _each(arms, lambda name: estimate(perplexity["views"][name]["ratio"]))
        yield f"Perplexity on plain text, over the base model's: {ratios}."
    worded = section.get("wordings")
    if worded and "labels" in worded["scopes"]:
        views = worded["scopes"]["labels"]["views"]

        def both(name: str) -> str:
            worst = views[name]["worst"]
            unchanged = estimate(views[name]["accuracy"]["unchanged"])
            return f"{unchanged}, {worst['accuracy']:.2f} ({worst['wording']})"

        yield (
            "Accuracy among the labels as trained, and under the worst of the other wordings: "
            f"{_each(arms, both, '; ')}."
        )


def _turned(found: Mapping[str, Any]) -> dict[str, Any]:
    return {"value": -found["value"], "low": -found["high"], "high": -found["low"]}


# ------------------------------------------------------------------------------------------- tables


def analysis_tables(result: Mapping[str, Any]) -> list[Table]:
    """Similarity to ICL of every condition; differences, paired."""
    section = result.get("activations")
    if not section:
        return []
    measures = {
        "asim": "asim",
        "centred": "centred",
        "variance_unexplained": "variance unexplained",
        "l2": "L2",
    }
    similar = [
        {
            "view": view["name"],
            "control": view["control"] or MISSING,
            **{title: estimate(view.get(name)) for name, title in measures.items()},
        }
        for view in section["views"]
    ]
    differences = [
        {"difference": f"{pair['a']} − {pair['b']}", "asim": estimate(pair["asim"], signed=True)}
        for pair in section["differences"]
    ]
    return [
        fill("views", "Similarity of attention outputs to ICL with 95% intervals.", similar),
        fill("view-differences", "Differences in asim, paired by query.", differences),
    ]
