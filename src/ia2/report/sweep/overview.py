"""What a sweep shows, in sentences: what was run, what IA2 → SFT gains, and whether ICL works."""

from __future__ import annotations

from ia2.experiment.sweep.records import seconds_by_kind, work_in_words
from ia2.report.sweep.cells import METHOD, RIVAL, TITLES, Report
from ia2.report.sweep.notes import grouped
from ia2.utils.statistics import PairedTest, paired_test, side
from ia2.utils.wording import counted, estimate


def overview_lines(report: Report) -> list[str]:
    """What was run, the verdict on IA2 → SFT, and whether ICL worked; sentences."""
    results = report.results
    count = len(results.cells)
    of = f"{count} of " if results.total not in (None, count) else ""
    cells = of + counted(results.total or count, "cell")
    failed = f", {results.failed} failed" if results.failed else ""
    seeds = {cell.seed for cell in results.cells if cell.seed is not None}
    seconds = seconds_by_kind(cell.seconds for cell in results.cells)
    took = f"; {work_in_words(seconds)}" if sum(seconds.values()) else ""
    sources = list(dict.fromkeys(task.benchmark for task in report.tasks))
    return [
        f"{results.name}: {cells}{failed}{took}. Models {', '.join(report.models)}; benchmarks "
        f"{', '.join(sources)}; recipes {', '.join(report.labels)}; N = {', '.join(map(str, report.sizes))}; "
        f"{counted(len(seeds), 'seed')}.",
        *verdict_lines(report),
        *_icl_lines(report.where(icl_works=False)),
    ]


def verdict_lines(report: Report) -> list[str]:
    """IA2 → SFT against SFT in two sentences: over all label and free-text tasks, and where ICL works."""
    every = _pooled(report.where(icl_works=False))
    if "accuracy" not in every:
        return [f"{METHOD} and {RIVAL} were not both run: there is no verdict."]
    where = _pooled(report.where(icl_works=True))
    if "accuracy" not in where:
        said = "there is no such benchmark among these."
    else:
        said = "the same, it works on all of them." if where == every else _verdict(where)
    sizes = ", ".join(map(str, report.sizes))
    return [f"Over everything (N = {sizes}): {_verdict(every)}", f"Where ICL works: {said}"]


def _pooled(report: Report) -> dict[str, PairedTest]:
    """IA2 → SFT less SFT over models, N, benchmarks and seeds, by measure, where there are any."""
    measures = ("accuracy", "nll", "accuracy_vocabulary")
    pairs = {measure: report.pooled(report.places(own=True), measure)[0] for measure in measures}
    return {measure: paired_test(found) for measure, found in pairs.items() if found}


def _verdict(found: dict[str, PairedTest]) -> str:
    accuracy, nll, vocabulary = found["accuracy"], found.get("nll"), found.get("accuracy_vocabulary")
    word = _word(accuracy, "more accurate", "less accurate", "no more accurate")
    text = f"{TITLES[METHOD]} is {word} than SFT, {_shown(accuracy, percent=True)} points"
    if nll is not None and vocabulary is not None:
        word = _word(nll, "worse", "better", "no better")
        text += (
            f" among the labels ({_shown(vocabulary, percent=True)} over the vocabulary), and {word} in NLL, "
            f"{_shown(nll, percent=False)}"
        )
    several = accuracy.clusters > 1
    how = "95% t over benchmarks" if several else "one benchmark: no interval over them"
    of = f"{counted(accuracy.clusters, 'benchmark')}, {counted(accuracy.pairs, 'pair')} of runs"
    return f"{text} ({of}; {how})."


def _shown(found: PairedTest, *, percent: bool) -> str:
    return estimate(found.whole.to_dict(), signed=True, percent=percent)


def _word(found: PairedTest, above: str, below: str, equal: str) -> str:
    value = float(found.whole.value)
    if abs(value) < 1e-12:
        return equal
    word = above if value > 0 else below
    if found.clusters < 2:
        # the draws of one benchmark say nothing of others
        return f"{word} on this one benchmark"
    return word if side(found.whole.to_dict()) else f"not distinguishably {word}"


def _icl_lines(report: Report) -> list[str]:
    lines = []
    for model in report.models:
        for size in report.sizes:
            places = report.places(own=True, model=model, size=size)
            judged = ((p.task.benchmark, found.judged.word) for p in places if (found := report.icl(p)))
            if by := grouped((word, benchmark) for benchmark, word in judged):
                there = [word for word in ("yes", "unclear", "no") if word in by]
                listed = "; ".join(f"{word}: {', '.join(by[word])}" for word in there)
                lines.append(f"Does ICL work with {model} at N = {size}? {listed}.")
    return lines
