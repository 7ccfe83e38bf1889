"""Dual-path networks that segment volumes slice by slice, written for MONAI.

Importing this loads PyTorch and the networks. The rooms behind, ``data``, ``engine`` and ``results``, are loaded when
they are first named: a network alone should not wait for MONAI.
"""

from importlib import import_module
from typing import Any

from .danie import DANIE
from .dilateformer import DilateFormer
from .errors import DataError, explain_errors
from .exports import check_export, load_exported, load_torchscript, save_exported
from .fias import FIAS
from .losses import SubsetSumLoss
from .trained_for import check_values, trained_values
from .weights import load_matching, load_weights

_ROOMS = ["data", "engine", "results"]

__all__ = [
    "DANIE",
    "FIAS",
    "DataError",
    "DilateFormer",
    "SubsetSumLoss",
    "check_export",
    "check_values",
    "explain_errors",
    "load_exported",
    "load_matching",
    "load_torchscript",
    "load_weights",
    "save_exported",
    "trained_values",
    *_ROOMS,
]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
