"""Run folders: whose folder it is, and what a later command finds in it."""

from __future__ import annotations

import platform
import shutil
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ia2.config import TrainConfig
from ia2.config_reading import validate
from ia2.errors import DataError, RunFolderError
from ia2.files import digest, read_json, write_json, write_text
from ia2.task import Task

CONFIG_FILE = "ia2_config.yaml"
RUN_FILE = "ia2_run.json"
ANALYSIS_FILE = "analysis.json"

# Settings that do not change what a run computes.
_INCIDENTAL = ("output_dir", "device", "report_to", "checkpoint_every")


def claim(
    folder: Path, kind: str, config: dict[str, Any], data: dict[str, str], overwrite: bool = False
) -> None:
    """Make ``folder`` this run's: a new or empty folder, or the same run again.

    Args:
        folder: the output folder.
        kind: ``train`` or ``compare``.
        config: all settings.
        data: fingerprints of what is trained and evaluated on.
        overwrite: delete another ia2 run that is there.

    Raises:
        RunFolderError: the folder holds another run, or files that are not ours.
    """
    facts = {"kind": kind, "config": _essential(config), "data": data}
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file. Choose another --output-dir.")
    holds = [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []
    if (folder / RUN_FILE).is_file():
        differing = _differences(read_json(folder / RUN_FILE), facts)
        if not differing and (folder / CONFIG_FILE).is_file():
            return
        # a run that was stopped before it computed anything is no work to protect
        started = any(path.name not in (RUN_FILE, CONFIG_FILE) for path in holds)
        if differing and started and not overwrite:
            raise RunFolderError(
                f"{folder} holds another run ({', '.join(differing)} differ). "
                "Choose another --output-dir, or give --overwrite to replace it."
            )
        if differing and started:
            shutil.rmtree(folder)
    elif holds:
        raise RunFolderError(
            f"{folder} is not empty and holds no ia2 run ({holds[0].name} …). Choose another --output-dir."
        )
    write_json(folder / RUN_FILE, {**facts, "versions": versions()})
    import yaml

    write_text(folder / CONFIG_FILE, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def _essential(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _INCIDENTAL}


def _differences(known: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    differing = [] if known.get("kind") == facts["kind"] else ["the command"]
    for part in ("config", "data"):
        before, now = known.get(part, {}), facts[part]
        names = sorted({*before, *now})
        label = "" if part == "config" else "data of "
        differing += [label + n for n in names if digest(before.get(n)) != digest(now.get(n))]
    return differing


def add_facts(folder: Path, **facts: Any) -> None:
    """Add what later commands need to the run's file."""
    write_json(folder / RUN_FILE, {**read_json(folder / RUN_FILE), **facts})


def task_facts(task: Task) -> dict[str, Any]:
    """A task as JSON; :func:`load_run` reads it back."""
    facts = asdict(task)
    facts.pop("index")
    return facts


def load_run(folder: Path) -> tuple[TrainConfig, Task, dict[str, Any]]:
    """Settings, task and facts of a finished training run.

    Raises:
        DataError: the folder holds none.
    """
    if not (folder / RUN_FILE).is_file():
        raise DataError(f"{folder}: no ia2 run there ({RUN_FILE} is missing).")
    facts = read_json(folder / RUN_FILE)
    # metrics.json is written last
    if "task" not in facts or not (folder / "metrics.json").is_file():
        raise DataError(f"{folder}: the run has not finished; start the same command again to continue it.")
    config = validate(TrainConfig, {**facts["config"], "output_dir": str(folder)}, str(folder))
    given = facts["task"]
    labels = tuple(given["labels"])
    task = Task(
        kind=given["kind"],
        labels=labels,
        label_ids=tuple(tuple(ids) for ids in given["label_ids"]),
        names=tuple(given["names"]),
        max_answer_tokens=given["max_answer_tokens"],
        append_end=given["append_end"],
        trimmed=given["trimmed"],
        terminators=tuple(given["terminators"]),
        stop_texts=tuple(given["stop_texts"]),
        parser=given["parser"],
        separator=given["separator"],
        index={label: i for i, label in enumerate(labels)},
    )
    return config, task, facts


def versions() -> dict[str, str]:
    """Versions of what results depend on."""
    found = {"python": platform.python_version()}
    for package in ("ia2", "torch", "transformers", "peft", "accelerate", "datasets", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """The machine, as results name it: no host names, no paths."""
    import os

    import psutil
    import torch

    accelerators = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "accelerators": accelerators,
        "platform": f"{platform.system()} {platform.machine()}",
    }
