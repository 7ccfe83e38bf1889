"""Training through a bundle's own config: the data pipeline alone, the step alone, both, in slices per second.

    python bundles/phantoms.py acdc phantoms/acdc --size 256
    python tests/benchmarks/training.py [--bundle fias_acdc] [--dataset_dir phantoms/acdc] [--num_workers 2]

``idle`` is the share of time in which the step waits: what both together lack to the step alone. The last column
extrapolates the bundle's epochs over ACDC's 1,304 training slices.
"""

from __future__ import annotations

import tempfile
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import fire
from measure import table, wait
from monai.bundle import ConfigParser
from monai.data import DataLoader
from torch import Tensor

ROOT = Path(__file__).parents[2]
SLICES = 1304


def main(
    bundle: str = "fias_acdc",
    dataset_dir: str = "phantoms/acdc",
    num_workers: int = 2,
    steps: int = 20,
    **overrides: Any,
) -> None:
    """Print the table.

    Args:
        bundle: whose ``train.json``.
        dataset_dir: its data.
        num_workers: of the loader.
        steps: batches to time.
        overrides: values of the config, such as ``--batch_size 12 --pretrained False``.
    """
    parser = ConfigParser()
    parser.read_config(ROOT / "bundles" / bundle / "configs" / "train.json")
    own = {"dataset_dir": dataset_dir, "num_workers": num_workers, "start_from": "", "output_dir": tempfile.mkdtemp()}
    parser.update({**own, **overrides})
    loader: DataLoader = parser.get_parsed_content("train#dataloader")
    trainer = parser.get_parsed_content("train#trainer")
    device, batch_size = parser.get_parsed_content("device"), parser.get_parsed_content("batch_size")

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

    data = rate(epochs(), lambda batch: None)
    alone = rate(cycle(batches), step)
    both = rate(epochs(), step)
    hours = parser.get_parsed_content("epochs") * SLICES / both / 3600
    name = f"{bundle}, batch {batch_size}, {num_workers} workers, {device}"
    columns = ("training", "data alone", "step alone", "both", "idle", f"{parser['epochs']} epochs of ACDC, h")
    idle = f"{100 * max(0, 1 - both / alone):.0f} %"
    print(table(columns, [(name, f"{data:.3g}", f"{alone:.3g}", f"{both:.3g}", idle, f"{hours:.1f}")]))


if __name__ == "__main__":
    fire.Fire(main)
