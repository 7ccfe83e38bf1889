"""Volumes to slices and back, for 2D networks on 3D images.

NIfTI volume -> load and check -> orientation -> intensity -> in-plane resize -> slices along the last axis
-> 2D network -> logits stacked to a volume -> inverse transforms -> label map with the input's exact shape and affine.

MONAI does most of it (``SliceInferer``, ``Invertd``, ``SaveImaged``, the cache classes); here is what it lacks: volumes
checked as they are loaded with errors that name the file, slicing across thick slices whichever way the volume is
stored, a dataset of slices that takes volumes, and a writer that keeps the input's header.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection, PathLike
from monai.data import CacheDataset, MetaTensor, NibabelWriter, PersistentDataset
from monai.transforms import (
    Compose,
    InvertibleTransform,
    LoadImaged,
    MapTransform,
    Orientation,
    Randomizable,
)
from monai.utils import TraceKeys, get_equivalent_dtype
from torch import Tensor
from torch.utils.data import Dataset

from .errors import DataError

__all__ = [
    "CheckLabeld",
    "LabelMapWriter",
    "LoadVolumed",
    "SliceDataset",
    "SliceOrientationd",
    "SlicesFirstd",
    "VolumeDataset",
]

logger = logging.getLogger(__name__)


@contextmanager
def _data_errors() -> Iterator[None]:
    """Let a :class:`DataError` through as itself: MONAI wraps it as ``applying transform <object at ...>``."""
    try:
        yield
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, DataError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None


class LoadVolumed(LoadImaged):
    """:class:`monai.transforms.LoadImaged` with the channel first, and a check that each file is one usable volume.

    Args:
        keys: keys of the file names.
        channels: channels that each volume must have: 1 for CT and MR.
        kwargs: further arguments of ``LoadImaged``, such as ``reader`` and ``dtype``.

    Shape:
        file names to ``MetaTensor`` of ``channels, X, Y, Z`` in the file's own axes; a fourth NIfTI dimension of
        length ``channels`` becomes the channel.

    Raises:
        DataError: when a file is missing, unreadable or truncated, has another number of dimensions or channels, is
            empty, or holds NaN or infinite values.
    """

    def __init__(self, keys: KeysCollection, channels: int = 1, **kwargs: Any) -> None:
        super().__init__(keys, image_only=True, ensure_channel_first=True, **kwargs)
        self.channels = channels

    def __call__(self, data: Mapping[Hashable, Any], reader: Any = None) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self._load(d[key], reader)
        return d

    def _load(self, file: Any, reader: Any) -> MetaTensor:
        try:
            volume = self._loader(file, reader)
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            text = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
            raise DataError(f"Cannot read {file}: missing, truncated, or not an image file. ({text})") from error
        shape = list(volume.shape)
        if volume.ndim != 4 or shape[0] != self.channels:
            raise DataError(
                f"{file} has shape {shape[1:]} with {shape[0]} channel(s) or time points, expected one volume X, Y, Z "
                f"of {self.channels} channel(s). Split time series and stacks into single volumes first."
            )
        if volume.numel() == 0:
            raise DataError(f"{file} is empty: shape {shape[1:]}.")
        if not bool(torch.isfinite(volume).all()):
            raise DataError(f"{file} holds NaN or infinite voxels. Replace them, for example by the minimum.")
        return volume


class CheckLabeld(MapTransform):
    """Refuse a label that does not belong to its image or holds other classes, before it can spoil a training.

    Args:
        keys: keys of the labels, loaded as ``1, X, Y, Z``.
        num_classes: labels are whole numbers from 0 to ``num_classes - 1``.
        image_key: key of the image, loaded; its grid must be the label's.

    Raises:
        DataError: when shape or position differs from the image's, or a value is fractional or out of range.
    """

    def __init__(self, keys: KeysCollection, num_classes: int, image_key: str = "image") -> None:
        super().__init__(keys)
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
                    f"{label.affine.numpy()}\n{image.affine.numpy()}\nResample the label onto the image first."
                )
            values = label.unique().tolist()
            wrong = [v for v in values if v != int(v) or not 0 <= v < self.num_classes]
            if wrong:
                raise DataError(
                    f"{file} holds the values {wrong[:5]}, expected whole numbers from 0 to {self.num_classes - 1}. "
                    "Map its labels to the bundle's classes, or set num_classes."
                )
        return d


def _file_of(volume: Any) -> str:
    return str(volume.meta.get("filename_or_obj", "array"))


def _same_grid(a: MetaTensor, b: MetaTensor) -> bool:
    """Whether the corners of two grids of one shape lie within half a voxel of each other."""
    corners = torch.tensor([[*map(int, np.unravel_index(i, (2, 2, 2))), 1] for i in range(8)], dtype=torch.float64)
    corners[:, :3] *= torch.tensor(a.shape[1:]) - 1
    affine_a, affine_b = a.affine.double(), b.affine.double()
    distance = (corners @ (affine_a - affine_b).T)[:, :3].norm(dim=1).max()
    return bool(distance <= affine_a[:3, :3].norm(dim=0).min() / 2)


class SliceOrientationd(MapTransform, InvertibleTransform):
    """Turn volumes so that slices lie along the last axis, in-plane axes towards right, anterior, superior.

    Slices are taken across the direction in which the volume is thick: an axis of one voxel, else the axis whose
    spacing is at least ``thick`` times any other's, else the superior axis. For axial volumes this is
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
        return int(world[order[2]]) if spacing[order[2]] >= self.thick * spacing[order[1]] else 2

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.orientations[self.slice_axis(d[key].affine, d[key].shape[1:])](d[key])
        return d

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            applied = d[key].applied_operations[-1]
            affine, shape = applied[TraceKeys.EXTRA_INFO]["original_affine"], applied[TraceKeys.ORIG_SIZE]
            d[key] = self.orientations[self.slice_axis(affine, shape)].inverse(d[key])
        return d


class SlicesFirstd(MapTransform):
    """Cut volumes into slices along the last axis: ``C, H, W, D`` to plain contiguous tensors ``D, C, H, W``."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            volume = d[key].as_tensor() if isinstance(d[key], MetaTensor) else d[key]
            d[key] = volume.movedim(-1, 0).contiguous()
        return d


class VolumeDataset(CacheDataset):
    """One item per volume: :class:`monai.data.CacheDataset` whose errors name the file.

    Args:
        data: list of dictionaries of file names, such as ``{"image": ..., "label": ...}``.
        transform: volume transforms.
        cache: keep transformed volumes in memory. Each process of a distributed run keeps its own; workers share it.
        num_workers: threads that fill the cache.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        transform: Sequence[Callable] | Callable,
        cache: bool = False,
        num_workers: int = 1,
    ) -> None:
        super().__init__(
            data, transform, cache_rate=float(cache), num_workers=num_workers, copy_cache=False, progress=False
        )

    def _fill_cache(self, indices: Sequence[int] | None = None) -> list[Any]:
        # MONAI's pool does not wait for its threads when an item fails; one still inside torch when the interpreter
        # exits aborts the process.
        pool = ThreadPoolExecutor(self.num_workers)
        try:
            return list(pool.map(self._load_cache_item, range(self.cache_num) if indices is None else indices))
        finally:
            pool.shutdown(cancel_futures=True)

    def _load_cache_item(self, idx: int) -> Any:
        with _data_errors():
            return super()._load_cache_item(idx)

    def _transform(self, index: int) -> Any:
        with _data_errors():
            return super()._transform(index)


class _StoredVolumeDataset(PersistentDataset):
    """One item per volume, kept on disk; errors name the file."""

    def _cachecheck(self, item_transformed: Any) -> Any:
        with _data_errors():
            return super()._cachecheck(item_transformed)


class SliceDataset(Dataset, Randomizable):
    """2D slices of a list of volumes, for training.

    The volume transforms run once, when the dataset is made, and their result is kept; the slice transforms run anew
    for each visit. An epoch visits every slice once, in the order that the loader's sampler gives, so shuffling,
    workers and ``DistributedSampler`` work as for any map-style dataset.

    Memory: all transformed volumes, that is slices x pixels x 5 bytes for float images and uint8 labels of one channel
    (427 MB for ACDC's 1,304 training slices at 256 x 256), once per process of a distributed run; forked workers share
    it. With ``cache_dir`` they lie on disk instead and each visit reads one volume. The figure is logged.

    Args:
        data: list of volume dictionaries ``{"image": path, "label": path}``.
        transform: deterministic volume transforms, such as loading, orientation, intensity, resize. They leave the
            slices along the last axis.
        slice_transform: transforms of one slice's ``{"image": C, H, W; "label": 1, H, W}``, such as augmentation.
        keys: what to take from the volumes; the last is the label.
        empty_weight: how often a slice without foreground is visited, from 0 (dropped) to 1 (as often as any other).
            Between, an epoch visits that share of them, others each time.
        cache_dir: folder to keep transformed volumes in, for more than memory holds.
        num_workers: threads that transform volumes.

    Raises:
        DataError: when a file cannot be used.
        ValueError: when there are no volumes, or ``empty_weight`` is not in 0 to 1.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        transform: Sequence[Callable] | Callable,
        slice_transform: Sequence[Callable] | Callable | None = None,
        keys: Sequence[str] = ("image", "label"),
        empty_weight: float = 1.0,
        cache_dir: str | Path | None = None,
        num_workers: int = 1,
    ) -> None:
        if not data:
            raise ValueError("SliceDataset got no volumes: is dataset_dir right, and its split not empty?")
        if not 0 <= empty_weight <= 1:
            raise ValueError(f"empty_weight is a share from 0 to 1, got {empty_weight}.")
        self.data = data
        self.keys = tuple(keys)
        self.slice_transform = Compose(slice_transform)
        cut = Compose([Compose(transform), SlicesFirstd(keys)]).flatten()
        self.volumes = (
            VolumeDataset(data, cut, cache=True, num_workers=num_workers)
            if cache_dir is None
            else _StoredVolumeDataset(data, cut, cache_dir)
        )
        visits: list[tuple[int, int]] = []
        empty: list[tuple[int, int]] = []
        size = 0
        for v in range(len(data)):
            volume = self.volumes[v]
            size += sum(volume[key].nbytes for key in self.keys)
            foreground = volume[self.keys[-1]].flatten(1).any(1)
            for k, full in enumerate(foreground.tolist()):
                (visits if full or empty_weight == 1 else empty).append((v, k))
        self._visits, self._empty = visits, empty
        self._empty_visits = round(empty_weight * len(empty))
        logger.info(
            f"{len(data)} volumes, {len(self)} slices an epoch, {len(empty) - self._empty_visits} empty ones left out, "
            f"{size / 1e6:.0f} MB {'in memory' if cache_dir is None else f'in {cache_dir}'}"
        )

    def __len__(self) -> int:
        return len(self._visits) + self._empty_visits

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        v, k = self._slice(index)
        volume = self.volumes[v]
        return self.slice_transform({key: volume[key][k] for key in self.keys})

    def _slice(self, index: int) -> tuple[int, int]:
        if index < 0:
            index += len(self)
        if index < len(self._visits):
            return self._visits[index]
        # The n-th empty visit draws from the n-th of equal shares of the empty slices: each has its turn some epoch.
        share = len(self._empty) / self._empty_visits
        n = index - len(self._visits)
        return self._empty[int(n * share + self.R.uniform(0, share))]

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> SliceDataset:
        """Seed the dataset's and the slice transforms' draws; MONAI's ``DataLoader`` calls it in each worker."""
        super().set_random_state(seed, state)
        self.slice_transform.set_random_state(seed, state)
        return self

    def randomize(self, data: Any = None) -> None:
        """Nothing is drawn ahead of a visit."""


class LabelMapWriter(NibabelWriter):
    """:class:`monai.data.NibabelWriter` for a label map that lies on its input in every reader.

    The input's NIfTI header is kept (sform, qform, spacing, units), whatever it says: ACDC's headers contradict
    themselves, and readers differ in which part they believe. The map has the input's exact shape, a trailing
    dimension of 1 included. It is written under a temporary name and renamed when whole. For an input of another
    format, MONAI's affine is written.
    """

    def set_metadata(self, meta_dict: Mapping | None, resample: bool = True, **options: Any) -> None:
        super().set_metadata(meta_dict, resample, **options)
        self.source = str((meta_dict or {}).get("filename_or_obj", ""))

    def write(self, filename: PathLike, verbose: bool = False, **obj_kwargs: Any) -> None:
        target = Path(filename)
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".partial-", suffix="".join(target.suffixes[-2:]), dir=target.parent)
        os.close(handle)
        try:
            source = nib.load(self.source) if self.source.endswith((".nii", ".nii.gz")) else None
            if isinstance(source, (nib.Nifti1Image, nib.Nifti2Image)):
                dtype = get_equivalent_dtype(self.output_dtype, np.ndarray)
                data = np.asarray(self.data_obj).astype(dtype).reshape(source.shape)
                image = type(source)(data, None, source.header)
                image.set_data_dtype(dtype)
                image.header["cal_min"] = image.header["cal_max"] = 0
                image.header.extensions.clear()
                nib.save(image, name)
            else:
                super().write(name, verbose=verbose, **obj_kwargs)
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, target)
        except BaseException:
            os.unlink(name)
            raise


def _umask() -> int:
    """The process's file mode mask, which temporary files ignore."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
