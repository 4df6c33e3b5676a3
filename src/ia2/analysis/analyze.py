"""``analyze``: what happened inside trained adapters, from their run folders to ``analysis.json``."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia2.analysis import activations, heads, lens, neurons
from ia2.analysis.checkpoints import Found, find_checkpoints
from ia2.analysis.conditions import ICL, Accumulator, Condition, Runner, conditions_of, run_conditions
from ia2.analysis.interventions import Interventions
from ia2.analysis.side_effects import SideEffects
from ia2.analysis.unembedding import Lens
from ia2.experiment.run_folder import ANALYSIS_FILE, machine, versions
from ia2.models.capture import find_attention_modules
from ia2.models.sites import has_site
from ia2.models.tokens import Ids
from ia2.prompts.task import Task, make_task
from ia2.utils.errors import ConfigError, ModelError, suggest
from ia2.utils.files import finite, json_text, write_text
from ia2.utils.logging import logger
from ia2.utils.manifest import begin

if TYPE_CHECKING:
    from ia2.models.load import BaseModel

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

# Queries whose attention is looked at: eager attention is slow, and means over heads settle soon.
ATTENTION_QUERIES = 48


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
    seconds: dict[str, float] = {}
    result = _facts(found, task, settings, folders)
    with tempfile.TemporaryDirectory(prefix="ia2-") as scratch:
        begin(Path(scratch))
        runners = [Runner(base, task, each, Path(scratch)) for each in found.sets]
        for runner in runners:
            runner.check(settings.controls)
        result |= _run(runners, found, settings, seconds)
    if "weights" in settings.parts:
        with _timed(seconds, "weights"):
            result["weights"] = _weights(found, base)
    result |= {"seconds": seconds, "machine": machine(), "versions": versions()}
    if output_dir is not None:
        # one line: it is for programs, and would be 100,000 lines
        text = json_text(_short(finite(result)), separators=(",", ":"))
        write_text(Path(output_dir) / ANALYSIS_FILE, text + "\n")
    return result


def _run(
    runners: Sequence[Runner], found: Found, settings: AnalysisSettings, seconds: dict[str, float]
) -> dict[str, Any]:
    """Everything that runs the model, one training set after the other."""
    inside = Inside(runners[0].base, found, settings)
    again: dict[str, Interventions | SideEffects] = {}
    if "causal" in settings.parts:
        again["causal"] = Interventions(settings.causal_queries, settings.controls)
    if "effects" in settings.parts:
        again["effects"] = SideEffects(
            runners,
            settings.text,
            settings.benchmarks,
            settings.data_dir,
            parsers=settings.code.get("parser") or (),
        )
    for runner in runners:
        try:
            with _timed(seconds, "views"):
                results = inside.add(runner)
            for name, part in again.items():
                with _timed(seconds, name):
                    part.add(runner, results)
        finally:
            runner.close()
    return inside.sections() | {name: part.section() for name, part in again.items()}


class Inside:
    """The analyses that are made while conditions run: each is run once, whatever looks at it.

    Args:
        base: the model.
        found: all training sets.
        settings: which parts; those that are made otherwise are passed over.
    """

    def __init__(self, base: BaseModel, found: Found, settings: AnalysisSettings) -> None:
        self.base, self.found, self.controls = base, found, settings.controls
        pattern = found.sets[0].config.attention_modules
        self.layers = list(find_attention_modules(base.model, pattern))
        self.num_heads = base.model.config.get_text_config().num_attention_heads
        self.makers: dict[str, Callable[[Runner, list[Ids]], Accumulator | None]] = {
            "activations": self._activations,
            "lens": self._lens,
            "heads": self._heads,
            "neurons": self._neurons,
        }
        self.parts = [part for part in self.makers if part in settings.parts]
        self._conditions: list[list[Condition]] = []
        self._results: dict[str, list[Any]] = {}
        self._attention: list[dict[str, Any]] = []

    def add(self, runner: Runner) -> dict[str, Any]:
        """One training set; gives what its accumulators found."""
        if not self.parts:
            return {}
        if self.controls and runner.others is None:
            logger.info("%s: too few other labelled rows for ICL with other demonstrations.", runner.set)
        others = self.controls and runner.others is not None
        conditions = conditions_of(runner.set, self.found.sets, controls=self.controls, others=others)
        answers: list[Ids] = []
        made = {part: self.makers[part](runner, answers) for part in self.parts}
        accumulators = {part: accumulator for part, accumulator in made.items() if accumulator is not None}
        run_conditions(runner, conditions, list(accumulators.values()), answers)
        results = {part: accumulator.finish() for part, accumulator in accumulators.items()}
        for part, result in results.items():
            self._results.setdefault(part, []).append(result)
        self._conditions.append(conditions)
        if "heads" in self.parts:
            self._attention.append(_attention(runner, conditions, answers))
        return results

    def _activations(self, runner: Runner, answers: list[Ids]) -> Accumulator:
        mean = runner.mean_of_training("output") if self.controls else None
        return activations.ActivationAccumulator(self.layers, mean)

    def _lens(self, runner: Runner, answers: list[Ids]) -> Accumulator | None:
        try:
            return lens.LensAccumulator(
                self.base.model, answers, runner.task.label_ids, runner.gold(), runner.pattern
            )
        except ModelError as error:
            logger.warning("%s The lens is left out.", error)
            return None

    def _heads(self, runner: Runner, answers: list[Ids]) -> Accumulator:
        return heads.HeadAccumulator(self.num_heads)

    def _neurons(self, runner: Runner, answers: list[Ids]) -> Accumulator:
        if has_site(self.base.model, "neurons", runner.pattern):
            return neurons.NeuronAccumulator()
        logger.info("No dense MLPs in this model: no neurons, only the residual stream.")
        return neurons.NeuronAccumulator(("residual",))

    def sections(self) -> dict[str, Any]:
        """Of all training sets together, by name."""
        sets, results = self.found.sets, self._results
        pool = activations.Pool([each.seed for each in sets], [each.places for each in sets])
        summaries = {
            "activations": lambda found: activations.summarise(found, pool, self._conditions),
            "lens": lambda found: lens.summarise(found, self.layers),
            "heads": lambda found: heads.summarise(found, self.layers, self.num_heads, self._attention),
            "neurons": self._neurons_section,
        }
        return {part: summaries[part](found) for part, found in results.items()}

    def _neurons_section(self, found: Sequence[Any]) -> dict[str, Any]:
        section = neurons.summarise(found, self.layers)
        residual = [each["residual"] for each in found]
        tokens = neurons.shift_tokens(Lens.of(self.base.model), self.base.tokenizer, residual, self.layers)
        for condition, named in tokens.items():
            section["residual"]["views"][condition]["tokens"] = named
        return section


def _attention(runner: Runner, conditions: Sequence[Condition], answers: Sequence[Ids]) -> dict[str, Any]:
    """What attention goes to, of the conditions that have demonstrations."""
    members = range(min(ATTENTION_QUERIES, len(answers)))
    shown = [ICL, *(c for c in conditions if c.context == "own" and c.checkpoint is not None)]
    found = {}
    for condition in shown:
        with runner.showing(condition.checkpoint) as model:
            found[condition.name] = heads.attention_mass(
                model,
                runner.base.tokenizer,
                runner.prompts("own", members),
                [answers[i] for i in members],
                runner.query_lengths(members),
                pattern=runner.pattern,
                description=f"{runner.set}: attention of {condition.name}",
            )
    return found


def _weights(found: Found, base: BaseModel) -> dict[str, Any]:
    from ia2.adapters.weights import read_adapter_state
    from ia2.analysis.weights import AdapterWeights, overlaps

    adapters = [
        AdapterWeights(c.name, c.recipe, c.seed, each.fold, c.config.adapter, read_adapter_state(c.weights))
        for each in found.sets
        for c in each.checkpoints
    ]
    return overlaps(adapters, dict(base.model.named_parameters()))


def _facts(
    found: Found, task: Task, settings: AnalysisSettings, folders: Sequence[str | Path]
) -> dict[str, Any]:
    first = found.sets[0]
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
        "subjects": found.names,
        "recipes": {c.name: c.recipe for each in found.sets for c in each.checkpoints},
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
