"""What only a GPU shows: its precisions, memory format and compiler, training on it, and the labels that a CPU gives.

    python -m pytest -m gpu tests/bundles/test_gpu.py

``--device cpu`` rehearses the same code where there is none: what it then compares is equal by nature.
"""

from __future__ import annotations

import copy
import csv
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT
from monai.bundle import ConfigWorkflow
from monai.utils import first
from torch import Tensor, nn

from networks import DANIE, FIAS
from networks.engine.inferers import AutocastInferer, LabelInferer, has_bfloat16

pytestmark = pytest.mark.gpu
CONFIGS = ROOT / "bundles" / "fias_acdc" / "configs"
SIZE = 64
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "FIAS": lambda: FIAS(1, 4, deep_supervision=False),
    "DANIE-S": lambda: DANIE(1, 4, size="small", img_size=SIZE),
}


@pytest.fixture(scope="module")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("device"))


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """fp32 is that, and not the TF32 of 11 bits that a GPU's convolutions take for it by default."""
    libraries = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [library.allow_tf32 for library in libraries]
    for library in libraries:
        library.allow_tf32 = False
    yield
    for library, allowed in zip(libraries, before, strict=True):
        library.allow_tf32 = allowed


def blocks(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy images of blocks, whose class is their intensity."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(4, (count, 1, 4, 4), generator=generator).repeat_interleave(16, 2).repeat_interleave(16, 3)
    return label / 3 + 0.05 * torch.randn(label.shape, generator=generator), label


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest, device: torch.device) -> nn.Module:
    """Each network, on the CPU, that has learnt the blocks: of a random one, rounding turns labels in any precision."""
    torch.manual_seed(0)
    net = NETWORKS[request.param]().to(device).train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.5  # its statistics are those of the last of so few steps
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, fused=True)
    for step in range(30):
        image, label = blocks(4, step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(image.to(device)), label[:, 0].to(device)).backward()
        optimizer.step()
    return net.cpu().eval()


# The compiler takes minutes: its tests come last, one with --slow alone.
compiled = pytest.mark.parametrize("name", ["FIAS", pytest.param("DANIE-S", marks=pytest.mark.slow)])


def start(names: list[str], root: Path, data: Path, device: torch.device, **overrides: Any) -> ConfigWorkflow:
    """A bundle's run in this process, ready to start."""
    options = {"bundle_root": str(root), "dataset_dir": str(data), "device": str(device), "image_size": SIZE}
    workflow = ConfigWorkflow([str(CONFIGS / f"{name}.json") for name in names], **{**options, **overrides})
    workflow.initialize()
    return workflow


def train(root: Path, data: Path, device: torch.device, epochs: int, resume: bool = False) -> dict[str, Any]:
    """Train in half precision, and what ``last.ckpt`` holds then."""
    options = {"epochs": epochs, "resume": resume, "amp": True, "batch_size": 8, "num_workers": 1}
    start(["train", "paper"], root, data, device, **options).run()  # whose rate knows nothing of the end
    return torch.load(root / "models" / "last.ckpt", weights_only=True)


def flat(state: dict[str, Any]) -> Tensor:
    return torch.cat([tensor.flatten().cpu() for tensor in state["network"].values() if tensor.is_floating_point()])


def losses(root: Path) -> list[float]:
    with (root / "eval" / "history.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("setting", ["contiguous", "channels last"])
def test_logits_are_those_of_a_cpu(network, device, setting):
    image, _ = blocks(3, 99)
    net = copy.deepcopy(network).to(device)
    if setting != "contiguous":
        net.to(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(net(image.to(device)).cpu(), network(image), atol=1e-3, rtol=1e-3)


def test_bfloat16_gives_the_labels_of_fp32(network, device):
    """By default on a GPU that has it; at most 0.5 % differ."""
    if device.type == "cuda" and not has_bfloat16(device):
        pytest.skip("this GPU has no bfloat16")
    image = blocks(6, 99)[0].to(device)
    net, volume = copy.deepcopy(network).to(device), image.movedim(0, -1)[None]
    chosen = None if device.type == "cuda" else True
    with torch.no_grad():
        full, half = (LabelInferer((SIZE, SIZE), bfloat16=b)(volume, net) for b in (False, chosen))
        maps, rounded = (AutocastInferer(bfloat16=b)(image, net) for b in (False, True))
    assert len(full.unique()) == 4
    assert (full != half).float().mean() <= 0.005
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, maps)
    assert (rounded.argmax(1) != maps.argmax(1)).float().mean() <= 0.005


def test_batches_wait_in_pinned_memory(device, phantoms, tmp_path):
    workflow = start(["train"], tmp_path, phantoms("acdc"), device, num_workers=1)
    loader = workflow.parser.get_parsed_content("train#dataloader")
    pinned = [first(loader)[key].is_pinned() for key in ("image", "label")]
    assert pinned == [loader.pin_memory] * 2 == [device.type == "cuda"] * 2


@pytest.fixture(scope="module")
def broken_off(phantoms, device, tmp_path_factory) -> dict[str, Any]:
    """The state after one epoch, after a second that resumed there, and after two unbroken; and their folders."""
    roots = {name: tmp_path_factory.mktemp(name) for name in ("resumed", "whole")}
    data = phantoms("acdc")
    found: dict[str, Any] = {"one": train(roots["resumed"], data, device, 1)}
    found["resumed"] = train(roots["resumed"], data, device, 2, resume=True)
    found["whole"] = train(roots["whole"], data, device, 2)
    for root in roots.values():
        shutil.rmtree(root / "models")  # 600 MB
    return {**found, "roots": roots}


def test_a_resumed_training_in_half_precision_ends_as_an_unbroken_one(broken_off):
    """To 3 % of the way that the second epoch takes the weights, and 1 % of the loss.

    Rounding of every gradient to 1 %, tried on a CPU, makes 0.6 % and 0.01 %; a resumption that loses the optimiser's
    state 15 % and 3 %, one that draws other batches 15 % and 0.4 %.
    """
    one, resumed, whole = (flat(broken_off[name]) for name in ("one", "resumed", "whole"))
    assert (resumed - whole).norm() <= 0.03 * (whole - one).norm()
    again, unbroken = (losses(broken_off["roots"][name]) for name in ("resumed", "whole"))
    assert len(again) == 2 and again == pytest.approx(unbroken, rel=0.01)


def test_a_resumed_training_takes_up_the_gradient_scaler(broken_off, device):
    if device.type == "cpu":
        pytest.skip("gradients are not scaled on a CPU")
    one, resumed, whole = (broken_off[name]["scaler"] for name in ("one", "resumed", "whole"))
    assert one != torch.amp.GradScaler("cuda").state_dict(), "nothing to take up"
    assert resumed == whole


def test_the_recommended_recipe_trains_in_bfloat16(device, phantoms, tmp_path):
    workflow = start(["train"], tmp_path, phantoms("acdc"), device, epochs=1, amp=True, num_workers=1)
    seen = set()
    network = workflow.parser.get_parsed_content("network")
    convs = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    convs[0].register_forward_hook(lambda module, _, y: seen.add(y.dtype) if module.training else None)
    workflow.run()
    assert seen == {torch.bfloat16 if device.type == "cuda" else torch.float32}  # a CPU knows no amp
    state = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    assert all(tensor.isfinite().all() and tensor.device.type == "cpu" for tensor in state.values())
    assert 0 < losses(tmp_path)[0] < 20


def test_inference_writes_the_label_maps_of_a_cpu(device, phantoms, weights, tmp_path):
    """All of a run, in fp32: at least 99.9 % of the voxels."""
    maps = {}
    for place in (device, torch.device("cpu")):
        options = {"ckpt_dir": str(weights), "output_dir": str(tmp_path / place.type)}
        start(["inference"], tmp_path, phantoms("acdc"), place, bfloat16=False, **options).run()
        files = sorted((tmp_path / place.type).rglob("*_seg.nii.gz"))
        maps[place.type] = np.concatenate([np.asarray(nib.load(file).dataobj).ravel() for file in files])
    assert len(np.unique(maps["cpu"])) > 1
    assert np.mean(maps[device.type] == maps["cpu"]) >= 0.999


@compiled
def test_compiled_logits_are_the_same(name, device):
    torch._dynamo.reset()
    torch.manual_seed(0)
    net, image = NETWORKS[name]().to(device).eval(), blocks(3, 99)[0].to(device)
    with torch.no_grad():
        expected = net(image)
        net.compile()
        torch.testing.assert_close(net(image), expected, atol=1e-3, rtol=1e-3)


@compiled
def test_a_compiled_network_trains(name, device):
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = NETWORKS[name]().to(device).train()
    net.compile()
    image, label = blocks(4, 99)
    loss = nn.functional.cross_entropy(net(image.to(device)), label[:, 0].to(device))
    loss.backward()
    torch.optim.Adam(net.parameters()).step()
    assert 0 < loss.item() < 20
    assert all(parameter.isfinite().all() for parameter in net.parameters())
