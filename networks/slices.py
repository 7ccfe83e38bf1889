"""Volumes to slices and back, for 2D networks on 3D images.

NIfTI volume -> load and check -> orientation -> intensity -> field of view -> slices along the last axis -> in-plane
resize -> 2D network -> logits resized back -> label map -> inverse field of view and orientation -> label map with the
input's exact shape and affine.

A picture, such as a photograph or a histology image, is a volume of one slice: it goes the same way.

MONAI does most of it (``Invertd``, the cache classes); here is what it lacks: slicing across thick slices whichever way
the volume is stored, an inferer that keeps no logits of a whole volume, and a dataset of slices that takes volumes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.data import CacheDataset, MetaTensor, PersistentDataset
from monai.data.utils import pickle_hashing
from monai.inferers import Inferer, SimpleInferer
from monai.transforms import (
    Compose,
    Crop,
    InvertibleTransform,
    MapTransform,
    Orientation,
    Pad,
    Randomizable,
)
from monai.utils import TraceKeys, convert_to_tensor
from torch import Tensor
from torch.utils.data import Dataset

from .errors import DataError, beginning, lacks_memory

__all__ = [
    "AutocastInferer",
    "FieldOfViewd",
    "LabelInferer",
    "SliceDataset",
    "SliceOrientationd",
    "SlicesFirstd",
    "VolumeDataset",
    "has_bfloat16",
]

logger = logging.getLogger(__name__)


@contextmanager
def _data_errors(case: Any) -> Iterator[None]:
    """Let a :class:`DataError` through as itself: MONAI wraps it as ``applying transform <object at ...>``.

    One is made of a lack of memory, which names no file.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        cause = beginning(error)
        if isinstance(cause, DataError):
            raise cause from None
        if lacks_memory(cause):
            raise DataError(f"{case['image']} does not fit into memory. Crop or split it first. ({cause})") from error
        raise


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
        for key in self.key_iterator(d) if self.size is not None else ():
            *shape, depth = d[key].shape[1:]
            wanted = [max(1, round(self.size / mm)) for mm in d[self.first_key(d)].pixdim[:2].tolist()]
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


class LabelInferer(Inferer):
    """The label map of a volume by a 2D network, at the volume's own resolution.

    Batches of slices are resized to the network's size, their logits resized back and reduced to the greatest class
    before the next batch comes. Memory holds one byte per voxel, where MONAI's ``SliceInferer`` holds a float per voxel
    and class. In fp32 the label map is the same.

    Args:
        size: height and width that the network sees.
        batch_size: slices in one forward.
        bfloat16: run the network in that type by autocast; None does so on a GPU where :func:`has_bfloat16` holds. On a
            CPU that has it, it is faster too, but rounds otherwise.
        flips: take the mean of the class probabilities of each slice and its three mirror images, in four times the
            time. A network that was trained without flips knows left from right, and loses by it.
        probabilities: take a network in training mode too, and give its class probabilities at the network's size:
            MONAI Label's scoring compares them under dropout.

    Shape:
        ``B, C, H, W, D`` to label maps ``B, 1, H, W, D`` of unsigned 8 bit; of a network in training mode to
        ``B, classes, *size, D`` of floats.

    Raises:
        DataError: when the network is in training mode and ``probabilities`` are not asked for, or it has more
            classes than a label map holds.
    """

    def __init__(
        self,
        size: Sequence[int],
        batch_size: int = 8,
        bfloat16: bool | None = None,
        flips: bool = False,
        probabilities: bool = False,
    ) -> None:
        super().__init__()
        self.probabilities = probabilities
        self.size = (size[0], size[1])
        self.batch_size = batch_size
        self.bfloat16 = bfloat16
        self.flips = flips

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        volumes = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        b, _, h, w, depth = volumes.shape
        slices = volumes.movedim(4, 1).flatten(0, 1)
        training = getattr(network, "training", False)
        if training and not self.probabilities:
            raise DataError("The network is in training mode, and would segment at random: call its eval() first.")
        bfloat16 = volumes.is_cuda and has_bfloat16(volumes.device) if self.bfloat16 is None else self.bfloat16
        found = []
        for batch in slices.split(self.batch_size):
            x = _resize(batch, self.size)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
                logits = network(x, *args, **kwargs).float()
                if self.flips and not training:
                    views = [network(x.flip(axes), *args, **kwargs).flip(axes) for axes in ((2,), (3,), (2, 3))]
                    logits = torch.stack([logits, *views]).float().softmax(2).mean(0)
            if logits.shape[1] > 256:
                raise DataError(f"The network has {logits.shape[1]} classes, more than the 256 that a label map holds.")
            if training:
                found.append(logits.softmax(1))
            else:
                found.append(_resize(logits, (h, w)).argmax(1, keepdim=True).to(torch.uint8))
        labels = torch.cat(found).unflatten(0, (b, depth)).movedim(1, 4)
        return MetaTensor(labels).copy_meta_from(inputs) if isinstance(inputs, MetaTensor) else labels


class AutocastInferer(SimpleInferer):
    """:class:`monai.inferers.SimpleInferer` in bfloat16, on CPUs too, where the trainer's ``amp`` has no effect.

    Args:
        bfloat16: True runs the network in that type by autocast, and gives its maps in fp32, for the loss.
    """

    def __init__(self, bfloat16: bool | None = None) -> None:
        super().__init__()
        self.bfloat16 = bfloat16

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self.bfloat16:
            return super().__call__(inputs, network, *args, **kwargs)
        with torch.autocast(inputs.device.type, torch.bfloat16):
            maps = super().__call__(inputs, network, *args, **kwargs)
        return maps.float() if isinstance(maps, Tensor) else [m.float() for m in maps]


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


def has_bfloat16(device: torch.device | str) -> bool:
    """Whether a device has instructions for bfloat16: a GPU from Ampere on, a CPU with AVX512_BF16 or AMX."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


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
        with _data_errors(self.data[idx]):
            return super()._load_cache_item(idx)

    def _transform(self, index: int) -> Any:
        with _data_errors(self.data[index]):
            return super()._transform(index)


class _StoredVolumeDataset(PersistentDataset):
    """One item per volume, kept on disk until its files or the transforms change; errors name the file."""

    def __init__(self, data: Sequence[Mapping[str, Any]], transform: Compose, cache_dir: str | Path) -> None:
        super().__init__(data, transform, cache_dir, hash_func=self._state, hash_transform=pickle_hashing)

    @staticmethod
    def _state(case: Mapping[str, Any]) -> bytes:
        files = [Path(value) for value in case.values() if isinstance(value, (str, Path))]
        return pickle_hashing({**case, "_changed": [file.stat().st_mtime_ns for file in files if file.exists()]})

    def _cachecheck(self, item_transformed: Any) -> Any:
        with _data_errors(item_transformed):
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
        DataError: when a file cannot be used, there are no volumes, or ``empty_weight`` is not in 0 to 1.
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
            raise DataError("SliceDataset got no volumes: is dataset_dir right, and its split not empty?")
        if not 0 <= empty_weight <= 1:
            raise DataError(f"empty_weight is a share from 0 to 1, got {empty_weight}.")
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
        sample = self.slice_transform({key: volume[key][k] for key in self.keys})
        # a MetaTensor costs each operation of the network a detour, and breaks the graph of a compiled one at each
        return convert_to_tensor(sample, track_meta=False)

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
