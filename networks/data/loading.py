"""Images in: each file is checked to be one usable volume as it is loaded."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from ..errors import DataError, beginning, lacks_memory
from .cine import TimeSeries, nifti_series
from .dicom import holds_all_frames
from .formats import MOST_VALUES, NIFTI, PICTURES, SERIES, VOLUMES
from .readers import file_of, itk_shape, load_nifti, read_image

__all__ = ["LoadVolumed"]


class LoadVolumed(MapTransform):
    """Load images with the channel first, and check that each file is one usable volume.

    A picture (JPEG, PNG, BMP) is loaded as a volume of one slice, a folder of DICOM files as the volume of its series.
    An image that is loaded already, as MONAI Deploy hands it over, is checked alike. Of a time series one frame is
    loaded, where the case names it.

    Args:
        keys: keys of the file names.
        channels: channels that each image must have: 1 for CT and MR, 3 for RGB.
        suffixes: endings of the files to take; :data:`networks.data.formats.SERIES` for folders of DICOM files.
        allow_constant: take an image of one value everywhere, as a label may be.

    Shape:
        file names to ``MetaTensor`` of ``channels, X, Y, Z`` in the file's own axes; a fourth NIfTI dimension of
        length ``channels`` becomes the channel. Of a picture, X goes to the right, Y down, and Z is 1. A ``MetaTensor``
        in memory is ``X, Y, Z`` of one channel, or ``channels, X, Y, Z``, of any type. Where the case has a
        ``"frame"``, that is the number of a frame of the files, or of the case's ``"series"``, which is then taken out
        of the case.

    Raises:
        DataError: when a file is missing, unreadable or truncated, of another kind, has another number of dimensions
            or channels, is empty or larger than :data:`MOST_VALUES`, has no position, holds NaN or infinite
            values, or one value alone; when a series has company in its folder, or a gap; when it is a list of files.
        MemoryError: when it does not fit into memory.
    """

    def __init__(
        self,
        keys: KeysCollection,
        channels: int = 1,
        suffixes: Sequence[str] = (*VOLUMES, SERIES),
        allow_constant: bool = True,
    ) -> None:
        super().__init__(keys)
        self.channels = channels
        self.suffixes = tuple(suffixes)
        self.allow_constant = allow_constant

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        series = d.pop("series", None)
        for key in self.key_iterator(d):
            d[key] = self._load_frame(d[key], series, d["frame"]) if "frame" in d else self._load(d[key])
        return d

    def _load_frame(self, file: Any, series: TimeSeries | None, frame: int) -> MetaTensor:
        try:
            series = series or nifti_series(file)
            if series is None:
                raise DataError(f"{file} is one volume, expected a time series. Name its frames, or the whole series.")
            volume = series.read(frame)
        except DataError:
            raise
        except Exception as error:
            raise _reading(file, error) from error
        return self._checked(volume, f"Frame {frame} of {file}")

    def _load(self, file: Any) -> MetaTensor:
        if isinstance(file, MetaTensor):
            volume = file.float()  # of whole numbers there are no percentiles
            return self._checked(volume[None] if volume.ndim == 3 else volume, file_of(file))
        if isinstance(file, (list, tuple)):
            raise DataError(
                f"{', '.join(map(str, file))}: several files for one image. Write their channels into one file, "
                "X, Y, Z, channel."
            )
        self._check_kind(Path(file))
        try:
            if str(file).lower().endswith(VOLUMES):
                _check_header(file)
            volume = read_image(file)
        except DataError:
            raise
        except Exception as error:
            raise _reading(file, error) from error
        if str(file).lower().endswith(PICTURES):
            if volume.ndim != 3 or volume.shape[0] != self.channels:
                raise DataError(
                    f"{file} has {volume.shape[0]} channel(s), expected {self.channels}: "
                    f"{'an RGB picture' if self.channels == 3 else 'one gray value per pixel'}. Convert it first."
                )
            volume = volume[..., None]
            volume.spatial_ndim = 3  # else the inverse of Resize takes the axis away again
        return self._checked(volume, file)

    def _checked(self, volume: Any, file: Any) -> MetaTensor:
        """A volume that can be used."""
        shape = list(volume.shape)
        if volume.ndim != 4 or shape[0] != self.channels:
            raise DataError(
                f"{file} has shape {shape[1:]} with {shape[0]} channel(s) or time points, expected one volume X, Y, Z "
                f"of {self.channels} channel(s). Split time series and stacks, join single slices: one file per volume."
            )
        axes = volume.affine[:3, :3].double()
        if not bool(torch.isfinite(volume.affine).all()) or torch.linalg.matrix_rank(axes) < 3:
            raise DataError(f"{file} says nothing of where it lies: affine {volume.affine.tolist()}. Export it again.")
        if not bool(torch.isfinite(volume).all()):
            raise DataError(f"{file} holds NaN or infinite voxels. Replace them, for example by the minimum.")
        if not self.allow_constant and bool((volume == volume.flatten()[0]).all()):
            raise DataError(f"{file} holds nothing but the value {volume.flatten()[0]:g}. Export the image again.")
        return volume

    def _check_kind(self, path: Path) -> None:
        """Before anything is read: what there is under that name, and whether it may be read."""
        if path.is_dir():
            if SERIES in self.suffixes:
                return
            raise DataError(f"{path} is a folder, expected a file: {', '.join(self.suffixes)}.")
        name = path.name.lower()
        if not name.endswith(self.suffixes):
            raise DataError(f"{path} is none of the files that this bundle reads: {', '.join(self.suffixes)}.")
        try:
            path.open("rb").close()
        except OSError as error:
            raise DataError(f"Cannot read {path}: {error.strerror}. Is that its name, and may you read it?") from error
        if name.endswith(SERIES) and not holds_all_frames(path):
            raise DataError(f"{path} is one DICOM file: name the folder that holds its series instead.")


def _reading(file: Any, error: Exception) -> Exception:
    """What an error is that came while a file was read."""
    cause = beginning(error)
    text = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    if lacks_memory(cause):
        return MemoryError(text)
    if isinstance(cause, OSError) and cause.errno:
        return DataError(
            f"Cannot read {cause.filename or file}: {cause.strerror}. Is the disk whole, and may you read it?"
        )
    return DataError(f"Cannot read {file}: truncated, or not an image file. Copy or export it again. ({text})")


def _check_header(file: Any) -> None:
    """Before the content is unpacked: a few bytes may become more than any memory."""
    if str(file).lower().endswith(NIFTI):
        header: Any = load_nifti(file)
        shape, dtype = list(header.shape), header.get_data_dtype()
        if dtype.kind not in "iuf":
            kind = "colours" if dtype.fields else f"values of type {dtype}"
            raise DataError(f"{file} holds {kind}, expected one real number per voxel. Convert it first.")
    else:
        shape = itk_shape(file)
    if 0 in shape:
        raise DataError(f"{file} is empty: shape {shape}. Export it again.")
    if math.prod(shape) > MOST_VALUES:
        raise DataError(f"{file} has shape {shape}, more than {MOST_VALUES} values. Crop or split it first.")
