"""Label maps have the shape of their volume; of a picture they are one."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd, Resized
from PIL import Image

from networks.data.formats import PICTURES
from networks.data.geometry import SliceOrientationd
from networks.data.loading import LoadVolumed
from networks.errors import DataError
from networks.results.label_maps import SaveImageLabelMapd, SaveImageMapsd, recorded_numbers
from networks.results.pictures import COLOURS


def save(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> str:
    nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
    return str(path)


@pytest.mark.parametrize("name", ["scan.nii.gz", "SCAN.NII.GZ"])
def test_a_label_map_has_its_volume_s_shape(name, tmp_path):
    case = LoadVolumed("image")({"image": save(tmp_path / name, np.arange(24, dtype=np.uint8).reshape(4, 3, 2))})
    SaveImageLabelMapd("image", tmp_path / "out")(case)
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
    SaveImageLabelMapd("pred", tmp_path / "out", ".png")(case)
    saved = Image.open(tmp_path / "out" / "image_seg.png")
    assert saved.size == (60, 40)
    values = np.asarray(saved)
    assert (values[:, :30] == 1).all() and (values[:30, 30:] == 0).all() and (values[30:, 30:] == 2).all()
    assert saved.convert("RGB").getpixel((0, 0)) == COLOURS[0] and saved.convert("RGB").getpixel((59, 0)) == (0, 0, 0)


def test_measuring_takes_the_numbers_that_the_inference_wrote(tmp_path):
    record = tmp_path / "inferring.json"
    assert recorded_numbers(None, record) is None and recorded_numbers({1: 3, 3: 1}, record) == {1: 3, 3: 1}
    record.write_text(json.dumps({"label_numbers": {"1": 3, "2": 2, "3": 1}}))
    for given in (None, {1: 3, 3: 1}, {"1": 3, "3": 1}):
        assert {int(known): number for known, number in recorded_numbers(given, record).items()} == {1: 3, 2: 2, 3: 1}
    with pytest.raises(DataError, match="label_numbers.*inferring.json") as error:
        recorded_numbers({1: 1}, record)
    assert "\n" not in str(error.value)
    record.write_text(json.dumps({"label_numbers": None}))
    assert not recorded_numbers(None, record) and not recorded_numbers({1: 1}, record)
    with pytest.raises(DataError, match="label_numbers"):
        recorded_numbers({1: 3, 3: 1}, record)


@pytest.mark.parametrize("ending", [".png", ".jpg"])
def test_maps_of_a_picture_are_pictures_that_lie_on_it(ending, tmp_path):
    file = tmp_path / f"skin{ending}"
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(file)  # 6 wide, 4 high
    loaded = LoadVolumed("image", channels=3, suffixes=PICTURES)({"image": str(file)})["image"]
    second, third = torch.rand(2, 6, 4, 1, generator=torch.Generator().manual_seed(0)) / 2
    probabilities = MetaTensor(torch.stack([torch.zeros_like(second), second, third])).copy_meta_from(loaded)
    entropy = MetaTensor(second[None]).copy_meta_from(loaded)
    saver = SaveImageLabelMapd("pred", tmp_path / "out", ".png")
    SaveImageMapsd(["entropy", "probabilities"], saver)({"entropy": entropy, "probabilities": probabilities})
    expected = {"skin_entropy.png": second, "skin_probability1.png": second, "skin_probability2.png": third}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(expected)
    for name, values in expected.items():
        found = np.asarray(Image.open(tmp_path / "out" / name))
        np.testing.assert_array_equal(found, (255 * values[..., 0].T).round().numpy().astype(np.uint8))
