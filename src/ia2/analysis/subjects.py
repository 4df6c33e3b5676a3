"""Trained adapters in run folders, grouped by what they were trained on: whom an analysis looks at.

A *trial* is one training set (a seed, or a fold of one) with the adapters of all recipes that were trained
on it, and the queries that they are looked at on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ia2.analysis.reading import find_runs
from ia2.arms import arms
from ia2.config import AdaptConfig, CompareConfig, TrainConfig
from ia2.config_reading import refuse_code
from ia2.console import logger
from ia2.errors import ConfigError, DataError, RunFolderError, suggest
from ia2.examples import Example, Examples, FewShotSplit
from ia2.files import digest, read_json, understood
from ia2.identity import differences
from ia2.manifest import RUN_FILE
from ia2.rounds import drawn_test, rounds_of
from ia2.runs import check_outputs, not_finished, read_run_file, say_unchecked, settings_of
from ia2.stages import plan, stage_place


@dataclass(frozen=True)
class Subject:
    """A trained adapter.

    Attributes:
        name: of its recipe and what it differs in, as comparisons have it: ``ia2-sft@dora``.
        recipe: its recipe.
        seed: of the training examples and the first weights.
        config: settings of its adapter.
        weights: folder of its weights.
    """

    name: str
    recipe: str
    seed: int
    config: AdaptConfig
    weights: Path


@dataclass(frozen=True)
class Trial:
    """One training set, what was trained on it, and the queries.

    Attributes:
        place: its folder.
        seed: of the draw.
        fold: of a cross-fitted comparison.
        data: training and dev examples.
        others: labelled rows that are neither training examples nor queries.
        queries: labelled rows to look at.
        places: of the queries in their data, which tells whether trials share them.
        config: settings of task and contexts.
        subjects: in the order of the recipes.
    """

    place: Path
    seed: int
    fold: int | None
    data: FewShotSplit
    others: tuple[Example, ...]
    queries: Examples
    places: tuple[int, ...]
    config: AdaptConfig
    subjects: tuple[Subject, ...]


@dataclass(frozen=True)
class Study:
    """Trials on one base model and one data set.

    Attributes:
        model: as the runs name it.
        identity: what it is.
        config: settings of the first run: model, data, task.
        examples: all labelled rows that the first run was given; they settle the task.
        trials: by seed and fold.
        queries_of: where the queries come from.
    """

    model: str
    identity: dict[str, Any]
    config: TrainConfig | CompareConfig
    examples: Examples
    trials: tuple[Trial, ...]
    queries_of: str

    @property
    def names(self) -> list[str]:
        """Of all subjects, each once, in order."""
        return list(dict.fromkeys(subject.name for trial in self.trials for subject in trial.subjects))


def find_study(
    folders: Sequence[Path],
    *,
    data: str | None = None,
    split: str | None = None,
    data_config: str | None = None,
    max_queries: int | None = None,
    only: Sequence[str] = (),
    code: Mapping[str, Any] | None = None,
) -> Study:
    """What is to be analysed in these folders.

    Args:
        folders: of finished runs of ``ia2 train`` or ``ia2 compare``, or of one round in the latter.
        data: labelled rows to look at; None takes the runs' own test rows (or dev rows, where a training
            run has none).
        split: of ``data``, where it is a hub data set or a folder.
        data_config: configuration of ``data``, where it is one of these.
        max_queries: at most so many rows of each trial, drawn once.
        only: names of the adapters to look at; empty for all.
        code: what the runs may name (see :func:`ia2.config_reading.refuse_code`).

    Raises:
        RunFolderError: a folder without a finished run, or whose adapters are gone.
        DataError: rows that cannot be read again, or have changed.
        ConfigError: runs on different base models or data, or that name code which ``code`` does not.
    """
    from ia2.adaptation import run_format

    runs = [run for folder in folders for run in find_runs(folder)]
    found = [_trials_of(run, part, code or {}) for run, part in runs]
    identities = [_identity(run) for run, _ in runs]
    config, examples, _ = found[0]
    for (folder_config, _, trials), identity in zip(found[1:], identities[1:], strict=True):
        _check_same(config, folder_config, trials[0].place)
        _check_same_model((config.model, identities[0]), (folder_config.model, identity), trials[0].place)
    trials = _merged([trial for _, _, own in found for trial in own])
    queries_of = config.test_data or config.data or "the runs' rows"
    if data is not None:
        rows = Examples.load(data, split=split, config=data_config, format=run_format(config), labelled=True)  # type: ignore[arg-type]
        places = tuple(range(len(rows)))
        trials = [replace(trial, queries=rows, places=places) for trial in trials]
        queries_of = data
    trials = [_drawn(trial, max_queries) for trial in _chosen(trials, only)]
    for trial in trials:
        _check_queries(trial)
    return Study(config.model, identities[0], config, examples, tuple(trials), queries_of)


def _trials_of(
    run: Path, part: str, code: Mapping[str, Any]
) -> tuple[TrainConfig | CompareConfig, Examples, list[Trial]]:
    if not (run / RUN_FILE).is_file():
        raise RunFolderError(f"{run}: only results are there, no adapters ({RUN_FILE} is missing).")
    facts = read_run_file(run)
    with understood(run):
        say_unchecked(run)
        refuse_code(facts.get("config", {}), run / RUN_FILE, code)
        if facts.get("kind") == "train":
            return _of_training(run, facts)
        if facts.get("kind") == "compare":
            return _of_comparison(run, facts, part)
    raise RunFolderError(f"{run}: a run of another kind ({facts.get('kind')}) than train or compare.")


# ---------------------------------------------------------------------------------------- ia2 train


def _of_training(run: Path, facts: dict[str, Any]) -> tuple[TrainConfig, Examples, list[Trial]]:
    from ia2.adaptation import load_examples, load_test_examples

    if not (run / "metrics.json").is_file():
        raise RunFolderError(not_finished(run))
    config = settings_of(TrainConfig, run, facts)
    examples = load_examples(config)
    data = examples.split(seed=config.seed, **config.drawn)
    known = facts["data"]
    _check_unchanged(run, config.data, data.train, known["train"])
    test = load_test_examples(config)
    queries = data.dev if test is None else test
    if not len(queries):
        raise DataError(f"{run}: the run had neither test nor dev rows. Name rows with --data.")
    check_outputs(run)
    metrics = read_json(run / "metrics.json")
    subjects = [Subject(config.recipe, config.recipe, config.seed, config, run)]
    stages = plan(config.recipe, config)
    for number in range(1, len(stages)):
        # what the stages before the last one left: whether the last one undid it
        chain = [stage.label for stage in stages[:number]]
        place = stage_place(stages[:number], metrics["learning_rate"], metrics.get("beta"), alone=True)
        folder = run / place
        if (folder / "stage.json").is_file():
            name = f"{config.recipe}:{'-'.join(chain)}"
            subjects.insert(number - 1, Subject(name, config.recipe, config.seed, config, folder))
    places = tuple(range(len(queries)))
    trial = Trial(
        run,
        config.seed,
        None,
        data,
        tuple(_others(examples, data, queries)),
        queries,
        places,
        config,
        tuple(subjects),
    )
    return config, examples, [trial]


# -------------------------------------------------------------------------------------- ia2 compare


def _of_comparison(
    run: Path, facts: dict[str, Any], part: str
) -> tuple[CompareConfig, Examples, list[Trial]]:
    from ia2.adaptation import load_examples, load_test_examples

    config = settings_of(CompareConfig, run, facts)
    examples = load_examples(config)
    _check_unchanged(run, config.data, examples, facts["data"]["data"])
    test = load_test_examples(config)
    if test is not None and config.max_test and config.max_test < len(test):
        test = drawn_test(test, config.max_test)
    if test is not None:
        _check_unchanged(run, config.test_data, test, facts["data"]["test"])
    summary = read_json(run / "compare.json") if (run / "compare.json").is_file() else {}
    diverged = summary.get("diverged", {})
    trials = []
    for current in rounds_of(examples, test, config, run):
        place = current.folder.relative_to(run).as_posix()
        if part and not (place == part or place.startswith(f"{part}/")):
            continue
        subjects = tuple(_arms_of(current.folder, config, current.seed, diverged))
        others = tuple(_others(examples, current.data, current.test))
        settings = config.model_copy(update={"seed": current.seed})
        trials.append(
            Trial(
                current.folder,
                current.seed,
                current.fold,
                current.data,
                others,
                current.test,
                tuple(current.places),
                settings,
                subjects,
            )
        )
    return config, examples, trials


def _arms_of(folder: Path, config: CompareConfig, seed: int, diverged: Container[str]) -> Iterator[Subject]:
    for arm in arms(config):
        stages = plan(arm.recipe, arm.config) if arm.recipe not in ("base", "icl") else []
        if not stages:
            continue
        file = folder / "evaluations" / f"{arm.name}.json"
        if not file.is_file():
            if arm.name in diverged:
                logger.warning("%s: %s diverged there; it is left out.", folder, arm.name)
                continue
            raise RunFolderError(
                f"{folder}: {arm.name} has not been evaluated yet; start the same comparison again to go on."
            )
        outcome = read_json(file)
        place = stage_place(stages, outcome["learning_rate"], outcome.get("beta"), alone=False)
        weights = folder / arm.variant / place
        if not (weights / "stage.json").is_file():
            # a comparison does not keep fully fine-tuned models
            logger.warning("%s: %s has no weights there; it is left out.", folder, arm.name)
            continue
        settings = arm.config.model_copy(update={"seed": seed})
        yield Subject(arm.name, arm.recipe, seed, settings, weights)


# ------------------------------------------------------------------------------------------ together


def _merged(trials: Sequence[Trial]) -> list[Trial]:
    """Training runs on the same examples are one trial; what has one name twice is told apart by folder."""
    groups: dict[str, Trial] = {}
    for trial in trials:
        key = digest([trial.data.train.fingerprint, trial.data.dev.fingerprint, trial.seed, trial.fold])
        if (known := groups.get(key)) is None:
            groups[key] = trial
            continue
        if known.queries.fingerprint != trial.queries.fingerprint:
            raise ConfigError(
                f"{trial.place}: trained on the same examples as {known.place}, but with other test rows. "
                "Name the rows to look at with --data."
            )
        taken = Counter(subject.name for subject in known.subjects)
        own = [
            replace(s, name=f"{s.name}@{trial.place.name}") if taken[s.name] else s for s in trial.subjects
        ]
        groups[key] = replace(known, subjects=(*known.subjects, *own))
    found = sorted(groups.values(), key=lambda trial: (trial.seed, -1 if trial.fold is None else trial.fold))
    if not any(trial.subjects for trial in found):
        raise RunFolderError(f"{found[0].place}: no trained adapter there.")
    return found


def _chosen(trials: Sequence[Trial], only: Sequence[str]) -> list[Trial]:
    if not only:
        return list(trials)
    known = list(dict.fromkeys(subject.name for trial in trials for subject in trial.subjects))
    for name in only:
        if name not in known:
            there = f" There are {', '.join(known)}."
            raise ConfigError(f"adapters: there is no '{name}'.{suggest(name, known) or there}")
    return [replace(t, subjects=tuple(s for s in t.subjects if s.name in only)) for t in trials]


def _others(examples: Examples, data: FewShotSplit, queries: Sequence[Example]) -> Iterator[Example]:
    """Rows that can be demonstrations instead of the training examples."""
    used = {(row.query, row.answer) for part in (data.train, queries) for row in part}
    return (row for row in examples if (row.query, row.answer) not in used)


def _drawn(trial: Trial, count: int | None) -> Trial:
    if count is None or count >= len(trial.queries):
        return trial
    logger.info("%s: looking at %d of %d queries, drawn once.", trial.place, count, len(trial.queries))
    where = {id(row): place for row, place in zip(trial.queries, trial.places, strict=True)}
    rows = drawn_test(trial.queries, count)
    return replace(trial, queries=rows, places=tuple(where[id(row)] for row in rows))


def _check_queries(trial: Trial) -> None:
    known = {row.query for row in trial.data.train}
    if inside := sum(row.query in known for row in trial.queries):
        logger.warning(
            "%s: %d of the %d queries are training examples: their answers stand in their own context.",
            trial.place,
            inside,
            len(trial.queries),
        )


def _check_unchanged(run: Path, source: str | None, rows: Examples, fingerprint: str) -> None:
    if rows.fingerprint != fingerprint:
        raise DataError(
            f"{source}: the rows have changed since {run} was trained on them. Restore them; without its "
            "demonstrations there is nothing to compare with."
        )


def _check_same(first: TrainConfig | CompareConfig, other: TrainConfig | CompareConfig, place: Path) -> None:
    for name in ("task", "labels", "chat", "separator", "max_answer_tokens"):
        mine, its = getattr(first, name), getattr(other, name)
        if mine != its:
            raise ConfigError(
                f"{place}: {name} is {its!r}, that of the first run is {mine!r}. Analyse them one by one."
            )


def _identity(run: Path) -> dict[str, Any]:
    facts = read_run_file(run)
    with understood(run):
        return dict(facts["data"]["model"])


_Model = tuple[str, dict[str, Any]]


def _check_same_model(first: _Model, other: _Model, place: Path) -> None:
    """By content: the same model may lie elsewhere."""
    if differing := differences(first[1], other[1]):
        raise ConfigError(
            f"{place}: model is {other[0]!r}, that of the first run is {first[0]!r}; these differ: "
            f"{', '.join(differing)}. Analyse them one by one."
        )
