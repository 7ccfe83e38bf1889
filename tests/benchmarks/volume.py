"""Inference from file to file, by stage, beside the plain recipe and beside MONAI's SwinUNETR in the bundle's place.

    python tests/benchmarks/volume.py [--network FIAS] [--shape 512,512,150] [--only plain,bundle]

The transforms are those of ``fias_synapse``. ``bundle`` is how the bundles infer: ``LabelInferer``, channels last; in
fp32, and in bfloat16, the default on a GPU that has it; compiled on a GPU, in each engine on a CPU. ``plain`` is the
plain recipe: the volume resized, MONAI's ``SliceInferer`` slice by slice in fp32, all logits resized back, the greatest
class. ``differ`` is the share of voxels with another label than the first row's. Weights are random; their heads find
several classes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fire
import nibabel as nib
import numpy as np
import torch
from measure import NETWORKS, Prepared, chosen, peak_memory, table, wait
from monai.inferers import Inferer, SliceInferer
from monai.transforms import AsDiscreted, Compose, Invertd, Resized, SaveImaged, ScaleIntensityRanged
from torch import nn

from networks import DANIE, FIAS
from networks.data.geometry import SliceOrientationd
from networks.data.loading import LoadVolumed
from networks.engine.inferers import LabelInferer, has_bfloat16
from networks.results.label_maps import LabelMapWriter

SIDE, CLASSES, BATCH = 256, 9, 8
STAGES = ("read", "preprocess", "network", "postprocess", "write")

SEGMENT: dict[str, Callable[[], nn.Module]] = {
    "FIAS": lambda: FIAS(1, CLASSES),
    "DANIE-S": lambda: DANIE(1, CLASSES, size="small", img_size=SIDE),
    "DANIE-L": lambda: DANIE(1, CLASSES, img_size=SIDE),
}


def phantom(file: Path, shape: tuple[int, int, int]) -> None:
    """A CT of ellipsoids and noise."""
    rng = np.random.default_rng(0)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij", sparse=True)
    volume = np.full(shape, -1000, np.int16)
    volume[(x / 0.8) ** 2 + (y / 0.6) ** 2 + 0 * z < 1] = 40
    for centre in rng.uniform(-0.4, 0.4, (8, 3)):
        organ = sum(((axis - c) / r) ** 2 for axis, c, r in zip((x, y, z), centre, (0.2, 0.15, 0.4), strict=True)) < 1
        volume[organ] = rng.integers(-100, 250)
    volume += rng.integers(-20, 20, shape, dtype=np.int16)
    nib.save(nib.Nifti1Image(volume, np.diag([-0.8, -0.8, 2.0, 1.0])), file)


def infer(
    file: Path, folder: Path, network: nn.Module, inferer: Inferer, plain: bool
) -> tuple[list[float], np.ndarray]:
    """Seconds of each stage, and the label map."""
    device = next(network.parameters()).device
    read = LoadVolumed("image")
    steps = [SliceOrientationd("image"), ScaleIntensityRanged("image", -125, 275, 0, 1, clip=True)]
    if plain:
        steps.append(Resized("image", [SIDE, SIDE, -1], mode="trilinear"))
    prepare = Compose(steps)
    restore: list[Any] = [Invertd("pred", prepare, "image", nearest_interp=not plain)]
    if plain:
        restore.append(AsDiscreted("pred", argmax=True))
    save = SaveImaged(
        "pred", writer=LabelMapWriter, output_dir=folder, resample=False, output_dtype=np.uint8, print_log=False
    )
    clock = [wait(device)]
    case = read({"image": str(file)})
    clock.append(wait(device))
    case = prepare(case)
    clock.append(wait(device))
    with torch.inference_mode():
        case["pred"] = inferer(case["image"][None].to(device), network)[0]
    clock.append(wait(device))
    case = Compose(restore)(case)
    clock.append(wait(device))
    save(case)
    clock.append(wait(device))
    label = np.asarray(case["pred"].cpu())[0].astype(np.uint8)
    return [b - a for a, b in zip(clock, clock[1:], strict=False)], label


def main(
    network: str = "FIAS",
    shape: tuple[int, int, int] = (512, 512, 150),
    only: str | tuple[str, ...] = (),
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Print the table.

    Args:
        network: ``FIAS``, ``DANIE-S`` or ``DANIE-L``.
        shape: voxels of the CT.
        only: parts of the recipes' names. ``plain`` needs 20 bytes per voxel and class.
        device: where to run.
    """
    torch.manual_seed(0)
    net = SEGMENT[network]().to(device).eval()
    for conv in net.heads.convs:
        nn.init.normal_(conv.weight)
        nn.init.zeros_(conv.bias)
    size = (SIDE, SIDE)
    recipes: dict[str, tuple[Callable[[], nn.Module], Inferer]] = {  # each prepared after the one before it ran
        f"{network} plain": (lambda: net, SliceInferer(roi_size=size, sw_batch_size=1, spatial_dim=2)),
        f"{network} bundle fp32": (lambda: Prepared(net, "last"), LabelInferer(size, BATCH)),
        f"{network} bundle bfloat16": (lambda: Prepared(net, "last"), LabelInferer(size, BATCH, bfloat16=True)),
    }
    if not has_bfloat16(device):
        del recipes[f"{network} bundle bfloat16"]
    if device != "cpu":
        recipes[f"{network} bundle compiled"] = (lambda: Prepared(net, "compiled"), LabelInferer(size, BATCH))
    else:
        for setting in ("openvino", "openvino+bfloat16", "onnxruntime"):
            recipes[f"{network} bundle {setting}"] = (lambda s=setting: Prepared(net, s), LabelInferer(size, BATCH))
    if "SwinUNETR, 48 features" in NETWORKS:
        swin = NETWORKS["SwinUNETR, 48 features"](SIDE).to(device).eval()
        recipes["SwinUNETR LabelInferer fp32"] = (lambda: swin, LabelInferer(size, BATCH))
    parts = chosen(only)
    recipes = {name: recipe for name, recipe in recipes.items() if not parts or any(part in name for part in parts)}
    rows, first, base = [], None, 0.0
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ct.nii.gz"
        phantom(file, shape)
        for name, (build, inferer) in recipes.items():
            built = build()
            found: list[Any] = []
            arguments = (file, Path(folder), built, inferer, name.endswith("plain"))
            with torch.inference_mode():
                built(torch.rand(1, 1, SIDE, SIDE, device=device))  # warms up
            peak = peak_memory(lambda a=arguments, f=found: f.extend(infer(*a)), torch.device(device))
            times, label = found
            first, base = (label, sum(times)) if first is None else (first, base)
            differ = "" if name.startswith("Swin") else f"{100 * np.mean(label != first):.4f} %"
            cells = [f"{t:.1f}" for t in (*times, sum(times))]
            rest = f"{100 * (1 - times[2] / sum(times)):.0f} %"
            rows.append([name, *cells, rest, f"{base / sum(times):.2f}", f"{peak / 1e9:.2f}", differ])
    threads = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
    print(f"\n{' x '.join(map(str, shape))}, {CLASSES} classes, {threads}, torch {torch.__version__}; seconds\n")
    print(table(["recipe", *STAGES, "total", "not network", "faster", "peak, GB", "differ"], rows))


if __name__ == "__main__":
    fire.Fire(main)
