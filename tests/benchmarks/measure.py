"""What the benchmarks share: networks to compare, clocks that wait for the device, memory, Markdown."""

from __future__ import annotations

import copy
import ctypes
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from monai.networks.nets import UNETR, AttentionUnet, DynUNet, SwinUNETR, UNet
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))

from networks import DANIE, FIAS  # noqa: E402
from networks.engine.engines import ENGINES, in_engine  # noqa: E402

__all__ = ["NETWORKS", "Prepared", "chosen", "kept_for_backward", "macs", "matrix_rate", "peak_memory", "table", "wait"]

try:
    import einops  # noqa: F401  (of MONAI's transformers)
except ImportError:
    einops = None
try:
    from segmentation_models_pytorch import UnetPlusPlus
except ImportError:
    UnetPlusPlus = None

PLAN = (32, 64, 128, 256, 512, 512, 512)  # nnU-Net's features for slices of 256 x 256

NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "MONAI UNet": lambda side: UNet(2, 1, 4, (32, 64, 128, 256, 512), (2, 2, 2, 2), num_res_units=2),
    "FIAS": lambda side: FIAS(1, 4, deep_supervision=False),
    "DANIE-S": lambda side: DANIE(1, 4, size="small", img_size=side),
    "DANIE-L": lambda side: DANIE(1, 4, size="large", img_size=side),
    "AttentionUnet": lambda side: AttentionUnet(2, 1, 4, (32, 64, 128, 256, 512), (2, 2, 2, 2)),
    "DynUNet, nnU-Net's 2D plan": lambda side: DynUNet(
        2, 1, 4, [3] * 7, [1] + [2] * 6, [2] * 6, PLAN, norm_name="instance"
    ),
}
if einops is not None:
    NETWORKS["UNETR"] = lambda side: UNETR(1, 4, (side, side), spatial_dims=2)
    NETWORKS["SwinUNETR, 48 features"] = lambda side: SwinUNETR(1, 4, feature_size=48, spatial_dims=2)
if UnetPlusPlus is not None:
    NETWORKS["Unet++, ResNet-34"] = lambda side: UnetPlusPlus(
        "resnet34", encoder_weights=None, in_channels=1, classes=4
    )


class Prepared(nn.Module):
    """A copy of a network in a setting: ``plain``, as constructed; ``last``, its channels last, as the bundles infer;
    ``bfloat16`` that under autocast; ``compiled`` that by ``torch.compile``; ``openvino`` or ``onnxruntime``, in that
    engine; or several joined by ``+``."""

    def __init__(self, network: nn.Module, setting: str) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).eval()
        self.bfloat16 = "bfloat16" in setting
        if setting != "plain":
            self.network.to(memory_format=torch.channels_last)
        if "compiled" in setting:
            self.network.compile()
        for engine in ENGINES[1:]:
            if engine in setting:
                self.folder = TemporaryDirectory()
                weights = Path(self.folder.name) / "model.pt"
                self.network, self.bfloat16 = in_engine(self.network, engine, weights, self.bfloat16), False
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if not self.bfloat16:  # the caller's autocast, if any, holds
            return self.network(x)
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.network(x)


def chosen(names: str | Sequence[str]) -> list[str]:
    """Names from a command line, where fire takes ``A,B`` for a tuple and ``A-1,B`` for a text."""
    return [name.strip() for name in (names.split(",") if isinstance(names, str) else names) if name.strip()]


def matrix_rate(dtype: torch.dtype, device: torch.device, side: int = 2048) -> float:
    """Multiply-accumulates of a large matrix product, in G a millisecond: what the processor can reach."""
    a, b = (torch.rand(side, side, device=device, dtype=dtype) for _ in range(2))
    taken = []
    for _ in range(6):
        start = wait(device)
        torch.mm(a, b)
        taken.append(wait(device) - start)
    return side**3 / 1e12 / min(taken[1:])


def wait(device: torch.device) -> float:
    """The time when a device has done all that was asked of it, in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def macs(network: nn.Module, x: Tensor) -> float:
    """Multiply-accumulates of one slice, attention through its plain kernel."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        network(x[:1])
    return counter.get_total_flops() / 2


def peak_memory(run: Callable[[], object], device: torch.device) -> float:
    """Bytes that a call takes at its peak, beyond what is held before it; on a CPU of resident memory (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(name: str) -> float:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return 1024 * int(line.split()[1])


def kept_for_backward(network: nn.Module, x: Tensor) -> float:
    """Bytes of activations that a training step keeps for its backward pass."""
    own = {p.untyped_storage().data_ptr() for p in (*network.parameters(), *network.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = network(x)
    del output
    return sum(kept.values())


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, all columns but the first flushed right."""
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
