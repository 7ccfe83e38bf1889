"""Time the networks beside MONAI's 2D UNet, in interleaved rounds of one process.

    python tests/benchmarks/speed.py [--rounds 9] [--batch 4] [--side 256]

Prints parameters, multiply-accumulates (``torch.utils.flop_counter``, halved, attention through its plain kernel),
the median milliseconds per slice of an inference in fp32, and the ratio to the UNet of the same round.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import fire
import torch
from monai.networks.nets import UNet
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))

from networks import DANIE, FIAS  # noqa: E402

NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "MONAI UNet": lambda side: UNet(2, 1, 4, (32, 64, 128, 256, 512), (2, 2, 2, 2), num_res_units=2),
    "FIAS": lambda side: FIAS(1, 4),
    "DANIE-S": lambda side: DANIE(1, 4, size="small", img_size=side),
    "DANIE-L": lambda side: DANIE(1, 4, size="large", img_size=side),
}


def macs(network: nn.Module, side: int) -> float:
    """Multiply-accumulates of one slice."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        network(torch.zeros(1, 1, side, side))
    return counter.get_total_flops() / 2


def main(rounds: int = 9, batch: int = 4, side: int = 256) -> None:
    networks = {name: build(side).eval() for name, build in NETWORKS.items()}
    x = torch.rand(batch, 1, side, side)
    times: dict[str, list[float]] = {name: [] for name in networks}
    with torch.inference_mode():
        for _ in range(rounds + 1):  # the first warms up
            for name, network in networks.items():
                start = time.perf_counter()
                network(x)
                times[name].append((time.perf_counter() - start) / batch)
    first = times["MONAI UNet"][1:]
    threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{side} x {side}, batch {batch}, {rounds} rounds, {threads}")
    print("\n| network | parameters, M | multiply-accumulates, G | ms per slice | ratio |\n|---|---:|---:|---:|---:|")
    for name, network in networks.items():
        parameters = sum(p.numel() for p in network.parameters()) / 1e6
        found = times[name][1:]
        ratio = median(t / u for t, u in zip(found, first, strict=True))
        cost = macs(network, side) / 1e9
        print(f"| {name} | {parameters:.1f} | {cost:.2f} | {1e3 * median(found):.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    fire.Fire(main)
