"""Tables and pictures on scores made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from networks.results.pictures import COLOURS, curves, overlay, read_slice, thin
from networks.results.report import case_table, summary_table

NAN = math.nan


def test_summary_counts_by_hand():
    details = {
        "val_mean_dice": torch.tensor([[0.8, 0.6], [0.6, NAN], [1.0, 0.2]]),
        "val_hd95": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
    }
    table = summary_table(details, ["liver", "spleen"], "sound", {"val_pooled_dice": 0.75}).splitlines()
    assert table[0] == "| metric | mean | liver | spleen |"
    # Dice: classes' means 80 and 40, their mean 60; cases' means 70, 60, 60 deviate by sqrt(200 / 9).
    assert table[2] == "| Dice, % | 60.00 ± 4.71 (1 undefined) | 80.00 ± 16.33 | 40.00 ± 20.00 (1 undefined) |"
    assert table[3] == "| HD95, mm | 3.50 ± 1.63 | 3.00 ± 1.63 | 4.00 ± 1.63 |"
    assert table[4] == "| Dice over all pixels, % | 75.00 | | |"
    assert table[-1].startswith("3 cases, mean ± standard deviation. A missed or invented structure counts 0")
    papers = summary_table(details, ["liver", "spleen"], "papers")
    assert "| HD95, voxels |" in papers and "an invented structure counts Dice 1" in papers
    nothing = summary_table({"val_mean_dice": torch.tensor([[NAN]])}, ["liver"], "sound")
    assert "| Dice, % | undefined (1 undefined) | undefined (1 undefined) |" in nothing


def test_case_table_has_a_row_per_case():
    table = case_table(torch.tensor([[0.5, 1.0], [NAN, 0.25]]), ["a", "b"], ["liver", "spleen"]).splitlines()
    assert table[2:] == ["| a | 50.00 | 100.00 | 75.00 |", "| b | nan | 25.00 | 25.00 |"]


def test_overlay_colours_labels_and_keeps_the_rest():
    label = np.zeros((10, 20), np.uint8)
    label[:5] = 2
    picture = np.asarray(overlay(np.full((10, 20, 3), 100.0), [label], alpha=1.0))
    scale = picture.shape[0] // 10
    assert picture.shape == (10 * scale, 40 * scale, 3) and min(picture.shape[:2]) >= 256
    assert tuple(picture[0, 0]) == (100, 100, 100) and tuple(picture[0, -1]) == COLOURS[1]
    assert tuple(picture[-1, -1]) == (100, 100, 100)
    gray = np.asarray(overlay(np.arange(200.0).reshape(10, 20), [label]))
    assert gray[0, 0].tolist() == [0, 0, 0]


def test_curves_draw_any_history():
    row = {"epoch": "1", "loss": "0.5", "score": "", "learning_rate": "1e-4"}
    for history in ([row], [row, {**row, "epoch": "2", "loss": "0.25", "score": "0.75"}]):
        picture = np.asarray(curves(history))
        assert picture.shape == (300, 960, 3)
        assert (picture == COLOURS[2]).all(2).any()


def test_pictures_of_large_images_are_thinned():
    assert thin(np.zeros((3000, 1000, 3))).shape == (500, 167, 3)
    assert thin(np.zeros((512, 100))).shape == (512, 100)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_picture_is_read_as_people_see_it(tmp_path, suffix):
    from PIL import Image

    image = np.zeros((16, 32, 3), np.uint8)
    image[:, 16:] = (0, 0, 255)
    Image.fromarray(image).save(tmp_path / f"image{suffix}", quality=100)
    read = read_slice(str(tmp_path / f"image{suffix}"), 2, 0)
    assert read.shape == (16, 32, 3) and read[8, 28, 2] > 200 and read[8, 4].max() < 60


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "SRA"])
def test_a_volume_is_seen_upright_however_it_is_stored(tmp_path, axcodes):
    import nibabel as nib

    # Towards right, anterior, superior: the patient's right third is bright at its anterior end.
    ras = np.zeros((12, 10, 4), np.float32)
    ras[9:, 6:, 2] = 1
    image = nib.Nifti1Image(ras, np.diag([2, 2, 5, 1]))
    turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(axcodes))
    nib.save(image.as_reoriented(turn), tmp_path / "volume.nii.gz")
    slices = [read_slice(str(tmp_path / "volume.nii.gz"), 2, z) for z in range(4)]
    assert [bool(s.any()) for s in slices] == [False, True, False, False]  # from superior to inferior
    assert slices[1].shape == (10, 12) and slices[1][:4, :3].all() and slices[1].sum() == 12
