"""Errors that a person can act on, and how they reach that person."""

from __future__ import annotations

import errno
import sys
from collections.abc import Collection
from types import TracebackType

__all__ = ["DataError", "check_option", "explain_errors", "sentence"]

_ELSEWHERE = "or write elsewhere by --bundle_root, --output_dir, --ckpt_dir."
_REMEDIES = {
    errno.ENOSPC: f"Free some space, {_ELSEWHERE}",
    errno.EDQUOT: f"Free some of your quota, {_ELSEWHERE}",
    errno.EFBIG: f"Raise the limit on file sizes, {_ELSEWHERE}",
    errno.EACCES: f"Ask for the right to it, {_ELSEWHERE}",
    errno.EPERM: f"Ask for the right to it, {_ELSEWHERE}",
    errno.EROFS: f"Mount it for writing, {_ELSEWHERE}",
    errno.EEXIST: f"Move it away, {_ELSEWHERE}",
    errno.ENOTDIR: f"Name a folder, {_ELSEWHERE}",
}


class DataError(ValueError):
    """A file or value that cannot be used: the message names it, what is wrong with it and what to do."""

    def __str__(self) -> str:
        # A DataLoader's worker passes its errors on as text, below their traceback.
        return super().__str__().rpartition(f"{type(self).__name__}: ")[2].strip()


def sentence(error: BaseException) -> str | None:
    """What to tell a person of an error.

    MONAI wraps an error once per transform, expression and config on its way up.

    Args:
        error: any error.

    Returns:
        The sentence of what began it: a :class:`DataError`, a file that is not there, a disk that is full or not to be
        written to. None for other errors, whose traceback is needed.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (DataError, FileNotFoundError)):
            return str(cause)
        if isinstance(cause, OSError) and cause.errno in _REMEDIES:
            return f"Cannot write {cause.filename}: {cause.strerror}. {_REMEDIES[cause.errno]}"
        cause = cause.__cause__
    return None


def explain_errors() -> None:
    """Let a program that ends on an error that has a :func:`sentence` say that alone.

    The bundle runner ends on ``Failed to evaluate ConfigExpression``. Any other error keeps its full traceback. The
    exit status stays 1.
    """
    default = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        text = sentence(error)
        if text is None:
            default(kind, error, trace)
        else:
            print(f"\nError: {text}", file=sys.stderr)

    sys.excepthook = hook


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
