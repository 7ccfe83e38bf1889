"""What the bundles attach to MONAI's engines beside MONAI's own handlers."""

from __future__ import annotations

import csv
import json
import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from ignite.handlers import ProgressBar as IgniteProgressBar
from ignite.metrics import Average, Frequency, RunningAverage
from ignite.metrics.metric import MetricUsage
from monai.data import set_rnd
from monai.engines import Evaluator, Trainer
from monai.handlers import from_engine
from monai.utils import set_determinism
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .errors import DataError
from .files import whole_file, write_csv
from .trained_for import differences, plain_values, trained_values
from .weights import load_state_dict, read_tensors

__all__ = ["EMA", "Checkpoints", "EpochSeed", "History", "ProgressBar", "ShareBuffers", "WholeOutput", "read_history"]

logger = logging.getLogger(__name__)


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


class Checkpoints:
    """Best weights and training state, written whole or not at all, and the way back into a broken-off training.

    After each epoch, ``model.pt`` holds the network's state dict of the best validation so far, ``model.json`` the
    values that it was trained for (:mod:`networks.trained_for`), and ``last.ckpt`` all that training goes on from:
    network, averaged network, optimiser, gradient scaler, schedule, epoch, best score. It is written after a run's
    first and last epoch and each best one, after others so often that it takes at most a twentieth of the time. (Of
    every file ``*.pt`` there, MONAI Label would offer the shortest name first as a model.)
    MONAI's ``CheckpointSaver`` removes the old best file before it writes the new one and forgets the best score at a
    restart.

    With :class:`EpochSeed`, a training killed at any moment and resumed ends as an unbroken one: on a CPU with as many
    threads bit for bit. A new training keeps the ``model.pt`` and ``model.json`` that it finds as ``.previous``,
    or those that a release was shipped with as ``pretrained.pt`` and ``pretrained.json``.

    Args:
        directory: folder of the files.
        network: the network in training.
        optimizer: its optimiser.
        evaluator: the validation engine, whose key metric decides.
        resume: start from ``last.ckpt``.
        averaged: a network of averaged weights, such as :class:`EMA` keeps; ``model.pt`` is of it then, and
            ``last.ckpt`` has both.
        schedule: of the learning rate, a function of the step as ``LambdaLR`` and MONAI's are. A resumed training goes
            on at its step, towards the end that the config says then.
        values: what the network is trained for: its arguments and what it sees. Without them there is no
            ``model.json``, as the log says, and nothing can tell later whether the weights are used rightly.

    Raises:
        DataError: when the evaluator validates another network than is saved, or ``resume`` is no truth value: on a
            command line, ``false`` is a text, and texts are true. At the start of a resumed training, when
            ``last.ckpt`` is unreadable, of another network, of other data, or of a training by other config files,
            values, learning rate or weight decay. After an epoch that left weights that are not finite.
        FileNotFoundError: at the start of a resumed training without ``last.ckpt``.
    """

    def __init__(
        self,
        directory: str | Path,
        network: nn.Module,
        optimizer: Optimizer,
        evaluator: Evaluator,
        resume: bool = False,
        averaged: nn.Module | None = None,
        schedule: LRScheduler | None = None,
        values: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(resume, bool):
            raise DataError(f"resume is True or False, got {resume!r}.")
        self.directory = Path(directory)
        self.network = getattr(network, "module", network)  # without DistributedDataParallel's prefix
        self.optimizer = optimizer
        self.evaluator = evaluator
        self.resume = resume
        self.averaged = averaged
        self.schedule = schedule
        self.values = None if values is None else plain_values({"network": type(self.network).__name__, **values})
        self.due = time.monotonic()  # when last.ckpt is to be written again
        validated = getattr(evaluator, "network", self.network)
        if validated is not (averaged or self.network):
            raise DataError(
                "The evaluator validates another network than model.pt will hold: where config files change either, "
                "name multi_gpu_train.json before the recipe."
            )

    def attach(self, trainer: Trainer) -> None:
        """Attach to a trainer, after its ``ValidationHandler`` and what else ends an epoch: it is saved complete."""
        trainer.add_event_handler(Events.STARTED, self.clear)
        trainer.add_event_handler(Events.STARTED, self.restore if self.resume else self.keep_previous)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self.save)
        trainer.add_event_handler(Events.COMPLETED, self.ensure)

    def clear(self, trainer: Trainer) -> None:
        """Remove what a training that was killed while it wrote left half."""
        if trainer.state.rank == 0:
            for partial in self.directory.glob(".partial-*"):
                partial.unlink()

    def keep_previous(self, trainer: Trainer) -> None:
        """Copy ``model.pt`` and ``model.json`` of an earlier training to ``.previous``, rename its ``last.ckpt``.

        Those that a release was shipped with are copied to ``pretrained.pt`` and ``pretrained.json``. Without the new
        name, a training that is broken off in its first epoch would be resumed as the earlier one.
        """
        if trainer.state.rank != 0:
            return
        last = self.directory / "last.ckpt"
        if last.is_file():
            last.replace(f"{last}.previous")
        shipped = "shipped" in trained_values(self.directory / "model.pt")
        for file in (self.directory / "model.pt", self.directory / "model.json"):
            if file.is_file():
                kept = file.with_stem("pretrained") if shipped else Path(f"{file}.previous")
                with whole_file(kept) as name:
                    shutil.copyfile(file, name)
                logger.warning(f"{file} will be replaced by this training's: a copy is {kept}.")

    def ensure(self, trainer: Trainer) -> None:
        """Write ``model.pt`` at the end of a training that was too short to be validated, or had nothing to score."""
        if trainer.state.rank == 0 and self.evaluator.state.best_metric_epoch < 1:
            self._write_model()
            logger.warning("no epoch was validated: model.pt holds the last one.")

    def save(self, trainer: Trainer) -> None:
        """Write ``model.pt`` when this epoch's validation is the best, and ``last.ckpt`` when it is due.

        Weights that are not finite are not written.
        """
        if trainer.state.rank != 0:
            return
        if spoilt := [name for name, tensor in self.network.state_dict().items() if not tensor.isfinite().all()]:
            raise DataError(
                f"After epoch {trainer.state.epoch} weights are not finite: {spoilt[0]} and {len(spoilt) - 1} others. "
                f"{self.directory} keeps what it held before. Train with a lower learning_rate, or without compile, "
                "amp or bfloat16."
            )
        best = self.evaluator.state
        epoch, start = trainer.state.epoch, time.monotonic()
        if best.best_metric_epoch == epoch:
            self._write_model()
            logger.info(f"epoch {epoch}: best {best.key_metric_name} {best.best_metric:.4f}")
        elif epoch != trainer.state.max_epochs and start < self.due:
            return
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "trainer": trainer.state_dict(),
            "best": {"best_metric": float(best.best_metric), "best_metric_epoch": int(best.best_metric_epoch)},
            "values": self.values or {},
        }
        if trainer.scaler is not None:
            state["scaler"] = trainer.scaler.state_dict()
        if self.averaged is not None:
            state["averaged"] = self.averaged.state_dict()
        if self.schedule is not None:
            state["schedule"] = self.schedule.last_epoch  # torch's name, of steps too
        self._write("last.ckpt", state)
        end = time.monotonic()
        self.due = end + 19 * (end - start)

    def restore(self, trainer: Trainer) -> None:
        """Take up the state of ``last.ckpt``."""
        path, model = self.directory / "last.ckpt", self.directory / "model.pt"
        if not path.is_file():
            raise FileNotFoundError(f"Nothing to resume: no {path}. Train without --resume first.")
        state: Any = read_tensors(path)
        if not isinstance(state, dict) or not {"network", "optimizer", "trainer", "best"} <= state.keys():
            raise DataError(f"{path} holds no state of a training. Train without --resume.")
        epochs, length = trainer.state.max_epochs, trainer.state.epoch_length
        if state["trainer"]["epoch_length"] != length:
            raise DataError(
                f"{path} comes from a training of {state['trainer']['epoch_length']} batches an epoch, this one has "
                f"{length}. Resume with the same data and batch_size, or start anew with --start_from {model}."
            )
        if other := differences(state.get("values", {}), self.values or {}):
            raise DataError(f"{path} comes from a training with other values. Resume with {other}.")
        for name, present in {"averaged": self.averaged is not None, "schedule": self.schedule is not None}.items():
            if (name in state) != present:
                raise DataError(
                    f"{path} comes from a training {'with' if name in state else 'without'} {name} "
                    f"{'weights' if name == 'averaged' else 'learning rate'}. Resume with the same config files."
                )
        load_state_dict(self.network, state["network"], source=str(path))
        for group, own in zip(state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=True):
            group["fused"] = own.get("fused")  # how, not what: the gradient scaler asked this optimiser
            for name in ("lr" if self.schedule is None else "initial_lr", "weight_decay"):
                if own.get(name) != group.get(name):
                    raise DataError(
                        f"{path} comes from a training with {name} {group.get(name)}, this one has {own.get(name)}. "
                        f"Resume with the same, or start anew with --start_from {model}."
                    )
        self.optimizer.load_state_dict(state["optimizer"])
        trainer.load_state_dict(state["trainer"])
        trainer.state.max_epochs = epochs
        if trainer.scaler is not None and "scaler" in state:
            trainer.scaler.load_state_dict(state["scaler"])
        if self.averaged is not None:
            load_state_dict(self.averaged, state["averaged"], source=str(path))
        if self.schedule is not None:
            self.schedule.last_epoch = state["schedule"]
        for name, value in state["best"].items():
            setattr(self.evaluator.state, name, value)
        best = state["best"]
        logger.info(f"resumed after epoch {trainer.state.epoch} of {epochs}, best score {best['best_metric']:.4f}")
        if trainer.state.epoch >= epochs:
            logger.warning(f"{path} has all of {epochs} epochs: nothing to train. Ask for more with --epochs.")
            trainer.terminate()

    def _write_model(self) -> None:
        # From the CPU: exports and MONAI Label load it without saying where to, on machines without a GPU too.
        network = self.network if self.averaged is None else self.averaged
        self._write("model.pt", {name: tensor.cpu() for name, tensor in network.state_dict().items()})
        record = self.directory / "model.json"
        if self.values is None:
            record.unlink(missing_ok=True)  # of an earlier training
            logger.warning(f"no {record}: nothing told what these weights are trained for (Checkpoints got no values).")
            return
        with whole_file(record) as partial:
            Path(partial).write_text(json.dumps(self.values, indent=4) + "\n", encoding="utf-8")

    def _write(self, name: str, state: Any) -> None:
        with whole_file(self.directory / name) as partial, open(partial, "wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # torch tells of a full disk as of a wrong position
                raise error.__context__ if isinstance(error.__context__, OSError) else error


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

    def attach(self, trainer: Trainer) -> None:
        """Attach to a trainer, after its ``ValidationHandler`` and before :class:`Checkpoints`."""
        Average(from_engine(["loss"], first=True), trainer.state.device).attach(trainer, "mean_loss")
        if trainer.state.rank == 0:
            trainer.add_event_handler(Events.EPOCH_COMPLETED, self._note)

    def _note(self, trainer: Trainer) -> None:
        state = self.evaluator.state
        validated = state.epoch == trainer.state.epoch and state.key_metric_name in state.metrics
        row = {
            "epoch": str(trainer.state.epoch),
            "loss": f"{float(trainer.state.metrics['mean_loss']):.6f}",
            "score": f"{state.metrics[state.key_metric_name]:.6f}" if validated else "",
            "learning_rate": f"{self.optimizer.param_groups[0]['lr']:.3g}",
        }
        # A training killed after this and before its checkpoint does the epoch again.
        before = [row for row in read_history(self.path) if int(row["epoch"]) < trainer.state.epoch]
        write_csv(self.path, self.columns, [[row[c] for c in self.columns] for row in (*before, row)])


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


def read_history(path: Path) -> list[dict[str, str]]:
    """Rows of a ``history.csv``; none where there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
