"""Errors that a person can act on, and how they reach that person."""

from __future__ import annotations

import sys
from collections.abc import Collection
from types import TracebackType

__all__ = ["DataError", "check_option", "explain_errors"]


class DataError(ValueError):
    """A file that cannot be used: the message names the file, what is wrong with it and what to do."""


def explain_errors() -> None:
    """Let a program that ends on a :class:`DataError` say that sentence alone.

    MONAI wraps an error once per transform, expression and config on its way up, and the bundle runner ends on
    ``Failed to evaluate ConfigExpression``. Any other error keeps its full traceback. The exit status stays 1.
    """
    default = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, (DataError, FileNotFoundError)):
            cause = cause.__cause__
        if cause is None:
            default(kind, error, trace)
        else:
            print(f"\nError: {cause}", file=sys.stderr)

    sys.excepthook = hook


def check_option(name: str, value: str, options: Collection[str]) -> None:
    """Refuse a value that is none of an argument's options.

    Args:
        name: the argument.
        value: what it was given.
        options: what it takes.

    Raises:
        ValueError: naming all three.
    """
    if value not in options:
        raise ValueError(f"{name} is one of {', '.join(map(repr, options))}, got {value!r}.")
