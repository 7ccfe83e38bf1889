"""Runs of several processes: their shares, their buffers and their end."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Sequence
from typing import Any

import torch
from ignite.engine import Events
from monai.engines import Evaluator
from torch import nn

from ..errors import DataError

__all__ = ["ShareBuffers", "check_shares", "leave_process_group"]


def check_shares(cases: Sequence[Any]) -> None:
    """Refuse several processes more than there are cases: each needs one.

    Args:
        cases: of all processes.

    Raises:
        DataError: with both numbers.
    """
    if len(cases) < (processes := torch.distributed.get_world_size()):
        raise DataError(
            f"{len(cases)} cases are fewer than the {processes} processes. Ask torchrun for fewer of these."
        )


class ShareBuffers:
    """Handler of an evaluator that gives all processes the first one's buffers, such as batch statistics, before a run.

    Processes then validate the network that the first one saves, which need not be wrapped in
    ``DistributedDataParallel``: that shares them in each forward, of which a process with more cases makes more, and
    calls without a counterpart may hang.

    Args:
        network: the network in training.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def attach(self, evaluator: Evaluator) -> None:
        """Attach to an evaluator."""
        evaluator.add_event_handler(Events.STARTED, self._share)

    def _share(self) -> None:
        for buffer in self.network.buffers():
            torch.distributed.broadcast(buffer, 0)


def leave_process_group() -> None:
    """Wait for the run's other processes and leave them; gloo's threads then end before the interpreter shuts down.

    ``DistributedDataParallel`` keeps them, and the run, of many references in circles, keeps it. One that frees a
    tensor while the interpreter shuts down may abort its process: torchrun takes a finished training for a failed one.
    """
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    atexit.register(gc.collect)  # not now: the run that calls this still holds its network
