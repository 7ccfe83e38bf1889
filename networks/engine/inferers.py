"""How a 2D network is run over a volume."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.inferers import Inferer, SimpleInferer
from torch import Tensor

from ..errors import DataError

__all__ = ["AutocastInferer", "LabelInferer", "has_bfloat16"]


class LabelInferer(Inferer):
    """The label map of a volume by a 2D network, at the volume's own resolution.

    Batches of slices are resized to the network's size, their logits resized back and reduced to the greatest class
    before the next batch comes. Memory holds one byte per voxel, where MONAI's ``SliceInferer`` holds a float per voxel
    and class. In fp32 the label map is the same.

    The network gets the slices alone: MONAI Deploy hands an inferer all other tensors of the case, too.

    Args:
        size: height and width that the network sees.
        batch_size: slices in one forward.
        bfloat16: run the network in that type by autocast; None does so on a GPU where :func:`has_bfloat16` holds. On a
            CPU that has it, it is faster too, but rounds otherwise.
        flips: take the mean of the class probabilities of each slice and its three mirror images, in four times the
            time. A network that was trained without flips knows left from right, and loses by it.
        training: take a network in training mode too, and give its class probabilities at the network's size: MONAI
            Label's scoring compares them under dropout.
        confidence: keep the probability of the chosen class of each voxel in ``maps``.
        entropy: keep that of the class probabilities p, -sum p log p / log(classes): 0 of a sure voxel, 1 of one
            whose classes are all as likely.
        probabilities: keep all class probabilities.

    Attributes:
        maps: of the last call, by name, as halves: ``B, 1, H, W, D``, of probabilities ``B, classes, H, W, D``.

    Shape:
        ``B, C, H, W, D`` to label maps ``B, 1, H, W, D`` of unsigned 8 bit; of a network in training mode to
        ``B, classes, *size, D`` of floats.

    Raises:
        DataError: when the network is in training mode and ``training`` is False, or it has more classes than a label
            map holds.
    """

    def __init__(
        self,
        size: Sequence[int],
        batch_size: int = 8,
        bfloat16: bool | None = None,
        flips: bool = False,
        training: bool = False,
        confidence: bool = False,
        entropy: bool = False,
        probabilities: bool = False,
    ) -> None:
        super().__init__()
        self.training = training
        self.confidence = confidence
        self.entropy = entropy
        self.probabilities = probabilities
        self.maps: dict[str, Tensor] = {}
        self.size = (size[0], size[1])
        self.batch_size = batch_size
        self.bfloat16 = bfloat16
        self.flips = flips

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        volumes = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        b, _, h, w, depth = volumes.shape
        slices = volumes.movedim(4, 1).flatten(0, 1)
        training = getattr(network, "training", False)
        if training and not self.training:
            raise DataError("The network is in training mode, and would segment at random: call its eval() first.")
        bfloat16 = volumes.is_cuda and has_bfloat16(volumes.device) if self.bfloat16 is None else self.bfloat16
        found: dict[str, list[Tensor]] = {"pred": []}
        for batch in slices.split(self.batch_size):
            x = _resize(batch, self.size)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
                logits = network(x).float()
                if self.flips and not training:
                    views = [network(x.flip(axes)).flip(axes) for axes in ((2,), (3,), (2, 3))]
                    logits = torch.stack([logits, *views]).float().softmax(2).mean(0)
            if logits.shape[1] > 256:
                raise DataError(f"The network has {logits.shape[1]} classes, more than the 256 that a label map holds.")
            if training:
                found["pred"].append(logits.softmax(1))
                continue
            logits = _resize(logits, (h, w))
            found["pred"].append(logits.argmax(1, keepdim=True).to(torch.uint8))
            for name, values in self._maps(logits).items():
                found.setdefault(name, []).append(values)
        volumes_of = {name: torch.cat(f).unflatten(0, (b, depth)).movedim(1, 4) for name, f in found.items()}
        if isinstance(inputs, MetaTensor):
            volumes_of = {name: MetaTensor(v).copy_meta_from(inputs) for name, v in volumes_of.items()}
        labels = volumes_of.pop("pred")
        self.maps = volumes_of
        return labels

    def _maps(self, logits: Tensor) -> dict[str, Tensor]:
        """What is kept beside the label map, of a batch of slices."""
        if not (self.confidence or self.entropy or self.probabilities):
            return {}
        likely = logits if self.flips else logits.softmax(1)
        maps = {}
        if self.confidence:
            maps["confidence"] = likely.amax(1, keepdim=True)
        if self.entropy:
            maps["entropy"] = torch.special.entr(likely).sum(1, keepdim=True) / math.log(likely.shape[1])
        if self.probabilities:
            maps["probabilities"] = likely
        return {name: values.half() for name, values in maps.items()}


class AutocastInferer(SimpleInferer):
    """:class:`monai.inferers.SimpleInferer` in bfloat16, on CPUs too, where the trainer's ``amp`` has no effect.

    Args:
        bfloat16: True runs the network in that type by autocast, and gives its maps in fp32, for the loss.
    """

    def __init__(self, bfloat16: bool | None = None) -> None:
        super().__init__()
        self.bfloat16 = bfloat16

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self.bfloat16:
            return super().__call__(inputs, network, *args, **kwargs)
        with torch.autocast(inputs.device.type, torch.bfloat16):
            maps = super().__call__(inputs, network, *args, **kwargs)
        return maps.float() if isinstance(maps, Tensor) else [m.float() for m in maps]


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


def has_bfloat16(device: torch.device | str) -> bool:
    """Whether a device has instructions for bfloat16: a GPU from Ampere on, a CPU with AVX512_BF16 or AMX."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if not hasattr(torch.cpu, "get_capabilities"):  # before torch 2.10
        return False
    return any(torch.cpu.get_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16"))
