"""Hearts that beat: files and studies show one heart, the truth is that of its labels, and weights find it."""

from __future__ import annotations

import csv
import runpy
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from conftest import ROOT, run
from monai.bundle import create_workflow

from networks.data.cine import nifti_series, study_series
from networks.data.layouts import cases
from networks.results.hearts import frame_volumes, heart_function, rate_of_times

Heart = runpy.run_path(str(ROOT / "bundles" / "phantom_heart.py"))["Heart"]

FRAMES = 14
TEST = ("patient002", "patient003")

STILL = {
    "frame01": [(10377, 77.66), (825, 193.48), (501, 82.58), (585, 201.59)],
    "frame12": [(11101, 72.43), (457, 187.72), (499, 76.70), (231, 198.74)],
}
"""By image of the first test patient of 64 pixels: voxels of each label, and the image's mean over them."""


def info_of(patient: Path) -> dict[str, str]:
    return dict(line.split(": ") for line in (patient / "Info.cfg").read_text().splitlines())


def voxels(patient: Path, name: str) -> np.ndarray:
    return np.asarray(nib.load(patient / f"{patient.name}_{name}.nii.gz").dataobj)


def spacing(patient: Path) -> tuple[float, ...]:
    return nib.load(patient / f"{patient.name}_frame01.nii.gz").header.get_zooms()


def truth_of(folder: Path) -> dict[str, dict[str, float]]:
    with open(folder / "truth.csv", newline="", encoding="utf-8") as file:
        return {row.pop("patient"): {name: float(v) for name, v in row.items()} for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def beats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("beats")
    told = run("bundles/phantoms.py", "acdc", str(folder), "--cine", "True", "--size", "64", "--slices", "3").stdout
    patients, beats, *studies = told.splitlines()
    assert patients.startswith("12 patients, 24 volumes in ") and beats.startswith("12 beats of 14 frames ")
    assert len(studies) == 2
    for line, patient in zip(studies, ("patient002", "patient003"), strict=True):
        true = truth_of(folder)[patient]
        assert patient in line and f"LV {true['lv_ef_percent']:.1f} %, RV {true['rv_ef_percent']:.1f} %" in line
    return folder


def patients(beats: Path) -> list[Path]:
    found = sorted((beats / "training").iterdir())
    assert len(found) == 12
    return found


def test_the_two_phases_are_frames_of_the_beat(beats):
    for patient in patients(beats):
        info, beat = info_of(patient), voxels(patient, "4d")
        assert info["ED"] == "1" and int(info["NbFrame"]) == beat.shape[3] == FRAMES
        for frame in (1, int(info["ES"])):
            assert np.array_equal(voxels(patient, f"frame{frame:02d}"), beat[..., frame - 1])
    assert len(cases("acdc", beats, "test")) == 4  # the beat is no case


def test_the_truth_is_that_of_the_labels(beats):
    truth = truth_of(beats)
    for patient in patients(beats):
        labels = [voxels(patient, f"frame{int(info_of(patient)[name]):02d}_gt") for name in ("ED", "ES")]
        rate = rate_of_times(nifti_series(patient / f"{patient.name}_4d.nii.gz").times)
        expected = heart_function(frame_volumes(labels, spacing(patient)), 0, 1, rate)
        row = truth.pop(patient.name)
        assert len(row) == 8
        for name, value in row.items():
            assert value == pytest.approx(expected[name], abs=2e-3), name
        assert 40 < row["lv_ef_percent"] < 75 and 50 < row["heart_rate_per_min"] < 90
    assert not truth


def test_the_heart_is_full_at_end_diastole_and_empties_until_end_systole(beats):
    for patient in patients(beats):
        es = int(info_of(patient)["ES"]) - 1
        cavity = voxels(patient, "frame01_gt") == 3
        blood = np.count_nonzero(voxels(patient, "4d")[cavity] > 140, axis=0)
        assert blood[1:].max() < blood[0] and np.delete(blood, es).min() > blood[es]
        assert (np.diff(blood[: es + 1]) < 0).all() and blood[-1] > 0.85 * blood[0]


@pytest.mark.parametrize("frames", [6, 14, 40])
def test_systole_is_shorter_than_diastole_and_the_ventricle_rests_before_the_atrium_fills_it(frames):
    heart = Heart(64, 1, np.random.default_rng(0))
    es = round(0.36 * frames)
    beat = heart.contractions(frames, es)
    assert beat[0] == 1 and beat[es] == pytest.approx(heart.body["systole"])
    change = np.diff([*beat, 1.0])
    assert (change[:es] < 0).all() and (change[es:] > 0).all()
    if frames == 40:
        early, rest, late = np.split(change[es:], [12, 20])
        assert max(rest) < max(late) < max(early) < max(-change[:es])


def test_around_the_heart_only_noise_changes(beats):
    beat = voxels(patients(beats)[0], "4d").astype(float)
    changes = beat.std(axis=3, ddof=1)[beat.mean(axis=3) > 50]  # of a deviation of 5 each; most of it is chest
    assert 4.5 < np.median(changes) < 6 and np.percentile(changes, 95) > 20


@pytest.mark.parametrize(("name", "series"), zip(TEST, (5, 3), strict=True))
def test_a_study_is_the_heart_of_its_file(name, series, beats):
    left_out: list[dict[str, str]] = []
    study = study_series(beats / "dicom" / name, left_out)
    patient = beats / "training" / name
    file = nifti_series(patient / f"{name}_4d.nii.gz")
    assert study is not None and file is not None
    assert study.shape == file.shape and study.frames == file.frames == FRAMES
    for t in range(FRAMES):
        one, other = study.read(t), file.read(t)
        assert np.array_equal(one, other)
        np.testing.assert_allclose(one.affine, other.affine, atol=1e-4)
    np.testing.assert_allclose(study.times, file.times, atol=0.01)
    assert 60_000 / study.interval == pytest.approx(truth_of(beats)[name]["heart_rate_per_min"], abs=1e-3)
    info = info_of(patient)
    assert (100 * study.height, study.weight) == (float(info["Height"]), float(info["Weight"]))
    assert [entry["why"] for entry in left_out] == [
        f"series {number} (cine {view}), 14 images: in another direction than the short-axis stack"
        for number, view in ((3, "4ch"), (4, "2ch"))
    ]
    headers = [pydicom.dcmread(f, stop_before_pixels=True) for f in (beats / "dicom" / name).rglob("*.dcm")]
    assert len(headers) == len({h.SOPInstanceUID for h in headers}) == 5 * FRAMES
    assert len({h.SeriesInstanceUID for h in headers}) == len({h.SeriesNumber for h in headers}) == series
    assert len({(h.StudyInstanceUID, h.FrameOfReferenceUID, h.PatientID) for h in headers}) == 1
    assert all("phantom" in h.PatientID and h.SOPClassUID.name == "MR Image Storage" for h in headers)


def test_the_same_seed_makes_the_same_files(tmp_path):
    for copy in "ab":
        options = ("--cine", "True", "--size", "64", "--slices", "1", "--frames", "6", "--seed", "3")
        run("bundles/phantoms.py", "acdc", str(tmp_path / copy), *options)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 12 * 6 + 1 + 2 * 3 * 6
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


def test_hearts_that_do_not_beat_are_those_of_before(phantoms):
    folder = phantoms("acdc")
    patient = folder / "training" / TEST[0]
    assert not (folder / "truth.csv").exists() and not (folder / "dicom").exists()
    assert len(list(patient.iterdir())) == 5 and info_of(patient)["NbFrame"] == "30"
    for frame, expected in STILL.items():
        image, labels = voxels(patient, frame), voxels(patient, f"{frame}_gt")
        found = [(np.count_nonzero(labels == k), image[labels == k].mean()) for k in range(4)]
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=0.5)


@pytest.mark.slow
def test_the_shipped_weights_find_the_ejection_fractions(tmp_path):
    run("bundles/phantoms.py", "acdc", str(tmp_path), "--cine", "True", "--frames", "8")
    config = str(ROOT / "bundles" / "fias_acdc" / "configs" / "inference.json")
    bundle = create_workflow(config_file=config, workflow_type="infer", device="cpu", logging_file=False)
    get = bundle.parser.get_parsed_content
    truth, errors = truth_of(tmp_path), []
    for name in (*TEST, "patient019", "patient021"):
        beat = nifti_series(tmp_path / "training" / name / f"{name}_4d.nii.gz")
        labels = []
        for t in (0, int(info_of(tmp_path / "training" / name)["ES"]) - 1):
            case = get("preprocessing")({"image": beat.read(t)})
            with torch.inference_mode():
                case["pred"] = get("inferer")(case["image"][None], get("network"))[0]
            labels.append(np.asarray(get("postprocessing").transforms[0](case)["pred"][0]).astype(np.uint8))
        found = heart_function(frame_volumes(labels, spacing(tmp_path / "training" / name)))
        errors.append([found[f"{side}_ef_percent"] - truth[name][f"{side}_ef_percent"] for side in ("lv", "rv")])
    print(np.round(errors, 2))
    assert (np.abs(errors).mean(0) < 2).all()
