"""Reading weight files safely, and errors that say which tensor of which file is wrong."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import DataError
from .trained_for import check_values

__all__ = ["load_matching", "load_weights", "read_tensors", "read_weights"]

logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]


def read_weights(path: str | Path) -> StateDict:
    """Read a state dict: bare, or under ``model`` or ``state_dict``, as ``.safetensors`` or in torch's format.

    Nothing is unpickled but tensors (``weights_only=True``), so a file from elsewhere can run no code.

    Args:
        path: the file.

    Returns:
        Names and tensors, on the CPU.

    Raises:
        FileNotFoundError: when there is no such file.
        DataError: when it is truncated, of another format, or holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No weights at {path}.")
    state = read_tensors(path)
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise DataError(f"{path} holds no state dict: expected names and tensors, bare or under 'model'.")
    return state


def read_tensors(path: Path) -> Any:
    """What a file of tensors holds, in containers of whatever kind; nothing else is unpickled.

    Args:
        path: a ``.safetensors`` file, or one in torch's format.

    Returns:
        Its content, on the CPU.

    Raises:
        DataError: when it is truncated, of another format, or holds anything but tensors, numbers and texts.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        cause = str(error).strip().splitlines() or [""]
        raise DataError(
            f"Cannot read weights from {path}: the file is truncated, or no plain file of tensors. "
            f"Fetch or save it again. ({type(error).__name__}: {cause[0].split('. ')[0]})"
        ) from error


def load_weights(module: nn.Module, path: str | Path, values: Mapping[str, Any] | None = None) -> None:
    """Load a weights file strictly: every tensor of the module, and no other.

    Args:
        module: the network; changed only if all tensors fit.
        path: the file, read by :func:`read_weights`.
        values: what the network is used for, by name; see :func:`networks.trained_for.check_values`.

    Raises:
        FileNotFoundError: when there is no such file, with what to do about it.
        DataError: when the file is unreadable, tensors are missing, unexpected or of another shape, or the ``.json``
            beside it says that the weights were trained for other values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"No weights at {path}. Train the network first, or get its weights, or name another file."
        )
    check_values(path, {"network": type(module).__name__, **(values or {})})
    load_state_dict(module, read_weights(path), source=str(path))
    logger.info(f"weights: {path}")


def load_state_dict(module: nn.Module, state: StateDict, source: str, leftover: Iterable[str] = ()) -> None:
    """Load ``state`` strictly and name what does not fit.

    Args:
        module: changed only if all tensors fit.
        state: names and tensors.
        source: where ``state`` comes from, for the message.
        leftover: prefixes of names that ``state`` may hold and ``module`` lack.

    Raises:
        DataError: naming the tensors that are missing, unexpected or of another shape.
    """
    own = module.state_dict()
    state = {k: v for k, v in state.items() if k in own or not k.startswith(tuple(leftover))}
    shapes = [
        f"{k} is {list(v.shape)} in the file, {list(own[k].shape)} in the network"
        for k, v in state.items()
        if k in own and v.shape != own[k].shape
    ]
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": shapes,
    }
    found = [f"{len(names)} {kind}: {_some(names)}" for kind, names in problems.items() if names]
    if found:
        raise DataError(
            f"The weights in {source} are not those of this {type(module).__name__}; tensors {'; '.join(found)}. "
            "Build the network with the arguments it was trained with (channels, classes, size)."
        )
    module.load_state_dict(state)


def load_matching(network: nn.Module, path: str | Path) -> None:
    """Start from a trained network whose heads or input may differ: take every tensor that fits, say which did not.

    Args:
        network: changed in place; under ``DistributedDataParallel`` the network inside.
        path: weights of the same network trained on something else; an empty path does nothing.

    Raises:
        FileNotFoundError: when there is no such file.
        DataError: when it is unreadable, or no tensor of it fits.
    """
    if not str(path):
        return
    if not Path(path).is_file():
        raise FileNotFoundError(f"No weights at {path} to start from. Name another file, or none.")
    from monai.networks.utils import copy_model_state  # MONAI takes seconds, for which no network should wait

    network = getattr(network, "module", network)
    state = read_weights(path)
    _, taken, left = copy_model_state(network, state)
    if not taken:
        raise DataError(f"No tensor in {path} fits this {type(network).__name__}: is it another network's?")
    own = set(network.state_dict())
    logger.info(f"start from {path}: {len(taken)} of {len(own)} tensors taken")
    for what, names in (("new, as initialised", own - set(taken)), ("in the file, left out", set(state) - set(taken))):
        if names:
            logger.warning(f"{len(names)} tensors {what}: {', '.join(sorted(names))}")


def load_backbone(module: nn.Module, state: StateDict, source: str, stem: str, leftover: Iterable[str]) -> None:
    """Load ImageNet weights into an encoder of one or three channels.

    Args:
        module: the encoder; changed only if all tensors fit.
        state: names and tensors of the weights.
        source: where ``state`` comes from, for the message.
        stem: name of the first convolution's weight; for one channel it is summed over RGB, equal to repeating the
            channel.
        leftover: prefixes of names that only the classifier has.

    Raises:
        DataError: naming the tensors that are missing, unexpected or of another shape.
    """
    if stem in state and state[stem].shape[1:2] == (3,) and module.state_dict()[stem].shape[1] == 1:
        state = {**state, stem: state[stem].sum(1, keepdim=True)}
    load_state_dict(module, state, source, leftover)


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
