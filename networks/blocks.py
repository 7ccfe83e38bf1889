"""Building blocks that every network of this package is wired from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ConvNormAct", "check_input", "check_spatial_dims", "upsample"]


class ConvNormAct(nn.Sequential):
    """Convolution without bias, batch normalisation, activation.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: side of the square kernel; the padding keeps the size at ``stride=1``.
        stride: step of the convolution, an odd size is rounded up.
        act: class of the activation.

    Shape:
        ``B, in_channels, H, W`` to ``B, out_channels, ceil(H / stride), ceil(W / stride)``.
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
            nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False),
            nn.BatchNorm2d(out_channels),
            act(),
        )


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
        ValueError: when ``spatial_dims`` is not 2.
    """
    if spatial_dims != 2:
        raise ValueError(
            f"{network} segments 2D slices: expected spatial_dims=2, got {spatial_dims}. "
            "For volumes, run it over slices with monai.inferers.SliceInferer."
        )


def check_input(x: Tensor, in_channels: int, network: str) -> None:
    """Refuse an input that the network cannot take, and say what it takes. Free of cost while tracing.

    Args:
        x: expected ``B, in_channels, H, W`` with ``H, W >= 32``.
        in_channels: channels that the network was built for.
        network: name for the message.

    The limit of 32 pixels is one position at the encoders' deepest scale.

    Raises:
        ValueError: on a wrong rank, channel count or a height or width below 32.
    """
    if torch.jit.is_tracing():
        return
    if x.dim() != 4:
        raise ValueError(f"{network} expects B, {in_channels}, H, W (4 dimensions), got shape {list(x.shape)}.")
    if x.shape[1] != in_channels:
        raise ValueError(
            f"{network} was built with in_channels={in_channels}, got an input of {x.shape[1]} channels: "
            f"shape {list(x.shape)}."
        )
    if x.shape[2] < 32 or x.shape[3] < 32:
        raise ValueError(
            f"{network} expects slices of at least 32 x 32 pixels, got {x.shape[2]} x {x.shape[3]}. "
            "Pad or resize them first."
        )
