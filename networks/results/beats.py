"""Pictures of a beating heart: the curve of its volumes, and its contours in motion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from scipy import ndimage

from ..data.cine import TimeSeries, nifti_series
from ..data.geometry import slices_along
from ..errors import DataError
from ..storage import whole_file
from .hearts import NAMES, RIGHT_FIRST, known_times
from .pictures import COLOURS, turned, upright

__all__ = ["beating", "beating_file", "save_gif", "volume_curve"]

_DPI = 100
_TILE = 144  # pixels of a slice's longer side in the GIF
_MARGIN = 0.25  # of the heart's size, shown around it
_MOST_FRAMES = 30  # of a GIF: more would make it larger, not smoother
_GREYS = 32  # of a GIF: its compression lives on few colours

_COLOURS = {name: COLOURS[number - 1] for name, number in RIGHT_FIRST.items()}
"""RGB of the structures, whatever their label numbers."""


def volume_curve(
    volumes: Mapping[str, Sequence[float]],
    ed: int,
    es: int,
    times: Sequence[float] | None = None,
    frames: Sequence[int] | None = None,
) -> Figure:
    """Volumes of both ventricles and the myocardium through the beat, with lines at end-diastole and end-systole.

    Args:
        volumes: mL in each of the T frames by ``lv``, ``myo`` and ``rv``.
        ed: the end-diastolic frame, counted from 0.
        es: the end-systolic one.
        times: of the frames in milliseconds. Unknown or not increasing ones leave the axis to frame numbers.
        frames: what the frames are called, by default 0, 1, 2, ...

    Returns:
        640 by 400 pixels.

    Raises:
        DataError: when the structures, times and names have different numbers of frames, or ED or ES is none of them.
    """
    count = len(volumes["lv"])
    others = [*volumes.values(), *(x for x in (times, frames) if x is not None)]
    if any(len(other) != count for other in others) or not (0 <= ed < count and 0 <= es < count):
        raise DataError(f"The curve needs volumes, times and names of the same frames, with ED {ed} and ES {es}.")
    in_ms = times is not None and known_times(times)
    x = [float(t) for t in (times if times is not None and in_ms else range(count) if frames is None else frames)]
    figure = Figure(figsize=(640 / _DPI, 400 / _DPI), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    for name, title in NAMES.items():
        axes.plot(x, volumes[name], ".-", color=np.array(_COLOURS[name]) / 255, label=title)
    for title, frame in {"ED": ed, "ES": es}.items():
        axes.axvline(x[frame], color="black", linestyle=":", linewidth=1)
        axes.annotate(title, (x[frame], 1), (2, -12), ("data", "axes fraction"), "offset points")
    axes.set(xlabel="time, ms" if in_ms else "frame", ylabel="volume, mL")
    axes.set_ylim(0, 1.1 * max(1, *(max(values) for values in volumes.values())))  # room for the names of the lines
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def beating(
    images: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    spacing: Sequence[float],
    numbers: Mapping[str, int] = RIGHT_FIRST,
    axis: int = 2,
    slices: int = 3,
) -> list[Image.Image]:
    """Contours of the heart over slices of each frame, side by side.

    Args:
        images: one volume ``X, Y, Z`` a frame, any range; grey values are shown between the 1st and 99th percentile of
            all frames. A sequence that reads each frame as it is asked for keeps memory small.
        labels: their label maps, likewise.
        spacing: size of a voxel in millimetres, so that pixels become square.
        numbers: label numbers of ``lv``, ``myo`` and ``rv``.
        axis: of X, Y and Z, the one across the slices.
        slices: how many are shown, spread over those that hold the heart; 1 is the middle one.

    Returns:
        Pictures with a palette, at most 30: of more frames every n-th. The first remaining axis runs to the right, the
        second down, as :func:`networks.results.pictures.upright` volumes want. They are cut to the heart's
        surroundings; of label maps without a heart the slices are shown whole.

    Raises:
        DataError: when there is no frame, or images and label maps differ in number or shape.
    """
    if not len(images) or len(images) != len(labels):
        raise DataError(f"The beating heart needs a label map a frame, got {len(labels)} for {len(images)} frames.")
    shape = labels[0].shape
    window, places = _view(labels, tuple(numbers.values()), axis, slices)
    shown = range(0, len(images), -(-len(images) // _MOST_FRAMES))
    grey = [_cut(images[t], shape, axis, places, window) for t in shown]
    low, high = np.percentile(np.array(grey, float), (1, 99))
    pixel = [mm for a, mm in enumerate(spacing) if a != axis]
    size = _tile([n * mm for n, mm in zip(grey[0][0].shape, pixel, strict=True)])
    pictures = []
    for t, planes in zip(shown, grey, strict=True):
        masks = _cut(labels[t], shape, axis, places, window)
        tiles = [_tile_of(*pair, numbers, size, (low, high)) for pair in zip(planes, masks, strict=True)]
        picture = Image.fromarray(np.concatenate(tiles).T).convert("P")
        picture.putpalette(_palette())
        pictures.append(picture)
    return pictures


def beating_file(series: TimeSeries, label_file: str | Path, numbers: Mapping[str, int]) -> list[Image.Image]:
    """:func:`beating` of a time series and its label map, read frame by frame.

    Args:
        series: the images.
        label_file: NIfTI ``X, Y, Z, T`` on their grid.
        numbers: label numbers in it.

    Returns:
        Pictures with a palette.
    """
    labels = nifti_series(label_file)
    assert labels is not None
    first = turned(series.read(0))
    return beating(
        _Frames(series),
        _Frames(labels),
        first.pixdim.tolist(),
        numbers,
        axis=slices_along(first.affine, first.shape[1:]),
    )


class _Frames(Sequence[np.ndarray]):
    """The frames of a series, :func:`networks.results.pictures.upright`, each read as it is asked for."""

    def __init__(self, series: TimeSeries) -> None:
        self.series = series
        self._last: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.series.frames

    def __getitem__(self, frame: Any) -> Any:
        if frame >= len(self):
            raise IndexError(frame)
        if self._last is None or self._last[0] != frame:
            self._last = frame, upright(self.series.read(frame))
        return self._last[1]


def save_gif(pictures: Sequence[Image.Image], path: Path, beat: float = 1000) -> None:
    """Write pictures as a GIF that repeats for ever, whole or not at all.

    Args:
        pictures: of :func:`beating`.
        path: ``NAME.gif``.
        beat: milliseconds that all pictures together take; each gets 20 or more, which viewers need.

    Raises:
        WriteError: when it cannot be written.
    """
    step = max(20, round(beat / len(pictures) / 10) * 10)  # GIFs count hundredths of a second
    with whole_file(path) as name:
        pictures[0].save(name, save_all=True, append_images=pictures[1:], duration=step, loop=0)


def _view(
    labels: Sequence[np.ndarray], numbers: Sequence[int], axis: int, slices: int
) -> tuple[list[slice], list[int]]:
    """Window of the slices' two axes around the heart, and the slices to show."""
    shape: tuple[int, ...] = labels[0].shape
    heart = np.zeros(shape, bool)
    for label in labels:
        _check_shape(label, shape)
        heart |= np.isin(label, numbers)
    box = ndimage.find_objects(heart.astype(np.uint8))
    ends = [(s.start, s.stop) for s in box[0]] if box else [(0, n) for n in shape]
    start, stop = ends.pop(axis)
    # The middles of equal parts of the stack: its ends show little.
    places = {start + int((stop - start) * (i + 0.5) / slices) for i in range(slices)}
    sides = [n for a, n in enumerate(shape) if a != axis]
    margin = round(_MARGIN * max(high - low for low, high in ends))
    window = [slice(max(0, low - margin), min(n, high + margin)) for (low, high), n in zip(ends, sides, strict=True)]
    return window, sorted(places)


def _check_shape(volume: np.ndarray, shape: tuple[int, ...]) -> None:
    if len(shape) != 3 or volume.shape != shape:
        raise DataError("The frames of the beating heart differ in shape.")


def _cut(
    volume: np.ndarray, shape: tuple[int, ...], axis: int, places: Sequence[int], window: Sequence[slice]
) -> list[np.ndarray]:
    """The window of some slices of a volume."""
    _check_shape(volume, shape)
    return [volume.take(place, axis)[tuple(window)] for place in places]


def _tile(lengths: Sequence[float]) -> tuple[int, int]:
    """Pixels of a slice of so many millimetres."""
    width, height = (max(1, round(_TILE * mm / max(lengths))) for mm in lengths)
    return width, height


def _tile_of(
    plane: np.ndarray, label: np.ndarray, numbers: Mapping[str, int], size: tuple[int, int], window: tuple[float, float]
) -> np.ndarray:
    """Palette indices ``W, H`` of a slice: greys, and contours above them."""
    low, high = window
    scaled = (np.asarray(plane, float) - low) / (high - low or 1)
    tile = (_resized(scaled, size).clip(0, 1) * (_GREYS - 1)).round().astype(np.uint8)
    # The myocardium is outlined together with what it encloses: its inner border is the left ventricle's outline.
    for name, parts in {"myo": ("myo", "lv"), "lv": ("lv",), "rv": ("rv",)}.items():
        mask = _resized(np.isin(label, [numbers[part] for part in parts]).astype(float), size) > 0.5
        tile[mask & ~ndimage.binary_erosion(mask)] = _GREYS + list(NAMES).index(name)
    return tile


def _resized(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A slice ``W, H`` with that many pixels, linearly between the old ones."""
    picture = Image.fromarray(plane.T.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(picture).T


def _palette() -> list[int]:
    greys = [round(255 * i / (_GREYS - 1)) for i in range(_GREYS)]
    return [value for grey in greys for value in (grey,) * 3] + [v for name in NAMES for v in _COLOURS[name]]
