"""What weights were trained for, kept beside them: the network, and what it sees.

Most networks would run on slices of another size or scale, and segment badly without a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import DataError
from .intensity import plain_intensity

__all__ = ["check_values", "differences", "plain_values"]


def plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values in one way of writing, as JSON holds them.

    Args:
        values: by name; those of older weights too.

    Returns:
        Numbers and texts.
    """
    plain = json.loads(json.dumps(dict(values), default=str))
    if "intensity" in plain:
        plain["intensity"] = plain_intensity(plain["intensity"])
    if plain.get("field_of_view", 0) is None:
        plain["field_of_view"] = "whole"
    return plain


def differences(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Options of a command line that would make some values those wanted; empty where they are.

    Args:
        wanted: values by name.
        found: values by name; of one that is absent, nothing is wanted.
    """
    own = plain_values(found)
    other = {name: value for name, value in plain_values(wanted).items() if name in own and own[name] != value}
    return " ".join(
        f"--{name} {value}" if isinstance(value, (int, float)) or " " not in str(value) else f'--{name} "{value}"'
        for name, value in other.items()
    )


def check_values(file: str | Path, values: Mapping[str, Any]) -> None:
    """Refuse weights that were trained for other values than a run has.

    Args:
        file: the ``model.json`` beside the weights; one that is absent tells nothing, and nothing is refused.
        values: the run's, by name.

    Raises:
        DataError: naming the options that the weights need; when the file is damaged.
    """
    path = Path(file)
    if not path.is_file():
        return
    try:
        trained = json.loads(path.read_text(encoding="utf-8"))
        other = differences(trained, values)
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"Cannot read {path}, what the weights beside it were trained for: {error}.") from error
    if other:
        raise DataError(
            f"{path.with_suffix('.pt')} was trained with other values than this run has. Add {other}, or remove "
            f"{path} to use the weights otherwise."
        )
