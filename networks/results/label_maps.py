"""Maps out, of labels and of how sure they are: on the input's own grid, under its own name, of all frames in one."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.config import KeysCollection, PathLike
from monai.data import NibabelWriter
from monai.data.folder_layout import default_name_formatter
from monai.transforms import MapTransform, SaveImage, SaveImaged
from monai.utils import get_equivalent_dtype
from PIL import Image

from ..data.folders import folder_of
from ..data.formats import MOST_CLASSES, NIFTI, PICTURES, SERIES
from ..data.readers import file_of, load_nifti
from ..errors import DataError
from ..storage import whole_file
from .pictures import label_picture

__all__ = ["LabelMapWriter", "SaveImageLabelMapd", "SaveImageMapsd", "recorded_numbers", "result_file"]


class LabelMapWriter(NibabelWriter):
    """:class:`monai.data.NibabelWriter` for a label map that lies on its input in every reader.

    The input's NIfTI header is kept (sform, qform, spacing, units), whatever it says: ACDC's headers contradict
    themselves, and readers differ in which part they believe. The map has the input's exact shape but for channels, a
    trailing dimension of 1 included. Of a picture, the map is a PNG whose pixel values are the classes, shown in
    :data:`networks.results.pictures.COLOURS`. It is written under a temporary name and renamed when whole. For an input
    of another format, MONAI's affine is written, and the time between frames where ``step`` says it.

    Attributes:
        step: milliseconds from frame to frame of a map ``X, Y, Z, T``; 0 where they are not known.
    """

    step: float = 0.0

    def set_metadata(self, meta_dict: Mapping | None, resample: bool = True, **options: Any) -> None:
        self.source = str((meta_dict or {}).get("filename_or_obj", ""))
        if not self.source.lower().endswith(PICTURES):  # a picture has no position that could ask for resampling
            super().set_metadata(meta_dict, resample, **options)

    def write(self, filename: PathLike, verbose: bool = False, **obj_kwargs: Any) -> None:
        target = Path(filename)
        image: Any = None
        if target.suffix == ".png":
            image = label_picture(np.asarray(self.data_obj).reshape(self.data_obj.shape[:2]).T)
        elif self.source.lower().endswith(NIFTI) and not Path(self.source).is_dir():
            source = load_nifti(self.source)
            data = np.asarray(self.data_obj).astype(get_equivalent_dtype(self.output_dtype, np.ndarray))
            image = _like(
                data.reshape(source.shape if math.prod(source.shape) == data.size else source.shape[:3]), source
            )
        elif self.data_obj.shape[3] > 1:
            image = _over_time(np.asarray(self.data_obj).astype(self.output_dtype), self.affine, self.step)
        with whole_file(target) as name:
            if image is None:
                self.data_obj = self.data_obj[..., 0]  # of X, Y, Z, 1: a series has no channels
                super().write(name, verbose=verbose, **obj_kwargs)
            elif target.suffix == ".png":
                image.save(name)
            else:
                nib.save(image, name)


def _like(data: np.ndarray, source: Any) -> Any:
    """A map with the header of its image; axes that the image has not are counted in ones."""
    image = type(source)(data, None, source.header)
    image.set_data_dtype(data.dtype)
    image.header["pixdim"][1 + len(source.shape) : 1 + data.ndim] = 1
    image.header["cal_min"] = image.header["cal_max"] = 0
    image.header.extensions.clear()
    return image


def _over_time(data: np.ndarray, affine: np.ndarray, step: float) -> Any:
    """A map ``X, Y, Z, T, ...`` of a time series that is no NIfTI file."""
    image = nib.Nifti1Image(data, affine)
    image.header.set_zooms((*image.header.get_zooms()[:3], step, 1)[: data.ndim])
    image.header.set_xyzt_units("mm", "msec" if step else None)
    return image


class _Joined:
    """Frames put together in memory, one series at a time, until all are there."""

    def __init__(self) -> None:
        self._source = ""
        self._values = np.empty(0)

    def __call__(self, case: Mapping[Hashable, Any], values: np.ndarray, source: str) -> np.ndarray | None:
        """``X, Y, Z, ...`` of a volume as it is, of a series as ``X, Y, Z, T, ...`` at its last frame, else None."""
        if "frame" not in case:
            return values
        frame, frames = int(case["frame"]), int(case["frames"])
        if frame == 0:
            self._source = source
            self._values = np.zeros((*values.shape[:3], frames, *values.shape[3:]), values.dtype)
        if source != self._source or self._values.shape[:3] != values.shape[:3]:
            raise DataError(f"{source}: frame {frame} has another grid than frame 0. Export the series again.")
        self._values[:, :, :, frame] = values
        if frame < frames - 1:
            return None
        whole, self._values = self._values, np.empty(0)
        return whole


class SaveImageLabelMapd(SaveImaged):
    """:class:`monai.transforms.SaveImaged` for label maps: ``NAME_seg`` by :class:`LabelMapWriter`.

    The frames of a time series become one file ``X, Y, Z, T``, when the last of them comes. ``SaveImage`` in its name
    tells MONAI Deploy to leave it out.

    Args:
        keys: keys of the label maps, ``1, X, Y, Z`` on the image file's grid.
        output_dir: where to write.
        output_ext: ``".nii.gz"``, or ``".png"`` of pictures.
        data_root_dir: the images' folder, or the one image; subfolders are made in ``output_dir`` too.
        numbers: those of the classes in the file, ``{1: 3, 2: 2, 3: 1}``; a class that is not named keeps its own.
        num_classes: how many classes there are.

    Raises:
        DataError: when a number is no whole one from 0 to 255, is of no class, or two classes have one number.
        OSError: when the file cannot be written, with its name. MONAI would tell of it as a missing writer.
    """

    def __init__(
        self,
        keys: KeysCollection,
        output_dir: str | Path,
        output_ext: str = ".nii.gz",
        data_root_dir: str | Path = "",
        numbers: Mapping[int, int] | None = None,
        num_classes: int = MOST_CLASSES,
    ) -> None:
        super().__init__(
            keys,
            output_dir=output_dir,
            output_postfix="seg",
            output_ext=output_ext,
            data_root_dir=str(data_root_dir and folder_of(data_root_dir)),
            separate_folder=False,
        )
        self.output_dir = Path(output_dir)
        self.numbers = _numbers(numbers or {}, num_classes)
        self._joined = _Joined()

    def target(self, image: str | Path) -> Path:
        """The file of an image's label map. Its folder is made."""
        return Path(self.saver.folder_layout.filename(**_result_name({"filename_or_obj": str(image)}, self.saver)))

    def classes(self, label: Any, file: str | Path) -> np.ndarray:
        """The classes in a label map as it lies in its file.

        Args:
            label: any shape, as it was read.
            file: that it came from.

        Returns:
            Classes of the same shape, of unsigned 8 bit. Numbers within 0.001 of a whole one are that, as in labels.

        Raises:
            DataError: when it holds a number that no class has.
        """
        values = np.asarray(label)
        classes = {int(number): known for known, number in enumerate(self.numbers)}
        found = np.unique(values)
        whole = np.where(np.isclose(found, np.rint(found), rtol=0, atol=1e-3), np.rint(found), found).tolist()
        if unknown := [value for value, number in zip(found.tolist(), whole) if number not in classes]:
            raise DataError(
                f"{file} holds the numbers {unknown[:5]}, expected none but {', '.join(map(str, classes))}. Correct "
                "it, or segment the image again."
            )
        return np.array([classes[int(number)] for number in whole], np.uint8)[np.searchsorted(found, values)]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            label = self.numbers[np.asarray(d[key].cpu(), np.uint8)[0]]
            whole = self._joined(d, label, file_of(d[key]))
            if whole is not None:
                writer = LabelMapWriter(output_dtype=np.uint8)
                writer.set_data_array(
                    whole if whole.ndim == 4 else whole[..., None], channel_dim=-1, squeeze_end_dims=False
                )
                writer.set_metadata(d[key].meta, resample=False)
                writer.step = float(d.get("step", 0))
                writer.write(self.target(file_of(d[key])))
        return d


def recorded_numbers(numbers: Mapping[int, int] | None, record: str | Path) -> Mapping[int, int] | None:
    """The numbers of the classes in the label maps of an inference that was recorded.

    Args:
        numbers: as of :class:`SaveImageLabelMapd`; None where nobody says.
        record: ``inferring.json`` beside the label maps, as :func:`networks.engine.records.record_run` writes it.

    Returns:
        Those of the record; without one, ``numbers``.

    Raises:
        DataError: when the record has others.
    """
    config = json.loads(Path(record).read_text(encoding="utf-8")) if Path(record).is_file() else {}
    written = config.get("label_numbers", numbers)
    if isinstance(written, str):  # an expression
        return numbers
    if numbers is not None and _others(numbers) != _others(written):
        raise DataError(
            f"label_numbers is {dict(numbers)}, but {record} says that the label maps were written with "
            f"{_others(written) or 'none'}: give the same, or leave it out."
        )
    return written


def _others(numbers: Mapping[int, int] | None) -> dict[int, int]:
    """The classes whose number in the file is another."""
    return {int(known): number for known, number in (numbers or {}).items() if int(known) != number}  # texts in JSON


def _numbers(numbers: Mapping[int, int], num_classes: int) -> np.ndarray:
    """The number in the file of each class."""
    named = {int(known): number for known, number in numbers.items()}  # texts in JSON
    table = [named.get(known, known) for known in range(num_classes)]
    whole = all(isinstance(number, int) and 0 <= number < MOST_CLASSES for number in table)
    if not whole or len(set(table)) < num_classes or not named.keys() <= set(range(num_classes)):
        raise DataError(
            f"label_numbers are classes from 0 to {num_classes - 1} and their numbers in the file, from 0 to 255 and "
            f"another for each class, got {dict(numbers)}. A class that is not named keeps its own."
        )
    return np.array(table, np.uint8)


class SaveImageMapsd(MapTransform):
    """Save maps of how sure the label maps are, beside these.

    - ``entropy``: ``NAME_entropy.nii.gz`` of floats from 0 to 1; of a picture a PNG, where 255 is 1.
    - ``probabilities``: ``NAME_probabilities.nii.gz``, ``X, Y, Z, class``, of a time series ``X, Y, Z, T, class``, of
      floats; of a picture a PNG for each class but the background, ``NAME_probability1.png``, where 255 is 1.

    Args:
        keys: of the maps, ``C, X, Y, Z`` on the image file's grid; their names are the files' too.
        saver: names the label maps.
    """

    def __init__(self, keys: KeysCollection, saver: SaveImageLabelMapd) -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.saver = saver
        self._joined: dict[Hashable, _Joined] = {key: _Joined() for key in self.keys}

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            source = file_of(d[key])
            values = np.moveaxis(np.asarray(d[key].cpu()), 0, -1)
            if key == "probabilities":  # outside the field of view all are 0 until here
                values[..., 0] = 1 - values[..., 1:].sum(-1)
            whole = self._joined[key](d, values, source)
            if whole is None:
                continue
            if source.lower().endswith(PICTURES):
                self._save_pictures(str(key), whole[:, :, 0], source)
                continue
            volume = (whole[..., 0] if key == "entropy" else whole).astype(np.float32)
            image: Any = nib.Nifti1Image(volume, np.asarray(d[key].affine))
            if source.lower().endswith(NIFTI) and not Path(source).is_dir():
                image = _like(volume, load_nifti(source))
            elif "frame" in d:
                image = _over_time(volume, np.asarray(d[key].affine), float(d.get("step", 0)))
            with whole_file(result_file(self.saver, source, f"{key}.nii.gz")) as name:
                nib.save(image, name)
        return d

    def _save_pictures(self, key: str, values: np.ndarray, source: str) -> None:
        names = {0: "entropy"} if key == "entropy" else {n: f"probability{n}" for n in range(1, values.shape[-1])}
        for channel, called in names.items():
            with whole_file(result_file(self.saver, source, f"{called}.png")) as name:
                Image.fromarray((255 * values[..., channel].T.clip(0, 1)).round().astype(np.uint8)).save(name)


def result_file(saver: SaveImageLabelMapd, image: str | Path, ending: str) -> Path:
    """The file of an image's results beside its label map ``NAME_seg``: ``NAME_ending``."""
    target = saver.target(image)
    return target.with_name(f"{target.name.rpartition('_seg')[0]}_{ending}")


def _result_name(meta: dict[str, Any], saver: SaveImage) -> dict[str, Any]:
    """Of a folder of DICOM files ``root/A/1.2.3`` what MONAI's name is of ``root/A/1.2.3.dcm``, of ``root`` itself
    that of a file of its name in it."""
    names = default_name_formatter(meta, saver)
    path = Path(names["subject"])
    if path.is_dir():
        folder = path if path == Path(getattr(saver.folder_layout, "data_root_dir", "")) else path.parent
        names["subject"] = str(folder / f"{path.resolve().name}{SERIES}")
    return names
