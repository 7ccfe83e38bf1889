"""Official folders, the papers' splits, and what is wrong with a folder that is neither."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from networks import DataError
from networks.datasets import ACDC_SPLIT, acdc, image_files


def patient(folder: Path, number: int, label: bool = True) -> Path:
    patient = folder / f"patient{number:03d}"
    patient.mkdir(parents=True)
    for frame in ("frame01", "frame12"):
        (patient / f"{patient.name}_{frame}.nii.gz").touch()
        if label:
            (patient / f"{patient.name}_{frame}_gt.nii.gz").touch()
    (patient / f"{patient.name}_4d.nii.gz").touch()
    (patient / "Info.cfg").touch()
    return patient


def test_all_hundred_patients_fall_into_the_papers_split(tmp_path):
    for number in range(1, 101):
        patient(tmp_path / "training", number)
    cases = {split: acdc(tmp_path, split) for split in ("train", "validation", "test")}
    assert {split: len(c) for split, c in cases.items()} == {"train": 140, "validation": 20, "test": 40}
    images = [case["image"] for c in cases.values() for case in c]
    assert len(set(images)) == 200
    assert all("patient0" in c["image"] or "patient100" in c["image"] for c in cases["train"])
    numbers = {int(Path(c["image"]).name[7:10]) for c in cases["validation"]}
    assert numbers == set(ACDC_SPLIT["validation"])
    assert acdc(tmp_path / "training", "test") == cases["test"]


def test_absent_test_patients_are_said_and_training_goes_on(tmp_path, caplog):
    patient(tmp_path, 1)
    patient(tmp_path, 19)
    with caplog.at_level(logging.WARNING):
        assert len(acdc(tmp_path, "train")) == 2
    assert "none of the 20 test patients" in caplog.text
    with pytest.raises(DataError, match="No test patients.*1 train"):
        acdc(tmp_path, "test")


def test_wrong_folders_are_named(tmp_path):
    with pytest.raises(DataError, match=f"No ACDC patients in {tmp_path}"):
        acdc(tmp_path, "train")
    with pytest.raises(ValueError, match="split is"):
        acdc(tmp_path, "val")
    folder = patient(tmp_path, 1)
    (folder / "patient001_frame12_gt.nii.gz").unlink()
    with pytest.raises(DataError, match="patient001_frame12.nii.gz has no label: expected .*frame12_gt"):
        acdc(tmp_path, "train")
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(DataError, match="No images in .*patient001"):
        acdc(tmp_path, "train")


def test_image_files_of_a_folder(tmp_path):
    patient(tmp_path, 1)
    files = image_files(tmp_path, ignore=["*_gt.nii*", "*_4d.nii*"])
    assert [Path(f["image"]).name for f in files] == ["patient001_frame01.nii.gz", "patient001_frame12.nii.gz"]
    with pytest.raises(DataError, match="is no folder"):
        image_files(tmp_path / "none")
    with pytest.raises(DataError, match="No images"):
        image_files(tmp_path, ignore=["*"])
