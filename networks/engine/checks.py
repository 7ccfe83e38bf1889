"""The values of a run's config are checked before anything is read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS

from ..data.formats import MOST_CLASSES
from ..errors import DataError
from .workflow import running_workflow, typed_options

__all__ = ["check_config"]

COUNTS = {
    "epochs": (1, math.inf),
    "batch_size": (1, math.inf),
    "val_batch_size": (1, math.inf),
    "val_interval": (1, math.inf),
    "num_workers": (0, math.inf),
    "seed": (0, 2**32 - 1),
    "in_channels": (1, math.inf),
    "num_classes": (2, MOST_CLASSES),
    "image_size": (32, math.inf),
}
"""Whole numbers among a bundle's values, and between which they lie."""

SHARES = ("dropout", "empty_weight", "augment_prob", "flip_prob", "warmup", "shift_range")
"""Values from 0 to 1."""


def check_config() -> None:
    """Refuse a value that the running bundle was given under a name or of a kind that it does not know.

    MONAI's runner takes any: ``--epoch 5`` would train for 300. Known is what one of the files beside the config
    names, or anything refers to, or MONAI adds of its own accord. A folder whose name was read as a number is taken as
    it was typed. Outside MONAI's runner nothing is checked.

    Raises:
        DataError: naming the value and the nearest known name, or what it can be.
    """
    workflow = running_workflow()
    if workflow is None:
        return
    known: dict[str, Any] = {}
    for file in sorted(workflow.config_root_path.glob("*")):
        own = file.stem in ("metadata", "modern") or file.stem.endswith("_cases")
        if file.suffix in (".json", ".yaml", ".yml") and not own:
            content = ConfigParser.load_config_file(file)
            known |= content if isinstance(content, dict) else {}
    config = workflow.parser.get()
    _check_nones(config)
    added: Any = DEFAULT_MLFLOW_SETTINGS["configs"]
    used = {*added, *re.findall(r"@(\w+)", json.dumps(config, default=str))}
    for name, value in config.items():
        if name in known or name in COUNTS or name in SHARES:
            _check_value(name, value, known.get(name))
        elif known and name not in used and not name.startswith("_"):
            near = get_close_matches(name, known, 1)
            raise DataError(f"This bundle has no value {name}.{f' Is it {near[0]}?' if near else ''}")
        if name.endswith(("_dir", "_root")) and isinstance(value, (int, float)):
            workflow.parser.ref_resolver.resolved_content[name] = _as_typed(name, value)


def _check_value(name: str, value: Any, usual: Any) -> None:
    """By its name, and by the value in the config file; a text that is an expression may become anything."""
    if isinstance(value, str) and value.startswith(("$", "@", "%")):
        return
    if isinstance(value, str) and value.lower() in ("true", "false"):
        raise DataError(f"{name} got the text {value!r}, which counts as true: write True or False.")
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if name == "device":
        _check_device(value)
    elif name in COUNTS:
        low, high = COUNTS[name]
        if not number or not isinstance(value, int) or not low <= value <= high:
            limit = f"from {low} to {high}" if high < math.inf else f"from {low} up"
            raise DataError(f"{name} is a whole number {limit}, got {value!r}.")
    elif name in SHARES:
        if not number or not 0 <= value <= 1:
            raise DataError(f"{name} is a share from 0 to 1, got {value!r}.")
    elif isinstance(usual, bool):
        if isinstance(value, str) and name != "pretrained":  # which may be a file
            raise DataError(f"{name} is True or False, got {value!r}.")
    elif isinstance(usual, (int, float)) and (not number or value < 0):
        raise DataError(f"{name} is a number from 0 up, such as {usual}, got {value!r}.")
    elif isinstance(usual, list) and not isinstance(value, (list, tuple)):
        raise DataError(f"{name} is a list such as {usual}, got {value!r}.")


def _check_device(value: Any) -> None:
    try:
        torch.empty(0, device=value)
    except (RuntimeError, TypeError, AssertionError) as error:  # AssertionError: torch without CUDA
        gpus = torch.cuda.device_count()
        known = f"cpu, or cuda:N with N below {gpus}" if gpus else "cpu, as there is no GPU here"
        raise DataError(f"device is {known}, got {value!r}.") from error


def _check_nones(config: Mapping[str, Any]) -> None:
    """MONAI's runner leaves out an option whose value is None, and what the config has would stay without a word."""
    for name, text in typed_options().items():
        if text == "None" and name in config and config[name] not in (None, "whole"):
            advice = "whole slices are --field_of_view whole" if name == "field_of_view" else "leave the option out"
            raise DataError(f"--{name} None does not reach the config, whose own {name} would stay: {advice}.")


def _as_typed(name: str, value: Any) -> str:
    """The text of an option that fire took for a number, as it takes ``2026_11`` for 202611."""
    return typed_options().get(name, str(value))
