"""Time dilated attention as shifted slices against nn.Unfold, in interleaved rounds of one process.

    python tests/benchmarks/dilated_attention.py

Prints the medians and the ratio for the two stages of DilateFormer that use it, on a slice of 256 x 256.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from test_dilateformer import unfold_attention  # noqa: E402

from networks.dilateformer import dilated_attention  # noqa: E402


def seconds(function: Callable, batch: int, channels: int, side: int, heads: int, training: bool) -> float:
    """One pass over the three dilations, and back in training."""
    q, k, v = (torch.randn(batch, channels, side, side, requires_grad=training) for _ in range(3))
    start = time.perf_counter()
    with torch.set_grad_enabled(training):
        out = sum(function(q, k, v, heads, 3, dilation).sum() for dilation in (1, 2, 3))
        if training:
            out.backward()
    return time.perf_counter() - start


def main(rounds: int = 15, batch: int = 2) -> None:
    print("| stage | mode | nn.Unfold, ms | shifted slices, ms | ratio |\n|---|---|---:|---:|---:|")
    for stage, channels, side, heads in ((1, 24, 64, 1), (2, 48, 32, 2)):
        for training in (False, True):
            times: dict[Callable, list[float]] = {unfold_attention: [], dilated_attention: []}
            for i in range(rounds + 2):
                for function, found in times.items():
                    found.append(seconds(function, batch, channels, side, heads, training))
            a, b = (1e3 * median(found[2:]) for found in times.values())
            print(f"| {stage} | {'training' if training else 'inference'} | {a:.2f} | {b:.2f} | {a / b:.1f} |")


if __name__ == "__main__":
    main()
