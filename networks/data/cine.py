"""Time series of volumes on one grid: a beating heart in a NIfTI file or a DICOM study, read frame by frame."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pydicom
from pydicom.uid import UID

from ..errors import DataError
from .dicom import Frame, SeriesReader, stacked
from .formats import MOST_VALUES
from .readers import NiftiReader, as_tensor, load_nifti
from .studies import StudyFrame, study_stack

__all__ = ["TimeSeries", "nifti_series", "study_series", "unreadable_series"]

MILLISECONDS = {8: 1e3, 16: 1.0, 24: 1e-3}
"""By NIfTI's code of the unit of time: seconds, milliseconds, microseconds."""

MULTIFRAME = UID("1.2.840.10008.5.1.4.1.1.7.3")
"""DICOM's kind of object that is frames of grey values and nothing more."""

PIXELS = ["SOPInstanceUID", "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns"]
PIXELS += ["BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData"]


@dataclass(eq=False)
class TimeSeries:
    """Volumes on one grid, one after another in time.

    It can be pickled and used in other processes: each opens the files for itself.

    Attributes:
        source: the file, or the folder of the study.
        shape: X, Y, Z of each frame, in voxels; of a study, Z are the slices.
        frames: how many there are, T; 2 or more.
        times: milliseconds of each frame, of a study since the R wave, of a file since the first frame; None where
            the header does not say.
        interval: the mean one between R waves in milliseconds, by the header; None where it does not say.
        height: of the patient in metres, as the header says it, right or wrong; None where it does not say.
        weight: of the patient in kilograms, likewise.
        reader: gives a frame by its number; see :meth:`read`.
        phases: of a study, the slices of each frame; None of a file.
    """

    source: str
    shape: tuple[int, int, int]
    frames: int
    times: tuple[float, ...] | None
    interval: float | None
    height: float | None
    weight: float | None
    reader: Callable[[int], Any]
    phases: Sequence[Sequence[Frame]] | None = None

    def __str__(self) -> str:
        if isinstance(self.reader, _Refusal):
            return f"refused: {self.reader.reason}"
        return f"{self.frames} frames of {' x '.join(map(str, self.shape))} voxels"

    @property
    def step(self) -> float | None:
        """Mean time from frame to frame in milliseconds; None where times are not known or run backwards."""
        if self.times is None or not self.times[-1] > self.times[0]:
            return None
        return (self.times[-1] - self.times[0]) / (self.frames - 1)

    def read(self, frame: int) -> Any:
        """One frame, as :func:`networks.data.readers.read_image` gives a volume.

        No other is kept in memory, but the stored numbers of DICOM files that hold several.

        Args:
            frame: its number, from 0.

        Returns:
            ``MetaTensor`` of floats, ``1, X, Y, Z``. The affine is in millimetres, ``filename_or_obj`` the source.

        Raises:
            IndexError: when there is no such frame.
            Exception: those of nibabel and ITK for a file that cannot be read.
        """
        if not 0 <= frame < self.frames:
            raise IndexError(f"{self.source} has the frames 0 to {self.frames - 1}, asked for {frame}.")
        return self.reader(frame)


def unreadable_series(source: str | Path, reason: str) -> TimeSeries:
    """What stands for a time series that cannot be read, so that it is refused in its turn and others go on.

    Args:
        source: the file or folder.
        reason: the sentence for people.

    Returns:
        A series of one frame, whose reading raises a :class:`DataError` of that reason.
    """
    return TimeSeries(str(source), (0, 0, 0), 1, None, None, None, None, _Refusal(reason))


class _Refusal:
    """Instead of frames."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __call__(self, frame: int) -> Any:
        raise DataError(self.reason)


def nifti_series(file: str | Path) -> TimeSeries | None:
    """The time series that a NIfTI file holds, ``X, Y, Z, T``.

    Args:
        file: its name.

    Returns:
        The series; None of a file that holds one volume. Dimensions of 1 at the end are none, as
        :class:`networks.data.readers.NiftiReader` has it. Times are those of ``pixdim`` where the header names their
        unit.

    Raises:
        DataError: when the file has more dimensions, colours, complex numbers, or a frame of no voxels or too many.
        Exception: those of nibabel for a file that cannot be read.
    """
    header: Any = load_nifti(file).header
    shape = [int(size) for size in header.get_data_shape()]
    while len(shape) > 3 and shape[-1] == 1:
        del shape[-1]
    if len(shape) <= 3:
        return None
    if len(shape) > 4:
        raise DataError(f"{file} has {len(shape)} dimensions {shape}, expected X, Y, Z, time. Split it first.")
    if 0 in shape:
        raise DataError(f"{file} is empty: shape {shape}. Export it again.")
    if math.prod(shape[:3]) > MOST_VALUES:
        raise DataError(f"{file} has frames of shape {shape[:3]}, more than {MOST_VALUES} values. Crop it first.")
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf":
        kind = "colours" if dtype.fields else f"values of type {dtype}"
        raise DataError(f"{file} holds {kind} over time, expected one real number per voxel. Convert it first.")
    step = float(header["pixdim"][4]) * MILLISECONDS.get(int(header["xyzt_units"]) & 56, math.nan)
    times = tuple(step * t for t in range(shape[3])) if 0 < step < math.inf else None
    x, y, z, count = shape
    return TimeSeries(str(file), (x, y, z), count, times, None, None, None, _NiftiFrames(file))


class _NiftiFrames:
    """Frames of a NIfTI file.

    A packed file has no way to its middle. It is kept open, so that frames read in their order unpack it once, and
    memory holds one; an earlier frame begins anew.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = file
        self._image: Any = None
        self._process = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_image": None}

    def __call__(self, frame: int) -> Any:
        if self._image is None or self._process != os.getpid():  # forked processes would share one place in the file
            self._image, self._process = load_nifti(self.file, keep_open=True), os.getpid()
        reader = NiftiReader()
        reader.filenames = (str(self.file),)
        ends = (0,) * (self._image.ndim - 4)
        return as_tensor(reader, self._image.slicer[(slice(None),) * 3 + (frame, *ends)], self.file)


def study_series(folder: str | Path, left_out: list[dict[str, str]]) -> TimeSeries | None:
    """The short-axis cine of the DICOM study in a folder and those below it; see :func:`networks.data.studies`.

    Args:
        folder: holds one study, in whatever folders and files; or one file that holds all frames.
        left_out: gets ``{"file", "why"}`` of each file and folder that cannot be read, and of each series that is not
            taken, if there is a cine. The log has them too.

    Returns:
        The series; None where no slice has phases, as of a series that is one volume.

    Raises:
        DataError: when the study cannot be sorted, or the stack has gaps: those of
            :func:`networks.data.studies.study_stack`.
    """
    stack = study_stack(folder, left_out)
    if stack is None:
        return None
    rows, columns = stack.phases[0][0].size
    return TimeSeries(
        source=str(folder),
        shape=(columns, rows, len(stack.phases[0])),
        frames=len(stack.phases),
        times=stack.times,
        interval=stack.interval,
        height=stack.height,
        weight=stack.weight,
        reader=_StudyFrames(str(folder), stack.phases),
        phases=stack.phases,
    )


class _StudyFrames:
    """Frames of a study.

    A file of several frames is unpacked whole, so its stored numbers are kept: two bytes a voxel of such files, as in
    the scanner's export. Files of one frame are read as they are needed.
    """

    def __init__(self, folder: str, phases: list[list[StudyFrame]]) -> None:
        self.folder = folder
        self.phases = phases
        self._files: dict[Path, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_files": {}}

    def __call__(self, frame: int) -> Any:
        slices = self.phases[frame]
        single = all(one.alone for one in slices)
        image = stacked(slices, None if single else self._pixels)
        return as_tensor(SeriesReader(), image, self.folder)

    def _pixels(self, frame: Frame) -> np.ndarray:
        assert isinstance(frame, StudyFrame)
        if frame.file not in self._files:
            self._files[frame.file] = _stored(frame.file)
        slope, intercept = frame.scale or (1.0, 0.0)
        return self._files[frame.file][frame.number] * slope + intercept


def _stored(file: Path) -> np.ndarray:
    """The numbers that a DICOM file holds, frames, rows and columns, without their scale.

    ITK refuses frames that lie at one position, and scales all as the first. So it gets the pixels alone.
    """
    import itk

    data = pydicom.dcmread(file, force=True, specific_tags=PIXELS)
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = MULTIFRAME
    with TemporaryDirectory() as folder:
        name = os.path.join(folder, "pixels.dcm")
        data.save_as(name)
        return np.array(np.atleast_3d(itk.array_from_image(itk.imread(name, imageio=itk.GDCMImageIO.New()))))
