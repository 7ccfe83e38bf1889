"""Image files in, label maps out: volumes and pictures checked as they are loaded, results on the input's own grid."""

from __future__ import annotations

import csv
import math
import os
import secrets
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection, PathLike
from monai.data import MetaTensor, NibabelWriter
from monai.data.folder_layout import default_name_formatter
from monai.transforms import MapTransform, SaveImage, SaveImaged
from monai.utils import get_equivalent_dtype

from .datasets import folder_of
from .dicom import holds_all_frames
from .errors import DataError, WriteError, beginning, lacks_memory
from .pictures import label_picture
from .readers import PICTURES, SERIES, VOLUMES, load_nifti, read_image

__all__ = ["CheckLabeld", "LabelMapWriter", "LoadVolumed", "MapLabelsd", "SaveLabelMapd", "whole_file", "write_csv"]


MOST_VALUES = 2**31
"""Values of the largest volume that is read: 8 GB of floats."""

MOST_CLASSES = 256
"""Label maps are of unsigned 8 bit."""


class LoadVolumed(MapTransform):
    """Load images with the channel first, and check that each file is one usable volume.

    A picture (JPEG, PNG, BMP) is loaded as a volume of one slice, a folder of DICOM files as the volume of its series.

    Args:
        keys: keys of the file names.
        channels: channels that each image must have: 1 for CT and MR, 3 for RGB.
        suffixes: endings of the files to take; :data:`networks.readers.SERIES` for folders of DICOM files.
        allow_constant: take an image of one value everywhere, as a label may be.

    Shape:
        file names to ``MetaTensor`` of ``channels, X, Y, Z`` in the file's own axes; a fourth NIfTI dimension of
        length ``channels`` becomes the channel. Of a picture, X goes to the right, Y down, and Z is 1.

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
        for key in self.key_iterator(d):
            d[key] = self._load(d[key])
        return d

    def _load(self, file: Any) -> MetaTensor:
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
    header: Any = load_nifti(file)
    shape, dtype = list(header.shape), header.get_data_dtype()
    if 0 in shape:
        raise DataError(f"{file} is empty: shape {shape}. Export it again.")
    if math.prod(shape) > MOST_VALUES:
        raise DataError(f"{file} has shape {shape}, more than {MOST_VALUES} values. Crop or split it first.")
    if dtype.kind not in "iuf":
        kind = "colours" if dtype.fields else f"values of type {dtype}"
        raise DataError(f"{file} holds {kind}, expected one real number per voxel. Convert it first.")


class MapLabelsd(MapTransform):
    """Turn the numbers of a label file into the bundle's classes where the case says how, by its ``"label_values"``.

    :func:`networks.datasets.cases` says so for the official datasets. Labels of other cases stay as they are, but for
    what ``values`` says. Numbers within 0.001 of a whole one are that: resampling and scaling leave such.

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
                    f"{_file_of(label)} holds the values {unknown[:5]}, expected none but {_ranges(values)}. "
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
            file, image_file = _file_of(label), _file_of(image)
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


def _file_of(volume: Any) -> str:
    return str(volume.meta.get("filename_or_obj", "array"))


def _same_grid(a: MetaTensor, b: MetaTensor) -> bool:
    """Whether the corners of two grids of one shape lie within half a voxel of each other."""
    corners = torch.tensor([[*map(int, np.unravel_index(i, (2, 2, 2))), 1] for i in range(8)], dtype=torch.float64)
    corners[:, :3] *= torch.tensor(a.shape[1:]) - 1
    affine_a, affine_b = a.affine.double(), b.affine.double()
    distance = (corners @ (affine_a - affine_b).T)[:, :3].norm(dim=1).max()
    return bool(distance <= affine_a[:3, :3].norm(dim=0).min() / 2)


class LabelMapWriter(NibabelWriter):
    """:class:`monai.data.NibabelWriter` for a label map that lies on its input in every reader.

    The input's NIfTI header is kept (sform, qform, spacing, units), whatever it says: ACDC's headers contradict
    themselves, and readers differ in which part they believe. The map has the input's exact shape but for channels, a
    trailing dimension of 1 included. Of a picture, the map is a PNG whose pixel values are the classes, shown in
    :data:`networks.pictures.COLOURS`. It is written under a temporary name and renamed when whole. For an input of
    another format, MONAI's affine is written.
    """

    def set_metadata(self, meta_dict: Mapping | None, resample: bool = True, **options: Any) -> None:
        self.source = str((meta_dict or {}).get("filename_or_obj", ""))
        if not self.source.lower().endswith(PICTURES):  # a picture has no position that could ask for resampling
            super().set_metadata(meta_dict, resample, **options)

    def write(self, filename: PathLike, verbose: bool = False, **obj_kwargs: Any) -> None:
        target = Path(filename)
        image: Any = None
        if target.suffix == ".png":
            image = label_picture(np.asarray(self.data_obj).reshape(self.data_obj.shape[:2]).T)
        elif self.source.lower().endswith(VOLUMES) and not Path(self.source).is_dir():
            image = self._like(load_nifti(self.source))
        with whole_file(target) as name:
            if image is None:
                self.data_obj = self.data_obj[..., 0]  # of X, Y, Z, 1: a series has no channels
                super().write(name, verbose=verbose, **obj_kwargs)
            elif target.suffix == ".png":
                image.save(name)
            else:
                nib.save(image, name)

    def _like(self, source: Any) -> Any:
        """The label map with the header of its image."""
        dtype = get_equivalent_dtype(self.output_dtype, np.ndarray)
        data = np.asarray(self.data_obj).astype(dtype)
        data = data.reshape(source.shape if math.prod(source.shape) == data.size else source.shape[:3])
        image = type(source)(data, None, source.header)
        image.set_data_dtype(dtype)
        image.header["cal_min"] = image.header["cal_max"] = 0
        image.header.extensions.clear()
        return image


class SaveLabelMapd(SaveImaged):
    """:class:`monai.transforms.SaveImaged` for label maps: ``NAME_seg`` by :class:`LabelMapWriter`.

    Args:
        keys: keys of the label maps, ``1, X, Y, Z`` on the image file's grid.
        output_dir: where to write.
        output_ext: ``".nii.gz"``, or ``".png"`` of pictures.
        data_root_dir: the images' folder, or the one image; subfolders are made in ``output_dir`` too.

    Raises:
        OSError: when the file cannot be written, with its name. MONAI would tell of it as a missing writer.
    """

    def __init__(
        self, keys: KeysCollection, output_dir: str | Path, output_ext: str = ".nii.gz", data_root_dir: str | Path = ""
    ) -> None:
        super().__init__(
            keys,
            output_dir=output_dir,
            output_postfix="seg",
            output_ext=output_ext,
            data_root_dir=str(data_root_dir and folder_of(data_root_dir)),
            separate_folder=False,
        )

    def target(self, image: str | Path) -> Path:
        """The file of an image's label map. Its folder is made."""
        return Path(self.saver.folder_layout.filename(**_result_name({"filename_or_obj": str(image)}, self.saver)))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            writer = LabelMapWriter(output_dtype=np.uint8)
            writer.set_data_array(d[key], channel_dim=0, squeeze_end_dims=False)
            writer.set_metadata(d[key].meta, resample=False)
            writer.write(self.target(_file_of(d[key])))
        return d


def _result_name(meta: dict[str, Any], saver: SaveImage) -> dict[str, Any]:
    """Of a folder of DICOM files ``root/A/1.2.3`` what MONAI's name is of ``root/A/1.2.3.dcm``, of ``root`` itself
    that of a file of its name in it."""
    names = default_name_formatter(meta, saver)
    path = Path(names["subject"])
    if path.is_dir():
        folder = path if path == Path(getattr(saver.folder_layout, "data_root_dir", "")) else path.parent
        names["subject"] = str(folder / f"{path.resolve().name}{SERIES}")
    return names


@contextmanager
def whole_file(target: Path) -> Iterator[str]:
    """A temporary name beside ``target``, renamed to it at the end: the file is there whole or not at all.

    A process that is killed leaves its ``.partial-*``, which nothing reads.

    Args:
        target: its folder is made.

    Yields:
        The name to write to.

    Raises:
        WriteError: when it cannot be written; it names ``target``.
    """
    name = target.parent / f".partial-{secrets.token_hex(8)}{''.join(target.suffixes[-2:])}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield str(name)
        with open(name, "rb") as file:
            os.fsync(file)  # else a power failure could leave the new name and none of the content
        os.replace(name, target)
    except BaseException as error:
        if name.exists():
            name.unlink()
        if isinstance(error, OSError) and _is_of(error, name, target):
            raise WriteError(error.errno, error.strerror or str(error), str(target)) from error
        raise


def _is_of(error: OSError, name: Path, target: Path) -> bool:
    """Whether an error is about a file that is written, or its folder, rather than about one that is read for it."""
    about = error.filename
    if about is None:
        return error.errno is not None  # libraries' own words have none
    return str(name) in (about, error.filename2) or Path(about) in target.parents


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a table with a line of column names, whole or not at all; what is not UTF-8 in it becomes escapes."""
    with whole_file(path) as name, open(name, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        csv.writer(file).writerows([columns, *rows])
