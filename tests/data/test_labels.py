"""Labels: their numbers become the classes of the bundle."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import Compose

from networks import DataError
from networks.data import CheckLabeld, LoadVolumed, MapLabelsd, VolumeDataset


def save(path: Path, data: np.ndarray) -> str:
    nib.save(nib.Nifti1Image(data, np.eye(4)), path)
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


def test_more_classes_than_a_label_map_holds_are_refused():
    with pytest.raises(DataError, match="300"):
        CheckLabeld("label", num_classes=300)
    CheckLabeld("label", num_classes=256)
