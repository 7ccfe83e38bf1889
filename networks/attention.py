"""Attention blocks that more than one file uses."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MultiHeadSelfAttention"]


class MultiHeadSelfAttention(nn.Module):
    """Global multi-head self-attention over all positions of a feature map, without position code.

    Attention Is All You Need, Vaswani et al. 2017, through
    :func:`torch.nn.functional.scaled_dot_product_attention`: the weights are never held in memory where
    the device has a fused kernel.

    Args:
        channels: channels of input and output.
        num_heads: number of heads, a divisor of ``channels``.

    Shape:
        ``B, H, W, C`` to ``B, H, W, C``, channels last.

    Raises:
        ValueError: when ``num_heads`` does not divide ``channels``.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide channels={channels}.")
        self.num_heads = num_heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        qkv = self.qkv(x).reshape(b, h * w, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.proj(x.transpose(1, 2).reshape(b, h, w, c))
