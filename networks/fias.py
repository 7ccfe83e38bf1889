"""FIAS: Feature Imbalance-Aware Medical Image Segmentation with Dynamic Fusion and Mixing Attention.

Liu, Xu and Ho, 2024 (https://arxiv.org/abs/2411.10881). A global encoder (DilateFormer) and a local one (DMK) see the
same slice; at each of four scales CAF weighs the two against each other, and the MixAtt decoder goes up through the
fused features. The paper leaves a few points open; this is how they are read here:

- eq. 1: the depthwise convolutions take ``L_l`` (the printed index ``l-1`` is a slip), batch normalisation and ReLU
  follow the 3x3 and the 1x1 convolution (as printed the branch would be linear).
- eq. 3: ``P_map`` is max pooling. A 1x1 convolution commutes with average pooling, so there it comes after it: equal,
  and cheaper.
- eq. 5: ``P_avg`` averages over channels, which its 1x1 convolutions to one map do.
- eq. 10's 3x3 convolution halves the channels for the next block, which makes eq. 7 "reduce the channel dimension by
  half"; the last block, which no block follows, keeps them. The deepest block has no block before it. Attention is
  computed once and used in eq. 8 and eq. 10.
- heads: 1x1 convolutions on the last three blocks. In training the loss takes their maps
  (:class:`networks.SubsetSumLoss` forms the seven sums); in inference the sum of the three is the prediction.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import MultiHeadSelfAttention
from .blocks import ConvNormAct, Heads, SumFusion, check_input, check_option, check_spatial_dims, upsample
from .dilateformer import DilateFormer

__all__ = ["FIAS"]


class FIAS(nn.Module):
    """Feature Imbalance-Aware Segmentation network, figure 1 of the paper.

    Args:
        in_channels: channels of the slice, 1 for MR and CT, 3 for RGB.
        out_channels: number of classes, background included.
        spatial_dims: 2, as MONAI's networks take it.
        dropout: rate in the decoder's blocks, eq. 7.
        pretrained: path of an official DilateFormer-tiny checkpoint, or False. See :class:`DilateFormer`.
        drop_path: stochastic depth of the DilateFormer.
        local_encoder: False leaves the DMK encoder out (table 3, first row); CAF then weighs one input.
        fusion: ``"caf"``, or ``"sum"`` of the two encoders' features (table 3, second row).
        decoder: ``"mixatt"``, or ``"conv"`` for blocks of two plain convolutions (table 3, third row).
        deep_supervision: in training return the three maps rather than their sum.

    Shape:
        ``B, in_channels, H, W`` with any ``H, W >= 32`` to logits ``B, out_channels, H, W``. In training with
        ``deep_supervision`` a list of three such maps, the finest first.

    Raises:
        ValueError: on an unknown argument value, and in ``forward`` on a wrong rank, channel count or size.

    Example:
        >>> net = FIAS(in_channels=1, out_channels=4).eval()
        >>> net(torch.zeros(2, 1, 64, 96)).shape
        torch.Size([2, 4, 64, 96])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
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
        check_option("fusion", fusion, ("caf", "sum"))
        check_option("decoder", decoder, ("mixatt", "conv"))
        self.in_channels = in_channels
        channels = DilateFormer.channels
        inputs = 2 if local_encoder else 1
        self.global_encoder = DilateFormer(in_channels, pretrained, drop_path)
        self.local_encoder = DMKEncoder(in_channels, channels) if local_encoder else None
        self.fusion = nn.ModuleList(ContextAwareFusion(c, inputs) if fusion == "caf" else SumFusion() for c in channels)
        self.decoder = MixAttDecoder(channels, attention=decoder == "mixatt", dropout=dropout)
        self.heads = Heads(self.decoder.out_channels[-3:][::-1], out_channels, deep_supervision)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        check_input(x, self.in_channels, "FIAS")
        encoded = [self.global_encoder(x)]
        if self.local_encoder is not None:
            encoded.append(self.local_encoder(x))
        fused: list[Tensor] = []
        for level, fusion in enumerate(self.fusion):
            fused.append(fusion([features[level] for features in encoded]))
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

    def __init__(self, in_channels: int, channels: tuple[int, ...]) -> None:
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

    Shape:
        ``B, in_channels, H, W`` to ``B, out_channels, ceil(H / 2), ceil(W / 2)``.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.local = ConvNormAct(in_channels, out_channels, stride=2)
        self.context5 = nn.Conv2d(out_channels, out_channels, 5, padding=2, groups=out_channels)
        self.context7 = nn.Conv2d(out_channels, out_channels, 7, padding=3, groups=out_channels)
        self.mix = ConvNormAct(out_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.local(x)
        return self.mix(x + self.context5(x) + self.context7(x))


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
        both = inputs * channels
        self.channel_avg = nn.Conv2d(both, both // 2, 1)
        self.channel_max = nn.Conv2d(both, both // 2, 1)
        self.channel = nn.Conv2d(both, both, 1)
        self.reduce = nn.Conv2d(both, channels, 1)
        self.spatial_in = nn.ModuleList(nn.Conv2d(channels, 1, 1) for _ in range(inputs))
        self.spatial = nn.Conv2d(1, 1, 7, padding=3)

    def forward(self, features: list[Tensor]) -> Tensor:
        both = torch.cat(features, 1)
        average = self.channel_avg(F.adaptive_avg_pool2d(both, 1))
        maximum = self.channel_max(both).amax([2, 3], keepdim=True)
        w_channel = torch.sigmoid(self.channel(torch.cat([average, maximum], 1)))  # eq. 3
        fused = self.reduce(w_channel * both)  # eq. 4
        summary = torch.zeros_like(fused[:, :1])
        for i, conv in enumerate(self.spatial_in):
            summary = summary + conv(features[i])
        w_spatial = torch.sigmoid(self.spatial(summary))  # eq. 5
        return w_spatial * fused  # eq. 6


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

    def __init__(self, channels: tuple[int, ...], attention: bool = True, dropout: float = 0.1) -> None:
        super().__init__()
        deepest_first = channels[::-1]
        self.out_channels = [*(c // 2 for c in deepest_first[:-1]), deepest_first[-1]]
        blocks = []
        for i, (c, heads) in enumerate(zip(deepest_first, self.num_heads, strict=True)):
            below = self.out_channels[i - 1] if i else 0
            blocks.append(MixAttBlock(below + c, c, self.out_channels[i], heads if attention else 0, dropout))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        x = features[-1]
        decoded: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i > 0:
                skip = features[len(features) - 1 - i]
                x = torch.cat([upsample(x, like=skip), skip], 1)
            x = block(x)
            decoded.append(x)
        return [decoded[3], decoded[2], decoded[1]]


class MixAttBlock(nn.Module):
    """One block of the MixAtt decoder, eq. 7 to 10.

    Args:
        in_channels: channels of the concatenated input.
        channels: channels of the attention.
        out_channels: channels of the output.
        num_heads: heads of the self-attention, 0 for plain convolutions (table 3, third row).
        dropout: rate after the first convolution.

    Shape:
        ``B, in_channels, H, W`` to ``B, out_channels, H, W``.
    """

    def __init__(self, in_channels: int, channels: int, out_channels: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.entry = nn.Sequential(ConvNormAct(in_channels, channels), nn.Dropout(dropout))
        self.attention = MixingAttention(channels, num_heads) if num_heads else nn.Identity()
        self.project = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.attention(self.entry(x)))


class MixingAttention(nn.Module):
    """Self-attention and Monte Carlo attention mixed, eq. 8 to 10 without eq. 10's convolution.

    Shape:
        ``B, C, H, W`` to ``B, C, H, W``.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.self_attention = MultiHeadSelfAttention(channels, num_heads)
        self.monte_carlo = MonteCarloAttention(channels)

    def forward(self, p1: Tensor) -> Tensor:
        attended = self.self_attention(self.norm(p1.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        p2 = attended + p1  # eq. 8
        return p2 * self.monte_carlo(p2) + attended  # eq. 9 and 10


class MonteCarloAttention(nn.Module):
    """Monte Carlo attention, eq. 9, after SvANet (Dai, 2024): channel weights from a randomly pooled cell.

    In training one of the pooled sizes 3 x 3, 2 x 2 and 1 x 1 is drawn per forward, and one cell of it, from torch's
    random state; a squeeze-and-excitation gate turns it into weights. In evaluation the cell is the global average,
    so the result is deterministic.

    Args:
        channels: channels of the input.
        ratio: reduction of the gate, which keeps at least 8 channels.

    Shape:
        ``B, C, H, W`` to ``B, C, 1, 1`` in 0 to 1.
    """

    sizes = (3, 2, 1)

    def __init__(self, channels: int, ratio: int = 4) -> None:
        super().__init__()
        squeezed = max(channels // ratio, 8)
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
            cells = torch.cat(
                [
                    F.adaptive_avg_pool2d(x, 3).flatten(2),
                    F.adaptive_avg_pool2d(x, 2).flatten(2),
                    F.adaptive_avg_pool2d(x, 1).flatten(2),
                ],
                2,
            )
            drawn = torch.multinomial(self.odds, 1)
            cell = cells.index_select(2, drawn).unsqueeze(3)
        else:
            cell = F.adaptive_avg_pool2d(x, 1)
        return self.gate(cell)
