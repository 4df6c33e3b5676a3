"""What the machine refuses, in words: full disks, absent memory, errors of the operating system."""

from __future__ import annotations

import errno
import os

# What safetensors and torch.save say of a full disk: they raise no OSError.
_FULL_DISK = (
    "No space left on device",
    "os error 28",
    "iostream error",
    "unexpected pos",
    "PytorchStreamWriter failed writing",
)


def no_space_left(error: BaseException) -> bool:
    """Whether a full disk is what went wrong."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(text in str(error) for text in _FULL_DISK)


_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")


def memory_exhausted(error: BaseException) -> bool:
    """Whether what went wrong is that memory ran out, on the CPU or an accelerator."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _OUT_OF_MEMORY)


_WAYS_OUT = {
    errno.EACCES: "Choose another place, or change its permissions",
    errno.EPERM: "Choose another place, or change its permissions",
    errno.EROFS: "Choose another place",
    errno.ENOENT: "Check the name",
    errno.ENOTDIR: "A file is in the way of a folder; choose another name",
    errno.EEXIST: "A file of that name is in the way; choose another name",
    errno.EISDIR: "Name a file in it",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.ELOOP: "Name the file that the links should lead to",
    errno.EMFILE: "Raise the limit (ulimit -n)",
    errno.ENFILE: "End other programs",
}


def system_trouble(error: OSError, place: object = None) -> str:
    """An error of the operating system as one line: its file (or ``place``), what is wrong, the way out."""
    place = place or error.filename
    place = os.fsdecode(place) if isinstance(place, bytes) else place
    said = error.strerror.lower() if error.strerror else " ".join(str(error).split()).rstrip(".")
    way_out = _WAYS_OUT.get(error.errno or 0, "Mend that and run the same command again")
    return f"{f'{place}: ' if place else ''}{said or type(error).__name__}. {way_out}."
