"""Attention and what it is computed with, for more than one file."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MultiHeadSelfAttention", "matmul_fp32"]


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


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product in at least 32 bit, inside autocast too.

    TorchScript, scripted or traced, ignores an autocast context of its own: there the product is taken in 64 bit,
    which autocast leaves alone.

    Args:
        a: ``*, N, K``.
        b: ``*, K, M``.

    Returns:
        ``*, N, M``, 32 bit.
    """
    if torch.jit.is_scripting():
        return (a.double() @ b.double()).float()
    if torch.jit.is_tracing():
        return (a.double() @ b.double()).float()
    with torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float()
