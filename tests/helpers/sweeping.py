"""What the tests of sweeps share: a tiny model and benchmarks as files, grids of them, and their records."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml
from helpers.benches import wordy_model
from helpers.command_line import write_rows
from helpers.words import make_word_tokenizer

from ia2.experiment.sweep.execute import Sweep, sweep
from ia2.experiment.sweep.grid import Cell, GridConfig, expand
from ia2.utils.files import digest

BRIEF = {"align": {"epochs": 2}, "sft": {"epochs": 2}, "joint": {"epochs": 2}, "soft": {"epochs": 2}}
"""Settings under which a stage takes no time."""

_WORDS = tuple("good bad great awful fine film food song day night cat dog bird fish sun".split())  # noqa: SIM905


def cells_of(**values: Any) -> list[Cell]:
    """The cells of a grid of packaged benchmarks, whose rows are not read."""
    defaults = {"benchmarks": ["SST2"], "models": ["demo"], "recipes": ["sft"], "ood": False}
    grid = GridConfig(**{**({} if "parts" in values else defaults), **values})
    return [cell for unit in expand(grid) for cell in unit.cells]


def write_files(folder: Path) -> Path:
    """A model (``model``) and benchmarks: ``two.yaml``, its OOD partner ``three.yaml``, ``free.yaml``."""
    folder.mkdir(parents=True, exist_ok=True)
    wordy_model().save_pretrained(folder / "model")
    make_word_tokenizer().save_pretrained(folder / "model")
    write_split(folder, "two", "train", 30)
    write_split(folder, "two", "test", 10, seed=1)
    write_split(folder, "three", "test", 8, seed=2, labels=3)
    write_split(folder, "free", "train", 30)
    write_split(folder, "free", "test", 6, seed=3)
    label = {"prompt": "Text:{text}\nLabel:", "label": "label"}
    free = {"prompt": "Question:{text}\nAnswer:", "answer": " {said}", "max_answer_tokens": 3}
    pool = {"split": "train", "rows": 24}
    entries: dict[str, dict[str, Any]] = {
        "two": {
            **label,
            "pool": pool,
            "test": {"split": "test", "rows": 8},
            "verbalisers": {"digits": {0: "0", 1: "1"}, "words": {0: " negative", 1: " positive"}},
            "ood": ["three.yaml"],
        },
        "three": {
            **label,
            "test": {"split": "test", "rows": 6},
            "verbalisers": {"colours": {0: " red", 1: " green", 2: " blue"}},
        },
        "free": {**free, "pool": pool, "test": {"split": "test", "rows": 4}},
    }
    for name, entry in entries.items():
        about = {"name": name.capitalize(), "path": name, **entry}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(about, sort_keys=False))
    return folder


def write_split(folder: Path, name: str, split: str, count: int, seed: int = 0, labels: int = 2) -> None:
    """Rows of one benchmark; no two have the same text."""
    rng = random.Random(f"{name} {seed}")
    texts: dict[str, None] = {}
    while len(texts) < count:
        texts[" ".join(rng.choices(_WORDS, k=rng.randint(2, 5)))] = None
    rows = [
        {"text": text, "label": i % labels, "said": " ".join(rng.choices(_WORDS, k=2))}
        for i, text in enumerate(texts)
    ]
    (folder / name).mkdir(exist_ok=True)
    write_rows(folder / name / f"{split}.jsonl", rows)


def grid_of(files: Path, **values: Any) -> dict[str, Any]:
    """A small grid of these files; ``settings`` come on top of brief ones."""
    settings = {**BRIEF, **values.pop("settings", {})}
    return {
        "benchmarks": [str(files / "two.yaml")],
        "models": [str(files / "model")],
        "recipes": ["sft"],
        "num_examples": [4],
        "ood": False,
        "dtype": "float32",
        "device": "cpu",
        "settings": settings,
        **values,
    }


def write_grid(path: Path, values: dict[str, Any]) -> Path:
    """A grid file."""
    path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    return path


def records(folder: Path, name: str = "cells.jsonl") -> list[dict[str, Any]]:
    """The records of a sweep's folder."""
    lines = (folder / name).read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    found = [json.loads(line) for line in lines]
    assert all(record.pop("sha256") == digest(record) for record in found)
    return found


def results(folder: Path, *left_out: str) -> list[str]:
    """The lines of ``cells.jsonl`` without what a run cost (and without other keys)."""
    return [
        json.dumps({k: v for k, v in record.items() if k not in ("cost", *left_out)})
        for record in records(folder)
    ]


def swept(files: Path, folder: Path, limit: int | None = None, **values: Any) -> Sweep:
    """A sweep of :func:`grid_of` in this process."""
    return sweep(GridConfig(**grid_of(files, **values)), folder, limit=limit)
