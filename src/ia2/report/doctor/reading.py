"""Run folders of ``ia2 train`` and ``ia2 compare``, finished or running, become facts; no model is loaded.

Only JSON is read and, where the data file is still there and unchanged, its rows: they are drawn again, and
the run's fingerprints say whether they are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ia2.adapters.types import default_learning_rate
from ia2.config import AdaptConfig, CompareConfig, TrainConfig
from ia2.config.reading import validate
from ia2.config.recipes import RECIPES
from ia2.data.examples import Examples, FewShotSplit, RowFormat
from ia2.experiment.methods import arms as arms_of
from ia2.experiment.rounds import draws, place_of, places
from ia2.experiment.run_folder import read_run_file, settings_of
from ia2.report.doctor.facts import ArmFacts, Evaluation, Facts, Round, Rows, Stage
from ia2.training.stages import PlannedStage, plan, stage_place
from ia2.utils.errors import RunFolderError, UserError
from ia2.utils.files import read_json, read_lines, understood
from ia2.utils.manifest import RUN_FILE
from ia2.utils.user_files import user_path


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
        if run.get("kind") != "train":
            raise RunFolderError(
                f"{folder}: a run of another kind ({run.get('kind')}) than train or compare."
            )
        return _training(folder, run)


# ---------------------------------------------------------------------------------------- ia2 train


def _training(folder: Path, run: Mapping[str, Any]) -> Facts:
    config = settings_of(TrainConfig, folder, run)
    metrics = read_json(folder / "metrics.json") if (folder / "metrics.json").is_file() else None
    task = run.get("task") or {}
    planned = plan(config.recipe, config)
    rates = tuple(config.learning_rates or [default_learning_rate(config.adapter)])
    arm = ArmFacts(config.recipe, config.recipe, "", tuple(s.kind for s in planned), config, rates, {})
    split, no_rows = _split_of(config, run["data"])
    chosen = {} if metrics is None else {arm.name: (metrics["learning_rate"], metrics.get("beta"))}
    stages = _stages(folder, folder, [(arm, planned)], chosen, single=True)
    evaluation = None if metrics is None else _own_evaluation(folder, metrics)
    only = Round(
        config.seed,
        None,
        "",
        stages,
        {} if evaluation is None else {arm.name: evaluation},
        _teacher(folder),
        *_pairs(split),
    )
    missing = [] if metrics is not None else _to_come(arm, stages, "")
    if metrics is None:
        missing.append("metrics.json (written last)")
    label_ids = task.get("label_ids") or ()
    return Facts(
        folder,
        "train",
        metrics is not None,
        tuple(missing),
        config,
        _labelled(task.get("kind"), config, only),
        tuple(task.get("labels") or config.labels or ()),
        tuple(len(ids) for ids in label_ids),
        None if not task else task["max_answer_tokens"] == 1,
        _num_dev(metrics, only),
        (arm,),
        (only,),
        {},
        no_rows,
        _advice(task),
    )


def _own_evaluation(folder: Path, metrics: Mapping[str, Any]) -> Evaluation | None:
    part = next((name for name in ("test", "dev") if name in metrics), None)
    if part is None:
        return None
    file = folder / "predictions.jsonl"
    rows = read_lines(file) if file.is_file() else []
    scopes = {s: v for s, v in metrics[part].items() if s in ("vocabulary", "labels", "answer")}
    means = {
        s: {name: float(found["value"]) for name, found in v.items() if found["value"] is not None}
        for s, v in scopes.items()
    }
    # the file has what competes alone: a label of the set, or a whole answer
    scope = "labels" if "labels" in scopes else "answer"
    similarity = metrics.get("similarity_to_icl")
    return Evaluation(
        part,
        tuple(range(len(rows) or metrics[part]["n"])),
        {scope: np.array([float(bool(row["correct"])) for row in rows])} if rows else {},
        means,
        **_texts(rows),
        mean_asim=similarity and similarity["asim"],
        rate=metrics["learning_rate"],
        beta=metrics.get("beta"),
    )


# -------------------------------------------------------------------------------------- ia2 compare


def _comparison(folder: Path, run: Mapping[str, Any] | None, part: str) -> Facts:
    file = folder / "compare.json"
    summary: dict[str, Any] = read_json(file) if file.is_file() else {}
    if run is None and not ("recipes" in summary and "design" in summary):
        raise RunFolderError(f"{file}: no results of `ia2 compare`.")
    config = _compare_config(folder, run, summary)
    # a part is judged by its own files: the summary is of the whole run
    entries = {} if part else summary.get("recipes", {})
    pairs = [] if config is None else [(a, plan(a.recipe, a.config)) for a in arms_of(config)]
    every = tuple(
        ArmFacts(
            a.name,
            a.recipe,
            a.variant,
            tuple(stage.kind for stage in stages),
            a.config,
            tuple(a.config.learning_rates or [default_learning_rate(a.config.adapter)]) if stages else (),
            entries.get(a.name, {}),
        )
        for a, stages in pairs
    ) or tuple(_summed_up(name, entry) for name, entry in entries.items())
    rounds: list[Round] = []
    missing: list[str] = []
    no_rows: str | None = "only compare.json is there"
    if run is not None and config is not None:
        planned = [(arm, stages) for arm, (_, stages) in zip(every, pairs, strict=True)]
        splits, no_rows = _splits_of(config, run["data"])
        for seed, fold in places(config, tested=bool(run["data"].get("test"))):
            place = place_of(seed, fold)
            if part and not (place == part or place.startswith(f"{part}/")):
                continue
            current = _round(folder, seed, fold, place, planned, splits.get((seed, fold)))
            if current.stages or current.evaluations or current.teacher:
                rounds.append(current)
            done = {*current.evaluations, *summary.get("diverged", ())}
            lacking = [arm.name for arm in every if arm.name not in done]
            if lacking:
                missing.append(f"{place}: {', '.join(lacking)}")
        if not summary:
            missing.append("compare.json (written last)")
    design = summary.get("design", {})
    first = rounds[0] if rounds else None
    labels = tuple(design.get("labels") or (config.labels if config is not None else None) or ())
    return Facts(
        folder / part if part else folder,
        "compare",
        not missing,
        tuple(missing),
        config,
        _labelled(design.get("task"), config, *rounds),
        labels,
        (),
        design.get("single_token"),
        _num_dev(design or None, first),
        every,
        tuple(rounds),
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


def _summed_up(name: str, entry: Mapping[str, Any]) -> ArmFacts:
    recipe, _, variant = name.partition("@")
    stages = RECIPES[recipe].kinds() if recipe in RECIPES else ()
    return ArmFacts(name, recipe, variant, stages, None, (), entry)


def _round(
    folder: Path,
    seed: int,
    fold: int | None,
    place: str,
    planned: Sequence[tuple[ArmFacts, Sequence[PlannedStage]]],
    split: FewShotSplit | None,
) -> Round:
    where = folder / place
    found = {}
    for arm, _ in planned:
        file = where / "evaluations" / f"{arm.name}.json"
        if file.is_file():
            found[arm.name] = _outcome(file)
    chosen = {name: (e.rate, e.beta) for name, e in found.items()}
    stages = _stages(folder, where, planned, chosen)
    return Round(seed, fold, place, stages, found, _teacher(where), *_pairs(split))


def _outcome(file: Path) -> Evaluation:
    value = read_json(file)
    rows_file = file.with_name(f"{file.stem}.predictions.jsonl")
    rows = read_lines(rows_file) if rows_file.is_file() else []
    plain = value["measured"]["plain"]
    columns = {s: {name: np.array(v, float) for name, v in rows.items()} for s, rows in plain.items()}
    means = {
        s: {"accuracy": float(v["correct"].mean()), "nll": float(v["nll"].mean())} for s, v in columns.items()
    }
    asim = value["asim"]
    return Evaluation(
        "test",
        tuple(value["places"]),
        {s: v["correct"] for s, v in columns.items()},
        means,
        **_texts(rows),
        asim=None if asim is None else np.array(asim),
        mean_asim=None if asim is None else float(np.mean(asim)),
        rate=value["learning_rate"],
        beta=value.get("beta"),
    )


# ------------------------------------------------------------------------------------------- stages


def _stages(
    run: Path,
    where: Path,
    planned: Sequence[tuple[ArmFacts, Sequence[PlannedStage]]],
    chosen: Mapping[str, tuple[float | None, float | None]],
    single: bool = False,
) -> tuple[Stage, ...]:
    """Stages that have begun; one that several recipes share comes once."""
    found: dict[Path, Stage] = {}
    for arm, stages in planned:
        betas: list[float | None] = next((s.betas for s in stages if s.betas != [None]), [None])
        for place, stage in enumerate(stages):
            chain = stages[: place + 1]
            for rate, beta in product(arm.rates, betas):
                folder = where / arm.variant / stage_place(chain, rate, beta, alone=single)
                mine = chosen.get(arm.name)
                kept = None if mine is None else mine[0] == rate and mine[1] in (None, beta)
                if (known := found.get(folder)) is not None:
                    kept = known.chosen if kept is None else kept or bool(known.chosen)
                    found[folder] = replace(
                        known, arms=tuple(dict.fromkeys((*known.arms, arm.name))), chosen=kept
                    )
                elif (read := _stage(run, folder, stage, arm, rate, beta, kept)) is not None:
                    found[folder] = read
    return tuple(found.values())


def _stage(
    run: Path,
    folder: Path,
    stage: PlannedStage,
    arm: ArmFacts,
    rate: float,
    beta: float | None,
    chosen: bool | None,
) -> Stage | None:
    if (folder / "stage.json").is_file():
        known = read_json(folder / "stage.json")
        history, finished = known["history"], True
    else:
        # begun: `.lr-0.001.KEY` with checkpoints, of which only complete ones count
        begun = list(folder.parent.glob(f".{folder.name}.*"))
        if not begun:
            return None
        states = [path.parent for path in begun[0].glob("checkpoint-*/complete.json")]
        last = max(states, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)
        known = {}
        history = [] if last is None else read_json(last / "trainer_state.json")["log_history"]
        finished = False
    return Stage(
        (arm.name,),
        stage.kind,
        stage.label,
        folder.relative_to(run).as_posix(),
        rate,
        beta,
        chosen,
        finished,
        _losses(history, "loss"),
        _losses(history, "eval_loss"),
        known.get("diverged_step"),
        stage.settings.learning_rate,
    )


def _losses(history: Sequence[Mapping[str, Any]], name: str) -> tuple[tuple[int, float], ...]:
    # None: NaN, as other tools write it
    pairs = [(int(entry["step"]), entry[name]) for entry in history if name in entry]
    return tuple((step, float("nan") if loss is None else float(loss)) for step, loss in pairs)


def _to_come(arm: ArmFacts, stages: Sequence[Stage], place: str) -> list[str]:
    done = {stage.kind for stage in stages if stage.finished}
    return [f"stage {kind}{place}" for kind in arm.stages if kind not in done]


# --------------------------------------------------------------------------------------------- rows


def _split_of(config: TrainConfig, data: Mapping[str, str]) -> tuple[FewShotSplit | None, str | None]:
    """The training and dev rows, if the file still has them; otherwise why not."""
    examples, reason = _examples(config)
    if examples is None:
        return None, reason
    try:
        split = examples.split(seed=config.seed, **config.drawn)
    except UserError as error:
        return None, str(error)
    if (split.train.fingerprint, split.dev.fingerprint) != (data["train"], data["dev"]):
        return None, f"{Path(config.data or '').name} has changed since"
    return split, None


def _splits_of(
    config: CompareConfig, data: Mapping[str, str]
) -> tuple[dict[tuple[int, int | None], FewShotSplit], str | None]:
    examples, reason = _examples(config)
    if examples is None:
        return {}, reason
    if examples.fingerprint != data["data"]:
        return {}, f"{Path(config.data or '').name} has changed since"
    try:
        every = draws(examples, config, tested=bool(data.get("test")))
        return {(draw.seed, draw.fold): draw.data for draw in every}, None
    except UserError as error:
        return {}, str(error)


def _examples(config: TrainConfig | CompareConfig) -> tuple[Examples | None, str | None]:
    if not config.data:
        return None, "the rows were given in memory, and no file is named"
    path = user_path(config.data)
    # the hub is not asked: this must work offline, and at once
    if not path.exists():
        return None, f"{path.name} is not there (a relative path counts from where the run was started)"
    format = RowFormat(config.prompt_template, config.completion_template, config.label_map)
    options: dict[str, Any] = {"split": config.split, "config": config.data_config, "format": format}
    try:
        return Examples.load(config.data, labelled=True, **options), None
    except UserError as error:
        return None, str(error).replace(config.data, path.name)  # reports are passed on: no folders


def _pairs(split: FewShotSplit | None) -> tuple[Rows | None, Rows | None]:
    if split is None:
        return None, None
    train, dev = (tuple((e.query, e.answer or "") for e in part) for part in (split.train, split.dev))
    return train, dev


# ------------------------------------------------------------------------------------- small things


def _teacher(folder: Path) -> tuple[str, ...]:
    for file in [folder / "teacher" / "train" / "index.json", *folder.glob("teacher/train-*/index.json")]:
        if file.is_file():
            return tuple(answer["text"] for answer in read_json(file)["answers"])
    return ()


def _advice(recorded: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...] | None:
    if "advice" not in recorded:
        return None
    return tuple((what, evidence, way_out) for what, evidence, way_out in recorded["advice"])


def _texts(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    texts = {
        name: tuple(str(row[key]) for row in rows) for name, key in (("queries", "query"), ("gold", "gold"))
    }
    return {**texts, "label_names": tuple(rows[0].get("labels", ())) if rows else ()}


def _labelled(kind: str | None, config: AdaptConfig | None, *rounds: Round) -> bool | None:
    for given in (kind, config.task if config is not None else None):
        if given in ("classification", "generation"):
            return given == "classification"
    scopes = {scope for r in rounds for e in r.evaluations.values() for scope in e.means}
    if not scopes:
        return True if config is not None and config.labels else None
    return "answer" not in scopes


def _num_dev(known: Mapping[str, Any] | None, first: Round | None) -> int | None:
    if known is not None:
        return int(known["num_dev"])
    return None if first is None or first.dev is None else len(first.dev)
