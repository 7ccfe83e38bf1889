"""DilateFormer, the global encoder of FIAS.

DilateFormer: Multi-Scale Dilated Transformer for Visual Recognition, Jiao et al., IEEE TMM 2023
(https://arxiv.org/abs/2302.01791), the tiny model, as a feature pyramid. State-dict keys are those of the official
repository (JIAOJIAYUASD/dilateformer), so its checkpoints load; the code here is written from the paper.

Feature maps travel channels last in memory (``B, C, H, W`` permuted), and as a list of tokens ``B, N, C`` where layers
ask for no neighbours: layer norm and linear layers take them without a copy, and compilers know these by that form.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .errors import DataError
from .layers import MultiHeadSelfAttention, check_input, linear_parts
from .weights import StateDict, load_backbone, read_weights

__all__ = ["DilateFormer", "MultiScaleDilatedAttention", "dilated_attention"]


def dilated_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int, kernel_size: int, dilation: int) -> Tensor:
    """Sliding-window dilated attention (SWDA), eq. 2 of the DilateFormer paper.

    Each position attends to the ``kernel_size`` squared positions around it, ``dilation`` pixels apart. Positions
    beyond the border take part with logit 0 and value 0, as in the official code. Keys and values are read as
    shifted slices of one padded map: nothing is unfolded, memory holds no copy of them per window position.

    Args:
        q: queries ``B, H, W, C``, channels ordered head by head.
        k: keys, like ``q``.
        v: values, like ``q``.
        num_heads: number of heads, a divisor of ``C``.
        kernel_size: odd side of the window.
        dilation: distance of its positions in pixels.

    Returns:
        ``B, H, W, C``.
    """
    b, h, w, c = q.shape
    d = c // num_heads
    pad = dilation * (kernel_size // 2)
    q = q.reshape(b, h, w, num_heads, d) * d**-0.5
    k = F.pad(k, [0, 0, pad, pad, pad, pad]).reshape(b, h + 2 * pad, w + 2 * pad, num_heads, d)
    v = F.pad(v, [0, 0, pad, pad, pad, pad]).reshape(b, h + 2 * pad, w + 2 * pad, num_heads, d)
    logits: list[Tensor] = []
    for i in range(0, kernel_size * dilation, dilation):
        for j in range(0, kernel_size * dilation, dilation):
            logits.append((q * k[:, i : i + h, j : j + w]).sum(4))
    weights = torch.stack(logits, 4).softmax(4)
    x = torch.zeros_like(q)
    for n in range(kernel_size * kernel_size):
        i, j = n // kernel_size * dilation, n % kernel_size * dilation
        weight, value = weights[..., n : n + 1], v[:, i : i + h, j : j + w]
        # One pass for both is faster, but autocast would keep more copies for its backward pass.
        x = x + weight * value if torch.is_grad_enabled() else torch.addcmul(x, weight, value)
    return x.reshape(b, h, w, c)


class MultiScaleDilatedAttention(nn.Module):
    """Multi-scale dilated attention (MSDA), eq. 4 of the DilateFormer paper: one dilation per group of heads.

    Args:
        channels: channels of input and output.
        num_heads: number of heads, a multiple of the number of dilations.
        kernel_size: odd side of each window.
        dilations: distance of the window's positions in pixels, one per group of heads.

    Shape:
        ``B, H, W, C`` to ``B, H, W, C``, channels last.

    Raises:
        ValueError: when heads cannot be shared out over the dilations, or channels over the heads.
    """

    def __init__(
        self, channels: int, num_heads: int, kernel_size: int = 3, dilations: Sequence[int] = (1, 2, 3)
    ) -> None:
        super().__init__()
        if num_heads % len(dilations) or channels % num_heads:
            raise ValueError(
                f"channels={channels} must be a multiple of num_heads={num_heads}, and that of the "
                f"{len(dilations)} dilations."
            )
        self.group_heads = num_heads // len(dilations)
        self.kernel_size = kernel_size
        self.dilations = list(dilations)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        groups, bias = len(self.dilations), self.qkv.bias
        assert bias is not None  # torch's type allows it
        parts = linear_parts(x, self.qkv.weight.flatten(1), bias, 3 * groups)
        out = [
            dilated_attention(
                parts[g], parts[groups + g], parts[2 * groups + g], self.group_heads, self.kernel_size, dilation
            )
            for g, dilation in enumerate(self.dilations)
        ]
        return self.proj(torch.cat(out, 3))


class DilateBlock(nn.Module):
    """Residual depthwise position encoding, attention and MLP: figure 3 of the DilateFormer paper.

    Args:
        channels: channels of input and output.
        attention: a module on ``B, H, W, C``.
        drop_path: chance in training that a sample skips a residual branch.

    Shape:
        ``B, C, H, W`` to ``B, C, H, W``.
    """

    def __init__(self, channels: int, attention: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.pos_embed = ResidualConv(channels)
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.attn = attention
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = MLP(channels)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        x = self.pos_embed(x).permute(0, 2, 3, 1).flatten(1, 2)
        x = x + self.drop_path(self.attn(self.norm1(x).reshape(b, h, w, c)).flatten(1, 2))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.reshape(b, h, w, c).permute(0, 3, 1, 2)


class DropPath(nn.Module):
    """Leave a residual branch out at random, in training, for each sample alone; the others are scaled up for it.

    Deep Networks with Stochastic Depth, Huang et al. 2016. MONAI's does the same, and imports all of MONAI.

    Args:
        rate: share of samples that are left out.

    Shape:
        ``B, N, C`` to ``B, N, C``.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return x * F.dropout(x.new_ones([x.shape[0], 1, 1]), self.rate) if self.training else x


class ResidualConv(nn.Conv2d):
    """Depthwise 3x3 convolution added to its input.

    Args:
        channels: channels of input and output.

    Shape:
        ``B, C, H, W`` to ``B, C, H, W``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self._conv_forward(x, self.weight, self.bias)  # super() cannot be scripted


class MLP(nn.Module):
    """Two linear layers, four times as wide between them.

    In training the backward pass computes the activation anew from its input, so one map of that width is kept rather
    than two.

    Args:
        channels: channels of input and output.

    Shape:
        ``B, N, C`` to ``B, N, C``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.training and not torch.jit.is_scripting():
            return checkpoint(self.activate, x, use_reentrant=False, preserve_rng_state=False)
        return self.activate(x)

    def activate(self, x: Tensor) -> Tensor:
        """The activation and the second layer."""
        return self.fc2(self.act(x))


class PatchEmbed(nn.Module):
    """Overlapping convolutional stem to 1/4: four 3x3 convolutions with strides 1, 2, 1, 2.

    Args:
        in_channels: channels of the input.
        channels: channels of the output.

    Shape:
        ``B, in_channels, H, W`` to ``B, channels, ceil(H / 4), ceil(W / 4)``.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        widths = (in_channels, 16, 32, 64, channels)
        layers: list[nn.Module] = []
        for i, stride in enumerate((1, 2, 1, 2)):
            layers.append(nn.Conv2d(widths[i], widths[i + 1], 3, stride, 1, bias=False))
            if i < 3:
                layers += [nn.BatchNorm2d(widths[i + 1]), nn.GELU()]
        self.proj = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Downsample(nn.Module):
    """3x3 convolution of stride 2 and batch normalisation, at the end of a stage.

    Args:
        in_channels: channels of this stage.
        out_channels: channels of the next.

    Shape:
        ``B, in_channels, H, W`` to ``B, out_channels, ceil(H / 2), ceil(W / 2)``.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, 2, 1), nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Stage(nn.Module):
    """Blocks of one resolution, then the way down to the next.

    Args:
        blocks: modules that keep the shape.
        downsample: the way down; the last stage keeps its feature.

    Shape:
        ``B, C, H, W`` to the stage's feature ``B, C, H, W`` and the next stage's input.
    """

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.blocks(x)
        return feature, self.downsample(feature)


class DilateFormer(nn.Module):
    """DilateFormer-tiny as a pyramid of features: multi-scale dilated attention in the first two stages, global
    attention in the last two.

    Args:
        in_channels: channels of the input. With pretrained weights, 1 or 3.
        pretrained: path of an official checkpoint of the tiny model (bare state dict or under ``model``), or
            False. True raises an error that says where to get one: the authors' hosting has no stable address.
            One input channel takes the stem's weights summed over RGB, equal to repeating the channel.
        drop_path: chance of the last block's residual branches to be skipped in training, rising linearly from 0.

    Shape:
        ``B, in_channels, H, W`` with ``H, W >= 32`` to four maps of 72, 144, 288, 576 channels at 1/4, 1/8, 1/16,
        1/32 of the size, odd sizes rounded up.

    Raises:
        DataError: when the checkpoint does not fit, naming the tensors.
        DataError: when ``pretrained`` is True.
        FileNotFoundError: when there is no checkpoint at the path.
    """

    channels = (72, 144, 288, 576)
    depths = (2, 2, 6, 2)
    num_heads = (3, 6, 12, 24)

    def __init__(self, in_channels: int = 3, pretrained: bool | str | Path = False, drop_path: float = 0.1) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.patch_embed = PatchEmbed(in_channels, self.channels[0])
        drops = torch.linspace(0, drop_path, sum(self.depths)).tolist()
        stages = []
        for s, (channels, depth, heads) in enumerate(zip(self.channels, self.depths, self.num_heads, strict=True)):
            attention = MultiScaleDilatedAttention if s < 2 else MultiHeadSelfAttention
            blocks = [DilateBlock(channels, attention(channels, heads), drops.pop(0)) for _ in range(depth)]
            stages.append(Stage(blocks, Downsample(channels, self.channels[s + 1]) if s < 3 else nn.Identity()))
        self.stages = nn.ModuleList(stages)
        self.apply(_init_weights)
        if pretrained is True:
            raise DataError(
                "DilateFormer's ImageNet weights have no stable address to download from. Get the checkpoint of "
                "DilateFormer-Tiny by the links in the README of github.com/JIAOJIAYUASD/dilateformer and give its "
                "path: pretrained='path/to/dilateformer_tiny.pth'."
            )
        if pretrained:
            self.load_pretrained(Path(pretrained))

    def load_pretrained(self, path: str | Path) -> None:
        """Load an official checkpoint; its classification ``norm`` and ``head`` are left out.

        Args:
            path: the file, see :class:`DilateFormer`.

        Raises:
            FileNotFoundError: when there is no such file.
            DataError: when it is truncated, of other depths, or tensors are missing, unexpected or misshapen.
        """
        state = read_weights(path)
        depths = _depths(state)
        if depths != self.depths:
            raise DataError(
                f"{path} holds a DilateFormer of depths {depths}, not the tiny model's {self.depths}: "
                "a checkpoint of another variant, or an incomplete one."
            )
        load_backbone(self, state, str(path), stem="patch_embed.proj.0.weight", leftover=("norm.", "head."))

    def forward(self, x: Tensor) -> list[Tensor]:
        check_input(x, self.in_channels, "DilateFormer")
        x = self.patch_embed(x)
        features = []
        for stage in self.stages:
            feature, x = stage(x)
            features.append(feature)
        return features


def _depths(state: StateDict) -> tuple[int, ...]:
    """Number of blocks per stage that a state dict's names tell."""
    names = (re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", key) for key in state)
    blocks = {(int(m[1]), int(m[2])) for m in names if m}
    stages = max((s for s, _ in blocks), default=-1) + 1
    return tuple(sum(s == stage for s, _ in blocks) for stage in range(stages))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
