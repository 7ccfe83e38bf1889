"""The table of measures holds what the images and label maps there say, and nothing else."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from PIL import Image

from networks.data.cine import TimeSeries
from networks.data.folders import image_files
from networks.errors import DataError
from networks.results.function import HeartReport
from networks.results.label_maps import SaveImageLabelMapd
from networks.results.measuring import Measures, patient_row, read_info

NAMES = {"0": "background", "1": "right ventricle", "2": "myocardium", "3": "left ventricle"}
IGNORE = ["*_seg.*", "*_overlay.png", "*_curve.png", "*_beating.gif"]
AFFINE = np.diag([2.0, 2, 8, 1])
RADII = (8, 6, 4, 6)  # pixels of the left ventricle in the frames of a beat: end-systole is frame 2


def heart(radius: float) -> np.ndarray:
    """Three slices, each with a right ventricle beside a left one in a ring."""
    x, y = np.meshgrid(np.arange(40), np.arange(40), indexing="ij")
    plane = np.zeros((40, 40), np.uint8)
    plane[np.hypot(x - 8, y - 20) < radius / 2] = 1
    plane[np.hypot(x - 24, y - 20) < np.hypot(radius, 6)] = 2
    plane[np.hypot(x - 24, y - 20) < radius] = 3
    return np.repeat(plane[..., None], 3, 2)


def beat(radii: Sequence[float] = RADII) -> np.ndarray:
    return np.stack([heart(radius) for radius in radii], -1)


def save(file: Path, values: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(values, affine)
    image.header.set_xyzt_units("mm", "msec")
    nib.save(image, file)


class Folder:
    """Images and their label maps, measured together."""

    def __init__(self, path: Path) -> None:
        self.images, self.out = path / "in", path / "out"

    def add(self, name: str, labels: np.ndarray) -> None:
        noise = np.random.default_rng(0).integers(0, 500, labels.shape).astype(np.int16)
        save(self.images / f"{name}.nii.gz", noise)
        self.correct(name, labels)

    def correct(self, name: str, labels: np.ndarray, affine: np.ndarray = AFFINE) -> None:
        save(self.out / f"{name}_seg.nii.gz", labels, affine)

    def measure(self, **options: object) -> dict[str, dict[str, str]]:
        """The rows of the table."""
        cases = image_files(self.images, (".nii.gz", ".dcm"), IGNORE, time_series=True)
        saver = SaveImageLabelMapd("pred", self.out, data_root_dir=self.images, num_classes=4)
        try:
            Measures(saver, cases, NAMES, 4, **options).again()  # type: ignore[arg-type]
        finally:
            assert not list(self.out.rglob(".partial-*"))
        return self.rows()

    def rows(self) -> dict[str, dict[str, str]]:
        with (self.out / "measures.csv").open(encoding="utf-8") as file:
            return {row.pop("case"): row for row in csv.DictReader(file)}

    def be_sure(self, name: str) -> None:
        """As if a network had been sure of a label map."""
        kept = self.out / "measures" / f"{name}.json"
        content = json.loads(kept.read_text())
        names = ("confidence", *(f"{NAMES[n].replace(' ', '_')}_confidence" for n in "123"))
        content["frames"] = [{**frame, **dict.fromkeys(names, 0.5)} for frame in content["frames"]]
        kept.write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path)


def frames(row: dict[str, str]) -> tuple[str, str]:
    return row["ed_frame"], row["es_frame"]


def test_label_maps_that_are_gone_or_broken_have_no_row(folder):
    for name in "abc":
        folder.add(name, beat())
    assert set(folder.measure(curves=True)) == set("abc")
    (folder.out / "a_seg.nii.gz").unlink()
    (folder.out / "b_seg.nii.gz").write_bytes(b"garbage")
    with pytest.raises(DataError, match="1 of the cases .*\n.*b_seg.nii.gz"):
        folder.measure()
    assert set(folder.rows()) == {"c"}
    pictures = sorted(file.name for file in folder.out.iterdir() if file.suffix in (".png", ".gif"))
    assert pictures == ["c_beating.gif", "c_curve.png"]


def test_a_pair_without_one_of_its_label_maps_has_no_ejection_fraction(folder):
    folder.add("p_frame01", heart(8))
    folder.add("p_frame12", heart(4))
    assert frames(folder.measure()["p"]) == ("1", "12")
    (folder.out / "p_frame12_seg.nii.gz").unlink()
    rows = folder.measure()
    assert set(rows) == {"p_frame01"} and "lv_ef_percent" not in rows["p_frame01"]


def test_an_image_that_cannot_be_read_any_more_has_no_row(folder):
    folder.add("a", heart(8))
    folder.add("b", heart(8))
    assert set(folder.measure()) == {"a", "b"}
    (folder.images / "a.nii.gz").write_bytes(b"garbage")
    with pytest.raises(DataError, match="1 of the cases"):
        folder.measure()
    assert set(folder.rows()) == {"b"}


def test_a_corrected_label_map_with_an_old_date_has_no_confidence(folder):
    folder.add("a", beat())
    folder.measure()
    folder.be_sure("a")
    assert folder.measure()["a"]["confidence"] == "0.5"
    folder.correct("a", beat((8, 4, 6, 6)))
    os.utime(folder.out / "a_seg.nii.gz", (1e9, 1e9))
    row = folder.measure()["a"]
    assert frames(row) == ("0", "1") and "confidence" not in row


def test_a_corrected_label_map_must_lie_on_its_image(folder):
    folder.add("a", beat())
    folder.measure()
    folder.correct("a", beat()[::-1].copy(), np.diag([-2.0, 2, 8, 1]))
    with pytest.raises(DataError, match="(?s)a_seg.nii.gz and its image .*positions"):
        folder.measure()
    folder.correct("a", beat()[:30])
    with pytest.raises(DataError, match="a_seg.nii.gz has shape"):
        folder.measure()
    assert folder.rows() == {}


def test_numbers_that_are_whole_but_for_rounding_are_classes(folder):
    folder.add("a", beat())
    whole = folder.measure()
    folder.correct("a", beat().astype(np.float32) * 1.0000002)
    assert folder.measure() == whole
    for wrong in (1.002, math.nan, math.inf):
        folder.correct("a", np.where(beat() == 1, wrong, 0).astype(np.float32))
        with pytest.raises(DataError, match="a_seg.nii.gz"):
            folder.measure()


def test_pictures_follow_a_corrected_label_map(folder, caplog):
    folder.add("a", beat())
    folder.add("b", heart(8))
    folder.measure(curves=True)
    curve, gif, overlay = (folder.out / name for name in ("a_curve.png", "a_beating.gif", "b_overlay.png"))
    before = {}
    for picture in (curve, gif):
        before[picture] = picture.read_bytes()
    folder.measure()
    assert gif.is_file() and overlay.is_file()  # nothing was changed
    folder.correct("a", beat((8, 2, 6, 6)))
    folder.correct("b", heart(4))
    folder.measure()
    assert not gif.exists() and not overlay.exists() and curve.read_bytes() != before[curve]
    assert all(name in caplog.text for name in (gif.name, overlay.name))
    folder.measure(curves=True)
    assert gif.read_bytes() != before[gif] and overlay.is_file()


def test_pictures_in_colours_are_measured_and_drawn_again(tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(np.full((30, 20, 3), 99, np.uint8)).save(tmp_path / "in" / "a.png")
    label = np.zeros((30, 20), np.uint8)
    label[:4, :5] = 1
    (tmp_path / "out").mkdir()
    Image.fromarray(label).save(tmp_path / "out" / "a_seg.png")
    cases = image_files(tmp_path / "in", (".png",))
    saver = SaveImageLabelMapd("pred", tmp_path / "out", ".png", tmp_path / "in", num_classes=2)
    Measures(saver, cases, ["lesion"], 2, curves=True).again()
    assert "a,20,99,1" in (tmp_path / "out" / "measures.csv").read_text()
    assert (tmp_path / "out" / "a_overlay.png").is_file()


def test_a_case_named_like_a_pair_has_a_row_of_its_own(folder):
    folder.add("p", heart(8))
    folder.add("p_frame01", heart(8))
    folder.add("p_frame12", heart(4))
    rows = folder.measure()
    assert set(rows) == {"p", "p_frame01 and p_frame12"}
    assert float(rows["p"]["left_ventricle_ml"]) > 0 and not rows["p"]["lv_ef_percent"]
    assert float(rows["p_frame01 and p_frame12"]["lv_ef_percent"]) == pytest.approx(75, abs=3)


def test_two_files_of_one_frame_are_refused_by_name(folder):
    folder.add("p_frame01", heart(8))
    folder.add("p_frame1", heart(4))
    folder.add("q", beat())
    with pytest.raises(DataError, match="p_frame01 and p_frame1 .*frame 1"):
        folder.measure()
    assert set(folder.rows()) == {"q"}


def test_frames_that_are_not_there_are_told_in_few_words(folder):
    folder.add("a", np.repeat(beat((4,)), 300, -1))
    folder.add("p_frame01", heart(8))
    folder.add("p_frame12", heart(4))
    assert set(folder.measure(es_frame=12)) == {"a", "p"}
    with pytest.raises(DataError) as error:
        folder.measure(es_frame=300)
    assert "0 to 299" in str(error.value) and "1, 12" in str(error.value) and "2 of the cases" in str(error.value)


def test_a_series_of_two_frames_is_no_pair_of_neighbours(folder):
    folder.add("a", beat((8, 6)))
    folder.add("p_frame01", heart(8))
    folder.add("p_frame02", heart(6))
    rows = folder.measure()
    assert "neighbouring" not in rows["a"]["flags"] and "neighbouring" in rows["p"]["flags"]


def test_a_heart_without_a_left_ventricle_has_a_row_also_with_a_named_frame(folder):
    folder.add("a", np.where(beat() == 3, 0, beat()))
    row = folder.measure(ed_frame=0)["a"]
    assert row["ed_frame"] == "0" and not row["lv_ef_percent"] and "left ventricle: not found" in row["flags"]
    with pytest.raises(DataError, match="Frame 0 cannot be both"):
        folder.measure(ed_frame=0, es_frame=0)


INFO = "ED: 2\nES: 4\nGroup: NOR\nHeight: 180.0\nNbFrame: 4\nWeight: 80.0\n"


def test_an_info_file_is_of_the_one_patient_in_its_folder(folder, caplog):
    for name in ("one/a", "two/b", "two/c", "three/p_frame01", "three/p_frame04", "three/p_frame02"):
        folder.add(name, heart(8 - int(name[-1])) if "frame" in name else beat())
    for name in ("one", "two", "three"):
        (folder.images / name / "Info.cfg").write_text(INFO)
    rows = folder.measure()
    assert [frames(rows[name]) for name in "abcp"] == [("1", "3"), ("0", "2"), ("0", "2"), ("2", "4")]
    assert float(rows["a"]["body_surface_m2"]) == pytest.approx(2)
    assert not rows["b"]["body_surface_m2"]
    assert caplog.text.count("Info.cfg") == 1 and str(Path("two") / "Info.cfg") in caplog.text


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (INFO, {"ED": 2, "ES": 4, "Height": 180, "Weight": 80}),
        ("ED: 1.0\r\nES:\t12\r\n", {"ED": 1, "ES": 12}),
        ("\ufeffed : 1 # of 30\n  es=12\t\nweight: 95.5; kg\n", {"ED": 1, "ES": 12, "Weight": 95.5}),
        ("Edges: 5\nGroup: DCM\n", {}),
    ],
)
def test_an_info_file_is_read_as_people_write_it(text, found, tmp_path):
    (tmp_path / "Info.cfg").write_bytes(text.encode())
    assert read_info(tmp_path / "Info.cfg") == found


@pytest.mark.parametrize("line", ["ED: 1.5", "ES: 0", "ED: -1", "es 4", "Weight: 95.0.1", "Height: tall", "ED:"])
def test_an_info_file_that_cannot_be_read_is_its_patient_s_error(line, folder):
    folder.add("a/a", beat())
    folder.add("b/b", beat())
    (folder.images / "a" / "Info.cfg").write_text(f"Group: NOR\n{line}\n")
    with pytest.raises(DataError) as error:
        folder.measure()
    assert line in str(error.value) and str(folder.images / "a" / "Info.cfg") in str(error.value)
    assert set(folder.rows()) == {"b"}


def series(interval: float | None, height: float | None = None, weight: float | None = None) -> TimeSeries:
    times = tuple(250.0 * t for t in range(4))  # a beat of one second
    return TimeSeries("a", (40, 40, 3), 4, times, interval, height, weight, lambda frame: None)


@pytest.mark.parametrize(("interval", "rate"), [(800, 75), (None, 60), (9, 60), (1e5, 60), (-800, 60)])
def test_an_interval_that_is_no_heartbeat_leaves_the_times_of_the_frames(interval, rate):
    names = {1: "right ventricle", 2: "myocardium", 3: "left ventricle"}
    sizes = {"right_ventricle_ml": 50.0, "myocardium_ml": 100.0}
    measured = [{**sizes, "left_ventricle_ml": 100.0 - 20 * (t % 3), "shapes": []} for t in range(4)]
    assert patient_row(measured, names, series=series(interval))["heart_rate_per_min"] == pytest.approx(rate)
    info = {"Height": 180, "Weight": 80}
    for height, weight in ((180, 8000), (None, None), (0, 0), (1.8, 80)):  # of headers
        row = patient_row(measured, names, None, series(interval, height, weight), info)
        assert row["body_surface_m2"] == pytest.approx(2)


def evaluated(out: Path, hearts: dict[str, float]) -> None:
    """An evaluation of label maps, by the files of their images, that are predicted as they are."""

    def case(file: str, radius: float) -> dict[str, object]:
        label = MetaTensor(torch.as_tensor(heart(radius))[None], affine=torch.as_tensor(AFFINE))
        image = SimpleNamespace(meta={"filename_or_obj": file})
        return {"id": Path(file).name.split(".")[0], "image": image, "label": label, "pred": label}

    engine = Engine(lambda engine, batch: batch)
    HeartReport(out, NAMES, 4).attach(engine)  # type: ignore[arg-type]
    engine.run([[case(file, radius)] for file, radius in hearts.items()])


def compared(out: Path) -> dict[str, float]:
    with (out / "function.csv").open() as file:
        return {row["patient"]: float(row["true_lv_edv_ml"]) for row in csv.DictReader(file)}


def test_an_evaluation_refuses_what_measuring_refuses_and_compares_the_others(tmp_path):
    hearts = {}
    for patient, numbers in {"a": (1, 3), "b": (1, 3), "c": (1, 3), "d": (1, 3), "e": (2, 3)}.items():
        (tmp_path / patient).mkdir()
        hearts |= {str(tmp_path / patient / f"{patient}_frame0{n}.nii.gz"): 9.0 - n for n in numbers}
    hearts[str(tmp_path / "d" / "d_frame1.nii.gz")] = 3
    infos = {"a": "ED: 3\nES: 1\n", "b": "ED: 1\nES: 12\n", "c": "ED: one\n"}
    for patient, text in infos.items():
        (tmp_path / patient / "Info.cfg").write_text(text)
    with pytest.raises(DataError) as error:
        evaluated(tmp_path / "out", hearts)
    first, *lines = str(error.value).splitlines()
    assert first.startswith("3 ") and len(lines) == 3
    assert "12" in lines[0] and "ED: one" in lines[1] and "d_frame01 and d_frame1" in lines[2]
    found = compared(tmp_path / "out")
    assert set(found) == {"a", "e"}
    assert found["a"] == pytest.approx(0.032 * (heart(6) == 3).sum(), rel=1e-4)  # of frame 3, as its Info.cfg says


def test_an_evaluation_uses_no_info_file_of_several_patients(tmp_path, caplog):
    names = ("a_frame01", "a_frame02", "b_frame01", "b_frame02", "x/a_frame01", "x/a_frame02")
    (tmp_path / "Info.cfg").write_text("ED: 2\nES: 1\n")
    with caplog.at_level(logging.WARNING):
        evaluated(tmp_path / "out", {str(tmp_path / f"{name}.nii.gz"): 9.0 - int(name[-1]) for name in names})
    found = compared(tmp_path / "out")
    assert set(found) == {"b", f"{tmp_path}/a", f"{tmp_path}/x/a"}  # two of one name are two
    assert all(volume == pytest.approx(0.032 * (heart(8) == 3).sum(), rel=1e-4) for volume in found.values())
    assert caplog.text.count("Info.cfg") == 1
