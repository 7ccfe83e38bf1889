"""The volume bundles under MONAI Deploy's rule: its operator loads and saves the image itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
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
            case["pred"] = inferer(case["image"][None], network)[0]
        return np.asarray(left(finish, "SaveImage")(case)["pred"])

    held = LoadImage(image_only=True)(file)
    held = MetaTensor(held.as_tensor().to(torch.int16), held.affine, {"original_channel_dim": "no_channel"})
    kept = left(prepare, "LoadImage")
    assert any(isinstance(transform, LoadVolumed) for transform in kept.transforms)  # it adds the channel's axis
    found, expected = segment(kept, held), segment(prepare, str(file))
    assert len(np.unique(expected)) > 1 and np.mean(found == expected) > 0.999
    assert not list(Path(tmp_path).rglob("*_seg*"))
