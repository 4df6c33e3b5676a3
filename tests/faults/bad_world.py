"""A folder with good and bad files of every kind that commands read: rows, YAML, models, runs."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shutil
from pathlib import Path

from helpers.command_line import write_rows
from helpers.finished_runs import write_comparison, write_curve, write_training
from helpers.sweeping import grid_of, write_files, write_grid
from tiny_icl.tasks import sample_task

MODEL = Path(__file__).resolve().parents[1] / "tiny_icl" / "model"
SUFFIXES = ("jsonl", "csv", "parquet", "yaml", "txt", "html")

_PLAIN = {
    "empty": b"",
    "blank": b"\n \n\n",
    "binary": random.Random(0).randbytes(3000),
    "latin1": "prompt: größe\n".encode("latin-1"),
    "utf16": "prompt: yes\n".encode("utf-16"),
    "nul": b"\0" * 500,
    "huge-line": b"x" * (4 << 20),
}
FILES = (*_PLAIN, "folder", "fifo", "loop", "dangling")
"""What no file should be; each is there with every ending."""

ROWS = {
    "no-columns": '{"text": "a", "label": "b"}\n' * 4,
    "numbers": '{"prompt": 1, "completion": 2}\n{"prompt": [1], "completion": {"a": 2}}\n',
    "nulls": '{"prompt": null, "completion": null}\n' * 3,
    "arrays": "[1, 2]\n" * 3,
    "scalars": '1\n"a"\nnull\n',
    "empty-texts": '{"prompt": "", "completion": ""}\n' * 3,
    "cut": '{"prompt": "a0 a1", "completion": " L1"}\n{"prompt": "a0 a',
    "deep": '{"prompt": ' + "[" * 100_000 + "\n",
    "huge-number": '{"prompt": "a0", "completion": ' + "9" * 10_000 + "}\n",
    "surrogates": '{"prompt": "a \\ud800", "completion": " L1"}\n{"prompt": "\\udfff", "completion": " L2"}\n'
    * 4,
    "array": '[{"prompt": "a0", "completion": " L1"}]',
    "too-long": json.dumps({"prompt": "a0 " * 5000, "completion": " L1"}) + "\n",
}
"""Rows that nobody can ask about."""

LABELS = {
    "one-column": '{"prompt": "a0"}\n' * 4,
    "one-label": '{"prompt": "a0 a1", "completion": " L1"}\n{"prompt": "a1 a2", "completion": " L1"}\n' * 4,
    "one-row": '{"prompt": "a0 a1", "completion": " L1"}\n',
    "unknown": '{"prompt": "word", "completion": "other"}\n{"prompt": "a0", "completion": "more"}\n' * 4,
}
"""Rows that nobody can train on."""

TABLES = {
    "header": "prompt,completion\n",
    "ragged": "prompt,completion\na,b,c\n",
    "quote": 'prompt,completion\n"a,b\n',
    "twice": "prompt,prompt\na,b\n",
}

YAML = {
    "syntax": "a: [1, 2",
    "tab": "a:\n\tb: 1\n",
    "list": "- 1\n- 2\n",
    "scalar": "just a text\n",
    "unknown-key": "no_such_key: 1\n",
    "number-key": "1: 2\n",
    "null-key": "? \n: 2\n",
    "mapping-key": "? {a: b}\n: 2\n",
    "list-key": "? [a, b]\n: 2\n",
    "date": "seed: 2024-99-99\n",
    "time": "seed: !!timestamp x\n",
    "huge-number": "seed: " + "9" * 10_000 + "\n",
    "sexagesimal": "seed: 190:20:30:99:61:" + "9" * 5_000 + "\n",
    "binary-tag": "seed: !!binary '%%%'\n",
    "python": "seed: !!python/object/apply:os.system ['true']\n",
    "unknown-tag": "seed: !mine 3\n",
    "of-itself": "labels: &a [*a, *a]\n",
    "mapping-of-itself": "schedules: &a {x: *a}\n",
    "merge": "<<: 3\n",
    "unknown-alias": "seed: *nothing\n",
    "two-documents": "seed: 1\n---\nseed: 2\n",
    "deep": "seed: " + "[" * 20_000 + "\n",
    "deep-mapping": "\n".join(" " * n + "a:" for n in range(1500)) + "\n",
    "wrong-types": "seed: many\nbatch_size: [1]\nbenchmarks: 3\nname: {}\n",
    "nul": "seed: \0\n",
    "bomb": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    + "labels: *i\n",
    "sections": "adapter: 3\nalign: [1]\nsft: text\nbenchmarks: [3]\nmodels: {a: b}\n",
    "long-key": "k" * 100_000 + ": 1\n",
    "control": "seed: \x07\n",
}
"""What no settings, grid or benchmark is."""

_CONFIG = json.loads((MODEL / "config.json").read_text())
_WEIGHTS = (MODEL / "model.safetensors").read_bytes()
MODELS: dict[str, dict[str, str | bytes | None]] = {
    "no-config": {"config.json": None},
    "empty-config": {"config.json": "{}"},
    "list-config": {"config.json": "[1]"},
    "broken-config": {"config.json": "{oops"},
    "binary-config": {"config.json": b"\xff\xfe\0\0"},
    "no-weights": {"model.safetensors": None},
    "pickle": {"model.safetensors": None, "pytorch_model.bin": b"\x80\x04cos\nsystem\n(S'true'\ntR."},
    "broken-weights": {"model.safetensors": b"oops"},
    "cut-weights": {"model.safetensors": _WEIGHTS[: len(_WEIGHTS) // 2]},
    "empty-weights": {"model.safetensors": b""},
    "encoder": {"config.json": json.dumps({"model_type": "vit", "architectures": ["ViTModel"]})},
    "strange-type": {"config.json": json.dumps({**_CONFIG, "model_type": "no_such_type"})},
    "no-heads": {"config.json": json.dumps({**_CONFIG, "num_attention_heads": 0})},
    "text-sizes": {"config.json": json.dumps({**_CONFIG, "hidden_size": "large"})},
    "no-tokenizer": {"tokenizer.json": None, "tokenizer_config.json": None},
    "broken-tokenizer": {"tokenizer.json": "{oops"},
    "list-tokenizer": {"tokenizer.json": "[1]"},
    "small": {},  # its embedding is cut
}
"""What is wrong with a model: its files that are other ones, or gone."""

RUN_FILES = ("ia2_run.json", "metrics.json", "adapter_config.json", "adapter_model.safetensors")
DAMAGE = {"gone": None, "empty": b"", "half": b'{"kind": "tr', "list": b"[1]", "null": b"null"}


def write_world(folder: Path) -> None:
    """Write it all: ``rows.jsonl``, ``model``, ``grid.yaml`` and ``run`` are good, what has a dash is bad."""
    task = sample_task(0, num_classes=3)
    write_rows(folder / "rows.jsonl", task.examples(12, seed=0))
    write_rows(folder / "test.jsonl", task.examples(6, seed=1))
    (folder / "model").symlink_to(MODEL)
    write_files(folder / "files")
    write_grid(folder / "grid.yaml", grid_of(folder / "files"))
    options = ["--model", "model", "--data", "rows.jsonl", "--output-dir", "run", "--recipe", "sft"]
    training = multiprocessing.get_context("fork").Process(
        target=_train, args=(folder, ["train", *options, "--sft-epochs", "1", "--quiet"])
    )
    training.start()
    training.join()
    assert training.exitcode == 0
    write_comparison(folder / "compared")
    write_curve(folder / "curved")
    write_training(folder / "trained")
    (folder / "strangers").mkdir()
    (folder / "strangers" / "thesis.tex").write_text("mine")
    (folder / "rows.docx").write_text("no rows")
    for suffix in SUFFIXES:
        for name, content in _PLAIN.items():
            (folder / f"{name}.{suffix}").write_bytes(content)
        (folder / f"folder.{suffix}").mkdir()
        os.mkfifo(folder / f"fifo.{suffix}")
        (folder / f"loop.{suffix}").symlink_to(f"loop.{suffix}")
        (folder / f"dangling.{suffix}").symlink_to("nothing-there")
    for texts, pattern in (
        (ROWS, "rows-{}.jsonl"),
        (LABELS, "rows-{}.jsonl"),
        (TABLES, "rows-{}.csv"),
        (YAML, "yaml-{}.yaml"),
    ):
        for name, text in texts.items():
            (folder / pattern.format(name)).write_text(text)
    for name, changes in MODELS.items():
        _changed(MODEL, folder / f"model-{name}", changes)
    cut_embedding(folder / "model-small", 40)
    (folder / "junk.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    for name, damage in DAMAGE.items():
        for file in RUN_FILES:
            _changed(folder / "run", folder / f"run-{file.partition('.')[0]}-{name}", {file: damage})
        _changed(folder / "compared", folder / f"compared-{name}", {"compare.json": damage})
        _changed(folder / "curved", folder / f"curved-{name}", {"curve.json": damage})
    for name, text in {"text": "oops", "list": "[1]", "object": "{}"}.items():
        (folder / f"swept-{name}").mkdir()
        (folder / f"swept-{name}" / "cells.jsonl").write_text(text)
    (folder / "run-strange").mkdir()
    (folder / "run-strange" / "ia2_run.json").write_text('{"kind": "song", "config": {}, "data": {}}')


def _train(folder: Path, arguments: list[str]) -> None:
    from ia2.cli import main

    os.chdir(folder)
    with Path(os.devnull).open("w") as nothing, contextlib.redirect_stdout(nothing):
        main(arguments)


def _changed(source: Path, to: Path, changes: dict[str, str | bytes | None]) -> None:
    """A copy of a folder with other files."""
    shutil.copytree(source, to)
    for file, content in changes.items():
        if content is None:
            (to / file).unlink()
        else:
            (to / file).write_bytes(content.encode() if isinstance(content, str) else content)


def cut_embedding(model: Path, rows: int) -> None:
    """Leave a model so many rows of its embedding."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    kept = {n: t[:rows].clone() if "embed" in n or "lm_head" in n else t for n, t in tensors.items()}
    save_file(kept, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
