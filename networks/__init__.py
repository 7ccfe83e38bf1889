"""Dual-path networks that segment volumes slice by slice, written for MONAI.

Importing this loads PyTorch and the networks. What reads files, runs engines and writes results is loaded when it is
first named: a network alone should not wait for MONAI.
"""

from importlib import import_module
from typing import Any

from .danie import DANIE
from .dilateformer import DilateFormer
from .errors import DataError, explain_errors
from .fias import FIAS
from .folding import prepare_for_inference
from .losses import SubsetSumLoss
from .places import bundle_root, weights_in
from .trained_for import check_values, trained_values
from .weights import check_export, load_matching, load_torchscript, load_weights

_ROOMS = ["datasets", "dicom", "files", "handlers", "inference", "intensity", "metrics", "pictures", "readers"]
_ROOMS += ["report", "runs", "slices"]
_IN_ROOMS = {
    "check_config": "runs",
    "check_shares": "inference",
    "leave_process_group": "runs",
    "record_run": "runs",
}

__all__ = [
    "DANIE",
    "FIAS",
    "DataError",
    "DilateFormer",
    "SubsetSumLoss",
    "bundle_root",
    "check_export",
    "check_values",
    "explain_errors",
    "load_matching",
    "load_torchscript",
    "load_weights",
    "prepare_for_inference",
    "trained_values",
    "weights_in",
    *_ROOMS,
    *_IN_ROOMS,
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f".{name}", __name__)
    if name in _IN_ROOMS:
        return getattr(import_module(f".{_IN_ROOMS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
