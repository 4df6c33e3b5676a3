"""``adapt``: from labelled examples to an adapter, in one call, resumable stage by stage."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia2.adapters.types import peft_config
from ia2.adapters.weights import attach, load_adapter_state, read_adapter_state, save_adapter
from ia2.config import AdaptConfig, CompareConfig, TrainConfig
from ia2.config.recipes import AUTO, METHOD, TRAINED, UNLABELLED, is_trained
from ia2.data.examples import Examples, FewShotSplit, RowFormat
from ia2.data.unlabelled import counts_unlabelled, distinct_from, unlabelled_facts, with_unlabelled
from ia2.evaluation.metrics import summarise
from ia2.evaluation.scoring import Prediction, write_predictions
from ia2.experiment.card import model_card
from ia2.experiment.run_folder import (
    REMADE,
    add_facts,
    check_outputs,
    choice_of,
    claimed,
    content_facts,
    load_run,
    machine,
    refuse_another,
    stored_settings,
    task_facts,
)
from ia2.experiment.workbench import Workbench
from ia2.models.load import BaseModel, load_base
from ia2.prompts.own_context import ContextFunction
from ia2.prompts.task import Task, make_task
from ia2.training.stages import TrainedRecipe, fitted, plan
from ia2.utils.distributed import is_first, several, wait
from ia2.utils.errors import ConfigError, DataError, ModelError, RunFolderError
from ia2.utils.files import atomic_files, digest, finite, read_json, write_json, write_text
from ia2.utils.logging import logger
from ia2.utils.manifest import RUN_FILE, begin

if TYPE_CHECKING:
    from peft import PeftModel

    from ia2.adapters.full_finetuning import FullModel


@dataclass
class AdaptResult:
    """An adapter and what is known about it.

    Attributes:
        model: the model with the trained adapter (or, fully fine-tuned, a wrapper of it), in evaluation mode.
        tokenizer: the base model's.
        config: the settings used.
        task: what counts as an answer.
        metrics: see ``metrics.json`` in the documentation.
        predictions: of the test rows, if there were any.
        folder: where the run lies.
    """

    model: PeftModel | FullModel
    tokenizer: Any
    config: AdaptConfig
    task: Task
    metrics: dict[str, Any]
    predictions: list[Prediction] = field(default_factory=list)
    folder: Path | None = None
    _facts: dict[str, Any] = field(default_factory=dict, repr=False)

    def save(self, folder: str | Path) -> Path:
        """Write adapter, tokenizer, model card, settings and metrics to ``folder``.

        Raises:
            RunFolderError: it holds something else.
        """
        folder = Path(folder)
        with claimed(folder, "train", self._facts["config"], self._facts["data"]):
            write_outputs(folder, self)
        return folder


def adapt(
    model: str | BaseModel,
    examples: Examples | FewShotSplit,
    config: AdaptConfig | None = None,
    *,
    test: Examples | None = None,
    output_dir: str | Path | None = None,
    overwrite: bool = False,
    context: ContextFunction | None = None,
    unlabelled: Examples | None = None,
) -> AdaptResult:
    """Train an adapter on labelled examples with one recipe.

    Args:
        model: what :func:`ia2.models.load.load_base` takes, or a loaded base model.
        examples: all labelled rows (split as ``config`` says), or a split of your own.
        config: settings; the defaults align and then fine-tune a LoRA.
        test: labelled rows to evaluate on. Without them the metrics are those of the dev rows, which
            also chose the weights and are therefore optimistic.
        output_dir: run folder. A killed run started again with the same arguments continues there.
        overwrite: replace another run in that folder.
        context: makes the context of an example from it and the other training examples: a text, chat
            messages, or a list of examples. Demonstrations by default.
        unlabelled: rows of the same task, read with ``labelled=False``, to align on; they may be the rows
            that ``examples`` are drawn from, of which those that are drawn are left out.

    Returns:
        The trained model with its metrics.

    Raises:
        UserError: a mistake in data, settings or model; nothing is left half-written.
    """
    config = config or AdaptConfig()
    if config.recipe != AUTO and not is_trained(config.recipe):
        known = ", ".join([AUTO, *TRAINED, *config.schedules])
        raise ConfigError(f"recipe '{config.recipe}' trains nothing. Choose one of {known}, or use compare.")
    if isinstance(examples, FewShotSplit):
        data = examples
    else:
        data = examples.split(seed=config.seed, **config.drawn)
    every = examples if isinstance(examples, Examples) else _joined(data)
    if more := distinct_from(unlabelled, config.unlabelled, [data.train, data.dev, test]):
        data = with_unlabelled(data, more, config.max_unlabelled, config.seed)
        config = config.model_copy(update={"unlabelled": config.unlabelled or more.name})
    # stages that lack their rows, and rows that no stage learns from, are refused before the model is loaded
    if config.recipe != AUTO and not _uses_unlabelled(config) and len(data.unlabelled):
        raise ConfigError(
            f"recipe '{config.recipe}' learns nothing from unlabelled rows. Leave out --unlabelled, or "
            "choose a recipe such as ia2-sft."
        )
    base = load_base_of(model, config)
    content = {
        "train": data.train.fingerprint,
        "dev": data.dev.fingerprint,
        "test": test.fingerprint if test is not None else "",
        **unlabelled_facts(data),
        **content_facts(base, config),
    }
    choice = None
    if config.recipe == AUTO:
        folder = None if output_dir is None else Path(output_dir)
        choice = _choice(base, _joined(data), config, content, folder, overwrite, context)
        config = config.model_copy(update={"recipe": choice["recipe"]})
        if len(data.unlabelled) and not _uses_unlabelled(config):
            logger.info("The unlabelled rows are not used: %s learns nothing from them.", config.recipe)
            data = FewShotSplit(data.train, data.dev)
    config = fitted(config.recipe, config)
    facts = {"config": _settings(base, config), "data": content}
    template = getattr(config, "prompt_template", None)
    task = make_task(every, config, base.tokenizer, template, test)
    rows = test if test is not None else data.dev
    logger.info("Examples: %d to train on, %d dev rows.", len(data.train), len(data.dev))
    if len(data.unlabelled):
        logger.info(
            "Unlabelled rows: %d to train on, %d held out.", len(data.unlabelled), len(data.unlabelled_dev)
        )
    if not len(data.dev) and config.selection == "dev":
        logger.warning("No dev rows: no early stopping, no choice of learning rate, no temperature scaling.")
    with ExitStack() as stack:
        if output_dir is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ia2-")))
            begin(folder)
        else:
            folder = Path(output_dir)
        bench = Workbench(base, data, task, config, folder, one_recipe=True, function=context)
        try:
            # what cannot work is refused before anything is written, or anything of another run deleted
            bench.check([config.recipe], rows)
            bench.model  # noqa: B018 - put on here, where an adapter that does not fit is refused
            if output_dir is not None:
                stack.enter_context(claimed(folder, "train", facts["config"], facts["data"], overwrite))
                if choice is not None and is_first():
                    add_facts(folder, choice=choice)
            return _run(bench, test, facts, choice, keep=output_dir is not None)
        except BaseException:
            bench.close()
            raise


def _uses_unlabelled(config: AdaptConfig) -> bool:
    return any(UNLABELLED in stage.rows for stage in plan(config.recipe, config))


def _choice(
    base: BaseModel,
    examples: Examples,
    config: AdaptConfig,
    content: dict[str, str],
    folder: Path | None,
    overwrite: bool,
    context: ContextFunction | None,
) -> dict[str, Any]:
    """The recipe that ``auto`` stands for, and why; as the run in the folder chose, if it is the same run."""
    settings = _settings(base, config)
    asked = digest([settings, content])
    if folder is not None:
        if (known := choice_of(folder, asked)) is not None:
            return known
        refuse_another(folder, "train", {**settings, "recipe": METHOD}, content, overwrite)
    if several():
        recipe, reason = METHOD, "Several processes do not probe; `ia2 probe` does, in one."
    else:
        from ia2.experiment.probe import choose_recipe

        logger.info("Recipe auto: probing whether in-context learning helps; --recipe %s skips that.", METHOD)
        recipe, reason = choose_recipe(base, examples, config, context)
    logger.info("Recipe: %s. %s", recipe, reason)
    return {"asked": asked, "recipe": recipe, "reason": reason}


def _run(
    bench: Workbench,
    test: Examples | None,
    facts: dict[str, Any],
    choice: dict[str, Any] | None,
    *,
    keep: bool,
) -> AdaptResult:
    base, data, task, config, folder = bench.base, bench.data, bench.task, bench.config, bench.folder
    trained = bench.train(config.recipe)
    result = AdaptResult(
        bench.model, base.tokenizer, config, task, {}, folder=folder if keep else None, _facts=facts
    )
    if keep and (folder / "metrics.json").is_file():
        try:
            check_outputs(folder)
            result.metrics = read_json(folder / "metrics.json")
        except RunFolderError as error:
            logger.warning("%s", error)
        else:
            logger.info("%s is complete; nothing was trained again.", folder)
            wait()
            return result
    rows = test if test is not None else data.dev
    result.metrics = _metrics(bench, trained, base)
    if choice is not None:
        result.metrics["chosen_because"] = choice["reason"]
    if len(rows):
        reference = bench.teaching.reference(rows)
        evaluated = bench.evaluate(config.recipe, rows, reference)
        part = "test" if test is not None else "dev"
        result.predictions = evaluated.predictions
        result.metrics[part] = summarise([evaluated.measured])
        result.metrics["temperatures"] = evaluated.measured.temperatures
        if evaluated.similarity is not None:
            result.metrics["similarity_to_icl"] = evaluated.similarity.to_dict()
        if test is None:
            result.metrics["note"] = "dev rows also chose the weights, so these figures are optimistic"
    if keep and is_first():
        write_outputs(folder, result)
    wait()
    return result


def _metrics(bench: Workbench, trained: TrainedRecipe, base: BaseModel) -> dict[str, Any]:
    teacher = {"teacher": bench.teacher_seconds} if bench.teacher_seconds else {}
    return {
        "recipe": trained.recipe,
        "model": base.name,
        "learning_rate": trained.learning_rate,
        "selected_by": trained.selected_by,
        "dev_loss_by_learning_rate": finite(trained.tried),
        "diverged": trained.diverged,
        "beta": trained.beta,
        "seconds": {**teacher, **trained.seconds},
        "steps": {stage.name: stage.steps for stage in trained.stages},
        "num_train": len(bench.data.train),
        "num_dev": len(bench.data.dev),
        **counts_unlabelled(bench.data),
        "machine": machine(),
    }


def write_outputs(folder: Path, result: AdaptResult) -> None:
    """The files that other tools load; ``metrics.json`` last, since it marks the run as complete."""
    add_facts(folder, task=task_facts(result.task), temperatures=result.metrics.get("temperatures", {}))
    with atomic_files(folder) as temporary:
        save_adapter(result.model, temporary)
        result.tokenizer.save_pretrained(temporary)
        if result.predictions:
            write_predictions(temporary / "predictions.jsonl", result.predictions)
        write_text(temporary / "README.md", model_card(result.metrics, result._facts, result.task))
    write_json(folder / "metrics.json", result.metrics)


def load_base_of(model: str | BaseModel, config: AdaptConfig) -> BaseModel:
    """The base model that a configuration names, unless it is loaded already."""
    if isinstance(model, BaseModel):
        return model
    options = {
        name: getattr(config, name)
        for name in ("dtype", "device", "revision", "trust_remote_code", "quantization")
        if hasattr(config, name)
    }
    return load_base(model, **options)


def load_base_of_run(
    folder: Path,
    config: TrainConfig | CompareConfig,
    identity: Mapping[str, Any],
    base: str | BaseModel | None = None,
) -> BaseModel:
    """The base model that a run was made with, in the type that it had then.

    Args:
        folder: the run's, for messages.
        config: its settings.
        identity: what its base model is.
        base: where it lies now, or the loaded model; by default where it lay.

    Raises:
        ModelError: it is not there any more, or what is there is another model; says what differs.
    """
    if "dtype" in identity:
        # `auto` may be another type here than where the run was made
        held = {name: identity.get(name) for name in ("dtype", "quantization")}
        config = config.model_copy(update=held)
    if base is not None:
        config = config.model_copy(update={"revision": None})
    try:
        loaded = load_base_of(config.model if base is None else base, config)
    except ModelError as error:
        if base is not None:
            raise
        raise ModelError(f"{folder}: its base model: {error} Say with --model where it lies now.") from error
    if differing := loaded.differs_from(identity):
        known = "" if loaded.source == config.model else f", {config.model}"
        raise ModelError(
            f"{loaded.source} is not the base model that {folder} was trained on{known}; these differ: "
            f"{', '.join(differing)}. Say with --model where that one lies now."
        )
    return loaded


def row_format(config: TrainConfig) -> RowFormat:
    """How rows become examples, from the data options."""
    return RowFormat(config.prompt_template, config.completion_template, config.label_map)


def run_format(config: TrainConfig) -> RowFormat:
    """The same of a finished run: its columns are named, since no option can change them any more."""
    format = row_format(config)
    return replace(
        format,
        prompt_template=format.prompt_template or "{prompt}",
        completion_template=format.completion_template or "{completion}",
    )


def load_examples(config: Any) -> Examples:
    """The rows of ``config.data``.

    Raises:
        DataError: no data were named, or they cannot be read.
    """
    if not config.data:
        raise DataError("no data given. Name a file, folder or hub data set with --data.")
    return Examples.load(
        config.data,
        split=config.split,
        config=config.data_config,
        format=row_format(config),
        labelled=True,
    )


def load_both(config: Any) -> tuple[Examples, Examples | None]:
    """The rows of ``config.data`` and of ``config.test_data``; what is wrong with either is told at once.

    Raises:
        UserError: no data were named, or rows cannot be read.
    """
    try:
        rows = load_examples(config)
    except DataError as error:
        try:
            load_test_examples(config)
        except DataError as other:
            raise DataError(f"{str(error).rstrip('.')}; and {other}") from None
        raise
    return rows, load_test_examples(config)


def load_unlabelled(config: Any) -> Examples | None:
    """The rows of ``config.unlabelled``, or None if none were named; their labels are not read.

    Raises:
        DataError: they cannot be read.
    """
    if not config.unlabelled:
        return None
    format = row_format(config)
    rows = Examples.load(
        config.unlabelled,
        split=config.unlabelled_split,
        config=config.data_config if config.unlabelled == config.data else None,
        format=format,
        labelled=False,
    )
    columns = format.completion.columns
    if all(rows[0].fields.get(column) is not None for column in columns):
        logger.info("%s: labels (%s) are not read.", rows.name, ", ".join(columns))
    return rows


def load_test_examples(config: Any) -> Examples | None:
    """The rows of ``config.test_data``, or None if none were named."""
    if not config.test_data:
        return None
    return Examples.load(
        config.test_data,
        split=config.test_split,
        config=config.data_config if config.test_data == config.data else None,
        format=row_format(config),
        labelled=True,
    )


def load_adapter(
    folder: str | Path,
    device: str | None = None,
    *,
    base: str | BaseModel | None = None,
    code: Mapping[str, Any] | None = None,
) -> tuple[AdaptResult, BaseModel]:
    """A finished run's model, ready to use.

    Args:
        folder: of the run.
        device: instead of the run's own.
        base: where the base model lies now, or the loaded model; by default where it lay.
        code: ``trust_remote_code`` and ``parser``, where the run was trained with them and they are trusted:
            a folder is data, and runs no code by itself.

    Raises:
        DataError: the folder holds no finished run.
        ConfigError: it names code that ``code`` does not.
        ModelError: its base model cannot be loaded, or is another one than the adapter was trained on.
    """
    folder = Path(folder)
    config, task, facts = load_run(folder, code)
    if device is not None:
        config = config.model_copy(update={"device": device})
    state = read_adapter_state(folder, REMADE)
    loaded = load_base_of_run(folder, config, facts["data"]["model"], base)
    rows = int(loaded.model.get_input_embeddings().weight.shape[0])  # type: ignore[union-attr, index, arg-type]
    if any(token >= rows for ids in task.label_ids for token in ids):
        raise RunFolderError(
            f"{folder / RUN_FILE}: names tokens that {loaded.source} does not have. {REMADE}"
        )
    model = attach(loaded.model, peft_config(loaded.model, config.adapter), config.seed)
    load_adapter_state(model, state)
    metrics = read_json(folder / "metrics.json", REMADE)
    return AdaptResult(model, loaded.tokenizer, config, task, metrics, folder=folder, _facts=facts), loaded


def _settings(base: BaseModel, config: AdaptConfig) -> dict[str, Any]:
    """All settings as a flat YAML-able mapping, of a TrainConfig whatever was given."""
    values = config.model_dump()
    known = TrainConfig.model_fields
    settings = {**TrainConfig().model_dump(), **{k: v for k, v in values.items() if k in known}}
    return stored_settings(settings, base)


def _joined(data: FewShotSplit) -> Examples:
    return Examples([*data.train, *data.dev], name=data.train.name)
