"""The subset-sum loss against sums written out by hand."""

from __future__ import annotations

import pytest
import torch
from monai.losses import DiceCELoss

from networks import SubsetSumLoss

LOSS = DiceCELoss(to_onehot_y=True, softmax=True, lambda_dice=0.4, lambda_ce=0.6)


@pytest.fixture
def maps_and_label():
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 4, 8, 8, generator=generator, requires_grad=True) for _ in range(3)]
    return maps, torch.randint(0, 4, (2, 1, 8, 8), generator=generator)


def test_seven_subset_sums_written_out(maps_and_label):
    (a, b, c), y = maps_and_label
    expected = LOSS(a, y) + LOSS(b, y) + LOSS(c, y)
    expected = expected + LOSS(a + b, y) + LOSS(a + c, y) + LOSS(b + c, y) + LOSS(a + b + c, y)
    loss = SubsetSumLoss(LOSS)([a, b, c], y)
    torch.testing.assert_close(loss, expected)
    for got, wanted in zip(torch.autograd.grad(loss, (a, b, c)), torch.autograd.grad(expected, (a, b, c)), strict=True):
        torch.testing.assert_close(got, wanted)


def test_dice_and_cross_entropy_are_weighted_as_the_paper_says(maps_and_label):
    (a, _, _), y = maps_and_label
    p, onehot = a.softmax(1), torch.nn.functional.one_hot(y[:, 0], 4).movedim(-1, 1)
    intersection, total = (p * onehot).sum((2, 3)), p.sum((2, 3)) + onehot.sum((2, 3))
    dice = (1 - (2 * intersection + 1e-5) / (total + 1e-5)).mean()
    cross_entropy = -(p.log() * onehot).sum(1).mean()
    torch.testing.assert_close(SubsetSumLoss(LOSS)(a, y), 0.4 * dice + 0.6 * cross_entropy)


def test_weights_by_subset_and_any_number_of_maps(maps_and_label):
    (a, b, c), y = maps_and_label
    single = SubsetSumLoss(LOSS, weights=(1, 1, 1, 0, 0, 0, 0))
    torch.testing.assert_close(single([a, b, c], y), LOSS(a, y) + LOSS(b, y) + LOSS(c, y))
    weighted = SubsetSumLoss(LOSS, weights=(1, 0.5, 2))
    torch.testing.assert_close(weighted([a, b], y), LOSS(a, y) + 0.5 * LOSS(b, y) + 2 * LOSS(a + b, y))
    assert len(list(SubsetSumLoss.subsets(4))) == 15
    with pytest.raises(ValueError, match="7.*3 weights"):
        weighted([a, b, c], y)
    with pytest.raises(ValueError, match="at least one"):
        SubsetSumLoss(LOSS)([], y)
