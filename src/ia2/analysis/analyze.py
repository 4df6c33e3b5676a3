"""``analyze``: what happened inside trained adapters, from their run folders to ``analysis.json``."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia2.analysis.further import Causal, SideEffects
from ia2.analysis.inside import Insides
from ia2.analysis.subjects import Study, find_study
from ia2.analysis.views import Look
from ia2.errors import ConfigError, suggest
from ia2.files import finite, json_text, write_text
from ia2.manifest import begin
from ia2.runs import ANALYSIS_FILE, machine, versions
from ia2.task import Task, make_task

if TYPE_CHECKING:
    from ia2.models import BaseModel

FORMAT = 1

PARTS = {
    "activations": "similarity to ICL by layer and token, with controls",
    "weights": "subspaces and sizes of the updates",
    "lens": "logit lens: where the task shows, by layer",
    "heads": "which attention heads differ from ICL, and what they attend to",
    "neurons": "which neurons and residual directions differ from ICL",
    "causal": "whose activations, put into another run, change the answer (minutes an adapter)",
    "effects": "side effects: forgetting, diversity, sensitivity to wording (minutes an adapter)",
}
"""What can be analysed, in the order of a report."""

DEFAULT_PARTS = ("activations", "weights", "lens", "heads", "neurons")


@dataclass(frozen=True)
class AnalysisSettings:
    """How an analysis is made.

    Attributes:
        parts: some of :data:`PARTS`.
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
        if not self.parts:
            raise ConfigError(f"parts: none are named. Choose some of {', '.join(PARTS)}.")
        for part in self.parts:
            if part not in PARTS:
                way_out = suggest(part, list(PARTS)) or f" Choose some of {', '.join(PARTS)}."
                raise ConfigError(f"parts: there is no '{part}'.{way_out}")
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
    from ia2.adaptation import load_base_of_run

    settings = settings or AnalysisSettings()
    if output_dir is not None and Path(output_dir).is_file():
        raise ConfigError(f"{output_dir} is a file. Choose another --output-dir.")
    places = [Path(folder) for folder in folders]
    study = find_study(
        places,
        data=data,
        split=split,
        data_config=data_config,
        max_queries=max_queries,
        only=adapters,
        code=settings.code,
    )
    if "causal" in settings.parts and min(len(trial.queries) for trial in study.trials) < 2:
        raise ConfigError("the causal check needs at least two queries. Give more rows, or leave causal out.")
    config = study.config if device is None else study.config.model_copy(update={"device": device})
    base = load_base_of_run(study.trials[0].place, config, study.identity, base)
    task = make_task(study.examples, config, base.tokenizer, config.prompt_template)
    seconds: dict[str, float] = {}
    result = _facts(study, task, settings, folders)
    with tempfile.TemporaryDirectory(prefix="ia2-") as scratch:
        begin(Path(scratch))
        looks = [Look(base, task, trial, Path(scratch)) for trial in study.trials]
        for look in looks:
            look.check(settings.controls)
        result |= _looked(looks, study, task, settings, base, seconds)
    if "weights" in settings.parts:
        with _timed(seconds, "weights"):
            result["weights"] = _weights(study, base)
    result |= {"seconds": seconds, "machine": machine(), "versions": versions()}
    if output_dir is not None:
        # one line: it is for programs, and would be 100,000 lines
        text = json_text(_short(finite(result)), separators=(",", ":"))
        write_text(Path(output_dir) / ANALYSIS_FILE, text + "\n")
    return result


def _looked(
    looks: Sequence[Look],
    study: Study,
    task: Task,
    settings: AnalysisSettings,
    base: BaseModel,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Everything that runs the model, trial by trial."""
    insides = Insides(study, task, settings.parts, settings.controls)
    causal = Causal(settings.causal_queries, settings.controls)
    effects = SideEffects(
        task,
        settings.text,
        settings.benchmarks,
        settings.data_dir,
        template=study.config.prompt_template,
        parsers=settings.code.get("parser") or (),
    )
    if "effects" in settings.parts:
        effects.prepare(looks)
    for look in looks:
        try:
            with _timed(seconds, "views"):
                found = insides.look(look)
            if "causal" in settings.parts:
                with _timed(seconds, "causal"):
                    causal.look(look, look.trial.subjects, found.get("neurons"))
            if "effects" in settings.parts:
                with _timed(seconds, "effects"):
                    effects.look(look, look.trial.subjects)
        finally:
            look.close()
    sections = insides.sections(base)
    if "causal" in settings.parts:
        sections["causal"] = causal.section()
    if "effects" in settings.parts:
        sections["effects"] = effects.section()
    return sections


def _weights(study: Study, base: BaseModel) -> dict[str, Any]:
    from ia2.adapter_weights import read_adapter_state
    from ia2.analysis.overlap import AdapterWeights, overlaps

    adapters = [
        AdapterWeights(s.name, s.recipe, s.seed, trial.fold, s.config.adapter, read_adapter_state(s.weights))
        for trial in study.trials
        for s in trial.subjects
    ]
    return overlaps(adapters, dict(base.model.named_parameters()))


def _facts(
    study: Study, task: Task, settings: AnalysisSettings, folders: Sequence[str | Path]
) -> dict[str, Any]:
    first = study.trials[0]
    return {
        "format": FORMAT,
        # names alone: a path says more about a machine than a report should
        "model": Path(study.model).name if Path(study.model).is_absolute() else study.model,
        "runs": [Path(folder).resolve().name for folder in folders],
        "parts": list(settings.parts),
        "controls": settings.controls,
        "data": {
            "name": Path(study.queries_of).name,
            "queries": sum(len(trial.queries) for trial in study.trials),
            "fingerprint": first.queries.fingerprint,
        },
        "seeds": list(dict.fromkeys(trial.seed for trial in study.trials)),
        "num_train": len(first.data.train),
        "task": task.kind,
        "labels": list(task.names),
        "single_token": task.single_token,
        "subjects": study.names,
        "recipes": {s.name: s.recipe for trial in study.trials for s in trial.subjects},
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
