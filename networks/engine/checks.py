"""The values of a run's config are checked before anything is read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import torch
from jsonschema import Draft4Validator
from monai.bundle import ConfigParser
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS

from ..data.formats import MOST_CLASSES
from ..errors import DataError
from .engines import ENGINES
from .workflow import running_workflow, typed_options

__all__ = ["VALUES", "check_config"]

Schema = dict[str, Any]


def _whole(low: int, high: int | None = None) -> Schema:
    limit = f"from {low} up" if high is None else f"from {low} to {high}"
    most = {} if high is None else {"maximum": high}
    return {"type": "integer", "minimum": low, **most, "description": f"a whole number {limit}"}


def _text(example: str) -> Schema:
    return {"type": "string", "description": f"a text such as {example}"}


SHARE = {"type": "number", "minimum": 0, "maximum": 1, "description": "a share from 0 to 1"}
POSITIVE = {"type": "number", "minimum": 0, "maximum": 1e300, "description": "a number from 0 up"}
SWITCH = {"type": "boolean", "description": "True or False"}
SWITCH_OR_NONE = {"type": ["boolean", "null"], "description": "True or False"}
PLACE = {"type": ["string", "number"], "description": "a path"}  # a folder called 2026 arrives as a number
TEXTS = {"type": "array", "items": {"type": "string"}, "description": "a list of texts"}

VALUES: dict[str, Schema] = {
    "ckpt_dir": PLACE,
    "output_dir": PLACE,
    "dataset_dir": PLACE,
    "bundle_root": PLACE,
    "weights": PLACE,
    "start_from": PLACE,
    "cache_dir": {"type": ["string", "number", "null"], "description": "a path"},
    "layout": _text("folder"),
    "patient": _text(r"'\D*\d+'"),
    "split": _text("validation"),
    "suffixes": TEXTS,
    "ignore": TEXTS,
    "output_ext": _text(".nii.gz"),
    "label_values": {"type": ["object", "null"], "description": 'numbers and their classes such as "{0: 0, 255: 1}"'},
    "in_channels": _whole(1),
    "num_classes": _whole(2, MOST_CLASSES),
    "image_size": _whole(32),
    "field_of_view": {"type": ["number", "string"], "description": "a number of millimetres, or whole"},
    "intensity": _text("minmax"),
    "empty_weight": SHARE,
    "size": _text("small"),
    "dropout": SHARE,
    "deep_supervision": SWITCH,
    "pretrained": {"type": ["boolean", "string"], "description": "True, False or a path"},
    "epochs": _whole(1),
    "batch_size": _whole(1),
    "learning_rate": POSITIVE,
    "weight_decay": POSITIVE,
    "warmup": SHARE,
    "average_weights": SWITCH,
    "ema_momentum": SHARE,
    "dice_weight": POSITIVE,
    "ce_weight": POSITIVE,
    "val_interval": _whole(1),
    "seed": _whole(0, 2**32 - 1),
    "augment_prob": SHARE,
    "rotate_range": POSITIVE,
    "zoom_range": POSITIVE,
    "shift_range": SHARE,
    "flip_prob": SHARE,
    "noise_prob": SHARE,
    "blur_prob": SHARE,
    "brightness_prob": SHARE,
    "contrast_prob": SHARE,
    "amp": SWITCH,
    "bfloat16": SWITCH_OR_NONE,
    "engine": {"enum": [*ENGINES], "description": f"one of {', '.join(ENGINES)}"},
    "compile": SWITCH,
    "num_workers": _whole(0),
    "val_batch_size": _whole(1),
    "cache_validation": SWITCH,
    "resume": SWITCH,
    "first_process": SWITCH,
    "convention": _text("strict"),
    "metrics": TEXTS,
    "pooled_metrics": TEXTS,
    "flips": SWITCH,
    "overlay": SWITCH,
    "measures": SWITCH,
    "dicom_seg": SWITCH,
    "uncertainty": SWITCH,
    "probabilities": SWITCH,
    "label_numbers": {"type": ["object", "null"], "description": 'classes and numbers such as "{1: 3, 2: 2, 3: 1}"'},
    "ed_frame": {"type": ["integer", "null"], "minimum": 0, "description": "a number from 0 up"},
    "es_frame": {"type": ["integer", "null"], "minimum": 0, "description": "a number from 0 up"},
}
"""JSON schema of each plain value of the bundles' configs, with a description for people."""

_CHECKS = {name: Draft4Validator(schema) for name, schema in VALUES.items()}  # of draft 4, where 5.0 is no integer


def check_config() -> None:
    """Refuse a value that the running bundle was given under a name or of a kind that it does not know.

    MONAI's runner takes any: ``--epoch 5`` would train for 300. Known is what :data:`VALUES` or one of the files beside
    the config names, or anything refers to, or MONAI adds of its own accord. A folder whose name was read as a number
    is taken as it was typed. Outside MONAI's runner nothing is checked.

    Raises:
        DataError: naming the value and the nearest known name, or what it can be.
    """
    workflow = running_workflow()
    if workflow is None:
        return
    config = workflow.parser.get()
    _check_nones(config)
    known = _known_names(config, workflow.config_root_path)
    for name, value in config.items():
        if name not in known:
            near = get_close_matches(name, known, 1)
            raise DataError(f"This bundle has no value {name}.{f' Is it {near[0]}?' if near else ''}")
        _check_value(name, value)
        if name.endswith(("_dir", "_root")) and isinstance(value, (int, float)):
            # No public way sets a value that another one may have been resolved from; tested by a folder called 2026.
            workflow.parser.ref_resolver.resolved_content[name] = typed_options().get(name, str(value))


def _known_names(config: Mapping[str, Any], folder: Any) -> set[str]:
    added: Any = DEFAULT_MLFLOW_SETTINGS["configs"]
    referred = re.findall(r"@(\w+)", json.dumps(config, default=str))
    known = {*VALUES, *added, *referred, *(name for name in config if name.startswith("_"))}
    for file in sorted(folder.glob("*")):
        if file.suffix in (".json", ".yaml", ".yml") and file.stem != "metadata" and not file.stem.endswith("_cases"):
            content = ConfigParser.load_config_file(file)
            known |= set(content) if isinstance(content, dict) else set()
    return known


def _check_value(name: str, value: Any) -> None:
    """By its schema; a text that is an expression may become anything."""
    if isinstance(value, str) and value.startswith(("$", "@", "%")):
        return
    if name == "device":
        _check_device(value)
    elif name in VALUES and not _CHECKS[name].is_valid(list(value) if isinstance(value, tuple) else value):
        raise DataError(f"{name} is {VALUES[name]['description']}, got {value!r}.")


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
