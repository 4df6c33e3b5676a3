"""The facts of a run of ``ia2 train`` or ``ia2 compare``, finished or running, from its JSON files; no model.

Where the data file is still in its place and unchanged, as fingerprints tell, its rows are drawn again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ia2.adapters.types import default_learning_rate
from ia2.config import AdaptConfig, CompareConfig, TrainConfig
from ia2.config.reading import validate
from ia2.config.recipes import RECIPES
from ia2.data.examples import Examples, FewShotSplit, RowFormat
from ia2.experiment.methods import arms
from ia2.experiment.rounds import draws, place_of, places
from ia2.experiment.run_folder import read_run_file, settings_of
from ia2.training.stages import PlannedStage, plan, stage_place
from ia2.utils.errors import DataError, RunFolderError, UserError
from ia2.utils.files import read_json, read_lines, understood
from ia2.utils.manifest import RUN_FILE
from ia2.utils.user_files import user_path

Rows = list[tuple[str, str]]
"""Prompt and answer of each row."""


@dataclass
class StageFacts:
    """One training stage at one rate (and β) in one round, finished or begun.

    ``place`` is its folder in the run. The rate of its own settings, if any, counts instead of the recipe's
    (``tried``). ``chosen`` is None while no recipe of it has chosen. Losses are (step, loss) as logged.
    """

    recipes: list[str]
    kind: str
    label: str
    place: str
    tried: float
    own_rate: float | None
    chosen: bool | None
    finished: bool
    train: list[tuple[int, float]]
    dev: list[tuple[int, float]]
    diverged: int | None

    @property
    def rate(self) -> float:
        """What it is trained at."""
        return self.tried if self.own_rate is None else self.own_rate

    def at(self, *factors: float) -> str:
        """The option that gives it other rates: ``--learning-rates 0.01``."""
        if self.own_rate is not None:  # one only
            return f"--{self.kind}-learning-rate {self.rate * factors[-1]:g}"
        return f"--learning-rates {' '.join(f'{self.rate * factor:g}' for factor in factors)}"


@dataclass
class AnswerFacts:
    """One recipe's answers in one round, to ``n`` rows of ``test`` or, without such, of ``dev``.

    By scope (``vocabulary``, ``labels``, ``answer``): whether each is right, ``[n]``, and means of metrics.
    ``rows`` are the predictions; ``asim`` is of the first queries, or one number of a training run.
    """

    part: str
    n: int
    correct: dict[str, np.ndarray]
    means: dict[str, dict[str, float]]
    rows: list[dict[str, Any]]
    asim: np.ndarray | None
    rate: float | None
    beta: float | None


@dataclass
class RoundFacts:
    """A training set, of a seed or a fold of one, and what came of it; a training run has exactly one.

    ``answers`` are by recipe, ``teacher`` is the text of its answer to each training row; ``train`` and
    ``dev`` are None where the rows could not be drawn again.
    """

    seed: int
    place: str
    stages: list[StageFacts]
    answers: dict[str, AnswerFacts]
    teacher: list[str]
    train: Rows | None
    dev: Rows | None


@dataclass
class RecipeFacts:
    """A recipe with its settings, ``ia2-sft@dora``, and its entry of ``compare.json``, if that is there.

    ``stages`` are kinds, empty without training; ``candidates`` counts rates times β.
    """

    name: str
    recipe: str
    variant: str
    stages: list[str]
    rates: list[float]
    candidates: int
    summary: Mapping[str, Any]


@dataclass
class Facts:
    """One run, as far as it has come; it has when nothing is ``missing``. None is what is not known (yet).

    ``labels`` are verbatim, with spaces; ``label_tokens`` counts the tokens of each; ``single_token``: each
    answer is one; ``no_rows``: why the training rows could not be drawn again; ``advice``: what the run said
    of labels and prompts when it began, each with its evidence and way out.
    """

    folder: Path
    kind: str
    missing: list[str]
    recipes: list[RecipeFacts]
    rounds: list[RoundFacts]
    labelled: bool | None
    labels: list[str]
    label_tokens: list[int]
    single_token: bool | None
    num_dev: int | None
    differences: Mapping[str, Any]
    no_rows: str | None
    advice: list[tuple[str, str, str]] | None

    def answers(self, name: str) -> list[AnswerFacts]:
        """Of one recipe, in all rounds that have come to it."""
        return [each.answers[name] for each in self.rounds if name in each.answers]


def read_facts(folder: Path, part: str = "") -> Facts:
    """All that a run folder tells.

    Args:
        folder: holds ``ia2_run.json``, or just ``compare.json``.
        part: ``seed-0`` or ``seed-0/fold-1``: only these rounds of a comparison.

    Raises:
        RunFolderError: a file has been damaged, or the folder is of another kind.
    """
    with understood(folder):
        run = read_run_file(folder) if (folder / RUN_FILE).is_file() else None
        if run is None or run.get("kind") == "compare":
            return _comparison(folder, run, part)
        if run.get("kind") == "train":
            return _training(folder, run)
        kind = run.get("kind")
        raise RunFolderError(f"{folder}: a run of another kind ({kind}) than train or compare.")


def _training(folder: Path, run: Mapping[str, Any]) -> Facts:
    config = settings_of(TrainConfig, folder, run)
    metrics = read_json(folder / "metrics.json") if (folder / "metrics.json").is_file() else None
    task = run.get("task") or {}
    planned = plan(config.recipe, config)
    recipe = _recipe(config.recipe, config.recipe, "", planned, config, {})
    split, no_rows = _split(config, run["data"])
    answers = None if metrics is None else _own_answers(folder, metrics)
    chosen = {} if metrics is None else {recipe.name: (metrics["learning_rate"], metrics.get("beta"))}
    only = RoundFacts(
        config.seed,
        "",
        _stages(folder, folder, [(recipe, planned)], chosen, alone=True),
        {} if answers is None else {recipe.name: answers},
        _teacher(folder),
        *_pairs(split),
    )
    missing = []
    if metrics is None:
        done = {stage.kind for stage in only.stages if stage.finished}
        missing = [f"stage {kind}" for kind in recipe.stages if kind not in done]
        missing.append("metrics.json (written last)")
    return Facts(
        folder,
        "train",
        missing,
        [recipe],
        [only],
        _labelled(task.get("kind"), config, [only]),
        list(task.get("labels") or config.labels or ()),
        [len(ids) for ids in task.get("label_ids") or ()],
        task["max_answer_tokens"] == 1 if task else None,
        _num_dev(metrics or {}, only),
        {},
        no_rows,
        _advice(task),
    )


def _own_answers(folder: Path, metrics: Mapping[str, Any]) -> AnswerFacts | None:
    part = next((name for name in ("test", "dev") if name in metrics), None)
    if part is None:
        return None
    file = folder / "predictions.jsonl"
    rows = read_lines(file) if file.is_file() else []
    means = {
        scope: {name: float(found["value"]) for name, found in of.items() if found["value"] is not None}
        for scope, of in metrics[part].items()
        if scope in ("vocabulary", "labels", "answer")
    }
    # the file has what competes alone: a label of the set, or a whole answer
    scope = "labels" if "labels" in means else "answer"
    correct = {scope: np.array([float(bool(row["correct"])) for row in rows])} if rows else {}
    similarity = metrics.get("similarity_to_icl")
    asim = np.array([similarity["asim"]]) if similarity else None
    return AnswerFacts(
        part,
        len(rows) or metrics[part]["n"],
        correct,
        means,
        rows,
        asim,
        metrics["learning_rate"],
        metrics.get("beta"),
    )


def _comparison(folder: Path, run: Mapping[str, Any] | None, part: str) -> Facts:
    file = folder / "compare.json"
    summary: dict[str, Any] = read_json(file) if file.is_file() else {}
    if run is None and not ("recipes" in summary and "design" in summary):
        raise RunFolderError(f"{file}: no results of `ia2 compare`.")
    config = _compare_config(folder, run, summary)
    # a part is judged by its own files: the summary is of the whole run
    entries = {} if part else summary.get("recipes", {})
    planned: list[tuple[RecipeFacts, Sequence[PlannedStage]]] = []
    for arm in [] if config is None else arms(config):
        stages = plan(arm.recipe, arm.config)
        entry = entries.get(arm.name, {})
        planned.append((_recipe(arm.name, arm.recipe, arm.variant, stages, arm.config, entry), stages))
    recipes = [recipe for recipe, _ in planned]
    for name, entry in {} if recipes else entries.items():
        kind, _, variant = name.partition("@")
        kinds = RECIPES[kind].kinds() if kind in RECIPES else ()
        recipes.append(RecipeFacts(name, kind, variant, list(kinds), [], 1, entry))
    rounds: list[RoundFacts] = []
    missing: list[str] = []
    no_rows: str | None = "only compare.json is there"
    if run is not None and config is not None:
        tested = bool(run["data"].get("test"))
        splits, no_rows = _splits(config, run["data"], tested)
        for seed, fold in places(config, tested=tested):
            place = place_of(seed, fold)
            if part and not f"{place}/".startswith(f"{part}/"):
                continue
            where = folder / place
            files = {recipe.name: where / "evaluations" / f"{recipe.name}.json" for recipe in recipes}
            answers = {name: _answers(file) for name, file in files.items() if file.is_file()}
            chosen = {name: (found.rate, found.beta) for name, found in answers.items()}
            stages_of = _stages(folder, where, planned, chosen, alone=False)
            each = RoundFacts(
                seed, place, stages_of, answers, _teacher(where), *_pairs(splits.get((seed, fold)))
            )
            if each.stages or each.answers or each.teacher:
                rounds.append(each)
            done = {*answers, *summary.get("diverged", ())}
            if lacking := [recipe.name for recipe in recipes if recipe.name not in done]:
                missing.append(f"{place}: {', '.join(lacking)}")
        if not summary:
            missing.append("compare.json (written last)")
    design = summary.get("design", {})
    return Facts(
        folder / part if part else folder,
        "compare",
        missing,
        recipes,
        rounds,
        _labelled(design.get("task"), config, rounds),
        list(design.get("labels") or (config and config.labels) or ()),
        [],
        design.get("single_token"),
        _num_dev(design, rounds[0] if rounds else None),
        {} if part else summary.get("differences", {}),
        no_rows,
        _advice(design),
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


def _recipe(
    name: str,
    recipe: str,
    variant: str,
    planned: Sequence[PlannedStage],
    config: AdaptConfig,
    entry: Mapping[str, Any],
) -> RecipeFacts:
    rates = list(config.learning_rates or [default_learning_rate(config.adapter)]) if planned else []
    betas = max((len(stage.betas) for stage in planned), default=1)
    return RecipeFacts(
        name, recipe, variant, [stage.kind for stage in planned], rates, max(1, len(rates)) * betas, entry
    )


def _answers(file: Path) -> AnswerFacts:
    value = read_json(file)
    rows_file = file.with_name(f"{file.stem}.predictions.jsonl")
    columns = {
        scope: {name: np.array(column, float) for name, column in of.items()}
        for scope, of in value["measured"]["plain"].items()
    }
    return AnswerFacts(
        "test",
        len(value["places"]),
        {scope: of["correct"] for scope, of in columns.items()},
        {
            scope: {"accuracy": float(of["correct"].mean()), "nll": float(of["nll"].mean())}
            for scope, of in columns.items()
        },
        read_lines(rows_file) if rows_file.is_file() else [],
        None if value["asim"] is None else np.array(value["asim"]),
        value["learning_rate"],
        value.get("beta"),
    )


# ------------------------------------------------------------------------------------------- stages


def _stages(
    run: Path,
    where: Path,
    planned: Sequence[tuple[RecipeFacts, Sequence[PlannedStage]]],
    chosen: Mapping[str, tuple[float | None, float | None]],
    *,
    alone: bool,
) -> list[StageFacts]:
    """Stages that have begun; one that several recipes share comes once."""
    found: dict[Path, StageFacts] = {}
    for recipe, stages in planned:
        betas: list[float | None] = next((s.betas for s in stages if s.betas != [None]), [None])
        for count, (rate, beta) in product(range(1, len(stages) + 1), product(recipe.rates, betas)):
            folder = where / recipe.variant / stage_place(stages[:count], rate, beta, alone=alone)
            kept = None
            if recipe.name in chosen:
                kept = chosen[recipe.name][0] == rate and chosen[recipe.name][1] in (None, beta)
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
            each.recipes += [recipe.name] if recipe.name not in each.recipes else []
            each.chosen = each.chosen if kept is None else kept or bool(each.chosen)
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


def _teacher(folder: Path) -> list[str]:
    for file in [folder / "teacher" / "train" / "index.json", *folder.glob("teacher/train-*/index.json")]:
        if file.is_file():
            return [answer["text"] for answer in read_json(file)["answers"]]
    return []


# --------------------------------------------------------------------------------------------- rows


def _split(config: TrainConfig, data: Mapping[str, str]) -> tuple[FewShotSplit | None, str | None]:
    """Training and dev rows of a training run; or why they could not be drawn again."""
    try:
        split = _examples(config).split(seed=config.seed, **config.drawn)
        _check_same([split.train.fingerprint, split.dev.fingerprint], [data["train"], data["dev"]], config)
        return split, None
    except UserError as error:
        return None, str(error)


def _splits(
    config: CompareConfig, data: Mapping[str, str], tested: bool
) -> tuple[dict[tuple[int, int | None], FewShotSplit], str | None]:
    """Training and dev rows by seed and fold; or why they could not be drawn again."""
    try:
        examples = _examples(config)
        _check_same([examples.fingerprint], [data["data"]], config)
        return {(each.seed, each.fold): each.data for each in draws(examples, config, tested=tested)}, None
    except UserError as error:
        return {}, str(error)


def _examples(config: TrainConfig | CompareConfig) -> Examples:
    """The rows of the data file, if it is there.

    Raises:
        DataError: it is not.
    """
    if not config.data:
        raise DataError("the rows were given in memory, and no file is named")
    path = user_path(config.data)
    # the hub is not asked: this must work offline, and at once
    if not path.exists():
        raise DataError(f"{path.name} is not there (a relative path counts from where the run was started)")
    format = RowFormat(config.prompt_template, config.completion_template, config.label_map)
    options: dict[str, Any] = {"split": config.split, "config": config.data_config, "format": format}
    try:
        return Examples.load(config.data, labelled=True, **options)
    except UserError as error:
        # reports are passed on: no folders
        raise DataError(str(error).replace(config.data, path.name)) from None


def _check_same(now: Sequence[str], then: Sequence[str], config: TrainConfig | CompareConfig) -> None:
    if list(now) != list(then):
        raise DataError(f"{Path(config.data or '').name} has changed since")


def _pairs(split: FewShotSplit | None) -> tuple[Rows | None, Rows | None]:
    if split is None:
        return None, None
    train, dev = ([(e.query, e.answer or "") for e in part] for part in (split.train, split.dev))
    return train, dev


# ------------------------------------------------------------------------------------- small things


def _advice(recorded: Mapping[str, Any]) -> list[tuple[str, str, str]] | None:
    if "advice" not in recorded:
        return None
    return [(what, evidence, way_out) for what, evidence, way_out in recorded["advice"]]


def _labelled(kind: str | None, config: AdaptConfig | None, rounds: Sequence[RoundFacts]) -> bool | None:
    for known in (kind, config.task if config is not None else None):
        if known in ("classification", "generation"):
            return known == "classification"
    scopes = {scope for each in rounds for answers in each.answers.values() for scope in answers.means}
    if not scopes:
        return True if config is not None and config.labels else None
    return "answer" not in scopes


def _num_dev(known: Mapping[str, Any], first: RoundFacts | None) -> int | None:
    if known:
        return int(known["num_dev"])
    return None if first is None or first.dev is None else len(first.dev)
