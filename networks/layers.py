"""What the networks are wired from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import DataError

__all__ = [
    "ConvNormAct",
    "Heads",
    "MultiHeadSelfAttention",
    "ScaleFusion",
    "SumFusion",
    "check_batch",
    "check_input",
    "check_spatial_dims",
    "linear_parts",
    "pad_to_multiple",
    "upsample",
]


class ConvNormAct(nn.Sequential):
    """Convolution without bias, batch normalisation, activation.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: side of the square kernel. An odd one is padded to keep the size at ``stride=1``, and to round an
            odd size up at 2; a 2x2 of stride 2 needs no padding.
        stride: step of the convolution.
        act: class of the activation.

    Shape:
        ``B, in_channels, H, W`` to ``B, out_channels, ceil(H / stride), ceil(W / stride)``, for an even kernel rounded
        down.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        act: type[nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size, stride, (kernel_size - 1) // 2, bias=False),
            nn.BatchNorm2d(out_channels),
            act(),
        )


class ScaleFusion(nn.Module):
    """The encoders' features fused scale by scale.

    Args:
        fusions: one module per scale, from a list of maps to one map.

    Shape:
        a list of encoders, each a list of maps ``B, C_i, H_i, W_i``, to a list of one map per scale.
    """

    def __init__(self, fusions: Iterable[nn.Module]) -> None:
        super().__init__()
        self.scales = nn.ModuleList(fusions)

    def forward(self, encoded: list[list[Tensor]]) -> list[Tensor]:
        fused: list[Tensor] = []
        for scale, fusion in enumerate(self.scales):
            fused.append(fusion([features[scale] for features in encoded]))
        return fused


class SumFusion(nn.Module):
    """Sum of the encoders' features, one or more.

    Shape:
        a list of maps ``B, C, H, W`` to ``B, C, H, W``.
    """

    def forward(self, features: list[Tensor]) -> Tensor:
        total = features[0]
        for feature in features[1:]:
            total = total + feature
        return total


class Heads(nn.Module):
    """One prediction map per scale by 1x1 convolutions, each up-sampled to the input's size, and their sum.

    Args:
        channels: channels of each scale's feature, finest first.
        out_channels: number of classes.
        deep_supervision: in training return the maps rather than their sum.

    Shape:
        a list of features ``B, C_i, h_i, w_i``; ``like``: the network's input ``B, *, H, W``; ``padded``: the padded
        input that the features were made from, if it was padded: the maps are resized to it, then cropped to
        ``like``. To ``B, out_channels, H, W``, or in training with ``deep_supervision`` a list of them in the
        features' order.
    """

    def __init__(self, channels: Sequence[int], out_channels: int, deep_supervision: bool) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.convs = nn.ModuleList(nn.Conv2d(c, out_channels, 1) for c in channels)

    def forward(self, features: list[Tensor], like: Tensor, padded: Tensor | None = None) -> Tensor | list[Tensor]:
        maps: list[Tensor] = []
        for i, conv in enumerate(self.convs):
            logits = upsample(conv(features[i]), like=like if padded is None else padded)
            maps.append(logits[:, :, : like.shape[2], : like.shape[3]])
        if self.training and self.deep_supervision:
            return maps
        total = maps[0]
        for logits in maps[1:]:
            total = total + logits
        return total


def pad_to_multiple(x: Tensor, multiple: tuple[int, int]) -> Tensor:
    """Pad a slice with zeros below and right until its sides are multiples.

    Args:
        x: ``B, C, H, W``.
        multiple: of the height and of the width.

    Returns:
        ``B, C, H', W'`` with ``H' >= H`` and ``W' >= W``.
    """
    return F.pad(x, [0, -x.shape[3] % multiple[1], 0, -x.shape[2] % multiple[0]])


def upsample(x: Tensor, like: Tensor) -> Tensor:
    """Resize ``x`` bilinearly to the height and width of ``like``.

    Args:
        x: ``B, C, h, w``.
        like: ``B, *, H, W``, only its size is used.

    Returns:
        ``B, C, H, W``.
    """
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)


def check_spatial_dims(network: str, spatial_dims: int) -> None:
    """Refuse anything but two dimensions.

    Args:
        network: name for the message.
        spatial_dims: as given to the network's constructor.

    Raises:
        DataError: when ``spatial_dims`` is not 2.
    """
    if spatial_dims != 2:
        raise DataError(
            f"{network} segments 2D slices: expected spatial_dims=2, got {spatial_dims}. "
            "For volumes, run it over slices with networks.engine.inferers.LabelInferer."
        )


def check_input(x: Tensor, in_channels: int, network: str) -> None:
    """Refuse an input that the network cannot take, and say what it takes. Free of cost while tracing.

    The limit of 32 pixels is one position at the encoders' deepest scale.

    Args:
        x: expected ``B, in_channels, H, W`` with ``H, W >= 32``.
        in_channels: channels that the network was built for.
        network: name for the message.

    Raises:
        DataError: on a wrong rank, channel count or a height or width below 32.
    """
    if torch.jit.is_tracing():
        return
    if x.dim() != 4:
        raise DataError(f"{network} expects B, {in_channels}, H, W (4 dimensions), got shape {list(x.shape)}.")
    if x.shape[1] != in_channels:
        raise DataError(
            f"{network} was built with in_channels={in_channels}, got an input of {x.shape[1]} channels: "
            f"shape {list(x.shape)}."
        )
    if x.shape[2] < 32 or x.shape[3] < 32:
        raise DataError(
            f"{network} expects slices of at least 32 x 32 pixels, got {x.shape[2]} x {x.shape[3]}. "
            "Pad or resize them first."
        )


def check_batch(x: Tensor, network: str) -> None:
    """Refuse a batch that batch normalisation cannot train on: one value per channel at 1/32.

    Args:
        x: ``B, C, H, W``, as the encoders take it.
        network: name for the message.

    Raises:
        DataError: on a single slice of at most 32 x 32.
    """
    if x.shape[0] == 1 and x.shape[2] <= 32 and x.shape[3] <= 32:
        raise DataError(
            f"{network} cannot train on a single slice of {x.shape[2]} x {x.shape[3]} pixels: at 1/32 it is one value "
            "per channel, which batch normalisation cannot take. Train on larger slices, or on batches without a rest "
            "of one."
        )


def linear_parts(x: Tensor, weight: Tensor, bias: Tensor, parts: int) -> list[Tensor]:
    """A linear layer's output in equal parts, each by a product of its own: compilers would copy what is split.

    Args:
        x: ``*, C``.
        weight: ``parts * D, C``.
        bias: ``parts * D``.
        parts: how many.

    Returns:
        ``parts`` tensors ``*, D``.
    """
    weights, biases = weight.chunk(parts), bias.chunk(parts)
    return [F.linear(x, weights[i], biases[i]) for i in range(parts)]


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
        parts = linear_parts(x.flatten(1, 2), self.qkv.weight, self.qkv.bias, 3)
        heads = [part.reshape(b, h * w, self.num_heads, c // self.num_heads).transpose(1, 2) for part in parts]
        x = F.scaled_dot_product_attention(heads[0], heads[1], heads[2])
        return self.proj(x.transpose(1, 2).reshape(b, h, w, c))
