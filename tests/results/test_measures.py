"""Measures of shapes whose volumes are known, and their table."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest

from networks.errors import DataError, WriteError
from networks.results.measures import components, measures, write_measures

NAN = math.nan
NAMES = {1: "Right ventricle", 2: "myocardium"}


def boxes() -> np.ndarray:
    """Class 1 in 2 x 3 x 4 voxels, class 2 in two single ones that do not touch."""
    label = np.zeros((8, 8, 8), np.uint8)
    label[1:3, 1:4, 1:5] = 1
    label[6, 6, 6] = label[6, 4, 6] = 2
    return label


@pytest.mark.parametrize("spacing", [(0.5, 0.5, 0.5), (0.5, 0.7, 1.5)])
def test_volume_of_an_ellipsoid(spacing):
    axes = (20.0, 15.0, 12.0)  # mm
    grid = np.meshgrid(*((np.arange(-25, 25, mm) + mm / 3) for mm in spacing), indexing="ij")
    label = (sum((x / a) ** 2 for x, a in zip(grid, axes, strict=True)) < 1).astype(np.uint8)
    row = measures(label, {1: "ball"}, spacing)
    assert row == {"ball_ml": pytest.approx(4 / 3 * math.pi * math.prod(axes) / 1000, rel=0.005), "ball_components": 1}


def test_all_columns_counted_by_hand():
    label = boxes()
    image = np.full(label.shape, -1000.0)
    image[label == 1] = np.arange(24) + 10  # mean 21.5
    image[6, 6, 6], image[6, 4, 6] = 3, 5
    probability = np.full(label.shape, 0.1)
    probability[label == 1] = 0.75
    probability[6, 6, 6], probability[6, 4, 6] = 0.5, 1.0
    row = measures(label, {**NAMES, 3: "aorta (arch)"}, (1, 2, 3), image, probability)
    expected = {
        "right_ventricle_ml": 24 * 6 / 1000,
        "right_ventricle_mean_intensity": 21.5,
        "right_ventricle_components": 1,
        "right_ventricle_confidence": 0.75,
        "myocardium_ml": 2 * 6 / 1000,
        "myocardium_mean_intensity": 4,
        "myocardium_components": 2,
        "myocardium_confidence": 0.75,
        "aorta_arch_ml": 0,
        "aorta_arch_mean_intensity": NAN,
        "aorta_arch_components": 0,
        "aorta_arch_confidence": NAN,
        "confidence": 0.75,
    }
    assert list(row) == list(expected)
    assert row == {name: pytest.approx(value, nan_ok=True) for name, value in expected.items()}
    # Another confidence by structure: the case's is weighted by their sizes.
    probability[label == 2] = 0.1
    assert measures(label, NAMES, (1, 2, 3), None, probability)["confidence"] == pytest.approx((24 * 0.75 + 0.2) / 26)


def test_nothing_found_is_a_row_too():
    nothing = np.zeros((4, 4, 4), np.uint8)
    row = measures(nothing, NAMES, (1, 1, 1), nothing, np.ones((4, 4, 4)))
    assert row["myocardium_ml"] == row["myocardium_components"] == 0
    assert math.isnan(row["myocardium_mean_intensity"]) and math.isnan(row["confidence"])


def test_pictures_have_areas_and_the_mean_of_their_channels():
    label = np.zeros((6, 5), np.uint8)
    label[1:3, 1:4] = 1
    image = np.stack([np.full(label.shape, value) for value in (10, 20, 60)])
    names = {1: "gland"}
    assert measures(label, names, image=image) == {
        "gland_pixels": 6,
        "gland_mean_intensity": 30,
        "gland_components": 1,
    }
    assert measures(label, names, (0.5, 2.0))["gland_mm2"] == 6
    assert measures(label.astype(float), names) == measures(label, names)  # whole numbers of any type


def test_parts_that_touch_at_a_corner_are_one():
    mask = np.zeros((4, 4, 4), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = True
    assert components(mask) == 1
    mask[3, 3, 3] = True
    assert components(mask) == 2


LABEL = boxes()


@pytest.mark.parametrize(
    ("label", "options", "message"),
    [
        (LABEL, {"names": {1: "a"}}, r"numbers \[2\], expected none but 0, 1"),
        (LABEL, {"names": {1: "left atrium", 2: "Left-Atrium"}}, "names of their own"),
        (LABEL, {"names": {0: "background", 1: "a", 2: "b"}}, "from 1 on"),
        (LABEL, {"names": {1: "a", 2: "?"}}, "names of their own"),
        (LABEL, {"names": {}}, "names of their own"),
        (LABEL, {"spacing": None}, "spacing is unknown"),
        (LABEL, {"spacing": (1, 1)}, "expected 3"),
        (LABEL, {"spacing": (1, 0, 1)}, "above 0"),
        (LABEL, {"spacing": (1, NAN, 1)}, "finite"),
        (LABEL, {"spacing": (1, math.inf, 1)}, "finite"),
        (LABEL, {"image": np.zeros((8, 8, 7))}, "image has shape"),
        (LABEL, {"probability": np.zeros((3, 8, 8, 8))}, "probabilities have shape"),
        (LABEL, {"probability": np.full(LABEL.shape, 1.5)}, "expected 0 to 1"),
        (LABEL, {"probability": np.full(LABEL.shape, NAN)}, "expected 0 to 1"),
        (LABEL + 0.5, {}, "fractions"),
        (LABEL - 1.0, {}, "from -1"),
        (np.full((2, 2, 2), NAN), {}, "whole numbers"),
        (np.full((2, 2, 2), 300), {}, "from 300"),
        (np.zeros((0, 2, 2), int), {}, "no voxels"),
        (LABEL[None], {}, "X, Y, Z"),
    ],
)
def test_wrong_input_is_told_in_one_sentence(label, options, message):
    with pytest.raises(DataError, match=message) as error:
        measures(label, **{"names": NAMES, "spacing": (1, 1, 1), **options})
    assert "\n" not in str(error.value)


def test_table_has_a_row_a_case_and_columns_in_order(tmp_path):
    path = tmp_path / "made" / "measures.csv"
    rows = {
        "one": {"lv_ml": 1.23456789, "parts": 1, "flags": "a, b"},
        "two, ä": {"lv_ml": NAN, "lv_mean": 2.0, "parts": 12345678, "flags": ""},
        "three": {"spleen_ml": 3.0},
    }
    write_measures(path, rows)
    with path.open(newline="", encoding="utf-8") as file:
        table = list(csv.reader(file))
    assert table == [
        ["case", "spleen_ml", "lv_ml", "lv_mean", "parts", "flags"],
        ["one", "", "1.23457", "", "1", "a, b"],
        ["two, ä", "", "", "2", "12345678", ""],
        ["three", "3", "", "", "", ""],
    ]
    assert [file.name for file in path.parent.iterdir()] == ["measures.csv"]


def test_table_is_there_whole_or_not(tmp_path):
    write_measures(tmp_path / "measures.csv", {})
    assert (tmp_path / "measures.csv").read_text().split() == ["case"]
    (tmp_path / "file").touch()
    with pytest.raises(WriteError):
        write_measures(tmp_path / "file" / "measures.csv", {"one": {"lv_ml": 1.0}})
