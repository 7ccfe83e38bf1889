"""Files in and out: what is refused and how, labels mapped, pictures as volumes of one slice."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import Compose, Invertd, Resized
from PIL import Image

from networks import DataError
from networks.datasets import PICTURES
from networks.files import CheckLabeld, LoadVolumed, MapLabelsd, SaveLabelMapd, whole_file
from networks.pictures import COLOURS
from networks.slices import SliceOrientationd, VolumeDataset


def save(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> str:
    nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
    return str(path)


def test_each_bad_file_gets_an_error_that_names_it(tmp_path):
    label = np.zeros((8, 8, 3), np.uint8)
    label[2:4] = 4
    good = save(tmp_path / "image.nii.gz", np.random.rand(8, 8, 3))
    truncated = tmp_path / "truncated.nii.gz"
    truncated.write_bytes(Path(good).read_bytes()[:200])
    text = tmp_path / "text.nii.gz"
    text.write_text("not an image")
    nan = np.zeros((8, 8, 3))
    nan[0, 0, 0] = np.nan
    shifted = np.eye(4)
    shifted[0, 3] = 5
    cases = {
        "picture.png": ({"image": str(tmp_path / "picture.png")}, r"none of the files .* \.nii\.gz"),
        "missing.nii.gz": ({"image": str(tmp_path / "missing.nii.gz")}, "missing, truncated"),
        "truncated.nii.gz": ({"image": str(truncated)}, "Cannot read"),
        "text.nii.gz": ({"image": str(text)}, "Cannot read"),
        "series.nii.gz": ({"image": save(tmp_path / "series.nii.gz", np.zeros((8, 8, 3, 5)))}, "time points"),
        "flat.nii.gz": ({"image": save(tmp_path / "flat.nii.gz", np.zeros((8, 8)))}, "expected one volume"),
        "nan.nii.gz": ({"image": save(tmp_path / "nan.nii.gz", nan)}, "NaN"),
        "small.nii.gz": ({"label": save(tmp_path / "small.nii.gz", label[:, :, :2])}, "another image"),
        "moved.nii.gz": ({"label": save(tmp_path / "moved.nii.gz", label, shifted)}, "different positions"),
        "four.nii.gz": ({"label": save(tmp_path / "four.nii.gz", label)}, r"values \[4.0\], expected .* 0 to 3"),
        "half.nii.gz": ({"label": save(tmp_path / "half.nii.gz", label * 0.125)}, r"values \[0.5\]"),
    }
    transforms = [LoadVolumed(["image", "label"]), CheckLabeld("label", num_classes=4)]
    fine = {"image": good, "label": save(tmp_path / "fine.nii.gz", np.zeros((8, 8, 3), np.uint8))}
    for name, (wrong, message) in cases.items():
        with pytest.raises(DataError, match=message) as error:
            VolumeDataset([{**fine, **wrong}], transforms)[0]
        assert name in str(error.value)
        print(f"{name}: {error.value}")
    assert VolumeDataset([fine], transforms)[0]["image"].shape == (1, 8, 8, 3)


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
    with pytest.raises(DataError, match=r"label.nii.gz holds the values \[11.0\], expected none but 0, 5, 8"):
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


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_pictures_of_other_channels_are_refused(tmp_path, mode):
    Image.new(mode, (20, 10)).save(tmp_path / "image.png")
    loader = LoadVolumed("image", channels=3, suffixes=PICTURES)
    with pytest.raises(DataError, match=r"image.png has \d channel.*expected 3: an RGB picture"):
        VolumeDataset([{"image": str(tmp_path / "image.png")}], loader)[0]


def test_a_truncated_picture_and_a_mask_of_another_size_are_refused(tmp_path):
    image, mask = tmp_path / "image.jpg", tmp_path / "mask.png"
    Image.new("RGB", (40, 30), (200, 100, 50)).save(image)
    Image.new("L", (8, 8)).save(mask)
    load = [
        LoadVolumed("image", channels=3, suffixes=PICTURES),
        LoadVolumed("label", suffixes=PICTURES),
        CheckLabeld("label", num_classes=2),
    ]
    with pytest.raises(DataError, match=r"mask.png has shape .*the label must lie on the image's grid"):
        VolumeDataset([{"image": str(image), "label": str(mask)}], load)[0]
    image.write_bytes(image.read_bytes()[:300])
    with pytest.raises(DataError, match="Cannot read .*image.jpg"):
        VolumeDataset([{"image": str(image), "label": str(mask)}], load)[0]


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    target = tmp_path / "folder" / "file.txt"
    with pytest.raises(RuntimeError), whole_file(target) as name:
        Path(name).write_text("half")
        raise RuntimeError
    assert list(target.parent.iterdir()) == []
    with whole_file(target) as name:
        Path(name).write_text("whole")
    assert target.read_text() == "whole" and list(target.parent.iterdir()) == [target]
