"""What a user can mend: every such mistake is one line that names the place and the way out."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """A mistake of the caller, not of the library.

    The command line prints ``str(error)`` without a traceback and exits with code 2. The message
    says what was given, what is allowed and what to do.
    """


class DataError(UserError):
    """Something in the user's rows: a missing file, a bad row, a template that does not fit."""


class ModelError(UserError):
    """A model that cannot be found, read or used for this."""


class ConfigError(UserError):
    """A setting that is unknown, contradictory or impossible."""


class DivergedError(ConfigError):
    """Training diverged at every learning rate that was tried.

    Attributes:
        rates: what each came to, in words.
    """

    def __init__(self, message: str, rates: str) -> None:
        super().__init__(message)
        self.rates = rates


class RunFolderError(UserError):
    """An output folder that holds something else, or a store that does not match."""


# Names are compared letter by letter: more or longer ones would take minutes.
_COMPARED = 2000
_LONGEST_NAME = 200


def suggest(name: str, known: Sequence[str]) -> str:
    """`` Did you mean 'x'?`` for the closest of the first 2000 known names, else an empty string."""
    import difflib

    if len(name) > _LONGEST_NAME:
        return ""
    close = difflib.get_close_matches(name, known[:_COMPARED], n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
