"""A finished adapter on new rows; the command line's side of it is in ``test_cli``."""

from __future__ import annotations

import csv
import io
import json
import logging
import shutil
from pathlib import Path

import pytest
from helpers.adapting import predict_rows
from helpers.benches import icl_base
from helpers.command_line import write_rows
from tiny_icl.tasks import sample_task

from ia2.config import TrainConfig
from ia2.data.examples import Examples, RowFormat
from ia2.experiment.adapt import AdaptResult, adapt, load_adapter
from ia2.experiment.predict import evaluate_adapter, predict_blocks, prediction_text
from ia2.utils.errors import DataError

TASK = sample_task(0, num_classes=3)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory, tiny_icl_model_path: Path) -> AdaptResult:
    """An adapter for labels, trained from a template with raw labels that are numbers."""
    folder = tmp_path_factory.mktemp("labelled")
    format = RowFormat("{text}", " {label}", {str(i): a.strip() for i, a in enumerate(TASK.answers)})
    rows = [{"text": q, "label": TASK.answers.index(a)} for q, a in TASK.examples(12, 0)]
    config = TrainConfig(
        model=str(tiny_icl_model_path),
        prompt_template=format.prompt_template,
        completion_template=format.completion_template,
        label_map=dict(format.label_map or {}),
        recipe="sft",
        sft={"epochs": 2},
        selection="dev",
    )
    examples = Examples.from_rows(rows, format=format)
    return adapt(str(tiny_icl_model_path), examples, config, output_dir=folder / "out")


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory, tiny_icl_model_path: Path) -> Path:
    """An adapter for free text."""
    folder = tmp_path_factory.mktemp("free")
    rows = [{"prompt": q, "completion": f"{a} {a}"} for q, a in TASK.examples(9, 0)]
    config = TrainConfig(
        recipe="ia2-sft",
        task="generation",
        max_answer_tokens=6,
        align={"epochs": 1},
        sft={"epochs": 1},
        selection="dev",
    )
    adapt(str(tiny_icl_model_path), Examples.from_rows(rows), config, output_dir=folder / "out")
    return folder / "out"


def test_raw_labels_come_back_as_they_were(labelled: AdaptResult, tmp_path: Path) -> None:
    assert labelled.folder is not None
    rows = write_rows(tmp_path / "new.jsonl", [{"text": q} for q, _ in TASK.examples(4, 5)])
    found = predict_rows(labelled.folder, str(rows))
    assert {type(row["label"]) for row in found} == {int}
    for row in found:
        assert list(row["labels"]) == [str(name) for name in labelled.task.names]
        assert sum(row["labels"].values()) == pytest.approx(1)
        assert row["labels"][str(row["label"])] == row["confidence"]


def test_evaluation_uses_the_temperatures_of_the_run(labelled: AdaptResult, tmp_path: Path) -> None:
    assert labelled.folder is not None
    rows = [{"text": q, "label": TASK.answers.index(a)} for q, a in TASK.examples(6, 5)]
    file = write_rows(tmp_path / "test.jsonl", rows)
    metrics, predictions = evaluate_adapter(labelled.folder, str(file))
    assert metrics["recipe"] == "sft"
    assert metrics["test"]["n"] == len(predictions) == 6
    temperatures = json.loads((labelled.folder / "metrics.json").read_text())["temperatures"]
    for scope in ("vocabulary", "labels"):
        assert metrics["test"]["scaled"][scope]["temperature"] == temperatures[scope]
    assert [p.gold for p in predictions] == [row["label"] for row in rows]


def test_a_split_of_a_folder(labelled: AdaptResult, tmp_path: Path) -> None:
    assert labelled.folder is not None
    for split, count in (("train", 3), ("test", 2)):
        write_rows(tmp_path / f"{split}.jsonl", [{"text": q} for q, _ in TASK.examples(count, 5)])
    assert len(predict_rows(labelled.folder, str(tmp_path), split="test")) == 2


def test_the_loaded_adapter_is_the_trained_one(labelled: AdaptResult) -> None:
    assert labelled.folder is not None
    loaded, base = load_adapter(labelled.folder, "cpu")
    trained = {n: p for n, p in labelled.model.named_parameters() if "lora" in n}
    assert trained
    for name, parameter in loaded.model.named_parameters():
        if "lora" in name:
            assert (parameter == trained[name]).all()
    assert loaded.task == labelled.task
    assert base.tokenizer is loaded.tokenizer


def test_a_copy_of_the_folder_works_too(labelled: AdaptResult, tmp_path: Path) -> None:
    assert labelled.folder is not None
    shutil.copytree(labelled.folder, tmp_path / "moved")
    rows = write_rows(tmp_path / "new.jsonl", [{"text": q} for q, _ in TASK.examples(2, 5)])
    assert predict_rows(tmp_path / "moved", str(rows)) == predict_rows(labelled.folder, str(rows))


def test_free_text(free: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "new.jsonl", [{"prompt": q} for q, _ in TASK.examples(3, 5)])
    found = predict_rows(free, str(rows))
    for row in found:
        assert set(row) == {"source", "query", "label", "confidence", "answer"}
        assert row["label"] == (" ".join(row["answer"].split()) or None)
        assert 0 <= row["confidence"] <= 1
    test = write_rows(tmp_path / "test.jsonl", [(q, f"{a} {a}") for q, a in TASK.examples(3, 5)])
    metrics, _ = evaluate_adapter(free, str(test))
    assert set(metrics["test"]) == {"n", "runs", "vocabulary", "answer", "scaled"}


def test_rows_are_answered_in_blocks(labelled: AdaptResult, tmp_path: Path) -> None:
    assert labelled.folder is not None
    rows = write_rows(tmp_path / "new.jsonl", [{"text": q} for q, _ in TASK.examples(1030, 5)])
    count, blocks = predict_blocks(labelled.folder, str(rows))
    first = next(blocks)
    assert (count, len(first), first[0]["source"]) == (1030, 1024, "new.jsonl:1")
    rest = [row for block in blocks for row in block]
    assert [row["source"] for row in rest] == [f"new.jsonl:{n}" for n in range(1025, 1031)]
    whole = prediction_text(first + rest, ".csv")
    assert whole == prediction_text(first, ".csv") + prediction_text(rest, ".csv", header=False)


def test_rows_are_read_before_the_model(
    labelled: AdaptResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ia2.experiment.predict.load_adapter", lambda *_: pytest.fail("the model was loaded"))
    rows = write_rows(tmp_path / "new.jsonl", [{"txt": "a0"}])
    assert labelled.folder is not None
    with pytest.raises(DataError, match="Did you mean 'txt'"):
        predict_rows(labelled.folder, str(rows))


def test_predictions_as_text() -> None:
    rows = [
        {
            "source": "s:1",
            "query": 'a, "b"\nc',
            "label": "x",
            "confidence": 0.5,
            "labels": {"x": 0.5, "y": 0.5},
        },
        {"source": "s:2", "query": "é", "label": "y", "confidence": 0.75, "labels": {"x": 0.25, "y": 0.75}},
    ]
    lines = prediction_text(rows, ".jsonl").splitlines()
    assert [json.loads(line) for line in lines] == rows
    table = list(csv.DictReader(io.StringIO(prediction_text(rows, ".csv"))))
    assert [row["query"] for row in table] == ['a, "b"\nc', "é"]
    assert [row["p(y)"] for row in table] == ["0.5", "0.75"]


def test_a_model_in_memory_is_given_back_when_a_row_is_refused(
    tiny_icl_model_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = icl_base(tiny_icl_model_path)
    before = [name for name, _ in base.model.named_parameters()]
    rows = Examples.from_rows([{"prompt": q, "completion": a} for q, a in TASK.examples(6, 0)])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    with caplog.at_level(logging.WARNING), pytest.raises(Exception, match="holds no ia2 run"):
        adapt(base, rows, output_dir=tmp_path / "out")
    assert [name for name, _ in base.model.named_parameters()] == before
