"""Networks in one file with their weights: torch.export's ``.pt2``, and TorchScript as MONAI's commands write it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import DataError
from .storage import whole_file

__all__ = ["ExportedNetwork", "check_export", "load_exported", "load_torchscript", "save_exported"]

logger = logging.getLogger(__name__)


class ExportedNetwork(nn.Module):
    """A network that ``torch.export`` wrote: it is in eval mode and stays so, and takes slices of one size.

    Args:
        program: what ``torch.export.load`` gives.
        path: its file, for messages.

    Shape:
        ``B, C, H, W`` of the size it was exported for, and any ``B``, to logits ``B, classes, H, W``.

    Raises:
        DataError: in forward, when the slices are of another size.
    """

    def __init__(self, program: torch.export.ExportedProgram, path: str | Path) -> None:
        super().__init__()
        self.program = program.module()
        self.path = path
        inputs, _ = program.example_inputs
        self.shape = tuple(inputs[0].shape[1:])
        self.train(False)

    def train(self, mode: bool = True) -> ExportedNetwork:
        """Change nothing: the program has no training mode, and refuses to be asked for one."""
        self.training = False
        return self

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.shape:
            sizes = [" x ".join(map(str, shape)) for shape in (self.shape, x.shape[1:])]
            raise DataError(f"{self.path} was exported for slices of {sizes[0]}, got {sizes[1]}: export it for these.")
        return self.program(x)


def save_exported(network: nn.Module, path: str | Path, shape: Sequence[int]) -> None:
    """Write a network with its weights by ``torch.export``, for batches of any size.

    Args:
        network: left as it is; exported in eval mode.
        path: the file, ``.pt2``; written whole or not at all.
        shape: channels, height and width of the slices; they are fixed in the file.

    Raises:
        WriteError: when the file cannot be written.
    """
    network = copy.deepcopy(network).cpu().to(memory_format=torch.contiguous_format).eval()  # torch warns of others
    with torch.no_grad():
        example = torch.rand(2, *shape)  # a batch of one would be taken for a constant
        program = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for node in list(program.graph.nodes):  # these hold each conversion's input to fp32, also under autocast
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            program.graph.erase_node(node)
    program.graph_module.recompile()
    with whole_file(Path(path)) as partial:
        torch.export.save(program, partial)
    logger.info(f"exported for slices of {' x '.join(map(str, shape))}: {path}")


def load_exported(path: str | Path, device: torch.device | str = "cpu") -> ExportedNetwork:
    """Load a network with its weights from a file that :func:`save_exported` wrote.

    Args:
        path: the file.
        device: where the network goes.

    Returns:
        The network, in eval mode.

    Raises:
        FileNotFoundError: when there is no such file, with what to do about it.
        DataError: when it is truncated, or no exported program.
    """
    _check_is_there(path, "run exporting")
    from torch.export.passes import move_to_device_pass  # brings sympy and much else

    try:
        program = torch.export.load(path)
    except Exception as error:  # torch has several
        raise DataError(
            f"Cannot read {path} as an exported program: truncated, or another format. Export it again."
        ) from error
    return ExportedNetwork(move_to_device_pass(program, torch.device(device)), path)


def load_torchscript(path: str | Path, device: torch.device | str = "cpu") -> torch.jit.ScriptModule:
    """Load a network with its weights from a file that ``monai.bundle ckpt_export`` or ``trt_export`` wrote.

    Args:
        path: the file.
        device: where the network goes.

    Returns:
        The network, in eval mode.

    Raises:
        FileNotFoundError: when there is no such file, with what to do about it.
        DataError: when it is truncated, or no TorchScript.
    """
    _check_is_there(path, "ckpt_export (or trt_export, for TensorRT)")
    try:
        return torch.jit.load(path, map_location=device).eval()
    except RuntimeError as error:
        raise DataError(f"Cannot read {path} as TorchScript: truncated, or another format. Export it again.") from error


def check_export(exported: str | Path, weights: str | Path) -> None:
    """Refuse an exported network that is older than the weights whose values it would be used with.

    Args:
        exported: the file of torch.export, TorchScript or TensorRT.
        weights: the weights in its folder. Where there are none, a line in the log says that nothing tells what the
            network was trained for.

    Raises:
        DataError: when the weights are newer.
    """
    if not Path(weights).is_file():
        logger.warning(f"nothing tells what {exported} was trained for: the config's values are taken for it.")
    elif Path(exported).is_file() and Path(exported).stat().st_mtime < Path(weights).stat().st_mtime:
        raise DataError(f"{exported} is older than {weights}, and may be of others. Export these weights again.")


def _check_is_there(path: str | Path, command: str) -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"No network at {path}. Export it by python -m monai.bundle {command}, or name its folder by --ckpt_dir."
        )
