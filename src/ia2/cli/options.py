"""Command-line options: those made from the settings in ``ia2.config``, and those that commands share."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pydantic
import typer

from ia2.config import AdaptConfig, DataOptions, ModelOptions
from ia2.config.reading import load_config
from ia2.data.rows import unescape
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


class Setting(NamedTuple):
    """A setting on the command line: its dotted name, its field, the panel of the help that shows it."""

    name: str
    field: pydantic.fields.FieldInfo
    panel: str

    @property
    def flag(self) -> str:
        """``--adapter-peft`` of ``adapter.peft``."""
        return "--" + self.name.replace(".", "-").replace("_", "-")

    @property
    def kinds(self) -> list[Any]:
        """The types that it may have, without None and their parameters."""
        annotation = self.field.annotation
        is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
        kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)] if is_union else []
        bare = [kind.__origin__ if typing.get_origin(kind) is Annotated else kind for kind in kinds]
        return [typing.get_origin(kind) or kind for kind in bare or [annotation]]

    def annotation(self) -> Any:
        """What typer reads; lists, mappings and choices come as text."""
        kind = self.kinds[0] if self.kinds[0] in (bool, int, float) else str
        default = self.field.get_default(call_default_factory=True)
        note = ""
        if default is not None and default != []:
            shown = ",".join(map(str, default)) if isinstance(default, list) else repr(default).strip("'")
            note = f" (default: {shown})"
        option = typer.Option(
            f"{self.flag}/--no-{self.flag[2:]}" if kind is bool else self.flag,
            help=(self.field.description or "") + note,
            rich_help_panel=self.panel,
            show_default=False,
        )
        return Annotated[typing.Optional[kind], option]  # noqa: UP045 - typer reads Optional

    def read(self, value: Any) -> Any:
        """The value of an option as the settings take it."""
        if not isinstance(value, str):
            return value
        if self.name in ("prompt_template", "completion_template", "separator", "context_text"):
            return unescape(value)
        if dict in self.kinds:
            return self._mapping(value)
        # what may be a text too (layers: `middle-third`, `0,5,6`) reads a list by itself
        if list in self.kinds and str not in self.kinds:
            return self._list(value)
        return value

    def _mapping(self, value: str) -> dict[str, Any]:
        """``0=negative,1=positive`` or a JSON object."""
        if value.lstrip().startswith("{"):
            return dict(self._json(value, "object"))
        found: dict[str, Any] = {}
        for part in value.split(","):
            raw, is_pair, text = part.partition("=")
            raw = raw.strip()
            if not is_pair:
                raise ConfigError(
                    f"{self.flag}: expected 0=negative,1=positive or a JSON object, got {value!r}."
                )
            if raw in found:
                raise ConfigError(f"{self.flag}: {raw!r} is there twice. Leave one of them out.")
            found[raw] = unescape(text)  # verbatim: it is (part of) a completion
        return found

    def _list(self, value: str) -> list[Any]:
        """Comma-separated, or a JSON list."""
        if value.lstrip().startswith("["):
            return list(self._json(value, "list"))
        parts = [part for part in value.split(",") if part.strip()]
        # labels are completions, in which blanks count
        return [unescape(part) if self.name == "labels" else part.strip() for part in parts]

    def _json(self, value: str, kind: str) -> Any:
        try:
            return strict_json(value)
        except (ValueError, TypeError, RecursionError) as error:
            raise ConfigError(f"{self.flag}: not a JSON {kind}: {error}") from None


def settings_of(kind: type[AdaptConfig], leave_out: tuple[str, ...] = ()) -> dict[str, Setting]:
    """Parameter name → setting, in the order in which help shows them."""
    found: dict[str, Setting] = {}
    for name, field in kind.model_fields.items():
        if name in leave_out:
            continue
        if name in _SECTIONS:
            section = typing.cast(type[pydantic.BaseModel], field.annotation)
            for inner, inner_field in section.model_fields.items():
                found[f"{name}_{inner}"] = Setting(f"{name}.{inner}", inner_field, _SECTIONS[name])
            continue
        panel = "Method"
        if name in ModelOptions.model_fields:
            panel = "Model"
        elif name in DataOptions.model_fields:
            panel = "Data"
        elif name == "output_dir" or name not in AdaptConfig.model_fields:
            panel = "Run"
        found[name] = Setting(name, field, panel)
    order = ["Run", "Model", "Data", "Method", *_SECTIONS.values()]
    return dict(sorted(found.items(), key=lambda item: order.index(item[1].panel)))


def with_settings(
    kind: type[AdaptConfig], leave_out: tuple[str, ...] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command every setting of ``kind`` as an option, and ``--config``.

    The command itself takes ``config`` (validated; flags win over the file) and its own options.
    """
    settings = settings_of(kind, leave_out)
    annotations = {name: setting.annotation() for name, setting in settings.items()}
    annotations["config_file"] = _CONFIG

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(config_file: Path | None = None, **given: Any) -> None:
            values = {name: given.pop(name) for name in settings if name in given}
            flags = {settings[n].name: settings[n].read(v) for n, v in values.items() if v is not None}
            command(load_config(kind, config_file, flags), **given)

        by_name = inspect.Parameter.KEYWORD_ONLY
        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [
            *(inspect.Parameter(n, by_name, default=None, annotation=a) for n, a in annotations.items()),
            *(parameter.replace(kind=by_name) for parameter in own if parameter.name != "config"),
        ]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def list_flags(*kinds: type[AdaptConfig]) -> set[str]:
    """Flags that take several values, for ``--learning-rates 1e-4 3e-4``."""
    return {setting.flag for kind in kinds for setting in settings_of(kind).values() if list in setting.kinds}


def gather_lists(arguments: list[str], flags: set[str]) -> list[str]:
    """Join the values that follow a list flag with commas, as its single value."""
    gathered: list[str] = []
    flag_open = False
    for argument in arguments:
        if not flag_open or argument.startswith("--"):
            gathered.append(argument)
            flag_open = argument in flags
        elif gathered[-1] in flags:
            gathered.append(argument)
        else:
            gathered[-1] += f",{argument}"
    return gathered


def option(help: str, *flags: str, default: Any = None, **more: Any) -> Any:
    """An option that is no setting; without a default unless one is given."""
    return typer.Option(default, *flags, help=help, show_default=default not in (None, False), **more)


_CONFIG = Annotated[
    Path | None,
    typer.Option("--config", help="YAML file with settings; flags win over it.", show_default=False),
]
JSON = option("Print the result as JSON on stdout.", "--json", default=False)
QUIET = option("No progress, no log lines; warnings only.", "--quiet", "-q", default=False)
OVERWRITE = option("Replace another ia2 run in the output folder.", "--overwrite", default=False)
BASE_MODEL = option(
    "Where the base model lies now, if not where it lay: a folder, .gguf file or hub id. Another model is "
    "refused.",
    "--model",
)
FIGURES = option("Draw the figures into this folder (SVG).")
# Code that is not ours: a file may ask for it, but only these flags have it run.
_MODULE = "module:function"
TRUST = option("Run code that comes with the model.", "--trust-remote-code")
PARSER = option("Reads free-form answers, where the run has one of one's own.", metavar=_MODULE)
PARSERS = option("Answer parser that a file may name; may be repeated.", "--parser", metavar=_MODULE)
CONTEXT_FUNCTIONS = option(
    "Context function that a file may name; may be repeated.", "--context-function", metavar=_MODULE
)


def named_code(
    trust_remote_code: bool | None = None,
    parsers: list[str] | None = None,
    context_functions: list[str] | None = None,
) -> dict[str, Any]:
    """What these flags name, for :func:`ia2.config.reading.refuse_code`."""
    lists = {"parser": parsers or [], "context_function": context_functions or []}
    return {"trust_remote_code": trust_remote_code, **lists}


def listed(text: str | None) -> list[str]:
    """The parts of a comma-separated option."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]
