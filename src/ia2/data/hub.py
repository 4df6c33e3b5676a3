"""Data sets of several files: a local folder in the layout of the Hugging Face hub, or the hub itself.

A folder's files are read by the same readers as files that are named; only hub ids go through ``datasets``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from itertools import chain, islice
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
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"(?:data/)?(\w+(?:\.\w+)*)-\d{5}-of-\d{5}\b[^/]*")

# A split's files, by their paths within the folder.
Splits = dict[str, list[str]]


# Folders


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
    files = _files(folder, shown)
    splits = _described(folder, shown, files, config)
    if splits is None and config is not None:
        inside = [name for name in files if name.startswith(config + "/")]
        if not inside:
            known = sorted({name.split("/")[0] for name in files if "/" in name} - {"data"})
            raise DataError(f"{shown}: no configuration {config!r}{_there_are(known, config)}")
        found = _named(folder / config, shown, [name.removeprefix(config + "/") for name in inside])
        splits = {name: [f"{config}/{file}" for file in part] for name, part in found.items()}
    if splits is None:
        splits = _named(folder, shown, files)
    if not splits:
        raise DataError(f"{shown}: {_no_files(folder, files)}")
    known = [*(name for name in _SPLITS if name in splits), *sorted(set(splits) - set(_SPLITS))]
    if split is None:
        if "train" not in splits and len(splits) > 1:
            raise DataError(f"{shown}: say which split to read; there are {names_of(known)}")
        split = "train" if "train" in splits else known[0]

    def rows(name: str) -> Iterator[Read]:
        _check_types(folder, f"{shown}: the split {name!r} has", splits[name])
        read = (read_file(folder / file, f"{folder.name}/{file}") for file in splits[name])
        return chain.from_iterable(read)

    if split in splits:
        return split, rows(split)
    wanted = [part.strip() for part in re.sub(r"\[[^\]]*\]", "", split).split("+")]
    for name in wanted:
        if name not in splits:
            raise DataError(f"{shown}: no split {name!r}{_there_are(known, name)}")
    return split, _sliced(shown, split, {name: list(rows(name)) for name in wanted})


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


def _files(folder: Path, shown: str) -> list[str]:
    """Paths within the folder of what may be rows, sorted; hidden files and folders are left out."""
    found: list[str] = []
    level, seen = [""], 0
    for _ in range(_DEEPEST + 1):
        below: list[str] = []
        for inside in level:
            try:
                with os.scandir(folder / inside) as listed:
                    entries = list(islice(listed, _MOST_ENTRIES + 1))
            except OSError as error:
                raise DataError(
                    f"{shown}: {folder / inside} cannot be looked into ({error.strerror})"
                ) from error
            seen += len(entries)
            if seen > _MOST_ENTRIES:
                raise DataError(
                    f"{shown}: more than {_MOST_ENTRIES:,} files and folders; name a file, or the "
                    "folder that holds the rows alone"
                )
            for entry in entries:
                name = inside + entry.name
                if entry.name.startswith((".", "__")):
                    continue
                if _is_folder(entry):
                    below.append(name + "/")
                elif _may_be_rows(entry.name):
                    found.append(name)
        level = below
        if not level:
            break
    return sorted(found)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle, or to where one may not look
        return False


def _may_be_rows(name: str) -> bool:
    path = PurePosixPath(name)
    if path.suffix.lower() in PACKED:  # refused when it is read, not passed over
        path = path.with_suffix("")
    return path.suffix.lower() in READERS and name not in _NO_ROWS


def _no_files(folder: Path, deeper: list[str]) -> str:
    if any((folder / name).exists() for name in ("dataset_dict.json", "state.json")):
        return (
            "it was written by save_to_disk, whose Arrow files are not read: write the rows with to_parquet "
            "or to_json of `datasets` instead"
        )
    if sound := next((folder / file for file in deeper[:100] if _sound(folder / file)), None):
        return f"no file in it is named as those of a data set are: name one file, such as {sound}"
    return f"no file in this folder can be read, only {', '.join(READERS)}"


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
                if wanted := _keywords(parts[place]):
                    if len(wanted) > 1:
                        raise DataError(f"{shown}: {file} could be {' or '.join(wanted)}: rename it")
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


def _check_types(folder: Path, beginning: str, files: list[str]) -> None:
    """Files of several types are the same rows saved twice, or belong to other splits."""
    types = sorted({PurePosixPath(file).suffix.lower() for file in files})
    if len(types) > 1:
        sound = next((f": name one, such as {folder / file}" for file in files if _sound(folder / file)), "")
        raise DataError(f"{beginning} files of several types ({', '.join(types)}){sound}")


def _sound(file: Path) -> bool:
    """Whether a file begins with a row that can be read."""
    try:
        _, row, problem = next(read_file(file))
    except (DataError, StopIteration):
        return False
    return problem is None and isinstance(row, Mapping)


def _gathered(split_of: Mapping[str, str]) -> Splits:
    splits: Splits = {}
    for file, split in split_of.items():
        splits.setdefault(split, []).append(file)
    return splits


def _keywords(text: str) -> list[str]:
    words = set(re.split(r"[-._ 0-9]+", text.lower()))
    return [split for split, keywords in _SPLITS.items() if words & set(keywords)]


def _described(folder: Path, shown: str, files: list[str], config: str | None) -> Splits | None:
    """Splits by ``configs`` in the head of the folder's ``README.md``; None if there are none."""
    if not (folder / "README.md").exists():
        return None
    head = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", read_text(folder / "README.md"), re.DOTALL)
    configs, standard = _configs(f"{shown}/README.md", head[1]) if head else ({}, None)
    if not configs:
        return None
    if config is None:
        config = next(iter(configs)) if len(configs) == 1 else standard
        if config is None:
            raise DataError(f"{shown}: say which configuration to read; there are {names_of(list(configs))}")
    if config not in configs:
        raise DataError(f"{shown}: no configuration {config!r}{_there_are(list(configs), config)}")
    splits: Splits = {}
    for split, patterns in configs[config].items():
        splits[split] = []
        for pattern in patterns:
            wanted = PurePosixPath(pattern).parts
            matching = [file for file in files if _matches(PurePosixPath(file).parts, wanted)]
            if not matching:
                raise DataError(f"{shown}/README.md: no file {pattern!r} of the split {split!r} can be read")
            splits[split] += [file for file in matching if file not in splits[split]]
    return splits


def _configs(place: str, head: str) -> tuple[dict[str, dict[str, list[str]]], str | None]:
    """Configuration → split → patterns of files; and the configuration that counts if none is named."""
    import yaml

    try:
        values = yaml.safe_load(head)
    except (yaml.YAMLError, RecursionError) as error:
        raise DataError(f"{place}: its head is not YAML ({one_line(error)})") from None
    listed = values.get("configs") if isinstance(values, dict) else None
    configs: dict[str, dict[str, list[str]]] = {}
    standard = None
    for entry in listed if isinstance(listed, list) else []:
        files = entry.get("data_files") if isinstance(entry, dict) else None
        if files is None:
            continue
        name = str(entry.get("config_name", "default"))
        if entry.get("default") is True or name == "default":
            standard = name
        if isinstance(files, list) and all(isinstance(part, dict) for part in files):
            pairs = [(str(part.get("split", "train")), part.get("path")) for part in files]
        else:
            pairs = list(files.items()) if isinstance(files, dict) else [("train", files)]
        configs[name] = {
            str(split): list(map(str, paths if isinstance(paths, list) else [paths]))
            for split, paths in pairs
        }
    return configs, standard


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[i:], pattern[1:]) for i in range(len(parts) + 1))
    if not parts or not (parts[0] == pattern[0] or fnmatchcase(parts[0], pattern[0])):
        return False
    return _matches(parts[1:], pattern[1:])


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
        known: list[str] = []
        if split is not None and "split" in str(error).lower():
            try:
                known = datasets.get_dataset_split_names(source, config, revision=revision)
            except Exception:  # then the first error has to do
                known = []
        if known:
            raise DataError(f"{source}: no split {split!r}{_there_are(known, split or '')}") from error
        raise DataError(f"{source}: {_hub_trouble(error, source)}") from error
    if split is not None:
        return split, loaded
    splits = [str(name) for name in loaded]
    if "train" not in splits and len(splits) != 1:
        raise DataError(f"{source}: say which split to read; there are {names_of(splits)}")
    chosen = "train" if "train" in splits else splits[0]
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
