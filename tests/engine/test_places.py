"""The bundle that lies there is the bundle that runs: its folder found from anywhere, its shipped weights used."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT
from monai.bundle import ConfigWorkflow

from networks import DataError
from networks.engine import bundle_root, weights_in

CONFIG = f"{ROOT}/bundles/fias_acdc/configs/inference.json"


def bundle(folder: Path, name: str) -> Path:
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "train.json").write_text(json.dumps({"name": name}))
    return folder


def test_a_bundle_is_found_in_the_current_folder_below_it_and_beside_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(bundle_root("fias_acdc")) == ROOT / "bundles" / "fias_acdc"
    assert bundle_root("none_acdc") == "."
    bundle(tmp_path / "bundles" / "fias_acdc", "fias_acdc")
    assert bundle_root("fias_acdc") == os.path.join("bundles", "fias_acdc")
    bundle(tmp_path / "own", "fias_acdc")
    monkeypatch.chdir(tmp_path / "own")
    assert bundle_root("fias_acdc") == "."
    assert Path(bundle_root("danie_acdc")) == ROOT / "bundles" / "danie_acdc"  # another bundle's folder is not its own


def test_the_last_training_s_weights_are_used_else_the_shipped_ones(tmp_path):
    assert weights_in(tmp_path) == str(tmp_path / "model.pt")
    (tmp_path / "pretrained.json").touch()
    with pytest.raises(DataError, match="pretrained.pt"):
        weights_in(tmp_path)
    (tmp_path / "pretrained.pt").touch()
    assert weights_in(tmp_path) == str(tmp_path / "pretrained.pt")
    (tmp_path / "model.pt").touch()
    assert weights_in(tmp_path) == str(tmp_path / "model.pt")


def test_the_config_that_runs_says_where_its_bundle_lies(tmp_path, monkeypatch):
    copy = shutil.copytree(Path(CONFIG).parent, tmp_path / "copy" / "configs").parent
    monkeypatch.chdir(tmp_path)
    workflow = ConfigWorkflow("copy/configs/inference.json", workflow_type="infer", initialize="$@weights")
    workflow.initialize()
    assert Path(workflow.parser.get_parsed_content("weights")).resolve() == copy / "models" / "model.pt"


@pytest.fixture
def without_training(tmp_path) -> str:
    """A ckpt_dir with the shipped weights alone, whatever a training left in the tree."""
    for file in ("pretrained.pt", "pretrained.json"):
        (tmp_path / file).symlink_to(ROOT / "bundles" / "fias_acdc" / "models" / file)
    return str(tmp_path)


def test_shipped_weights_segment_from_any_folder_with_no_value_repeated(
    phantoms, without_training, tmp_path, monkeypatch
):
    image = phantoms("acdc") / "training" / "patient002" / "patient002_frame01.nii.gz"
    monkeypatch.chdir(tmp_path)
    options = {"dataset_dir": str(image), "output_dir": str(tmp_path / "out"), "device": "cpu"}
    workflow = ConfigWorkflow(CONFIG, workflow_type="infer", ckpt_dir=without_training, **options)
    workflow.initialize()
    workflow.run()
    label = nib.load(tmp_path / "out" / "patient002_frame01_seg.nii.gz")
    assert np.array_equal(label.affine, nib.load(image).affine) and len(np.unique(label.dataobj)) == 4
    record = json.loads((tmp_path / "out" / "inferring.json").read_text())
    assert record["image_size"] == 256 and record["field_of_view"] == 224
    assert record["intensity"] == "percentiles 0.5 99.5" and record["weights"].endswith("pretrained.pt")


def test_a_value_that_contradicts_the_shipped_weights_is_refused(without_training, tmp_path):
    options = {"dataset_dir": str(tmp_path), "output_dir": str(tmp_path / "out"), "device": "cpu"}
    workflow = ConfigWorkflow(CONFIG, workflow_type="infer", ckpt_dir=without_training, image_size=128, **options)
    with pytest.raises(RuntimeError) as error:
        workflow.initialize()
    assert "pretrained.pt" in str(error.value.__cause__) and "--image_size 256" in str(error.value.__cause__)


def test_load_gives_the_network_with_its_weights_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = {"bundle_dir": str(ROOT / "bundles"), "model_file": "models/pretrained.pt"}
    network = monai.bundle.load("fias_acdc", **place, workflow_type="inference", device="cpu")
    shipped = torch.load(ROOT / "bundles" / "fias_acdc" / "models" / "pretrained.pt", weights_only=True)
    name = next(iter(shipped))
    assert torch.equal(network.state_dict()[name], shipped[name].float())
