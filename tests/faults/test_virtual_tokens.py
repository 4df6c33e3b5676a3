"""Rows that an adapter's virtual tokens leave no room for are refused before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.benches import base_of, word_examples
from helpers.command_line import run, tree, write_rows
from helpers.families import build, llama
from helpers.sweeping import swept, write_files

from ia2.config import AdaptConfig, CompareConfig, CurveConfig, ProbeConfig
from ia2.data.examples import Example, Examples, FewShotSplit
from ia2.experiment.adapt import adapt
from ia2.experiment.compare import compare
from ia2.experiment.curve import curve
from ia2.experiment.probe import probe
from ia2.models.load import BaseModel
from ia2.utils.errors import DataError

WINDOW = 90
LONG = "good " * 73 + "\nLabel:"  # 75 tokens: room for an answer and a demonstration, not for 16 more
SHORT = word_examples(14)
BRIEF: dict[str, Any] = {name: {"epochs": 1} for name in ("align", "sft", "joint", "soft")}
BRIEF["max_context_tokens"] = WINDOW
KINDS: list[dict[str, Any]] = [
    {"type": "prompt"},
    {"type": "prefix"},
    {"type": "p-tuning"},
    {"peft": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 16}},
]


@pytest.fixture
def base(word_tokenizer: Any) -> BaseModel:
    return base_of(build(llama().config, seed=3), word_tokenizer)


def with_long(rows: Examples, answer: str = " positive") -> Examples:
    return Examples([*rows, Example(LONG, answer, "the long row")], name=rows.name)


def refused(error: DataError) -> None:
    said = str(error)
    assert said.startswith("the long row: the prompt has ")
    assert "16 taken by the adapter's virtual tokens" in said and "\n" not in said


# ------------------------------------------------------------------------------------------- compare


@pytest.mark.parametrize(
    "changes",
    [
        {"adapters": ["lora", "prompt"]},
        {"adapters": ["lora", "prefix"], "recipes": ["base", "icl", "ia2+sft"]},
        {"adapters": ["p-tuning"], "recipes": ["soft-sft"]},
        {"adapters": ["prompt"], "objectives": ["kl"], "recipes": ["ia2"]},
        {"recipes": ["mine"], "schedules": {"mine": [{"stage": "sft"}]}, "adapter": {"type": "prompt"}},
        *({"adapter": kind} for kind in KINDS),
    ],
)
@pytest.mark.parametrize("where", ["test", "folds"])
def test_compare(
    where: str, changes: dict[str, Any], base: BaseModel, tmp_path: Path, fits: list[str]
) -> None:
    """In the test rows, or anywhere in the rows that are cross-fitted."""
    config = CompareConfig(**{**BRIEF, "recipes": ["base", "sft"], "seeds": 2, "folds": 2, **changes})
    test = with_long(word_examples(4, seed=5)) if where == "test" else None
    rows = SHORT if test is not None else with_long(SHORT)
    with pytest.raises(DataError) as caught:
        compare(base, rows, config, test=test, output_dir=tmp_path / "out")
    refused(caught.value)
    assert fits == [] and not (tmp_path / "out").exists()


def test_the_same_rows_fit_other_adapters(base: BaseModel, tmp_path: Path, fits: list[str]) -> None:
    config = CompareConfig(**BRIEF, recipes=["base", "icl", "sft"], seeds=1, adapters=["lora"])
    compare(base, SHORT, config, test=with_long(word_examples(4, seed=5)), output_dir=tmp_path / "out")
    assert fits == ["AnswerLoss"]


# --------------------------------------------------------------------------------------------- curve


@pytest.mark.parametrize("problem", ["virtual tokens", "window"])
def test_curve(problem: str, base: BaseModel, tmp_path: Path, fits: list[str]) -> None:
    """A row that only the largest size draws is refused before the smallest is trained."""
    rows = with_long(SHORT)
    if problem == "window":
        rows = Examples([*SHORT, Example("good " * 95 + "\nLabel:", " positive", "the long row")])
    drawn = [rows.split(num_examples=2, seed=seed, balanced=True) for seed in range(20)]
    seed = next(s for s, d in enumerate(drawn) if not any(len(e.query) > 200 for e in [*d.train, *d.dev]))
    kind = "prompt" if problem == "virtual tokens" else "lora"
    changes = {"sizes": [2, 10], "recipes": ["sft"], "seeds": 1, "seed": seed, "adapter": {"type": kind}}
    with pytest.raises(DataError, match="the long row"):
        curve(
            base,
            rows,
            CurveConfig(**BRIEF, **changes),
            test=word_examples(4, seed=5),
            output_dir=tmp_path / "out",
        )
    assert fits == [] and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------- one run


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("part", ["train", "dev", "test"])
def test_train(part: str, kind: dict[str, Any], base: BaseModel, tmp_path: Path, fits: list[str]) -> None:
    parts = {"train": SHORT[:8], "dev": SHORT[8:11], "test": SHORT[11:]}
    parts[part] = with_long(parts[part])
    test = parts.pop("test")
    config = AdaptConfig(**BRIEF, recipe="sft", adapter=kind)
    with pytest.raises(DataError) as caught:
        adapt(base, FewShotSplit(**parts), config, test=test, output_dir=tmp_path / "out")
    refused(caught.value)
    assert fits == [] and not (tmp_path / "out").exists()
    # the model has no adapter on it, and the same rows do without virtual tokens
    adapt(base, FewShotSplit(**parts), AdaptConfig(**BRIEF, recipe="sft"), test=test)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_probe(kind: dict[str, Any], base: BaseModel) -> None:
    with pytest.raises(DataError) as caught:
        probe(base, with_long(SHORT), ProbeConfig(**BRIEF, adapter=kind))
    refused(caught.value)
    probe(base, SHORT, ProbeConfig(**BRIEF, adapter=kind))


# ------------------------------------------------------------------------------------------- sweeps


@pytest.mark.parametrize("problem", ["virtual tokens", "window", "virtual tokens of the rows themselves"])
def test_sweep(problem: str, tmp_path: Path, fits: list[str]) -> None:
    """Out-of-distribution rows too, and those that are too long for any adapter."""
    files = write_files(tmp_path / "files")
    own = problem.endswith("themselves")
    file = files / ("two" if own else "three") / "test.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[2]["text"] = "good " * (95 if problem == "window" else 69)
    write_rows(file, rows)
    settings: dict[str, Any] = {**BRIEF, "adapter.type": "lora" if problem == "window" else "prompt"}
    recipes = ["icl", "sft"] if own else ["sft"]
    done = swept(files, tmp_path / "out", recipes=recipes, ood=True, settings=settings)
    assert [failure["spec"]["recipe"] for failure in done.failed] == ["sft"]
    assert "test.jsonl:3: the prompt has " in done.failed[0]["error"]
    assert ("virtual tokens" in done.failed[0]["error"]) == (problem != "window")
    assert fits == []


# ------------------------------------------------------------------------------- what is done with it


def test_what_uses_the_adapter(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once it is trained: predictions, evaluation and analysis of other rows."""
    rows = write_rows(tmp_path / "rows.jsonl", [(row.query, row.answer or "") for row in SHORT])
    long = write_rows(tmp_path / "long.jsonl", [("good cat", " positive"), ("good " * 240, " negative")])
    elsewhere = write_files(tmp_path / "files")
    table = elsewhere / "three" / "test.jsonl"
    other = [json.loads(line) for line in table.read_text().splitlines()]
    other[1]["text"] = "good " * 240
    write_rows(table, other)
    folder = tmp_path / "out"
    trained = run(
        capsys, "train", "--model", files / "model", "--data", rows, "--recipe", "sft", "--device", "cpu",
        "--adapter-type", "prompt", "--sft-epochs", 1, "--output-dir", folder, "--quiet",
    )  # fmt: skip
    assert trained.status == 0, trained
    before = tree(folder)
    for command in ("predict", "eval", "analyze"):
        name = "--adapter" if command != "analyze" else ""
        said = run(capsys, command, *([name] if name else []), folder, "--data", long, "--quiet").refusal()
        assert "long.jsonl:2: the prompt has " in said and "virtual tokens" in said
        assert "--no-controls" not in said
    said = run(
        capsys, "analyze", folder, "--parts", "effects", "--benchmarks", elsewhere / "three.yaml", "--quiet"
    ).refusal()
    assert "test.jsonl:2: the prompt has " in said and "virtual tokens" in said
    assert tree(folder) == before
