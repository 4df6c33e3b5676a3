"""The command line: each command parses, calls the library and prints."""

from __future__ import annotations

import errno
import sys

import typer

from ia2.cli import compare, demo, env, evaluate, predict, probe, train
from ia2.cli.options import gather_lists, list_flags
from ia2.config import CompareConfig, ProbeConfig, TrainConfig
from ia2.errors import UserError

app = typer.Typer(
    name="ia2",
    help="Fine-tune on a handful of examples: align an adapter with in-context activations, then "
    "fine-tune it. Start with [bold]ia2 demo[/bold], then [bold]ia2 probe[/bold] on your own rows.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)
app.command("predict")(predict.predict)
app.command("compare")(compare.compare)
app.command("probe")(probe.probe)
app.command("env")(env.env)


@app.callback(invoke_without_command=True)
def _version(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version.", is_eager=True),
) -> None:
    if version:
        from ia2 import __version__

        print(__version__)
        raise typer.Exit


def main(arguments: list[str] | None = None) -> None:
    """Run a command; a user's mistake is one line on stderr and exit code 2."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        app(
            gather_lists(given, list_flags(TrainConfig, CompareConfig, ProbeConfig)),
            prog_name="ia2",
        )
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        print("\nia2: interrupted; start the same command again to continue.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # the reader of a pipe has gone (`ia2 … | head`); nothing to say to it
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _fail(f"{error.filename or 'disk'}: no space left on the device. Free some and run again.")


def _fail(message: str) -> None:
    print("ia2: error: " + " ".join(message.split("\n")), file=sys.stderr)
    sys.exit(2)
