"""A network prepared for inference: the same output to rounding, in less time."""

from __future__ import annotations

import copy
import ctypes
import platform
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = ["WinogradConv2d", "fuse_convs", "prepare_for_inference"]


def prepare_for_inference(network: nn.Module) -> None:
    """Fold into the weights what each inference would compute anew: the same output to rounding.

    For this package's networks alone, which say ``registers_in_order``; any other stays as it is. Each batch
    normalisation goes into the convolution before it. The two are taken for a pair where a module registers one right
    after the other, as this package's blocks and timm's MaxViT do; an activation inside the normalisation (timm) stays.
    Then each module with a method ``fold`` folds what is its own. The network can then neither train nor load weights.

    On a CPU :class:`WinogradConv2d` takes the convolutions that it makes faster, and the process keeps the memory that
    a batch frees for the next one.

    Args:
        network: in eval mode, on the device it will run on; changed in place.
    """
    if not getattr(network, "registers_in_order", False):
        return
    for module in list(network.modules()):
        children = list(module.named_children())
        for (name, conv), (norm_name, norm) in zip(children, children[1:]):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, getattr(norm, "act", nn.Identity()))
    for module in list(network.modules()):
        fold = getattr(module, "fold", None)
        if fold is not None:
            fold()
    for module in list(network.modules()):
        for name, conv in module.named_children():
            if isinstance(conv, nn.Conv2d) and WinogradConv2d.pays(conv) and not isinstance(module, WinogradConv2d):
                setattr(module, name, WinogradConv2d(conv))
    if next(network.parameters()).device.type == "cpu":
        _keep_freed_memory()


def _keep_freed_memory(largest: int = 2**27, kept: int = 2**29) -> None:
    """Let glibc keep freed blocks up to a size, and so many bytes of them for each thread; nothing without glibc.

    By itself it returns those of a batch to the system after each use, and each page of the next costs a fault: up to
    a tenth of the time of a volume.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        if libc.mallopt(-3, largest) or libc.mallopt(-3, 2**25):  # M_MMAP_THRESHOLD, of which older ones take less
            libc.mallopt(-1, kept)  # M_TRIM_THRESHOLD


def fuse_convs(conv: nn.Conv2d, pointwise: nn.Conv2d) -> nn.Conv2d:
    """One convolution for a convolution and a 1x1 right after it.

    Args:
        conv: any of one group, with bias.
        pointwise: 1x1 on its output, with bias.

    Returns:
        A new convolution with the kernel of the first.
    """
    assert conv.bias is not None and pointwise.bias is not None
    fused, weight = copy.deepcopy(conv), pointwise.weight.detach()[:, :, 0, 0]
    fused.out_channels = pointwise.out_channels
    fused.weight = nn.Parameter(torch.tensordot(weight, conv.weight.detach(), 1))
    fused.bias = nn.Parameter(weight @ conv.bias.detach() + pointwise.bias.detach())
    return fused


class WinogradConv2d(nn.Module):
    """A 3x3 convolution by Winograd's minimal filtering F(4x4, 3x3): a quarter of the multiplications.

    Fast Algorithms for Convolutional Neural Networks, Lavin and Gray, 2015 (https://arxiv.org/abs/1509.09308).
    cuDNN chooses it by itself; PyTorch on a CPU never does, and takes up to twice as long for wide, small maps. Errors
    of rounding grow about fivefold. The transformed weights are four times as large. Under autocast and on maps with
    too few tiles to pay for reading them, the convolution itself runs.

    Args:
        conv: of 3x3, stride 1, padding 1, one group; stays part of this module.

    Shape:
        ``B, C, H, W`` to ``B, K, H, W``, channels last.
    """

    min_channels, max_weights = 128, 2**19  # beyond, transforming the maps, or reading the weights, takes what is won
    min_tiles, max_tiles = 64, 256  # in one product; more would leave the cache

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        filters = torch.tensor(
            [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6]]
            + [[1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]],
            dtype=torch.float64,
        )
        tiles = torch.tensor(
            [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0]]
            + [[0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]
        )
        outputs = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])
        kernels = conv.weight.detach().permute(2, 3, 1, 0).flatten(0, 1)  # 9, C, K
        weight = torch.tensordot(torch.kron(filters, filters), kernels.double(), 1).to(conv.weight)
        self.weight: Tensor
        self.tiles: Tensor
        self.outputs: Tensor
        self.register_buffer("weight", weight, persistent=False)  # 36, C, K
        self.register_buffer("tiles", torch.kron(tiles, tiles).to(weight), persistent=False)
        self.register_buffer("outputs", torch.kron(outputs, outputs).to(weight), persistent=False)

    @classmethod
    def pays(cls, conv: nn.Conv2d) -> bool:
        """Whether this way is right for a convolution and faster."""
        return (
            (conv.kernel_size, conv.stride, conv.dilation) == ((3, 3), (1, 1), (1, 1))
            and (conv.padding, conv.padding_mode, conv.groups) == ((1, 1), "zeros", 1)
            and (conv.weight.device.type, conv.weight.dtype) == ("cpu", torch.float32)
            and min(conv.in_channels, conv.out_channels) >= cls.min_channels
            and conv.in_channels * conv.out_channels <= cls.max_weights
        )

    def forward(self, x: Tensor) -> Tensor:
        tiles = -(-x.shape[2] // 4) * -(-x.shape[3] // 4)
        if len(x) * tiles < self.min_tiles or torch.is_autocast_enabled("cpu"):
            return self.conv(x)
        parts = x.split(max(1, self.max_tiles // tiles))
        return torch.cat([self._filter(part) for part in parts])

    def _filter(self, x: Tensor) -> Tensor:
        (b, c, h, w), k = x.shape, self.weight.shape[2]
        rows, columns = -(-h // 4), -(-w // 4)
        padded = F.pad(x.permute(0, 2, 3, 1), [0, 0, 1, 4 * columns - w + 1, 1, 4 * rows - h + 1])
        tiles = padded.unfold(1, 6, 4).unfold(2, 6, 4).permute(4, 5, 0, 1, 2, 3)  # 6, 6, B, rows, columns, C
        products = torch.bmm((self.tiles @ tiles.reshape(36, -1)).view(36, -1, c), self.weight)  # 36, B*rows*columns, K
        pixels = (self.outputs @ products.view(36, -1)).view(4, 4, b, rows, columns, k)
        y = pixels.permute(2, 3, 0, 4, 1, 5).reshape(b, 4 * rows, 4 * columns, k)
        if self.conv.bias is not None:
            y += self.conv.bias
        return y[:, :h, :w].permute(0, 3, 1, 2)
