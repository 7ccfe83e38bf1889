"""Dual-path networks that segment volumes slice by slice, written for MONAI."""

from .dilateformer import DilateFormer
from .fias import FIAS
from .losses import SubsetSumLoss
from .weights import load_weights

__version__ = "0.1.0"
