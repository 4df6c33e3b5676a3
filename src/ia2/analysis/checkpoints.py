"""Checkpoints: trained adapters in run folders, grouped by the training set they were trained on."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ia2.config import AdaptConfig, CompareConfig, TrainConfig
from ia2.config.reading import refuse_code
from ia2.data.examples import Example, Examples, FewShotSplit
from ia2.experiment.methods import arms
from ia2.experiment.rounds import drawn_test, rounds_of
from ia2.experiment.run_folder import (
    check_outputs,
    find_runs,
    not_finished,
    read_run_file,
    say_unchecked,
    settings_of,
)
from ia2.models.identity import differences
from ia2.training.stages import plan, stage_place
from ia2.utils.errors import ConfigError, DataError, RunFolderError, suggest
from ia2.utils.files import digest, read_json, understood
from ia2.utils.logging import logger
from ia2.utils.manifest import RUN_FILE

_Config = TrainConfig | CompareConfig
_Read = tuple[_Config, Examples, "list[TrainingSet]"]


@dataclass(frozen=True)
class Checkpoint:
    """A trained adapter: its name as in comparisons (``ia2-sft@dora``), and the folder of its weights."""

    name: str
    recipe: str
    seed: int
    config: AdaptConfig
    weights: Path


@dataclass(frozen=True)
class TrainingSet:
    """A seed, or a fold of one: its examples, what was trained on them, and the queries.

    Attributes:
        place: its folder.
        seed, fold: of the draw; the fold of a cross-fitted comparison only.
        data: training and dev examples.
        others: labelled rows that are neither training examples nor queries.
        queries: labelled rows to look at.
        places: of the queries in their data, which tells whether training sets share them.
        config: settings of task and contexts.
        checkpoints: in the order of the recipes.
    """

    place: Path
    seed: int
    fold: int | None
    data: FewShotSplit
    others: tuple[Example, ...]
    queries: Examples
    places: tuple[int, ...]
    config: _Config
    checkpoints: tuple[Checkpoint, ...]

    def __str__(self) -> str:
        return f"seed {self.seed}" if self.fold is None else f"seed {self.seed}, fold {self.fold}"

    def other_demonstrations(self) -> Examples | None:
        """As many other labelled rows as there are training examples, or None if there are too few.

        None too where the context is no demonstrations.
        """
        config, train = self.config, self.data.train
        if config.context_text or config.context_file or config.context_column or config.context_function:
            return None
        if len(self.others) < len(train):
            return None
        draw = random.Random(f"other demonstrations {self.seed}")
        return Examples(draw.sample(list(self.others), len(train)), name=train.name)


@dataclass(frozen=True)
class Found:
    """Training sets of one base model and one data set, by seed and fold.

    Settings and labelled rows are those of the first run; they settle the task.
    """

    model: str
    identity: dict[str, Any]
    config: _Config
    examples: Examples
    sets: tuple[TrainingSet, ...]
    queries_of: str


def find_checkpoints(
    folders: Sequence[Path],
    *,
    data: str | None = None,
    split: str | None = None,
    data_config: str | None = None,
    max_queries: int | None = None,
    only: Sequence[str] = (),
    code: Mapping[str, Any] | None = None,
) -> Found:
    """What is to be analysed in these folders, or in one round of a comparison (see :func:`analyze`).

    Without ``data`` the queries are the runs' own test rows, or dev rows where a training run has none.

    Raises:
        RunFolderError: a folder without a finished run, or whose adapters are gone.
        DataError: rows that cannot be read again, or have changed.
        ConfigError: runs on different base models or data, or that name code which ``code`` does not.
    """
    from ia2.experiment.adapt import run_format

    runs = [run for folder in folders for run in find_runs(folder)]
    read = [_read(run, part, code or {}) for run, part in runs]
    identities = [_identity(run) for run, _ in runs]
    config, examples, _ = read[0]
    for (other, _, sets), identity in zip(read[1:], identities[1:], strict=True):
        _check_same((config, identities[0]), (other, identity), sets[0].place)
    sets = _merged([each for _, _, own in read for each in own])
    queries_of = config.test_data or config.data or "the runs' rows"
    if data is not None:
        rows = Examples.load(data, split=split, config=data_config, format=run_format(config), labelled=True)  # type: ignore[arg-type]
        sets = [replace(each, queries=rows, places=tuple(range(len(rows)))) for each in sets]
        queries_of = data
    sets = [_drawn(each, max_queries) for each in _chosen(sets, only)]
    for each in sets:
        known = {row.query for row in each.data.train}
        if inside := sum(row.query in known for row in each.queries):
            logger.warning(
                "%s: %d of the %d queries are training examples: their answers stand in their own context.",
                each.place,
                inside,
                len(each.queries),
            )
    return Found(config.model, identities[0], config, examples, tuple(sets), queries_of)


def _read(run: Path, part: str, code: Mapping[str, Any]) -> _Read:
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


def _of_training(run: Path, facts: dict[str, Any]) -> _Read:
    from ia2.experiment.adapt import load_examples, load_test_examples

    if not (run / "metrics.json").is_file():
        raise RunFolderError(not_finished(run))
    config = settings_of(TrainConfig, run, facts)
    examples = load_examples(config)
    data = examples.split(seed=config.seed, **config.drawn)
    _check_unchanged(run, config.data, data.train, facts["data"]["train"])
    test = load_test_examples(config)
    queries = data.dev if test is None else test
    if not len(queries):
        raise DataError(f"{run}: the run had neither test nor dev rows. Name rows with --data.")
    check_outputs(run)
    metrics = read_json(run / "metrics.json")
    stages = plan(config.recipe, config)
    found = []
    for number in range(1, len(stages)):
        # what the stages before the last one left: whether the last one undid it
        place = stage_place(stages[:number], metrics["learning_rate"], metrics.get("beta"), alone=True)
        if (run / place / "stage.json").is_file():
            name = f"{config.recipe}:{'-'.join(stage.label for stage in stages[:number])}"
            found.append(Checkpoint(name, config.recipe, config.seed, config, run / place))
    found.append(Checkpoint(config.recipe, config.recipe, config.seed, config, run))
    others, places = _others(examples, data, queries), tuple(range(len(queries)))
    made = TrainingSet(run, config.seed, None, data, others, queries, places, config, tuple(found))
    return config, examples, [made]


def _of_comparison(run: Path, facts: dict[str, Any], part: str) -> _Read:
    from ia2.experiment.adapt import load_examples, load_test_examples

    config = settings_of(CompareConfig, run, facts)
    examples = load_examples(config)
    _check_unchanged(run, config.data, examples, facts["data"]["data"])
    test = load_test_examples(config)
    if test is not None and config.max_test and config.max_test < len(test):
        test = drawn_test(test, config.max_test)
    if test is not None:
        _check_unchanged(run, config.test_data, test, facts["data"]["test"])
    summary = read_json(run / "compare.json") if (run / "compare.json").is_file() else {}
    sets = []
    for current in rounds_of(examples, test, config, run):
        place = current.folder.relative_to(run).as_posix()
        if part and not (place == part or place.startswith(f"{part}/")):
            continue
        sets.append(
            TrainingSet(
                current.folder,
                current.seed,
                current.fold,
                current.data,
                _others(examples, current.data, current.test),
                current.test,
                tuple(current.places),
                config.model_copy(update={"seed": current.seed}),
                tuple(_arms_of(current.folder, config, current.seed, summary.get("diverged", {}))),
            )
        )
    return config, examples, sets


def _arms_of(
    folder: Path, config: CompareConfig, seed: int, diverged: Container[str]
) -> Iterator[Checkpoint]:
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
        yield Checkpoint(arm.name, arm.recipe, seed, arm.config.model_copy(update={"seed": seed}), weights)


# ------------------------------------------------------------------------------------------ together


def _merged(sets: Sequence[TrainingSet]) -> list[TrainingSet]:
    """Training runs on the same examples are one set; what has one name twice is told apart by folder."""
    groups: dict[str, TrainingSet] = {}
    for each in sets:
        key = digest([each.data.train.fingerprint, each.data.dev.fingerprint, each.seed, each.fold])
        if (known := groups.get(key)) is None:
            groups[key] = each
            continue
        if known.queries.fingerprint != each.queries.fingerprint:
            raise ConfigError(
                f"{each.place}: trained on the same examples as {known.place}, but with other test rows. "
                "Name the rows to look at with --data."
            )
        taken = Counter(checkpoint.name for checkpoint in known.checkpoints)
        own = [
            replace(c, name=f"{c.name}@{each.place.name}") if taken[c.name] else c for c in each.checkpoints
        ]
        groups[key] = replace(known, checkpoints=(*known.checkpoints, *own))
    found = sorted(groups.values(), key=lambda each: (each.seed, -1 if each.fold is None else each.fold))
    if not any(each.checkpoints for each in found):
        raise RunFolderError(f"{found[0].place}: no trained adapter there.")
    return found


def _chosen(sets: Sequence[TrainingSet], only: Sequence[str]) -> list[TrainingSet]:
    if not only:
        return list(sets)
    known = list(dict.fromkeys(checkpoint.name for each in sets for checkpoint in each.checkpoints))
    for name in only:
        if name not in known:
            there = f" There are {', '.join(known)}."
            raise ConfigError(f"adapters: there is no '{name}'.{suggest(name, known) or there}")
    return [replace(s, checkpoints=tuple(c for c in s.checkpoints if c.name in only)) for s in sets]


def _others(examples: Examples, data: FewShotSplit, queries: Sequence[Example]) -> tuple[Example, ...]:
    """Rows that can be demonstrations instead of the training examples."""
    used = {(row.query, row.answer) for part in (data.train, queries) for row in part}
    return tuple(row for row in examples if (row.query, row.answer) not in used)


def _drawn(each: TrainingSet, count: int | None) -> TrainingSet:
    if count is None or count >= len(each.queries):
        return each
    logger.info("%s: looking at %d of %d queries, drawn once.", each.place, count, len(each.queries))
    where = {id(row): place for row, place in zip(each.queries, each.places, strict=True)}
    rows = drawn_test(each.queries, count)
    return replace(each, queries=rows, places=tuple(where[id(row)] for row in rows))


def _check_unchanged(run: Path, source: str | None, rows: Examples, fingerprint: str) -> None:
    if rows.fingerprint != fingerprint:
        raise DataError(
            f"{source}: the rows have changed since {run} was trained on them. Restore them; without its "
            "demonstrations there is nothing to compare with."
        )


def _identity(run: Path) -> dict[str, Any]:
    facts = read_run_file(run)
    with understood(run):
        return dict(facts["data"]["model"])


def _check_same(first: tuple[_Config, Any], other: tuple[_Config, Any], place: Path) -> None:
    """Settings of the task, and the model: by content, since the same one may lie elsewhere."""
    differing = differences(first[1], other[1])
    for name in ("model", "task", "labels", "chat", "separator", "max_answer_tokens"):
        mine, its = getattr(first[0], name), getattr(other[0], name)
        if differing if name == "model" else mine != its:
            which = f"; these differ: {', '.join(differing)}" if name == "model" else ""
            raise ConfigError(
                f"{place}: {name} is {its!r}, that of the first run is {mine!r}{which}. "
                "Analyse them one by one."
            )
