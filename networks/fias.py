"""FIAS: Feature Imbalance-Aware Medical Image Segmentation with Dynamic Fusion and Mixing Attention.

Liu, Xu and Ho, 2024 (https://arxiv.org/abs/2411.10881). A global encoder (DilateFormer) and a local one (DMK) see the
same slice; at each of four scales CAF weighs the two against each other, and the MixAtt decoder goes up through the
fused features. The paper leaves points open. Read from its text:

- eq. 1: the depthwise convolutions take ``L_l`` (the printed index ``l-1`` is a slip), batch normalisation and ReLU
  follow the 3x3 and the 1x1 convolution (as printed the branch would be linear).
- eq. 3: ``P_map`` is max pooling.
- eq. 5: ``P_avg``, an average over channels, is taken as the 1x1 convolutions to one map.
- eq. 7 and 10: the 3x3 convolution of eq. 10 halves the channels for the next block, which makes eq. 7 "reduce the
  channel dimension by half"; the last block, which no block follows, keeps them. The deepest block has none before it.
- eq. 8 and 10: the same attention, computed once.

And chosen, where the text is silent:

- encoders: the tiny DilateFormer; a DMK stem of 36 channels at half size, then the DilateFormer's widths.
- eq. 8: no position code, and no feed-forward network after the attention.
- eq. 9: the paper prints the pooled sum alone. The draw of a size and a cell, the gate, and the average in evaluation
  follow SvANet's text; see :class:`MonteCarloAttention`.
- heads: 1x1 convolutions on the last three blocks, up-sampled bilinearly, as every up-sampling here. In training the
  loss takes their maps (:class:`networks.SubsetSumLoss` forms the seven sums); in inference their sum is the
  prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dilateformer import DilateFormer
from .errors import check_option
from .layers import (
    ConvNormAct,
    Heads,
    MultiHeadSelfAttention,
    ScaleFusion,
    SumFusion,
    check_batch,
    check_input,
    check_spatial_dims,
    upsample,
)

__all__ = ["FIAS"]


class FIAS(nn.Module):
    """Feature Imbalance-Aware Segmentation network, figure 1 of the paper.

    Args:
        in_channels: channels of the slice, 1 for MR and CT, 3 for RGB.
        out_channels: number of classes, background included.
        spatial_dims: 2, as MONAI's networks take it.
        dropout: rate in the decoder's blocks, eq. 7. The paper gives none.
        pretrained: path of an official DilateFormer-tiny checkpoint, or False; True raises an error that says where
            to get one. A file fits one or three input channels. See :class:`DilateFormer`.
        drop_path: stochastic depth of the DilateFormer. The paper gives none.
        local_encoder: False leaves the DMK encoder out (table 3, first row); CAF then weighs one input.
        fusion: ``"caf"``, or ``"add"`` for the sum of the two encoders' features (table 3, second row).
        decoder: ``"mixatt"``, or ``"conv"`` for blocks without the attention between their two convolutions (table 3,
            third row).
        deep_supervision: in training return the three maps rather than their sum.

    Shape:
        ``B, in_channels, H, W`` with any ``H, W >= 32`` to logits ``B, out_channels, H, W``. In training with
        ``deep_supervision`` a list of three such maps, the finest first.

    Raises:
        FileNotFoundError: when there is no file of pretrained weights.
        DataError: when they do not fit, naming the tensors; on an unknown argument value; in ``forward`` on a wrong
            rank, channel count or size, and in training on a single slice of 32 x 32.

    Example:
        >>> net = FIAS(in_channels=1, out_channels=4).eval()
        >>> net(torch.zeros(2, 1, 64, 96)).shape
        torch.Size([2, 4, 64, 96])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        spatial_dims: int = 2,
        dropout: float = 0.1,
        pretrained: bool | str | Path = False,
        drop_path: float = 0.1,
        local_encoder: bool = True,
        fusion: str = "caf",
        decoder: str = "mixatt",
        deep_supervision: bool = True,
    ) -> None:
        super().__init__()
        check_spatial_dims("FIAS", spatial_dims)
        check_option("fusion", fusion, ("caf", "add"))
        check_option("decoder", decoder, ("mixatt", "conv"))
        self.in_channels = in_channels
        self.dropout_rate = dropout
        channels = DilateFormer.channels
        inputs = 2 if local_encoder else 1
        self.global_encoder = DilateFormer(in_channels, pretrained, drop_path)
        self.local_encoder = DMKEncoder(in_channels, channels) if local_encoder else None
        self.fusion = ScaleFusion(ContextAwareFusion(c, inputs) if fusion == "caf" else SumFusion() for c in channels)
        self.decoder = MixAttDecoder(channels, attention=decoder == "mixatt", dropout=dropout)
        self.heads = Heads(self.decoder.out_channels, out_channels, deep_supervision)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        check_input(x, self.in_channels, "FIAS")
        if self.training:
            check_batch(x, "FIAS")
        encoded = [self.global_encoder(x)]
        if self.local_encoder is not None:
            encoded.append(self.local_encoder(x))
        fused = self.fusion(encoded)
        decoded = self.decoder(fused)
        return self.heads(decoded, like=x)


class DMKEncoder(nn.Module):
    """Depthwise multi-kernel (DMK) encoder, figure 1 (b): a stem at 1/2, then one :class:`DMKBlock` per scale.

    Args:
        in_channels: channels of the slice.
        channels: channels of the four scales.

    Shape:
        ``B, in_channels, H, W`` to four maps at 1/4 to 1/32, odd sizes rounded up.
    """

    def __init__(self, in_channels: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.stem = ConvNormAct(in_channels, channels[0] // 2, stride=2)
        widths = (channels[0] // 2, *channels)
        self.blocks = nn.ModuleList(DMKBlock(widths[i], widths[i + 1]) for i in range(len(channels)))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        return features


class DMKBlock(nn.Module):
    """Depthwise multi-kernel convolution, eq. 1 and 2: a 3x3 of stride 2, depthwise 5x5 and 7x7, a 1x1 of the sum.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.

    Shape:
        ``B, in_channels, H, W`` to ``B, out_channels, ceil(H / 2), ceil(W / 2)``.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.local = ConvNormAct(in_channels, out_channels, stride=2)
        self.context = MultiKernelConv(out_channels)
        self.mix = ConvNormAct(out_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.local(x)  # L_l
        return self.mix(self.context(x))  # eq. 1 and 2


class MultiKernelConv(nn.Module):
    """Depthwise 5x5 and 7x7 convolutions added to their input, the sum in eq. 2.

    Args:
        channels: channels of input and output.

    Shape:
        ``B, C, H, W`` to ``B, C, H, W``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv5 = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.conv7 = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv5(x) + self.conv7(x)


class ContextAwareFusion(nn.Module):
    """Context-aware fusion (CAF), figure 2 and eq. 3 to 6: channel weights, then spatial weights.

    Args:
        channels: channels of each input and of the output.
        inputs: number of feature maps to fuse.

    Shape:
        a list of ``inputs`` maps ``B, channels, H, W`` to ``B, channels, H, W``.
    """

    def __init__(self, channels: int, inputs: int = 2) -> None:
        super().__init__()
        stacked = inputs * channels
        self.channel_avg = nn.Conv2d(stacked, stacked // 2, 1)
        self.channel_max = nn.Conv2d(stacked, stacked // 2, 1)
        self.channel = nn.Conv2d(stacked, stacked, 1)
        self.reduce = nn.Conv2d(stacked, channels, 1)
        self.spatial_in = nn.ModuleList(nn.Conv2d(channels, 1, 1) for _ in range(inputs))
        self.spatial = nn.Conv2d(1, 1, 7, padding=3)

    def forward(self, features: list[Tensor]) -> Tensor:
        stacked = torch.cat(features, 1)
        average = self.channel_avg(F.adaptive_avg_pool2d(stacked, 1))  # before the convolution: equal, and cheaper
        maximum = self.channel_max(stacked).flatten(2).max(2, keepdim=True).values[..., None]
        w_ch = torch.sigmoid(self.channel(torch.cat([average, maximum], 1)))  # eq. 3
        fused = self.reduce(w_ch * stacked)  # eq. 4
        summary = torch.zeros_like(fused[:, :1])
        for i, conv in enumerate(self.spatial_in):
            summary = summary + conv(features[i])
        w_sp = torch.sigmoid(self.spatial(summary))  # eq. 5
        return w_sp * fused  # eq. 6


class MixAttDecoder(nn.Module):
    """Mixing-attention decoder, figure 1 (c): four blocks from 1/32 to 1/4, each with the fused feature of its scale.

    Args:
        channels: channels of the fused features, 1/4 to 1/32.
        attention: False for blocks of plain convolutions.
        dropout: rate in each block, eq. 7.

    Shape:
        four maps at 1/4 to 1/32 to the last three blocks' outputs, the finest (1/4) first.
    """

    num_heads = (8, 6, 4, 2)

    def __init__(self, channels: Sequence[int], attention: bool = True, dropout: float = 0.1) -> None:
        super().__init__()
        deepest_first = channels[::-1]
        widths = [*(c // 2 for c in deepest_first[:-1]), deepest_first[-1]]
        self.out_channels = widths[:0:-1]
        blocks = []
        for i, (c, heads) in enumerate(zip(deepest_first, self.num_heads, strict=True)):
            below = widths[i - 1] if i else 0
            blocks.append(MixAttBlock(below + c, c, widths[i], heads if attention else None, dropout))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, fused: list[Tensor]) -> list[Tensor]:
        x = fused[-1]
        decoded: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            f = fused[len(fused) - 1 - i]
            x = block(f if i == 0 else torch.cat([upsample(x, like=f), f], 1))
            decoded.insert(0, x)
        return decoded[:3]


class MixAttBlock(nn.Module):
    """One block of the MixAtt decoder, eq. 7 to 10.

    Args:
        in_channels: channels of the concatenated input.
        channels: channels of the attention.
        out_channels: channels of the output.
        num_heads: heads of the self-attention; None leaves the attention out (table 3, third row).
        dropout: rate after the first convolution.

    Shape:
        ``B, in_channels, H, W`` to ``B, out_channels, H, W``.
    """

    def __init__(
        self, in_channels: int, channels: int, out_channels: int, num_heads: int | None, dropout: float
    ) -> None:
        super().__init__()
        self.entry = nn.Sequential(ConvNormAct(in_channels, channels), nn.Dropout(dropout))
        self.attention = MixingAttention(channels, num_heads) if num_heads else nn.Identity()
        self.project = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        p1 = self.entry(x)  # eq. 7
        return self.project(self.attention(p1))  # eq. 8 to 10


class MixingAttention(nn.Module):
    """Self-attention and Monte Carlo attention mixed, eq. 8 to 10 without eq. 10's convolution.

    Args:
        channels: channels of input and output.
        num_heads: heads of the self-attention.

    Shape:
        ``B, C, H, W`` to ``B, C, H, W``.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.self_attention = MultiHeadSelfAttention(channels, num_heads)
        self.monte_carlo = MonteCarloAttention(channels)

    def forward(self, p1: Tensor) -> Tensor:
        b, c, h, w = p1.shape
        tokens = self.norm(p1.permute(0, 2, 3, 1).flatten(1, 2))
        attended = self.self_attention(tokens.reshape(b, h, w, c)).permute(0, 3, 1, 2)
        p2 = attended + p1  # eq. 8
        return p2 * self.monte_carlo(p2) + attended  # eq. 9 and 10


class MonteCarloAttention(nn.Module):
    """Monte Carlo attention, eq. 9, after SvANet (Dai, 2024): channel weights from a randomly pooled cell.

    In training one of the pooled sizes 3 x 3, 2 x 2 and 1 x 1 is drawn per forward, and one cell of it, for the whole
    batch, from torch's random state; a squeeze-and-excitation gate turns it into weights. In evaluation the cell is
    the global average, so the result is deterministic. SvANet's code differs from its text: it shuffles the pixels
    before pooling, and its gate keeps at least 32 channels.

    Args:
        channels: channels of the input.
        ratio: reduction of the gate.

    Shape:
        ``B, C, H, W`` to ``B, C, 1, 1`` in 0 to 1.
    """

    sizes = (3, 2, 1)
    __constants__ = ["sizes"]  # for TorchScript

    def __init__(self, channels: int, ratio: int = 4) -> None:
        super().__init__()
        squeezed = channels // ratio
        self.gate = nn.Sequential(
            nn.Conv2d(channels, squeezed, 1), nn.ReLU(), nn.Conv2d(squeezed, channels, 1), nn.Sigmoid()
        )
        # Drawing one of all cells by these odds is drawing a size, then a cell of it: no branch on a random value,
        # which torch.compile and TorchScript could not follow.
        odds = [1 / len(self.sizes) / size**2 for size in self.sizes for _ in range(size**2)]
        self.odds: Tensor
        self.register_buffer("odds", torch.tensor(odds), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            cells = torch.cat([F.adaptive_avg_pool2d(x, size).flatten(2) for size in self.sizes], 2)
            drawn = torch.multinomial(self.odds, 1)
            cell = cells.index_select(2, drawn).unsqueeze(3)
        else:
            cell = F.adaptive_avg_pool2d(x, 1)
        return self.gate(cell)
