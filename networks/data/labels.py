"""Labels in: their numbers become the bundle's classes, and must belong to their image."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from ..errors import DataError
from .formats import MOST_CLASSES
from .readers import file_of

__all__ = ["CheckLabeld", "MapLabelsd"]


class MapLabelsd(MapTransform):
    """Turn the numbers of a label file into the bundle's classes where the case says how, by its ``"label_values"``.

    :func:`networks.data.layouts.cases` says so for the official datasets. Labels of other cases stay as they are, but
    for what ``values`` says. Numbers within 0.001 of a whole one are that: resampling and scaling leave such.

    Args:
        keys: keys of the labels, loaded.
        values: classes by the numbers in the files, ``{0: 0, 255: 1}``, of cases that do not say.

    Raises:
        DataError: when a label holds a number that has no class.
    """

    def __init__(self, keys: KeysCollection, values: Mapping[int, int] | None = None) -> None:
        super().__init__(keys)
        self.values = None if values is None else {int(raw): value for raw, value in values.items()}  # texts in JSON

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        values = d.pop("label_values", self.values)
        for key in self.key_iterator(d) if values else ():
            label = _rounded(d[key])
            found = label.unique().tolist()
            unknown = [v for v in found if v not in values]
            if unknown:
                raise DataError(
                    f"{file_of(label)} holds the values {unknown[:5]}, expected none but {_ranges(values)}. "
                    "Is it a label of this dataset?"
                )
            mapped = torch.zeros_like(label)
            for value in found:
                mapped[label == value] = values[value]
            d[key] = mapped
        return d


def _ranges(values: Mapping[int, int]) -> str:
    named = sorted(values)
    return f"{named[0]} to {named[-1]}" if len(named) == named[-1] - named[0] + 1 else ", ".join(map(str, named))


class CheckLabeld(MapTransform):
    """Refuse a label that does not belong to its image or holds other classes, before it can spoil a training.

    Args:
        keys: keys of the labels, loaded as ``1, X, Y, Z``.
        num_classes: labels are whole numbers from 0 to ``num_classes - 1``, to within 0.001; they are rounded.
        image_key: key of the image, loaded; its grid must be the label's.

    Raises:
        DataError: when there are more classes than :data:`MOST_CLASSES`, shape or position differs from the image's,
            or a value is fractional or out of range.
    """

    def __init__(self, keys: KeysCollection, num_classes: int, image_key: str = "image") -> None:
        super().__init__(keys)
        if num_classes > MOST_CLASSES:
            raise DataError(f"num_classes is {num_classes}, more than the {MOST_CLASSES} that a label map holds.")
        self.num_classes = num_classes
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        image = d[self.image_key]
        for key in self.key_iterator(d):
            label = d[key]
            file, image_file = file_of(label), file_of(image)
            if label.shape[1:] != image.shape[1:]:
                raise DataError(
                    f"{file} has shape {list(label.shape[1:])}, its image {image_file} {list(image.shape[1:])}: "
                    "the label must lie on the image's grid. Is it the label of another image?"
                )
            if not _same_grid(label, image):
                raise DataError(
                    f"{file} and its image {image_file} have the same shape at different positions: affines\n"
                    f"{label.affine.numpy()}\n{image.affine.numpy()}\nResample the label onto the image first, or "
                    "name the same unit in both headers."
                )
            d[key] = label = _rounded(label)
            values = label.unique().tolist()
            wrong = [v for v in values if v != int(v) or not 0 <= v < self.num_classes]
            if wrong:
                raise DataError(
                    f"{file} holds the values {wrong[:5]}, expected whole numbers from 0 to {self.num_classes - 1}. "
                    f"{self._mapping(values)}"
                )
        return d

    def _mapping(self, values: Sequence[float]) -> str:
        """What to do about a label's values."""
        if any(v != int(v) for v in values):
            return "Resample it by the nearest neighbour."
        if len(values) > self.num_classes:
            return "Say which are which class by --label_values, or how many classes there are by --num_classes."
        mapping = {int(v): i for i, v in enumerate(values)}
        return f'Say which is which class, as by --label_values "{mapping}", or how many there are by --num_classes.'


def _rounded(label: Any) -> Any:
    """Whole numbers instead of such as are within 0.001 of them; a label with others stays as it is."""
    whole = label.round()
    return whole if bool((label - whole).abs().max() <= 1e-3) else label


def _same_grid(a: MetaTensor, b: MetaTensor) -> bool:
    """Whether the corners of two grids of one shape lie within half a voxel of each other."""
    corners = torch.tensor([[*map(int, np.unravel_index(i, (2, 2, 2))), 1] for i in range(8)], dtype=torch.float64)
    corners[:, :3] *= torch.tensor(a.shape[1:]) - 1
    affine_a, affine_b = a.affine.double(), b.affine.double()
    distance = (corners @ (affine_a - affine_b).T)[:, :3].norm(dim=1).max()
    return bool(distance <= affine_a[:3, :3].norm(dim=0).min() / 2)
