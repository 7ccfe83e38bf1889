"""Grey values and colours of an image scaled for the network, in the way that one plain value names."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from monai.config import KeysCollection
from monai.transforms import (
    MapTransform,
    NormalizeIntensity,
    ScaleIntensity,
    ScaleIntensityRange,
    ScaleIntensityRangePercentiles,
)

from ..errors import DataError
from ..trained_for import is_number

__all__ = ["ScaleIntensityByd"]

_WAYS = '"minmax", "percentiles LOW HIGH", "window LOW HIGH" or "zscore"'


class ScaleIntensityByd(MapTransform):
    """Scale each image by one of MONAI's transforms.

    Args:
        keys: keys of the images.
        by: ``"minmax"`` makes the smallest value of an image 0 and the greatest 1; ``"percentiles 0.5 99.5"`` does so
            with these percentiles, and cuts what lies beyond; ``"window -125 275"`` with these values, the same in all
            images; ``"zscore"`` makes the mean 0 and the standard deviation 1.

    Shape:
        images of any shape to floating-point numbers of the same.

    Raises:
        DataError: when ``by`` is none of these.
    """

    def __init__(self, keys: KeysCollection, by: str = "minmax") -> None:
        super().__init__(keys)
        self.scale = _scaler(by)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.scale(d[key])
        return d


def _scaler(by: str) -> Callable[[Any], Any]:
    match by.split() if isinstance(by, str) else []:
        case ["minmax"]:
            return ScaleIntensity()
        case ["zscore"]:
            return NormalizeIntensity()
        case ["percentiles" | "window" as kind, low, high] if (
            is_number(low) and is_number(high) and float(low) < float(high)
        ):
            if kind == "window":
                return ScaleIntensityRange(float(low), float(high), 0.0, 1.0, clip=True)
            if 0 <= float(low) and float(high) <= 100:
                return ScaleIntensityRangePercentiles(float(low), float(high), 0.0, 1.0, clip=True)
    raise DataError(f"intensity is {_WAYS}, two numbers and the lower first, got {by!r}.")
