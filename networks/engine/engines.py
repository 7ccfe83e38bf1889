"""A network run on a CPU by another library than PyTorch: OpenVINO or ONNX Runtime."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, WriteError, check_option
from ..exports import ExportedNetwork
from ..storage import whole_file

__all__ = ["ENGINES", "EngineNetwork", "in_engine"]

logger = logging.getLogger(__name__)

ENGINES = ("torch", "openvino", "onnxruntime")
OPSET = 20  # the newest of the exporter below


def in_engine(network: nn.Module, engine: str, weights: str | Path, bfloat16: bool | None = None) -> nn.Module:
    """What runs a network on a CPU.

    Args:
        network: with its weights, as constructed.
        engine: ``torch``, ``openvino`` or ``onnxruntime``.
        weights: the file that they came from, beside which the converted network is kept.
        bfloat16: True computes in that type, by OpenVINO; anything else in fp32.

    Returns:
        The network itself for ``torch``, else an :class:`EngineNetwork`.

    Raises:
        DataError: for an unknown engine, one that is not installed or lacks bfloat16, or a network that is exported or
            compiled already.
    """
    check_option("engine", engine, ENGINES)
    return network if engine == "torch" else EngineNetwork(network, engine, Path(weights), bool(bfloat16))


class EngineNetwork(nn.Module):
    """A network whose forward pass is an engine's, with as many threads as PyTorch has.

    The engines read ONNX, and so will others. Each size of slices is converted once, with a free size of batch, when it
    is first seen; the file is kept beside the weights or, where that cannot be written, in the user's cache. Its name
    has a hash of all that it was made from: the values of the weights, and the code. No other file is ever read.

    Args:
        network: with its weights.
        engine: ``openvino`` or ``onnxruntime``.
        weights: their file, which gives the name and the folder.
        bfloat16: compute in that type, by OpenVINO. Without it OpenVINO is held to fp32, which it leaves by itself.

    Shape:
        ``B, C, H, W`` of floats, on a CPU, to logits ``B, classes, H, W`` in fp32.

    Raises:
        DataError: when the engine is not installed or lacks bfloat16, or the network is exported or compiled
            already; in forward when the slices are on a GPU, the network is in training mode, a kept file is damaged,
            or no folder can be written.
    """

    def __init__(self, network: nn.Module, engine: str, weights: Path, bfloat16: bool) -> None:
        super().__init__()
        if isinstance(network, (torch.jit.ScriptModule, ExportedNetwork)):
            raise DataError(
                f"An exported network runs by itself alone: leave out either its config or engine {engine}."
            )
        if getattr(network, "_compiled_call_impl", None) is not None:  # nn.Module.compile() leaves no public trace
            raise DataError(f"A network that torch compiles cannot be converted: leave out either compile or {engine}.")
        if bfloat16 and engine == "onnxruntime":
            raise DataError(
                "ONNX Runtime computes in fp32 alone on a CPU: leave out bfloat16, or choose the engine openvino."
            )
        self.network = network
        self.weights = weights
        self.precision = "bf16" if bfloat16 else "f32"  # the hint's words; without one OpenVINO chooses by itself
        self.open = {"openvino": self._open_openvino, "onnxruntime": self._open_onnxruntime}[engine]
        _check_installed(engine, engine)
        self.engine = engine
        self.opened: dict[tuple[int, ...], Callable[[Any], Any]] = {}
        self.train(network.training)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            raise DataError(
                f"The engine {self.engine} runs on a CPU, and the slices are on {x.device}: choose device cpu."
            )
        if self.network.training:
            raise DataError("The network is in training mode, and would be converted as such: call its eval() first.")
        shape = tuple(x.shape[1:])
        if shape not in self.opened:
            file = self._file(shape)
            try:
                self.opened[shape] = self.open(file)
            except Exception as error:  # each library has its own
                raise DataError(
                    f"{self.engine} cannot read {file}: remove it, and it is made anew. ({error})"
                ) from error
        return torch.from_numpy(self.opened[shape](x.float().contiguous().numpy()))

    def _open_openvino(self, file: Path) -> Callable[[Any], Any]:
        settings = {
            "INFERENCE_PRECISION_HINT": self.precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # each of several processes would take the same cores
        }
        compiled = import_module("openvino").Core().compile_model(file, "CPU", settings)
        return lambda x: compiled(x)[0]

    def _open_onnxruntime(self, file: Path) -> Callable[[Any], Any]:
        library = import_module("onnxruntime")
        options = library.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = library.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return lambda x: session.run(None, {"image": x})[0]

    def _file(self, shape: tuple[int, ...]) -> Path:
        """The converted network for slices ``C, H, W``, made where it is missing."""
        channels, height, width = shape
        name = f"{self.weights.stem}-{channels}x{height}x{width}-{_fingerprint(self.network)}.onnx"
        places = [self.weights.parent / name, _cache() / name]
        for file in places:
            if file.is_file():
                logger.info(f"network for {self.engine}: {file}")
                return file
        start = time.perf_counter()
        converted = _converted(self.network, shape, self.engine)
        for file in places:
            try:
                with whole_file(file) as partial:
                    Path(partial).write_bytes(converted)
            except WriteError as error:
                reason = error
                continue
            logger.info(f"network converted for {self.engine} in {time.perf_counter() - start:.0f} s: {file}")
            if file == places[0]:
                _remove_others(file)
            return file
        raise DataError(
            f"The converted network can be kept neither in {places[0].parent} nor in {places[1].parent} "
            f"({reason.strerror}): name a folder that can be written by XDG_CACHE_HOME, or choose the engine torch."
        )


def _check_installed(name: str, engine: str) -> None:
    """Without loading it: a loader's workers, forked from a process that has OpenVINO loaded, may wait for ever."""
    if find_spec(name) is None:
        raise DataError(
            f"The engine {engine} is not installed: pip install {engine} onnx, or choose the engine torch. "
            f"({name} is missing)"
        )


def _converted(network: nn.Module, shape: tuple[int, ...], engine: str) -> bytes:
    """A network in eval mode as ONNX, for batches of any size of slices ``C, H, W``."""
    _check_installed("onnx", engine)  # torch's exporter needs it
    file: Any = io.BytesIO()
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each size that the network looks at is a warning; the slices' are fixed
        torch.onnx.export(
            network,
            (torch.rand(2, *shape),),
            file,
            dynamo=False,  # torch's newer exporter takes minutes for the slices of the dilated attention, not seconds
            opset_version=OPSET,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        )
    return file.getvalue()


def _fingerprint(network: nn.Module) -> str:
    """A hash of the values of a network's weights, and of the code that it is made of and converted by."""
    digest = hashlib.sha256(f"{network} {torch.__version__} {OPSET}".encode())
    sources = {getattr(sys.modules[type(module).__module__], "__file__", None) for module in network.modules()}
    for source in sorted(filter(None, sources)):
        digest.update(_code(source))
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@cache
def _code(source: str) -> bytes:
    """A file of code, as it was when it was first asked for: what was imported does not change with its file."""
    return Path(source).read_bytes()


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "fias-danie"


def _remove_others(file: Path) -> None:
    """Files of the same name and size that other weights left there: a training would leave one each time."""
    for other in file.parent.glob(f"{file.stem.rpartition('-')[0]}-*.onnx"):
        if other != file:
            with suppress(OSError):
                other.unlink()
