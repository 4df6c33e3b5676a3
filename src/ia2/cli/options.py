"""Command-line options made from the settings, so that each is defined once (in ``config.py``)."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import typer

from ia2.config import AdaptConfig, DataOptions, ModelOptions
from ia2.config.reading import load_config
from ia2.data.examples import unescape
from ia2.utils.errors import ConfigError
from ia2.utils.user_files import strict_json

_SECTIONS = {
    "adapter": "Adapter",
    "align": "Alignment stage",
    "sft": "Fine-tuning stage",
    "joint": "Joint stage",
    "soft": "Distillation stage",
    "constant": "Constant stage",
}


def with_settings(
    kind: type[AdaptConfig], leave_out: tuple[str, ...] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command every setting of ``kind`` as an option, and ``--config``.

    The command itself takes ``config`` (validated; flags win over the file) and its own options.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        names = _options(kind, leave_out)

        @functools.wraps(command)
        def run(config_file: Path | None = None, **given: Any) -> None:
            own = {name: given.pop(name) for name in list(given) if name not in names}
            flags = {names[n][0]: _read(names[n], value) for n, value in given.items() if value is not None}
            command(load_config(kind, config_file, flags), **own)

        own_parameters = [
            p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "config"
        ]
        file = inspect.Parameter(
            "config_file",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                Path | None,
                typer.Option(
                    "--config",
                    help="YAML file with settings; flags win over it.",
                    show_default=False,
                ),
            ],
        )
        settings = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(*entry)
            )
            for name, entry in names.items()
        ]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own_parameters]
        run.__signature__ = inspect.Signature([*settings, file, *parameters])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in [*settings, file, *parameters]}
        return run

    return decorate


# dotted setting name, its field, the panel it is shown in
_Entry = tuple[str, pydantic.fields.FieldInfo, str]


def _options(kind: type[AdaptConfig], leave_out: tuple[str, ...]) -> dict[str, _Entry]:
    """Parameter name → setting, in the order in which help shows them."""
    entries: dict[str, _Entry] = {}
    for name, field in kind.model_fields.items():
        if name in leave_out:
            continue
        if name in _SECTIONS:
            section = typing.cast(type[pydantic.BaseModel], field.annotation)
            for inner, inner_field in section.model_fields.items():
                entries[f"{name}_{inner}"] = (f"{name}.{inner}", inner_field, _SECTIONS[name])
            continue
        panel = "Method"
        if name in ModelOptions.model_fields:
            panel = "Model"
        elif name in DataOptions.model_fields:
            panel = "Data"
        elif name == "output_dir" or name not in AdaptConfig.model_fields:
            panel = "Run"
        entries[name] = (name, field, panel)
    order = ["Run", "Model", "Data", "Method", *_SECTIONS.values()]
    return dict(sorted(entries.items(), key=lambda item: order.index(item[1][2])))


def _annotation(dotted: str, field: pydantic.fields.FieldInfo, panel: str) -> Any:
    flag = flag_of(dotted)
    plain = _plain_type(field.annotation)
    default = field.get_default(call_default_factory=True)
    note = ""
    if default is not None and default != []:
        shown = ",".join(map(str, default)) if isinstance(default, list) else repr(default).strip("'")
        note = f" (default: {shown})"
    option = typer.Option(
        f"{flag}/--no-{flag[2:]}" if plain is bool else flag,
        help=(field.description or "") + note,
        rich_help_panel=panel,
        show_default=False,
    )
    return Annotated[typing.Optional[plain], option]  # noqa: UP045 - typer reads Optional


def _plain_type(annotation: Any) -> type:
    """What the command line reads for a setting: lists, mappings and choices come as text."""
    options = [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        options = [a for a in typing.get_args(annotation) if a is not type(None)]
    kind = options[0]
    if typing.get_origin(kind) is Annotated:  # a number with its bounds
        kind = typing.get_args(kind)[0]
    if kind in (bool, int, float):
        return typing.cast(type, kind)
    return str


def _read(entry: _Entry, value: Any) -> Any:
    dotted, field, _ = entry
    if not isinstance(value, str):
        return value
    if dotted in ("prompt_template", "completion_template", "separator", "context_text"):
        return unescape(value)
    kinds = _kinds(field)
    if dict in kinds:
        return _read_mapping(dotted, value)
    # what may be a text too (layers: `middle-third`, `0,5,6`) reads a list by itself
    if list in kinds and str not in kinds:
        return _read_list(dotted, value)
    return value


def _kinds(field: pydantic.fields.FieldInfo) -> set[Any]:
    """The types that a setting may have, without their parameters."""
    annotation = field.annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return {typing.get_origin(part) or part for part in typing.get_args(annotation)}
    return {typing.get_origin(annotation) or annotation}


def flag_of(dotted: str) -> str:
    """The option of a setting: ``--adapter-peft`` of ``adapter.peft``."""
    return "--" + dotted.replace(".", "-").replace("_", "-")


def _read_mapping(dotted: str, value: str) -> dict[str, Any]:
    """``0=negative,1=positive`` or a JSON object."""
    if value.lstrip().startswith("{"):
        try:
            return dict(strict_json(value))
        except (ValueError, TypeError, RecursionError) as error:
            raise ConfigError(f"{flag_of(dotted)}: not a JSON object: {error}") from None
    pairs = [part.split("=", 1) for part in value.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise ConfigError(
            f"{flag_of(dotted)}: expected 0=negative,1=positive or a JSON object, got {value!r}."
        )
    # raw labels without blanks around them, texts verbatim: they are (parts of) completions
    return _each_once(dotted, [(raw.strip(), unescape(text)) for raw, text in pairs])


def _each_once(dotted: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for place, (key, _) in enumerate(pairs) if key in dict(pairs[:place]))
        raise ConfigError(f"{flag_of(dotted)}: {twice!r} is there twice. Leave one of them out.")
    return found


def _read_list(dotted: str, value: str) -> list[Any]:
    """Comma-separated, or a JSON list."""
    if value.lstrip().startswith("["):
        try:
            return list(strict_json(value))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{flag_of(dotted)}: not a JSON list: {error}") from None
    parts = [part for part in value.split(",") if part.strip()]
    # labels are completions, in which blanks count
    return [unescape(part) if dotted == "labels" else part.strip() for part in parts]


def list_flags(*kinds: type[AdaptConfig]) -> set[str]:
    """Flags that take several values, for ``--learning-rates 1e-4 3e-4``."""
    flags = set()
    for kind in kinds:
        for dotted, field, _ in _options(kind, ()).values():
            if list in _kinds(field):
                flags.add(flag_of(dotted))
    return flags


def gather_lists(arguments: list[str], flags: set[str]) -> list[str]:
    """Join the values that follow a list flag with commas, as its single value."""
    gathered: list[str] = []
    i = 0
    while i < len(arguments):
        gathered.append(arguments[i])
        i += 1
        if gathered[-1] not in flags:
            continue
        values = []
        while i < len(arguments) and not arguments[i].startswith("--"):
            values.append(arguments[i])
            i += 1
        if values:
            gathered.append(",".join(values))
    return gathered


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
BaseModelNow = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Where the base model lies now, if not where it lay: a folder, .gguf file or hub id. Another "
        "model is refused.",
        show_default=False,
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no log lines; warnings only.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace another ia2 run in the output folder.")]
Format = Literal["jsonl", "csv"]

# Code that is not ours: a file may ask for it, but only these flags have it run.
TrustRemoteCode = Annotated[
    bool | None,
    typer.Option("--trust-remote-code", help="Run code that comes with the model.", show_default=False),
]
_MODULE = "module:function"
Parser = Annotated[
    str | None,
    typer.Option(help="Reads free-form answers, where the run has one of one's own.", metavar=_MODULE),
]
Parsers = Annotated[
    list[str] | None,
    typer.Option("--parser", help="Answer parser that a file may name; may be repeated.", metavar=_MODULE),
]
ContextFunctions = Annotated[
    list[str] | None,
    typer.Option(
        "--context-function", help="Context function that a file may name; may be repeated.", metavar=_MODULE
    ),
]


def named_code(
    trust_remote_code: bool | None = None,
    parsers: list[str] | None = None,
    context_functions: list[str] | None = None,
) -> dict[str, Any]:
    """What these flags name, for :func:`ia2.config.reading.refuse_code`."""
    return {
        "trust_remote_code": trust_remote_code,
        "parser": parsers or [],
        "context_function": context_functions or [],
    }
