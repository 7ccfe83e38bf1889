"""Pictures for people: label maps in colours, overlays, curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from monai.data import MetaTensor
from monai.transforms import Orientation
from PIL import Image

from ..data.cine import nifti_series
from ..data.formats import PICTURES
from ..data.readers import read_image

__all__ = ["COLOURS", "curves", "label_picture", "overlay", "read_slice", "thin", "turned", "upright"]

COLOURS = (
    (60, 190, 90),
    (230, 80, 70),
    (70, 120, 230),
    (240, 190, 50),
    (170, 90, 200),
    (70, 200, 210),
    (240, 140, 60),
    (150, 150, 150),
)
"""RGB of the classes 1, 2, 3, ..., repeated from the ninth on."""

_PALETTE = np.array([(0, 0, 0, 0), *((*COLOURS[i % len(COLOURS)], 255) for i in range(255))], np.uint8)
"""RGB and opacity of the classes 0 to 255."""

_DPI = 100
_FONT = 9  # points
_LINE = 20  # pixels that a line of text takes
_COLUMNS = 4  # of class names


def overlay(
    image: np.ndarray, labels: Mapping[str, np.ndarray], names: Sequence[str] = (), alpha: float = 0.45
) -> Figure:
    """The image beside copies of itself under label maps, with a title over each.

    Args:
        image: ``H, W``, any range, shown between its 1st and 99th percentile; or ``H, W, 3`` in 0 to 255.
        labels: label maps ``H, W`` of whole numbers in 0 to 255 by their titles, such as truth and prediction; 0 stays
            clear.
        names: of the classes 1, 2, 3, ...; those that the label maps show are listed below in their colours.
        alpha: opacity of the colours.

    Returns:
        Panels side by side. A pixel of the image is a square of n by n in the figure, n the greatest that keeps a panel
        within 512 by 512.
    """
    seen = [n for n in range(1, len(names) + 1) if any((label == n).any() for label in labels.values())]
    scale = max(1, 512 // max(image.shape[:2]))
    height, width = image.shape[0] * scale, image.shape[1] * scale
    below = _LINE * -(-len(seen) // _COLUMNS)
    total = _LINE + height + below
    panels = 1 + len(labels)
    figure = Figure(figsize=(panels * width / _DPI, total / _DPI), dpi=_DPI)
    low, high = np.percentile(image, (1, 99))  # matplotlib ignores them where the image has colours
    image = image if image.ndim == 2 else image.astype(np.uint8)
    for panel, (title, label) in enumerate([("image", None), *labels.items()]):
        # Placed by hand: a layout of matplotlib's leaves margins, and pixels of unequal size.
        axes = figure.add_axes((panel / panels, below / total, 1 / panels, height / total))
        axes.set_axis_off()
        axes.set_title(title, fontsize=_FONT, pad=4)
        axes.imshow(image, cmap="gray", vmin=low, vmax=high, interpolation="nearest", aspect="auto")
        if label is not None:
            axes.imshow(_PALETTE[label], alpha=alpha, interpolation="nearest", aspect="auto")
    if seen:
        _list_classes(figure, {n: names[n - 1] for n in seen})
    return figure


def _list_classes(figure: Figure, names: Mapping[int, str]) -> None:
    """Names of classes, each beside its colour, at the foot of a figure."""
    handles = [
        Patch(color=_PALETTE[n] / 255, label=name.replace("$", r"\$"))  # else matplotlib reads formulas between dollars
        for n, name in names.items()
    ]
    figure.legend(handles=handles, loc="lower center", ncols=_COLUMNS, fontsize=_FONT, borderaxespad=0, frameon=False)


def curves(history: Sequence[Mapping[str, str]]) -> Figure:
    """Training loss and validation score by epoch, side by side.

    Args:
        history: rows of ``history.csv``, one or more. Where an epoch has no value, there is no point.

    Returns:
        960 by 300 pixels.
    """
    epochs = int(history[-1]["epoch"])
    figure = Figure(figsize=(960 / _DPI, 300 / _DPI), dpi=_DPI, layout="constrained")
    for place, (column, title) in enumerate({"loss": "training loss", "score": "validation score"}.items(), 1):
        rows = [row for row in history if row[column]]
        axes = figure.add_subplot(1, 2, place)
        axes.plot([int(row["epoch"]) for row in rows], [float(row[column]) for row in rows], ".-")
        axes.set(title=title, xlabel="epoch", xlim=(0.5, epochs + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def read_slice(file: str, axis: int, index: int, frame: int | None = None) -> np.ndarray:
    """One slice of an image file, as :func:`overlay` takes it.

    Args:
        file: a volume or a picture.
        axis: axis of the :func:`upright` volume to cut across.
        index: position along it.
        frame: of a time series, from 0.

    Returns:
        ``H, W`` or, of an RGB picture, ``H, W, 3``.
    """
    series = None if frame is None else nifti_series(file)
    image = read_image(file) if series is None else series.read(frame or 0)
    if image.ndim == 3:
        picture = np.asarray(image)
        return picture[0].T if len(picture) == 1 else picture[:3].transpose(2, 1, 0)
    return upright(image).take(index, axis).T


def upright(volume: MetaTensor) -> np.ndarray:
    """Turn a volume so that each slice, transposed, is seen as radiologists do: the patient's right on the left,
    anterior or superior at the top.

    Args:
        volume: ``1, X, Y, Z`` in any orientation; a picture, which has no position, stays as it is.

    Returns:
        ``X, Y, Z`` towards left, posterior and inferior.
    """
    if str(volume.meta.get("filename_or_obj", "")).lower().endswith(PICTURES):
        return np.asarray(volume.cpu())[0]
    return np.asarray(turned(volume).cpu())[0]


def turned(volume: MetaTensor) -> Any:
    """A volume ``C, X, Y, Z`` with its axes towards left, posterior and inferior, as :func:`upright`."""
    labels = (("L", "R"), ("P", "A"), ("I", "S"))
    return Orientation(axcodes="LPI", labels=labels)(volume)


def label_picture(label: np.ndarray) -> Image.Image:
    """A label map ``H, W`` as a picture whose values are the classes and whose palette shows them in colours."""
    picture = Image.fromarray(label.astype(np.uint8)).convert("P")
    picture.putpalette(_PALETTE[:, :3].tobytes())
    return picture


def thin(image: np.ndarray, largest: int = 512) -> np.ndarray:
    """Every n-th pixel of an image ``H, W, ...``, so that no side is longer than ``largest``."""
    step = -(-max(image.shape[:2]) // largest)
    return image[::step, ::step]
