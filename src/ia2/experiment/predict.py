"""Using a trained adapter: evaluate it on labelled rows, predict unlabelled ones."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ia2.adapters.weights import virtual_tokens
from ia2.data.examples import Example, Examples
from ia2.evaluation.evaluate import evaluate_prompts
from ia2.evaluation.metrics import summarise
from ia2.evaluation.scoring import (
    Prediction,
    answer_freely,
    free_predictions,
    label_predictions,
    score_labels,
)
from ia2.experiment.adapt import AdaptResult, load_adapter, run_format
from ia2.experiment.run_folder import load_run
from ia2.models.load import BaseModel
from ia2.models.tokens import Ids
from ia2.prompts.builder import query_prompts
from ia2.prompts.format import PromptFormat
from ia2.utils.files import finite, json_lines
from ia2.utils.imports import uncollected
from ia2.utils.logging import escaped


def evaluate_adapter(
    folder: str | Path,
    data: str,
    *,
    split: str | None = None,
    data_config: str | None = None,
    device: str | None = None,
    base: str | BaseModel | None = None,
    code: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], list[Prediction]]:
    """Metrics of a trained adapter on labelled rows, and its predictions.

    Temperatures are those fitted on the training run's dev rows. ``base`` and ``code``: see
    :func:`ia2.experiment.adapt.load_adapter`.

    Raises:
        UserError: no finished run, another base model than its own, or rows that cannot be read.
    """
    rows = _read(folder, data, split, data_config, code, labelled=True)
    with uncollected():
        result, loaded = load_adapter(folder, device, base=base, code=code)
    result.task.check(result.tokenizer, rows, trained=False)
    prompts = _prompts(result, loaded, rows)
    temperatures = result._facts.get("temperatures") or None
    predictions, measured = evaluate_prompts(
        result.model, result.tokenizer, result.task, rows, prompts, temperatures
    )
    metrics = {
        "recipe": result.config.recipe,
        "adapter": str(folder),
        "data": {"name": rows.name, "fingerprint": rows.fingerprint},
        "test": summarise([measured]),
    }
    return metrics, predictions


def predict_blocks(
    folder: str | Path,
    data: str,
    *,
    split: str | None = None,
    data_config: str | None = None,
    device: str | None = None,
    base: str | BaseModel | None = None,
    code: Mapping[str, Any] | None = None,
) -> tuple[int, Iterator[list[dict[str, Any]]]]:
    """How many rows there are, and what is predicted of them, in blocks of rows.

    Of each row: label, confidence and label distribution; for free text, answer and confidence. All rows are
    checked before the model is loaded. Only a row that is longer than the context window is found when its
    block is reached. ``base`` and ``code``: see :func:`ia2.experiment.adapt.load_adapter`.

    Raises:
        UserError: no finished run, another base model than its own, or rows that cannot be read.
    """
    config, _, _ = load_run(Path(folder), code)
    count, blocks = Examples.blocks(data, split=split, config=data_config, format=run_format(config))
    with uncollected():
        result, loaded = load_adapter(folder, device, base=base, code=code)
    return count, (_predicted(result, loaded, rows) for rows in blocks)


def _predicted(result: AdaptResult, base: BaseModel, rows: Examples) -> list[dict[str, Any]]:
    prompts = _prompts(result, base, rows)
    model, tokenizer, task = result.model, result.tokenizer, result.task
    if task.kind == "classification":
        scores = score_labels(model, tokenizer, task, prompts, description="predicting")
        found = label_predictions(tokenizer, task, rows, scores)
        return [
            {
                "source": p.source,
                "query": p.query,
                "label": p.predicted,
                "confidence": p.confidence,
                "labels": p.details["labels"],
            }
            for p in found
        ]
    answers = answer_freely(model, tokenizer, task, prompts, description="predicting")
    return [
        {
            "source": p.source,
            "query": p.query,
            "label": p.predicted,
            "confidence": p.confidence,
            "answer": p.details["answer"],
        }
        for p in free_predictions(task, rows, answers)
    ]


def prediction_text(rows: Sequence[dict[str, Any]], suffix: str, *, header: bool = True) -> str:
    """Predictions as JSON lines, or as CSV with one column a label.

    In CSV a quote mark is put before a text that a spreadsheet would take for a formula; ``header`` is its
    first line, which only the first block of rows has.
    """
    if suffix == ".jsonl":
        return escaped(json_lines(rows))
    flat = []
    for row in finite(rows):
        plain = {key: value for key, value in row.items() if key != "labels"}
        plain.update({f"p({name})": share for name, share in row.get("labels", {}).items()})
        flat.append({key: _no_formula(value) for key, value in plain.items()})
    text = io.StringIO()
    # texts in quotes: else one with a carriage return would not be
    writer = csv.DictWriter(text, list(flat[0]), lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    if header:
        writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _no_formula(cell: Any) -> Any:
    """A cell that spreadsheets show instead of computing it."""
    if not isinstance(cell, str) or not re.match(r"[=+\-@\t\r\n＝＋－＠]", cell):
        return cell
    number = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", cell, re.ASCII)
    return cell if number else f"'{cell}"


def _read(
    folder: str | Path,
    data: str,
    split: str | None,
    data_config: str | None,
    code: Mapping[str, Any] | None,
    *,
    labelled: bool,
) -> Examples:
    """Rows in the format of the training run; read before the model is loaded, so mistakes are quick."""
    config, _, _ = load_run(Path(folder), code)
    return Examples.load(data, split=split, config=data_config, format=run_format(config), labelled=labelled)


def _prompts(result: AdaptResult, base: BaseModel, rows: Sequence[Example]) -> Sequence[Ids]:
    config = result.config
    prompt_format = PromptFormat(result.tokenizer, config.separator, config.chat, config.thinking)
    reserve, virtual = result.task.reserve, virtual_tokens(result.model)
    return query_prompts(prompt_format, rows, base.max_length, reserve, virtual)
