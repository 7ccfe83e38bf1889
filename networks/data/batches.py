"""Time series among volumes: each frame is an item of the dataset, and a batch holds frames of one series."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch.utils.data import Sampler

__all__ = ["CaseBatches", "in_frames"]


def in_frames(cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each frame of the time series among some cases as a case of its own.

    Args:
        cases: those with ``"series"``, a :class:`networks.data.cine.TimeSeries`, are divided.

    Returns:
        The cases in their order. Frames have ``"frame"``, their number from 0, ``"frames"``, how many there are, and
        ``"step"``, the milliseconds from one to the next, 0 where they are not known.
    """
    items: list[dict[str, Any]] = []
    for case in cases:
        series = case.get("series")
        if series is None:
            items.append(dict(case))
        else:
            same = {**case, "frames": series.frames, "step": series.step or 0.0}
            items += [{**same, "frame": frame} for frame in range(series.frames)]
    return items


class CaseBatches(Sampler[list[int]]):
    """Batches of one volume, or of some frames of one series, in their order; all frames of a case in one process.

    Frames of few slices come several at a time, so that the network gets whole batches of slices. Memory holds those
    frames alone, however many the series has. With several processes, each has every n-th case.

    Args:
        dataset: its ``data`` are the cases, as of :func:`in_frames`.
        slices: that the network takes at once.
    """

    def __init__(self, dataset: Any, slices: int = 8) -> None:
        self.batches: list[list[int]] = []
        groups = groupby(range(len(dataset.data)), lambda index: str(dataset.data[index]["image"]))
        for case, (_, indices) in enumerate(groups):
            if case % _processes() == _process():
                numbers = list(indices)
                series = dataset.data[numbers[0]].get("series")
                together = slices if series is not None and min(series.shape) < slices else 1
                self.batches += [numbers[at : at + together] for at in range(0, len(numbers), together)]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _processes() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _process() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
