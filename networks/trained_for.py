"""What weights were trained for, kept beside them: the network, and what it sees.

Most networks would run on slices of another size or scale, and segment badly without a word.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import DataError

__all__ = ["check_values", "differences", "is_number", "plain_intensity", "plain_values", "record_of", "trained_values"]


logger = logging.getLogger(__name__)

NO_OPTIONS = ("network", "shipped")


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


def trained_values(weights: str | Path, **usual: Any) -> dict[str, Any]:
    """What some weights were trained for, by the ``.json`` beside them.

    Args:
        weights: their file.
        usual: values of what the file does not tell, or where there is none.

    Returns:
        Values by name.

    Raises:
        DataError: when the file is damaged.
    """
    if Path(weights).is_file() and not record_of(weights).is_file():
        logger.warning(f"no {record_of(weights)}: the config's values are taken for those {weights} was trained for.")
    return {**usual, **_read(record_of(weights))}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return plain_values(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(f"Cannot read {path}, what the weights beside it were trained for: {error}.") from error


def plain_intensity(value: Any) -> Any:
    """An intensity in one way of writing, also of weights whose config named MONAI's transform itself.

    Args:
        value: a text, or the dictionary of a transform in a config.

    Returns:
        The text that means the same; anything else unchanged.
    """
    if isinstance(value, str):
        kind, *numbers = value.split() or [""]
        return " ".join([kind, *(f"{float(n):.15g}" if is_number(n) else n for n in numbers)])
    if not isinstance(value, dict):
        return value
    own = {key: v for key, v in value.items() if key not in ("_target_", "keys")}
    match value.get("_target_", "").rpartition(".")[2], own:
        case ["ScaleIntensityd", {**rest}] if not rest:
            return "minmax"
        case ["NormalizeIntensityd", {**rest}] if not rest:
            return "zscore"
        case [
            "ScaleIntensityRangePercentilesd",
            {"lower": low, "upper": high, "b_min": 0, "b_max": 1, "clip": True, **rest},
        ] if not rest:
            return f"percentiles {low:g} {high:g}"
        case ["ScaleIntensityRanged", {"a_min": low, "a_max": high, "b_min": 0, "b_max": 1, **rest}] if rest == {
            "clip": True
        } or (
            not rest and (low, high) == (0, 255)
        ):  # no picture has more
            return f"window {low:g} {high:g}"
    return value


def is_number(text: str) -> bool:
    """Whether a text is a finite decimal number, such as ``-0.5`` or ``1e6``."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def record_of(weights: str | Path) -> Path:
    """The file beside weights that tells what they were trained for; of ``a.pt.previous`` it is ``a.json.previous``."""
    path = Path(weights)
    if path.suffix == ".previous":
        return path.with_suffix("").with_suffix(".json.previous")
    return path.with_suffix(".json")


def differences(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Options of a command line that would make some values those wanted; empty where they are.

    The network's name and that of the release are no options.

    Args:
        wanted: values by name.
        found: values by name; of one that is absent, nothing is wanted.
    """
    own = plain_values(found)
    wanted = {name: value for name, value in plain_values(wanted).items() if name not in NO_OPTIONS}
    other = {name: value for name, value in wanted.items() if name in own and own[name] != value}
    return " ".join(
        f"--{name} {value}" if isinstance(value, (int, float)) or " " not in str(value) else f'--{name} "{value}"'
        for name, value in other.items()
    )


def check_values(weights: str | Path, values: Mapping[str, Any]) -> None:
    """Refuse weights that were trained for other values than a run has.

    Args:
        weights: their file; without a ``.json`` beside it nothing is known, and nothing is refused.
        values: the run's, by name.

    Raises:
        DataError: naming the other network, or the options that contradict the weights; when the file is damaged.
    """
    record = record_of(weights)
    trained = _read(record)
    name, own = trained.get("network"), values.get("network")
    if name and own and name != own:
        raise DataError(f"{weights} holds a {name}, and this network is a {own}. Choose others by --weights.")
    if other := differences(trained, values):
        raise DataError(
            f"{weights} was trained with other values than this run has. Leave these options out, or give {other}; or "
            f"remove {record}, to use the weights otherwise."
        )
