"""DANIE: Dual Attention Encoder with Joint Preservation for Medical Image Segmentation.

Li, Tu, Gong, Zhong and Li, ECAI 2024 (https://doi.org/10.3233/FAIA240505). Two streams see the same slice:
self-attention perception (SAP, a MaxViT) and hierarchical-attention perception (HAP, channel and spatial attention on
convolutions). At each of four scales joint preservation enhances and adds them, and goes up through the sums. The
paper leaves points open. Read from its text:

- eq. 5: "compress the channel dimensions" makes A_d a map 1 x H x W (the printed C x 1 x 1 would need a pooling that no
  equation has).
- eq. 7: S_{3,j} must be S_{3,i}, as in DANet, whose channel attention this is: as printed the weights sum to one and
  drop out.
- eq. 8 and 9: GCNet's context modelling.
- section 4.2: MaxViT-tiny and -small are timm's variants of the paper's widths whose weights fit any window size:
  ``maxvit_rmlp_tiny_rw_256``, and ``maxvit_rmlp_small_rw_224`` because timm has no weights for ``small_rw_256``; built
  for 256 it is the same network.

And chosen, where the text is silent:

- eq. 2: one MLP for both branches, ratio 16, ReLU. Eq. 3: a 1-to-1 convolution of its own for each branch.
- eq. 4: the weights start at 0.5.
- eq. 9: the bottleneck has a quarter of the channels.
- eq. 11 and the heads: up-sampling is bilinear.

And chosen to reach the costs that the paper prints (tables 1, 5 and 7). That they come out shows that they belong to
one network, not that it is the authors' own:

- HAP's embedding: two 3x3 convolutions of 32 channels at full size, max-pooling, two of 64 at half size, and one of
  stride 2 to C, in both sizes of the network.
- HAP's stage: a 2x2 convolution down (none in the first), a 3x3 convolution, the attention, a ConvBlock.
- a 3x3 convolution on the sum of eq. 10 wherever ES or EH is on, and none in the row "Add".
- eq. 11: the deeper feature is up-sampled at its full width, twice the one it joins.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import DataError, check_option
from .layers import (
    ConvNormAct,
    Heads,
    ScaleFusion,
    SumFusion,
    check_batch,
    check_input,
    check_spatial_dims,
    pad_to_multiple,
    upsample,
)
from .weights import load_backbone, read_weights

__all__ = ["DANIE"]

SIZES = {
    "small": ("maxvit_rmlp_tiny_rw_256", (64, 128, 256, 512)),
    "large": ("maxvit_rmlp_small_rw_224", (96, 192, 384, 768)),
}
ATTENTIONS = {
    "channel-spatial": ("channel", "spatial"),
    "spatial-channel": ("spatial", "channel"),
    "channel": ("channel",),
    "spatial": ("spatial",),
    "w/o spatial": ("channel",),
    "w/o channel": ("spatial",),
}
FUSIONS = ("joint", "es", "eh", "add", "concat")


class DANIE(nn.Module):
    """Dual Attention Encoder with Joint Preservation, figure 3 of the paper.

    SAP and HAP, each with its embedding, are the Dual Attention Encoder (DAE).

    Args:
        in_channels: channels of the slice, 1 for MR and CT, 3 for RGB.
        out_channels: number of classes, background included.
        size: ``"small"`` (DANIE-S, widths 64 to 512) or ``"large"`` (DANIE-L, widths 96 to 768).
        spatial_dims: 2, as MONAI's networks take it.
        dropout: rate between the two convolutions of joint preservation's blocks. The paper gives none.
        pretrained: True for timm's ImageNet weights in the MaxViT, downloaded once; a path for a file of them
            (``.safetensors`` or ``.pth``); False for none. A file fits one or three input channels: one takes the
            stem's weights summed over RGB, equal to repeating the channel. Without effect where ``sap`` is False.
        drop_path: stochastic depth of the MaxViT. The paper gives none.
        img_size: height and width of the slices, or both in one number. The MaxViT's windows are a 32nd of it, rounded
            up. All values share one set of weights.
        sap: False leaves the self-attention perception stream out, and MaxViT with it (table 5, A.2).
        hap: False leaves the hierarchical-attention perception stream out (table 5, A.1). Either stream alone is not
            fused: ``fusion`` has no effect.
        attention: order of the attentions in HAP, ``"channel-spatial"`` or ``"spatial-channel"`` (table 6), or one of
            them alone. ``"channel"`` and ``"spatial"`` keep every convolution, a fair ablation; ``"w/o spatial"`` and
            ``"w/o channel"`` are table 5's A.3 and A.4 at their printed cost, which the rows reach only if the
            stage's ConvBlock goes with the spatial attention, and its first convolution with the channel attention.
        calibration: False holds eq. 4's two weights at 0.5 (table 6, "Dcal").
        fusion: ``"joint"``, or table 7's ``"es"``, ``"eh"``, ``"add"`` and ``"concat"`` (with residual). Tables 5
            and 6 were made with ``"add"``.
        scaled_energies: divide ES's energies by the square root of the number of pixels. Without it (the paper,
            DANet) they grow to 1e5 and the softmax picks one channel.
        deep_supervision: in training return the four maps rather than their sum. The paper trains the sum.
        former: ``self_attention`` and ``hierarchical_attention``, as ``sap`` and ``hap`` were called; they are taken
            with a warning until version 0.3.

    Shape:
        ``B, in_channels, H, W`` with any ``H, W >= 32`` to logits ``B, out_channels, H, W``. In training with
        ``deep_supervision`` a list of four such maps, the finest first.

        Windows must tile every scale: a slice that is no multiple of ``img_size`` (rounded up to 32; of 32 itself
        without the SAP stream) is padded with zeros below and right to the next one, and the logits are cropped. It
        costs what the padded slice costs: a smaller slice as much as one of ``img_size``, one just above a multiple
        up to four times its own. The padding takes part in attention and pooling. Slices of ``img_size`` are padded
        by less than 32.

    Raises:
        FileNotFoundError: when there is no file of pretrained weights.
        DataError: when they cannot be had, saying what was tried, or do not fit, naming the tensors; on an unknown
            argument value; in ``forward`` on a wrong rank, channel count or size, and in training on a single slice
            of 32 x 32.

    Example:
        >>> net = DANIE(in_channels=1, out_channels=4, size="small", img_size=64).eval()
        >>> net(torch.zeros(2, 1, 64, 96)).shape
        torch.Size([2, 4, 64, 96])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        size: str = "large",
        spatial_dims: int = 2,
        dropout: float = 0.0,
        pretrained: bool | str | Path = False,
        drop_path: float = 0.0,
        img_size: int | Sequence[int] = 256,
        sap: bool = True,
        hap: bool = True,
        attention: str = "channel-spatial",
        calibration: bool = True,
        fusion: str = "joint",
        scaled_energies: bool = False,
        deep_supervision: bool = False,
        **former: bool,
    ) -> None:
        super().__init__()
        sap, hap = _renamed(former, sap, hap)
        check_spatial_dims("DANIE", spatial_dims)
        check_option("size", size, SIZES)
        check_option("attention", attention, ATTENTIONS)
        check_option("fusion", fusion, FUSIONS)
        if not (sap or hap):
            raise DataError("DANIE needs a stream: sap and hap are both False.")
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if min(height, width) < 1:
            raise DataError(f"img_size is a size in pixels or a pair of them, got {img_size!r}.")
        tile = (32 * math.ceil(height / 32), 32 * math.ceil(width / 32))
        backbone, channels = SIZES[size]
        self.in_channels = in_channels
        self.dropout_rate = dropout
        self.tile = tile if sap else (32, 32)
        self.self_attention = (
            SelfAttentionPerception(backbone, in_channels, tile, pretrained, drop_path) if sap else None
        )
        self.hierarchical_attention = (
            HierarchicalAttentionPerception(in_channels, channels, attention, calibration) if hap else None
        )
        both = sap and hap
        self.joint_preservation = JointPreservation(channels, fusion if both else "add", scaled_energies, dropout)
        self.heads = Heads(channels, out_channels, deep_supervision)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        check_input(x, self.in_channels, "DANIE")
        padded = pad_to_multiple(x, self.tile)
        if self.training:
            check_batch(padded, "DANIE")
        encoded: list[list[Tensor]] = []
        if self.self_attention is not None:
            encoded.append(self.self_attention(padded))
        if self.hierarchical_attention is not None:
            encoded.append(self.hierarchical_attention(padded))
        preserved = self.joint_preservation(encoded)
        return self.heads(preserved, like=x, padded=padded)  # eq. 12


class SelfAttentionPerception(nn.Module):
    """Self-attention perception (SAP) with its embedding, figure 3 (b) and eq. 1: the stages of timm's MaxViT.

    Args:
        backbone: name of the MaxViT in timm.
        in_channels: channels of the slice.
        img_size: height and width that the windows are made for.
        pretrained: see :class:`DANIE`.
        drop_path: stochastic depth.

    Shape:
        ``B, in_channels, H, W``, multiples of ``img_size``, to four maps at 1/4 to 1/32.

    Raises:
        DataError: when pretrained weights cannot be had or do not fit.
        FileNotFoundError: when there is no file of them.
    """

    def __init__(
        self,
        backbone: str,
        in_channels: int,
        img_size: tuple[int, int],
        pretrained: bool | str | Path = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        import timm  # it takes a second and needs torchvision: only who builds a DANIE waits for it

        try:
            self.maxvit = timm.create_model(
                backbone,
                pretrained=pretrained is True,
                features_only=True,
                out_indices=(1, 2, 3, 4),
                in_chans=in_channels,
                img_size=img_size,
                drop_path_rate=drop_path,
            )
        except (OSError, RuntimeError) as error:
            if pretrained is not True:
                raise
            hub, url = (timm.get_pretrained_cfg_value(backbone, key) for key in ("hf_hub_id", "url"))
            cause = str(error).strip().splitlines() or [""]
            raise DataError(
                f"timm could not load the ImageNet weights of {backbone}, from huggingface.co/{hub} or {url}: "
                f"{cause[0]} ({type(error).__name__}). Without a connection, fetch that file elsewhere "
                "and give its path, pretrained='path/to/file'; pretrained=False trains without."
            ) from error
        if pretrained and pretrained is not True:
            state = {re.sub(r"^stages\.(\d+)\.", r"stages_\1.", k): v for k, v in read_weights(pretrained).items()}
            load_backbone(self.maxvit, state, str(pretrained), stem="stem.conv1.weight", leftover=("norm.", "head."))

    def forward(self, x: Tensor) -> list[Tensor]:
        if not torch.jit.is_scripting():
            if torch.compiler.is_exporting():
                # The exporter stumbles over a fused attention whose weights record gradients (pytorch issue 141107).
                self._fuse_attention(False)
                features = self.maxvit(x)
                self._fuse_attention(True)
                return features
        return self.maxvit(x)

    @torch.jit.unused
    def _fuse_attention(self, fused: bool) -> None:
        for module in self.maxvit.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused  # type: ignore[assignment]


class HierarchicalAttentionPerception(nn.Module):
    """Hierarchical-attention perception (HAP) with its embedding, figure 3 (c): a stem to 1/4, then four stages.

    Args:
        in_channels: channels of the slice.
        channels: channels of the four scales.
        attention: see :class:`DANIE`.
        calibration: see :class:`DANIE`.

    Shape:
        ``B, in_channels, H, W``, multiples of 32, to four maps at 1/4 to 1/32.
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        attention: str,
        calibration: bool,
    ) -> None:
        super().__init__()
        self.embedding = nn.Sequential(
            ConvBlock(in_channels, 32),
            nn.MaxPool2d(2),
            ConvBlock(32, 64),
            ConvNormAct(64, channels[0], stride=2, act=nn.GELU),
        )
        widths = (channels[0], *channels)
        self.stages = nn.ModuleList(
            HierarchicalAttentionStage(widths[i], widths[i + 1], i > 0, attention, calibration)
            for i in range(len(channels))
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        h = self.embedding(x)
        features = []
        for stage in self.stages:
            h = stage(h)
            features.append(h)
        return features


class HierarchicalAttentionStage(nn.Module):
    """One stage of HAP, eq. 5: the way down, a convolution, the attention map's product, a ConvBlock.

    Args:
        in_channels: channels of the stage before.
        channels: channels of this one.
        downsample: halve the size first.
        attention: see :class:`DANIE`.
        calibration: see :class:`DANIE`.

    Shape:
        ``B, in_channels, H, W`` to ``B, channels, H, W``, or half that size.
    """

    def __init__(self, in_channels: int, channels: int, downsample: bool, attention: str, calibration: bool) -> None:
        super().__init__()
        self.downsample = (
            ConvNormAct(in_channels, channels, kernel_size=2, stride=2, act=nn.Identity)
            if downsample
            else nn.Identity()
        )
        # A.3 and A.4 reach their printed cost only if these convolutions go with the attention.
        self.entry = nn.Identity() if attention == "w/o channel" else ConvNormAct(channels, channels, act=nn.GELU)
        self.attention = HierarchicalAttention(channels, ATTENTIONS[attention], calibration)
        self.exit = nn.Identity() if attention == "w/o spatial" else ConvBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.entry(self.downsample(x))
        return self.exit(self.attention(h) * h)  # eq. 5


class HierarchicalAttention(nn.Module):
    """Channel and spatial attention in a max and an average branch, calibrated to one map: eq. 2 to 5.

    Args:
        channels: channels of the input.
        order: ``"channel"`` and ``"spatial"``, in the order they are applied.
        calibration: whether eq. 4's weights learn; they start at 0.5.

    Shape:
        ``B, C, H, W`` to the map ``A_d``, ``B, 1, H, W``, in 0 to 1.
    """

    def __init__(self, channels: int, order: Sequence[str] = ("channel", "spatial"), calibration: bool = True) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(
            ChannelAttention(channels) if name == "channel" else SpatialAttention() for name in order
        )
        self.w_max = nn.Parameter(torch.tensor(0.5), requires_grad=calibration)
        self.w_avg = nn.Parameter(torch.tensor(0.5), requires_grad=calibration)
        self.compress = nn.Conv2d(channels, 1, 1)

    def forward(self, h: Tensor) -> Tensor:
        o_max, o_avg = h, h
        for attention in self.attentions:
            o_max, o_avg = attention(o_max, o_avg)  # eq. 2 and 3
        o_d = self.w_max * o_max + self.w_avg * o_avg  # eq. 4
        return torch.sigmoid(self.compress(o_d))  # A_d of eq. 5


class ChannelAttention(nn.Module):
    """Channel attention of the max and the average branch, eq. 2, with one MLP for both.

    Args:
        channels: channels of the input.
        ratio: reduction in the MLP.

    Shape:
        both branches' ``B, C, H, W``, to the same two, each channel weighted.
    """

    def __init__(self, channels: int, ratio: int = 16) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, channels // ratio, 1), nn.ReLU(), nn.Conv2d(channels // ratio, channels, 1)
        )

    def forward(self, h_max: Tensor, h_avg: Tensor) -> tuple[Tensor, Tensor]:
        # Not amax: its gradient looks for the maximum again, and finds none among bfloat16's roundings when compiled.
        a_max = torch.sigmoid(self.mlp(h_max.flatten(2).max(2, keepdim=True).values[..., None]))
        a_avg = torch.sigmoid(self.mlp(h_avg.mean([2, 3], keepdim=True)))
        return a_max * h_max, a_avg * h_avg


class SpatialAttention(nn.Module):
    """Spatial attention of the max and the average branch, eq. 3, with a 1x1 convolution for each.

    Shape:
        both branches' ``B, C, H, W``, to the same two, each pixel weighted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv_max = nn.Conv2d(1, 1, 1)
        self.conv_avg = nn.Conv2d(1, 1, 1)

    def forward(self, m_max: Tensor, m_avg: Tensor) -> tuple[Tensor, Tensor]:
        a_max = torch.sigmoid(self.conv_max(m_max.max(1, keepdim=True)[0]))  # not amax, as above
        a_avg = torch.sigmoid(self.conv_avg(m_avg.mean(1, keepdim=True)))
        return a_max * m_max, a_avg * m_avg


class JointPreservation(nn.Module):
    """Joint preservation (JP), eq. 6 to 11: the streams fused at each scale, and one way up through the sums.

    Args:
        channels: channels of the four scales.
        fusion: see :class:`DANIE`.
        scaled_energies: see :class:`DANIE`.
        dropout: rate in the blocks of eq. 11.

    Shape:
        a list of streams, each a list of four maps at 1/4 to 1/32, to four maps of the same channels and sizes.
    """

    def __init__(
        self, channels: Sequence[int], fusion: str = "joint", scaled_energies: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.fusion = ScaleFusion(self._fusion(fusion, c, scaled_energies) for c in channels)
        deepest_first = channels[::-1]
        below = (0, *deepest_first[:-1])
        self.blocks = nn.ModuleList(ConvBlock(b + c, c, dropout) for b, c in zip(below, deepest_first, strict=True))

    @staticmethod
    def _fusion(name: str, channels: int, scaled_energies: bool) -> nn.Module:
        if name == "add":
            return SumFusion()
        if name == "concat":
            return ConcatFusion(channels)
        return Aggregation(channels, name in ("joint", "es"), name in ("joint", "eh"), scaled_energies)

    def forward(self, encoded: list[list[Tensor]]) -> list[Tensor]:
        fused = self.fusion(encoded)  # eq. 6 to 10
        j = fused[-1]
        preserved: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            e = fused[len(fused) - 1 - i]
            j = block(e if i == 0 else torch.cat([e, upsample(j, like=e)], 1))  # eq. 11
            preserved.insert(0, j)
        return preserved


class Aggregation(nn.Module):
    """The streams' features enhanced and added, eq. 10, then a 3x3 convolution.

    Args:
        channels: channels of both.
        es: enhance the self-attention stream.
        eh: enhance the hierarchical-attention stream.
        scaled_energies: see :class:`DANIE`.

    Shape:
        a list of two maps ``B, C, H, W`` to ``B, C, H, W``.
    """

    def __init__(self, channels: int, es: bool = True, eh: bool = True, scaled_energies: bool = False) -> None:
        super().__init__()
        self.es = EnhancingSelfAttention(scaled_energies) if es else nn.Identity()
        self.eh = EnhancingHierarchicalAttention(channels) if eh else nn.Identity()
        self.conv = ConvNormAct(channels, channels, act=nn.GELU)

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.conv(self.es(features[0]) + self.eh(features[1]))


class EnhancingSelfAttention(nn.Module):
    """Enhancing self-attentional perceptron (ES), figure 4, eq. 6 and 7: each channel takes from all, after DANet.

    The energies are computed in 32 bit under autocast too: half precision would round those of 1e5 by hundreds, or
    overflow.

    Args:
        scaled: divide the energies by the square root of the number of pixels.

    Shape:
        ``B, C, H, W`` to ``B, C, H, W``.
    """

    def __init__(self, scaled: bool = False) -> None:
        super().__init__()
        self.scaled = scaled
        self.scale = nn.Parameter(torch.zeros(()))  # lambda

    def forward(self, s: Tensor) -> Tensor:
        flat = s.flatten(2)
        energies = _product_in_32_bit(flat, flat.transpose(1, 2))
        if self.scaled:
            energies = energies / flat.shape[2] ** 0.5
        w = energies.softmax(2).to(s.dtype)  # eq. 6
        return self.scale * (w @ flat).reshape(s.shape) + s  # eq. 7


class EnhancingHierarchicalAttention(nn.Module):
    """Enhancing hierarchical-attention perception (EH), figure 5, eq. 8 and 9: a gate from the global context.

    Args:
        channels: channels of input and output.

    Shape:
        ``B, C, H, W`` to ``B, C, H, W``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.context = nn.Conv2d(channels, 1, 1)
        self.integration = nn.Sequential(
            nn.Linear(channels, channels // 4),
            nn.LayerNorm(channels // 4),
            nn.GELU(),
            nn.Linear(channels // 4, channels),
            nn.Sigmoid(),
        )

    def forward(self, h: Tensor) -> Tensor:
        weights = self.context(h).flatten(2).softmax(2)
        a_g = (h.flatten(2) @ weights.transpose(1, 2)).squeeze(2)  # eq. 8
        w_g = self.integration(a_g)
        return w_g[:, :, None, None] * h  # eq. 9


class ConcatFusion(nn.Module):
    """A 3x3 convolution of both features, and their sum as residual: table 7, C.1.

    Args:
        channels: channels of each.

    Shape:
        a list of two maps ``B, C, H, W`` to ``B, C, H, W``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = ConvNormAct(2 * channels, channels, act=nn.GELU)

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.conv(torch.cat(features, 1)) + features[0] + features[1]


class ConvBlock(nn.Sequential):
    """Two 3x3 convolutions, each with batch normalisation and GELU: ConvBlock of eq. 5 and 11.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        dropout: rate between the two.

    Shape:
        ``B, in_channels, H, W`` to ``B, out_channels, H, W``.
    """

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0) -> None:
        super().__init__(
            ConvNormAct(in_channels, out_channels, act=nn.GELU),
            nn.Dropout(dropout),
            ConvNormAct(out_channels, out_channels, act=nn.GELU),
        )


def _product_in_32_bit(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product ``*, N, K`` by ``*, K, M`` in 32 bit, inside autocast too."""
    # TorchScript, scripted or traced, ignores an autocast context of its own; autocast leaves 64 bit alone.
    if torch.jit.is_scripting():
        return (a.double() @ b.double()).float()
    if torch.jit.is_tracing():
        return (a.double() @ b.double()).float()
    if torch.compiler.is_exporting():  # leaves out a float() that has nothing to do without autocast
        return (a.double() @ b.double()).float()
    with torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float()


def _renamed(former: dict[str, bool], sap: bool, hap: bool) -> tuple[bool, bool]:
    """``sap`` and ``hap`` where they were given by their former names."""
    names = {"self_attention": "sap", "hierarchical_attention": "hap"}
    if unknown := sorted(former.keys() - names):
        raise TypeError(f"DANIE() got an unexpected keyword argument {unknown[0]!r}")
    for name in former:
        warnings.warn(f"DANIE's {name} is called {names[name]} now.", FutureWarning, stacklevel=3)
    return former.get("self_attention", sap), former.get("hierarchical_attention", hap)
