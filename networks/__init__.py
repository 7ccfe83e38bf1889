"""Dual-path networks that segment volumes slice by slice, written for MONAI."""

from . import datasets, slices
from .danie import DANIE
from .dilateformer import DilateFormer
from .errors import DataError, explain_errors
from .fias import FIAS
from .losses import SubsetSumLoss
from .weights import load_weights

__all__ = [
    "DANIE",
    "FIAS",
    "DataError",
    "DilateFormer",
    "SubsetSumLoss",
    "datasets",
    "explain_errors",
    "load_weights",
    "slices",
]
__version__ = "0.1.0"
