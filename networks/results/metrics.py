"""Scores of label maps per case and class, with a stated answer where a structure is absent.

MONAI computes the figures; what it lacks is a rule for absent structures: its NaN leaves means, its infinity spoils
them. Two conventions, per case and class; in the strict one a structure that is missed or invented counts:

===================  ======================  ===================================
structure is in      strict (the default)    paper (TransUNet's code, after it both papers)
===================  ======================  ===================================
truth and prediction the figure, in mm       the figure, in voxels
truth only           overlap 0, distance D   overlap 0, distance 0
prediction only      overlap 0, distance D   overlap 1, distance 0
neither              undefined               overlap 0, distance 0
===================  ======================  ===================================

D is the diagonal of the image in millimetres, more than any distance in it: missing a structure never improves a mean
and never drops out of it. Overlap is Dice and IoU, distance HD95 and ASD. Sensitivity is undefined without the
structure, specificity without anything else, in both conventions.

HD95 is the greater of the two directed 95th percentiles (MONAI), ASD the mean over both surfaces (MONAI). The paper
convention pools both directions' distances before taking the percentile, and averages the two directed means, as
medpy does in their code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.handlers import IgniteMetricHandler, from_engine
from monai.metrics import (
    CumulativeIterationMetric,
    compute_average_surface_distance,
    compute_confusion_matrix_metric,
    compute_hausdorff_distance,
    get_confusion_matrix,
)
from monai.metrics.utils import get_mask_edges, get_surface_distance
from torch import Tensor

from ..errors import check_option

__all__ = ["CaseMetric", "PooledMetric", "metric_handlers"]

OVERLAPS = {
    "dice": "f1 score",
    "iou": "threat score",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "accuracy": "accuracy",
}
"""Names of metrics that pixel counts suffice for, as here and as in MONAI."""

DISTANCES = ("hd95", "asd")

CONVENTIONS = ("strict", "paper")


class CaseMetric(CumulativeIterationMetric):
    """One metric of each foreground class in each case.

    Args:
        name: ``"dice"``, ``"iou"``, ``"sensitivity"``, ``"specificity"``, ``"accuracy"`` (0 to 1), ``"hd95"`` or
            ``"asd"`` (millimetres where the image's header has them, else voxels).
        num_classes: classes, background included.
        convention: ``"strict"``, where a structure that is missed or invented counts, or ``"paper"``; see the module.

    Shape:
        label maps ``B, 1, X, Y, Z`` or a list of ``1, X, Y, Z``, prediction first, to ``B, num_classes - 1`` with NaN
        where a score is undefined. :meth:`aggregate` gives the mean over classes of the means over cases.

    Raises:
        ValueError: on an unknown name or convention.
    """

    def __init__(self, name: str, num_classes: int, convention: str = "strict") -> None:
        super().__init__()
        check_option("metric", name, (*OVERLAPS, *DISTANCES))
        check_option("convention", convention, CONVENTIONS)
        self.name = name
        self.num_classes = num_classes
        self.paper = convention == "paper"

    def _compute_tensor(self, y_pred: Tensor, y: Tensor | None = None, **kwargs: Any) -> Tensor:
        assert y is not None
        scores = []
        for pred, truth in zip(y_pred, y, strict=True):
            spacing = None if self.paper else _spacing(truth)
            pairs = [(_plain(pred) == c, _plain(truth) == c) for c in range(1, self.num_classes)]
            scores.append([self._score(p, t, spacing) for p, t in pairs])
        return torch.tensor(scores, dtype=torch.float64)

    def _score(self, pred: Tensor, truth: Tensor, spacing: list[float] | None) -> float:
        if self.name in ("sensitivity", "specificity", "accuracy"):
            return _overlap(self.name, _counts(pred, truth))
        in_pred, in_truth = bool(pred.any()), bool(truth.any())
        distance = self.name in DISTANCES
        if in_pred and in_truth:
            return self._distance(pred, truth, spacing) if distance else _overlap(self.name, _counts(pred, truth))
        if self.paper:
            return float(in_pred and not distance)
        if not in_pred and not in_truth:
            return float("nan")
        return _diagonal(truth.shape[1:], spacing) if distance else 0.0

    def _distance(self, pred: Tensor, truth: Tensor, spacing: list[float] | None) -> float:
        if self.paper:
            edges = get_mask_edges(pred[0].cpu().numpy(), truth[0].cpu().numpy())
            ways = [get_surface_distance(a, b) for a, b in (edges, edges[::-1])]
            pooled = np.percentile(np.concatenate(ways), 95)
            return float(pooled if self.name == "hd95" else np.mean([way.mean() for way in ways]))
        if 1 in truth.shape[1:] and truth.ndim == 4:  # a picture, or one slice: in 3D each voxel would be surface
            axis = truth.shape.index(1, 1)
            pred, truth = pred.select(axis, 0), truth.select(axis, 0)
            spacing = spacing and [*spacing[: axis - 1], *spacing[axis:]]
        if self.name == "hd95":
            return compute_hausdorff_distance(pred[None], truth[None], True, percentile=95, spacing=spacing).item()
        return compute_average_surface_distance(pred[None], truth[None], True, symmetric=True, spacing=spacing).item()

    def aggregate(self) -> Tensor:
        """Mean over classes of the means over cases; NaN when nothing is defined."""
        return self.get_buffer().nanmean(0).nanmean()


class PooledMetric(CumulativeIterationMetric):
    """One metric of each foreground class over the pixels of all cases together, as part of the ISIC literature does.

    Args:
        name: ``"dice"``, ``"iou"``, ``"sensitivity"``, ``"specificity"`` or ``"accuracy"``.
        num_classes: classes, background included.

    Shape:
        as :class:`CaseMetric`, to pixel counts ``B, num_classes - 1, 4``. :meth:`aggregate` gives the mean over
        classes.

    Raises:
        ValueError: on an unknown name.
    """

    def __init__(self, name: str, num_classes: int) -> None:
        super().__init__()
        check_option("metric", name, OVERLAPS)
        self.name = name
        self.num_classes = num_classes

    def _compute_tensor(self, y_pred: Tensor, y: Tensor | None = None, **kwargs: Any) -> Tensor:
        assert y is not None
        classes = range(1, self.num_classes)
        pairs = [(_plain(pred), _plain(truth)) for pred, truth in zip(y_pred, y, strict=True)]
        return torch.stack([torch.stack([_counts(pred == c, truth == c) for c in classes]) for pred, truth in pairs])

    def aggregate(self) -> Tensor:
        """Mean over classes of the metric of the summed counts."""
        return torch.tensor([_overlap(self.name, counts) for counts in self.get_buffer().sum(0)]).nanmean()


def metric_handlers(
    names: Sequence[str], num_classes: int, convention: str = "strict", pooled: Sequence[str] = ()
) -> dict[str, IgniteMetricHandler]:
    """Handlers for an evaluator's ``key_val_metric`` or ``additional_metrics``, on its ``pred`` and ``label``.

    Args:
        names: metrics per case, see :class:`CaseMetric`.
        num_classes: classes, background included.
        convention: ``"strict"`` or ``"paper"``.
        pooled: metrics over all pixels together, see :class:`PooledMetric`; no convention applies to them.

    Returns:
        ``val_mean_dice`` for Dice, ``val_NAME`` for any other; ``val_pooled_NAME`` over all pixels.
    """
    metrics: dict[str, CumulativeIterationMetric] = {
        "val_mean_dice" if name == "dice" else f"val_{name}": CaseMetric(name, num_classes, convention)
        for name in names
    }
    metrics.update({f"val_pooled_{name}": PooledMetric(name, num_classes) for name in pooled})
    output = from_engine(["pred", "label"])
    return {
        name: IgniteMetricHandler(metric, output_transform=output, save_details=isinstance(metric, CaseMetric))
        for name, metric in metrics.items()
    }


def _plain(volume: Tensor) -> Tensor:
    return volume.as_tensor() if isinstance(volume, MetaTensor) else volume


def _counts(pred: Tensor, truth: Tensor) -> Tensor:
    """True and false positives, true and false negatives of two masks ``1, X, Y, Z``."""
    return get_confusion_matrix(pred[None].byte(), truth[None].byte())[0, 0].double().cpu()


def _overlap(name: str, counts: Tensor) -> float:
    return compute_confusion_matrix_metric(OVERLAPS[name], counts).item()


def _spacing(volume: Tensor) -> list[float]:
    """Size of a voxel ``X, Y, Z`` in millimetres, 1 where the image does not say."""
    axes = volume.ndim - 1
    return [float(s) for s in volume.pixdim[:axes]] if isinstance(volume, MetaTensor) else [1.0] * axes


def _diagonal(shape: Sequence[int], spacing: list[float] | None) -> float:
    return float(np.linalg.norm(np.array(shape) * (1.0 if spacing is None else np.array(spacing))))
