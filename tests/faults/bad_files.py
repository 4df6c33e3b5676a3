"""A folder with good and bad files of every kind that commands read: rows, YAML, models, runs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml
from helpers.command_line import TASK, write_rows
from helpers.finished_runs import write_comparison
from helpers.sweeping import grid_of, write_files, write_grid

ROWS = {
    "cut": '{"prompt": "a0 a1", "completion": " L1"}\n{"prompt": "a0 a',
    "empty": "",
    "blank": "\n \n\n",
    "scalars": '1\n"a"\nnull\n',
    "nulls": '{"prompt": null, "completion": null}\n' * 3,
    "deep": '{"prompt": ' + "[" * 100_000 + "\n",
    "texts": '{"text": "a", "label": "b"}\n' * 4,
    "surrogates": '{"prompt": "a \\ud800", "completion": " L1"}\n' * 4,
}
LABELS = {
    "one-label": [(q, " L1") for q, _ in TASK.examples(8, 0)],
    "same-tokens": [(q, (" ja", " nein")[i % 2]) for i, (q, _) in enumerate(TASK.examples(8, 0))],
    "other": [*TASK.examples(12, seed=1), ("a0", " other")],
    "long": [*TASK.examples(7, seed=0), (" ".join(["z0"] * 600), " L1"), *TASK.examples(4, seed=1)],
    "free": [(q, " L1" + f" z{i}" * i) for i, (q, _) in enumerate(TASK.examples(10, 0))],
}
YAML = {
    "syntax": "a: [1, 2",
    "list": "- 1\n- 2\n",
    "unknown": "no_such_key: 1\n",
    "number-key": "1: 2\n",
    "list-key": "? [a, b]\n: 2\n",
    "date": "seed: 2024-99-99\n",
    "huge-number": "seed: " + "9" * 10_000 + "\n",
    "python": "seed: !!python/object/apply:os.system ['true']\n",
    "of-itself": "labels: &a [*a, *a]\n",
    "deep": "seed: " + "[" * 20_000 + "\n",
    "twice": "seed: 1\nseed: 2\n",
    "nul": "seed: \0\n",
    "bomb": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    + "labels: *i\n",
    "control": "seed: \x07\n",
}
MODELS: dict[str, tuple[str, Any]] = {  # a file of the model and what it holds instead
    "no-config": ("config.json", None),
    "list-config": ("config.json", "[1]"),
    "broken-config": ("config.json", "{oops"),
    "vision": ("config.json", '{"model_type": "vit", "architectures": ["ViTModel"]}'),
    "no-heads": ("config.json", {"num_attention_heads": 0}),
    "text-sizes": ("config.json", {"hidden_size": "large"}),
    "no-weights": ("model.safetensors", None),
    "broken-weights": ("model.safetensors", "oops"),
    "broken-tokenizer": ("tokenizer.json", "{oops"),
}
UNREADABLE = {"fifo": "pipe", "zero": "device", "loop": "symbolic link", "dangling": "symbolic link"}


def write_world(folder: Path, finished: Path, model: Path) -> Path:
    """Write it all: rows.jsonl, test.jsonl, model, run, compared, grid.yaml and files are good."""
    write_rows(folder / "rows.jsonl", TASK.examples(12, seed=0))
    write_rows(folder / "test.jsonl", TASK.examples(6, seed=1))
    write_rows(folder / "same.jsonl", [{"prompt": q} for q, _ in TASK.examples(12, seed=0)])
    (folder / "model").symlink_to(model)
    (folder / "run").symlink_to(finished)
    write_comparison(folder / "compared")
    write_grid(folder / "grid.yaml", grid_of(write_files(folder / "files")))
    mixed = yaml.safe_load((folder / "files" / "two.yaml").read_text())
    (folder / "files" / "mixed.yaml").write_text(
        yaml.safe_dump({**mixed, "name": "Mixed", "ood": ["free.yaml"]})
    )
    (folder / "strangers").mkdir()
    (folder / "strangers" / "thesis.tex").write_text("mine")
    (folder / "rows.docx").write_text("no rows")
    (folder / "junk.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    for suffix in ("jsonl", "csv", "yaml"):
        os.mkfifo(folder / f"fifo.{suffix}")
        (folder / f"loop.{suffix}").symlink_to(f"loop.{suffix}")
        (folder / f"zero.{suffix}").symlink_to("/dev/zero")
        (folder / f"dangling.{suffix}").symlink_to("nothing-there")
    for name in ("folder.d", "folder.csv", "folder"):
        (folder / name).mkdir()
    write_rows(folder / "folder" / "train.jsonl", TASK.examples(6, seed=0))
    for name, text in ROWS.items():
        (folder / f"{name}.jsonl").write_text(text)
    for name, rows in LABELS.items():
        write_rows(folder / f"{name}.jsonl", rows)
    for name, text in YAML.items():
        (folder / f"{name}.yaml").write_text(text)
    for name, (file, content) in MODELS.items():
        path = Path(shutil.copytree(model, folder / f"model-{name}")) / file
        if isinstance(content, dict):
            content = json.dumps({**json.loads(path.read_text()), **content})
        path.unlink()
        if content is not None:
            path.write_text(content)
    cut_embedding(Path(shutil.copytree(model, folder / "model-small")), 72)
    return folder


def cut_embedding(model: Path, rows: int) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    kept = {n: t[:rows].clone() if "embed" in n or "lm_head" in n else t for n, t in tensors.items()}
    save_file(kept, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
