"""Time series: a beating heart is the same frames as one NIfTI file and as a DICOM study, however that is exported."""

from __future__ import annotations

import gzip
import itertools
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pydicom.sequence import Sequence
from test_dicom import ENHANCED, MR, SEGMENTATION, STRUCTURES, group, write

from networks import DataError
from networks.data.cine import TimeSeries, nifti_series, study_series
from networks.data.folders import image_files
from networks.data.readers import read_image
from networks.data.studies import study_folders

SLICES, PHASES, ROWS, COLUMNS = 4, 5, 12, 16
GAP, SPACING = 9.0, (1.4, 1.5)  # between rows, between columns
TURN = np.array([[0.8, 0, 0.6], [0.36, 0.8, -0.48], [-0.48, 0.6, 0.64]])  # columns: along a row, a column, the normal
ORIGIN = np.array([-20.0, 10.0, 30.0])
SHORT = [*TURN[:, 0], *TURN[:, 1]]
LONG = [*TURN[:, 1], *TURN[:, 2]]
TO_RAS = np.diag([-1.0, -1, 1])
AFFINE = nib.affines.from_matvec(TO_RAS @ TURN @ np.diag([SPACING[1], SPACING[0], GAP]), TO_RAS @ ORIGIN)


def pixels(z: int, t: int) -> np.ndarray:
    """Rows and columns of a slice at a phase: each pixel says where and when it is."""
    return 1000 * z + 100 * t + np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS) % 97


def heart() -> np.ndarray:
    """The frames as a NIfTI file has them: X, Y, Z, T."""
    frames = [[pixels(z, t).T for z in range(SLICES)] for t in range(PHASES)]
    return np.array(frames).transpose(2, 3, 1, 0).astype(np.int16)


def place(z: float) -> list[float]:
    return (ORIGIN + GAP * z * TURN[:, 2]).tolist()


def image(file: Path, z: float, t: int, values: np.ndarray | None = None, **tags: object) -> None:
    """Write one slice at one phase; tags of None are not there."""
    told = {
        "SeriesInstanceUID": "1.2.9",
        "SeriesNumber": 9,
        "SeriesDescription": "cine SAX",
        "InstanceNumber": t + 1,
        "TriggerTime": 30 * t,
        "NominalInterval": 900,
        "AcquisitionDate": "20240102",
        "AcquisitionTime": "101500.5",
        "ImagePositionPatient": place(z),
        "ImageOrientationPatient": SHORT,
        "PixelSpacing": list(SPACING),
        **tags,
    }
    content = pixels(int(z), t) if values is None else values
    write(file, MR, content, **{name: value for name, value in told.items() if value is not None})


def by_slice(z: int) -> dict[str, object]:
    return {"SeriesInstanceUID": f"1.2.{z + 1}", "SeriesNumber": z + 1}


def study(folder: Path, of: Callable[[int, int], dict | None] = lambda z, t: {}, phases: int = PHASES) -> Path:
    """Write a study of the heart, the files without order in folders without meaning.

    Args:
        folder: gets it.
        of: the tags of slice z at phase t besides those of :func:`image`; None leaves it away.
        phases: how many there are.
    """
    for number, (t, z) in enumerate(itertools.product(range(phases), range(SLICES))):
        if (tags := of(z, t)) is not None:
            image(folder / f"d{number % 3}" / f"IM{(number * 7) % (phases * SLICES)}", z, t, **tags)
    return folder


def enhanced(
    file: Path,
    order: list[tuple[int, int]],
    of: Callable[[int, int], dict] = lambda z, t: {},
    measures: dict[str, object] | None = None,
    **tags,
) -> None:
    """Write one file of several frames, slices z at phases t, and 6 mm thick where ``measures`` say nothing else."""
    frames = []
    for z, t in order:
        told = {
            "PlanePositionSequence": {"ImagePositionPatient": place(z)},
            "FrameContentSequence": {"TemporalPositionIndex": t + 1},
            "CardiacSynchronizationSequence": {
                "NominalCardiacTriggerDelayTime": 30.0 * t,
                "RRIntervalTimeNominal": 900.0,
            },
        }
        frames.append(group(**{**told, **of(z, t)}))
    shared = group(
        PixelMeasuresSequence={
            "PixelSpacing": list(SPACING),
            **({"SliceThickness": 6} if measures is None else measures),
        },
        PlaneOrientationSequence={"ImageOrientationPatient": SHORT},
    )
    groups: dict[str, object] = {
        "SharedFunctionalGroupsSequence": Sequence([shared]),
        "PerFrameFunctionalGroupsSequence": Sequence(frames),
    }
    write(file, ENHANCED, np.array([pixels(*each) for each in order]), NumberOfFrames=len(order), **groups, **tags)


def sorted_study(folder: Path) -> tuple[TimeSeries, list[str]]:
    """The series of a study, and why what is left out is."""
    left_out: list[dict[str, str]] = []
    series = study_series(folder, left_out)
    assert series is not None and all(Path(entry["file"]).is_file() for entry in left_out)
    return series, [entry["why"] for entry in left_out]


def check(series: TimeSeries | None, expected: np.ndarray | None = None) -> None:
    """The frames are those of the heart, where it lies."""
    expected = heart() if expected is None else expected
    assert series is not None
    assert (*series.shape, series.frames) == expected.shape
    for t in range(series.frames):
        frame = series.read(t)
        assert frame.shape == (1, *series.shape) and frame.meta["filename_or_obj"] == series.source
        assert np.array_equal(frame[0], expected[..., t])
        np.testing.assert_allclose(frame.affine, AFFINE, atol=1e-4)


def refused(folder: Path) -> str:
    with pytest.raises(DataError) as error:
        study_series(folder, [])
    assert str(folder) in str(error.value)
    print(error.value)
    return str(error.value)


@pytest.mark.parametrize("of", [lambda z, t: {}, lambda z, t: by_slice(z)], ids=["one series", "a series a slice"])
def test_a_study_is_sorted_by_its_headers(of, tmp_path):
    series, left_out = sorted_study(study(tmp_path, of))
    check(series)
    assert series.times == (0, 30, 60, 90, 120) and series.interval == 900
    assert series.source == str(tmp_path) and left_out == [] and series.height is series.weight is None
    with pytest.raises(IndexError, match="0 to 4"):
        series.read(PHASES)
    check(pickle.loads(pickle.dumps(series)))


@pytest.mark.parametrize("order", ["slices first", "phases first"])
def test_frames_of_one_enhanced_file_are_sorted_by_their_groups(order, tmp_path):
    frames = list(itertools.product(range(SLICES), range(PHASES)))
    enhanced(tmp_path / "1", frames if order == "phases first" else sorted(frames, key=lambda zt: (zt[1], -zt[0])))
    series, _ = sorted_study(tmp_path)
    check(series)
    assert series.times == (0, 30, 60, 90, 120) and series.interval == 900


def test_each_slice_may_have_an_enhanced_file_and_each_frame_a_scale(tmp_path):
    def scaled(z: int, t: int) -> dict:
        return {
            "PixelValueTransformationSequence": {"RescaleSlope": 0.5 + t, "RescaleIntercept": z, "RescaleType": "US"},
            "FrameContentSequence": {},
            "CardiacSynchronizationSequence": {},
        }

    for z in range(SLICES):
        enhanced(tmp_path / f"{7 - z}", [(z, t) for t in range(PHASES)], scaled, **by_slice(z))
    series, _ = sorted_study(tmp_path)
    z, t = np.arange(SLICES)[:, None], np.arange(PHASES)
    check(series, heart() * (0.5 + t) + z)
    assert series.times is None and series.interval is None


def test_one_slice_is_as_thick_as_its_header_says_by_one_rule(tmp_path):
    """The distance between slices, which has the gaps in it, else the thickness; in files of one frame or of many."""
    for name, extent, tags in (
        ("distance", 8, {"SpacingBetweenSlices": 8, "SliceThickness": 6}),
        ("thickness", 6, {"SliceThickness": 6}),
    ):
        for t in range(PHASES):
            image(tmp_path / name / str(t), 0, t, **tags)
        enhanced(tmp_path / f"{name}, all in one" / "1", [(0, t) for t in range(PHASES)], measures=tags)
        for folder in (name, f"{name}, all in one"):
            series, _ = sorted_study(tmp_path / folder)
            assert np.allclose(series.read(2).pixdim, [SPACING[1], SPACING[0], extent])


def test_one_slice_of_unknown_thickness_is_refused(tmp_path):
    for t in range(PHASES):
        image(tmp_path / "plain" / str(t), 0, t)
    message = refused(tmp_path / "plain")
    assert all(fact in message for fact in ("series 9 (cine SAX)", "SpacingBetweenSlices", "SliceThickness", "stack"))
    enhanced(tmp_path / "enhanced" / "1", [(0, t) for t in range(PHASES)], measures={})
    assert "SliceThickness" in refused(tmp_path / "enhanced")


def test_each_file_has_its_own_scale(tmp_path):
    series, _ = sorted_study(study(tmp_path, lambda z, t: {"RescaleSlope": 1 + t, "RescaleIntercept": -z}))
    check(series, heart() * (1.0 + np.arange(PHASES)) - np.arange(SLICES)[:, None])


def test_the_header_tells_of_the_patient_and_the_beat(tmp_path):
    tags = {"PatientSize": 1.76, "PatientWeight": 81}
    series, _ = sorted_study(study(tmp_path / "a", lambda z, t: {**tags, "NominalInterval": 800 + 20 * z}))
    assert (series.height, series.weight, series.interval) == (1.76, 81, 830)
    tags = {"PatientSize": 0, "PatientWeight": None, "NominalInterval": None}
    series, _ = sorted_study(study(tmp_path / "b", lambda z, t: tags))
    assert (series.height, series.weight, series.interval) == (None, None, None)
    series, _ = sorted_study(study(tmp_path / "c", lambda z, t: {"PatientSize": 176}))
    assert series.height == 176  # centimetres: whoever measures by it judges it


SHUFFLED = [3, 0, 4, 1, 2]


@pytest.mark.parametrize(
    ("of", "times"),
    [
        (lambda z, t: {"TriggerTime": 30 * t + 3 * z + t * z}, (4.5, 36, 67.5, 99, 130.5)),
        (lambda z, t: {"InstanceNumber": PHASES - t}, (0, 30, 60, 90, 120)),
        (lambda z, t: {"TriggerTime": None, "TemporalPositionIdentifier": t, "InstanceNumber": SHUFFLED[t]}, None),
        (lambda z, t: {"TriggerTime": 0, "AcquisitionTime": f"10151{t}.25", "InstanceNumber": SHUFFLED[t]}, None),
        (lambda z, t: {"TriggerTime": "", "AcquisitionDateTime": f"202401021015{t}5", "InstanceNumber": 1}, None),
        (lambda z, t: {"TriggerTime": None, "InstanceNumber": t * SLICES + z}, None),
        (lambda z, t: {"TriggerTime": None if z == 1 else 30 * t}, None),
    ],
    ids=["jitter", "backwards", "temporal position", "acquisition time", "date and time", "instance", "not of all"],
)
def test_phases_come_in_the_order_that_the_headers_tell(of, times, tmp_path):
    series, left_out = sorted_study(study(tmp_path, of))
    check(series)
    assert left_out == [] and (series.times == times if times is None else np.allclose(series.times, times))


def test_two_phases_are_a_series_and_one_is_none(tmp_path):
    series, _ = sorted_study(study(tmp_path / "two", phases=2))
    check(series, heart()[..., :2])
    left_out: list[dict[str, str]] = []
    assert study_series(study(tmp_path / "one", phases=1), left_out) is None and left_out == []
    (tmp_path / "none").mkdir()
    assert study_series(tmp_path / "none", left_out) is None


def test_company_is_left_out_with_a_line_for_each_series(tmp_path, caplog):
    study(tmp_path, lambda z, t: by_slice(z))
    for t in range(PHASES):
        tags = {"SeriesNumber": 21, "SeriesInstanceUID": "1.2.21", "SeriesDescription": "4CH"}
        image(tmp_path / "d0" / f"LAX{t}", 1, t, ImageOrientationPatient=LONG, **tags)
        tags = {"SeriesNumber": 22, "SeriesInstanceUID": "1.2.22", "SeriesDescription": "perfusion"}
        image(tmp_path / "d1" / f"P{t}", 1, t, pixels(0, t)[:8, :8], **tags)
        image(tmp_path / "d1" / f"Q{t}", 1, t + PHASES, pixels(0, t)[:8, :8], **tags)
        tags = {"SeriesNumber": 23, "SeriesInstanceUID": "1.2.23", "SeriesDescription": "T1 map"}
        image(tmp_path / "d2" / f"T{t}", 1.5, t, **tags)
        image(tmp_path / "d2" / f"U{t}", 1.5, t + PHASES, **tags)
    for z in range(SLICES):
        tags = {"SeriesNumber": 24, "SeriesInstanceUID": "1.2.24", "SeriesDescription": "LGE"}
        image(tmp_path / "d2" / f"L{z}.dcm", z, 0, AcquisitionTime="113000", **tags)
    write(tmp_path / "struct.dcm", STRUCTURES, None, Modality="RTSTRUCT", SeriesInstanceUID="1.8", SeriesNumber=31)
    write(tmp_path / "seg", SEGMENTATION, pixels(0, 0), SeriesInstanceUID="1.7", SeriesNumber=32)
    write(tmp_path / "report", "1.2.840.10008.5.1.4.1.1.88.22", None, Modality="SR", SeriesInstanceUID="1.6")
    shot = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "SeriesDescription": "screen", "SeriesNumber": 34}
    write(tmp_path / "shot", "1.2.840.10008.5.1.4.1.1.7", pixels(0, 0).repeat(3, 0), SeriesInstanceUID="1.5", **shot)
    (tmp_path / "readme.txt").write_text("no DICOM")
    (tmp_path / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    series, left_out = sorted_study(tmp_path)
    check(series)
    expected = {
        "series 21 (4CH), 5 images": "direction",
        "series 22 (perfusion), 10 images": "another size",
        "series 23 (T1 map), 10 images": "between its slices",
        "series 24 (LGE), 4 images": "no phases",
        "series 31, 1 files": "RTSTRUCT",
        "series 32, 1 files": "a segmentation",
        "the series of report, 1 files": "SR",
        "series 34 (screen), 1 files": "colours",
    }
    assert len(left_out) == len(expected)
    for name, why in expected.items():
        (line,) = (line for line in left_out if line.startswith(f"{name}: "))
        assert why in line and line.replace(f"{name}: ", "") in caplog.text


@pytest.mark.parametrize("later", [{"AcquisitionTime": "103000"}, {"AcquisitionTime": None, "AcquisitionDate": None}])
def test_of_a_slice_taken_again_the_later_counts_and_both_are_named(later, tmp_path, caplog):
    study(tmp_path, lambda z, t: by_slice(z))
    again = {"SeriesInstanceUID": "1.2.30", "SeriesNumber": 30, "SeriesDescription": "SAX again", **later}
    for t in range(PHASES):
        image(tmp_path / "d0" / f"A{t}", 2, t, pixels(2, t) + 5, **again)
    series, left_out = sorted_study(tmp_path)
    expected = heart()
    expected[:, :, 2] += 5
    check(series, expected)
    (why,) = left_out
    assert "series 3 (cine SAX), 5 images" in why and "as series 30 (SAX again)" in why and why[-30:] in caplog.text


def test_the_earlier_scan_is_not_taken_for_its_number(tmp_path):
    study(tmp_path, lambda z, t: by_slice(z))
    for t in range(PHASES):
        image(
            tmp_path / f"A{t}", 2, t, 0 * pixels(2, t), SeriesInstanceUID="1.3", SeriesNumber=30, AcquisitionTime="09"
        )
    series, left_out = sorted_study(tmp_path)
    check(series)
    assert left_out[0].startswith("series 30 ")


def test_of_a_slice_taken_again_with_other_phases_the_older_counts_and_both_are_named(tmp_path, caplog):
    study(tmp_path, lambda z, t: by_slice(z))
    again = {"SeriesInstanceUID": "1.2.30", "SeriesNumber": 30, "SeriesDescription": "SAX again"}
    for t in range(PHASES + 3):
        image(tmp_path / "d0" / f"A{t}", 2, t, pixels(2, t) + 5, AcquisitionTime="103000", **again)
    series, left_out = sorted_study(tmp_path)
    check(series)
    (why,) = left_out
    assert "series 30 (SAX again), 8 images: 8 phases; series 3 (cine SAX) has 5 " in why and why[-30:] in caplog.text


def test_a_slice_of_which_one_phase_arrived_is_not_left_out_in_silence(tmp_path):
    for name, lost in (("inside", 1), ("end", 3)):
        for of in (by_slice, lambda z: {}):
            folder = tmp_path / f"{name} {len(of(0))}"
            message = refused(study(folder, lambda z, t: None if z == lost and t else of(z)))
            assert f"series {of(lost).get('SeriesNumber', 9)} (cine SAX) has 1 phase, the other slices 5" in message
    folder = study(tmp_path / "other kinds", lambda z, t: by_slice(z))
    image(folder / "a", SLICES, 0, SeriesInstanceUID="1.5", SeriesNumber=40, SeriesDescription="LGE")
    image(folder / "b", SLICES + 0.5, 0, SeriesInstanceUID="1.6", SeriesNumber=41)
    series, left_out = sorted_study(folder)
    check(series)
    assert [why[:9] for why in left_out] == ["series 40", "series 41"]


def test_a_whole_stack_taken_again_is_one_line(tmp_path):
    study(tmp_path / "first", lambda z, t: {"RescaleSlope": 3, "RescaleIntercept": 0})
    study(tmp_path / "again", lambda z, t: {"SeriesInstanceUID": "1.4", "SeriesNumber": 12, "AcquisitionTime": "1017"})
    series, left_out = sorted_study(tmp_path)
    check(series)
    assert len(left_out) == 1 and "series 9 (cine SAX), 20 images" in left_out[0] and "series 12" in left_out[0]


def test_a_copied_file_counts_once(tmp_path, caplog):
    study(tmp_path)
    shutil.copy(tmp_path / "d0" / "IM0", tmp_path / "copy")
    check(sorted_study(tmp_path)[0])
    assert "copies of others" in caplog.text


def test_what_is_no_whole_stack_is_refused_by_name(tmp_path):
    def gone(z: int, t: int) -> dict | None:
        return by_slice(z) if (z, t) != (1, 3) else None

    assert "series 2 (cine SAX) has 4 phases, the other slices 5" in refused(study(tmp_path / "phase", gone))
    at_end = study(tmp_path / "end", lambda z, t: None if (z, t) == (3, 0) else {})
    assert "series 9 (cine SAX) has 4 phases" in refused(at_end)
    message = refused(study(tmp_path / "slice", lambda z, t: None if z == 1 else by_slice(z)))
    assert all(fact in message for fact in ("18.00 mm", "9.00 mm", "series 1 (cine SAX)", "series 3 (cine SAX)"))
    assert "uneven" in refused(study(tmp_path / "uneven", lambda z, t: {"ImagePositionPatient": place(z * z)}))
    sizes = study(tmp_path / "size", lambda z, t: {"values": pixels(z, t)[:8]} if z == 3 else {})
    assert "16 x 8 pixels, the other slices 16 x 12" in refused(sizes)
    frame = study(tmp_path / "frame", lambda z, t: {"values": pixels(z, t)[:8]} if (z, t) == (1, 2) else {})
    assert "has 4 phases" in refused(frame)
    lost = study(tmp_path / "lost", lambda z, t: {"ImagePositionPatient": None} if (z, t) == (1, 2) else {})
    assert "series 9 (cine SAX)" in refused(lost)
    twice = study(tmp_path / "twice", lambda z, t: {"SeriesNumber": None, "AcquisitionTime": None})
    for t in range(PHASES):
        image(twice / f"A{t}", 1, t, SeriesInstanceUID="1.4", SeriesNumber=None, AcquisitionTime=None)
    assert "nothing says which was taken later" in refused(twice)
    kinds = study(tmp_path / "kinds")
    study(tmp_path / "kinds" / "phase")
    assert "several images for one time" in refused(kinds)
    nothing = {"TriggerTime": 0, "InstanceNumber": 1}
    assert "in which order" in refused(study(tmp_path / "order", lambda z, t: nothing))
    damaged = study(tmp_path / "damaged")
    (damaged / "d0" / "IM0").write_bytes((damaged / "d0" / "IM0").read_bytes()[:150])
    assert "IM0 is a damaged" in refused(damaged)


def test_studies_are_told_from_each_other(tmp_path):
    a, b = (study(tmp_path / name, lambda z, t: {"StudyInstanceUID": name}) for name in ("1.1", "1.2"))
    assert "2 studies" in refused(tmp_path)
    (tmp_path / "1.1" / "broken.dcm").write_bytes(b"no DICOM")
    left_out: list[dict[str, str]] = []
    assert study_folders(tmp_path, left_out) == [a, b]
    assert [Path(entry["file"]).name for entry in left_out] == ["broken.dcm"]


def test_of_long_axes_alone_none_is_the_short(tmp_path):
    for number, direction in enumerate((LONG, [*TURN[:, 2], *TURN[:, 0]])):
        for t in range(PHASES):
            tags = {"SeriesDescription": f"{number + 2}CH", "SeriesInstanceUID": f"1.{number}", "SeriesNumber": number}
            image(tmp_path / f"{number}{t}", 0, t, ImageOrientationPatient=direction, **tags)
    message = refused(tmp_path)
    assert "series 0 (2CH); series 1 (3CH)" in message and "parallel" in message


def test_a_refused_study_is_recorded_as_that(tmp_path):
    enhanced(tmp_path / "1.dcm", [(0, t) for t in range(PHASES)], measures={})
    for place in (tmp_path, tmp_path / "1.dcm"):
        (case,) = image_files(place, time_series=True)
        assert str(case["series"]).startswith("refused: ") and "SliceThickness" in str(case["series"])
        with pytest.raises(DataError, match="SliceThickness"):
            case["series"].read(0)
    assert str(study_series(study(tmp_path / "good"), [])) == "5 frames of 16 x 12 x 4 voxels"


def test_files_that_cannot_be_read_are_left_out_and_the_rest_is_measured(unprivileged, caplog):
    folder = unprivileged.folder
    tags = {name: {"StudyInstanceUID": f"1.2.{n}"} for n, name in enumerate(("whole", "lacking"))}
    for name, uid in tags.items():
        study(folder / name, lambda z, t: {**by_slice(z), **uid})
    closed = [folder / "notes", folder / "whole" / "notes", folder / "whole" / "report.dcm"]
    for file in closed:
        file.touch()
    closed.append(folder / "lacking" / "d0" / "IM0")
    (folder / "shut").mkdir()
    (folder / "shut" / "in.nii.gz").touch()
    closed.append(folder / "shut")
    for path in closed:
        path.chmod(0o444 if path.is_dir() else 0)
    with unprivileged():
        lacking, whole = image_files(folder, time_series=True)
        found = image_files(folder, time_series=True)
        with pytest.raises(DataError, match="4 phases, .*IM0 is not to be read .Permission denied"):
            lacking["series"].read(0)
        assert image_files(folder / "whole" / "report.dcm", time_series=True)[0].keys() == {"id", "image"}
    check(whole["series"])  # by a user who may load ITK
    (folder / "shut").chmod(0o755)
    named = {entry["file"]: entry["why"] for entry in found.left_out}
    assert named.keys() == {str(folder), *map(str, closed[1:])}
    assert all("Permission denied" in why for why in named.values()) and "notes" in named[str(folder)]
    assert all(path.name in caplog.text for path in closed)


def turned(degrees: float) -> list[float]:
    """The orientation of a view along the heart's long axis, turned around it."""
    angle = np.deg2rad(degrees)
    return [*(np.cos(angle) * TURN[:, 0] + np.sin(angle) * TURN[:, 1]), *TURN[:, 2]]


def slices(folder: Path, number: int, orientation: list[float], count: int, phases: int = PHASES) -> None:
    """Write a cine in any direction."""
    normal = np.cross(orientation[:3], orientation[3:])
    tags = {"SeriesInstanceUID": f"1.3.{number}", "SeriesNumber": number, "SeriesDescription": f"view {number}"}
    for z, t in itertools.product(range(count), range(phases)):
        where = {"ImagePositionPatient": (ORIGIN + 8 * z * normal).tolist(), "ImageOrientationPatient": orientation}
        image(folder / f"{number}" / f"{z}_{t}", 0, t, **where, **tags)


AXIAL = [1, 0, 0, 0, 1, 0]
PARALLEL = [*TURN[:, 1], *-TURN[:, 0]]  # to the short axis, its rows turned


@pytest.mark.parametrize(
    ("other", "views"),
    [
        (AXIAL, [turned(0), turned(60)]),
        (AXIAL, [turned(95)]),
        (turned(0), [turned(60), turned(120)]),
        (turned(0), [turned(90), turned(150), turned(2), AXIAL]),
    ],
    ids=["axial", "axial, one view", "4-chamber", "4-chamber, all views"],
)
def test_a_larger_stack_in_another_direction_is_not_the_short_axis(other, views, tmp_path):
    study(tmp_path, lambda z, t: by_slice(z))
    slices(tmp_path, 20, other, 2 * SLICES)
    for number, view in enumerate(views, 21):
        slices(tmp_path, number, view, 1)
    slices(tmp_path, 30, PARALLEL, 1, phases=PHASES + 3)  # a map of relaxation times
    series, left_out = sorted_study(tmp_path)
    check(series)
    assert "series 20 (view 20), 40 images: in another direction than the short-axis stack" in left_out


@pytest.mark.parametrize(
    ("other", "views"),
    [
        (AXIAL, []),
        (AXIAL, [AXIAL]),
        (turned(0), [turned(90)]),
        (turned(0), [turned(60), PARALLEL]),
        (turned(0), [turned(90), [*TURN[:, 1], *(TURN[:, 0] + TURN[:, 2]) / 2**0.5], turned(2)]),
    ],
    ids=["no views", "a straight view", "both lie in the view", "a short-axis view", "a view of the valve"],
)
def test_stacks_of_two_directions_are_refused_where_no_view_decides(other, views, tmp_path):
    study(tmp_path)
    slices(tmp_path, 20, other, 2 * SLICES)
    for number, view in enumerate(views, 21):
        slices(tmp_path, number, view, 1)
    message = refused(tmp_path)
    assert all(fact in message for fact in ("8 slices of series 20 (view 20)", "4 slices of series 9 (cine SAX)"))


def test_a_parallel_stack_of_another_kind_is_no_rival(tmp_path):
    study(tmp_path)
    slices(tmp_path, 20, PARALLEL, 3, phases=PHASES + 3)
    check(sorted_study(tmp_path)[0])


def nifti(
    file: Path, values: np.ndarray, affine: np.ndarray = AFFINE, unit: int | None = None, step: float = 1
) -> Path:
    made = nib.Nifti1Image(values, affine)
    if values.ndim > 3:
        made.header["pixdim"][4] = step
    if unit is not None:
        made.header["xyzt_units"] = 2 | unit
    nib.save(made, file)
    return file


@pytest.mark.parametrize("name", ["heart.nii", "heart.nii.gz"])
def test_the_heart_of_a_study_is_that_of_a_file(name, tmp_path):
    file = nifti(tmp_path / name, heart(), unit=8, step=0.03)
    series = nifti_series(file)
    check(series)
    assert np.allclose(series.times, (0, 30, 60, 90, 120)) and series.interval is None and series.source == str(file)
    other, _ = sorted_study(study(tmp_path / "study"))
    for t in (3, 1):
        one, two = series.read(t), other.read(t)
        assert np.array_equal(one, two) and one.dtype == two.dtype
        np.testing.assert_allclose(one.affine, two.affine, atol=1e-4)
    check(pickle.loads(pickle.dumps(series)))


def test_a_frame_of_a_file_is_what_a_file_of_the_frame_is(tmp_path):
    """ACDC's headers: the sform is a diagonal of 1 mm, the true spacing stands in pixdim."""
    for made, name in ((heart(), "series.nii.gz"), (heart()[..., 2], "frame.nii.gz")):
        image = nib.Nifti1Image(made, np.eye(4))
        image.header["pixdim"][1:4] = (1.5, 1.4, 9)
        image.header["qform_code"] = 0
        image.header.set_slope_inter(0.5, 3)
        nib.save(image, tmp_path / name)
    series = nifti_series(tmp_path / "series.nii.gz")
    one, other = series.read(2), read_image(tmp_path / "frame.nii.gz")
    assert np.array_equal(one, other) and np.array_equal(one.affine, other.affine) and one.dtype == other.dtype
    assert np.allclose(one.pixdim, (1.5, 1.4, 9)) and set(one.meta) == set(other.meta)


@pytest.mark.parametrize(
    ("unit", "step", "times"), [(16, 40, (0, 40)), (24, 5e4, (0, 50)), (0, 1, None), (8, 0, None), (32, 1, None)]
)
def test_times_of_a_file_have_their_unit_or_are_unknown(unit, step, times, tmp_path):
    series = nifti_series(nifti(tmp_path / "a.nii", heart()[..., :2], unit=unit, step=step))
    assert series.frames == 2 and series.times == times


def test_a_packed_file_is_unpacked_once(tmp_path, monkeypatch):
    series = nifti_series(nifti(tmp_path / "a.nii.gz", heart()))
    begun = []
    rewind = gzip._GzipReader._rewind
    monkeypatch.setattr(gzip._GzipReader, "_rewind", lambda self: begun.append(1) or rewind(self))
    for t in range(series.frames):
        series.read(t)
    assert not begun
    series.read(0)
    assert len(begun) == 1


def test_a_file_that_is_no_series_of_numbers_is_none_or_refused(tmp_path):
    assert nifti_series(nifti(tmp_path / "a.nii", heart()[..., 0])) is None
    assert nifti_series(nifti(tmp_path / "b.nii", heart()[..., :1])) is None
    assert nifti_series(nifti(tmp_path / "c.nii", heart()[..., None])).frames == PHASES
    colours = np.zeros((4, 4, 2, 3), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    bad = {
        "colours": colours,
        "complex": np.zeros((4, 4, 2, 3), np.complex64),
        "dimensions": np.zeros((4, 4, 2, 3, 2), np.int16),
    }
    for word, values in bad.items():
        with pytest.raises(DataError, match=word) as error:
            nifti_series(nifti(tmp_path / f"{word}.nii", values))
        print(error.value)


def test_ten_thousand_frames_are_read_one_by_one(tmp_path):
    """The file is sparse: its frames are not written."""
    made = nib.Nifti1Image(np.zeros((8, 8, 2, 2), np.int16), AFFINE)
    made.header.set_data_shape((8, 8, 2, 10_000))
    with open(tmp_path / "long.nii", "wb") as file:
        made.header.write_to(file)
        file.truncate(352 + 8 * 8 * 2 * 10_000 * 2)
    series = nifti_series(tmp_path / "long.nii")
    assert series.frames == 10_000 and series.read(9_999).shape == (1, 8, 8, 2)


@pytest.mark.skipif("CINE_DIR" not in os.environ, reason="CINE_DIR names no study of six slices of 25 phases")
def test_a_scanners_own_study(caplog):
    series, left_out = sorted_study(Path(os.environ["CINE_DIR"]))
    assert (*series.shape, series.frames) == (256, 208, 6, 25)
    frame = series.read(24)
    np.testing.assert_allclose(frame.pixdim, [1.40625, 1.40625, 17.7], atol=1e-3)
    assert np.abs(np.diag(frame.affine)[:3]).max() > 1.1 and frame.max() > 100  # oblique
    assert sorted(why.split(",")[0] for why in left_out) == [
        "series 14001 (cine_trufi_retro 4CH)",
        "series 16001 (cine_trufi_retro 4CH)",
        "series 17001 (cine_trufi_retro 2CH)",
        "series 19001 (cine_trufi_retro 2CH)",
        "series 22001 (cine_trufi_retro RVOT)",
    ]
    assert series.interval == pytest.approx(828.83, abs=0.01) and series.times[24] == pytest.approx(795.68, abs=0.01)
