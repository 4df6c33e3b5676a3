"""Settings from YAML files and flags, checked; whatever is wrong is told in one line."""

from __future__ import annotations

import shlex
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ia2.config.yaml_reading import load_yaml
from ia2.utils.errors import ConfigError, suggest
from ia2.utils.user_files import read_text


def load_config(
    kind: type[BaseModel],
    file: str | Path | None,
    flags: Mapping[str, Any],
    code: Mapping[str, Any] | None = None,
) -> Any:
    """A validated ``kind`` from a YAML file and flags; flags win, and their dotted names reach sections.

    Args:
        kind: the configuration class.
        file: YAML file with (some of) its keys, or None.
        flags: values given on the command line; None means not given.
        code: what the file may name beside (see :func:`refuse_code`).

    Raises:
        DataError: the file is missing.
        ConfigError: it is no mapping, has an unknown key, a value is not allowed, or is code. One line.
    """
    if file is None:
        return validate(kind, _with_flags({}, flags, ""))
    values = _with_flags(read_settings(Path(file)), flags, f"{file}: ")
    config: BaseModel = validate(kind, values, str(file))
    refuse_code(config.model_dump(), file, {**flags, **(code or {})})
    return config


def refuse_code(settings: Mapping[str, Any], file: str | Path, named: Mapping[str, Any]) -> None:
    """Refuse settings by which a file would run code: a file is data, whoever wrote it.

    Code that is not ours runs only when the user names it in this command (``named``: setting → its value,
    or several), or in a call from Python.

    Raises:
        ConfigError: a value that is code and was not named; says which flag names it.
    """
    for name, flag in code_flags(settings).items():
        value, given = settings[name], named.get(name)
        if value == given or (isinstance(given, (list, tuple)) and value in given):
            continue
        raise ConfigError(
            f"{file}: {name} is {'true' if value is True else repr(value)}, and no file may choose what "
            f"code is run. If you trust it, give {flag} in this command."
        )


def code_flags(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings by which code that is not ours is run, each with the flag that names its value."""
    found = {}
    for name in ("trust_remote_code", "parser", "context_function"):
        value = settings.get(name)
        # parsers of one's own are import paths, ours are names
        if value and (name != "parser" or ":" in str(value)):
            flag = f"--{name.replace('_', '-')}"
            found[name] = flag if value is True else f"{flag} {shlex.quote(str(value))}"
    return found


def validate(kind: type[BaseModel], values: Mapping[str, Any], where: str | None = None) -> Any:
    """``kind(**values)`` with one-line errors.

    Raises:
        ConfigError: an unknown key (with a suggestion) or a value that is not allowed.
    """
    try:
        return kind.model_validate(dict(values))  # keys that are no texts are refused there
    except ValidationError as error:
        lines = [describe(kind, problem) for problem in error.errors()]
        prefix = f"{where}: " if where else ""
        message = prefix + "; ".join(lines)
        raise ConfigError(message if message.endswith("?") else message + ".") from None


def read_settings(path: Path, named_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The keys and values of a YAML file, beside those of the file that its ``extends`` names.

    What the file says itself wins; mappings are joined, lists are not. ``named_by``: files that extend it.

    Raises:
        DataError: a file is missing.
        ConfigError: it is no mapping, or extends itself.
    """
    try:
        values = load_yaml(read_text(path))
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if values is None:  # nothing but comments
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(values).__name__}.")
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends: expected the path of one file, found {type(base).__name__}.")
    chain = (*named_by, path.resolve())
    other = path.parent / base
    if other.resolve() in chain:
        raise ConfigError(f"{path}: extends: {base} extends this file. Take extends out of one of them.")
    return _joined(read_settings(other, chain), values)


def settings_text(path: Path) -> str:
    """A file of settings as one text that needs no other file: as it is, if it extends none."""
    import yaml

    text = read_text(path)
    given = load_yaml(text)
    if not isinstance(given, dict) or "extends" not in given:
        return text
    return str(yaml.safe_dump(read_settings(path), sort_keys=False, allow_unicode=True))


def _joined(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    joined = dict(base)
    for name, value in values.items():
        inner = joined.get(name)
        if isinstance(inner, dict) and isinstance(value, dict):
            value = _joined(inner, value)
        joined[name] = value
    return joined


def _with_flags(values: dict[str, Any], flags: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    for name, value in flags.items():
        if value is None:
            continue
        *sections, leaf = name.split(".")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
            if not isinstance(inner, dict):
                kind = type(inner).__name__
                raise ConfigError(f"{prefix}{section}: expected keys and values, found {kind}.")
        inner[leaf] = value
    return values


def describe(kind: type[BaseModel], problem: Any) -> str:
    """One of pydantic's problems with ``kind`` as a phrase: its place, what is wrong, a suggestion."""
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        section: type[BaseModel] = kind
        for part in problem["loc"][:-1]:
            if isinstance(part, int):  # a place in a list
                continue
            annotation = section.model_fields[str(part)].annotation
            for inner in (annotation, *typing.get_args(annotation)):
                # Python 3.10 takes list[int] for a class, and then issubclass does not
                plain = typing.get_origin(inner) is None and isinstance(inner, type)
                if plain and issubclass(inner, BaseModel):
                    section = inner
        return f"unknown key '{place}'.{suggest(str(problem['loc'][-1]), list(section.model_fields))}".rstrip(
            "."
        )
    message = problem["msg"].removeprefix("Value error, ").rstrip(".")
    message = message[:1].lower() + message[1:] if problem["type"] != "value_error" else message
    if isinstance(problem["input"], bool) and problem["type"] in ("literal_error", "string_type"):
        words = "yes and on" if problem["input"] else "no and off"
        truth = str(problem["input"]).lower()
        message += f"; YAML takes {words} without quotation marks for {truth}: write them in such"
    return f"{place}: {message}" if place else message
