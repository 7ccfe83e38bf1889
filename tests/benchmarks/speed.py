"""Time and memory of the networks beside their peers, in interleaved rounds of one process.

    python tests/benchmarks/speed.py [--settings plain,last,openvino,openvino+bfloat16] [--only FIAS,UNet]

All peers need ``pip install einops segmentation-models-pytorch``. A table per setting, see
:class:`measure.Prepared`: ``plain``, ``last``, ``bfloat16``, ``compiled``, ``openvino``, ``onnxruntime`` and such as
``openvino+bfloat16``. All networks have the setting, but the first, the base of the ratios, is plain in all tables.
Below each table is what a large matrix product reaches in the same run, in fp32 and bfloat16: ``of peak`` is the share
of the first, of fp32, that a network's multiply-accumulates reach.

Latency is of one slice alone. Time is of one in a batch, of the size that is best for the network; the ratio is the
median over rounds of that to the first network's in the same round. Multiply-accumulates by
``torch.utils.flop_counter``, halved. Peak is of the largest batch. Step is the peak of
a training step of two slices, gradients included, kept the activations that it holds for its backward pass.
"""

from __future__ import annotations

from statistics import median

import fire
import torch
from measure import NETWORKS, Prepared, chosen, kept_for_backward, macs, matrix_rate, peak_memory, table, wait

COLUMNS = (
    *("network", "parameters, M", "MACs, G", "latency, ms"),
    *("ms a slice", "batch", "ratio", "of peak", "peak, MB", "step, MB", "kept, MB"),
)

DTYPES = {"fp32": torch.float32, "bfloat16": torch.bfloat16}


def main(
    settings: str | tuple[str, ...] = ("plain", "last"),
    only: str | tuple[str, ...] = (),
    rounds: int = 5,
    batches: int | tuple[int, ...] = (4, 8),
    side: int = 256,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Print the tables.

    Args:
        settings: see above.
        only: parts of names; the first network, the base of the ratios, is always there.
        rounds: each times every network once, after one that warms up.
        batches: sizes of batches, of which each network's best counts.
        side: height and width.
        device: where to run.
    """
    parts = chosen(only)
    names = [n for i, n in enumerate(NETWORKS) if i == 0 or not parts or any(part in n for part in parts)]
    sizes = (1, *((batches,) if isinstance(batches, int) else batches))
    x = torch.rand(max(sizes), 1, side, side, device=device)
    threads = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
    peak_rate = {name: matrix_rate(dtype, x.device) for name, dtype in DTYPES.items()}
    for setting in chosen(settings):
        torch.manual_seed(0)
        built = {name: NETWORKS[name](side).to(device) for name in names}
        networks = {n: Prepared(net, setting if n != names[0] else "plain") for n, net in built.items()}
        taken: dict[str, dict[int, list[float]]] = {name: {size: [] for size in sizes} for name in names}
        with torch.inference_mode():
            for _ in range(rounds + 1):
                for size in sizes:
                    for name, network in networks.items():
                        start = wait(x.device)
                        network(x[:size])
                        taken[name][size].append(1e3 * (wait(x.device) - start) / size)
            best = {name: min(sizes[1:], key=lambda size, n=name: median(taken[n][size][1:])) for name in names}
            peaks = {name: peak_memory(lambda n=network: n(x), x.device) for name, network in networks.items()}
        rows = []
        for name, network in built.items():
            parameters = sum(p.numel() for p in network.parameters()) / 1e6
            kept = kept_for_backward(network.train(), x[:2]) / 1e6
            step = peak_memory(lambda n=network: n(x[:2]).square().mean().backward(), x.device) / 1e6
            single, batched = taken[name][1][1:], taken[name][best[name]][1:]
            first = taken[names[0]][best[names[0]]][1:]
            cost = macs(network.eval(), x) / 1e9
            share = cost / (median(batched) * peak_rate["fp32"])
            ratio = median(t / u for t, u in zip(batched, first, strict=True))
            times = (
                f"{median(single):.1f}",
                f"{median(batched):.1f}",
                str(best[name]),
                f"{ratio:.2f}",
                f"{100 * share:.0f} %",
            )
            memory = (f"{peaks[name] / 1e6:.0f}", f"{step:.0f}", f"{kept:.0f}")
            rows.append((name, f"{parameters:.1f}", f"{cost:.2f}", *times, *memory))
        print(f"\n{setting}: {side} x {side}, {rounds} rounds, {threads}, torch {torch.__version__}\n")
        print(table(COLUMNS, rows))
        reached = ", ".join(f"{name} {2000 * rate:.0f}" for name, rate in peak_rate.items())
        print(f"\nA matrix product of 2048 x 2048 reaches, in GFLOPS: {reached}.")


if __name__ == "__main__":
    fire.Fire(main)
