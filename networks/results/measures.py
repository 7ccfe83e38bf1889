"""Measures of a label map: how large each structure is, how bright, in how many parts, and how sure the network is.

===================  ===================================================================
column               what
===================  ===================================================================
NAME_ml              volume in millilitres; of a picture ``NAME_mm2``, or ``NAME_pixels`` where its spacing is unknown
NAME_mean_intensity  mean of the image over the structure, in the image's own values
NAME_components      parts that do not touch, not even at a corner
NAME_confidence      mean probability of the chosen class over the structure, 0 to 1
confidence           the same over all structures together
===================  ===================================================================

A structure that was not found has size 0, no components, and NaN for the means.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage

from ..data.formats import MOST_CLASSES
from ..errors import DataError
from ..storage import write_csv

__all__ = [
    "column_of",
    "components",
    "measures",
    "structure_boxes",
    "structure_names",
    "voxel_size",
    "write_measures",
]


def measures(
    label: np.ndarray,
    names: Mapping[int, str],
    spacing: Sequence[float] | None = None,
    image: np.ndarray | None = None,
    probability: np.ndarray | None = None,
) -> dict[str, float]:
    """Measures of each structure in one label map.

    Args:
        label: ``X, Y, Z``, or ``X, Y`` of a picture; whole numbers, 0 is background.
        names: of the structures by their numbers, without the background. ``left ventricle`` begins the columns
            ``left_ventricle_...``.
        spacing: size of a voxel in millimetres, one number an axis; pictures may have none.
        image: of the label map's shape, or with channels first, whose mean is taken.
        probability: of each voxel's chosen class, in 0 to 1, of the label map's shape.

    Returns:
        The columns of the module's table in its order, structure by structure as in ``names``. Means of intensity and
        confidence are there where ``image`` and ``probability`` are.

    Raises:
        DataError: on a number without a name, two structures of one name, another shape of image or probability,
            probabilities outside 0 to 1, a volume without spacing, a spacing that is not finite and positive.
    """
    if label.ndim not in (2, 3):
        raise DataError(f"A label map has the axes X, Y, Z, or X, Y of a picture; got the shape {list(label.shape)}.")
    columns = _columns(names)
    unit, size = _unit(label.ndim, spacing)
    image = None if image is None else _on_grid("image", image, label)
    if probability is not None and probability.shape != label.shape:
        raise DataError(f"The probabilities have shape {list(probability.shape)}, their label map {list(label.shape)}.")
    row: dict[str, float] = {}
    chosen, total = 0.0, 0
    boxes = structure_boxes(label, names)
    for number, column in columns.items():
        box = boxes.get(number, (slice(0),) * label.ndim)
        mask = label[box] == number
        count = int(np.count_nonzero(mask))
        row[f"{column}_{unit}"] = count * size if spacing is not None else count
        if image is not None:
            row[f"{column}_mean_intensity"] = _mean(image[(slice(None),) + box][:, mask])
        row[f"{column}_components"] = components(mask)
        if probability is not None:
            values = _probabilities(probability[box][mask], column)
            row[f"{column}_confidence"] = _mean(values)
            chosen, total = chosen + float(values.sum(dtype=np.float64)), total + count
    if probability is not None:
        row["confidence"] = chosen / total if total else math.nan
    return row


def structure_names(labels: Mapping[str, str] | Sequence[str], num_classes: int) -> dict[int, str]:
    """Names of the structures by their numbers, without the background.

    Args:
        labels: names by number, such as the metadata's ``channel_def``, where 0 is the background; or a list of them
            without it.
        num_classes: of the network. Where there are others than named, the names are ``class 1`` and so on.

    Returns:
        One for each class from 1 on.
    """
    names = [labels[i] for i in sorted(labels, key=int)][1:] if isinstance(labels, Mapping) else list(labels)
    known = len(names) == num_classes - 1
    return {n: names[n - 1] if known else f"class {n}" for n in range(1, num_classes)}


def column_of(name: str) -> str:
    """How the columns of a structure begin: its name in lower case, words joined by ``_``."""
    return "_".join(re.findall(r"\w+", name.lower()))


def structure_boxes(label: np.ndarray, known: Collection[int], what: str = "The label map") -> dict[int, tuple]:
    """The smallest box around each structure that a label map holds.

    Args:
        label: any shape, whole numbers, 0 is background.
        known: numbers that it may hold besides 0.
        what: names the label map in errors.

    Returns:
        A slice an axis, by the structures' numbers.

    Raises:
        DataError: when the map is empty, or holds fractions or a number that is not known.
    """
    if label.size == 0:
        raise DataError(f"{what} has no voxels: its shape is {list(label.shape)}.")
    low, high = label.min(), label.max()
    if not (0 <= low and high < MOST_CLASSES):  # NaN too
        raise DataError(f"{what} holds values from {low} to {high}, expected whole numbers from 0 to {max(known)}.")
    if label.dtype.kind not in "iu":
        whole = label.astype(np.uint8)
        if (whole != label).any():
            raise DataError(f"{what} holds fractions: resample it by the nearest neighbour.")
        label = whole
    boxes = {number: box for number, box in enumerate(ndimage.find_objects(label), 1) if box is not None}
    unknown = [number for number in boxes if number not in known]
    if unknown:
        expected = ", ".join(map(str, [0, *sorted(known)]))
        raise DataError(f"{what} holds the numbers {unknown[:5]}, expected none but {expected}.")
    return boxes


def voxel_size(spacing: Sequence[float], axes: int) -> float:
    """Volume of a voxel in mm3, or area of a pixel in mm2.

    Args:
        spacing: in millimetres.
        axes: how many numbers it has.

    Returns:
        Their product.

    Raises:
        DataError: on another count, or a number that is not finite and positive.
    """
    if len(spacing) != axes or not all(math.isfinite(mm) and mm > 0 for mm in spacing):
        shown = ", ".join(f"{mm:g}" for mm in spacing)
        raise DataError(f"The spacing is ({shown}) mm, expected {axes} finite numbers above 0.")
    return math.prod(map(float, spacing))


def components(mask: np.ndarray) -> int:
    """Parts of a mask that do not touch, not even at a corner."""
    return int(ndimage.label(mask, ndimage.generate_binary_structure(mask.ndim, mask.ndim))[1])


def write_measures(path: Path, rows: Mapping[str, Mapping[str, float | str]]) -> None:
    """Write a table with one row a case, whole or not at all.

    Args:
        path: ``measures.csv``.
        rows: measures by the case's name. Cases may have different columns. A column that is new in a later row comes
            behind the one before it in that row, so that what belongs together stays together.

    Raises:
        WriteError: when it cannot be written.
    """
    columns: list[str] = []
    for row in rows.values():
        place = 0
        for column in row:
            if column not in columns:
                columns.insert(place, column)
            place = columns.index(column) + 1
    write_csv(
        path, ["case", *columns], [[case, *(_cell(row.get(c, "")) for c in columns)] for case, row in rows.items()]
    )


def _cell(value: float | str) -> str:
    """Six digits of a number, all of a whole one, nothing of NaN."""
    if isinstance(value, (str, int, np.integer)):
        return str(value)
    return "" if math.isnan(value) else f"{value:.6g}"


def _columns(names: Mapping[int, str]) -> dict[int, str]:
    """How the columns of each structure begin."""
    columns = {number: column_of(name) for number, name in names.items()}
    if not names or 0 in names or "" in columns.values() or len(set(columns.values())) < len(columns):
        raise DataError(f"Structures need names of their own by numbers from 1 on, got {dict(names)}.")
    return columns


def _unit(axes: int, spacing: Sequence[float] | None) -> tuple[str, float]:
    """Unit of sizes, and a voxel in it."""
    if spacing is None:
        if axes == 3:
            raise DataError(
                "The volume's spacing is unknown, so its structures have no volume in mL: give its spacing."
            )
        return "pixels", 1
    size = voxel_size(spacing, axes)
    return ("ml", size / 1000) if axes == 3 else ("mm2", size)


def _on_grid(what: str, image: np.ndarray, label: np.ndarray) -> np.ndarray:
    """The image as ``C, X, Y, Z`` or ``C, X, Y``."""
    if image.shape == label.shape:
        return image[None]
    if image.shape[1:] != label.shape:
        raise DataError(f"The {what} has shape {list(image.shape)}, its label map {list(label.shape)}.")
    return image


def _probabilities(values: np.ndarray, column: str) -> np.ndarray:
    if len(values) and not (values.min() >= 0 and values.max() <= 1.001):  # resampling rounds 1 up
        raise DataError(f"Probabilities of {column} range from {values.min()} to {values.max()}, expected 0 to 1.")
    return values


def _mean(values: np.ndarray) -> float:
    return float(values.mean(dtype=np.float64)) if values.size else math.nan
