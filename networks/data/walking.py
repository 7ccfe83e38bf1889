"""The way through the folders below one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["below"]


def below(folder: Path, left_out: list[dict[str, str]]) -> Iterator[Path]:
    """All files and folders in a folder; each real folder is entered once, by a link only where no other way leads.

    Args:
        folder: where to begin.
        left_out: gets ``{"file", "why"}`` of each folder that cannot be read.
    """

    def note(error: OSError) -> None:
        left_out.append({"file": str(error.filename), "why": f"not to be read ({error.strerror})"})

    entered: set[str] = set()
    starts = [folder]
    while starts:
        for root, names, files in os.walk(starts.pop(0), onerror=note):
            try:
                os.stat(os.path.join(root, "."))
            except OSError as error:  # a folder that shows its names, and lets nobody in
                error.filename = root
                note(error)
                names.clear()
                continue
            if (real := os.path.realpath(root)) in entered:
                names.clear()
                continue
            entered.add(real)
            names[:] = [name for name in names if not name.startswith(".")]
            paths = [Path(root, name) for name in (*names, *files)]
            starts += sorted(path for path in paths[: len(names)] if path.is_symlink())
            yield from paths
