"""DICOM: a folder of files is one volume, its label map lies where the series lies, and broken series are refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import group
from monai.transforms import Compose
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from networks import DataError
from networks.data.folders import image_files
from networks.data.geometry import FieldOfViewd, SliceOrientationd
from networks.data.loading import LoadVolumed
from networks.results.label_maps import SaveImageLabelMapd

SPACING = (0.8, 0.7, 2.5)
ORIGIN = (-10.0, 20.0, -30.0)
TILT = np.array([[1, 0, 0], [0, 0.96, -0.28], [0, 0.28, 0.96]])  # oblique, as a stack that follows an organ
CT = "1.2.840.10008.5.1.4.1.1.2"


def write_series(
    folder: Path, slices: int = 6, uid: str = "1.2.3.4.5", suffix: str = ".dcm", shift: float = 0.0
) -> np.ndarray:
    """Write a CT series of 12 x 10 pixels by ITK, a file per slice; its values ``X, Y, Z`` in Hounsfield units."""
    folder.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(0).integers(-200, 300, (12, 10, slices)).astype(np.int16)
    for z in range(slices):
        image = itk.image_from_array(np.ascontiguousarray(values[:, :, z].T[None]))
        image.SetSpacing(SPACING)
        position = np.array(ORIGIN) + z * (SPACING[2] * TILT[:, 2] + shift * TILT[:, 1])
        image.SetOrigin(position.tolist())
        image.SetDirection(itk.matrix_from_array(TILT))
        tags = {
            "0008|0016": CT,
            "0008|0018": f"{uid}.{z + 1}",
            "0008|0021": "20200101",
            "0008|0060": "CT",
            "0020|000d": "1.2.3.4",
            "0020|000e": uid,
            "0020|0013": str(z + 1),
            "0020|0032": "\\".join(f"{v:.6f}" for v in position),
            "0020|0037": "\\".join(f"{v:.6f}" for v in (*TILT[:, 0], *TILT[:, 1])),
            "0028|1052": "0",
            "0028|1053": "1",
        }
        metadata = image.GetMetaDataDictionary()
        for tag, value in tags.items():
            metadata[tag] = value
        writer = itk.ImageFileWriter.New(
            Input=image, FileName=str(folder / f"{uid}.{z}{suffix}"), ImageIO=itk.GDCMImageIO.New(KeepOriginalUID=True)
        )
        writer.Update()
    return values


def test_a_series_is_one_volume_in_its_own_geometry(tmp_path):
    values = write_series(tmp_path / "ct", suffix="")
    volume = LoadVolumed("image")({"image": str(tmp_path / "ct")})["image"]
    to_ras = np.diag([-1, -1, 1])
    expected = nib.affines.from_matvec(to_ras @ TILT @ np.diag(SPACING), to_ras @ ORIGIN)
    np.testing.assert_allclose(volume.affine, expected, atol=1e-4)
    assert np.array_equal(volume[0], values)


@pytest.mark.parametrize("field_of_view", [None, 6.5])
def test_a_label_map_of_a_series_lies_on_it_for_itk(field_of_view, tmp_path):
    write_series(tmp_path / "in" / "A" / "1.2.3")
    write_series(tmp_path / "in" / "A" / "1.2.4", uid="1.9")
    save = SaveImageLabelMapd("image", tmp_path / "out", data_root_dir=tmp_path / "in")
    prepare = Compose([LoadVolumed("image"), SliceOrientationd("image"), FieldOfViewd("image", field_of_view)])
    for case in image_files(tmp_path / "in"):
        save(prepare.inverse(prepare(case)))
    maps = sorted((tmp_path / "out").rglob("*.nii.gz"))
    assert [str(m.relative_to(tmp_path / "out")) for m in maps] == ["A/1.2.3_seg.nii.gz", "A/1.2.4_seg.nii.gz"]
    label = itk.imread(str(maps[0]))
    np.testing.assert_allclose(label.GetSpacing(), SPACING, atol=1e-4)
    np.testing.assert_allclose(label.GetOrigin(), ORIGIN, atol=1e-4)
    np.testing.assert_allclose(itk.array_from_matrix(label.GetDirection()), TILT, atol=1e-4)
    assert tuple(itk.size(label)) == (12, 10, 6) and nib.load(maps[0]).shape == (12, 10, 6)


def test_what_is_saved_of_the_folder_itself_stays_in_the_output_folder(tmp_path):
    (tmp_path / "ct").mkdir()
    saver = SaveImageLabelMapd("image", tmp_path / "out", data_root_dir=tmp_path / "ct")
    assert saver.target(tmp_path / "ct") == tmp_path / "out" / "ct_seg.nii.gz"


def test_series_are_found_by_content_beside_other_files(tmp_path):
    write_series(tmp_path / "a" / "DICOM", suffix="")
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 2)), np.eye(4)), tmp_path / "b.nii.gz")
    (tmp_path / "a" / "report.txt").write_text("no image")
    (tmp_path / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    assert [case["id"] for case in image_files(tmp_path)] == ["DICOM", "b"]
    assert [case["id"] for case in image_files(tmp_path, suffixes=(".nii.gz",))] == ["b"]
    (only,) = image_files(tmp_path / "a" / "DICOM")
    assert only["image"] == str(tmp_path / "a" / "DICOM")


def refused(folder: Path) -> str:
    with pytest.raises(DataError) as error:
        LoadVolumed("image")({"image": str(folder)})
    assert str(folder) in str(error.value)
    print(error.value)
    return str(error.value)


def test_broken_series_are_refused_by_name(tmp_path):
    write_series(tmp_path / "gap")
    (tmp_path / "gap" / "1.2.3.4.5.3.dcm").unlink()
    message = refused(tmp_path / "gap")
    assert all(fact in message for fact in ("1.2.3.4.5.2.dcm", "1.2.3.4.5.4.dcm", "5.00 mm", "2.50 mm"))

    write_series(tmp_path / "double")
    shutil.copy(tmp_path / "double" / "1.2.3.4.5.3.dcm", tmp_path / "double" / "copy.dcm")
    assert "1.2.3.4.5.3.dcm and copy.dcm" in refused(tmp_path / "double")

    write_series(tmp_path / "cine", slices=1)
    shutil.copy(tmp_path / "cine" / "1.2.3.4.5.0.dcm", tmp_path / "cine" / "phase.dcm")
    assert "phase" in refused(tmp_path / "cine")

    write_series(tmp_path / "gantry", shift=1.0)
    assert "tilted gantry" in refused(tmp_path / "gantry")

    write_series(tmp_path / "two")
    write_series(tmp_path / "two", slices=2, uid="1.2.9")
    message = refused(tmp_path / "two")
    assert "2 DICOM series" in message and "6 files such as" in message and "2 files such as" in message

    write_series(tmp_path / "cut", slices=2)
    file = min((tmp_path / "cut").iterdir())
    file.write_bytes(file.read_bytes()[:150])
    assert file.name in refused(tmp_path / "cut")
    assert "folder" in refused(tmp_path / "gap" / "1.2.3.4.5.0.dcm")


STACK = np.random.default_rng(0).integers(0, 900, (3, 10, 12))  # slices, rows, columns
MR, ENHANCED, STRUCTURES, SEGMENTATION = (f"1.2.840.10008.5.1.4.1.1.{kind}" for kind in ("4", "4.1", "481.3", "66.4"))


def write(file: Path, sop: str, pixels: np.ndarray | None, **values: object) -> None:
    """Write a DICOM object with the pydicom keywords ``values``."""
    file.parent.mkdir(parents=True, exist_ok=True)
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = sop
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    data.Modality, data.StudyInstanceUID, data.SeriesInstanceUID = "MR", "1.2.3", "1.2.3.4"
    if pixels is not None:
        data.Rows, data.Columns = pixels.shape[-2:]
        data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
        data.BitsAllocated = data.BitsStored = 16
        data.HighBit = 15
        data.PixelData = pixels.astype("<u2").tobytes()
    for name, value in values.items():
        setattr(data, name, value)
    data.is_little_endian, data.is_implicit_VR = True, False  # pydicom 2 asks for them, and 3 takes them
    data.save_as(file, write_like_original=False)


def write_stack(folder: Path, stack: np.ndarray = STACK, **values: list) -> None:
    """Write an MR series, a file a slice, 10 mm apart; of ``values``, each slice gets its own."""
    for z, pixels in enumerate(stack):
        own = {name: each[z] for name, each in values.items() if each[z] is not None}
        place = {"PixelSpacing": [1.5, 1.6], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
        place["ImagePositionPatient"] = [0, 0, 10 * z]
        write(folder / f"{9 - z}.dcm", MR, pixels, SeriesDate="20200101", InstanceNumber=z + 1, **place, **own)


def write_enhanced(file: Path, stack: np.ndarray, positions: list[float], slopes: list[float] | None = None) -> None:
    """Write one enhanced MR file of several frames."""
    shared = group(
        PixelMeasuresSequence={"PixelSpacing": [1.5, 1.6], "SliceThickness": 10},
        PlaneOrientationSequence={"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]},
    )
    frames = [group(PlanePositionSequence={"ImagePositionPatient": [0, 0, z]}) for z in positions]
    for frame, slope in zip(frames, slopes or []):
        scale = {"RescaleSlope": slope, "RescaleIntercept": 0, "RescaleType": "US"}
        frame.PixelValueTransformationSequence = group(PixelValueTransformationSequence=scale)[0x0028, 0x9145].value
    groups = {
        "SharedFunctionalGroupsSequence": Sequence([shared]),
        "PerFrameFunctionalGroupsSequence": Sequence(frames),
    }
    write(file, ENHANCED, stack, NumberOfFrames=len(stack), **groups)


def loaded(folder: Path) -> torch.Tensor:
    return LoadVolumed("image")({"image": str(folder)})["image"]


def test_each_slice_has_its_own_scale_of_grey_values(tmp_path):
    write_stack(tmp_path / "plain")
    slopes, offsets = [1, 0.001, 0.5], [0, -2, 7.5]
    raw = STACK.copy()
    raw[0] = STACK[0] > 500  # 0 and 1: read as the first file is, all others would be cut to these
    write_stack(tmp_path / "scaled", raw, RescaleSlope=slopes, RescaleIntercept=offsets)
    expected = np.stack([r * k + o for r, k, o in zip(raw, slopes, offsets, strict=True)])
    np.testing.assert_allclose(loaded(tmp_path / "scaled")[0].numpy().T, expected, atol=1e-4)
    assert np.array_equal(loaded(tmp_path / "plain")[0].numpy().T, STACK)


def test_one_number_written_in_two_ways_makes_no_two_series(tmp_path):
    write_stack(tmp_path / "a", SliceThickness=["10", "10.0", None], SequenceName=["*tfi2d1", None, "*tfi2d2"])
    assert np.array_equal(loaded(tmp_path / "a")[0].numpy().T, STACK)


def test_what_is_no_image_is_left_out_by_name_and_the_images_are_taken(tmp_path, caplog):
    for name, sop, pixels in (("structures", STRUCTURES, None), ("segmentation", SEGMENTATION, STACK[0])):
        write_stack(tmp_path / name / "MR")
        for folder in ("alone", "MR"):
            write(tmp_path / name / folder / "z.dcm", sop, pixels, Modality="RTSTRUCT", SeriesInstanceUID="1.9")
        (tmp_path / name / "MR" / "._0.dcm").write_bytes(bytes.fromhex("00051607000200004d6163204f532058"))
        found = image_files(tmp_path / name)
        assert [case["id"] for case in found] == ["MR"]
        assert [Path(entry["file"]).name for entry in found.left_out] == ["alone"] and "alone" in caplog.text
        assert np.array_equal(loaded(tmp_path / name / "MR")[0].numpy().T, STACK) and "z.dcm" in caplog.text
        caplog.clear()
    with pytest.raises(DataError, match="structures.alone"):
        loaded(tmp_path / "structures" / "alone")


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_frames_of_one_file_lie_where_each_says(order, tmp_path):
    write_stack(tmp_path / "slices")
    write_enhanced(tmp_path / "frames" / "1.dcm", STACK[order], [10.0 * z for z in order])
    expected = loaded(tmp_path / "slices")
    for place in (tmp_path / "frames", tmp_path / "frames" / "1.dcm"):
        volume = loaded(place)
        assert torch.equal(volume.as_tensor(), expected.as_tensor())
        np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-4)


def test_frames_that_are_no_volume_are_refused(tmp_path):
    write_enhanced(tmp_path / "cine" / "1.dcm", STACK.repeat(2, 0), [0, 0, 10, 10, 20, 20])
    assert "frame 2 of 1.dcm" in refused(tmp_path / "cine")
    write_enhanced(tmp_path / "missing" / "1.dcm", STACK, [0, 10, 30])
    assert "20.00 mm" in refused(tmp_path / "missing")
    write_enhanced(tmp_path / "scales" / "1.dcm", STACK, [0, 10, 20], slopes=[1, 1, 2])
    with pytest.raises(DataError, match="1.dcm"):
        loaded(tmp_path / "scales")
    write(tmp_path / "nowhere" / "1.dcm", MR, STACK, NumberOfFrames=3)
    with pytest.raises(DataError, match="1.dcm"):
        loaded(tmp_path / "nowhere")


def test_slices_of_two_sizes_or_of_no_position_are_refused(tmp_path):
    write_stack(tmp_path / "sizes")
    write(tmp_path / "sizes" / "x.dcm", MR, STACK[0, :8], ImagePositionPatient=[0, 0, 30], PixelSpacing=[1.5, 1.6])
    assert "x.dcm" in refused(tmp_path / "sizes")
    write_stack(tmp_path / "nowhere")
    write(tmp_path / "nowhere" / "x.dcm", MR, STACK[0], PixelSpacing=[1.5, 1.6])
    assert "x.dcm" in refused(tmp_path / "nowhere")


def test_one_slice_is_a_volume(tmp_path):
    write_series(tmp_path / "one", slices=1)
    assert LoadVolumed("image")({"image": str(tmp_path / "one")})["image"].shape == torch.Size([1, 12, 10, 1])


@pytest.mark.parametrize(
    ("tags", "extent"),
    [
        ({"SpacingBetweenSlices": [10], "SliceThickness": [8]}, 10),
        ({"SliceThickness": [8]}, 8),
        ({"SpacingBetweenSlices": [-10], "SliceThickness": [8]}, 8),
        ({}, None),
    ],
)
def test_one_slice_is_as_thick_as_it_says_or_refused(tags, extent, tmp_path):
    write_stack(tmp_path / "one", STACK[:1], **tags)
    if extent is None:
        message = refused(tmp_path / "one")
        assert all(fact in message for fact in ("9.dcm", "SpacingBetweenSlices", "SliceThickness"))
    else:
        np.testing.assert_allclose(loaded(tmp_path / "one").pixdim, [1.6, 1.5, extent])


def test_pixels_of_unknown_size_are_refused(tmp_path):
    for z in range(2):
        write(tmp_path / "b" / f"{z}.dcm", MR, STACK[z], ImagePositionPatient=[0, 0, 10 * z])
    assert "PixelSpacing" in refused(tmp_path / "b")
