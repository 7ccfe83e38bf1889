"""Tables and pictures on scores made by hand."""

from __future__ import annotations

import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from matplotlib.figure import Figure
from monai.data import MetaTensor
from PIL import Image

from networks.results.pictures import COLOURS, curves, overlay, read_slice, thin
from networks.results.report import Report, case_table, summary_table
from networks.storage import write_csv

NAN = math.nan


def test_summary_counts_by_hand():
    details = {
        "val_mean_dice": torch.tensor([[0.8, 0.6], [0.6, NAN], [1.0, 0.2]]),
        "val_hd95": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
    }
    table = summary_table(details, ["liver", "spleen"], "strict", {"val_pooled_dice": 0.75}).splitlines()
    assert table[0] == "| metric | mean | liver | spleen |"
    # Dice: classes' means 80 and 40, their mean 60; cases' means 70, 60, 60 deviate by sqrt(200 / 9).
    assert table[2] == "| Dice, % | 60.00 ± 4.71 (1 undefined) | 80.00 ± 16.33 | 40.00 ± 20.00 (1 undefined) |"
    assert table[3] == "| HD95, mm | 3.50 ± 1.63 | 3.00 ± 1.63 | 4.00 ± 1.63 |"
    assert table[4] == "| Dice over all pixels, % | 75.00 | | |"
    assert table[-1].startswith("3 cases")
    paper = summary_table(details, ["liver", "spleen"], "paper").splitlines()
    assert paper[2] == table[2] and paper[3] == table[3].replace("mm", "voxels")
    assert paper[-1] != table[-1]  # the rule for absent structures
    nothing = summary_table({"val_mean_dice": torch.tensor([[NAN]])}, ["liver"], "strict")
    assert "| Dice, % | undefined (1 undefined) | undefined (1 undefined) |" in nothing


def test_case_table_has_a_row_per_case():
    table = case_table(torch.tensor([[0.5, 1.0], [NAN, 0.25]]), ["a", "b"], ["liver", "spleen"]).splitlines()
    assert table[2:] == ["| a | 50.00 | 100.00 | 75.00 |", "| b | nan | 25.00 | 25.00 |"]


def drawn(figure: Figure, tmp_path: Path) -> np.ndarray:
    """A figure's pixels ``H, W, 3`` as people see them."""
    figure.savefig(tmp_path / "figure.png")
    return np.asarray(Image.open(tmp_path / "figure.png").convert("RGB")).astype(int)


@pytest.mark.parametrize("names", [(), ("liver", "spleen"), [f"organ {n}" for n in range(1, 10)]])
def test_overlay_shows_each_pixel_as_a_square_in_its_class_s_colour(names, tmp_path):
    rng = np.random.default_rng(0)
    image, label = rng.integers(0, 256, (10, 20, 3)).astype(float), np.zeros((10, 20), np.uint8)
    label[:5], label[5] = 2, 9
    figure = overlay(image, {"truth": label}, names, alpha=1.0)
    assert [axes.get_title() for axes in figure.axes] == ["image", "truth"]
    truth = np.where(label[..., None] == 0, image, COLOURS[1])
    truth[5] = COLOURS[0]  # the ninth class has the first one's
    scale = 512 // 20
    expected = np.concatenate([image, truth], 1).repeat(scale, 0).repeat(scale, 1)
    top = 20  # the line of titles
    assert np.array_equal(drawn(figure, tmp_path)[top : top + len(expected)], expected)


def test_overlay_lists_the_classes_it_shows():
    label = np.zeros((10, 20), np.uint8)
    label[0], label[1] = 1, 3
    maps = {"truth": np.where(label == 1, 0, label), "prediction": label}
    (legend,) = overlay(label, maps, ["liver", "spleen", "$x^{2$"]).legends
    listed = {t.get_text(): h.get_facecolor()[:3] for t, h in zip(legend.texts, legend.legend_handles, strict=True)}
    assert list(listed) == ["liver", r"\$x^{2\$"]  # no formula, which would end in an error
    assert [np.round(np.multiply(colour, 255)).tolist() for colour in listed.values()] == [[*COLOURS[0]], [*COLOURS[2]]]
    assert not overlay(label, maps).legends and not overlay(label, {"truth": label * 0}, ["liver"]).legends


def test_overlay_shows_gray_values_between_their_percentiles(tmp_path):
    pixels = drawn(overlay(np.arange(200.0).reshape(10, 20) - 5000, {}), tmp_path)[20:]
    assert pixels[0, 0].tolist() == [0, 0, 0] and pixels[-1, -1].tolist() == [255, 255, 255]
    red, green, blue = pixels[5 * 25, 0]  # half way
    assert red == green == blue and 120 < red < 135


@pytest.mark.parametrize("score", ["", "nan", "0.75"])
def test_curves_draw_any_history(score, tmp_path):
    row = {"epoch": "1", "loss": "0.5", "score": "", "learning_rate": "1e-4"}
    for history in ([row], [row, {**row, "epoch": "2", "loss": "0.25", "score": score}]):
        figure = curves(history)
        assert drawn(figure, tmp_path).shape == (300, 960, 3)
        (loss,), (scores,) = (axes.lines for axes in figure.axes)
        assert loss.get_xydata().tolist() == [[1, 0.5], [2, 0.25]][: len(history)]
    assert np.array_equal(scores.get_xydata(), [[2, float(score)]] if score else np.empty((0, 2)), equal_nan=True)


def test_an_evaluation_leaves_its_tables_and_the_pictures_of_three_cases(tmp_path):
    truth = torch.zeros(1, 20, 12, 3)
    truth[:, 5:10, 2:8, 1] = 1
    batches, scores = [], torch.tensor([[0.9, NAN], [0.1, NAN], [0.5, NAN]])
    for case in "abc":
        nib.save(nib.Nifti1Image(np.random.default_rng(0).random((20, 12, 3)), np.eye(4)), tmp_path / f"{case}.nii")
        batches.append([{"image": MetaTensor(truth, meta={"filename_or_obj": str(tmp_path / f"{case}.nii")})}])
    write_csv(tmp_path / "out" / "history.csv", ["epoch", "loss", "score"], [["1", "0.5", "0.25"]])
    evaluator = Engine(lambda engine, batch: [{"label": MetaTensor(truth), "pred": MetaTensor(truth)}])
    evaluator.state.metric_details = {"val_mean_dice": scores}
    Report(tmp_path / "out", {"0": "background", "1": "liver", "2": "spleen"}).attach(evaluator)
    evaluator.run(batches)
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {"history.csv", "cases.csv", "summary.md", "curves.png", "worst.png", "median.png", "best.png"}
    assert (tmp_path / "out" / "cases.csv").read_text().splitlines()[:2] == ["case,dice liver,dice spleen", "a,0.9,nan"]
    # Three panels of 12 by 20 pixels at a scale of 25, a line of titles, and one of names.
    assert Image.open(tmp_path / "out" / "worst.png").size == (3 * 20 * 25, 12 * 25 + 40)


def test_pictures_of_large_images_are_thinned():
    assert thin(np.zeros((3000, 1000, 3))).shape == (500, 167, 3)
    assert thin(np.zeros((512, 100))).shape == (512, 100)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_picture_is_read_as_people_see_it(tmp_path, suffix):
    image = np.zeros((16, 32, 3), np.uint8)
    image[:, 16:] = (0, 0, 255)
    Image.fromarray(image).save(tmp_path / f"image{suffix}", quality=100)
    read = read_slice(str(tmp_path / f"image{suffix}"), 2, 0)
    assert read.shape == (16, 32, 3) and read[8, 28, 2] > 200 and read[8, 4].max() < 60


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "SRA"])
def test_a_volume_is_seen_upright_however_it_is_stored(tmp_path, axcodes):
    # Towards right, anterior, superior: the patient's right third is bright at its anterior end.
    ras = np.zeros((12, 10, 4), np.float32)
    ras[9:, 6:, 2] = 1
    image = nib.Nifti1Image(ras, np.diag([2, 2, 5, 1]))
    turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(axcodes))
    nib.save(image.as_reoriented(turn), tmp_path / "volume.nii.gz")
    slices = [read_slice(str(tmp_path / "volume.nii.gz"), 2, z) for z in range(4)]
    assert [bool(s.any()) for s in slices] == [False, True, False, False]  # from superior to inferior
    assert slices[1].shape == (10, 12) and slices[1][:4, :3].all() and slices[1].sum() == 12
