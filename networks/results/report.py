"""What an evaluation leaves for people: tables and pictures."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Events
from monai.engines import Evaluator, IterationEvents
from monai.utils import string_list_all_gather
from torch import Tensor

from ..storage import whole_file, write_csv
from .beats import beating_file, save_gif
from .hearts import heart_numbers
from .history import read_history
from .label_maps import SaveImageLabelMapd, result_file
from .measures import structure_names
from .metrics import DISTANCES
from .pictures import curves, overlay, read_slice, thin, upright

__all__ = ["Overlays", "Report", "case_table", "summary_table"]

logger = logging.getLogger(__name__)

TITLES = {"mean_dice": "Dice", "iou": "IoU", "hd95": "HD95", "asd": "ASD"}


class Report:
    """Handler that ends an evaluation with tables, and pictures of the worst, median and best case.

    Writes ``cases.csv`` (all metrics per case and class), ``summary.md`` (means in the layout of the papers' tables,
    then Dice per case), ``worst.png``, ``median.png``, ``best.png`` (image, truth and prediction on the slice with
    most foreground, and the classes' names), and ``curves.png`` where training left its ``history.csv``. Predictions
    and labels must be label maps on the image file's own grid, as the bundles' postprocessing leaves them. With several
    processes the cases of all are gathered.

    Args:
        output_dir: where to write.
        labels: class names by index, such as the metadata's ``channel_def``; index 0 is background. Or a list of them
            without it. Of another number of classes than scored, the names are ``class 1`` and so on.
        convention: of the metrics, ``"strict"``, where a structure that is missed or invented counts, or ``"paper"``;
            see :mod:`networks.results.metrics`.
        metric: name of the evaluator's metric with details per case that orders the cases.
    """

    def __init__(
        self,
        output_dir: str | Path,
        labels: Mapping[str, str] | Sequence[str],
        convention: str = "strict",
        metric: str = "val_mean_dice",
    ) -> None:
        self.output_dir = Path(output_dir)
        self.labels = labels
        self.convention = convention
        self.metric = metric
        self._names: list[str] = []
        self._views: list[tuple[tuple[str, int, int, int | None], np.ndarray, np.ndarray]] = []

    def attach(self, evaluator: Evaluator) -> None:
        """Attach to an evaluator."""
        evaluator.add_event_handler(Events.STARTED, self._start)
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        evaluator.add_event_handler(Events.COMPLETED, self._write)

    def _start(self, evaluator: Evaluator) -> None:
        self._names.clear()
        self._views.clear()

    def _collect(self, evaluator: Evaluator) -> None:
        for case, output in zip(evaluator.state.batch, evaluator.state.output, strict=True):
            truth, pred = (_label_map(output[key]) for key in ("label", "pred"))
            axis, index = _fullest_slice(2 * (truth > 0).astype(np.uint8) + (pred > 0))
            self._names.append(_name(case))
            frame = int(case["frame"]) if "frame" in case else None
            place = (_file(case), axis, index, frame)
            self._views.append((place, thin(truth.take(index, axis)), thin(pred.take(index, axis))))

    def _write(self, evaluator: Evaluator) -> None:
        details = {name: scores.cpu().double() for name, scores in evaluator.state.metric_details.items()}
        scores = details[self.metric]
        first = sum(_counts(len(self._names))[: idist.get_rank()])
        names = string_list_all_gather(self._names)
        labels = list(structure_names(self.labels, scores.shape[1] + 1).values())
        order = scores.nanmean(1).nan_to_num(-1).argsort().tolist()
        for picture, case in {"worst": order[0], "median": order[len(order) // 2], "best": order[-1]}.items():
            if first <= case < first + len(self._views):
                place, truth, pred = self._views[case - first]
                with whole_file(self.output_dir / f"{picture}.png") as name:
                    panels = {"truth": truth.T, "prediction": pred.T}
                    overlay(thin(read_slice(*place)), panels, labels).savefig(name)
        if idist.get_rank() != 0:
            return
        pooled = {n: v for n, v in evaluator.state.metrics.items() if n.startswith("val_pooled_")}
        summary = summary_table(details, labels, self.convention, pooled)
        table = f"{summary}\n\n{case_table(scores, names, labels)}\n"
        with whole_file(self.output_dir / "summary.md") as name:
            Path(name).write_text(table, encoding="utf-8", errors="backslashreplace")
        columns = [f"{_short(metric)} {label}" for metric in details for label in labels]
        rows = torch.cat(list(details.values()), 1).tolist()
        cells = [[case, *(f"{value:.6g}" for value in row)] for case, row in zip(names, rows, strict=True)]
        write_csv(self.output_dir / "cases.csv", ["case", *columns], cells)
        history = read_history(self.output_dir / "history.csv")
        if history:
            with whole_file(self.output_dir / "curves.png") as name:
                curves(history).savefig(name)
        logger.info(f"{self.output_dir / 'summary.md'}, cases.csv and pictures\n\n{table}")


class Overlays:
    """Handler of an evaluator that draws each case: a picture of a volume, a moving one of a heart over time.

    Of a volume, ``NAME_overlay.png`` shows the slice with most foreground beside itself under the label map; of a time
    series of a heart, ``NAME_beating.gif`` shows its contours. They lie beside the label map, which must be on the
    image file's own grid.

    Args:
        saver: names the label maps.
        cases: all of them; those over time have their ``"series"``.
        labels: names of the classes; see :func:`networks.results.measures.structure_names`.
        num_classes: of the network.
        enabled: False draws nothing.
    """

    def __init__(
        self,
        saver: SaveImageLabelMapd,
        cases: Sequence[Mapping[str, Any]],
        labels: Mapping[str, str] | Sequence[str],
        num_classes: int,
        enabled: bool = True,
    ) -> None:
        self.saver = saver
        self.series = {str(case["image"]): case["series"] for case in cases if "series" in case}
        self.heart = heart_numbers(structure_names(labels, num_classes))
        self.enabled = enabled

    @staticmethod
    def picture(saver: SaveImageLabelMapd, case: Mapping[str, Any]) -> Path:
        """The file of a case's picture."""
        return result_file(saver, case["image"], "beating.gif" if "series" in case else "overlay.png")

    def attach(self, evaluator: Evaluator) -> None:
        """Attach to an evaluator."""
        if self.enabled:
            evaluator.add_event_handler(IterationEvents.MODEL_COMPLETED, self._draw)  # an error is the case's

    def _draw(self, evaluator: Evaluator) -> None:
        for case, output in zip(evaluator.state.batch, evaluator.state.output, strict=True):
            if int(case.get("frame", 0)) == int(case.get("frames", 1)) - 1:
                self.draw(_file(case), output["pred"])

    def draw(self, image: str, label: Any) -> None:
        """Draw a case whose label map is written.

        Args:
            image: its file or folder.
            label: classes of a volume, ``MetaTensor`` ``1, X, Y, Z``. Those of a time series are read from their file.
        """
        if image not in self.series:
            pred = _label_map(label)
            axis, index = _fullest_slice(pred > 0)
            grey = thin(read_slice(image, axis, index))
            with whole_file(result_file(self.saver, image, "overlay.png")) as name:
                overlay(grey, {"prediction": thin(pred.take(index, axis)).T}).savefig(name)
        elif self.heart is not None:
            numbers = {side: int(self.saver.numbers[number]) for side, number in self.heart.items()}
            beat = beating_file(self.series[image], self.saver.target(image), numbers)
            save_gif(beat, result_file(self.saver, image, "beating.gif"))


def summary_table(
    details: Mapping[str, Tensor], labels: Sequence[str], convention: str, pooled: Mapping[str, float] | None = None
) -> str:
    """Markdown table of means and standard deviations over cases: a row per metric, a column per class.

    Args:
        details: scores ``cases, classes`` by the metric's name; NaN where undefined.
        labels: names of the classes.
        convention: ``"strict"`` or ``"paper"``, for units and the line below.
        pooled: scores over all pixels together, by name.

    Returns:
        The table. ``mean`` is the mean over classes of the classes' means; its deviation is that of the cases' means.
        Undefined scores are left out, and counted in the cell.
    """
    lines = ["| metric | mean | " + " | ".join(labels) + " |", "|---" + "|---:" * (len(labels) + 1) + "|"]
    for name, scores in details.items():
        unit, scale = _unit(name, convention)
        by_class = [_cell(column * scale, column.nanmean() * scale) for column in scores.unbind(1)]
        total = _cell(scores.nanmean(1) * scale, scores.nanmean(0).nanmean() * scale, int(scores.isnan().sum()))
        lines.append(f"| {_title(name)}, {unit} | {total} | {' | '.join(by_class)} |")
    for name, value in (pooled or {}).items():
        title = _title(name.replace("pooled_", "").replace("_dice", "_mean_dice"))
        lines.append(f"| {title} over all pixels, % | {100 * value:.2f} |{' |' * len(labels)}")
    cases = len(next(iter(details.values())))
    rule = {
        "strict": "Strict: a missed or invented structure counts 0 and the image's diagonal; one that is in neither "
        "truth nor prediction is undefined.",
        "paper": "As the papers' code: voxels; an invented structure counts Dice 1 and distance 0, one that is not "
        "predicted 0 and 0.",
    }
    return "\n".join([*lines, "", f"{cases} cases, mean ± standard deviation. {rule[convention]}"])


def case_table(scores: Tensor, cases: Sequence[str], labels: Sequence[str]) -> str:
    """Markdown table of Dice in percent: a row per case.

    Args:
        scores: ``cases, classes`` in 0 to 1; NaN where undefined.
        cases: names of the rows.
        labels: names of the classes.

    Returns:
        The table.
    """
    rows = torch.cat([scores, scores.nanmean(1, keepdim=True)], 1) * 100
    head = ["case (Dice, %)", *labels, "mean"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for name, row in zip(cases, rows.tolist(), strict=True):
        lines.append("| " + " | ".join([name, *(f"{value:.2f}" for value in row)]) + " |")
    return "\n".join(lines)


def _counts(own: int) -> list[int]:
    """Number of cases of each process."""
    if idist.get_world_size() == 1:
        return [own]
    return torch.as_tensor(idist.all_gather(torch.tensor([own], device=idist.device()))).flatten().tolist()


def _label_map(x: Any) -> np.ndarray:
    return upright(x).astype(np.uint8)


def _file(case: Mapping[str, Any]) -> str:
    return str(case["image"].meta["filename_or_obj"])


def _name(case: Mapping[str, Any]) -> str:
    return str(case.get("id") or Path(_file(case)).name.split(".")[0])


def _fullest_slice(weight: np.ndarray) -> tuple[int, int]:
    """Axis across the fewest slices of a volume ``X, Y, Z``, and the slice along it with the greatest sum."""
    axis = int(np.argmin(weight.shape))
    others = tuple(i for i in range(3) if i != axis)
    return axis, int(weight.sum(others, dtype=np.int64).argmax())


def _short(metric: str) -> str:
    return metric.removeprefix("val_").replace("mean_dice", "dice")


def _title(metric: str) -> str:
    name = metric.removeprefix("val_")
    return TITLES.get(name, name)


def _unit(metric: str, convention: str) -> tuple[str, float]:
    if metric.removeprefix("val_") in DISTANCES:
        return ("mm" if convention == "strict" else "voxels"), 1.0
    return "%", 100.0


def _cell(scores: Tensor, mean: Tensor, undefined: int | None = None) -> str:
    undefined = int(scores.isnan().sum()) if undefined is None else undefined
    defined = scores[~scores.isnan()]
    text = f"{mean:.2f} ± {defined.std(correction=0):.2f}" if len(defined) else "undefined"
    return f"{text} ({undefined} undefined)" if undefined else text
