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
from PIL import Image

from networks import DANIE
from networks.datasets import cases
from networks.errors import sentence
from networks.files import whole_file
from networks.slices import VolumeDataset

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
    "missing file": ("volume", lambda d: d / "a.nii.gz", "Cannot read .*a.nii.gz: missing"),
    "empty file": ("volume", lambda d: cut(nifti(d / "a.nii.gz", VOXELS), 0), "Cannot read .*a.nii.gz: missing, trunc"),
    "truncated file": ("volume", lambda d: cut(nifti(d / "a.nii.gz", VOXELS), 500), "Cannot read .*truncated"),
    "truncated, not zipped": ("volume", lambda d: cut(nifti(d / "a.nii", VOXELS), 500), "Cannot read .*truncated"),
    "text named .nii.gz": ("volume", lambda d: text(d / "a.nii.gz"), "Cannot read .*not an image file"),
    "NaN voxels": ("volume", lambda d: holes(d / "a.nii.gz", np.nan), "a.nii.gz holds NaN or infinite.*Replace"),
    "infinite voxels": ("volume", lambda d: holes(d / "a.nii.gz", -np.inf), "a.nii.gz holds NaN or infinite.*Replace"),
    "no position": ("volume", lambda d: nowhere(d / "a.nii.gz"), "where it lies.*Export"),
    "constant image": ("volume", lambda d: nifti(d / "a.nii.gz", VOXELS * 0 + 7), "nothing but the value 7.*Export"),
    "no slices": (
        "volume",
        lambda d: nifti(d / "a.nii.gz", VOXELS[:, :, :0]),
        r"is empty: shape \[12, 10, 0\]. Export",
    ),
    "2D file for a 3D bundle": (
        "volume",
        lambda d: nifti(d / "a.nii.gz", VOXELS[:, :, 0]),
        "expected one volume X, Y, Z.*join",
    ),
    "picture for a 3D bundle": ("volume", lambda d: picture(d / "a.png"), "none of the files that this bundle reads"),
    "3D file for a picture bundle": ("picture", lambda d: nifti(d / "a.nii.gz", VOXELS), "none of the files .*jpg"),
    "time series": ("volume", lambda d: nifti(d / "a.nii.gz", np.stack([VOXELS] * 5, 3)), "time points.*Split time"),
    "RGB voxels": ("volume", lambda d: rgb_voxels(d / "a.nii.gz"), "holds colours, expected one.*Convert"),
    "complex voxels": ("volume", lambda d: nifti(d / "a.nii.gz", VOXELS * 1j), "type complex128.*Convert"),
    "three channels": ("volume", lambda d: nifti(d / "a.nii.gz", np.stack([VOXELS] * 3, 3)), r"3 channel\(s\) or time"),
    "gray picture": ("picture", lambda d: picture(d / "a.png", "L"), "1 channel.*expected 3: an RGB picture. Convert"),
    "picture with opacity": ("picture", lambda d: picture(d / "a.png", "RGBA"), "4 channel.*expected 3.*Convert"),
    "truncated picture": ("picture", lambda d: cut(picture(d / "a.jpg"), 500), "Cannot read .*a.jpg"),
    "text named .png": ("picture", lambda d: text(d / "a.png"), "Cannot read .*a.png"),
    "huge volume": ("volume", lambda d: bomb(d / "a.nii"), "30000, 30000.*Crop or split"),
}
LABELS = {
    "label of another shape": ("volume", VOXELS[:, :, :2] % 4, None, "another image"),
    "label elsewhere": ("volume", VOXELS % 4, SHIFTED, "different positions.*Resample"),
    "label out of range": ("volume", VOXELS % 6, None, r"values \[4.0, 5.0\], expected whole numbers from 0 to 3. Map"),
    "fractional label": ("volume", (VOXELS % 4) / 2, None, r"values \[0.5, 1.5\], expected whole numbers"),
    "negative label": ("volume", -(VOXELS % 4), None, r"values \[-3.0, -2.0, -1.0\], expected whole"),
    "NaN in the label": ("volume", np.where(VOXELS > 500, np.nan, 1.0), None, "NaN or infinite"),
    "label of RGB": ("volume", np.stack([VOXELS % 4] * 3, 3), None, r"3 channel\(s\)"),
}


@contextmanager
def tells(what: str, message: str) -> Iterator[None]:
    """The block must end in an error that has a sentence, which is printed."""
    with pytest.raises(Exception) as caught:
        yield
    told = sentence(caught.value)
    assert told is not None, caught.getrepr()
    print(f"| {what} | {told} |")
    assert re.search(message, told, re.DOTALL), told


@pytest.mark.parametrize("what", IMAGES)
def test_a_bad_image(what, read, tmp_path):
    kind, make, message = IMAGES[what]
    file = make(tmp_path)
    with tells(what, f"{file.name}.*{message}|{message}"):
        read(kind, file)


@pytest.mark.parametrize("what", LABELS)
def test_a_bad_label(what, read, tmp_path):
    kind, data, affine, message = LABELS[what]
    image, label = nifti(tmp_path / "a.nii.gz", VOXELS), nifti(tmp_path / "a_gt.nii.gz", data, affine)
    with tells(what, f"a_gt.nii.gz.*{message}"):
        read(kind, image, label)


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
    "missing folder": ("inference", lambda d: {"dataset_dir": f"{d}/none"}, "none is no folder. Set dataset_dir"),
    "empty folder": ("inference", lambda d: {"dataset_dir": str(d)}, "No images in .*expected .nii.gz"),
    "missing folder to evaluate": ("evaluate", lambda d: {"dataset_dir": f"{d}/none"}, "none does not exist. Set"),
    "empty folder to train on": ("train", lambda d: {"dataset_dir": str(d)}, "No train cases in .*Expected"),
    "datalist that is no JSON": (
        "train",
        lambda d: {"layout": "datalist", "dataset_dir": str(text(d / "data.json"))},
        "Cannot read .*data.json as a datalist",
    ),
    "missing weights": ("inference", lambda d: {"ckpt_dir": str(d)}, "No weights at .*model.pt. Train them"),
    "weights that come with the bundle": (
        "inference",
        lambda d: {"ckpt_dir": str(text(d / "pretrained.pt").parent)},
        "No weights at .*model.pt. .* For .*pretrained.pt, build the release",
    ),
    "truncated weights": (
        "evaluate",
        lambda d: {"ckpt_dir": str(cut(Path(other_weights(d)) / "model.pt", 10000).parent)},
        "Cannot read weights from .*model.pt.*Fetch or save it again",
    ),
    "weights of another network": (
        "inference",
        lambda d: {"ckpt_dir": other_weights(d)},
        "model.pt are not those of this FIAS.*Build the network with",
    ),
    "nothing to resume": ("train", lambda d: {"resume": True}, "Nothing to resume: no .*last.ckpt. Train without"),
    "weights to start from missing": ("train", lambda d: {"start_from": f"{d}/a.pt"}, "No weights at .*a.pt to start"),
    "misspelt override": ("train", lambda d: {"epoch": 5}, "no value epoch. Is it epochs"),
    "unknown override": ("inference", lambda d: {"colour": 5}, "This bundle has no value colour"),
    "text for a number": ("train", lambda d: {"epochs": "ten"}, "epochs is a whole number such as 300, got 'ten'"),
    "fraction for a count": (
        "inference",
        lambda d: {"val_batch_size": 2.5},
        "val_batch_size is a whole number such as",
    ),
    "false as a text": ("inference", lambda d: {"overlay": "false"}, "overlay got the text 'false'.*True or False"),
    "text for a list": ("evaluate", lambda d: {"metrics": "iou"}, "metrics is a list such as"),
    "no share": ("train", lambda d: {"empty_weight": 2}, "empty_weight is a share from 0 to 1, got 2"),
    "too few pixels": ("train", lambda d: {"image_size": 16}, "at least 32 x 32 pixels, got 16 x 16"),
    "no address of a DilateFormer": ("train", lambda d: {"pretrained": True}, "no stable address to download from"),
    "a rate that spoils the weights": (
        "train",
        lambda d: {"learning_rate": 1e38},
        "After epoch 1 weights are not finite",
    ),
    "unknown layout": ("train", lambda d: {"layout": "synapse"}, "layout is one of 'acdc'.*got 'synapse'"),
    "negative seed": ("train", lambda d: {"seed": -1}, "seed is a whole number from 0 up"),
    "output folder that is a file": (
        "inference",
        lambda d: {"output_dir": str(text(d / "out"))},
        "Cannot write .*out.*Name a folder|Cannot write .*out.*Move it away",
    ),
}


@pytest.mark.parametrize("what", RUNS)
def test_a_bad_run(what, run_config, tmp_path):
    config, make, message = RUNS[what]
    (tmp_path / "d").mkdir()
    overrides = make(tmp_path / "d")
    with tells(f"{what} ({config})", message):
        run_config(config, **overrides)
    left = [p for p in (tmp_path / "root").rglob("*") if p.is_file()]
    assert not [p for p in left if p.name.startswith(".partial-") or p.suffix in (".gz", ".pt", ".ckpt", ".md")]


def test_values_are_checked_against_a_yaml_file_too(weights, tmp_path):
    content = ConfigParser.load_config_file(f"{ROOT}/bundles/fias_acdc/configs/inference.json")
    ConfigParser.export_config_file(content, f"{tmp_path}/inference.yaml", fmt="yaml")
    workflow = ConfigWorkflow(f"{tmp_path}/inference.yaml", workflow_type="infer", ckpt_dir=str(weights), imagesize=32)
    with tells("misspelt override of a YAML file", "no value imagesize. Is it image_size"):
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
        with tells(f"code in {name}", f"Cannot read weights from .*{name}"):
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
    with tells("no room for a checkpoint", "Cannot write .*model.pt: File too large.*ckpt_dir"), no_room(1_000_000):
        run_config("train", dataset_dir=two_cases(phantoms("acdc"), tmp_path), layout="datalist", batch_size=3)
    assert model.read_bytes() == b"the one before" and not list(model.parent.glob(".*"))


def test_no_room_for_results_stops_inference(run_config, phantoms, tmp_path):
    patient = phantoms("acdc") / "training" / "patient002"
    with tells("no room for the results", "Cannot write .*File too large.*output_dir"), no_room(100):
        run_config("inference", dataset_dir=str(patient))
    assert not [p for p in (tmp_path / "root").rglob("*") if p.is_file()]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_place_that_cannot_be_written_is_named(number, tmp_path):
    with tells(errno.errorcode[number], "Cannot write .*a.csv: .*, or write elsewhere by --bundle_root"):
        with whole_file(tmp_path / "a.csv"):
            raise OSError(number, "as the system says")
    assert not list(tmp_path.iterdir())


def test_phantoms_and_releases_tell_on_the_command_line(tmp_path):
    text(tmp_path / "file")
    commands = {
        ("bundles/phantoms.py", "acdc", f"{tmp_path}/file/acdc"): "Not a directory.*Choose another folder",
        ("bundles/phantoms.py", "acdc", f"{tmp_path}/a", "--size", "big"): "size must be a whole number of at least 64",
        (
            "bundles/release.py",
            "fias_acdc",
            "--weights",
            f"{tmp_path}/file",
        ): "Cannot read weights from .*Fetch or save",
    }
    for command, message in commands.items():
        result = run(*command, check=False)
        assert result.returncode == 1 and "Traceback" not in result.stdout
        assert re.search(message, result.stdout), result.stdout
        print(f"| {' '.join(command[:2])} | {result.stdout.strip()} |")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
