"""A heart over time goes in and comes out as one case: label map, measures, pictures, and what is wrong with it."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT
from conftest import run as run_python
from monai.bundle import ConfigWorkflow
from PIL import Image

from networks import DataError
from networks.data.batches import CaseBatches, in_frames
from networks.data.cine import nifti_series

CONFIGS = f"{ROOT}/bundles/fias_acdc/configs"
FRAMES = 5


@pytest.fixture
def images(phantoms, tmp_path) -> Path:
    """A folder with a heart over time, brighter with each frame, and a volume."""
    patient = phantoms("acdc") / "training" / "patient002"
    ed, es = (nib.load(f) for f in sorted(patient.glob("*_frame??.nii.gz")))
    volumes = [(1 + t) * np.asanyarray((es if t == 2 else ed).dataobj) for t in range(FRAMES)]
    series = nib.Nifti1Image(np.stack(volumes, -1), ed.affine)
    series.header.set_xyzt_units("mm", "sec")
    series.header["pixdim"][4] = 0.2
    folder = tmp_path / "in"
    folder.mkdir()
    nib.save(series, folder / "heart.nii.gz")
    shutil.copy(patient / "patient002_frame01.nii.gz", folder / "volume.nii.gz")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A folder with a model.pt of a convolution that takes dark pixels for background, bright ones for blood."""
    network = torch.nn.Conv2d(1, 4, 1)
    network.weight.data[:, 0, 0, 0] = torch.tensor([0.0, 10, 20, 30])
    network.bias.data[:] = torch.tensor([0.0, -2, -7, -14])  # borders at 0.2, 0.5 and 0.7
    folder = tmp_path_factory.mktemp("weights")
    torch.save(network.state_dict(), folder / "model.pt")
    return folder


def started(config: str, images: Path, weights: Path, output: Path, **overrides: object) -> ConfigWorkflow:
    """A config, with the network of ``weights`` where it has one, ready to run."""
    options: dict[str, object] = {"dataset_dir": str(images), "output_dir": str(output), "ckpt_dir": str(weights)}
    if config != "measure":
        network = {"_target_": "torch.nn.Conv2d", "in_channels": 1, "out_channels": 4, "kernel_size": 1}
        options |= {"device": "cpu", "image_size": 32, "network_def": network}
    workflow = ConfigWorkflow(
        f"{CONFIGS}/{config}.json",
        workflow_type="infer",
        meta_file=f"{CONFIGS}/metadata.json",
        **{**options, **overrides},
    )
    workflow.initialize()
    return workflow


@pytest.fixture
def run(weights, images, tmp_path) -> Callable[..., Path]:
    """``run(config="inference", **overrides)``: the folder of the results."""

    def run(config: str = "inference", **overrides: object) -> Path:
        try:
            workflow = started(config, images, weights, tmp_path / "out", **overrides)
            workflow.run()
        except RuntimeError as error:  # the expression's
            raise error.__cause__ or error
        finally:
            assert not list((tmp_path / "out").rglob(".partial-*"))
        return Path(str(overrides.get("output_dir", tmp_path / "out")))

    return run


def table(out: Path) -> dict[str, dict[str, str]]:
    with (out / "measures.csv").open() as file:
        return {row["case"]: row for row in csv.DictReader(file)}


def test_each_frame_is_segmented_as_a_volume_of_its_own(images, run, tmp_path):
    out = run(overlay=True)
    series, found = nib.load(images / "heart.nii.gz"), nib.load(out / "heart_seg.nii.gz")
    assert found.shape == series.shape and found.get_data_dtype() == np.uint8
    assert np.array_equal(found.affine, series.affine) and found.header.get_zooms() == series.header.get_zooms()
    (tmp_path / "frames").mkdir()
    for t in range(FRAMES):
        nib.save(series.slicer[..., t], tmp_path / "frames" / f"{t}.nii.gz")
    alone = run(dataset_dir=str(tmp_path / "frames"), output_dir=str(tmp_path / "alone"), val_batch_size=2)
    for t in range(FRAMES):
        assert np.array_equal(found.dataobj[..., t], nib.load(alone / f"{t}_seg.nii.gz").dataobj), t
    assert (out / "volume_seg.nii.gz").is_file() and (out / "volume_overlay.png").is_file()
    assert Image.open(out / "heart_beating.gif").n_frames == FRAMES
    assert Image.open(out / "heart_curve.png").size == (640, 400)


def test_a_heart_over_time_is_one_row_with_its_function(images, run):
    out = run()
    rows = table(out)
    assert set(rows) == {"heart", "volume"}
    heart, labels = rows["heart"], np.asarray(nib.load(out / "heart_seg.nii.gz").dataobj)
    voxel = np.prod(nib.load(images / "heart.nii.gz").header.get_zooms()[:3]) / 1000
    lv = voxel * (labels == 3).sum((0, 1, 2))
    assert (int(heart["ed_frame"]), int(heart["es_frame"])) == (lv.argmax(), lv.argmin())
    assert float(heart["lv_edv_ml"]) == pytest.approx(lv.max(), rel=1e-4)
    assert float(heart["lv_ef_percent"]) == pytest.approx(100 * (1 - lv.min() / lv.max()), abs=1e-2)
    assert float(heart["heart_rate_per_min"]) == pytest.approx(60)
    assert 0.25 < float(heart["confidence"]) < 1
    assert float(rows["volume"]["left_ventricle_ml"]) > 0 and not rows["volume"]["lv_ef_percent"]
    kept = json.loads((out / "measures" / "heart.json").read_text())["frames"]
    assert [frame["left_ventricle_ml"] for frame in kept] == pytest.approx(lv)
    means = [frame["left_ventricle_mean_intensity"] for frame in kept]
    pixels = np.asarray(nib.load(images / "heart.nii.gz").dataobj)
    assert means == pytest.approx([pixels[..., t][labels[..., t] == 3].mean() for t in range(FRAMES)], rel=1e-4)


def test_frames_can_be_named(run):
    named = table(run(ed_frame=1, es_frame=2))["heart"]
    assert (named["ed_frame"], named["es_frame"]) == ("1", "2")
    with pytest.raises(DataError, match="heart.nii.gz: The ed frame is 9, but the frames are 0 to 4"):
        run(ed_frame=9)


def test_a_frame_that_is_not_there_hides_no_case_that_failed(images, run):
    (images / "bad.nii.gz").write_bytes(b"garbage")
    with pytest.raises(DataError, match="2 of the cases failed") as error:
        run(ed_frame=9)
    assert "bad.nii.gz" in str(error.value) and "ed frame is 9" in str(error.value)


def test_an_image_that_was_replaced_by_a_bad_one_has_no_row(images, run, tmp_path):
    assert set(table(run())) == {"heart", "volume"}
    (images / "heart.nii.gz").write_bytes(b"garbage")
    for resume in (True, False):
        with pytest.raises(DataError, match="1 of the cases failed"):
            run(resume=resume)
        assert set(table(tmp_path / "out")) == {"volume"}


def test_two_frames_of_a_patient_are_one_row(phantoms, run, tmp_path):
    patient = phantoms("acdc") / "training" / "patient003"
    out = run(dataset_dir=str(patient))
    (row,) = table(out).values()
    es = next(line.split()[1] for line in (patient / "Info.cfg").read_text().splitlines() if line.startswith("ES"))
    assert (row["case"], row["ed_frame"], row["es_frame"]) == ("patient003", "1", es)
    assert float(row["body_surface_m2"]) == pytest.approx((175 * 75 / 3600) ** 0.5, rel=1e-5)
    assert float(row["lv_edvi_ml_m2"]) == pytest.approx(
        float(row["lv_edv_ml"]) / float(row["body_surface_m2"]), rel=1e-4
    )


def test_frames_beside_their_series_are_left_out(images, run):
    for name in ("heart_frame01", "heart_frame12", "other_frame01"):
        shutil.copy(images / "volume.nii.gz", images / f"{name}.nii.gz")
    out = run()
    assert sorted(p.name for p in out.glob("*_seg*")) == [
        f"{n}_seg.nii.gz" for n in ("heart", "other_frame01", "volume")
    ]
    left_out = json.loads((out / "inferring_cases.json").read_text())["left_out"]
    assert [Path(entry["file"]).name for entry in left_out] == ["heart_frame01.nii.gz", "heart_frame12.nii.gz"]
    assert all("heart.nii.gz" in entry["why"] for entry in left_out)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_frame_that_cannot_be_used_is_told_once_and_nothing_half_written(num_workers, images, run, tmp_path):
    good = nib.load(images / "heart.nii.gz")
    values = good.get_fdata()
    values[3, 3, 0, 1:] = np.nan
    nib.save(nib.Nifti1Image(values, good.affine), images / "bad.nii.gz")
    content = (images / "heart.nii.gz").read_bytes()
    (images / "cut.nii.gz").write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(DataError) as error:
        run(num_workers=num_workers, val_batch_size=2)
    lines = str(error.value).splitlines()
    assert len(lines) == 3 and "Frame 1 of" in lines[1] and "NaN" in lines[1]
    assert "cut.nii.gz" in lines[2] and "truncated" in lines[2]
    out = tmp_path / "out"
    assert sorted(p.name for p in out.glob("*_seg*")) == ["heart_seg.nii.gz", "volume_seg.nii.gz"]
    assert set(table(out)) == {"heart", "volume"}


def test_a_resumed_run_has_all_cases_in_its_table(images, run):
    out = run()
    whole = (out / "measures.csv").read_text()
    assert "confidence" in whole
    (out / "volume_seg.nii.gz").unlink()
    (out / "measures.csv").unlink()
    before = (out / "heart_seg.nii.gz").stat().st_mtime_ns
    run(resume=True)
    assert (out / "measures.csv").read_text() == whole
    assert (out / "heart_seg.nii.gz").stat().st_mtime_ns == before
    (out / "measures" / "heart.json").unlink()  # killed between the two
    run(resume=True)
    assert (out / "measures.csv").read_text() == whole
    assert (out / "heart_seg.nii.gz").stat().st_mtime_ns > before


def test_corrected_label_maps_are_measured_again(images, run):
    out = run()
    whole = table(out)
    run("measure")
    assert table(out) == whole
    corrected = nib.load(out / "heart_seg.nii.gz")
    labels = np.asarray(corrected.dataobj).copy()
    labels[..., 2][labels[..., 2] == 3] = 2
    nib.save(nib.Nifti1Image(labels, None, corrected.header), out / "heart_seg.nii.gz")
    run("measure")
    again = table(out)
    assert again["volume"] == whole["volume"]
    assert again["heart"]["es_frame"] == "2" and float(again["heart"]["lv_ef_percent"]) == 100
    assert not again["heart"]["confidence"]  # nobody knows how sure a person was


def test_a_resumed_run_measures_what_was_corrected(images, run):
    out = run(overlay=True)
    gif = (out / "heart_beating.gif").read_bytes()
    target = out / "heart_seg.nii.gz"
    corrected = nib.load(target)
    labels = np.asarray(corrected.dataobj).copy()
    labels[..., 2][labels[..., 2] == 3] = 2
    nib.save(nib.Nifti1Image(labels, None, corrected.header), target)
    run(resume=True, overlay=True)
    assert np.array_equal(nib.load(target).dataobj, labels)
    heart = table(out)["heart"]
    assert float(heart["lv_ef_percent"]) == 100 and not heart["confidence"]
    assert table(out)["volume"]["confidence"] and (out / "heart_beating.gif").read_bytes() != gif
    target.write_bytes(target.read_bytes()[:-99])  # of another program, or not whole: segmented again
    run(resume=True)
    assert table(out)["heart"]["confidence"]


def test_label_numbers_of_others(images, run, tmp_path):
    out, others = run(), {"output_dir": str(tmp_path / "others"), "label_numbers": {1: 3, 3: 1}}
    run(**others)
    ours, theirs = (np.asarray(nib.load(f / "heart_seg.nii.gz").dataobj) for f in (out, tmp_path / "others"))
    assert np.array_equal(np.array([0, 3, 2, 1], np.uint8)[ours], theirs)
    assert table(tmp_path / "others") == table(out)
    run("measure", **others)
    assert table(tmp_path / "others") == table(out)
    run("measure", output_dir=others["output_dir"])  # the record of the run has them
    assert table(tmp_path / "others") == table(out)
    with pytest.raises(DataError, match="label_numbers.*inferring.json"):
        run("measure", output_dir=others["output_dir"], label_numbers={1: 2, 2: 1})
    others["label_numbers"] = {1: 85, 2: 170, 3: 255}  # of the STACOM challenges' kind
    run(**others)
    run("measure", **others)
    assert table(tmp_path / "others") == table(out)
    for wrong in ({1: 3, 2: 3}, {1: 3}, {4: 1}, {1: 256}):  # {1: 3} would leave class 3 its own number, too
        with pytest.raises(DataError, match="label_numbers"):
            run(label_numbers=wrong)


def test_a_corrected_label_map_with_other_numbers_is_refused_by_name(images, run):
    out = run()
    labels = nib.load(out / "volume_seg.nii.gz")
    values = labels.get_fdata(dtype=np.float32)
    for wrong in (1.5, 7, 257):
        values[0, 0, 0] = wrong
        nib.save(nib.Nifti1Image(values, labels.affine), out / "volume_seg.nii.gz")
        with pytest.raises(DataError, match=f"volume_seg.nii.gz holds the numbers .{wrong}"):
            run("measure")


def test_the_same_case_again_in_one_process_is_measured_again(images, weights, tmp_path):
    workflow = started("inference", images / "volume.nii.gz", weights, tmp_path / "out")
    evaluator = workflow.parser.get_parsed_content("evaluator")
    for _ in range(2):
        evaluator.run()
        kept = tmp_path / "out" / "measures" / "volume.json"
        assert kept.is_file() and len(table(tmp_path / "out")) == 1
        kept.unlink()


def test_maps_of_how_sure_the_label_maps_are(images, run):
    out = run(probabilities=True, uncertainty=True)
    labels = nib.load(out / "heart_seg.nii.gz")
    probabilities = nib.load(out / "heart_probabilities.nii.gz")
    assert probabilities.shape == (*labels.shape, 4) and np.allclose(probabilities.affine, labels.affine)
    values = np.asarray(probabilities.dataobj)
    assert values.sum(-1) == pytest.approx(1, abs=2e-3)
    chosen = np.take_along_axis(values, np.asarray(labels.dataobj)[..., None].astype(int), -1)[..., 0]
    assert (chosen >= values.max(-1) - 2e-3).all()
    entropy = np.asarray(nib.load(out / "heart_entropy.nii.gz").dataobj)
    safe = np.where(values > 0, values, 1)
    assert entropy == pytest.approx(-(safe * np.log(safe)).sum(-1) / np.log(4), abs=1e-2)
    mean = chosen[np.asarray(labels.dataobj) > 0].mean()
    assert float(table(out)["heart"]["confidence"]) == pytest.approx(mean, abs=1e-3)
    assert nib.load(out / "volume_probabilities.nii.gz").shape == (*labels.shape[:3], 4)
    for name, zooms in (("entropy", ()), ("probabilities", (1,))):
        header = nib.load(out / f"heart_{name}.nii.gz").header
        assert header.get_xyzt_units() == ("mm", "sec") == labels.header.get_xyzt_units()
        assert header.get_zooms() == (*labels.header.get_zooms(), *zooms)


def test_batches_hold_frames_of_one_series(images):
    series = nifti_series(images / "heart.nii.gz")
    cases = [{"image": "a"}, {"image": "heart", "series": series}, {"image": "b"}]
    items = in_frames(cases)
    assert [item.get("frame") for item in items] == [None, *range(FRAMES), None]

    class Data:
        data = items

    assert [*CaseBatches(Data(), slices=4)] == [[0], [1, 2, 3, 4], [5], [6]]
    assert [*CaseBatches(Data(), slices=3)] == [[i] for i in range(7)]  # three slices a frame: one frame at a time


@pytest.mark.parametrize("values", ["one", "colours", "five"])
def test_other_dimensions(values, images, run, tmp_path):
    volume = nib.load(images / "volume.nii.gz")
    data = np.asanyarray(volume.dataobj)
    for file in images.iterdir():
        file.unlink()
    if values == "one":
        nib.save(nib.Nifti1Image(data[..., None], volume.affine), images / "x.nii.gz")
        out = run()
        assert nib.load(out / "x_seg.nii.gz").shape == (*data.shape, 1)
        return
    if values == "colours":
        colours = np.zeros((*data.shape, 3), [("R", "u1"), ("G", "u1"), ("B", "u1")])
        nib.save(nib.Nifti1Image(colours, volume.affine), images / "x.nii.gz")
    else:
        nib.save(nib.Nifti1Image(np.zeros((*data.shape, 3, 2)), volume.affine), images / "x.nii.gz")
    with pytest.raises(DataError, match="x.nii.gz"):
        run()
    assert not list((tmp_path / "out").glob("*_seg*"))


@pytest.fixture(scope="module")
def beating(tmp_path_factory) -> Path:
    """Phantoms that beat, and DICOM studies of two of them."""
    folder = tmp_path_factory.mktemp("beating") / "acdc"
    run_python("bundles/phantoms.py", "acdc", str(folder), "--size", "64", "--slices", "3", "--cine", "--frames", "6")
    return folder


def test_a_study_is_measured_as_its_file_and_its_segmentations_lie_on_its_slices(beating, run, tmp_path):
    hd = pytest.importorskip("highdicom")
    out = run(dataset_dir=str(beating / "dicom"), dicom_seg=True, label_numbers={1: 3, 3: 1})
    file = tmp_path / "patient002_4d.nii.gz"  # without the Info.cfg that names frames
    shutil.copy(beating / "training" / "patient002" / file.name, file)
    whole = run(dataset_dir=str(file), output_dir=str(tmp_path / "file"))
    of_study, of_file = table(out)["patient002"], table(whole)["patient002_4d"]
    assert float(of_study["body_surface_m2"]) == pytest.approx(1.909, abs=1e-3)  # a file knows no height
    assert of_file | {"case": "patient002"} == {name: of_study[name] for name in of_file}
    labels = nib.load(whole / "patient002_4d_seg.nii.gz")
    for phase in (1, 4):
        segmentation = hd.seg.segread(out / f"patient002_seg_phase{phase:02}.dcm")
        volume = segmentation.get_volume(combine_segments=True)
        found = np.zeros(labels.shape[:3], np.uint8)
        for index in np.argwhere(volume.array):
            place = volume.affine @ [*index, 1] * [-1, -1, 1, 1]
            x, y, z = np.rint(np.linalg.inv(labels.affine) @ place)[:3].astype(int)
            found[x, y, z] = volume.array[tuple(index)]
        assert np.array_equal(found, labels.dataobj[..., phase - 1])


def test_the_info_file_of_a_study_lies_in_its_folder(beating, run, tmp_path):
    studies = tmp_path / "studies"
    shutil.copytree(beating / "dicom", studies)
    out = run(dataset_dir=str(studies), uncertainty=True)
    for name in ("seg", "entropy"):
        header = nib.load(out / f"patient002_{name}.nii.gz").header
        assert header.get_xyzt_units() == ("mm", "msec") and header.get_zooms()[3] > 1
    found = {name: (row["ed_frame"], row["es_frame"]) for name, row in table(out).items()}
    (studies / "Info.cfg").write_text("ED: 3\nES: 4\n")  # of whom?
    run("measure", dataset_dir=str(studies))
    assert {name: (row["ed_frame"], row["es_frame"]) for name, row in table(out).items()} == found
    (studies / "Info.cfg").rename(studies / "patient003" / "Info.cfg")
    run("measure", dataset_dir=str(studies))
    rows = table(out)
    assert (rows["patient002"]["ed_frame"], rows["patient002"]["es_frame"]) == found["patient002"]
    assert (rows["patient003"]["ed_frame"], rows["patient003"]["es_frame"]) == ("2", "3") != found["patient003"]


def test_a_file_that_is_no_series_has_no_dicom_segmentation(images, run, tmp_path):
    with pytest.raises(DataError, match="volume.nii.gz is no DICOM series"):
        run(dicom_seg=True)


def test_evaluation_tells_the_function_of_hearts(beating, weights, tmp_path):
    workflow = started("evaluate", beating, weights, tmp_path / "out")
    workflow.run()
    with (tmp_path / "out" / "function.csv").open() as file:
        found = {row["patient"]: row for row in csv.DictReader(file)}
    with (beating / "truth.csv").open() as file:
        truth = {row["patient"]: row for row in csv.DictReader(file)}
    assert set(found) == {"patient002", "patient003"}
    for patient, row in found.items():
        for column in ("lv_ef_percent", "rv_ef_percent", "lv_edv_ml", "rv_esv_ml", "lv_mass_g"):
            assert float(row[f"true_{column}"]) == pytest.approx(float(truth[patient][column]), rel=1e-4)
    errors = [float(r["predicted_lv_ef_percent"]) - float(r["true_lv_ef_percent"]) for r in found.values()]
    summary = (tmp_path / "out" / "function.md").read_text()
    assert f"| LV ejection fraction | {np.abs(errors).mean():.1f} points | {np.mean(errors):+.1f} |" in summary
    assert Image.open(tmp_path / "out" / "lv_ef.png").size == (560, 400)
