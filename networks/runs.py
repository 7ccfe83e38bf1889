"""Around a bundle's run: its config checked before, and kept beside its results; its processes parted after."""

from __future__ import annotations

import atexit
import gc
import json
import platform
import re
import subprocess
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
from .files import whole_file

__all__ = ["check_config", "differences", "leave_process_group", "network_values", "record_run"]

NETWORK_VALUES = ("in_channels", "num_classes", "size", "image_size", "field_of_view", "intensity")
"""What weights are trained for: the network and what it sees. Evaluation and inference need the same."""


def check_config() -> None:
    """Refuse a value that the running bundle was given under a name or of a type that it does not know.

    MONAI's runner takes any: ``--epoch 5`` would train for 300. Known is what one of the files beside the config
    names, or anything refers to, or MONAI adds of its own accord. In evaluation and inference, :func:`network_values`
    are refused too where they are not those that ``model.json`` beside the weights names: most networks would run,
    and segment badly.

    Raises:
        DataError: naming the value and the nearest known name, the expected type, or the weights' value.
    """
    workflow = _workflow()
    if workflow is None:
        return
    known: dict[str, Any] = {}
    for file in sorted(workflow.config_root_path.glob("*")):
        if file.suffix in (".json", ".yaml", ".yml") and file.stem not in ("metadata", "modern"):
            content = ConfigParser.load_config_file(file)
            known |= content if isinstance(content, dict) else {}
    config = workflow.parser.get()
    added: Any = DEFAULT_MLFLOW_SETTINGS["configs"]
    used = {*added, *re.findall(r"@(\w+)", json.dumps(config, default=str))}
    for name, value in config.items():
        if name in known:
            _check_type(name, value, known[name])
        elif known and name not in used and not name.startswith("_"):
            near = get_close_matches(name, known, 1)
            raise DataError(f"This bundle has no value {name}.{f' Is it {near[0]}?' if near else ''}")
    file = Path(str(workflow.parser.get_parsed_content("ckpt_dir", default="."))) / "model.json"
    if {"evaluating", "inferring"} & config.keys() and file.is_file():
        trained = json.loads(file.read_text(encoding="utf-8"))
        if other := differences(trained, network_values()):
            raise DataError(
                f"{file.with_suffix('.pt')} was trained with other values than this run has. Add {other}"
                f" (or remove {file}, to use it otherwise)."
            )


def network_values() -> dict[str, Any]:
    """Of the running bundle's config, the values that weights are trained for; none where no bundle is running."""
    workflow = _workflow()
    config = {} if workflow is None else workflow.parser.get()
    return json.loads(json.dumps({name: config[name] for name in NETWORK_VALUES if name in config}, default=str))


def differences(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Options of a command line that would make some values those wanted; empty where they are.

    Args:
        wanted: values by name.
        found: values by name; of one that is absent, nothing is wanted.
    """
    other = {name: value for name, value in wanted.items() if name in found and found[name] != value}
    return " ".join(
        f'--{name} "{value}"' if isinstance(value, dict) else f"--{name} {value}" for name, value in other.items()
    )


def _check_type(name: str, value: Any, usual: Any) -> None:
    """By the value in the config file; a text that refers to something or is an expression may become anything."""
    if isinstance(value, str) and value.startswith(("$", "@", "%")):
        return
    if isinstance(value, str) and value.lower() in ("true", "false"):
        raise DataError(f"{name} got the text {value!r}, which counts as true: write True or False.")
    if isinstance(usual, bool) and isinstance(value, str) and name != "pretrained":
        raise DataError(f"{name} is True or False, got {value!r}.")
    number = isinstance(usual, (int, float)) and not isinstance(usual, bool)
    whole = isinstance(usual, int) and usual not in (0, 1)  # a record may hold these of a share
    if number and (isinstance(value, bool) or not isinstance(value, int if whole else (int, float))):
        raise DataError(f"{name} is a {'whole ' if whole else ''}number such as {usual}, got {value!r}.")
    if isinstance(usual, list) and not isinstance(value, (list, tuple)):
        raise DataError(f"{name} is a list such as {usual}, got {value!r}.")


def record_run(output_dir: str | Path, name: str, cases: Sequence[Mapping[str, Any]]) -> Path:
    """Keep what a bundle's run is made of beside its results.

    ``NAME.json`` is the config with all overrides, which runs again by ``--config_file``, with the versions of
    all packages, the git revision of this code and the machine under ``_run_``. It is written anew only when
    one of them changes, so results that are newer come from it. ``NAME_cases.json`` lists the data.

    Args:
        output_dir: where to write; with several processes, the first one writes.
        name: of the run.
        cases: the data.

    Returns:
        Path of ``NAME.json``.
    """
    folder = Path(output_dir)
    workflow = _workflow()
    config: dict[str, Any] = {}
    if workflow is not None:
        config = dict(workflow.parser.get())
        for key, value in workflow.parser.ref_resolver.resolved_content.items():
            if key == "device" and torch.distributed.is_initialized():
                continue  # each process has its own
            if key in config and isinstance(value, (str, torch.device)):
                config[key] = str(value)
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
        _write(folder / f"{name}_cases.json", cases)
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


def _workflow() -> ConfigWorkflow | None:
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
