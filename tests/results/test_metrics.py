"""Metrics on cases counted by hand, in both conventions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.metrics import DiceMetric, HausdorffDistanceMetric, MeanIoU, SurfaceDistanceMetric
from scipy.ndimage import binary_erosion, distance_transform_edt

from networks.results.metrics import CaseMetric, PooledMetric, metric_handlers

NAMES = ("dice", "iou", "hd95", "asd")
SPACING = (1.0, 2.0, 3.0)


def label_map(*boxes: tuple[slice, slice, slice]) -> MetaTensor:
    """A map ``1, 8, 8, 4`` of 1 x 2 x 3 mm voxels; the n-th box holds class n + 1, None leaves it out."""
    data = torch.zeros(1, 8, 8, 4)
    for n, box in enumerate(boxes):
        if box is not None:
            data[(0, *box)] = n + 1
    return MetaTensor(data, affine=torch.diag(torch.tensor([*SPACING, 1.0])))


def scores(convention: str, pred: MetaTensor, truth: MetaTensor, num_classes: int = 2) -> dict[str, list[float]]:
    return {n: CaseMetric(n, num_classes, convention)([pred], [truth])[0].tolist() for n in NAMES}


BOX = (slice(1, 4), slice(2, 4), slice(1, 2))  # 6 voxels, all of them surface
MOVED = (slice(1, 4), slice(3, 5), slice(1, 2))  # one voxel further along y: 3 voxels in common


def test_a_case_counted_by_hand():
    # The moved box: 3 of 6 + 6 voxels in common. Half of each surface is 0 away from the other, half one voxel.
    pred, truth = label_map(MOVED), label_map(BOX)
    strict, paper = scores("strict", pred, truth), scores("paper", pred, truth)
    assert strict["dice"] == paper["dice"] == [pytest.approx(6 / 12)]
    assert strict["iou"] == paper["iou"] == [pytest.approx(3 / 9)]
    assert strict["hd95"] == [2.0] and paper["hd95"] == [1.0]  # 2 mm along y, one voxel
    assert strict["asd"] == [1.0] and paper["asd"] == [0.5]
    both = f"{'':14}" + "".join(f"{n:>8}" for n in NAMES)
    print(f"\n{both}\nstrict (mm)   {_row(strict)}\npaper (voxel) {_row(paper)}")


def _row(found: dict[str, list[float]]) -> str:
    return "".join(f"{found[n][0]:8.3f}" for n in NAMES)


@pytest.mark.parametrize(
    ("pred", "truth", "strict", "paper"),
    [
        (None, BOX, (0, 0, "D", "D"), (0, 0, 0, 0)),  # missed: never better than any hit, never left out
        (BOX, None, (0, 0, "D", "D"), (1, 1, 0, 0)),  # invented
        (None, None, ("nan",) * 4, (0, 0, 0, 0)),
    ],
)
def test_absent_structures_count_as_the_convention_says(pred, truth, strict, paper):
    diagonal = math.sqrt((8 * 1) ** 2 + (8 * 2) ** 2 + (4 * 3) ** 2)
    for convention, expected in (("strict", strict), ("paper", paper)):
        found = scores(convention, label_map(pred), label_map(truth))
        for name, value in zip(NAMES, expected, strict=True):
            value = {"D": diagonal, "nan": math.nan}.get(value, value)
            assert found[name] == [pytest.approx(value, nan_ok=True)], (convention, name)


def test_a_missed_structure_worsens_every_mean():
    hit, missed, truth = label_map(MOVED), label_map(None), label_map(BOX)
    for name in NAMES:
        better, worse = CaseMetric(name, 2), CaseMetric(name, 2)
        better([hit, hit], [truth, truth])
        worse([hit, missed], [truth, truth])
        gain = worse.aggregate() - better.aggregate()
        assert gain < 0 if name in ("dice", "iou") else gain > 0


def test_means_go_over_cases_first_and_leave_undefined_scores_out():
    metric = CaseMetric("dice", 3)
    metric([label_map(BOX), label_map(MOVED)], [label_map(BOX), label_map(BOX)])
    assert torch.equal(metric.get_buffer().isnan(), torch.tensor([[False, True], [False, True]]))
    assert metric.aggregate().item() == pytest.approx((1 + 0.5) / 2)
    nothing = CaseMetric("dice", 2)
    nothing([label_map(None)], [label_map(None)])
    assert math.isnan(nothing.aggregate().item())


def test_figures_are_monai_s_where_monai_has_one():
    rng = np.random.default_rng(0)
    pred, truth = (MetaTensor(torch.from_numpy(rng.integers(0, 2, (1, 9, 7, 5)))) for _ in range(2))
    for p in (pred, truth):
        p.affine = torch.diag(torch.tensor([*SPACING, 1.0], dtype=torch.float64))
    both = torch.stack([pred.as_tensor()]).float(), torch.stack([truth.as_tensor()]).float()
    assert scores("strict", pred, truth) == {
        "dice": [pytest.approx(DiceMetric()(*both).item())],
        "iou": [pytest.approx(MeanIoU()(*both).item())],
        "hd95": [pytest.approx(HausdorffDistanceMetric(percentile=95)(*both, spacing=list(SPACING)).item())],
        "asd": [pytest.approx(SurfaceDistanceMetric(symmetric=True)(*both, spacing=list(SPACING)).item())],
    }


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_distances_of_one_slice_are_those_of_its_outlines(axis):
    """In 3D, each voxel of a slice would be surface, and what two discs share at no distance."""
    x, y = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    discs = [(((x - 32) * 2) ** 2 + ((y - 32) * 3) ** 2 < r**2)[None] for r in (40, 60)]
    spacing = [2.0, 3.0]
    spacing.insert(axis, 8.0)
    affine = torch.diag(torch.tensor([*spacing, 1.0]))
    pred, truth = (MetaTensor(disc.unsqueeze(axis + 1).float(), affine=affine) for disc in discs)
    both = [disc[None].float() for disc in discs]
    found = scores("strict", pred, truth)
    distance = HausdorffDistanceMetric(percentile=95)(*both, spacing=[2.0, 3.0]).item()
    assert found["hd95"] == [pytest.approx(distance)] and 19 < distance < 23
    assert found["asd"] == [pytest.approx(SurfaceDistanceMetric(symmetric=True)(*both, spacing=[2.0, 3.0]).item())]


def test_the_papers_distances_pool_both_directions():
    rng = np.random.default_rng(1)
    pred, truth = (rng.random((12, 10, 6)) > 0.6 for _ in range(2))
    ways = []
    for a, b in ((pred, truth), (truth, pred)):
        surfaces = [m ^ binary_erosion(m) for m in (a, b)]
        ways.append(distance_transform_edt(~surfaces[1])[surfaces[0]])
    maps = [MetaTensor(torch.from_numpy(m[None]).float(), affine=torch.eye(4) * 5) for m in (pred, truth)]
    found = scores("paper", *maps)
    assert found["hd95"] == [pytest.approx(np.percentile(np.concatenate(ways), 95))]
    assert found["asd"] == [pytest.approx((ways[0].mean() + ways[1].mean()) / 2)]


def test_pixel_metrics_of_a_lesion_counted_by_hand():
    # 100 pixels, 10 of truth, 8 predicted, 6 in common: tp 6, fp 2, fn 4, tn 88. Then all 100 missed of 20.
    truth, pred = torch.zeros(1, 10, 10, 1), torch.zeros(1, 10, 10, 1)
    truth[0, 0] = 1
    pred[0, 0, :6] = pred[0, 1, :2] = 1
    other = torch.zeros(1, 10, 10, 1)
    other[0, :2] = 1
    expected = {"sensitivity": 0.6, "specificity": 88 / 90, "accuracy": 0.94, "dice": 12 / 18}
    for name, value in expected.items():
        assert CaseMetric(name, 2)([pred], [truth]).item() == pytest.approx(value), name
    by_image, pooled = CaseMetric("dice", 2), PooledMetric("dice", 2)
    for metric in (by_image, pooled):
        metric([pred, torch.zeros_like(other)], [truth, other])
    assert by_image.aggregate().item() == pytest.approx((12 / 18 + 0) / 2)
    assert pooled.aggregate().item() == pytest.approx(12 / (12 + 2 + 4 + 20))
    assert math.isnan(CaseMetric("sensitivity", 2)([pred], [torch.zeros_like(truth)]).item())


def test_handlers_carry_their_names_and_unknown_metrics_are_refused():
    assert list(metric_handlers(["dice", "hd95"], 4)) == ["val_mean_dice", "val_hd95"]
    assert list(metric_handlers([], 2, pooled=["dice"])) == ["val_pooled_dice"]
    with pytest.raises(ValueError, match="metric.*'hd95'.*'hausdorff'"):
        metric_handlers(["hausdorff"], 2)
    for name in ("monai", "sound", "papers"):
        with pytest.raises(ValueError, match=f"convention.*'strict', 'paper'.*'{name}'"):
            metric_handlers(["dice"], 2, name)
