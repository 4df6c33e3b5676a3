"""``compare``: recipes side by side on the same examples, over several seeds, with intervals."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ia2.config import CompareConfig
from ia2.config.recipes import is_trained
from ia2.data.examples import Examples
from ia2.data.unlabelled import counts_unlabelled, distinct_from
from ia2.evaluation.metrics import STATISTICS, Measured, RowMeasures, summarise
from ia2.evaluation.scoring import write_predictions
from ia2.evaluation.similarity import Similarity
from ia2.evaluation.tables import INTERVALS, comparison_table
from ia2.experiment.adapt import load_base_of
from ia2.experiment.methods import Arm, arms, rivals
from ia2.experiment.rounds import Round, drawn_test, place_of, rounds_of
from ia2.experiment.run_folder import claimed, content_facts, machine, stored_settings, versions
from ia2.experiment.workbench import Evaluated, Workbench
from ia2.models.load import BaseModel
from ia2.prompts.task import Task, make_task
from ia2.teacher.targets import OnlineTargets
from ia2.training.stages import TrainedRecipe, plan
from ia2.utils.distributed import is_first, wait
from ia2.utils.errors import ConfigError, DivergedError
from ia2.utils.files import digest, read_json, write_json, write_text
from ia2.utils.format import markdown
from ia2.utils.logging import logger
from ia2.utils.statistics import main_scope, over_draws


@dataclass
class Outcome:
    """One recipe, one seed, one fold: rows, similarity to ICL and what it cost.

    Attributes:
        places: of the test rows in the data, ``[n]``.
        measured: rows that metrics are made of.
        asim: mean over layers and tokens for each of the first queries, ``[m]``; None for ``icl``.
        similarity: means by layer; None for ``icl``.
        seconds: by stage; ``evaluate`` too.
        learning_rate: chosen; None for recipes without training.
        beta: chosen; None for recipes without a joint stage.
        tokens_per_query: mean length of the prompts.
        diverged: rates (and β) that did, in words.
    """

    places: list[int]
    measured: Measured
    asim: list[float] | None
    similarity: dict[str, Any] | None
    seconds: dict[str, float]
    learning_rate: float | None
    beta: float | None
    tokens_per_query: float
    diverged: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; floats survive exactly."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Outcome:
        """What :meth:`to_dict` gave."""

        def rows(scopes: dict[str, Any]) -> dict[str, RowMeasures]:
            return {
                s: RowMeasures(**{k: np.array(v, float) for k, v in r.items()}) for s, r in scopes.items()
            }

        measured = value["measured"]
        return cls(
            **{
                **value,
                "measured": Measured(
                    rows(measured["plain"]), rows(measured["scaled"]), measured["temperatures"]
                ),
            }
        )


@dataclass
class Comparison:
    """The result of :func:`compare`.

    Attributes:
        summary: what ``compare.json`` holds.
        folder: where it lies.
    """

    summary: dict[str, Any]
    folder: Path

    def table(self) -> str:
        """Markdown."""
        return markdown(comparison_table(self.summary))


def compare(
    model: str | BaseModel,
    examples: Examples,
    config: CompareConfig | None = None,
    *,
    test: Examples | None = None,
    output_dir: str | Path,
    overwrite: bool = False,
    unlabelled: Examples | None = None,
) -> Comparison:
    """Train and evaluate recipes on the same examples.

    With test rows, each seed draws its training and dev rows and is evaluated on the test rows.
    Without, the rows are cross-fitted: each fold is evaluated by models trained on the others, so
    every row is a test row once a seed.

    Args:
        model: what :func:`ia2.models.load.load_base` takes, or a loaded base model.
        examples: labelled rows.
        config: settings.
        test: labelled test rows.
        output_dir: run folder; a killed run started again continues there.
        overwrite: replace another run in that folder.
        unlabelled: rows of the same task without answers (see :func:`ia2.adapt`).

    Raises:
        UserError: a mistake in data, settings or model.
    """
    return prepare(
        model, examples, config or CompareConfig(), test, Path(output_dir), overwrite, unlabelled
    )()


def prepare(
    model: str | BaseModel,
    examples: Examples,
    config: CompareConfig,
    test: Examples | None,
    folder: Path,
    overwrite: bool,
    unlabelled: Examples | None = None,
) -> Callable[[], Comparison]:
    """Refuse what cannot work; returns what does the rest of :func:`compare`, which has the arguments."""
    if test is None and config.max_test:
        raise ConfigError("max_test needs test data; with cross-fitting every row is a test row.")
    if test is not None and config.max_test and config.max_test < len(test):
        logger.info("Evaluating on %d of %d test rows, drawn once.", config.max_test, len(test))
        test = drawn_test(test, config.max_test)
    if more := distinct_from(unlabelled, config.unlabelled, [test]):
        config = config.model_copy(update={"unlabelled": config.unlabelled or more.name})
    every = arms(config)
    rounds = rounds_of(examples, test, config, folder, more)
    if test is None:
        logger.info(
            "No test data: %d-fold cross-fitting over the %d rows given, %d seeds.",
            config.folds,
            len(examples),
            config.seeds,
        )
    base = load_base_of(model, config)
    task = make_task(examples, config, base.tokenizer, config.prompt_template, test)
    data = {
        "data": examples.fingerprint,
        "test": test.fingerprint if test is not None else "",
        **({"unlabelled": more.fingerprint} if more else {}),
        **content_facts(base, config),
    }
    settings = stored_settings(config.model_dump(), base)
    benches = [
        Workbench(base, r.data, task, config.model_copy(update={"seed": r.seed}), r.folder, unused=r.unused)
        for r in rounds
    ]
    # what cannot work is refused before anything is written, or anything of another run deleted
    for bench, current in zip(benches, rounds, strict=True):
        for key, arm in {_adapter_of(arm): arm for arm in every}.items():
            recipes = [other.recipe for other in every if _adapter_of(other) == key]
            _bench_of(bench, arm).check(recipes, current.test)
    for arm in {_adapter_of(arm): arm for arm in every if is_trained(arm.recipe)}.values():
        trial = _bench_of(benches[0], arm)
        try:
            trial.model  # noqa: B018 - an adapter that does not fit is refused when it is put on
        finally:
            trial.close()

    def run() -> Comparison:
        with claimed(folder, "compare", settings, data, overwrite):
            return _run(base, task, config, every, examples, test, rounds, benches, folder)

    return run


def _run(
    base: BaseModel,
    task: Task,
    config: CompareConfig,
    every: Sequence[Arm],
    examples: Examples,
    test: Examples | None,
    rounds: Sequence[Round],
    benches: Sequence[Workbench],
    folder: Path,
) -> Comparison:
    """All rounds, and the summary of them."""
    outcomes: dict[str, dict[int, list[Outcome]]] = {arm.name: {} for arm in every}
    diverged: dict[str, str] = {}
    for number, (bench, current) in enumerate(zip(benches, rounds, strict=True)):
        logger.info(
            "Round %d of %d: seed %d, %d training, %d dev, %d test rows.",
            number + 1,
            len(rounds),
            current.seed,
            len(current.data.train),
            len(current.data.dev),
            len(current.test),
        )
        for name, outcome in _run_round(bench, every, current, diverged).items():
            outcomes[name].setdefault(current.seed, []).append(outcome)
    if len(diverged) == len(every):
        found = "; ".join(f"{name}: {rates}" for name, rates in diverged.items())
        raise ConfigError(
            f"every recipe diverged at every learning rate ({found}). Lower learning_rates; in the same "
            "output folder that needs --overwrite."
        )
    summary = _summary(base, task, config, every, examples, test, rounds, outcomes, diverged)
    if is_first():
        write_json(folder / "compare.json", summary)
        write_text(folder / "table.md", markdown(comparison_table(summary)))
    wait()
    return Comparison(summary, folder)


def _adapter_of(arm: Arm) -> tuple[str, str]:
    """What arms have in common that one workbench does after the other."""
    return arm.variant, digest(arm.config.adapter.model_dump())


def _bench_of(bench: Workbench, arm: Arm) -> Workbench:
    """The round's workbench with the settings of one arm."""
    config = arm.config.model_copy(update={"seed": bench.config.seed})
    return bench.with_config(config, arm.variant)


def _run_round(
    bench: Workbench, every: Sequence[Arm], current: Round, diverged: dict[str, str]
) -> dict[str, Outcome]:
    """All arms on one training set; what an earlier start finished is read, not run.

    Arms that diverge at every rate are added to ``diverged``; those that are there already are left out.
    """
    found: dict[str, Outcome] = {}
    files = {arm.name: current.folder / "evaluations" / f"{arm.name}.json" for arm in every}
    for name, file in files.items():
        if file.is_file():
            found[name] = Outcome.from_dict(read_json(file))
    if len(found) == len(files):
        logger.info("%s: finished before.", current.folder)
        wait()
        return found
    reference: OnlineTargets | None = None
    referred = False
    on: Workbench | None = None  # the workbench whose adapter is on the model
    adapter: tuple[str, str] | None = None
    try:
        # ICL first: the others are compared with what its evaluation gives; then arms of one adapter and
        # objective one after the other, so that an adapter is put on once
        adapters = [_adapter_of(arm) for arm in every]
        for arm in sorted(every, key=lambda arm: (arm.recipe != "icl", adapters.index(_adapter_of(arm)))):
            if arm.name in found or arm.name in diverged:
                continue
            if on is None or adapter != _adapter_of(arm):
                if on is not None:
                    _leave(on)
                on, adapter = _bench_of(bench, arm), _adapter_of(arm)
            try:
                trained = on.train(arm.recipe) if is_trained(arm.recipe) else None
            except DivergedError as error:
                diverged[arm.name] = f"{place_of(current.seed, current.fold)}: {error.rates}"
                continue
            if not referred and arm.recipe != "icl":
                reference, referred = on.teaching.reference(current.test), True
            refer = arm.recipe == "icl" and any(a.recipe != "icl" and a.name not in found for a in every)
            evaluated = on.evaluate(arm.recipe, current.test, reference, refer=refer)
            if refer:
                reference, referred = evaluated.reference, evaluated.reference is not None
            outcome = _outcome(on, arm, current, trained, evaluated)
            if is_first():
                write_json(files[arm.name], outcome.to_dict())
            wait()
            found[arm.name] = Outcome.from_dict(read_json(files[arm.name]))
    finally:
        if on is not None:
            _leave(on)
    return {arm.name: found[arm.name] for arm in every if arm.name in found}


def _leave(bench: Workbench) -> None:
    """Take the adapter off; whole models, which fill a disk in no time, are not kept."""
    bench.close()
    if bench.config.adapter.type != "full" or bench.config.adapter.peft is not None:
        return
    folder = bench.folder / bench.variant
    if is_first() and (stages := list(folder.rglob("stage.json"))):
        logger.info("%s: weights of full fine-tuning are not kept after a comparison.", folder)
        for stage in stages:
            shutil.rmtree(stage.parent)
    wait()


def _outcome(
    bench: Workbench,
    arm: Arm,
    current: Round,
    trained: TrainedRecipe | None,
    evaluated: Evaluated,
) -> Outcome:
    seconds = {"evaluate": evaluated.seconds}
    if trained is not None:
        teacher = bench.teacher_seconds
        seconds = {**({"teacher": teacher} if teacher else {}), **trained.seconds, **seconds}
    similarity: Similarity | None = evaluated.similarity
    if is_first():
        file = current.folder / "evaluations" / f"{arm.name}.predictions.jsonl"
        write_predictions(file, evaluated.predictions)
    return Outcome(
        current.places,
        evaluated.measured,
        None if similarity is None else similarity.asim.mean(1).tolist(),
        None if similarity is None else similarity.to_dict(),
        seconds,
        trained.learning_rate if trained is not None else None,
        trained.beta if trained is not None else None,
        evaluated.tokens_per_query,
        [] if trained is None else [f"{rate} ({stage})" for rate, stage in trained.diverged.items()],
    )


# ----------------------------------------------------------------------------------------- summary


def _summary(
    base: BaseModel,
    task: Task,
    config: CompareConfig,
    every: Sequence[Arm],
    examples: Examples,
    test: Examples | None,
    rounds: Sequence[Round],
    outcomes: dict[str, dict[int, list[Outcome]]],
    diverged: dict[str, str],
) -> dict[str, Any]:
    finished = [arm for arm in every if arm.name not in diverged]
    merged = {
        arm.name: [_merge(folds) for _, folds in sorted(outcomes[arm.name].items())] for arm in finished
    }
    recipes = {}
    for arm in finished:
        by_seed = outcomes[arm.name]
        all_folds = [outcome for folds in by_seed.values() for outcome in folds]
        entry: dict[str, Any] = {
            "recipe": arm.recipe,
            "variant": arm.variant,
            "description": arm.description,
            "answers": arm.answers,
            "metrics": summarise(merged[arm.name]),
            "seconds": _mean_seconds(all_folds),
            "learning_rates": [outcome.learning_rate for outcome in all_folds],
            "betas": [outcome.beta for outcome in all_folds],
            "tokens_per_query": _mean_tokens(all_folds),
            "diverged": list(dict.fromkeys(rate for outcome in all_folds for rate in outcome.diverged)),
        }
        if all(outcome.asim is not None for outcome in all_folds):
            entry["asim"] = _asim_interval(list(by_seed.values()))
            parts = [o.similarity for o in all_folds if o.similarity is not None]
            entry["similarity"] = {
                # null: of a single row there is no variance
                key: np.mean([np.array(p[key], float) for p in parts], axis=0)
                for key in (
                    "l2",
                    "variance_unexplained",
                    "asim_by_layer",
                    "l2_by_layer",
                    "variance_unexplained_by_layer",
                )
            } | {"layers": parts[0]["layers"]}
        recipes[arm.name] = entry
    train, dev = rounds[0].data.train, rounds[0].data.dev
    return {
        "model": base.name,
        "data": {
            "name": examples.name,
            "fingerprint": examples.fingerprint,
            "rows": len(examples),
            "test": None if test is None else {"name": test.name, "fingerprint": test.fingerprint},
        },
        "design": {
            "kind": "test data" if test is not None else f"{config.folds}-fold cross-fitting",
            "num_train": len(train),
            "num_dev": len(dev),
            **counts_unlabelled(rounds[0].data),
            "num_test": len(test) if test is not None else len(examples),
            "seeds": list(range(config.seed, config.seed + config.seeds)),
            "task": task.kind,
            "labels": list(task.labels),
            "advice": [list(each) for each in task.advice],
            "single_token": task.single_token,
            "learning_rates": _rates(every),
            "selected_by": {"dev": "dev loss", "last": None}.get(config.selection, "loss of the folds"),
            "icl_demonstrations": _context_of(config),
        },
        "recipes": recipes,
        "diverged": diverged,
        "differences": _differences(finished, merged),
        "headroom": _headroom(finished, merged),
        "intervals": INTERVALS,
        "config": config.model_dump(exclude={"output_dir"}),
        "config_digest": digest(config.model_dump(exclude={"output_dir"})),
        "machine": machine(),
        "versions": versions(),
    }


def _asim_interval(by_seed: Sequence[Sequence[Outcome]]) -> dict[str, float | None]:
    """Mean similarity to ICL of each seed's queries, over seeds."""
    runs = [[np.concatenate([np.array(outcome.asim) for outcome in folds])] for folds in by_seed]
    return over_draws(np.mean, runs).to_dict()


def _merge(folds: Sequence[Outcome]) -> Measured:
    """The folds of one seed as one evaluation, rows in the data's order."""
    order = np.argsort(np.concatenate([outcome.places for outcome in folds]), kind="stable")

    def join(parts: list[dict[str, RowMeasures]]) -> dict[str, RowMeasures]:
        joined = {}
        for scope in parts[0]:
            rows = RowMeasures.concatenate([part[scope] for part in parts])
            joined[scope] = RowMeasures(*(column[order] for column in rows.arrays()))
        return joined

    scaled = [outcome.measured.scaled for outcome in folds]
    temperatures = [outcome.measured.temperatures for outcome in folds]
    return Measured(
        join([outcome.measured.plain for outcome in folds]),
        join(scaled) if all(scaled) else {},
        {s: float(np.mean([t[s] for t in temperatures])) for s in temperatures[0]},
    )


def _mean_seconds(outcomes: Sequence[Outcome]) -> dict[str, float]:
    names = list(dict.fromkeys(name for outcome in outcomes for name in outcome.seconds))
    return {n: float(np.mean([o.seconds[n] for o in outcomes if n in o.seconds])) for n in names}


def _mean_tokens(outcomes: Sequence[Outcome]) -> float:
    """Over all test rows; folds differ in how many they have."""
    rows = [len(outcome.places) for outcome in outcomes]
    return float(np.average([outcome.tokens_per_query for outcome in outcomes], weights=rows))


def _context_of(config: CompareConfig) -> str:
    """What the teacher and ``icl`` see before each query."""
    if config.context_text or config.context_file:
        return "a text"
    if config.context_column:
        return f"the column {config.context_column}"
    if config.icl_demonstrations == "fresh":
        return "other examples for every query, as many, from rows that nothing else uses"
    return config.context_function or "the same training examples"


def _rates(every: Sequence[Arm]) -> dict[str, list[float]]:
    """Rates tried, or those of the stages, by adapter type."""
    rates: dict[str, set[float]] = {}
    for arm in every:
        if is_trained(arm.recipe):
            own = (stage.settings.learning_rate for stage in plan(arm.recipe, arm.config))
            found = arm.config.learning_rates or [rate for rate in own if rate is not None]
            rates.setdefault(arm.config.adapter.type, set()).update(found)
    return {kind: sorted(found) for kind, found in rates.items()}


DIFFERENCES = ("accuracy", "nll", "brier", "ece")
"""Measures of paired differences, in the main scope."""


def _differences(every: Sequence[Arm], merged: dict[str, list[Measured]]) -> dict[str, Any]:
    """The method less every other arm that can be compared with it, paired by draw and row."""
    result: dict[str, Any] = {}
    for arm in every:
        for other in rivals(arm, every):
            found = _paired_differences(merged[arm.name], merged[other.name])
            if arm.answers != other.answers and None not in (arm.answers, other.answers):
                found["answers"] = [arm.answers, other.answers]
            result[f"{arm.name} − {other.name}"] = found
    return result


def _headroom(every: Sequence[Arm], merged: dict[str, list[Measured]]) -> dict[str, Any]:
    """ICL less each plain fine-tuning: what alignment could carry over."""
    icl = next((arm for arm in every if arm.recipe == "icl"), None)
    rivals = [arm for arm in every if arm.recipe == "sft"] if icl is not None else []
    return {
        f"{icl.name} − {arm.name}": _paired_differences(merged[icl.name], merged[arm.name])
        for arm in rivals
        if icl is not None
    }


def _paired_differences(mine: Sequence[Measured], other: Sequence[Measured]) -> dict[str, Any]:
    scope = main_scope("labels" in mine[0].plain)
    found = {name: _less(mine, other, scope, name) for name in DIFFERENCES}
    if scope == "labels":
        found["accuracy_vocabulary"] = _less(mine, other, "vocabulary", "accuracy")
    return found


def _less(mine: Sequence[Measured], other: Sequence[Measured], scope: str, name: str) -> dict[str, Any]:
    statistic = STATISTICS[name]

    def difference(*columns: np.ndarray, axis: int) -> Any:
        half = len(columns) // 2
        return statistic(*columns[:half], axis=axis) - statistic(*columns[half:], axis=axis)

    runs = [[*a.plain[scope].arrays(), *b.plain[scope].arrays()] for a, b in zip(mine, other, strict=True)]
    return over_draws(difference, runs).to_dict()
