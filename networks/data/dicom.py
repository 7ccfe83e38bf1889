"""A folder of DICOM files as one volume: its images found, sorted by what their headers say, and checked.

MONAI's ``ITKReader`` stacks the files of a folder. Of two series it takes the first, a missing slice it closes by
spreading the others evenly, and a scale of grey values that differs between files it takes from the first of them: the
label map would lie beside the patient, or be of another image.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from monai.config import PathLike
from monai.data import ITKReader
from monai.utils import ensure_tuple

from ..errors import DataError

__all__ = ["Frame", "SeriesReader", "has_image", "holds_all_frames", "is_series", "series_frames"]

logger = logging.getLogger(__name__)

NO_IMAGES = {
    "1.2.840.10008.5.1.4.1.1.66.4": "a segmentation",
    "1.2.840.10008.5.1.4.1.1.66.7": "a label map",
    "1.2.840.10008.5.1.4.1.1.481.2": "a radiotherapy dose",
}
"""Kinds of DICOM objects that have pixels and are no images. Most others that are none have no pixels."""

TAGS = ["SOPClassUID", "SeriesInstanceUID", "Modality", "Rows", "Columns", "SamplesPerPixel"]
TAGS += ["NumberOfFrames", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"]
TAGS += ["SpacingBetweenSlices", "SliceThickness"]
TAGS += ["SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"]

EXTENTS = ("SpacingBetweenSlices", "SliceThickness")
"""What tells how far one slice reaches along its normal, the better first."""


@dataclass
class Frame:
    """A slice of a series.

    Attributes:
        file: holds it.
        number: of the slice among those of its file, from 0.
        size: rows and columns.
        position: of the first pixel's centre in the patient, in millimetres to the left, back and head; None where
            the header does not say.
        rows: unit vectors ``2, 3``: the direction in which a row runs, and that in which a column runs.
        spacing: between rows and between columns, in millimetres.
        extent: along the normal in millimetres, where no neighbour tells it: the distance between slices, which has
            the gaps in it, else the thickness of one; None where the header says neither.
    """

    file: Path
    number: int
    size: tuple[int, int]
    position: np.ndarray | None
    rows: np.ndarray
    spacing: np.ndarray
    extent: float | None

    def __str__(self) -> str:
        return self.file.name if self.number == 0 else f"frame {self.number + 1} of {self.file.name}"


def is_series(folder: Path) -> bool:
    """Whether a folder itself, not its subfolders, holds DICOM files: named ``.dcm``, or with DICOM's preamble.

    Raises:
        OSError: when the folder or a file in it cannot be read.
    """
    return folder.is_dir() and any(_dicom_files(folder))


def has_image(folder: Path) -> bool:
    """Whether one of a folder's DICOM files holds an image, or is damaged, so that nobody knows.

    Raises:
        OSError: when the folder or a file in it cannot be read.
    """
    for file in _dicom_files(folder):
        try:
            if no_image(header_of(file)) is None:
                return True
        except DataError:
            return True
    return False


def holds_all_frames(file: Path) -> bool:
    """Whether one DICOM file is a whole stack of slices, as of enhanced MR and CT.

    Raises:
        DataError: when it is damaged.
    """
    return int(header_of(file).get("NumberOfFrames") or 1) > 1


def series_frames(folder: str | Path, tolerance: float = 0.1) -> list[Frame]:
    """The slices of the one series in a folder, along their normal, checked to be one whole volume.

    A slice missing at either end cannot be told from a shorter scan. Files that are no images, such as structure sets
    and segmentations, are left out with a line in the log.

    Args:
        folder: holds the files of one series; or one file that holds all slices.
        tolerance: share of the usual distance between slices by which one may differ.

    Returns:
        One frame or more.

    Raises:
        DataError: when there is no image, a damaged file, more than one series, size or direction, a slice without
            position or size of pixels, one missing in between, two at one position, or slices that are shifted
            against each other.
    """
    folder = Path(folder)
    headers = {file: header_of(file) for file in (_dicom_files(folder) if folder.is_dir() else [folder])}
    others = {file.name: kind for file, header in headers.items() if (kind := no_image(header))}
    if others:
        kinds = ", ".join(sorted(set(others.values())))
        logger.warning(f"{folder}: left out {len(others)} files that are no images ({kinds}): {', '.join(others)}")
    images = {file: header for file, header in headers.items() if file.name not in others}
    if not images:
        raise DataError(f"No DICOM image in {folder}. Export the series again, with its pixels.")
    series: dict[str, list[Path]] = {}
    for file, header in images.items():
        series.setdefault(str(header.get("SeriesInstanceUID", "")), []).append(file)
    if len(series) > 1:
        found = "; ".join(f"{len(files)} files such as {files[0].name}" for files in series.values())
        raise DataError(f"{folder} holds {len(series)} DICOM series ({found}). Put each into a folder of its own.")
    frames = [frame for file, header in images.items() for frame in frames_of(file, header)]
    for file, header in images.items():
        _check_one_scale(file, header)
    return in_order(str(folder), frames, tolerance)


class SeriesReader(ITKReader):
    """:class:`monai.data.ITKReader` for a folder of DICOM files, by :func:`series_frames`.

    Each file's own scale of grey values counts, so values are floating-point numbers.
    """

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> Any:
        """Images of ITK, one for each folder."""
        images = [stacked(series_frames(str(folder))) for folder in ensure_tuple(data)]
        return images if len(images) > 1 else images[0]


def stacked(frames: Sequence[Frame], pixels: Callable[[Frame], np.ndarray] | None = None) -> Any:
    """The ITK image of slices that are in order.

    Args:
        frames: the slices, by :func:`in_order`.
        pixels: gives the values of a slice, rows and columns, where ITK is not to read the files.

    Returns:
        ``itk.Image`` of floats.

    Raises:
        DataError: by :func:`extent_of`.
    """
    import itk

    step = extent_of(frames)
    files = [str(frame.file) for frame in frames]
    if pixels is None:
        if len(files) == len(set(files)):
            image = itk.imread(files if len(files) > 1 else files[0], pixel_type=itk.F)
            if len(files) == 1:  # of which ITK asks one of the two tags, and takes 1 mm without it
                image.SetSpacing([*list(image.GetSpacing())[:2], step])
            return image
        read = {file: np.atleast_3d(itk.array_from_image(itk.imread(file, pixel_type=itk.F))) for file in set(files)}
        pixels = lambda frame: read[str(frame.file)][frame.number]
    image = itk.image_from_array(np.stack([pixels(frame) for frame in frames]).astype(np.float32, copy=False))
    first = frames[0]
    assert first.position is not None  # as they are in order
    normal = np.cross(*first.rows)
    image.SetOrigin(first.position.tolist())
    image.SetSpacing([first.spacing[1], first.spacing[0], step])
    image.SetDirection(itk.matrix_from_array(np.ascontiguousarray(np.stack([*first.rows, normal], 1))))
    return image


def extent_of(frames: Sequence[Frame]) -> float:
    """How far each of some slices that are in order reaches along their normal, in millimetres.

    Raises:
        DataError: when there is one alone, and its header does not say.
    """
    first, last = frames[0], frames[-1]
    if len(frames) > 1:
        assert first.position is not None and last.position is not None
        return float(np.linalg.norm(last.position - first.position)) / (len(frames) - 1)
    if first.extent is None:
        raise DataError(
            f"{first.file.parent}: {first} is one slice and has neither {' nor '.join(EXTENTS)}, so no volume can be "
            "measured. Export the original images, or the whole stack."
        )
    return first.extent


def _dicom_files(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.iterdir()) if is_dicom(file))


def is_dicom(file: Path) -> bool:
    """Whether a file is named ``.dcm``, or has DICOM's preamble, and is no table of contents.

    Raises:
        OSError: when it cannot be read.
    """
    if file.name.startswith(".") or file.name.upper() == "DICOMDIR" or not file.is_file():
        return False
    if file.suffix.lower() == ".dcm":
        return True
    with file.open("rb") as content:
        return content.read(132)[128:] == b"DICM"


def header_of(file: Path, tags: Sequence[str] = ()) -> pydicom.Dataset:
    """What a file says but its pixels.

    Args:
        file: its name.
        tags: keywords of what is read besides :data:`TAGS`.

    Raises:
        DataError: when it is damaged.
        OSError: when it cannot be read.
    """
    try:
        header = pydicom.dcmread(file, stop_before_pixels=True, force=True, specific_tags=[*TAGS, *tags])
    except OSError:
        raise
    except Exception as error:  # pydicom has no class of its own for most of what a damaged file makes it raise
        raise DataError(f"{file} is a damaged DICOM file ({error}). Export the series again.") from error
    if ("SOPClassUID" not in header and "Rows" not in header) or ("Rows" in header) != ("Columns" in header):
        raise DataError(f"{file} is a damaged DICOM file, or none. Export the series again, or move the file away.")
    return header


def no_image(header: pydicom.Dataset) -> str | None:
    """What an object is that is no image; None of an image."""
    if kind := NO_IMAGES.get(str(header.get("SOPClassUID", ""))):
        return kind
    return None if "Rows" in header else str(header.get("Modality", "")) or "no pixels"


def frames_of(file: Path, header: pydicom.Dataset) -> list[Frame]:
    """The slices that a file holds, by its header.

    Raises:
        DataError: when it holds colours, several frames of which it does not say where each lies, or pixels of which
            it does not say how large they are.
    """
    if int(header.get("SamplesPerPixel") or 1) != 1:
        raise DataError(f"{file} holds colours, expected one number per pixel. Export the original images.")
    count = int(header.get("NumberOfFrames") or 1)
    if count > 1 and len(header.get("PerFrameFunctionalGroupsSequence", [])) != count:
        raise DataError(f"{file} holds {count} frames and does not say where each lies. Export single slices.")
    frames = []
    for number, places in enumerate(places_of(header)):
        position = _vector(places, "PlanePositionSequence", "ImagePositionPatient", 3)
        orientation = _vector(places, "PlaneOrientationSequence", "ImageOrientationPatient", 6)
        spacing = _vector(places, "PixelMeasuresSequence", "PixelSpacing", 2)
        if spacing is None:
            raise DataError(
                f"{file} has no PixelSpacing: the size of its pixels is unknown. Export the original images."
            )
        rows = np.eye(3)[:2] if orientation is None else orientation.reshape(2, 3)
        size = (int(header.Rows), int(header.Columns))
        extents = (number_of(places, f"PixelMeasuresSequence.{name}", least=1e-3) for name in EXTENTS)
        extent = next((number for number in extents if number is not None), None)
        frames.append(Frame(file, number, size, position, rows, spacing, extent))
    return frames


def places_of(header: pydicom.Dataset) -> list[list[pydicom.Dataset]]:
    """Where a header may speak of each frame: in its own group, in that of all frames, at the top of the file."""
    shared = [*header.get("SharedFunctionalGroupsSequence", []), header]
    groups = list(header.get("PerFrameFunctionalGroupsSequence", []))
    count = int(header.get("NumberOfFrames") or 1)
    return [[*groups[number : number + 1], *shared] for number in range(count)]


def _check_one_scale(file: Path, header: pydicom.Dataset) -> None:
    """ITK scales the grey values of all frames of a file as those of the first."""
    scales = {
        (float(scale.RescaleSlope), float(scale.RescaleIntercept))
        for group in header.get("PerFrameFunctionalGroupsSequence", [])
        for scale in group.get("PixelValueTransformationSequence", [])
    }
    if len(scales) > 1:
        raise DataError(f"{file} holds frames whose grey values are scaled otherwise each. Export single slices.")


def _vector(places: Sequence[pydicom.Dataset], sequence: str, name: str, length: int) -> np.ndarray | None:
    """A value of a frame, by its :func:`places_of`."""
    for place in places:
        for holder in (*place.get(sequence, []), place):
            value = holder.get(name)
            if value is not None and len(value) == length:
                return np.array([float(number) for number in value])
    return None


def value_of(places: Sequence[pydicom.Dataset], names: Iterable[str]) -> Any:
    """The first value that a frame's header has of some names, ``Sequence.Keyword`` or ``Keyword``."""
    for name in names:
        *sequence, keyword = name.split(".")
        for place in places:
            for holder in (*(place.get(sequence[0]) or [] if sequence else []), place):
                if (value := holder.get(keyword)) not in (None, ""):
                    return value
    return None


def number_of(places: Sequence[pydicom.Dataset], *names: str, least: float = -math.inf) -> float | None:
    """:func:`value_of` as a number; None where it is none, or less than ``least``."""
    try:
        number = float(value_of(places, names))
    except (TypeError, ValueError, OverflowError):  # not there, or no number
        return None
    return number if math.isfinite(number) and number >= least else None


def in_order(folder: str, frames: Sequence[Frame], tolerance: float = 0.1) -> list[Frame]:
    """The frames along their normal, if they make one volume; see :func:`series_frames`."""
    frames = list(frames)
    if len(frames) == 1:
        return frames
    first = frames[0]
    for frame in frames:
        if frame.position is None:
            raise DataError(f"{folder}: {frame} does not say where it lies. Export the original images.")
        if frame.size != first.size or not np.allclose(frame.spacing, first.spacing, rtol=1e-3):
            raise DataError(
                f"{folder} holds slices of different sizes or pixels, {first} and {frame}. Put each stack into a "
                "folder of its own."
            )
        if np.abs(frame.rows - first.rows).max() > 1e-3:
            raise DataError(f"{folder} holds slices of different directions. Put each stack into a folder of its own.")
    normal = np.cross(*first.rows)
    positions = np.array([frame.position for frame in frames])
    order = np.argsort(positions @ normal, kind="stable")
    frames = [frames[at] for at in order]
    steps = np.diff(positions[order], axis=0)
    gaps = steps @ normal
    usual = float(np.median(gaps))

    def pair(at: int) -> str:
        return f"{frames[at]} and {frames[at + 1]}"

    if gaps.min() < 1e-3:
        raise DataError(
            f"{folder}: two slices lie at one position, {pair(int(gaps.argmin()))}. Are they phases of a series over "
            "time, or copies? Put one volume into a folder of its own."
        )
    uneven = np.abs(gaps - usual) - tolerance * usual
    if uneven.max() > 1e-3:
        wide, narrow = int(gaps.argmax()), int(gaps.argmin())
        raise DataError(
            f"{folder}: slices are missing or unevenly spaced. {pair(wide)} are {gaps[wide]:.2f} mm apart, "
            f"{pair(narrow)} {gaps[narrow]:.2f} mm. Export the whole series again."
        )
    shifts = np.linalg.norm(steps - gaps[:, None] * normal, axis=1)
    if shifts.max() > tolerance * usual:
        at = int(shifts.argmax())
        raise DataError(
            f"{folder}: slices are shifted against each other, as by a tilted gantry: {pair(at)} by "
            f"{shifts[at]:.2f} mm. Resample the series to a straight volume first."
        )
    return frames
