"""Data sets of several files: a local folder in the layout of the Hugging Face hub, or the hub itself.

A folder's files are read by the same readers as files that are named; only hub ids go through ``datasets``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from ia2.data.readers import PACKED, READERS, Read, read_file
from ia2.utils.errors import DataError, suggest
from ia2.utils.user_files import read_text, similar
from ia2.utils.wording import names_of, one_line

_DEEPEST = 3
_MOST_ENTRIES = 10_000

# Not rows, though their names end like those of rows.
_NO_ROWS = ("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
_SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "dev", "val"},
    "test": {"test", "testing", "eval", "evaluation"},
}
_SHARD = re.compile(r"(?:data/)?(\w+(?:\.\w+)*)-\d{5}-of-\d{5}\b[^/]*")

# Names of splits, and the paths of their files within the folder.
Splits = dict[str, list[str]]


def read_folder(
    folder: Path, shown: str, split: str | None, config: str | None
) -> tuple[str, Iterator[Read]]:
    """The name of a split of a local folder, and its rows.

    Files are found in the folder and three levels below it. Which split a file belongs to is said by
    ``configs`` in the ``README.md``, else by its name (``train.jsonl``,
    ``data/train-00000-of-00002.parquet``) or its folder's (``test/part.csv``); with no such names all
    files are ``train``.

    Args:
        folder: an existing folder.
        shown: what messages call it.
        split: as ``datasets`` knows it, ``train[:100]`` included. ``None``: ``train``, or the only one.
        config: a configuration of the ``README.md``, or the name of a folder in this one.

    Raises:
        DataError: no file can be read, there is no such split or configuration, or it must be said.
    """
    splits = _splits(folder, shown, config)
    known = [*(name for name in _SPLITS if name in splits), *sorted(set(splits) - set(_SPLITS))]

    def rows(name: str) -> Iterator[Read]:
        files = splits[name]
        if len(types := sorted({PurePosixPath(file).suffix.lower() for file in files})) > 1:
            # the same rows saved twice, or rows of other splits
            sound = next(
                (f": name one, such as {folder / file}" for file in files if _sound(folder / file)), ""
            )
            listed = ", ".join(types)
            raise DataError(f"{shown}: the split {name!r} has files of several types ({listed}){sound}")
        return chain.from_iterable(read_file(folder / file, f"{folder.name}/{file}") for file in files)

    if split is None:
        split = _chosen(shown, known)
    if split in splits:
        return split, rows(split)
    wanted = [part.strip() for part in re.sub(r"\[[^\]]*\]", "", split).split("+")]
    for name in wanted:
        if name not in splits:
            raise DataError(f"{shown}: no split {name!r}{_there_are(known, name)}")
    return split, _sliced(shown, split, {name: list(rows(name)) for name in wanted})


def _chosen(shown: str, splits: list[str]) -> str:
    if "train" not in splits and len(splits) != 1:
        raise DataError(f"{shown}: say which split to read; there are {names_of(splits)}")
    return "train" if "train" in splits else splits[0]


def _there_are(known: list[str], wanted: str) -> str:
    if not known:
        return ": leave it out"
    near = suggest(wanted, known)
    return f"; there are {names_of(known)}" + (f".{near}" if near else "")


def _sliced(shown: str, split: str, read: dict[str, list[Read]]) -> Iterator[Read]:
    """Rows of ``train[:100]``, ``train[50%:]`` or ``train+test``, as ``datasets`` counts them."""
    import datasets

    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({n: len(r) for n, r in read.items()})
    except Exception as error:  # assertions too
        raise DataError(f"{shown}: no split {split!r} ({one_line(error)})") from error
    return chain.from_iterable(read[part.splitname][part.from_ : part.to] for part in parts)


# Which files are a split


def _splits(folder: Path, shown: str, config: str | None) -> Splits:
    files = _files(folder, shown)
    splits = _described(folder, shown, files, config)
    if splits is None and config is not None:
        inside = [name.removeprefix(f"{config}/") for name in files if name.startswith(f"{config}/")]
        if not inside:
            known = sorted({name.split("/")[0] for name in files if "/" in name} - {"data"})
            raise DataError(f"{shown}: no configuration {config!r}{_there_are(known, config)}")
        named = _named(folder / config, shown, inside)
        splits = {split: [f"{config}/{file}" for file in part] for split, part in named.items()}
    if splits is None:
        splits = _named(folder, shown, files)
    if splits:
        return splits
    if any((folder / name).exists() for name in ("dataset_dict.json", "state.json")):
        raise DataError(
            f"{shown}: it was written by save_to_disk, whose Arrow files are not read: write the rows with "
            "to_parquet or to_json of `datasets` instead"
        )
    if sound := next((folder / file for file in files[:100] if _sound(folder / file)), None):
        raise DataError(
            f"{shown}: no file in it is named as those of a data set are: name one file, such as {sound}"
        )
    raise DataError(f"{shown}: no file in this folder can be read, only {', '.join(READERS)}")


def _files(folder: Path, shown: str) -> list[str]:
    """Paths within the folder of what may be rows, sorted; hidden files and folders are left out."""

    def closed(error: OSError) -> None:
        raise DataError(f"{shown}: {error.filename} cannot be looked into ({error.strerror})") from error

    files: list[str] = []
    seen = 0
    for place, folders, names in os.walk(folder, onerror=closed, followlinks=True):
        inside = Path(place).relative_to(folder)
        seen += len(folders) + len(names)
        if seen > _MOST_ENTRIES:
            raise DataError(
                f"{shown}: more than {_MOST_ENTRIES:,} files and folders; name a file, or the folder that "
                "holds the rows alone"
            )
        below = len(inside.parts) < _DEEPEST
        folders[:] = [name for name in folders if below and not name.startswith((".", "__"))]
        files += [(inside / name).as_posix() for name in names if _may_be_rows(name)]
    return sorted(files)


def _may_be_rows(name: str) -> bool:
    path = PurePosixPath(name)
    if path.suffix.lower() in PACKED:  # refused when it is read, not passed over
        path = path.with_suffix("")
    hidden = name.startswith((".", "__")) or name in _NO_ROWS
    return path.suffix.lower() in READERS and not hidden


def _sound(file: Path) -> bool:
    """Whether a file begins with a row that can be read."""
    try:
        _, row, problem = next(read_file(file))
    except (DataError, StopIteration):
        return False
    return problem is None and isinstance(row, Mapping)


def _named(folder: Path, shown: str, files: list[str]) -> Splits:
    """Splits by the names of files: the first way of naming that any file follows counts for all."""
    if sharded := {file: match[1] for file in files if (match := _SHARD.fullmatch(file))}:
        return _gathered(sharded)
    for of_folders in (True, False):
        split_of: dict[str, str] = {}
        above: dict[str, set[str]] = {}  # split → folders that hold it
        for file in files:
            parts = file.split("/")
            for place in range(len(parts) - 1) if of_folders else [len(parts) - 1]:
                words = set(re.split(r"[-._ 0-9]+", parts[place].lower()))
                wanted = [split for split, keywords in _SPLITS.items() if words & keywords]
                if len(wanted) > 1:
                    raise DataError(f"{shown}: {file} could be {' or '.join(wanted)}: rename it")
                if wanted:
                    split_of[file] = wanted[0]
                    above.setdefault(wanted[0], set()).add("/".join(parts[:place]))
                    break
        for split, holders in above.items():
            if len(holders) > 1:
                raise DataError(
                    f"{shown}: files of the split {split!r} lie in several folders "
                    f"({names_of(sorted(holders))}): name one, such as {folder / max(holders)}"
                )
        if split_of:
            return _gathered(split_of)
    beside = [file for file in files if "/" not in file.removeprefix("data/")]
    return {"train": beside} if beside else {}


def _gathered(split_of: Mapping[str, str]) -> Splits:
    splits: Splits = {}
    for file, split in split_of.items():
        splits.setdefault(split, []).append(file)
    return splits


def _described(folder: Path, shown: str, files: list[str], config: str | None) -> Splits | None:
    """Splits by ``configs`` in the head of the folder's ``README.md``; None if there are none."""
    configs = _configs(folder, shown)
    if not configs:
        return None
    known = list(configs)
    if config is None:
        standard = [name for name, (_, default) in configs.items() if default]
        config = known[0] if len(known) == 1 else standard[-1] if standard else None
        if config is None:
            raise DataError(f"{shown}: say which configuration to read; there are {names_of(known)}")
    if config not in configs:
        raise DataError(f"{shown}: no configuration {config!r}{_there_are(known, config)}")
    splits: Splits = {}
    for split, patterns in configs[config][0].items():
        for pattern in patterns:
            try:
                matching = {path.relative_to(folder).as_posix() for path in folder.glob(pattern)} | {pattern}
            except (ValueError, NotImplementedError):  # no pattern, or one that leads elsewhere
                matching = set()
            found = [file for file in files if file in matching]
            if not found:
                raise DataError(f"{shown}/README.md: no file {pattern!r} of the split {split!r} can be read")
            splits[split] = list(dict.fromkeys([*splits.get(split, []), *found]))
    return splits


def _configs(folder: Path, shown: str) -> dict[str, tuple[dict[str, list[str]], bool]]:
    """Configuration → its patterns of files by split, and whether it counts if none is named."""
    import yaml

    readme = folder / "README.md"
    head = (
        re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", read_text(readme), re.DOTALL) if readme.exists() else None
    )
    try:
        values = yaml.safe_load(head[1]) if head else None
    except (yaml.YAMLError, RecursionError) as error:
        raise DataError(f"{shown}/README.md: its head is not YAML ({one_line(error)})") from None
    listed = values.get("configs") if isinstance(values, dict) else None
    configs: dict[str, tuple[dict[str, list[str]], bool]] = {}
    for entry in listed if isinstance(listed, list) else []:
        files = entry.get("data_files") if isinstance(entry, dict) else None
        if files is None:
            continue
        name = str(entry.get("config_name", "default"))
        pairs: list[tuple[Any, Any]] = [("train", files)]
        if isinstance(files, dict):
            pairs = list(files.items())
        elif isinstance(files, list) and all(isinstance(part, dict) for part in files):
            pairs = [(part.get("split", "train"), part.get("path")) for part in files]
        patterns = {str(s): [str(p) for p in (x if isinstance(x, list) else [x])] for s, x in pairs}
        configs[name] = patterns, entry.get("default") is True or name == "default"
    return configs


# The hub


def read_hub(
    source: str, split: str | None, config: str | None, revision: str | None
) -> tuple[str, Iterable[Any]]:
    """The name of a split of a hub data set, and its rows as ``datasets`` gives them.

    Raises:
        DataError: it cannot be had, has no such split, or the split must be said.
    """
    import datasets

    try:
        loaded = datasets.load_dataset(source, config, split=split, revision=revision)
    except Exception as error:  # a dozen unrelated types, those of the HTTP client among them
        raise DataError(f"{source}: {_hub_trouble(error, source)}") from error
    if split is not None:
        return split, loaded
    chosen = _chosen(source, [str(name) for name in loaded])
    return chosen, loaded[chosen]


def numbered(place: str, rows: Iterable[Any]) -> Iterator[Read]:
    """Rows of the hub with their sources, ``owner/name[train]:1`` first.

    Raises:
        DataError: they cannot be decoded.
    """
    try:
        for number, row in enumerate(rows, 1):
            yield f"{place}:{number}", row, None
    except Exception as error:  # decoding a column can fail in any library
        raise DataError(f"{place}: cannot be read ({one_line(error)})") from error


def _hub_trouble(error: Exception, source: str) -> str:
    """What happened, and what to do about it."""
    import datasets.exceptions

    said, near = one_line(error), similar(Path(source))
    if isinstance(error, ConnectionError) or "offline" in said.lower():
        return (
            f"the hub cannot be reached ({said}); check the network and HF_HUB_OFFLINE, or give a local "
            f"file{near}"
        )
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return (
            f"no such file, folder or data set of the hub ({said}); check the spelling, or log in with "
            f"`hf auth login` if it is private or gated{near}"
        )
    return f"cannot be loaded from the hub ({said})"
