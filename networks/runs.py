"""Around a bundle's run: its config checked before, and kept beside its results; its processes parted after."""

from __future__ import annotations

import atexit
import gc
import json
import math
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.metadata import distributions
from pathlib import Path
from traceback import walk_stack
from typing import Any

import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS

from .errors import DataError
from .files import MOST_CLASSES, whole_file

__all__ = ["check_config", "leave_process_group", "record_run", "running_workflow"]

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
    for name, text in _typed().items():
        if text == "None" and name in config and config[name] not in (None, "whole"):
            advice = "whole slices are --field_of_view whole" if name == "field_of_view" else "leave the option out"
            raise DataError(f"--{name} None does not reach the config, whose own {name} would stay: {advice}.")


def _as_typed(name: str, value: Any) -> str:
    """The text of an option that fire took for a number, as it takes ``2026_11`` for 202611."""
    return _typed().get(name, str(value))


def _typed() -> dict[str, str]:
    """The command line's options as they were typed."""
    typed = {}
    for argument, following in zip(sys.argv, [*sys.argv[1:], ""]):
        option, equals, text = argument.partition("=")
        if option.startswith("--"):
            typed[option[2:].replace("-", "_")] = text if equals else following
    return typed


def record_run(output_dir: str | Path, name: str, *cases: Sequence[Mapping[str, Any]]) -> Path:
    """Keep what a bundle's run is made of beside its results.

    ``NAME.json`` is the config with all overrides, which runs again by ``--config_file``, with the versions of
    all packages, the git revision of this code and the machine under ``_run_``. It is written anew only when
    one of them changes, so results that are newer come from it. ``NAME_cases.json`` lists the data: under ``cases``
    what the run takes, under ``left_out`` what it found beside them and why it leaves that out.

    Args:
        output_dir: where to write; with several processes, the first one writes.
        name: of the run.
        cases: the data, one list or more; :class:`networks.datasets.Cases` know what was left out.

    Returns:
        Path of ``NAME.json``.
    """
    folder = Path(output_dir)
    workflow = running_workflow()
    config: dict[str, Any] = {}
    if workflow is not None:
        config = dict(workflow.parser.get())
        for key, value in workflow.parser.ref_resolver.resolved_content.items():
            if key == "device" and torch.distributed.is_initialized():
                continue  # each process has its own
            if key in config and isinstance(value, (str, torch.device)):
                config[key] = str(value)
            if key in config and key in config.get("trained_for", {}):
                config[key] = value  # which the weights told
    if "resume" in config:
        config["resume"] = False  # the one value that makes no other results
    config["_run_"] = {
        "revision": _revision(),
        "machine": f"{platform.platform()}, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}",
        "python": platform.python_version(),
        "packages": dict(sorted({d.name: d.version for d in distributions() if d.name}.items())),  # none: half removed
    }
    target = folder / f"{name}.json"
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        left_out = {entry["file"]: entry for found in cases for entry in getattr(found, "left_out", [])}
        data = {"cases": [case for found in cases for case in found], "left_out": list(left_out.values())}
        _write(folder / f"{name}_cases.json", data)
        _write(target, config)
    return target


def leave_process_group() -> None:
    """Wait for the run's other processes and leave them; gloo's threads then end before the interpreter shuts down.

    ``DistributedDataParallel`` keeps them, and the run, of many references in circles, keeps it. One that frees a
    tensor while the interpreter shuts down may abort its process: torchrun takes a finished training for a failed one.
    """
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    atexit.register(gc.collect)  # not now: the run that calls this still holds its network


def _write(file: Path, content: Any) -> None:
    text = json.dumps(content, indent=4, default=str)
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        with whole_file(file) as partial:
            Path(partial).write_text(text, encoding="utf-8")


def running_workflow() -> ConfigWorkflow | None:
    """The workflow whose config is evaluated: MONAI hands it to no expression, so it is found among the callers."""
    callers = (frame.f_locals.get("self") for frame, _ in walk_stack(None))
    return next((caller for caller in callers if isinstance(caller, ConfigWorkflow)), None)


def _revision() -> str | None:
    """Last commit to this package, and whether it was changed since; None where git does not know it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit, changes = (
            subprocess.run([*git, *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in (["log", "-1", "--format=%H", "--", "."], ["status", "--porcelain", "--", "."])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}{', changed' if changes else ''}" if commit else None
