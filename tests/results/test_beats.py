"""The curve of a beat and its GIF."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from networks.errors import DataError, WriteError
from networks.results.beats import beating, save_gif, volume_curve
from networks.results.hearts import RIGHT_FIRST
from networks.results.pictures import COLOURS

VOLUMES = {"lv": [100, 60, 40, 80], "myo": [90, 91, 92, 93], "rv": [110, 70, 50, 90]}
TIMES = [0.0, 200.0, 400.0, 600.0]


@pytest.mark.parametrize(
    ("times", "frames", "x", "label"),
    [
        (TIMES, None, TIMES, "time, ms"),
        (None, None, [0, 1, 2, 3], "frame"),
        (None, [1, 4, 7, 9], [1, 4, 7, 9], "frame"),
        (TIMES[::-1], None, [0, 1, 2, 3], "frame"),  # times that run backwards say nothing
    ],
)
def test_curve_shows_the_volumes_over_time(times, frames, x, label):
    figure = volume_curve(VOLUMES, 0, 2, times, frames)
    axes = figure.axes[0]
    curves = {line.get_label(): line for line in axes.lines[:3]}
    assert list(curves) == ["left ventricle", "myocardium", "right ventricle"]
    for line, values in zip(curves.values(), VOLUMES.values(), strict=True):
        assert list(line.get_xdata()) == x and list(line.get_ydata()) == values
    assert [line.get_xdata()[0] for line in axes.lines[3:]] == [x[0], x[2]]
    assert [text.get_text() for text in axes.texts] == ["ED", "ES"]
    assert axes.get_xlabel() == label and axes.get_ylabel() == "volume, mL"
    figure.canvas.draw()


@pytest.mark.parametrize(
    ("change", "ed", "es", "times"),
    [({"rv": [1]}, 0, 2, None), ({}, 0, 4, None), ({}, -1, 2, None), ({}, 0, 2, TIMES[:3])],
)
def test_curve_of_frames_that_do_not_belong_together_is_told(change, ed, es, times):
    with pytest.raises(DataError):
        volume_curve({**VOLUMES, **change}, ed, es, times)


def heart(frames: int, numbers=RIGHT_FIRST) -> tuple[np.ndarray, np.ndarray]:
    """Blurred noise, and a left ventricle in a ring with a right one beside it, in slices 2 to 7 of ten."""
    x, y = np.meshgrid(np.arange(200), np.arange(180), indexing="ij")
    labels = np.zeros((frames, 200, 180, 10), np.uint8)
    for t in range(frames):
        r = 20 + 5 * np.cos(2 * np.pi * t / frames)
        labels[t][np.hypot(x - 140, y - 90) < 15, 2:8] = numbers["rv"]
        labels[t][np.hypot(x - 90, y - 90) < 32, 2:8] = numbers["myo"]
        labels[t][np.hypot(x - 90, y - 90) < r, 2:8] = numbers["lv"]
    noise = gaussian_filter(np.random.default_rng(0).normal(size=labels.shape[1:]), 2).astype(np.float32)
    return 5 * noise + labels, labels


@pytest.mark.parametrize("numbers", [RIGHT_FIRST, {"lv": 1, "myo": 2, "rv": 3}])
def test_contours_lie_where_the_structures_end(numbers):
    images, labels = heart(3, numbers)
    pictures = beating(images, labels, (1.0, 1.0, 10.0), numbers, slices=1)
    assert len(pictures) == 3
    # Radii 25, 17.5, 17.5 about x = 90; the heart's window is 58 to 155 in x with a margin of a quarter of that.
    window, scale = 59 - 24, 144 / (155 + 24 - 59 - 24 + 48)
    for picture, radius in zip(pictures, (25, 17.5, 17.5), strict=True):
        colours = np.asarray(picture.convert("RGB")).transpose(1, 0, 2)
        row = (colours == COLOURS[2]).all(-1).any(1).nonzero()[0]  # blue: the left ventricle
        assert (row[-1] - row[0]) / scale == pytest.approx(2 * radius, abs=2)
        assert (row[-1] + row[0]) / 2 / scale + window == pytest.approx(90, abs=1.5)
        red = (colours == COLOURS[1]).all(-1).any(1).nonzero()[0]
        assert (red[-1] - red[0]) / scale == pytest.approx(64, abs=2)
        assert (colours == COLOURS[0]).all(-1).any()
        middle = colours[round((90 - window) * scale), round((90 - window) * scale)]
        assert middle[0] == middle[1] == middle[2]  # inside the contour the image is seen


def test_pixels_are_square_and_slices_lie_side_by_side():
    images, labels = heart(2)
    one, three = (beating(images, labels, (1.0, 1.0, 10.0), slices=n)[0].size for n in (1, 3))
    assert three == (3 * one[0], one[1])
    assert beating(images, labels, (1.0, 1.0, 10.0), slices=99)[0].size == (6 * one[0], one[1])  # no slice twice
    wide = beating(images, labels, (1.0, 2.0, 10.0), slices=1)[0].size
    assert wide[1] / wide[0] == pytest.approx(2 * one[1] / one[0], rel=0.02)
    turned = [np.moveaxis(a, 3, 1) for a in (images, labels)]
    again = beating(*turned, (10.0, 1.0, 1.0), axis=0, slices=1)
    assert np.array_equal(np.asarray(again[0]), np.asarray(beating(images, labels, (1.0, 1.0, 10.0), slices=1)[0]))


def test_one_slice_is_the_middle_of_the_heart():
    images, labels = heart(2)
    images[..., 5] = 0  # of slices 2 to 7
    colours = np.asarray(beating(images, labels, (1.0, 1.0, 10.0), slices=1)[0].convert("RGB")).reshape(-1, 3)
    assert {tuple(colour) for colour in colours.tolist()} == {(0, 0, 0), *COLOURS[:3]}


def test_gif_is_small_and_plays_a_beat(tmp_path):
    images, labels = heart(40)
    pictures = beating(images, labels, (1.4, 1.4, 10.0))
    assert len(pictures) == 20  # every second
    save_gif(pictures, tmp_path / "heart.gif", beat=800)
    assert (tmp_path / "heart.gif").stat().st_size < 400_000
    gif = Image.open(tmp_path / "heart.gif")
    assert gif.n_frames == 20 and gif.info["duration"] == 40 and gif.info["loop"] == 0
    assert [file.name for file in tmp_path.iterdir()] == ["heart.gif"]
    with pytest.raises(WriteError):
        save_gif(pictures, tmp_path / "heart.gif" / "heart.gif")


def test_a_series_without_a_heart_is_shown_whole():
    images, labels = heart(2)
    assert beating(images, np.zeros_like(labels), (1.0, 1.0, 10.0), slices=1)[0].size == (144, 130)
    assert beating(np.zeros_like(images), labels, (1.0, 1.0, 10.0))  # nor does an image without contrast fail


@pytest.mark.parametrize("cut", [lambda i, x: (i[:1], x), lambda i, x: (i[:0], x[:0]), lambda i, x: (i[..., :3], x)])
def test_images_that_do_not_belong_to_their_label_maps_are_told(cut):
    with pytest.raises(DataError):
        beating(*cut(*heart(2)), (1.0, 1.0, 10.0))
