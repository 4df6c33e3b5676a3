"""Run folders: whose folder it is, and what a later command finds in it."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ia2.config import AdaptConfig, CompareConfig, TrainConfig
from ia2.config.reading import refuse_code, validate
from ia2.models.identity import differences
from ia2.prompts.task import Task
from ia2.utils.errors import DataError, RunFolderError
from ia2.utils.files import digest, read_json, understood, write_json, write_text
from ia2.utils.locks import only_one
from ia2.utils.logging import warn_once
from ia2.utils.manifest import MANIFEST, RUN_FILE, begin, check, clean, compact, is_ours, recorded, remove
from ia2.utils.user_files import user_path

if TYPE_CHECKING:
    from ia2.models.load import BaseModel

CONFIG_FILE = "ia2_config.yaml"
Settings = TypeVar("Settings", TrainConfig, CompareConfig)

ANALYSIS_FILE = "analysis.json"
REPORT_FILE = "report.html"
CARD_FILE = "README.md"

# Where model, rows and context are found. What they are is compared by content.
_PATHS = ("model", "data", "test_data", "context_file", "unlabelled")
_WHERE = (*_PATHS, "revision", "split", "test_split", "unlabelled_split", "data_config")
# Settings that are compared by content: the rows' fingerprints, the model's identity.
_BY_CONTENT = {*_WHERE, "dtype", "quantization", "trust_remote_code"}
# Settings that do not change what a run computes.
_INCIDENTAL = ("output_dir", "device", "report_to", "checkpoint_every")


@contextmanager
def claimed(
    folder: Path, kind: str, config: dict[str, Any], data: dict[str, str], overwrite: bool = False
) -> Iterator[None]:
    """Make ``folder`` this run's for a while: a new or empty folder, or the same run again.

    Args:
        folder: the output folder.
        kind: ``train``, ``compare`` or ``curve``.
        config: all settings.
        data: fingerprints of what is trained and evaluated on, and what the model is (:func:`content_facts`).
        overwrite: remove what another ia2 run has written there; other files stay.

    Raises:
        RunFolderError: the folder holds another run, or files that are not ours, or another process works
            there.
    """
    from ia2.utils.distributed import is_first, wait

    facts = {"kind": kind, "config": _essential(config), "data": data}
    if not is_first():
        wait()  # for the first process, which writes
        _is_same(folder, facts, False)
        yield
        return
    # looked at before anything is written, and once more when nobody else can write
    with ExitStack() as stack:
        try:
            _is_same(folder, facts, overwrite)
            stack.enter_context(only_one(folder, f"ia2 {kind}"))
            same = _is_same(folder, facts, overwrite)
            clean(folder)
            if not same:
                remove(folder)
                try:
                    begin(folder)
                    write_json(folder / RUN_FILE, {**facts, "versions": versions()})
                except BaseException:
                    remove(folder)
                    raise
            _note_places(folder, config)
        finally:
            wait()
        yield
        compact(folder)


# How what `ia2 train` leaves is mended; stages are kept, so it takes no training.
REMADE = "Run the same `ia2 train` again: it is made anew from the finished stages."


def check_outputs(folder: Path) -> None:
    """What a finished training run leaves for later commands is as it was written.

    Raises:
        RunFolderError: a file is damaged or gone.
    """
    # the card and the settings are for people, who may change them
    for name in recorded(folder):
        if "/" not in name and name not in (CARD_FILE, CONFIG_FILE, ANALYSIS_FILE, REPORT_FILE):
            check(folder / name, mend=REMADE)


def refuse_another(
    folder: Path, kind: str, config: dict[str, Any], data: dict[str, str], overwrite: bool
) -> None:
    """What :func:`claimed` would refuse, before work that needs no folder.

    Raises:
        RunFolderError: as there.
    """
    _is_same(folder, {"kind": kind, "config": _essential(config), "data": data}, overwrite)


def choice_of(folder: Path, asked: str) -> dict[str, Any] | None:
    """How the run in a folder chose its recipe (``choose_recipe``), if it was asked the same.

    Raises:
        RunFolderError: the run's file is damaged.
    """
    if not (folder / RUN_FILE).is_file():
        return None
    choice = read_run_file(folder).get("choice") or {}
    return choice if choice.get("asked") == asked else None


def _is_same(folder: Path, facts: dict[str, Any], overwrite: bool) -> bool:
    """Whether ``folder`` holds this run; False if it is free for it.

    Raises:
        RunFolderError: it is neither.
    """
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file. Choose another --output-dir.")
    holds = sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []
    if not holds:
        return False
    if MANIFEST not in holds:
        if RUN_FILE in holds:
            raise RunFolderError(
                f"{folder}: a run without {MANIFEST}, so its files cannot be checked: it is from an earlier "
                "release, or that file was lost. Choose another --output-dir."
            )
        raise RunFolderError(
            f"{folder} is not empty and holds no ia2 run ({holds[0]} …). Choose another --output-dir."
        )
    others = [name for name in holds if name not in (MANIFEST, RUN_FILE, CONFIG_FILE)]
    if RUN_FILE not in holds:
        if others:
            raise RunFolderError(
                f"{folder} holds no run of this command ({others[0]} …). Choose another --output-dir."
            )
        return False
    try:
        differing = _differences(read_run_file(folder), facts)
    except RunFolderError:
        if overwrite and is_ours(folder / RUN_FILE):
            return False
        raise
    if not differing:
        return True
    # a run that was stopped before it computed anything is no work to protect
    if others and not overwrite:
        raise RunFolderError(
            f"{folder} holds another run ({', '.join(differing)} differ). "
            "Choose another --output-dir, or give --overwrite to replace it."
        )
    return False


def read_run_file(folder: Path) -> Any:
    """What a run is; without this file its folder is none, so that to delete it helps nobody.

    Raises:
        RunFolderError: it is damaged, or cannot be read.
    """
    file = folder / RUN_FILE
    # what the manifest does not list, --overwrite leaves too
    replaced = " with --overwrite, or" if is_ours(file) else ""
    return read_json(file, f"Run the command that made the run again{replaced} with another --output-dir.")


def say_unchecked(folder: Path) -> None:
    """Say, once a command, that damage to a run's files would not be seen."""
    if not (folder / MANIFEST).is_file():
        warn_once(f"{folder} has no {MANIFEST}, so its files cannot be checked for damage.")


def _essential(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _INCIDENTAL}


def _differences(known: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    differing = [] if known.get("kind") == facts["kind"] else ["the command"]
    for part, left_out in (("config", _BY_CONTENT), ("data", {"model"})):
        before, now = known.get(part, {}), facts[part]
        if part == "data":
            # the sizes of a curve name their models themselves
            models = differences(before.get("model", {}), now.get("model", {}))
            differing += [f"the model's {words}" for words in models]
        names = sorted({*before, *now} - left_out)
        label = "" if part == "config" else "data of "
        differing += [label + n for n in names if digest(before.get(n)) != digest(now.get(n))]
    return differing


def stored_settings(settings: Mapping[str, Any], base: BaseModel) -> dict[str, Any]:
    """Settings as a run keeps them: what lies on this machine by absolute path, the hub's by commit."""
    revision = base.revision or settings.get("revision")
    stored = {**settings, "model": base.source, "revision": revision, "output_dir": None}
    for name in _PATHS[1:]:
        if (given := stored.get(name)) and (path := user_path(given)).exists():
            stored[name] = str(path.resolve())
    return stored


def content_facts(base: BaseModel, config: AdaptConfig) -> dict[str, Any]:
    """What a run depends on beside its settings and rows: the model, and the text of a context file.

    Raises:
        DataError: that file cannot be read.
    """
    from ia2.prompts.own_context import context_text

    context = {"context": digest(context_text(config))} if config.context_file else {}
    return {"model": base.identity, **context}


def _note_places(folder: Path, settings: Mapping[str, Any]) -> None:
    """Note where model and rows lie now: absolutely, and from the folder, which may be moved with them."""
    facts = read_run_file(folder)
    # rows that are given in memory now do not make a run forget where it found them
    names = _WHERE if settings.get("data") else ("model", "revision", "context_file")
    config = {**facts["config"], **{name: settings[name] for name in names if name in settings}}
    here = folder.resolve()
    found = {name: str(config.get(name)) for name in _PATHS if Path(str(config.get(name))).is_absolute()}
    places = {name: Path(os.path.relpath(path, here)).as_posix() for name, path in found.items()}
    moved = (facts["config"], facts.get("places")) != (config, places)
    if moved:
        add_facts(folder, config=config, places=places)
    if moved or not (folder / CONFIG_FILE).is_file():
        import yaml

        text = yaml.safe_dump({**settings, **config}, sort_keys=False, allow_unicode=True)
        write_text(folder / CONFIG_FILE, text)


def settings_of(kind: type[Settings], folder: Path, facts: Mapping[str, Any], **changes: Any) -> Settings:
    """A run's settings, changed; what has been moved together with its folder is found where it lies now.

    Raises:
        ConfigError: they are of another version, or have been damaged.
    """
    values = {**facts["config"], "output_dir": None, **changes}
    for name, near in facts.get("places", {}).items():
        stored = Path(str(values.get(name)))
        moved = Path(os.path.normpath(folder.resolve() / near))
        if stored.is_absolute() and not stored.exists() and moved.exists():
            values[name] = str(moved)
    settings: Settings = validate(kind, values, str(folder))
    return settings


def add_facts(folder: Path, **facts: Any) -> None:
    """Add what later commands need to the run's file."""
    write_json(folder / RUN_FILE, {**read_run_file(folder), **facts})


def task_facts(task: Task) -> dict[str, Any]:
    """A task as JSON; :func:`load_run` reads it back."""
    facts = asdict(task)
    facts.pop("index")
    return facts


def load_run(folder: Path, code: Mapping[str, Any] | None = None) -> tuple[TrainConfig, Task, dict[str, Any]]:
    """Settings, task and facts of a finished training run.

    Args:
        folder: the run's folder.
        code: what the user trusts: ``trust_remote_code`` and ``parser``, in place of the run's own. A
            ``context_function`` is left out: a trained adapter is shown no context.

    Raises:
        DataError: the folder holds none.
        ConfigError: it names code that the user has not named.
    """
    if not (folder / RUN_FILE).is_file():
        raise DataError(f"{folder}: no ia2 run there ({RUN_FILE} is missing). Give a folder of `ia2 train`.")
    say_unchecked(folder)
    facts = read_run_file(folder)
    with understood(folder):
        return _run_of(folder, facts, code or {})


def not_finished(folder: Path) -> str:
    """That a run has not finished, and what to do: where training diverged, not the same again."""
    stages = folder.rglob("stage.json")
    if any(read_json(file).get("diverged") for file in stages):
        return (
            f"{folder}: the run has not finished, and training diverged in it; see what "
            f"`ia2 doctor {folder}` says."
        )
    return f"{folder}: the run has not finished; start the same command again to continue it."


def _run_of(
    folder: Path, facts: dict[str, Any], code: Mapping[str, Any]
) -> tuple[TrainConfig, Task, dict[str, Any]]:
    # metrics.json is written last
    if "task" not in facts or not (folder / "metrics.json").is_file():
        raise DataError(not_finished(folder))
    labels, label_ids, names = (tuple(facts["task"][name]) for name in ("labels", "label_ids", "names"))
    if not len({*labels}) == len(label_ids) == len(names) or any(i < 0 for ids in label_ids for i in ids):
        raise ValueError("labels, their names and tokens do not fit each other")
    if not isinstance(facts["data"]["model"], dict):
        raise TypeError("data.model is no mapping")
    named = {name: value for name, value in code.items() if value is not None}
    config = settings_of(TrainConfig, folder, facts, **named, context_function=None, output_dir=str(folder))
    given = {**facts["task"], **named}
    for settings in (config.model_dump(), given):
        refuse_code(settings, folder / RUN_FILE, named)
    task = Task(
        kind=given["kind"],
        labels=labels,
        label_ids=tuple(tuple(ids) for ids in label_ids),
        names=names,
        max_answer_tokens=given["max_answer_tokens"],
        append_end=given["append_end"],
        trimmed=given["trimmed"],
        terminators=tuple(given["terminators"]),
        stop_texts=tuple(given["stop_texts"]),
        parser=given["parser"],
        separator=given["separator"],
        stop_tokens=given["stop_tokens"],
        advice=tuple((what, evidence, way_out) for what, evidence, way_out in given["advice"]),
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


def find_runs(folder: Path) -> list[tuple[Path, str]]:
    """The runs that a folder stands for, each with the part of it that is meant (empty: all of it).

    Raises:
        RunFolderError: there is none, or a sweep.
    """
    if not folder.is_dir():
        raise RunFolderError(f"{folder}: there is no such folder. Give one of `ia2 train` or `ia2 compare`.")
    of_sizes = (folder / RUN_FILE).is_file() and read_run_file(folder).get("kind") == "curve"
    if not of_sizes and ((folder / RUN_FILE).is_file() or (folder / "compare.json").is_file()):
        return [(folder, "")]
    sizes = [(int(m[1]), path) for path in folder.iterdir() if (m := re.fullmatch(r"n-(\d+)", path.name))]
    if found := [path for _, path in sorted(sizes) if (path / RUN_FILE).is_file()]:
        return [(path, "") for path in found]
    if any((folder / name).exists() for name in ("cells.jsonl", "sweep.json", "grid.yaml", "cells")):
        raise RunFolderError(
            f"{folder}: that is a sweep; `ia2 report {folder}` has its tables. Give a folder of `ia2 train` "
            "or `ia2 compare`."
        )
    here = folder.resolve()
    for depth, pattern in ((1, r"seed-\d+"), (2, r"seed-\d+/fold-\d+")):
        part = "/".join(here.parts[-depth:])
        # `/` has no folder above it
        if re.fullmatch(pattern, part) and (here.parents[depth - 1] / RUN_FILE).is_file():
            return [(here.parents[depth - 1], part)]
    raise RunFolderError(f"{folder}: no ia2 run there. Give a folder of `ia2 train` or `ia2 compare`.")
