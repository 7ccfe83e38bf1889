"""A folder of DICOM files as one volume: found, and checked before it is stacked.

MONAI's ``ITKReader`` stacks the files of a folder. Of two series it takes the first, and a missing slice it closes by
spreading the others evenly: the label map would lie beside the patient.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .errors import DataError

__all__ = ["check_series", "is_series"]


def is_series(folder: Path) -> bool:
    """Whether a folder itself, not its subfolders, holds DICOM files: named ``.dcm``, or with DICOM's preamble."""
    return folder.is_dir() and any(_is_dicom(file) for file in folder.iterdir() if file.is_file())


def _is_dicom(file: Path) -> bool:
    if file.suffix.lower() == ".dcm":
        return True
    if file.name.upper() == "DICOMDIR":  # a table of contents
        return False
    with file.open("rb") as content:
        return content.read(132)[128:] == b"DICM"


def check_series(folder: str | Path, tolerance: float = 0.1) -> None:
    """Refuse a folder that is not one whole volume of evenly spaced slices.

    A slice missing at either end cannot be told from a shorter scan.

    Args:
        folder: holds the files of one series.
        tolerance: share of the usual distance between slices by which one may differ.

    Raises:
        DataError: when there is no readable image, more than one series or direction, a slice missing in between, two
            at one position, or slices that are shifted against each other.
    """
    import itk  # takes a second

    names = itk.GDCMSeriesFileNames.New()  # set up as ITKReader does, to see the series that it sees
    names.SetUseSeriesDetails(True)
    names.AddSeriesRestriction("0008|0021")
    names.SetDirectory(str(folder))
    series = names.GetSeriesUIDs()
    if not series:
        raise DataError(f"No readable DICOM image in {folder}: damaged files, or none with pixels.")
    files = {uid: list(names.GetFileNames(uid)) for uid in series}
    if len(series) > 1:
        found = "; ".join(f"{len(f)} files such as {Path(f[0]).name}" for f in files.values())
        raise DataError(f"{folder} holds {len(series)} DICOM series ({found}). Put each into a folder of its own.")
    _check_spacing(str(folder), files[series[0]], tolerance)


def _check_spacing(folder: str, files: list[str], tolerance: float) -> None:
    import itk

    origins, directions = [], []
    for file in files:
        header = itk.GDCMImageIO.New(FileName=file)
        header.ReadImageInformation()
        origins.append([header.GetOrigin(axis) for axis in range(3)])
        directions.append([header.GetDirection(axis) for axis in range(3)])
    if len(files) == 1:
        return
    if np.abs(np.array(directions) - directions[0]).max() > 1e-3:
        raise DataError(f"{folder} holds slices of different directions. Put each stack into a folder of its own.")
    normal = np.array(directions[0][2])
    order = np.argsort(np.array(origins) @ normal)
    steps = np.diff(np.array(origins)[order], axis=0)
    gaps = steps @ normal
    usual = float(np.median(gaps))

    def pair(at: int) -> str:
        first, second = (Path(files[order[at + i]]).name for i in (0, 1))
        return f"{first} and {second}"

    if gaps.min() < 1e-3:
        at = int(gaps.argmin())
        raise DataError(
            f"{folder}: two slices lie at one position, {pair(at)}. Are they phases of a series over time, or copies? "
            "Put one volume into a folder of its own."
        )
    uneven = np.abs(gaps - usual) - tolerance * usual
    if uneven.max() > 1e-3:
        at = int(uneven.argmax())
        raise DataError(
            f"{folder}: slices are missing or unevenly spaced. {pair(at)} are {gaps[at]:.2f} mm apart, the others "
            f"{usual:.2f} mm. Export the whole series again."
        )
    shifts = np.linalg.norm(steps - gaps[:, None] * normal, axis=1)
    if shifts.max() > tolerance * usual:
        at = int(shifts.argmax())
        raise DataError(
            f"{folder}: slices are shifted against each other, as by a tilted gantry: {pair(at)} by "
            f"{shifts[at]:.2f} mm. Resample the series to a straight volume first."
        )
