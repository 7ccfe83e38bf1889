"""MONAI's readers of NIfTI files and pictures, where these hold a case that MONAI takes for another.

Every part of this package reads image files by :func:`read_image`, so that images, labels, label maps and pictures of
them lie alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.config import PathLike
from monai.data import ImageReader, ITKReader, MetaTensor, NibabelReader, PILReader
from monai.transforms import EnsureChannelFirst
from monai.utils import ensure_tuple
from PIL import Image, ImageOps

from ..errors import DataError
from .dicom import SeriesReader
from .formats import NIFTI, OF_ITK, PICTURES

__all__ = ["NiftiReader", "PictureReader", "file_of", "itk_shape", "load_nifti", "read_image"]

MILLIMETRES = {1: 1e3, 2: 1.0, 3: 1e-3}
"""By NIfTI's code of the unit: metres, millimetres, microns. Any other is taken for millimetres."""


def read_image(file: str | Path) -> Any:
    """An image as its file holds it: NIfTI, NRRD or MetaImage, a picture, or a folder of DICOM files.

    MONAI's ``LoadImage`` would try each reader that it knows, and warn of those that lack a package.

    Args:
        file: its name.

    Returns:
        ``MetaTensor`` of floats, ``C, X, Y, Z``, of a picture ``C, X, Y`` with X to the right and Y down. The affine is
        in millimetres.

    Raises:
        DataError: when the file is none of these, or one of DICOM's or Pillow's refusals.
        Exception: those of the readers for a file that cannot be read.
    """
    kinds: dict[type[ImageReader], tuple[str, ...]] = {PictureReader: PICTURES, NiftiReader: NIFTI, ITKReader: OF_ITK}
    fitting = (kind for kind, endings in kinds.items() if str(file).lower().endswith(endings))
    reader = (SeriesReader if Path(file).is_dir() else next(fitting, SeriesReader))()
    return as_tensor(reader, reader.read(file), file)


def as_tensor(reader: ImageReader, image: Any, file: str | Path) -> Any:
    """What a reader has read, as :func:`read_image` gives it.

    Args:
        reader: one of this package's.
        image: the image of nibabel, ITK or Pillow.
        file: what it came from.

    Returns:
        ``MetaTensor`` of floats, channel first.
    """
    values, meta = reader.get_data(image)
    meta["filename_or_obj"] = str(file)
    tensor: Any = MetaTensor.ensure_torch_and_prune_meta(np.asarray(values, np.float32), meta)
    return EnsureChannelFirst()(tensor)


class NiftiReader(NibabelReader):
    """:class:`monai.data.NibabelReader` for every way in which a header says where its voxels lie.

    - The position is the coded sform, else the coded qform, as nibabel, FSL and SPM have it. MONAI asks ``pixdim``
      which of them to believe, and believes one that was never set.
    - A coded sform of voxels of 1 mm has the sizes of ``pixdim`` where these are others and no qform is coded: such are
      ACDC's files.
    - Positions are turned into millimetres from the unit that the header names.
    - A rotation whose quaternion is longer than 1 by rounding is a rotation, and trailing dimensions of 1 are none.
    """

    def __init__(self) -> None:
        super().__init__(squeeze_non_spatial_dims=True)

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> Any:
        """Images of nibabel, one for each file."""
        self.filenames = ensure_tuple(data)
        images = [load_nifti(file) for file in self.filenames]
        return images if len(images) > 1 else images[0]

    def get_data(self, img: Any) -> tuple[np.ndarray, dict]:
        """Voxels, and what the header says of them."""
        voxels, meta = super().get_data(img)
        meta["affine"] = meta["original_affine"] = _position(ensure_tuple(img)[0])
        return voxels, meta


def _position(image: Any) -> np.ndarray:
    """The affine in millimetres that a header means."""
    header = image.header
    affine, pixdim = np.array(image.affine), header.get_zooms()[:3]
    if header["sform_code"] and not header["qform_code"]:
        if np.allclose(np.abs(affine[:3, :3]), np.eye(3)) and not np.allclose(pixdim, 1):
            affine[:3, :3] *= pixdim
    elif header["sform_code"] and not np.linalg.det(affine[:3, :3]):
        affine = header.get_qform()  # a sform that was declared and never written
    affine[:3] *= MILLIMETRES.get(int(header["xyzt_units"]) & 7, 1.0)
    return affine


def load_nifti(file: PathLike, keep_open: bool = False) -> nib.Nifti1Image | nib.Nifti2Image:
    """An image file by nibabel, also one whose quaternion is longer than 1 by rounding.

    Args:
        file: its name.
        keep_open: keep the file open between accesses to the voxels, so that parts that are read in their order unpack
            it once.

    Returns:
        The image, of which no voxel is read yet. The header is the file's but for such a quaternion.

    Raises:
        DataError: when the file is of another format, for all its name, or its rotation is none.
        Exception: those of nibabel for a file that cannot be read.
    """
    options: Any = {"keep_file_open": True} if keep_open else {}  # no other format takes it
    try:
        image = nib.load(file, **options)
    except ValueError:  # so far nibabel's word for such a quaternion
        kind = next(kind for kind in (_RoundedImage, _RoundedImage2) if kind.path_maybe_image(file)[0])
        try:
            image = kind.from_filename(file, **options)
        except ValueError as error:
            raise DataError(f"The rotation in the header of {file} is none: {error}. Export it again.") from error
    if not isinstance(image, (nib.Nifti1Image, nib.Nifti2Image)):
        raise DataError(f"{file} is a {type(image).__name__}, no NIfTI file, for all its name. Convert it first.")
    return image


def _shorten(header: nib.Nifti1Header) -> None:
    """Make a quaternion that is longer than 1 by rounding one of length 1."""
    names = ("quatern_b", "quatern_c", "quatern_d")
    length = math.hypot(*(float(header[name]) for name in names))
    if 1 < length < 1 + 1e-4:
        for name in names:
            header[name] = float(header[name]) / length * (1 - np.finfo(header[name].dtype).epsneg)


class _RoundedHeader(nib.Nifti1Header):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _shorten(self)


class _RoundedHeader2(nib.Nifti2Header):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _shorten(self)


class _RoundedImage(nib.Nifti1Image):
    header_class = _RoundedHeader


class _RoundedImage2(nib.Nifti2Image):
    header_class = _RoundedHeader2


class PictureReader(PILReader):
    """:class:`monai.data.PILReader` that turns a picture as viewers show it, by its EXIF orientation.

    Raises:
        DataError: by :meth:`read`, when a picture has more pixels than Pillow opens.
    """

    def read(self, data: Any, **kwargs: Any) -> Any:
        """Pictures of Pillow, one for each file."""
        pictures = []
        for file in ensure_tuple(data):
            try:
                picture = Image.open(file)
            except Image.DecompressionBombError as error:
                raise DataError(f"{file} is too large a picture: {error} Cut or scale it first.") from None
            pictures.append(ImageOps.exif_transpose(picture))
        return pictures if len(pictures) > 1 else pictures[0]


def file_of(volume: Any) -> str:
    """The file that a loaded volume came from; of an array it is ``array``."""
    return str(volume.meta.get("filename_or_obj", "array"))


def itk_shape(file: PathLike) -> list[int]:
    """The shape of an image that ITK reads, from its header alone.

    Args:
        file: its name.

    Returns:
        Length of each axis.

    Raises:
        DataError: when the file is of no format that ITK knows.
    """
    import itk  # takes a second, which NIfTI files and pictures need not wait for

    reader = itk.ImageIOFactory.CreateImageIO(str(file), itk.CommonEnums.IOFileMode_ReadMode)
    if reader is None:
        raise DataError(f"{file} is of another format, for all its name. Convert it first.")
    reader.SetFileName(str(file))
    reader.ReadImageInformation()
    return [reader.GetDimensions(axis) for axis in range(reader.GetNumberOfDimensions())]
