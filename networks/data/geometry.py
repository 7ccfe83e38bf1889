"""Volumes turned, cut and resized so that a 2D network sees slices, and back."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Crop, InvertibleTransform, MapTransform, Orientation, Pad
from monai.utils import TraceKeys
from torch import Tensor

from ..errors import DataError

__all__ = ["FieldOfViewd", "SliceOrientationd", "SlicesFirstd", "seen_voxels", "slices_along"]


class SliceOrientationd(MapTransform, InvertibleTransform):
    """Turn volumes so that slices lie along the last axis, in-plane axes towards right, anterior, superior.

    Slices are taken across the direction in which the volume is thick: an axis of one voxel, else the axis whose
    spacing is at least ``thick`` times any other's, else the superior axis. The first key's volume decides for all: an
    image and its label are cut alike, whatever their headers' last digits say. For axial volumes this is
    ``Orientationd(axcodes="RAS")``. It differs where that would cut across the acquired slices: short-axis MR of a
    tilted heart, stored with its true oblique axes, has slices whose normal may be nearest to any of the three.

    Args:
        keys: keys of ``MetaTensor`` volumes ``C, X, Y, Z``.
        thick: ratio of spacings from which an axis is the slice axis.
    """

    axcodes = ("ASR", "RSA", "RAS")

    def __init__(self, keys: KeysCollection, thick: float = 1.5) -> None:
        super().__init__(keys)
        self.thick = thick
        labels = (("L", "R"), ("P", "A"), ("I", "S"))
        self.orientations = [Orientation(axcodes=codes, labels=labels) for codes in self.axcodes]

    def slice_axis(self, affine: Tensor, shape: Sequence[int]) -> int:
        """World axis (0 left-right, 1 posterior-anterior, 2 inferior-superior) nearest to the slices' normal."""
        world = nib.io_orientation(np.asarray(affine, dtype=float))[:, 0]
        single = [axis for axis, size in enumerate(shape) if size == 1]
        if len(single) == 1:
            return int(world[single[0]])
        spacing = np.linalg.norm(np.asarray(affine, dtype=float)[:3, :3], axis=0)
        order = np.argsort(spacing)
        thick = self.thick * (1 - 1e-3)  # oblique affines hold 1 x 1 x 1.5 mm to a few digits
        return int(world[order[2]]) if spacing[order[2]] >= thick * spacing[order[1]] else 2

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        first = d[self.first_key(d)]
        orientation = self.orientations[self.slice_axis(first.affine, first.shape[1:])]
        for key in self.key_iterator(d):
            d[key] = orientation(d[key])
        return d

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        first = d[self.first_key(d)].applied_operations[-1]
        affine, shape = first[TraceKeys.EXTRA_INFO]["original_affine"], first[TraceKeys.ORIG_SIZE]
        orientation = self.orientations[self.slice_axis(affine, shape)]
        for key in self.key_iterator(d):
            d[key] = orientation.inverse(d[key])
        return d


class SlicesFirstd(MapTransform):
    """Cut volumes into slices along the last axis: ``C, H, W, D`` to plain contiguous tensors ``D, C, H, W``."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            volume = d[key].as_tensor() if isinstance(d[key], MetaTensor) else d[key]
            d[key] = volume.movedim(-1, 0).contiguous()
        return d


class FieldOfViewd(MapTransform, InvertibleTransform):
    """Cut or pad slices about their centre to a square of so many millimetres: all cases get pixels of one size.

    Resized afterwards, an organ has the same scale in each, and the network's pixels are spent where it lies. What lies
    outside is not seen: label maps have background there.

    Args:
        keys: keys of ``MetaTensor`` volumes ``C, H, W, D``; all take the first one's spacing.
        size: side of the square in millimetres (in pixels for pictures, which have no spacing); ``"whole"`` (or None)
            changes nothing.

    Raises:
        DataError: when ``size`` is no positive number.
    """

    def __init__(self, keys: KeysCollection, size: float | str | None) -> None:
        super().__init__(keys)
        self.size = None if size == "whole" else size
        if self.size is not None and (isinstance(self.size, (bool, str)) or not 0 < self.size < math.inf):
            raise DataError(f"field_of_view is a number of millimetres, or whole for whole slices, got {size!r}.")
        self.crop, self.pad = Crop(), Pad()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        size = math.inf if self.size is None else float(self.size)
        for key in self.key_iterator(d) if self.size is not None else ():
            *shape, depth = d[key].shape[1:]
            wanted = [_voxels(size, mm) for mm in d[self.first_key(d)].pixdim[:2].tolist()]
            starts = [max(0, have - want) // 2 for have, want in zip(shape, wanted, strict=True)]
            d[key] = self.crop(
                d[key], Crop.compute_slices(roi_start=[*starts, 0], roi_end=[*map(sum, zip(starts, wanted)), depth])
            )
            lacks = [max(0, want - have) for have, want in zip(shape, wanted, strict=True)]
            width: Any = [(0, 0), *((lack // 2, lack - lack // 2) for lack in lacks), (0, 0)]
            d[key] = self.pad(d[key], width)
        return d

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d) if self.size is not None else ():
            d[key] = self.crop.inverse(self.pad.inverse(d[key]))
        return d


def slices_along(affine: Tensor, shape: Sequence[int]) -> int:
    """Of X, Y and Z, the axis across the slices into which :class:`SliceOrientationd` cuts a volume.

    Args:
        affine: 4, 4, of the volume's file.
        shape: X, Y, Z.

    Returns:
        0, 1 or 2.
    """
    world = nib.io_orientation(np.asarray(affine, dtype=float))[:, 0].tolist()
    return int(world.index(SliceOrientationd("image").slice_axis(affine, shape)))


def seen_voxels(
    shape: Sequence[int], spacing: Sequence[float], axis: int, field_of_view: float | str | None
) -> list[tuple[int, int]]:
    """The part of a volume that :class:`FieldOfViewd` leaves, in the axes of its file.

    Args:
        shape: X, Y, Z.
        spacing: millimetres.
        axis: of X, Y and Z, the one across the slices.
        field_of_view: as of :class:`FieldOfViewd`.

    Returns:
        First voxel and the one behind the last along each axis. A cut side may lie a voxel further in than it was cut,
        as the middle of a volume that was turned may be another by one.
    """
    wanted = math.inf if field_of_view in (None, "whole") else float(field_of_view or 0)
    seen = []
    for a, (size, mm) in enumerate(zip(shape, spacing, strict=True)):
        cut = 0 if a == axis or wanted == math.inf else max(0, size - _voxels(wanted, mm))
        seen.append(((cut + 1) // 2, size - (cut + 1) // 2))
    return seen


def _voxels(size: float, mm: float) -> int:
    return max(1, round(size / mm))
