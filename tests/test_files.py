"""Files in and out: what is refused and how, labels mapped, pictures as volumes of one slice."""

from __future__ import annotations

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import Compose, Invertd, Resized
from PIL import Image

from networks import DataError
from networks.readers import PICTURES
from networks.files import CheckLabeld, LoadVolumed, MapLabelsd, SaveLabelMapd, whole_file, write_csv
from networks.pictures import COLOURS
from networks.slices import SliceOrientationd, VolumeDataset


def save(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> str:
    nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
    return str(path)


def test_labels_are_mapped_where_the_case_says_how_and_others_stay(tmp_path):
    raw = np.zeros((4, 4, 2), np.uint8)
    raw[0], raw[1], raw[2] = 8, 5, 11
    case = {"label": save(tmp_path / "label.nii.gz", raw)}
    load = Compose([LoadVolumed("label"), MapLabelsd("label")])
    mapped = load({**case, "label_values": {0: 0, 5: 0, 8: 1, 11: 6}})
    assert mapped["label"][0, :, 0, 0].tolist() == [1, 0, 6, 0]
    assert "label_values" not in mapped
    assert torch.equal(load(case)["label"][0], torch.from_numpy(raw))
    own = Compose([LoadVolumed("label"), MapLabelsd("label", {"0": 0, "5": 2, "8": 1, "11": 0})])  # as in JSON
    assert own(case)["label"][0, :, 0, 0].tolist() == [1, 2, 0, 0]
    with pytest.raises(DataError, match=r"label.nii.gz.*\[11.0\].*0, 5, 8"):
        VolumeDataset([{**case, "label_values": {0: 0, 5: 0, 8: 1}}], load)[0]


@pytest.mark.parametrize("name", ["scan.nii.gz", "SCAN.NII.GZ"])
def test_a_label_map_has_its_volume_s_shape(name, tmp_path):
    case = LoadVolumed("image")({"image": save(tmp_path / name, np.arange(24, dtype=np.uint8).reshape(4, 3, 2))})
    SaveLabelMapd("image", tmp_path / "out")(case)
    (written,) = (tmp_path / "out").iterdir()
    assert nib.load(written).shape == (4, 3, 2)


def test_a_picture_is_a_volume_of_one_slice_and_its_label_map_lies_on_it(tmp_path):
    rng = np.random.default_rng(0)
    file = tmp_path / "image.png"
    Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)).save(file)
    steps = [
        LoadVolumed("image", channels=3, suffixes=PICTURES),
        SliceOrientationd("image"),
        Resized("image", [32, 32, -1], mode="trilinear"),
    ]
    prepare = Compose(steps)
    case = prepare({"image": str(file)})
    assert case["image"].shape == (3, 32, 32, 1)
    # A prediction that is exact under resizing: classes by halves of the picture, the left, then the lower quarter.
    pred = torch.zeros(1, 32, 32, 1)
    pred[0, :16] = 1
    pred[0, 16:, 24:] = 2
    case["pred"] = case["image"][:1] * 0 + pred
    case = Invertd("pred", prepare, "image", nearest_interp=True)(case)
    assert case["pred"].shape == (1, 60, 40, 1)
    SaveLabelMapd("pred", tmp_path / "out", ".png")(case)
    saved = Image.open(tmp_path / "out" / "image_seg.png")
    assert saved.size == (60, 40)
    values = np.asarray(saved)
    assert (values[:, :30] == 1).all() and (values[:30, 30:] == 0).all() and (values[30:, 30:] == 2).all()
    assert saved.convert("RGB").getpixel((0, 0)) == COLOURS[0] and saved.convert("RGB").getpixel((59, 0)) == (0, 0, 0)


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    target = tmp_path / "folder" / "file.txt"
    with pytest.raises(RuntimeError), whole_file(target) as name:
        Path(name).write_text("half")
        raise RuntimeError
    assert list(target.parent.iterdir()) == []
    with whole_file(target) as name:
        Path(name).write_text("whole")
    assert target.read_text() == "whole" and list(target.parent.iterdir()) == [target]


def test_a_file_has_the_rights_that_the_process_s_mask_leaves(monkeypatch, tmp_path):
    usual = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", None)  # of the whole process: other threads write meanwhile
        with whole_file(tmp_path / "a.txt"):
            pass
    finally:
        monkeypatch.undo()
        os.umask(usual)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640


def test_more_classes_than_a_label_map_holds_are_refused():
    with pytest.raises(DataError, match="300"):
        CheckLabeld("label", num_classes=300)
    CheckLabeld("label", num_classes=256)


def test_a_table_is_written_of_names_that_are_not_utf_8(tmp_path):
    write_csv(tmp_path / "a.csv", ["case"], [[b"M\xfcller".decode(errors="surrogateescape")]])
    assert (tmp_path / "a.csv").read_text(encoding="utf-8").splitlines() == ["case", "M\\udcfcller"]
