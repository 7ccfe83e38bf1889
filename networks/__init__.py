"""Dual-path networks that segment volumes slice by slice, written for MONAI."""

from . import datasets, files, handlers, inference, intensity, metrics, report, slices
from .danie import DANIE
from .dilateformer import DilateFormer
from .errors import DataError, explain_errors
from .fias import FIAS
from .folding import prepare_for_inference
from .inference import check_shares
from .losses import SubsetSumLoss
from .runs import check_config, leave_process_group, record_run
from .trained_for import check_values
from .weights import load_matching, load_torchscript, load_weights

__all__ = [
    "DANIE",
    "FIAS",
    "DataError",
    "DilateFormer",
    "SubsetSumLoss",
    "check_config",
    "check_shares",
    "check_values",
    "datasets",
    "explain_errors",
    "files",
    "prepare_for_inference",
    "handlers",
    "inference",
    "intensity",
    "leave_process_group",
    "load_matching",
    "load_torchscript",
    "load_weights",
    "metrics",
    "record_run",
    "report",
    "slices",
]
__version__ = "0.1.0"
