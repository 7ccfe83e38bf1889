"""Write the beating heart of a NIfTI file as the DICOM study that a scanner would export."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid
from scipy.ndimage import map_coordinates

TO_LPS = np.diag([-1.0, -1, 1])
"""From NIfTI's directions, right, anterior and up, to DICOM's: left, posterior and up."""

START = 9 * 3600 + 30 * 60
"""When a study begins, in seconds of its day."""

BREATH_HOLD = 14
"""Seconds from one slice to the next: each takes some heartbeats, and the patient breathes in between."""

SAME = {
    "ImageType": ["ORIGINAL", "PRIMARY", "M"],
    "Modality": "MR",
    "Manufacturer": "bundles/phantoms.py",
    "StudyDate": "20240102",
    "SeriesDate": "20240102",
    "AcquisitionDate": "20240102",
    "StudyDescription": "Synthetic heart, no patient",
    "StudyID": "1",
    "AccessionNumber": "",
    "ReferringPhysicianName": "",
    "PatientBirthDate": "",
    "PatientSex": "O",
    "PatientPosition": "HFS",
    "PositionReferenceIndicator": "",
    "BodyPartExamined": "HEART",
    "ScanningSequence": "GR",
    "SequenceVariant": "SS",
    "ScanOptions": "CG",
    "MRAcquisitionType": "2D",
    "EchoTime": 1.3,
    "EchoTrainLength": 1,
    "SamplesPerPixel": 1,
    "PhotometricInterpretation": "MONOCHROME2",
    "BitsAllocated": 16,
    "BitsStored": 12,
    "HighBit": 11,
    "PixelRepresentation": 0,
    "WindowCenter": 150,
    "WindowWidth": 300,
}
"""What all files of all studies say: sex O is DICOM's other, SS the steady state, CG gating by the heart."""


@dataclass(eq=False)
class _Slice:
    """A slice in its phases.

    Attributes:
        position: of the first pixel's middle, in DICOM's mm.
        right: direction of a row.
        down: direction of a column.
        spacing: mm from row to row, and from column to column.
        pixels: phases, rows and columns.
    """

    position: np.ndarray
    right: np.ndarray
    down: np.ndarray
    spacing: tuple[float, float]
    pixels: np.ndarray


def write_study(cine: Path, folder: Path, by_slice: bool, height: float, weight: float, seed: int = 0) -> None:
    """Write two long-axis cines, then the short-axis one, a file for each slice and phase.

    Args:
        cine: the heart, a NIfTI file ``X, Y, Z, T`` of whole numbers from 0 to 4095, whose frames cover one beat.
        folder: receives a folder for each series. Its name is the patient's.
        by_slice: whether each short-axis slice is a series of its own, as some scanners have it, or one series has all.
        height: of the patient in metres.
        weight: of the patient in kilograms.
        seed: goes into the UIDs; the same one makes the same files.
    """
    volume: Any = nib.load(cine)
    values = np.asarray(volume.dataobj)
    matrix, origin = TO_LPS @ volume.affine[:3, :3], TO_LPS @ volume.affine[:3, 3]
    gaps = np.linalg.norm(matrix, axis=0)
    right, down, _ = (matrix / gaps).T
    stack = [
        _Slice(origin + z * matrix[:, 2], right, down, (gaps[1], gaps[0]), values[:, :, z].transpose(2, 1, 0))
        for z in range(values.shape[2])
    ]
    series = [(f"cine {name}", [_long_axis(values, matrix, origin, axis)]) for name, axis in (("4ch", 0), ("2ch", 1))]
    series += [("cine sax", [one]) for one in stack] if by_slice else [("cine sax", stack)]
    step = 1000 * float(volume.header["pixdim"][4])
    interval = step * values.shape[3]
    patient = {
        "PatientID": folder.name.replace("patient", "phantom"),
        "PatientName": folder.name.replace("patient", "Phantom^"),
        "PatientSize": height,
        "PatientWeight": weight,
        "StudyInstanceUID": _uid(seed, folder.name),
        "FrameOfReferenceUID": _uid(seed, folder.name, "place"),
        "StudyTime": _clock(START),
        "NominalInterval": round(interval),
        "HeartRate": round(60_000 / interval),
        "CardiacNumberOfImages": values.shape[3],
        "RepetitionTime": round(step, 2),
        "SliceThickness": round(float(gaps[2]), 6),
        "SpacingBetweenSlices": round(float(gaps[2]), 6),
    }
    begin = START
    for number, (description, slices) in enumerate(series, 3):
        own = {
            "SeriesInstanceUID": _uid(seed, folder.name, number),
            "SeriesNumber": number,
            "SeriesDescription": description,
            "SeriesTime": _clock(begin),
        }
        place = folder / f"{number:02d}_{description.replace(' ', '_')}"
        _write_series(place, slices, {**SAME, **patient, **own}, begin, step)
        begin += BREATH_HOLD * len(slices)


def _write_series(folder: Path, slices: list[_Slice], tags: dict[str, Any], begin: int, step: float) -> None:
    """Write the files of a series that begins at a second of the day, with a phase each ``step`` milliseconds."""
    folder.mkdir(parents=True)
    for z, one in enumerate(slices):
        time = _clock(begin + BREATH_HOLD * z)
        for t, pixels in enumerate(one.pixels):
            instance = z * len(one.pixels) + t + 1
            own = {
                "SOPInstanceUID": _uid(tags["SeriesInstanceUID"], instance),
                "InstanceNumber": instance,
                "AcquisitionNumber": 1,
                "AcquisitionTime": time,
                "ContentTime": time,
                "TriggerTime": round(t * step, 2),
                "ImagePositionPatient": _rounded(one.position),
                "ImageOrientationPatient": _rounded([*one.right, *one.down]),
                "PixelSpacing": _rounded(one.spacing),
            }
            _write(folder / f"{instance:04d}.dcm", pixels, tags | own)


def _long_axis(values: np.ndarray, matrix: np.ndarray, origin: np.ndarray, axis: int) -> _Slice:
    """A square cut across a stack's slices, through its middle and along one of its axes; black beside the stack."""
    side, gap = max(values.shape[:2]), float(np.linalg.norm(matrix[:, 0]))
    right, down = (matrix[:, a] / np.linalg.norm(matrix[:, a]) for a in (axis, 2))
    middle = origin + matrix @ (np.array(values.shape[:3]) - 1) / 2
    position = middle - (side - 1) / 2 * gap * (right + down)
    i, j = gap * np.indices((side, side))
    points = position[:, None, None] + down[:, None, None] * i + right[:, None, None] * j
    at = np.tensordot(np.linalg.inv(matrix), points - origin[:, None, None], 1)
    frames = [map_coordinates(values[..., t], at, order=1) for t in range(values.shape[3])]
    return _Slice(position, right, down, (gap, gap), np.array(frames))


def _write(file: Path, pixels: np.ndarray, tags: dict[str, Any]) -> None:
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = MRImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = tags["SOPInstanceUID"]
    data.Rows, data.Columns = pixels.shape
    data.PixelData = pixels.astype("<u2").tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    data.is_little_endian, data.is_implicit_VR = True, False  # pydicom 2 asks for them, and 3 takes them
    data.save_as(file, write_like_original=False)


def _uid(*parts: object) -> str:
    return generate_uid(entropy_srcs=["/".join(map(str, parts))])


def _clock(seconds: int) -> str:
    return f"{seconds // 3600:02d}{seconds // 60 % 60:02d}{seconds % 60:02d}"


def _rounded(numbers: Iterable[float]) -> list[float]:
    """To a nanometre: DICOM has room for 16 characters a number."""
    return [round(float(number), 6) for number in numbers]
