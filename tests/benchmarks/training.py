"""Training through a bundle's own config: the data pipeline alone, the step alone, both, in slices per second.

    python bundles/phantoms.py acdc phantoms/acdc --size 256
    python tests/benchmarks/training.py [--bundles fias_acdc,danie_acdc] [--batch_sizes 8,32] [--num_workers 2]

``idle`` is the share of time in which the step waits: what both together lack to the step alone. The peak is of one
step, beyond what the network and the optimiser hold.
"""

from __future__ import annotations

import tempfile
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import fire
import torch
from measure import chosen, peak_memory, table, wait
from monai.bundle import ConfigParser
from monai.data import DataLoader
from torch import Tensor

ROOT = Path(__file__).parents[2]


COLUMNS = ("training", "data alone", "step alone", "both", "idle", "peak, GB")


def main(
    bundles: str | tuple[str, ...] = "fias_acdc",
    batch_sizes: int | tuple[int, ...] = (),
    dataset_dir: str = "phantoms/acdc",
    num_workers: int = 2,
    steps: int = 20,
    **overrides: Any,
) -> None:
    """Print the table.

    Args:
        bundles: names of those whose ``train.json`` runs.
        batch_sizes: a row each; by default the config's alone.
        dataset_dir: their data.
        num_workers: of the loader.
        steps: batches to time.
        overrides: values of the config, such as ``--image_size 224 --pretrained False``.
    """
    sizes = (batch_sizes,) if isinstance(batch_sizes, int) else batch_sizes
    own = {"dataset_dir": dataset_dir, "num_workers": num_workers, "start_from": "", "output_dir": tempfile.mkdtemp()}
    rows = []
    for bundle in chosen(bundles):
        for size in [{"batch_size": size} for size in sizes] or [{}]:
            rows.append(measured(bundle, steps, {**own, **overrides, **size}))
    print(table(COLUMNS, rows))


def measured(bundle: str, steps: int, options: dict[str, Any]) -> list[str]:
    """A row of the table."""
    parser = ConfigParser()
    parser.read_config(ROOT / "bundles" / bundle / "configs" / "train.json")
    parser.update(options)
    loader: DataLoader = parser.get_parsed_content("train#dataloader")
    trainer = parser.get_parsed_content("train#trainer")
    device, batch_size = torch.device(parser.get_parsed_content("device")), parser.get_parsed_content("batch_size")

    def step(batch: dict[str, Tensor]) -> None:
        trainer._iteration(trainer, batch)

    if parser["compile"]:
        parser.get_parsed_content("network").compile()
    batches = list(islice(cycle(loader), 2))
    step(batches[0])

    def rate(source: Any, work: Any) -> float:
        count, start = 0, 0.0
        for i, batch in enumerate(source):
            if i == 2:  # the first batches wait for the workers to start
                start, count = wait(device), 0
            work(batch)
            count += len(batch["image"])
            if i == steps + 1:
                break
        return count / (wait(device) - start)

    def epochs() -> Any:
        while True:
            yield from loader

    peak = peak_memory(lambda: step(batches[1]), device)
    data = rate(epochs(), lambda batch: None)
    alone = rate(cycle(batches), step)
    both = rate(epochs(), step)
    name = f"{bundle}, batch {batch_size}, {parser['num_workers']} workers, {device}"
    rates = [f"{rate:.3g}" for rate in (data, alone, both)]
    return [name, *rates, f"{100 * max(0, 1 - both / alone):.0f} %", f"{peak / 1e9:.2f}"]


if __name__ == "__main__":
    fire.Fire(main)
