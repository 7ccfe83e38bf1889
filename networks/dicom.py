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
        DataError: when there is no readable image, more than one series, a slice missing in between, or two at one
            position.
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

    places = []
    for file in files:
        header = itk.GDCMImageIO.New(FileName=file)
        header.ReadImageInformation()
        normal = np.array(header.GetDirection(2))
        places.append(float(np.array([header.GetOrigin(axis) for axis in range(3)]) @ normal))
    order = np.argsort(places)
    gaps = np.diff(np.array(places)[order])
    if len(gaps) == 0:
        return
    usual = float(np.median(gaps))
    for position in np.flatnonzero(np.abs(gaps - usual) > tolerance * usual + 1e-3):
        first, second = (Path(files[order[position + i]]).name for i in (0, 1))
        gap = float(gaps[position])
        what = "two slices lie at one position" if gap < 0.5 * usual else "slices are missing or unevenly spaced"
        raise DataError(
            f"{folder}: {what}. {first} and {second} are {gap:.2f} mm apart, the others {usual:.2f} mm. "
            "Export the whole series again, or one volume per folder."
        )
