"""Time and memory of the networks beside their peers, in interleaved rounds of one process.

    python tests/benchmarks/speed.py [--settings plain,prepared,bfloat16] [--only FIAS,UNet] [--device cuda]

All peers need ``pip install einops segmentation-models-pytorch``. A table per setting: ``plain`` is fp32 as
constructed, ``prepared`` as the bundles infer (batch normalisation folded, channels last), ``bfloat16`` that under
autocast, ``compiled`` that by ``torch.compile``, ``bfloat16+compiled`` both. The first network, the base of the ratios,
is plain in all of them. Latency is of one slice, time and ratio of a slice in a batch; the ratio is the median over
rounds of that to the first network's in the same round. Peers are prepared as far as they let themselves.
Multiply-accumulates by ``torch.utils.flop_counter``, halved. Kept are the activations that a training step of two
slices holds for its backward pass.
"""

from __future__ import annotations

from statistics import median

import fire
import torch
from measure import NETWORKS, Prepared, chosen, kept_for_backward, macs, peak_memory, table, wait

COLUMNS = ("network", "parameters, M", "MACs, G", "latency, ms", "ms a slice", "ratio", "peak, MB", "kept, MB")


def main(
    settings: str | tuple[str, ...] = ("plain", "prepared"),
    only: str | tuple[str, ...] = (),
    rounds: int = 5,
    batch: int = 4,
    side: int = 256,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Print the tables.

    Args:
        settings: see above.
        only: parts of names; the first network, the base of the ratios, is always there.
        rounds: each times every network once, after one that warms up.
        batch: slices in a batch.
        side: height and width.
        device: where to run.
    """
    parts = chosen(only)
    names = [n for i, n in enumerate(NETWORKS) if i == 0 or not parts or any(part in n for part in parts)]
    x = torch.rand(batch, 1, side, side, device=device)
    threads = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
    for setting in chosen(settings):
        torch.manual_seed(0)
        built = {name: NETWORKS[name](side).to(device) for name in names}
        networks = {n: Prepared(net, setting if n != names[0] else "plain") for n, net in built.items()}
        single: dict[str, list[float]] = {name: [] for name in names}
        whole: dict[str, list[float]] = {name: [] for name in names}
        with torch.inference_mode():
            for _ in range(rounds + 1):
                for name, network in networks.items():
                    for slices, times in ((x[:1], single), (x, whole)):
                        start = wait(x.device)
                        network(slices)
                        times[name].append(1e3 * (wait(x.device) - start) / len(slices))
            peaks = {name: peak_memory(lambda n=network: n(x), x.device) for name, network in networks.items()}
        rows = []
        for name, network in built.items():
            parameters = sum(p.numel() for p in network.parameters()) / 1e6
            kept = kept_for_backward(network.train(), x[:2]) / 1e6
            ratio = median(t / u for t, u in zip(whole[name][1:], whole[names[0]][1:], strict=True))
            times = (f"{median(single[name][1:]):.1f}", f"{median(whole[name][1:]):.1f}", f"{ratio:.2f}")
            cost = macs(network.eval(), x) / 1e9
            rows.append((name, f"{parameters:.1f}", f"{cost:.2f}", *times, f"{peaks[name] / 1e6:.0f}", f"{kept:.0f}"))
        print(f"\n{setting}: {side} x {side}, batch {batch}, {rounds} rounds, {threads}, torch {torch.__version__}\n")
        print(table(COLUMNS, rows))


if __name__ == "__main__":
    fire.Fire(main)
