"""Label maps back to the hospital: DICOM segmentation objects that lie on the images they were made of.

highdicom writes them; the extra ``dicom`` installs it. OHIF and 3D Slicer lay them over the series.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.valuerep import DSfloat

from ..data.dicom import Frame, extent_of, header_of, places_of
from ..errors import DataError
from ..storage import whole_file
from .dicom_codes import CODES, MAKER, described

__all__ = ["CODES", "phase_file", "write_phases", "write_segmentation"]

LONGEST = 64  # letters of a name in DICOM

FIRST_SERIES = 9001
"""Number of the series that is written, beyond those that scanners give; phases count on from it."""

IDENTITY = ["SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID"]

PATIENT = ["PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate"]
PATIENT += ["StudyTime", "ReferringPhysicianName"]

COPIED = ["SpecificCharacterSet", "PositionReferenceIndicator", "LossyImageCompression"]
COPIED += ["LossyImageCompressionRatio", "LossyImageCompressionMethod"]

PLAIN_KIND = "1.2.840.10008.5.1.4.1.1.4"
"""SOPClassUID of the slices that highdicom gets: MR, one image a file."""


def phase_file(target: Path, number: int, count: int) -> Path:
    """The file of a phase by its number, from 0, so that names sort as time does: ``NAME_seg_phase01.dcm``."""
    return target.with_name(f"{target.stem}_phase{number + 1:0{max(2, len(str(count)))}}{target.suffix}")


def write_phases(
    target: Path,
    label: np.ndarray,
    phases: Sequence[Sequence[Frame]],
    names: Mapping[int, str],
    algorithm: str,
    version: str,
) -> list[Path]:
    """Write the label maps of a cine, one object for each phase.

    No viewer shows time within one: OHIF lays it over all phases alike, dcmqi, by which 3D Slicer reads it, knows no
    time, and highdicom refuses two frames at one place. Each is a series of its own, as OHIF shows one of a series.

    Args:
        target: the name from which :func:`phase_file` makes those of the phases.
        label: ``X, Y, Z, T`` of classes.
        phases: T of them, as :func:`networks.data.studies.study_stack` gives them.
        names, algorithm, version: see :func:`write_segmentation`.

    Returns:
        The files, in the order of time.

    Raises:
        DataError, OSError: those of :func:`write_segmentation`.
    """
    count = len(phases)
    if label.ndim != 4 or label.shape[3] != count:
        raise DataError(f"{target}: a label map of shape {label.shape} does not fit {count} phases. Give all of them.")
    files = [phase_file(target, number, count) for number in range(count)]
    for number, frames in enumerate(phases):
        write_segmentation(files[number], label[..., number], frames, names, algorithm, version, (number, count))
    return files


def write_segmentation(
    target: Path,
    label: np.ndarray,
    frames: Sequence[Frame],
    names: Mapping[int, str],
    algorithm: str,
    version: str,
    phase: tuple[int, int] | None = None,
) -> None:
    """Write one volume's label map as a DICOM segmentation, whole or not at all.

    All structures are described, also absent ones, by the classes' numbers. Frames without a voxel are left out; of a
    map that is empty one is kept for each structure, as there must be some. Patient and study are the source's, word
    for word: what is not there stays away.

    Args:
        target: the file, ``.dcm``; its folder is made.
        label: ``X, Y, Z`` of classes, 0 for background, on the grid of :func:`networks.data.readers.read_image`: X are
            columns, Y rows and Z slices.
        frames: the Z slices in their order, as :func:`networks.data.dicom.series_frames` gives them of a folder or a
            file of many frames; or a phase of :func:`networks.data.studies.study_stack`.
        names: of the classes 1, 2, 3, ... without a gap, as DICOM counts. Those of :data:`CODES` are coded by it.
        algorithm: name of the bundle.
        version: of the bundle.
        phase: its number, from 0, and how many there are.

    Raises:
        DataError: when highdicom is missing; the label map is not on the slices' grid, or has a class without a name;
            DICOM does not take a name; or a source lacks a UID or its position, or is of another study or frame of
            reference than the first.
        OSError: when a file cannot be read or written.
    """
    hd = _highdicom()
    _check(target, label, frames, names, [*names.values(), algorithm, version])
    headers = _headers(frames)
    filled = bool(label.any())
    number, count = phase or (0, 1)
    description = f"{algorithm} {version}"[: LONGEST - 24] + (f", phase {number + 1} of {count}" if phase else "")
    seg = hd.seg.Segmentation(
        source_images=[_plain(frames, headers[0], z) for z in range(len(frames) if filled else 1)],
        pixel_array=np.ascontiguousarray(label.T if filled else label.T[:1], np.uint8),
        segmentation_type="BINARY",
        segment_descriptions=[described(hd, n, names[n], algorithm, version) for n in sorted(names)],
        series_instance_uid=hd.UID(),
        series_number=FIRST_SERIES + number,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer=MAKER,
        manufacturer_model_name=algorithm,
        software_versions=version,
        device_serial_number="1",  # must not be empty, and software has none
        content_label="SEGMENTATION",
        series_description=description,
        omit_empty_frames=filled,
    )
    _refer(seg, frames, headers)
    _copy_source(seg, frames[0].file)
    if not "".join([*names.values(), algorithm]).isascii():
        seg.SpecificCharacterSet = "ISO_IR 192"  # UTF-8; the source's own may lack letters of the names
    with whole_file(target) as name:
        seg.save_as(name)


def _highdicom() -> Any:
    """The package, which takes a second to load, and which most users do without."""
    try:
        import highdicom

        if not hasattr(highdicom.color.CIELabColor, "from_rgb"):  # older than 0.27; far older ones take pydicom 2
            raise ImportError("highdicom is too old")
    except (ImportError, AttributeError) as error:  # pydicom 2 lacks what newer ones ask of it as they are imported
        raise DataError(
            "A DICOM segmentation needs highdicom 0.27 and pydicom 3, and here is pydicom "
            f"{pydicom.__version__}. Install them by pip install .[dicom] in the project's folder, or pip install "
            '"highdicom>=0.27"; MONAI Label wants pydicom 2, so not in its environment.'
        ) from error
    logging.getLogger("highdicom").setLevel(logging.WARNING)  # else each object has ten lines in the log
    return highdicom


def _check(
    target: Path, label: np.ndarray, frames: Sequence[Frame], names: Mapping[int, str], words: Sequence[str]
) -> None:
    """Refuse what would not be a segmentation of these slices, or none that DICOM knows."""
    rows, columns = frames[0].size
    if label.shape != (columns, rows, len(frames)):
        raise DataError(
            f"{target}: a label map of shape {label.shape} does not lie on {len(frames)} slices of {columns} x {rows} "
            f"pixels, such as {frames[0].file}. Segment these images again."
        )
    least, most = int(label.min()), int(label.max())
    if not names or sorted(names) != list(range(1, len(names) + 1)) or least < 0 or most > len(names):
        raise DataError(
            f"{target}: a DICOM segmentation counts its structures 1, 2, 3, ... The label map holds {least} to {most}, "
            f"names are given to {sorted(names)}. Name each class."
        )
    for word in words:
        if not word.strip() or len(word) > LONGEST or "\\" in word:
            raise DataError(f"{target}: DICOM takes no name {word!r}. Give one of 1 to {LONGEST} letters and no \\.")


def _headers(frames: Sequence[Frame]) -> list[Dataset]:
    """What says of each frame which image it is, checked to be there."""
    headers = {file: header_of(file, [*IDENTITY, "SliceThickness"]) for file in {frame.file for frame in frames}}
    first = frames[0].file
    for frame in frames:
        if frame.position is None:
            raise DataError(f"{frame.file} does not say where it lies. Export the original images.")
        if lacking := [keyword for keyword in IDENTITY if not headers[frame.file].get(keyword)]:
            raise DataError(
                f"{frame.file} has no {', '.join(lacking)}, by which a DICOM segmentation would refer to it. Export "
                "the images with it, or use the NIfTI label map."
            )
        for keyword in ("StudyInstanceUID", "FrameOfReferenceUID"):
            if headers[frame.file][keyword].value != headers[first][keyword].value:
                raise DataError(
                    f"{frame.file} has another {keyword} than {first}, so no DICOM segmentation lies on both. Use the "
                    "NIfTI label map."
                )
    return [headers[frame.file] for frame in frames]


def _plain(frames: Sequence[Frame], header: Dataset, z: int) -> Dataset:
    """A slice as highdicom takes it: a file of its own, in one series with the others, called by its number.

    highdicom takes a series or a file of many frames, whole. A phase is neither: its slices may be of a series each, or
    some of the frames of a file. It also asks for values that anonymised files lack.
    """
    own, step = frames[z].position, extent_of(frames)
    assert own is not None  # as checked
    places = [
        measures for place in places_of(header)[0] for measures in (*place.get("PixelMeasuresSequence", []), place)
    ]
    thickness = next((float(place.SliceThickness) for place in places if place.get("SliceThickness")), 0.0)
    one = Dataset()
    for keyword in IDENTITY:
        setattr(one, keyword, header[keyword].value)
    for keyword in PATIENT:
        setattr(one, keyword, "")
    one.SOPClassUID, one.SOPInstanceUID = PLAIN_KIND, _number(z)
    one.Rows, one.Columns = frames[z].size
    one.ImagePositionPatient = _decimals(own)
    one.ImageOrientationPatient = _decimals(frames[0].rows.ravel())
    one.PixelSpacing = _decimals(frames[0].spacing)
    one.SliceThickness, one.SpacingBetweenSlices = _decimals([thickness or step, step])
    return one


def _number(z: int) -> str:
    return f"2.25.{z}"


def _decimals(values: Iterable[float]) -> list[DSfloat]:
    return [DSfloat(float(value), auto_format=True) for value in values]


def _refer(seg: Dataset, frames: Sequence[Frame], headers: Sequence[Dataset]) -> None:
    """Let a segmentation refer to the files and frames that there are, where it refers to slices of :func:`_plain`."""
    sources: dict[str, Dataset] = {}
    series: dict[str, dict[str, Dataset]] = {}
    for z, (frame, header) in enumerate(zip(frames, headers, strict=True)):
        source = sources[_number(z)] = _reference(header)
        if int(header.get("NumberOfFrames") or 1) > 1:
            source.ReferencedFrameNumber = frame.number + 1
        series.setdefault(header.SeriesInstanceUID, {})[header.SOPInstanceUID] = _reference(header)
    for group in seg.PerFrameFunctionalGroupsSequence:
        (source,) = group.DerivationImageSequence[0].SourceImageSequence
        source.update(sources.get(source.ReferencedSOPInstanceUID, {}))  # segments share that of a slice
    seg.SourceImageSequence = list(sources.values())
    seg.ReferencedSeriesSequence = [Dataset() for _ in series]
    for one, (uid, files) in zip(seg.ReferencedSeriesSequence, series.items(), strict=True):
        one.SeriesInstanceUID, one.ReferencedInstanceSequence = uid, list(files.values())


def _reference(header: Dataset) -> Dataset:
    reference = Dataset()
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = header.SOPClassUID, header.SOPInstanceUID
    return reference


def _copy_source(seg: Any, file: Path) -> None:
    """Patient and study as a source has them, also what highdicom would not take as an argument."""
    source = pydicom.dcmread(file, stop_before_pixels=True, force=True)
    source.SOPClassUID = PLAIN_KIND  # by it highdicom knows which values are the patient's; all images have the same
    seg.copy_patient_and_study_information(source)
    for keyword in COPIED:
        if keyword in source:
            seg[keyword] = source[keyword]
