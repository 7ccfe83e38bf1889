"""What a run was: its config, cases and versions, kept beside its results."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from ..storage import whole_file
from .workflow import running_workflow

__all__ = ["record_run"]


def record_run(record: str | Path, *cases: Sequence[Mapping[str, Any]]) -> None:
    """Keep what a bundle's run is made of beside its results.

    The record is the config with all overrides, which runs again by ``--config_file``, with the versions of
    all packages, the git revision of this code and the machine under ``_run_``. It is written anew only when
    one of them changes, so results that are newer come from it. Beside ``NAME.json``, ``NAME_cases.json`` lists the
    data: under ``cases`` what the run takes, under ``left_out`` what it found beside them and why it leaves that out.

    Args:
        record: the file to write; with several processes, the first one writes.
        cases: the data, one list or more; :class:`networks.data.folders.Cases` know what was left out.
    """
    target = Path(record)
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
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        left_out = {entry["file"]: entry for found in cases for entry in getattr(found, "left_out", [])}
        data = {"cases": [case for found in cases for case in found], "left_out": list(left_out.values())}
        _write(target.with_name(f"{target.stem}_cases.json"), data)
        _write(target, config)


def _write(file: Path, content: Any) -> None:
    text = json.dumps(content, indent=4, default=str)
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        with whole_file(file) as partial:
            Path(partial).write_text(text, encoding="utf-8")


def _revision() -> str | None:
    """Last commit to this package, and whether it was changed since; None where git does not know it."""
    git = ["git", "-C", str(Path(__file__).parents[1])]
    try:
        commit, changes = (
            subprocess.run([*git, *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in (["log", "-1", "--format=%H", "--", "."], ["status", "--porcelain", "--", "."])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}{', changed' if changes else ''}" if commit else None
