"""What the bundles attach to MONAI's engines beside MONAI's own handlers."""

from __future__ import annotations

from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar as IgniteProgressBar
from ignite.metrics import Frequency, RunningAverage
from ignite.metrics.metric import MetricUsage
from monai.data import set_rnd
from monai.engines import Evaluator, Trainer
from monai.handlers import from_engine
from monai.utils import set_determinism
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ..errors import DataError

__all__ = ["AverageWeights", "EpochSeed", "ProgressBar", "WholeOutput"]


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


class AverageWeights:
    """Handler of a trainer that takes each step's weights into their moving average.

    Args:
        averaged: the average; None does nothing.
        network: the network in training.
    """

    def __init__(self, averaged: AveragedModel | None, network: nn.Module) -> None:
        self.averaged = averaged
        self.network = network

    def attach(self, trainer: Trainer) -> None:
        """Attach to a trainer."""
        if self.averaged is not None:
            trainer.add_event_handler(Events.ITERATION_COMPLETED, self._update)

    def _update(self, trainer: Trainer) -> None:
        assert self.averaged is not None
        self.averaged.update_parameters(self.network)


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
