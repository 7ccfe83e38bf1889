"""Errors that a person can act on, and how they reach that person."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Collection
from types import TracebackType

__all__ = ["DataError", "WriteError", "beginning", "check_option", "explain_errors", "lacks_memory", "sentence"]

_WRITING = {
    errno.ENOSPC: "Free some space",
    errno.EDQUOT: "Free some of your quota",
    errno.EFBIG: "Raise the limit on file sizes",
    errno.EROFS: "Mount it for writing",
}
"""Errors that only writing can meet, and what to do."""

_REMEDIES = {
    **_WRITING,
    errno.EACCES: "Ask for the right to it",
    errno.EPERM: "Ask for the right to it",
    errno.EEXIST: "Move it away",
    errno.ENOTDIR: "Name a folder",
    errno.EISDIR: "Name a file",
}


class DataError(ValueError):
    """A file or value that cannot be used: the message names it, what is wrong with it and what to do."""

    def __str__(self) -> str:
        text = super().__str__()
        if not text.startswith(f"Caught {type(self).__name__} in "):
            return text
        # A DataLoader's worker passes its errors on as text, below their traceback.
        return re.split(rf"^(?:\w+\.)*{type(self).__name__}: ", text, flags=re.MULTILINE)[-1].strip()


class WriteError(OSError):
    """A file that cannot be written: no other can be either, so whatever writes many stops."""


def beginning(error: BaseException) -> BaseException:
    """What began an error, which MONAI wraps once per transform, expression and config on its way up.

    Args:
        error: any error.

    Returns:
        The first :class:`DataError` or :class:`WriteError` that it came from, else the last of its causes.
    """
    while error.__cause__ is not None and not isinstance(error, (DataError, WriteError)):
        error = error.__cause__
    return error


def lacks_memory(error: BaseException) -> bool:
    """Whether an error is a lack of memory. numpy has a class for it; torch and ITK have the word alone."""
    return isinstance(error, MemoryError) or "allocate" in str(error)


def sentence(error: BaseException) -> str | None:
    """What to tell a person of an error.

    MONAI wraps an error once per transform, expression and config on its way up.

    Args:
        error: any error.

    Returns:
        The sentence of what began it: a :class:`DataError`, a file that is not there, one that cannot be read or
        written, a disk that is full. None for other errors, whose traceback is needed.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (DataError, FileNotFoundError)):
            return str(cause)
        if isinstance(cause, OSError) and (isinstance(cause, WriteError) or cause.errno in _REMEDIES):
            return _of_file(cause)
        cause = cause.__cause__
    return None


def _of_file(error: OSError) -> str:
    writing = isinstance(error, WriteError) or error.errno in _WRITING
    name = "a file" if error.filename is None else error.filename
    remedy = _REMEDIES.get(error.errno or 0, "Look after the disk")
    place = "choose another place for it" if writing else "choose another file or folder"
    return f"Cannot {'write' if writing else 'use'} {name}: {error.strerror or error}. {remedy}, or {place}."


def explain_errors() -> None:
    """Let a program that ends on an error that has a :func:`sentence` say that alone.

    The bundle runner ends on ``Failed to evaluate ConfigExpression``. Any other error keeps its full traceback. The
    exit status stays 1. Names of files that are not UTF-8 are printed with escapes.
    """
    default = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        text = sentence(error)
        if text is None:
            default(kind, error, trace)
        else:
            print(f"\nError: {text}", file=sys.stderr)

    sys.excepthook = hook
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):  # not of a notebook's
            reconfigure(errors="backslashreplace")


def check_option(name: str, value: str, options: Collection[str]) -> None:
    """Refuse a value that is none of an argument's options.

    Args:
        name: the argument.
        value: what it was given.
        options: what it takes.

    Raises:
        DataError: naming all three.
    """
    if value not in options:
        raise DataError(f"{name} is one of {', '.join(map(repr, options))}, got {value!r}.")
