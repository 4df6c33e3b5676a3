"""The facts of a run of ``ia2 train`` or ``ia2 compare``, finished or running, from its JSON files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ia2.adapters.types import default_learning_rate
from ia2.config import AdaptConfig, CompareConfig, TrainConfig
from ia2.config.reading import validate
from ia2.config.recipes import RECIPES
from ia2.data.examples import Examples, FewShotSplit, RowFormat
from ia2.experiment.methods import Arm, arms
from ia2.experiment.rounds import draws, place_of, places
from ia2.experiment.run_folder import read_run_file, settings_of
from ia2.report.doctor.facts import AnswerFacts, Facts, RecipeFacts, RoundFacts, StageFacts
from ia2.training.stages import PlannedStage, plan, stage_place
from ia2.utils.errors import RunFolderError, UserError
from ia2.utils.files import read_json, read_lines, understood
from ia2.utils.manifest import RUN_FILE
from ia2.utils.user_files import user_path


def read_facts(folder: Path, part: str = "") -> Facts:
    """All that a run folder tells; of a ``part`` such as ``seed-0/fold-1``, what these rounds of it tell.

    Raises:
        RunFolderError: a file has been damaged, or the folder is of another kind.
    """
    with understood(folder):
        run = read_run_file(folder) if (folder / RUN_FILE).is_file() else None
        kind = "compare" if run is None else run.get("kind")
        if kind not in _RESULTS:
            raise RunFolderError(f"{folder}: a run of another kind ({kind}) than train or compare.")
        file = folder / _RESULTS[kind]
        summary: dict[str, Any] = read_json(file) if file.is_file() else {}
        if run is None and not ("recipes" in summary and "design" in summary):
            raise RunFolderError(f"{file}: no results of `ia2 compare`.")
        return _facts(folder, part, kind, run, summary)


_RESULTS = {"train": "metrics.json", "compare": "compare.json"}


def _facts(
    folder: Path, part: str, kind: str, run: Mapping[str, Any] | None, summary: dict[str, Any]
) -> Facts:
    design = dict(summary.get("design", {}))
    # a part is judged by its own files: the summary is of the whole run
    entries = {} if part else summary.get("recipes", {})
    config: TrainConfig | CompareConfig | None
    if kind == "train":
        assert run is not None
        config = settings_of(TrainConfig, folder, run)
        compared = [Arm(config.recipe, config.recipe, "", config)]
        design = dict(run.get("task") or {})
        if design:
            design |= {"task": design["kind"], "single_token": design["max_answer_tokens"] == 1}
    else:
        config = _compare_config(folder, run, summary)
        compared = [] if config is None else arms(config)
    planned = [(arm, plan(arm.recipe, arm.config)) for arm in compared]
    recipes = [_recipe(arm, stages, entries.get(arm.name, {})) for arm, stages in planned]
    for name, entry in {} if recipes else entries.items():
        recipe, _, variant = name.partition("@")
        kinds = RECIPES[recipe].kinds() if recipe in RECIPES else ()
        recipes.append(RecipeFacts(name, recipe, variant, list(kinds), [], 1, entry))
    rounds: list[RoundFacts] = []
    missing: list[str] = []
    no_rows: str | None = "only compare.json is there"
    if run is not None and config is not None:
        splits, no_rows = _splits(config, run["data"])
        for (seed, fold), place in _places(config, bool(run["data"].get("test"))).items():
            if part and not f"{place}/".startswith(f"{part}/"):
                continue
            answers = _answers(folder / place, compared, summary if kind == "train" else None)
            stages = _stages(folder, place, planned, answers)
            split = splits.get((seed, fold))
            parts = () if split is None else (split.train, split.dev)
            train, dev = [[(e.query, e.answer or "") for e in rows] for rows in parts] or (None, None)
            each = RoundFacts(seed, place, stages, answers, _teacher(folder / place), train, dev)
            if kind == "train" or stages or answers or each.teacher:
                rounds.append(each)
            if kind == "train":
                done = {stage.kind for stage in stages if stage.finished}
                missing += [] if summary else [f"stage {k}" for k in recipes[0].stages if k not in done]
            else:
                done = {*answers, *summary.get("diverged", ())}
                lacking = [arm.name for arm in compared if arm.name not in done]
                missing += [f"{place}: {', '.join(lacking)}"] if lacking else []
        missing += [] if summary else [f"{_RESULTS[kind]} (written last)"]
    num_dev = summary.get("num_dev", design.get("num_dev"))
    if num_dev is None and rounds and rounds[0].dev is not None:
        num_dev = len(rounds[0].dev)
    return Facts(
        folder / part if part else folder,
        kind,
        missing,
        recipes,
        rounds,
        _labelled(design.get("task"), config, rounds),
        list(design.get("labels") or (config and config.labels) or ()),
        [len(ids) for ids in design.get("label_ids") or ()],
        design.get("single_token"),
        num_dev,
        {} if part else summary.get("differences", {}),
        no_rows,
        [tuple(each) for each in design["advice"]] if "advice" in design else None,
    )


def _compare_config(
    folder: Path, run: Mapping[str, Any] | None, summary: Mapping[str, Any]
) -> CompareConfig | None:
    if run is not None:
        return settings_of(CompareConfig, folder, run)
    try:
        return validate(CompareConfig, dict(summary["config"]), str(folder))
    except (UserError, KeyError):
        return None  # results outlive the settings that another version had


def _recipe(arm: Arm, planned: Sequence[PlannedStage], entry: Mapping[str, Any]) -> RecipeFacts:
    rates = _rates(arm, planned)
    candidates = max(1, len(rates)) * max((len(stage.betas) for stage in planned), default=1)
    kinds = [stage.kind for stage in planned]
    return RecipeFacts(arm.name, arm.recipe, arm.variant, kinds, rates, candidates, entry)


def _rates(arm: Arm, planned: Sequence[PlannedStage]) -> list[float]:
    if not planned:
        return []
    usual = planned[-1].settings.learning_rate or default_learning_rate(arm.config.adapter)
    return list(arm.config.learning_rates or [usual])


def _places(config: TrainConfig | CompareConfig, tested: bool) -> dict[tuple[int, int | None], str]:
    if isinstance(config, TrainConfig):
        return {(config.seed, None): ""}
    return {each: place_of(*each) for each in places(config, tested=tested)}


def _labelled(kind: str | None, config: AdaptConfig | None, rounds: Sequence[RoundFacts]) -> bool | None:
    for known in (kind, config.task if config is not None else None):
        if known in ("classification", "generation"):
            return known == "classification"
    scopes = {answers.scope for each in rounds for answers in each.answers.values()}
    if not scopes:
        return True if config is not None and config.labels else None
    return "answer" not in scopes


def _answers(folder: Path, compared: Sequence[Arm], metrics: dict[str, Any] | None) -> dict[str, AnswerFacts]:
    """By recipe: those of a round of a comparison or, given its metrics, of a training run."""
    if metrics is None:
        files = [folder / "evaluations" / f"{arm.name}.json" for arm in compared]
        return {file.stem: _compared_answers(file) for file in files if file.is_file()}
    part = next((name for name in ("test", "dev") if name in metrics), None)
    if part is None:
        return {}
    rows = _read_lines(folder / "predictions.jsonl")
    scope = "labels" if "labels" in metrics[part] else "answer"
    similarity = metrics.get("similarity_to_icl")
    only = AnswerFacts(
        part,
        len(rows) or metrics[part]["n"],
        scope,
        metrics[part][scope]["accuracy"]["value"],
        np.array([float(bool(row["correct"])) for row in rows]) if rows else None,
        rows,
        np.array([similarity["asim"]]) if similarity else None,
        metrics["learning_rate"],
        metrics.get("beta"),
    )
    return {compared[0].name: only}


def _compared_answers(file: Path) -> AnswerFacts:
    value = read_json(file)
    plain = value["measured"]["plain"]
    scope = "labels" if "labels" in plain else "answer"
    correct = np.array(plain[scope]["correct"], float)
    return AnswerFacts(
        "test",
        len(correct),
        scope,
        float(correct.mean()),
        correct,
        _read_lines(file.with_name(f"{file.stem}.predictions.jsonl")),
        None if value["asim"] is None else np.array(value["asim"]),
        value["learning_rate"],
        value.get("beta"),
    )


def _read_lines(file: Path) -> list[dict[str, Any]]:
    return read_lines(file) if file.is_file() else []


def _teacher(folder: Path) -> list[str]:
    for file in [folder / "teacher" / "train" / "index.json", *folder.glob("teacher/train-*/index.json")]:
        if file.is_file():
            return [answer["text"] for answer in read_json(file)["answers"]]
    return []


def _stages(
    run: Path,
    place: str,
    planned: Sequence[tuple[Arm, Sequence[PlannedStage]]],
    answers: Mapping[str, AnswerFacts],
) -> list[StageFacts]:
    """Stages that have begun; one that several recipes share comes once."""
    found: dict[Path, StageFacts] = {}
    for arm, stages in planned:
        betas: list[float | None] = next((s.betas for s in stages if s.betas != [None]), [None])
        for count, (rate, beta) in product(range(1, len(stages) + 1), product(_rates(arm, stages), betas)):
            # a training run has one recipe, whose stages are simply named
            folder = run / place / arm.variant / stage_place(stages[:count], rate, beta, alone=not place)
            if folder not in found:
                result = _stage_result(folder)
                if result is None:
                    continue
                stage = stages[count - 1]
                found[folder] = StageFacts(
                    [],
                    stage.kind,
                    stage.label,
                    folder.relative_to(run).as_posix(),
                    rate,
                    stage.settings.learning_rate,
                    None,
                    "stage" in result,
                    _losses(result["history"], "loss"),
                    _losses(result["history"], "eval_loss"),
                    result.get("diverged_step"),
                )
            each = found[folder]
            each.recipes += [arm.name] if arm.name not in each.recipes else []
            if (mine := answers.get(arm.name)) is not None:
                each.chosen = bool(each.chosen) or (mine.rate == rate and mine.beta in (None, beta))
    return list(found.values())


def _stage_result(folder: Path) -> dict[str, Any] | None:
    """``stage.json``; of a stage that is being trained, its history alone; None of one that has not begun."""
    if (folder / "stage.json").is_file():
        found: dict[str, Any] = read_json(folder / "stage.json")
        return found
    # begun: `.lr-0.001.KEY` with checkpoints, of which only complete ones count
    begun = list(folder.parent.glob(f".{folder.name}.*"))
    if not begun:
        return None
    states = [path.parent for path in begun[0].glob("checkpoint-*/complete.json")]
    last = max(states, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)
    return {"history": [] if last is None else read_json(last / "trainer_state.json")["log_history"]}


def _losses(history: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    # None: NaN, as other tools write it
    pairs = [(int(entry["step"]), entry[name]) for entry in history if name in entry]
    return [(step, float("nan") if loss is None else float(loss)) for step, loss in pairs]


def _splits(
    config: TrainConfig | CompareConfig, data: Mapping[str, str]
) -> tuple[dict[tuple[int, int | None], FewShotSplit], str | None]:
    """Training and dev rows by seed and fold, drawn again from the data file; or why they cannot be."""
    if not config.data:
        return {}, "the rows were given in memory, and no file is named"
    path = user_path(config.data)
    # the hub is not asked: this must work offline, and at once
    if not path.exists():
        return {}, f"{path.name} is not there (a relative path counts from where the run was started)"
    format = RowFormat(config.prompt_template, config.completion_template, config.label_map)
    options: dict[str, Any] = {"split": config.split, "config": config.data_config, "format": format}
    try:
        examples = Examples.load(config.data, labelled=True, **options)
        if isinstance(config, TrainConfig):
            split = examples.split(seed=config.seed, **config.drawn)
            if (split.train.fingerprint, split.dev.fingerprint) == (data["train"], data["dev"]):
                return {(config.seed, None): split}, None
        elif examples.fingerprint == data["data"]:
            drawn = draws(examples, config, tested=bool(data.get("test")))
            return {(each.seed, each.fold): each.data for each in drawn}, None
    except UserError as error:
        return {}, str(error).replace(config.data, path.name)  # reports are passed on: no folders
    return {}, f"{path.name} has changed since"
