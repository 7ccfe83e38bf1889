"""Best weights and training state on disk, and the way back into a broken-off training."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from monai.engines import Evaluator, Trainer
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from ..errors import DataError
from ..storage import whole_file
from ..trained_for import differences, plain_values, trained_values
from ..weights import load_state_dict, read_tensors

__all__ = ["Checkpoints"]

logger = logging.getLogger(__name__)


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
        averaged: the moving average of the network's weights, where there is one; ``model.pt`` is of it then, and
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
        averaged: AveragedModel | None = None,
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
        if validated is not (self.network if averaged is None else averaged.module):
            raise DataError("The evaluator validates another network than model.pt will hold.")

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
            state["averaged"] = self.averaged.module.state_dict()
            state["averaged_steps"] = int(self.averaged.n_averaged)
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
            load_state_dict(self.averaged.module, state["averaged"], source=str(path))
            self.averaged.n_averaged.fill_(state.get("averaged_steps", 1))  # which older files lack
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
        network = self.network if self.averaged is None else self.averaged.module
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
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
