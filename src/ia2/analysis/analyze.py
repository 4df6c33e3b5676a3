"""``analyze``: what happened inside trained adapters, from their run folders to ``analysis.json``."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia2.analysis.checkpoints import Found, find_checkpoints
from ia2.analysis.conditions import Runner, run_conditions, sites_of
from ia2.analysis.section import Analysis, AnalysisSection, Look
from ia2.analysis.sections import SECTIONS
from ia2.experiment.run_folder import ANALYSIS_FILE, machine, versions
from ia2.prompts.task import Task, make_task
from ia2.utils.errors import ConfigError, suggest
from ia2.utils.files import finite, json_text, write_text
from ia2.utils.manifest import begin

if TYPE_CHECKING:
    from ia2.models.load import BaseModel

FORMAT = 1

DEFAULT_PARTS = tuple(name for name, section in SECTIONS.items() if section.default)


@dataclass(frozen=True)
class AnalysisSettings:
    """How an analysis is made.

    Attributes:
        parts: some of :data:`SECTIONS`.
        controls: whether controls are run, which is most of the passes.
        causal_queries: queries of each training set that the causal check is made on.
        text: file of plain text, for forgetting; None takes the packaged one.
        benchmarks: other benchmarks, for forgetting.
        data_dir: folder of their mirrors.
        code: code that runs and files of benchmarks may name: ``trust_remote_code``, and ``parser`` and
            ``context_function`` as one or several ``module:function``. They are data, and run no other.
    """

    parts: tuple[str, ...] = DEFAULT_PARTS
    controls: bool = True
    causal_queries: int = 24
    text: str | None = None
    benchmarks: tuple[str, ...] = ()
    data_dir: str | None = None
    code: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        choose = f" Choose some of {', '.join(SECTIONS)}."
        if not self.parts:
            raise ConfigError(f"parts: none are named.{choose}")
        for part in self.parts:
            if part not in SECTIONS:
                raise ConfigError(f"parts: there is no '{part}'.{suggest(part, list(SECTIONS)) or choose}")
        if self.causal_queries < 2:
            raise ConfigError("causal_queries: at least two are needed.")
        if (self.text or self.benchmarks) and "effects" not in self.parts:
            raise ConfigError("a text or benchmarks are given, but effects is not among the parts. Add it.")


def analyze(
    folders: Sequence[str | Path],
    settings: AnalysisSettings | None = None,
    *,
    data: str | None = None,
    split: str | None = None,
    data_config: str | None = None,
    max_queries: int | None = 200,
    adapters: Sequence[str] = (),
    device: str | None = None,
    base: str | BaseModel | None = None,
    output_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Look inside trained adapters.

    Args:
        folders: finished runs of ``ia2 train`` or ``ia2 compare`` on one base model.
        settings: what is analysed.
        data: labelled rows to look at; the runs' own test rows by default.
        split: of ``data``, where it is a hub data set or a folder.
        data_config: configuration of ``data``, where it is one of these.
        max_queries: at most so many rows of each training set, drawn once; None takes all.
        adapters: names of those to look at; all by default.
        device: ``cpu``, ``cuda``, …; by default that of the runs' settings.
        base: where the base model lies now, or the loaded model; by default where it lay.
        output_dir: where ``analysis.json`` is written; None writes nothing.

    Returns:
        What ``analysis.json`` holds (see the documentation).

    Raises:
        UserError: folders, rows or settings that do not fit; nothing is written.
    """
    from ia2.experiment.adapt import load_base_of_run

    settings = settings or AnalysisSettings()
    if output_dir is not None and Path(output_dir).is_file():
        raise ConfigError(f"{output_dir} is a file. Choose another --output-dir.")
    found = find_checkpoints(
        [Path(folder) for folder in folders],
        data=data,
        split=split,
        data_config=data_config,
        max_queries=max_queries,
        only=adapters,
        code=settings.code,
    )
    if "causal" in settings.parts and min(len(each.queries) for each in found.sets) < 2:
        raise ConfigError("the causal check needs at least two queries. Give more rows, or leave causal out.")
    config = found.config if device is None else found.config.model_copy(update={"device": device})
    base = load_base_of_run(found.sets[0].place, config, found.identity, base)
    task = make_task(found.examples, config, base.tokenizer, config.prompt_template)
    result = _facts(found, task, settings, folders)
    with tempfile.TemporaryDirectory(prefix="ia2-") as scratch:
        begin(Path(scratch))
        runners = [Runner(base, task, each, Path(scratch)) for each in found.sets]
        result |= _sections(Analysis(base, settings, runners))
    result |= {"machine": machine(), "versions": versions()}
    if output_dir is not None:
        # one line: it is for programs, and would be 100,000 lines
        text = json_text(_short(finite(result)), separators=(",", ":"))
        write_text(Path(output_dir) / ANALYSIS_FILE, text + "\n")
    return result


def _sections(analysis: Analysis) -> dict[str, Any]:
    """All sections, and the seconds they took; one training set after the other."""
    sections = {name: s for name, s in SECTIONS.items() if name in analysis.settings.parts}
    seconds: dict[str, float] = {}
    for runner in analysis.runners:
        runner.check(analysis.settings.controls)
    for name, section in sections.items():
        if section.prepare is not None:
            analysis.prepared[name] = section.prepare(analysis)
    results: dict[str, list[Any]] = {}
    for runner in analysis.runners:
        look = Look(analysis, runner)
        try:
            with _timed(seconds, "views"):
                _shared_passes(look, sections)
            for name, section in sections.items():
                if section.measure is not None:
                    with _timed(seconds, name):
                        look.results[name] = section.measure(look)
        finally:
            runner.close()
        for name, found in look.results.items():
            results.setdefault(name, []).append(found)
    made: dict[str, Any] = {}
    for name, section in sections.items():
        if name in results:
            with _timed(seconds, name):
                made[name] = section.summarise(results[name], analysis)
    return made | {"seconds": seconds}


def _shared_passes(look: Look, sections: Mapping[str, AnalysisSection]) -> None:
    """Each condition is run once, whatever looks at it."""
    made = {name: s.accumulate(look) for name, s in sections.items() if s.accumulate is not None}
    accumulators = {name: accumulator for name, accumulator in made.items() if accumulator is not None}
    if not accumulators:
        return
    feeding = list(accumulators.values())
    for members in look.runner.blocks(sites_of(feeding)):
        run_conditions(look.runner, look.conditions, feeding, look.answers, members)
    look.results |= {name: accumulator.finish() for name, accumulator in accumulators.items()}


def _facts(
    found: Found, task: Task, settings: AnalysisSettings, folders: Sequence[str | Path]
) -> dict[str, Any]:
    first = found.sets[0]
    checkpoints = [checkpoint for each in found.sets for checkpoint in each.checkpoints]
    return {
        "format": FORMAT,
        # names alone: a path says more about a machine than a report should
        "model": Path(found.model).name if Path(found.model).is_absolute() else found.model,
        "runs": [Path(folder).resolve().name for folder in folders],
        "parts": list(settings.parts),
        "controls": settings.controls,
        "data": {
            "name": Path(found.queries_of).name,
            "queries": sum(len(each.queries) for each in found.sets),
            "fingerprint": first.queries.fingerprint,
        },
        "seeds": list(dict.fromkeys(each.seed for each in found.sets)),
        "num_train": len(first.data.train),
        "task": task.kind,
        "labels": list(task.names),
        "single_token": task.single_token,
        "subjects": list(dict.fromkeys(c.name for c in checkpoints)),
        "recipes": {c.name: c.recipe for c in checkpoints},
    }


def _short(value: Any) -> Any:
    """Six significant digits, so that the file is half as large."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _short(inner) for key, inner in value.items()}
    return [_short(inner) for inner in value] if isinstance(value, list) else value


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
