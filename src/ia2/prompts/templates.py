"""Chat templates are programs that come with a model: what one may use up is bounded."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia2.data.rows import one_line
from ia2.utils.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of one prompt, which takes about a millisecond: seconds of processor time, bytes of memory.
_SECONDS = 10.0
_BYTES = 1 << 29
# Characters that a template may add to what the messages hold, of which it may write some twice.
_CHARACTERS = 1_000_000
_TIMES = 4


class _TooMuch(Exception):
    """A template that would not end."""


def apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], source: str, **settings: Any
) -> str:
    """Messages (``role`` and ``content``) through a tokenizer's chat template, as text.

    Raises:
        DataError: the template refuses the messages, fails, or takes too much time, memory or text.
    """
    size = sum(len(message["content"]) for message in messages)
    other = "Leave --chat out, or choose another model."
    try:
        with _bounded():
            text = str(tokenizer.apply_chat_template(messages, tokenize=False, **settings))  # type: ignore[arg-type]
        if len(text) > _CHARACTERS + _TIMES * size:
            raise _TooMuch(f"{len(text):,} characters of text from {size:,}")
    except _TooMuch as error:
        raise DataError(
            f"{source}: the model's chat template makes too much of the messages ({error}). {other}"
        ) from None
    except MemoryError:
        raise DataError(
            f"{source}: the model's chat template takes more than {_BYTES >> 20} MB of memory. {other}"
        ) from None
    except Exception as error:  # it is a program, and may fail in any way
        roles = ", ".join(message["role"] for message in messages[:8])
        raise DataError(
            f"{source}: the model's chat template refuses the messages ({roles}): "
            f"{one_line(error).rstrip('.')}. Change the messages, or leave --chat out."
        ) from error
    return text


@contextmanager
def _bounded() -> Iterator[None]:
    """Stop what runs inside when it takes too long or too much; the sandbox that it runs in bounds neither.

    Time is bounded in the main thread of POSIX systems, where signals arrive; memory on Linux.
    """

    def stop(*_: Any) -> None:
        raise _TooMuch(f"more than {_SECONDS:g} s of processor time")

    with ExitStack() as stack:
        if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():
            stack.callback(signal.signal, signal.SIGVTALRM, signal.signal(signal.SIGVTALRM, stop))
            stack.callback(signal.setitimer, signal.ITIMER_VIRTUAL, 0)
            # again and again, since an error raised while an object is being deleted is lost
            signal.setitimer(signal.ITIMER_VIRTUAL, _SECONDS, 1.0)
        if Path("/proc/self/statm").is_file():
            _bound_memory(stack)
        yield


def _bound_memory(stack: ExitStack) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    if soft == resource.RLIM_INFINITY or taken + _BYTES < soft:
        stack.callback(resource.setrlimit, resource.RLIMIT_AS, (soft, hard))
        resource.setrlimit(resource.RLIMIT_AS, (taken + _BYTES, hard))
