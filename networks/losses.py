"""The papers' training objectives, thin over MONAI's losses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

__all__ = ["SubsetSumLoss"]


class SubsetSumLoss(nn.Module):
    r"""A loss summed over the sums of all non-empty subsets of a network's prediction maps.

    FIAS section 2.3 and eq. 11, after MERIT's MUTATION (Rahman and Marculescu, MIDL 2023): of :math:`n` maps
    of logits, the :math:`2^n - 1` subsets are each summed to one map, and
    :math:`L = \sum_S w_S \, \mathrm{loss}(\sum_{i \in S} p_i, y)`. With FIAS's three maps and
    ``DiceCELoss(lambda_dice=0.4, lambda_ce=0.6)`` this is the paper's objective.

    Args:
        loss: what each subset's map and the label are given to, such as :class:`monai.losses.DiceCELoss`.
        weights: one per subset, in the order of :meth:`subsets`: single maps first, the sum of all last.
            Defaults to 1 for each. A subset of weight 0 costs nothing: ``(1, 1, 1, 0, 0, 0, 0)`` is plain deep
            supervision of three maps.

    Shape:
        ``pred``: one map or a sequence of maps, ``B, C, H, W`` logits each; ``target``: what ``loss`` expects,
        ``B, 1, H, W`` class indices for MONAI's losses with ``to_onehot_y``. One map gives ``loss`` itself.

    Raises:
        ValueError: when no map is given, or the number of weights is not :math:`2^n - 1`.
    """

    def __init__(self, loss: nn.Module, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.loss = loss
        self.weights = weights

    @staticmethod
    def subsets(n: int) -> Iterator[tuple[int, ...]]:
        """The non-empty subsets of ``range(n)``, smallest first: ``(0,), (1,), (0, 1)`` for two maps."""
        for size in range(1, n + 1):
            yield from combinations(range(n), size)

    def forward(self, pred: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        if isinstance(pred, Tensor):
            return self.loss(pred, target)
        subsets = list(self.subsets(len(pred)))
        if not subsets:
            raise ValueError("SubsetSumLoss needs at least one prediction map, got none.")
        weights = [1.0] * len(subsets) if self.weights is None else self.weights
        if len(weights) != len(subsets):
            raise ValueError(f"{len(pred)} maps have {len(subsets)} non-empty subsets, got {len(weights)} weights.")
        losses = [
            weight * self.loss(sum((pred[i] for i in subset[1:]), start=pred[subset[0]]), target)
            for subset, weight in zip(subsets, weights, strict=True)
            if weight
        ]
        return torch.stack(losses).sum()
