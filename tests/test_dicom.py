"""DICOM: a folder of files is one volume, its label map lies where the series lies, and broken series are refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import Compose

from networks import DataError
from networks.datasets import image_files
from networks.files import LoadVolumed, SaveLabelMapd
from networks.slices import FieldOfViewd, SliceOrientationd

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
    save = SaveLabelMapd("image", tmp_path / "out", data_root_dir=tmp_path / "in")
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
    saver = SaveLabelMapd("image", tmp_path / "out", data_root_dir=tmp_path / "ct")
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


def test_broken_series_are_refused_by_name(tmp_path):
    def refused(folder: Path) -> str:
        with pytest.raises(DataError) as error:
            LoadVolumed("image")({"image": str(folder)})
        assert str(folder) in str(error.value)
        print(error.value)
        return str(error.value)

    write_series(tmp_path / "gap")
    (tmp_path / "gap" / "1.2.3.4.5.3.dcm").unlink()
    message = refused(tmp_path / "gap")
    assert "1.2.3.4.5.2.dcm and 1.2.3.4.5.4.dcm are 5.00 mm apart, the others 2.50 mm" in message

    write_series(tmp_path / "double")
    shutil.copy(tmp_path / "double" / "1.2.3.4.5.3.dcm", tmp_path / "double" / "copy.dcm")
    assert "two slices lie at one position" in refused(tmp_path / "double")

    write_series(tmp_path / "cine", slices=1)
    shutil.copy(tmp_path / "cine" / "1.2.3.4.5.0.dcm", tmp_path / "cine" / "phase.dcm")
    assert "phases of a series over time" in refused(tmp_path / "cine")

    write_series(tmp_path / "gantry", shift=1.0)
    assert "shifted against each other, as by a tilted gantry" in refused(tmp_path / "gantry")

    write_series(tmp_path / "two")
    write_series(tmp_path / "two", slices=2, uid="1.2.9")
    message = refused(tmp_path / "two")
    assert "holds 2 DICOM series" in message and "6 files such as" in message and "2 files such as" in message

    write_series(tmp_path / "cut", slices=1)
    file = next((tmp_path / "cut").iterdir())
    file.write_bytes(file.read_bytes()[:150])
    assert "No readable DICOM image" in refused(tmp_path / "cut")
    assert "is one DICOM file: name the folder" in refused(tmp_path / "gap" / "1.2.3.4.5.0.dcm")


def test_one_slice_is_a_volume(tmp_path):
    write_series(tmp_path / "one", slices=1)
    assert LoadVolumed("image")({"image": str(tmp_path / "one")})["image"].shape == torch.Size([1, 12, 10, 1])
