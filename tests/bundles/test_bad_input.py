"""Bad input through every entry: each ends in one sentence of file, cause and remedy, and nothing half-written.

With ``-s`` the tests print the sentences.
"""

from __future__ import annotations

import errno
import json
import re
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, run
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.data import NibabelReader, PILReader
from PIL import Image

from networks import DANIE
from networks.data.layouts import cases
from networks.data.loading import LoadVolumed
from networks.data.slices import VolumeDataset
from networks.errors import sentence
from networks.storage import whole_file

KINDS = {"volume": "fias_acdc", "picture": "danie_glas"}
VOXELS = np.random.default_rng(0).integers(0, 1000, (12, 10, 4)).astype(np.int16)
SHIFTED = np.diag([1.0, 1, 1, 1])
SHIFTED[0, 3] = 5


@pytest.fixture(scope="module")
def read() -> Callable[..., dict]:
    """``read(kind, image, label=None)``: a case as the bundle of that kind prepares it."""
    preparations = {}
    for kind, name in KINDS.items():
        for config in ("inference", "evaluate"):
            parser = ConfigParser(json.loads((ROOT / f"bundles/{name}/configs/{config}.json").read_text()))
            preparations[kind, config] = parser.get_parsed_content("preprocessing")

    def read(kind: str, image: Path, label: Path | None = None) -> dict:
        case = {"image": str(image)} if label is None else {"image": str(image), "label": str(label)}
        return VolumeDataset([case], preparations[kind, "inference" if label is None else "evaluate"])[0]

    return read


def nifti(file: Path, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), file)
    return file


def picture(file: Path, mode: str = "RGB") -> Path:
    data = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
    Image.fromarray(data).convert(mode).save(file)
    return file


def cut(file: Path, size: int) -> Path:
    file.write_bytes(file.read_bytes()[:size])
    return file


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def text(file: Path) -> Path:
    file.write_text("Dear colleague, the images follow.")
    return file


def bomb(file: Path) -> Path:
    """A header of 27e12 voxels over none."""
    nifti(file, VOXELS)
    data = bytearray(nib.load(file).header.binaryblock)
    data[42:48] = np.array([30000] * 3, "<i2").tobytes()
    file.write_bytes(bytes(data) + bytes(4))
    return file


def rgb_voxels(file: Path) -> Path:
    colours = np.zeros(VOXELS.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    colours["G"] = VOXELS % 255
    return nifti(file, colours)


def nowhere(file: Path) -> Path:
    """An affine that makes a plane of the volume."""
    volume = nib.Nifti1Image(VOXELS, np.eye(4))
    volume.header["srow_y"] = 0
    nib.save(nib.Nifti1Image(VOXELS, None, volume.header), file)
    return file


def holes(file: Path, value: float) -> Path:
    data = VOXELS.astype(np.float32)
    data[3, 3, 1] = value
    return nifti(file, data)


IMAGES = {
    "missing file": ("volume", lambda d: d / "a.nii.gz", ["No such file"]),
    "empty file": ("volume", lambda d: cut(nifti(d / "a.nii.gz", VOXELS), 0), ["truncated"]),
    "truncated file": ("volume", lambda d: cut(nifti(d / "a.nii.gz", VOXELS), 500), ["truncated"]),
    "truncated, not zipped": ("volume", lambda d: cut(nifti(d / "a.nii", VOXELS), 500), ["truncated"]),
    "text named .nii.gz": ("volume", lambda d: text(d / "a.nii.gz"), ["not an image"]),
    "folder named .nii.gz": ("picture", lambda d: folder(d / "a.png"), ["folder"]),
    "NaN voxels": ("volume", lambda d: holes(d / "a.nii.gz", np.nan), ["NaN"]),
    "infinite voxels": ("volume", lambda d: holes(d / "a.nii.gz", -np.inf), ["infinite"]),
    "no position": ("volume", lambda d: nowhere(d / "a.nii.gz"), ["affine"]),
    "constant image": ("volume", lambda d: nifti(d / "a.nii.gz", VOXELS * 0 + 7), ["value 7"]),
    "no slices": ("volume", lambda d: nifti(d / "a.nii.gz", VOXELS[:, :, :0]), ["empty", "[12, 10, 0]"]),
    "2D file for a 3D bundle": ("volume", lambda d: nifti(d / "a.nii.gz", VOXELS[:, :, 0]), ["[12, 10]"]),
    "picture for a 3D bundle": ("volume", lambda d: picture(d / "a.png"), [".nii.gz", ".dcm"]),
    "3D file for a picture bundle": ("picture", lambda d: nifti(d / "a.nii.gz", VOXELS), [".jpg", ".bmp"]),
    "time series": ("volume", lambda d: nifti(d / "a.nii.gz", np.stack([VOXELS] * 5, 3)), ["5", "time"]),
    "RGB voxels": ("volume", lambda d: rgb_voxels(d / "a.nii.gz"), ["colours"]),
    "complex voxels": ("volume", lambda d: nifti(d / "a.nii.gz", VOXELS * 1j), ["complex128"]),
    "three channels": ("volume", lambda d: nifti(d / "a.nii.gz", np.stack([VOXELS] * 3, 3)), ["3 channel"]),
    "gray picture": ("picture", lambda d: picture(d / "a.png", "L"), ["1 channel", "expected 3"]),
    "picture with opacity": ("picture", lambda d: picture(d / "a.png", "RGBA"), ["4 channel", "expected 3"]),
    "truncated picture": ("picture", lambda d: cut(picture(d / "a.jpg"), 500), ["truncated"]),
    "text named .png": ("picture", lambda d: text(d / "a.png"), ["not an image"]),
    "huge volume": ("volume", lambda d: bomb(d / "a.nii"), ["30000, 30000"]),
}
LABELS = {
    "label of another shape": ("volume", VOXELS[:, :, :2] % 4, None, ["[12, 10, 2]", "[12, 10, 4]"]),
    "label elsewhere": ("volume", VOXELS % 4, SHIFTED, ["positions"]),
    "label out of range": ("volume", VOXELS % 6, None, ["[4.0, 5.0]", "0 to 3", "--num_classes"]),
    "mask of 0 and 255": ("volume", (VOXELS % 2) * 255, None, ['--label_values "{0: 0, 255: 1}"']),
    "mask of 100 and 200": ("volume", (VOXELS % 2 + 1) * 100, None, ['--label_values "{100: 0, 200: 1}"']),
    "fractional label": ("volume", (VOXELS % 4) / 2, None, ["[0.5, 1.5]"]),
    "negative label": ("volume", -(VOXELS % 4), None, ["[-3.0, -2.0, -1.0]"]),
    "NaN in the label": ("volume", np.where(VOXELS > 500, np.nan, 1.0), None, ["NaN"]),
    "label of RGB": ("volume", np.stack([VOXELS % 4] * 3, 3), None, ["3 channel"]),
}


@contextmanager
def tells(what: str, *facts: str) -> Iterator[None]:
    """The block must end in an error that has a sentence, which is printed, with these facts in it."""
    with pytest.raises(Exception) as caught:
        yield
    told = sentence(caught.value)
    assert told is not None, caught.getrepr()
    print(f"| {what} | {told} |")
    assert all(fact in told for fact in facts), f"{facts} in: {told}"


@pytest.mark.parametrize("what", IMAGES)
def test_a_bad_image(what, read, tmp_path):
    kind, make, facts = IMAGES[what]
    file = make(tmp_path)
    with tells(what, file.name, *facts):
        read(kind, file)


@pytest.mark.parametrize("what", LABELS)
def test_a_bad_label(what, read, tmp_path):
    kind, data, affine, facts = LABELS[what]
    image, label = nifti(tmp_path / "a.nii.gz", VOXELS), nifti(tmp_path / "a_gt.nii.gz", data, affine)
    with tells(what, "a_gt.nii.gz", *facts):
        read(kind, image, label)


def test_a_label_with_rounding_is_its_classes(read, tmp_path):
    classes = (VOXELS % 4).astype(np.float32)
    for shift in (-1e-4, 1e-4, 9e-4):
        label = nifti(tmp_path / "a_gt.nii.gz", (classes + shift * (classes > 0)).astype(np.float32))
        case = read("volume", nifti(tmp_path / "a.nii.gz", VOXELS), label)
        assert np.array_equal(case["label"][0].numpy(), classes)


def test_a_mask_of_another_size_is_refused(read, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a_anno.png")
    with tells("mask of another size", "a_anno.png", "a.png"):
        read("picture", picture(tmp_path / "a.png"), tmp_path / "a_anno.png")


def test_several_files_of_one_image_are_refused(read, tmp_path):
    files = [str(nifti(tmp_path / name, VOXELS)) for name in ("t1.nii.gz", "t2.nii.gz")]
    with tells("a list of files", *files):
        LoadVolumed("image")({"image": files})
    entry = {"image": files, "label": files[0]}
    (tmp_path / "data.json").write_text(json.dumps({"training": [entry]}))
    with tells("a list of files in a datalist", "data.json", *files):
        cases("datalist", tmp_path / "data.json", "train")


def test_a_file_without_the_right_to_read_it_is_named_as_that(read, unprivileged):
    for kind, file in (
        ("volume", nifti(unprivileged.folder / "a.nii.gz", VOXELS)),
        ("picture", picture(unprivileged.folder / "a.png")),
    ):
        file.chmod(0)
        with unprivileged(), tells("no right to read", file.name, "Permission denied", "read"):
            read(kind, file)
        file.chmod(0o644)


def test_a_slice_without_the_right_to_read_it_is_named_as_that(unprivileged):
    folder(unprivileged.folder / "series")
    (unprivileged.folder / "series" / "1").write_bytes(bytes(128) + b"DICM")
    (unprivileged.folder / "series" / "1").chmod(0)
    with unprivileged(), tells("no right to read a slice", f"{unprivileged.folder}/series/1", "Permission denied"):
        LoadVolumed("image")({"image": str(unprivileged.folder / "series")})


@pytest.mark.parametrize("error", [MemoryError("Unable to allocate 9 GiB"), RuntimeError("can't allocate memory")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_does_not_fit_into_memory_is_named_as_that(kind, error, read, monkeypatch, tmp_path):
    def no_memory(*args: object) -> None:
        raise error

    monkeypatch.setattr(NibabelReader, "get_data", no_memory)
    monkeypatch.setattr(PILReader, "get_data", no_memory)
    file = nifti(tmp_path / "a.nii.gz", VOXELS) if kind == "volume" else picture(tmp_path / "a.png")
    with tells("no memory to load it", file.name, "memory", str(error)):
        read(kind, file)


@pytest.fixture
def run_config(phantoms, weights, tmp_path) -> Callable[..., None]:
    """``run_config(config, **overrides)`` runs FIAS in this process."""

    def run_config(config: str, **overrides: object) -> None:
        root = {} if config == "train" else {"ckpt_dir": str(weights)}
        options = {"dataset_dir": str(phantoms("acdc")), "bundle_root": str(tmp_path / "root"), **root}
        quick = {"image_size": 32, "num_workers": 0, "device": "cpu"}
        if config == "train":
            quick["epochs"] = 1
        file = f"{ROOT}/bundles/fias_acdc/configs/{config}.json"
        workflow = ConfigWorkflow(
            file,
            workflow_type="train" if config == "train" else "infer",
            logging_file=False,
            **{**options, **quick, **overrides},
        )
        workflow.initialize()
        workflow.run()

    return run_config


def other_weights(folder: Path) -> str:
    torch.save(DANIE(1, 4, size="small").state_dict(), folder / "model.pt")
    return str(folder)


RUNS = {
    "missing folder": ("inference", lambda d: {"dataset_dir": f"{d}/none"}, ["none", "dataset_dir"]),
    "empty folder": ("inference", lambda d: {"dataset_dir": str(d)}, ["No images", ".nii.gz"]),
    "missing folder to evaluate": ("evaluate", lambda d: {"dataset_dir": f"{d}/none"}, ["none", "dataset_dir"]),
    "empty folder to train on": ("train", lambda d: {"dataset_dir": str(d)}, ["No train cases", "patientNNN"]),
    "datalist that is no JSON": (
        "train",
        lambda d: {"layout": "datalist", "dataset_dir": str(text(d / "data.json"))},
        ["data.json"],
    ),
    "missing weights": ("inference", lambda d: {"ckpt_dir": str(d)}, ["model.pt", "Train"]),
    "shipped weights that are missing": (
        "inference",
        lambda d: {"ckpt_dir": str(text(d / "pretrained.json").parent)},
        ["pretrained.pt", "git checkout"],
    ),
    "shipped weights that are truncated": (
        "evaluate",
        lambda d: {
            "ckpt_dir": str(cut((Path(other_weights(d)) / "model.pt").rename(d / "pretrained.pt"), 10000).parent)
        },
        ["pretrained.pt", "truncated"],
    ),
    "values of weights that cannot be read": (
        "evaluate",
        lambda d: {"ckpt_dir": str((Path(other_weights(d)) / "model.pt").with_suffix(".json").write_text("{") and d)},
        ["model.json"],
    ),
    "truncated weights": (
        "evaluate",
        lambda d: {"ckpt_dir": str(cut(Path(other_weights(d)) / "model.pt", 10000).parent)},
        ["model.pt", "truncated"],
    ),
    "weights of another network": ("inference", lambda d: {"ckpt_dir": other_weights(d)}, ["model.pt", "FIAS"]),
    "nothing to resume": ("train", lambda d: {"resume": True}, ["last.ckpt", "--resume"]),
    "weights to start from missing": ("train", lambda d: {"start_from": f"{d}/a.pt"}, ["a.pt", "start"]),
    "misspelt override": ("train", lambda d: {"epoch": 5}, ["epoch.", "epochs"]),
    "unknown override": ("inference", lambda d: {"colour": 5}, ["colour"]),
    "text for a number": ("train", lambda d: {"epochs": "ten"}, ["epochs", "'ten'"]),
    "text for a rate": ("train", lambda d: {"learning_rate": "fast"}, ["learning_rate", "'fast'"]),
    "false as a text": ("inference", lambda d: {"overlay": "false"}, ["overlay", "'false'", "False"]),
    "text for a list": ("evaluate", lambda d: {"metrics": "iou"}, ["metrics", "'iou'"]),
    "no address of a DilateFormer": ("train", lambda d: {"pretrained": True}, ["address"]),
    "a rate that spoils the weights": ("train", lambda d: {"learning_rate": 1e38}, ["epoch 1", "learning_rate"]),
    "unknown layout": ("train", lambda d: {"layout": "synapse"}, ["layout", "'acdc'", "'synapse'"]),
    "unknown scale of grey values": ("train", lambda d: {"intensity": "window 5"}, ["intensity", "'window 5'"]),
    "grey values upside down": ("inference", lambda d: {"intensity": "window 5 1"}, ["intensity", "'window 5 1'"]),
    "no field of view": ("train", lambda d: {"field_of_view": "all"}, ["field_of_view", "'all'", "whole"]),
    "output folder that is a file": ("inference", lambda d: {"output_dir": str(text(d / "out"))}, ["write", "out"]),
}
for option, value in {
    "epochs": 0,
    "batch_size": 0,
    "val_interval": 0,
    "image_size": 0,
    "num_workers": -1,
    "num_classes": 300,
    "seed": -1,
    "learning_rate": -1,
    "empty_weight": 2,
    "flip_prob": -0.5,
    "dropout": 1.5,
    "device": "cuda:99",
}.items():
    RUNS[f"{option} {value}"] = ("train", lambda d, o=option, v=value: {o: v}, [option, repr(value)])
for option, value in {"val_batch_size": 0, "image_size": 31, "num_workers": 0.5, "device": "gpu"}.items():
    RUNS[f"{option} {value}"] = ("inference", lambda d, o=option, v=value: {o: v}, [option, repr(value)])


@pytest.mark.parametrize("what", RUNS)
def test_a_bad_run(what, run_config, tmp_path):
    config, make, facts = RUNS[what]
    (tmp_path / "d").mkdir()
    overrides = make(tmp_path / "d")
    with tells(f"{what} ({config})", *facts):
        run_config(config, **overrides)
    left = [p for p in (tmp_path / "root").rglob("*") if p.is_file()]
    assert not [p for p in left if p.name.startswith(".partial-") or p.suffix in (".gz", ".pt", ".ckpt", ".md")]


def test_values_are_checked_against_a_yaml_file_too(weights, tmp_path):
    content = ConfigParser.load_config_file(f"{ROOT}/bundles/fias_acdc/configs/inference.json")
    ConfigParser.export_config_file(content, f"{tmp_path}/inference.yaml", fmt="yaml")
    workflow = ConfigWorkflow(f"{tmp_path}/inference.yaml", workflow_type="infer", ckpt_dir=str(weights), imagesize=32)
    with tells("misspelt override of a YAML file", "imagesize", "image_size"):
        workflow.initialize()


class Code:
    """Unpickled, it leaves a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return Path.touch, (self.file,)


def test_weights_that_hold_code_are_refused_and_it_does_not_run(run_config, tmp_path):
    for name, options in {"model.pt": {"ckpt_dir": str(tmp_path)}, "last.ckpt": {"resume": True}}.items():
        file = tmp_path / name if name == "model.pt" else tmp_path / "root" / "models" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"network": Code(tmp_path / "ran")}, file)
        with tells(f"code in {name}", str(file)):
            run_config("train" if "resume" in options else "inference", **options)
    assert not (tmp_path / "ran").exists()


@contextmanager
def no_room(bytes_left: int) -> Iterator[None]:
    """The system refuses to write files longer than that, as it refuses where a disk is full."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        signal.signal(signal.SIGXFSZ, handler)


def two_cases(data: Path, folder: Path) -> str:
    """A datalist of one case to train on and one to validate."""
    entries = [{"image": case["image"], "label": case["label"]} for case in cases("acdc", data, "train")]
    (folder / "data.json").write_text(json.dumps({"training": entries[:1], "validation": entries[1:2]}))
    return str(folder / "data.json")


def test_no_room_for_a_checkpoint_leaves_the_one_before(run_config, phantoms, tmp_path):
    model = tmp_path / "root" / "models" / "model.pt"
    model.parent.mkdir(parents=True)
    model.write_bytes(b"the one before")
    with tells("no room for a checkpoint", "write", str(model), "File too large"), no_room(1_000_000):
        run_config("train", dataset_dir=two_cases(phantoms("acdc"), tmp_path), layout="datalist", batch_size=3)
    assert model.read_bytes() == b"the one before" and not list(model.parent.glob(".*"))


def test_no_room_for_results_stops_inference(run_config, phantoms, tmp_path):
    patient = phantoms("acdc") / "training" / "patient002"
    with tells("no room for the results", "write", "File too large"), no_room(100):
        run_config("inference", dataset_dir=str(patient))
    assert not [p for p in (tmp_path / "root").rglob("*") if p.is_file()]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_place_that_cannot_be_written_is_named(number, tmp_path):
    with tells(errno.errorcode[number], f"write {tmp_path}/a.csv", "as the system says"):
        with whole_file(tmp_path / "a.csv"):
            raise OSError(number, "as the system says")
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_read_while_another_is_written_is_not_one_that_cannot_be_written(tmp_path):
    with tells("no right to the source", "source.pt"), whole_file(tmp_path / "a.pt"):
        raise PermissionError(errno.EACCES, "Permission denied", "source.pt")
    told = sentence(PermissionError(errno.EACCES, "Permission denied", "source.pt"))
    assert told and "write" not in told


def test_phantoms_and_releases_tell_on_the_command_line(tmp_path):
    text(tmp_path / "file")
    commands = {
        ("bundles/phantoms.py", "acdc", f"{tmp_path}/file/acdc"): "Not a directory",
        ("bundles/phantoms.py", "acdc", f"{tmp_path}/a", "--size", "big"): "size .*64",
        ("bundles/phantoms.py", "acdc", f"{tmp_path}/a", "--cine", "True", "--frames", "5"): "frames .*6",
        (
            "bundles/release.py",
            "fias_acdc",
            "--weights",
            f"{tmp_path}/file",
        ): "file",
    }
    for command, message in commands.items():
        result = run(*command, check=False)
        assert result.returncode == 1 and "Traceback" not in result.stdout
        assert re.search(message, result.stdout), result.stdout
        print(f"| {' '.join(command[:2])} | {result.stdout.strip()} |")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
