"""The volume bundles under MONAI Deploy's rule: its operator loads and saves the image itself; and in its real SDK.

pip install ".[test]" "monai-deploy-app-sdk==4.0.0"
python -m pytest -m deploy tests/bundles/test_deploy.py
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run, succeeded, write_phase
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose, LoadImage

from networks.data import LoadVolumed

BUNDLES = [f"{network}_{data}" for network in ("fias", "danie") for data in ("synapse", "acdc")]


def left(transforms: Compose, name: str) -> Compose:
    """What ``MonaiBundleInferenceOperator`` keeps: all but those with ``LoadImage`` or ``SaveImage`` in their names."""
    return Compose([t for t in transforms.transforms if name not in type(t).__name__])


@pytest.mark.parametrize("name", BUNDLES)
def test_an_image_handed_over_in_memory_gives_the_label_map_of_its_file(name, phantoms, tmp_path):
    data = phantoms({"synapse": "btcv", "acdc": "acdc"}[name.split("_")[1]])
    file = next(path for path in sorted(data.rglob("*.nii.gz")) if "gt" not in path.name and "label" not in path.name)
    parser = ConfigParser()
    parser.read_config(ROOT / "bundles" / name / "configs" / "inference.json")
    parser.update({"image_size": 32, "bfloat16": False, "output_dir": str(tmp_path), "ckpt_dir": str(tmp_path)})
    prepare, finish = (parser.get_parsed_content(f"{part}processing") for part in ("pre", "post"))
    torch.manual_seed(0)
    network, inferer = torch.nn.Conv2d(1, 4, 5, padding=2).eval(), parser.get_parsed_content("inferer")

    def segment(prepare: Compose, image: object) -> np.ndarray:
        case = prepare({"image": image})
        with torch.no_grad():
            others = {name: value[None] for name, value in case.items() if name != "image" and torch.is_tensor(value)}
            case["pred"] = inferer(case["image"][None], network, **others)[0]
        return np.asarray(left(finish, "SaveImage")(case)["pred"])

    held = LoadImage(image_only=True)(file)
    held = MetaTensor(held.as_tensor().to(torch.int16), held.affine, {"original_channel_dim": "no_channel"})
    kept = left(prepare, "LoadImage")
    assert any(isinstance(transform, LoadVolumed) for transform in kept.transforms)  # it adds the channel's axis
    found, expected = segment(kept, held), segment(prepare, str(file))
    assert len(np.unique(expected)) > 1 and np.mean(found == expected) > 0.999
    assert not list(Path(tmp_path).rglob("*_seg*"))


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """The release of fias_acdc with the weights that it comes with; beside it lies a phantom's series, ``series``."""
    root = tmp_path_factory.mktemp("deploy")
    (root / "schema.json").write_text('{"type": "object"}')  # the model zoo's is elsewhere
    weights = ROOT / "bundles" / "fias_acdc" / "models" / "pretrained.pt"
    options = {"output_dir": root, "weights": weights, "schema": root / "schema.json"}
    run("bundles/release.py", "fias_acdc", *(f"--{key}={value}" for key, value in options.items()))
    with zipfile.ZipFile(next(root.glob("*.zip"))) as archive:
        archive.extractall(root)
    size = ["--size", "96", "--slices", "3", "--frames", "6"]
    run("bundles/phantoms.py", "acdc", str(root / "phantoms"), "--cine", "True", *size)
    write_phase(next((root / "phantoms" / "dicom" / "patient003").glob("*_sax")), root / "series", 0)
    return root / "fias_acdc"


@pytest.mark.deploy
@pytest.mark.skipif(
    importlib.util.find_spec("monai.deploy") is None or importlib.util.find_spec("highdicom") is None,
    reason="MONAI Deploy's SDK is not installed: pip install monai-deploy-app-sdk==4.0.0 highdicom",
)
@pytest.mark.parametrize("model", ["folder", "model.ts"])
def test_the_real_sdk_writes_the_segmentation_that_the_bundle_writes(model, released, tmp_path):
    import highdicom as hd

    series, out = released.parent / "series", tmp_path / "out"
    out.mkdir()
    app, environment = [ROOT / "tests" / "bundles" / "deploy_app.py", "-i", series, "-o", out], {
        "CUDA_VISIBLE_DEVICES": ""
    }
    if model == "folder":
        app.append(released)
    else:
        files = ["--ckpt_file", "models/model.pt", "--meta_file", "configs/metadata.json"]
        export = ["-m", "monai.bundle", "ckpt_export", "network_def", "--filepath", "models/model.ts", *files]
        run(*export, "--config_file", "configs/inference.json", cwd=released, path="")
        app += ["-m", released / "models" / "model.ts"]
        environment["PYTHONPATH"] = str(released)  # the file has configs, but no code
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "errors": "replace"}
    env = {**os.environ, **environment}
    result = subprocess.run([sys.executable, *map(str, app)], cwd=tmp_path, env=env, timeout=600, **pipes)
    print(succeeded(result).stdout[-3000:])
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == [written := next(out.glob("*.dcm"))]
    options = {"dataset_dir": series, "output_dir": tmp_path / "own", "device": "cpu", "dicom_seg": True}
    command = ["-m", "monai.bundle", "run", "inferring", "--config_file", "configs/inference.json"]
    run(*command, *(f"--{key}={value}" for key, value in options.items()), cwd=released, path="")
    found, expected = (
        hd.seg.segread(file).get_volume(combine_segments=True, allow_missing_positions=True)
        for file in (written, tmp_path / "own" / "series_seg.dcm")
    )
    assert found.geometry_equal(expected, tol=1e-3) and np.unique(expected.array).tolist() == [0, 1, 2, 3]
    agree = [np.mean(found.array[expected.array == n] == n) for n in range(4)]
    print(f"{model}: voxels of each class that agree: {agree}")
    assert min(agree) > 0.999
