"""What the bundles attach to MONAI's engines beside MONAI's own handlers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from ignite.handlers import ProgressBar as IgniteProgressBar
from ignite.metrics import Frequency, RunningAverage
from ignite.metrics.metric import MetricUsage
from monai.data import set_rnd
from monai.engines import Evaluator, Trainer
from monai.handlers import from_engine
from monai.utils import set_determinism
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..errors import DataError

__all__ = ["EMA", "EpochSeed", "ProgressBar", "WholeOutput"]


class EpochSeed:
    """Handler of a trainer that makes all that an epoch draws a function of seed, epoch and process.

    The order of slices, augmentation, dropout and Monte Carlo attention are the same in each run, and in one that goes
    on from a checkpoint, which so needs no random state.

    Args:
        seed: 0 or greater.

    Raises:
        DataError: when ``seed`` is no such number.
    """

    def __init__(self, seed: int) -> None:
        if not isinstance(seed, int) or seed < 0:
            raise DataError(f"seed is a whole number from 0 up, got {seed!r}.")
        self.seed = seed

    def attach(self, trainer: Trainer) -> None:
        """Attach to a trainer."""
        trainer.add_event_handler(Events.EPOCH_STARTED, self._start)

    def _start(self, trainer: Trainer) -> None:
        drawn = np.random.SeedSequence((self.seed, trainer.state.epoch, trainer.state.rank)).generate_state(1)
        set_determinism(int(drawn[0]))  # workers and sampler draw theirs from torch's
        set_rnd(getattr(trainer.data_loader, "dataset", None), int(drawn[0]))


class EMA(EMAHandler):
    """ignite's moving average of weights and buffers, all tensors at once instead of two kernels for each.

    After each step ``average = (1 - momentum) * average + momentum * network``; buffers of whole numbers are copied.
    The networks here have hundreds of small tensors: for DANIE-S, a step's update is 89 operations instead of 2708.

    Args:
        model: the network that is trained; its average is ``ema_model``.
        momentum: above 0 and below 1.

    Raises:
        ValueError: when ``momentum`` is not.
    """

    def __init__(self, model: nn.Module, momentum: float) -> None:
        super().__init__(model, momentum, handle_buffers="update")
        average, current = ([*net.parameters(), *net.buffers()] for net in (self.ema_model, self.model))
        pairs = list(zip(average, current, strict=True))
        self._weighed = tuple(zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True))
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def _update_ema_model(self, engine: Engine, name: str) -> None:
        get_ema_multi_avg_fn(1 - getattr(engine.state, name))(*self._weighed, 0)
        for average, current in self._copied:
            average.copy_(current)


class _Speed(Frequency):
    """ignite's frequency to a tenth: its whole numbers are 0 or 1 on many a CPU."""

    def completed(self, engine: Engine, name: str) -> None:
        engine.state.metrics[name] = round(self.compute(), 1)


class ProgressBar:
    """A progress bar per epoch with the loss, the last validation's key metric and slices per second.

    Args:
        evaluator: the validation engine.
        every: iterations between updates, and there is one at an epoch's end. No other reads the loss from the device;
            what is shown is a running average of those read.
    """

    def __init__(self, evaluator: Evaluator, every: int = 10) -> None:
        self.evaluator = evaluator
        self.every = every

    def attach(self, trainer: Trainer) -> None:
        """Attach to a trainer, after its ``ValidationHandler``. Only the first process shows the bar."""
        due: Any = Events.ITERATION_COMPLETED(event_filter=self._is_due)
        loss = RunningAverage(alpha=0.9, output_transform=from_engine(["loss"], first=True))
        loss.attach(trainer, "loss", MetricUsage(Events.STARTED, due, due))
        _Speed(lambda output: len(output[0]["image"])).attach(trainer, "slices/s", due)
        trainer.state.metrics["dice"] = float("nan")  # none yet
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._note_score)
        if trainer.state.rank == 0:
            bar = IgniteProgressBar(persist=True, desc="Epoch")
            bar.attach(
                trainer,
                metric_names=["loss", "dice", "slices/s"],
                event_name=due,
                closing_event_name=Events.EPOCH_COMPLETED,
            )

    def _is_due(self, trainer: Engine, iteration: int) -> bool:
        return iteration % self.every == 0 or iteration % (trainer.state.epoch_length or 1) == 0

    def _note_score(self, trainer: Engine) -> None:
        state = self.evaluator.state
        if state.key_metric_name in state.metrics:
            trainer.state.metrics["dice"] = state.metrics[state.key_metric_name]


class WholeOutput:
    """Handler of a trainer with ``decollate=False`` that puts each step's output, a dictionary, into a list of its own.

    So other handlers find in it what they find in MONAI's list of one dictionary per slice, by
    ``from_engine(..., first=True)``. To make that, MONAI reads the loss from the device in each step, and a GPU that is
    waited for runs dry.
    """

    def attach(self, trainer: Trainer) -> None:
        """Attach to a trainer, before all that reads its output."""
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._wrap)

    def _wrap(self, trainer: Trainer) -> None:
        trainer.state.output = [trainer.state.output]
