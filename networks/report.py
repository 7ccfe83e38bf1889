"""What an evaluation leaves for people: a table and pictures."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from monai.engines import Evaluator
from monai.transforms import LoadImage
from PIL import Image
from torch import Tensor

__all__ = ["COLOURS", "Report", "dice_table", "overlay"]

logger = logging.getLogger(__name__)

COLOURS = (
    (230, 80, 70),
    (80, 180, 90),
    (70, 120, 230),
    (240, 190, 50),
    (170, 90, 200),
    (70, 200, 210),
    (240, 140, 60),
    (150, 150, 150),
)
"""RGB of the classes 1, 2, 3, ..., repeated from the ninth on."""


def dice_table(scores: Tensor, cases: list[str], labels: list[str]) -> str:
    """Markdown table of Dice in percent: a row per case, then mean and standard deviation over cases.

    Args:
        scores: ``cases, classes`` in 0 to 1; NaN where a structure is in neither truth nor prediction.
        cases: names of the rows.
        labels: names of the classes.

    Returns:
        The table. Undefined scores are left out of means, and counted below the table.
    """
    rows = torch.cat([scores, scores.nanmean(1, keepdim=True)], 1) * 100
    head = ["case", *labels, "mean"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    mean = rows.nanmean(0)
    deviation = (rows - mean).square().nanmean(0).sqrt()
    for name, row in [*zip(cases, rows, strict=True), ("**mean**", mean), ("standard deviation", deviation)]:
        lines.append("| " + " | ".join([name, *(f"{value:.2f}" for value in row.tolist())]) + " |")
    undefined = int(scores.isnan().sum())
    lines.append(f"\nDice in percent over {len(cases)} cases; undefined scores left out of means: {undefined}.")
    return "\n".join(lines)


def overlay(image: np.ndarray, labels: list[np.ndarray], alpha: float = 0.45) -> Image.Image:
    """The image beside copies of itself under label maps, such as truth and prediction.

    Args:
        image: ``H, W``, any range: shown between its 1st and 99th percentile.
        labels: label maps ``H, W``, 0 stays clear.
        alpha: opacity of the colours.

    Returns:
        An RGB picture, panels side by side, the short side at least 256 pixels.
    """
    low, high = np.percentile(image, (1, 99))
    gray = np.clip((image - low) / max(high - low, 1e-6), 0, 1)[..., None].repeat(3, 2) * 255
    panels = [gray]
    for label in labels:
        colour = np.array(COLOURS, dtype=float)[(label.astype(int) - 1) % len(COLOURS)]
        panels.append(np.where(label[..., None] > 0, (1 - alpha) * gray + alpha * colour, gray))
    picture = Image.fromarray(np.concatenate(panels, 1).astype(np.uint8))
    scale = max(1, -(-256 // min(image.shape)))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


class Report:
    """Handler that ends an evaluation with a Dice table and pictures of the worst, median and best case.

    Writes ``dice.md`` and ``worst.png``, ``median.png``, ``best.png``: image, truth and prediction on the slice with
    most foreground. Predictions and labels must be label maps on the image file's own grid, as the bundles'
    postprocessing leaves them.

    Args:
        output_dir: where to write.
        labels: class names by index, such as the metadata's ``channel_def``; index 0 is background.
        metric: name of the evaluator's Dice metric with details per case.
    """

    def __init__(self, output_dir: str | Path, labels: Mapping[str, str], metric: str = "val_mean_dice") -> None:
        self.output_dir = Path(output_dir)
        self.labels = [labels[i] for i in sorted(labels, key=int)][1:]
        self.metric = metric
        self._cases: list[tuple[str, int, int, np.ndarray, np.ndarray]] = []

    def attach(self, evaluator: Evaluator) -> None:
        """Attach to an evaluator."""
        evaluator.add_event_handler(Events.STARTED, lambda _: self._cases.clear())
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        evaluator.add_event_handler(Events.COMPLETED, self._write)

    def _collect(self, evaluator: Evaluator) -> None:
        for case, output in zip(evaluator.state.batch, evaluator.state.output, strict=True):
            truth, pred = (_label_map(output[key]) for key in ("label", "pred"))
            axis = int(np.argmin(truth.shape))
            others = tuple(i for i in range(3) if i != axis)
            index = int(((truth > 0).sum(others) * 2 + (pred > 0).sum(others)).argmax())
            file = str(case["image"].meta["filename_or_obj"])
            self._cases.append((file, axis, index, truth.take(index, axis), pred.take(index, axis)))

    def _write(self, evaluator: Evaluator) -> None:
        scores = evaluator.state.metric_details[self.metric].cpu().double()
        if len(scores) != len(self._cases):
            return  # one of several processes: the scores are gathered, the cases are not
        names = [Path(case[0]).name.split(".")[0] for case in self._cases]
        table = dice_table(scores, names, self.labels)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        (self.output_dir / "dice.md").write_text(table + "\n")
        order = scores.nanmean(1).nan_to_num(-1).argsort().tolist()
        for name, case in {"worst": order[0], "median": order[len(order) // 2], "best": order[-1]}.items():
            file, axis, index, truth, pred = self._cases[case]
            image = np.asarray(LoadImage(image_only=True, ensure_channel_first=True)(file))[0].take(index, axis)
            overlay(image.T, [truth.T, pred.T]).save(self.output_dir / f"{name}.png")
        logger.info(f"{self.output_dir / 'dice.md'}, worst.png, median.png, best.png\n\n{table}\n")


def _label_map(x: Any) -> np.ndarray:
    return np.asarray(x.cpu())[0].astype(np.uint8)
