"""Official folders, the papers' splits, and what is wrong with a folder that is neither."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from networks import DataError
from networks.data.folders import Cases, image_files
from networks.data.layouts import ACDC_SPLIT, BTCV_ORGANS, BTCV_SPLIT, LAYOUTS, SPLITS, cases
from networks.data.loading import LoadVolumed


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def acdc(root: Path) -> None:
    for n in range(1, 101):
        folder = root / "training" / f"patient{n:03d}"
        for frame in ("frame01", "frame12"):
            touch(folder / f"{folder.name}_{frame}.nii.gz", folder / f"{folder.name}_{frame}_gt.nii.gz")
        touch(folder / f"{folder.name}_4d.nii.gz", folder / "Info.cfg")


def btcv(root: Path) -> None:
    for n in (*range(1, 11), *range(21, 41)):
        folder = root / "RawData" / "Training"
        touch(folder / "img" / f"img{n:04d}.nii.gz", folder / "label" / f"label{n:04d}.nii.gz")


def isic2017(root: Path) -> None:
    first = 0
    for part, count in (("Training", 2000), ("Validation", 150), ("Test_v2", 600)):
        for n in range(first, first + count):
            images, masks = root / f"ISIC-2017_{part}_Data", root / f"ISIC-2017_{part}_Part1_GroundTruth"
            touch(images / f"ISIC_{n:07d}.jpg", images / f"ISIC_{n:07d}_superpixels.png")
            touch(masks / f"ISIC_{n:07d}_segmentation.png")
        first += count


def isic2018(root: Path, parts: dict[str, int] | None = None) -> None:
    first = 0
    for part, count in (parts or {"Training": 2594, "Validation": 100, "Test": 1000}).items():
        images, masks = root / f"ISIC2018_Task1-2_{part}_Input", root / f"ISIC2018_Task1_{part}_GroundTruth"
        touch(images / "ATTRIBUTION.txt")
        for n in range(first, first + count):
            touch(images / f"ISIC_{n:07d}.jpg", masks / f"ISIC_{n:07d}_segmentation.png")
        first += count


def glas(root: Path) -> None:
    folder = root / "Warwick QU Dataset (Released 2016_07_08)"
    touch(folder / "Grade.csv")
    for part, count in (("train", 85), ("testA", 60), ("testB", 20)):
        for n in range(1, count + 1):
            touch(folder / f"{part}_{n}.bmp", folder / f"{part}_{n}_anno.bmp")


COUNTS = {
    "acdc": (acdc, 140, 20, 40),
    "btcv": (btcv, 15, 3, 12),
    "btcv_papers": (btcv, 18, 12, 12),
    "isic2017": (isic2017, 2000, 150, 600),
    "isic2018": (isic2018, 2594, 100, 1000),
    "isic2018_bcdunet": (isic2018, 1815, 259, 520),
    "glas": (glas, 68, 17, 80),
    "glas_papers": (glas, 85, 80, 80),
}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Callable[[str], Path]:
    """An official download as it unpacks, of empty files."""
    root = tmp_path_factory.mktemp("official")

    def unpacked(layout: str) -> Path:
        make = COUNTS[layout][0]
        if not (root / make.__name__).exists():
            make(root / make.__name__)
        return root / make.__name__

    return unpacked


@pytest.mark.parametrize("layout", COUNTS)
def test_official_downloads_fall_into_their_splits(layout, unpacked):
    found = {split: cases(layout, unpacked(layout), split) for split in SPLITS}
    assert tuple(len(c) for c in found.values()) == COUNTS[layout][1:]
    ids = [case["id"] for c in found.values() for case in c]
    assert len(set(ids)) == len(ids) or layout.endswith("_papers")
    for case in (c for split in found.values() for c in split):
        assert Path(case["image"]).is_file() and Path(case["label"]).is_file()
        assert case["id"] == Path(case["image"]).name.split(".")[0]
    assert found == {split: cases(layout, unpacked(layout), split) for split in SPLITS}


def test_cases_are_the_ones_of_the_papers_splits(unpacked):
    validation = {int(c["id"][7:10]) for c in cases("acdc", unpacked("acdc"), "validation")}
    assert validation == set(ACDC_SPLIT["validation"])
    assert {int(c["id"][3:]) for c in cases("btcv", unpacked("btcv"), "test")} == set(BTCV_SPLIT["test"])
    glands = [c["id"] for c in cases("glas", unpacked("glas"), "validation")]
    assert glands == [f"train_{n}" for n in range(5, 86, 5)]
    assert cases("acdc", unpacked("acdc") / "training", "test") == cases("acdc", unpacked("acdc"), "test")
    assert cases("isic2017", unpacked("isic2017").parent, "test") == cases("isic2017", unpacked("isic2017"), "test")


def test_labels_map_to_the_papers_classes(unpacked):
    values = cases("btcv", unpacked("btcv"), "train")[0]["label_values"]
    assert set(values) == set(range(14)) and {raw: c for raw, c in values.items() if c} == BTCV_ORGANS
    assert cases("isic2018", unpacked("isic2018"), "test")[0]["label_values"] == {0: 0, 255: 1}
    instances = cases("glas", unpacked("glas"), "train")[0]["label_values"]
    assert instances[0] == 0 and {instances[n] for n in range(1, 256)} == {1}
    assert "label_values" not in cases("acdc", unpacked("acdc"), "train")[0]


def test_flat_btcv_folders_are_read_too(tmp_path):
    touch(tmp_path / "imagesTr" / "img0005.nii.gz", tmp_path / "labelsTr" / "label0005.nii.gz")
    (case,) = cases("btcv", tmp_path, "train")
    assert case["label"] == str(tmp_path / "labelsTr" / "label0005.nii.gz")


def test_absent_test_cases_are_said_and_training_goes_on(tmp_path, caplog):
    isic2018(tmp_path, {"Training": 4})
    with caplog.at_level(logging.WARNING):
        assert len(cases("isic2018", tmp_path, "train")) == 4
    assert "no test cases" in caplog.text
    with pytest.raises(DataError, match=f"test.*{tmp_path}.*4 train.*ISIC2018_Task1-2_Training_Input"):
        cases("isic2018", tmp_path, "test")


def test_wrong_folders_are_named(tmp_path):
    for layout in LAYOUTS:
        if layout != "datalist":
            with pytest.raises(DataError, match=f"train.*{tmp_path}"):
                cases(layout, tmp_path, "train")
    with pytest.raises(ValueError, match="split.*'validation'.*'val'"):
        cases("acdc", tmp_path, "val")
    with pytest.raises(ValueError, match="layout.*'btcv_papers'.*'synapse'"):
        cases("synapse", tmp_path, "train")
    with pytest.raises(DataError, match=f"{tmp_path}/none"):
        cases("acdc", tmp_path / "none", "train")
    folder = tmp_path / "patient001"
    touch(folder / "patient001_frame12.nii.gz")
    with pytest.raises(DataError, match="patient001_frame12.nii.gz.*label.*frame12_gt"):
        cases("acdc", tmp_path, "train")
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(DataError, match="images.*patient001"):
        cases("acdc", tmp_path, "train")


def test_a_case_that_is_there_twice_or_in_two_splits_is_named(tmp_path):
    isic2018(tmp_path, {"Training": 2, "Test": 1})
    training = tmp_path / "ISIC2018_Task1-2_Training_Input"
    touch(training / "ISIC_0000001.png")
    with pytest.raises(DataError, match="ISIC_0000001.*Training.*jpg.*Training.*png"):
        cases("isic2018", tmp_path, "train")
    (training / "ISIC_0000001.png").unlink()
    test = tmp_path / "ISIC2018_Task1-2_Test_Input" / "ISIC_0000000.jpg"
    touch(test)
    with pytest.raises(DataError, match="ISIC_0000000.*Training.*Test"):
        cases("isic2018", tmp_path, "train")


def test_your_own_folder_is_divided_by_name(tmp_path):
    for n in range(10):
        touch(tmp_path / "images" / f"scan.{n}.nii.gz", tmp_path / "labels" / f"scan.{n}.nii.gz")
    found = {split: [c["id"] for c in cases("folder", tmp_path, split)] for split in SPLITS}
    assert {split: len(ids) for split, ids in found.items()} == {"train": 7, "validation": 1, "test": 2}
    assert sorted(sum(found.values(), [])) == [f"scan.{n}" for n in range(10)]
    (tmp_path / "labels" / f"{found['train'][0]}.nii.gz").unlink()
    with pytest.raises(DataError, match=f"{found['train'][0]}.nii.gz.*label"):
        cases("folder", tmp_path, "train")


def test_a_decathlon_datalist_names_its_own_splits(tmp_path):
    file = tmp_path / "dataset.json"
    entry = {"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}
    touch(tmp_path / entry["image"], tmp_path / entry["label"])
    file.write_text(json.dumps({"training": [entry], "test": ["imagesTs/b.nii.gz"]}))
    (case,) = cases("datalist", file, "train")
    assert case == {"id": "a", **{key: str(tmp_path / value) for key, value in entry.items()}}
    with pytest.raises(DataError, match="validation.*'training', 'validation' and 'test'"):
        cases("datalist", file, "validation")
    with pytest.raises(DataError, match="test.*dataset.json"):
        cases("datalist", file, "test")
    file.write_text("{")
    with pytest.raises(DataError, match="dataset.json"):
        cases("datalist", file, "train")


def test_a_datalist_of_a_folder_per_patient_tells_images_of_one_name_apart(tmp_path):
    file = tmp_path / "dataset.json"
    entries = [{"image": f"p{n}/ct.nii.gz", "label": f"p{n}/seg.nii.gz"} for n in (1, 2, 3)]
    touch(*(tmp_path / name for entry in entries for name in entry.values()))
    file.write_text(json.dumps({"training": entries[:2], "test": entries[2:]}))
    assert [c["id"] for c in cases("datalist", file, "train")] == ["p1/ct", "p2/ct"]
    file.write_text(json.dumps({"training": entries[:2], "test": entries[1:]}))
    with pytest.raises(DataError, match="p2/ct.*twice"):
        cases("datalist", file, "train")


def test_image_files_of_a_folder(tmp_path):
    folder = tmp_path / "patient001"
    touch(*(folder / f"patient001_{name}.nii.gz" for name in ("frame01", "frame01_gt", "frame12", "4d")))
    touch(folder / "photo.JPG")
    files = image_files(tmp_path, ignore=["*_gt.nii*", "*_4d.nii*"])
    assert [f["id"] for f in files] == ["patient001_frame01", "patient001_frame12"]
    assert [f["id"] for f in image_files(tmp_path, suffixes=[".jpg", ".png"])] == ["photo"]
    touch(folder / "photo.png")
    with pytest.raises(DataError, match="photo.JPG.*photo.png"):
        image_files(tmp_path, suffixes=[".jpg", ".png"])
    with pytest.raises(DataError, match=f"{tmp_path}/none"):
        image_files(tmp_path / "none")
    cohort = tmp_path / "cohort"
    touch(cohort / "b" / "own.nii.gz")
    (cohort / "a").symlink_to("b")  # each real folder once, by its own name
    (cohort / "b" / "back").symlink_to(tmp_path)
    (cohort / "linked").symlink_to(folder)
    assert [str(Path(f["image"]).relative_to(cohort)) for f in image_files(cohort, ignore=["*_gt*", "*_4d*"])] == [
        "b/own.nii.gz",
        "linked/patient001_frame01.nii.gz",
        "linked/patient001_frame12.nii.gz",
    ]
    with pytest.raises(DataError, match=f"{tmp_path}.*.nii.gz.*.dcm"):
        image_files(tmp_path, ignore=["*"])


def left_out(found: Cases) -> dict[str, str]:
    return {Path(entry["file"]).name: entry["why"] for entry in found.left_out}


def test_images_that_are_left_out_are_counted_and_named(tmp_path, caplog):
    taken = ("a.nii.gz", ".hidden.nii.gz", "notes.txt", ".trash/b.nii.gz")
    others = ("a_gt.nii.gz", "b_gt.nii.gz", "a.nhdr", "a.mgz", "photo.jpg", "gone.nii.gz")
    touch(*(tmp_path / name for name in (*taken, *others[:-1])))
    (tmp_path / "gone.nii.gz").symlink_to("elsewhere.nii.gz")
    found = image_files(tmp_path, ignore=["*_gt.nii*"])
    assert [case["id"] for case in found] == ["a"] and sorted(left_out(found)) == sorted(others)
    assert all(name in caplog.text for name in others) and left_out(found)["a_gt.nii.gz"].endswith("*_gt.nii*")
    assert image_files(tmp_path / "a_gt.nii.gz", ignore=["*_gt.nii*"])[0]["id"] == "a_gt"


def test_folders_that_cannot_be_read_are_named(unprivileged, caplog):
    folder = unprivileged.folder
    touch(folder / "a.nii.gz", folder / "closed" / "b.nii.gz", folder / "slices" / "1")
    (folder / "closed").chmod(0)
    (folder / "slices" / "1").chmod(0)
    with unprivileged():
        found = image_files(folder)
    (folder / "closed").chmod(0o755)
    assert [case["id"] for case in found] == ["a"]
    assert sorted(left_out(found)) == ["closed", "slices"] and "Permission denied" in left_out(found)["closed"]
    assert "closed" in caplog.text and "slices" in caplog.text


def test_own_files_are_found_in_capitals_and_the_system_s_own_are_none(tmp_path, caplog):
    for n in range(4):
        touch(tmp_path / "images" / f"IMG_{n}.JPG", tmp_path / "labels" / f"IMG_{n}.PNG")
        touch(tmp_path / "images" / f"._IMG_{n}.JPG", tmp_path / "labels" / f"._IMG_{n}.PNG")
    touch(tmp_path / "images" / "scan.NII.GZ", tmp_path / "labels" / "scan.Nii.gz", tmp_path / "images" / "x.nhdr")
    found = [cases("folder", tmp_path, split) for split in SPLITS]
    pairs = {c["id"]: Path(c["label"]).name for split in found for c in split}
    assert pairs == {**{f"IMG_{n}": f"IMG_{n}.PNG" for n in range(4)}, "scan": "scan.Nii.gz"}
    assert list(left_out(found[0])) == ["x.nhdr"] and "x.nhdr" in caplog.text
    (tmp_path / "labels" / "IMG_0.PNG").unlink()
    with pytest.raises(DataError) as error:
        for split in SPLITS:
            cases("folder", tmp_path, split)
    assert "IMG_0.JPG" in str(error.value) and ".png" in str(error.value) and ".nii" not in str(error.value)


def test_files_in_folders_of_their_own_names_are_found(tmp_path):
    """As some unpack ACDC."""
    for name in ("patient001_frame01", "patient001_frame01_gt", "patient001_frame12", "patient001_frame12_gt"):
        touch(tmp_path / "patient001" / f"{name}.nii" / f"{name}.nii")
    found = cases("acdc", tmp_path, "train")
    assert [case["id"] for case in found] == ["patient001_frame01", "patient001_frame12"]
    assert all(Path(case["label"]).is_file() and Path(case["image"]).is_file() for case in found)


def test_patients_of_no_split_are_named(tmp_path, caplog):
    acdc(tmp_path)
    touch(*(tmp_path / "training" / "patient101" / f"patient101_frame01{end}.nii.gz" for end in ("", "_gt")))
    found = left_out(cases("acdc", tmp_path, "train"))
    assert [name for name in found if "_4d" not in name] == ["patient101"] and "patient101" in caplog.text


FRAMES = [f"patient{n:02d}_frame{f}" for n in range(10) for f in (1, 2)]


def own_folder(root: Path, names: list[str]) -> Path:
    touch(*(root / folder / f"{name}.nii.gz" for folder in ("images", "labels") for name in names))
    return root


def test_all_files_of_a_patient_go_into_one_split(tmp_path):
    root = own_folder(tmp_path, FRAMES)
    parts = {split: {case["id"].split("_")[0] for case in cases("folder", root, split)} for split in SPLITS}
    assert sorted(map(len, parts.values())) == [1, 2, 7] and len(set.union(*parts.values())) == 10


def test_a_pattern_says_what_a_patient_s_files_begin_with(tmp_path):
    root = own_folder(tmp_path, [f"{scan}-{name}" for scan in "ab" for name in "uvwxyz"])
    parts = {split: {case["id"][-1] for case in cases("folder", root, split, patient=".-(.)")} for split in SPLITS}
    assert len(set.union(*parts.values())) == sum(map(len, parts.values())) == 6
    for pattern, fact in {".": "patient", "(": r"'\('"}.items():
        with pytest.raises(DataError, match=fact):
            cases("folder", own_folder(tmp_path / "one", ["a1", "a2", "a3"]), "train", patient=pattern)


def test_each_labelled_frame_of_a_time_series_is_a_case(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a1", "b2", "c3", "d4"):
        image, label = rng.normal(size=(6, 5, 4, 7)).astype(np.float32), np.zeros((6, 5, 4, 7), np.uint8)
        label[2, 2, 1, 0], label[2, 2, 1, 3] = 1, 2
        for folder, values in {"images": image, "labels": label}.items():
            (tmp_path / folder).mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(values, np.diag([1.5, 1.5, 8, 1])), tmp_path / folder / f"{name}.nii.gz")
    found = [case for split in ("train", "test") for case in cases("folder", tmp_path, split)]
    first, second = sorted(
        (case for case in found if case["id"].startswith(found[0]["id"][:2])), key=lambda c: c["frame"]
    )
    assert (first["id"][2:], second["id"][2:]) == ("_frame0", "_frame3") and (first["frame"], second["frame"]) == (0, 3)
    loaded = LoadVolumed(["image", "label"])(second)
    image, label = (nib.load(second[key]).get_fdata()[..., 3] for key in ("image", "label"))
    assert np.array_equal(loaded["image"][0], image) and np.array_equal(loaded["label"][0], label)
    nib.save(nib.Nifti1Image(np.zeros((6, 5, 4)), np.eye(4)), first["image"])
    with pytest.raises(DataError, match="has 7 frames, its image .* 1"):
        for split in ("train", "validation", "test"):
            cases("folder", tmp_path, split)


def spoil(file: Path, what: str) -> Path:
    if what == "closed":
        file.chmod(0)
    elif what == "mha":
        file.unlink()
        file = file.with_name(file.name.replace(".nii.gz", ".mha"))
        file.write_text("no image")
    elif what == "link":
        file.unlink()
        file.symlink_to("nowhere.nii.gz")
    else:
        file.write_bytes(file.read_bytes()[: {"cut": -3000, "header": 90}[what]])
    return file


@pytest.mark.parametrize(
    ("folder", "what"),
    [*((folder, what) for folder in ("images", "labels") for what in ("cut", "header", "closed", "link"))]
    + [("images", "mha")],
)
def test_a_time_series_that_cannot_be_read_is_told_of_in_one_sentence(folder, what, unprivileged):
    root = unprivileged.folder
    for name in ("images", "labels"):
        (root / name).mkdir()
        for case in ("a1", "b2", "c3", "d4"):
            values = np.random.default_rng(0).integers(0, 3, (30, 20, 8, 3)).astype(np.uint8)
            nib.save(nib.Nifti1Image(values, np.diag([1.5, 1.5, 8, 1])), root / name / f"{case}.nii.gz")
    bad = [spoil(root / folder / f"{case}.nii.gz", what) for case in ("a1", "b2", "c3", "d4")]
    with unprivileged(), pytest.raises(DataError) as error:
        LoadVolumed(["image", "label"])(cases("folder", root, "train")[0])
    print(error.value)
    assert any(str(file) in str(error.value) for file in bad)
    assert "time points" not in str(error.value)
