"""Releases: built, downloaded, and run without this repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import run

from networks import FIAS


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Random weights of FIAS in half precision."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in FIAS(1, 4).state_dict().items()}, file)
    return file


@pytest.fixture(scope="module")
def dist(weights, tmp_path_factory) -> Path:
    """A folder with the release of fias_acdc."""
    folder = tmp_path_factory.mktemp("dist")
    url = "https://example.org/releases"
    run("bundles/release.py", "fias_acdc", "--output_dir", str(folder), "--weights", str(weights), "--url", url)
    return folder


def test_a_release_holds_what_it_needs_and_nothing_else(dist):
    with zipfile.ZipFile(dist / "fias_acdc_v0.1.0.zip") as archive:
        names = archive.namelist()
        configs = [archive.read(n).decode() for n in names if n.endswith(".json")]
    assert all(n.startswith("fias_acdc/") for n in names) and names == sorted(names)
    assert {"fias_acdc/LICENSE", "fias_acdc/models/model.pt", "fias_acdc/docs/README.md"} < set(names)
    assert "fias_acdc/scripts/networks/fias.py" in names and not any("__pycache__" in n for n in names)
    assert not any('"networks.' in c or '"$import networks"' in c for c in configs)
    info = json.loads((dist / "model_info.json").read_text())
    assert info["fias_acdc_v0.1.0"]["source"] == "https://example.org/releases/fias_acdc_v0.1.0.zip"


def test_the_same_input_gives_the_same_bytes(dist, weights, tmp_path):
    run("bundles/release.py", "fias_acdc", "--output_dir", str(tmp_path), "--weights", str(weights))
    assert (tmp_path / "fias_acdc_v0.1.0.zip").read_bytes() == (dist / "fias_acdc_v0.1.0.zip").read_bytes()


def test_a_download_runs_without_this_repository(dist, phantoms, tmp_path):
    """Download from a server, inference and load in its own folder; importing the repository's package would fail."""
    poison = tmp_path / "poison" / "networks"
    poison.mkdir(parents=True)
    (poison / "__init__.py").write_text("raise ImportError('the repository is not there')")
    environment = {**os.environ, "PYTHONPATH": str(poison.parent), "CUDA_VISIBLE_DEVICES": ""}

    def alone(*command: str, cwd: Path) -> str:
        options = {"cwd": cwd, "env": environment, "text": True, "stderr": subprocess.STDOUT}
        return subprocess.check_output([sys.executable, *command], **options)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(dist)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/fias_acdc_v0.1.0.zip"
    download = ["download", "--name", "fias_acdc", "--url", url, "--bundle_dir", str(tmp_path)]
    alone("-m", "monai.bundle", *download, cwd=tmp_path)
    server.shutdown()
    bundle = tmp_path / "fias_acdc"
    data = phantoms("acdc") / "training" / "patient002"
    files = ["--config_file", "configs/inference.json", "--dataset_dir", str(data), "--image_size", "64"]
    alone("-m", "monai.bundle", "run", "inferring", *files, cwd=bundle)
    for label in (maps := sorted((bundle / "eval").glob("*_seg.nii.gz"))):
        image = nib.load(data / label.name.replace("_seg", ""))
        assert nib.load(label).shape == image.shape and np.array_equal(nib.load(label).affine, image.affine)
    assert len(maps) == 2
    code = "import monai.bundle as b; print(type(b.load('fias_acdc', bundle_dir='..')))"
    assert "scripts.networks.fias.FIAS" in alone("-c", code, cwd=bundle)


def test_an_override_is_baked_in_under_another_name(tmp_path):
    command = ["bundles/release.py", "danie_glas", "--output_dir", str(tmp_path), "--name", "danie_s_glas"]
    run(*command, "--set", "{'size': 'small', 'batch_size': 4}")
    with zipfile.ZipFile(tmp_path / "danie_s_glas_v0.1.0.zip") as archive:
        train, inference = (json.loads(archive.read(f"danie_s_glas/configs/{n}.json")) for n in ("train", "inference"))
    assert train["size"] == inference["size"] == "small" and train["batch_size"] == 4
    assert train["name"] == inference["name"] == "danie_s_glas"


def test_what_must_not_be_released_is_refused(weights, tmp_path):
    def refused(*options: str) -> str:
        result = run("bundles/release.py", *options, "--output_dir", str(tmp_path), check=False)
        assert result.returncode == 1 and not list(tmp_path.glob("*.zip"))
        return result.stdout

    assert "No bundle in" in refused("none_acdc")
    assert "MONAI takes what follows '_v' for the version" in refused("fias_acdc", "--name", "fias_vessel")
    assert "has the value colour" in refused("fias_acdc", "--set", "{'colour': 1}")
    other = ["danie_acdc", "--set", "{'size': 'small'}", "--weights", str(weights)]
    assert "are not those of this DANIE" in refused(*other)
