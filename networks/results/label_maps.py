"""Label maps out: on the input's own grid, under its own name."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.config import KeysCollection, PathLike
from monai.data import NibabelWriter
from monai.data.folder_layout import default_name_formatter
from monai.transforms import SaveImage, SaveImaged
from monai.utils import get_equivalent_dtype

from ..data.folders import folder_of
from ..data.formats import NIFTI, PICTURES, SERIES
from ..data.readers import file_of, load_nifti
from ..storage import whole_file
from .pictures import label_picture

__all__ = ["LabelMapWriter", "SaveImageLabelMapd"]


class LabelMapWriter(NibabelWriter):
    """:class:`monai.data.NibabelWriter` for a label map that lies on its input in every reader.

    The input's NIfTI header is kept (sform, qform, spacing, units), whatever it says: ACDC's headers contradict
    themselves, and readers differ in which part they believe. The map has the input's exact shape but for channels, a
    trailing dimension of 1 included. Of a picture, the map is a PNG whose pixel values are the classes, shown in
    :data:`networks.results.pictures.COLOURS`. It is written under a temporary name and renamed when whole. For an input
    of another format, MONAI's affine is written.
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
        elif self.source.lower().endswith(NIFTI) and not Path(self.source).is_dir():
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


class SaveImageLabelMapd(SaveImaged):
    """:class:`monai.transforms.SaveImaged` for label maps: ``NAME_seg`` by :class:`LabelMapWriter`.

    ``SaveImage`` in its name tells MONAI Deploy to leave it out.

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
            writer.write(self.target(file_of(d[key])))
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
