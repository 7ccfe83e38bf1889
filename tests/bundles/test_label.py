"""Released bundles in a real MONAI Label server, started on loopback: listed, inferring, training, scoring.

Needs an environment of its own: pip install "monailabel==0.8.5" "pydicom<3" "pynetdicom<3" and this project's packages.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import requests
import torch
from conftest import ROOT, run, save_random
from servers import monai_label

from networks import DANIE, FIAS

pytestmark = [
    pytest.mark.label,
    pytest.mark.skipif(importlib.util.find_spec("monailabel") is None, reason="MONAI Label is not installed"),
]

NETWORKS = {
    "fias_synapse": lambda: FIAS(1, 9),
    "fias_acdc": lambda: FIAS(1, 4),
    "danie_synapse": lambda: DANIE(1, 9, size="small"),
    "danie_acdc": lambda: DANIE(1, 4, size="small"),
}
IMAGES = ("plain", "permuted", "oblique")
LATER, VERSION = "danie_acdc", "99.0.0"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Four released bundles with random weights; of one a later version, whose code turns the classes round."""
    dist, models = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("app") / "model"
    for name, build in NETWORKS.items():
        torch.manual_seed(0)
        save_random(build(), dist / "model.pt")
        baked = "{'image_size': 64, 'num_workers': 0, 'size': 'small'}"
        baked = baked if "danie" in name else baked.replace(", 'size': 'small'", "")
        command = ["bundles/release.py", name, "--output_dir", dist, "--weights", dist / "model.pt", "--set", baked]
        run(*map(str, command))
        (file,) = dist.glob(f"{name}_v*.zip")
        with zipfile.ZipFile(file) as archive:
            archive.extractall(models)
    (code,) = (models / LATER).glob("*/networks/layers.py")
    edit(code, "return total", "return -total")
    file = models / LATER / "configs" / "metadata.json"
    metadata = json.loads(file.read_text())
    assert metadata["version"] != VERSION
    file.write_text(json.dumps({**metadata, "version": VERSION}))
    return models


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text, f"{file} has no {old!r}"
    file.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def studies(phantoms, tmp_path_factory) -> Path:
    """One CT three times: as it is, with axes permuted and flipped, and rotated; and another CT."""
    folder = tmp_path_factory.mktemp("studies")
    image, other = (nib.load(next(phantoms("btcv").rglob(f"img000{i}.nii.gz"))) for i in (1, 2))
    nib.save(other, folder / "other.nii.gz")
    nib.save(image, folder / "plain.nii.gz")
    nib.save(image.as_reoriented(np.array([[2, -1], [0, 1], [1, -1]])), folder / "permuted.nii.gz")
    tilt = nib.affines.from_matvec([[0.96, 0.28, 0], [-0.28, 0.96, 0], [0, 0, 1]])
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), tilt @ image.affine), folder / "oblique.nii.gz")
    return folder


@pytest.fixture(scope="module")
def alone(models, studies, tmp_path_factory) -> Path:
    """Label maps that the bundle runner makes of the same images with each bundle alone."""
    output = tmp_path_factory.mktemp("alone")
    for name in NETWORKS:
        run_alone(models / name, studies, output / name)
    return output


def run_alone(bundle: Path, studies: Path, output: Path) -> None:
    options = {"dataset_dir": studies, "output_dir": output, "device": "cpu"}
    arguments = [f"--{key}={value}" for key, value in options.items()]
    command = ["-m", "monai.bundle", "run", "inferring", "--config_file", "configs/inference.json", *arguments]
    run(*command, cwd=bundle, path="")


@pytest.fixture(scope="module")
def server(models, studies, alone) -> Iterator[str]:
    """The server's address."""
    conf = {"epistemic_model": ",".join(NETWORKS), "epistemic_simulation_size": "2"}
    with monai_label(models, studies, conf=conf) as address:
        yield address


def ask(method: str, url: str, **options) -> requests.Response:
    answer = requests.request(method, url, **options)
    print(f"{method} {re.sub('.*:[0-9]+', '', url)} {options.get('json', '')}: {answer.status_code}")
    assert answer.ok, answer.text
    return answer


def infer(server: str, name: str, image: str, folder: Path) -> nib.Nifti1Image:
    answer = ask("POST", f"{server}/infer/{name}?image={image}&output=image", data={"params": '{"device": "cpu"}'})
    file = folder / f"{image}.nii.gz"
    file.write_bytes(answer.content)
    return nib.load(file)


def test_all_volume_bundles_are_listed_with_version_and_labels(server):
    known = ask("GET", f"{server}/info/").json()["models"]
    for name in NETWORKS:
        own = json.loads((ROOT / "bundles" / name / "configs" / "metadata.json").read_text())["version"]
        assert known[name]["version"] == (VERSION if name == LATER else own)
        labels = known[name]["labels"]
        if name.endswith("acdc"):
            assert labels == {"right ventricle": 1, "myocardium": 2, "left ventricle": 3}
        else:
            assert len(labels) == 8 and labels["aorta"] == 1


def test_the_later_version_s_code_answers_otherwise(models, studies, alone, tmp_path):
    """Else the next test would not tell whose code the server runs."""
    released = shutil.copytree(models / LATER, tmp_path / LATER)
    (code,) = released.glob("*/networks/layers.py")
    edit(code, "return -total", "return total")
    images = tmp_path / "images"  # without what the server keeps beside them
    images.mkdir()
    for image in IMAGES:
        shutil.copy(studies / f"{image}.nii.gz", images)
    run_alone(released, images, tmp_path / "output")
    for image in IMAGES:
        folders = (alone / LATER, tmp_path / "output")
        later, own = (np.asarray(nib.load(folder / f"{image}_seg.nii.gz").dataobj) for folder in folders)
        found = (later > 0) | (own > 0)  # outside of the field of view both are background
        assert np.mean(later[found] == own[found]) < 0.5


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("image", IMAGES)
def test_inference_gives_the_bundle_s_own_answer_on_the_image_s_grid(server, studies, alone, tmp_path, name, image):
    source = nib.load(studies / f"{image}.nii.gz")
    label = infer(server, name, image, tmp_path)
    assert label.shape == source.shape
    np.testing.assert_allclose(label.affine, source.affine, atol=1e-4)
    own = np.asarray(nib.load(alone / name / f"{image}_seg.nii.gz").dataobj)
    assert len(np.unique(own)) > 1
    assert np.mean(np.asarray(label.dataobj) == own) > 0.9999


def test_training_and_scoring(server, models, studies, tmp_path):
    app = models.parent / "monaibundle" / "model"
    for name in NETWORKS:
        label = infer(server, name, "plain", tmp_path)
        for image in ("plain", "oblique"):
            source = nib.load(studies / f"{image}.nii.gz")
            nib.save(nib.Nifti1Image(np.asarray(label.dataobj).astype(np.uint8), source.affine), tmp_path / "l.nii.gz")
            with (tmp_path / "l.nii.gz").open("rb") as file:
                ask("PUT", f"{server}/datastore/label?image={image}&tag=final", files={"label": file})
        before = torch.load(app / name / "models" / "model.pt", weights_only=True)
        request = {"device": "cpu", "max_epochs": 1, "val_split": 0.5}
        ask("POST", f"{server}/train/{name}?run_sync=true", json=request)
        after = torch.load(app / name / "models" / "model.pt", weights_only=True)
        assert before.keys() == after.keys()
        steps = torch.cat([(after[k] - before[k]).abs().flatten() for k in before if k.startswith("heads.")])
        assert 0 < steps.max() < 0.01  # trained, and from the served weights: random_heads' are of the order of 1
    for name, build in NETWORKS.items():
        config = ask("GET", f"{server}/info/").json()["trainers"][name]["config"]
        assert config["model_filename"] == ["model.pt", "pretrained.pt"]  # not the training state; the last first
        first, second = (score(server, name, app / name / "models" / "model.pt") for _ in range(2))
        classes = build().heads.convs[0].out_channels
        for entropy in first + second:  # of probabilities: of label maps it would be a finite number too
            assert 0 < entropy <= math.log(classes)
        assert not set(first) & set(second)  # dropout draws anew


def score(server: str, name: str, model: Path) -> list[float]:
    """The scores of the two images without labels, by weights that the server takes for new ones."""
    ts = int(model.stat().st_mtime) + 1
    os.utime(model, (ts, ts))
    request = {"device": "cpu"}  # by two threads, as is MONAI Label's default
    summary = ask("POST", f"{server}/scoring/{name}?run_sync=true", json=request).json()
    assert (summary["total"], summary["skipped"], summary["executed"]) == (2, 0, 2)
    found = []
    for image in ("permuted", "other"):
        info = ask("GET", f"{server}/datastore/image/info?image={image}").json()
        print(name, image, json.dumps(info))
        assert info["epistemic_ts"] == ts  # this bundle's score, not an earlier one's
        found.append(info["epistemic_entropy"])
    return found
