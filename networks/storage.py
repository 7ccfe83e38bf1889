"""Files that are written whole or not at all, and when they were."""

from __future__ import annotations

import csv
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .errors import WriteError

__all__ = ["changed", "whole_file", "write_csv"]


@contextmanager
def whole_file(target: Path) -> Iterator[str]:
    """A temporary name beside ``target``, renamed to it at the end: the file is there whole or not at all.

    A process that is killed leaves its ``.partial-*``, which nothing reads.

    Args:
        target: its folder is made.

    Yields:
        The name to write to.

    Raises:
        WriteError: when it cannot be written; it names ``target``.
    """
    name = target.parent / f".partial-{secrets.token_hex(8)}{''.join(target.suffixes[-2:])}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield str(name)
        with open(name, "rb") as file:
            os.fsync(file)  # else a power failure could leave the new name and none of the content
        os.replace(name, target)
    except BaseException as error:
        if name.exists():
            name.unlink()
        if isinstance(error, OSError) and _is_of(error, name, target):
            raise WriteError(error.errno, error.strerror or str(error), str(target)) from error
        raise


def changed(file: Path) -> int:
    """When a file came to its place or its content, in nanoseconds: one that is moved or copied there may bring an old
    date along."""
    status = file.stat()
    return max(status.st_mtime_ns, status.st_ctime_ns)


def _is_of(error: OSError, name: Path, target: Path) -> bool:
    """Whether an error is about a file that is written, or its folder, rather than about one that is read for it."""
    about = error.filename
    if about is None:
        return error.errno is not None  # libraries' own words have none
    return str(name) in (about, error.filename2) or Path(about) in target.parents


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a table with a line of column names, whole or not at all; what is not UTF-8 in it becomes escapes."""
    with whole_file(path) as name, open(name, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        csv.writer(file).writerows([columns, *rows])
