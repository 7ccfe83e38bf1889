"""DICOM segmentations: they lie on their source voxel by voxel, refer to it, and tell no more of a patient than it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from conftest import ROOT, group
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from networks import DataError
from networks.data.cine import study_series
from networks.data.dicom import Frame, series_frames
from networks.data.readers import read_image
from networks.data.studies import study_stack
from networks.results import dicom_seg
from networks.results.dicom_seg import CODES, phase_file, write_phases, write_segmentation
from networks.results.pictures import COLOURS

hd = pytest.importorskip("highdicom")

HEART = {1: "right ventricle", 2: "myocardium", 3: "left ventricle"}
COLUMNS, ROWS, SLICES = 18, 13, 5  # a frame of 234 pixels ends within a byte
SPACING, GAP = (1.4, 1.5), 9.0  # between rows, between columns, between slices
ORIGIN = np.array([-20.25, 10.5, 30.125])
AXIAL = np.eye(3)
OBLIQUE = np.array([[0.8, 0, 0.6], [0.36, 0.8, -0.48], [-0.48, 0.6, 0.64]])  # columns: along a row, a column, normal
UPSIDE_DOWN = np.diag([1.0, -1, -1])  # the normal runs to the feet
MR, ENHANCED = "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1"
PERSON = {"PatientName": "Müller^Eva", "PatientID": "77", "PatientBirthDate": "19500102", "PatientSex": "F"}
PERSON |= {"AccessionNumber": "A1", "StudyID": "S1", "StudyDate": "20240102", "StudyTime": "1015"}
PERSON |= {"ReferringPhysicianName": "Doe^Jo", "SpecificCharacterSet": "ISO_IR 100"}


def write(file: Path, kind: str = MR, frames: int = 1, **tags: object) -> None:
    """Write an image of noise; tags of None are not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID, data.file_meta.MediaStorageSOPInstanceUID = kind, generate_uid()
    pixels = np.random.default_rng(0).integers(0, 900, (frames, ROWS, COLUMNS))
    told: dict[str, object] = {
        "SpecificCharacterSet": None,
        "SOPClassUID": kind,
        "SOPInstanceUID": data.file_meta.MediaStorageSOPInstanceUID,
        "Modality": "MR",
        "StudyInstanceUID": "1.2.3",
        "SeriesInstanceUID": "1.2.3.4",
        "FrameOfReferenceUID": "1.2.3.9",
        "Rows": ROWS,
        "Columns": COLUMNS,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "PixelRepresentation": 0,
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelData": pixels.astype("<u2").tobytes(),
        **tags,
    }
    for name, value in told.items():
        if value is not None:
            setattr(data, name, value)
    data.save_as(file, enforce_file_format=True)


def place(z: float, turn: np.ndarray) -> list[float]:
    return (ORIGIN + GAP * z * turn[:, 2]).tolist()


def write_series(folder: Path, turn: np.ndarray = OBLIQUE, slices: int = SLICES, **tags: object) -> Path:
    """Write a series of one file a slice, whose names are not in order."""
    for z in range(slices):
        where = {"ImagePositionPatient": place(z, turn), "ImageOrientationPatient": [*turn[:, 0], *turn[:, 1]]}
        write(folder / f"{(z * 3) % 7}.dcm", PixelSpacing=list(SPACING), InstanceNumber=9 - z, **{**where, **tags})
    return folder


def write_enhanced(file: Path, places: list[tuple[int, int]], turn: np.ndarray = OBLIQUE, **tags: object) -> None:
    """Write one file of frames at slices z and phases t."""
    orientation = {"ImageOrientationPatient": [*turn[:, 0], *turn[:, 1]]}
    shared = group(
        PixelMeasuresSequence={"PixelSpacing": list(SPACING), "SliceThickness": 6},
        PlaneOrientationSequence=orientation,
    )
    frames = [
        group(
            PlanePositionSequence={"ImagePositionPatient": place(z, turn)},
            FrameContentSequence={"TemporalPositionIndex": t + 1},
        )
        for z, t in places
    ]
    groups: dict[str, object] = {
        "SharedFunctionalGroupsSequence": Sequence([shared]),
        "PerFrameFunctionalGroupsSequence": Sequence(frames),
    }
    write(file, ENHANCED, len(places), NumberOfFrames=len(places), **groups, **tags)


def label_map(slices: int = SLICES, classes: int = 3, seed: int = 0) -> np.ndarray:
    """Noise, of which no turn or shift looks alike, with an empty slice in between."""
    label = np.random.default_rng(seed).integers(0, classes + 1, (COLUMNS, ROWS, slices)).astype(np.uint8)
    if slices > 2:
        label[..., 1] = 0
    return label


def save(folder: Path, label: np.ndarray, frames: list[Frame], names: dict[int, str] | None = None) -> Path:
    file = folder / "out" / "case_seg.dcm"
    write_segmentation(file, label, frames, names or HEART, "FIAS on ACDC", "0.2.0")
    assert [each.name for each in file.parent.iterdir()] == [file.name]
    return file


def patient_place(affine: np.ndarray, voxels: np.ndarray) -> np.ndarray:
    """Where voxels ``3, N`` of a volume in nibabel's axes lie, in DICOM's."""
    return (np.diag([-1, -1, 1, 1]) @ affine @ np.vstack([voxels, np.ones(voxels.shape[1])]))[:3]


def check(file: Path, label: np.ndarray, frames: list[Frame], affine: np.ndarray) -> pydicom.Dataset:
    """Each voxel has its class where it lies in the patient, and is said to come from the image that has it there.

    Args:
        file: the segmentation.
        label: what was written.
        frames: its sources.
        affine: of the volume that was segmented, in nibabel's axes.
    """
    volume = hd.seg.segread(file).get_volume(combine_segments=True, allow_missing_positions=True)
    voxels = np.array(np.nonzero(label))
    found = volume.map_reference_to_indices(patient_place(affine, voxels).T)
    np.testing.assert_allclose(found, np.round(found), atol=1e-3)
    indices = tuple(np.round(found).astype(int).T)
    assert np.array_equal(volume.array[indices], label[tuple(voxels)])
    assert np.count_nonzero(volume.array) == np.count_nonzero(label)  # so Dice is 1 for each class
    seg = pydicom.dcmread(file)
    planes = np.atleast_3d(seg.pixel_array.T).T.astype(bool)
    assert seg.NumberOfFrames == sum(len(np.unique(plane[plane > 0])) for plane in label.T)
    for plane, its in zip(planes, seg.PerFrameFunctionalGroupsSequence, strict=True):
        at = its.PlanePositionSequence[0].ImagePositionPatient
        (z,) = (z for z, frame in enumerate(frames) if np.allclose(frame.position, at, atol=1e-9))
        assert np.array_equal(plane, label[..., z].T == its.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        (source,) = its.DerivationImageSequence[0].SourceImageSequence
        image = pydicom.dcmread(frames[z].file)
        assert (source.ReferencedSOPInstanceUID, source.ReferencedSOPClassUID) == (
            image.SOPInstanceUID,
            image.SOPClassUID,
        )
        assert source.get("ReferencedFrameNumber") == (frames[z].number + 1 if "NumberOfFrames" in image else None)
    assert seg.FrameOfReferenceUID == "1.2.3.9" and seg.StudyInstanceUID == "1.2.3"
    images = [pydicom.dcmread(frame.file) for frame in frames]
    told = {
        (s.SeriesInstanceUID, i.ReferencedSOPInstanceUID)
        for s in seg.ReferencedSeriesSequence
        for i in s.ReferencedInstanceSequence
    }
    assert told == {(image.SeriesInstanceUID, image.SOPInstanceUID) for image in images}
    assert len(seg.SourceImageSequence) == len(frames)
    assert "2.25." not in str(seg)
    return seg


@pytest.mark.parametrize("turn", [AXIAL, OBLIQUE, UPSIDE_DOWN])
def test_a_series_gets_its_label_map_back_where_it_lies(turn, tmp_path):
    frames = series_frames(write_series(tmp_path / "mr", turn))
    label = label_map()
    seg = check(save(tmp_path, label, frames), label, frames, np.asarray(read_image(tmp_path / "mr").affine))
    assert seg.SegmentationType == "BINARY" and seg.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    measures = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert (measures.PixelSpacing, measures.SpacingBetweenSlices) == (list(SPACING), GAP)


def test_dcmqi_reads_the_same(tmp_path):
    tool = shutil.which("segimage2itkimage") or shutil.which("segimage2itkimage", path=Path(sys.executable).parent)
    if tool is None:
        pytest.skip("dcmqi is not installed: pip install dcmqi")
    frames = series_frames(write_series(tmp_path / "mr"))
    label = label_map()
    file = save(tmp_path, label, frames)
    (tmp_path / "q").mkdir()
    command = [tool, "--inputDICOM", file, "--outputDirectory", tmp_path / "q", "--mergeSegments", "-t", "nii"]
    subprocess.run(command, check=True, capture_output=True)
    (merged,) = (tmp_path / "q").glob("*.nii.gz")
    image = nib.load(merged)
    voxels = np.array(np.nonzero(label))
    places = patient_place(np.asarray(read_image(tmp_path / "mr").affine), voxels)
    to_indices = np.linalg.inv(np.diag([-1, -1, 1, 1]) @ image.affine)
    found = (to_indices @ np.vstack([places, np.ones(places.shape[1])]))[:3]
    np.testing.assert_allclose(found, np.round(found), atol=1e-3)
    values = np.asarray(image.dataobj)
    assert np.array_equal(values[tuple(np.round(found).astype(int))], label[tuple(voxels)])
    assert np.count_nonzero(values) == np.count_nonzero(label)


def test_a_single_slice_and_a_file_of_many_frames_do_as_well(tmp_path):
    frames = series_frames(write_series(tmp_path / "one", slices=1, SliceThickness=8))
    label = label_map(1)
    seg = check(save(tmp_path / "a", label, frames), label, frames, np.asarray(read_image(tmp_path / "one").affine))
    assert seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SliceThickness == 8
    write_enhanced(tmp_path / "all.dcm", [(z, 0) for z in (3, 0, 4, 2, 1)])
    frames = series_frames(tmp_path / "all.dcm")
    label = label_map()
    affine = np.asarray(read_image(write_series(tmp_path / "single")).affine)
    seg = check(save(tmp_path / "b", label, frames), label, frames, affine)
    assert [source.ReferencedFrameNumber for source in seg.SourceImageSequence] == [2, 5, 4, 1, 3]
    assert len(seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence) == 1


def by_slice(folder: Path) -> Path:
    """A cine of a series for each slice, three phases."""
    for z in range(SLICES):
        for t in range(3):
            where = {
                "ImagePositionPatient": place(z, OBLIQUE),
                "ImageOrientationPatient": [*OBLIQUE[:, 0], *OBLIQUE[:, 1]],
            }
            series = {"SeriesInstanceUID": f"1.2.3.{z + 20}", "SeriesNumber": z, "TriggerTime": 30 * t}
            write(folder / str(z) / f"{t}.dcm", PixelSpacing=list(SPACING), SliceThickness=6, **where, **series)
    return folder


def in_one_file(folder: Path) -> Path:
    write_enhanced(folder / "all.dcm", [(z, t) for t in (2, 0, 1) for z in (1, 0, 3, 2, 4)])
    return folder


@pytest.mark.parametrize("study", [by_slice, in_one_file])
def test_each_phase_of_a_cine_is_an_object_of_its_own(study, tmp_path):
    stack = study_stack(study(tmp_path / "study"), [])
    affine = np.asarray(read_image(write_series(tmp_path / "single")).affine)
    label = np.stack([label_map(seed=t) for t in range(3)], -1)
    files = write_phases(tmp_path / "out" / "heart_seg.dcm", label, stack.phases, HEART, "FIAS on ACDC", "0.2.0")
    assert [file.name for file in files] == [f"heart_seg_phase0{t}.dcm" for t in (1, 2, 3)]
    assert sorted(files) == sorted((tmp_path / "out").iterdir())
    objects = [check(file, label[..., t], stack.phases[t], affine) for t, file in enumerate(files)]
    assert len({seg.SeriesInstanceUID for seg in objects}) == 3
    assert [int(seg.SeriesNumber) for seg in objects] == [9001, 9002, 9003]
    assert objects[1].SeriesDescription == "FIAS on ACDC 0.2.0, phase 2 of 3"
    with pytest.raises(DataError, match="does not fit 3 phases"):
        write_phases(tmp_path / "x.dcm", label[..., :2], stack.phases, HEART, "FIAS on ACDC", "0.2.0")


def test_files_of_phases_sort_as_time_does():
    names = [phase_file(Path("a/b_seg.dcm"), number, 120).name for number in (0, 9, 119)]
    assert names == ["b_seg_phase001.dcm", "b_seg_phase010.dcm", "b_seg_phase120.dcm"]


def test_structures_are_named_coded_and_coloured_whether_they_are_there_or_not(tmp_path):
    frames = series_frames(write_series(tmp_path / "mr"))
    names = {1: "Left kidney", 2: "右心室", 3: "myocardium"}
    label = label_map()
    label[label == 1] = 0
    seg = check(save(tmp_path, label, frames, names), label, frames, np.asarray(read_image(tmp_path / "mr").affine))
    kidney, own, muscle = seg.SegmentSequence
    assert [s.SegmentNumber for s in seg.SegmentSequence] == [1, 2, 3]
    assert [s.SegmentLabel for s in seg.SegmentSequence] == list(names.values())
    types = [s.SegmentedPropertyTypeCodeSequence[0] for s in seg.SegmentSequence]
    assert [t.CodeValue for t in types] == ["64033007", "85756007", CODES["myocardium"][0]]
    assert types[0].SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Left"
    categories = [s.SegmentedPropertyCategoryCodeSequence[0].CodeMeaning for s in seg.SegmentSequence]
    assert categories == ["Anatomical Structure", "Tissue", "Anatomical Structure"]
    for number, segment in enumerate(seg.SegmentSequence):
        colour = hd.color.CIELabColor.from_dicom_value(segment.RecommendedDisplayCIELabValue).to_rgb()
        np.testing.assert_allclose(colour, COLOURS[number], atol=1)
        assert segment.SegmentAlgorithmType == "AUTOMATIC" and segment.SegmentAlgorithmName == "FIAS on ACDC"
        assert segment.SegmentationAlgorithmIdentificationSequence[0].AlgorithmVersion == "0.2.0"
    assert (seg.Manufacturer, seg.ManufacturerModelName, seg.SoftwareVersions) == (
        "FIAS and DANIE",
        "FIAS on ACDC",
        "0.2.0",
    )
    assert seg.SeriesDescription == "FIAS on ACDC 0.2.0" and seg.Modality == "SEG"


def test_the_table_has_the_structures_of_all_volume_bundles():
    names = set()
    for file in (ROOT / "bundles").glob("*/configs/metadata.json"):
        if file.parent.parent.name.endswith(("_acdc", "_synapse")):
            outputs = json.loads(file.read_text())["network_data_format"]["outputs"]
            names |= set(outputs["pred"]["channel_def"].values())
    assert names - {"background"} == set(CODES) and len(set(CODES.values())) == len(CODES)


def test_an_empty_label_map_is_a_small_valid_object(tmp_path):
    frames = series_frames(write_series(tmp_path / "mr"))
    seg = pydicom.dcmread(save(tmp_path, np.zeros((COLUMNS, ROWS, SLICES), np.uint8), frames))
    assert seg.NumberOfFrames == 3 and len(seg.SegmentSequence) == 3 and not seg.pixel_array.any()
    assert len(seg.SourceImageSequence) == SLICES
    assert not hd.seg.segread(tmp_path / "out" / "case_seg.dcm").get_volume(combine_segments=True).array.any()


@pytest.mark.parametrize("names", [HEART, {1: "心室", 2: "myocardium", 3: "left ventricle"}])
def test_the_patient_is_the_sources(names, tmp_path):
    odd = {"PatientSex": "U", "StudyTime": "10 o'clock"}  # highdicom would refuse them
    with pytest.warns(UserWarning):
        frames = series_frames(write_series(tmp_path / "mr", **{**PERSON, **odd}))
        seg = pydicom.dcmread(save(tmp_path, label_map(), frames, names))
        for name, value in {**PERSON, **odd}.items():
            if name != "SpecificCharacterSet":
                assert seg[name].value == value
    assert seg.SpecificCharacterSet == ("ISO_IR 100" if names is HEART else "ISO_IR 192")


def test_an_anonymised_source_stays_anonymised(tmp_path):
    frames = series_frames(write_series(tmp_path / "mr", PatientName="", PatientID=""))
    image, seg = (pydicom.dcmread(file) for file in (frames[0].file, save(tmp_path, label_map(), frames)))
    for name in dicom_seg.PATIENT:
        assert not seg[name].value
    tags = [element.tag for element in seg if element.tag.group in (0x0010, 0x0012, 0x0032, 0x0038, 0x0040)]
    assert not any(seg[tag].value for tag in tags)
    assert not any(seg.get(name) for name in ("InstitutionName", "StationName", "OperatorsName", "ContentCreatorName"))
    assert image.StudyInstanceUID == seg.StudyInstanceUID


def refused(folder: Path, source: Path, label: np.ndarray | None = None, names: dict[int, str] | None = None) -> str:
    with pytest.raises(DataError) as error:
        save(folder, label_map() if label is None else label, series_frames(source), names)
    assert not (folder / "out").exists()
    print(error.value)
    return str(error.value)


@pytest.mark.parametrize("keyword", ["FrameOfReferenceUID", "SOPInstanceUID", "StudyInstanceUID"])
@pytest.mark.parametrize("value", [None, ""])
def test_a_source_that_cannot_be_referred_to_is_refused_by_name(keyword, value, tmp_path):
    message = refused(tmp_path, write_series(tmp_path / "mr", **{keyword: value}))
    assert keyword in message and str(tmp_path / "mr") in message and ".dcm" in message


def test_what_does_not_fit_is_refused_in_one_sentence(tmp_path, monkeypatch):
    source = write_series(tmp_path / "mr")
    assert "(13, 18, 5)" in refused(tmp_path, source, label_map().transpose(1, 0, 2))
    assert "holds 0 to 3" in refused(tmp_path, source, names={1: "liver", 2: "spleen"})
    assert "[1, 3]" in refused(tmp_path, source, names={1: "liver", 3: "spleen"})
    assert "64 letters" in refused(tmp_path, source, names={1: "liver", 2: "a\\b", 3: "spleen"})
    shutil.rmtree(source)
    write_series(source, FrameOfReferenceUID="1.2.3.9", slices=3)
    write(
        source / "other.dcm",
        ImagePositionPatient=place(3, OBLIQUE),
        FrameOfReferenceUID="1.2.3.8",
        PixelSpacing=list(SPACING),
        ImageOrientationPatient=[*OBLIQUE[:, 0], *OBLIQUE[:, 1]],
    )
    assert "another FrameOfReferenceUID" in refused(tmp_path, source, label_map(4))
    shutil.rmtree(source)
    write_series(source, slices=1, ImagePositionPatient=None)
    assert "where it lies" in refused(tmp_path, source, label_map(1))
    monkeypatch.setitem(sys.modules, "highdicom", None)
    assert "pip install .[dicom]" in refused(tmp_path, source, label_map(1))


def test_too_old_a_highdicom_is_as_none(tmp_path, monkeypatch):
    monkeypatch.delattr(hd.color.CIELabColor, "from_rgb")
    assert "highdicom 0.27" in refused(tmp_path, write_series(tmp_path / "mr"))


def test_a_name_stands_for_a_whole_file_or_none(tmp_path, monkeypatch):
    monkeypatch.setattr(hd.seg.Segmentation, "save_as", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "no space")))
    with pytest.raises(OSError, match="no space"):
        save(tmp_path, label_map(), series_frames(write_series(tmp_path / "mr")))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.skipif("CINE_DIR" not in os.environ, reason="CINE_DIR names no study of six slices of 25 phases")
def test_a_scanners_own_study(tmp_path):
    stack = study_stack(os.environ["CINE_DIR"], [])
    label = np.random.default_rng(0).integers(0, 4, (256, 208, 6)).astype(np.uint8)
    write_segmentation(tmp_path / "seg.dcm", label, stack.phases[9], HEART, "FIAS on ACDC", "0.2.0")
    volume = hd.seg.segread(tmp_path / "seg.dcm").get_volume(combine_segments=True)
    series = study_series(os.environ["CINE_DIR"], [])
    assert series is not None
    voxels = np.array(np.nonzero(label))
    found = volume.map_reference_to_indices(patient_place(np.asarray(series.read(9).affine), voxels).T)
    assert np.abs(found - np.round(found)).max() < 1e-3
    assert np.array_equal(volume.array[tuple(np.round(found).astype(int).T)], label[tuple(voxels)])
    assert np.count_nonzero(volume.array) == np.count_nonzero(label)
