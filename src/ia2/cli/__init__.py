"""The command line: each command parses, calls the library and prints."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any, NoReturn

import typer

from ia2.cli import analyze, benchmarks, compare, doctor, predict, report, sweep, train
from ia2.cli.boundary import DEBUG, bug, give_up, in_words, open_streams, say
from ia2.cli.options import gather_lists, list_flags
from ia2.config import CurveConfig, ProbeConfig, TrainConfig
from ia2.utils.errors import ConfigError, UserError, suggest
from ia2.utils.logging import printable
from ia2.utils.user_files import EMPTY_PATH

# Old typer raises click's exceptions, new typer its own copies of them; both export this one below them.
_UsageError, _ClickException = typer.BadParameter.__mro__[1:3]

_INTERRUPTED = 130
_LONGEST_LINE = 1600  # characters
_PATH_FLAGS = (
    "--adapter", "--config", "--context-file", "--data", "--data-dir", "--figures", "--model", "--output",
    "--output-dir", "--test-data",
)  # fmt: skip

app = typer.Typer(
    name="ia2",
    help="Fine-tune on a handful of examples: align an adapter with in-context activations, then "
    "fine-tune it. Start with [bold]ia2 demo[/bold], then [bold]ia2 probe[/bold] on your own rows.",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_COMMANDS: dict[str, Callable[..., None]] = {
    "demo": compare.demo,
    "train": train.train,
    "eval": predict.evaluate,
    "predict": predict.predict,
    "compare": compare.compare,
    "curve": compare.curve,
    "probe": train.probe,
    "analyze": analyze.analyze,
    "doctor": doctor.doctor,
    "sweep": sweep.sweep,
    "report": report.report,
    "env": doctor.env,
}
for name, command in _COMMANDS.items():
    app.command(name)(command)
app.add_typer(benchmarks.app, name="benchmarks")


@app.callback(invoke_without_command=True)
def _version(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version.", is_eager=True),
) -> None:
    if version:
        from ia2 import __version__

        print(__version__)
        raise typer.Exit


@cache
def _commands() -> Any:
    """What typer makes of the functions: once a process, since reading all their options takes a while."""
    return typer.main.get_command(app)


def main(arguments: list[str] | None = None) -> None:
    """Run a command.

    A mistake of the user, or of the machine, is one line on stderr and exit code 2; a mistake of ours is one
    line, exit code 1 and a file with its traceback (with ``IA2_DEBUG=1`` the traceback itself).
    """
    given = sys.argv[1:] if arguments is None else arguments
    lists = list_flags(TrainConfig, CurveConfig, ProbeConfig)
    try:
        open_streams()
        _check_paths(given)
        # not standalone: typer would draw a box of several lines around its own errors
        status = _commands()(gather_lists(given or ["--help"], lists), prog_name="ia2", standalone_mode=False)
        sys.stdout.flush()
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        status = _INTERRUPTED
    except BrokenPipeError:
        # the reader of a pipe has gone (`ia2 … | head`); nothing to say to it
        give_up(sys.stdout)
        sys.exit(1)
    except Exception as error:
        if isinstance(error, _ClickException):
            _fail(_usage_line(error))
        if os.environ.get(DEBUG):
            raise
        if (message := in_words(error)) is not None:
            _fail(message)
        say(f"ia2: bug: {bug(error)}")
        sys.exit(1)
    # typer turns an interrupt into this status
    if status == _INTERRUPTED:
        say("\nia2: interrupted; start the same command again to continue.")
    if status:
        sys.exit(status)


def _check_paths(arguments: list[str]) -> None:
    """Refuse paths that are empty, which to ``Path`` are the folder that one is in."""
    for before, argument in pairwise(["", *arguments]):
        flag = argument.removesuffix("=") if argument else before
        if flag in _PATH_FLAGS and (not argument or argument != flag):
            raise ConfigError(f"{flag}: {EMPTY_PATH}.")
        if not argument and not before.startswith("-"):
            raise ConfigError(f"{EMPTY_PATH}.")


def _usage_line(error: Any) -> str:
    """What typer says of a wrong flag or command, in one line with the way out."""
    message = error.format_message()
    context = getattr(error, "ctx", None)
    if context is None:
        return str(message)
    if hasattr(error, "possibilities") and getattr(error, "option_name", None):
        flags = [flag for p in context.command.params for flag in (*p.opts, *p.secondary_opts)]
        message = f"unknown option {error.option_name}.{suggest(error.option_name, flags)}"
    elif message.startswith("No such command") and "Did you mean" not in message:
        known = list(context.command.commands)
        near = suggest(message.split("'")[1], known) or f" There are {', '.join(known)}."
        message = f"{message.rstrip('.')}.{near}"
    return f"{message.rstrip('.')}{'' if message.endswith('?') else '.'} See {context.command_path} --help."


def _fail(message: str) -> NoReturn:
    line = " ".join(message.splitlines())
    if len(line) > _LONGEST_LINE:  # the place is at its beginning, the way out at its end
        line = f"{line[: _LONGEST_LINE // 2]} … {line[-_LONGEST_LINE // 2 :]}"
    say(f"ia2: error: {printable(line)}")
    sys.exit(2)
