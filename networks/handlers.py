"""What the bundles attach to MONAI's engines beside MONAI's own handlers."""

from __future__ import annotations

import csv
import logging
import os
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar as IgniteProgressBar
from ignite.metrics import Average, Frequency, RunningAverage
from monai.engines import Evaluator, Trainer
from monai.handlers import from_engine
from torch import nn
from torch.optim import Optimizer

from .files import write_csv

__all__ = ["Checkpoints", "History", "ProgressBar", "ShareBuffers", "read_history"]

logger = logging.getLogger(__name__)


class Checkpoints:
    """Best weights and training state, written whole or not at all, and the way back into a broken-off training.

    After each epoch, ``model.pt`` holds the network's state dict of the best validation so far, and ``last.ckpt`` all
    that training goes on from: network, optimiser, gradient scaler, random state, epoch, best score. (Of every file
    ``*.pt`` there, MONAI Label would offer the shortest name first as a model.) MONAI's
    ``CheckpointSaver`` removes the old best file before it writes the new one and forgets the best score at a restart.

    Args:
        directory: folder of both files.
        network: the network in training.
        optimizer: its optimiser.
        evaluator: the validation engine, whose key metric decides.
        resume: start from ``last.ckpt``.

    Raises:
        ValueError: when ``resume`` is no truth value: on a command line, ``false`` is a text, and texts are true.
        FileNotFoundError: at the start of a resumed training without ``last.ckpt``.
    """

    def __init__(
        self,
        directory: str | Path,
        network: nn.Module,
        optimizer: Optimizer,
        evaluator: Evaluator,
        resume: bool = False,
    ) -> None:
        if not isinstance(resume, bool):
            raise ValueError(f"resume is True or False, got {resume!r}.")
        self.directory = Path(directory)
        self.network = getattr(network, "module", network)  # without DistributedDataParallel's prefix
        self.optimizer = optimizer
        self.evaluator = evaluator
        self.resume = resume

    def attach(self, trainer: Trainer) -> None:
        """Attach to a trainer, after its ``ValidationHandler``."""
        if self.resume:
            trainer.add_event_handler(Events.STARTED, self.restore)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self.save)
        trainer.add_event_handler(Events.COMPLETED, self.ensure)

    def ensure(self, trainer: Trainer) -> None:
        """Write ``model.pt`` at the end of a training that was too short to be validated, or had nothing to score."""
        if trainer.state.rank == 0 and self.evaluator.state.best_metric_epoch < 1:
            self._write_model()
            logger.warning("no epoch was validated: model.pt holds the last one.")

    def save(self, trainer: Trainer) -> None:
        """Write ``last.ckpt``, and ``model.pt`` when this epoch's validation is the best."""
        if trainer.state.rank != 0:
            return
        best = self.evaluator.state
        if best.best_metric_epoch == trainer.state.epoch:
            self._write_model()
            logger.info(f"epoch {trainer.state.epoch}: best {best.key_metric_name} {best.best_metric:.4f}")
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "trainer": trainer.state_dict(),
            "best": {"best_metric": float(best.best_metric), "best_metric_epoch": int(best.best_metric_epoch)},
            "random": torch.get_rng_state(),
        }
        if trainer.scaler is not None:
            state["scaler"] = trainer.scaler.state_dict()
        self._write("last.ckpt", state)

    def restore(self, trainer: Trainer) -> None:
        """Take up the state of ``last.ckpt``."""
        path = self.directory / "last.ckpt"
        if not path.is_file():
            raise FileNotFoundError(f"Nothing to resume: no {path}. Train without --resume first.")
        state = torch.load(path, map_location="cpu", weights_only=True)
        epochs = trainer.state.max_epochs
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        trainer.load_state_dict(state["trainer"])
        trainer.state.max_epochs = epochs
        if trainer.scaler is not None and "scaler" in state:
            trainer.scaler.load_state_dict(state["scaler"])
        for name, value in state["best"].items():
            setattr(self.evaluator.state, name, value)
        torch.set_rng_state(state["random"])
        best = state["best"]
        logger.info(f"resumed after epoch {trainer.state.epoch} of {epochs}, best score {best['best_metric']:.4f}")
        if trainer.state.epoch >= epochs:
            logger.warning(f"{path} has all of {epochs} epochs: nothing to train. Ask for more with --epochs.")
            trainer.terminate()

    def _write_model(self) -> None:
        # From the CPU: exports and MONAI Label load it without saying where to, on machines without a GPU too.
        self._write("model.pt", {name: tensor.cpu() for name, tensor in self.network.state_dict().items()})

    def _write(self, name: str, state: Any) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        partial = self.directory / f".{name}.partial"
        try:
            torch.save(state, partial)
            os.replace(partial, self.directory / name)
        finally:
            partial.unlink(missing_ok=True)


class ProgressBar:
    """A progress bar per epoch with the loss, the last validation's key metric and slices per second.

    Args:
        evaluator: the validation engine.
        every: iterations between updates, and there is one at an epoch's end; each reads the loss from the device.
    """

    def __init__(self, evaluator: Evaluator, every: int = 10) -> None:
        self.evaluator = evaluator
        self.every = every

    def attach(self, trainer: Trainer) -> None:
        """Attach to a trainer, after its ``ValidationHandler``. Only the first process shows the bar."""
        RunningAverage(output_transform=from_engine(["loss"], first=True)).attach(trainer, "loss")
        Frequency(output_transform=len).attach(trainer, "slices/s", Events.ITERATION_COMPLETED)
        trainer.state.metrics["dice"] = float("nan")  # none yet
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._note_score)
        if trainer.state.rank == 0:
            bar = IgniteProgressBar(persist=True, desc="Epoch")
            bar.attach(
                trainer,
                metric_names=["loss", "dice", "slices/s"],
                event_name=Events.ITERATION_COMPLETED(event_filter=self._is_due),
                closing_event_name=Events.EPOCH_COMPLETED,
            )

    def _is_due(self, trainer: Engine, iteration: int) -> bool:
        return iteration % self.every == 0 or iteration % (trainer.state.epoch_length or 1) == 0

    def _note_score(self, trainer: Engine) -> None:
        state = self.evaluator.state
        if state.key_metric_name in state.metrics:
            trainer.state.metrics["dice"] = state.metrics[state.key_metric_name]


class History:
    """Handler of a trainer that keeps ``history.csv``: epoch, mean loss, validation score, learning rate.

    Args:
        output_dir: where to write. A resumed training goes on in the same file.
        optimizer: the network's optimiser.
        evaluator: the validation engine, whose key metric is the score.
    """

    columns = ("epoch", "loss", "score", "learning_rate")

    def __init__(self, output_dir: str | Path, optimizer: Optimizer, evaluator: Evaluator) -> None:
        self.path = Path(output_dir) / "history.csv"
        self.optimizer = optimizer
        self.evaluator = evaluator
        self.rows: list[dict[str, str]] = []

    def attach(self, trainer: Trainer) -> None:
        """Attach to a trainer, after its ``ValidationHandler`` and whatever resumes it."""
        Average(output_transform=from_engine(["loss"], first=True)).attach(trainer, "mean_loss")
        if trainer.state.rank == 0:
            trainer.add_event_handler(Events.STARTED, self._take_up)
            trainer.add_event_handler(Events.EPOCH_COMPLETED, self._note)

    def _take_up(self, trainer: Trainer) -> None:
        before = read_history(self.path) if trainer.state.epoch else []
        self.rows = [row for row in before if int(row["epoch"]) <= trainer.state.epoch]

    def _note(self, trainer: Trainer) -> None:
        state = self.evaluator.state
        validated = state.epoch == trainer.state.epoch and state.key_metric_name in state.metrics
        row = {
            "epoch": str(trainer.state.epoch),
            "loss": f"{float(trainer.state.metrics['mean_loss']):.6f}",
            "score": f"{state.metrics[state.key_metric_name]:.6f}" if validated else "",
            "learning_rate": f"{self.optimizer.param_groups[0]['lr']:.3g}",
        }
        self.rows.append(row)
        write_csv(self.path, self.columns, [[row[c] for c in self.columns] for row in self.rows])


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


def read_history(path: Path) -> list[dict[str, str]]:
    """Rows of a ``history.csv``; none where there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
