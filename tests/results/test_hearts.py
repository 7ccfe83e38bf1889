"""Function of hearts whose volumes are known, and a flag for each thing that looks wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest

from networks.errors import DataError
from networks.results.hearts import (
    RIGHT_FIRST,
    body_surface,
    ed_and_es,
    frame_shapes,
    frame_volumes,
    function_flags,
    heart_function,
    known_times,
    rate_of_interval,
    rate_of_times,
    shape_flags,
)

LEFT_FIRST = {"lv": 1, "myo": 2, "rv": 3}
SPACING = (0.5, 0.5, 10.0)
HEIGHT = 60.0  # mm, of six slices
MYOCARDIUM = 1500.0  # mm2 of each slice's ring, the same through the beat
RADII = [25 - 5 * (1 - math.cos(2 * math.pi * t / 8)) for t in range(8)]  # mm: 25 at frame 0, 15 at frame 4


def heart(radius: float, rv_radius: float, numbers=RIGHT_FIRST) -> np.ndarray:
    """Three cylinders through slices 1 to 6 of eight: left ventricle, myocardium about it, right ventricle beside."""
    x, y = np.meshgrid(np.arange(-40, 70, SPACING[0]), np.arange(-40, 40, SPACING[1]), indexing="ij")
    plane = np.zeros(x.shape, np.uint8)
    plane[np.hypot(x - 51, y) < rv_radius] = numbers["rv"]
    plane[np.hypot(x, y) < math.sqrt(radius**2 + MYOCARDIUM / math.pi)] = numbers["myo"]
    plane[np.hypot(x, y) < radius] = numbers["lv"]
    label = np.zeros((*plane.shape, 8), np.uint8)
    label[..., 1:7] = plane[..., None]
    return label


def beat(numbers=RIGHT_FIRST) -> np.ndarray:
    """Eight frames ``T, X, Y, Z``; the right ventricle's radius is 0.6 of the left one's."""
    return np.stack([heart(r, 0.6 * r, numbers) for r in RADII])


LABELS = beat()


def millilitres(radius: float) -> float:
    return math.pi * radius**2 * HEIGHT / 1000


def test_function_of_cylinders():
    volumes = frame_volumes(LABELS, SPACING)
    assert volumes["lv"] == pytest.approx([millilitres(r) for r in RADII], rel=0.01)
    assert volumes["rv"] == pytest.approx([millilitres(0.6 * r) for r in RADII], rel=0.02)
    assert volumes["myo"] == pytest.approx(np.full(8, MYOCARDIUM * HEIGHT / 1000), rel=0.01)
    row = heart_function(volumes)
    assert (row["ed_frame"], row["es_frame"]) == (0, 4)
    assert row["lv_edv_ml"] == pytest.approx(millilitres(25), rel=0.01)
    assert row["lv_ef_percent"] == pytest.approx(100 * (1 - (15 / 25) ** 2), abs=0.5)  # 64
    assert row["rv_ef_percent"] == pytest.approx(64, abs=1.5)
    assert row["lv_mass_g"] == pytest.approx(1.05 * 90, rel=0.01)
    pair = heart_function(frame_volumes(LABELS[[0, 4]], SPACING), frames=[1, 12])
    assert pair == {**row, "ed_frame": 1, "es_frame": 12}


def test_label_numbers_may_be_others():
    swapped = beat(LEFT_FIRST)
    right, left = frame_volumes(LABELS, SPACING), frame_volumes(swapped, SPACING, LEFT_FIRST)
    assert all((right[name] == left[name]).all() for name in RIGHT_FIRST)
    assert not any(frame_shapes(frame, LEFT_FIRST) for frame in swapped)
    mistaken = frame_volumes(swapped, SPACING)
    assert (mistaken["rv"] == right["lv"]).all() and (mistaken["lv"] == right["rv"]).all()


VOLUMES = {
    "lv": [80.0, 100.0, 70.0, 40.0, 60.0],
    "myo": [98.0, 100.0, 102.0, 104.0, 100.0],
    "rv": [150, 120, 90, 60, 99],
}


def test_all_columns_by_hand():
    surface = body_surface(1.8, 80)
    assert surface == pytest.approx(2.0)  # sqrt(180 x 80 / 3600)
    row = heart_function(VOLUMES, rate=70.0, surface=surface)
    assert row == {
        "ed_frame": 1,
        "es_frame": 3,
        "lv_edv_ml": 100,
        "lv_esv_ml": 40,
        "lv_sv_ml": 60,
        "lv_ef_percent": 60,
        "lv_edvi_ml_m2": 50,
        "lv_esvi_ml_m2": 20,
        "lv_svi_ml_m2": 30,
        "lv_co_l_min": pytest.approx(4.2),
        "lv_ci_l_min_m2": pytest.approx(2.1),
        "lv_mass_g": pytest.approx(105),
        "lv_massi_g_m2": pytest.approx(52.5),
        "rv_edv_ml": 120,  # at the left ventricle's end-diastole, though it is larger before
        "rv_esv_ml": 60,
        "rv_sv_ml": 60,
        "rv_ef_percent": 50,
        "rv_edvi_ml_m2": 60,
        "rv_esvi_ml_m2": 30,
        "rv_svi_ml_m2": 30,
        "rv_co_l_min": pytest.approx(4.2),
        "rv_ci_l_min_m2": pytest.approx(2.1),
        "heart_rate_per_min": 70,
        "body_surface_m2": pytest.approx(2),
    }
    bare = heart_function(VOLUMES)
    assert not any(name.endswith(("_m2", "_min")) for name in bare)
    assert bare == {name: row[name] for name in bare}


def test_frames_may_be_given():
    row = heart_function(VOLUMES, ed=10, es=12, frames=[10, 11, 12, 13, 14])
    assert (row["ed_frame"], row["es_frame"], row["lv_edv_ml"], row["lv_esv_ml"]) == (10, 12, 80, 70)
    assert ed_and_es(VOLUMES["lv"], es=0) == (1, 0)
    assert ed_and_es(VOLUMES["lv"], ed=7, frames=[1, 3, 5, 7, 9]) == (3, 3)  # one frame is found, the other was given
    assert ed_and_es([5, 5, 3, 3]) == (0, 2)
    assert ed_and_es([0, 0, 0]) == (0, 0)  # no ventricle anywhere, which is flagged


def test_heart_rate_of_headers():
    assert rate_of_interval(850) == pytest.approx(60_000 / 850)
    assert rate_of_interval(0) is rate_of_interval(None) is rate_of_interval(math.nan) is None
    assert rate_of_interval(100) is None  # 600 a minute
    times = [40.0 * t for t in range(25)]  # 25 frames of 40 ms: a beat of 1000 ms, though the last begins at 960
    assert rate_of_times(times) == pytest.approx(60)
    assert rate_of_times([t * 25.0 for t in range(25)]) == pytest.approx(96)
    assert rate_of_times([t * 1000.0 for t in range(25)]) is None  # seconds a frame: 2.4 a minute
    for wrong in (times[::-1], [0, 0, 40], [5], [], [0, math.nan, 40]):
        assert not known_times(wrong) and rate_of_times(wrong) is None


@pytest.mark.parametrize(("height", "weight"), [(0, 0), (180, 80), (1.8, 0), (1.8, 8000), (math.nan, 80)])
def test_body_surface_of_headers_that_are_no_person_s(height, weight):
    assert body_surface(height, weight) is None


def test_a_sound_heart_has_no_flags():
    assert function_flags(frame_volumes(LABELS, SPACING)) == []
    assert not any(frame_shapes(frame) for frame in LABELS)
    assert function_flags({name: values[1:4:2] for name, values in VOLUMES.items()}) == []  # a pair of any frames


@pytest.mark.parametrize(
    ("change", "frames", "flag"),
    [
        ({"lv": [100, 90, 14.7, 50, 80]}, None, "left ventricle: ejection fraction 85.3 %, outside 5 to 85 %"),
        ({"lv": [100, 99, 98, 97, 99]}, [1, 2, 3, 4, 5], "left ventricle: ejection fraction 3.0 %, outside 5 to 85 %"),
        ({"rv": [80, 50, 112, 70, 70]}, None, "right ventricle: ejection fraction -40.0 %, outside 5 to 85 %"),
        ({"rv": [0] * 5}, None, "right ventricle: not found at end-diastole, so it has no ejection fraction"),
        ({"myo": [0] * 5}, None, "myocardium: not found at end-diastole, so its mass is 0"),
        (
            {"myo": [100, 100, 79, 90, 95]},
            None,
            "myocardium: its volume changes from 79 to 100 mL, by more than a fifth",
        ),
        ({"lv": [100, 60, 70, 80, 90]}, None, "end-diastole and end-systole are neighbouring frames, 0 and 1"),
        ({"lv": [100, 90, 80, 70, 60]}, None, "end-diastole and end-systole are neighbouring frames, 0 and 4"),
    ],
)
def test_a_flag_for_each_thing_wrong_with_volumes(change, frames, flag):
    volumes = {"lv": [100, 80, 50, 70, 90], "myo": [100, 100, 81, 90, 95], "rv": [100, 80, 50, 50, 90]}
    assert function_flags(volumes) == []
    assert function_flags({**volumes, **change}, frames=frames) == [flag]


def test_a_pair_s_frames_are_neighbours_by_their_names():
    pair = {"lv": [100, 50], "myo": [100, 100], "rv": [100, 50]}
    assert function_flags(pair, frames=[1, 12]) == []
    assert function_flags(pair) == []  # two frames that have no names
    assert function_flags(pair, frames=[7, 8]) == ["end-diastole and end-systole are neighbouring frames, 7 and 8"]


def _gap(frame):
    frame[..., 3][frame[..., 3] == RIGHT_FIRST["rv"]] = 0


def _part(frame):
    frame[5, 5, 3] = RIGHT_FIRST["lv"]


def _edge(frame):
    frame[:40, 80, 3][frame[:40, 80, 3] == 0] = RIGHT_FIRST["myo"]  # a line of pixels from the heart to the edge


def _last_slice(frame):
    frame[..., 7] = frame[..., 6]
    frame[..., 0] = frame[..., 1]


@pytest.mark.parametrize(
    ("spoil", "flags"),
    [
        (_gap, ["right ventricle: missing between slices that have it", "right ventricle: in several parts"]),
        (_part, ["left ventricle: in several parts"]),
        (_edge, ["myocardium: at the edge of the field of view"]),
        (_last_slice, []),  # a stack may end in the heart
    ],
)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_flag_for_each_thing_wrong_with_shapes(spoil, flags, axis):
    labels = LABELS[:6].copy()
    spoil(labels[2])
    turned = np.moveaxis(labels, 3, axis + 1)

    def found(frames=None):
        return shape_flags([frame_shapes(frame, axis=axis) for frame in turned], frames)

    assert found() == [f"{flag}, in frame 2" for flag in flags]
    spoil(labels[3])
    named = found(range(10, 16))
    assert named == [f"{flag}, in frames 12 and 13" for flag in flags]
    for frame in labels:
        spoil(frame)
    assert found() == [f"{flag}, in 6 frames (0, 1, 2, ...)" for flag in flags]


def test_the_edge_of_what_the_network_saw_is_an_edge():
    (frame,) = LABELS[:1]
    (left, right), (top, bottom) = ((found.min(), found.max() + 1) for found in np.nonzero(frame)[:2])
    whole = [(0, size) for size in frame.shape]
    assert frame_shapes(frame, seen=whole) == []
    seen = [(left - 1, right + 1), (top - 1, bottom + 1), whole[2]]
    assert frame_shapes(frame, seen=seen) == []
    cut = [(left, right + 1), *seen[1:]]
    assert frame_shapes(frame, seen=cut) == ["myocardium: at the edge of the field of view"]


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([LABELS[0], LABELS[1][..., :5]], {}, r"Frame 1 has shape \[220, 160, 5\]"),
        (LABELS[0], {}, "volumes X, Y, Z"),
        (LABELS[:2] * 2, {}, r"Frame 0 holds the numbers \[4, 6\]"),
        (LABELS[:2], {"spacing": (1, 1, math.inf)}, "finite"),
        (LABELS[:2], {"spacing": (1, 1)}, "expected 3"),
        (LABELS[:2], {"numbers": {"lv": 1, "myo": 2}}, "three different"),
        (LABELS[:2], {"numbers": {"lv": 1, "myo": 2, "rv": 2}}, "three different"),
        (LABELS[:2], {"numbers": {"lv": 0, "myo": 1, "rv": 2}}, "from 1 on"),
    ],
)
def test_wrong_label_maps_are_told_in_one_sentence(labels, options, message):
    with pytest.raises(DataError, match=message) as error:
        frame_volumes(labels, **{"spacing": SPACING, **options})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("volumes", "options", "message"),
    [
        ({name: values[:1] for name, values in VOLUMES.items()}, {}, "two frames or more, got 1"),
        ({name: [] for name in VOLUMES}, {}, "two frames or more, got 0"),
        ({**VOLUMES, "rv": [1, 2]}, {}, "differ in number: 2, 5"),
        (VOLUMES, {"frames": [1, 2]}, "differ in number: 2, 5"),
        ({"lv": [1, 2], "rv": [1, 2]}, {}, "myo is missing"),
        ({**VOLUMES, "lv": [1, 2, 3, 4, math.nan]}, {}, "not finite"),
        ({**VOLUMES, "rv": [1, 2, 3, 4, -1]}, {}, "negative"),
        (VOLUMES, {"ed": 5}, "ed frame is 5, but the frames are 0 to 4"),
        (VOLUMES, {"es": -1}, "es frame is -1"),
        (VOLUMES, {"ed": 2, "es": 2}, "Frame 2 cannot be both"),
        (VOLUMES, {"ed": 1, "frames": [10, 12, 14, 16, 18]}, "ed frame is 1, but the frames are 10, 12, 14"),
    ],
)
def test_wrong_volumes_are_told_in_one_sentence(volumes, options, message):
    for function in (heart_function, function_flags):
        with pytest.raises(DataError, match=message) as error:
            function(volumes, **options)
        assert "\n" not in str(error.value)
