"""Pictures for people: label maps in colours, overlays, curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from monai.data import MetaTensor
from monai.transforms import Orientation
from PIL import Image, ImageDraw

from ..data.formats import PICTURES
from ..data.readers import read_image

__all__ = ["COLOURS", "curves", "label_picture", "overlay", "read_slice", "thin", "upright"]

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


def overlay(image: np.ndarray, labels: Sequence[np.ndarray], alpha: float = 0.45) -> Image.Image:
    """The image beside copies of itself under label maps, such as truth and prediction.

    Args:
        image: ``H, W``, any range, shown between its 1st and 99th percentile; or ``H, W, 3`` in 0 to 255.
        labels: label maps ``H, W``, 0 stays clear.
        alpha: opacity of the colours.

    Returns:
        An RGB picture, panels side by side, the short side at least 256 pixels.
    """
    if image.ndim == 2:
        low, high = np.percentile(image, (1, 99))
        image = np.clip((image - low) / max(high - low, 1e-6), 0, 1)[..., None].repeat(3, 2) * 255
    panels = [image]
    for label in labels:
        colour = np.array(COLOURS, dtype=float)[(label.astype(int) - 1) % len(COLOURS)]
        panels.append(np.where(label[..., None] > 0, (1 - alpha) * image + alpha * colour, image))
    picture = Image.fromarray(np.concatenate(panels, 1).astype(np.uint8))
    scale = max(1, -(-256 // min(image.shape[:2])))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def curves(history: Sequence[Mapping[str, str]], width: int = 480, height: int = 300) -> Image.Image:
    """Training loss and validation score by epoch, side by side.

    Args:
        history: rows of ``history.csv``, one or more.
        width: of each plot, in pixels.
        height: of both.

    Returns:
        An RGB picture ``2 * width`` by ``height``.
    """
    picture = Image.new("RGB", (2 * width, height), "white")
    draw = ImageDraw.Draw(picture)
    for plot, column in enumerate(("loss", "score")):
        points = [(int(row["epoch"]), float(row[column])) for row in history if row[column] not in ("", "nan")]
        left, right, top, bottom = plot * width + 60, (plot + 1) * width - 15, 30, height - 35
        draw.text((left, 8), {"loss": "training loss", "score": "validation score"}[column], fill="black")
        draw.line([(left, top), (left, bottom), (right, bottom)], fill="black")
        if not points:
            continue
        epochs, values = zip(*points, strict=True)
        low, high = min(values), max(values)
        span = (high - low) or 1.0
        across = (right - left) / max(epochs[-1] - 1, 1)
        line = [(left + (e - 1) * across, bottom - (v - low) / span * (bottom - top)) for e, v in points]
        draw.line(line, fill=COLOURS[2], width=2)
        for x, y in line if len(line) < 40 else line[-1:]:
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=COLOURS[2])
        for y, value in ((top, high), (bottom, low)):
            draw.text((plot * width + 8, y - 6), f"{value:.3f}", fill="black")
        draw.text((left, bottom + 8), "epoch 1", fill="black")
        draw.text((right - 30, bottom + 8), str(epochs[-1]), fill="black")
    return picture


def read_slice(file: str, axis: int, index: int) -> np.ndarray:
    """One slice of an image file, as :func:`overlay` takes it.

    Args:
        file: a volume or a picture.
        axis: axis of the :func:`upright` volume to cut across.
        index: position along it.

    Returns:
        ``H, W`` or, of an RGB picture, ``H, W, 3``.
    """
    image = read_image(file)
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
    labels = (("L", "R"), ("P", "A"), ("I", "S"))
    return np.asarray(Orientation(axcodes="LPI", labels=labels)(volume).cpu())[0]


def label_picture(label: np.ndarray) -> Image.Image:
    """A label map ``H, W`` as a picture whose values are the classes and whose palette shows them in colours."""
    picture = Image.fromarray(label.astype(np.uint8)).convert("P")
    picture.putpalette([0, 0, 0, *(channel for i in range(255) for channel in COLOURS[i % len(COLOURS)])])
    return picture


def thin(image: np.ndarray, largest: int = 512) -> np.ndarray:
    """Every n-th pixel of an image ``H, W, ...``, so that no side is longer than ``largest``."""
    step = -(-max(image.shape[:2]) // largest)
    return image[::step, ::step]
