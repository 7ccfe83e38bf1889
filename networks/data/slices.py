"""Datasets of volumes and of their slices, for training and evaluation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import CacheDataset, PersistentDataset
from monai.data.utils import pickle_hashing
from monai.transforms import Compose, Randomizable
from monai.utils import convert_to_tensor
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import DataError, beginning, lacks_memory
from .geometry import SlicesFirstd

__all__ = ["SliceDataset", "VolumeDataset"]

logger = logging.getLogger(__name__)


class PlainErrors(Compose):
    """:class:`monai.transforms.Compose` that ends on the :class:`DataError` of a transform, not on MONAI's wrapping.

    Raises:
        DataError: the one that a transform raised; or when memory does not suffice, naming the image.
    """

    def __call__(self, input_: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        try:
            return super().__call__(input_, *args, **kwargs)
        except (MemoryError, RuntimeError) as error:
            cause = beginning(error)
            if isinstance(cause, DataError):
                raise cause from None
            if lacks_memory(cause):
                raise DataError(
                    f"{input_['image']} does not fit into memory. Crop or split it first. ({cause})"
                ) from error
            raise


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
            data,
            PlainErrors(Compose(transform).flatten().transforms),
            cache_rate=float(cache),
            num_workers=num_workers,
            copy_cache=False,
            progress=False,
        )

    def _fill_cache(self, indices: Sequence[int] | None = None) -> list[Any]:
        # MONAI's pool does not wait for its threads when an item fails; one still inside torch when the interpreter
        # exits aborts the process. No public way gives the dataset another pool; a wrong image in training tests it.
        pool = ThreadPoolExecutor(self.num_workers)
        try:
            return list(pool.map(self._load_cache_item, range(self.cache_num) if indices is None else indices))
        finally:
            pool.shutdown(cancel_futures=True)


class _StoredVolumeDataset(PersistentDataset):
    """One item per volume, kept on disk until its files or the transforms change; errors name the file."""

    def __init__(self, data: Sequence[Mapping[str, Any]], transform: Compose, cache_dir: str | Path) -> None:
        super().__init__(
            data,
            PlainErrors(Compose(transform).flatten().transforms),
            cache_dir,
            hash_func=self._state,
            hash_transform=pickle_hashing,
        )

    @staticmethod
    def _state(case: Mapping[str, Any]) -> bytes:
        files = [Path(value) for value in case.values() if isinstance(value, (str, Path))]
        return pickle_hashing({**case, "_changed": [file.stat().st_mtime_ns for file in files if file.exists()]})


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
